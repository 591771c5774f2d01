"""Decision curves: the net benefit of calling a class positive from a threshold probability on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import checked, ratio

# The threshold probabilities of a curve: 1 % to 99 %.
STEPS = np.arange(1, 100) / 100


@dataclass(frozen=True)
class NetBenefit:
    """Net benefit per image at each threshold (T,): of the model and of calling every image positive, (C, T) each.

    NaN for a class without a known label. Calling no image positive has a net benefit of 0.
    """

    thresholds: np.ndarray
    model: np.ndarray
    everyone: np.ndarray


def net_benefit(labels: np.ndarray, probs: np.ndarray, thresholds: np.ndarray = STEPS) -> NetBenefit:
    """Return the net benefit of each class, TP / n - FP / n x t / (1 - t), over its n known labels.

    labels and probs (N, C), thresholds (T,) above 0 and below 1; positive is p >= t. Reshaped to (-1, 1), labels and
    probs give the curve of all labels pooled. Raises InputError as `figures.headline` does.
    Source: Vickers and Elkin, Decision curve analysis, Medical Decision Making 2006.
    """
    labels, probs = checked(labels, probs, probabilities=True)
    odds = thresholds / (1 - thresholds)
    model, everyone = (np.empty((labels.shape[1], len(thresholds))) for _ in range(2))
    for c, (y, p) in enumerate(zip(labels.T, probs.T.astype(np.float64), strict=True)):
        high, low = np.sort(p[y == 1]), np.sort(p[y == 0])
        true = len(high) - np.searchsorted(high, thresholds, "left")
        false = len(low) - np.searchsorted(low, thresholds, "left")
        known = np.array(len(high) + len(low))
        model[c] = ratio(true - false * odds, known)
        everyone[c] = ratio(len(high) - len(low) * odds, known)
    return NetBenefit(thresholds, model, everyone)
