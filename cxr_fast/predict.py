"""Files in, probabilities out, from the ONNX file alone: no torch, no pandas, no h5py in the process."""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, timing
from .config import PreprocessSpec, from_dict
from .devices import onnxruntime
from .errors import ImageError, InputError
from .preprocess import IMAGE_SUFFIXES, array_pixels, load
from .session import open_model

BATCH = 8
ROUNDING = 1e-6  # of float32 sums in a calibration


@dataclass(frozen=True, kw_only=True)
class Result:
    """One image's answer: probabilities (C,), or a reason code and message."""

    path: str
    probabilities: np.ndarray | None = field(default=None, repr=False)
    reason: str = ""
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether there are probabilities."""
        return self.probabilities is not None


class Predictor:
    """A model file ready to run: `Predictor("model.onnx")(["a.png", array]) -> [{label: probability}, ...]`.

    `path` may be a folder of variants (`exports/RUN`): the one this device runs best is taken. `device` is `auto`,
    `cpu`, `cuda[:N]` or `tensorrt[:N]`, `threads` defaults to the cores this process may use; `where` says what runs
    it and `why` the reason. Threads may share one predictor. Raises InputError for a file that is not ours or is
    damaged, SchemaError for one of another schema, DeviceError when an explicit device cannot be had or does not run
    the file. `spin`, `strict` and `check` are those of `session.open_model`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: str = "auto",
        threads: int | None = None,
        *,
        spin: bool = True,
        strict: bool = True,
        check: bool = True,
    ) -> None:
        opened = open_model(path, device, threads, spin=spin, strict=strict, check=check)
        self.path, self.session, self.threads = opened.path, opened.session, opened.threads
        self.provider, self.where, self.why = opened.provider, opened.where, opened.why
        self.info = opened.info
        self.labels: tuple[str, ...] = tuple(self.info["labels"])
        self.thresholds = np.array(self.info["thresholds"], np.float64)
        self.spec = from_dict(PreprocessSpec, self.info["preprocess"])

    @property
    def warning(self) -> str:
        """What must be said beside every figure of this model, such as `random backbone`; empty for a real one."""
        return str(self.info.get("provenance", ""))

    def pixels(self, image: str | os.PathLike[str] | np.ndarray) -> np.ndarray:
        """uint8 (S, S) as the model wants them, by the same code that made the training pixels."""
        if isinstance(image, np.ndarray):
            return array_pixels(image, self.spec)
        return load(image, self.spec)[0]

    def run(self, pixels: np.ndarray, *, output: str = "probabilities") -> np.ndarray:
        """uint8 (N, S, S) to probabilities, or another of the graph's outputs, (N, C) float32."""
        try:
            out: np.ndarray = self.session.run([output], {"pixels": pixels})[0]
        except Exception as error:  # onnxruntime raises its own classes, all straight from Exception
            text = " ".join(str(error).split())[:160]
            raise InputError(f"{self.path}: the model does not run on {len(pixels)} image(s) ({text}).") from error
        return out

    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        """`run`, with InputError where the answer is not a row of probabilities an image."""
        out, count = self.run(pixels), len(pixels)
        if out.shape != (count, len(self.labels)):
            raise InputError(f"{self.path}: the model answers {out.shape} for {count} x {len(self.labels)} classes.")
        if not (np.isfinite(out).all() and out.min(initial=0) >= -ROUNDING and out.max(initial=0) <= 1 + ROUNDING):
            raise InputError(f"{self.path}: the model answers what is no probability (NaN, or outside 0..1).")
        return out

    def __call__(self, images: Sequence[str | os.PathLike[str] | np.ndarray]) -> list[dict[str, float]]:
        """One {label: probability} an image. Raises ImageError at the first that cannot be read."""
        out: list[dict[str, float]] = []
        for start in range(0, len(images), BATCH):
            batch = np.stack([self.pixels(image) for image in images[start : start + BATCH]])
            out += [dict(zip(self.labels, map(float, row), strict=True)) for row in self.probabilities(batch)]
        return out

    def stream(
        self, paths: Iterable[str | os.PathLike[str]], *, batch_size: int = BATCH, workers: int | None = None
    ) -> Iterator[Result]:
        """Results in input order; decoding runs ahead by a few batches only, so memory stays flat."""
        with ThreadPoolExecutor(workers or timing.cpu_count()) as pool:
            pending: deque[tuple[str, Future[np.ndarray | ImageError]]] = deque()
            upcoming = iter(paths)
            try:
                while True:
                    while len(pending) < 3 * batch_size and (path := next(upcoming, None)) is not None:
                        pending.append((os.fspath(path), pool.submit(self._decode, path)))
                    if not pending:
                        return
                    batch = [pending.popleft() for _ in range(min(batch_size, len(pending)))]
                    yield from self._answer([(path, future.result()) for path, future in batch])
            finally:
                for _, future in pending:
                    future.cancel()

    def _decode(self, path: str | os.PathLike[str]) -> np.ndarray | ImageError:
        try:
            return self.pixels(path)
        except ImageError as error:
            return error

    def _answer(self, batch: list[tuple[str, np.ndarray | ImageError]]) -> list[Result]:
        good = [pixels for _, pixels in batch if isinstance(pixels, np.ndarray)]
        rows = iter(self.probabilities(np.stack(good)) if good else ())
        return [
            Result(path=path, reason=found.reason, message=str(found))
            if isinstance(found, ImageError)
            else Result(path=path, probabilities=next(rows))
            for path, found in batch
        ]


def golden_pixels(size: int) -> np.ndarray:
    """The input of the golden pair, (1, S, S) uint8: (7 i + 13 j + i j // 16) mod 256 at row i, column j."""
    i, j = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    return ((7 * i + 13 * j + i * j // 16) % 256).astype(np.uint8)[None]


def expand(inputs: Iterable[str]) -> list[str]:
    """Files, folders (recursive, image suffixes only) and globs to a list of paths, in order, each once.

    A named file is taken whatever its suffix, and need not exist: it then becomes a row that says so.
    """
    found: list[str] = []
    for item in inputs:
        if not item:
            raise InputError("one of the inputs is empty: a shell variable without a value?")
        path = Path(item)
        if path.is_dir():
            inside = [p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
            if not inside:
                raise InputError(f"{item}: a folder without images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
            found += [str(p) for p in sorted(inside)]
        elif not path.exists() and glob.has_magic(item):
            matched = sorted(p for p in glob.glob(item, recursive=True) if os.path.isfile(p))
            if not matched:
                raise InputError(f"{item}: matches no file.")
            found += matched
        else:
            found.append(item)
    return list(dict.fromkeys(found))


def write_csv(
    predictor: Predictor,
    paths: Sequence[str],
    out: Path,
    *,
    batch_size: int = BATCH,
    workers: int | None = None,
    decide: bool = False,
    on_result: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Predict `paths` into a CSV (path, status, reason, one probability a class) and `NAME.run.json` beside it.

    The file appears under its name when complete. Returns the counts and times that the JSON holds.
    """
    if out.is_dir():
        raise InputError(f"--out: {out} is a folder; give the name of a CSV file.")
    if out.exists() and any(os.path.exists(path) and out.samefile(path) for path in paths):
        raise InputError(f"--out: {out} is one of the images; give the name of a CSV file.")
    if out.exists() and out.samefile(predictor.path):
        raise InputError(f"--out: {out} is the model itself; give the name of a CSV file.")
    scratch = out.with_name(out.name + f".partial.{os.getpid()}")
    began, failed = time.perf_counter(), 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(scratch, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "status", "reason", *predictor.labels, *(["findings"] if decide else [])])
            for count, result in enumerate(predictor.stream(paths, batch_size=batch_size, workers=workers), 1):
                writer.writerow(_row(result, predictor, decide))
                failed += not result.ok
                if on_result is not None:
                    on_result(count, failed)
        summary = {
            "model": str(predictor.path),
            "model_sha256": file_sha256(predictor.path),
            "provenance": predictor.warning,
            "provider": predictor.provider,
            "threads": predictor.threads,
            "images": len(paths),
            "failed": failed,
            "seconds": time.perf_counter() - began,
            "versions": {"cxr-fast": __version__, "onnxruntime": onnxruntime.__version__, "numpy": np.__version__},
        }
        out.with_suffix(".run.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, out)
    except OSError as error:
        raise InputError(f"--out: cannot write {out}: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()
    return summary


def _row(result: Result, predictor: Predictor, decide: bool) -> list[str]:
    if result.probabilities is None:
        empty = [""] * (len(predictor.labels) + decide)
        return [result.path, "failed", f"{result.reason}: {result.message}", *empty]
    row = [result.path, "ok", "", *(f"{p:.6f}" for p in result.probabilities)]
    if decide:
        positive = np.flatnonzero(result.probabilities >= predictor.thresholds)
        row.append(";".join(predictor.labels[i] for i in positive))
    return row


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
