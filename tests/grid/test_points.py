"""Points of a grid: every combination in order, or draws that follow from the seed; each on every seed."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.config import TrainSpec
from cxr_fast.errors import InputError
from cxr_fast.grid.points import Point, make_points

# Combinations.


def test_without_flags_there_is_the_spec_alone() -> None:
    spec = TrainSpec(lr=3e-5)
    assert make_points(spec, [], seed=3) == [Point(changes={}, train=spec, seed=3, group=0)]


def test_the_last_flag_varies_fastest() -> None:
    points = make_points(TrainSpec(), ["lr=1e-5,2e-5", "loss=bce,focal", "patience=none,3"])
    want = itertools.product((1e-5, 2e-5), ("bce", "focal"), (None, 3))
    assert [tuple(point.changes.values()) for point in points] == list(want)
    assert all(list(point.changes) == ["lr", "loss", "patience"] for point in points)
    assert [point.group for point in points] == list(range(8))


def test_a_point_is_the_spec_with_what_differs_and_nothing_else() -> None:
    base = TrainSpec(dropout=0.3, flip=False)
    for point in make_points(base, ["focal_gamma=0,1", "batch_size=4,8"]):
        assert point.train == dataclasses.replace(base, **point.changes)
        assert dataclasses.asdict(point.train).items() >= point.changes.items()


@pytest.mark.parametrize("flag", ["lr", "lr:1e-5", ""])
def test_a_flag_without_an_equals_sign_is_refused(flag: str) -> None:
    with pytest.raises(InputError, match=r"^--grid: '.*' must be NAME=A,B,\.\.\., each NAME once\.$"):
        make_points(TrainSpec(), [flag])


def test_a_field_given_by_two_flags_is_refused() -> None:
    with pytest.raises(InputError, match=r"^--grid: 'lr=3e-5' must be NAME=A,B,\.\.\., each NAME once\.$"):
        make_points(TrainSpec(), ["lr=1e-5", "focal_gamma=1", "lr=3e-5"])


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("lr=1e-5,0", r"--lr: 0\.0 must be positive"),
        ("lr=nan", "--lr: nan must be positive"),
        ("lr=inf", "--lr: inf must be positive"),
        ("batch_size=16,1", "--batch-size: 1 must be at least 2"),
        ("dropout=1", r"--dropout: 1\.0 must be in \[0, 1\)"),
        ("patience=none,0", "--patience: 0 must be at least 1"),
    ],
)
def test_a_value_the_spec_refuses_is_refused_before_anything_is_trained(flag: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_points(TrainSpec(), ["focal_gamma=1,2", flag])


# Seeds.


def test_each_point_stands_on_every_seed_side_by_side() -> None:
    points = make_points(TrainSpec(), ["seed=5,7", "lr=1e-5,2e-5"], seed=3)
    assert [(point.changes, point.seed, point.group) for point in points] == [
        ({"seed": 5, "lr": 1e-5}, 5, 0),
        ({"seed": 7, "lr": 1e-5}, 7, 0),
        ({"seed": 5, "lr": 2e-5}, 5, 1),
        ({"seed": 7, "lr": 2e-5}, 7, 1),
    ]
    alone = make_points(TrainSpec(lr=0.5), ["seed=0..2"])
    assert [(point.changes, point.train.lr, point.group) for point in alone] == [
        ({"seed": k}, 0.5, 0) for k in range(3)
    ]


@pytest.mark.parametrize("text", ["-1", "4294967296"])
def test_a_seed_that_no_generator_takes_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^--grid: seed=-?\d+ must be between 0 and 4294967295\.$"):
        make_points(TrainSpec(), [f"seed={text}"])


# Draws.

RANGES = ["lr=1e-5..1e-3:log", "dropout=0.1..0.6", "loss=bce,focal"]


@settings(max_examples=50)
@given(st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_draws_follow_from_the_seed_and_fewer_are_the_first_of_more(trials: int, seed: int) -> None:
    found = make_points(TrainSpec(), RANGES, seed=seed, trials=trials)
    assert len(found) == trials
    assert len({repr(point.changes) for point in found}) == trials
    assert found == make_points(TrainSpec(), RANGES, seed=seed, trials=30)[:trials]
    for point in found:
        assert 1e-5 <= point.train.lr <= 1e-3
        assert 0.1 <= point.train.dropout <= 0.6


def test_other_seeds_draw_other_points_and_each_draw_stands_on_every_seed() -> None:
    one, two = (make_points(TrainSpec(), RANGES, seed=seed, trials=3) for seed in (0, 1))
    assert not {repr(point.changes) for point in one} & {repr(point.changes) for point in two}
    crossed = make_points(TrainSpec(), [*RANGES, "seed=0..2"], trials=3)
    assert [(point.group, point.seed) for point in crossed] == list(itertools.product(range(3), range(3)))
    assert [point.train for point in crossed[::3]] == [point.train for point in one]


def test_of_lists_alone_no_combination_is_drawn_twice() -> None:
    flags = ["batch_size=2,4,8", "loss=bce,focal"]
    found = make_points(TrainSpec(), flags, trials=5)
    assert len({repr(point.changes) for point in found}) == 5


@pytest.mark.parametrize(
    ("flags", "trials", "said"),
    [
        (["lr=1e-5..1e-3"], None, "lr is a range; say how many draws from it with --trials N"),
        (["patience=1..4:log"], None, "patience is a range"),
        ([], 5, "there is nothing to draw from; add --grid NAME=A..B or NAME=A,B"),
        (["seed=0..4"], 5, "there is nothing to draw from"),
        (["lr=1e-5,1e-4", "loss=bce,asl"], 4, "the grid has 4 combinations; leave --trials out to train each of them"),
        (["batch_size=2..3"], 3, "2 different draws were found and no more; ask for fewer or widen the grid"),
        (["lr=1e-5..1e-3"], 10_001, "10001 must be between 1 and 10,000"),
        (["lr=1e-5..1e-3"], 0, "0 must be between 1 and 10,000"),
        (["batch_size=2..9999", "seed=0..3"], None, "39,992 configurations; at most 10,000"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(flags: list[str], trials: int | None, said: str) -> None:
    with pytest.raises(InputError) as caught:
        make_points(TrainSpec(), flags, trials=trials)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
