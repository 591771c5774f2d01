"""`--grid` becomes specs in order; threshold goals and the published recipe's differences are what they say."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast import config
from cxr_fast.config import CacheSpec, SweepSpec, TrainSpec
from cxr_fast.errors import InputError
from cxr_fast.recipes import REFERENCE, grid, grid_values, recipe_differences, reference_value

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
    got = grid_values(name, text)
    assert got == want
    assert [type(value) for value in got] == [type(value) for value in want]


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
    for ask in (lambda: grid_values(name, text), lambda: grid(TrainSpec(), [f"{name}={text}"])):
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
        assert grid(default, [f"{f.name}={text}"]) == [({f.name: value}, default)]


@settings(max_examples=100)
@given(st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=6, unique=True))
def test_numbers_come_back_as_they_were_written(values: list[float]) -> None:
    assert grid_values("lr", ",".join(map(repr, values))) == values


# Combinations.


def test_without_flags_there_is_the_spec_alone() -> None:
    spec = TrainSpec(lr=3e-5)
    assert grid(spec, []) == [({}, spec)]


def test_the_last_flag_varies_fastest() -> None:
    points = grid(TrainSpec(), ["lr=1e-5,2e-5", "loss=bce,focal", "patience=none,3"])
    want = itertools.product((1e-5, 2e-5), ("bce", "focal"), (None, 3))
    assert [tuple(changes.values()) for changes, _ in points] == list(want)
    assert all(list(changes) == ["lr", "loss", "patience"] for changes, _ in points)


def test_a_point_is_the_spec_with_what_differs_and_nothing_else() -> None:
    base = TrainSpec(dropout=0.3, flip=False)
    for changes, spec in grid(base, ["focal_gamma=0,1", "batch_size=4,8"]):
        assert spec == dataclasses.replace(base, **changes)
        assert dataclasses.asdict(spec).items() >= changes.items()


@pytest.mark.parametrize("flag", ["lr", "lr:1e-5", ""])
def test_a_flag_without_an_equals_sign_is_refused(flag: str) -> None:
    with pytest.raises(InputError, match=r"^--grid: '.*' must be NAME=A,B,\.\.\., each NAME once\.$"):
        grid(TrainSpec(), [flag])


def test_a_field_given_by_two_flags_is_refused() -> None:
    with pytest.raises(InputError, match=r"^--grid: 'lr=3e-5' must be NAME=A,B,\.\.\., each NAME once\.$"):
        grid(TrainSpec(), ["lr=1e-5", "focal_gamma=1", "lr=3e-5"])


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
        grid(TrainSpec(), ["focal_gamma=1,2", flag])


# Threshold goals.


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("f1", ("f1", 0.0)),
        ("sensitivity=0.9", ("sensitivity", 0.9)),
        ("specificity=1", ("specificity", 1.0)),
        ("specificity=1e-3", ("specificity", 0.001)),
    ],
)
def test_a_threshold_goal_is_read(text: str, goal: tuple[str, float]) -> None:
    assert SweepSpec(threshold_target=text).threshold_goal == goal


@pytest.mark.parametrize(
    "text",
    [
        *("", "F1", "f1=0.5", "f2", "sensitivity", "sensitivity=", "sensitivity=0", "sensitivity=1.01"),
        *("sensitivity=-0.1", "sensitivity=nan", "sensitivity=inf", "sensitivity=high", "sensitivity=0.9=0.8"),
        *("recall=0.9", "=0.9", "sensitivity:0.9", " f1"),
    ],
)
def test_any_other_goal_is_refused_with_its_flag(text: str) -> None:
    with pytest.raises(InputError) as caught:
        SweepSpec(threshold_target=text)
    assert str(caught.value) == (
        f"--threshold-target: {text!r} must be f1, sensitivity=X or specificity=X with X in (0, 1]."
    )


@given(st.floats(0, 1, exclude_min=True))
def test_any_share_is_a_goal(share: float) -> None:
    assert SweepSpec(threshold_target=f"sensitivity={share!r}").threshold_goal == ("sensitivity", share)


# The published recipe.


def test_the_published_value_is_the_tables_or_our_default() -> None:
    listed = {(cls, name): value for cls, name, value, _ in REFERENCE}
    for cls in (CacheSpec, TrainSpec, SweepSpec):
        for f in dataclasses.fields(cls):
            want = listed.pop((cls.__name__, f.name), config.default(cls, f.name))
            assert reference_value(cls, f.name) == want
    assert not listed, "the table names fields that do not exist"
    with pytest.raises(KeyError):
        reference_value(TrainSpec, "momentum")


def test_the_published_values_make_valid_specs_that_differ_from_our_defaults() -> None:
    for cls in (CacheSpec, SweepSpec):
        changed = {name: value for spec, name, value, _ in REFERENCE if spec == cls.__name__}
        assert dataclasses.asdict(cls(**changed)).items() >= changed.items()
        for name, value in changed.items():
            assert value != config.default(cls, name), f"{name} does not differ"


def test_each_difference_says_what_was_used_here() -> None:
    rows = recipe_differences(CacheSpec(), SweepSpec(split_by="image"))
    assert [row["field"] for row in rows] == [name for _, name, _, _ in REFERENCE]
    by = {row["field"]: row for row in rows}
    assert by["split_by"]["here"] == by["split_by"]["published"] == "image"
    assert by["split_by"]["default"] == "group"
    assert (by["normalize"]["here"], by["normalize"]["default"]) == ("model", "model")
    assert by["normalize"]["published"] == "imagenet"
    assert all(list(row) == ["field", "here", "published", "default", "why"] and row["why"] for row in rows)
