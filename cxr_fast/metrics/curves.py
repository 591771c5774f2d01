"""ROC, precision-recall and decision curves with few enough points to draw.

Not by sklearn.metrics: its import is 1 s of a report that needs nothing else of it, and its ROC curve keeps points on
straight lines, so that the points chosen to draw would be others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import checked, ratio

MOST = 200
# The threshold probabilities of a curve: 1 % to 99 %.
STEPS = np.arange(1, 100) / 100
Points = list[list[float]]


def roc(labels: np.ndarray, scores: np.ndarray, most: int = MOST) -> Points:
    """Return [false positive rate, sensitivity] from (0, 0) to (1, 1), at most `most` points; labels and scores (n,).

    Labels are 1, 0, -1 unknown. Corners alone: a point on the line between its neighbours is left out. Empty without a
    known positive or a known negative.
    """
    true, called = count_steps(labels, scores)
    positive, negative = int(true[-1]), int(called[-1] - true[-1])
    if not positive or not negative:
        return []
    false = called - true
    # A point on the line between its neighbours draws nothing.
    corner = np.diff(false)[1:] * np.diff(true)[:-1] != np.diff(false)[:-1] * np.diff(true)[1:]
    kept = np.concatenate([[True], corner, [True]])
    return _thinned(np.stack([false / negative, true / positive], axis=1)[kept], most)


def precision_recall(labels: np.ndarray, scores: np.ndarray, most: int = MOST) -> Points:
    """Return [recall, precision] by rising recall, the last at recall 1, at most `most` points; arguments as `roc`.

    The curve is steps: between two points precision is that of the higher recall, so that the area below all of them
    is the average precision. Only thresholds at which recall rises are points, and none is at recall 0, where no image
    is called and precision does not exist. Of neighbours with one precision the last is kept.
    Source: sum over thresholds of (R_n - R_n-1) P_n, as in sklearn.metrics.average_precision_score.
    """
    true, called = count_steps(labels, scores)
    positive, negative = int(true[-1]), int(called[-1] - true[-1])
    if not positive or not negative:
        return []
    rises = np.flatnonzero(np.diff(true)) + 1
    true, called = true[rises], called[rises]
    ends = np.append(true[:-1] * called[1:] != true[1:] * called[:-1], True)
    return _thinned(np.stack([true / positive, true / called], axis=1)[ends], most)


def count_steps(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count positives and images called at each distinct score, from none to all, (k + 1,) each."""
    known = labels >= 0
    order = np.argsort(-scores[known], kind="stable")
    ranked, truth = scores[known][order], labels[known][order] == 1
    last = np.flatnonzero(np.append(np.diff(ranked) != 0, [True] * bool(len(ranked))))
    true = np.concatenate([[0], np.cumsum(truth)[last]]).astype(np.int64)
    return true, np.concatenate([[0], last + 1])


def _thinned(points: np.ndarray, most: int) -> Points:
    """Keep up to `most` of the points (k, 2), evenly along the curve, both ends kept."""
    if len(points) > most:
        along = np.concatenate([[0], np.cumsum(np.abs(np.diff(points, axis=0)).sum(axis=1))])
        points = points[np.unique(np.searchsorted(along, np.linspace(0, along[-1], most)))]
    return [[float(x), float(y)] for x, y in points]


# Decision curves.


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
