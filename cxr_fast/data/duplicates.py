"""Find duplicate images: same bytes in different groups (leakage) or with different labels (conflict)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NAMED = 3


def notes(images: Sequence[str], sha256: Sequence[str], groups: Sequence[str], labels: np.ndarray) -> tuple[str, ...]:
    """At most two lines for people: images of equal bytes in different groups, and with different labels.

    N names, hashes and groups; labels (N, C) with 1, 0, -1 unknown. Nothing is changed: which of the two is right is
    not for a program to say.
    """
    same: dict[str, list[int]] = {}
    for row, value in enumerate(sha256):
        same.setdefault(value, []).append(row)
    twins = [rows for rows in same.values() if len(rows) > 1]
    apart = [rows for rows in twins if len({groups[row] for row in rows}) > 1]
    against = [rows for rows in twins if _contradict(labels[rows])]
    out = []
    if apart:
        named = _pairs(apart, [f"{image} of {group}" for image, group in zip(images, groups, strict=True)])
        out.append(
            f"{_count(apart)} images have the bytes of an image of another group, so one film can be on both sides "
            f"of a fold: {named}; give them one group in the manifest, or list one of them."
        )
    if against:
        out.append(
            f"{_count(against)} images have the bytes of another image and other labels: {_pairs(against, images)}; "
            "correct the manifest."
        )
    return tuple(out)


def _contradict(labels: np.ndarray) -> bool:
    """Whether some class is 1 in one row of (n, C) and 0 in another; unknown contradicts nothing."""
    return bool(((labels == 1).any(axis=0) & (labels == 0).any(axis=0)).any())


def _count(sets: Sequence[Sequence[int]]) -> str:
    return f"{sum(map(len, sets)):,}"


def _pairs(sets: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """The first two names of the first few sets."""
    text = ", ".join(f"{names[rows[0]]} = {names[rows[1]]}" for rows in sets[:NAMED])
    return text + (", ..." if len(sets) > NAMED else "")
