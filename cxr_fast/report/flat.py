"""A run's evaluation as tables of plain rows, and those as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
OF_CLASSES = ("auc", "ap", "jaccard", "f1", "sensitivity", "specificity", "ppv", "npv", "brier", "ece")


def tables(evaluation: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Every table by file name; one without rows is left out."""
    found = {
        "figures.csv": list(figures(evaluation)),
        "per_class.csv": [class_row(row) for row in evaluation["per_class"]],
        "confusion.csv": list(evaluation["confusion"]),
        "curves.csv": list(curves(evaluation)),
        "reliability.csv": list(reliability(evaluation["reliability"])),
        "cooccurrence.csv": list(cooccurrence(evaluation["cooccurrence"])),
    }
    return {name: rows for name, rows in found.items() if rows}


def figures(evaluation: Mapping[str, Any]) -> Iterator[Row]:
    """One row a figure of a part: training, out of fold, hold-out, their studies, each view, each subgroup."""
    for name, part in evaluation["parts"].items():
        yield from _part(part, {"part": name, "level": "image", "by": "", "group": ""})
    studies = evaluation["studies"]
    for name, part in studies["parts"].items():
        yield from _part(part, {"part": name, "level": f"study ({studies['pool']})", "by": "", "group": ""})
    for by, parts in {"view": evaluation["views"], **evaluation["subgroups"]}.items():
        for group, part in parts.items():
            place = {"part": evaluation["per_class_of"], "level": "image", "by": by, "group": group}
            yield from _part(part, place)


def _part(part: Mapping[str, Any], place: Row) -> Iterator[Row]:
    counted = {key: part[key] for key in ("n", "groups", "classes_defined", "classes_total")}
    for name, figure in part["figures"].items():
        yield {**place, "figure": name, **{key: figure[key] for key in ("value", "low", "high")}, **counted}


def class_row(row: Mapping[str, Any]) -> Row:
    """One class on one line: `auc`, `auc_low`, `auc_high`, and so on for each figure."""
    plain = {key: value for key, value in row.items() if key not in OF_CLASSES}
    flat: Row = {}
    for name in (name for name in OF_CLASSES if name in row):
        flat |= {name: row[name]["value"], f"{name}_low": row[name]["low"], f"{name}_high": row[name]["high"]}
    return {**plain, **flat}


def curves(evaluation: Mapping[str, Any]) -> Iterator[Row]:
    """The points of every curve: `roc` false positive rate and sensitivity, `pr` recall and precision."""
    for name, curve in evaluation["curves"].items():
        for kind, points in curve.items():
            for x, y in points:
                yield {"class": name, "curve": kind, "x": x, "y": y}


def reliability(bins: Mapping[str, Any] | None) -> Iterator[Row]:
    """One row a bin of predicted probability."""
    if bins is None:
        return
    edges = bins["edges"]
    for k, count in enumerate(bins["count"]):
        said = {"confidence": bins["confidence"][k], "frequency": bins["frequency"][k]}
        yield {"from": edges[k], "to": edges[k + 1], "count": count, **said}


def cooccurrence(table: Mapping[str, Any]) -> Iterator[Row]:
    """The square of counts, a row a class."""
    for name, counts in zip(table["classes"], table["counts"], strict=True):
        yield {"class": name, **dict(zip(table["classes"], counts, strict=True))}


def to_csv(rows: Sequence[Row]) -> bytes:
    """Rows of equal keys as CSV, full precision, nothing for what is undefined."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()
