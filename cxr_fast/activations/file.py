"""The activation file: create, write rows, resume, verify, read.

HDF5 with the default library version, one contiguous dataset allocated when the file is made. HDF5 writes the
metadata once and closes; rows are then written beside it with `pwrite`, flushed, and only then marked done. A
process killed at any moment leaves a file that opens. It is called `NAME.h5.partial` until complete.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from .. import __version__
from ..config import PARTIAL, digest
from ..errors import InputError, SchemaError
from ..system.files import make_folders, put_in_place, reserve_space, sync_folder, write_at
from ..system.locks import exclude, share
from ..system.text import gigabytes

SCHEMA = 1
KIND = "cxr-fast activations"
STATE: dict[str, Any] = {"done": np.dtype("u1"), "crc32": np.dtype("<u4"), "absmax": np.dtype("<f4")}
HASH_BYTES, ERROR_BYTES = 64, 240
PENDING, DONE, FAILED = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Header:
    """The description of an activation file: its metadata, and a column for each property of its rows.

    `meta` is JSON: spec, fingerprint and its parts, backbone config, weights source, dataset name and root.
    `shape` is (N, V, T, D), or (N, V, E) for a cut after pooling.
    """

    meta: dict[str, Any]
    shape: tuple[int, ...]
    dtype: str
    images: tuple[str, ...]
    groups: tuple[str, ...]
    studies: tuple[str, ...]
    views: tuple[str, ...]
    classes: tuple[str, ...]
    labels: np.ndarray


def partial_path(path: Path) -> Path:
    """Return the name that the file has until it is complete."""
    return path.with_name(path.name + PARTIAL)


def row_bytes(shape: Sequence[int], dtype: str) -> int:
    """Count the bytes of one image's row, all views."""
    return int(np.prod(shape[1:], dtype=np.int64)) * np.dtype(dtype).itemsize


def create(path: Path, header: Header) -> None:
    """Write an empty file at `partial_path(path)`: all metadata, all space, no rows done.

    Raises InputError when the folder cannot be written or the disk is too small.
    """
    target = partial_path(path)
    # One name for every process: the lock keeps others away, and what a killed one left is written over.
    scratch = target.with_name(target.name + ".new")
    try:
        make_folders(target.parent)
        need = row_bytes(header.shape, header.dtype) * header.shape[0]
        free = os.statvfs(target.parent).f_bavail * os.statvfs(target.parent).f_frsize
        if need > free:
            raise InputError(f"--out: {path} needs {gigabytes(need)}; {gigabytes(free)} are free on that disk.")
        with h5py.File(scratch, "w") as file:
            _write_header(file, header)
        reserve_space(scratch)
        put_in_place(scratch, target)
    except OSError as error:
        raise InputError(f"--out: cannot write {target}: {error.strerror or error}.") from error
    finally:
        scratch.unlink(missing_ok=True)


def _write_header(file: h5py.File, header: Header) -> None:
    file.attrs["kind"] = KIND
    file.attrs["schema"] = SCHEMA
    file.attrs["written_by"] = f"cxr-fast {__version__}"
    file.attrs["meta"] = json.dumps(header.meta, sort_keys=True)
    file.attrs["classes"] = json.dumps(list(header.classes))
    file.attrs["axes"] = "N V T D" if len(header.shape) == 4 else "N V E"
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_layout(h5py.h5d.CONTIGUOUS)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    early.set_obj_track_times(False)  # so that the same rows are the same file
    space = h5py.h5s.create_simple(header.shape)
    h5py.h5d.create(file.id, b"activations", h5py.h5t.py_create(np.dtype(header.dtype)), space, dcpl=early)
    n = header.shape[0]
    for name, dtype in STATE.items():
        file.create_dataset(name, data=np.zeros(n, dtype))
    file.create_dataset("sha256", data=np.zeros(n, f"S{HASH_BYTES}"))
    file.create_dataset("error", data=np.zeros(n, f"S{ERROR_BYTES}"))
    columns = {"id": header.images, "group": header.groups, "study": header.studies, "view": header.views}
    for name, values in columns.items():
        encoded = [value.encode() for value in values]
        file.create_dataset(name, data=np.array(encoded, dtype=f"S{max(map(len, encoded), default=0) or 1}"))
    file.create_dataset("labels", data=np.asarray(header.labels, np.int8))


Texts = Sequence[str | None]


class Writer:
    """Writes rows into a partial file, from one thread, without the HDF5 library; refused while anybody reads it.

    `rows` writes the bytes, waits until they are on disk, and only then marks them done. `state` (N,) holds PENDING,
    DONE or FAILED a row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        partial = partial_path(path)
        with open_file(partial) as file:
            self.shape = tuple(file["activations"].shape)
            self.dtype = file["activations"].dtype
            names = ("activations", *STATE, "sha256", "error")
            self._offsets = {name: _offset(file[name]) for name in names}
            self.state = np.array(file["done"])
            self.sha256 = [_text(value) for value in file["sha256"][:]]
        self._fd = _open_exclusive(partial, path)

    def rows(
        self, indices: Sequence[int], values: np.ndarray, sha256: Sequence[str], errors: Texts, notes: Texts = ()
    ) -> None:
        """Store `values` (n, V, ...) at rows `indices`; a row with an error is marked failed and its bytes are zero.

        `notes` say how the images of good rows were read; they stand in the error's place.
        Raises InputError when the disk is full; rows already done are kept.
        """
        values = np.ascontiguousarray(values, self.dtype)
        assert values.shape == (len(indices), *self.shape[1:]), (values.shape, self.shape)
        failed = np.array([bool(error) for error in errors])
        if failed.any():
            values = values.copy()
            values[failed] = 0
        flat = values.reshape(len(indices), -1)
        texts = [error or note or "" for error, note in zip(errors, notes or [""] * len(errors), strict=True)]
        done = np.where(failed, FAILED, DONE).astype(STATE["done"])
        columns = {
            "activations": flat,
            "crc32": np.array([zlib.crc32(row.data) for row in flat], STATE["crc32"]),
            "absmax": np.array([np.abs(row).max() for row in flat], STATE["absmax"]),
            "sha256": np.array([value.encode() for value in sha256], f"S{HASH_BYTES}"),
            "error": np.array([_clip(text, ERROR_BYTES) for text in texts], f"S{ERROR_BYTES}"),
        }
        try:
            for name, array in columns.items():
                self._put(name, indices, array)
            os.fdatasync(self._fd)
            self._put("done", indices, done)
        except OSError as error:
            raise InputError(
                f"{partial_path(self.path)}: cannot write: {error.strerror}. "
                "Rows already done are kept; make room and run the same command again."
            ) from error
        for i, row in enumerate(indices):
            self.state[row], self.sha256[row] = done[i], sha256[i]

    def forget(self, indices: Sequence[int]) -> None:
        """Mark rows as not encoded, on disk before anything else happens."""
        self._put("done", indices, np.full(len(indices), PENDING, STATE["done"]))
        os.fdatasync(self._fd)
        self.state[list(indices)] = PENDING

    def _put(self, name: str, indices: Sequence[int], array: np.ndarray) -> None:
        """Write one value a row at its place, neighbours in one call."""
        size = array.nbytes // max(len(array), 1)
        start = 0
        for i in range(1, len(indices) + 1):
            if i == len(indices) or indices[i] != indices[i - 1] + 1:
                write_at(self._fd, array[start:i].data, self._offsets[name] + indices[start] * size)
                start = i

    def finish(self) -> None:
        """Flush and give the file its final name; every row must be done or failed."""
        assert (self.state != PENDING).all(), "unfinished rows"
        self.close()
        put_in_place(partial_path(self.path), self.path)

    def close(self) -> None:
        """Close the file and release its lock; done rows stay done."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def reopen(path: Path) -> None:
    """Give a complete file its unfinished name back, so that its rows can be written again.

    Raises InputError, changing nothing, while anybody has its rows mapped or its HDF5 file open.
    """
    fd = _open_exclusive(path, path)
    try:
        # Under the lock: whoever opened the file and waits for its turn sees afterwards that the name is gone.
        os.replace(path, partial_path(path))
        # Before any row is marked as missing: a power cut may keep that mark and bring the final name back.
        sync_folder(path.parent)
    finally:
        os.close(fd)


def _open_exclusive(path: Path, name: Path) -> int:
    """Open for writing with the exclusive lock; return the descriptor. `name` is what the user calls the file."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"--out: cannot write {path}: {error.strerror}.") from error
    if not exclude(fd):
        os.close(fd)
        raise InputError(f"{name} is being read by another process; wait for it, or give another --out.")
    return fd


class ActivationFile:
    """An activation file read through a memory map; refused while incomplete unless `partial`.

    `activations` is a read-only (N, V, T, D) or (N, V, E) map; `ok` (N,) bool marks images that were encoded. The map
    opens on first use, so that the object pickles. As long as it, or any array cut from it, lives, no writer touches
    the file: the map keeps a shared lock that the kernel drops with it.
    """

    def __init__(self, path: Path | str, *, partial: bool = False) -> None:
        self.path = Path(path)
        self._version = _version(self.path) if self.path.is_file() else ()
        with open_file(self.path) as file:
            self.header = _read_header(file)
            self.offset = _offset(file["activations"])
            self.state = np.array(file["done"])
            self.ok = self.state == DONE
            self.sha256 = tuple(_text(v) for v in file["sha256"][:])
            self.errors = tuple(_text(v) for v in file["error"][:])
            self.crc32 = np.array(file["crc32"])
            self.absmax = np.array(file["absmax"])
            self.written_by = str(file.attrs["written_by"])
        pending = int((self.state == PENDING).sum())
        if pending and not partial:
            raise InputError(
                f"{self.path}: {pending:,} of {len(self.state):,} rows are not encoded yet; run the same `cxrfast "
                "cache` command again to finish it."
            )
        self._map: np.memmap | None = None

    @property
    def meta(self) -> dict[str, Any]:
        """The file's own description: spec, fingerprint, backbone, dataset."""
        return self.header.meta

    @property
    def activations(self) -> np.memmap:
        """Read-only map, (N, V, T, D) or (N, V, E). InputError when the file is no longer the one that was opened."""
        if self._map is None:
            self._map = self._open_map()
        return self._map

    def _open_map(self) -> np.memmap:
        try:
            with open(self.path, "rb") as file:
                # The map holds a copy of this descriptor, and the lock with it.
                if not share(file.fileno()):
                    raise InputError(f"{self.path} is being written by another process; wait for it.")
                if _version(self.path) != self._version or _version(file.fileno()) != self._version:
                    raise InputError(f"{self.path} was written again since it was opened; run the same command again.")
                return np.memmap(file, self.header.dtype, mode="r", offset=self.offset, shape=self.header.shape)
        except FileNotFoundError:
            raise InputError(f"{self.path} is gone since it was opened; run the same command again.") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    def mismatched(self, rows: Sequence[int], threads: int, *, chunk: int = 32) -> Iterator[int]:
        """Yield those of `rows` whose bytes do not give their checksum, in order; `threads` read, zlib holds no GIL."""
        activations = np.asarray(self.activations)

        def wrong(some: Sequence[int]) -> list[int]:
            return [row for row in some if zlib.crc32(activations[row].data) != self.crc32[row]]

        with ThreadPoolExecutor(threads) as pool:
            for found in pool.map(wrong, (rows[i : i + chunk] for i in range(0, len(rows), chunk))):
                yield from found

    def damage(self, row: int) -> str:
        """Say why an encoded row cannot be trusted (`checksum`, `not finite`); an empty string where it can."""
        values = np.ascontiguousarray(self.activations[row])
        if zlib.crc32(values.data) != self.crc32[row]:
            return "checksum"
        return "" if np.isfinite(values).all() else "not finite"

    def damaged(self) -> Iterator[tuple[int, str]]:
        """Yield encoded rows that cannot be trusted, with the reason."""
        for row in np.flatnonzero(self.ok):
            if reason := self.damage(int(row)):
                yield int(row), reason


@contextmanager
def open_file(path: Path) -> Iterator[h5py.File]:
    """Open one of our HDF5 files for reading; InputError or SchemaError with one line when it is not one."""
    if not path.is_file():
        raise InputError(f"{path}: no such cache; `cxrfast cache DATASET` makes one.")
    with _open_hdf5(path) as file:
        if file.attrs.get("kind") != KIND:
            raise InputError(f"{path}: an HDF5 file, but not an activation file of cxr-fast.")
        if file.attrs.get("schema") != SCHEMA:
            raise SchemaError(
                f"{path}: schema {file.attrs.get('schema')} (written by {file.attrs.get('written_by')}); "
                f"cxr-fast {__version__} reads schema {SCHEMA}. Run `cxrfast cache` again."
            )
        yield file


def _open_hdf5(path: Path) -> h5py.File:
    """Open a file with the locking that this process already uses for it, else without.

    HDF5's own lock protects nothing here: HDF5 writes nothing after the file has a name, and rows are guarded by the
    map's lock. It would only keep `info` from a file in the making. But the library shares one handle in a process, and
    refuses a second one that asks for another locking than the first, such as a plain `h5py.File(path)`.
    """
    for locking in (False, "best-effort", True):
        try:
            return h5py.File(path, "r", locking=locking)
        except OSError as error:
            reason = str(error).splitlines()[0][:120]
            if "flag values don't match" not in reason:
                break
    else:
        raise InputError(f"{path}: this process has it open through h5py already; close that `h5py.File` first.")
    mend = "; copy it again, or remove it and run `cxrfast cache` again" * ("signature not found" not in reason)
    raise InputError(f"{path}: not an HDF5 file, or damaged ({reason}){mend}.")


def read_header(path: Path) -> Header:
    """Read the header of a file, complete or partial."""
    with open_file(path) as file:
        return _read_header(file)


def _read_header(file: h5py.File) -> Header:
    def column(name: str) -> tuple[str, ...]:
        return tuple(_text(value) for value in file[name][:])

    meta = json.loads(file.attrs["meta"])
    if digest(meta.get("fingerprint_parts")) != meta.get("fingerprint"):
        raise InputError(
            f"{file.filename}: the fingerprint does not belong to its parts: the file was changed by hand. "
            "Run `cxrfast cache` again with another --out."
        )
    return Header(
        meta=meta,
        shape=tuple(file["activations"].shape),
        dtype=str(file["activations"].dtype),
        images=column("id"),
        groups=column("group"),
        studies=column("study"),
        views=column("view"),
        classes=tuple(json.loads(file.attrs["classes"])),
        labels=np.array(file["labels"]),
    )


def _offset(dataset: h5py.Dataset) -> int:
    offset = dataset.id.get_offset()
    if offset is None:
        raise InputError(f"{dataset.file.filename}: dataset {dataset.name} is not contiguous; not written by cxr-fast.")
    return int(offset)


def _version(file: Path | int) -> tuple[int, ...]:
    """Return inode, size and time of the last write, which differ between two states of a file on every host."""
    status = os.stat(file)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _clip(text: str, size: int) -> bytes:
    return text.encode()[:size].decode("utf-8", "ignore").encode()
