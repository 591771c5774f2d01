"""Rows kept batch by batch: only what is missing or has changed is done again, and no torn or damaged row is read."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.errors import InputError
from cxr_fast.inference.checkpoint import WAL, Checkpoint, beside
from cxr_fast.inference.predictor import Result, changed_ns
from cxr_fast.system.files import file_sha256
from tests.helpers.states import wait_until

MODEL = {"model_sha256": "a" * 64, "pixel_check": "p"}


def answer(path: Path | str, *values: float, **changes: object) -> Result:
    return Result(path=str(path), probabilities=np.array(values or [0.1, 0.9], np.float32), **changes)  # type: ignore[arg-type]


def of_file(path: Path) -> Result:
    """What `Predictor` says of a file that is old enough."""
    os.utime(path, ns=(10**18, 10**18))
    return answer(path, sha256=file_sha256(path), size=path.stat().st_size, mtime_ns=changed_ns(path.stat()))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "p.csv"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(b"twelve bytes")
    return tmp_path / "a.png"


def test_rows_come_back_to_the_last_bit(out: Path) -> None:
    values = np.random.default_rng(0).random((40, 3)).astype(np.float32) ** 9
    values[0] = [0, 1, np.finfo(np.float32).smallest_subnormal]
    results = [
        Result(path=f"{i}.png", probabilities=row, sha256=f"{i:064x}", size=i, mtime_ns=i)
        for i, row in enumerate(values)
    ]
    results += [Result(path="bad.png", reason="truncated", message="bad.png: ü\n")]
    with Checkpoint(out, MODEL) as kept:
        for start in range(0, len(results), 2):
            kept.append(results[start : start + 2], "CPU")
    with Checkpoint(out, MODEL) as kept:
        for result in reversed(results):
            found, by = kept.row(result.path)
            assert by == "CPU"
            assert (found.path, found.reason, found.message) == (result.path, result.reason, result.message)
            assert (found.sha256, found.size, found.mtime_ns) == (result.sha256, result.size, result.mtime_ns)
            if result.probabilities is not None:
                np.testing.assert_array_equal(found.probabilities, result.probabilities)
                assert found.probabilities.dtype == np.float32


@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=5, unique=True))
def test_names_of_any_bytes_come_back(tmp_path_factory: pytest.TempPathFactory, names: list[bytes]) -> None:
    out, paths = tmp_path_factory.mktemp("names") / "p.csv", list(map(os.fsdecode, names))
    with Checkpoint(out, MODEL) as kept:
        kept.append([answer(path) for path in paths], "CPU")
    with Checkpoint(out, MODEL) as kept:
        assert [kept.row(path)[0].path for path in paths] == paths


# The first line of a file of version 0.1, lines of JSON.
EARLIER = (
    b'1f2e3d4c {"kind":"cxr-fast predictions so far","schema":1,"written_by":"cxr-fast 0.1.0","model_sha256":"a"}\n'
)


def replaced(image: Path) -> None:
    image.write_bytes(b"other bytes!")


def replaced_and_dated_back(image: Path) -> None:
    """Same size and the time of long ago, yet not the recorded one."""
    image.write_bytes(b"other bytes!")
    os.utime(image, ns=(10**17, 10**17))


def replaced_at_the_same_time(image: Path) -> None:
    """As `cp -p` and archives leave it: size and modification time are the recorded ones."""
    before = changed_ns(image.stat())

    def replaced() -> bool:
        image.write_bytes(b"other bytes!")
        os.utime(image, ns=(10**18, 10**18))
        return changed_ns(image.stat()) != before

    wait_until(replaced, "a tick of the file system's clock")


def longer(image: Path) -> None:
    image.write_bytes(b"twelve bytes and more")
    os.utime(image, ns=(10**18, 10**18))


def piped(image: Path) -> None:
    image.unlink()
    os.mkfifo(image)


CHANGES: list[tuple[Callable[[Path], object], bool]] = [
    (lambda image: None, True),
    (lambda image: os.utime(image), True),  # touched or copied: the content decides
    (replaced, False),
    (replaced_and_dated_back, False),
    (replaced_at_the_same_time, False),
    (longer, False),
    (Path.unlink, False),
    (piped, False),
]


@pytest.mark.parametrize(("change", "same"), CHANGES)
def test_what_has_changed_is_seen(out: Path, image: Path, change: Callable[[Path], object], same: bool) -> None:
    with Checkpoint(out, MODEL) as kept:
        assert not kept.holds(str(image))
        kept.append([of_file(image)], "CPU")
        assert kept.holds(str(image))
    change(image)
    with Checkpoint(out, MODEL) as kept:
        assert kept.holds(str(image)) is same


def test_a_file_of_the_same_time_is_not_read_again(out: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpoint(out, MODEL) as kept:
        kept.append([of_file(image)], "CPU")
        monkeypatch.setattr("cxr_fast.inference.checkpoint.file_sha256", lambda path: pytest.fail("read"))
        assert kept.holds(str(image))


def test_a_file_that_was_young_is_told_by_its_content(out: Path, image: Path) -> None:
    """Changed again within one tick of the clock, it keeps size and time."""
    with Checkpoint(out, MODEL) as kept:
        kept.append([answer(image, sha256=file_sha256(image), size=12, mtime_ns=0)], "CPU")
        assert kept.holds(str(image))
        before = image.stat().st_mtime_ns
        image.write_bytes(b"other bytes!")
        os.utime(image, ns=(before, before))
        assert not kept.holds(str(image))


def test_failures_are_never_held_and_take_no_room_again(out: Path) -> None:
    bad = Result(path="bad.png", reason="missing", message="bad.png: no such file")
    sizes = set()
    for _ in range(3):
        with Checkpoint(out, MODEL) as kept:
            kept.append([bad], "CPU")
            assert not kept.holds("bad.png")
        sizes.add(beside(out).stat().st_size)
    assert len(sizes) == 1
    with Checkpoint(out, MODEL) as kept:
        kept.append([Result(path="bad.png", reason="empty", message="bad.png: no bytes")], "CPU")
        assert kept.row("bad.png")[0].reason == "empty"


def test_the_newest_answer_counts(out: Path, image: Path) -> None:
    with Checkpoint(out, MODEL) as kept:
        kept.append([answer(image, 0.5)], "CPU")
        kept.append([answer("b.png", 0.6), answer(image, 0.7)], "CUDA")
    with Checkpoint(out, MODEL) as kept:
        found, by = kept.row(str(image))
        assert (found.probabilities, by) == (np.float32(0.7), "CUDA")


BATCHES = [[answer(f"{i}{x}") for x in "ab"] for i in range(4)]


def killed(out: Path) -> tuple[bytes, bytes, list[int]]:
    """The file and its log as a kill after the last batch leaves them, and how long the log was after each batch."""
    log = out.with_name(out.name + WAL)
    with Checkpoint(out, MODEL) as kept:
        ends = []
        for batch in BATCHES:
            kept.append(batch, "CPU")
            ends.append(log.stat().st_size)
        return beside(out).read_bytes(), log.read_bytes(), ends


def left(out: Path, file: bytes, log: bytes) -> None:
    beside(out).write_bytes(file)
    out.with_name(out.name + WAL).write_bytes(log)


def batches_kept(kept: Checkpoint) -> int:
    """How many batches are there: whole ones, and none after one that is missing."""
    found = [[_known(kept, result) for result in batch] for batch in BATCHES]
    count = sum(map(all, found))
    assert found == [[i < count] * 2 for i in range(len(BATCHES))]
    return count


def _known(kept: Checkpoint, result: Result) -> bool:
    try:
        found, _ = kept.row(result.path)
    except KeyError:
        return False
    np.testing.assert_array_equal(found.probabilities, result.probabilities)
    return True


@pytest.mark.kill
def test_cut_anywhere_whole_batches_remain(out: Path) -> None:
    """Lengths of the log that a kill or a power cut can leave, its making included: a prefix of the batches is kept,
    and one can go on from it."""
    file, log, ends = killed(out)
    assert sorted(set(ends)) == ends
    near = {end + step for end in ends for step in (-1, 0, 1)}
    for length in sorted({*range(0, len(log), 509), *near, len(log)} - {len(log) + 1}):
        left(out, file, log[:length])
        with Checkpoint(out, MODEL) as kept:
            whole = batches_kept(kept)
            assert whole == sum(end <= length for end in ends)
            for batch in BATCHES[whole:]:
                kept.append(batch, "CPU")
        with Checkpoint(out, MODEL) as kept:
            assert batches_kept(kept) == len(BATCHES)


@pytest.mark.kill
def test_a_kill_while_the_log_is_moved_into_the_file_loses_nothing(out: Path) -> None:
    """At the end, and once a second: any of the file's pages may have been written, the log is still whole."""
    before, log, _ = killed(out)
    after, page = beside(out).read_bytes(), 4096
    assert len(after) > len(before)
    for pages in range(len(after) // page + 1):
        for length in (pages * page, min(pages * page + 100, len(after))):
            left(out, after[:length] + before[length:], log)
            with Checkpoint(out, MODEL) as kept:
                assert batches_kept(kept) == len(BATCHES)


@pytest.mark.kill
def test_killed_while_it_was_made_it_is_made_again(out: Path) -> None:
    for content in (b"", killed(out)[0][:4096]):
        left(out, content, b"")
        with Checkpoint(out, MODEL) as kept:
            assert batches_kept(kept) == 0
            kept.append(BATCHES[0], "CPU")


@pytest.mark.kill
def test_the_log_of_a_file_that_is_gone_is_not_read(out: Path) -> None:
    _, log, _ = killed(out)
    for overwrite in (False, True):
        beside(out).unlink()
        out.with_name(out.name + WAL).write_bytes(log)
        with Checkpoint(out, MODEL, overwrite=overwrite) as kept:
            assert batches_kept(kept) == 0


def test_a_flipped_bit_is_a_row_to_predict_again_or_one_clear_line(out: Path) -> None:
    """In the file and in its log; never another answer."""
    file, log, _ = killed(out)
    whole = beside(out).read_bytes()
    drawn, said, kept_ones = random.Random(5), set(), []
    for turn in range(300):
        data, flipped = (whole, bytearray(whole)) if turn % 3 else (log, bytearray(log))
        at = drawn.randrange(len(data) if turn % 2 else 4096)
        flipped[at] ^= 1 << drawn.randrange(8)
        left(out, *((bytes(flipped), b"") if data is whole else (file, bytes(flipped))))
        try:
            with Checkpoint(out, MODEL) as kept:
                kept_ones.append(sum(_known(kept, result) for batch in BATCHES for result in batch))
        except InputError as error:
            said.add(str(error).replace(str(out.parent), ""))
    assert 0 < sum(count < 8 for count in kept_ones) < len(kept_ones)
    assert all(text.startswith("--out: ") and "\n" not in text and "--overwrite" in text for text in said)
    assert any("is damaged" in text for text in said)


def test_a_full_disk_keeps_what_there_is(out: Path) -> None:
    """SQLite's own limit answers as a full disk does."""
    with Checkpoint(out, MODEL) as kept:
        kept.append([answer("a")], "CPU")
        kept.db.execute("PRAGMA max_page_count=5")
        with pytest.raises(OSError, match="No space left on device") as caught:
            kept.append([answer(f"{i}", *[0.5] * 500) for i in range(20)], "CPU")
        assert caught.value.errno == 28
        assert kept.row("a")[0].ok
        with pytest.raises(KeyError):
            kept.row("0")
    with Checkpoint(out, MODEL) as kept:
        assert kept.row("a")[0].ok
        kept.append([answer("b")], "CPU")


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (
            {"model_sha256": "b" * 64, "pixel_check": "p"},
            r"another model's answers \(aaaaaaaaaaaa, this is bbbbbbbbbbbb\)",
        ),
        ({"model_sha256": "a" * 64, "pixel_check": "q"}, "Pillow decodes or resizes a picture to other pixels"),
    ],
)
def test_answers_of_something_else_are_refused(out: Path, model: dict[str, str], match: str) -> None:
    with Checkpoint(out, MODEL) as kept:
        kept.append([answer("a")], "CPU")
    before = beside(out).read_bytes()
    with pytest.raises(InputError, match=f"{match}; give another --out, or pass --overwrite"):
        Checkpoint(out, model)
    assert beside(out).read_bytes() == before
    with Checkpoint(out, model, overwrite=True) as kept, pytest.raises(KeyError):
        kept.row("a")
    with Checkpoint(out, model) as kept:
        kept.append([answer("b")], "CPU")


def test_a_file_that_nothing_is_known_of_is_never_written_over(out: Path) -> None:
    out.write_text("mine")
    with pytest.raises(InputError, match=r"p\.csv exists but p\.csv\.resume is missing, .*--overwrite"):
        Checkpoint(out, MODEL)
    assert os.listdir(out.parent) == ["p.csv"]
    with Checkpoint(out, MODEL, overwrite=True):
        assert out.read_text() == "mine"
    with sqlite3.connect(out.parent / "other") as db:
        db.execute("CREATE TABLE answers (path TEXT)")
    db.close()
    other = (out.parent / "other").read_bytes()
    for foreign in (b"a line of mine\n", b"x" * 100_000, EARLIER, other):
        beside(out).write_bytes(foreign)
        with pytest.raises(
            InputError, match=r"is damaged, or another version of cxr-fast .*pass --overwrite to predict"
        ):
            Checkpoint(out, MODEL)
        assert beside(out).read_bytes() == foreign
        with Checkpoint(out, MODEL, overwrite=True) as kept:
            assert not kept.holds("a")


def test_a_moved_pair_goes_on(out: Path, image: Path) -> None:
    with Checkpoint(out, MODEL) as kept:
        kept.append([of_file(image)], "CPU")
    other = out.parent / "new" / "q.csv"
    other.parent.mkdir()
    shutil.move(beside(out), beside(other))
    with Checkpoint(other, MODEL) as kept:
        assert kept.holds(str(image))


def test_answers_of_an_earlier_version_are_named_as_such_and_kept(tmp_path: Path) -> None:
    path = beside(tmp_path / "p.csv")
    path.write_text('{"kind": "cxr-fast predictions so far", "schema": 1}\n')
    with (
        pytest.raises(InputError, match=r"in the format of an earlier cxr-fast; .* --overwrite to predict all images"),
        Checkpoint(tmp_path / "p.csv", MODEL),
    ):
        pass
    assert path.read_text().startswith('{"kind"')
