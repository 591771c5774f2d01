"""Means over classes as records and tables: over which classes, by how frequent they are, and gaps of subgroups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..metrics.intervals import FEW, Interval
from ..metrics.rarity import BORDERS, GROUPS, group_means
from ..metrics.subgroups import Gap
from ..system.text import Cell, Figure, Label, Table
from .charts import excludes_zero
from .summary import FIGURES, PARTS, Record, as_figure

NAMED = 5
RARITY_FIGURES = {"auc": "AUC", "map": "mAP"}
GAP_NOTE = (
    "The widest gap between two values of a column, both scored on the same resamples of groups, over the classes with "
    f"positives and negatives in at least {FEW} groups of each. The widest of several gaps is wide by chance: its "
    "interval is wider for that (Bonferroni), and one that holds 0 shows no difference."
)


def name_some(names: Sequence[str]) -> str:
    """The first NAMED names, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def interval_over(interval: Interval | None, classes: Sequence[str]) -> dict[str, Any] | None:
    """Which classes the interval of a mean is over: how many, the mean over them, and the names of those left out."""
    if interval is None or interval.classes is None:
        return None
    left = [name for name, inside in zip(classes, interval.classes, strict=True) if not inside]
    return {"classes": int(interval.classes.sum()), "value": float(interval.value), "left_out": left}


def mean_record(value: float, interval: Interval | None, classes: Sequence[str]) -> dict[str, Any]:
    """A mean over classes with its interval, and in `over` the classes that the interval is over.

    Where `over` leaves classes out, low and high belong to its value, which is the mean over the others.
    """
    low = high = None
    if interval is not None and interval.low <= interval.value <= interval.high and interval.low < interval.high:
        low, high = float(interval.low), float(interval.high)
    return {"value": value, "low": low, "high": high, "over": interval_over(interval, classes)}


def mean_difference(a: float, b: float, interval: Interval, classes: Sequence[str]) -> dict[str, Any]:
    """The difference of two runs in a mean over classes, as `mean_record` with both sides."""
    ends = {"low": float(interval.low), "high": float(interval.high)}
    return {"a": a, "b": b, "difference": b - a, **ends, "over": interval_over(interval, classes)}


def left_out(part: Record) -> str:
    """The classes that the intervals of means in a part, or of a comparison, leave out, as words; empty for none."""
    over = part["figures"].get("macro_auc", {}).get("over")
    if not over or not over["left_out"]:
        return ""
    return (
        f"intervals of means are over {over['classes']} of {over['classes'] + len(over['left_out'])} classes, without "
        f"{name_some(over['left_out'])}, which have positives or negatives in fewer than {FEW} groups"
    )


# --------------------------------------------------------------------------------------- head, medium, tail


def rarity_subsets(groups: np.ndarray) -> dict[str, np.ndarray]:
    """The classes of each of GROUPS that has any, bool (C,) by name."""
    return {name: groups == name for name in GROUPS if (groups == name).any()}


def rarity_classes(labels: np.ndarray, groups: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Each group's border, its classes, and their positives in the images of the folds, labels (n, C)."""
    positives = (labels == 1).sum(axis=0)
    return {
        name: {
            "border": BORDERS[name],
            "classes": [each for each, inside in zip(classes, chosen, strict=True) if inside],
            "positives": positives[chosen].tolist(),
        }
        for name, chosen in rarity_subsets(groups).items()
    }


def rarity_record(
    scored: tuple[np.ndarray, np.ndarray],
    groups: np.ndarray,
    intervals: Mapping[str, Interval],
    classes: Sequence[str],
) -> dict[str, Any]:
    """AUC and mAP of head, medium and tail classes in one part, its labels and probabilities (n, C)."""
    out: dict[str, Any] = {}
    for name, found in group_means(*scored, groups).items():
        inside = [each for each, group in zip(classes, groups, strict=True) if group == name]
        out[name] = {key: found[key] for key in ("classes_defined", "classes_total")}
        for key, each in (("auc", "auc"), ("map", "ap")):
            figure = mean_record(float(found[key]), intervals.get(f"{name}_{each}"), classes)
            if figure["over"]:
                figure["over"]["left_out"] = [left for left in figure["over"]["left_out"] if left in inside]
            out[name][key] = figure
    return out


def rarity_difference(
    labels: np.ndarray,
    sides: Sequence[np.ndarray],
    groups: np.ndarray,
    intervals: Mapping[str, Interval],
    classes: Sequence[str],
) -> dict[str, Any]:
    """Differences of two runs' probabilities (n, C) in the AUC and mAP of head, medium and tail classes."""
    one, two = (group_means(labels, probs, groups) for probs in sides)
    out: dict[str, Any] = {}
    for name, found in one.items():
        inside = [each for each, group in zip(classes, groups, strict=True) if group == name]
        out[name] = {key: found[key] for key in ("classes_defined", "classes_total")}
        for key, each in (("auc", "auc"), ("map", "ap")):
            ends = intervals[f"{name}_{each}"]
            figure = mean_difference(float(found[key]), float(two[name][key]), ends, classes)
            figure["over"]["left_out"] = [left for left in figure["over"]["left_out"] if left in inside]
            out[name][key] = figure
    return out


def rarity_table(parts: Mapping[str, Record], classes: Record | None = None, digits: int = 3) -> Table:
    """AUC and mAP of head, medium and tail classes: a row for each in each part, a part by its title and its `rarity`.

    No row where a run was made before these figures.
    """
    rows: list[list[Cell]] = [
        [
            f"{title}, {name}",
            Label(text=f"{found['classes_defined']} of {found['classes_total']}", value=found["classes_defined"]),
            *(_as_cell(found[key], digits) for key in RARITY_FIGURES),
        ]
        for title, part in parts.items()
        for name, found in (part.get("rarity") or {}).items()
    ]
    return Table(
        title="Head, medium and tail classes",
        columns=["classes", "with an AUC", *RARITY_FIGURES.values()],
        rows=rows,
        notes=rarity_notes(classes) if rows else [],
    )


def _as_cell(found: Any, digits: int) -> Figure:
    return as_figure(found if isinstance(found, Mapping) else {"value": found}, digits)


def run_rarity_table(run: Record, digits: int = 3) -> Table:
    """`rarity_table` of the figures in run.json, out of fold and on the hold-out, which have no intervals."""
    parts = {PARTS[name]: run["metrics"][name] for name in ("out_of_fold", "holdout") if run["metrics"][name]}
    return rarity_table(parts, digits=digits)


def rarity_notes(classes: Record | None, of: str = "the images of the folds") -> list[str]:
    """Where the borders are, and where known which classes lie between them; `of` what images their shares are."""
    if not classes:
        borders = "; ".join(f"{name} classes: {border}" for name, border in BORDERS.items())
        return [f"{borders}, of the known labels of {of}."]
    texts = [
        f"{name.capitalize()} ({found['border']}): {name_some(found['classes'])}, {_span(found['positives'])} positives"
        for name, found in classes.items()
    ]
    return [f"By the share of positives among the known labels of {of}. {'; '.join(texts)}."]


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def rarity_comparison_table(pair: Record, names: Sequence[str], digits: int = 3) -> Table:
    """AUC and mAP of head, medium and tail classes in two runs, and the differences.

    Chosen: rows whose interval holds no 0.
    """
    of = ["these films"] if pair.get("part") == "external" else []
    rows = [
        (f"{word}, {name} classes", found[key])
        for key, word in RARITY_FIGURES.items()
        for name, found in pair.get("rarity", {}).items()
    ]
    return Table(
        title=f"Differences by how frequent classes are, {names[1]} minus {names[0]}",
        columns=["figure", *names, "difference"],
        rows=[
            [
                name,
                *(Figure(value=found[side], digits=digits) for side in "ab"),
                as_figure(found | {"value": found["difference"]}, digits, signed=True),
            ]
            for name, found in rows
        ],
        chosen=[place for place, (_, found) in enumerate(rows) if excludes_zero(found)],
        mark="differs",
        notes=rarity_notes(pair.get("rarity_classes"), *of) if rows else [],
    )


# ------------------------------------------------------------------------------------------ gaps of subgroups


def gap_record(gap: Gap, classes: Sequence[str]) -> dict[str, Any]:
    """One gap, JSON-ready."""
    left = [name for name, inside in zip(classes, gap.classes, strict=True) if not inside]
    pair = {"higher": gap.higher, "lower": gap.lower, "pairs": gap.pairs}
    ends = {"value": gap.value, "low": gap.low, "high": gap.high}
    return pair | ends | {"classes": int(gap.classes.sum()), "left_out": left}


def gap_table(gaps: Record) -> Table:
    """The widest gap of each column and figure, with its interval."""
    rows = [
        [
            f"{by.lower()}, {FIGURES[figure]}",
            f"{found['higher']} above {found['lower']}",
            Figure(value=found["value"], low=found["low"], high=found["high"], signed=True),
            found["classes"],
            found["pairs"],
        ]
        for by, figures in gaps.items()
        for figure, found in figures.items()
    ]
    return Table(
        title="Widest gaps between subgroups",
        columns=["column", "values", "gap", "classes", "pairs compared"],
        rows=rows,
        notes=[GAP_NOTE] if rows else [],
    )
