"""Rows encoded once are not lost, whatever the list of images does meanwhile, and are copied only where they belong."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cxr_fast.activations import file as store
from cxr_fast.activations import reuse
from cxr_fast.config import digest
from cxr_fast.errors import InputError

SHAPE = (1, 3, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty files that stand for images."""
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(bytes([i]) * 9)
    return tmp_path


def header(images: list[int], **parts: object) -> store.Header:
    named = {"prefix_sha256": "a" * 64, "cut": "blocks.4", **parts}
    return store.Header(
        meta={"fingerprint_parts": named, "fingerprint": digest(named), "block": 4},
        shape=(len(images), *SHAPE),
        dtype="float16",
        images=tuple(f"{i}.png" for i in images),
        groups=tuple(f"p{i}" for i in images),
        studies=tuple(f"p{i}" for i in images),
        views=("",) * len(images),
        classes=("Edema",),
        labels=np.zeros((len(images), 1), np.int8),
    )


def rows_for(images: list[int]) -> np.ndarray:
    return np.stack([np.full(SHAPE, i, np.float16) for i in images])


def prepare(folder: Path, images: list[int], *, repair: bool = False) -> bool:
    out, paths = folder / "a.h5", [folder / f"{i}.png" for i in images]
    return reuse.prepare(header(images), out, reuse.ImageHasher(paths, 2), repair=repair)


def encode(folder: Path, images: list[int], count: int) -> list[int]:
    """What a run does with the pending rows: write `count` of them, in order; which images those were."""
    with store.Writer(folder / "a.h5") as writer:
        pending = np.flatnonzero(writer.state == store.PENDING)[:count].tolist()
        chosen = [images[row] for row in pending]
        hashes = [hashlib.sha256((folder / f"{i}.png").read_bytes()).hexdigest() for i in chosen]
        if chosen:
            writer.rows(pending, rows_for(chosen), hashes, [None] * len(chosen))
        if (writer.state != store.PENDING).all():
            writer.finish()
            reuse.remove_asides(folder / "a.h5")
    return chosen


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("a.h5*"))


def test_lists_that_change_again_and_again_lose_no_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = list(range(12)), list(range(6, 18)), list(range(20))
    prepare(folder, first)
    assert encode(folder, first, 5) == [0, 1, 2, 3, 4]
    with monkeypatch.context() as patch:  # stopped before anything is copied, twice
        patch.setattr(reuse, "_copy", lambda *_: None)
        prepare(folder, second)
        assert encode(folder, second, 4) == [6, 7, 8, 9]
        prepare(folder, first[::-1])
        assert encode(folder, first[::-1], 1) == [11]
        prepare(folder, third)
    assert names(folder) == ["a.h5.partial", "a.h5.reuse1", "a.h5.reuse2", "a.h5.reuse3"]
    assert reuse.count_reusable(header(third), reuse.find_files(folder / "a.h5")) == 10
    prepare(folder, third)
    assert encode(folder, third, 20) == [5, 10, *range(12, 20)]
    assert names(folder) == ["a.h5"]
    assert np.array_equal(store.ActivationFile(folder / "a.h5").activations, rows_for(third))


def test_a_damaged_copy_is_passed_over_for_a_sound_one(folder: Path) -> None:
    prepare(folder, [0, 1, 2])
    encode(folder, [0, 1, 2], 2)
    partial = store.partial_path(folder / "a.h5")
    offset = store.ActivationFile(partial, partial=True).offset
    (folder / "a.h5.reuse7").write_bytes(partial.read_bytes())
    for path, row in ((partial, 0), (folder / "a.h5.reuse7", 1)):
        with open(path, "r+b") as file:
            file.seek(offset + row * 24)
            file.write(b"\x55\x55")
    prepare(folder, [1, 0])
    assert encode(folder, [1, 0], 9) == []
    assert names(folder) == ["a.h5"]
    assert np.array_equal(store.ActivationFile(folder / "a.h5").activations, rows_for([1, 0]))


def test_an_aside_without_rows_is_not_kept(folder: Path) -> None:
    prepare(folder, [0, 1])
    prepare(folder, [1, 0])
    assert names(folder) == ["a.h5.partial"]


def test_what_a_run_killed_after_the_last_rename_left_aside_goes(folder: Path) -> None:
    prepare(folder, [0, 1])
    encode(folder, [0, 1], 2)
    (folder / "a.h5.reuse1").write_bytes((folder / "a.h5").read_bytes())
    (folder / "a.h5.reuse-mine").write_text("not ours")
    assert not prepare(folder, [0, 1])
    assert names(folder) == ["a.h5", "a.h5.reuse-mine"]


def test_an_aside_made_another_way_is_refused_by_field(folder: Path) -> None:
    prepare(folder, [0, 1])
    encode(folder, [0, 1], 1)
    store.partial_path(folder / "a.h5").rename(folder / "a.h5.reuse1")
    other = replace(header([0, 1]), meta=header([0, 1], cut="blocks.3").meta)
    with pytest.raises(InputError, match=r"a\.h5\.reuse1 was made with cut blocks.4, this run has blocks.3"):
        reuse.count_reusable(other, reuse.find_files(folder / "a.h5"))


# ------------------------------------------------------------------ the pixel check


def with_check(value: str, images: list[int]) -> store.Header:
    new = header(images, pixel_check=value)
    return replace(new, meta={**new.meta, "pillow": f"of {value}"})


def test_a_file_from_before_the_pixel_check_is_refused_as_such(folder: Path) -> None:
    prepare(folder, [0, 1])
    encode(folder, [0, 1], 1)
    store.partial_path(folder / "a.h5").rename(folder / "a.h5.reuse1")
    with pytest.raises(
        InputError, match=r"a\.h5\.reuse1 was made by an older cxr-fast, which did not record how Pillow"
    ):
        reuse.count_reusable(with_check("new", [0, 1]), reuse.find_files(folder / "a.h5"))


def run(folder: Path, head: store.Header) -> bool:
    paths = [folder / image for image in head.images]
    return reuse.prepare(head, folder / "a.h5", reuse.ImageHasher(paths, 1), repair=False)


def test_another_pillow_is_refused_by_field_and_version(folder: Path) -> None:
    run(folder, with_check("one", [0, 1, 2]))
    encode(folder, [0, 1, 2], 2)
    before = store.partial_path(folder / "a.h5").read_bytes()
    with pytest.raises(
        InputError, match="made with pixel_check one, this run has two; Pillow of one decoded images to other"
    ):
        run(folder, with_check("two", [0, 1, 2]))
    assert store.partial_path(folder / "a.h5").read_bytes() == before


def test_another_pillow_of_the_same_pixels_goes_on(folder: Path) -> None:
    run(folder, with_check("one", [0, 1, 2]))
    encode(folder, [0, 1, 2], 2)
    newer = with_check("one", [0, 1, 2])
    run(folder, replace(newer, meta={**newer.meta, "pillow": "99"}))
    assert encode(folder, [0, 1, 2], 9) == [2]


def test_a_finished_file_has_its_unfinished_name_on_disk_before_a_row_is_marked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, order = list(range(6)), []
    prepare(folder, images)
    encode(folder, images, 6)
    (folder / "3.png").write_bytes(b"another film")
    sync, forget = store.sync_folder, store.Writer.forget
    monkeypatch.setattr(store, "sync_folder", lambda path: (order.append(names(folder)), sync(path)))
    monkeypatch.setattr(store.Writer, "forget", lambda *some: (order.append("forget"), forget(*some)))
    assert prepare(folder, images)
    assert order == [["a.h5.partial"], "forget"]


def test_rows_that_are_missing_under_the_final_name_are_encoded_by_the_same_command(folder: Path) -> None:
    """A power cut could leave that before the unfinished name was waited for: every command refused it for good."""
    images = list(range(6))
    prepare(folder, images)
    encode(folder, images, 6)
    store.reopen(folder / "a.h5")
    with store.Writer(folder / "a.h5") as writer:
        writer.forget([2, 4])
    (folder / "a.h5.partial").rename(folder / "a.h5")
    assert prepare(folder, images)
    assert encode(folder, images, 6) == [2, 4]
    assert not prepare(folder, images)
    assert (store.ActivationFile(folder / "a.h5").activations[:, 0, 0, 0] == images).all()
