"""Every figure, on arrays: labels (N, C) with 1, 0, -1 unknown against probabilities (N, C).

Unknown entries are masked everywhere. A figure that is undefined (no positive, no negative, nothing called) is
NaN and counted, never 0 or 1. AUC, average precision, F1 and Jaccard are defined or not by the labels alone, so
two models scored on the same images are always averaged over the same classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from .arrays import checked, ratio, where
from .sparse import Sparse, by_rows

BINS = 15
TIERS = ((0.85, "excellent"), (0.70, "good"), (0.60, "fair"), (-math.inf, "poor"))
# The figures over all classes and what people call them. Beside those of each class the last two are `pooled_brier`
# and `pooled_ece`, see `overall_key`.
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
# Which figure of each class a figure over all classes is the mean of.
MEANS = {
    "macro_auc": "auc",
    "map": "ap",
    "class_jaccard": "jaccard",
    **{f"macro_{name}": name for name in ("f1", "sensitivity", "specificity", "ppv", "npv")},
}
OF_CLASSES = ("auc", "ap", "jaccard", "f1", "sensitivity", "specificity", "ppv", "npv", "brier", "ece")
# The first keys of `headline` in their order since the first run.json; the others follow in the order of HEADLINE.
FIRST = ("label_accuracy", "macro_auc", "sample_jaccard", "class_jaccard", "macro_f1", "map", "micro_auc")

Figures = dict[str, np.ndarray]


# Ranking figures: no threshold.


@dataclass(frozen=True)
class Ranked:
    """One class sorted once: its AUC and average precision for any integer weights of the N images.

    blocks (K, N): which negatives lie between two neighbouring scores of positives, lowest first; positives: image of
    each positive by rising score. For the i-th positive: `below` and `through` count the blocks with a score < and <=
    its own, `first` is the first positive that ties with it.
    """

    blocks: Sparse
    positives: np.ndarray
    below: np.ndarray
    through: np.ndarray
    first: np.ndarray

    def areas(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return AUC and average precision, (R,) each, with image n counted weights[n] times; weights (N, R) int32.

        Everything up to the last division is whole numbers, so a weight of 2 is exactly an image that occurs twice.
        """
        won = _running_sums(self.blocks @ weights)
        own = np.take(weights, self.positives, axis=0)
        positive, negative = own.sum(axis=0, dtype=np.int64), won[-1].astype(np.int64)
        twice = (own * (won[self.below] + won[self.through])).sum(axis=0, dtype=np.int64)
        true = positive - _running_sums(own)[self.first]
        called = true + negative - won[self.below]
        precision = (own * true / np.maximum(called, 1)).sum(axis=0)
        return ratio(twice, 2 * positive * negative), where(negative > 0, ratio(precision, positive))


def rank_class(labels: np.ndarray, scores: np.ndarray, each: int = 1) -> Ranked:
    """Sort labels and scores (N each,), which hold `each` entries per image."""
    negatives, positives = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
    negatives = negatives[np.argsort(scores[negatives], kind="stable")]
    positives = positives[np.argsort(scores[positives], kind="stable")]
    low, high = scores[negatives], scores[positives]
    below, through = np.searchsorted(low, high, "left"), np.searchsorted(low, high, "right")
    # A running sum over few blocks is six times faster than one over all negatives.
    edges = np.unique(np.concatenate([[0], below, through, [len(low)]]))
    return Ranked(
        by_rows(np.ones(len(low), np.int32), negatives // each, edges, len(labels) // each),
        positives // each,
        np.searchsorted(edges, below),
        np.searchsorted(edges, through),
        np.searchsorted(high, high, "left"),
    )


def _running_sums(weights: np.ndarray) -> np.ndarray:
    """Add up the first k rows of weights (n, R) for each k, (n + 1, R)."""
    out = np.zeros((len(weights) + 1, weights.shape[1]), dtype=np.int32)
    np.cumsum(weights, axis=0, dtype=np.int32, out=out[1:])
    return out


def auc(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve of each class, (C,); NaN without a known positive or a known negative.

    labels (N, C) in {1, 0, -1}, scores (N, C) of any scale; ties count half.
    Raises InputError on unequal shapes, other labels, or NaN scores.
    The same as `Ranked.areas` with weights of one, without its argsort: this runs every epoch.
    Source: Mann and Whitney 1947; the area is P(positive > negative) + P(equal) / 2.
    """
    labels, scores = checked(labels, scores)
    out = np.full(labels.shape[1], np.nan)
    for c in range(labels.shape[1]):
        # Sorted values, not row numbers: np.sort is five times faster than argsort.
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
    labels, scores = checked(labels, scores)
    ones = np.ones((len(labels), 1), dtype=np.int32)
    return np.array([rank_class(y, s).areas(ones)[1][0] for y, s in zip(labels.T, scores.T, strict=True)])


def micro_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """ROC AUC over all known entries of all classes pooled; NaN without a positive or a negative."""
    labels, scores = checked(labels, scores)
    return float(auc(labels.reshape(-1, 1), scores.reshape(-1, 1))[0])


def macro(values: np.ndarray) -> tuple[float, int]:
    """Mean over the defined values, and how many those are: "33 of 35 classes". (NaN, 0) when none is."""
    defined = np.asarray(values, dtype=np.float64)
    defined = defined[~np.isnan(defined)]
    return (float(defined.mean()), len(defined)) if len(defined) else (math.nan, 0)


def prevalence(labels: np.ndarray) -> np.ndarray:
    """Share of positives among the known entries of each class, (C,)."""
    labels = np.asarray(labels)
    return ratio((labels == 1).sum(axis=0), (labels >= 0).sum(axis=0))


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
        return ratio(self.tp, self.tp + self.fn)

    def specificity(self) -> np.ndarray:
        """Share of negatives called negative."""
        return ratio(self.tn, self.tn + self.fp)

    def ppv(self) -> np.ndarray:
        """Share of positive calls that are right (precision)."""
        return ratio(self.tp, self.tp + self.fp)

    def npv(self) -> np.ndarray:
        """Share of negative calls that are right."""
        return ratio(self.tn, self.tn + self.fn)

    def accuracy(self) -> np.ndarray:
        """Share of known entries called right."""
        return ratio(self.tp + self.tn, self.tp + self.tn + self.fp + self.fn)

    def f1(self) -> np.ndarray:
        """2 TP / (2 TP + FP + FN); NaN without a known positive, whatever was called."""
        return where(self.tp + self.fn > 0, ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn))

    def jaccard(self) -> np.ndarray:
        """TP / (TP + FP + FN); NaN without a known positive, whatever was called."""
        return where(self.tp + self.fn > 0, ratio(self.tp, self.tp + self.fp + self.fn))

    def figures(self) -> Figures:
        """Return every figure of a class at its threshold, by the names of OF_CLASSES, and its accuracy."""
        return {
            "f1": self.f1(),
            "jaccard": self.jaccard(),
            "sensitivity": self.sensitivity(),
            "specificity": self.specificity(),
            "ppv": self.ppv(),
            "npv": self.npv(),
            "accuracy": self.accuracy(),
        }

    def pooled(self) -> Counts:
        """All classes as one, for micro averages: () or (R,)."""
        return Counts(*(x.sum(axis=0) for x in (self.tp, self.fp, self.fn, self.tn)))


def decisions(probs: np.ndarray, thresholds: np.ndarray | float) -> np.ndarray:
    """Call a class positive where p >= threshold, bool (N, C); thresholds (C,), one for all, or (N, C).

    Raises InputError on NaN thresholds (a class that `best_f1_thresholds` could not set) or a wrong shape.
    """
    limits = np.asarray(thresholds, dtype=np.float64)
    if limits.shape not in ((), (probs.shape[1],), probs.shape):
        raise InputError(f"thresholds {limits.shape} do not fit {probs.shape[1]} classes.")
    if missing := int(np.isnan(limits).sum()):
        raise InputError(f"{missing} of {limits.size} thresholds are NaN: give those classes one, such as 0.5.")
    return np.asarray(probs) >= limits


def counts(labels: np.ndarray, called: np.ndarray) -> Counts:
    """Count the known entries of each class by truth and decision, (C,) int64; labels and decisions (N, C)."""
    return Counts(*(cell.sum(axis=0) for cell in confusion_cells(np.asarray(labels), called)))


def confusion_cells(labels: np.ndarray, called: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mark the entries that are true positive, false positive, false negative, true negative; bool (N, C) each."""
    yes, no = labels == 1, labels == 0
    return yes & called, no & called, yes & ~called, no & ~called


def sample_jaccard(labels: np.ndarray, called: np.ndarray) -> float:
    """Mean over images of |true and called| / |true or called|, over known entries.

    An image with no finding and none called scores 1: that call is right. Images without a known label are
    left out. sklearn.metrics.jaccard_score(average="samples", zero_division=1) is the same figure.
    """
    return macro(image_jaccard(labels, called))[0]


def image_jaccard(labels: np.ndarray, called: np.ndarray) -> np.ndarray:
    """Return the Jaccard index of each image, (N,), as `sample_jaccard` averages them; NaN without a known label."""
    yes, known = labels == 1, labels >= 0
    union = ((yes | called) & known).sum(axis=1)
    score = np.where(union > 0, (yes & called).sum(axis=1) / np.maximum(union, 1), 1.0)
    return where(np.any(known, axis=1), score)


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
    labels, probs = checked(labels, probs, probabilities=True)
    known = labels >= 0
    return ratio(squared_errors(labels, probs).sum(axis=0), known.sum(axis=0))


def ece(labels: np.ndarray, probs: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, Reliability]:
    """Expected calibration error of each class, (C,), and the bins it was summed over.

    Bin k holds k/bins <= p < (k+1)/bins, the last one 1 as well; labels reshaped to (-1, 1) give the pooled
    figure. Source: Naeini, Cooper, Hauskrecht 2015: sum over bins of n_b / n |frequency - mean probability|.
    """
    labels, probs = checked(labels, probs, probabilities=True)
    classes = labels.shape[1]
    rows, columns = np.nonzero(labels >= 0)
    p = probs[rows, columns].astype(np.float64)
    slot = columns * bins + bin_numbers(p, bins)
    count, confidence, frequency = (
        np.bincount(slot, weights, classes * bins).reshape(classes, bins)
        for weights in (None, p, labels[rows, columns].astype(np.float64))
    )
    table = Reliability(np.linspace(0, 1, bins + 1), count, ratio(confidence, count), ratio(frequency, count))
    return ratio(np.abs(frequency - confidence).sum(axis=1), count.sum(axis=1)), table


def bin_numbers(probs: np.ndarray, bins: int) -> np.ndarray:
    """Return the bin of each probability, as `ece` numbers them."""
    return np.minimum((probs * bins).astype(np.int64), bins - 1)


def squared_errors(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Return (probability - label) squared, (N, C); 0 where a label is unknown."""
    return np.where(labels >= 0, (probs.astype(np.float64) - labels) ** 2, 0.0)


# Summaries.


def overall_key(name: str) -> str:
    """Return the key of a HEADLINE figure where those of each class stand beside it: they have a brier and ece too."""
    return f"pooled_{name}" if name in ("brier", "ece") else name


def every_figure(labels: np.ndarray, probs: np.ndarray, thresholds: np.ndarray | float) -> Figures:
    """Return the figures of OF_CLASSES and accuracy, (C,) each, and those of HEADLINE by `overall_key`, () each.

    labels and probs (N, C), thresholds (C,) or one for all. Raises InputError as `headline` does.
    """
    labels, probs = checked(labels, probs, probabilities=True)
    called, flat = decisions(probs, thresholds), (labels.reshape(-1, 1), probs.reshape(-1, 1))
    table = counts(labels, called)
    of_classes = {
        "auc": auc(labels, probs),
        "ap": average_precision(labels, probs),
        "brier": brier(labels, probs),
        "ece": ece(labels, probs)[0],
        **table.figures(),
    }
    alone = {
        "sample_jaccard": np.array(sample_jaccard(labels, called)),
        "micro_auc": np.array(micro_auc(labels, probs)),
        "pooled_brier": brier(*flat)[0],
        "pooled_ece": ece(*flat)[0][0],
    }
    means = {name: np.array(macro(of_classes[each])[0]) for name, each in MEANS.items()}
    return of_classes | pooled_counts(table) | means | alone


def pooled_counts(table: Counts) -> Figures:
    """Return the figures that follow from the counts of all classes as one."""
    pooled = table.pooled()
    return {"label_accuracy": pooled.accuracy(), "micro_f1": pooled.f1()}


def headline(labels: np.ndarray, probs: np.ndarray, thresholds: np.ndarray | float) -> dict[str, float | int]:
    """Return the published figures and those beside them, over all classes, and what they rest on.

    labels and probs (N, C), thresholds (C,) or one for all. `macro_` figures are means over the defined classes, of
    which `classes_defined` of `classes_total` have an AUC; PPV (NPV) is defined by the decisions, where something was
    called positive (negative). `brier` and `ece` are over all known entries of all classes as one.
    Raises InputError on bad shapes, labels, probabilities or thresholds.
    """
    found = every_figure(labels, probs, thresholds)
    figures = {name: float(found[overall_key(name)]) for name in dict.fromkeys((*FIRST, *HEADLINE))}
    defined = int((~np.isnan(found["auc"])).sum())
    return figures | {"n": len(labels), "classes_defined": defined, "classes_total": len(found["auc"])}


def per_class(
    labels: np.ndarray, probs: np.ndarray, thresholds: np.ndarray | float, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Return one row per class with every figure, NaN where undefined; same arguments and errors as `headline`.

    `ap_lift` is average precision over prevalence: 1 is chance. Where each image has its own thresholds, (N, C), the
    `threshold` of a class is NaN.
    """
    labels = np.asarray(labels)
    if labels.ndim == 2 and len(classes) != labels.shape[1]:
        raise InputError(f"{len(classes)} class names for {labels.shape[1]} columns of labels.")
    limits = np.asarray(thresholds, dtype=np.float64)
    found, share = every_figure(labels, probs, limits), prevalence(labels)
    names = ("jaccard", "f1", "sensitivity", "specificity", "ppv", "npv", "accuracy", "brier", "ece")
    columns = {
        "auc": found["auc"],
        "ap": found["ap"],
        "ap_lift": ratio(found["ap"], share),
        **{name: found[name] for name in names},
        "threshold": np.broadcast_to(np.nan if limits.ndim == 2 else limits, share.shape),
        "positives": (labels == 1).sum(axis=0),
        "negatives": (labels == 0).sum(axis=0),
        "unknown": (labels == -1).sum(axis=0),
        "prevalence": share,
    }
    rows = [{key: column[c].item() for key, column in columns.items()} for c in range(len(classes))]
    return [{"class": name, **row, "tier": tier(row["auc"])} for name, row in zip(classes, rows, strict=True)]


def tier(value: float) -> str:
    """The published names for an AUC: excellent from 0.85, good 0.70, fair 0.60, poor below; or no data."""
    return next((name for low, name in TIERS if value >= low), "insufficient data")
