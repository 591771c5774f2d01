"""What a model answered for the hold-out, as its file keeps it: counts of many films, and nothing of any single one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...config import digest
from ...data.disclosure import GROUPS
from ...errors import InputError
from . import chance

KEY = "holdout"  # the entry of a model file
BINS = 20
LEVELS = (*range(5, 100, 5), 99)  # percentiles of the training films' unlikeness that are edges of bins
PLAIN = np.arange(1, BINS) / BINS  # edges where there is no hold-out to take quantiles of


@dataclass(frozen=True, kw_only=True)
class HoldoutClass:
    """One class on the hold-out: films called positive, edges (b - 1,) of the bins, films in each bin (b,)."""

    positives: int
    edges: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True, kw_only=True)
class HoldoutSummary:
    """The hold-out's answers: its films and groups, how many independent films they are worth, its classes in order."""

    films: int
    groups: int
    effective: float
    classes: tuple[HoldoutClass, ...]


def summarise_holdout(probabilities: np.ndarray, thresholds: Sequence[float], groups: Sequence[str]) -> dict[str, Any]:
    """Return the entry of a model file: of n films' calibrated probabilities (n, C), thresholds (C,), n group names.

    A class has up to BINS bins of as many films each. A bin holds films of at least `disclosure.GROUPS` groups, and
    edges have three digits, so that no film shows. A film that reaches its threshold is positive.
    """
    names = np.unique(np.asarray(list(groups), dtype=str), return_inverse=True)[1].reshape(-1)
    sizes = Counter(names.tolist())
    exact = np.asarray(probabilities, np.float64)
    positives = (exact >= np.asarray(thresholds, np.float64)).sum(axis=0).tolist()
    classes = []
    for values, count in zip(exact.T, positives, strict=True):
        edges = _edges(values, names)
        counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
        classes.append({"positives": count, "edges": edges, "counts": counts.tolist()})
    return {
        "films": len(exact),
        "groups": len(sizes),
        "effective_films": chance.effective_number(sizes.values()),
        "classes": classes,
    }


def point_digest(info: Mapping[str, Any]) -> str:
    """Hash the thresholds and the calibration of which an entry is, from a model file's metadata or `run.json`."""
    return digest({"thresholds": info.get("thresholds"), "calibration": info.get("calibration")})


def _edges(values: np.ndarray, names: np.ndarray) -> list[float]:
    """Rising edges between bins, each of which holds films of GROUPS groups or more."""
    wanted = np.quantile(values, PLAIN) if len(values) else []
    edges: list[float] = []
    for edge in sorted({float(f"{value:.3g}") for value in wanted}):
        inside = values < edge
        inside &= values >= (edges[-1] if edges else -math.inf)
        if min(len(set(names[inside])), len(set(names[values >= edge]))) >= GROUPS:
            edges.append(edge)
    return edges


def read_holdout(info: Mapping[str, Any], path: Path) -> HoldoutSummary | None:
    """Read the entry of a model file's metadata; None where it has none, or one of other thresholds or another
    calibration than the file's. InputError where the entry is damaged."""
    entry = info.get(KEY)
    if entry is None or (isinstance(entry, dict) and entry.get("point", point := point_digest(info)) != point):
        return None
    try:
        found = HoldoutSummary(
            films=int(entry["films"]),
            groups=int(entry["groups"]),
            effective=float(entry["effective_films"]),
            classes=tuple(
                HoldoutClass(
                    positives=int(row["positives"]),
                    edges=np.array(row["edges"], np.float64).reshape(-1),
                    counts=np.array(row["counts"], np.int64).reshape(-1),
                )
                for row in entry["classes"]
            ),
        )
        sound = len(found.classes) == len(info["labels"]) and 0 <= found.effective <= found.films
        sound = sound and all(_is_sound(row, found.films) for row in found.classes)
    except (KeyError, TypeError, ValueError, OverflowError):
        sound = False
    if not sound:
        raise InputError(f"{path}: damaged metadata ({KEY} is no summary of {len(info['labels'])} classes).")
    return found


@dataclass(frozen=True, kw_only=True)
class TrainingUnlikeness:
    """The unlikeness of the training films out of fold: how many films, of how many groups, edges (b - 1,) of bins, and
    the share of the films in each bin, (b,)."""

    films: int
    groups: int
    edges: np.ndarray
    shares: np.ndarray


def read_training_unlikeness(info: Mapping[str, Any], path: Path) -> TrainingUnlikeness | None:
    """Read the unlikeness of the training films from the 101 quantiles in a model file's metadata; None where it has
    none. InputError where they are damaged."""
    entry = info.get("unlikeness")
    if not isinstance(entry, dict):
        return None
    try:
        films, groups = int(entry["films"]), int(entry["groups"])
        values = np.array(entry["quantiles"], np.float64).reshape(-1)
        sound = len(values) == 101 and bool(np.isfinite(values).all() and (np.diff(values) >= 0).all())
        sound = sound and 0 <= groups <= films
    except (KeyError, TypeError, ValueError, OverflowError):
        sound = False
    if not sound:
        raise InputError(f"{path}: damaged metadata (unlikeness has no 101 rising quantiles of its training films).")
    levels = np.array(LEVELS)
    edges, first = np.unique(values[levels], return_index=True)
    return TrainingUnlikeness(
        films=films, groups=groups, edges=edges, shares=np.diff(levels[first], prepend=0, append=100) / 100
    )


def _is_sound(row: HoldoutClass, films: int) -> bool:
    rising = bool(np.isfinite(row.edges).all() and (np.diff(row.edges) > 0).all())
    fits = len(row.counts) == len(row.edges) + 1 and int(row.counts.sum()) == films and int(row.counts.min()) >= 0
    return rising and fits and 0 <= row.positives <= films
