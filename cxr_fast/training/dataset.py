"""The usable rows of a cache: labels, groups and parts."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..activations.cache import Cache, open_cache
from ..activations.file import Header
from ..activations.reuse import hash_image
from ..config import SweepOptions, SweepSpec
from ..data import duplicates
from ..data.identifiers import note_groups
from ..data.labels import UNKNOWN
from ..data.manifest import Manifest
from ..data.splits import given
from ..data.splits.assign import SplitSpec, one_sided, split
from ..data.splits.published import published_words
from ..data.tables import corrections
from ..errors import InputError
from ..system import hardware
from ..unlikeness.distance import why_not
from . import earlier_runs

NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Data:
    """The usable rows of an activation file and where each goes: fold number, or -1 for the hold-out.

    `labels` are those of the rows for every figure, where uncertain ones are unknown; in `header` they are as cached.

    `by_name` images of another manifest were matched by file name only; `notes` are lines the user must see; `split`
    is what `run.json` says of the split: the method, and how many images of the parts were given by what; `corrections`
    what it says of labels that a person corrected, None where there are none. `parts` are
    those given before the rest was drawn.
    """

    file: Cache
    header: Header
    rows: np.ndarray
    labels: np.ndarray
    assignment: np.ndarray
    by_name: int = 0
    notes: tuple[str, ...] = ()
    split: dict[str, Any] = field(default_factory=dict)
    corrections: dict[str, Any] | None = None
    parts: np.ndarray | None = None

    def train(self, fold: int) -> np.ndarray:
        """Row numbers (in the file) that fold `fold` trains on."""
        return np.asarray(self.rows[(self.assignment >= 0) & (self.assignment != fold)])

    def valid(self, fold: int) -> np.ndarray:
        """Row numbers (in the file) that fold `fold` is scored on; -1 is the hold-out."""
        return np.asarray(self.rows[self.assignment == fold])


def read(
    cache: Path,
    spec: SweepSpec,
    manifest: Manifest | None = None,
    options: SweepOptions = SweepOptions(),  # noqa: B008
    *,
    checksums: bool = True,
    threads: int | None = None,
) -> Data:
    """Open a cache, leave out the images that failed, split by group; labels from `manifest` where one is given.

    Parts come from the column `split` of the manifest or the cache, and from the list or the run that `options` names;
    what they leave open is drawn. Corrections are made after that, so that they move no film to another part.

    The checksum of every used row is checked, which reads all of them once; `checksums=False` is for files too large
    to read twice. Raises InputError for damaged rows and for a manifest of other images.
    """
    file = open_cache(cache)
    header, kept, by_name = (file.header, file.ok, 0) if manifest is None else relabel(file, manifest, threads=threads)
    rows = np.flatnonzero(kept)
    labels = np.maximum(header.labels[rows], UNKNOWN)  # an uncertain label is unknown in every figure
    groups = [header.groups[i] for i in rows]
    data = Data(file=file, header=header, rows=rows, labels=labels, assignment=np.empty(0), by_name=by_name)
    data = _divide(data, manifest, spec, options)
    if options.corrections is not None:
        data = _correct(data, corrections.read_corrections(Path(options.corrections)))
    if checksums:
        _refuse_damaged(file, rows, threads)
    return replace(
        data,
        notes=(
            *_by_name(by_name, len(rows), file),
            *data.notes,
            *note_groups(groups),
            *duplicates.notes([header.images[i] for i in rows], [file.sha256[i] for i in rows], groups, data.labels),
            *_no_unlikeness(data, groups),
        ),
    )


# ------------------------------------------------------------------ parts


def _divide(data: Data, manifest: Manifest | None, spec: SweepSpec, options: SweepOptions) -> Data:
    """Give each row its part, with the lines and the record that say how."""
    groups = [data.header.groups[row] for row in data.rows]
    units = groups if spec.split_by == "group" else [data.header.images[row] for row in data.rows]
    notes: list[str] = []
    sources: dict[str, np.ndarray] = {}
    if words := _words(data, manifest, spec):
        name = given.COLUMN if spec.split == "column" else "the published list"
        sources[name] = given.whole_groups(given.from_words([words[row] for row in data.rows]), units, name)
    if options.holdout_list is not None:
        lines = given.read_list(Path(options.holdout_list))
        held = given.from_list(lines, data.header.images, data.header.groups, str(data.file.path))[data.rows]
        sources[given.LIST] = given.whole_groups(held, units, given.LIST, listed=True)
    if options.split_from is not None:
        earlier = earlier_runs.read_earlier(Path(options.split_from))
        earlier_runs.require_same_folds(earlier, spec.folds, spec.split_by)
        kept = earlier_runs.keep_parts(earlier, groups, [data.file.sha256[row] for row in data.rows])
        sources[given.EARLIER] = given.whole_groups(kept, units, given.EARLIER)
        notes.append(earlier_runs.describe_kept(sources[given.EARLIER], units, earlier))
    parts = given.combine(sources, units)
    wanted = SplitSpec(
        folds=spec.folds, holdout=spec.holdout, seed=spec.seed, by=spec.split_by, method=spec.split_method
    )
    assignment = split(data.labels, groups, wanted, parts)
    _refuse_empty_holdout(data.labels, assignment)
    return replace(
        data,
        assignment=assignment,
        parts=parts,
        split=_describe_split(sources, parts, assignment, spec),
        notes=(
            *notes,
            *_drawn_too(parts, assignment, units),
            *_one_sided(data.labels, units, assignment, data.header.classes),
        ),
    )


def redraw_folds(data: Data, spec: SweepSpec, seed: int) -> np.ndarray:
    """The assignment (N,) with the same hold-out and with folds drawn by `seed`; a fold that was given stays."""
    dev = np.flatnonzero(data.assignment >= 0)
    groups = [data.header.groups[row] for row in data.rows[dev]]
    wanted = SplitSpec(folds=spec.folds, holdout=0.0, seed=seed, by=spec.split_by, method=spec.split_method)
    parts = None if data.parts is None else np.where(data.parts[dev] >= 0, data.parts[dev], given.FREE)
    out = data.assignment.copy()
    out[dev] = split(data.labels[dev], groups, wanted, parts)
    return out


def _words(data: Data, manifest: Manifest | None, spec: SweepSpec) -> Sequence[str]:
    """What the column `split`, or a published list, says of each row of the file; empty where nothing does."""
    header, about = data.header, data.file.meta
    if spec.split == "drawn":
        return ()
    if manifest is None:
        if spec.split == "column":
            return cast(Sequence[str], about.get("splits", ()))
        return published_words(about["dataset"].get("kind", "manifest"), Path(about["dataset"]["root"]), header.images)
    own = manifest.splits
    if spec.split == "published":
        own = published_words(manifest.info["kind"], manifest.root, manifest.images)
    if not own:
        return ()
    at = {cast(int, row): i for i, row in enumerate(_match(data.file, manifest)[0])}
    return [own[at[row]] if row in at else "" for row in range(len(header.images))]


def _refuse_empty_holdout(labels: np.ndarray, assignment: np.ndarray) -> None:
    held = assignment == given.HOLDOUT
    if held.any() and not (labels[held] == 1).any():
        raise InputError(
            f"the hold-out, {int(held.sum()):,} images, has no positive of any class, so nothing can be scored on it: "
            "hold out other films, or none with --holdout 0 (and --split drawn)."
        )


def _describe_split(
    sources: dict[str, np.ndarray], parts: np.ndarray, assignment: np.ndarray, spec: SweepSpec
) -> dict[str, Any]:
    """What `run.json` says of the split; counts are images."""
    held = assignment == given.HOLDOUT
    return {
        "method": spec.split_method,
        "given": {name: int((values != given.FREE).sum()) for name, values in sources.items()},
        "holdout_given": int((held & (parts == given.HOLDOUT)).sum()),
        "holdout_drawn": int((held & (parts != given.HOLDOUT)).sum()),
    }


def _drawn_too(parts: np.ndarray, assignment: np.ndarray, units: Sequence[str]) -> Iterator[str]:
    """A line where a given hold-out was filled up by drawing."""
    drawn = (assignment == given.HOLDOUT) & (parts != given.HOLDOUT)
    if drawn.any() and (parts == given.HOLDOUT).any():
        count = len({units[row] for row in np.flatnonzero(drawn).tolist()})
        yield (
            f"hold-out: {count:,} groups are drawn beside those given, to reach --holdout; to keep to what is given, "
            "mark the others as train or pass --holdout 0"
        )


def _one_sided(
    labels: np.ndarray, units: Sequence[str], assignment: np.ndarray, classes: Sequence[str]
) -> Iterator[str]:
    found = one_sided(labels, units, assignment)
    for side, text in ((0, "none of them is held out"), (given.HOLDOUT, "all of them are held out")):
        if names := [classes[c] for c, where in found.items() if where == side]:
            yield f"split: {len(names):,} class(es) have positives in two or more groups, and {text}: {_named(names)}"


def _no_unlikeness(data: Data, groups: Sequence[str]) -> Iterator[str]:
    if reason := why_not([group for group, fold in zip(groups, data.assignment, strict=True) if fold >= 0]):
        yield reason


def _correct(data: Data, marked: corrections.Corrections) -> Data:
    """Make the corrections of a table, with the line and the record that say how many."""
    rows, hashes = data.rows, [data.file.sha256[row] for row in data.rows]
    found = corrections.apply(marked, data.header.labels[rows], hashes, data.header.classes)
    labels = data.header.labels.copy()
    labels[rows] = found.labels
    used = np.maximum(found.labels, UNKNOWN)
    _refuse_empty_holdout(used, data.assignment)
    touched = found.changed.any(axis=1)
    films, held = int(touched.sum()), int((touched & (data.assignment == given.HOLDOUT)).sum())
    record = {
        "file": marked.file.name,
        "sha256": marked.sha256,
        "marks": len(marked.marks),
        "flipped": found.flipped,
        "unknown": found.unknown,
        "kept": found.kept,
        "skipped": found.skipped,
        "films": films,
        "films_held_out": held,
    }
    note = (
        f"--corrections: {found.flipped:,} labels flipped and {found.unknown:,} made unknown, of {films:,} images "
        f"({held:,} of them held out); {found.kept:,} kept"
    )
    skipped = [f"{count:,} marks skipped: {reason}" for reason, count in found.skipped.items()]
    header = replace(data.header, labels=labels)
    return replace(
        data, header=header, labels=used, corrections=record, notes=("; ".join([note, *skipped]), *data.notes)
    )


# ------------------------------------------------------------------ rows


def _refuse_damaged(file: Cache, rows: np.ndarray, threads: int | None) -> None:
    if bad := list(file.mismatched(rows.tolist(), threads or hardware.cpu_count())):
        many = f" --shards {len(file.files)}" if file.sharded else ""
        raise InputError(
            f"{file.path}: {len(bad):,} of {len(rows):,} rows fail their checksum: "
            f"{_named([file.header.images[row] for row in bad])}.\n"
            f"`cxrfast cache SOURCE --out {file.path}{many} --repair` encodes them again."
        )


def _by_name(count: int, of: int, file: Cache) -> Iterator[str]:
    if count:
        yield (
            f"--manifest: {count:,} of {of:,} images were matched by file name only: the manifest's own files were not "
            f"found, so contents were not compared; make sure that they are the images of {file.path}."
        )


def relabel(file: Cache, manifest: Manifest, *, threads: int | None = None) -> tuple[Header, np.ndarray, int]:
    """The file's header with labels, groups and views of `manifest`, (N,) which images it names and are encoded, and
    how many of these were matched by file name only.

    Images are matched by path, else by their name in the cache; then the manifest's own file, where it exists, must
    have the bytes that were encoded. InputError when the manifest names an image that the cache does not hold.
    """
    found, named = _match(file, manifest)
    if missing := [image for image, row in zip(manifest.images, found, strict=True) if row is None]:
        raise InputError(
            f"--manifest: {len(missing):,} of {len(found):,} images are not in {file.path}: {_named(missing)}; "
            "run `cxrfast cache` on the manifest."
        )
    at = {cast(int, row): i for i, row in enumerate(found)}
    if len(at) < len(found):
        raise InputError(f"--manifest: {len(found) - len(at):,} of {len(found):,} images are named twice.")
    by_name = _refuse_others(file, manifest, {i: cast(int, found[i]) for i in named}, threads)
    labels = np.full((len(file.ok), len(manifest.classes)), UNKNOWN, np.int8)
    labels[list(at)] = manifest.labels[list(at.values())]

    def column(values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(values[at[row]] if row in at else "" for row in range(len(file.ok)))

    header = replace(
        file.header,
        meta={**file.meta, "dataset": {**file.meta["dataset"], "label_rules": manifest.info.get("label_rules")}},
        classes=manifest.classes,
        labels=labels,
        groups=column(manifest.groups),
        studies=column(manifest.studies),
        views=column(manifest.views),
    )
    return header, np.isin(np.arange(len(file.ok)), list(at)) & file.ok, by_name


def _match(file: Cache, manifest: Manifest) -> tuple[list[int | None], list[int]]:
    """The row of each image of the manifest, None where there is none; and which images were found by name."""
    root, here = Path(file.meta["dataset"]["root"]), manifest.root.resolve()
    places = {os.path.normpath(root / image): row for row, image in enumerate(file.header.images)}
    names = {image: row for row, image in enumerate(file.header.images)}
    # A table that names files without folders, as Indiana's does, means the only file of that name.
    bare = Counter(map(posixpath.basename, names))
    alone = {posixpath.basename(image): row for image, row in names.items() if bare[posixpath.basename(image)] == 1}
    found: list[int | None] = [places.get(os.path.normpath(here / image)) for image in manifest.images]
    named = [i for i, row in enumerate(found) if row is None]
    for i in named:
        image = manifest.images[i]
        # In another folder only a file whose bytes can be compared.
        only = alone.get(posixpath.basename(image)) if manifest.path(i).is_file() else alone.get(image)
        found[i] = names.get(image, only)
    return found, named


def _refuse_others(file: Cache, manifest: Manifest, named: dict[int, int], threads: int | None) -> int:
    """Compare bytes where the manifest's own file exists; return how many encoded images have no such file.

    Raises InputError naming images of the same name and other bytes: another data set may count from one as well.
    """
    usable = {i: row for i, row in named.items() if file.ok[row]}
    present = [i for i in usable if manifest.path(i).is_file()]
    with ThreadPoolExecutor(threads or hardware.cpu_count()) as pool:
        hashes = pool.map(lambda i: hash_image(manifest.path(i)), present)
        other = [manifest.images[i] for i, h in zip(present, hashes, strict=True) if h != file.sha256[usable[i]]]
    if other:
        raise InputError(
            f"--manifest: {len(other):,} images have the name of one in {file.path} and other bytes: {_named(other)}; "
            "run `cxrfast cache` on the manifest."
        )
    return len(usable) - len(present)


def _named(images: Sequence[str]) -> str:
    return ", ".join(images[:NAMED]) + (", ..." if len(images) > NAMED else "")
