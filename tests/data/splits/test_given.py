"""Parts that are given: words, lists, whole groups, and sources that contradict each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cxr_fast.data.manifest import read_dataset, write_manifest
from cxr_fast.data.splits import given
from cxr_fast.data.splits.given import FREE, HOLDOUT, TRAIN
from cxr_fast.errors import InputError

IMAGES, GROUPS = ["a/1.png", "a/2.png", "b/1.png", "b/3.png"], ["p1", "p1", "p2", "p3"]


def table(folder: Path, *words: str) -> Path:
    lines = ["image,group,split,Mass", *(f"{i}.png,p{i},{word},{i % 2}" for i, word in enumerate(words))]
    (folder / "my.csv").write_text("\n".join(lines) + "\n")
    return folder / "my.csv"


def test_a_column_is_read_written_and_read_again(tmp_path: Path) -> None:
    found = read_dataset(table(tmp_path, "train", "holdout", ""), missing="keep")
    assert found.splits == ("train", "holdout", "")
    assert found.classes == ("Mass",)
    write_manifest(found, tmp_path / "out.csv")
    assert read_dataset(tmp_path / "out.csv", missing="keep").splits == found.splits
    assert read_dataset(table(tmp_path, "", ""), missing="keep").splits == ()


def test_another_word_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"column 'split' holds 'test' in data row 2; it takes train, holdout"
    ) as found:
        read_dataset(table(tmp_path, "train", "test"), missing="keep")
    assert "\n" not in str(found.value)


def test_a_list_names_images_file_names_and_groups(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("\ufeffa/1.png\r\n\r\n3.png\n3.png\n".encode())
    lines = given.read_list(tmp_path / "list.txt")
    assert lines == ["a/1.png", "3.png"]
    found = given.from_list(lines, IMAGES, GROUPS, "c.h5")
    assert found.tolist() == [HOLDOUT, TRAIN, TRAIN, HOLDOUT]
    whole = given.whole_groups(found, GROUPS, given.LIST, listed=True)
    assert whole.tolist() == [HOLDOUT, HOLDOUT, TRAIN, HOLDOUT]
    assert given.from_list(["p1"], IMAGES, GROUPS, "c.h5").tolist() == [HOLDOUT, HOLDOUT, TRAIN, TRAIN]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\xff\xfea\x00", "is not UTF-8 text"),
        (b"p1\nnobody\n1.png\n", r"2 of 3 lines name no image or group of c\.h5: nobody, 1\.png"),
    ],
)
def test_a_bad_list_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(InputError, match=said) as found:
        given.from_list(given.read_list(tmp_path / "list.txt"), IMAGES, GROUPS, "c.h5")
    assert "\n" not in str(found.value)
    with pytest.raises(InputError, match=r"--holdout-list: .*No such file"):
        given.read_list(tmp_path / "none.txt")


def test_a_group_has_one_part() -> None:
    assert given.whole_groups(np.array([HOLDOUT, FREE, FREE, TRAIN]), GROUPS, "x").tolist() == [-1, -1, FREE, TRAIN]
    assert given.whole_groups(np.array([2, 1, 1, 0]), ["p1", "p1", "p1", "p3"], "x").tolist() == [1, 1, 1, 0]
    with pytest.raises(InputError, match=r"x: 1 group\(s\) have images in training and in the hold-out, first 'p1'"):
        given.whole_groups(np.array([HOLDOUT, TRAIN, FREE, FREE]), GROUPS, "x")


def test_sources_add_up_and_do_not_contradict() -> None:
    one, two = np.array([TRAIN, TRAIN, FREE, HOLDOUT]), np.array([1, FREE, HOLDOUT, HOLDOUT])
    assert given.combine({"one": one, "two": two}, list("abcd")).tolist() == [1, TRAIN, HOLDOUT, HOLDOUT]
    assert given.combine({}, list("ab")).tolist() == [FREE, FREE]
    with pytest.raises(InputError, match=r"two holds out what one trains on: 1 group\(s\), first 'a'"):
        given.combine({"one": one, "two": np.full(4, HOLDOUT)[[0]].repeat(4) * [1, 3, 3, 3]}, list("abcd"))
    with pytest.raises(InputError, match=r"one holds out what two trains on: 1 group\(s\), first 'd'"):
        given.combine({"one": one, "two": np.array([FREE, FREE, FREE, 0])}, list("abcd"))
