"""Thresholds against a search over every possible one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.errors import InputError
from cxr_fast.metrics.figures import Counts, decisions
from cxr_fast.metrics.thresholds import best_f1_thresholds, predictive_values, thresholds_for

from .drawn import Pair, known, pairs


def candidates(probs: np.ndarray) -> np.ndarray:
    """A threshold for every way of cutting the scores."""
    return np.append(np.unique(probs.astype(np.float64)), 2.0)


@settings(deadline=None)
@given(pairs())
def test_best_f1_is_the_best_of_all_thresholds(pair: Pair) -> None:
    labels, probs = pair
    found = best_f1_thresholds(labels, probs)
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
    found = thresholds_for(labels, probs, target, value)
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
    assert best_f1_thresholds(labels, probs) == pytest.approx([0.4])
    assert thresholds_for(labels, probs, "sensitivity", 0.5) == pytest.approx([0.7])
    assert thresholds_for(labels, probs, "specificity", 0.5) == pytest.approx([0.15])
    certain = np.ones((4, 1))
    assert thresholds_for(labels, certain, "specificity", 0.5)[0] > 1
    close = np.array([[0.5], [0.5], [np.nextafter(0.5, 1)], [np.nextafter(0.5, 1)]])
    assert decisions(close, best_f1_thresholds(labels, close)).ravel().tolist() == [
        False,
        False,
        True,
        True,
    ]
    # 0.07 * 100 is a bit more than 7 in floating point; seven of a hundred positives are enough.
    rising = np.linspace(0.1, 0.9, 100)[:, None]
    limit = thresholds_for(np.ones((100, 1), dtype=np.int8), rising, "sensitivity", 0.07)
    assert (rising >= limit).sum() == 7
    with pytest.raises(InputError, match=r"\(0, 1\]"):
        thresholds_for(labels, probs, "sensitivity", 0.0)


@given(*[st.integers(0, 40)] * 4)
def test_predictive_values_at_the_prevalence_of_the_images_are_theirs(tp: int, fp: int, fn: int, tn: int) -> None:
    table = Counts(*(np.array([count]) for count in (tp, fp, fn, tn)))
    sensitivity, specificity = float(table.sensitivity()[0]), float(table.specificity()[0])
    share = (tp + fn) / (tp + fp + fn + tn) if tp + fp + fn + tn else math.nan
    found = predictive_values(sensitivity, specificity, share)
    want = [table.ppv()[0], table.npv()[0]] if tp + fn and fp + tn else [math.nan, math.nan]
    np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-12)


def test_predictive_values_of_a_worked_example() -> None:
    """Altman and Bland, BMJ 1994;309:102: liver scans, 231 of 258 abnormal and 54 of 86 normal livers called right; at
    a prevalence of 0.25 the PPV is 0.45 and the NPV 0.95."""
    assert predictive_values(231 / 258, 54 / 86, 0.25) == pytest.approx((0.45, 0.95), abs=0.005)
    assert math.isnan(predictive_values(0.0, 1.0, 0.02)[0])
    assert math.isnan(predictive_values(1.0, 0.0, 0.02)[1])
