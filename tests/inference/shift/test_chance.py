"""The tests of daily use against scipy's, and against what chance does to films of few patients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cxr_fast.inference.shift import chance


@given(st.integers(1, 60), st.integers(1, 400), st.data())
def test_fisher_is_that_of_scipy(n: int, m: int, data: st.DataObject) -> None:
    k, j = data.draw(st.integers(0, n)), data.draw(st.integers(0, m))
    wanted = stats.fisher_exact([[k, n - k], [j, m - j]]).pvalue
    assert chance.fisher_exact((k, n), (j, m)) == pytest.approx(wanted, rel=1e-6, abs=1e-12)
    assert chance.fisher_exact((j, m), (k, n)) == pytest.approx(wanted, rel=1e-6, abs=1e-12)


def test_fisher_takes_a_million_films() -> None:
    found = chance.fisher_exact((30, 300), (101_000, 1_000_000))
    assert 0.9 < found <= 1
    assert chance.fisher_exact((90, 300), (101_000, 1_000_000)) < 1e-15


@pytest.mark.parametrize("x", [0.1, 0.21, 0.5, 1.0, 1.36, 2.0, 3.5])
def test_the_tail_of_kolmogorov_is_that_of_scipy(x: float) -> None:
    assert chance.kolmogorov_tail(x) == pytest.approx(stats.kstwobign.sf(x), abs=1e-12)


@given(st.lists(st.floats(1e-9, 1), max_size=12))
def test_holm_is_the_plain_procedure(values: list[float]) -> None:
    """A value is under a level after adjusting just where the step-down procedure at that level rejects it."""
    adjusted = chance.adjust_by_holm(values)
    for level in (0.01, 0.05, 0.5):
        rejected = set()
        for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
            if values[place] * (len(values) - rank) > level:
                break
            rejected.add(place)
        assert {place for place, p in enumerate(adjusted) if p <= level} == rejected


def test_films_of_one_patient_are_worth_one() -> None:
    assert chance.effective_number([1] * 50) == 50
    assert chance.effective_number([5] * 10) == 10
    assert chance.effective_number([96, 1, 1]) < 2
    assert chance.effective_number([]) == 0


@given(st.integers(1, 200), st.integers(1, 200), st.floats(0.05, 1), st.floats(0.05, 1), st.data())
def test_rounding_of_dependent_films_brings_proportions_nearer(
    n: int, m: int, worth: float, other: float, data: st.DataObject
) -> None:
    k, j = data.draw(st.integers(0, n)), data.draw(st.integers(0, m))
    p = chance.compare_proportions((k, j), (n, m), (n * worth, m * other))
    assert 0 <= p <= 1
    assert p == pytest.approx(chance.compare_proportions((j, k), (m, n), (m * other, n * worth)))
    if k * m == j * n:
        assert p == 1
    assert chance.compare_proportions((k, j), (n, m), (n, m)) == pytest.approx(
        1.0 if k * m == j * n else chance.fisher_exact((k, n), (j, m))
    )


def test_fractions_of_a_film_are_rounded_towards_the_other_side() -> None:
    found = chance.compare_proportions((10, 70), (20, 80), (13.4, 41.9))  # 6.5 of 13 against 35.875 of 41
    assert found == pytest.approx(stats.fisher_exact([[7, 6], [35, 6]]).pvalue)


def test_distributions_are_compared_at_the_edge_where_they_differ_most() -> None:
    one, other = np.array([10, 10, 10, 70]), np.array([10, 10, 40, 40])
    p, place = chance.compare_distributions(one, other, (100, 100))
    assert place == 3
    assert p == pytest.approx(stats.kstwobign.sf(0.3 * np.sqrt(50)))
    assert chance.compare_distributions(one, one, (100, 100)) == (1.0, 0)
    assert chance.compare_distributions(np.array([5]), np.array([7]), (5, 7)) == (1.0, 0)


def test_bins_can_only_hide_a_difference() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        one, other = draw.beta(1, 4, 80), draw.beta(1, 3, 120)
        edges = np.sort(draw.uniform(0, 1, 6))
        counts = [np.bincount(np.searchsorted(edges, x, side="right"), minlength=7) for x in (one, other)]
        p, _ = chance.compare_distributions(*counts, (80, 120))
        assert p >= stats.kstwobign.sf(stats.ks_2samp(one, other).statistic * np.sqrt(80 * 120 / 200)) - 1e-12
