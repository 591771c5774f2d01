"""Real images that a model file must answer for as torch does, and a file opened for it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import calibrate
from .config import PreprocessSpec, from_dict
from .devices import onnxruntime
from .encode import normalise
from .errors import ImageError, InputError
from .graph import RAW
from .preprocess import load
from .runs import Run
from .timing import cpu_count

BATCHES = (1, 2, 7, 64)
IMAGES = 256
RUNS = 9  # behind a latency
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far ONNX Runtime and torch are apart on real images: largest probability difference, by batch size.

    `cached` is the largest difference to what the sweep computed from stored activations (their rounding).
    """

    images: int
    largest: float
    by_batch: dict[int, float]
    cached: float | None


@dataclass(frozen=True, kw_only=True)
class Checks:
    """The images a variant must answer for: pixels (n, S, S), labels (n, C), torch's raw probabilities (n, C), those of
    the sweep where it kept them, and which part of the run they are from."""

    pixels: np.ndarray
    labels: np.ndarray
    raw: np.ndarray
    cached: np.ndarray | None
    part: str


def checks_of(run: Run, images: Path | None, count: int, say: Progress) -> Checks:
    """Up to `count` images of a run with torch's answers."""
    pixels, rows, saved = check_images(run, images, most=count)
    raw = torch_probabilities(run, pixels, on_done=lambda done: say("torch float32", done, len(pixels)))
    held = saved["fold"][rows] < 0
    part = "hold-out" if held.all() else "cached" if not held.any() else f"{held.sum()} hold-out and other cached"
    cached = cached_probabilities(run, saved, rows)
    return Checks(pixels=pixels, labels=saved["labels"][rows], raw=raw, cached=cached, part=part)


def cached_probabilities(run: Run, saved: Any, rows: np.ndarray) -> np.ndarray | None:
    """What the sweep said of these images with this final model, where it kept that of all of them."""
    return saved["final"][rows] if run.info["final"]["kind"] == run.chosen else None


class OpenFile:
    """A file of any variant on a CPU, for its checks alone: `Predictor` would refuse float16 there."""

    def __init__(self, model: Path | bytes, variant: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cpu_count()
        options.log_severity_level = 3
        self.variant, self.provider = variant, "CPUExecutionProvider"
        self.session = onnxruntime.InferenceSession(model, options, providers=[self.provider])

    def run(self, pixels: np.ndarray, output: str = "probabilities") -> np.ndarray:
        """uint8 (N, S, S) to one of the graph's outputs, (N, C) float32."""
        out: np.ndarray = self.session.run([output], {"pixels": pixels})[0]
        return out

    def probabilities(self, pixels: np.ndarray, on_done: Callable[[int], None], batch: int = 8) -> np.ndarray:
        """Probabilities (n, C) of many images."""
        out = []
        for start in range(0, len(pixels), batch):
            out.append(self.run(pixels[start : start + batch]))
            on_done(start + len(out[-1]))
        return np.concatenate(out)

    def seconds(self, pixels: np.ndarray) -> float:
        """Median seconds of one image, of `RUNS`."""
        times = []
        for _ in range(RUNS):
            began = time.perf_counter()
            self.run(pixels)
            times.append(time.perf_counter() - began)
        return statistics.median(times)


def raw_name(run: Run) -> str:
    """The output that holds probabilities before calibration."""
    return "probabilities" if run.info["calibration"] is None else RAW


def check_images(run: Run, images: Path | None, *, most: int = IMAGES) -> tuple[np.ndarray, np.ndarray, Any]:
    """Pixels (n, S, S) of cached images, their rows in predictions.npz, and that file.

    The hold-out first, evenly spread over it where it is larger than `most`; then the others.
    """
    try:
        with np.load(run.folder / "predictions.npz") as file:
            saved = {name: file[name] for name in ("image", "sha256", "fold", "labels", "final")}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{run.folder / 'predictions.npz'}: cannot be read; run the sweep again.") from error
    root = images or Path(run.info["cache"]["dataset"]["root"])
    spec = from_dict(PreprocessSpec, run.info["preprocess"])
    pixels: list[np.ndarray] = []
    kept: list[int] = []
    changed = 0
    for i in _order(saved["fold"], most):
        if len(kept) == most:
            break
        try:
            image, sha256 = load(root / str(saved["image"][i]), spec)
        except ImageError:
            continue
        if sha256 != saved["sha256"][i]:
            changed += 1
            continue
        pixels.append(image)
        kept.append(i)
    if not kept:
        raise InputError(
            f"export checks itself on the cached images, and none of the {len(saved['fold']):,} is readable under "
            f"{root} ({changed} changed since); give their folder with --images DIR."
        )
    return np.stack(pixels), np.array(kept), saved


def _order(fold: np.ndarray, most: int) -> np.ndarray:
    """Rows to try, in turn: of each part, hold-out (fold -1) first, `most` evenly spread ones before the rest."""
    out = []
    for rows in (np.flatnonzero(fold < 0), np.flatnonzero(fold >= 0)):
        first = (
            np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)) if len(rows) else rows
        )
        out += [rows[first], np.delete(rows, first)]
    return np.concatenate(out)


def check(run: Run, file: OpenFile, checks: Checks, say: Progress) -> Parity:
    """Compare the file with torch at batch sizes 1, 2, 7 and 64 (images repeat where there are fewer).

    Of a calibrated model the raw probabilities are compared with torch's, and the calibration in the graph with
    `calibrate.apply` on them: a steep calibration would make any difference large.
    """
    calibration = run.info["calibration"]
    by_batch = {}
    for batch in BATCHES:
        take = np.arange(batch) % min(len(checks.pixels), max(BATCHES))
        found = file.run(checks.pixels[take], raw_name(run))
        apart = [np.abs(found - checks.raw[take]).max()]
        if calibration is not None:
            apart.append(np.abs(file.run(checks.pixels[take]) - calibrate.apply(calibration, found)).max())
        by_batch[batch] = float(np.max(apart))  # numpy's, which does not lose a NaN
        say(f"{file.variant} at batch {batch}", BATCHES.index(batch) + 1, len(BATCHES))
    cached = None if checks.cached is None else float(np.abs(checks.raw - checks.cached).max())
    largest = float(np.max(list(by_batch.values())))  # numpy's, which does not lose a NaN
    count = min(len(checks.pixels), max(BATCHES))
    return Parity(images=count, largest=largest, by_batch=by_batch, cached=cached)


def torch_probabilities(
    run: Run, pixels: np.ndarray, *, batch: int = 8, on_done: Callable[[int], None] | None = None
) -> np.ndarray:
    """The trusted path: float32 probabilities (n, C), not calibrated, of uint8 pixels (n, S, S), by open_clip."""
    mean, std = (torch.tensor(run.info[k]).reshape(1, 3, 1, 1) for k in ("mean", "std"))
    out = []
    for start in range(0, len(pixels), batch):
        x = normalise(torch.from_numpy(pixels[start : start + batch]), mean, std)
        out.append(run.raw_probabilities(x))
        if on_done is not None:
            on_done(start + len(x))
    return np.concatenate(out)
