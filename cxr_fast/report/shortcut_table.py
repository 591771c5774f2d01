"""Tables and sentences of the shortcut audit: what else than findings is read from the images, and who follows it."""

from __future__ import annotations

from ..metrics.shortcuts import strength
from ..system.text import Figure, Label, Table
from .summary import Record, as_figure

# Rows on the screen and lines on the card.
FIRST = 3
NOTE = (
    "Read by a logistic regression on the embeddings before training, each image by the one that saw none of its "
    "group. A model can tell a label through what is read well and followed by the label; the strongest such shortcut "
    "is first. The label is named whose shares differ most surely, at 95 % for all classes together."
)


def shortcut_table(run: Record, digits: int = 3, most: int | None = None) -> Table:
    """One row a value of a column, the strongest shortcut first, at most `most`; no row where a run has no audit."""
    rows = list(run.get("shortcuts") or [])[:most]
    return Table(
        title="Shortcuts: what is read from the images, and the label that follows it most",
        columns=[
            *("column", "value", "images with it", "groups with it", "AUC of reading it"),
            *("label", "share with it", "share without", "AUC of it for the label"),
        ],
        rows=[
            [
                *(row["column"], row["value"]),
                Label(text=f"{row['images_with']:,} of {row['images']:,}", value=row["images_with"]),
                row["groups_with"],
                as_figure(_area(row), digits),
                *_label_cells(row, digits),
            ]
            for row in rows
        ],
        notes=[NOTE] if rows else [],
        sortable=True,
    )


def shortcut_lines(run: Record) -> list[str]:
    """The strongest shortcuts as sentences, for the card; none where a run has no audit, or nothing follows."""
    return [
        f"{row['column']} {row['value']} is read from the embeddings with AUC {as_figure(_area(row))}; "
        f"{row['labels'][0]['class']} is positive in {_percent(row['labels'][0]['with'])} of the images with it and in "
        f"{_percent(row['labels'][0]['without'])} of those without"
        for row in list(run.get("shortcuts") or [])[:FIRST]
        if strength(row) > 0
    ]


def _area(found: Record) -> Record:
    return {"value": found["auc"], "low": found["low"], "high": found["high"]}


def _label_cells(row: Record, digits: int) -> tuple[str | Figure, ...]:
    if not row["labels"]:
        return ("none has enough groups", *[Figure(value=None)] * 3)
    first = row["labels"][0]
    shares = (Figure(value=first[side], digits=digits) for side in ("with", "without"))
    return (str(first["class"]), *shares, as_figure(_area(first), digits))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
