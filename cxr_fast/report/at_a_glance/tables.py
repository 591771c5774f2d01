"""Make the section's table of mistaken findings, and the data of its threshold slider."""

from __future__ import annotations

from typing import Any

from ...system.text import Label, Table
from ..summary import Record

PAIRS = 8
LEAST = 2  # one film is no habit
MEANING = (
    "A film counts for A and B where A is labelled and was not called, and B was called and is labelled absent. Sorted "
    "by how many films more there are than the share of B's false positives among all films would give; few films may "
    "be chance. All pairs: mistaken.csv."
)


def mistaken_table(found: Record | None) -> Table:
    """Return the PAIRS pairs of findings with most films beyond what B's false positives among all films would give."""
    names = (found or {"classes": []})["classes"]
    pairs = []
    for a, missed in enumerate(names):
        for b, called in enumerate(names):
            films, of = found["counts"][a][b], found["known"][a][b]  # type: ignore[index]
            wrong, every = found["wrong"][b], found["all"][b]  # type: ignore[index]
            if films >= LEAST and films > of * wrong / every:
                cells = [f"{missed} → {called}", films, _share(films, of), _share(wrong, every)]
                pairs.append((films - of * wrong / every, cells))
    pairs.sort(key=lambda pair: -pair[0])
    return Table(
        title="Missed finding → finding called in its place",
        columns=["findings", "films", "of the films with A missed", "of all films"],
        rows=[cells for _, cells in pairs[:PAIRS]],
        notes=[MEANING] if pairs else [],
    )


def _share(part: int, whole: int) -> Label:
    return Label(text=f"{100 * part / whole:.0f} % of {whole:,}", value=part / whole)


def slider_data(found: Record | None) -> list[dict[str, Any]]:
    """Return what the threshold slider moves, per class with positives and negatives: its name, how many of both, the
    place of its own threshold, and points of threshold, true and false positives."""
    return [
        {
            "name": name,
            "counts": [each["positives"], each["negatives"]],
            "chosen": each["chosen"],
            "points": [[None if x is None else float(f"{x:.4g}"), *counts] for x, *counts in each["points"]],
        }
        for name, each in (found or {}).items()
        if each["positives"] and each["negatives"]
    ]
