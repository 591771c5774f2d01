"""Which rows of a cache may be trained on, with whose labels; nothing damaged, nothing of another data set."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from cxr_fast.activations import file as store
from cxr_fast.activations.reuse import hash_image
from cxr_fast.config import SweepOptions, SweepSpec
from cxr_fast.data.manifest import Manifest, read_dataset
from cxr_fast.errors import InputError
from cxr_fast.training import dataset

SPEC = SweepSpec(epochs=(1,), folds=2)


@pytest.fixture
def own(toy_data: Path, lively_weights: Path, toy_cache: Path, tmp_path: Path) -> Path:
    """A cache that a test may change."""
    return Path(shutil.copy(toy_cache, tmp_path / "own.h5"))


def damage(path: Path, row: int) -> str:
    file = store.ActivationFile(path)
    with open(path, "r+b") as raw:
        raw.seek(file.offset + row * store.row_bytes(file.header.shape, file.header.dtype) + 5)
        raw.write(b"\x55\xaa")
    return file.header.images[row]


def labels_of(names: list[str], folder: Path) -> Manifest:
    """A manifest of one class in `folder`, positive for every second image."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "other.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["image", "group", "Mass"], *([name, f"g{i}", i % 2] for i, name in enumerate(names))]
        )
    return read_dataset(folder / "other.csv", missing="keep")


# ------------------------------------------------------------------ damage


def test_damaged_rows_never_reach_training(own: Path) -> None:
    names = [damage(own, row) for row in (0, 40)]
    with pytest.raises(InputError, match=r"2 of 79 rows fail their checksum") as caught:
        dataset.read(own, SPEC)
    text = str(caught.value)
    assert all(name in text for name in names)
    assert f"`cxrfast cache SOURCE --out {own} --repair`" in text
    assert len(text.splitlines()) == 2
    assert len(dataset.read(own, SPEC, checksums=False).rows) == 79


def test_a_failed_row_may_hold_anything(own: Path) -> None:
    failed = int(np.flatnonzero(~store.ActivationFile(own).ok)[0])
    damage(own, failed)
    assert len(dataset.read(own, SPEC).rows) == 79


def test_a_row_that_the_manifest_leaves_out_may_be_damaged(own: Path) -> None:
    damage(own, 0)
    file = store.ActivationFile(own)
    assert len(dataset.read(own, SPEC, labels_of([*file.header.images[30:60]], own.parent)).rows) == 30


# ------------------------------------------------------------------ another manifest


def told(data: dataset.Data) -> list[str]:
    """The notes, without the one that a toy has too few films to measure unlikeness."""
    return [note for note in data.notes if not note.startswith("no unlikeness: ")]


def test_the_manifest_of_the_same_folder_is_told_by_place(own: Path, toy_data: Path) -> None:
    data = dataset.read(own, SPEC, read_dataset(toy_data, missing="keep"))
    assert (data.by_name, told(data)) == (0, [])
    assert len(data.rows) == 79


def test_a_copy_of_the_folder_is_matched_by_name_and_bytes(own: Path, toy_data: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_data / "images", tmp_path / "copy" / "elsewhere")
    names = [f"elsewhere/{path.name}" for path in sorted((toy_data / "images").iterdir())]
    data = dataset.read(own, SPEC, labels_of(names, tmp_path / "copy"))
    assert (data.by_name, len(data.rows)) == (0, 79)


def test_another_data_set_with_the_same_names_is_refused(own: Path, toy_data: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    paths = sorted((toy_data / "images").iterdir())
    for path, other in itertools.pairwise(paths[:11]):
        shutil.copy(other, tmp_path / "b" / path.name)
    with pytest.raises(
        InputError, match=r"--manifest: 9 images have the name of one in .* and other bytes: "
    ) as caught:
        dataset.read(own, SPEC, labels_of([path.name for path in paths], tmp_path / "b"))
    text = str(caught.value)  # ten were put there; the fourth failed in the cache, and is not used
    assert paths[0].name in text
    assert paths[6].name not in text
    assert len(text.splitlines()) == 1


def test_names_decide_where_no_file_is_there_and_it_is_said(own: Path, toy_data: Path, tmp_path: Path) -> None:
    names = [path.name for path in sorted((toy_data / "images").iterdir())]
    (tmp_path / "t").mkdir()
    shutil.copy(toy_data / "images" / names[0], tmp_path / "t" / names[0])
    data = dataset.read(own, SPEC, labels_of(names, tmp_path / "t"))
    assert data.by_name == 78
    assert len(told(data)) == 1
    assert told(data)[0].startswith("--manifest: 78 of 79 images were matched by file name only")
    place = {f"images/{name}": i for i, name in enumerate(names)}
    assert data.labels[:, 0].tolist() == [place[data.header.images[row]] % 2 for row in data.rows]
    with pytest.raises(InputError, match="80 of 80 images are not in"):
        dataset.read(own, SPEC, labels_of([f"deep/{name}" for name in names], tmp_path / "t"))


def test_an_image_named_twice_is_refused(own: Path, toy_data: Path, tmp_path: Path) -> None:
    name = sorted(path.name for path in (toy_data / "images").iterdir())[0]
    with pytest.raises(InputError, match="1 of 2 images are named twice"):
        dataset.read(own, SPEC, labels_of([name, f"images/{name}"], tmp_path / "t"))


def test_labels_of_the_manifest_replace_the_caches(own: Path, toy_data: Path) -> None:
    manifest = read_dataset(toy_data)
    file = store.ActivationFile(own)
    other = replace(manifest, classes=("Mass",), labels=np.full((len(manifest), 1), 1, np.int8), groups=manifest.images)
    header, kept, _ = dataset.relabel(file, other)
    assert header.classes == ("Mass",)
    assert header.groups == file.header.images
    assert kept.tolist() == file.ok.tolist()
    assert set(header.labels[kept].ravel()) == {1}


# ------------------------------------------------------------------ given parts


def with_split(path: Path, words: list[str]) -> None:
    """Give a cache the column `split`."""
    with h5py.File(path, "r+") as file:
        file.attrs["meta"] = json.dumps(json.loads(file.attrs["meta"]) | {"splits": words}, sort_keys=True)


def patients(path: Path) -> tuple[str, ...]:
    return store.ActivationFile(path).header.groups


def test_the_cache_s_column_decides_and_can_be_left_out(own: Path) -> None:
    groups = patients(own)
    held = set(sorted(set(groups))[::4])
    with_split(own, ["holdout" if group in held else "train" for group in groups])
    data = dataset.read(own, SPEC)
    np.testing.assert_array_equal(data.assignment == -1, [groups[row] in held for row in data.rows])
    assert data.split["given"] == {"the column split": 79}
    assert data.split["holdout_drawn"] == 0
    drawn = dataset.read(own, replace(SPEC, split="drawn"))
    assert drawn.split["given"] == {}
    assert (drawn.assignment != data.assignment).any()


def test_a_column_that_is_too_small_is_filled_up_and_it_is_said(own: Path) -> None:
    groups = patients(own)
    with_split(own, ["holdout" if group == groups[0] else "" for group in groups])
    data = dataset.read(own, SPEC)
    assert any("are drawn beside those given, to reach --holdout" in note for note in data.notes)
    kept = dataset.read(own, replace(SPEC, holdout=0.0))
    assert {groups[row] for row in kept.valid(-1)} == {groups[0]}


def test_a_manifest_s_column_goes_before_the_cache_s(own: Path, toy_data: Path) -> None:
    with_split(own, ["holdout", *["train"] * 79])
    manifest = read_dataset(toy_data, missing="keep")
    held = set(sorted(set(manifest.groups))[::4])
    marked = replace(manifest, splits=tuple("holdout" if group in held else "train" for group in manifest.groups))
    data = dataset.read(own, SPEC, marked)
    assert {data.header.groups[row] for row in data.valid(-1)} <= held
    assert len(data.valid(-1)) > 1


def test_a_list_decides_and_contradictions_are_one_line(own: Path, tmp_path: Path) -> None:
    groups = patients(own)
    (tmp_path / "list.txt").write_text("\n".join(sorted(set(groups))[::4]))
    options = SweepOptions(holdout_list=str(tmp_path / "list.txt"))
    data = dataset.read(own, SPEC, options=options)
    assert {data.header.groups[row] for row in data.valid(-1)} == set(sorted(set(groups))[::4])
    del data  # its map keeps a lock on the file
    with_split(own, ["train"] * 80)
    with pytest.raises(InputError, match="--holdout-list holds out what the column split trains on") as caught:
        dataset.read(own, SPEC, options=options)
    assert "\n" not in str(caught.value)


def test_a_hold_out_without_a_positive_is_one_line(own: Path, toy_data: Path) -> None:
    manifest = read_dataset(toy_data, missing="keep")
    held = np.array(manifest.groups) == manifest.groups[0]
    labels = np.where(held[:, None], 0, manifest.labels).astype(np.int8)
    marked = replace(manifest, labels=labels, splits=tuple(np.where(held, "holdout", "train").tolist()))
    with pytest.raises(InputError, match="has no positive of any class") as caught:
        dataset.read(own, SPEC, marked)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ corrections


def test_corrections_change_labels_and_move_no_film(own: Path, tmp_path: Path) -> None:
    plain = dataset.read(own, SPEC)
    row, held = int(plain.train(0)[0]), int(plain.valid(-1)[0])
    c = next(c for c in range(plain.labels.shape[1]) if (plain.header.labels[[row, held], c] >= 0).all())
    name, marks = plain.header.classes[c], tmp_path / "marks.csv"
    lines = [["card", "image_sha256", "class", "label", "mark"]]
    lines += [[str(i), plain.file.sha256[i], name, str(plain.header.labels[i, c]), mark]
              for i, mark in ((row, "flip"), (held, "unknown"))]  # fmt: skip
    lines += [["9", "f" * 64, name, "1", "flip"]]
    with open(marks, "w", newline="") as file:
        csv.writer(file).writerows(lines)
    found = dataset.read(own, SPEC, options=SweepOptions(corrections=str(marks)))
    expected = plain.header.labels.copy()
    expected[row, c], expected[held, c] = 1 - expected[row, c], -1
    assert (found.header.labels == expected).all()
    assert (found.labels == np.maximum(expected, -1)[found.rows]).all()
    assert (found.assignment == plain.assignment).all()
    assert found.corrections is not None
    assert plain.corrections is None
    counts = {key: found.corrections[key] for key in ("flipped", "unknown", "kept", "films", "films_held_out", "marks")}
    assert counts == {"flipped": 1, "unknown": 1, "kept": 0, "films": 2, "films_held_out": 1, "marks": 3}
    assert found.corrections["sha256"] == hash_image(marks)
    assert found.notes[0] == (
        "--corrections: 1 labels flipped and 1 made unknown, of 2 images (1 of them held out); 0 kept; "
        "1 marks skipped: their film is not among those of the sweep"
    )
