"""What is named to image files: files, folders, globs, lists, manifests; nothing left out without a word."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.data import paths
from cxr_fast.data.paths import Inputs, expand, read
from cxr_fast.errors import InputError


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ["b.png", "a.JPG", "notes.txt", "deep/er/c.dcm", "deep/d.jpeg", "x[1].png", "none/readme.md"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"?")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (["b.png"], ["b.png"]),
        (["deep"], ["deep/d.jpeg", "deep/er/c.dcm"]),
        (["./deep/"], ["deep/d.jpeg", "deep/er/c.dcm"]),
        (["."], ["a.JPG", "b.png", "deep/d.jpeg", "deep/er/c.dcm", "x[1].png"]),
        (["*.png"], ["b.png", "x[1].png"]),
        (["**/*.dcm"], ["deep/er/c.dcm"]),
        (["x[1].png"], ["x[1].png"]),  # a file of that name, not a glob for x1.png
        (["notes.txt", "gone.png"], ["notes.txt", "gone.png"]),  # named by hand: the answer says what is wrong
        (["b.png", "*.png", ".", "b.png"], ["b.png", "x[1].png", "a.JPG", "deep/d.jpeg", "deep/er/c.dcm"]),
        ([], []),
    ],
)
def test_inputs_become_paths(tree: Path, items: list[str], expected: list[str]) -> None:
    assert expand(items) == expected
    assert read(items).paths == expected


def test_a_folder_is_in_the_order_of_its_parts(tree: Path) -> None:
    for name in ["deep-a/1.png", "deep.b/1.png", "deep/z.png"]:
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_bytes(b"?")
    found = expand(["."])
    assert found == [str(path) for path in sorted(map(Path, found))]
    assert len(found) == 8


@pytest.mark.parametrize(
    ("item", "match"),
    [("nome", "nome: no such file or folder"), ("*.tif", r"\*\.tif: matches no file"), ("", "empty")],
)
def test_inputs_that_are_surely_a_mistake(tree: Path, item: str, match: str) -> None:
    for taken in (expand, read):
        with pytest.raises(InputError, match=match):
            taken(["b.png", item])


def test_a_folder_without_images_may_be_named_and_says_what_lies_in_it(tree: Path) -> None:
    with pytest.raises(InputError, match="none: a folder without images"):
        expand(["none"])
    assert read(["none"]) == Inputs(paths=[], passed_over={"without a known suffix": 1})


def test_what_is_hidden_is_passed_over_and_dicom_needs_no_suffix(tree: Path) -> None:
    """One rule for every folder: hidden and AppleDouble files are counted and left out, DICOM is known by its bytes."""
    for name in [
        ".hid/z.png",
        "deep/._d.jpeg",
        "deep/__MACOSX/._d.jpeg",
        "deep/1.2.840.17",
        "deep/IM0001",
        "deep/text",
    ]:
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_bytes(b"?")
    (tree / "deep/1.2.840.17").write_bytes(bytes(128) + b"DICM")
    (tree / "deep/IM0001").write_bytes(b"\x08\0\x05\0" + bytes(200))  # as old scanners write it, without a preamble
    found = read(["."])
    deep = [f"deep/{name}" for name in ("1.2.840.17", "IM0001", "d.jpeg", "er/c.dcm")]
    assert found.paths == ["a.JPG", "b.png", *deep, "x[1].png"]
    assert found.passed_over == {"hidden": 3, "without a known suffix": 3}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_list_may_begin_with_a_byte_order_mark(tree: Path, encoding: str) -> None:
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    data = mark + "b.png\r\nMüller.png\r\n".encode(encoding)
    (tree / "list.txt").write_bytes(data)
    assert read(["@list.txt"]).paths == read(["-"], stdin=io.BytesIO(data)).paths == ["b.png", "Müller.png"]
    with pytest.raises(InputError, match="save the list as UTF-8"):
        read(["-"], stdin=io.BytesIO(b"\xff\xfea"))


@given(st.lists(st.sampled_from(["a.png", "b.png", "c.dcm"]), max_size=8))
def test_each_path_comes_once_where_it_came_first(names: list[str]) -> None:
    assert expand(names) == sorted(set(names), key=names.index)
    assert read(names).paths == expand(names)


def test_links_are_followed_and_no_circle_is(tree: Path) -> None:
    (tree / "far").mkdir()
    (tree / "far" / "f.png").write_bytes(b"?")
    (tree / "deep" / "link").symlink_to(tree / "far")
    (tree / "deep" / "er" / "up").symlink_to(tree / "deep")
    (tree / "deep" / "dead.png").symlink_to("nowhere.png")
    (tree / "deep" / "folder.png").mkdir()
    os.mkfifo(tree / "deep" / "pipe.png")
    # What cannot be read is not left out: it becomes a row.
    names = ["d.jpeg", "dead.png", "er/c.dcm", "link/f.png", "pipe.png"]
    assert expand(["deep"]) == [f"deep/{name}" for name in names]


def test_a_folder_that_cannot_be_read_is_not_passed_over(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("er"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(paths.os, "scandir", scandir)
    with pytest.raises(InputError, match=r"deep/er: Permission denied; its images would be missing"):
        expand(["deep"])


# --------------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"b.png\ndeep/d.jpeg\n", ["b.png", "deep/d.jpeg"]),
        (b"b.png\r\n\r\ngone.png", ["b.png", "gone.png"]),
        (b"line\nbreak.png\0b.png\0", ["line\nbreak.png", "b.png"]),
        (b"*.png\ndeep\n@x\n-\nm.csv", ["*.png", "deep", "@x", "-", "m.csv"]),  # word by word
        (b" a b.png \n", [" a b.png "]),
        (b"\xff.png\nb.png\nb.png", ["\udcff.png", "b.png"]),
    ],
)
def test_a_list_is_a_path_a_line(tree: Path, data: bytes, expected: list[str]) -> None:
    assert read(["-"], stdin=io.BytesIO(data)).paths == expected
    (tree / "list.txt").write_bytes(data)
    found = read(["@list.txt"])
    assert found.paths == expected
    assert found.sources == (Path("list.txt"),)


def test_a_file_whose_name_begins_with_an_at_sign_is_that_file(tree: Path) -> None:
    (tree / "@b.png").write_bytes(b"?")
    assert read(["@b.png"]).paths == ["@b.png"]


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\0"])
def test_an_empty_list_is_a_mistake(tree: Path, data: bytes) -> None:
    with pytest.raises(InputError, match="standard input: a list without a path"):
        read(["-"], stdin=io.BytesIO(data))
    with pytest.raises(InputError, match=r"@gone\.txt: No such file"):
        read(["@gone.txt"])


# ----------------------------------------------------------------------------------------------- manifests


def test_a_manifest_is_relative_to_itself_and_says_the_studies(tree: Path) -> None:
    (tree / "deep" / "m.csv").write_text("image,group,view\nd.jpeg,p1,F\ner/c.dcm,p2,L\n/abs.png,p2,L\n")
    found = read(["deep/m.csv"])
    assert found.paths == ["deep/d.jpeg", "deep/er/c.dcm", "/abs.png"]
    assert (found.studies, found.by) == (["p1", "p2", "p2"], "group")
    assert (found.sources, found.manifests) == ((Path("deep/m.csv"),), 1)


def test_studies_come_before_groups(tree: Path) -> None:
    (tree / "m.csv").write_text("image,study,group\nb.png,s1,p1\na.JPG,s2,p1\n")
    assert read(["m.csv"]).studies == ["s1", "s2"]
    # An image named by hand as well keeps its place, and what the manifest knows of it.
    found = read(["a.JPG", "gone.png", "m.csv"])
    assert (found.paths, found.studies) == (["a.JPG", "gone.png", "b.png"], ["s2", "", "s1"])


def test_groups_are_kept_beside_studies(tree: Path) -> None:
    (tree / "m.csv").write_text("image,study,group\nb.png,s1,p1\na.JPG,s2,\n")
    found = read(["gone.png", "m.csv"])
    assert (found.studies, found.groups) == (["", "s1", "s2"], ["", "p1", "s2"])
    (tree / "g.csv").write_text("image,group\nb.png,p1\n")
    assert read(["g.csv"]).groups == ["p1"]


def test_a_manifest_without_studies(tree: Path) -> None:
    (tree / "m.csv").write_text("image\nb.png\nb.png\n")
    assert read(["m.csv"]) == Inputs(paths=["b.png"], sources=(Path("m.csv"),), manifests=1)


def test_a_parquet_manifest(tree: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"image": ["b.png", "a.JPG"], "group": [7, 8]}), "m.parquet")
    assert read(["m.parquet"]).studies == ["7", "8"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            "file,group\nb.png,1\n",
            r"m\.csv lacks the column\(s\) image; .*`cxrfast prepare \S*m\.csv --out manifest\.csv`",
        ),
        ("image,group\nb.png,1\n,2\n", "column 'image' is blank in data row 2"),
        ("image,group\nb.png,1\nb.png,2\n", r"m\.csv: b\.png is in group '1' and in '2'"),
        ("image,group\n", "a header and no rows"),
        ("image,group\nb.png\n", "1 fields where the header has 2"),
    ],
)
def test_a_manifest_in_doubt_is_refused(tree: Path, text: str, match: str) -> None:
    (tree / "m.csv").write_text(text)
    with pytest.raises(InputError, match=match):
        read(["m.csv"])
    with pytest.raises(InputError, match=r"gone\.csv"):
        read(["gone.csv"])
