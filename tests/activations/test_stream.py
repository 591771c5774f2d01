"""Streamed batches are the rows of the files, in the order asked, whatever is read together; memory stays flat."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.activations import stream
from cxr_fast.activations.stream import Stream, Wanted, plan_reads
from cxr_fast.errors import InputError
from tests.helpers import states

LENGTHS, VIEWS, SHAPE = (7, 1, 15), 2, (3, 4)
N, SIZE = sum(LENGTHS), 2 * 3 * 4


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> list[np.memmap]:
    return written(tmp_path_factory.mktemp("maps"))


def written(folder: Path) -> list[np.memmap]:
    """Three files, rows behind headers of unlike lengths."""
    values, out = np.random.default_rng(0), []
    for i, n in enumerate(LENGTHS):
        path, head = folder / f"shard{i}", 10 + 6 * i
        rows = values.standard_normal((n, VIEWS, *SHAPE)).astype(np.float16)
        path.write_bytes(b"h" * head + rows.tobytes())
        out.append(np.memmap(path, np.float16, "r", offset=head, shape=rows.shape))
    return out


def whole(maps: list[np.memmap]) -> np.ndarray:
    return np.concatenate(maps)


def wanted(pairs: list[tuple[int, int]]) -> Wanted:
    found = np.array(pairs, np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


PAIR = st.tuples(st.integers(0, N - 1), st.integers(0, VIEWS - 1))
BATCHES = st.lists(st.lists(PAIR, max_size=9).map(wanted), max_size=14)


@settings(max_examples=150, deadline=None)
@given(
    batches=BATCHES,
    window=st.integers(1, 30).map(lambda pieces: pieces * SIZE - 1),
    merge=st.integers(1, 6 * SIZE),
    gap=st.integers(0, 3 * SIZE),
    pieces=st.integers(1, 5),
)
def test_whatever_is_read_together_the_batches_are_the_rows(
    maps: list[np.memmap], batches: list[Wanted], window: int, merge: int, gap: int, pieces: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MERGE", merge), ("GAP", gap), ("PIECES", pieces)):
            patch.setattr(stream, name, value)
        source = Stream(maps, window=window)
        got = [values.copy() for values in source.ahead(iter(batches))]
        alone = [source.read(*batch) for batch in batches]
    want = [whole(maps)[rows, views] for rows, views in batches]
    for found in (got, alone):
        assert [values.shape for values in found] == [values.shape for values in want]
        assert [values.tobytes() for values in found] == [values.tobytes() for values in want]


@settings(max_examples=300)
@given(
    places=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40)), max_size=60),
    merge=st.integers(1, 100),
    gap=st.integers(0, 30),
    pieces=st.integers(1, 9),
)
def test_a_plan_reads_every_piece_once_and_no_read_is_larger_than_stated(
    places: list[tuple[int, int]], merge: int, gap: int, pieces: int
) -> None:
    size = 10
    part, start = (np.array([p[i] for p in places], np.int64) for i in range(2))
    start *= size
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MERGE", merge), ("GAP", gap), ("PIECES", pieces)):
            patch.setattr(stream, name, value)
        found = plan_reads(part, start, size)
    keys = list(zip(found.part.tolist(), found.start.tolist(), strict=True))
    assert keys == sorted(set(zip(part.tolist(), start.tolist(), strict=True)))
    assert sorted([*found.slot, *found.repeats]) == list(range(len(places)))
    for slot, of in zip(found.repeats, found.of, strict=True):
        assert (part[slot], start[slot]) == (part[of], start[of])
        assert of in found.slot
    assert found.edges[-1] == len(keys)
    for a, b in pairwise(found.edges):
        assert 0 < b - a <= pieces
        assert len({p for p, _ in keys[a:b]}) == 1
        starts = [s for _, s in keys[a:b]]
        assert starts[-1] - starts[0] < merge
        assert all(0 <= after - before - size <= gap for before, after in pairwise(starts))


def test_neighbours_are_one_read_and_strangers_are_not() -> None:
    size = 1 << 20
    together = plan_reads(np.zeros(4, np.int64), np.array([3, 1, 2, 0]) * size, size)
    assert together.edges.tolist() == [0, 4]
    assert together.slot.tolist() == [3, 1, 2, 0]
    apart = plan_reads(np.zeros(3, np.int64), np.array([0, 2, 4]) * size, size)
    assert apart.edges.tolist() == [0, 1, 2, 3]
    long = plan_reads(np.zeros(9, np.int64), np.arange(9) * size, size)
    assert long.edges.tolist() == [0, 4, 8, 9]


def test_two_windows_are_in_memory_and_no_more_however_long_the_epoch(maps: list[np.memmap]) -> None:
    made: list[int] = []

    def allocate(size: int) -> np.ndarray:
        made.append(size)
        return np.empty(size, np.uint8)

    source = Stream(maps, window=8 * SIZE, allocate=allocate)
    batches = [wanted([(i % N, i % 2), ((3 * i) % N, 0)]) for i in range(400)]
    for _ in range(3):
        assert sum(1 for _ in source.ahead(iter(batches))) == 400
    assert made == [8 * SIZE] * 2


def test_a_window_is_settled_before_it_is_written_again(maps: list[np.memmap]) -> None:
    """As long as a device may still be copying from it, a window must hold what it held."""
    held: list[tuple[np.ndarray, bytes]] = []

    def settle() -> None:
        assert all(values.tobytes() == before for values, before in held)
        settled.append(len(held))
        held.clear()

    settled: list[int] = []
    source = Stream(maps, window=4 * SIZE, settle=settle)
    for values in source.ahead(wanted([(i % N, 0), (i % N, 1)]) for i in range(30)):
        held.append((values, values.tobytes()))
    assert settled == [2] * 15 + [0]


def test_two_that_read_at_once_do_not_share_memory(maps: list[np.memmap]) -> None:
    source, array = Stream(maps, window=6 * SIZE), whole(maps)
    batches = [[wanted([((7 * i + k) % N, k), (i % N, 1 - k)]) for i in range(100)] for k in range(2)]
    pairs = zip(*(source.ahead(iter(own)) for own in batches), strict=True)
    for i, found in enumerate(pairs):
        for own, values in zip(batches, found, strict=True):
            assert np.array_equal(values, array[own[i]])


def test_a_call_that_gives_less_than_asked_is_called_again(
    maps: list[np.memmap], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    preadv = os.preadv

    def stingy(fd: int, buffers: list[Any], offset: int) -> int:
        calls.append(offset)
        return preadv(fd, [buffers[0][: 1 + len(calls) % 17]], offset)

    monkeypatch.setattr(stream.os, "preadv", stingy)
    rows = np.random.default_rng(0).permutation(N)
    assert np.array_equal(Stream(maps, window=1000).read(rows, rows % 2), whole(maps)[rows, rows % 2])
    assert len(calls) > N


# Errors.


def test_a_short_file_is_named_among_several(tmp_path: Path) -> None:
    maps = written(tmp_path)
    source = Stream(maps, window=4 * SIZE)
    path = Path(str(maps[2].filename))
    os.truncate(path, path.stat().st_size - 1)
    good = [wanted([(i, i % 2)]) for i in range(N - 1)]
    assert len(list(source.ahead(iter(good)))) == N - 1
    with pytest.raises(InputError) as caught:
        for _ in source.ahead(iter([*good, wanted([(N - 1, 1)])])):
            pass
    assert str(caught.value) == f"{path}: ends before its last row; run `cxrfast verify`."
    assert len(list(source.ahead(iter(good)))) == N - 1, "an error leaves the stream as it was"


def test_a_disk_that_fails_is_one_line_with_the_file(maps: list[np.memmap], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    source = Stream(maps, window=4 * SIZE)
    monkeypatch.setattr(stream.os, "preadv", broken)
    for ask in (lambda: source.read(*wanted([(8, 0)])), lambda: next(source.ahead([wanted([(8, 0)])]))):
        with pytest.raises(InputError) as caught:
            ask()
        assert str(caught.value) == f"{maps[2].filename}: Input/output error; run `cxrfast verify`."


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    maps = written(tmp_path)
    os.unlink(str(maps[1].filename))
    with pytest.raises(InputError, match=r"shard1: No such file or directory\.$"):
        Stream(maps, window=100)


@pytest.mark.parametrize("pair", [(N, 0), (-1, 0), (0, VIEWS), (0, -1)])
def test_a_row_outside_is_refused_and_nothing_else_is_read(maps: list[np.memmap], pair: tuple[int, int]) -> None:
    with pytest.raises(IndexError):
        Stream(maps, window=100).read(*wanted([(0, 0), pair]))


def test_one_who_stops_early_leaves_no_read_that_writes_later(
    maps: list[np.memmap], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, preadv = threading.Event(), os.preadv
    begun, ended = list[int](), list[int]()

    def slow(fd: int, buffers: Any, offset: int) -> int:
        begun.append(offset)
        assert gate.wait(states.PATIENCE)
        got = preadv(fd, buffers, offset)
        ended.append(offset)
        return got

    source = Stream(maps, window=4 * SIZE)
    batches: Iterator[Wanted] = (wanted([(2 * i % N, 0)]) for i in range(100))
    windows, start = list[stream.Window](), source._start

    def started(*arguments: Any) -> stream.Window:
        windows.append(start(*arguments))
        return windows[-1]

    monkeypatch.setattr(source, "_start", started)
    ahead = source.ahead(batches)
    next(ahead)
    states.wait_until(lambda: all(f.done() for w in windows for f in w.under_way), "an end of both windows' reads")
    assert len(windows) == 2
    monkeypatch.setattr(stream.os, "preadv", slow)
    for _ in range(4):  # the fifth batch begins the second window, and the third is asked for
        next(ahead)
    states.wait_until(lambda: begun, "a read under way")
    waits = Future.exception

    def waited(self: Future[None], *arguments: Any) -> Any:
        gate.set()  # only when somebody waits for it does a read end
        return waits(self, *arguments)

    monkeypatch.setattr(Future, "exception", waited)
    ahead.close()
    assert begun
    assert sorted(ended) == sorted(begun)
