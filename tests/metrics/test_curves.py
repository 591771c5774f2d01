"""Curves have scikit-learn's area and points, and few enough of them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.metrics import curves

Pair = tuple[np.ndarray, np.ndarray]


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    """Labels and scores of one class, with ties and unknowns, with or without positives and negatives."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(1, 60))
    labels = (random.random(n) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))).astype(np.int8)
    labels[random.random(n) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -1
    scores = random.random(n).astype(np.float32)
    if levels := draw(st.sampled_from([0, 1, 4])):
        scores = np.round(scores * levels) / levels
    return labels, scores


def area_of_steps(points: curves.Points) -> float:
    """The area below steps that are, up to each recall, as high as its precision."""
    return sum((b - a) * height for (a, _), (b, height) in pairwise([[0, 0], *points]))


def area_of_lines(points: curves.Points) -> float:
    """The area below straight lines."""
    return float(np.trapezoid([y for _, y in points], [x for x, _ in points]))


def both(labels: np.ndarray) -> bool:
    return bool((labels == 1).any() and (labels == 0).any())


@settings(deadline=None)
@given(pairs())
def test_roc_is_scikit_learns(pair: Pair) -> None:
    labels, scores = pair
    points = curves.roc(labels, scores)
    if not both(labels):
        assert points == []
        return
    known = labels >= 0
    fpr, tpr, _ = sk.roc_curve(labels[known], scores[known], drop_intermediate=False)
    assert {tuple(p) for p in points} <= set(zip(fpr.tolist(), tpr.tolist(), strict=True))
    area = np.trapezoid([y for _, y in points], [x for x, _ in points])
    assert area == pytest.approx(sk.roc_auc_score(labels[known], scores[known]), abs=1e-12)
    assert (points[0], points[-1]) == ([0, 0], [1, 1])
    assert points == sorted(points)


@settings(deadline=None)
@given(pairs())
def test_precision_recall_is_scikit_learns(pair: Pair) -> None:
    labels, scores = pair
    points = curves.precision_recall(labels, scores)
    if not both(labels):
        assert points == []
        return
    known = labels >= 0
    precision, recall, _ = sk.precision_recall_curve(labels[known], scores[known])
    assert {tuple(p) for p in points} <= set(zip(recall.tolist(), precision.tolist(), strict=True))
    assert area_of_steps(points) == pytest.approx(sk.average_precision_score(labels[known], scores[known]), abs=1e-12)
    assert points[0][0] > 0, "at recall 0 nothing is called, and precision does not exist"
    assert points[-1][0] == 1
    recalls = [x for x, _ in points]
    assert recalls == sorted(set(recalls))


def test_a_long_curve_is_thinned_and_keeps_its_area() -> None:
    random = np.random.default_rng(0)
    labels = (random.random(20000) < 0.3).astype(np.int8)
    scores = random.normal(labels, 1)
    for make, area in ((curves.roc, area_of_lines), (curves.precision_recall, area_of_steps)):
        whole, few = make(labels, scores, 10**6), make(labels, scores)
        assert len(whole) > 5000
        assert 100 < len(few) <= curves.MOST
        assert few[0] == whole[0]
        assert few[-1] == whole[-1]
        assert {tuple(p) for p in few} <= {tuple(p) for p in whole}
        areas = [area(points) for points in (whole, few)]
        assert areas[1] == pytest.approx(areas[0], abs=5e-3)


def test_by_hand() -> None:
    labels = np.array([1, 0, -1, 1, 0], np.int8)
    scores = np.array([0.9, 0.8, 0.85, 0.3, 0.3])
    assert curves.roc(labels, scores) == [[0, 0], [0, 0.5], [0.5, 0.5], [1, 1]]
    assert curves.precision_recall(labels, scores) == [[0.5, 1], [1, 0.5]]
    assert curves.precision_recall(labels, -scores) == [[1, 0.5]], "two steps of one height are one"
