"""The weighted bootstrap against rows that were really repeated, and intervals that hold what they should."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.metrics import figures, intervals
from cxr_fast.metrics.arrays import number_groups
from cxr_fast.metrics.intervals import Resampling

from .drawn import Pair, pairs

SCALARS = {figures.overall_key(name) for name in figures.HEADLINE}


def groups_of(n: int, seed: int) -> list[str]:
    return [f"p{g}" for g in np.random.default_rng(seed).integers(0, max(2, n // 2), n)]


def plain(labels: np.ndarray, probs: np.ndarray, thresholds: np.ndarray | float) -> dict[str, Any]:
    """Every bootstrapped figure by the functions that know no weights."""
    head = figures.headline(labels, probs, thresholds)
    rows = figures.per_class(labels, probs, thresholds, [""] * labels.shape[1])
    keys = (*figures.OF_CLASSES, "accuracy")
    return {figures.overall_key(key): head[key] for key in figures.HEADLINE} | {
        key: [row[key] for row in rows] for key in keys
    }


@settings(deadline=None, max_examples=40)
@given(pairs(30), st.integers(0, 100))
def test_a_weighted_resample_is_the_resampled_rows(pair: Pair, seed: int) -> None:
    labels, probs = pair
    thresholds = np.random.default_rng(seed).random(labels.shape[1])
    weigh = intervals.weighted_figures(labels, probs, thresholds)
    ids = number_groups(groups_of(len(labels), seed), len(labels))
    weights = next(intervals.group_weights(ids, 3, seed))
    got = weigh(weights)
    for k in range(3):
        rows = np.repeat(np.arange(len(labels)), weights[:, k])
        expected = plain(labels[rows], probs[rows], thresholds)
        assert got.keys() == expected.keys() - figures.MEANS.keys()
        for key, value in got.items():
            np.testing.assert_allclose(value[..., k], expected[key], rtol=0, atol=1e-9, err_msg=key)
        np.testing.assert_allclose(got["auc"][:, k], expected["auc"], rtol=0, atol=1e-12)


def test_groups_are_drawn_whole_and_with_replacement() -> None:
    ids = np.array([0, 1, 1, 2, 2, 2])
    blocks = list(intervals.group_weights(ids, 150, 0))
    weights = np.concatenate(blocks, axis=1)
    assert weights.shape == (6, 150)
    assert [block.shape[1] for block in blocks] == [64, 64, 22]
    assert (weights[1] == weights[2]).all()
    assert (weights[3] == weights[5]).all()
    assert (weights[[0, 1, 3]].sum(axis=0) == 3).all()
    assert weights[0].mean() == pytest.approx(1, abs=0.2)
    assert not (weights == np.concatenate(list(intervals.group_weights(ids, 150, 1)), axis=1)).all()


def model(n: int, classes: int, seed: int, skill: float = 1.2) -> Pair:
    random = np.random.default_rng(seed)
    labels = (random.random((n, classes)) < random.uniform(0.02, 0.4, classes)).astype(np.int8)
    return labels, 1 / (1 + np.exp(2 - random.normal(size=(n, classes)) - skill * labels))


def test_bootstrap_holds_the_value_and_repeats() -> None:
    labels, probs = model(300, 6, 0)
    groups = groups_of(300, 0)
    first = intervals.bootstrap(labels, probs, groups, 0.3, Resampling(resamples=200, seed=4))
    for key, value in plain(labels, probs, np.full(6, 0.3)).items():
        np.testing.assert_allclose(first[key].value, value, atol=1e-12)
        assert first[key].low.shape == first[key].value.shape == ((6,) if key not in SCALARS else ())
        assert (first[key].defined == 200).all()
        assert (first[key].low <= first[key].high).all()
    assert first["macro_auc"].low < first["macro_auc"].value < first["macro_auc"].high
    again = intervals.bootstrap(labels, probs, groups, 0.3, Resampling(resamples=200, seed=4))
    other = intervals.bootstrap(labels, probs, groups, 0.3, Resampling(resamples=200, seed=5))
    assert again["macro_auc"].low == first["macro_auc"].low != other["macro_auc"].low
    ids = number_groups(groups, 300)
    weights = np.concatenate(list(intervals.group_weights(ids, 200, 4)), axis=1)
    right = (labels == (probs >= 0.3)).mean(axis=1) @ weights / weights.sum(axis=0)
    tail = float(intervals.tail_shares(labels, ids, 0.95)["overall"])
    assert 0.023 < tail < 0.025, "widened a little for some 130 groups"
    ends = [first["label_accuracy"].low, first["label_accuracy"].high]
    np.testing.assert_allclose(ends, np.quantile(right, [tail, 1 - tail]), atol=1e-12)
    narrow = intervals.bootstrap(labels, probs, groups, 0.3, Resampling(resamples=200, seed=4, level=0.5))["macro_auc"]
    assert first["macro_auc"].low < narrow.low < narrow.high < first["macro_auc"].high


def test_bootstrap_interval_is_as_wide_as_theory_says_and_wider_for_groups() -> None:
    labels, probs = model(2000, 1, 1)
    alone = intervals.bootstrap(labels, probs, [str(i) for i in range(2000)], 0.5, Resampling(resamples=600))
    share = alone["accuracy"].value[0]
    width = 2 * 1.96 * math.sqrt(share * (1 - share) / 2000)
    assert (alone["accuracy"].high - alone["accuracy"].low)[0] == pytest.approx(width, rel=0.15)
    four = np.repeat(np.arange(500), 4)
    labels, probs = labels[:500][four], probs[:500][four]
    together = intervals.bootstrap(labels, probs, four.astype(str).tolist(), 0.5, Resampling(resamples=600))
    assert (together["accuracy"].high - together["accuracy"].low)[0] == pytest.approx(2 * width, rel=0.2)


def test_bootstrap_counts_resamples_without_a_positive() -> None:
    labels = np.zeros((40, 2), dtype=np.int8)
    labels[0, 0] = 1
    probs = np.random.default_rng(0).random((40, 2))
    got = intervals.bootstrap(labels, probs, [str(i) for i in range(40)], 0.5, Resampling(resamples=500))["auc"]
    # One positive of 40 is missed by (1 - 1/40)^40 = 36 % of resamples; the empty class by all of them.
    assert got.defined[0] == pytest.approx(500 * 0.637, rel=0.1)
    assert got.defined[1] == 0
    assert np.isnan([got.value[1], got.low[1], got.high[1]]).all()


def test_support_is_a_plain_loop() -> None:
    labels = np.array([[1, 0, -1], [1, 1, 0], [0, 1, -1], [0, -1, 1], [0, 0, 1]], dtype=np.int8)
    groups = ["a", "a", "b", "c", "c"]
    expected = []
    for c in range(3):
        sides = [{g for g, y in zip(groups, labels[:, c], strict=True) if y == side} for side in (0, 1)]
        expected.append(min(map(len, sides)))
    assert expected == [1, 2, 1]
    np.testing.assert_array_equal(intervals.support(labels, groups), expected)


def test_few_groups_widen_the_interval_as_students_t_does() -> None:
    from scipy import stats

    ids = np.arange(12)
    labels = np.zeros((12, 4), dtype=np.int8)
    for c, positives in enumerate((1, 2, 5, 6)):
        labels[:positives, c] = 1
    tails = intervals.tail_shares(labels, ids, 0.9)
    for got, n in zip([*tails["of_class"][1:], tails["overall"]], (2, 5, 6, 12), strict=True):
        assert got == pytest.approx(stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf(0.05, n - 1)), rel=1e-9)
    assert math.isnan(tails["of_class"][0]), "one group knows nothing of the others"


def plain_mean_interval(draws: list[list[float]], value: float, groups: list[int], each: str) -> tuple[float, float]:
    """The ends of a mean from figures of its classes in resamples, by the formulas one after another, with SciPy."""
    from scipy import stats

    means = [sum(row) / len(row) for row in zip(*draws, strict=True)]
    average = sum(means) / len(means)
    spread = sum((m - average) ** 2 for m in means) / (len(means) - 1)
    variances = [float(np.var(row, ddof=1)) / len(draws) ** 2 for row in draws]
    widened = spread + sum(v / (n - 1) for v, n in zip(variances, groups, strict=True))
    shares = [v * n / (n - 1) for v, n in zip(variances, groups, strict=True)]
    if each == "auc":
        shares = [1 / n for n in groups]
    whole = sum(shares) if each == "auc" else widened
    freedom = whole**2 / sum(s**2 / (n - 1) for s, n in zip(shares, groups, strict=True))
    of = stats.norm() if each == "f1" else stats.t(max(freedom, min(groups) - 1))
    half = of.ppf(0.975) * math.sqrt(widened)
    if not each:
        return value - half, value + half
    slope, times = value * (1 - value), 1.5 if each == "ap" else 0.0
    bias = (average - value) / slope
    half = math.sqrt((half / slope) ** 2 + (1.959963985 * bias) ** 2 * (times > 0))
    centre = math.log(value / (1 - value)) - times * bias
    return 1 / (1 + math.exp(half - centre)), 1 / (1 + math.exp(-half - centre))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_mean_is_over_one_set_of_classes_in_resamples_of_repeated_rows(seed: int, paired: bool) -> None:
    """Against rows really repeated: classes 0 and 1 are in too few groups, class 2 is missing from some resamples."""
    labels, probs = model(120, 6, seed)
    other = np.clip(probs + 0.1 * np.random.default_rng(seed).normal(size=probs.shape), 0, 1)
    labels[:, :3] = 0
    labels[:3, 0] = 1
    labels[:4, 1] = labels[:5, 2] = 1
    labels[:12, 3:] = np.arange(12)[:, None] % 2
    groups, how = [str(i) for i in range(120)], Resampling(resamples=120, seed=seed)
    subsets = {"tail": np.arange(6) < 3}
    if paired:
        found = intervals.paired_bootstrap(labels, (probs, 0.2), (other, 0.3), groups, how, subsets)
    else:
        found = intervals.bootstrap(labels, probs, groups, 0.2, how, subsets)
    drawn = []
    for weights in intervals.group_weights(np.unique(groups, return_inverse=True)[1], 120, seed):
        for column in weights.T:
            rows = np.repeat(np.arange(120), column)
            one, two = plain(labels[rows], probs[rows], 0.2), plain(labels[rows], other[rows], 0.3)
            drawn.append({key: np.subtract(two[key], one[key]) if paired else one[key] for key in ("auc", "ap", "f1")})
    one, two = plain(labels, probs, 0.2), plain(labels, other, 0.3)
    behind = intervals.support(labels, groups)
    for name, key, rare in (("macro_auc", "auc", 0), ("map", "ap", 0), ("macro_f1", "f1", 0), ("tail_ap", "ap", 1)):
        chosen = [2] if rare else [2, 3, 4, 5]
        assert found[name].classes is not None
        assert np.flatnonzero(found[name].classes).tolist() == chosen
        whole = [row for draw in drawn if not np.isnan(row := [draw[key][c] for c in chosen]).any()]
        assert found[name].defined == len(whole)
        value = np.mean([two[key][c] - one[key][c] if paired else one[key][c] for c in chosen])
        columns = [list(column) for column in zip(*whole, strict=True)]
        ends = plain_mean_interval(columns, value, [int(behind[c]) for c in chosen], "" if paired else key)
        got = [float(end) for end in (found[name].value, found[name].low, found[name].high)]
        assert got == pytest.approx([value, *ends], rel=1e-6, abs=1e-9)


def test_a_model_that_calls_everything_positive_has_no_interval_up_to_one() -> None:
    """A resample without the rare class has no other class set: a Jaccard of 1 came from those with one class alone."""
    labels = np.zeros((60, 3), dtype=np.int8)
    labels[:30, 0] = labels[:2, 1] = labels[:6, 2] = 1
    groups = [str(i) for i in range(60)]
    found = intervals.bootstrap(labels, np.ones(labels.shape), groups, 0.5)
    for name in ("class_jaccard", "macro_f1", "macro_ppv", "map"):
        assert found[name].classes.tolist() == [True, False, True]  # type: ignore[union-attr]
        assert found[name].low < found[name].value < found[name].high < 0.7
    assert found["macro_sensitivity"].low == found["macro_sensitivity"].high == 1, "1 in every resample: no width"
    assert math.isnan(found["macro_npv"].low), "nothing is called negative"
    alone = intervals.bootstrap(labels[:, 1:2], np.ones((60, 1)), groups, 0.5)
    assert all(math.isnan(alone[name].high) for name in figures.MEANS), "no class is in enough groups"


def test_a_class_that_never_varies_takes_the_interval_away() -> None:
    """None of six positives is called: every resample says F1 0, and says nothing of other patients."""
    labels = np.zeros((100, 2), dtype=np.int8)
    labels[:6, 0] = labels[:50, 1] = 1
    probs = np.zeros(labels.shape)
    probs[20:70, 1] = 0.9
    found = intervals.bootstrap(labels, probs, [str(i) for i in range(100)], 0.5, Resampling(resamples=100))
    assert found["macro_f1"].value == pytest.approx(0.3)
    assert math.isnan(found["macro_f1"].low)


def test_the_interval_of_map_is_not_shifted_by_rare_classes() -> None:
    """Average precision of rare classes is too high, and every resample repeats positives, so its mAP is higher still:
    the interval takes that off."""
    random, shares = np.random.default_rng(0), np.geomspace(0.04, 0.4, 8)

    def draw(n: int) -> Pair:
        labels = (random.random((n, 8)) < shares).astype(np.int8)
        return labels, 1 / (1 + np.exp(-1.2 * labels - random.normal(size=labels.shape)))

    truth, hit, plain_hit = figures.average_precision(*draw(200_000)), 0, 0
    for k in range(100):
        labels, probs = draw(200)
        how = Resampling(resamples=150, seed=k)
        found = intervals.bootstrap(labels, probs, [str(i) for i in range(200)], 0.5, how)["map"]
        target = truth[found.classes].mean()
        hit += bool(found.low <= target <= found.high)
        plain_hit += bool(abs(found.value - target) <= (found.high - found.low) / 2)
    assert hit >= 89
    assert plain_hit < hit


def test_paired_bootstrap_sees_a_difference_and_none() -> None:
    labels, probs = model(400, 4, 2)
    groups = groups_of(400, 2)
    worse = 0.5 * probs + 0.5 * np.random.default_rng(9).random(probs.shape)
    same = intervals.paired_bootstrap(labels, (probs, 0.5), (probs, 0.5), groups, Resampling(resamples=100))
    assert all((x.low == 0).all() and (x.high == 0).all() for x in same.values())
    drop = intervals.paired_bootstrap(labels, (probs, 0.3), (worse, 0.5), groups, Resampling(resamples=200))
    assert drop["macro_auc"].high < 0
    a, b = figures.headline(labels, probs, 0.3), figures.headline(labels, worse, 0.5)
    assert drop["macro_f1"].value == pytest.approx(b["macro_f1"] - a["macro_f1"], abs=1e-12)
    # Paired: the shared images cancel, so the interval is narrower than two separate ones would make it.
    how = Resampling(resamples=200)
    alone = intervals.bootstrap(labels, probs, groups, 0.3, how)["brier"]
    nearly = intervals.paired_bootstrap(labels, (probs, 0.3), (probs * 0.99, 0.3), groups, how)["brier"]
    assert ((nearly.high - nearly.low) < 0.5 * (alone.high - alone.low)).all()
