"""Calibration recovers what was done to the probabilities, keeps their order and their range, and survives JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from cxr_fast.metrics import calibration
from cxr_fast.metrics.calibration import EDGE, apply, describe, fit, logit
from cxr_fast.metrics.figures import auc

KINDS = ("platt", "isotonic")
GRID = np.concatenate([[0.0, 1e-9, EDGE], np.linspace(0.001, 0.999, 400), [1 - 1e-6, 1.0]])


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x)))


def drawn(n: int, a: float, b: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities (n,) where sigmoid(a logit(p) + b) is the truth."""
    random = np.random.default_rng(seed)
    x = random.normal(0, 1.5, n)
    return (random.random(n) < sigmoid(a * x + b)).astype(np.int8), sigmoid(x)


@st.composite
def answers(draw: Any) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N, C) with unknown ones, and float32 probabilities, 0 and 1 exactly and repeats among them."""
    n, c = draw(st.integers(1, 40)), draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = random.choice([-1, 0, 1], size=(n, c), p=draw(st.sampled_from([(0.2, 0.4, 0.4), (0.1, 0.85, 0.05)])))
    few = draw(st.lists(st.floats(0, 1, width=32) | st.sampled_from([0.0, 1.0, 0.5]), min_size=1, max_size=6))
    probs = np.where(random.random((n, c)) < draw(st.floats(0, 1)), random.choice(few, (n, c)), random.random((n, c)))
    return labels.astype(np.int8), probs.astype(np.float32)


# Platt.


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (2.5, -1.0), (0.4, 0.8)])
def test_platt_recovers_an_affine_map_of_the_logits(a: float, b: float) -> None:
    columns = [drawn(40_000, a, b, seed) for seed in (0, 1)]
    labels, probs = (np.stack(part, axis=1) for part in zip(*columns, strict=True))
    found = fit(labels, probs, "platt")
    assert found is not None
    assert found["fitted"] == 2
    # The standard error of the slope at 40,000 samples is below 0.03, that of the intercept below 0.02.
    np.testing.assert_allclose(found["a"], a, atol=0.1)
    np.testing.assert_allclose(found["b"], b, atol=0.07)
    np.testing.assert_allclose(apply(found, probs), sigmoid(a * logit(probs) + b), atol=0.02)


def test_platt_minimises_the_cross_entropy_with_his_targets() -> None:
    labels, probs = drawn(60, 1.5, -0.5)
    found = fit(labels[:, None], probs[:, None], "platt")
    assert found is not None
    positives = int(labels.sum())
    target = np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (len(labels) - positives + 2))
    error = sigmoid(found["a"][0] * logit(probs) + found["b"][0]) - target
    # Both derivatives of the cross entropy vanish there.
    assert abs(error.mean()) < 1e-4
    assert abs((error * logit(probs)).mean()) < 1e-4


def test_a_separable_class_stays_finite() -> None:
    found = fit(np.array([[0], [0], [1], [1]], np.int8), np.array([[0.1], [0.2], [0.8], [0.9]]), "platt")
    assert found is not None
    assert found["fitted"] == 1
    got = apply(found, np.array([[0.1], [0.2], [0.8], [0.9]]))
    # His targets for two of each are 1/4 and 3/4, and the fit goes between them.
    np.testing.assert_allclose(got[:, 0], [0.25, 0.25, 0.75, 0.75], atol=0.07)


@settings(max_examples=60, deadline=None)
@example(seed=162, a=0.5, b=0.5)
@given(seed=st.integers(0, 10_000), a=st.floats(0.3, 4), b=st.floats(-2, 2))
def test_platt_keeps_every_order_and_so_every_auc(seed: int, a: float, b: float) -> None:
    labels, probs = (part[:, None] for part in drawn(80, a, b, seed))
    found = fit(labels, probs, "platt")
    assert found is not None
    if found["fitted"]:
        ordered = apply(found, np.sort(probs, axis=0))[:, 0]
        assert (np.diff(ordered) >= 0).all()
    # A flat slope makes one float32 of two neighbours, and a pair that was in order counts half.
    got, before = apply(found, probs)[:, 0], probs.astype(np.float32)[:, 0]
    positive, negative = labels[:, 0] == 1, labels[:, 0] == 0
    now_equal = got[positive][:, None] == got[negative]
    merged = now_equal & (before[positive][:, None] != before[negative])
    (after,), (was,) = auc(labels, got[:, None]), auc(labels, before[:, None])
    assert abs(after - was) <= merged.mean() / 2 + 1e-12


@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-5])
def test_a_class_whose_probabilities_hardly_differ_gives_no_overflow_elsewhere(gap: float) -> None:
    labels = np.array([[0], [0], [1], [1]] * 10, np.int8)
    probs = np.where(labels == 1, 0.5 + gap, 0.5)
    got = apply(fit(labels, probs, "platt"), GRID[:, None])
    assert np.isfinite(got).all()
    steep = {"kind": "platt", "fitted": 1, "a": [1e4], "b": [0.0]}
    assert apply(steep, np.array([[0.0], [0.5], [1.0]])).ravel().tolist() == [0.0, 0.5, 1.0]


# Isotonic.


@settings(max_examples=80, deadline=None)
@given(answers())
def test_isotonic_gives_scikit_learns_blocks_at_their_centres(data: tuple[np.ndarray, np.ndarray]) -> None:
    labels, probs = data
    found = fit(labels, probs, "isotonic")
    for c in range(labels.shape[1]):
        known = labels[:, c] >= 0
        y, p = labels[known, c], probs[known, c].astype(np.float64)
        x, values = (np.array(found[k][c]) for k in "xy")
        if len(set(y.tolist())) < 2:
            assert (x.tolist(), values.tolist()) == ([0, 1], [0, 1])
            continue
        blocks = IsotonicRegression(y_min=0, y_max=1).fit_transform(p, y)
        centres = {value: p[blocks == value].mean() for value in np.unique(blocks)}
        assert set(values.tolist()) <= set(centres)
        np.testing.assert_allclose(x, [centres[value] for value in values], atol=1e-7)
        assert (np.diff(x) > 0).all()
        assert (np.diff(values) > 0).all()
        # Centres that float32 cannot tell apart are one knot.
        assert len(x) == len(np.unique(np.array(list(centres.values()), np.float32)))


def test_isotonic_pools_what_is_out_of_order_and_joins_the_centres() -> None:
    labels = np.array([[0], [1], [0], [1]], np.int8)
    probs = np.array([[0.1], [0.2], [0.3], [0.4]])
    found = fit(labels, probs, "isotonic")
    np.testing.assert_allclose(found["x"][0], [0.1, 0.25, 0.4], atol=1e-7)
    assert found["y"][0] == [0, 0.5, 1]
    got = apply(found, np.array([[0.0], [0.1], [0.2], [0.25], [0.3], [0.4], [1.0]]))
    np.testing.assert_allclose(got[:, 0], [0, 0, 1 / 3, 0.5, 2 / 3, 1, 1], atol=1e-6)


# Both.


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(data=answers())
def test_values_stay_numbers_between_0_and_1_and_in_order(kind: str, data: tuple[np.ndarray, np.ndarray]) -> None:
    labels, probs = data
    found = fit(labels, probs, kind)
    for given_probs in (probs, np.repeat(GRID[:, None], labels.shape[1], axis=1)):
        got = apply(found, given_probs)
        assert got.dtype == np.float32
        assert got.shape == given_probs.shape
        assert ((got >= 0) & (got <= 1)).all()
    assert (np.diff(got, axis=0) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=answers())
def test_a_calibration_from_json_gives_the_same_numbers(kind: str, data: tuple[np.ndarray, np.ndarray]) -> None:
    labels, probs = data
    found = fit(labels, probs, kind)
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again == found
    assert apply(again, probs).tobytes() == apply(found, probs).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_classes_that_cannot_be_fitted_stay_as_they_are_and_are_not_counted(kind: str) -> None:
    labels, probs = drawn(50, 1.0, 0.0)
    same = np.stack([labels, np.zeros_like(labels), np.ones_like(labels), np.full_like(labels, -1), labels], axis=1)
    same[labels == 0, 4] = -1
    found = fit(same, np.repeat(probs[:, None], 5, axis=1), kind)
    assert found is not None
    assert found["fitted"] == 1
    got = apply(found, np.repeat(GRID[:, None], 5, axis=1))
    assert not np.allclose(got[:, 0], GRID, atol=1e-3)
    for c in range(1, 5):
        np.testing.assert_allclose(got[:, c], GRID, atol=2e-7)


def test_an_inverted_class_is_left_alone_by_platt() -> None:
    labels, probs = drawn(200, 2.0, 0.0)
    found = fit(np.stack([labels, 1 - labels], axis=1), np.stack([probs, probs], axis=1), "platt")
    assert found is not None
    assert found["fitted"] == 1
    assert (found["a"][1], found["b"][1]) == (1.0, 0.0)
    np.testing.assert_allclose(apply(found, np.stack([GRID, GRID], axis=1))[:, 1], GRID, atol=2e-7)


def test_classes_left_as_they_are_are_told() -> None:
    found = {"kind": "platt", "fitted": 6, "a": [1.0] * 14, "b": [0.0] * 14}
    said = "platt per class, fitted out of fold; 8 of 14 classes could not be fitted and are not calibrated"
    assert describe(found, 14) == said
    assert describe(found | {"fitted": 14}, 14) == "platt per class, fitted out of fold"


def test_unknown_labels_do_not_count() -> None:
    labels, probs = drawn(100, 1.0, 0.5)
    more = np.concatenate([labels, np.full(30, -1, np.int8)])[:, None]
    wild = np.concatenate([probs, np.full(30, 0.999)])[:, None]
    for kind in KINDS:
        assert fit(more, wild, kind) == fit(labels[:, None], probs[:, None], kind)


def test_nothing_asked_is_nothing_done() -> None:
    labels, probs = (part[:, None] for part in drawn(10, 1.0, 0.0))
    assert fit(labels, probs, "none") is None
    assert apply(None, probs) is probs


def test_no_rows_are_no_rows() -> None:
    labels, probs = (part[:, None] for part in drawn(30, 1.0, 0.0))
    for kind in KINDS:
        assert apply(fit(labels, probs, kind), probs[:0]).shape == (0, 1)


def test_the_logit_of_0_and_1_is_that_of_the_edge() -> None:
    np.testing.assert_allclose(logit(np.array([0.0, 0.5, 1.0])), [np.log(EDGE), 0, -np.log(EDGE)], atol=1e-6)
    assert np.finfo(np.float32).eps > EDGE


# ------------------------------------------------------------------------------------- slope and intercept


def plain_recalibration(
    y: np.ndarray, x: np.ndarray, groups: np.ndarray, *, slope: bool
) -> tuple[list[float], list[float]]:
    """Weights by SciPy's minimiser and errors by sums over groups; slope and intercept, or the intercept alone."""
    from scipy.optimize import minimize

    design = np.stack([x, np.ones(len(x))], axis=1) if slope else np.ones((len(x), 1))
    offset = np.zeros(len(x)) if slope else x

    def loss(weights: np.ndarray) -> float:
        scores = design @ weights + offset
        return float((np.logaddexp(0, scores) - y * scores).sum())

    def pull(weights: np.ndarray) -> np.ndarray:
        return np.asarray(design.T @ (1 / (1 + np.exp(-design @ weights - offset)) - y))

    found = minimize(loss, np.zeros(design.shape[1]), jac=pull, method="BFGS", options={"gtol": 1e-10}).x
    p = 1 / (1 + np.exp(-(design @ found + offset)))
    bread, meat = np.zeros((design.shape[1],) * 2), np.zeros((design.shape[1],) * 2)
    for row, q in zip(design, p, strict=True):
        bread += q * (1 - q) * np.outer(row, row)
    for g in set(groups.tolist()):
        total = sum((y[i] - p[i]) * design[i] for i in np.flatnonzero(groups == g))
        meat += np.outer(total, total)
    count = len(set(groups.tolist()))
    spread = np.linalg.inv(bread) @ meat @ np.linalg.inv(bread) * count / (count - 1)
    return found.tolist(), np.sqrt(np.diag(spread)).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_slope_and_intercept_are_those_of_logistic_regression(seed: int) -> None:
    random = np.random.default_rng(seed)
    groups, logits = np.repeat(np.arange(60), 2), random.normal(-1, 1.5, (120, 2))
    labels = (random.random((120, 2)) < 1 / (1 + np.exp(-(0.6 * logits - 0.4)))).astype(np.int8)
    labels[:10, 0] = -1
    found = calibration.recalibrate(labels, 1 / (1 + np.exp(-logits)), groups)
    for c in range(2):
        known = labels[:, c] >= 0
        args = (labels[known, c].astype(float), logits[known, c], groups[known])
        (slope, intercept), errors = plain_recalibration(*args, slope=True)
        (large,), (error,) = plain_recalibration(*args, slope=False)
        got = [found.slope[c], found.intercept[c], found.in_the_large[c], *found.errors[c]]
        assert got == pytest.approx([slope, intercept, large, *errors, error], rel=1e-5, abs=1e-6)


def test_calibrated_probabilities_have_slope_one_and_others_say_what_is_wrong() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(-1, 1.5, (40_000, 1))
    labels = (random.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.int8)
    groups = np.arange(40_000)

    def fit(scores: np.ndarray) -> calibration.Recalibration:
        return calibration.recalibrate(labels, 1 / (1 + np.exp(-scores)), groups)

    good, extreme, high = fit(logits), fit(2 * logits), fit(logits + 1)
    for value, error in zip((good.slope[0] - 1, good.intercept[0], good.in_the_large[0]), good.errors[0], strict=True):
        assert abs(value) < 4 * error < 0.15
    assert extreme.slope[0] == pytest.approx(good.slope[0] / 2, rel=1e-6)
    assert high.in_the_large[0] == pytest.approx(good.in_the_large[0] - 1, abs=1e-6)


def test_what_cannot_be_recalibrated_is_nan_without_a_word() -> None:
    labels = np.array([[0, 1, 0, 1], [0, 1, 0, 1], [0, 0, 1, -1], [0, 0, 1, -1]], dtype=np.int8)
    probs = np.array([[0.1, 0.8, 0.4, 0.2]] * 2 + [[0.3, 0.2, 0.4, 0.1]] * 2)
    with np.errstate(all="raise"):
        found = calibration.recalibrate(labels, probs, np.arange(4))
    assert np.isnan(found.slope).tolist() == [True, True, True, True], "one sign, apart, all alike, one sign"
    assert np.isnan(found.in_the_large).tolist() == [True, False, False, True]
