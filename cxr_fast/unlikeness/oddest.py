"""Describe unlikeness: the films that are least like the training films, and what a run measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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


def describe_measure(record: Mapping[str, Any] | None) -> str:
    """Say in a sentence what `unlikeness` of a run's `run.json` can see; empty for a run of an earlier version."""
    if not record:
        return ""
    if "sha256" not in record:
        return f"The model does not say how unlike a film is to its training films ({record['skipped'].rstrip('.')})."
    return (
        "The model file says of each film how unlike it is to the training films (output unlikeness): 1 is the 99th "
        f"percentile of {record['films']:,} training films of {record['groups']:,} groups. It sees pictures that are "
        "no films, inverted and turned films, and cannot see mirrored ones."
    )
