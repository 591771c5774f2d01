"""Marked labels: flipped or masked where they are still what they were; everything else is counted or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.data.tables import corrections
from cxr_fast.data.tables.corrections import Correction, Corrections, apply, is_corrections, read_corrections
from cxr_fast.errors import InputError

CLASSES = ("Mass", "Effusion")
HEAD = "card,image_sha256,class,label,mark"


def written(folder: Path, *rows: str, head: str = HEAD) -> Path:
    (folder / "marks.csv").write_text("\n".join([head, *rows]) + "\n")
    return folder / "marks.csv"


def test_marks_are_read_and_rows_without_one_passed_over(tmp_path: Path) -> None:
    file = written(tmp_path, "1,AB,Mass,1,flip", "2,cd,Mass,0,", "3,cd,Effusion,,Unknown", "4,cd,Mass,0,keep")
    found = read_corrections(file)
    assert [(each.sha256, each.name, each.label, each.mark) for each in found.marks] == [
        ("ab", "Mass", 1, "flip"),
        ("cd", "Effusion", -1, "unknown"),
        ("cd", "Mass", 0, "keep"),
    ]
    assert is_corrections(file)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["1,ab,Mass,1,swap"], r"data row 1: mark 'swap' is not keep, flip, unknown, or nothing"),
        (["1,ab,Mass,2,flip"], r"data row 1: label '2' is not 1, 0, or nothing"),
        (["1,ab,Mass,,flip"], r"data row 1: an unknown label cannot be flipped"),
        (["1,,Mass,1,flip"], r"data row 1: image_sha256 is blank"),
        (["1,ab,Mass,1,flip", "2,ab,Mass,1,keep"], r"data rows 1 and 2 mark one label of one film differently"),
        (["1,ab,Mass,1,"], r"no row has a mark"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_row(tmp_path: Path, rows: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        read_corrections(written(tmp_path, *rows))
    assert "\n" not in str(caught.value)


def test_a_column_that_lacks_is_named(tmp_path: Path) -> None:
    file = written(tmp_path, "ab,Mass,flip", head="image_sha256,class,mark")
    with pytest.raises(InputError, match=r"lacks the column\(s\) label \(1, 0 or nothing, as it was"):
        read_corrections(file)
    assert not is_corrections(file)
    assert not is_corrections(tmp_path / "none.csv")
    assert not is_corrections(tmp_path)


def marks(*each: tuple[str, str, int, str]) -> Corrections:
    rows = tuple(Correction(row=i, sha256=a, name=b, label=c, mark=d) for i, (a, b, c, d) in enumerate(each, 1))
    return Corrections(file=Path("marks.csv"), sha256="0", marks=rows)


def test_labels_change_where_they_are_still_what_they_were() -> None:
    labels = np.array([[1, 0], [0, -2], [1, 1]], np.int8)
    given = marks(
        ("a", "Mass", 1, "flip"),  # two films of these bytes
        ("b", "Effusion", -1, "unknown"),
        ("b", "Mass", 1, "flip"),  # is 0 now
        ("z", "Mass", 1, "flip"),
        ("a", "Effusion", 0, "keep"),  # of one of the two
    )
    found = apply(given, labels, ["a", "b", "a"], CLASSES)
    assert found.labels.tolist() == [[0, 0], [0, -1], [0, 1]]
    assert found.changed.tolist() == [[True, False], [False, True], [True, False]]
    assert (found.flipped, found.unknown, found.kept) == (2, 1, 1)
    assert found.skipped == {corrections.NO_FILM: 1, corrections.OTHER_LABEL: 1}
    assert labels.tolist() == [[1, 0], [0, -2], [1, 1]]


def test_another_data_set_s_list_is_refused() -> None:
    labels = np.zeros((1, 2), np.int8)
    with pytest.raises(InputError, match="no film of its 1 marks is among those of the sweep"):
        apply(marks(("z", "Mass", 0, "flip")), labels, ["a"], CLASSES)
    with pytest.raises(InputError, match="data row 1: there is no class 'Hernia'"):
        apply(marks(("a", "Hernia", 0, "flip")), labels, ["a"], CLASSES)


@given(seed=st.integers(0, 999))
def test_flipping_twice_gives_the_labels_back(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, (6, 2)).astype(np.int8)
    names = [f"{i}" for i in range(6)]
    chosen = [(i, c) for i in range(6) for c in range(2) if random.random() < 0.5] or [(0, 0)]
    for _ in range(2):
        given_marks = marks(*((names[i], CLASSES[c], int(labels[i, c]), "flip") for i, c in chosen))
        found = apply(given_marks, labels, names, CLASSES)
        assert found.flipped == len(chosen) == found.changed.sum()
        labels, before = found.labels, labels
    assert (apply(given_marks, before, names, CLASSES).labels == labels).all()
