"""How far two sets of probabilities are apart, against counting by hand and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from cxr_fast.metrics import drift


def sample(seed: int, n: int = 60, classes: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reference and variant (n, C), labels with unknown ones."""
    random = np.random.default_rng(seed)
    reference = random.random((n, classes)).astype(np.float32)
    found = np.clip(reference + random.normal(0, 0.1, reference.shape), 0, 1).astype(np.float32)
    labels = (random.random(reference.shape) < 0.4).astype(np.int8)
    labels[random.random(reference.shape) < 0.1] = -1
    return reference, found, labels


@given(st.integers(0, 200))
def test_every_figure_by_hand(seed: int) -> None:
    reference, found, labels = sample(seed)
    thresholds = [0.2, 0.4, 0.5, 0.9]
    one = drift.measure(reference, found, labels, thresholds)
    apart = sorted(abs(float(a) - float(b)) for a, b in zip(reference.ravel(), found.ravel(), strict=True))
    assert one.largest == pytest.approx(apart[-1])
    assert apart[-4] <= one.p99 <= apart[-1]
    flips = sum(
        (reference[i, c] >= thresholds[c]) != (found[i, c] >= thresholds[c]) for i in range(60) for c in range(4)
    )
    assert (one.flipped, one.flips) == (flips, pytest.approx(1e4 * flips / 240))
    for c in range(4):
        known = labels[:, c] >= 0
        before, after = (roc_auc_score(labels[known, c], p[known, c]) for p in (reference, found))
        assert one.auc_drop[c] == pytest.approx(before - after, abs=1e-12)
    assert one.macro_drop == pytest.approx(np.mean(one.auc_drop))


def test_nothing_moves_where_nothing_differs() -> None:
    reference, _, labels = sample(0)
    one = drift.measure(reference, reference.copy(), labels, [0.5] * 4)
    assert (one.largest, one.flipped, one.macro_drop) == (0, 0, 0)
    assert one.over() == []


def test_a_class_without_both_signs_has_no_auc() -> None:
    reference, found, labels = sample(1)
    labels[:, 2] = 0
    one = drift.measure(reference, found, labels, [0.5] * 4)
    assert one.auc_drop[2] is None
    assert one.classes == 3
    labels[:] = -1
    none = drift.measure(reference, found, labels, [2.0] * 4)
    assert math.isnan(none.macro_auc)
    assert none.classes == 0
    assert none.over() == [], "no AUC to drop, and no decision over a threshold of 2"


def test_limits_are_where_they_are_said_to_be() -> None:
    """20 flips in 10,000 decisions pass, 21 do not."""
    reference = np.full((2500, 4), 0.4, np.float32)
    labels = np.zeros(reference.shape, np.int8)
    labels[::2] = 1
    for count, over in ((20, False), (21, True)):
        found = reference.copy()
        found.reshape(-1)[:count] = 0.6
        one = drift.measure(reference, found, labels, [0.5] * 4)
        assert one.flips == count
        assert bool([text for text in one.over() if "decisions" in text]) == over


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_over_every_limit(bad: float) -> None:
    reference, found, labels = sample(2)
    found[3, 1] = bad
    one = drift.measure(reference, found, labels, [0.5] * 4)
    assert "not all finite" in one.over()[0]
