"""ROC and precision-recall curves with few enough points to draw.

Not by sklearn.metrics: its import is 1 s of a report that needs nothing else of it, and its ROC curve keeps points on
straight lines, so that the points chosen to draw would be others.
"""

from __future__ import annotations

import numpy as np

MOST = 200
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
