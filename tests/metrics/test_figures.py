"""Every figure against scikit-learn or a plain loop."""

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
from cxr_fast.metrics import figures
from cxr_fast.metrics.intervals import Resampling, bootstrap

from .drawn import Pair, known, pairs


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
    np.testing.assert_allclose(figures.auc(*pair), by_class(*pair, sk.roc_auc_score), rtol=0, atol=1e-12)
    expected = by_class(*pair, sk.average_precision_score)
    np.testing.assert_allclose(figures.average_precision(*pair), expected, rtol=0, atol=1e-12)
    flat = by_class(labels.reshape(-1, 1), probs.reshape(-1, 1), sk.roc_auc_score)[0]
    np.testing.assert_allclose(figures.micro_auc(*pair), flat, rtol=0, atol=1e-12)
    mean, defined = figures.macro(figures.auc(*pair))
    assert defined == int((~np.isnan(figures.auc(*pair))).sum())
    assert math.isnan(mean) == (defined == 0)


def test_auc_by_hand() -> None:
    labels = np.array([[0, 1, -1], [0, 1, 0], [1, 1, -1], [1, -1, 1]], dtype=np.int8)
    scores = np.array([[0.1, 0.2, 0.0], [0.4, 0.2, 5.0], [0.4, 0.1, 0.0], [-3.0, 0.3, 5.0]])
    # Class 0: (0.4 beats 0.1, ties 0.4; -3 beats none) = 1.5 of 4. Class 1 has no negative. Class 2 one tie.
    np.testing.assert_array_equal(figures.auc(labels, scores), [0.375, np.nan, 0.5])
    assert figures.macro(figures.auc(labels, scores)) == (0.4375, 2)
    assert figures.macro(np.array([np.nan]))[1] == 0
    np.testing.assert_array_equal(figures.prevalence(labels), [0.5, 1.0, 0.5])
    assert math.isnan(figures.prevalence(np.array([[-1]]))[0])


def test_auc_orders_values_too_close_for_float32_sums_and_infinities() -> None:
    labels = np.array([[0], [1], [0], [1]], dtype=np.int8)
    scores = np.array([[1.0], [np.nextafter(1, 2)], [-np.inf], [np.inf]])
    assert figures.auc(labels, scores)[0] == 1.0


@settings(deadline=None)
@given(pairs(), st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_figures_at_a_threshold_are_scikit_learns(pair: Pair, threshold: float) -> None:
    labels, probs = pair
    called = figures.decisions(probs, threshold)
    np.testing.assert_array_equal(called, probs >= threshold)
    table = figures.counts(labels, called)
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
    called = figures.decisions(probs, 0.5)
    scores = []
    for y, d in zip(labels, called, strict=True):
        true, said = set(np.flatnonzero(y == 1)), set(np.flatnonzero(d & (y >= 0)))
        if (y >= 0).any():
            scores.append(len(true & said) / len(true | said) if true | said else 1.0)
    expected = np.mean(scores) if scores else math.nan
    np.testing.assert_allclose(figures.sample_jaccard(labels, called), expected, atol=1e-12)


@settings(deadline=None)
@given(pairs(), st.sampled_from([0.0, 0.3, 0.5]))
def test_headline_figures_are_scikit_learns_where_labels_are_unknown(pair: Pair, threshold: float) -> None:
    """Means over the classes in which scikit-learn has a figure, and all known entries as one column."""
    labels, probs = pair
    called = figures.decisions(probs, threshold)
    got = figures.headline(labels, probs, threshold)
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
    got = figures.headline(labels, probs, thresholds)
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
        "ece": pytest.approx(figures.ece(labels.reshape(-1, 1), probs.reshape(-1, 1))[0][0], abs=1e-12),
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
    value, table = figures.ece(labels, probs, bins)
    squares = figures.brier(labels, probs)
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
    assert figures.ece(labels, probs)[0][0] < 0.02
    assert figures.ece(labels, (probs > 0.5).astype(float))[0][0] == pytest.approx(0.25, abs=0.02)


def test_per_class_rows() -> None:
    labels = np.array([[1, 0, -1], [0, 0, -1], [1, 0, -1], [-1, 0, -1]], dtype=np.int8)
    probs = np.array([[0.9, 0.1, 0.5], [0.2, 0.7, 0.5], [0.6, 0.1, 0.5], [0.5, 0.1, 0.5]])
    first, second, third = figures.per_class(labels, probs, np.array([0.5, 0.5, 0.5]), ["A", "B", "C"])
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
        figures.per_class(labels, probs, 0.5, ["A", "B"])


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
    assert figures.tier(value) == name


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
        figures.headline(labels, probs, 0.5)
    assert "\n" not in str(caught.value)


def test_wrong_thresholds_and_groups_are_one_line() -> None:
    with pytest.raises(InputError, match="1 of 2 thresholds are NaN"):
        figures.headline(ZEROS, np.zeros((2, 2)), np.array([0.5, np.nan]))
    with pytest.raises(InputError, match=r"thresholds \(3,\) do not fit 2 classes"):
        figures.headline(ZEROS, np.zeros((2, 2)), np.zeros(3))
    with pytest.raises(InputError, match="3 group names for 2 images"):
        bootstrap(ZEROS, np.zeros((2, 2)), ["a", "b", "c"], 0.5)


def test_nothing_warns_where_everything_is_undefined() -> None:
    labels = np.full((3, 2), -1, dtype=np.int8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = figures.headline(labels, np.full((3, 2), 0.5), 0.5)
        bootstrap(labels, np.full((3, 2), 0.5), ["a", "b", "b"], 0.5, Resampling(resamples=10))
    assert head["classes_defined"] == 0
    assert all(math.isnan(head[key]) for key in figures.HEADLINE)
