"""Every image is in exactly one subgroup; numbers become few of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.errors import InputError
from cxr_fast.metrics import subgroups
from cxr_fast.metrics.figures import auc
from cxr_fast.metrics.intervals import Resampling


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


# ------------------------------------------------------------------------------------------------- gaps


def patients(seed: int, unfair: float = 0.0) -> tuple[np.ndarray, np.ndarray, list[str], dict[str, np.ndarray]]:
    """300 images of 150 patients in three subgroups, the first scored with `unfair` more skill."""
    random = np.random.default_rng(seed)
    of = np.repeat(np.arange(150), 2)
    labels = np.repeat((random.random((150, 3)) < (0.4, 0.3, 0.01)).astype(np.int8), 2, axis=0)
    skill = 1.0 + unfair * (of % 3 == 0)[:, None]
    probs = 1 / (1 + np.exp(-skill * labels - random.normal(size=labels.shape)))
    members = {name: np.flatnonzero(of % 3 == k) for k, name in enumerate("abc")}
    return labels, probs, [str(g) for g in of], members


def test_a_gap_is_the_difference_of_two_macro_figures_on_the_same_resamples() -> None:
    labels, probs, groups, members = patients(0, unfair=3.0)
    found = subgroups.widest_gaps(labels, probs, 0.6, groups, members, Resampling(resamples=100))
    assert list(found) == list(subgroups.GAPS)
    gap = found["macro_auc"]
    assert gap.classes.tolist() == [True, True, False]
    assert (gap.higher, gap.pairs) == ("a", 3)
    each = {name: auc(labels[rows, :2], probs[rows, :2]).mean() for name, rows in members.items()}
    assert gap.value == pytest.approx(max(each.values()) - min(each.values()), abs=1e-12)
    assert 0 < gap.low < gap.value < gap.high
    two = {name: members[name] for name in ("a", gap.lower)}
    alone = subgroups.widest_gaps(labels, probs, 0.6, groups, two, Resampling(resamples=100))["macro_auc"]
    assert alone.value == gap.value
    assert alone.pairs == 1
    assert alone.high - alone.low < gap.high - gap.low, "the widest of three is less sure than one asked for"


def test_the_widest_gap_of_equals_holds_zero_about_as_often_as_it_says() -> None:
    hit = 0
    for seed in range(60):
        labels, probs, groups, members = patients(seed)
        gap = subgroups.widest_gaps(labels, probs, 0.6, groups, members, Resampling(resamples=60, seed=seed))[
            "macro_auc"
        ]
        hit += gap.low <= 0 <= gap.high
    assert hit >= 53


def test_subgroups_without_a_common_class_have_no_gap() -> None:
    labels, probs, groups, members = patients(0)
    labels[members["a"]] = 0
    assert (
        subgroups.widest_gaps(labels, probs, 0.6, groups, {k: members[k] for k in "ab"}, Resampling(resamples=9)) == {}
    )
