"""What `cxrfast sweep` prints: its plan, hints before it starts, and the figures of the run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ...config import NOTICE, SweepSpec
from ...recipes import sweep_spec
from ...system.text import duration, gigabytes, number
from ..console import Part

HOUR = 3600  # seconds
GRID_ROWS = 20  # configurations printed; a page and a file have all


def describe_plan(plan: Any, spec: SweepSpec) -> str:
    """The plan of a sweep, before it starts."""
    count = plan.trainable
    dropped = f", {plan.failed} failed images left out" if plan.failed else ""
    extra = "".join(f", {part} {count[part]:,}" for part in ("norm",) if count.get(part))
    many = f"{plan.configurations} configurations, " if plan.configurations > 1 else ""
    time = "unknown (no GPU here to time a step on)" if math.isnan(plan.seconds) else duration(plan.seconds)
    lines = [
        f"{plan.images:,} images, {plan.groups:,} groups, {plan.classes} classes{dropped}; hold-out "
        f"{plan.holdout_images:,} images; {plan.folds} folds by {spec.split_by}",
        f"activations {gigabytes(plan.activation_bytes)} ({plan.where}), on {plan.device}, {plan.precision}",
        f"trainable parameters {count['total']:,}: blocks {count['blocks']:,}, head {count['head']:,}{extra}",
        f"{many}epochs {','.join(map(str, plan.epochs))} from one run of {plan.epochs[-1]} a fold; final model "
        f"{spec.final}; expected time {time} in all -> {plan.out}",
    ]
    if plan.cluster:
        lines.append(f"cluster: {plan.cluster}")
    if plan.resumed:
        lines.append(f"going on with the unfinished run in {plan.out}.partial")
    return "\n".join(lines)


def faster_first(plan: Any, spec: SweepSpec, recipe: str) -> list[str]:
    """A hint where a sweep is expected to take over an hour and a quicker one can be had from the same cache."""
    if plan.resumed or not plan.seconds > HOUR:  # NaN where the time is unknown
        return []
    ways, tuned = [], sweep_spec("tuned").epochs[-1]
    if recipe not in ("tuned", "longtail") and tuned < spec.epochs[-1]:
        ways.append(f"--recipe tuned ({tuned} epochs instead of {spec.epochs[-1]})")
    if plan.trainable["blocks"]:
        ways.append("--train-blocks 0 (the head alone)")
    return [f"a faster first try from the same cache: {', or '.join(ways)}"] if ways else []


def streaming_notes(residency: str, size: int, shuffles: set[str]) -> list[str]:
    """A hint where each epoch will read a cache larger than memory in an order that no disk likes."""
    from ...activations.loader import SHARE
    from ...system import hardware

    if residency != "stream" or "full" not in shuffles or size < SHARE * hardware.memory_available():
        return []
    return [
        "every epoch reads rows from all over a cache larger than memory; --shuffle block reads neighbours together, "
        "which slow and shared disks need (it changes the order of training, and so the figures)"
    ]


def describe_run(run: dict[str, Any]) -> list[Part]:
    """The folds, the epoch budgets, the grid, positives per fold, and the figures of the final model."""
    from ...metrics import calibration
    from ...report import class_means, tables
    from ...report.configurations import grid_tables
    from ...report.shortcut_table import FIRST, shortcut_table
    from ...training.operating_points import describe_target, describe_two_means

    parts: list[Part] = ["", tables.fold_table(run, 4), "", tables.budget_table(run, 4), ""]
    if run.get("seeds"):
        parts += [grid_tables.seed_table(run, 4), ""]
    if len(run["grid"]) > 1 or run.get("lost"):
        parts += [grid_tables.grid_table(run, 4, most=GRID_ROWS), ""]
    goal = describe_target(run["spec"]["threshold_target"])
    figures = tables.run_figure_table(run, 4)
    notes = [f"thresholds from out-of-fold {goal}"]
    if both := run.get("out_of_fold_auc"):
        notes.append(describe_two_means(both))
    parts += [tables.positives_table(run), "", replace(figures, notes=notes)]
    frequent = class_means.run_rarity_table(run, 4)
    if frequent.rows:
        parts += ["", frequent]
    if run["calibration"]:
        parts += ["", f"calibration: {calibration.describe(run['calibration'], len(run['classes']))}"]
    if run["finals"]:
        parts += ["", tables.final_table(run, 4)]
    parts += ["", tables.probe_table(run, 4)]
    if (found := shortcut_table(run, most=FIRST)).rows:
        parts += ["", found]
    if held := run["metrics"]["holdout"]:
        said = f" ({run['provenance']})" if run["provenance"] else ""
        parts.append(
            f"\nheld-out macro AUC over the {held['frequent_classes']} classes with at least "
            f"{held['frequent_min_positives']} positives: {number(held['frequent_auc'])}{said}"
        )
    return [*parts, NOTICE]
