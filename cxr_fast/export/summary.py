"""Describe the result of an export: a table of drift, what was kept, and why not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..config import FILM_CHANGES
from ..metrics import calibration
from ..system.text import Table, gigabytes, number
from ..training.operating_points import AFTER
from ..unlikeness.reference import LIMITS
from .variants import Exported


def describe_export(found: Sequence[Exported]) -> list[str | Table]:
    """What was kept and why not, one line per variant, and the classes that lose most."""
    info, first, far = found[0].info, found[0].parity, found[0].drift
    views = " of both views" if "flip" in info["views"] else ""
    parts: list[str | Table] = [
        f"{info['final']['kind']} model{views}, {len(info['labels'])} classes; against torch float32 on {far.images} "
        f"images ({info['parity']['part']}), {far.classes} classes with an AUC; {info['golden']['cpu']}",
        _drift_table(found),
    ]
    if any(one.variant == "fp16" for one in found):
        parts.append("fp16 was computed on this CPU, as float32 between float16 values; `cxrfast verify` it on the GPU")
    if first.cached is not None:
        parts.append(f"largest difference to the sweep's own predictions from stored activations: {first.cached:.1e}")
    for one in found:
        if one.drift.margin is not None and one.variant != "fp32":
            parts.append(
                f"{one.variant}: {one.drift.flips:.1f} of 10,000 decisions change sides, {one.yardstick.describe()}; "
                f"{one.drift.margin.describe()}"
            )
    if first.unlikeness is not None:
        apart = ", ".join(f"{one.variant} {one.parity.unlikeness:.1e} (limit {LIMITS[one.variant]:g})" for one in found)
        parts.append(f"unlikeness: largest difference to torch, as a share of it or of 1: {apart}")
    parts += [_worst_classes(one, info["labels"]) for one in found if one.variant != "fp32" and one.drift.classes]
    for one in found:
        left = one.info["float_matrices"]
        text = f"wrote {one.path}" if one.kept else f"NOT KEPT, {one.path}: {one.reason}"
        parts.append(text + (f" (left in float: {', '.join(left)})" if left and one.kept else ""))
    return parts + _export_notes(info)


def _drift_table(found: Sequence[Exported]) -> Table:
    """A row per variant, then what the float32 model itself does when the same films change."""
    head = ["variant", "largest", "p99", "flips/10,000", "macro AUC", "change", "mAP change", "size", "ms an image"]
    rows = [
        [
            one.variant,
            f"{one.drift.largest:.1e}",
            f"{one.drift.p99:.1e}",
            f"{one.drift.flips:.1f}",
            number(_finite(one.drift.macro_auc - one.drift.macro_drop)),
            _signed(_finite(-one.drift.macro_drop)),
            _signed(_finite(-one.drift.map_drop)),
            gigabytes(one.size),
            "-" if one.variant == "fp16" else f"{1000 * one.seconds:.1f}",
        ]
        for one in found
    ]
    for name, change in found[0].yardstick.changes.items():
        auc = number(_finite(change.macro_auc - change.macro_drop))
        drops = [_signed(_finite(-drop)) for drop in (change.macro_drop, change.map_drop)]
        sizes = [f"{change.largest:.1e}", f"{change.p99:.1e}", f"{change.flips:.1f}"]
        rows.append([f"film: {FILM_CHANGES[name]}", *sizes, auc, *drops, "", ""])
    return Table(columns=head, rows=rows)


def _export_notes(info: dict[str, Any]) -> list[str | Table]:
    """What calibration, thresholds and provenance of a file ask to be said."""
    parts: list[str | Table] = []
    if info["calibration"] is not None and "adjusted" in info["calibration"]:
        parts.append(f"note: {calibration.describe(info['calibration'], len(info['labels']))}; thresholds moved along")
    if AFTER in info["threshold_source"]:
        fitted = info["calibration"]
        said = calibration.describe(fitted, len(info["labels"])) if fitted else "none"
        parts.append(f"thresholds: {info['threshold_source']}; calibration: {said}")
    if ", used on " in info["threshold_source"]:
        parts.append(f"note: thresholds: {info['threshold_source']}; the run's figures are not those of this model")
    if info["provenance"]:
        parts.append(f"note: {info['provenance'].upper()}")
    return parts


def _worst_classes(one: Exported, labels: list[str], most: int = 3) -> str:
    """The classes whose AUC a variant lowers most."""
    pairs = zip(one.drift.auc_drop, labels, strict=True)
    drops = [(drop, name) for drop, name in pairs if drop is not None and drop >= 0.00005]
    worst = ", ".join(f"{name} {_signed(-drop)}" for drop, name in sorted(drops, reverse=True)[:most])
    return f"{one.variant}: largest AUC losses {worst}" if worst else f"{one.variant}: no class loses AUC"


def _finite(value: float) -> float | None:
    """None for NaN."""
    return value if math.isfinite(value) else None


def _signed(value: float | None) -> str:
    """A change with its sign, `-` where it is undefined."""
    return "-" if value is None else f"{round(value, 4) + 0.0:+.4f}"  # no -0.0000
