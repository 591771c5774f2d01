"""Percentile intervals of every figure, by resampling groups of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from . import figures
from .arrays import checked, mean_of_classes, number_groups, ratio
from .figures import BINS, Counts, Figures
from .sparse import Sparse, by_entries
from .student import widened_tail

# Figures that lie higher in every resample than in the sample, see `bootstrap`.
REVERSED = ("map",)
# Resamples handled at once: a block of weights (1,500 images x 64) stays in the second-level cache.
BLOCK = 64

Decided = tuple[np.ndarray, np.ndarray | float]  # probabilities (N, C), thresholds (C,) or one for all
Weighted = Callable[[np.ndarray], Figures]  # weights (N, R) int32 to figures (C, R) and (R,)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure and its interval: () for a figure over all classes, (C,) for one of each class.

    `defined` is the number of resamples in which the figure exists; the interval is over those alone.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    defined: np.ndarray

    def of_class(self, c: int) -> Interval:
        """Return the interval of one class."""
        return Interval(value=self.value[c], low=self.low[c], high=self.high[c], defined=self.defined[c])


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How often groups are drawn, from which seed, and the share of resamples that an interval holds."""

    resamples: int = 1000
    seed: int = 0
    level: float = 0.95


def bootstrap(
    labels: np.ndarray,
    probs: np.ndarray,
    groups: Sequence[str],
    thresholds: np.ndarray | float,
    how: Resampling = Resampling(),
) -> dict[str, Interval]:
    """Return percentile intervals of every figure, resampling groups with replacement, never single images.

    labels and probs (N, C), groups N names, thresholds (C,) or one for all. The keys are those of
    `figures.every_figure`. Percentiles are widened for few groups, those of a class by `support` (NaN below 2). Average
    precision rises when a positive is drawn twice, and so does its mean over rare classes in every resample: the
    interval of `map` is the reverse percentile one, which takes that off.
    Raises InputError as `figures.headline` does. Source: Efron and Tibshirani 1993; groups as in Field and Welsh 2007;
    widened and reversed percentiles as in Hesterberg 2015.
    """
    figures_of, ids = weighted_figures(labels, probs, thresholds), number_groups(groups, len(labels))
    drawn = resample(figures_of, ids, how)
    tails = tail_shares(labels, ids, how.level)
    return _intervals(_with_equal_weights(figures_of, len(labels)), drawn, tails, reversed_names=REVERSED)


def paired_bootstrap(
    labels: np.ndarray, a: Decided, b: Decided, groups: Sequence[str], how: Resampling = Resampling()
) -> dict[str, Interval]:
    """`bootstrap` of b minus a, both scored on the same resamples; an interval without 0 is a difference.

    a and b are probabilities (N, C) and their thresholds. All by percentiles, mAP too: what repeated positives add to
    one run they add to the other.
    """
    first, second = weighted_figures(labels, *a), weighted_figures(labels, *b)

    def difference(weights: np.ndarray) -> Figures:
        before, after = first(weights), second(weights)
        return {key: after[key] - before[key] for key in before}

    ids = number_groups(groups, len(labels))
    drawn = resample(difference, ids, how)
    return _intervals(_with_equal_weights(difference, len(labels)), drawn, tail_shares(labels, ids, how.level))


def support(labels: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Count groups with a positive and groups with a negative, and return the fewer, (C,); labels (N, C)."""
    return _support(np.asarray(labels), number_groups(groups, len(labels)))


def _support(labels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    seen = np.zeros((2, int(ids.max()) + 1, labels.shape[1]), dtype=bool)
    for side in (0, 1):
        np.logical_or.at(seen[side], ids, labels == side)
    return np.asarray(seen.sum(axis=1).min(axis=0))


def group_weights(groups: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each image is in each resample of groups: blocks (N, up to BLOCK) int32, `resamples` in all.

    groups (N,) holds group numbers 0..G-1.
    """
    total = int(groups.max()) + 1
    random = np.random.default_rng(seed)
    for start in range(0, resamples, BLOCK):
        size = min(BLOCK, resamples - start)
        picks = random.integers(0, total, (size, total)) + np.arange(size)[:, None] * total
        drawn = np.bincount(picks.ravel(), minlength=size * total).reshape(size, total)
        yield np.ascontiguousarray(drawn.T, dtype=np.int32)[groups]


def weighted_figures(labels: np.ndarray, probs: np.ndarray, thresholds: np.ndarray | float) -> Weighted:
    """Sort once and return a function that turns weights (N, R) into every figure, (R,) or (C, R).

    With weights of one they are `figures.every_figure`, up to the order of sums: means over classes, Brier score,
    calibration error and sample-wise Jaccard may differ in the last bit.
    """
    labels, probs = checked(labels, probs, probabilities=True)
    called = figures.decisions(probs, thresholds)
    classes = labels.shape[1]
    ranked = [figures.rank_class(y, p) for y, p in zip(labels.T, probs.T, strict=True)]
    all_as_one = figures.rank_class(labels.ravel(), probs.ravel(), classes)
    cells = np.concatenate([cell.T for cell in figures.confusion_cells(labels, called)])
    rows, columns = np.nonzero(cells)
    cells_by_class = by_entries(np.ones(len(rows)), rows, columns, cells.shape)
    per_image = figures.image_jaccard(labels, called)
    overlap = np.stack([np.nan_to_num(per_image), ~np.isnan(per_image)])
    squared, gaps = figures.squared_errors(labels, probs).T, _bin_gaps(labels, probs)

    def weigh(weights: np.ndarray) -> Figures:
        w = weights.astype(np.float64)
        table = Counts(*(cells_by_class @ w).reshape(4, classes, -1))
        total, areas = table.tp + table.fp + table.fn + table.tn, [each.areas(weights) for each in ranked]
        errors, gap = _sums(squared, w), (gaps @ w).reshape(classes, BINS, -1)
        of_classes: Figures = {
            "auc": np.array([area for area, _ in areas]),
            "ap": np.array([precision for _, precision in areas]),
            "brier": ratio(errors, total),
            "ece": ratio(np.abs(gap).sum(axis=1), total),
            **table.figures(),
        }
        alone = {
            "sample_jaccard": ratio(*_sums(overlap, w)),
            "micro_auc": all_as_one.areas(weights)[0],
            "pooled_brier": ratio(errors.sum(axis=0), total.sum(axis=0)),
            "pooled_ece": ratio(np.abs(gap.sum(axis=0)).sum(axis=0), total.sum(axis=0)),
        }
        return of_classes | figures.over_classes(of_classes, table, mean_of_classes) | alone

    return weigh


def _sums(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Multiply (K, N) by (N, R) without BLAS: its threads make products this small 30 times slower, 25 s instead of
    0.8 s, where other work keeps the cores busy."""
    return np.asarray(np.einsum("kn,nr->kr", values, weights))


def _bin_gaps(labels: np.ndarray, probs: np.ndarray) -> Sparse:
    """Return label minus probability of image n in its bin, (C BINS, N), which the calibration error sums."""
    rows, columns = np.nonzero(labels >= 0)
    p = probs[rows, columns].astype(np.float64)
    slots, shape = columns * BINS + figures.bin_numbers(p, BINS), (labels.shape[1] * BINS, len(labels))
    return by_entries(labels[rows, columns] - p, slots, rows, shape)


def _with_equal_weights(figures_of: Weighted, images: int) -> Figures:
    return {key: value[..., 0] for key, value in figures_of(np.ones((images, 1), dtype=np.int32)).items()}


def resample(figures_of: Weighted, ids: np.ndarray, how: Resampling) -> Figures:
    """Return every figure in each resample of the groups `ids` (N,), (resamples,) or (C, resamples)."""
    blocks = [figures_of(weights) for weights in group_weights(ids, how.resamples, how.seed)]
    return {key: np.concatenate([block[key] for block in blocks], axis=-1) for key in blocks[0]}


def tail_shares(labels: np.ndarray, ids: np.ndarray, level: float) -> dict[str, np.ndarray]:
    """Return the share of resamples beyond each end, of figures `of_class` (C,) and `overall` (): less for few groups.

    A resample of n groups varies less than a sample of n by (n - 1) / n, and n groups know their own spread as badly as
    Student's t says. Source: Hesterberg 2015, the expanded percentile interval.
    """
    return {
        "of_class": widened_tail(_support(np.asarray(labels), ids), level),
        "overall": widened_tail(ids.max() + 1, level),
    }


def _intervals(
    values: Figures, drawn: Figures, tails: dict[str, np.ndarray], reversed_names: Sequence[str] = ()
) -> dict[str, Interval]:
    def one(name: str) -> Interval:
        value, draws = values[name], np.atleast_2d(drawn[name])
        rows = [row[~np.isnan(row)] for row in draws]
        ends = np.broadcast_to(tails["of_class" if value.ndim else "overall"], len(rows))
        limits = np.array([_quantiles(row, end) for row, end in zip(rows, ends, strict=True)])
        if name in reversed_names:
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
