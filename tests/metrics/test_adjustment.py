"""Logits adjusted after training: who is ahead of whom and every decision stay; the probabilities move."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cxr_fast.metrics import calibration, figures
from cxr_fast.metrics.thresholds import best_f1_thresholds


def plain_log_odds(labels: np.ndarray) -> list[float]:
    out = []
    for column in labels.T:
        positives, negatives = int((column == 1).sum()), int((column == 0).sum())
        if not positives:
            positives, negatives = 1, max(negatives - 1, 1)
        elif not negatives:
            positives, negatives = max(positives - 1, 1), 1
        out.append(math.log(positives / negatives))
    return out


def drawn(images: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = (random.random((images, classes)) < random.choice([0, 0.05, 0.5, 1], classes)).astype(np.int8)
    labels[random.random(labels.shape) < 0.2] = -1
    probs = np.round(random.random(labels.shape), 2).clip(0.005, 0.995).astype(np.float32)  # with ties
    return labels, probs


@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 2**16))
@settings(max_examples=50, deadline=None)
def test_log_odds_are_those_of_counts(images: int, classes: int, seed: int) -> None:
    labels, _ = drawn(images, classes, seed)
    found = calibration.prior_log_odds(labels)
    np.testing.assert_allclose(found, plain_log_odds(labels))
    assert np.isfinite(found).all()


@given(st.integers(2, 60), st.integers(1, 6), st.integers(0, 2**16), st.sampled_from([0.5, 1.0, 2.0]))
@example(29, 4, 9848, 0.5)  # an unlabelled score within 3e-8 of a threshold, where the map is flat
@settings(max_examples=50, deadline=None)
def test_ranking_and_decisions_stay(images: int, classes: int, seed: int, strength: float) -> None:
    labels, probs = drawn(images, classes, seed)
    fitted = calibration.adjust(labels, strength)
    moved = calibration.apply(fitted, probs)
    for key in (figures.auc, figures.average_precision):
        np.testing.assert_allclose(key(labels, moved), key(labels, probs), atol=1e-12)
    # Thresholds as a run finds them, midway between two scores; a score itself, which is a yes; all, and none.
    found = np.nan_to_num(best_f1_thresholds(labels, probs), nan=0.5)
    for limits in (found, probs[0].astype(np.float64), np.zeros(classes), np.full(classes, np.nextafter(1, 2))):
        after = calibration.move_thresholds(fitted, limits)
        # As move_thresholds says: nothing can tell the two float32 beside a limit apart where the map makes them equal.
        above = np.where(limits > limits.astype(np.float32), np.nextafter(limits, 2, dtype=np.float32), limits)
        above = above.astype(np.float32)
        beside = np.stack([np.nextafter(above, np.float32(-1)), above])
        flat = np.equal(*calibration.apply(fitted, beside.clip(0, 1)))
        judged = ~(flat & ((probs == beside[0]) | (probs == beside[1])))
        assert judged.mean() > 0.9 or len(probs) < 20
        np.testing.assert_array_equal((moved >= after)[judged], (probs >= limits)[judged])


@pytest.mark.parametrize("kind", ["platt", "isotonic"])
def test_thresholds_move_with_any_calibration(kind: str) -> None:
    labels, probs = drawn(60, 4, 3)
    fitted = calibration.fit(labels, probs, kind)
    assert fitted is not None
    limits = np.array([0.2, 0.5, 0.7, 1.1])
    found = calibration.apply(fitted, probs) >= calibration.move_thresholds(fitted, limits)
    assert found[probs >= limits].all(), "a flat part of the map makes more positive, never fewer"


def test_a_rare_class_rises_and_a_frequent_one_falls() -> None:
    labels = np.zeros((100, 3), np.int8)
    labels[:1, 0], labels[:50, 1], labels[:90, 2] = 1, 1, 1
    fitted = calibration.adjust(labels, 1.0)
    rare, even, frequent = calibration.apply(fitted, np.full((1, 3), 0.5, np.float32))[0]
    assert rare == pytest.approx(0.99)  # what 0.5 is worth where one in a hundred has it
    assert even == pytest.approx(0.5)
    assert frequent == pytest.approx(0.1)
    assert "log odds" in calibration.describe(fitted, 3)
    twice = calibration.apply(calibration.adjust(labels, 2.0), np.full((1, 3), 0.5, np.float32))
    again = calibration.apply(fitted, calibration.apply(fitted, np.full((1, 3), 0.5, np.float32)))
    np.testing.assert_allclose(twice, again, atol=1e-6)
