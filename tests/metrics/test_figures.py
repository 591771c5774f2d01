"""Every figure against scikit-learn or a plain loop; the weighted bootstrap against rows that were really repeated."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.errors import InputError
from cxr_fast.metrics import figures as metrics

Pair = tuple[np.ndarray, np.ndarray]
POOLED = {"brier": "pooled_brier", "ece": "pooled_ece"}
SCALARS = {POOLED.get(name, name) for name in metrics.HEADLINE}


@st.composite
def pairs(draw: st.DrawFn, most: int = 40) -> Pair:
    """Labels and probabilities with ties, unknowns, classes without positives or negatives, down to two rows."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(2, most)), draw(st.integers(1, 5)))
    labels = (random.random(shape) < random.choice([0.0, 0.1, 0.5, 0.9, 1.0], shape[1])).astype(np.int8)
    labels[random.random(shape) < draw(st.sampled_from([0.0, 0.2, 0.7]))] = -1
    if draw(st.booleans()):
        labels[:, 0] = -1
    probs = random.random(shape)
    if levels := draw(st.sampled_from([0, 1, 2, 5, 15])):
        probs = np.round(probs * levels) / levels
    return labels, probs.astype(draw(st.sampled_from([np.float32, np.float64])))


def known(labels: np.ndarray, values: np.ndarray, c: int) -> Pair:
    rows = labels[:, c] >= 0
    return labels[rows, c], values[rows, c]


def by_class(labels: np.ndarray, values: np.ndarray, figure: Any, *, both: bool = True) -> np.ndarray:
    """A scikit-learn figure of each class, NaN without a positive (and, with `both`, without a negative)."""
    out = []
    for c in range(labels.shape[1]):
        y, v = known(labels, values, c)
        out.append(figure(y, v) if (y == 1).any() and (not both or (y == 0).any()) else math.nan)
    return np.array(out)


@settings(deadline=None)
@given(pairs())
def test_ranking_figures_are_scikit_learns(pair: Pair) -> None:
    labels, probs = pair
    np.testing.assert_allclose(metrics.auc(*pair), by_class(*pair, sk.roc_auc_score), rtol=0, atol=1e-12)
    expected = by_class(*pair, sk.average_precision_score)
    np.testing.assert_allclose(metrics.average_precision(*pair), expected, rtol=0, atol=1e-12)
    flat = by_class(labels.reshape(-1, 1), probs.reshape(-1, 1), sk.roc_auc_score)[0]
    np.testing.assert_allclose(metrics.micro_auc(*pair), flat, rtol=0, atol=1e-12)
    mean, defined = metrics.macro(metrics.auc(*pair))
    assert defined == int((~np.isnan(metrics.auc(*pair))).sum())
    assert math.isnan(mean) == (defined == 0)


def test_auc_by_hand() -> None:
    labels = np.array([[0, 1, -1], [0, 1, 0], [1, 1, -1], [1, -1, 1]], dtype=np.int8)
    scores = np.array([[0.1, 0.2, 0.0], [0.4, 0.2, 5.0], [0.4, 0.1, 0.0], [-3.0, 0.3, 5.0]])
    # Class 0: (0.4 beats 0.1, ties 0.4; -3 beats none) = 1.5 of 4. Class 1 has no negative. Class 2 one tie.
    np.testing.assert_array_equal(metrics.auc(labels, scores), [0.375, np.nan, 0.5])
    assert metrics.macro(metrics.auc(labels, scores)) == (0.4375, 2)
    assert metrics.macro(np.array([np.nan]))[1] == 0
    np.testing.assert_array_equal(metrics.prevalence(labels), [0.5, 1.0, 0.5])
    assert math.isnan(metrics.prevalence(np.array([[-1]]))[0])


def test_auc_orders_values_too_close_for_float32_sums_and_infinities() -> None:
    labels = np.array([[0], [1], [0], [1]], dtype=np.int8)
    scores = np.array([[1.0], [np.nextafter(1, 2)], [-np.inf], [np.inf]])
    assert metrics.auc(labels, scores)[0] == 1.0


@settings(deadline=None)
@given(pairs(), st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_figures_at_a_threshold_are_scikit_learns(pair: Pair, threshold: float) -> None:
    labels, probs = pair
    called = metrics.decisions(probs, threshold)
    np.testing.assert_array_equal(called, probs >= threshold)
    table = metrics.counts(labels, called)
    near: Any = np.testing.assert_allclose
    near(table.f1(), by_class(labels, called, sk.f1_score, both=False), atol=1e-12)
    near(table.jaccard(), by_class(labels, called, sk.jaccard_score, both=False), atol=1e-12)
    near(table.sensitivity(), by_class(labels, called, sk.recall_score, both=False), atol=1e-12)
    for c in range(labels.shape[1]):
        y, d = known(labels, called, c)
        tn, fp, fn, tp = sk.confusion_matrix(y, d, labels=[0, 1]).ravel() if len(y) else (0, 0, 0, 0)
        assert (table.tp[c], table.fp[c], table.fn[c], table.tn[c]) == (tp, fp, fn, tn)
        by_hand = {"specificity": (tn, tn + fp), "ppv": (tp, tp + fp), "npv": (tn, tn + fn)}
        by_hand["accuracy"] = (tp + tn, tp + tn + fp + fn)
        for name, (part, whole) in by_hand.items():
            value = getattr(table, name)()[c]
            assert value == part / whole if whole else math.isnan(value)


@settings(deadline=None)
@given(pairs())
def test_sample_jaccard_is_a_plain_loop(pair: Pair) -> None:
    labels, probs = pair
    called = metrics.decisions(probs, 0.5)
    scores = []
    for y, d in zip(labels, called, strict=True):
        true, said = set(np.flatnonzero(y == 1)), set(np.flatnonzero(d & (y >= 0)))
        if (y >= 0).any():
            scores.append(len(true & said) / len(true | said) if true | said else 1.0)
    expected = np.mean(scores) if scores else math.nan
    np.testing.assert_allclose(metrics.sample_jaccard(labels, called), expected, atol=1e-12)


@settings(deadline=None)
@given(pairs(), st.sampled_from([0.0, 0.3, 0.5]))
def test_headline_figures_are_scikit_learns_where_labels_are_unknown(pair: Pair, threshold: float) -> None:
    """Means over the classes in which scikit-learn has a figure, and all known entries as one column."""
    labels, probs = pair
    called = metrics.decisions(probs, threshold)
    got = metrics.headline(labels, probs, threshold)
    names = ("sensitivity", "specificity", "ppv", "npv", "f1", "jaccard")
    of_class: dict[str, list[float]] = {name: [] for name in names}
    for c in range(labels.shape[1]):
        y, d = known(labels, called, c)
        scores = {
            "sensitivity": sk.recall_score(y, d) if (y == 1).any() else None,
            "specificity": sk.recall_score(y, d, pos_label=0) if (y == 0).any() else None,
            "ppv": sk.precision_score(y, d) if d.any() else None,
            "npv": sk.precision_score(y, d, pos_label=0) if (~d).any() else None,
            "f1": sk.f1_score(y, d) if (y == 1).any() else None,
            "jaccard": sk.jaccard_score(y, d) if (y == 1).any() else None,
        }
        for name, score in scores.items():
            if score is not None:
                of_class[name].append(score)
    near: Any = np.testing.assert_allclose
    for name, scores_of in of_class.items():
        key = "class_jaccard" if name == "jaccard" else f"macro_{name}"
        near(got[key], np.mean(scores_of) if scores_of else math.nan, atol=1e-12, err_msg=key)
    y, p, d = (values[labels >= 0] for values in (labels, probs.astype(np.float64), called))
    near(got["label_accuracy"], sk.accuracy_score(y, d) if len(y) else math.nan, atol=1e-12)
    near(got["micro_f1"], sk.f1_score(y, d) if (y == 1).any() else math.nan, atol=1e-12)
    near(got["brier"], np.mean((y - p) ** 2) if len(y) else math.nan, atol=1e-12)
    gaps = [abs((y - p)[(p * 15).astype(int).clip(max=14) == b].sum()) for b in range(15)]
    near(got["ece"], sum(gaps) / len(y) if len(y) else math.nan, atol=1e-12)


def test_multilabel_averages_are_scikit_learns_where_all_is_known() -> None:
    random = np.random.default_rng(5)
    labels = (random.random((80, 6)) < 0.2).astype(np.int8)
    probs = random.random((80, 6))
    probs[:5] = 0
    labels[:3] = 0
    thresholds = np.array([0.9, 0.8, 0.7, 0.9, 0.95, 0.5])
    called = probs >= thresholds
    got = metrics.headline(labels, probs, thresholds)
    jaccard = sk.jaccard_score(labels, called, average="samples", zero_division=1)
    assert got == {
        "label_accuracy": pytest.approx((labels == called).mean(), abs=1e-12),
        "macro_auc": pytest.approx(sk.roc_auc_score(labels, probs, average="macro"), abs=1e-12),
        "sample_jaccard": pytest.approx(jaccard, abs=1e-12),
        "class_jaccard": pytest.approx(sk.jaccard_score(labels, called, average="macro"), abs=1e-12),
        "macro_f1": pytest.approx(sk.f1_score(labels, called, average="macro"), abs=1e-12),
        "map": pytest.approx(sk.average_precision_score(labels, probs, average="macro"), abs=1e-12),
        "micro_auc": pytest.approx(sk.roc_auc_score(labels, probs, average="micro"), abs=1e-12),
        "micro_f1": pytest.approx(sk.f1_score(labels, called, average="micro"), abs=1e-12),
        "macro_sensitivity": pytest.approx(sk.recall_score(labels, called, average="macro"), abs=1e-12),
        "macro_specificity": pytest.approx(sk.recall_score(1 - labels, ~called, average="macro"), abs=1e-12),
        "macro_ppv": pytest.approx(sk.precision_score(labels, called, average="macro"), abs=1e-12),
        "macro_npv": pytest.approx(sk.precision_score(1 - labels, ~called, average="macro"), abs=1e-12),
        "brier": pytest.approx(sk.brier_score_loss(labels.ravel(), probs.ravel()), abs=1e-12),
        "ece": pytest.approx(metrics.ece(labels.reshape(-1, 1), probs.reshape(-1, 1))[0][0], abs=1e-12),
        "n": 80,
        "classes_defined": 6,
        "classes_total": 6,
    }
    assert (labels[:3] == 0).all()
    assert jaccard > sk.jaccard_score(labels, called, average="samples", zero_division=0)


@settings(deadline=None)
@given(pairs(), st.integers(1, 20))
def test_calibration_is_a_plain_loop(pair: Pair, bins: int) -> None:
    labels, probs = pair
    value, table = metrics.ece(labels, probs, bins)
    squares = metrics.brier(labels, probs)
    assert table.edges.shape == (bins + 1,)
    for c in range(labels.shape[1]):
        y, p = known(labels, probs.astype(np.float64), c)
        if not len(y):
            assert math.isnan(value[c])
            assert math.isnan(squares[c])
            continue
        assert squares[c] == pytest.approx(sk.brier_score_loss(y, p, pos_label=1), abs=1e-12)
        slot = [min(int(x * bins), bins - 1) for x in p]
        total = 0.0
        for b in range(bins):
            rows = [i for i, s in enumerate(slot) if s == b]
            assert table.count[c, b] == len(rows)
            if rows:
                assert table.frequency[c, b] == pytest.approx(y[rows].mean())
                assert table.confidence[c, b] == pytest.approx(p[rows].mean())
                total += len(rows) / len(y) * abs(y[rows].mean() - p[rows].mean())
            else:
                assert math.isnan(table.frequency[c, b])
        assert value[c] == pytest.approx(total, abs=1e-9)


def test_a_calibrated_model_has_little_calibration_error_and_a_confident_one_has_much() -> None:
    random = np.random.default_rng(0)
    probs = random.random((20000, 1))
    labels = (random.random((20000, 1)) < probs).astype(np.int8)
    assert metrics.ece(labels, probs)[0][0] < 0.02
    assert metrics.ece(labels, (probs > 0.5).astype(float))[0][0] == pytest.approx(0.25, abs=0.02)


def candidates(probs: np.ndarray) -> np.ndarray:
    """A threshold for every way of cutting the scores."""
    return np.append(np.unique(probs.astype(np.float64)), 2.0)


@settings(deadline=None)
@given(pairs())
def test_best_f1_is_the_best_of_all_thresholds(pair: Pair) -> None:
    labels, probs = pair
    found = metrics.best_f1_thresholds(labels, probs)
    for c in range(labels.shape[1]):
        y, p = known(labels, probs, c)
        if not ((y == 1).any() and (y == 0).any()):
            assert math.isnan(found[c])
            continue
        scores = [(sk.f1_score(y, p >= t, zero_division=0), t) for t in candidates(p)]
        best = max(score for score, _ in scores)
        assert sk.f1_score(y, p >= found[c]) == pytest.approx(best, abs=1e-12)
        # Of equal ones the one that calls least.
        assert (p >= found[c]).sum() == min((p >= t).sum() for score, t in scores if score >= best - 1e-12)


@settings(deadline=None)
@given(pairs(), st.sampled_from(["sensitivity", "specificity"]), st.sampled_from([0.01, 0.5, 0.9, 0.95, 1.0]))
def test_thresholds_reach_their_target_and_no_further(pair: Pair, target: Any, value: float) -> None:
    labels, probs = pair
    found = metrics.thresholds_for(labels, probs, target, value)
    for c in range(labels.shape[1]):
        y, p = known(labels, probs, c)
        own = p[y == (1 if target == "sensitivity" else 0)]
        if not len(own):
            assert math.isnan(found[c])
            continue

        def reached(t: float, own: np.ndarray = own) -> bool:
            share = (own >= t).mean() if target == "sensitivity" else (own < t).mean()
            return bool(share >= value - 1e-12)

        good = [t for t in candidates(p) if reached(t)]
        best = max(good) if target == "sensitivity" else min(good)
        np.testing.assert_array_equal(p >= found[c], p >= best)


def test_thresholds_lie_between_scores() -> None:
    labels = np.array([[0], [0], [1], [1]], dtype=np.int8)
    probs = np.array([[0.1], [0.2], [0.6], [0.8]])
    assert metrics.best_f1_thresholds(labels, probs) == pytest.approx([0.4])
    assert metrics.thresholds_for(labels, probs, "sensitivity", 0.5) == pytest.approx([0.7])
    assert metrics.thresholds_for(labels, probs, "specificity", 0.5) == pytest.approx([0.15])
    certain = np.ones((4, 1))
    assert metrics.thresholds_for(labels, certain, "specificity", 0.5)[0] > 1
    close = np.array([[0.5], [0.5], [np.nextafter(0.5, 1)], [np.nextafter(0.5, 1)]])
    assert metrics.decisions(close, metrics.best_f1_thresholds(labels, close)).ravel().tolist() == [
        False,
        False,
        True,
        True,
    ]
    # 0.07 * 100 is a bit more than 7 in floating point; seven of a hundred positives are enough.
    rising = np.linspace(0.1, 0.9, 100)[:, None]
    limit = metrics.thresholds_for(np.ones((100, 1), dtype=np.int8), rising, "sensitivity", 0.07)
    assert (rising >= limit).sum() == 7
    with pytest.raises(InputError, match=r"\(0, 1\]"):
        metrics.thresholds_for(labels, probs, "sensitivity", 0.0)


def test_per_class_rows() -> None:
    labels = np.array([[1, 0, -1], [0, 0, -1], [1, 0, -1], [-1, 0, -1]], dtype=np.int8)
    probs = np.array([[0.9, 0.1, 0.5], [0.2, 0.7, 0.5], [0.6, 0.1, 0.5], [0.5, 0.1, 0.5]])
    first, second, third = metrics.per_class(labels, probs, np.array([0.5, 0.5, 0.5]), ["A", "B", "C"])
    expected = {"class": "A", "auc": 1.0, "ap": 1.0, "f1": 1.0, "ppv": 1.0, "npv": 1.0, "threshold": 0.5}
    expected |= {"positives": 2, "negatives": 1, "unknown": 1, "tier": "excellent", "ap_lift": 1.5}
    assert expected.items() <= first.items()
    assert first["brier"] == pytest.approx((0.01 + 0.04 + 0.16) / 3)
    assert first["prevalence"] == pytest.approx(2 / 3)
    assert (second["specificity"], second["tier"], second["prevalence"]) == (0.75, "insufficient data", 0.0)
    assert all(math.isnan(second[key]) for key in ("auc", "ap", "f1", "jaccard", "sensitivity"))
    assert all(math.isnan(third[key]) for key in ("auc", "brier", "ece", "prevalence", "accuracy", "npv"))
    assert {type(first[key]) for key in ("auc", "threshold", "ece")} == {float}
    assert {type(first[key]) for key in ("positives", "negatives", "unknown")} == {int}
    with pytest.raises(InputError, match="2 class names for 3 columns"):
        metrics.per_class(labels, probs, 0.5, ["A", "B"])


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (0.85, "excellent"),
        (0.8499, "good"),
        (0.70, "good"),
        (0.6999, "fair"),
        (0.60, "fair"),
        (0.5999, "poor"),
        (0.0, "poor"),
        (math.nan, "insufficient data"),
    ],
)
def test_tiers(value: float, name: str) -> None:
    assert metrics.tier(value) == name


def groups_of(n: int, seed: int) -> list[str]:
    return [f"p{g}" for g in np.random.default_rng(seed).integers(0, max(2, n // 2), n)]


def plain(labels: np.ndarray, probs: np.ndarray, thresholds: np.ndarray | float) -> dict[str, Any]:
    """Every bootstrapped figure by the functions that know no weights."""
    head = metrics.headline(labels, probs, thresholds)
    rows = metrics.per_class(labels, probs, thresholds, [""] * labels.shape[1])
    keys = (*metrics.OF_CLASSES, "accuracy")
    return {POOLED.get(key, key): head[key] for key in metrics.HEADLINE} | {
        key: [row[key] for row in rows] for key in keys
    }


@settings(deadline=None, max_examples=40)
@given(pairs(30), st.integers(0, 100))
def test_a_weighted_resample_is_the_resampled_rows(pair: Pair, seed: int) -> None:
    labels, probs = pair
    thresholds = np.random.default_rng(seed).random(labels.shape[1])
    figures = metrics._figures(labels, probs, thresholds)
    ids = metrics._group_ids(groups_of(len(labels), seed), len(labels))
    weights = next(metrics.group_weights(ids, 3, seed))
    got = figures(weights)
    for k in range(3):
        rows = np.repeat(np.arange(len(labels)), weights[:, k])
        expected = plain(labels[rows], probs[rows], thresholds)
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(got[key][..., k], value, rtol=0, atol=1e-9, err_msg=key)
        np.testing.assert_allclose(got["auc"][:, k], expected["auc"], rtol=0, atol=1e-12)


def test_groups_are_drawn_whole_and_with_replacement() -> None:
    ids = np.array([0, 1, 1, 2, 2, 2])
    blocks = list(metrics.group_weights(ids, 150, 0))
    weights = np.concatenate(blocks, axis=1)
    assert weights.shape == (6, 150)
    assert [block.shape[1] for block in blocks] == [64, 64, 22]
    assert (weights[1] == weights[2]).all()
    assert (weights[3] == weights[5]).all()
    assert (weights[[0, 1, 3]].sum(axis=0) == 3).all()
    assert weights[0].mean() == pytest.approx(1, abs=0.2)
    assert not (weights == np.concatenate(list(metrics.group_weights(ids, 150, 1)), axis=1)).all()


def model(n: int, classes: int, seed: int, skill: float = 1.2) -> Pair:
    random = np.random.default_rng(seed)
    labels = (random.random((n, classes)) < random.uniform(0.02, 0.4, classes)).astype(np.int8)
    return labels, 1 / (1 + np.exp(2 - random.normal(size=(n, classes)) - skill * labels))


def test_bootstrap_holds_the_value_and_repeats() -> None:
    labels, probs = model(300, 6, 0)
    groups = groups_of(300, 0)
    first = metrics.bootstrap(labels, probs, groups, 0.3, resamples=200, seed=4)
    for key, value in plain(labels, probs, np.full(6, 0.3)).items():
        np.testing.assert_allclose(first[key].value, value, atol=1e-12)
        assert first[key].low.shape == first[key].value.shape == ((6,) if key not in SCALARS else ())
        assert (first[key].defined == 200).all()
        assert (first[key].low <= first[key].high).all()
    assert first["macro_auc"].low < first["macro_auc"].value < first["macro_auc"].high
    again = metrics.bootstrap(labels, probs, groups, 0.3, resamples=200, seed=4)
    other = metrics.bootstrap(labels, probs, groups, 0.3, resamples=200, seed=5)
    assert again["macro_auc"].low == first["macro_auc"].low != other["macro_auc"].low
    ids = metrics._group_ids(groups, 300)
    weights = np.concatenate(list(metrics.group_weights(ids, 200, 4)), axis=1)
    right = (labels == (probs >= 0.3)).mean(axis=1) @ weights / weights.sum(axis=0)
    tail = float(metrics._tails(labels, ids, 0.95)["overall"])
    assert 0.023 < tail < 0.025, "widened a little for some 130 groups"
    ends = [first["label_accuracy"].low, first["label_accuracy"].high]
    np.testing.assert_allclose(ends, np.quantile(right, [tail, 1 - tail]), atol=1e-12)
    narrow = metrics.bootstrap(labels, probs, groups, 0.3, resamples=200, seed=4, level=0.5)["macro_auc"]
    assert first["macro_auc"].low < narrow.low < narrow.high < first["macro_auc"].high


def test_bootstrap_interval_is_as_wide_as_theory_says_and_wider_for_groups() -> None:
    labels, probs = model(2000, 1, 1)
    alone = metrics.bootstrap(labels, probs, [str(i) for i in range(2000)], 0.5, resamples=600)
    share = alone["accuracy"].value[0]
    width = 2 * 1.96 * math.sqrt(share * (1 - share) / 2000)
    assert (alone["accuracy"].high - alone["accuracy"].low)[0] == pytest.approx(width, rel=0.15)
    four = np.repeat(np.arange(500), 4)
    labels, probs = labels[:500][four], probs[:500][four]
    together = metrics.bootstrap(labels, probs, four.astype(str).tolist(), 0.5, resamples=600)
    assert (together["accuracy"].high - together["accuracy"].low)[0] == pytest.approx(2 * width, rel=0.2)


def test_bootstrap_counts_resamples_without_a_positive() -> None:
    labels = np.zeros((40, 2), dtype=np.int8)
    labels[0, 0] = 1
    probs = np.random.default_rng(0).random((40, 2))
    got = metrics.bootstrap(labels, probs, [str(i) for i in range(40)], 0.5, resamples=500)["auc"]
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
    np.testing.assert_array_equal(metrics.support(labels, groups), expected)


def test_few_groups_widen_the_interval_as_students_t_does() -> None:
    from scipy import stats

    ids = np.arange(12)
    labels = np.zeros((12, 4), dtype=np.int8)
    for c, positives in enumerate((1, 2, 5, 6)):
        labels[:positives, c] = 1
    tails = metrics._tails(labels, ids, 0.9)
    for got, n in zip([*tails["of_class"][1:], tails["overall"]], (2, 5, 6, 12), strict=True):
        assert got == pytest.approx(stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf(0.05, n - 1)), rel=1e-9)
    assert math.isnan(tails["of_class"][0]), "one group knows nothing of the others"


def test_the_interval_of_map_is_not_shifted_by_rare_classes() -> None:
    """Every resample repeats positives, so its mAP lies above: the plain percentile interval holds the truth a quarter
    of the time (benchmarks/LOG.md), the reverse one about as often as it says."""
    random, shares = np.random.default_rng(0), np.geomspace(0.02, 0.4, 8)

    def draw(n: int) -> Pair:
        labels = (random.random((n, 8)) < shares).astype(np.int8)
        return labels, 1 / (1 + np.exp(-1.2 * labels - random.normal(size=labels.shape)))

    truth, hit, plain_hit = metrics.headline(*draw(200_000), 0.5)["map"], 0, 0
    for k in range(100):
        labels, probs = draw(200)
        found = metrics.bootstrap(labels, probs, [str(i) for i in range(200)], 0.5, resamples=150, seed=k)["map"]
        hit += bool(found.low <= truth <= found.high)
        plain_hit += bool(2 * found.value - found.high <= truth <= 2 * found.value - found.low)
    assert hit >= 88
    assert plain_hit <= 75


def test_paired_bootstrap_sees_a_difference_and_none() -> None:
    labels, probs = model(400, 4, 2)
    groups = groups_of(400, 2)
    worse = 0.5 * probs + 0.5 * np.random.default_rng(9).random(probs.shape)
    same = metrics.paired_bootstrap(labels, probs, probs, groups, 0.5, 0.5, resamples=100)
    assert all((x.low == 0).all() and (x.high == 0).all() for x in same.values())
    drop = metrics.paired_bootstrap(labels, probs, worse, groups, 0.3, 0.5, resamples=200)
    assert drop["macro_auc"].high < 0
    a, b = metrics.headline(labels, probs, 0.3), metrics.headline(labels, worse, 0.5)
    assert drop["macro_f1"].value == pytest.approx(b["macro_f1"] - a["macro_f1"], abs=1e-12)
    # Paired: the shared images cancel, so the interval is narrower than two separate ones would make it.
    alone = metrics.bootstrap(labels, probs, groups, 0.3, resamples=200)["brier"]
    nearly = metrics.paired_bootstrap(labels, probs, probs * 0.99, groups, 0.3, 0.3, resamples=200)["brier"]
    assert ((nearly.high - nearly.low) < 0.5 * (alone.high - alone.low)).all()


ZEROS = np.zeros((2, 2), dtype=np.int8)


@pytest.mark.parametrize(
    ("labels", "probs", "said"),
    [
        (ZEROS, np.zeros((2, 3)), r"labels \(2, 2\) and scores \(2, 3\)"),
        (np.zeros(2), np.zeros(2), r"share one \(images, classes\) shape"),
        (np.zeros((0, 2)), np.zeros((0, 2)), r"labels \(0, 2\)"),
        (ZEROS, np.array([[0.0, np.nan], [np.nan, 1.0]]), "2 of 4 scores are NaN"),
        (ZEROS + 2, np.zeros((2, 2)), "4 of 4 labels are not 1, 0 or -1"),
        (np.array([[0.5, 0], [257, -1]]), np.zeros((2, 2)), "2 of 4 labels are not"),
        (ZEROS, np.array([[0.0, 1.5], [-2.0, 1.0]]), "2 of 4 probabilities are outside 0..1"),
    ],
)
def test_wrong_input_is_one_line(labels: np.ndarray, probs: np.ndarray, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        metrics.headline(labels, probs, 0.5)
    assert "\n" not in str(caught.value)


def test_wrong_thresholds_and_groups_are_one_line() -> None:
    with pytest.raises(InputError, match="1 of 2 thresholds are NaN"):
        metrics.headline(ZEROS, np.zeros((2, 2)), np.array([0.5, np.nan]))
    with pytest.raises(InputError, match=r"thresholds \(3,\) do not fit 2 classes"):
        metrics.headline(ZEROS, np.zeros((2, 2)), np.zeros(3))
    with pytest.raises(InputError, match="3 group names for 2 images"):
        metrics.bootstrap(ZEROS, np.zeros((2, 2)), ["a", "b", "c"], 0.5)


def test_nothing_warns_where_everything_is_undefined() -> None:
    labels = np.full((3, 2), -1, dtype=np.int8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = metrics.headline(labels, np.full((3, 2), 0.5), 0.5)
        metrics.bootstrap(labels, np.full((3, 2), 0.5), ["a", "b", "b"], 0.5, resamples=10)
    assert head["classes_defined"] == 0
    assert all(math.isnan(head[key]) for key in metrics.HEADLINE)
