"""How far two sets of probabilities are apart, against counting by hand and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from cxr_fast.metrics import drift
from cxr_fast.metrics.intervals import FEW


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
    precise = [
        [average_precision_score(labels[labels[:, c] >= 0, c], p[labels[:, c] >= 0, c]) for c in range(4)]
        for p in (reference, found)
    ]
    assert one.macro_ap == pytest.approx(np.mean(precise[0]))
    assert one.map_drop == pytest.approx(np.mean(precise[0]) - np.mean(precise[1]), abs=1e-9)
    assert one.margin is None


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
    assert math.isnan(none.map_drop)
    assert none.classes == 0
    assert none.over() == [], "no AUC and no mAP to drop, and no decision over a threshold of 2"


# --------------------------------------------------------------------------- the rule: no more than JPEG 95 changes


def with_flips(count: int, n: int = 250, classes: int = 4, step: int = 1) -> np.ndarray:
    """Probabilities (n, C) of 0.4 of which `count` are 0.6, one in each of so many films, `step` films apart."""
    found = np.full((n, classes), 0.4, np.float32)
    found[np.arange(count) * step, np.arange(count) % classes] = 0.6
    return found


def beside(jpeg: int, variant: np.ndarray, labels: np.ndarray | None = None, per_group: int = 1) -> drift.Drift:
    """A variant's drift where JPEG changes the decisions of the last `jpeg` films."""
    reference = with_flips(0, len(variant))
    labels = np.full(reference.shape, -1, np.int8) if labels is None else labels
    groups = [str(i // per_group) for i in range(len(variant))]
    one_pixel = with_flips(min(40, len(variant)), len(variant))
    changed = {"jpeg_95": with_flips(jpeg, len(variant))[::-1], "one_pixel": one_pixel}
    yardstick = drift.measure_changes(reference, changed, labels, [0.5] * 4, groups)
    assert yardstick.describe() == f"JPEG 95 {10.0 * jpeg:.1f}, one pixel 400.0" or len(variant) != 250
    return drift.measure(reference, variant, labels, [0.5] * 4, yardstick)


@pytest.mark.parametrize(("count", "over"), [(19, False), (20, False), (21, True)])
def test_a_variant_may_change_as_many_decisions_as_jpeg(count: int, over: bool) -> None:
    one = beside(20, with_flips(count))
    assert one.flips == 10 * count
    assert one.margin is not None
    assert (one.margin.jpeg, one.margin.more) == (200, pytest.approx(10 * (count - 20)))
    assert bool(one.over()) == over
    if over:
        assert (
            "210.0 of 10,000 decisions change sides (limit 200.0, what saving these films as JPEG 95" in one.over()[0]
        )


def test_where_jpeg_changes_nothing_a_variant_may_not_either() -> None:
    assert beside(0, with_flips(0)).over() == []
    (said,) = beside(0, with_flips(1)).over()
    assert "limit 0.0" in said
    assert "only 1 of 250 groups with a changed decision, too few to tell" in said


def test_few_films_have_no_interval_and_say_so() -> None:
    margin = beside(2, with_flips(2)).margin
    assert margin is not None
    assert (margin.low, margin.high, margin.affected, margin.groups) == (None, None, 4, 250)
    assert margin.affected < FEW
    assert "no interval: only 4 of 250 groups" in margin.describe()
    assert "check on more films" in margin.describe()
    alone = beside(8, with_flips(8, n=8), per_group=8).margin
    assert alone is not None
    assert alone.low is None, "one patient alone"
    assert "only 1 of 1 group with" in alone.describe()


def test_the_interval_is_of_the_paired_difference_by_groups() -> None:
    """Against resampling by hand, films of a group together; the ends a little wider, as few groups ask."""
    variant = with_flips(30, step=3)
    one = beside(40, variant, per_group=5)
    assert one.margin is not None
    assert one.margin.groups == 50
    reference = with_flips(0)
    each = ((variant >= 0.5) != (reference >= 0.5)).sum(1) - (with_flips(40)[::-1] >= 0.5).sum(1)
    sums, random = each.reshape(50, 5).sum(1), np.random.default_rng(1)
    draws = [1e4 * sums[random.integers(0, 50, 50)].mean() / 5 / 4 for _ in range(4000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert one.margin.more == pytest.approx(-100)
    assert one.margin.low is not None
    assert one.margin.high is not None
    assert one.margin.low == pytest.approx(low, abs=0.15 * (high - low))
    assert one.margin.high == pytest.approx(high, abs=0.15 * (high - low))
    assert "50 groups" in one.margin.describe()
    assert ("do not tell the two apart" in one.margin.describe()) == (one.margin.low <= 0 <= one.margin.high)


@pytest.mark.parametrize("moved", ["both", "map"])
def test_a_drop_of_auc_or_map_is_over_its_limit(moved: str) -> None:
    """All films rank right; then a negative is put first (mAP falls most), or a positive last. No decision changes."""
    n = 2000
    labels = np.zeros((n, 1), np.int8)
    labels[:40] = 1
    reference = np.linspace(0.4, 0.1, n, dtype=np.float32)[:, None]
    found = reference.copy()
    if moved == "map":
        found[41] = 0.45
    else:
        found[:10] = 0.01
    one = drift.measure(reference, found, labels, [0.5])
    said = one.over()
    assert one.flipped == 0
    assert any("macro mAP drops by" in text and "(limit 0.002)" in text for text in said)
    assert any("macro AUC drops by" in text for text in said) == (moved == "both")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_over_every_limit(bad: float) -> None:
    reference, found, labels = sample(2)
    found[3, 1] = bad
    one = drift.measure(reference, found, labels, [0.5] * 4)
    assert "not all finite" in one.over()[0]
