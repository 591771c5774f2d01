"""A run to ONNX variants, each checked against torch on real images before it is kept."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import PIL
import torch

from . import __version__, calibrate, drift
from .config import PreprocessSpec, from_dict
from .drift import Drift
from .encode import normalise
from .errors import ImageError, InputError, ParityError
from .graph import RAW, VARIANTS, all_nodes, build, matrices
from .model_file import PREFIX, SCHEMA, labels_sha256, write
from .predict import golden_pixels
from .preprocess import load, self_check
from .runs import Run, read_run
from .timing import cpu_count, machine

LIMIT = 1e-5
BATCHES = (1, 2, 7, 64)
IMAGES = 256
# Images on which a single matrix in int8 shows what it does, and runs behind a latency.
FEW, RUNS = 16, 9
# No golden answer may be farther off, see `model_check`.
LOOSEST = 0.1
NOTICE = "Research use only. Not a medical device; not for diagnosis or treatment."
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
class Exported:
    """What became of one variant; `reason` says why it was not kept. `seconds` is the median of single images."""

    variant: str
    path: Path
    size: int
    parity: Parity
    drift: Drift
    seconds: float
    info: dict[str, Any]
    reason: str = ""

    @property
    def kept(self) -> bool:
        """Whether the file is there."""
        return not self.reason


@dataclass(frozen=True, kw_only=True)
class Checks:
    """The images a variant must answer for: pixels (n, S, S), labels (n, C), torch's raw probabilities (n, C), those of
    the sweep where it kept them, and which part of the run they are from."""

    pixels: np.ndarray
    labels: np.ndarray
    raw: np.ndarray
    cached: np.ndarray | None
    part: str


def export(
    run_folder: Path,
    *,
    out: Path | None = None,
    variants: Sequence[str] = ("fp32",),
    final: str | None = None,
    images: Path | None = None,
    embedding: bool = False,
    allow_drift: bool = False,
    count: int = IMAGES,
    on_progress: Progress | None = None,
) -> list[Exported]:
    """Write RUN/model.VARIANT.onnx for each variant, kept only where it agrees with torch float32 on `count` images.

    `out` is a folder, or a file for a single variant; `final` another final model than the run's own. The images are
    the cached ones (hold-out first), read again under the dataset's folder or `images`. Limits: fp32 1e-5 in
    probability, or ParityError; fp16 and int8 `drift.AUC_DROP` and `drift.FLIPS`, else not kept unless `allow_drift`.
    """
    if unknown := [v for v in variants if v not in VARIANTS]:
        raise InputError(f"--variants: {unknown[0]!r} is not one of {', '.join(VARIANTS)}.")
    run = read_run(run_folder, final)
    if embedding and len(run.members) > 1:
        raise InputError("--embedding: an ensemble has as many embeddings as members; use --final best-fold or refit.")
    paths = _paths(run_folder, out, variants)
    say = on_progress or (lambda text, done, total: None)
    checks = _checks(run, images, count, say)
    found = []
    for variant, path in paths.items():
        one = _int8 if variant == "int8" else _variant
        found.append(one(run, variant, path, checks, embedding=embedding, allow_drift=allow_drift, say=say))
    return found


def _paths(run_folder: Path, out: Path | None, variants: Sequence[str]) -> dict[str, Path]:
    """Where each variant goes."""
    if out is not None and out.suffix == ".onnx" and not out.is_dir():
        if len(variants) > 1:
            raise InputError(f"--out: {out} is one file for {len(variants)} variants; give a folder.")
        return {variants[0]: out}
    return {variant: (out or run_folder) / f"model.{variant}.onnx" for variant in dict.fromkeys(variants)}


def _checks(run: Run, images: Path | None, count: int, say: Progress) -> Checks:
    pixels, rows, saved = check_images(run, images, most=count)
    raw = torch_probabilities(run, pixels, on_done=lambda done: say("torch float32", done, len(pixels)))
    held = saved["fold"][rows] < 0
    part = "hold-out" if held.all() else "cached" if not held.any() else f"{held.sum()} hold-out and other cached"
    cached = _cached(run, saved, rows)
    return Checks(pixels=pixels, labels=saved["labels"][rows], raw=raw, cached=cached, part=part)


def _cached(run: Run, saved: Any, rows: np.ndarray) -> np.ndarray | None:
    """What the sweep said of these images with this final model, where it kept that of all of them."""
    return saved["final"][rows] if run.info["final"]["kind"] == run.chosen else None


def _variant(
    run: Run,
    variant: str,
    path: Path,
    checks: Checks,
    *,
    embedding: bool,
    allow_drift: bool,
    say: Progress,
    exclude: frozenset[str] = frozenset(),
) -> Exported:
    """Build, check and keep one file. One over its limit leaves nothing behind."""
    model = build(run, variant, embedding=embedding, exclude=exclude)
    scratch = path.with_name(path.name + f".partial.{os.getpid()}")
    info = metadata(run, model) | {"variant": variant, "float_matrices": sorted(exclude)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(model, info, scratch)
        file = OpenFile(scratch, variant)
        parity, far = check(run, file, checks, say), None
        probabilities = file.probabilities(checks.pixels, lambda done: say(variant, done, len(checks.pixels)))
        far = drift.measure(
            calibrate.apply(run.info["calibration"], checks.raw), probabilities, checks.labels, run.info["thresholds"]
        )
        seconds = file.seconds(checks.pixels[:1])
        reason = _refused(path, variant, parity, far, allow_drift)
        info |= {
            "parity": _parity_json(checks, parity, far, variant, file) | {"latency_ms": 1000 * seconds},
            "golden": golden(run, file, 1e-4 if variant == "fp32" else min(max(1e-4, far.largest), LOOSEST)),
        }
        size = _save(model, info, scratch)
        if not reason:
            os.replace(scratch, path)
    except OSError as error:
        raise InputError(f"--out: cannot write {path}: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()
    return Exported(
        variant=variant, path=path, size=size, parity=parity, drift=far, seconds=seconds, info=info, reason=reason
    )


def _refused(path: Path, variant: str, parity: Parity, far: Drift, allow_drift: bool) -> str:
    """Why a variant is not kept; empty where it is. fp32 over its limit is an error of ours, and raised."""
    if variant == "fp32":
        if not parity.largest <= LIMIT:
            raise ParityError(
                f"{path.name} was not kept: ONNX Runtime and torch differ by {parity.largest:.2e} in probability "
                f"(limit {LIMIT:g}) on {parity.images} images; please report this with the run folder."
            )
        return ""
    over = far.over()
    return "" if not over or (allow_drift and np.isfinite(far.largest)) else "; ".join(over)


def _int8(
    run: Run, variant: str, path: Path, checks: Checks, *, embedding: bool, allow_drift: bool, say: Progress
) -> Exported:
    """int8 everywhere in the blocks; where that is over the limits, the matrices that move most stay in float, as few
    as needed by doubling, up to half of them."""
    named: dict[str, Any] = {"embedding": embedding, "allow_drift": allow_drift, "say": say}
    found = _variant(run, variant, path, checks, **named)
    if found.kept:
        return found
    order = _most_moved(run, checks, say)
    number = 1
    while not found.kept and number <= len(order) // 2:
        found = _variant(run, variant, path, checks, exclude=frozenset(order[:number]), **named)
        number *= 2
    if found.kept:
        return found
    text = f"{found.reason}, with {len(found.info['float_matrices'])} of {len(order)} matrices left in float"
    return replace(found, reason=text)


def _most_moved(run: Run, checks: Checks, say: Progress) -> list[str]:
    """Block matrices by how far each alone in int8 moves the probabilities, the farthest first."""
    names, pixels = matrices(run), checks.pixels[:FEW]
    moved = {}
    for k, name in enumerate(names):
        model = build(run, "int8", exclude=frozenset(names) - {name})
        found = OpenFile(model.SerializeToString(), "int8").run(pixels, _raw_name(run))
        moved[name] = float(np.abs(found - checks.raw[:FEW]).mean())
        say("which matrices int8 hurts", k + 1, len(names))
    return sorted(names, key=lambda name: -moved[name])


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


def _raw_name(run: Run) -> str:
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
        found = file.run(checks.pixels[take], _raw_name(run))
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


def golden(run: Run, file: OpenFile, tolerance: float) -> dict[str, Any]:
    """Recipe of an input, torch's float32 answer, and this file's own answer here: what another machine must repeat.

    `tolerance` of a float16 or int8 file is how far it was from torch: another machine's rounding must move it less.
    """
    pixels = golden_pixels(run.info["preprocess"]["size"])
    expected = calibrate.apply(run.info["calibration"], torch_probabilities(run, pixels))[0]
    return {
        "recipe": "pixels[0, i, j] = (7*i + 13*j + i*j//16) % 256",
        "probabilities": [float(p) for p in expected],
        "expected": [float(p) for p in file.run(pixels)[0]],
        "tolerance": tolerance,
        "provider": file.provider,
        "cpu": machine()["cpu"],
    }


def metadata(run: Run, model: onnx.ModelProto) -> dict[str, Any]:
    """What the file says of itself; every value is JSON under `cxr.`."""
    info = run.info
    counts: dict[str, int] = {}
    for node in all_nodes(model.graph):
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return {
        "schema": SCHEMA,
        "written_by": f"cxr-fast {__version__}",
        "labels": info["classes"],
        "labels_sha256": labels_sha256(info["classes"]),
        "thresholds": info["thresholds"],
        "threshold_source": info["threshold_source"],
        "calibration": info["calibration"],
        "final": info["final"],
        "preprocess": info["preprocess"],
        "pixel_check": self_check(),
        "dicom_policy": info["preprocess"]["dicom_policy"],
        "mean": info["mean"],
        "std": info["std"],
        "weights": "random" if info["random_weights"] else Path(info["cache"]["weights"]).name,
        "provenance": info["provenance"],
        "backbone": info["backbone"],
        "tower_sha256": info["cache"]["tower_sha256"],
        "model_sha256": info["model_sha256"],
        "trainable": info["trainable"],
        "cache_fingerprint": info["cache"]["fingerprint"],
        "data": {"name": info["cache"]["dataset"]["name"], "images": info["images"], "metrics": info["metrics"]},
        "nodes": counts,
        "toolchain": info["toolchain"]
        | {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "pillow": PIL.__version__},
        "intended_use": NOTICE,
    }


def _parity_json(checks: Checks, parity: Parity, far: Drift, variant: str, file: OpenFile) -> dict[str, Any]:
    limits: dict[str, Any] = {"limit": LIMIT} if variant == "fp32" else {}
    limits |= {"limit_macro_auc_drop": drift.AUC_DROP, "limit_flips_per_10000": drift.FLIPS} if not limits else {}
    found = asdict(far)
    for name, value in found.items():
        found[name] = None if isinstance(value, float) and not np.isfinite(value) else value
    return {
        "against": "torch float32, open_clip tower",
        "images": far.images,
        "part": checks.part,
        "provider": file.provider,
        "max_probability_difference": found["largest"],
        "p99_probability_difference": found["p99"],
        "flips_per_10000": far.flips,
        "macro_auc_torch": found["macro_auc"],
        "macro_auc_drop": found["macro_drop"],
        "classes_with_auc": far.classes,
        "auc_drop_by_class": list(far.auc_drop),
        "by_batch": {str(k): v for k, v in parity.by_batch.items()},
        "to_cached_activations": parity.cached,
        **limits,
    }


def _save(model: onnx.ModelProto, info: dict[str, Any], path: Path) -> int:
    """Write the file; its size in bytes."""
    del model.metadata_props[:]
    for key, value in info.items():
        model.metadata_props.add(key=PREFIX + key, value=json.dumps(value))
    write(path, model.SerializeToString())
    return path.stat().st_size
