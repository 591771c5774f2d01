"""Equal bytes in two groups leak, equal bytes with two labels contradict; everything else is silent."""

from __future__ import annotations

import numpy as np

from cxr_fast.data import duplicates


def notes(hashes: str, groups: str, labels: list[int] | None = None) -> tuple[str, ...]:
    names = [f"{i}.png" for i in range(len(hashes))]
    array = np.array(labels or [0] * len(hashes), np.int8)[:, None]
    return duplicates.notes(names, list(hashes), list(groups), array)


def test_different_images_and_copies_in_one_group_are_silent() -> None:
    assert notes("abcd", "1122") == ()
    assert notes("aabb", "1122") == ()
    assert notes("", "") == ()


def test_copies_in_two_groups_are_counted_and_named() -> None:
    (line,) = notes("abacbb", "112234")
    assert line.startswith("5 images have the bytes of an image of another group")
    assert "0.png of 1 = 2.png of 2, 1.png of 1 = 4.png of 3;" in line
    assert "give them one group in the manifest" in line
    (line,) = notes("abcdabcd", "11112222")
    assert line.count(" = ") == duplicates.NAMED
    assert ", ...;" in line


def test_copies_that_contradict_are_told_and_unknown_contradicts_nothing() -> None:
    assert notes("aa", "11", [1, -1]) == ()
    assert notes("ab", "11", [1, 0]) == ()
    (line,) = notes("aa", "11", [1, 0])
    assert line.startswith("2 images have the bytes of another image and other labels: 0.png = 1.png;")
    assert len(notes("aa", "12", [1, 0])) == 2
