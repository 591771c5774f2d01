"""Write ONNX variants of a run, each checked against torch on real images before it is kept."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import PIL

from .. import __version__
from ..config import NOTICE
from ..data.images import self_check
from ..errors import InputError, ParityError
from ..inference.model_file import PREFIX, SCHEMA, labels_sha256, require_variants, write
from ..inference.predictor import golden_pixels
from ..inference.shift.reference import KEY as HOLDOUT
from ..inference.verify import LOOSEST
from ..metrics import calibration, drift
from ..metrics.drift import Drift, Yardstick
from ..system.files import AnyPath, disk_reason, folders_above, put_in_place
from ..system.hardware import machine
from ..training.operating_points import OperatingPoint
from ..training.run_folder import Run, clean, read_run
from ..unlikeness.nodes import OUTPUT as UNLIKENESS
from ..unlikeness.reference import LIMITS, describe_output
from . import int8
from .entries.measured import LIMIT, holdout_record, parity_record
from .entries.settings import KEY, ExportSpec, record_export
from .graph import build
from .int8 import Plan
from .nodes import all_nodes
from .parity import Checks, OnProgress, OpenFile, Parity, check, checks_of, raw_name
from .rotate import rotated

FEW = 16  # images on which the effect of each matrix in int8 is computed, and the yardstick's float32 graph compared
ROUNDING = "int8 weights from training images"
AS_ASKED = ExportSpec()


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The result of one variant; `reason` says why it was not kept. `seconds` is the median of single images."""

    variant: str
    path: Path
    size: int
    parity: Parity
    drift: Drift
    yardstick: Yardstick
    seconds: float
    info: dict[str, Any]
    reason: str = ""

    @property
    def kept(self) -> bool:
        """Whether the file was kept."""
        return not self.reason


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A run, the images its variants are checked on, and what is asked for."""

    run: Run
    checks: Checks
    yardstick: Yardstick
    spec: ExportSpec
    on_progress: OnProgress


def export_run(
    run_folder: AnyPath, spec: ExportSpec = AS_ASKED, *, on_progress: OnProgress | None = None
) -> list[Exported]:
    """Write RUN/model.VARIANT.onnx for each variant, kept only where it agrees with torch float32.

    The images are the cached ones (hold-out first), read again. Limits: fp32 1e-5 in probability before calibration, or
    ParityError; fp16 and int8 `drift.AUC_DROP`, `drift.MAP_DROP`, and as many changed decisions as the same films saved
    as JPEG 95 have in float32, else not kept unless `allow_drift`. A float16 or int8 file that is not kept also removes
    an earlier one of its name. Raises InputError where the run or its images cannot
    be read or a file cannot be written.

        >>> (one,) = export_run("exports/indiana", ExportSpec(out="exports/indiana/again.onnx", count=8))
        >>> one.kept, one.path.name
        (True, 'again.onnx')
    """
    folder = Path(run_folder)
    require_variants(spec.variants)
    point = OperatingPoint(threshold_target=spec.threshold_target, calibration=spec.calibration)
    run = read_run(folder, spec.final, tta=spec.tta, logit_adjustment=spec.logit_adjustment, point=point)
    if spec.embedding and len(run.members) > 1:
        raise InputError("--embedding: an ensemble has as many embeddings as members; use --final best-fold or refit.")
    if spec.embedding and run.info["train"].get("tta") == "flip":
        raise InputError("--embedding: a model of both views has two embeddings of an image; use --tta none.")
    paths = _paths(folder, None if spec.out is None else Path(spec.out), spec.variants)
    report = on_progress or (lambda text, done, total: None)
    rounding = int8.IMAGES if "int8" in spec.variants else 0
    images = None if spec.images is None else Path(spec.images)
    checks = checks_of(run, images, spec.count, report, rounding=rounding)
    yardstick = measure_yardstick(run, checks, next(iter(paths.values())), report)
    job = _Job(run=run, checks=checks, yardstick=yardstick, spec=spec, on_progress=report)
    found = []
    for variant, path in paths.items():
        found.append(_export_int8(job, path) if variant == "int8" else _export_variant(job, variant, path))
        if not found[-1].kept:
            _remove(path)
    return found


def _remove(path: Path) -> None:
    """Remove an earlier file under a name that was not kept: `predict RUN` would go on using it."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"--out: cannot remove {path}: {error.strerror or error}; it was not kept.") from error


def _paths(run_folder: Path, out: Path | None, variants: Sequence[str]) -> dict[str, Path]:
    """Return the path of each variant's file."""
    if out is not None and out.suffix == ".onnx" and not out.is_dir():
        if len(variants) > 1:
            raise InputError(f"--out: {out} is one file for {len(variants)} variants; give a folder.")
        return {variants[0]: out}
    return {variant: (out or run_folder) / f"model.{variant}.onnx" for variant in dict.fromkeys(variants)}


def _export_variant(
    job: _Job,
    variant: str,
    path: Path,
    *,
    exclude: frozenset[str] = frozenset(),
    rounded: tuple[Run, Plan] | None = None,
) -> Exported:
    """Build, check and keep one file; one over its limit leaves nothing behind. `exclude` stays in float; `rounded` is
    the run with turned towers and its int8 weights."""
    run, checks = job.run, job.checks
    built, plan = rounded or (run, None)
    model = build(built, variant, embedding=job.spec.embedding, exclude=exclude, plan=plan)
    info = metadata(run, model) | {"variant": variant, "float_matrices": sorted(exclude)}
    info |= {HOLDOUT: holdout_record(run, checks), KEY: msgspec.to_builtins(record_export(job.spec))}
    with _scratch(path) as scratch:
        _save(model, info, scratch)
        file = OpenFile(scratch)
        parity, probabilities = check(run, file, checks, _with_count(job.on_progress, len(exclude)))
        reference = calibration.apply(run.info["calibration"], checks.raw)
        far = drift.measure(reference, probabilities, checks.labels, run.info["thresholds"], job.yardstick)
        seconds = file.seconds(checks.pixels[:1])
        reason = _refused(path, variant, parity, far, job.spec.allow_drift)
        info |= {
            "parity": parity_record(job.yardstick, checks.part, parity, far, file) | {"latency_ms": 1000 * seconds},
            "golden": _golden(run, file, checks, 1e-4 if variant == "fp32" else min(max(1e-4, far.largest), LOOSEST)),
        }
        size = _save(model, info, scratch)
        if not reason:
            put_in_place(scratch, path)
    return Exported(
        variant=variant, path=path, size=size, parity=parity, drift=far, yardstick=job.yardstick, seconds=seconds,
        info=info, reason=reason,
    )  # fmt: skip


def _with_count(on_progress: OnProgress, floats: int) -> OnProgress:
    """Name the number of matrices in float with each stage, where there are some."""
    return lambda stage, done, total: on_progress(
        f"{stage}, {floats} {'matrix' if floats == 1 else 'matrices'} in float" if floats else stage, done, total
    )


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """Give the name of a file beside `path` that is removed at the end. InputError where the disk refuses one."""
    scratch = path.with_name(path.name + f".partial.{os.getpid()}")
    try:
        with folders_above(path):
            try:
                yield scratch
            finally:
                with contextlib.suppress(OSError):
                    scratch.unlink()
    except OSError as error:
        raise InputError(f"--out: cannot write {path}: {disk_reason(path, error)}.") from error


def _refused(path: Path, variant: str, parity: Parity, far: Drift, allow_drift: bool) -> str:
    """Say why a variant is not kept; empty where it is. fp32 over its limit is a fault of this program, and raised."""
    unlike = parity.unlikeness is None or parity.unlikeness <= LIMITS[variant]
    if variant == "fp32":
        _require_agreement(path, parity.largest, parity.images)
        if not unlike:
            raise ParityError(
                f"{path.name} was not kept: its unlikeness differs from torch's by {parity.unlikeness:.2%} (limit "
                f"{LIMITS[variant]:.1%}); please report this with the run folder."
            )
        return ""
    over = [*far.over(), *([] if unlike else [f"unlikeness {parity.unlikeness:.1%} off (limit {LIMITS[variant]:.0%})"])]
    return "" if not over or (allow_drift and np.isfinite(far.largest)) else "; ".join(over)


def _require_agreement(path: Path, largest: float, images: int) -> None:
    """Raise ParityError where the float32 graph and torch differ in probability by more than LIMIT."""
    if not largest <= LIMIT:
        raise ParityError(
            f"{path.name} was not kept: ONNX Runtime and torch differ by {largest:.2e} in probability "
            f"(limit {LIMIT:g}) on {images} images; please report this with the run folder."
        )


def measure_yardstick(run: Run, checks: Checks, path: Path, on_progress: OnProgress) -> Yardstick:
    """Return what the float32 model does on the check films saved as JPEG 95 and moved by one pixel.

    The float32 graph computes it (ViT-B/16 on 2 cores: 94 ms a film, torch 232), once it agrees with torch on FEW
    films; else ParityError for the file `path`, which would be the first to be kept.
    """
    stage = "float32 on films saved as JPEG 95 and moved by one pixel"
    done, total, name = 0, sum(map(len, checks.changed.values())), raw_name(run)

    def count(images: int) -> None:
        nonlocal done
        done += images
        on_progress(stage, done, total)

    with tempfile.TemporaryDirectory() as scratch:
        model = build(run, "fp32")
        _save(model, metadata(run, model) | {"variant": "fp32"}, file := Path(scratch) / "model.onnx")
        opened = OpenFile(file)
        plain = opened.run(checks.pixels[:FEW], name)
        _require_agreement(path, float(np.abs(plain - checks.raw[:FEW]).max()), len(plain))
        raw = {change: opened.many(pixels, [name], count)[0] for change, pixels in checks.changed.items()}
    fitted = run.info["calibration"]
    return drift.measure_changes(
        calibration.apply(fitted, checks.raw),
        {change: calibration.apply(fitted, found) for change, found in raw.items()},
        checks.labels,
        run.info["thresholds"],
        checks.groups.tolist(),
    )


def _export_int8(job: _Job, path: Path) -> Exported:
    """Export int8 everywhere in the blocks; where that is over the limits, leave in float the matrices that gain most
    by it for what they cost, as few as needed by doubling, up to half of them."""
    if not len(job.checks.rounding):
        return _export_variant(job, "int8", path)
    turned = rotated(job.run)
    plan = int8.choose(turned, job.checks.rounding, lambda done, total: job.on_progress(ROUNDING, done, total))
    found = _export_variant(job, "int8", path, rounded=(turned, plan))
    if found.kept:
        return found
    order = int8.order(turned, plan, job.checks.rounding[:FEW])
    number = 1
    while not found.kept and number <= len(order) // 2:
        found = _export_variant(job, "int8", path, exclude=frozenset(order[:number]), rounded=(turned, plan))
        number *= 2
    if found.kept:
        return found
    text = f"{found.reason}, with {len(found.info['float_matrices'])} of {len(order)} matrices left in float"
    text += f" (those that int8 hurts most for what they cost: {', '.join(order[:3])}, ...)"
    return replace(found, reason=text)


def _golden(run: Run, file: OpenFile, checks: Checks, tolerance: float) -> dict[str, Any]:
    """Return an input's recipe, torch's float32 answer and this file's own here, which another machine must repeat.

    `tolerance` of a float16 or int8 file is how far it was from torch: another machine's rounding must move it less.
    """
    return {
        "recipe": "pixels[0, i, j] = (7*i + 13*j + i*j//16) % 256",
        "probabilities": [float(p) for p in calibration.apply(run.info["calibration"], checks.golden)[0]],
        "expected": [float(p) for p in file.run(golden_pixels(run.info["preprocess"]["size"]))[0]],
        "tolerance": tolerance,
        **_golden_unlikeness(file, checks),
        "provider": file.provider,
        "cpu": machine()["cpu"],
    }


def _golden_unlikeness(file: OpenFile, checks: Checks) -> dict[str, float]:
    """Return torch's unlikeness of the golden input and this file's own, where the run has one."""
    if checks.unlikeness is None:
        return {}
    found = file.run(golden_pixels(checks.pixels.shape[-1]), UNLIKENESS)
    return {"unlikeness": float(checks.unlikeness[-1]), "expected_unlikeness": float(found[0])}


def metadata(run: Run, model: onnx.ModelProto) -> dict[str, Any]:
    """Return the file's metadata; every value is stored as JSON under `cxr.NAME`."""
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
        "views": ["plain", "flip"] if info["train"].get("tta") == "flip" else ["plain"],
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
        "data": {"name": info["cache"]["dataset"]["name"], "images": info["images"], "metrics": info["metrics"]}
        | _class_figures(run),
        "nodes": counts,
        "toolchain": info["toolchain"]
        | {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "pillow": PIL.__version__},
        "intended_use": NOTICE,
        **({} if run.unlikeness is None else {"unlikeness": describe_output(run.unlikeness)}),
    }


def _class_figures(run: Run) -> dict[str, Any]:
    """The hold-out's figures of each class, for `cxrfast evaluate`; empty where the run has none of this very model."""
    own = run.info["final"]["kind"] == run.chosen and (run.info["metrics"] or {}).get("holdout")
    return {"per_class": clean(run.info["per_class"])} if own and run.info.get("per_class") else {}


def _save(model: onnx.ModelProto, info: dict[str, Any], path: Path) -> int:
    """Write the file and return its size in bytes."""
    del model.metadata_props[:]
    for key, value in info.items():
        model.metadata_props.add(key=PREFIX + key, value=json.dumps(value))
    write(path, model.SerializeToString())
    return path.stat().st_size
