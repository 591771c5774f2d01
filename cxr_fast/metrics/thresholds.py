"""The threshold of each class that has the best F1, or reaches a sensitivity or a specificity; what it is worth."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from ..errors import InputError
from .arrays import checked
from .curves import count_steps


def best_f1_thresholds(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Return the threshold of each class with the best F1 on these predictions, (C,).

    It lies midway between two neighbouring scores, so that rounding elsewhere moves no decision; of several
    equal ones the highest. NaN without a known positive or a known negative: the caller decides.
    """
    labels, probs = checked(labels, probs, probabilities=True)
    return np.array([_best_f1(y, p) for y, p in zip(labels.T, probs.T, strict=True)])


def _best_f1(labels: np.ndarray, probs: np.ndarray) -> float:
    true, called = count_steps(labels, probs)
    if not 0 < true[-1] < called[-1]:
        return math.nan
    # 2 TP / (2 TP + FP + FN) = 2 TP / (called + positives)
    f1 = 2 * true[1:] / (called[1:] + true[-1])
    scores = np.unique(probs[labels >= 0].astype(np.float64))
    return _between(scores, len(scores) - 1 - int(np.argmax(f1)))


def thresholds_for(
    labels: np.ndarray,
    probs: np.ndarray,
    target: Literal["sensitivity", "specificity"] = "sensitivity",
    value: float = 0.9,
) -> np.ndarray:
    """Return the threshold of each class that reaches a sensitivity or a specificity on these predictions, (C,).

    The highest with sensitivity >= value, or the lowest with specificity >= value, moved midway to the
    neighbouring score, which changes no decision. NaN without a known positive (sensitivity) or negative
    (specificity). Where even p = 1 must be called negative it is just above 1.
    Raises InputError unless 0 < value <= 1.
    """
    if target not in ("sensitivity", "specificity") or not 0 < value <= 1:
        raise InputError(f"threshold for {target} {value}: needs sensitivity or specificity in (0, 1].")
    labels, probs = checked(labels, probs, probabilities=True)
    side = 1 if target == "sensitivity" else 0
    return np.array([_reach(y, p, side, value) for y, p in zip(labels.T, probs.T, strict=True)])


def _reach(labels: np.ndarray, probs: np.ndarray, side: int, value: float) -> float:
    own = np.sort(probs[labels == side].astype(np.float64))
    if not len(own):
        return math.nan
    # 1e-9: 0.07 * 100 is 7.000000000000001, and seven of a hundred are enough.
    need = math.ceil(value * len(own) - 1e-9)
    scores = np.unique(probs[labels >= 0].astype(np.float64))
    if side == 1:
        return _between(scores, int(np.searchsorted(scores, own[len(own) - need])))
    return _between(scores, int(np.searchsorted(scores, own[need - 1], "right")))


def _between(scores: np.ndarray, k: int) -> float:
    """Return a threshold that calls scores[k:] positive and scores[:k] not; 0 and 1 stand beyond the ends."""
    lower = scores[k - 1] if k else 0.0
    if k == len(scores):
        return float((lower + 1) / 2 if (lower + 1) / 2 > lower else np.nextafter(lower, np.inf))
    middle = (lower + scores[k]) / 2
    return float(middle if k == 0 or middle > lower else scores[k])


def predictive_values(sensitivity: float, specificity: float, prevalence: float) -> tuple[float, float]:
    """Return PPV and NPV at a prevalence, by Bayes' theorem from sensitivity and specificity.

    NaN where nothing is called positive (negative), or where any of the three is NaN. At the prevalence of the images
    that the two were measured on these are their PPV and NPV. Source: Altman and Bland, BMJ 1994;309:102.
    """
    true, false = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
    right, missed = specificity * (1 - prevalence), (1 - sensitivity) * prevalence
    ppv = true / (true + false) if true + false != 0 else math.nan
    return ppv, right / (right + missed) if right + missed != 0 else math.nan
