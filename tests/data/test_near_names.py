"""Files under names that differ a little from the listed ones: found where one file fits, else said."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from cxr_fast.data import images, paths
from cxr_fast.data.manifest import read_dataset
from cxr_fast.data.near_names import NearNames, hint_at, name_differences
from cxr_fast.errors import ImageError, InputError


def put(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def table(folder: Path, *listed: str) -> Path:
    rows = "".join(f"{name},p{row},{row % 2}\n" for row, name in enumerate(listed))
    return put(folder / "my.csv", f"image,group,A\n{rows}")


@pytest.mark.parametrize(
    ("listed", "there", "kind"),
    [
        ("a\\1.png", "a/1.png", "backslashes"),
        ("a/M\u00fcller.png", "a/Mu\u0308ller.png", "composed and decomposed letters"),
        ("Mu\u0308ller/1.png", "M\u00fcller/1.png", "composed and decomposed letters"),
        ("a/1.png", "a/1.PNG", "upper and lower case"),
        ("A/x.png", "a/X.png", "upper and lower case"),
        ("a/1.jpg", "a/1.png", "the suffix"),
        ("a/1", "a/1.dcm", "the suffix"),
        ("a/1.dcm", "a/1.dcm.png", "the suffix"),
        ("A\\1.jpg", "a/1.TIFF", "backslashes and upper and lower case and the suffix"),
        ("../films/1.png", "../films/1.PNG", "upper and lower case"),
    ],
)
def test_a_name_that_differs_is_found_and_said(tmp_path: Path, listed: str, there: str, kind: str) -> None:
    folder = tmp_path / "here"
    put(folder / "a" / "0.png")
    put(folder / there)
    found = read_dataset(table(folder, "a/0.png", listed))
    assert found.images[1] == there
    assert found.path(1).is_file()
    assert found.notes == (f"1 image(s) were found under a name that differs in {kind}: {listed} is {there}.",)
    assert name_differences(listed, there) == kind
    predicted = paths.read([str(folder / "my.csv")]).paths
    assert os.path.samefile(predicted[1], folder / there)


def test_exact_names_win_and_no_file_is_taken_twice(tmp_path: Path) -> None:
    for name in ("a.png", "A.png", "b.png", "c.png"):
        put(tmp_path / name)
    assert read_dataset(table(tmp_path, "a.png", "A.png")).images == ("a.png", "A.png")
    with pytest.raises(InputError, match=r"1 of the 2 images .*: b\.jpg\n"):
        read_dataset(table(tmp_path, "b.png", "b.jpg"))
    with pytest.raises(InputError, match=r"2 of the 3 images .*: c\.jpg, c\.tif\n"):
        read_dataset(table(tmp_path, "a.png", "c.jpg", "c.tif"))


def test_two_files_that_fit_are_said_and_not_chosen_between(tmp_path: Path) -> None:
    for name in ("0.png", "1.png", "1.tif"):
        put(tmp_path / name)
    with pytest.raises(InputError, match=r"not below .*: 1\.jpg; 1\.jpg may be 1\.png or 1\.tif\n"):
        read_dataset(table(tmp_path, "0.png", "1.jpg"))


def test_of_several_those_with_the_listed_suffix_come_first(tmp_path: Path) -> None:
    for name in ("1.PNG", "1.tif"):
        put(tmp_path / name)
    assert NearNames().find(str(tmp_path), "1.png") == ["1.PNG"]
    assert NearNames().find(str(tmp_path), "1.jpg") == ["1.PNG", "1.tif"]
    assert NearNames().find(str(tmp_path), "gone/1.png") == []
    assert NearNames().find(str(tmp_path), "C:\\films\\1.png") == []


def test_a_missing_film_says_which_file_is_nearly_it(tmp_path: Path) -> None:
    composed = put(tmp_path / "M\u00fcller.png")
    with pytest.raises(ImageError) as caught:
        images.read_bytes(tmp_path / unicodedata.normalize("NFD", composed.name))
    assert str(caught.value).endswith(
        "no such file; M\u00fcller.png is there, which differs in composed and decomposed letters"
    )
    assert hint_at(str(tmp_path / "nothing.png")) == hint_at(str(tmp_path / "gone" / "1.png")) == hint_at("\0") == ""


NIH = "Image Index,Finding Labels,Patient ID,View Position\n0_0.png,Mass,1,PA\n0_1.png,Hernia,1,PA\n"


def test_a_layout_that_names_files_without_folders(tmp_path: Path) -> None:
    put(tmp_path / "Data_Entry_2017.csv", NIH)
    put(tmp_path / "images" / "0_0.png")
    put(tmp_path / "images" / "0_1.PNG")
    found = read_dataset(tmp_path)
    assert found.images == ("images/0_0.png", "images/0_1.PNG")
    assert found.notes[0].endswith("differs in upper and lower case: 0_1.png is images/0_1.PNG.")
    put(tmp_path / "images" / "0_1.jpg")
    with pytest.raises(InputError, match=r"0_1\.png may be images/0_1\.PNG or images/0_1\.jpg"):
        read_dataset(tmp_path)
