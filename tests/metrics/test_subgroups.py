"""Every image is in exactly one subgroup; numbers become few of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.data.disclosure import GROUPS, VALUES
from cxr_fast.errors import InputError
from cxr_fast.metrics import subgroups
from cxr_fast.metrics.figures import auc
from cxr_fast.metrics.intervals import Resampling


def rows(name: str, values: list[str], groups: list[str] | None = None) -> dict[str, list[int]]:
    """Row numbers by subgroup; without groups every value counts as one of enough of them."""
    owners = [f"p{i}" for i in range(len(values))] if groups is None else groups
    named = subgroups.name_subgroups(name, values, owners)
    if groups is None:
        return {value: np.flatnonzero(named == value).tolist() for value in subgroups.in_order(named)}
    return {value: found.tolist() for value, found in subgroups.split(named, np.array(groups))[0].items()}


def sizes(name: str, values: list[str], groups: list[str] | None = None) -> dict[str, int]:
    return {key: len(found) for key, found in rows(name, values, groups).items()}


def test_texts_are_what_they_are_and_the_unknown_stand_last() -> None:
    found = rows("sex", ["M", "F", "", " F "])
    assert found == {"F": [1, 3], "M": [0], "unknown": [2]}
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
    values = [str(i) for i in range(1, 101)] * 2
    found = sizes("dose", [*values, ""])
    assert list(found) == ["up to 25", "25 to 50", "50 to 75", "over 75", "unknown"]
    assert list(found.values()) == [50, 50, 50, 50, 1]
    assert sizes("stage", [str(i) for i in range(40)] * 2)["up to 10"] == 22, "`stage` is no age"
    assert list(sizes("index", [f"{i / 7:.4f}" for i in range(100)])) == [
        *("up to 3.5", "3.5 to 7", "7 to 10.5", "over 10.5"),
    ], "edges are round: none is a patient's own number"


def test_what_is_no_subgroup_is_told() -> None:
    with pytest.raises(InputError, match="more than 12 different values that are no numbers") as caught:
        rows("scanner", [f"s{i}" for i in range(40)])
    assert "s1" not in str(caught.value)
    columns = {"view": ["AP"] * 40, "meta:view": ["PA"] * 40, "meta:sex": [""] * 40, "meta:who": ["MEIER^ANNA"] * 40}
    found = subgroups.choose(columns, [str(i) for i in range(40)])
    assert list(found.columns) == ["view", "meta:view"]
    assert found.hidden == {"who": "it holds names of persons"}
    assert found.empty == ("sex",)
    assert str(found).startswith("1 column not shown: ")
    assert "1 of 3 columns" in found.warning()
    assert "ANNA" not in found.warning() + str(found)


def test_few_groups_are_put_together_or_left_out() -> None:
    values = ["a"] * 20 + ["b"] * 9 + ["c"] * 30 + [""] * 3
    groups = [f"p{i}" for i in range(29)] + ["q"] * 30 + ["r", "s", "t"]
    found = sizes("scanner", values, groups)
    assert found == {"a": 20, "other values": 9 + 30 + 3}, "30 images of one patient are one group"
    named = subgroups.name_subgroups("scanner", values[:29], groups[:29])
    left, few = subgroups.split(named, np.array(groups[:29]))
    assert (list(left), few) == (["a"], 1)


def test_views_are_counted_without_what_few_have() -> None:
    groups = [str(i) for i in range(30)]
    found = subgroups.count_views(["AP"] * 12 + ["Lateral Erect"] * 3 + ["of Hans"] * 2 + [""] * 13, groups)
    assert found == {"unknown": 13, "AP": 12, "Lateral Erect": 3, "other values": 2}
    assert subgroups.count_views(["MEIER^ANNA"] * 30, groups) == {"not shown": 30}
    assert subgroups.count_views([""] * 2, ["a", "b"]) == {"unknown": 2}
    assert subgroups.count_views([], []) == {}


@given(
    st.lists(
        st.tuples(st.sampled_from(["", *map(str, range(30)), "-3.5", "1e3", "inf", "x"]), st.integers(0, 40)),
        min_size=1,
    ),
    st.sampled_from(["a", "age"]),
)
def test_every_image_is_in_one_and_every_subgroup_has_enough_groups(pairs: list[tuple[str, int]], name: str) -> None:
    values, groups = [value for value, _ in pairs], [str(group) for _, group in pairs]
    try:
        named = subgroups.name_subgroups(name, values, groups)
    except InputError:
        return
    assert len(named) == len(values)
    assert len(set(named.tolist()) - {"unknown"}) <= VALUES
    found, few = subgroups.split(named, np.array(groups))
    together = np.concatenate([*found.values(), np.array([], int)])
    assert len(set(together.tolist())) == len(together)
    assert few or len(together) == len(values)
    for members in found.values():
        assert len({groups[row] for row in members}) >= GROUPS


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
