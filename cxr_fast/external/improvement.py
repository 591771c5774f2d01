"""What thresholds and calibration set on films change there: figures out of sample beside those of the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..metrics import figures
from ..metrics.rarity import class_groups
from ..report.comparison import comparison_table, describe_differences
from ..report.evaluation import EvaluationJob, describe_classes
from ..report.summary import FIGURES, Record, as_figure
from ..system.text import Cell, Figure, Table
from ..training.predictions import Scored
from ..training.run_folder import clean
from .evaluation import FigureSpec, Source
from .films import Answers
from .recalibration import NEEDED, NewPoint

SIDES = ("as the file is", "set here")
# Figures of the order of films within a class. A rising map changes no order, so those of the file hold for its copy;
# out of sample the maps of several parts are mixed, which lowers them for no reason of the copy.
RANKING = ("macro_auc", "map")
AT_THRESHOLDS = tuple(key for key in figures.OF_CLASSES if key not in ("auc", "ap"))

RANKING_NOTE = "The order of films within a class does not change: AUC and mAP of the copy are those of the file."
ISOTONIC_NOTE = (
    "The order of films within a class does not change, but films beyond the ends of an isotonic calibration become "
    "equal: AUC and mAP of the copy may differ a little from those of the file."
)


def describe_point(
    source: Source, answers: Answers, point: NewPoint, spec: FigureSpec, found: Mapping[str, Any]
) -> dict[str, Any]:
    """The figures of a new point out of sample, beside those of `found`, an evaluation of the file; JSON-ready.

    `point.probs` and `point.limits` are of the answered films, in order.
    """
    scored = source.score(answers)
    places, rows = source.places, {row["class"]: row for row in found["per_class"]}
    probs, limits = point.probs[:, places], point.limits[:, places]
    new = Scored(of=scored.of, labels=scored.labels, probs=probs, columns=scored.columns)
    names = list(source.matched.names)
    job = EvaluationJob(classes=names, limits=limits, labels=scored.labels, how=spec.resampling)
    intervals = job.intervals(new)
    part = job.part("set here", new, intervals)
    called = {
        side: figures.decisions(p, t).astype(int)
        for side, p, t in (("before", scored.probs, source.limits), ("after", probs, limits))
    }
    known, kept = scored.labels >= 0, point.refused
    each = []
    for c, row in enumerate(describe_classes(new, intervals, job)):
        place = places[c]
        counts = {side: int(found[known[:, c], c].sum()) for side, found in called.items()}
        before = rows[row["class"]]
        each.append(
            {
                "class": row["class"],
                "positives": row["positives"],
                "kept": kept.get(row["class"], ""),
                "threshold": {"before": before["threshold"], "after": float(point.thresholds[place])},
                "called": counts,
                **{key: {"before": before[key], "after": row[key]} for key in AT_THRESHOLDS},
            }
        )
    record = {
        "target": point.target,
        "calibration": point.kind,
        "folds": point.folds,
        "fitted": list(point.fitted),
        "kept": point.refused,
        "part": {**part, "figures": _without_ranking(part["figures"])},
        "per_class": each,
        "differences": _differences(scored, (source.limits, probs, limits), names, spec),
    }
    return dict(clean(record))


def _differences(
    scored: Scored, new: tuple[np.ndarray, np.ndarray, np.ndarray], names: Sequence[str], spec: FigureSpec
) -> Record | None:
    """Paired differences, set here minus as the file is; None without intervals."""
    old, probs, limits = new
    if not spec.resamples or len(set(scored.columns["group"].tolist())) < 2:
        return None
    sides = ((scored.probs, old), (probs, limits))
    found = describe_differences(scored, sides, names, class_groups(scored.labels), spec.resampling)
    return {"figures": _without_ranking(found["figures"])}


def _without_ranking(found: Record) -> dict[str, Any]:
    return {key: each for key, each in found.items() if key not in RANKING}


def figures_for_file(found: Record, record: Record) -> dict[str, Any]:
    """What the metadata of the recalibrated file say: counts, and headline figures before and out of sample."""
    before = found["parts"]["external"]
    return {
        "images": before["n"],
        "groups": before["groups"],
        "before": {key: each["value"] for key, each in before["figures"].items()},
        "out_of_sample": {key: each["value"] for key, each in record["part"]["figures"].items()},
    }


def point_table(record: Record, digits: int = 3) -> Table:
    """The headline figures as the file is and as set here, out of sample, with paired differences."""
    note = ISOTONIC_NOTE if record["calibration"] == "isotonic" else RANKING_NOTE
    if record["differences"]:
        table = comparison_table(record["differences"], SIDES, digits)
        return Table(
            title="As the file is, and with thresholds and calibration set on these films, out of sample",
            columns=table.columns,
            rows=table.rows,
            chosen=table.chosen,
            mark=table.mark,
            notes=[*table.notes, note],
        )
    rows: list[list[Cell]] = [
        [FIGURES[key], as_figure(each, digits)] for key, each in record["part"]["figures"].items() if key in FIGURES
    ]
    return Table(title="Set here, out of sample", columns=["figure", SIDES[1]], rows=rows, notes=[note])


def point_class_table(record: Record, digits: int = 3) -> Table:
    """Each class before and after: threshold, how often it is called, sensitivity and specificity out of sample."""
    rows: list[list[Cell]] = []
    for row in record["per_class"]:
        cells = [Figure(value=row["threshold"][side], digits=digits) for side in ("before", "after")]
        calls = [row["called"][side] for side in ("before", "after")]
        pairs = [row[key][side] for key in ("sensitivity", "specificity", "ece") for side in ("before", "after")]
        shown = [Figure(value=each["value"], digits=digits) for each in pairs]
        name = f"{row['class']} (kept)" if row["kept"] else str(row["class"])
        rows.append([name, row["positives"], *calls, *cells, *shown])
    columns = ["class", "positives", "called before", "after", "threshold before", "after"]
    for name in ("sensitivity", "specificity", "ECE"):
        columns += [f"{name} before", "after"]
    return Table(
        title="Each class before and after",
        columns=columns,
        rows=rows,
        notes=describe_kept(record),
        sortable=True,
    )


def describe_kept(record: Record) -> list[str]:
    """Sentences: how the figures are out of sample, and which classes keep what they had and why."""
    lines = [
        f"Each film is scored by thresholds and a calibration found on the films of other groups, in {record['folds']} "
        "parts. The file that was written has those found on all films."
    ]
    if record["kept"]:
        named = "; ".join(f"{name}: {why}" for name, why in record["kept"].items())
        lines.append(f"A class is set from {NEEDED}. These keep their threshold and calibration: {named}.")
    return lines
