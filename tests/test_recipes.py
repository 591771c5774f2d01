"""Threshold goals and the published recipe's differences are what they say."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast import config
from cxr_fast.config import CacheSpec, SweepSpec, TrainSpec
from cxr_fast.errors import InputError
from cxr_fast.recipes import REFERENCE, recipe_differences, reference_value

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
