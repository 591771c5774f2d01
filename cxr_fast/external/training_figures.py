"""The figures of the training data that a model file holds, beside those of other films."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..inference.model_file import is_number
from ..metrics.figures import MEANS
from ..report.summary import FIGURES, Record
from ..system.text import Figure, Table

WORDS = {"holdout": "hold-out", "out_of_fold": "validation, out of fold"}
# Of each class: what the training figures hold of it.
OF_CLASSES = ("auc", "ap", "jaccard", "f1", "sensitivity", "specificity", "ppv", "npv")


def compare_with_training(info: Mapping[str, Any], found: Record, lacking: Sequence[str]) -> dict[str, Any] | None:
    """The figures in a model file's metadata, those of an evaluation, and the differences; JSON-ready.

    A mean over classes is taken over the same classes on both sides, where the file holds the figures of each class;
    elsewhere, and for figures over all labels as one, there is a difference only where the films have all classes
    (`lacking` is empty). None where the file holds no figures, as after `export --final` of another model than the
    run's.
    """
    data = info.get("data")
    data = data if isinstance(data, Mapping) else {}
    metrics = data.get("metrics")
    metrics = metrics if isinstance(metrics, Mapping) else {}
    part = next((name for name in WORDS if isinstance(metrics.get(name), Mapping)), "")
    if not part:
        return None
    then, here = metrics[part], found["parts"]["external"]
    rows = data.get("per_class") if part == "holdout" else []
    rows = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    rows = {str(row.get("class")): row for row in rows}
    pairs = [(rows[row["class"]], row) for row in found["per_class"] if row["class"] in rows]
    figures = {}
    for key in FIGURES:
        if key in here["figures"] and is_number(then.get(key)):
            figures[key] = _pair(key, then[key], here["figures"][key]["value"], pairs, bool(lacking))
    return {
        "data": str(data.get("name", "")),
        "part": part,
        "images": then.get("n"),
        "classes_defined": then.get("classes_defined"),
        "classes_total": then.get("classes_total"),
        "figures": figures,
        "per_class": [_class_pair(one, other) for one, other in pairs],
    }


def _pair(
    key: str, then: float, here: float | None, pairs: Sequence[tuple[Record, Record]], lacks: bool
) -> dict[str, Any]:
    if key in MEANS and pairs:
        both = [(one.get(MEANS[key]), other[MEANS[key]]["value"]) for one, other in pairs]
        values = np.array([(a, b) for a, b in both if is_number(a) and is_number(b)], float).reshape(-1, 2)
        if not len(values):
            return {"training": None, "here": None, "difference": None, "classes": 0}
        a, b = values.mean(axis=0).tolist()
        return {"training": a, "here": b, "difference": b - a, "classes": len(values)}
    difference = None if lacks or here is None else here - then
    return {"training": then, "here": here, "difference": difference, "classes": None}


def _class_pair(one: Record, other: Record) -> dict[str, Any]:
    """A class in training and here: positives, and its figures of OF_CLASSES."""
    out: dict[str, Any] = {"class": other["class"]}
    out["positives"] = {"training": one.get("positives"), "here": other["positives"]}
    for key in OF_CLASSES:
        a, b = one.get(key), other[key]["value"]
        known = is_number(a) and is_number(b)
        a = a if is_number(a) else None
        out[key] = {"training": a, "here": b, "difference": b - a if known else None}
    return out


def training_table(record: Record | None, digits: int = 3) -> Table:
    """The headline figures on the training data and on these films; no row where the file holds none."""
    rows = []
    for key, each in (record or {"figures": {}})["figures"].items():
        cells = [Figure(value=each[side], digits=digits) for side in ("training", "here")]
        difference = Figure(value=each["difference"], digits=digits, signed=True)
        rows.append([FIGURES[key], *cells, difference, each["classes"]])
    by_class = any(row[-1] is not None for row in rows)
    columns = ["figure", _of(record), "these films", "difference", "classes of the mean"]
    return Table(
        title="Beside the figures of the training data",
        columns=columns if by_class else columns[:-1],
        rows=rows if by_class else [row[:-1] for row in rows],
        notes=_notes(record),
    )


def _of(record: Record | None) -> str:
    return f"{WORDS[record['part']]} of {record['data']}" if record else ""


def _notes(record: Record | None) -> list[str]:
    if not record:
        return []
    images = f"{record['images']:,} images, " if isinstance(record["images"], int) else ""
    said = f"The {_of(record)}: {images}{record['classes_defined']} of {record['classes_total']} classes with an AUC. "
    if record["per_class"]:
        said += "A mean over classes is over those that have the figure on both sides. "
    else:
        said += "The file does not hold the figures of each class, so means may be over other classes than here. "
    return [
        f"{said}The other figures have a difference only where these films have all classes of the model. "
        "Differences have no interval: the file holds no predictions of the training data."
    ]


def training_class_table(record: Record | None, digits: int = 3) -> Table:
    """AUC, sensitivity and specificity of each class there and here; no row where the file does not hold them."""
    names = {"auc": "AUC", "sensitivity": "sensitivity", "specificity": "specificity"}
    rows = []
    for each in (record or {"per_class": []})["per_class"]:
        cells = [each["positives"][side] for side in ("training", "here")]
        for key in names:
            cells += [
                Figure(value=each[key]["training"], digits=digits),
                Figure(value=each[key]["here"], digits=digits),
            ]
            cells.append(Figure(value=each[key]["difference"], digits=digits, signed=True))
        rows.append([str(each["class"]), *cells])
    columns = ["class", "positives there", "here"]
    for name in names.values():
        columns += [f"{name} there", "here", "difference"]
    return Table(title=f"Each class beside the {_of(record)}", columns=columns, rows=rows, sortable=True)
