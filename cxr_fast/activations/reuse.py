"""What earlier runs encoded: resume it, keep rows whose image is the same, refuse what was made another way."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import PARTIAL, SHARDS
from ..data.formats.dicom import other_subject
from ..data.images import read_bytes
from ..data.manifest import Manifest
from ..errors import CxrFastError, ImageError, InputError
from ..system.files import sync_folder
from . import cache
from . import file as store

ASIDE = ".reuse"
PIXEL_CHECK = "pixel_check"  # the part of the fingerprint that says what Pillow makes of two built-in pictures
# What may differ between a file and a run that continues it.
NO_IDENTITY = ("block", "pillow")
CHUNK, AT_ONCE = 64, 256
SAMPLES = 8  # files that are hashed to see whether images of the same names are the same


@dataclass(frozen=True)
class ImageHasher:
    """Hash image files in threads; takes a stop and a progress callback.

    `paths` are the images by row; `stop()` ends it early; `on_hashed(n)` is called after every n more images.
    """

    paths: Sequence[Path]
    threads: int
    stop: Callable[[], bool] = bool
    on_hashed: Callable[[int], None] | None = None

    def hash_rows(self, rows: Sequence[int]) -> list[tuple[int, str]]:
        """Return (row, sha256 of the image's bytes), the hash empty for a file that cannot be read."""
        out: list[tuple[int, str]] = []
        with ThreadPoolExecutor(self.threads) as pool:
            for start in range(0, len(rows), AT_ONCE):
                if self.stop():
                    break
                some = rows[start : start + AT_ONCE]
                out += zip(some, pool.map(lambda row: hash_image(self.paths[row]), some), strict=True)
                if self.on_hashed is not None:
                    self.on_hashed(len(some))
        return out


def hash_image(path: Path) -> str:
    """Return the sha256 (hex) of an image file, or an empty string where it cannot be read."""
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except ImageError:
        return ""


# ------------------------------------------------------------------ files that may hold rows


def find_files(out: Path, *, sharded: bool = False) -> list[Path]:
    """List every file that may hold rows of the cache at `out`: complete, unfinished, or set aside.

    Of a sharded cache those are its shards, whatever their number, and not the index `out` itself.
    """
    if not sharded:
        return [path for path in (out, store.partial_path(out)) if path.exists()] + find_asides(out)
    if not out.parent.is_dir():
        return []
    pattern = re.compile(re.escape(cache.stem(out)) + cache.SHARD_NAME.pattern + f"({re.escape(PARTIAL)})?")
    return sorted(path for path in out.parent.iterdir() if pattern.fullmatch(path.name)) + find_asides(out)


def find_asides(out: Path) -> list[Path]:
    """List files that a stopped run of another list of images set aside: `NAME.h5.reuse1` and so on."""
    if not out.parent.is_dir():
        return []
    pattern = re.compile(re.escape(out.name + ASIDE) + r"\d+")
    return sorted(path for path in out.parent.iterdir() if pattern.fullmatch(path.name))


def set_aside(path: Path, out: Path) -> None:
    """Rename a file of another list to a new name beside `out`; delete it where no row of it is encoded.

    Several lists may follow each other before one is finished, so each file gets a number of its own.
    """
    if not store.ActivationFile(path, partial=True).ok.any():
        path.unlink()
        return
    taken, number = set(find_asides(out)), 1
    while (aside := out.with_name(f"{out.name}{ASIDE}{number}")) in taken:
        number += 1
    os.replace(path, aside)
    sync_folder(path.parent)


def set_aside_others(wanted: Mapping[Path, store.Header], out: Path) -> tuple[Path, ...]:
    """Set aside the shards of another list or number beside the index `out`; return every file that is set aside.

    `wanted` are the shards that will be made. The index goes first, unless every shard is already complete: it must
    never list a file that is being changed. Raises InputError, before anything is moved, when a file was made another
    way.
    """
    olds = {path: store.read_header(path) for path in find_files(out, sharded=True)}
    for path, old in olds.items():
        refuse_other(old, next(iter(wanted.values())), path)
    keep, move, asides = set(), [], set(find_asides(out))
    for path, old in olds.items():
        final = path.with_name(path.name.removesuffix(PARTIAL))
        if final in wanted and same_rows(old, wanted[final]):
            keep.add(path)
        elif path not in asides:
            move.append(path)
    if move or not keep.issuperset(wanted):
        out.unlink(missing_ok=True)
        sync_folder(out.parent)
    for path in move:
        set_aside(path, out)
    return tuple(find_asides(out))


def remove_asides(out: Path) -> None:
    """Delete the files set aside; the finished file holds what they held."""
    for path in find_asides(out):
        path.unlink()


# ------------------------------------------------------------------ what of them fits


def count_reusable(header: store.Header, files: Iterable[Path]) -> int:
    """Count the images of this run that are already encoded in `files`, whose bytes may have changed; writes nothing.

    Raises InputError naming the field that differs, and both values, when a file was made another way.
    """
    encoded: set[str] = set()
    for path in files:
        refuse_other(store.read_header(path), header, path)
        file = store.ActivationFile(path, partial=True)
        encoded.update(image for image, ok in zip(file.header.images, file.ok, strict=True) if ok)
    return len(encoded.intersection(header.images))


def count_dropped(header: store.Header, files: Iterable[Path]) -> int:
    """Count the images encoded in the complete ones of `files` that this run does not list: it drops their rows."""
    kept, count = set(header.images), 0
    for path in files:
        if path.name.endswith(PARTIAL) or re.search(re.escape(ASIDE) + r"\d+$", path.name):
            continue
        old = store.ActivationFile(path, partial=True)
        count += sum(ok and image not in kept for image, ok in zip(old.header.images, old.ok, strict=True))
    return count


def find_others(header: store.Header, manifest: Manifest, out: Path) -> list[tuple[Path, int]]:
    """Find complete caches beside `out` that were made in the same way and seem to hold rows of these images.

    Each with how many images it adds to what `out` has, as `count_same_images` counts them; the largest number first.
    """
    own = {path.resolve() for path in (out, *find_files(out), *find_files(out, sharded=True))}
    have: set[str] = set()
    for path in own - {out.resolve()} if cache.is_index(out) else own:
        with contextlib.suppress(CxrFastError):
            file = store.ActivationFile(path, partial=True)
            have.update(image for image, ok in zip(file.header.images, file.ok, strict=True) if ok)
    found = []
    for path in sorted([*out.parent.glob("*.h5"), *out.parent.glob(f"*{SHARDS}")]):
        if path.resolve() in own or cache.SHARD_NAME.search(path.name):
            continue
        with contextlib.suppress(CxrFastError):  # of another kind, of another version, damaged, or being written
            other = cache.open_cache(path)
            if other.meta["fingerprint"] == header.meta["fingerprint"]:
                found.append((path, count_same_images(other, manifest, have)))
    return sorted((each for each in found if each[1]), key=lambda each: -each[1])


def count_same_images(other: cache.Cache, manifest: Manifest, without: Collection[str] = ()) -> int:
    """Count the images of a manifest, `without` those named, that another cache seems to hold; few files are read.

    The same file counts. So does a file of the same name, where SAMPLES of those have the recorded bytes; the copy
    itself compares the bytes of every image.
    """
    wanted = [row for row, image in enumerate(manifest.images) if image not in without]
    encoded = np.flatnonzero(other.ok).tolist()
    root = os.path.realpath(str(other.meta["dataset"]["root"]))
    own = os.path.realpath(manifest.root)
    there = {os.path.normpath(os.path.join(root, other.header.images[row])): row for row in encoded}
    same = {row for row in wanted if os.path.normpath(os.path.join(own, manifest.images[row])) in there}
    rest = [row for row in wanted if row not in same]
    names = Counter(os.path.basename(other.header.images[row]) for row in encoded)
    by_name = {os.path.basename(other.header.images[row]): row for row in encoded}
    named = [row for row in rest if names[os.path.basename(manifest.images[row])] == 1]
    few = [named[i] for i in np.unique(np.linspace(0, len(named) - 1, min(SAMPLES, len(named))).round().astype(int))]
    alike = all(
        hash_image(manifest.path(row)) == other.sha256[by_name[os.path.basename(manifest.images[row])]] for row in few
    )
    return len(same) + (len(named) if alike else 0)


def open_sources(paths: Iterable[Path], header: store.Header) -> list[cache.Cache]:
    """Open the caches of --reuse. Raises InputError for one that cannot be read, or was made in another way."""
    found = []
    for path in paths:
        try:
            other = cache.open_cache(path)
        except CxrFastError as error:
            raise type(error)(f"--reuse: {error}") from error
        refuse_other(other.header, header, path, "--reuse", "leave it out: its rows cannot be copied.")
        found.append(other)
    return found


def refuse_other(
    old: store.Header,
    new: store.Header,
    path: Path,
    flag: str = "--out",
    mend: str = "give another --out, or remove the file.",
) -> None:
    """Raise InputError, naming the first part of the fingerprint that differs, when two files' rows cannot be mixed."""
    here, there = new.meta["fingerprint_parts"], old.meta["fingerprint_parts"]
    if PIXEL_CHECK in here and PIXEL_CHECK not in there:
        raise InputError(
            f"{flag}: {path} was made by an older cxr-fast, which did not record how Pillow decodes images; {mend}"
        )
    for name in ("size", *here):  # first what changes the hash of the weights too
        if here.get(name) != there.get(name):
            said = "image size" if name == "size" else name
            raise InputError(
                f"{flag}: {path} was made with {said} {_short(there.get(name))}, this run has {_short(here[name])}; "
                f"{_pillows(old, new) if name == PIXEL_CHECK else ''}{mend}"
            )


def _pillows(old: store.Header, new: store.Header) -> str:
    made, here = (header.meta.get("pillow") for header in (old, new))
    return f"Pillow {made} decoded images to other pixels than Pillow {here} does here; install Pillow {made}, "


def same_rows(old: store.Header, new: store.Header) -> bool:
    """Whether both files hold the same rows with the same description, apart from how they are made."""
    names = ("images", "groups", "studies", "views", "classes")
    metas = [{k: v for k, v in header.meta.items() if k not in NO_IDENTITY} for header in (old, new)]
    columns = all(getattr(old, name) == getattr(new, name) for name in names)
    return columns and np.array_equal(old.labels, new.labels) and metas[0] == metas[1]


def prepare(
    header: store.Header,
    out: Path,
    hasher: ImageHasher,
    *,
    repair: bool,
    strict: bool = False,
    also: Sequence[Path] = (),
) -> bool:
    """Leave a partial file at `out` in which only what must be encoded is pending; False when nothing is.

    A file of the same rows is continued, a complete one reopened; rows of any other file of this fingerprint, those in
    `also` included, are copied where the image's bytes are the same. Images whose bytes changed and images that failed
    are encoded again, with `repair` also rows that fail their checksum. With `strict` no row is kept whose note says
    that it is no film of a chest.
    """
    partial = store.partial_path(out)
    for path in (*find_files(out), *also):
        refuse_other(store.read_header(path), header, path)
    if partial.exists() and not same_rows(store.read_header(partial), header):
        set_aside(partial, out)
    if partial.exists():
        _forget(out, _stale_rows(partial, hasher, repair, strict))
    elif out.exists() and same_rows(store.read_header(out), header):
        stale = _stale_rows(out, hasher, repair, strict)
        if not stale:
            remove_asides(out)  # a run killed between the last rename and this may have left files aside
            return False
        store.reopen(out)
        _forget(out, stale)
    else:
        store.create(out, header)
    if sources := [path for path in (*find_files(out), *also) if path != partial]:
        _copy(sources, out, hasher, strict)
    return True


def _stale_rows(path: Path, hasher: ImageHasher, repair: bool, strict: bool) -> list[int]:
    """Rows that failed, whose image changed since, whose bytes are damaged (`repair`), or of no chest (`strict`)."""
    file = store.ActivationFile(path, partial=True)
    # Pending ones too: files of earlier versions may lack rows under their final name, after a power cut.
    stale = set(np.flatnonzero(file.state != store.DONE).tolist())
    rows = np.flatnonzero(file.ok).tolist()
    # An image that cannot be read now says nothing against its row: a network disk that stutters must not cost it.
    stale |= {row for row, found in hasher.hash_rows(rows) if found and found != file.sha256[row]}
    if repair:
        stale |= {row for row, _ in file.damaged()}
    if strict:
        stale |= {row for row in rows if other_subject(file.errors[row])}
    return sorted(stale)


def _forget(out: Path, stale: list[int]) -> None:
    if stale:
        with store.Writer(out) as writer:
            writer.forget(stale)


def _copy(sources: Sequence[Path], out: Path, hasher: ImageHasher, strict: bool) -> None:
    """Copy rows of `sources` whose image has the same bytes into the pending rows of the partial file."""
    known: dict[str, list[tuple[store.ActivationFile, int]]] = {}
    for file in (store.ActivationFile(path, partial=True) for path in sources):
        for row in np.flatnonzero(file.ok).tolist():
            if strict and other_subject(file.errors[row]):
                continue
            known.setdefault(file.sha256[row], []).append((file, row))
    with store.Writer(out) as writer:
        pending = np.flatnonzero(writer.state == store.PENDING).tolist()
        for start in range(0, len(pending), CHUNK):
            hashed = hasher.hash_rows(pending[start : start + CHUNK])
            found = [(row, h, copy) for row, h in hashed if (copy := _sound(known.get(h, ()))) is not None]
            if found:
                rows, names, copies = zip(*found, strict=True)
                values, notes = zip(*copies, strict=True)
                writer.rows(rows, np.stack(values), names, [None] * len(rows), notes)


def _sound(copies: Sequence[tuple[store.ActivationFile, int]]) -> tuple[np.ndarray, str] | None:
    """The first undamaged of several copies of a row, (V, ...), and its note."""
    return next(((file.activations[row], file.errors[row]) for file, row in copies if not file.damage(row)), None)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:12] + "…"
