"""Identifiers that tables spell differently, and groups that differ in spelling alone."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.data.identifiers import note_groups, spell_id


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("50000001", "50000001"),
        (" 50000001.0 ", "50000001"),
        ("050000001", "50000001"),
        ("5.0000001e+07", "50000001"),
        ("5e3", "5000"),
        ("S50000001", "s50000001"),
        ("P01", "p1"),
        ("000", "0"),
        ("1.5", "1.5"),
        ("1.2.3.0", "1.2.3.0"),
        ("e1", "e1"),
        ("\uff11\uff12", "12"),
        ("Mu\u0308ller", "m\u00fcller"),
        ("", ""),
    ],
)
def test_one_spelling(text: str, said: str) -> None:
    assert spell_id(text) == said


@given(st.integers(0, 10**15), st.integers(0, 3), st.booleans())
def test_numbers_keep_their_value_whatever_stands_around_them(number: int, zeros: int, decimal: bool) -> None:
    assert spell_id("0" * zeros + str(number) + ".0" * decimal) == str(number)


@given(st.lists(st.sampled_from(["1", "1.0", "01", "P1", "p1", "p01", "2", "20", "x", "X", "y"]), max_size=9))
def test_pairs_are_counted_as_a_comparison_of_each_with_each_would(groups: list[str]) -> None:
    pairs = sum(spell_id(one) == spell_id(other) for one, other in combinations(sorted(set(groups)), 2))
    notes = note_groups(groups)
    assert len(notes) == (pairs > 0)
    assert not notes or notes[0].startswith(f"{pairs} pair(s) of groups differ in spelling alone")
