"""The sections of a run's page that say how well the model does."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..metrics import calibration as calibrate
from . import charts
from .html import (
    PARTS,
    Cell,
    Lines,
    count_cell,
    figure_cell,
    listing,
    note,
    number,
    of_classes,
    pair,
    picture,
    section,
    table,
    value_cell,
)
from .summary import FEW, FIGURES, TIERS, Material

Row = Mapping[str, Any]
FINAL_FIGURES = ("macro_auc", "map", "label_accuracy", "sample_jaccard", "class_jaccard", "macro_f1")
VIEW_FIGURES = ("macro_auc", "micro_auc", "map", "macro_f1")
TIER_ORDER = {name: place for place, name in enumerate(reversed(TIERS))}
PAIRS = 10


def figures(material: Material) -> str:
    """Training, validation and hold-out beside each other, then the three final models and the studies."""
    parts = {name: material.parts[name] for name in PARTS if material.parts.get(name)}
    if not parts:
        return ""
    told = [f"{PARTS[name]}: {part['of']}." for name, part in parts.items()]
    if material.run["final"]["kind"] == "best-fold":
        told.append(
            "The best fold's model is chosen among folds with different validation images: part of its lead is the "
            "images it happened to be judged on. The hold-out has no part in that choice."
        )
    told.append(
        f"Thresholds: {material.run['threshold_source']}; none was chosen on the hold-out. A class without a positive, "
        "or without a negative, has no AUC: it is left out of the mean and counted."
    )
    return section(
        "figures",
        "Figures",
        part_table({PARTS[name]: part for name, part in parts.items()}, "Figures of each part"),
        listing([said for said in (material.confidence, *told) if said], "note"),
        _finals(material.run),
        _studies(material),
    )


def part_table(parts: Mapping[str, Row], caption: str) -> str:
    """One column a part: its size, then every figure with its interval."""
    rows: Lines = [
        ["Images", *(count_cell(part["n"]) for part in parts.values())],
        ["Groups", *(count_cell(part["groups"]) for part in parts.values())],
        ["Classes with an AUC", *(of_classes(part) for part in parts.values())],
    ]
    for key, name in FIGURES.items():
        if any(key in part["figures"] for part in parts.values()):
            rows.append([name, *(figure_cell(part["figures"].get(key)) for part in parts.values())])
    return table(["figure", *parts], rows, caption=caption, show_caption=False)


def _finals(run: Row) -> str:
    if not run["finals"]:
        return ""
    rows: Lines = [[kind, *(value_cell(found[key]) for key in FINAL_FIGURES)] for kind, found in run["finals"].items()]
    marks = [kind == run["final"]["kind"] for kind in run["finals"]]
    head = ["final model", *(FIGURES[key] for key in FINAL_FIGURES)]
    said = "The marked one was chosen by flag before the hold-out was scored, never by these figures."
    return table(head, rows, caption="The three final models on the hold-out", marks=marks) + note(said)


def _studies(material: Material) -> str:
    if material.evaluation is None:
        return ""
    studies, columns = material.evaluation["studies"], {}
    for name, part in studies["parts"].items():
        if material.parts.get(name):
            columns[f"{PARTS[name]}, by image"] = material.parts[name]
        columns[f"{PARTS[name]}, by study"] = part
    if not columns:
        return ""
    pool = {"mean": "averaged", "max": "replaced by the highest"}.get(studies["pool"], studies["pool"])
    whole = all(part["n"] == part["groups"] for part in studies["parts"].values())
    alike = " Here each group counts as one study; a manifest's column `study` can say otherwise." if whole else ""
    return (
        "<h3>By image and by study</h3>"
        + part_table(columns, "Figures by image and by study")
        + note(
            f"By study: the probabilities of a study's views are {pool}, and the study is scored once; its rows of "
            f"“Images” count studies.{alike}"
        )
    )


def classes(material: Material) -> str:
    """The per-class tables, the tiers, the best and the worst, and the two plots of all classes."""
    if not material.rows:
        return ""
    head = ["class", "AUC", "AP", "prevalence", "Jaccard", "F1", "threshold", "positives", "tier"]
    return section(
        "classes",
        f"Classes on {material.judged_on}",
        _tiers(material),
        _best_and_worst(material),
        table(head, [_class_row(row) for row in material.ranked()], caption="All classes", css="full sortable"),
        note(
            "AP: average precision, the area under the precision-recall curve; by chance it equals the prevalence. "
            "A class without an interval has positives or negatives in too few groups; its figures may be luck."
        ),
        pair(
            picture(
                "AUC of each class with its interval, positives in brackets",
                material.plots.get("evaluation_plot.png"),
                "AUC with 95 % interval; positives in brackets. Dotted: chance.",
            ),
            picture(
                "Average precision of each class with its interval, against its prevalence",
                material.plots.get("precision_plot.png"),
                "Average precision with 95 % interval against prevalence.",
            ),
        ),
        _at_threshold(material),
    )


def _class_row(row: Row) -> list[str | Cell]:
    return [
        str(row["class"]),
        figure_cell(row["auc"]),
        value_cell(row["ap"]["value"]),
        value_cell(row["prevalence"]),
        value_cell(row["jaccard"]["value"]),
        value_cell(row["f1"]["value"]),
        value_cell(row["threshold"]),
        count_cell(row["positives"]),
        Cell(text=str(row["tier"]), sort=TIER_ORDER.get(row["tier"])),
    ]


def _tiers(material: Material) -> str:
    tiers = [row["tier"] for row in material.rows]
    words = "; ".join(f"{tiers.count(tier)} {tier} ({text})" for tier, text in TIERS.items())
    return note(f"Published tiers: {words}.")


def _best_and_worst(material: Material) -> str:
    tables = []
    for caption, rows in zip(("Best", "Worst"), material.best_and_worst(), strict=True):
        lines: Lines = [[str(row["class"]), figure_cell(row["auc"]), count_cell(row["positives"])] for row in rows]
        title = f"{caption} {('', 'one', 'two', 'three', 'four', 'five')[len(rows)]}"
        title += f" with at least {FEW} positives" if rows and rows[0]["positives"] >= FEW else ""
        tables.append(table(["class", "AUC", "positives"], lines, caption=title) if rows else "")
    return pair(*tables)


def _at_threshold(material: Material) -> str:
    keys = {"sensitivity": "sensitivity", "specificity": "specificity", "ppv": "PPV", "npv": "NPV"}
    rows: Lines = [
        [str(row["class"]), value_cell(row["threshold"]), *(figure_cell(row[key]) for key in keys)]
        for row in material.ranked()
    ]
    return table(
        ["class", "threshold", *keys.values()], rows, caption="At each class's threshold", css="full sortable"
    ) + note(
        "PPV and NPV hold for the prevalence of these images; elsewhere they differ. A figure equal in every "
        "resample, such as 1.000, has no interval. Brier score and calibration error of each class: per_class.csv."
    )


def curves(material: Material) -> str:
    """ROC and precision-recall curves, and the confusion matrices of the largest classes."""
    if material.evaluation is None:
        return ""
    drawn = pair(
        picture(
            "ROC curves of the largest classes",
            material.plots.get("roc_curves.png"),
            "Six largest classes in colour, with their AUC; all others in grey.",
        ),
        picture(
            "Precision-recall curves of the largest classes",
            material.plots.get("pr_curves.png"),
            "The same classes, with their average precision.",
        ),
    )
    return section("curves", f"Curves and confusions on {material.judged_on}", drawn, _confusions(material))


def _confusions(material: Material) -> str:
    assert material.evaluation is not None
    rows = charts.largest(dict(material.evaluation))
    keys = ("tp", "fp", "fn", "tn")
    lines: Lines = [[str(row["class"]), *(count_cell(row[key]) for key in keys)] for row in rows]
    counts = table(
        ["class", "true pos.", "false pos.", "false neg.", "true neg."],
        lines,
        caption="Counts of the six largest classes" if len(rows) == charts.LARGEST else "Counts of the classes",
    )
    image = picture(
        "Confusion matrices of the largest classes",
        material.plots.get("confusion_matrices.png"),
        "Each row of a matrix adds up to 100 %.",
    )
    return pair(image, counts) if rows else ""


def calibration(material: Material) -> str:
    """The reliability diagram and its bins."""
    bins = None if material.evaluation is None else material.evaluation["reliability"]
    if not bins:
        return ""
    fitted = material.run["calibration"]
    said = f"calibrated ({calibrate.describe(fitted, len(material.run['classes']))})" if fitted else "not calibrated"
    image = picture(
        "Reliability diagram: observed frequency against predicted probability",
        material.plots.get("reliability_diagram.png"),
    )
    rows: Lines = [
        [f"{low:.2f}–{high:.2f}", count_cell(int(count)), value_cell(mean), value_cell(seen)]
        for low, high, count, mean, seen in zip(
            bins["edges"][:-1], bins["edges"][1:], bins["count"], bins["confidence"], bins["frequency"], strict=True
        )
        if count
    ]
    head = ["predicted", "labels", "mean predicted", "observed"]
    return section(
        "calibration",
        f"Calibration on {material.judged_on}",
        note(f"Calibration error (ECE) {number(bins['ece'])} over all known labels pooled; probabilities are {said}."),
        pair(image, table(head, rows, caption="Bins that hold a label")),
    )


def together(material: Material) -> str:
    """Which findings occur together in the labels."""
    if material.evaluation is None:
        return ""
    found = material.evaluation["cooccurrence"]
    counts, names = np.array(found["counts"], float), found["classes"]
    if len(names) < 2:
        return ""
    order = sorted(itertools.combinations(range(len(names)), 2), key=lambda ij: -counts[ij])[:PAIRS]
    rows: Lines = [
        [f"{names[i]} + {names[j]}", count_cell(int(counts[i, j])), _share(counts, i, j), _share(counts, j, i)]
        for i, j in order
        if counts[i, j]
    ]
    head = ["findings", "images", "of the first", "of the second"]
    return section(
        "cooccurrence",
        "Findings that occur together",
        table(head, rows, caption="Most frequent pairs") if rows else note("No image has two findings."),
        picture(
            "Share of the images with one finding that have another as well",
            material.plots.get("cooccurrence_plot.png"),
            "Labels, not predictions. White: never together, or a finding without images. Counts: cooccurrence.csv.",
            wide=True,
        ),
    )


def _share(counts: np.ndarray, i: int, j: int) -> Cell:
    share = counts[i, j] / counts[i, i] if counts[i, i] else 0.0
    return Cell(text=f"{100 * share:.0f} %", sort=share)


def views(material: Material) -> str:
    """The figures of each view and of each subgroup the manifest has columns for."""
    if material.evaluation is None:
        return ""
    groupings = {"View": material.evaluation["views"], **material.evaluation["subgroups"]}
    tables = [part_rows(title, parts) for title, parts in groupings.items() if parts]
    return section(
        "views",
        "Views and subgroups",
        *tables,
        note(
            f"On {material.judged_on}. Small parts lack classes, and means over other classes do not compare: "
            "mind the column “classes”, and prefer micro AUC there."
        )
        if tables
        else "",
    )


def part_rows(title: str, parts: Mapping[str, Row]) -> str:
    """One row a part: its size, the classes with an AUC, and a few figures with intervals."""
    rows: Lines = [
        [
            name or "unknown",
            count_cell(part["n"]),
            count_cell(part["groups"]),
            Cell(text=of_classes(part), sort=part["classes_defined"]),
            *(figure_cell(part["figures"].get(key)) for key in VIEW_FIGURES),
        ]
        for name, part in parts.items()
    ]
    head = [title.lower(), "images", "groups", "classes", *(FIGURES[key] for key in VIEW_FIGURES)]
    return table(head, rows, caption=f"By {title.lower()}", css="full sortable")


ALL: Sequence[Any] = (figures, classes, curves, calibration, together, views)
