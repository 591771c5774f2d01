"""A cache as its readers see it: one activation file, or the shards that an index (JSON) lists, read as one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from .. import __version__
from ..config import SHARDS
from ..errors import InputError, SchemaError
from ..system.files import AnyPath, write_json
from .file import ActivationFile, Header, partial_path

if TYPE_CHECKING:
    from .dataset import CacheDataset

SHARD_NAME = re.compile(r"\.shard-\d{4,}-of-\d{4,}\.h5")
KIND = "cxr-fast activation index"
SCHEMA = 1
# Of a header's meta, what may differ between the shards of one cache: how it was made, and columns.
OWN = ("block", "pillow", "subgroups", "splits")


class Shard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of an index: `rows` images from row `first` of the whole cache lie in `file`, a name beside the index.

    `sha256` is of all columns but the activations (`columns_sha256`), the checksum of each row among them.
    """

    file: str
    first: int
    rows: int
    first_image: str
    last_image: str
    fingerprint: str
    sha256: str


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """The index of a sharded cache, as it lies on disk."""

    kind: str = KIND
    schema: int = SCHEMA
    written_by: str
    images: int
    shards: tuple[Shard, ...]


# ------------------------------------------------------------------ the index


def stem(path: Path) -> str:
    """Return the name of a cache without `.h5`, `.shards.json` or `.json`."""
    return path.name.removesuffix(".h5").removesuffix(SHARDS).removesuffix(".json")


def shard_path(path: Path, number: int, count: int) -> Path:
    """Return the path of shard `number` of `count` (from 1): `NAME.shard-0001-of-0004.h5` beside the index."""
    return path.with_name(f"{stem(path)}.shard-{number:04d}-of-{count:04d}.h5")


def is_index(path: Path) -> bool:
    """Whether a file is meant as an index: by its name, or by its first byte."""
    if path.name.endswith(SHARDS):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(1) == b"{"
    except OSError:
        return False


def columns_sha256(file: ActivationFile) -> str:
    """Hash (hex) everything in an activation file but how it was made and the activations themselves."""
    header, hasher = file.header, hashlib.sha256()
    meta = {name: value for name, value in header.meta.items() if name not in ("block", "pillow")}
    names = (header.images, header.groups, header.studies, header.views, header.classes, file.sha256, file.errors)
    hasher.update(json.dumps([meta, list(header.shape), header.dtype, *map(list, names)], sort_keys=True).encode())
    for column in (header.labels, file.state, file.crc32, file.absmax):
        hasher.update(np.ascontiguousarray(column).data)
    return hasher.hexdigest()


def write_index(path: Path, files: Sequence[Path]) -> None:
    """Write the index of complete activation files, all beside it, whole or not at all."""
    shards, first = [], 0
    for name in files:
        assert name.parent == path.parent
        file = ActivationFile(name)
        images = file.header.images
        shards.append(
            Shard(
                file=name.name,
                first=first,
                rows=len(images),
                first_image=images[0],
                last_image=images[-1],
                fingerprint=file.meta["fingerprint"],
                sha256=columns_sha256(file),
            )
        )
        first += len(images)
    index = Index(written_by=f"cxr-fast {__version__}", images=first, shards=tuple(shards))
    write_json(path, msgspec.to_builtins(index), "--out")


def read_index(path: Path) -> Index:
    """Read an index. Raises InputError or SchemaError when it is not a sound one."""
    if not path.is_file():
        raise InputError(f"{path}: no such cache; `cxrfast cache DATASET --shards 4` makes one.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not an index of a sharded cache, or damaged ({str(error)[:80]}).") from error
    if not isinstance(value, dict) or value.get("kind") != KIND:
        raise InputError(f"{path}: a JSON file, but not the index of a sharded cache of cxr-fast.")
    if value.get("schema") != SCHEMA:
        raise SchemaError(
            f"{path}: schema {value.get('schema')} (written by {value.get('written_by')}); this cxr-fast reads schema "
            f"{SCHEMA}. Use a version that reads it, or cache again."
        )
    try:
        index = msgspec.convert(value, Index)
    except msgspec.ValidationError as error:
        raise InputError(f"{path}: a damaged index ({error}).") from error
    edges = [0, *(shard.first + shard.rows for shard in index.shards)]
    plain = all(shard.rows > 0 and Path(shard.file).name == shard.file for shard in index.shards)
    if not plain or not index.shards or edges != [*(shard.first for shard in index.shards), index.images]:
        raise InputError(f"{path}: a damaged index: its shards do not add up to {index.images} images.")
    return index


# ------------------------------------------------------------------ reading


def open_cache(path: AnyPath, *, partial: bool = False) -> Cache:
    """Open one activation file (refused while incomplete unless `partial`), or the index of several.

    Raises InputError or SchemaError as `ActivationFile` does. A shard that is missing, unfinished, damaged, or another
    than the one the index was written for is an InputError naming it and its images; nothing is ever filled in.

    >>> cache = open_cache("cache/indiana.h5")
    >>> rows = cache.activations[[0, 1]]  # (2, views, tokens, width)
    >>> rows.shape[0]
    2
    """
    path = Path(path)
    if not is_index(path):
        return Cache(path, [ActivationFile(path, partial=partial)])
    shards = read_index(path).shards
    return Cache(path, [_open_shard(path, number, shards) for number in range(len(shards))], sharded=True)


def _open_shard(index: Path, number: int, shards: Sequence[Shard]) -> ActivationFile:
    shard = shards[number]
    path, images = index.with_name(shard.file), f"{shard.first_image} to {shard.last_image}"
    name = f"{index}: shard {number + 1} of {len(shards)}, {shard.file} ({images})"
    again = "run the same `cxrfast cache` command again"
    if not path.is_file():
        what = "is not finished" if partial_path(path).exists() else "is missing"
        raise InputError(f"{name}, {what}; {again}.")
    try:
        file = ActivationFile(path)
    except InputError as error:
        raise InputError(f"{name}, cannot be read: {error}") from error
    if file.meta["fingerprint"] != shard.fingerprint:
        raise InputError(
            f"{name}, is foreign: its fingerprint is {file.meta['fingerprint'][:12]}…, the index has "
            f"{shard.fingerprint[:12]}…; put the right file back, or {again} after removing it."
        )
    if columns_sha256(file) != shard.sha256:
        raise InputError(
            f"{name}, is not the file the index was written for (other images, labels or checksums); put the right "
            f"file back, or {again}."
        )
    return file


class Cache:
    """A cache open for reading; made by `open_cache`.

    `files` are its activation files, one or the shards of an index. Each column is that of all files end to end:
    `header`, `state`, `ok`, `crc32`, `absmax` (N,), `sha256` and `errors`; see `ActivationFile`.
    """

    def __init__(self, path: Path, files: Sequence[ActivationFile], *, sharded: bool = False) -> None:
        self.path, self.files, self.sharded = path, tuple(files), sharded
        self.starts = np.cumsum([0, *(len(file.ok) for file in files)]).tolist()
        self.header = _joined([file.header for file in files])
        self.state, self.ok, self.crc32, self.absmax = (
            np.concatenate([getattr(file, name) for file in files]) for name in ("state", "ok", "crc32", "absmax")
        )
        self.sha256 = tuple(chain.from_iterable(file.sha256 for file in files))
        self.errors = tuple(chain.from_iterable(file.errors for file in files))
        self.written_by = files[0].written_by
        self._activations: np.memmap | JoinedRows | None = None

    @property
    def meta(self) -> dict[str, Any]:
        """The cache's own description: spec, fingerprint, backbone, dataset."""
        return self.header.meta

    @property
    def activations(self) -> np.memmap | JoinedRows:
        """Read-only (N, V, T, D) or (N, V, E): the file's map, or the maps of all shards."""
        if self._activations is None:
            maps = [file.activations for file in self.files]
            self._activations = JoinedRows(maps) if self.sharded else maps[0]
        return self._activations

    def dataset(self, view: str = "plain") -> CacheDataset:
        """The encoded films as a torch `Dataset` of (activations, labels). Raises InputError for a view it lacks.

        >>> films = open_cache("cache/indiana.h5").dataset()
        >>> activations, labels = films[0]
        """
        from .dataset import CacheDataset

        views = list(self.meta["spec"]["views"])
        if view not in views:
            raise InputError(f"view {view!r}: {self.path} holds {', '.join(views)}.")
        return CacheDataset(self, views.index(view))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_activations": None}

    def mismatched(self, rows: Sequence[int], threads: int, *, chunk: int = 32) -> Iterator[int]:
        """Yield those of `rows` whose bytes do not give their checksum, by file."""
        numbers = np.asarray(rows, dtype=int)
        for file, first, end in zip(self.files, self.starts, self.starts[1:], strict=False):
            inside = numbers[(numbers >= first) & (numbers < end)] - first
            for row in file.mismatched(inside.tolist(), threads, chunk=chunk):
                yield row + first

    def damage(self, row: int) -> str:
        """Say why an encoded row cannot be trusted; an empty string where it can."""
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.files[part].damage(row - self.starts[part])

    def damaged(self) -> Iterator[tuple[int, str]]:
        """Yield encoded rows that cannot be trusted, with the reason."""
        for file, first in zip(self.files, self.starts, strict=False):
            yield from ((row + first, reason) for row, reason in file.damaged())


def _joined(headers: Sequence[Header]) -> Header:
    """One header of several: columns end to end, meta of the first. The index has proved that they belong together."""
    first = headers[0]
    if len(headers) == 1:
        return first
    for header in headers[1:]:
        same = [{k: v for k, v in h.meta.items() if k not in OWN} for h in (first, header)]
        if same[0] != same[1] or header.classes != first.classes or header.shape[1:] != first.shape[1:]:
            raise InputError("the index lists shards of different caches; cache again.")

    def column(name: str) -> tuple[str, ...]:
        return tuple(chain.from_iterable(getattr(header, name) for header in headers))

    subgroups = {
        name: list(chain.from_iterable(header.meta["subgroups"][name] for header in headers))
        for name in first.meta["subgroups"]
    }
    splits = list(chain.from_iterable(header.meta.get("splits", [""] * header.shape[0]) for header in headers))
    return replace(
        first,
        meta={**first.meta, "subgroups": subgroups, **({"splits": splits} if any(splits) else {})},
        shape=(sum(header.shape[0] for header in headers), *first.shape[1:]),
        images=column("images"),
        groups=column("groups"),
        studies=column("studies"),
        views=column("views"),
        labels=np.concatenate([header.labels for header in headers]),
    )


class JoinedRows:
    """Several arrays read as one: `parts` (n_k, V, ...) of one row shape and dtype, end to end, read-only.

    Takes what the trainer asks of an array: a row number, a slice of rows, or (rows, views) index arrays. Only the
    rows asked for are read; `np.asarray` reads them all.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        assert len({(part.shape[1:], part.dtype) for part in parts}) == 1, "parts of different kinds"
        self.parts = tuple(parts)
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        self.dtype = parts[0].dtype
        self.shape: tuple[int, ...] = (int(self.starts[-1]), *parts[0].shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(part.nbytes for part in self.parts)

    def __len__(self) -> int:
        return self.shape[0]

    def _by_part(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each part that holds any of `rows` (n,): its number, the places in `rows`, and the rows in the part."""
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of {len(self)}")
        parts = np.searchsorted(self.starts, rows, side="right") - 1
        for part in np.unique(parts):
            places = np.flatnonzero(parts == part)
            yield int(part), places, rows[places] - self.starts[part]

    def __getitem__(self, key: Any) -> np.ndarray:
        if isinstance(key, int | np.integer):
            return np.asarray(self[[int(key) + (len(self) if key < 0 else 0)]][0])
        rows, rest = key if isinstance(key, tuple) else (key, None)
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        rest = None if rest is None else np.broadcast_to(np.asarray(rest), rows.shape)
        out = np.empty((len(rows), *self.shape[1 if rest is None else 2 :]), self.dtype)
        for part, places, inside in self._by_part(rows):
            out[places] = self.parts[part][inside] if rest is None else self.parts[part][inside, rest[places]]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self.parts).astype(dtype or self.dtype, copy=False)


def newest(folder: Path) -> Path:
    """Return the complete cache written last in `folder`, a file or an index; its shards by themselves do not count.

    Raises InputError when there is none.
    """
    found = [*folder.glob("*.h5"), *folder.glob(f"*{SHARDS}")]
    for path in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True):
        with open(path, "rb") as file:
            head = file.read(8)
        if head[:1] == b"{" or (head == b"\x89HDF\r\n\x1a\n" and not SHARD_NAME.search(path.name)):
            return path
    raise InputError(
        f"no complete cache in {folder}/; `cxrfast cache DATASET` makes one, or name it: `cxrfast sweep FILE`."
    )
