"""What an earlier run already encoded: resume it, keep its rows where the image is the same, name what differs."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import digest
from ..data.images import read_bytes
from ..errors import ImageError, InputError
from . import file as store

ASIDE = ".reuse"
# The part of the fingerprint that older files of this schema lack; see `_as_old`.
PIXEL_CHECK = "pixel_check"
# What may differ between a file and a run that goes on with it.
NO_IDENTITY = ("block", "pillow")
CHUNK, AT_ONCE = 64, 256


def check(header: store.Header, out: Path, files: Sequence[Path] | None = None) -> int:
    """Rows already in a file at `out`, or in `files`, that this run would not encode again, at most; writes nothing.

    Raises InputError naming the field that differs, and both values, when that file was made another way.
    """
    encoded: set[str] = set()
    for path in existing(out) if files is None else files:
        refuse_other(store.read_header(path), header, path)
        file = store.ActivationFile(path, partial=True)
        encoded.update(image for image, ok in zip(file.header.images, file.ok, strict=True) if ok)
    return len(encoded.intersection(header.images))


def dropped(header: store.Header, files: Sequence[Path]) -> int:
    """Images encoded in those complete files that exist that are not in this run's list: their rows would go."""
    kept, count = set(header.images), 0
    for path in files:
        if path.exists():
            old = store.ActivationFile(path, partial=True)
            count += sum(ok and image not in kept for image, ok in zip(old.header.images, old.ok, strict=True))
    return count


def refuse_other(old: store.Header, new: store.Header, path: Path) -> None:
    """InputError when two files' activations cannot be mixed: the first field of the fingerprint that differs.

    A file from before the pixel check cannot fail it.
    """
    mine, theirs = new.meta["fingerprint_parts"], old.meta["fingerprint_parts"]
    for name in mine:
        if mine[name] != theirs.get(name) and not (name == PIXEL_CHECK and name not in theirs):
            raise InputError(
                f"--out: {path} was made with {name} {_short(theirs.get(name))}, this run has {_short(mine[name])}; "
                f"{_pillows(old, new) if name == PIXEL_CHECK else ''}give another --out, or remove the file."
            )


def _pillows(old: store.Header, new: store.Header) -> str:
    made, here = (header.meta.get("pillow", "unknown") for header in (old, new))
    return f"Pillow {made} gave other pixels than Pillow {here} does here: install that one, "


def _as_old(new: store.Header, olds: Iterable[store.Header]) -> store.Header:
    """The header without the pixel check when rows may come from a file that has none: it would vouch for them."""
    if all(PIXEL_CHECK in old.meta["fingerprint_parts"] for old in olds):
        return new
    parts = {name: value for name, value in new.meta["fingerprint_parts"].items() if name != PIXEL_CHECK}
    return replace(new, meta={**new.meta, "fingerprint_parts": parts, "fingerprint": digest(parts)})


def prepare(
    header: store.Header,
    out: Path,
    look: Look,
    *,
    repair: bool,
    also: Sequence[Path] = (),
) -> bool:
    """Leave a partial file at `out` in which only what must be encoded is pending; False when nothing is.

    A file of the same rows is continued, a complete one reopened; rows of any other file of this fingerprint are
    copied where the image's bytes are the same, those of `also` too. Images whose bytes changed and images that failed
    are encoded again, with `repair` also rows that fail their checksum.
    """
    partial = store.partial_path(out)
    olds = {path: store.read_header(path) for path in (*existing(out), *also)}
    for path, old in olds.items():
        refuse_other(old, header, path)
    header = _as_old(header, olds.values())
    if partial.exists() and not same_rows(store.read_header(partial), header):
        set_aside(partial, out)
    if partial.exists():
        _forget(out, _stale(partial, look, repair))
    elif out.exists() and same_rows(store.read_header(out), header):
        stale = _stale(out, look, repair)
        if not stale:
            finish(out)  # a run killed between the last rename and this may have left files aside
            return False
        store.reopen(out)
        _forget(out, stale)
    else:
        store.create(out, header)
    if sources := [path for path in (*existing(out), *also) if path != partial]:
        _copy(sources, out, look)
    return True


def finish(out: Path) -> None:
    """Forget the files set aside; what they held is in the new one."""
    for path in asides(out):
        path.unlink()


def same_rows(old: store.Header, new: store.Header) -> bool:
    """Whether both files hold the same rows with the same description, how they are made aside."""
    names = ("images", "groups", "studies", "views", "classes")
    metas = [{k: v for k, v in header.meta.items() if k not in NO_IDENTITY} for header in (old, new)]
    columns = all(getattr(old, name) == getattr(new, name) for name in names)
    return columns and np.array_equal(old.labels, new.labels) and metas[0] == metas[1]


def _stale(path: Path, look: Look, repair: bool) -> list[int]:
    """Rows that failed, whose image changed since, or (with `repair`) whose bytes are damaged."""
    file = store.ActivationFile(path, partial=True)
    stale = set(np.flatnonzero(file.state == store.FAILED).tolist())
    rows = np.flatnonzero(file.ok).tolist()
    # An image that cannot be read now says nothing against its row: a network disk that stutters must not cost it.
    stale |= {row for row, found in look.hashes(rows) if found and found != file.sha256[row]}
    if repair:
        stale |= {row for row, _ in file.damaged()}
    return sorted(stale)


def _forget(out: Path, stale: list[int]) -> None:
    if stale:
        with store.Writer(out) as writer:
            writer.forget(stale)


def _copy(sources: Sequence[Path], out: Path, look: Look) -> None:
    """Copy rows of `sources` whose image has the same bytes into the pending rows of the partial file."""
    known: dict[str, list[tuple[store.ActivationFile, int]]] = {}
    for file in (store.ActivationFile(path, partial=True) for path in sources):
        for row in np.flatnonzero(file.ok).tolist():
            known.setdefault(file.sha256[row], []).append((file, row))
    with store.Writer(out) as writer:
        pending = np.flatnonzero(writer.state == store.PENDING).tolist()
        for start in range(0, len(pending), CHUNK):
            told = look.hashes(pending[start : start + CHUNK])
            found = [(row, values, h) for row, h in told if (values := _sound(known.get(h, ()))) is not None]
            if found:
                rows, kept, names = zip(*found, strict=True)
                writer.rows(rows, np.stack(kept), names, [None] * len(rows))


def _sound(copies: Sequence[tuple[store.ActivationFile, int]]) -> np.ndarray | None:
    """The first undamaged of several copies of a row, (V, ...)."""
    return next((file.activations[row] for file, row in copies if not file.damage(row)), None)


@dataclass(frozen=True)
class Look:
    """How the images' bytes are looked at: their paths by row, threads, when to end early, whom to tell how many more
    were read."""

    paths: Sequence[Path]
    workers: int
    stop: Callable[[], bool]
    on_looked: Callable[[int], None] | None = None

    def hashes(self, rows: Sequence[int]) -> list[tuple[int, str]]:
        """(row, sha256 of the image's bytes); an empty hash for a file that cannot be read."""
        out: list[tuple[int, str]] = []
        with ThreadPoolExecutor(self.workers) as pool:
            for start in range(0, len(rows), AT_ONCE):
                if self.stop():
                    break
                some = rows[start : start + AT_ONCE]
                out += zip(some, pool.map(lambda row: file_hash(self.paths[row]), some), strict=True)
                if self.on_looked is not None:
                    self.on_looked(len(some))
        return out


def file_hash(path: Path) -> str:
    """sha256 (hex) of an image file, or an empty string where it cannot be read."""
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except ImageError:
        return ""


def set_aside(path: Path, out: Path) -> None:
    """Give a file of another list a name of its own beside `out`: several lists may change before one is finished."""
    if not store.ActivationFile(path, partial=True).ok.any():
        path.unlink()
        return
    taken, number = set(asides(out)), 1
    while (aside := out.with_name(f"{out.name}{ASIDE}{number}")) in taken:
        number += 1
    os.replace(path, aside)


def asides(out: Path) -> list[Path]:
    """Files set aside by runs that were stopped, `NAME.h5.reuse1` and so on."""
    start = out.name + ASIDE
    if not out.parent.is_dir():
        return []
    names = (path.name for path in out.parent.iterdir() if path.name.startswith(start))
    return [out.with_name(name) for name in sorted(names) if re.fullmatch(r"\d*", name[len(start) :])]


def existing(out: Path) -> list[Path]:
    """Every file that may hold rows for `out`: the complete one, the unfinished one, those set aside."""
    return [path for path in (out, store.partial_path(out)) if path.exists()] + asides(out)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:12] + "…"
