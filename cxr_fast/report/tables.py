"""Every table of a run and its evaluation, made once: page, card and command line show the same one.

`run` is run.json, `evaluation` what `evaluate` found, `digits` the decimals of the figures.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from ..system.text import NONE, Cell, Figure, Label, Table, counted
from .summary import FEW, FIGURES, PARTS, TIERS, Record, as_figure, behind_intervals, of_classes

FINAL_FIGURES = ("macro_auc", "map", "label_accuracy", "sample_jaccard", "class_jaccard", "macro_f1")
GROUP_FIGURES = ("macro_auc", "micro_auc", "map", "macro_f1")
AT_THRESHOLD = {"sensitivity": "sensitivity", "specificity": "specificity", "ppv": "PPV", "npv": "NPV"}
# Every how many epochs the training progression has a row.
EVERY = 10
# Rows of the findings that occur together.
PAIRS = 10
PROBE = (
    "The probe is one logistic regression a class on the embeddings as the backbone gave them, fitted on the same "
    "folds. A trained model below it was trained badly: the features hold more than it uses."
)

# ------------------------------------------------------------------------------------------ how the model was made


def fold_table(run: Record, digits: int = 3) -> Table:
    """Validation macro AUC of each fold at each epoch budget, the best fold chosen; their mean and std in the foot."""
    budgets = run["budgets"]
    return Table(
        title="Validation macro AUC of each fold",
        columns=[
            *("fold", "images", "classes with an AUC"),
            *(f"{counted(b['epochs'], 'epoch')}{' (chosen)' if b['chosen'] else ''}" for b in budgets),
        ],
        rows=[
            [
                str(fold["fold"] + 1),
                fold["images"],
                fold["classes_defined"],
                *(Figure(value=fold[f"auc_{b['epochs']}"], digits=digits) for b in budgets),
            ]
            for fold in run["folds"]
        ],
        chosen=[row for row, fold in enumerate(run["folds"]) if fold["best"]],
        mark="best",
        foot=[
            [name, "", "", *(Figure(value=b[key], digits=digits) for b in budgets)]
            for name, key in (("mean", "mean_auc"), ("std", "std_auc"))
        ],
    )


def budget_table(run: Record, digits: int = 3) -> Table:
    """Mean and std over folds of the validation macro AUC, one row an epoch budget."""
    return Table(
        title="Validation macro AUC of each epoch budget, over folds",
        columns=["epochs", "mean AUC", "std"],
        rows=[
            [str(b["epochs"]), *(Figure(value=b[key], digits=digits) for key in ("mean_auc", "std_auc"))]
            for b in run["budgets"]
        ],
        chosen=[row for row, b in enumerate(run["budgets"]) if b["chosen"]],
    )


def history_table(history: Sequence[Record]) -> Table:
    """Losses, validation AUC and learning rate over folds: the first epoch, every EVERY-th and the last."""
    last = max(int(line["epoch"]) for line in history)
    shown = sorted({1, *range(EVERY, last + 1, EVERY), last})
    return Table(
        title="Training progression, means over folds",
        columns=[
            *("epoch", "folds", "training loss", "validation loss"),
            *("validation AUC", "lowest", "highest", "learning rate"),
        ],
        rows=[_history_row(epoch, [line for line in history if line["epoch"] == epoch]) for epoch in shown],
    )


def _history_row(epoch: int, lines: Sequence[Record]) -> list[Cell]:
    def values(key: str) -> list[float]:
        return [float(line[key]) for line in lines if line[key] is not None]

    def mean(key: str, digits: int) -> Figure:
        return Figure(value=float(np.mean(values(key))) if values(key) else None, digits=digits)

    rates, scores = values("lr"), values("valid_auc")
    return [
        str(epoch),
        len(lines),
        # Losses are of the order of 0.01.
        mean("train_loss", 4),
        mean("valid_loss", 4),
        mean("valid_auc", 3),
        Figure(value=min(scores, default=None)),
        Figure(value=max(scores, default=None)),
        f"{min(rates):.3g}" if rates else NONE,
    ]


def flow_table(run: Record, unknown_labels: int | None) -> Table:
    """Count images and labels from the dataset to the folds, with what was left out on the way."""
    images, held, classes = run["images"], run["images"]["holdout"], len(run["classes"])
    skipped = int(run["cache"]["dataset"].get("skipped_missing") or 0)
    other = images["in"] - images["failed"] - images["used"]
    labels = images["used"] * classes
    rows: dict[str, Cell] = {"Listed but not found, skipped": skipped} if skipped else {}
    rows |= {"Images in": images["in"], "Failed to read, left out": images["failed"]}
    if other > 0:
        rows["Not in the manifest given, left out"] = other
    rows |= {"Images used": images["used"], "… in the folds": images["used"] - held, "… held out": held}
    rows["Groups (never split)" if run["spec"]["split_by"] == "group" else "Groups"] = images["groups"]
    rows[f"Labels (images × {classes} classes)"] = labels
    if unknown_labels is not None:
        text = f"{unknown_labels:,} ({100 * unknown_labels / max(labels, 1):.1f} %)"
        rows["Unknown labels, masked everywhere"] = Label(text=text, value=unknown_labels)
    return Table(title="From the dataset to the folds", columns=["", ""], rows=list(rows.items()))


def positives_table(run: Record) -> Table:
    """Positives of every class in each fold, as in split.csv; images and groups in the foot."""
    rows = run["split_table"]
    columns = [name for name, value in rows[0].items() if isinstance(value, int)] if rows else []
    # The first rows are "(images)" and "(groups)"; a class may be called so too.
    sizes = [row for row in rows[:2] if row["class"] in ("(images)", "(groups)")]
    return Table(
        title="Positives a fold",
        columns=["class", *map(_part_name, columns)],
        rows=[
            [row["class"], *(Label(text=f"{row[c]:,}", value=row[c], alarm=not row[c]) for c in columns)]
            for row in rows[len(sizes) :]
        ],
        foot=[[row["class"].strip("()"), *(row[c] for c in columns)] for row in sizes],
        sortable=True,
    )


def _part_name(name: str) -> str:
    """`fold_0` of split.csv as people count: `fold 1`."""
    return f"fold {int(name[5:]) + 1}" if name.startswith("fold_") else name.replace("holdout", "hold-out")


# ------------------------------------------------------------------------------------------- how well the model does


def figure_table(parts: Mapping[str, Record], title: str = "Figures of each part", digits: int = 3) -> Table:
    """One column a part of the images, by its name: size, then every figure with its interval.

    A part holds n, classes_defined, classes_total, figures, and perhaps groups.
    """
    rows: list[list[Cell]] = [["Images", *(part["n"] for part in parts.values())]]
    if any("groups" in part for part in parts.values()):
        rows.append(["Groups", *(part.get("groups") for part in parts.values())])
    rows.append(["Classes with an AUC", *map(of_classes, parts.values())])
    if any(behind := [behind_intervals(part) for part in parts.values()]):
        rows.append(["Classes behind intervals of means", *(found or NONE for found in behind)])
    for key, name in FIGURES.items():
        if any(key in part["figures"] for part in parts.values()):
            rows.append([name, *(as_figure(part["figures"].get(key), digits) for part in parts.values())])
    return Table(title=title, columns=["figure", *parts], rows=rows)


def run_figure_table(run: Record, digits: int = 3) -> Table:
    """`figure_table` of the figures in run.json, out of fold and on the hold-out, which have no intervals."""
    found = {name: run["metrics"][name] for name in ("out_of_fold", "holdout") if run["metrics"][name]}
    parts = {
        PARTS[name]: {
            **{key: metrics[key] for key in ("n", "classes_defined", "classes_total")},
            "figures": {key: {"value": metrics[key]} for key in FIGURES if key in metrics},
        }
        for name, metrics in found.items()
    }
    return figure_table(parts, digits=digits)


def final_table(run: Record, digits: int = 3) -> Table:
    """Figures of each kind of final model on the hold-out; the chosen one was chosen by flag, before."""
    finals = run["finals"]
    return Table(
        title="The final models on the hold-out",
        columns=["final model", *(FIGURES[key] for key in FINAL_FIGURES)],
        rows=[
            [kind, *(Figure(value=found[key], digits=digits) for key in FINAL_FIGURES)]
            for kind, found in finals.items()
        ],
        chosen=[row for row, kind in enumerate(finals) if kind == run["final"]["kind"]],
    )


def probe_table(run: Record, digits: int = 3) -> Table:
    """The linear probe beside the final model and the folds behind it; no row where a run has none."""
    probe, kind, trained = run.get("probe"), run["final"]["kind"], run["metrics"]
    rows: list[list[Cell]] = []
    if probe:
        decision = run["decisions"]["retrained" if kind == "retrained" else "folds"]
        for name, mean, pooled, held in (
            ("linear probe", probe["mean_auc"], probe["out_of_fold"], probe["holdout"]),
            (f"trained ({kind})", decision["mean_auc"], trained["out_of_fold"], trained["holdout"]),
        ):
            parts = ((pooled or {}).get("map"), *((held or {}).get(key) for key in ("macro_auc", "map")))
            rows.append([name, *(Figure(value=value, digits=digits) for value in (mean, *parts))])
    return Table(
        title="Against a linear probe on the embeddings before training",
        columns=["", "validation AUC, mean of folds", "validation mAP", "hold-out AUC", "hold-out mAP"],
        rows=rows,
        notes=[PROBE] if rows else [],
    )


def study_table(evaluation: Record) -> Table:
    """Figures by image and by study beside each other; no column where the data names no studies."""
    columns = {}
    for name, part in evaluation["studies"]["parts"].items():
        if evaluation["parts"].get(name):
            columns[f"{PARTS[name]}, by image"] = evaluation["parts"][name]
        columns[f"{PARTS[name]}, by study"] = part
    return figure_table(columns, "Figures by image and by study")


def class_table(rows: Sequence[Record]) -> Table:
    """AUC with interval and the other figures of every class."""
    ranks = {name: place for place, name in enumerate(reversed(TIERS))}
    return Table(
        title="All classes",
        columns=["class", "AUC", "AP", "prevalence", "Jaccard", "F1", "threshold", "positives", "negatives", "tier"],
        rows=[
            [
                str(row["class"]),
                as_figure(row["auc"]),
                Figure(value=row["ap"]["value"]),
                Figure(value=row["prevalence"]),
                Figure(value=row["jaccard"]["value"]),
                Figure(value=row["f1"]["value"]),
                Figure(value=row["threshold"]),
                row["positives"],
                row["negatives"],
                Label(text=str(row["tier"]), value=ranks.get(row["tier"])),
            ]
            for row in rows
        ],
        sortable=True,
    )


def interval_table(rows: Sequence[Record]) -> Table:
    """Positives, threshold and tier of every class, and its figures that have intervals, for the card."""
    keys = ("auc", "ap", "sensitivity", "specificity")
    return Table(
        title="Classes and thresholds",
        columns=["class", "positives", "AUC", "AP", "sensitivity", "specificity", "threshold", "tier"],
        rows=[
            [
                *(str(row["class"]), row["positives"]),
                *(as_figure(row[key]) for key in keys),
                *(Figure(value=row["threshold"]), str(row["tier"])),
            ]
            for row in rows
        ],
    )


def leader_table(word: str, rows: Sequence[Record]) -> Table:
    """The best or the worst classes (`word` is Best or Worst), at most five."""
    title = f"{word} {('', 'one', 'two', 'three', 'four', 'five')[len(rows)]}"
    title += f" with at least {FEW} positives" if rows and rows[0]["positives"] >= FEW else ""
    return Table(
        title=title,
        columns=["class", "AUC", "positives"],
        rows=[[str(row["class"]), as_figure(row["auc"]), row["positives"]] for row in rows],
    )


def threshold_table(rows: Sequence[Record]) -> Table:
    """Sensitivity, specificity, PPV and NPV of every class at its threshold."""
    return Table(
        title="At each class's threshold",
        columns=["class", "threshold", *AT_THRESHOLD.values()],
        rows=[
            [str(row["class"]), Figure(value=row["threshold"]), *(as_figure(row[key]) for key in AT_THRESHOLD)]
            for row in rows
        ],
        sortable=True,
    )


def confusion_table(rows: Sequence[Record], title: str) -> Table:
    """Count the decisions of each class against the reference standard."""
    return Table(
        title=title,
        columns=["class", "true positive", "false positive", "false negative", "true negative"],
        rows=[[str(row["class"]), *(row[key] for key in ("tp", "fp", "fn", "tn"))] for row in rows],
    )


def bin_table(bins: Record) -> Table:
    """Predicted and observed frequency of each bin of predicted probability that holds a label."""
    keys = ("count", "confidence", "frequency")
    edges = itertools.pairwise(bins["edges"])
    return Table(
        title="Bins that hold a label",
        columns=["predicted", "labels", "mean predicted", "observed"],
        rows=[
            [f"{low:.2f}–{high:.2f}", int(count), Figure(value=mean), Figure(value=seen)]
            for (low, high), count, mean, seen in zip(edges, *(bins[key] for key in keys), strict=True)
            if count
        ],
    )


def pair_table(cooccurrence: Record) -> Table:
    """The PAIRS pairs of findings that are together in most images; no row where none are."""
    counts, names = np.array(cooccurrence["counts"], float), cooccurrence["classes"]

    def share(both: float, one: float) -> Label:
        return Label(text=f"{100 * both / one if one else 0:.0f} %", value=both / one if one else 0.0)

    pairs = sorted(itertools.combinations(range(len(names)), 2), key=lambda ij: -counts[ij])[:PAIRS]
    return Table(
        title="Most frequent pairs",
        columns=["findings", "images", "of the first", "of the second"],
        rows=[
            [
                f"{names[i]} + {names[j]}",
                int(counts[i, j]),
                share(counts[i, j], counts[i, i]),
                share(counts[i, j], counts[j, j]),
            ]
            for i, j in pairs
            if counts[i, j]
        ],
    )


def group_table(title: str, parts: Mapping[str, Record]) -> Table:
    """One row a view or subgroup: its size, the classes with an AUC, and a few figures with intervals."""
    return Table(
        title=f"By {title.lower()}",
        columns=[title.lower(), "images", "groups", "classes", *(FIGURES[key] for key in GROUP_FIGURES)],
        rows=[
            [
                *(name or "unknown", part["n"], part["groups"]),
                Label(text=of_classes(part), value=part["classes_defined"]),
                *(as_figure(part["figures"].get(key)) for key in GROUP_FIGURES),
            ]
            for name, part in parts.items()
        ],
        sortable=True,
    )
