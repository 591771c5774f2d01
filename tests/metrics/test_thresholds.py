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
from cxr_fast.metrics.figures import decisions
from cxr_fast.metrics.thresholds import best_f1_thresholds, thresholds_for

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
