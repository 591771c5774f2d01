"""List the films that are least like the training films."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

COUNT = 5


def rank_oddest(
    images: Sequence[str], unlikeness: Sequence[float | None], count: int = COUNT
) -> list[tuple[str, float]]:
    """Return the `count` images (N,) of the largest unlikeness (N,), largest first; those without one are left out."""
    pairs = [(name, float(value)) for name, value in zip(images, unlikeness, strict=True) if value is not None]
    return sorted(pairs, key=lambda pair: -pair[1])[:count]


def share_over(unlikeness: Sequence[float | None], limit: float = 1.0) -> float | None:
    """Return the share of images (N,) over the limit, of those that have an unlikeness; None where none has."""
    known = np.array([value for value in unlikeness if value is not None], np.float64)
    return float((known > limit).mean()) if len(known) else None


def describe_oddest(found: Sequence[tuple[str, float]]) -> list[str]:
    """Return a line per image: its unlikeness and its name."""
    return [f"{value:6.2f}  {name}" for name, value in found]
