"""Intervals of every figure, by resampling groups of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from . import figures
from .arrays import checked, number_groups, ratio
from .figures import BINS, MEANS, Counts, Figures
from .sparse import Sparse, by_entries
from .student import student_quantile, widened_tail

# A class with positives (or negatives) in fewer groups than this has no interval and no part in that of a mean: however
# widened, its own would hold the truth in three of four cases and not in 19 of 20 (benchmarks/LOG.md).
FEW = 5
# Average precision is too high by more than its resamples show, which repeat positives: 1.5 to 2 times that, as rare as
# classes are (benchmarks/LOG.md). So many times it is taken off a mean of it.
EXCESS = {"ap": 1.5}
# Figures whose spread in the resamples is least where the sample is luckiest, with all positives of a rare class ranked
# high: the counts of groups alone tell how well it is known, not the spread itself.
LUCKY = ("auc",)
# Figures whose means the normal distribution is enough for: with Student's t their intervals held the truth in 0.97 to
# 0.98 of draws, and not in 0.95 (benchmarks/LOG.md).
NORMAL = ("f1", "jaccard")
# A class whose figure varies by less in the resamples is the same in all of them, up to rounding: none of its positives
# is called, say.
SILENT = 1e-7
# Resamples handled at once: a block of weights (1,500 images x 64) stays in the second-level cache.
BLOCK = 64

Decided = tuple[np.ndarray, np.ndarray | float]  # probabilities (N, C), thresholds (C,) or one for all
Weighted = Callable[[np.ndarray], Figures]  # weights (N, R) int32 to figures (C, R) and (R,)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure and its interval: () for a figure over all classes, (C,) for one of each class.

    `defined` is the number of resamples in which the figure exists; the interval is over those alone. `classes`, bool
    (C,), are the classes of a mean: value and interval are over these, in every resample. None for other figures.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    defined: np.ndarray
    classes: np.ndarray | None = None

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
    subsets: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Interval]:
    """Return intervals of every figure, resampling groups with replacement, never single images.

    labels and probs (N, C), groups N names, thresholds (C,) or one for all. The keys are those of
    `figures.every_figure`, and for each of the `subsets` of classes, bool (C,) by name, `NAME_auc` and `NAME_ap`.
    Means over classes are described in `mean_intervals`. All others are percentiles, widened for few groups, those of a
    class by `support` (NaN below 2). Raises InputError as `figures.headline` does.
    Source: Efron and Tibshirani 1993; groups as in Field and Welsh 2007; widened as in Hesterberg 2015.
    """
    ids = number_groups(groups, len(labels))
    figures_of = weighted_figures(labels, probs, thresholds)
    values, drawn = _with_equal_weights(figures_of, len(labels)), resample(figures_of, ids, how)
    behind = groups_behind(labels, figures.decisions(probs, thresholds), ids)
    means = mean_intervals(values, drawn, behind, subsets or {}, how.level)
    return means | _percentiles(values, drawn, tail_shares(labels, ids, how.level))


def paired_bootstrap(
    labels: np.ndarray,
    a: Decided,
    b: Decided,
    groups: Sequence[str],
    how: Resampling = Resampling(),
    subsets: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Interval]:
    """`bootstrap` of b minus a, both scored on the same resamples; an interval without 0 is a difference.

    a and b are probabilities (N, C) and their thresholds. A mean is over the classes that both runs have enough groups
    for. Nothing is taken off mAP: what repeated positives add to one run they add to the other.
    """
    first, second = weighted_figures(labels, *a), weighted_figures(labels, *b)

    def difference(weights: np.ndarray) -> Figures:
        before, after = first(weights), second(weights)
        return {key: after[key] - before[key] for key in before}

    ids = number_groups(groups, len(labels))
    values, drawn = _with_equal_weights(difference, len(labels)), resample(difference, ids, how)
    sides = [groups_behind(labels, figures.decisions(*side), ids) for side in (a, b)]
    behind = {name: np.minimum(count, sides[1][name]) for name, count in sides[0].items()}
    means = mean_intervals(values, drawn, behind, subsets or {}, how.level, differences=True)
    return means | _percentiles(values, drawn, tail_shares(labels, ids, how.level))


def mean_interval(values: np.ndarray, groups: Sequence[str], how: Resampling = Resampling()) -> Interval:
    """Return the mean of the images' values (N,) and its interval: percentiles of resampled groups, widened for few.

    Values are of any scale, such as differences of two models image by image. NaN ends below two groups.
    """
    ids = number_groups(groups, len(values))

    def mean(weights: np.ndarray) -> Figures:
        w = weights.astype(np.float64)
        return {"mean": ratio(_sums(values[None].astype(np.float64), w)[0], w.sum(axis=0))}

    tails = {"overall": widened_tail(ids.max() + 1, how.level)}
    return _percentiles(_with_equal_weights(mean, len(values)), resample(mean, ids, how), tails)["mean"]


# Means over one set of classes.


def groups_behind(labels: np.ndarray, called: np.ndarray, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Count the groups that the figure of each class rests on, (C,) by the names of OF_CLASSES.

    Sensitivity rests on the groups with a positive, specificity on those with a negative, PPV and NPV also on those
    with an image called so, all others on the fewer of positive and negative. labels and decisions (N, C), ids (N,).
    """
    labels = np.asarray(labels)
    known, rows = labels >= 0, (labels == 1, labels == 0)
    positive, negative = (_count_groups(row, ids) for row in rows)
    both = np.minimum(positive, negative)
    enough = both >= FEW  # one set for all of them, as far as the decisions allow
    found = dict.fromkeys(figures.OF_CLASSES, both)
    found |= {"sensitivity": np.where(enough, positive, 0), "specificity": np.where(enough, negative, 0)}
    found |= {"ppv": np.where(enough, _count_groups(known & called, ids), 0)}
    return found | {"npv": np.where(enough, _count_groups(known & ~called, ids), 0)}


def mean_intervals(
    values: Figures,
    drawn: Figures,
    behind: Mapping[str, np.ndarray],
    subsets: Mapping[str, np.ndarray],
    level: float,
    *,
    differences: bool = False,
) -> dict[str, Interval]:
    """Return the interval of each mean over classes, of those alone that FEW groups or more are behind.

    values (C,) and drawn (C, R) are figures of each class; `behind` as `groups_behind` counts, `subsets` of classes as
    in `bootstrap`. The mean is over the same classes in every resample: one in which a class of them is undefined is
    left out. The interval is the spread of the resamples about the value, on the scale of log odds (not `differences`),
    times Student's t (those of NORMAL the normal quantile), widened for the few groups behind each class (Satterthwaite
    1946, Hesterberg 2015).
    NaN without such a class; where those that are the same in all resamples, as an F1 of 0 is, make up a third of what
    is unknown by their counts of groups; and for a value of 0 or 1.
    """
    everything = np.ones(len(behind["auc"]), dtype=bool)
    asked = {name: (each, everything) for name, each in MEANS.items()}
    for name, subset in subsets.items():
        asked |= {f"{name}_{each}": (each, subset) for each in ("auc", "ap")}
    out = {}
    for name, (each, subset) in asked.items():
        chosen = subset & (behind[each] >= FEW) & ~np.isnan(values[each])
        draws = drawn[each][chosen]
        draws = draws[:, ~np.isnan(draws).any(axis=0)]
        value, low, high = math.nan, math.nan, math.nan
        if draws.size:
            value = float(values[each][chosen].mean())
            low, high = mean_ends(value, draws, behind[each][chosen], level, "" if differences else each)
        ends = (np.array(end) for end in (value, low, high, draws.shape[1] if draws.size else 0))
        out[name] = Interval(**dict(zip(("value", "low", "high", "defined"), ends, strict=True)), classes=chosen)
    return out


def mean_ends(value: float, draws: np.ndarray, groups: np.ndarray, level: float, each: str = "") -> tuple[float, float]:
    """Return the ends for a mean and its draws (C, R), with so many groups (C,) behind each class.

    `each` names the figure of a class that is averaged; it is empty for differences, which have no bounds.
    """
    means, tail = draws.mean(axis=0), (1 - level) / 2
    if len(means) < 2:
        return math.nan, math.nan
    if not (spread := float(means.var(ddof=1))):
        return value, value
    n = groups.astype(np.float64)
    own = draws.var(axis=1, ddof=1) / len(draws) ** 2 * n / (n - 1)  # of each class, as a sample of n varies
    silent = own < SILENT**2
    if each and (1 / n)[silent].sum() > (1 / n).sum() / 3:
        return math.nan, math.nan
    widened = spread + float((own / n).sum())
    part, whole = (1 / n, float((1 / n).sum())) if each in LUCKY else (own, widened)
    freedom = max(whole**2 / float((part**2 / (n - 1)).sum()), float(n.min()) - 1)
    normal = NormalDist().inv_cdf(1 - tail)
    half = math.sqrt(widened) * (normal if each in NORMAL else student_quantile(min(freedom, 1e6), tail))
    if not each:
        return value - half, value + half
    if not 0 < value < 1:
        return math.nan, math.nan
    slope, excess = value * (1 - value), EXCESS.get(each, 0.0)
    bias = (float(means.mean()) - value) / slope
    centre = math.log(value / (1 - value)) - excess * bias
    half = math.hypot(half / slope, (excess > 0) * normal * bias)
    return _odds_share(centre - half), _odds_share(centre + half)


def _odds_share(log_odds: float) -> float:
    return 1 / (1 + math.exp(-min(max(log_odds, -700), 700)))


def support(labels: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Count groups with a positive and groups with a negative, and return the fewer, (C,); labels (N, C)."""
    return _support(np.asarray(labels), number_groups(groups, len(labels)))


def _support(labels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return np.minimum(_count_groups(labels == 1, ids), _count_groups(labels == 0, ids))


def _count_groups(marked: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Count the groups with a marked image, (C,); marked bool (N, C), ids (N,)."""
    rows, columns = np.nonzero(marked)
    pairs = np.unique(columns * (int(ids.max()) + 1) + ids[rows])
    return np.bincount(pairs // (int(ids.max()) + 1), minlength=marked.shape[1])


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

    With weights of one they are those of `figures.every_figure` without the means over classes, up to the order of
    sums: Brier score, calibration error and sample-wise Jaccard may differ in the last bit.
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
        return of_classes | figures.pooled_counts(table) | alone

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


def _percentiles(values: Figures, drawn: Figures, tails: dict[str, np.ndarray]) -> dict[str, Interval]:
    def one(name: str) -> Interval:
        value, draws = values[name], np.atleast_2d(drawn[name])
        rows = [row[~np.isnan(row)] for row in draws]
        ends = np.broadcast_to(tails["of_class" if value.ndim else "overall"], len(rows))
        limits = np.array([_quantiles(row, end) for row, end in zip(rows, ends, strict=True)])
        low, high, defined = limits[:, 0], limits[:, 1], np.array([len(row) for row in rows])
        shaped = {"low": low, "high": high, "defined": defined}
        return Interval(value=value, **{key: ends.reshape(value.shape) for key, ends in shaped.items()})

    return {name: one(name) for name in values}


def _quantiles(draws: np.ndarray, tail: float) -> np.ndarray:
    return np.full(2, np.nan) if not len(draws) or np.isnan(tail) else np.quantile(draws, (tail, 1 - tail))
