"""Read a table of a hospital: columns that a user names, or that have usual names, to listed images."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...errors import InputError
from ...system.table_files import read_table
from ...system.tables import Cells, filled
from ..disclosure import META
from ..layouts import ListedImages
from ..manifest import spell_reserved
from ..near_names import NearNames
from .columns import TableSpec, choose_column, find_column, need_column
from .dicom_tags import TagColumns, is_dicom, read_tags, to_columns
from .findings import count_blanks_as_negative, list_candidates, read_columns, read_listed
from .personal import refuse_meta, refuse_persons
from .splits import read_split


def read_hospital(file: Path, spec: TableSpec, *, root: Path, blank: str = "unknown") -> ListedImages:
    """A row per image, as CSV, Excel or Parquet.

    Columns that `spec` does not name are found by usual names; where none names the patient and all images below
    `root` are DICOM, patient, study, view, sex and age come from the tags. `blank="negative"` counts unknown labels as
    negative. Raises InputError for columns that are missing or in doubt, and for columns of persons' names.
    """
    cells = spell_reserved(read_table(file))
    path = need_column(cells, "path", spec, file)
    images = [posixpath.normpath(image) for image in filled(cells, path, file)]
    chosen = {role: choose_column(cells, role, spec, file) for role in ("group", "study", "view", "split")}
    tags = None if chosen["group"] else _tags(file, root, images)
    if tags is None:
        need_column(cells, "group", spec, file)
    for role, column in chosen.items():
        if column and role != "split":
            refuse_persons(column, cells[column], f"--{role}")
    groups = filled(cells, chosen["group"], file) if tags is None else tags.groups
    meta = [find_column(cells, name, "--meta", file) for name in spec.meta]
    meta += [name for name in cells if name.startswith(META) and name not in meta]
    for name in meta:
        refuse_meta(name.removeprefix(META), cells[name], groups)
    used = [path, *chosen.values(), *meta]
    classes, labels, notes = _read_classes(cells, spec, file, used)
    if blank == "negative":
        labels = labels.copy()
        notes = (*notes, f"{count_blanks_as_negative(labels):,} blank labels count as negative.")
    splits, said = read_split(chosen["split"], cells[chosen["split"]], file) if chosen["split"] else (None, ())
    return ListedImages(
        kind="table",
        file=file,
        images=images,
        groups=groups,
        studies=filled(cells, chosen["study"], file) if chosen["study"] else tags.studies if tags else None,
        views=cells[chosen["view"]] if chosen["view"] else tags.views if tags else None,
        splits=splits,
        classes=classes,
        labels=labels,
        subgroups={**(tags.subgroups if tags else {}), **{name.removeprefix(META): cells[name] for name in meta}},
        notes=(_say(path, chosen, tags is not None), *notes, *said, *(tags.notes if tags else ())),
    )


def _read_classes(
    cells: Cells, spec: TableSpec, file: Path, used: list[str]
) -> tuple[tuple[str, ...], np.ndarray, tuple[str, ...]]:
    if spec.labels:
        return read_listed(cells, spec, file)
    if spec.classes:
        classes, labels = read_columns(cells, spec, file)
        if both := [name for name in classes if name in used]:
            raise InputError(f"--classes: {both[0]!r} is also taken as image, group, study, view, split or meta.")
        left = [name for name in list_candidates(cells, used) if name not in classes]
        note = f"no class, though of 0 and 1: {', '.join(left[:12])}{', ...' * (len(left) > 12)}." if left else ""
        return classes, labels, (note,) if note else ()
    found = list_candidates(cells, used)
    named = ",".join(found[:40]) or "NAME,..."
    raise InputError(
        f"{file}: which columns are findings is not known. Name them: --classes '{named}'"
        + (" (these hold 0 and 1; leave out what is no finding)" if found else "")
        + ", or --labels COLUMN for one that lists them."
    )


def _say(path: str, chosen: Mapping[str, str], tagged: bool) -> str:
    """Which column became what."""
    parts = [f"image from {path!r}", *(f"{role} from {column!r}" for role, column in chosen.items() if column)]
    if tagged:
        parts += ["group, study, view, sex and age from the DICOM tags where the table has no column"]
    return ", ".join(parts) + "."


def _tags(file: Path, root: Path, images: list[str]) -> TagColumns | None:
    """The columns of the images' tags; None where not all of them are DICOM."""
    near = NearNames()
    places = [
        image if os.path.isfile(root / image) else (near.find(str(root), image) or [image])[0] for image in images
    ]
    if not all(is_dicom(root / place) for place in places):
        return None
    tags, lost = read_tags(root, places)
    if lost:
        raise InputError(
            f"{root}: {sum(lost.values()):,} of {len(tags):,} listed films have no tags ({next(iter(lost))})."
        )
    return to_columns(images, [tag for tag in tags if tag is not None])
