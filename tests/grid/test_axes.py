"""An axis of a grid is read as its field's type, or refused in one line; draws from a range stay in it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.config import TrainSpec
from cxr_fast.errors import InputError
from cxr_fast.grid.axes import MOST, read_axis
from cxr_fast.grid.points import make_points

# Values.

GOOD: list[tuple[str, str, list[Any]]] = [
    ("lr", "1e-5,2e-5,5e-5", [1e-5, 2e-5, 5e-5]),
    ("lr", " 1e-5 , 2e-5 ", [1e-5, 2e-5]),
    ("weight_decay", "0", [0.0]),
    ("focal_gamma", "1,2", [1.0, 2.0]),
    ("batch_size", "8,16", [8, 16]),
    ("plateau_patience", "0,3", [0, 3]),
    ("loss", "focal,bce,focal+jaccard", ["focal", "bce", "focal+jaccard"]),
    ("class_weights", "none,sqrt", ["none", "sqrt"]),
    ("scheduler", "none,plateau", ["none", "plateau"]),
    ("flip", "true,false", [True, False]),
    ("train_norm", "false", [False]),
    ("head_lr", "none,1e-3", [None, 1e-3]),
    ("layer_decay", "1,0.75", [1.0, 0.75]),
    ("train_blocks", "none,0,2", [None, 0, 2]),
    ("head_first", "0,5", [0, 5]),
    ("loss", "asl,ldam", ["asl", "ldam"]),
    ("asl_gamma_neg", "2,4", [2.0, 4.0]),
    ("asl_gamma_pos", "0,1", [0.0, 1.0]),
    ("asl_clip", "0,0.05", [0.0, 0.05]),
    ("ldam_margin", "0.5", [0.5]),
    ("logit_adjustment", "0,1", [0.0, 1.0]),
    ("label_smoothing", "0.1", [0.1]),
    ("sampling", "none,balanced,sqrt", ["none", "balanced", "sqrt"]),
    ("ema", "0,0.99", [0.0, 0.99]),
    ("tta", "none,flip", ["none", "flip"]),
    ("patience", "none,5,10", [None, 5, 10]),
    ("precision", "bfloat16", ["bfloat16"]),
    ("shuffle", "full,block", ["full", "block"]),
    ("shuffle_block", "1,16", [1, 16]),
]


@pytest.mark.parametrize(("name", "text", "want"), GOOD)
def test_values_come_in_order_and_of_the_fields_type(name: str, text: str, want: list[Any]) -> None:
    got = read_axis(name, text).values
    assert got == tuple(want)
    assert [type(value) for value in got or ()] == [type(value) for value in want]


BAD: list[tuple[str, str, str]] = [
    ("momentum", "0.9", "'momentum' is no training field; it takes asl_clip, asl_gamma_neg, "),
    ("epochs", "3", "'epochs' is no training field"),
    ("", "1", "'' is no training field"),
    ("lr", "", "lr='' is not a number"),
    ("lr", "1e-5,", "lr='' is not a number"),
    ("lr", "1e-5,,2e-5", "lr='' is not a number"),
    ("lr", "fast", "lr='fast' is not a number"),
    ("lr", "none", "lr='none' is not a number"),
    ("batch_size", "8.5", "batch_size='8.5' is not a "),
    ("batch_size", "1e1", "batch_size='1e1' is not a "),
    ("patience", "soon", "patience='soon' is not a "),
    ("patience", "None", "patience='None' is not a "),
    ("loss", "mse", "loss='mse' is not one of focal, focal+jaccard, bce"),
    ("loss", "", "loss='' is not one of"),
    ("flip", "yes", "flip='yes' must be true or false"),
    ("flip", "1", "flip='1' must be true or false"),
    ("lr", "1e-5,0.00001", "lr=1e-5,0.00001 names a value twice"),
    ("focal_gamma", "1,1.0", "focal_gamma=1,1.0 names a value twice"),
    ("batch_size", "8,16,8", "names a value twice"),
    ("flip", "true,true", "names a value twice"),
    ("patience", "none,none", "names a value twice"),
    ("loss", "bce,bce", "names a value twice"),
]


@pytest.mark.parametrize(("name", "text", "said"), BAD)
def test_a_bad_value_is_refused_in_one_line_that_names_it(name: str, text: str, said: str) -> None:
    for ask in (lambda: read_axis(name, text), lambda: make_points(TrainSpec(), [f"{name}={text}"])):
        with pytest.raises(InputError) as caught:
            ask()
        assert str(caught.value).startswith("--grid: ")
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_every_training_field_can_be_searched() -> None:
    default = TrainSpec()
    for f in dataclasses.fields(TrainSpec):
        value = getattr(default, f.name)
        text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        (point,) = make_points(default, [f"{f.name}={text}"])
        assert (point.changes, point.train) == ({f.name: value}, default)


@settings(max_examples=100)
@given(st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=6, unique=True))
def test_numbers_come_back_as_they_were_written(values: list[float]) -> None:
    assert read_axis("lr", ",".join(map(repr, values))).values == tuple(values)


# Ranges.


@pytest.mark.parametrize(
    ("name", "text", "values"),
    [
        ("batch_size", "8..10", (8, 9, 10)),
        ("seed", "0..4", (0, 1, 2, 3, 4)),
        ("train_blocks", " 0 .. 2 ", (0, 1, 2)),
        ("patience", "1..2", (1, 2)),
    ],
)
def test_a_range_of_whole_numbers_is_all_of_them(name: str, text: str, values: tuple[int, ...]) -> None:
    assert read_axis(name, text).values == values


def test_seeds_are_never_drawn() -> None:
    assert read_axis("seed", "0..2", drawn=True).values == (0, 1, 2)
    assert read_axis("batch_size", "8..10", drawn=True).values is None


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("lr", "1e-3..1e-5", "must rise, from the lowest value to the highest"),
        ("lr", "1e-3..1e-3", "must rise"),
        ("lr", "0..1:log", "must begin above 0, for it is drawn by its logarithm"),
        ("lr", "..1", "lr='' is not a number"),
        ("lr", "1..", "lr='' is not a number"),
        ("lr", "1..2..3", "is no range; a range is A..B or A..B:log"),
        ("lr", "1e-5..1e-3,1e-2", "is no range"),
        ("lr", "1e-5..1e-3:ln", "lr='1e-3:ln' is not a number"),
        ("lr", "1e-5..inf", "must have a number at either end"),
        ("lr", "nan..1", "must have a number at either end"),
        ("head_lr", "none..1", "must have a number at either end"),
        ("loss", "bce..asl", "is no range; a range is A..B or A..B:log of a field that is a number"),
        ("flip", "false..true", "is no range"),
        ("batch_size", "2..8.5", "batch_size='8.5' is not a number"),
        ("batch_size", f"2..{MOST + 2}", "is over 10,000 values; name fewer, or draw with --trials N"),
        ("seed", "1..4:log", "seeds are all trained, not drawn; leave :log out"),
        ("seed", "0..4:log", "seeds are all trained, not drawn; leave :log out"),
    ],
)
def test_what_is_no_range_is_refused_in_one_line(name: str, text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_axis(name, text)
    assert str(caught.value).startswith("--grid: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=200)
@given(st.floats(1e-9, 1e9), st.floats(1.0001, 1e6), st.booleans(), st.integers(0, 2**32 - 1))
def test_a_drawn_number_lies_in_its_range_and_can_be_read(low: float, times: float, log: bool, seed: int) -> None:
    high = low * times
    axis = read_axis("lr", f"{low!r}..{high!r}{':log' * log}")
    found = axis.draw(np.random.default_rng(seed))
    assert low <= found <= high
    assert found in (low, high) or float(f"{found:.3g}") == found


@given(st.integers(2, 50), st.integers(1, 50), st.booleans(), st.integers(0, 2**32 - 1))
def test_a_drawn_whole_number_is_one(low: int, more: int, log: bool, seed: int) -> None:
    axis = read_axis("batch_size", f"{low}..{low + more}{':log' * log}", drawn=True)
    found = axis.draw(np.random.default_rng(seed))
    assert isinstance(found, int)
    assert low <= found <= low + more


def test_draws_are_even_over_the_range_over_its_logarithm_and_over_a_list() -> None:
    rng = np.random.default_rng(0)
    even, log = read_axis("dropout", "0..0.5"), read_axis("lr", "1e-5..1e-1:log")
    whole, few = read_axis("batch_size", "2..5", drawn=True), read_axis("loss", "bce,asl")
    draws = {axis.name: [axis.draw(rng) for _ in range(4000)] for axis in (even, log, whole, few)}
    assert np.mean(draws["dropout"]) == pytest.approx(0.25, abs=0.01)
    assert np.mean(np.log10(draws["lr"])) == pytest.approx(-3, abs=0.06)
    for value in (2, 3, 4, 5):
        assert draws["batch_size"].count(value) == pytest.approx(1000, abs=120)
    assert draws["loss"].count("bce") == pytest.approx(2000, abs=150)
