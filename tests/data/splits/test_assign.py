"""Groups never shared, everything assigned, every label spread; on toy sizes, at Indiana's size, and on Indiana."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.data.splits import assign, balanced
from cxr_fast.data.splits.assign import SplitSpec, one_sided
from cxr_fast.data.splits.given import FREE, HOLDOUT, TRAIN
from cxr_fast.data.splits.table import fold_table
from cxr_fast.errors import InputError

HOLDOUTS = st.sampled_from([0.0, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8])
METHODS = ("balanced", "iterative")


@pytest.fixture(autouse=True, scope="module")
def few_starts() -> Iterator[None]:
    """What holds for each start holds for the best of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balanced, "STARTS", 2)
        yield


def split(labels: np.ndarray, groups: list[str], given: np.ndarray | None = None, **wanted: Any) -> np.ndarray:
    return assign.split(labels, groups, SplitSpec(**wanted), given)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, list[str], int, float, int]:
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    folds, holdout = draw(st.integers(2, 6)), draw(HOLDOUTS)
    units = draw(st.integers(folds + 1, 80))
    sizes = random.integers(1, draw(st.integers(2, 9)), units)
    groups = [f"p{g}" for g in np.repeat(np.arange(units), sizes)]
    shares = random.choice([0.0, 0.02, 0.2, 0.7, 1.0], draw(st.integers(1, 8)))
    labels = (random.random((len(groups), len(shares))) < shares).astype(np.int8)
    labels[random.random(labels.shape) < draw(st.sampled_from([0.0, 0.3]))] = -1
    order = random.permutation(len(groups))
    return labels[order], [groups[i] for i in order], folds, holdout, draw(st.integers(0, 999))


def group_counts(assignment: np.ndarray, groups: list[str]) -> dict[int, int]:
    place = dict(zip(groups, assignment.tolist(), strict=True))
    return {part: list(place.values()).count(part) for part in set(place.values())}


@settings(max_examples=50, deadline=None)
@given(cases(), st.sampled_from(METHODS))
def test_a_split_is_whole_disjoint_and_repeatable(
    case: tuple[np.ndarray, list[str], int, float, int], method: str
) -> None:
    labels, groups, folds, holdout, seed = case
    assignment = split(labels, groups, folds=folds, holdout=holdout, seed=seed, method=method)
    assert assignment.dtype == np.int16
    assert assignment.shape == (len(groups),)
    assert set(assignment.tolist()) == set(range(folds)) | ({HOLDOUT} if holdout else set())
    places: dict[str, set[int]] = {}
    for group, part in zip(groups, assignment.tolist(), strict=True):
        places.setdefault(group, set()).add(part)
    assert all(len(parts) == 1 for parts in places.values())
    again = split(labels, groups, folds=folds, holdout=holdout, seed=seed, method=method)
    np.testing.assert_array_equal(assignment, again)


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 2**32 - 1), st.sampled_from(METHODS))
def test_row_order_is_irrelevant(case: tuple[np.ndarray, list[str], int, float, int], seed: int, method: str) -> None:
    labels, groups, folds, holdout, split_seed = case
    order = np.random.default_rng(seed).permutation(len(groups))
    wanted = {"folds": folds, "holdout": holdout, "seed": split_seed, "method": method}
    first = split(labels, groups, **wanted)
    moved = split(labels[order], [groups[i] for i in order], **wanted)
    np.testing.assert_array_equal(first[order], moved)


def _study_like(units: int, classes: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Prevalence from 0.2 % to 30 %, groups of 1 to 4 images that share their findings; about half have none."""
    random = np.random.default_rng(seed)
    shares = np.geomspace(0.002, 0.3, classes)
    findings = (random.random((units, classes)) < shares) & (random.random((units, 1)) < 0.5)
    owner = np.repeat(np.arange(units), random.choice([1, 2, 3, 4], units, p=[0.2, 0.6, 0.15, 0.05]))
    return findings[owner].astype(np.int8), [f"s{g}" for g in owner]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_sizes_and_labels_are_spread(seed: int, method: str) -> None:
    labels, groups = _study_like(600, 20, seed)
    assignment = split(labels, groups, folds=5, holdout=0.2, seed=seed, method=method)
    groups_each = group_counts(assignment, groups)
    assert abs(groups_each[HOLDOUT] / 600 - 0.2) < 0.03
    folds = np.array([groups_each[k] for k in range(5)])
    assert folds.max() - folds.min() <= 0.15 * folds.mean()
    images = np.bincount(assignment + 1)
    assert abs(images[0] / len(labels) - 0.2) < 0.03
    assert images[1:].max() - images[1:].min() <= 0.15 * images[1:].mean()
    first = np.unique(np.asarray(groups), return_index=True)[1]
    for c in range(labels.shape[1]):
        positive = assignment[first][labels[first, c] == 1]
        hit = len(set(positive[positive >= 0].tolist()))
        # Rarer labels that share a group are placed first, so a label may lose a fold or two, not more.
        assert hit >= min(5, (positive >= 0).sum()) - 2
        if len(positive) >= 20:
            assert set(positive.tolist()) == {-1, 0, 1, 2, 3, 4}
            share = np.bincount(positive + 1, minlength=6) / len(positive)
            np.testing.assert_allclose(share, [0.2, 0.16, 0.16, 0.16, 0.16, 0.16], atol=0.1)


def test_a_label_alone_in_its_groups_reaches_every_part() -> None:
    labels = np.zeros((60, 2), dtype=np.int8)
    labels[:6, 0] = 1
    labels[6:16, 1] = 1
    assignment = split(labels, [f"g{i}" for i in range(60)], folds=4, holdout=0.2, seed=3)
    # Of 6 groups one or two are held out (1.2 wanted), and the four or five left reach all four folds.
    assert set(assignment[:6].tolist()) == set(assignment[6:16].tolist()) == {-1, 0, 1, 2, 3}


def test_labels_that_occur_once_do_not_flock_to_one_part() -> None:
    assignment = split(np.eye(30, dtype=np.int8), [f"g{i}" for i in range(30)], folds=5, holdout=0.2, seed=0)
    assert np.bincount(assignment + 1, minlength=6).min() >= 4


@pytest.mark.parametrize("fill", [0, 1, -1])
def test_columns_without_a_positive_or_all_positive(fill: int) -> None:
    labels = np.full((40, 3), fill, dtype=np.int8)
    assignment = split(labels, [f"g{i}" for i in range(40)], folds=4, holdout=0.2, seed=0)
    assert np.bincount(assignment + 1).tolist() == [8, 8, 8, 8, 8]


def test_image_counts_are_balanced_where_groups_differ() -> None:
    sizes = [16] * 10 + [1] * 100
    groups = [f"g{i}" for i in np.repeat(np.arange(110), sizes)]
    assignment = split(np.zeros((260, 1), dtype=np.int8), groups, folds=5, holdout=0.0, seed=0)
    assert np.bincount(assignment).tolist() == [52] * 5


def test_seed_and_mode_matter() -> None:
    labels, groups = _study_like(100, 5, 0)
    first, second = (split(labels, groups, folds=5, holdout=0.2, seed=s) for s in (0, 1))
    assert (first != second).any()
    images = split(labels, groups, folds=5, holdout=0.2, seed=0, by="image")
    parts = {g: set(images[[i for i, name in enumerate(groups) if name == g]].tolist()) for g in set(groups)}
    assert any(len(p) > 1 for p in parts.values())
    counts = np.bincount(images + 1) / len(labels)
    np.testing.assert_allclose(counts, [0.2, *[0.16] * 5], atol=0.02)


def test_group_findings_are_those_of_any_image() -> None:
    # Positive in one of two images each: by groups exactly one such group a fold.
    labels = np.zeros((20, 1), dtype=np.int8)
    labels[[0, 2, 4, 6, 8], 0] = 1
    labels[1::2] = -1
    assignment = split(labels, [f"g{i // 2}" for i in range(20)], folds=5, holdout=0, seed=0)
    assert sorted(assignment[[0, 2, 4, 6, 8]].tolist()) == [0, 1, 2, 3, 4]


def test_as_many_groups_as_parts_fills_each_and_fewer_is_an_error() -> None:
    labels = np.eye(6, dtype=np.int8)
    for seed in range(20):
        filled = split(labels, list("abcdef"), folds=5, holdout=0.2, seed=seed)
        assert sorted(filled.tolist()) == [-1, 0, 1, 2, 3, 4]
    with pytest.raises(InputError, match=r"5 group\(s\) cannot fill 5 folds and a hold-out: lower --folds"):
        split(labels[:5], list("abcde"), folds=5, holdout=0.2, seed=0)
    with pytest.raises(InputError, match=r"2 group\(s\) cannot fill 5 folds: lower --folds"):
        split(labels, list("aaabbb"), folds=5, holdout=0, seed=0)
    assert len(set(split(labels, list("aaabbb"), folds=5, holdout=0.2, seed=0, by="image").tolist())) == 6


@pytest.mark.parametrize(
    ("names", "folds", "holdout", "said"),
    [
        (["a"], 2, 0.2, "do not describe the same images"),
        (["a", "b"], 0, 0.2, "--folds: 0"),
        (["a", "b"], 2, 1.0, "--holdout: 1.0"),
        (["a", "b"], 2, -0.1, "--holdout: -0.1"),
        (["a", "b"], 1, 1e-9, "too close to 0 or 1"),
    ],
)
def test_wrong_requests_are_one_line(names: list[str], folds: int, holdout: float, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        split(np.zeros((2, 1), dtype=np.int8), names, folds=folds, holdout=holdout, seed=0, method="iterative")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ what is given


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 2**32 - 1))
def test_what_is_given_stays(case: tuple[np.ndarray, list[str], int, float, int], seed: int) -> None:
    labels, groups, folds, holdout, split_seed = case
    names = sorted(set(groups))
    random = np.random.default_rng(seed)
    of = dict(zip(names, random.choice([FREE, FREE, TRAIN, HOLDOUT, 0, folds - 1], len(names)).tolist(), strict=True))
    given_parts = np.array([of[group] for group in groups])
    try:
        found = split(labels, groups, given_parts, folds=folds, holdout=holdout, seed=split_seed)
    except InputError:
        return  # too much is given: nothing is left for a part; see below
    assert (found[given_parts == HOLDOUT] == HOLDOUT).all()
    assert (found[given_parts == TRAIN] >= 0).all()
    np.testing.assert_array_equal(found[given_parts >= 0], given_parts[given_parts >= 0])
    assert set(found.tolist()) >= set(range(folds))
    if holdout:
        assert (found == HOLDOUT).any()
    again = split(labels, groups, found.astype(int), folds=folds, holdout=holdout, seed=99)
    np.testing.assert_array_equal(again, found)


def test_a_hold_out_that_is_large_enough_takes_no_more() -> None:
    labels, groups = _study_like(100, 5, 0)
    held = np.where(np.isin(groups, [f"s{i}" for i in range(30)]), HOLDOUT, FREE)
    found = split(labels, groups, held, folds=3, holdout=0.2, seed=0)
    np.testing.assert_array_equal(found == HOLDOUT, held == HOLDOUT)
    few = np.where(np.isin(groups, [f"s{i}" for i in range(5)]), HOLDOUT, FREE)
    found = split(labels, groups, few, folds=3, holdout=0.2, seed=0)
    assert abs(group_counts(found, groups)[HOLDOUT] - 20) <= 1


@pytest.mark.parametrize(
    ("parts", "folds", "holdout", "said"),
    [
        ([HOLDOUT, HOLDOUT, HOLDOUT, FREE], 2, 0.2, r"3 of 4 group\(s\) are given to the hold-out"),
        ([TRAIN, TRAIN, 0, 1], 2, 0.2, r"every one of 4 group\(s\) is given to training"),
        ([0, 0, 0, FREE], 2, 0.2, r"too few group\(s\) are left to draw for fold 1"),
    ],
)
def test_given_parts_that_leave_nothing_are_one_line(parts: list[int], folds: int, holdout: float, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        split(np.ones((4, 1), np.int8), list("abcd"), np.array(parts), folds=folds, holdout=holdout, seed=0)
    assert "\n" not in str(caught.value)


def test_the_former_method_takes_nothing_that_is_given() -> None:
    labels, groups = _study_like(40, 3, 0)
    given_parts = np.where(np.array(groups) == "s0", HOLDOUT, FREE)
    with pytest.raises(InputError, match="--split-method iterative draws every group"):
        split(labels, groups, given_parts, folds=3, holdout=0.2, seed=0, method="iterative")


def test_classes_on_one_side_are_found() -> None:
    labels = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]], dtype=np.int8)
    groups = ["a", "b", "c", "d", "d"]
    held = np.array([HOLDOUT, HOLDOUT, 0, 1, 1], dtype=np.int16)
    assert one_sided(labels, groups, held) == {0: HOLDOUT, 3: 0}
    assert one_sided(labels, groups, np.zeros(5, int)) == {}


def test_fold_table_counts_and_flags() -> None:
    labels = np.array([[1, 0], [1, -1], [0, 1], [1, 0]], dtype=np.int8)
    table = fold_table(labels, np.array([0, 1, 1, -1], dtype=np.int16), ["A", "B"], ["p", "q", "q", "r"])
    assert table == [
        {"class": "(images)", "total": 4, "fold_0": 1, "fold_1": 2, "holdout": 1, "empty_folds": ""},
        {"class": "(groups)", "total": 3, "fold_0": 1, "fold_1": 1, "holdout": 1, "empty_folds": ""},
        {"class": "A", "total": 3, "fold_0": 1, "fold_1": 1, "holdout": 1, "empty_folds": ""},
        {"class": "B", "total": 1, "fold_0": 0, "fold_1": 1, "holdout": 0, "empty_folds": "fold_0 holdout"},
    ]
    assert "holdout" not in fold_table(labels, np.array([0, 1, 1, 0]), ["A", "B"])[0]


def test_indiana_size_takes_seconds() -> None:
    labels, groups = _study_like(3851, 35, 0)
    began = time.perf_counter()
    split(labels, groups, folds=5, holdout=0.2, seed=0)
    assert time.perf_counter() - began < 5


@pytest.mark.skipif("CXR_FAST_REAL_DATA" not in os.environ, reason="CXR_FAST_REAL_DATA names no data folder")
def test_indiana() -> None:
    folder = Path(os.environ["CXR_FAST_REAL_DATA"]) / "iu"
    with (folder / "indiana_reports_labelled.csv").open(encoding="utf-8", newline="") as file:
        found = {row["uid"]: row["label"].split(";") for row in csv.DictReader(file)}
    with (folder / "indiana_projections.csv").open(encoding="utf-8", newline="") as file:
        groups = [row["uid"] for row in csv.DictReader(file)]
    classes = sorted({name for names in found.values() for name in names})
    labels = np.array([[name in found[uid] for name in classes] for uid in groups], dtype=np.int8)
    assert labels.shape == (7466, 35)
    assignment = split(labels, groups, folds=5, holdout=0.2, seed=0)
    images = np.bincount(assignment + 1) / len(labels)
    np.testing.assert_allclose(images, [0.2, *[0.16] * 5], atol=0.01)
    table = {row["class"]: row for row in fold_table(labels, assignment, classes, groups)}
    # Nothing shared, and only classes of under 30 images (about 15 studies) may be missing somewhere.
    assert (
        table["(groups)"]["total"]
        == sum(table["(groups)"][f"fold_{k}"] for k in range(5)) + table["(groups)"]["holdout"]
    )
    missing = {name: row["total"] for name, row in table.items() if row["empty_folds"]}
    assert len(missing) <= 5
    assert max(missing.values()) < 30
