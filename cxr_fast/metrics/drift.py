"""Measure how far a variant's probabilities are from a reference, beside what changed films do to the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..config import FILM_CHANGES, JPEG_95
from . import figures
from .arrays import number_groups
from .intervals import FEW, mean_interval

# Limits of a float16 or int8 file: drop of macro AUC and of macro mAP. It may change as many decisions as JPEG does.
AUC_DROP = MAP_DROP = 0.002


@dataclass(frozen=True, kw_only=True)
class Margin:
    """Decisions in 10,000 that a variant changes beyond those that the films saved as JPEG 95 change: `more`.

    `low` and `high` are the ends of its 95 % interval, over films of both (groups resampled); None where fewer than
    FEW groups have a changed decision. `groups` counts all of them, `affected` those with a changed decision, `unit`
    names them ("group", "film").
    """

    jpeg: float
    more: float
    low: float | None
    high: float | None
    groups: int
    affected: int
    unit: str

    def describe(self) -> str:
        """Say what the interval is, or why there is none."""
        units = f"{self.unit}{'s' * (self.groups != 1)}"
        if self.low is None or self.high is None:
            few = f"only {self.affected} of {self.groups} {units} with a changed decision, too few to tell"
            return f"difference to JPEG 95 {self.more:+.1f}, no interval: {few}; check on more films"
        interval = f"95 % interval {self.low:+.1f} to {self.high:+.1f}, {self.groups} {units}"
        text = f"difference to JPEG 95 {self.more:+.1f}, {interval}"
        if self.low <= 0 <= self.high:
            text += "; these films do not tell the two apart"
        return text


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Differences between two sets of probabilities (n, C) of the same images, a reference's and a variant's.

    `largest` and `p99` are absolute differences in probability; `flipped` counts decisions that differ, `flips` in
    10,000. `macro_drop`, `map_drop` and `auc_drop` are reference minus variant; NaN (None in `auc_drop`) where no class
    has both signs. `margin` is None where the changed films are not known.
    """

    images: int
    largest: float
    p99: float
    flipped: int
    flips: float
    macro_auc: float
    macro_drop: float
    macro_ap: float
    map_drop: float
    classes: int
    auc_drop: tuple[float | None, ...]
    margin: Margin | None = None

    def over(self) -> list[str]:
        """Say in words what is over the limits of float16 and int8; empty where nothing is."""
        out = [] if math.isfinite(self.largest) else ["its probabilities are not all finite"]
        if self.margin is not None and self.flips > self.margin.jpeg:
            out.append(
                f"{self.flips:.1f} of 10,000 decisions change sides (limit {self.margin.jpeg:.1f}, what saving these "
                f"films as JPEG 95 changes; {self.margin.describe()})"
            )
        for name, drop, limit in (("AUC", self.macro_drop, AUC_DROP), ("mAP", self.map_drop, MAP_DROP)):
            if drop > limit:
                out.append(f"macro {name} drops by {drop:.4f} (limit {limit:g})")
        return out


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """What the reference itself does on the same films, changed as no reader could see, by the names of FILM_CHANGES.

    `changes` holds how far its probabilities move; `flipped` how many decisions of each film change, (n,). `groups` are
    n names, what is resampled, each of them one `unit`.
    """

    changes: Mapping[str, Drift]
    flipped: Mapping[str, np.ndarray]
    groups: Sequence[str]
    unit: str = "group"

    def describe(self) -> str:
        """`JPEG 95 29, one pixel 182`: decisions in 10,000 that change."""
        return ", ".join(f"{FILM_CHANGES[name]} {change.flips:.1f}" for name, change in self.changes.items())

    def margin(self, flipped: np.ndarray, classes: int) -> Margin:
        """Compare the changed decisions of each film, (n,), of C classes, with those of JPEG, paired film by film."""
        jpeg = self.flipped[JPEG_95]
        ids = number_groups(self.groups, len(flipped))
        affected = len(np.unique(ids[(flipped > 0) | (jpeg > 0)]))
        found = mean_interval(1e4 * (flipped - jpeg) / classes, self.groups)
        known = affected >= FEW and bool(np.isfinite(found.low) and np.isfinite(found.high))
        return Margin(
            jpeg=self.changes[JPEG_95].flips,
            more=float(found.value),
            low=float(found.low) if known else None,
            high=float(found.high) if known else None,
            groups=int(ids.max()) + 1,
            affected=affected,
            unit=self.unit,
        )


def measure(
    reference: np.ndarray,
    found: np.ndarray,
    labels: np.ndarray,
    thresholds: Sequence[float],
    yardstick: Yardstick | None = None,
) -> Drift:
    """Compare `found` with `reference`, both (n, C) probabilities, at the thresholds (C,); labels (n, C) 1, 0, -1.

    A decision is a probability at or over its threshold. AUCs and average precisions are of classes with both signs
    among known labels.
    """
    apart = np.abs(found.astype(np.float64) - reference)
    if not np.isfinite(apart).all():
        undefined = (None,) * reference.shape[1]
        return Drift(
            images=len(apart), largest=math.nan, p99=math.nan, flipped=apart.size, flips=1e4, macro_auc=math.nan,
            macro_drop=math.nan, macro_ap=math.nan, map_drop=math.nan, classes=0, auc_drop=undefined,
        )  # fmt: skip
    flipped = changed_decisions(reference, found, thresholds)
    before, after = figures.auc(labels, reference), figures.auc(labels, found)
    precise, then = figures.average_precision(labels, reference), figures.average_precision(labels, found)
    macro, count = figures.macro(before)
    drops = before - after
    return Drift(
        images=len(apart),
        largest=float(apart.max()),
        p99=float(np.quantile(apart, 0.99)),
        flipped=int(flipped.sum()),
        flips=1e4 * int(flipped.sum()) / apart.size,
        macro_auc=macro,
        macro_drop=figures.macro(drops)[0],
        macro_ap=figures.macro(precise)[0],
        map_drop=figures.macro(precise - then)[0],
        classes=count,
        auc_drop=tuple(None if np.isnan(d) else float(d) for d in drops),
        margin=None if yardstick is None else yardstick.margin(flipped, reference.shape[1]),
    )


def changed_decisions(reference: np.ndarray, found: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """Count the decisions of each image that differ, (n,), between probabilities (n, C) at the thresholds (C,)."""
    limits = np.asarray(thresholds)
    return np.asarray(((found >= limits) != (reference >= limits)).sum(axis=1))


def measure_changes(
    reference: np.ndarray,
    changed: Mapping[str, np.ndarray],
    labels: np.ndarray,
    thresholds: Sequence[float],
    groups: Sequence[str],
    unit: str = "group",
) -> Yardstick:
    """Return what changed films do: `changed` holds the reference's own probabilities (n, C) of them by change."""
    return Yardstick(
        changes={name: measure(reference, found, labels, thresholds) for name, found in changed.items()},
        flipped={name: changed_decisions(reference, found, thresholds) for name, found in changed.items()},
        groups=groups,
        unit=unit,
    )
