"""Compare a model file with torch on real images."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..activations.encoder import normalise
from ..config import PreprocessSpec, from_dict
from ..data.paths import describe_places, recorded_places
from ..errors import ImageError, InputError
from ..inference.predictor import golden_pixels
from ..inference.session import open_model
from ..metrics import calibration as calibrate
from ..system.hardware import cpu_count
from ..training.run_folder import Run
from ..unlikeness.nodes import OUTPUT as UNLIKENESS
from ..unlikeness.reference import furthest, measure_seen, watch_features
from .entries.settings import IMAGES
from .film_changes import CHANGES, ChangedFilm, load_changed
from .graph import RAW

BATCHES = (1, 2, 7, 64)
RUNS = 9  # behind a latency
BLOCK = 16  # films read at a time, in threads
OnProgress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far ONNX Runtime and torch are apart on real images, before calibration: the largest probability difference
    on all of them, and by batch size on the first 64.

    `cached` is the largest difference to what the sweep computed from stored activations (their rounding).
    `unlikeness` is the largest difference in unlikeness as a share of torch's, None where the run has none.
    """

    images: int
    largest: float
    by_batch: dict[int, float]
    cached: float | None
    unlikeness: float | None = None


@dataclass(frozen=True, kw_only=True)
class Checks:
    """The images a variant is checked on: pixels (n, S, S), the same by each of CHANGES, groups (n), labels (n, C),
    torch's raw probabilities (n, C), those of the sweep where it kept them, the part of the run they are from and which
    are of the hold-out (n,), and torch's for the golden image, (1, C); torch's `unlikeness` (n + 1,) of the images and
    the golden one, if the run has it; `rounding` (m, S, S) are other images, of the training part, on which weights are
    rounded."""

    pixels: np.ndarray
    changed: dict[str, np.ndarray]
    groups: np.ndarray
    labels: np.ndarray
    raw: np.ndarray
    cached: np.ndarray | None
    part: str
    held: np.ndarray
    golden: np.ndarray
    rounding: np.ndarray
    unlikeness: np.ndarray | None


def checks_of(run: Run, images: Path | None, count: int, on_progress: OnProgress, *, rounding: int = 0) -> Checks:
    """Read up to `count` images of a run and compute torch's answers; `rounding` more are kept from the checks."""
    own = _rounding_rows(run, count, rounding)
    films, rows, saved = read_films(run, images, count, on_progress, without=own)
    other = read_films(run, images, rounding, on_progress, only=own)[0] if len(own) else []
    pixels = np.stack([film.pixels for film in films])
    changed = {name: np.stack([film.changed[name] for film in films]) for name in CHANGES}
    stage = "torch float32 on the check images"
    with watch_features(run.unlikeness, run.visual) as seen:
        raw = torch_probabilities(run, pixels, on_done=lambda done: on_progress(stage, done, len(pixels)))
        golden = torch_probabilities(run, golden_pixels(run.info["preprocess"]["size"]))
    unlikeness = measure_seen(run.unlikeness, seen, both_views=run.info["train"].get("tta") == "flip")
    held = saved["fold"][rows] < 0
    part = "hold-out" if held.all() else "cached" if not held.any() else f"{held.sum()} hold-out and other cached"
    # The sweep kept the answers to all images of the final model and the views it chose, of no other.
    own = run.info["final"]["kind"] == run.chosen and run.info["train"].get("tta") == run.tta
    cached = saved["final"][rows] if own else None
    return Checks(
        pixels=pixels,
        changed=changed,
        groups=saved["group"][rows],
        labels=saved["labels"][rows],
        raw=raw,
        cached=cached,
        part=part,
        held=held,
        golden=golden,
        rounding=np.stack([film.pixels for film in other]) if other else pixels[:0],
        unlikeness=unlikeness,
    )


class OpenFile:
    """A file of any variant on a CPU, for its checks alone: `inference` refuses float16 on a CPU."""

    def __init__(self, path: Path) -> None:
        opened = open_model(path, "cpu", strict=False, check=False)
        self.variant, self.provider, self.session = opened.variant, opened.provider, opened.session

    def run(self, pixels: np.ndarray, output: str = "probabilities") -> np.ndarray:
        """Compute one of the graph's outputs, (N, C) float32, of uint8 pixels (N, S, S)."""
        return self.run_all(pixels, [output])[0]

    def run_all(self, pixels: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        """Compute several of the graph's outputs at once."""
        out: list[np.ndarray] = self.session.run(list(outputs), {"pixels": pixels})
        return out

    def many(
        self, pixels: np.ndarray, outputs: Sequence[str], on_done: Callable[[int], None], batch: int = 8
    ) -> list[np.ndarray]:
        """Compute several outputs of many images, `batch` at a time; `on_done` is given how many more are done."""
        out = []
        for start in range(0, len(pixels), batch):
            out.append(self.run_all(pixels[start : start + batch], outputs))
            on_done(len(out[-1][0]))
        return [np.concatenate(each) for each in zip(*out, strict=True)]

    def seconds(self, pixels: np.ndarray) -> float:
        """Measure the median seconds of one image, of `RUNS`."""
        times = []
        for _ in range(RUNS):
            began = time.perf_counter()
            self.run(pixels)
            times.append(time.perf_counter() - began)
        return statistics.median(times)


def raw_name(run: Run) -> str:
    """Return the name of the output that holds probabilities before calibration."""
    return "probabilities" if run.info["calibration"] is None else RAW


def check_images(run: Run, images: Path | None, *, most: int = IMAGES) -> tuple[np.ndarray, np.ndarray, Any]:
    """Read the pixels (n, S, S) of cached images, their rows in predictions.npz, and that file."""
    films, rows, saved = read_films(run, images, most, lambda *_: None)
    return np.stack([film.pixels for film in films]), rows, saved


def _saved(run: Run) -> dict[str, np.ndarray]:
    try:
        with np.load(run.folder / "predictions.npz") as file:
            return {name: file[name] for name in ("image", "sha256", "group", "fold", "labels", "final")}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{run.folder / 'predictions.npz'}: cannot be read; run the sweep again.") from error


def _rounding_rows(run: Run, checked: int, count: int) -> np.ndarray:
    """Choose up to `count` rows of the training part, at most a quarter of it, behind those to be checked if it can."""
    if not count:
        return np.empty(0, np.int64)
    fold = _saved(run)["fold"]
    order = _order(fold, checked)
    count = min(count, max(1, int((fold >= 0).sum()) // 4))
    rest = order[checked:][fold[order[checked:]] >= 0]
    rest = rest if len(rest) >= count else order[-count:]
    return rest[np.linspace(0, len(rest) - 1, count).round().astype(int)]


def read_films(
    run: Run,
    images: Path | None,
    most: int,
    on_progress: OnProgress,
    *,
    only: np.ndarray | None = None,
    without: np.ndarray | None = None,
) -> tuple[list[ChangedFilm], np.ndarray, Any]:
    """Read cached images with their changes, in threads, their rows in predictions.npz, and that file.

    The hold-out first, evenly spread over it where it is larger than `most`; then the others. Of the rows `only`, where
    given, none of which need be readable; or of those `without` some.
    """
    saved = _saved(run)
    root = Path(run.info["cache"]["dataset"]["root"])
    spec = from_dict(PreprocessSpec, run.info["preprocess"])

    def read(row: int) -> list[ChangedFilm]:
        return _load_any(recorded_places(str(saved["image"][row]), root, images), spec)

    films: list[ChangedFilm] = []
    kept: list[int] = []
    stage = "reading the check images" if only is None else "reading training images"
    changed, order = 0, _order(saved["fold"], most) if only is None else only
    order = order if without is None else order[~np.isin(order, without)]
    with ThreadPoolExecutor(cpu_count()) as pool:
        for start in range(0, len(order), BLOCK):
            rows = order[start : start + BLOCK]
            for row, found in zip(rows, pool.map(read, rows), strict=True):
                film = next((each for each in found if each.sha256 == saved["sha256"][row]), None)
                if film is None:
                    changed += bool(found)
                elif len(kept) < most:
                    films.append(film)
                    kept.append(row)
            if kept:
                on_progress(stage, len(kept), min(most, len(order)))
            if len(kept) == most:
                break
    if not kept and only is None:
        raise InputError(
            f"export checks itself on the cached images, and none of the {len(saved['fold']):,} is readable under "
            f"{images or root} ({changed} changed since; {_tried(saved, root, images)}); give their folder with "
            "--images DIR."
        )
    return films, np.array(kept), saved


def _load_any(places: Sequence[Path], spec: PreprocessSpec) -> list[ChangedFilm]:
    """Read what can be read of the places where one image may lie."""
    found = []
    for place in places:
        with contextlib.suppress(ImageError):
            found.append(load_changed(place, spec))
    return found


def _tried(saved: Mapping[str, Any], root: Path, images: Path | None) -> str:
    return describe_places(recorded_places(str(saved["image"][0]), root, images))


def _order(fold: np.ndarray, most: int) -> np.ndarray:
    """Order the rows to try: of each part, hold-out (fold -1) first, `most` evenly spread ones before the rest."""
    out = []
    for rows in (np.flatnonzero(fold < 0), np.flatnonzero(fold >= 0)):
        first = (
            np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)) if len(rows) else rows
        )
        out += [rows[first], np.delete(rows, first)]
    return np.concatenate(out)


def check(run: Run, file: OpenFile, checks: Checks, on_progress: OnProgress) -> tuple[Parity, np.ndarray]:
    """Compare the file with torch on all images, and on the first at batch sizes 1, 2, 7 and 64 (they repeat where
    there are fewer); also its (calibrated) probabilities of all images (n, C).

    Of a calibrated model the raw probabilities are compared with torch's, and the calibration in the graph with
    `calibrate.apply` on them: a steep calibration would make any difference large.
    """
    calibration, name = run.info["calibration"], raw_name(run)
    names = dict.fromkeys((name, "probabilities"))
    done, total = 0, len(names) * sum(BATCHES) + len(checks.pixels)

    def count(images: int) -> None:
        nonlocal done
        done += images
        on_progress(f"{file.variant} on the check images", done, total)

    by_batch = {}
    for batch in BATCHES:
        take = np.arange(batch) % min(len(checks.pixels), max(BATCHES))
        found = file.run(checks.pixels[take], name)
        calibrated = found if calibration is None else file.run(checks.pixels[take])
        by_batch[batch] = _apart(calibration, checks.raw[take], found, calibrated)
        count(batch * len(names))
    further = [] if checks.unlikeness is None else [UNLIKENESS]
    each = file.many(checks.pixels, [*names, *further], count)
    found, calibrated = each[0], each[len(names) - 1]
    unlike = None if checks.unlikeness is None else furthest(each[-1], checks.unlikeness[:-1])
    cached = None if checks.cached is None else float(np.abs(checks.raw - checks.cached).max())
    # numpy's largest, which does not lose a NaN
    largest = float(np.max([_apart(calibration, checks.raw, found, calibrated), *by_batch.values()]))
    parity = Parity(images=len(checks.pixels), largest=largest, by_batch=by_batch, cached=cached, unlikeness=unlike)
    return parity, calibrated


def _apart(calibration: Any, want: np.ndarray, found: np.ndarray, calibrated: np.ndarray) -> float:
    """Return the larger of two differences: raw probabilities to torch's, calibrated ones to the calibrated raw."""
    return float(np.max([np.abs(found - want).max(), np.abs(calibrated - calibrate.apply(calibration, found)).max()]))


def torch_probabilities(
    run: Run, pixels: np.ndarray, *, batch: int = 8, on_done: Callable[[int], None] | None = None
) -> np.ndarray:
    """Compute the trusted float32 probabilities (n, C), not calibrated, of uint8 pixels (n, S, S), by open_clip."""
    mean, std = (torch.tensor(run.info[k]).reshape(1, 3, 1, 1) for k in ("mean", "std"))
    out = []
    for start in range(0, len(pixels), batch):
        x = normalise(torch.from_numpy(pixels[start : start + batch]), mean, std)
        out.append(run.raw_probabilities(x))
        if on_done is not None:
            on_done(start + len(x))
    return np.concatenate(out)
