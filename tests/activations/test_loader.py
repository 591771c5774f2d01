"""Wherever activations live, the trainer gets the same bytes; a file cut short is an error and never a number."""

from __future__ import annotations

import dataclasses
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.activations import file as store
from cxr_fast.activations import loader
from cxr_fast.activations.cache import JoinedRows
from cxr_fast.activations.loader import (
    SHARE,
    Activations,
    choose_residency,
    in_file,
)
from cxr_fast.config import digest
from cxr_fast.errors import InputError
from cxr_fast.system import hardware
from cxr_fast.training.folds.fold import Fold
from cxr_fast.training.folds.head_fold import HeadFold
from tests.helpers import toys
from tests.helpers.toys import CPU, make, same

RESIDENCIES = ("device", "host", "stream")
SHAPES = ((2, 5, 8), (2, 12), (1, 3, 4))
N = 23


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def written(path: Path, values: np.ndarray) -> store.ActivationFile:
    """A real activation file of these values."""
    n = len(values)
    header = store.Header(
        meta={"fingerprint": digest({}), "fingerprint_parts": {}},
        shape=values.shape,
        dtype=str(values.dtype),
        images=tuple(f"{i}.png" for i in range(n)),
        groups=tuple(f"p{i}" for i in range(n)),
        studies=("",) * n,
        views=("",) * n,
        classes=("Edema",),
        labels=np.zeros((n, 1), np.int8),
    )
    store.create(path, header)
    with store.Writer(path) as writer:
        writer.rows(range(n), values, ["ab" * 32] * n, [None] * n)
        writer.finish()
    return store.ActivationFile(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[tuple[int, ...], str], store.ActivationFile]:
    folder, random = tmp_path_factory.mktemp("a"), np.random.default_rng(0)
    return {
        (shape, dtype): written(folder / f"{i}{dtype}.h5", random.standard_normal((N, *shape)).astype(dtype))
        for i, shape in enumerate(SHAPES)
        for dtype in ("float16", "float32")
    }


def split(folder: Path, array: np.ndarray, cuts: list[int]) -> JoinedRows:
    """The same rows in several files, each at another offset."""
    parts = []
    for i, part in enumerate(np.split(np.asarray(array), cuts)):
        path = folder / f"part{i}"
        path.write_bytes(b"x" * (2048 + 8 * i) + part.tobytes() + b"end")
        parts.append(np.memmap(path, array.dtype, "r", offset=2048 + 8 * i, shape=part.shape))
    return JoinedRows(parts)


@pytest.fixture(scope="module")
def several(files: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[tuple[int, ...], str], JoinedRows]:
    """What `files` has, in four files each."""
    folders = {key: tmp_path_factory.mktemp("several") for key in files}
    return {key: split(folders[key], file.activations, [1, 9, 10]) for key, file in files.items()}


def batch(rows: list[int], views: list[int]) -> loader.Batch:
    return torch.tensor(rows, dtype=torch.long), torch.tensor(views, dtype=torch.long)


@st.composite
def requests(draw: Any) -> tuple[tuple[int, ...], list[loader.Batch]]:
    """A shape, and up to 12 batches of rows (any order, repeats too) and views of it."""
    shape = draw(st.sampled_from(SHAPES))
    entry = st.tuples(st.integers(0, N - 1), st.integers(0, shape[0] - 1))
    batches = draw(st.lists(st.lists(entry, min_size=1, max_size=9), max_size=12))
    return shape, [batch([r for r, _ in b], [v for _, v in b]) for b in batches]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("residency", RESIDENCIES)
@settings(max_examples=40, deadline=None)
@given(request=requests())
def test_every_residency_gives_the_bytes_of_the_array_as_float32(
    files: Any, several: Any, residency: str, dtype: str, request: tuple[tuple[int, ...], list[loader.Batch]]
) -> None:
    shape, batches = request
    array = files[shape, dtype].activations
    want = [np.asarray(array[rows.numpy(), views.numpy()], np.float32) for rows, views in batches]
    for values in (array, several[shape, dtype]):
        source = Activations(values, CPU, residency=residency)
        assert (source.residency, source.views) == (residency, shape[0])
        for got in ([source.gather(*b) for b in batches], list(source.ahead(iter(batches)))):
            assert [g.dtype for g in got] == [torch.float32] * len(batches)
            assert [g.numpy().tobytes() for g in got] == [w.tobytes() for w in want]
            assert [tuple(g.shape) for g in got] == [w.shape for w in want]


def test_several_files_count_as_one_file_where_each_is_a_whole_map(several: Any) -> None:
    rows = several[SHAPES[0], "float16"]
    assert in_file(rows)
    assert not in_file(JoinedRows([rows.parts[0], rows.parts[1][1:]]))
    assert not in_file(JoinedRows([rows.parts[0], np.asarray(rows.parts[1])]))
    with pytest.raises(InputError, match="--residency stream: these activations are not in a file"):
        Activations(JoinedRows([np.asarray(rows.parts[1])]), CPU, residency="stream")


def test_a_plain_map_with_an_offset_is_streamed_from_there(tmp_path: Path) -> None:
    values = np.arange(4 * 2 * 3, dtype=np.float32).reshape(4, 2, 3)
    (tmp_path / "raw").write_bytes(b"x" * 20 + values.tobytes())
    array = np.memmap(tmp_path / "raw", np.float32, "r", offset=20, shape=values.shape)
    got = Activations(array, CPU, residency="stream").gather(*batch([3, 0], [1, 0]))
    assert np.array_equal(got.numpy(), values[[3, 0], [1, 0]])


def test_a_part_of_a_map_is_not_streamed_from_the_start_of_its_file(files: Any) -> None:
    array = files[SHAPES[0], "float32"].activations
    for part in (array[3:], array[:, :1], array[::2], np.asarray(array), array.astype(np.float16)):
        with pytest.raises(InputError, match="--residency stream: these activations are not in a file"):
            Activations(part, CPU, residency="stream")
        assert Activations(part, CPU).residency == "host"
    got = Activations(array[3:], CPU).gather(*batch([0], [1]))
    assert np.array_equal(got[0].numpy(), array[3, 1])


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_what_is_gathered_is_a_copy(files: Any, residency: str) -> None:
    source = Activations(files[SHAPES[1], "float32"].activations, CPU, residency=residency)
    first = source.gather(*batch([1], [0]))
    first.zero_()
    assert source.gather(*batch([1], [0])).any()


# Reading ahead.


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_consumer_that_stops_early_leaves_no_thread_behind(files: Any, residency: str) -> None:
    before = set(threading.enumerate())
    array = files[SHAPES[0], "float16"].activations
    source = Activations(array, CPU, residency=residency, window=3 * array[0, 0].nbytes)
    asked: list[int] = []

    def batches() -> Iterator[loader.Batch]:
        for i in range(1000):
            asked.append(i)
            yield batch([i % N], [0])

    ahead = source.ahead(batches())
    for i in range(2):
        assert torch.equal(next(ahead), source.gather(*batch([i], [0])))
    ahead.close()
    # Two windows of three batches each, and the batch that is one too many for the second.
    limit = 7 if residency == "stream" else 2 + loader.DEPTH
    assert len(asked) <= limit, "no more is read ahead than so many batches"
    del ahead, source
    gc.collect()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_nothing_asked_is_nothing_given(files: Any, residency: str) -> None:
    source = Activations(files[SHAPES[0], "float16"].activations, CPU, residency=residency)
    assert list(source.ahead(iter(()))) == []
    assert len(source.gather(*batch([], []))) == 0


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_an_error_of_whoever_asks_comes_through(files: Any, residency: str) -> None:
    source = Activations(files[SHAPES[0], "float16"].activations, CPU, residency=residency)

    def batches() -> Iterator[loader.Batch]:
        yield batch([0], [0])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(source.ahead(batches()))


def test_the_file_is_closed_with_its_last_user(files: Any) -> None:
    source = Activations(files[SHAPES[0], "float16"].activations, CPU, residency="stream")
    assert source.stream is not None
    (fd,) = source.stream._fds
    os.fstat(fd)
    del source
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# A file cut short.


def test_a_file_cut_short_is_an_error_naming_it_and_no_garbage(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((N, 2, 5, 8)).astype(np.float16)
    path = tmp_path / "a.h5"
    file = written(path, values)
    source = Activations(file.activations, CPU, residency="stream")
    os.truncate(path, file.offset + values.nbytes - 2)
    for answer in (lambda b: source.gather(*b), lambda b: next(iter(source.ahead([b])))):
        assert np.array_equal(answer(batch([0, N - 2], [1, 1])).numpy(), values[[0, N - 2], 1].astype(np.float32))
        for bad in ([N - 1], [0, N - 1]):
            with pytest.raises(InputError) as caught:
                answer(batch(bad, [1] * len(bad)))
            assert str(path) in str(caught.value)
            assert "ends before its last row" in str(caught.value)
            assert "\n" not in str(caught.value)


def test_a_file_already_short_is_refused_when_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    file = written(path, np.ones((N, 2, 5, 8), np.float16))
    os.truncate(path, file.offset + 100)
    with pytest.raises(InputError) as caught:
        Activations(store.ActivationFile(path).activations, CPU)
    assert str(path) in str(caught.value)


def test_a_fold_streaming_from_a_file_cut_short_ends_with_that_error(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    file = written(path, toys.embeddings())
    for kind in (Fold, HeadFold):
        fold = make(kind, activations=Activations(file.activations, CPU, residency="stream"))
        size = path.stat().st_size
        os.truncate(path, file.offset + file.activations.nbytes // 2)
        with pytest.raises(InputError, match="ends before its last row"):
            fold.run_epoch()
        with path.open("r+b") as raw:
            raw.truncate(size)
            raw.seek(file.offset)
            raw.write(toys.embeddings().tobytes())


# Choosing.


def test_streaming_what_is_in_no_file_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"^--residency stream: these activations are not in a file\.$"):
        Activations(np.zeros((3, 1, 4), np.float32), CPU, residency="stream")


def test_a_device_too_small_is_an_error_with_its_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loader.torch, "empty", full)
    with pytest.raises(InputError, match=r"^--residency device: 0\.0 GB do not fit on cpu; use --residency host"):
        Activations(np.zeros((3, 1, 4), np.float32), CPU, residency="device")


@settings(max_examples=200)
@given(size=st.integers(0, 2**40), host=st.integers(0, 2**40), gpu=st.integers(0, 2**40), in_file=st.booleans())
def test_the_first_place_of_which_four_fifths_suffice_is_taken(size: int, host: int, gpu: int, in_file: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "memory_available", lambda: host)
        patch.setattr(loader.torch.cuda, "mem_get_info", lambda _: (gpu, 2**41))
        rest = "host" if not in_file or size < SHARE * host else "stream"
        assert choose_residency(size, CPU, in_file) == rest
        assert choose_residency(size, torch.device("cuda"), in_file) == ("device" if size < SHARE * gpu else rest)


def test_auto_is_what_choose_says(files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    array = files[SHAPES[0], "float16"].activations
    for free, want, where in ((1e12, "host", "memory map"), (10.0, "stream", "read ahead from the file")):
        monkeypatch.setattr(hardware, "memory_available", lambda free=free: free)
        source = Activations(array, CPU)
        assert (source.residency, source.where) == (want, where)
    assert Activations(np.asarray(array), CPU).residency == "host"
    assert Activations(array, CPU, residency="device").where == "copied to cpu"


# Training.


@pytest.mark.parametrize("shuffle", ["full", "block"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", [Fold, HeadFold])
def test_training_from_each_residency_is_the_same_to_the_last_bit(
    kind: type[Fold], dtype: str, shuffle: Any, tmp_path: Path
) -> None:
    array = written(tmp_path / "a.h5", toys.embeddings(dtype)).activations
    spec = dataclasses.replace(toys.SPEC, shuffle=shuffle, shuffle_block=3, shuffle_window=2)
    folds = [
        make(kind, spec, activations=Activations(values, CPU, residency=residency))
        for values in (array, split(tmp_path, array, [5, 6, 20]))
        for residency in RESIDENCIES
    ]
    for fold in folds:
        for _ in range(2):
            fold.run_epoch()
    for other in folds[1:]:
        assert same(folds[0], other)
    assert folds[0].history[-1].train_loss != folds[0].history[0].train_loss
