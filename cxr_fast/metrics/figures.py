"""Every figure, on arrays: labels (N, C) with 1, 0, -1 unknown against probabilities (N, C).

Unknown entries are masked everywhere. A figure that is undefined (no positive, no negative, nothing called) is
NaN and counted, never 0 or 1. AUC, average precision, F1 and Jaccard are defined or not by the labels alone, so
two models scored on the same images are always averaged over the same classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import sparse

from ..errors import InputError

BINS = 15
TIERS = ((0.85, "excellent"), (0.70, "good"), (0.60, "fair"), (-math.inf, "poor"))
# The headline figures and what people call them; in what `bootstrap` returns the last two are `pooled_brier` and
# `pooled_ece`, beside those of each class.
HEADLINE = {
    "label_accuracy": "label-wise accuracy",
    "macro_auc": "macro AUC",
    "micro_auc": "micro AUC",
    "map": "mAP",
    "sample_jaccard": "sample-wise Jaccard",
    "class_jaccard": "per-class Jaccard, mean",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "macro_sensitivity": "macro sensitivity",
    "macro_specificity": "macro specificity",
    "macro_ppv": "macro PPV",
    "macro_npv": "macro NPV",
    "brier": "Brier score",
    "ece": "calibration error (ECE)",
}
OF_CLASSES = ("auc", "ap", "jaccard", "f1", "sensitivity", "specificity", "ppv", "npv", "brier", "ece")
# Figures that lie higher in every resample than in the sample, see `bootstrap`.
REVERSED = ("map",)
# Resamples handled at once: a block of weights (1,500 images x 64) stays in the second-level cache.
BLOCK = 64


# Ranking figures: no threshold.


@dataclass(frozen=True)
class _Ranked:
    """One class sorted once; everything AUC and average precision need for any integer weights of the N images.

    blocks (K, N): which negatives lie between two neighbouring scores of positives, lowest first; positives: image of
    each positive by rising score. For the i-th positive: `below` and `through` count the blocks with a score < and <=
    its own, `first` is the first positive that ties with it.
    """

    blocks: sparse.csr_array
    positives: np.ndarray
    below: np.ndarray
    through: np.ndarray
    first: np.ndarray


def _rank(labels: np.ndarray, scores: np.ndarray, each: int = 1) -> _Ranked:
    """labels and scores (N each,), `each` entries an image."""
    negatives, positives = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
    negatives = negatives[np.argsort(scores[negatives], kind="stable")]
    positives = positives[np.argsort(scores[positives], kind="stable")]
    low, high = scores[negatives], scores[positives]
    below, through = np.searchsorted(low, high, "left"), np.searchsorted(low, high, "right")
    # A running sum over few blocks is six times faster than one over all negatives.
    edges = np.unique(np.concatenate([[0], below, through, [len(low)]]))
    ones, shape = np.ones(len(low), np.int32), (len(edges) - 1, len(labels) // each)
    return _Ranked(
        sparse.csr_array((ones, negatives // each, edges), shape=shape),
        positives // each,
        np.searchsorted(edges, below),
        np.searchsorted(edges, through),
        np.searchsorted(high, high, "left"),
    )


def _ranking(r: _Ranked, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUC and average precision, (R,) each, with image n counted weights[n] times; weights (N, R) int32.

    Everything up to the last division is whole numbers, so a weight of 2 is exactly an image that occurs twice.
    """
    won = _running(r.blocks @ weights)
    own = np.take(weights, r.positives, axis=0)
    positive, negative = own.sum(axis=0, dtype=np.int64), won[-1].astype(np.int64)
    twice = (own * (won[r.below] + won[r.through])).sum(axis=0, dtype=np.int64)
    true = positive - _running(own)[r.first]
    called = true + negative - won[r.below]
    precision = (own * true / np.maximum(called, 1)).sum(axis=0)
    return _ratio(twice, 2 * positive * negative), _where(negative > 0, _ratio(precision, positive))


def _running(weights: np.ndarray) -> np.ndarray:
    """Weight of the first k rows, (n + 1, R)."""
    out = np.zeros((len(weights) + 1, weights.shape[1]), dtype=np.int32)
    np.cumsum(weights, axis=0, dtype=np.int32, out=out[1:])
    return out


def auc(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each class, (C,); NaN without a known positive or a known negative.

    labels (N, C) in {1, 0, -1}, scores (N, C) of any scale; ties count half.
    Raises InputError on unequal shapes, other labels, or NaN scores.
    Source: Mann and Whitney 1947; the area is P(positive > negative) + P(equal) / 2.
    """
    labels, scores = _checked(labels, scores)
    out = np.full(labels.shape[1], np.nan)
    for c in range(labels.shape[1]):
        # Sorted values, not row numbers: this runs every epoch, and np.sort is five times faster than argsort.
        low = np.sort(scores[labels[:, c] == 0, c])
        high = np.sort(scores[labels[:, c] == 1, c])
        if len(low) and len(high):
            twice = np.searchsorted(low, high, "left").sum() + np.searchsorted(low, high, "right").sum()
            out[c] = twice / (2 * len(low) * len(high))
    return out


def average_precision(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Average precision (AUPRC) of each class, (C,); to be read against `prevalence`, its value by chance.

    Same arguments, errors and NaN rule as `auc`: without a negative every ranking would score 1.
    Source: sum over thresholds of (R_n - R_n-1) P_n, as in sklearn.metrics.average_precision_score.
    """
    labels, scores = _checked(labels, scores)
    ones = np.ones((len(labels), 1), dtype=np.int32)
    return np.array([_ranking(_rank(y, s), ones)[1][0] for y, s in zip(labels.T, scores.T, strict=True)])


def micro_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """ROC AUC over all known entries of all classes pooled; NaN without a positive or a negative."""
    labels, scores = _checked(labels, scores)
    return float(auc(labels.reshape(-1, 1), scores.reshape(-1, 1))[0])


def macro(values: np.ndarray) -> tuple[float, int]:
    """Mean over the defined values, and how many those are: "33 of 35 classes". (NaN, 0) when none is."""
    defined = np.asarray(values, dtype=np.float64)
    defined = defined[~np.isnan(defined)]
    return (float(defined.mean()), len(defined)) if len(defined) else (math.nan, 0)


def prevalence(labels: np.ndarray) -> np.ndarray:
    """Share of positives among the known entries of each class, (C,)."""
    labels = np.asarray(labels)
    return _ratio((labels == 1).sum(axis=0), (labels >= 0).sum(axis=0))


# Figures at a threshold.


@dataclass(frozen=True)
class Counts:
    """Known entries by truth and decision, each (C,), or (C, R) for R weightings of the images."""

    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray
    tn: np.ndarray

    def sensitivity(self) -> np.ndarray:
        """Share of positives called positive (recall)."""
        return _ratio(self.tp, self.tp + self.fn)

    def specificity(self) -> np.ndarray:
        """Share of negatives called negative."""
        return _ratio(self.tn, self.tn + self.fp)

    def ppv(self) -> np.ndarray:
        """Share of positive calls that are right (precision)."""
        return _ratio(self.tp, self.tp + self.fp)

    def npv(self) -> np.ndarray:
        """Share of negative calls that are right."""
        return _ratio(self.tn, self.tn + self.fn)

    def accuracy(self) -> np.ndarray:
        """Share of known entries called right."""
        return _ratio(self.tp + self.tn, self.tp + self.tn + self.fp + self.fn)

    def f1(self) -> np.ndarray:
        """2 TP / (2 TP + FP + FN); NaN without a known positive, whatever was called."""
        return _where(self.tp + self.fn > 0, _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn))

    def jaccard(self) -> np.ndarray:
        """TP / (TP + FP + FN); NaN without a known positive, whatever was called."""
        return _where(self.tp + self.fn > 0, _ratio(self.tp, self.tp + self.fp + self.fn))

    def pooled(self) -> Counts:
        """All classes as one, for micro averages: () or (R,)."""
        return Counts(*(x.sum(axis=0) for x in (self.tp, self.fp, self.fn, self.tn)))


def decisions(probs: np.ndarray, thresholds: np.ndarray | float) -> np.ndarray:
    """Positive where p >= threshold, bool (N, C); thresholds (C,) or one for all.

    Raises InputError on NaN thresholds (a class that `best_f1_thresholds` could not set) or a wrong shape.
    """
    limits = np.asarray(thresholds, dtype=np.float64)
    if limits.shape not in ((), (probs.shape[1],)):
        raise InputError(f"thresholds {limits.shape} do not fit {probs.shape[1]} classes.")
    if missing := int(np.isnan(limits).sum()):
        raise InputError(f"{missing} of {limits.size} thresholds are NaN: give those classes one, such as 0.5.")
    return np.asarray(probs) >= limits


def counts(labels: np.ndarray, called: np.ndarray) -> Counts:
    """Confusion counts of each class over known entries, (C,) int64; labels and decisions (N, C)."""
    return Counts(*(cell.sum(axis=0) for cell in _cells(np.asarray(labels), called)))


def _cells(labels: np.ndarray, called: np.ndarray) -> tuple[np.ndarray, ...]:
    yes, no = labels == 1, labels == 0
    return yes & called, no & called, yes & ~called, no & ~called


def sample_jaccard(labels: np.ndarray, called: np.ndarray) -> float:
    """Mean over images of |true and called| / |true or called|, over known entries.

    An image with no finding and none called scores 1: that call is right. Images without a known label are
    left out. sklearn.metrics.jaccard_score(average="samples", zero_division=1) is the same figure.
    """
    return macro(_image_jaccard(labels, called))[0]


def _image_jaccard(labels: np.ndarray, called: np.ndarray) -> np.ndarray:
    yes, known = labels == 1, labels >= 0
    union = ((yes | called) & known).sum(axis=1)
    score = np.where(union > 0, (yes & called).sum(axis=1) / np.maximum(union, 1), 1.0)
    return _where(np.any(known, axis=1), score)


# Calibration.


@dataclass(frozen=True)
class Reliability:
    """Equal-width bins of predicted probability: edges (bins + 1,), the rest (C, bins), NaN in empty bins."""

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    frequency: np.ndarray


def brier(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Mean squared difference of probability and truth over known entries, (C,). Source: Brier 1950."""
    labels, probs = _checked(labels, probs, probabilities=True)
    known = labels >= 0
    return _ratio((_squared_error(labels, probs)).sum(axis=0), known.sum(axis=0))


def ece(labels: np.ndarray, probs: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, Reliability]:
    """Expected calibration error of each class, (C,), and the bins it was summed over.

    Bin k holds k/bins <= p < (k+1)/bins, the last one 1 as well; labels reshaped to (-1, 1) give the pooled
    figure. Source: Naeini, Cooper, Hauskrecht 2015: sum over bins of n_b / n |frequency - mean probability|.
    """
    labels, probs = _checked(labels, probs, probabilities=True)
    classes = labels.shape[1]
    rows, columns = np.nonzero(labels >= 0)
    p = probs[rows, columns].astype(np.float64)
    slot = columns * bins + _bin(p, bins)
    count, confidence, frequency = (
        np.bincount(slot, weights, classes * bins).reshape(classes, bins)
        for weights in (None, p, labels[rows, columns].astype(np.float64))
    )
    table = Reliability(np.linspace(0, 1, bins + 1), count, _ratio(confidence, count), _ratio(frequency, count))
    return _ratio(np.abs(frequency - confidence).sum(axis=1), count.sum(axis=1)), table


def _bin(probs: np.ndarray, bins: int) -> np.ndarray:
    return np.minimum((probs * bins).astype(np.int64), bins - 1)


def _squared_error(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    return np.where(labels >= 0, (probs.astype(np.float64) - labels) ** 2, 0.0)


# Thresholds.


def best_f1_thresholds(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """The threshold of each class with the best F1 on these predictions, (C,).

    It lies midway between two neighbouring scores, so that rounding elsewhere moves no decision; of several
    equal ones the highest. NaN without a known positive or a known negative: the caller decides.
    """
    labels, probs = _checked(labels, probs, probabilities=True)
    return np.array([_best_f1(y[y >= 0], p[y >= 0]) for y, p in zip(labels.T, probs.T, strict=True)])


def _best_f1(truth: np.ndarray, probs: np.ndarray) -> float:
    positives = int(truth.sum())
    if not 0 < positives < len(truth):
        return math.nan
    scores = np.unique(probs.astype(np.float64))
    truth = truth[np.argsort(probs, kind="stable")]
    start = np.searchsorted(np.sort(probs), scores, "left")
    tp = positives - np.concatenate([[0], np.cumsum(truth, dtype=np.int64)])[start]
    # 2 TP / (2 TP + FP + FN) = 2 TP / (called + positives)
    f1 = 2 * tp / (len(truth) - start + positives)
    return _between(scores, int(np.flatnonzero(f1 == np.max(f1))[-1]))


def thresholds_for(
    labels: np.ndarray,
    probs: np.ndarray,
    target: Literal["sensitivity", "specificity"] = "sensitivity",
    value: float = 0.9,
) -> np.ndarray:
    """The threshold of each class that reaches a sensitivity or a specificity on these predictions, (C,).

    The highest with sensitivity >= value, or the lowest with specificity >= value, moved midway to the
    neighbouring score, which changes no decision. NaN without a known positive (sensitivity) or negative
    (specificity). Where even p = 1 must be called negative it is just above 1.
    Raises InputError unless 0 < value <= 1.
    """
    if target not in ("sensitivity", "specificity") or not 0 < value <= 1:
        raise InputError(f"threshold for {target} {value}: needs sensitivity or specificity in (0, 1].")
    labels, probs = _checked(labels, probs, probabilities=True)
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
    """A threshold that calls scores[k:] positive and scores[:k] not; 0 and 1 stand beyond the ends."""
    lower = scores[k - 1] if k else 0.0
    if k == len(scores):
        return float((lower + 1) / 2 if (lower + 1) / 2 > lower else np.nextafter(lower, np.inf))
    middle = (lower + scores[k]) / 2
    return float(middle if k == 0 or middle > lower else scores[k])


# Summaries.


def headline(labels: np.ndarray, probs: np.ndarray, thresholds: np.ndarray | float) -> dict[str, float | int]:
    """The published figures and those beside them, over all classes, and what they rest on.

    labels and probs (N, C), thresholds (C,) or one for all. `macro_` figures are means over the defined classes, of
    which `classes_defined` of `classes_total` have an AUC; PPV (NPV) is defined by the decisions, where something was
    called positive (negative). `brier` and `ece` are over all known entries of all classes as one.
    Raises InputError on bad shapes, labels, probabilities or thresholds.
    """
    labels, probs = _checked(labels, probs, probabilities=True)
    called = decisions(probs, thresholds)
    table, flat = counts(labels, called), (labels.reshape(-1, 1), probs.reshape(-1, 1))
    macro_auc, defined = macro(auc(labels, probs))
    return {
        "label_accuracy": float(table.pooled().accuracy()),
        "macro_auc": macro_auc,
        "sample_jaccard": sample_jaccard(labels, called),
        "class_jaccard": macro(table.jaccard())[0],
        "macro_f1": macro(table.f1())[0],
        "map": macro(average_precision(labels, probs))[0],
        "micro_auc": micro_auc(labels, probs),
        "micro_f1": float(table.pooled().f1()),
        "macro_sensitivity": macro(table.sensitivity())[0],
        "macro_specificity": macro(table.specificity())[0],
        "macro_ppv": macro(table.ppv())[0],
        "macro_npv": macro(table.npv())[0],
        "brier": float(brier(*flat)[0]),
        "ece": float(ece(*flat)[0][0]),
        "n": len(labels),
        "classes_defined": defined,
        "classes_total": labels.shape[1],
    }


def per_class(
    labels: np.ndarray, probs: np.ndarray, thresholds: np.ndarray | float, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """One row a class with every figure, NaN where undefined; same arguments and errors as `headline`.

    `ap_lift` is average precision over prevalence: 1 is chance.
    """
    labels, probs = _checked(labels, probs, probabilities=True)
    if len(classes) != labels.shape[1]:
        raise InputError(f"{len(classes)} class names for {labels.shape[1]} columns of labels.")
    table, share, ap = (
        counts(labels, decisions(probs, thresholds)),
        prevalence(labels),
        average_precision(labels, probs),
    )
    columns: dict[str, np.ndarray] = {
        "auc": auc(labels, probs),
        "ap": ap,
        "ap_lift": _ratio(ap, share),
        "jaccard": table.jaccard(),
        "f1": table.f1(),
        "sensitivity": table.sensitivity(),
        "specificity": table.specificity(),
        "ppv": table.ppv(),
        "npv": table.npv(),
        "accuracy": table.accuracy(),
        "brier": brier(labels, probs),
        "ece": ece(labels, probs)[0],
        "threshold": np.broadcast_to(np.asarray(thresholds, dtype=np.float64), share.shape),
        "positives": (labels == 1).sum(axis=0),
        "negatives": (labels == 0).sum(axis=0),
        "unknown": (labels == -1).sum(axis=0),
        "prevalence": share,
    }
    rows = [
        {"class": name} | {key: column[c].item() for key, column in columns.items()} for c, name in enumerate(classes)
    ]
    return [row | {"tier": tier(row["auc"])} for row in rows]


def tier(value: float) -> str:
    """The published names for an AUC: excellent from 0.85, good 0.70, fair 0.60, poor below; or no data."""
    return next((name for low, name in TIERS if value >= low), "insufficient data")


# Confidence.


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure and its interval: floats () or one a class (C,).

    `defined` is the number of resamples in which the figure exists; the interval is over those alone.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    defined: np.ndarray

    def of_class(self, c: int) -> Interval:
        """That of one class."""
        return Interval(value=self.value[c], low=self.low[c], high=self.high[c], defined=self.defined[c])


Figures = dict[str, np.ndarray]


def bootstrap(
    labels: np.ndarray,
    probs: np.ndarray,
    groups: Sequence[str],
    thresholds: np.ndarray | float,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Percentile intervals of every figure, resampling groups with replacement, never single images.

    labels and probs (N, C), groups N names, thresholds (C,) or one for all. The names of HEADLINE hold scalars, brier
    and ece as pooled_brier and pooled_ece; those of OF_CLASSES and accuracy hold (C,). Percentiles are widened for few
    groups, a class's by `support` (NaN below 2). Average precision rises when a positive is drawn twice, and so does
    its mean over rare classes in every resample: the interval of `map` is the reverse percentile one, which takes that
    off.
    Raises InputError as `headline` does. Source: Efron and Tibshirani 1993; groups as in Field and Welsh 2007; widened
    and reversed percentiles as in Hesterberg 2015.
    """
    of, ids = _figures(labels, probs, thresholds), _group_ids(groups, len(labels))
    drawn = _resampled(of, ids, resamples, seed)
    return _intervals(_plain(of, len(labels)), drawn, _tails(labels, ids, level), turned=REVERSED)


def paired_bootstrap(
    labels: np.ndarray,
    probs_a: np.ndarray,
    probs_b: np.ndarray,
    groups: Sequence[str],
    thresholds_a: np.ndarray | float,
    thresholds_b: np.ndarray | float,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """`bootstrap` of b minus a, both scored on the same resamples; an interval without 0 is a difference.

    All by percentiles, mAP too: what repeated positives add to one run they add to the other.
    """
    a, b = _figures(labels, probs_a, thresholds_a), _figures(labels, probs_b, thresholds_b)

    def difference(weights: np.ndarray) -> Figures:
        first, second = a(weights), b(weights)
        return {key: second[key] - first[key] for key in first}

    ids = _group_ids(groups, len(labels))
    drawn = _resampled(difference, ids, resamples, seed)
    return _intervals(_plain(difference, len(labels)), drawn, _tails(labels, ids, level))


def support(labels: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Groups with a positive or groups with a negative, whichever are fewer, (C,); labels (N, C), groups N names."""
    return _support(np.asarray(labels), _group_ids(groups, len(labels)))


def _support(labels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    seen = np.zeros((2, int(ids.max()) + 1, labels.shape[1]), dtype=bool)
    for side in (0, 1):
        np.logical_or.at(seen[side], ids, labels == side)
    return np.asarray(seen.sum(axis=1).min(axis=0))


def group_weights(groups: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is in each resample of groups: blocks (N, up to BLOCK) int32, `resamples` in all.

    groups (N,) holds group numbers 0..G-1.
    """
    total = int(groups.max()) + 1
    random = np.random.default_rng(seed)
    for start in range(0, resamples, BLOCK):
        size = min(BLOCK, resamples - start)
        picks = random.integers(0, total, (size, total)) + np.arange(size)[:, None] * total
        drawn = np.bincount(picks.ravel(), minlength=size * total).reshape(size, total)
        yield np.ascontiguousarray(drawn.T, dtype=np.int32)[groups]


def _figures(labels: np.ndarray, probs: np.ndarray, thresholds: np.ndarray | float) -> Callable[[np.ndarray], Figures]:
    """Sort once; the answer turns weights (N, R) into every figure, (R,) or (C, R)."""
    labels, probs = _checked(labels, probs, probabilities=True)
    called = decisions(probs, thresholds)
    classes = labels.shape[1]
    ranked = [_rank(y, p) for y, p in zip(labels.T, probs.T, strict=True)]
    pooled = _rank(labels.ravel(), probs.ravel(), classes)
    cells = sparse.csr_array(np.concatenate([cell.T for cell in _cells(labels, called)]).astype(np.float64))
    per_image = _image_jaccard(labels, called)
    overlap = np.stack([np.nan_to_num(per_image), ~np.isnan(per_image)])
    squared, gaps = _squared_error(labels, probs).T, _bin_gaps(labels, probs)

    def figures(weights: np.ndarray) -> Figures:
        w = weights.astype(np.float64)
        table = Counts(*(cells @ w).reshape(4, classes, -1))
        total, areas = table.tp + table.fp + table.fn + table.tn, [_ranking(r, weights) for r in ranked]
        errors, gap = _sums(squared, w), (gaps @ w).reshape(classes, BINS, -1)
        of_classes: Figures = {
            "auc": np.array([area for area, _ in areas]),
            "ap": np.array([precision for _, precision in areas]),
            "brier": _ratio(errors, total),
            "ece": _ratio(np.abs(gap).sum(axis=1), total),
        }
        return (
            of_classes
            | _at_threshold(table)
            | {
                "sample_jaccard": _ratio(*_sums(overlap, w)),
                "macro_auc": _mean_of_classes(of_classes["auc"]),
                "map": _mean_of_classes(of_classes["ap"]),
                "micro_auc": _ranking(pooled, weights)[0],
                "pooled_brier": _ratio(errors.sum(axis=0), total.sum(axis=0)),
                "pooled_ece": _ratio(np.abs(gap.sum(axis=0)).sum(axis=0), total.sum(axis=0)),
            }
        )

    return figures


def _sums(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(K, N) by (N, R) to (K, R), without BLAS: its threads make products this small 30 times slower, 25 s for
    0.8 s, where other work keeps the cores busy."""
    return np.asarray(np.einsum("kn,nr->kr", values, weights))


def _at_threshold(table: Counts) -> Figures:
    pooled = table.pooled()
    of_classes = {
        "f1": table.f1(),
        "jaccard": table.jaccard(),
        "sensitivity": table.sensitivity(),
        "specificity": table.specificity(),
        "ppv": table.ppv(),
        "npv": table.npv(),
    }
    means = {f"macro_{name}": _mean_of_classes(values) for name, values in of_classes.items()}
    means["class_jaccard"] = means.pop("macro_jaccard")
    return (
        of_classes
        | means
        | {"accuracy": table.accuracy(), "label_accuracy": pooled.accuracy(), "micro_f1": pooled.f1()}
    )


def _bin_gaps(labels: np.ndarray, probs: np.ndarray) -> sparse.csr_array:
    """Label minus probability of image n in its bin, (C BINS, N), what calibration error sums."""
    rows, columns = np.nonzero(labels >= 0)
    p = probs[rows, columns].astype(np.float64)
    slots, shape = columns * BINS + _bin(p, BINS), (labels.shape[1] * BINS, len(labels))
    return sparse.coo_array((labels[rows, columns] - p, (slots, rows)), shape=shape).tocsr()


def _plain(of: Callable[[np.ndarray], Figures], images: int) -> Figures:
    return {key: value[..., 0] for key, value in of(np.ones((images, 1), dtype=np.int32)).items()}


def _resampled(of: Callable[[np.ndarray], Figures], groups: np.ndarray, resamples: int, seed: int) -> Figures:
    blocks = [of(weights) for weights in group_weights(groups, resamples, seed)]
    return {key: np.concatenate([block[key] for block in blocks], axis=-1) for key in blocks[0]}


def _tails(labels: np.ndarray, ids: np.ndarray, level: float) -> dict[str, np.ndarray]:
    """The share of resamples beyond each end, of figures `of_class` (C,) and `overall` (): smaller for few groups.

    A resample of n groups varies less than a sample of n by (n - 1) / n, and n groups know their own spread as badly as
    Student's t says. Source: Hesterberg 2015, the expanded percentile interval.
    """
    from scipy.special import ndtr, stdtrit

    def tail(groups: np.ndarray) -> np.ndarray:
        n = np.maximum(groups, 2).astype(np.float64)
        return _where(groups >= 2, ndtr(np.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 - level) / 2)))

    return {"of_class": tail(_support(np.asarray(labels), ids)), "overall": tail(ids.max() + 1)}


def _intervals(
    values: Figures, drawn: Figures, tails: dict[str, np.ndarray], turned: Sequence[str] = ()
) -> dict[str, Interval]:
    def one(name: str) -> Interval:
        value, draws = values[name], np.atleast_2d(drawn[name])
        rows = [row[~np.isnan(row)] for row in draws]
        ends = np.broadcast_to(tails["of_class" if value.ndim else "overall"], len(rows))
        limits = np.array([_quantiles(row, end) for row, end in zip(rows, ends, strict=True)])
        if name in turned:
            limits = np.clip(2 * value.reshape(-1, 1) - limits[:, ::-1], 0, 1)
        low, high, defined = limits[:, 0], limits[:, 1], np.array([len(row) for row in rows])
        return Interval(
            value=value,
            low=low.reshape(value.shape),
            high=high.reshape(value.shape),
            defined=defined.reshape(value.shape),
        )

    return {name: one(name) for name in values}


def _quantiles(draws: np.ndarray, tail: float) -> np.ndarray:
    return np.full(2, np.nan) if not len(draws) or np.isnan(tail) else np.quantile(draws, (tail, 1 - tail))


# Small parts.


def _checked(labels: np.ndarray, scores: np.ndarray, *, probabilities: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays, labels int8; or one line that says what is wrong."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.ndim != 2 or labels.shape != scores.shape or not len(labels):
        raise InputError(f"labels {labels.shape} and scores {scores.shape} must share one (images, classes) shape.")
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype(np.float64)
    small = labels.astype(np.int8)
    if wrong := int(((small != labels) | (small < -1) | (small > 1)).sum()):
        raise InputError(f"{wrong} of {labels.size} labels are not 1, 0 or -1 (unknown).")
    if missing := int(np.isnan(scores).sum()):
        raise InputError(f"{missing} of {scores.size} scores are NaN: the model diverged or the input is damaged.")
    if probabilities and (outside := int(((scores < 0) | (scores > 1)).sum())):
        raise InputError(f"{outside} of {scores.size} probabilities are outside 0..1: logits were passed?")
    return small, scores


def _group_ids(groups: Sequence[str], images: int) -> np.ndarray:
    if len(groups) != images:
        raise InputError(f"{len(groups)} group names for {images} images.")
    return np.unique(np.asarray(list(groups), dtype=str), return_inverse=True)[1].reshape(-1)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where whole is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64))
    out = np.full(part.shape, np.nan)
    np.divide(part, whole, out=out, where=whole != 0)
    return out


def _where(defined: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.where(defined, values, np.nan)


def _mean_of_classes(values: np.ndarray) -> np.ndarray:
    """Mean over the defined classes of (C, R), (R,)."""
    return _ratio(np.nansum(values, axis=0), (~np.isnan(values)).sum(axis=0))
