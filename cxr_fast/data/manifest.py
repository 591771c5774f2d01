"""Read a dataset folder or manifest file into a `Manifest` (image, group, view, labels), and write one."""

from __future__ import annotations

import math
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..errors import InputError
from ..system.files import AnyPath
from ..system.table_files import read_table
from ..system.tables import (
    KNOWN_OR_NOT,
    Cells,
    coded,
    filled,
    need,
    write_table,
)
from . import indiana, public_tables
from .disclosure import META, differ_everywhere, why_hidden
from .identifiers import note_groups
from .indiana import Unindexed
from .labels import RULED, SOFT, UNCERTAIN, UNKNOWN, LabelRules, check_class_names
from .layouts import ListedImages, read_card, recognise, replace_card
from .locate import Located, find_listed, refuse_missing
from .splits.given import check_words

Missing = Literal["refuse", "skip", "keep", "unchecked"]

RESERVED = ("image", "group", "view", "study", "split")
# What a class column of a manifest takes.
CODES = KNOWN_OR_NOT | {f"{SOFT:g}": UNCERTAIN}
# The columns that a manifest needs, and what each holds.
MEANING = {"image": "the file", "group": "the patient, whose images stay on one side of a split"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """What is known of every image of a dataset (N images, C classes), in the order of its file.

    `images` are POSIX paths relative to `root` (absolute ones stay so); `labels` is (N, C) int8 with 1, 0, -1 for
    unknown and -2 for uncertain (a target of 0.7 in training, unknown in every figure); `views` keeps the dataset's
    own word, "" where unknown; `studies` equals `groups` where the dataset has none; `splits` is empty, or says for
    each image `train`, `holdout`, or "" (drawn); `subgroups` are further columns (N values each) to break figures down
    by. `info` holds `kind`, `synthetic`, `skipped_missing` and what the layout has to say about its labels. `notes` are
    lines for people about this reading of the table; no file keeps them.

        >>> manifest = read_dataset("indiana")
        >>> manifest.labels.shape == (len(manifest), len(manifest.classes))
        True
    """

    name: str
    root: Path
    images: tuple[str, ...]
    groups: tuple[str, ...]
    views: tuple[str, ...]
    classes: tuple[str, ...]
    labels: np.ndarray
    studies: tuple[str, ...]
    splits: tuple[str, ...] = ()
    subgroups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        columns = [self.groups, self.views, self.studies, *self.subgroups.values()]
        assert all(len(column) == len(self.images) for column in columns)
        assert len(self.splits) in (0, len(self.images))
        assert self.labels.shape == (len(self.images), len(self.classes))
        assert self.labels.dtype == np.int8

    def __len__(self) -> int:
        return len(self.images)

    def path(self, row: int) -> Path:
        """Where the image of one row lies."""
        return self.root / self.images[row]


# ---------------------------------------------------------------------------------------------- layout


def spell_reserved(cells: Cells) -> Cells:
    """Columns that differ from `image`, `group`, `view`, `study`, `split` or `meta:` in case alone, spelled so."""
    out: Cells = {}
    for name, column in cells.items():
        lower = name.lower()
        if lower in RESERVED and lower not in cells:
            name = lower
        elif lower.startswith(META):
            name = META + name[len(META) :]
        if name in out:
            raise InputError(f"Two columns are named {name!r}, but for upper and lower case.")
        out[name] = column
    return out


def _read_own(file: Path, _: Unindexed) -> ListedImages:
    """Our own manifest, CSV or Parquet. Raises InputError naming the column, the value and the row."""
    cells = spell_reserved(read_table(file))
    need(cells, MEANING, file)
    if "" in cells:
        raise InputError(f"{file}: column {[*cells].index('') + 1} has no name (pandas: write with index=False).")
    classes = tuple(name for name in cells if name not in RESERVED and not name.startswith(META))
    if not classes:
        raise InputError(f"{file} has no class column: after image and group, one column a class with 1, 0 or blank.")
    try:
        values = coded(cells, classes, CODES, file)
    except InputError as error:
        mend = f"{error} A column that is no class is named '{META}...'."
        raise InputError(_no_class(cells, classes, file) or mend) from None
    return ListedImages(
        kind="manifest",
        file=file,
        images=[posixpath.normpath(image) for image in filled(cells, "image", file)],
        groups=filled(cells, "group", file),
        views=cells.get("view"),
        studies=filled(cells, "study", file) if "study" in cells else None,
        splits=check_words(cells["split"], file) if "split" in cells else None,
        classes=classes,
        labels=values,
        subgroups={name.removeprefix(META): cells[name] for name in cells if name.startswith(META)},
    )


def _no_class(cells: Cells, classes: Sequence[str], file: Path) -> str:
    """Say which column could identify a person and is no class, without a value of it; empty where there is none."""
    for name in classes:
        if {*cells[name]} <= set(KNOWN_OR_NOT):
            continue
        why = why_hidden(name, cells[name], cells["group"])
        if differ_everywhere(cells[name], KNOWN_OR_NOT):
            why = why or "its values are all different"
        if why:
            return (
                f"{file}: column {name!r} holds more than 1, 0 or nothing, so it is no class, and it could identify a "
                f"person ({why}); leave it out of the manifest."
            )
    return ""


READERS: dict[str, Callable[[Path, Unindexed], ListedImages]] = {
    "manifest": _read_own,
    "indiana": indiana.read_kaggle,
    "openi": indiana.read_openi,
    "nih": lambda file, _: public_tables.read_nih(file),
    "chexpert": lambda file, _: public_tables.read_chexpert(file),
    "mimic": lambda file, _: public_tables.read_mimic(file),
}


# ---------------------------------------------------------------------------------------------- images


def _refuse_twice(rows: ListedImages) -> None:
    first: dict[str, int] = {}
    for row, image in enumerate(rows.images):
        before = first.setdefault(rows.key(image) if rows.key else image, row)
        if before != row:
            raise InputError(f"{rows.file} lists {image} twice, in data rows {before + 1} and {row + 1}.")


def read_dataset(
    source: AnyPath,
    *,
    images: AnyPath | None = None,
    missing: Missing = "refuse",
    unindexed: Unindexed = "normal",
    limit: int | None = None,
    rules: LabelRules | None = None,
) -> Manifest:
    """Read a dataset folder, one of its tables, a manifest file or OpenI's archive, recognised by its content.

    Images are looked for below `images`, else below the folder of the source. `missing` says what becomes of listed
    images that are not found there: `refuse` raises, `skip` leaves them out, `keep` keeps the names as listed (also
    those that two files match), and `unchecked` looks for no image and keeps every name as listed.
    `unindexed="unknown"` masks what the Indiana headings do not say: every label of a study that nobody indexed, and
    Normal where only devices and the like are named. `limit` keeps the first images.
    `rules` say how blank and uncertain labels of CheXpert and MIMIC-CXR count. Raises InputError, one or two lines, for
    a source that is not recognised or not whole, and for an image that is listed twice or missing.

        >>> manifest = read_dataset("indiana")
        >>> len(manifest), len(manifest.classes)
        (80, 35)
        >>> manifest.path(0).is_file()
        True
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit: {limit} must be at least 1.")
    source = Path(source)
    kind, file = recognise(source)
    rules = rules or LabelRules()
    if kind not in RULED and (wrong := [name for name, word in asdict(rules).items() if word != "unknown"]):
        raise InputError(f"--{wrong[0]} is for the tables of CheXpert and MIMIC-CXR; {file} is none of them.")
    folder = source if source.is_dir() else source.parent
    manifest = list_images(READERS[kind](file, unindexed), folder, images=images, missing=missing, limit=limit)
    return _apply(rules, manifest) if kind in RULED else manifest


def list_images(
    rows: ListedImages, folder: Path, *, images: AnyPath | None, missing: Missing, limit: int | None
) -> Manifest:
    """Find the images that a table lists, below `images` or its `folder`, and make a manifest of them.

    `missing` and `limit` are those of `read_dataset`, and so are the errors.
    """
    check_class_names(rows.classes, rows.file)
    _refuse_twice(rows)
    root = folder if images is None else Path(images)
    if not root.is_dir():
        raise InputError(f"--images: {root} is not a folder.")
    placed, lost, notes = _place(rows, root, missing, limit)
    about, kind = read_card(folder), rows.kind
    stem = rows.file.name.partition(".")[0]
    plain = folder.resolve().name if stem == "manifest" or kind not in ("manifest", "openi", "table") else stem
    info = {"kind": kind, "synthetic": about.get("synthetic", False), "skipped_missing": lost, **rows.info}
    if kind == "manifest" and (noted := about.get("label_rules", {}).get(rows.file.name)):
        info["label_rules"] = noted
    manifest = _manifest(rows, placed, str(about.get("name", plain)), root, info)
    return replace(manifest, notes=(*notes, *note_groups(manifest.groups), *_note_labels(manifest)))


def _place(
    rows: ListedImages, root: Path, missing: Missing, limit: int | None
) -> tuple[list[tuple[int, str]], int, tuple[str, ...]]:
    """(row, path) of the images to take, how many were not found, and notes. Raises InputError for missing ones."""
    # With --skip-missing the first images that exist are meant, so all must be looked for.
    keep = list(range(len(rows.images)))[: None if missing == "skip" else limit]
    wanted = [rows.images[row] for row in keep]
    located = Located(paths=wanted)
    if missing != "unchecked":
        located = find_listed(rows, wanted, root, twice=missing == "keep")
    if missing == "keep":
        kept = [path or image for path, image in zip(located.paths, wanted, strict=True)]
        located = replace(located, paths=kept, doubts=())
    lost = sum(path is None for path in located.paths)
    if lost and (missing == "refuse" or lost == len(wanted)):
        refuse_missing(rows, located, wanted, root)
    placed = [(row, path) for row, path in zip(keep, located.paths, strict=True) if path is not None][:limit]
    return placed, lost, (*rows.notes, *located.notes)


def _note_labels(manifest: Manifest) -> Iterator[str]:
    """A line where no label is known, or none is positive: then columns or identifiers were not read as was meant."""
    if (manifest.labels < 0).all() and manifest.classes:
        yield "No label is known: every image has a blank or uncertain label in every class."
    elif not (manifest.labels == 1).any() and manifest.classes:
        yield "No image has a positive label in any class."


def _apply(rules: LabelRules, manifest: Manifest) -> Manifest:
    values, said = rules.apply(manifest.labels)
    values.setflags(write=False)
    return replace(manifest, labels=values, info={**manifest.info, "label_rules": said})


def _manifest(
    rows: ListedImages, placed: Sequence[tuple[int, str]], name: str, root: Path, info: dict[str, Any]
) -> Manifest:
    keep = [row for row, _ in placed]

    def kept(column: Sequence[str]) -> tuple[str, ...]:
        return tuple(column[row] for row in keep)

    values = rows.labels[keep]
    values.setflags(write=False)
    return Manifest(
        name=name,
        root=root,
        images=tuple(path for _, path in placed),
        groups=kept(rows.groups),
        views=kept(rows.views) if rows.views else ("",) * len(keep),
        classes=rows.classes,
        labels=values,
        studies=kept(rows.studies or rows.groups),
        splits=kept(rows.splits) if rows.splits and any(rows.splits) else (),
        subgroups={title: kept(column) for title, column in rows.subgroups.items()},
        info=info,
    )


# ------------------------------------------------------------------------------------- write, describe


def write_manifest(manifest: Manifest, out: AnyPath) -> None:
    """Write a manifest as CSV or Parquet (by suffix), whole or not at all; `read_dataset(out)` gives it back.

    Image paths become relative to the new file; absolute ones stay. Columns `view`, `study` and `split` are
    left out where they say nothing. Raises InputError for another suffix or a class named like a column of ours.

        >>> write_manifest(read_dataset("indiana"), "manifest.csv")
        >>> read_dataset("manifest.csv").classes == read_dataset("indiana").classes
        True
    """
    out = Path(out)
    # In any case: `spell_reserved` reads SPLIT as split.
    if clash := [name for name in manifest.classes if name.lower() in RESERVED or name.lower().startswith(META)]:
        raise InputError(f"{out}: a class cannot be named {clash[0]!r} in a manifest.")
    check_class_names(manifest.classes, out)
    start, end = os.path.realpath(manifest.root), os.path.realpath(out.parent)
    # Lexical, one call a distinct folder: relpath on each of 200,000 images would take seconds.
    moved = {
        folder: os.path.relpath(os.path.join(start, folder), end) for folder in map(posixpath.dirname, manifest.images)
    }
    columns: dict[str, Sequence[Any]] = {
        "image": [
            image if os.path.isabs(image) else _join(moved[posixpath.dirname(image)], posixpath.basename(image))
            for image in manifest.images
        ],
        "group": manifest.groups,
    }
    if any(manifest.views):
        columns["view"] = manifest.views
    if manifest.studies != manifest.groups:
        columns["study"] = manifest.studies
    if manifest.splits:
        columns["split"] = manifest.splits
    columns |= {META + name: values for name, values in manifest.subgroups.items()}
    code = {1: 1, 0: 0, UNKNOWN: None, UNCERTAIN: SOFT}
    for name, values in zip(manifest.classes, manifest.labels.T, strict=True):
        columns[name] = [code[int(value)] for value in values]
    synthetic = manifest.name if manifest.info.get("synthetic") else None
    with replace_card(out, synthetic=synthetic, rules=manifest.info.get("label_rules")):
        write_table(columns, out, "--out")


def _join(folder: str, name: str) -> str:
    return posixpath.normpath(posixpath.join(Path(folder).as_posix(), name))


class ClassRow(NamedTuple):
    """One class: images with 1, their percentage of those with 1 or 0 (NaN where there are none), images that are
    neither, groups with a 1, and images with 0."""

    name: str
    positives: int
    percent: float
    unknown: int
    groups: int
    negatives: int


def class_table(manifest: Manifest) -> list[ClassRow]:
    """A `ClassRow` for each class, in the order of `manifest.classes`."""
    group = np.unique(np.array(manifest.groups), return_inverse=True)[1]
    positive, known = manifest.labels == 1, (manifest.labels >= 0).sum(axis=0)
    return [
        ClassRow(
            name,
            int(positive[:, c].sum()),
            100 * float(positive[:, c].sum() / known[c]) if known[c] else math.nan,
            int((manifest.labels[:, c] < 0).sum()),
            len(np.unique(group[positive[:, c]])),
            int((manifest.labels[:, c] == 0).sum()),
        )
        for c, name in enumerate(manifest.classes)
    ]


def summary(manifest: Manifest) -> dict[str, Any]:
    """The data set in figures, JSON-ready; `labels_an_image` counts every positive, Normal included."""
    images_a_study = Counter(manifest.studies).values()
    positives = int((manifest.labels == 1).sum())
    return {
        "name": manifest.name,
        "kind": manifest.info.get("kind", "manifest"),
        "synthetic": manifest.info.get("synthetic", False),
        "images": len(manifest),
        "groups": len(set(manifest.groups)),
        "studies": len(set(manifest.studies)),
        "classes": len(manifest.classes),
        "views": dict(Counter(manifest.views).most_common()),
        "splits": dict(Counter(manifest.splits).most_common()),
        "positives": positives,
        "labels_an_image": positives / max(len(manifest), 1),
        "unknown": int((manifest.labels < 0).sum()),
        "uncertain": int((manifest.labels == UNCERTAIN).sum()),
        "images_a_study": {"min": min(images_a_study, default=0), "max": max(images_a_study, default=0)},
        "skipped_missing": manifest.info.get("skipped_missing", 0),
    }
