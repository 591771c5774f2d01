"""A sharded cache: K activation files and one index (JSON) that says which, in what order, and what each must hold."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import InputError, SchemaError
from ..system.files import AnyPath, write_bytes
from .file import ActivationFile, Header, partial_path
from .rows import Rows

SUFFIX = ".shards.json"
SHARD_NAME = re.compile(r"\.shard-\d{4,}-of-\d{4,}\.h5")
KIND = "cxr-fast activation index"
SCHEMA = 1
# Of a header's meta, what may differ between the shards of one cache: how it was made, and columns.
OWN = ("block", "pillow", "subgroups")


@dataclass(frozen=True, kw_only=True)
class Shard:
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


def is_index(path: Path) -> bool:
    """Whether a file is meant as an index: by its first byte, and by name where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(1) == b"{"
    except OSError:
        return path.name.endswith(SUFFIX)


def open_cache(path: AnyPath, *, partial: bool = False) -> Cache:
    """Open a cache: one activation file, or the index of several. Errors as those of the two classes.

    >>> cache = open_cache("cache/indiana.h5")
    >>> rows = cache.activations[[0, 1]]  # (2, views, tokens, width)
    >>> rows.shape[0]
    2
    """
    path = Path(path)
    return ShardedFile(path) if is_index(path) else ActivationFile(path, partial=partial)


def read_cache_header(path: Path) -> Header:
    """The header of a cache of either kind; an index is opened whole, which proves its shards' columns."""
    return open_cache(path, partial=True).header


def columns_sha256(file: ActivationFile) -> str:
    """sha256 (hex) of everything an activation file says but how it was made and the activations themselves."""
    header, hasher = file.header, hashlib.sha256()
    meta = {name: value for name, value in header.meta.items() if name not in ("block", "pillow")}
    names = (header.images, header.groups, header.studies, header.views, header.classes, file.sha256, file.errors)
    hasher.update(json.dumps([meta, list(header.shape), header.dtype, *map(list, names)], sort_keys=True).encode())
    for column in (header.labels, file.state, file.crc32, file.absmax):
        hasher.update(np.ascontiguousarray(column).data)
    return hasher.hexdigest()


def write(path: Path, shards: Sequence[Path]) -> None:
    """Write the index of complete activation files, all beside it, whole or not at all."""
    lines, first = [], 0
    for shard in shards:
        assert shard.parent == path.parent
        file = ActivationFile(shard)
        images = file.header.images
        lines.append(
            Shard(
                file=shard.name,
                first=first,
                rows=len(images),
                first_image=images[0],
                last_image=images[-1],
                fingerprint=file.meta["fingerprint"],
                sha256=columns_sha256(file),
            )
        )
        first += len(images)
    value = {
        "kind": KIND,
        "schema": SCHEMA,
        "written_by": f"cxr-fast {__version__}",
        "images": first,
        "shards": [asdict(line) for line in lines],
    }
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode(), "--out")


def read(path: Path) -> tuple[Shard, ...]:
    """The shards an index lists, in order. Raises InputError or SchemaError when it is no sound index."""
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
        shards = tuple(Shard(**line) for line in value["shards"])
        plain = all(isinstance(s.rows, int) and s.rows > 0 and Path(s.file).name == s.file for s in shards)
        ends = [s.first + s.rows for s in shards]
        sound = plain and bool(shards) and [0, *ends] == [*(s.first for s in shards), value["images"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not a sound index (missing or unknown {error}).") from error
    if not sound:
        raise InputError(f"{path}: not a sound index: its shards do not add up to {value['images']} images.")
    return shards


class ShardedFile:
    """The shards of an index read as one `ActivationFile`: the same fields, `activations` a `Rows` over their maps.

    A shard that is missing, unfinished, damaged, or another than the one the index was written for is an InputError
    naming it and its images; nothing is ever filled in.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        shards = read(self.path)
        self.files = tuple(self._open(number, shard, len(shards)) for number, shard in enumerate(shards, 1))
        self.starts = tuple(shard.first for shard in shards)
        self.header = _joined([file.header for file in self.files])
        self.state, self.ok, self.crc32, self.absmax = (
            np.concatenate([getattr(file, name) for file in self.files]) for name in ("state", "ok", "crc32", "absmax")
        )
        self.sha256 = tuple(chain.from_iterable(file.sha256 for file in self.files))
        self.errors = tuple(chain.from_iterable(file.errors for file in self.files))
        self.written_by = self.files[0].written_by
        self._rows: Rows | None = None

    def _open(self, number: int, shard: Shard, count: int) -> ActivationFile:
        path = self.path.with_name(shard.file)
        name = f"{self.path}: shard {number} of {count}, {shard.file} ({shard.first_image} to {shard.last_image})"
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

    @property
    def meta(self) -> dict[str, Any]:
        """What the shards say of themselves in common: spec, fingerprint, backbone, dataset."""
        return self.header.meta

    @property
    def activations(self) -> Rows:
        """Read-only (N, V, T, D) or (N, V, E) over the maps of all shards."""
        if self._rows is None:
            self._rows = Rows([file.activations for file in self.files])
        return self._rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def mismatched(self, rows: Sequence[int], threads: int, *, chunk: int = 32) -> Iterator[int]:
        """Those of `rows` whose bytes do not give their checksum, by shard."""
        numbers = np.asarray(rows, dtype=int)
        ends = (*self.starts[1:], len(self.ok))
        for file, first, end in zip(self.files, self.starts, ends, strict=True):
            inside = numbers[(numbers >= first) & (numbers < end)] - first
            for row in file.mismatched(inside.tolist(), threads, chunk=chunk):
                yield row + first

    def damage(self, row: int) -> str:
        """Why an encoded row cannot be trusted, or an empty string."""
        part, inside = self.activations.place(row)
        return self.files[part].damage(inside)

    def damaged(self) -> Iterator[tuple[int, str]]:
        """Encoded rows that cannot be trusted, with the reason."""
        for file, first in zip(self.files, self.starts, strict=True):
            yield from ((row + first, reason) for row, reason in file.damaged())


def _joined(headers: Sequence[Header]) -> Header:
    """One header of several: columns end to end, meta of the first. The index has proved that they belong together."""
    first = headers[0]
    for header in headers[1:]:
        same = [{k: v for k, v in h.meta.items() if k not in OWN} for h in (first, header)]
        if same[0] != same[1] or header.classes != first.classes or header.shape[1:] != first.shape[1:]:
            raise InputError("the index lists shards of different caches; cache again.")

    def column(name: str) -> tuple[str, ...]:
        return tuple(chain.from_iterable(getattr(header, name) for header in headers))

    subgroups = {
        name: list(chain.from_iterable(header.meta["subgroups"][name] for header in headers))
        for name in first.meta.get("subgroups", {})
    }
    return replace(
        first,
        meta={**first.meta, "subgroups": subgroups},
        shape=(sum(header.shape[0] for header in headers), *first.shape[1:]),
        images=column("images"),
        groups=column("groups"),
        studies=column("studies"),
        views=column("views"),
        labels=np.concatenate([header.labels for header in headers]),
    )


# Either kind of cache, to whoever reads one.
Cache = ActivationFile | ShardedFile


def newest(folder: Path) -> Path:
    """The complete cache written last in `folder`, a file or an index; its shards by themselves do not count.

    Raises InputError when there is none.
    """
    found = [*folder.glob("*.h5"), *folder.glob(f"*{SUFFIX}")]
    for path in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True):
        with open(path, "rb") as file:
            head = file.read(8)
        if head[:1] == b"{" or (head == b"\x89HDF\r\n\x1a\n" and not SHARD_NAME.search(path.name)):
            return path
    raise InputError(
        f"no complete cache in {folder}/; `cxrfast cache DATASET` makes one, or name it: `cxrfast sweep FILE`."
    )
