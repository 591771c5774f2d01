"""Rows kept batch by batch: only what is missing or has changed is done again, and no torn line is ever read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.errors import InputError
from cxr_fast.inference.checkpoint import LINES, Resume, beside
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
    with Resume(out, MODEL) as kept:
        for start in range(0, len(results), 2):
            kept.append(results[start : start + 2], "CPU")
    with Resume(out, MODEL) as kept:
        assert len(results) > 2 * LINES
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
    with Resume(out, MODEL) as kept:
        kept.append([answer(path) for path in paths], "CPU")
    with Resume(out, MODEL) as kept:
        assert [kept.row(path)[0].path for path in paths] == paths
    assert beside(out).read_bytes().count(b"\n") == 2


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
    with Resume(out, MODEL) as kept:
        assert not kept.holds(str(image))
        kept.append([of_file(image)], "CPU")
        assert kept.holds(str(image))
    change(image)
    with Resume(out, MODEL) as kept:
        assert kept.holds(str(image)) is same


def test_a_file_of_the_same_time_is_not_read_again(out: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Resume(out, MODEL) as kept:
        kept.append([of_file(image)], "CPU")
        monkeypatch.setattr("cxr_fast.inference.checkpoint.file_sha256", lambda path: pytest.fail("read"))
        assert kept.holds(str(image))


def test_a_file_that_was_young_is_told_by_its_content(out: Path, image: Path) -> None:
    """Changed again within one tick of the clock, it keeps size and time."""
    with Resume(out, MODEL) as kept:
        kept.append([answer(image, sha256=file_sha256(image), size=12, mtime_ns=0)], "CPU")
        assert kept.holds(str(image))
        before = image.stat().st_mtime_ns
        image.write_bytes(b"other bytes!")
        os.utime(image, ns=(before, before))
        assert not kept.holds(str(image))


def test_failures_are_never_held_and_written_once(out: Path) -> None:
    bad = Result(path="bad.png", reason="missing", message="bad.png: no such file")
    with Resume(out, MODEL) as kept:
        kept.append([bad], "CPU")
        size = beside(out).stat().st_size
        kept.append([bad], "CPU")
        assert beside(out).stat().st_size == size
        assert not kept.holds("bad.png")
        kept.append([Result(path="bad.png", reason="empty", message="bad.png: no bytes")], "CPU")
        assert kept.row("bad.png")[0].reason == "empty"


def test_the_newest_answer_counts(out: Path, image: Path) -> None:
    with Resume(out, MODEL) as kept:
        kept.append([answer(image, 0.5)], "CPU")
        kept.append([answer("b.png", 0.6), answer(image, 0.7)], "CUDA")
    with Resume(out, MODEL) as kept:
        found, by = kept.row(str(image))
        assert (found.probabilities, by) == (np.float32(0.7), "CUDA")


def test_cut_anywhere_whole_lines_remain(out: Path) -> None:
    """Every length a kill can leave: what is read is a prefix of the batches, and one can go on from it."""
    with Resume(out, MODEL) as kept:
        for i in range(3):
            kept.append([answer(f"{i}a"), answer(f"{i}b")], "CPU")
    data = beside(out).read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for length in range(len(data) + 1):
        beside(out).write_bytes(data[:length])
        with Resume(out, MODEL) as kept:
            whole = sum(end <= length for end in ends[1:])
            for i in range(3):
                for name in (f"{i}a", f"{i}b"):
                    if i < whole:
                        assert kept.row(name)[0].ok
                    else:
                        with pytest.raises(KeyError):
                            kept.row(name)
            kept.append([answer(f"{i}{x}") for i in range(whole, 3) for x in "ab"], "CPU")
        with Resume(out, MODEL) as kept:
            assert all(kept.row(f"{i}{x}")[0].ok for i in range(3) for x in "ab")


def test_a_damaged_line_ends_what_is_believed(out: Path) -> None:
    with Resume(out, MODEL) as kept:
        for name in "abc":
            kept.append([answer(name)], "CPU")
    lines = beside(out).read_bytes().splitlines(keepends=True)
    for changed in (lines[2].replace(b"0.9", b"0.8"), b"\0" * len(lines[2]), b"\n"):
        beside(out).write_bytes(b"".join([*lines[:2], changed, lines[3]]))
        with Resume(out, MODEL) as kept:
            assert kept.row("a")[0].ok
            with pytest.raises(KeyError):
                kept.row("b")
            with pytest.raises(KeyError):
                kept.row("c")


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
    with Resume(out, MODEL) as kept:
        kept.append([answer("a")], "CPU")
    before = beside(out).read_bytes()
    with pytest.raises(InputError, match=f"{match}; give another --out, or pass --overwrite"):
        Resume(out, model)
    assert beside(out).read_bytes() == before
    with Resume(out, model, overwrite=True) as kept, pytest.raises(KeyError):
        kept.row("a")
    with Resume(out, model) as kept:
        kept.append([answer("b")], "CPU")


def test_a_file_that_nothing_is_known_of_is_never_written_over(out: Path) -> None:
    out.write_text("mine")
    with pytest.raises(InputError, match=r"p\.csv is there, and p\.csv\.resume.* is not; .*--overwrite"):
        Resume(out, MODEL)
    assert os.listdir(out.parent) == ["p.csv"]
    with Resume(out, MODEL, overwrite=True):
        assert out.read_text() == "mine"
    for foreign in (b"a line of mine\n", b"x" * 100_000):
        beside(out).write_bytes(foreign)
        with pytest.raises(InputError, match="is damaged or not of ours"):
            Resume(out, MODEL)
        assert beside(out).read_bytes() == foreign


def test_another_schema_is_refused_by_who_wrote_it(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("cxr_fast.inference.checkpoint.SCHEMA", 99)
        with Resume(out, MODEL):
            pass
    with pytest.raises(InputError, match="was written by cxr-fast "):
        Resume(out, MODEL)


def test_a_moved_pair_goes_on(out: Path, image: Path) -> None:
    with Resume(out, MODEL) as kept:
        kept.append([of_file(image)], "CPU")
    other = out.parent / "new" / "q.csv"
    other.parent.mkdir()
    shutil.move(beside(out), beside(other))
    with Resume(other, MODEL) as kept:
        assert kept.holds(str(image))
