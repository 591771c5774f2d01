"""Tables over the configurations and the seeds of a search, and over those that one would train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...metrics.rarity import HEAD, TAIL
from ...system.text import Figure, Label, Table, duration
from ..summary import Record

if TYPE_CHECKING:
    from ...grid.points import Point

GRID_MAPS = ("head_map", "medium_map", "tail_map")
RARITY = (
    f"mAP out of fold, in brackets of how many classes it is the mean: head are those with more than {100 * HEAD:g} % "
    f"positives, tail those with less than {100 * TAIL:g} %, medium those between."
)
GRID_RESULTS = (
    *("config", "epochs", "mean_auc", "std_auc", "seconds", "chosen"),
    *(*GRID_MAPS, "head_classes", "medium_classes", "tail_classes"),
)
SEED_RESULTS = (
    *("config", "seeds", "epochs", "mean_auc", "std_auc", "min_auc", "max_auc", "mean_map", "std_map", "chosen"),
)
SEEDS = (
    "Each seed has other draws, and other folds unless these were given; the hold-out is the same. AUC is the "
    "validation macro AUC, a mean over folds; mAP is out of fold. The spread is the standard deviation over seeds. The "
    "choice is made by the mean over seeds, and the final model is the one of the first seed."
)


def grid_table(run: Record, digits: int = 3, *, most: int | None = None) -> Table:
    """The configurations of the grid, best first, at most `most`; one row where there was no grid."""
    first = run["grid"][0]
    fields = searched_fields(run)
    maps = [name for name in GRID_MAPS if name in first]  # runs of earlier versions have none
    of = {name: f"{name.removesuffix('_map')} mAP ({first[name.replace('map', 'classes')]})" for name in maps}
    shown = [row for place, row in enumerate(run["grid"]) if most is None or place < most or row["chosen"]]
    notes = [RARITY] if maps else []
    for row in run.get("lost") or []:
        changes = ", ".join(f"{name} {value}" for name, value in row.items() if name not in ("config", "reason"))
        whole = ", with all its seeds" if "seed" in row else ""
        notes.append(f"Left out{whole}: configuration {row['config'] + 1} ({changes}): {row['reason']}")
    if hidden := len(run["grid"]) - len(shown):
        notes.append(f"{hidden:,} more are in grid.csv and on the page.")
    return Table(
        title="Configurations, by validation AUC",
        columns=["configuration", *fields, "epochs", "mean AUC", "std", *of.values(), "time"],
        rows=[
            [
                str(row["config"] + 1),
                *(str(row[name]) for name in fields),
                row["epochs"],
                Figure(value=row["mean_auc"], digits=digits),
                Figure(value=row["std_auc"], digits=digits),
                *(Figure(value=row[name], digits=digits) for name in maps),
                Label(text=duration(row["seconds"], tenths=True), value=row["seconds"]),
            ]
            for row in shown
        ],
        notes=notes,
        chosen=[place for place, row in enumerate(shown) if row["chosen"]],
        sortable=True,
    )


def searched_fields(run: Record) -> list[str]:
    """The fields that the grid of a run changes, in the order of its flags; `seed` may be one."""
    return [name for name in run["grid"][0] if name not in GRID_RESULTS]


def seed_table(run: Record, digits: int = 3) -> Table:
    """Every point of the grid over its seeds, best first; no rows where each was trained on one seed."""
    rows = run.get("seeds") or []
    fields = [name for name in rows[0] if name not in SEED_RESULTS] if rows else []
    figures = ("mean_auc", "std_auc", "min_auc", "max_auc", "mean_map", "std_map")
    return Table(
        title="Configurations over seeds, by mean validation AUC",
        columns=[
            *("configuration", *fields, "seeds", "epochs"),
            *("mean AUC", "spread", "lowest", "highest", "mean mAP", "mAP spread"),
        ],
        rows=[
            [
                str(row["config"] + 1),
                *(str(row[name]) for name in fields),
                row["seeds"],
                row["epochs"],
                *(Figure(value=row[name], digits=digits) for name in figures),
            ]
            for row in rows
        ],
        notes=[SEEDS] if rows else [],
        chosen=[place for place, row in enumerate(rows) if row["chosen"]],
        sortable=True,
    )


def points_table(points: Sequence[Point]) -> Table:
    """The configurations that a sweep would train, in their order."""
    fields = list(points[0].changes)
    return Table(
        title="Configurations to train",
        columns=["configuration", *fields],
        rows=[[str(n + 1), *(str(point.changes[name]) for name in fields)] for n, point in enumerate(points)],
    )
