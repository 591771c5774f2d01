"""Every image is in exactly one subgroup; numbers become few of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.errors import InputError
from cxr_fast.metrics import subgroups


def sizes(name: str, values: list[str]) -> dict[str, int]:
    return {key: len(rows) for key, rows in subgroups.split(name, values).items()}


def test_texts_are_what_they_are_and_the_unknown_stand_last() -> None:
    found = subgroups.split("sex", ["M", "F", "", "F"])
    assert {key: rows.tolist() for key, rows in found.items()} == {"F": [1, 3], "M": [0], "unknown": [2]}
    assert list(found) == ["F", "M", "unknown"]
    assert sizes("ward", ["1", "1", "2"]) == {"1": 2, "2": 1}


@pytest.mark.parametrize("name", ["age", "Age", "patient_age", "age_years"])
def test_ages_become_decades_in_order(name: str) -> None:
    found = sizes(name, ["58", "51", "9", "103", "017Y", "", "110"])
    assert list(found.items()) == [
        ("0-9", 1),
        ("10-19", 1),
        ("50-59", 2),
        ("100-109", 1),
        ("110-119", 1),
        ("unknown", 1),
    ]
    assert list(sizes(name, ["10-19", "0-9", "100-109"])) == ["0-9", "10-19", "100-109"], "decades stay decades"


def test_other_numbers_become_quarters_in_order() -> None:
    values = [str(i) for i in range(1, 101)]
    found = sizes("dose", [*values, ""])
    assert list(found) == ["up to 25.75", "25.75 to 50.5", "50.5 to 75.25", "over 75.25", "unknown"]
    assert list(found.values()) == [25, 25, 25, 25, 1]
    assert sizes("stage", [str(i) for i in range(40)])["up to 9.75"] == 10, "`stage` is no age"


def test_what_is_no_subgroup_is_told() -> None:
    with pytest.raises(InputError, match="names none"):
        subgroups.split("sex", ["", ""])
    with pytest.raises(InputError, match="40 different values that are no numbers"):
        subgroups.split("scanner", [f"s{i}" for i in range(40)])


@given(st.lists(st.sampled_from(["", *map(str, range(30)), "-3.5", "1e3"]), min_size=1), st.sampled_from(["a", "age"]))
def test_every_image_is_in_one(values: list[str], name: str) -> None:
    if not any(values):
        return
    rows = np.concatenate(list(subgroups.split(name, values).values()))
    assert sorted(rows.tolist()) == list(range(len(values)))
