"""The activation file: what is written is read back, by us and by h5py alone, and nothing half-done passes for done."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.activations import file as store
from cxr_fast.config import digest
from cxr_fast.errors import InputError, SchemaError

HASH = "ab" * 32
PARTS = {"cut": "blocks.4", "mean": [0.5, 0.25]}


def header(
    n: int = 6, *, shape: tuple[int, ...] = (2, 5, 8), dtype: str = "float16", **changes: object
) -> store.Header:
    base = store.Header(
        meta={"fingerprint": digest(PARTS), "fingerprint_parts": PARTS, "block": 4},
        shape=(n, *shape),
        dtype=dtype,
        images=tuple(f"images/é{i}.png" for i in range(n)),
        groups=tuple(f"p{i // 2}" for i in range(n)),
        studies=tuple(f"s{i}" for i in range(n)),
        views=tuple("Frontal" if i % 2 else "" for i in range(n)),
        classes=("Edema", "Mass"),
        labels=np.array([[i % 2, -1] for i in range(n)], np.int8),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def values(n: int = 6, shape: tuple[int, ...] = (2, 5, 8), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float16)


def write(path: Path, data: np.ndarray, errors: list[str | None] | None = None) -> None:
    store.create(path, header(len(data), shape=data.shape[1:]))
    with store.Writer(path) as writer:
        writer.rows(range(len(data)), data, [HASH] * len(data), errors or [None] * len(data))
        writer.finish()


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path, data = tmp_path / "a.h5", values()
    write(path, data)
    file = store.ActivationFile(path)
    want = header()
    assert np.array_equal(file.activations, data)
    for name in ("shape", "dtype", "images", "groups", "studies", "views", "classes", "meta"):
        assert getattr(file.header, name) == getattr(want, name), name
    assert np.array_equal(file.header.labels, want.labels)
    assert file.ok.all()
    assert file.sha256 == (HASH,) * 6
    assert list(file.damaged()) == []
    assert np.allclose(file.absmax, np.abs(data).max(axis=(1, 2, 3)))


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(7)), cuts=st.lists(st.integers(1, 6), max_size=3))
def test_rows_may_come_in_any_order_and_grouping(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], cuts: list[int]
) -> None:
    path, data = tmp_path_factory.mktemp("a") / "a.h5", values(7)
    store.create(path, header(7))
    with store.Writer(path) as writer:
        for part in np.split(np.array(order), sorted(set(cuts))):
            writer.rows(part.tolist(), data[part], [f"{i:064d}" for i in part], [None] * len(part))
        writer.finish()
    file = store.ActivationFile(path)
    assert np.array_equal(file.activations, data)
    assert file.sha256 == tuple(f"{i:064d}" for i in range(7))
    assert file.crc32.tolist() == [zlib.crc32(row.tobytes()) for row in data]


def test_h5py_alone_reads_it(tmp_path: Path) -> None:
    path, data = tmp_path / "a.h5", values()
    write(path, data, [None, None, None, "truncated: b.png: cut", None, None])
    with h5py.File(path) as file:
        assert file.attrs["kind"] == "cxr-fast activations"
        assert file.attrs["schema"] == 1
        assert json.loads(file.attrs["classes"]) == ["Edema", "Mass"]
        assert file.attrs["axes"] == "N V T D"
        ok = file["done"][:] == 1
        assert ok.tolist() == [True, True, True, False, True, True]
        assert np.array_equal(file["activations"][0], data[0])
        assert np.array_equal(file["labels"][:][ok][:, 0], [0, 1, 0, 0, 1])
        assert file["id"][0].decode() == "images/é0.png"
        assert file["error"][3].decode().startswith("truncated: ")
        assert file["activations"].chunks is None, "contiguous"
        assert file["activations"].id.get_offset() is not None


def test_failed_rows_are_zero_and_not_ok(tmp_path: Path) -> None:
    path, data = tmp_path / "a.h5", values()
    write(path, data, [None, "corrupt: x", None, None, None, None])
    file = store.ActivationFile(path)
    assert not file.activations[1].any()
    assert file.ok.tolist() == [True, False, True, True, True, True]
    assert file.errors[1] == "corrupt: x"


def test_an_unfinished_file_has_no_final_name_and_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    store.create(path, header())
    assert not path.exists()
    with store.Writer(path) as writer:
        writer.rows([0], values(1), [HASH], [None])
        with pytest.raises(AssertionError):
            writer.finish()
    with pytest.raises(InputError, match=r"5 of 6 rows are not encoded yet.*same"):
        store.ActivationFile(store.partial_path(path))
    assert store.ActivationFile(store.partial_path(path), partial=True).ok.sum() == 1


def test_a_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    path, data = tmp_path / "a.h5", values()
    write(path, data)
    offset = store.ActivationFile(path).offset
    with open(path, "r+b") as file:
        file.seek(offset + 3 * data[0].nbytes + 7)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))
    assert list(store.ActivationFile(path).damaged()) == [(3, "checksum")]


def test_rows_that_are_not_finite_are_named(tmp_path: Path) -> None:
    path, data = tmp_path / "a.h5", values()
    data[2, 0, 0, 0] = np.nan
    write(path, data)
    assert list(store.ActivationFile(path).damaged()) == [(2, "not finite")]


def test_done_bits_are_set_only_after_the_rows_bytes_were_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, log = tmp_path / "a.h5", []
    store.create(path, header())
    with store.Writer(path) as writer:
        put, sync = writer._put, os.fdatasync
        monkeypatch.setattr(writer, "_put", lambda name, rows, array: (log.append(name), put(name, rows, array)))
        monkeypatch.setattr(os, "fdatasync", lambda fd: (log.append("sync"), sync(fd)))
        writer.rows([0, 1], values(2), [HASH] * 2, [None] * 2)
    assert log.index("activations") < log.index("sync") < log.index("done")
    assert set(log[: log.index("sync")]) == {"activations", "crc32", "absmax", "sha256", "error"}


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = tmp_path / "a.h5", values()
    store.create(path, header())
    with store.Writer(path) as writer:
        writer.rows([0, 1], data[:2], [HASH] * 2, [None] * 2)

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(InputError, match="No space left on device") as caught:
                writer.rows([2], data[2:3], [HASH], [None])
        assert len(str(caught.value).splitlines()) <= 2
        assert writer.state.tolist() == [1, 1, 0, 0, 0, 0]
    with store.Writer(path) as writer:
        writer.rows([2, 3, 4, 5], data[2:], [HASH] * 4, [None] * 4)
        writer.finish()
    assert np.array_equal(store.ActivationFile(path).activations, data)


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    huge = header(shape=(2, 1 << 20, 1 << 20))
    with pytest.raises(InputError, match=r"needs [\d.]+ [kMG]B; [\d.]+ [kMG]B are free"):
        store.create(tmp_path / "a.h5", huge)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["text", "empty", "other hdf5", "schema", "missing", "cut"])
def test_what_is_not_ours_is_one_line(tmp_path: Path, kind: str) -> None:
    path, error = tmp_path / "a.h5", InputError
    if kind == "text":
        path.write_text("hello")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "other hdf5":
        with h5py.File(path, "w") as file:
            file["x"] = 1
    elif kind == "schema":
        write(path, values())
        with h5py.File(path, "a") as file:
            file.attrs["schema"] = 99
            file.attrs["written_by"] = "cxr-fast 7.0"
        error = SchemaError
    elif kind == "cut":
        write(path, values())
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(error) as caught:
        store.ActivationFile(path)
    text = str(caught.value)
    assert str(path) in text
    assert len(text.splitlines()) <= 2
    if kind == "schema":
        assert "99" in text
        assert "cxr-fast 7.0" in text


def test_readers_pickle(tmp_path: Path) -> None:
    path, data = tmp_path / "a.h5", values()
    write(path, data)
    file = store.ActivationFile(path)
    assert file.activations.shape == data.shape
    again = pickle.loads(pickle.dumps(file))
    assert np.array_equal(again.activations, data)


def test_what_a_process_killed_while_creating_leaves_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    left = store.partial_path(path).with_name("a.h5.partial.new")
    left.write_bytes(b"half a header")
    write(path, values())
    assert np.array_equal(store.ActivationFile(path).activations, values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5"]


# ------------------------------------------------------------------ readers and writers

READ = """
import sys
import numpy as np
from cxr_fast.activations.file import ActivationFile
rows = ActivationFile(sys.argv[1]).activations[2:4]
print(rows.sum(), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has part of a complete file mapped, and nothing else of it."""
    write(tmp_path / "a.h5", values())
    command = [sys.executable, "-c", READ, str(tmp_path / "a.h5")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip()
        yield process
        process.kill()


@pytest.mark.kill
def test_a_file_that_another_process_reads_is_not_reopened(tmp_path: Path, reader: subprocess.Popen[str]) -> None:
    path = tmp_path / "a.h5"
    before = path.read_bytes()
    with pytest.raises(InputError, match="is being read by another process; wait for it") as caught:
        store.reopen(path)
    assert len(str(caught.value).splitlines()) == 1
    assert (path.read_bytes(), [p.name for p in tmp_path.iterdir()]) == (before, ["a.h5"])
    assert np.array_equal(store.ActivationFile(path).activations, values()), "other readers are welcome"
    reader.kill()
    reader.wait()
    store.reopen(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5.partial"]


def test_h5py_alone_counts_as_a_reader(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", values())
    with h5py.File(tmp_path / "a.h5"), pytest.raises(InputError, match="is being read"):
        store.reopen(tmp_path / "a.h5")
    store.reopen(tmp_path / "a.h5")


HOLD = """
import sys
import h5py
from cxr_fast.activations.file import ActivationFile
path, mode = sys.argv[1:]
file = h5py.File(path, mode)
print(ActivationFile(path).header.shape[0], flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_file_that_plain_h5py_has_open_is_read_here_and_there(tmp_path: Path, mode: str) -> None:
    """A notebook that opened the cache by `h5py.File(path)`, as docs/reference/cache_file.md shows, and then by us."""
    path = tmp_path / "a.h5"
    write(path, values())
    command = [sys.executable, "-c", HOLD, str(path), mode]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "6\n", "the process that holds it"
        assert store.ActivationFile(path).ok.all(), "another process"
        process.communicate("\n", timeout=60)


@pytest.mark.parametrize("locking", [None, False, "best-effort", True])
def test_any_locking_of_an_open_file_is_taken_up(tmp_path: Path, locking: object) -> None:
    path = tmp_path / "a.h5"
    write(path, values())
    with h5py.File(path, locking=locking):
        assert np.array_equal(store.ActivationFile(path).activations, values())


def test_a_locking_that_cannot_be_taken_up_is_not_called_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.h5"
    write(path, values())

    def refuse(*_: object, **__: object) -> None:
        raise OSError("Unable to synchronously open file (file locking flag values don't match)")

    monkeypatch.setattr(store.h5py, "File", refuse)
    with pytest.raises(InputError, match="has it open through h5py already; close that"):
        store.ActivationFile(path)


def test_the_lock_lives_as_long_as_the_last_array(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path, values())
    file = store.ActivationFile(path)
    part = file.activations[1:3, 0]
    del file
    with pytest.raises(InputError, match="is being read"):
        store.reopen(path)
    del part
    store.reopen(path)


def test_what_only_looks_at_the_header_stops_nobody_and_is_not_stopped(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path, values())
    looked = store.ActivationFile(path)
    store.reopen(path)
    with store.Writer(path) as writer:
        writer.forget([3])
        assert store.ActivationFile(store.partial_path(path), partial=True).ok.sum() == 5
        with pytest.raises(InputError, match="is being written"):
            _ = store.ActivationFile(store.partial_path(path), partial=True).activations
        with pytest.raises(InputError, match="is gone since"):
            _ = looked.activations
        writer.rows([3], values(1, seed=1), [HASH], [None])
        writer.finish()
    with pytest.raises(InputError, match="written again since"):
        _ = looked.activations
    assert np.array_equal(store.ActivationFile(path).activations[3], values(1, seed=1)[0])


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    write(tmp_path / "a.h5", values())
    held = store.ActivationFile(tmp_path / "a.h5").activations
    store.reopen(tmp_path / "a.h5")
    assert held.shape == values().shape


@pytest.mark.parametrize("change", ["a part", "the fingerprint", "no parts"])
def test_a_file_changed_by_hand_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.h5"
    write(path, values())
    with h5py.File(path, "a") as file:
        meta = json.loads(file.attrs["meta"])
        if change == "a part":
            meta["fingerprint_parts"]["cut"] = "blocks.3"
        elif change == "no parts":
            del meta["fingerprint_parts"]
        else:
            meta["fingerprint"] = "0" * 64
        file.attrs["meta"] = json.dumps(meta)
    for read in (store.ActivationFile, store.read_header):
        with pytest.raises(InputError, match="the fingerprint does not belong to its parts"):
            read(path)


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_that_do_not_give_their_checksum_are_found_by_any_number_of_threads(tmp_path: Path, threads: int) -> None:
    path, data = tmp_path / "a.h5", values(70)
    write(path, data)
    offset = store.ActivationFile(path).offset
    with open(path, "r+b") as file:
        for row in (0, 31, 32, 69):
            file.seek((row + 1) * data[0].nbytes + offset - 1)
            file.write(b"\x7f")
    opened = store.ActivationFile(path)
    assert list(opened.mismatched(range(70), threads)) == [0, 31, 32, 69]
    assert list(opened.mismatched([1, 32, 5], threads)) == [32]
