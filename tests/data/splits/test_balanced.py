"""The fair draw: its costs against plain sums, and how near the shares come on real films."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.data.manifest import read_dataset
from cxr_fast.data.splits import balanced
from cxr_fast.data.splits.assign import SplitSpec, one_sided, split
from cxr_fast.data.splits.given import HOLDOUT


def drawn(seed: int) -> balanced.Draw:
    """A draw in the middle of its work, over three parts, with units that stay."""
    random = np.random.default_rng(seed)
    units, classes = int(random.integers(6, 25)), int(random.integers(1, 6))
    unit = np.sort(np.append(np.arange(units), random.integers(0, units, 30)))
    labels = (random.random((len(unit), classes)) < random.choice([0.05, 0.3], classes)).astype(np.int8)
    fixed = np.where(random.random(units) < 0.2, random.integers(0, 3, units), -1)
    shares = np.array([0.2, 0.3, 0.5])
    draw = balanced.Draw(balanced.count(labels, unit), fixed, shares, np.ones(3, int))
    draw.place_greedily(np.random.RandomState(seed))
    return draw


def plain_cost(draw: balanced.Draw, place: np.ndarray) -> float:
    """The cost class by class and part by part."""
    total, cost = draw.values.sum(axis=0), 0.0
    classes = (len(total) - 2) // 2
    for j, of in enumerate(total):
        weight = balanced.IMAGES if j < classes else balanced.GROUPS if j < 2 * classes else balanced.SIZES * classes
        counts = [draw.values[place == part, j].sum() for part in range(3)]
        for share, count in zip(draw.shares[:, 0], counts, strict=True):
            cost += weight * (count / of - share) ** 2 / share if of else 0.0
        if classes <= j < 2 * classes and of > 1 and sum(count > 0 for count in counts) == 1:
            cost += balanced.ALONE
    return cost


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_change_of_each_move_is_that_of_the_plain_sums(seed: int) -> None:
    draw = drawn(seed)
    before = plain_cost(draw, draw.place)
    assert draw.cost(draw.sums) == pytest.approx(before)
    for (row, part), change in np.ndenumerate(draw.changes()):
        moved = draw.place.copy()
        moved[row] = part
        if np.isfinite(change):
            assert change == pytest.approx(plain_cost(draw, moved) - before, abs=1e-8)
        else:
            only = (draw.place == draw.place[row]).sum() == 1
            assert only or not draw.free[row] or part == draw.place[row]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_descending_never_costs_and_leaves_no_move(seed: int) -> None:
    draw = drawn(seed)
    fixed, before = draw.place.copy(), draw.cost(draw.sums)
    draw.descend()
    assert draw.cost(draw.sums) <= before
    assert draw.cost(draw.sums) == pytest.approx(plain_cost(draw, draw.place))
    assert draw.changes().min() >= -balanced.BETTER
    np.testing.assert_array_equal(draw.place[~draw.free], fixed[~draw.free])


def test_a_class_of_two_groups_lies_on_both_sides() -> None:
    labels = np.zeros((40, 6), dtype=np.int8)
    for c in range(6):
        labels[[2 * c, 2 * c + 1], c] = 1
    for seed in range(10):
        found = split(labels, [f"g{i:02d}" for i in range(40)], SplitSpec(folds=3, holdout=0.2, seed=seed))
        assert one_sided(labels, [f"g{i:02d}" for i in range(40)], found) == {}
        assert 8 <= (found == HOLDOUT).sum() <= 10


def test_30_000_groups_come_within_a_hundredth() -> None:
    random = np.random.default_rng(0)
    shares = np.geomspace(0.002, 0.18, 14)
    group = np.repeat(np.arange(30_000), np.minimum(random.geometric(0.27, 30_000), 100))
    frail = random.gamma(0.3, 1 / 0.3, (30_000, 14))
    labels = (random.random((len(group), 14)) < shares * frail[group]).astype(np.int8)
    found = split(labels, [f"{i:05d}" for i in group], SplitSpec(folds=5, holdout=0.2))
    for part, share in ((HOLDOUT, 0.2), (0, 0.16), (4, 0.16)):
        of = (labels[found == part] == 1).sum(axis=0) / (labels == 1).sum(axis=0)
        np.testing.assert_allclose(of, share, atol=0.01)


@pytest.mark.skipif("CXR_FAST_REAL_DATA" not in os.environ, reason="CXR_FAST_REAL_DATA names no data folder")
def test_shares_of_real_films_are_near_what_was_asked() -> None:
    """550 films of 129 patients, 20 seeds: films 0.07 at most from their share (0.13 by the former method, 0.06 the
    best of 3,000 random draws), no class of two or more groups on one side."""
    found = read_dataset(Path(os.environ["CXR_FAST_REAL_DATA"]) / "nih")
    positive = found.labels == 1
    deviations = []
    for seed in range(20):
        parts = split(found.labels, found.groups, SplitSpec(folds=1, holdout=0.2, seed=seed))
        share = positive[parts == HOLDOUT].sum(axis=0) / positive.sum(axis=0)
        deviations.append(np.abs(share - 0.2).mean())
        assert one_sided(found.labels, found.groups, parts) == {}
        assert abs((parts == HOLDOUT).mean() - 0.2) < 0.02
    assert np.mean(deviations) <= 0.07
