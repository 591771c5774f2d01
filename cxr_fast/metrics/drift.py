"""Measure how far the probabilities of an exported variant are from torch's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import figures

# Limits of a float16 or int8 file: drop of the macro AUC, and changed decisions in 10,000.
AUC_DROP, FLIPS = 0.002, 20.0


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Differences between two sets of probabilities (n, C) of the same images, a reference's and a variant's.

    `largest` and `p99` are absolute differences in probability; `flipped` counts decisions that differ, `flips` in
    10,000. `macro_drop` and `auc_drop` are reference minus variant; NaN (None in `auc_drop`) where no AUC is defined.
    """

    images: int
    largest: float
    p99: float
    flipped: int
    flips: float
    macro_auc: float
    macro_drop: float
    classes: int
    auc_drop: tuple[float | None, ...]

    def over(self) -> list[str]:
        """Say in words what is over the limits of float16 and int8; empty where nothing is."""
        out = [] if math.isfinite(self.largest) else ["its probabilities are not all finite"]
        if self.flips > FLIPS:
            out.append(f"{self.flips:.1f} of 10,000 decisions change sides (limit {FLIPS:g})")
        if self.macro_drop > AUC_DROP:
            out.append(f"macro AUC drops by {self.macro_drop:.4f} (limit {AUC_DROP:g})")
        return out


def measure(reference: np.ndarray, found: np.ndarray, labels: np.ndarray, thresholds: Sequence[float]) -> Drift:
    """Compare `found` with `reference`, both (n, C) probabilities, at the thresholds (C,); labels (n, C) 1, 0, -1.

    A decision is a probability at or over its threshold. AUCs are of classes with both signs among known labels.
    """
    apart = np.abs(found.astype(np.float64) - reference)
    if not np.isfinite(apart).all():
        undefined = (None,) * reference.shape[1]
        return Drift(
            images=len(apart), largest=math.nan, p99=math.nan, flipped=apart.size, flips=1e4, macro_auc=math.nan,
            macro_drop=math.nan, classes=0, auc_drop=undefined,
        )  # fmt: skip
    limits = np.asarray(thresholds)
    flipped = int(((found >= limits) != (reference >= limits)).sum())
    before, after = figures.auc(labels, reference), figures.auc(labels, found)
    macro, count = figures.macro(before)
    drops = before - after
    return Drift(
        images=len(apart),
        largest=float(apart.max()),
        p99=float(np.quantile(apart, 0.99)),
        flipped=flipped,
        flips=1e4 * flipped / apart.size,
        macro_auc=macro,
        macro_drop=figures.macro(drops)[0],
        classes=count,
        auc_drop=tuple(None if np.isnan(d) else float(d) for d in drops),
    )
