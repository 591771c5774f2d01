"""Predict probabilities from images with the ONNX file alone: no torch, no h5py in the process."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import IO, Any, overload

import numpy as np
from PIL import Image

from ..config import PreprocessSpec, from_dict
from ..data.images import is_one_image, load, pixels_of
from ..errors import ImageError, InputError, Interrupted
from ..system import hardware
from . import model_file
from .session import open_model

BATCH = 8
ROUNDING = 1e-6  # of float32 sums in a calibration
# A file changed within one tick of its clock keeps its time: 10 ms on ext4, 1 s on NFS servers, 2 s on FAT.
TICK_NS = 2 * 10**9

EMBEDDING, UNLIKENESS = "embedding", "unlikeness"
# What `data.images.pixels_of` takes, torch's tensors and pydicom's data sets aside: neither is imported here.
OneImage = str | os.PathLike[str] | bytes | bytearray | np.ndarray | Image.Image | IO[bytes]

Decoded = tuple[np.ndarray | None, "Result"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """The answer to one image: probabilities (C,) float32, or a reason code and message; and which file was read.

    `sha256` (hex) and `size` are of the bytes that were decoded, `mtime_ns` was `changed_ns` before they were read: 0
    where it was too young to show a change that came next. The message of an answered image is a note, empty for most:
    where a DICOM header was not followed, or what says that the film is none of a chest. `unlikeness` says how far the
    film is from the training films: 1 is the 99th percentile of these; None where the model file has no such output.

        >>> predictor = Predictor("exports/indiana/model.fp32.onnx", device="cpu")
        >>> [(result.ok, result.reason) for result in predictor.stream(["film.png", "absent.png"])]
        [(True, ''), (False, 'missing')]
    """

    path: str
    probabilities: np.ndarray | None = field(default=None, repr=False)
    reason: str = ""
    message: str = ""
    sha256: str = ""
    size: int = 0
    mtime_ns: int = 0
    unlikeness: float | None = None

    @property
    def ok(self) -> bool:
        """Whether there are probabilities."""
        return self.probabilities is not None

    @property
    def note(self) -> str:
        """What should be known of an answered image; empty for most."""
        return self.message if self.ok else ""


class Predictor:
    """A model file ready to run: `Predictor("model.onnx")(["a.png", array]) -> [{label: probability}, ...]`.

    `path` may be a folder of variants (`exports/RUN`) or an address on the Hugging Face hub
    (`hf-hub:owner/name[@revision]`): the variant this device runs best is taken, and of an address only that one is
    downloaded. `source` names it in records: the path, or the address with the commit. `device` is `auto`,
    `cpu`, `cuda[:N]` or `tensorrt[:N]`, `threads` defaults to the cores this process may use; `where` says what runs
    it and `why` the reason. Threads may share one predictor. Raises InputError for a file that is not ours or is
    damaged, SchemaError for one of another schema, DeviceError when an explicit device cannot be had or does not run
    the file. `check` and `spin` are those of `session.open_model`: for a folder of films pass `spin=False`. With
    `strict` an image whose DICOM header names another modality or body part than a film of a chest is refused as one
    that cannot be read.

        >>> predictor = Predictor("exports/indiana/model.fp32.onnx", device="cpu")
        >>> (answer,) = predictor(["film.png"])
        >>> set(answer) == set(predictor.labels)
        True
    """

    gives_unlikeness = False  # whether results have it
    _refuse_unlike: float | None = None  # outlives the session that a fork opens again

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: str = "auto",
        threads: int | None = None,
        *,
        check: bool = True,
        strict: bool = False,
        spin: bool = True,
    ) -> None:
        opened = open_model(path, device, threads, check=check, spin=spin)
        self._opened_with: dict[str, Any] = {"path": path, "device": device, "threads": threads, "check": check}
        self._opened_with |= {"strict": strict, "spin": spin}
        self.strict = strict
        self._process = os.getpid()
        self.path, self.source = opened.path, opened.source
        self.session, self.threads = opened.session, opened.threads
        self.provider, self.where, self.why = opened.provider, opened.where, opened.why
        self.info = opened.info
        self.labels: tuple[str, ...] = tuple(self.info["labels"])
        self.thresholds = np.array(self.info["thresholds"], np.float64)
        self.spec = from_dict(PreprocessSpec, self.info["preprocess"])
        self.gives_unlikeness = model_file.has_unlikeness(self.info)

    @property
    def refuse_unlike(self) -> float | None:
        """The unlikeness over which an image fails with the reason `unlike`; None, the default, for no such limit.

        The message of such an image names what would make it likely: inverted, or turned. Setting it raises InputError
        where the file has no unlikeness.

            >>> predictor = Predictor("exports/indiana/model.fp32.onnx", device="cpu")
            >>> predictor.refuse_unlike = 1.0
            >>> next(predictor.stream(["film.png"])).reason
            ''
        """
        return self._refuse_unlike

    @refuse_unlike.setter
    def refuse_unlike(self, limit: float | None) -> None:
        """Set the limit. Raises InputError where the file has no unlikeness."""
        if limit is not None:
            model_file.require_unlikeness(self.info, self.path)
        self._refuse_unlike = limit

    @property
    def warning(self) -> str:
        """What must be said beside every figure of this model, such as `random backbone`; empty for a real one."""
        return str(self.info.get("provenance", ""))

    def __repr__(self) -> str:
        return f"Predictor({self.source!r}, {len(self.labels)} classes, {self.where})"

    def __getstate__(self) -> dict[str, Any]:
        """What a process needs to open the same file again: a running session cannot travel."""
        return {**self._opened_with, "refuse_unlike": self._refuse_unlike}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._refuse_unlike = state.pop("refuse_unlike")
        self.__init__(**state)  # type: ignore[misc]

    def pixels(self, image: object) -> np.ndarray:
        """Read an image of any kind that `data.images.pixels_of` takes as uint8 (S, S), by the code that made the
        training pixels."""
        return pixels_of(image, self.spec, strict=self.strict)

    def run(self, pixels: np.ndarray, *, output: str = "probabilities") -> np.ndarray:
        """Run the model on uint8 (N, S, S): probabilities, or another of the graph's outputs, (N, C) float32."""
        return self._run(pixels, [output])[0]

    def _run(self, pixels: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        if self._process != os.getpid():  # a fork has the session without its threads, and would wait for them
            self.__init__(**self._opened_with)  # type: ignore[misc]
        try:
            out: list[np.ndarray] = self.session.run(list(outputs), {"pixels": pixels})
        except Exception as error:  # onnxruntime raises its own classes, all straight from Exception
            text = " ".join(str(error).split())[:160]
            raise InputError(f"{self.path}: the model does not run on {len(pixels)} image(s) ({text}).") from error
        return out

    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        """Call `run`; raise InputError where the answer is not one row of probabilities per image."""
        out, _ = self._rows(pixels)
        if not all(map(_probable, out)):
            raise InputError(f"{self.path}: the model answers what is no probability (NaN, or outside 0..1).")
        return out

    def _rows(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return probabilities (N, C), and the unlikeness (N,) where the file has it."""
        count = len(pixels)
        both = ["probabilities", UNLIKENESS]
        out, *rest = self._run(pixels, both) if self.gives_unlikeness else [self.run(pixels)]
        if out.shape != (count, len(self.labels)):
            raise InputError(f"{self.path}: the model answers {out.shape} for {count} x {len(self.labels)} classes.")
        if rest and rest[0].shape != (count,):
            raise InputError(f"{self.path}: the model answers an unlikeness of {rest[0].shape} for {count} images.")
        return out, rest[0] if rest else None

    @overload
    def __call__(self, images: OneImage) -> dict[str, float]: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, images: Iterable[Any]) -> list[dict[str, float]]: ...

    def __call__(self, images: Any) -> dict[str, float] | list[dict[str, float]]:
        """Return {label: probability} for one image, or a list of them for several.

        An image is a path, the bytes of a file, a file object, a PIL image, a NumPy array, a torch tensor or a pydicom
        data set, as `data.images.pixels_of` says. Raises ImageError at the first that cannot be read.
        """
        one = is_one_image(images)
        upcoming = iter([images] if one else self._several(images))
        out: list[dict[str, float]] = []
        while batch := [self.pixels(image) for image in itertools.islice(upcoming, BATCH)]:
            rows = self.probabilities(np.stack(batch))
            out += [dict(zip(self.labels, map(float, row), strict=True)) for row in rows]
        return out[0] if one else out

    def embed(self, images: OneImage | Iterable[Any]) -> np.ndarray:
        """Return the embedding of one image, (E,) float32, or of several, (N, E): what the head sees, of length one.

        Raises InputError where the file has none (`cxrfast export --embedding` makes one that has).
        """
        if EMBEDDING not in [output.name for output in self.session.get_outputs()]:
            raise InputError(f"{self.path} has no embedding; export the run with --embedding.")
        if is_one_image(images):
            return np.asarray(self.run(self.pixels(images)[None], output=EMBEDDING)[0])
        upcoming, out = iter(self._several(images)), []
        while batch := [self.pixels(image) for image in itertools.islice(upcoming, BATCH)]:
            out.append(self.run(np.stack(batch), output=EMBEDDING))
        return np.concatenate(out) if out else np.zeros((0, 0), np.float32)

    def _several(self, images: Any) -> Iterable[Any]:
        if not isinstance(images, Iterable):
            raise ImageError("bad_array", f"a {type(images).__name__} is no image and no list of images")
        return images

    def stream(
        self, paths: Iterable[str | os.PathLike[str]], *, batch_size: int = BATCH, workers: int | None = None
    ) -> Iterator[Result]:
        """Yield results in input order; decoding runs ahead by a few batches only, so memory stays flat.

        Raises InputError for a batch_size below 1.
        """
        if batch_size < 1:
            raise InputError(f"batch_size {batch_size}: must be at least 1.")
        if isinstance(paths, (str, os.PathLike)):
            paths = [paths]
        upcoming = iter(paths)
        batches = iter(lambda: list(itertools.islice(upcoming, batch_size)), [])
        with contextlib.closing(self.stream_batches(batches, workers=workers)) as answers:
            for results in answers:
                yield from results

    def stream_batches(
        self,
        batches: Iterable[Sequence[str | os.PathLike[str]]],
        *,
        workers: int | None = None,
        seconds: dict[str, float] | None = None,
        stop: Callable[[], bool] = bool,
    ) -> Generator[list[Result], None, None]:
        """Yield the results of one batch after the other, in order; each batch is one call of the model.

        The model runs in the calling thread while `workers` threads decode what comes next; Pillow and hashing drop
        the GIL. `seconds` collects what the caller's thread spent in each: `decode` waiting for pixels, `model`.
        Raises Interrupted before the next batch once `stop` returns True.
        """
        # ONNX Runtime's threads that wait spin, unless `spin=False`, and take time from the decoding ones: on 2 cores a
        # film of a folder took 1.08 times the CPU seconds of its parts, 1.01 times without (benchmarks/LOG.md).
        workers = workers or hardware.cpu_count()
        spent = seconds if seconds is not None else {}
        pending: deque[list[Future[Decoded]]] = deque()
        upcoming = iter(batches)
        with ThreadPoolExecutor(workers) as pool:
            try:
                while True:
                    while _short(pending, workers) and (batch := next(upcoming, None)) is not None:
                        pending.append([pool.submit(self._decode, path) for path in batch])
                    if not pending:
                        return
                    if stop():
                        raise Interrupted("stopped.")
                    began = time.perf_counter()
                    decoded = [future.result() for future in pending.popleft()]
                    ready = time.perf_counter()
                    results = self._answer(decoded)
                    spent["decode"] = spent.get("decode", 0.0) + ready - began
                    spent["model"] = spent.get("model", 0.0) + time.perf_counter() - ready
                    yield results
            finally:
                for future in itertools.chain.from_iterable(pending):
                    future.cancel()

    def describe(self) -> dict[str, Any]:
        """Return nothing beyond the fields above; a cluster's answerer names here the nodes that ran the model."""
        return {}

    def _decode(self, path: str | os.PathLike[str]) -> Decoded:
        name, now = os.fspath(path), time.time_ns()
        size = changed = 0
        with contextlib.suppress(OSError, ValueError):  # reading it says what is wrong
            status = os.stat(name)
            size, changed = status.st_size, changed_ns(status)
        try:
            found = load(name, self.spec, strict=self.strict)
        except ImageError as error:
            return None, Result(path=name, reason=error.reason, message=str(error))
        old = changed if now - changed > TICK_NS else 0
        return found.pixels, Result(path=name, message=found.note, sha256=found.sha256, size=size, mtime_ns=old)

    def _answer(self, decoded: list[Decoded]) -> list[Result]:
        good = [pixels for pixels, _ in decoded if pixels is not None]
        probabilities, unlike = self._rows(np.stack(good)) if good else (np.empty((0, 0)), None)
        rows = iter(zip(probabilities, [None] * len(good) if unlike is None else unlike.tolist(), strict=True))
        return [result if pixels is None else self._judge(pixels, result, *next(rows)) for pixels, result in decoded]

    def _judge(self, pixels: np.ndarray, result: Result, row: np.ndarray, unlikeness: float | None) -> Result:
        """Add a film's answer, or fail it: where it is none, and where the film is more unlike than is asked for."""
        found = _checked(result, row, unlikeness)
        if self.refuse_unlike is None or not found.ok or unlikeness is None or unlikeness <= self.refuse_unlike:
            return found
        changed = self.run(np.stack([make(pixels) for make in CAUSES.values()]), output=UNLIKENESS).tolist()
        text = describe_unlike(unlikeness, self.refuse_unlike, dict(zip(CAUSES, changed, strict=True)))
        return replace(found, probabilities=None, reason="unlike", message=f"{result.path}: {text}")


def _short(pending: Sequence[Sequence[Any]], workers: int) -> bool:
    """Whether to decode more: up to three batches, or two images per thread beside the next batch."""
    return len(pending) < 3 or sum(map(len, pending)) < len(pending[0]) + 2 * workers


def _checked(result: Result, row: np.ndarray, unlikeness: float | None) -> Result:
    """Add probabilities (C,) to a result, or fail it where they are none; the other rows of the batch stand."""
    if _probable(row) and (unlikeness is None or math.isfinite(unlikeness)):
        return replace(result, probabilities=row, unlikeness=unlikeness)
    text = f"{result.path}: the model's answer is no probability"
    return Result(path=result.path, reason="not_finite", message=text)


def _probable(row: np.ndarray) -> bool:
    return bool(np.isfinite(row).all() and row.min(initial=0) >= -ROUNDING and row.max(initial=0) <= 1 + ROUNDING)


# What may be wrong with a film that is unlike the training films, and how to undo it on its pixels (S, S).
CAUSES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "inverted": lambda pixels: 255 - pixels,
    "turned left by 90 degrees": lambda pixels: np.rot90(pixels),
    "turned by 180 degrees": lambda pixels: np.rot90(pixels, 2),
    "turned right by 90 degrees": lambda pixels: np.rot90(pixels, 3),
}


def describe_unlike(unlikeness: float, limit: float, changed: Mapping[str, float]) -> str:
    """Say how unlike a film is, and which of the CAUSES, whose unlikeness `changed` has, would make it likely."""
    text = f"unlikeness {unlikeness:.2f} is over {limit:g}"
    cause = min(changed, key=lambda name: changed[name])
    if changed[cause] <= limit:
        return f"{text}; {cause} it would have {changed[cause]:.2f}"
    return f"{text}; inverted or turned it would be over it too"


def golden_pixels(size: int) -> np.ndarray:
    """Make the input of the golden pair, (1, S, S) uint8: (7 i + 13 j + i j // 16) mod 256 at row i, column j."""
    i, j = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    return ((7 * i + 13 * j + i * j // 16) % 256).astype(np.uint8)[None]


def changed_ns(status: os.stat_result) -> int:
    """Return when a file was last changed: the later of mtime, which `cp -p`, tar and zip set, and ctime."""
    return max(status.st_mtime_ns, status.st_ctime_ns)
