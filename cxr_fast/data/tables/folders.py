"""Make image lists of folders without a table: DICOM by its tags, films in folders named by their findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...errors import InputError
from ...system.text import counted
from ..labels import UNKNOWN
from ..layouts import ListedImages
from ..paths import find_images
from .columns import FOLDER, TableSpec
from .dicom_tags import is_dicom, read_tags, to_columns
from .findings import select_classes
from .splits import SPLIT_WORDS


def list_films(folder: Path) -> list[str]:
    """The images below a folder, POSIX paths relative to it. Raises InputError where there is none."""
    found = [Path(path).relative_to(folder).as_posix() for path in find_images(str(folder), Counter())]
    if not found:
        raise InputError(f"{folder} holds no image.")
    return found


def all_dicom(folder: Path) -> bool:
    """Whether a folder holds images and all are DICOM."""
    found = find_images(str(folder), Counter())
    return bool(found) and all(is_dicom(Path(path)) for path in found)


def read_folder(folder: Path, spec: TableSpec) -> ListedImages:
    """The films of a folder without a table.

    With `labels` of FOLDER the folder above a film is its one finding; folders above that named train, val and test
    say the split. Otherwise all labels of the classes are unknown. DICOM tags give group, study, view, sex and age.
    Raises InputError for other flags, and films in no folder of a finding.
    """
    if other := sorted(set(spec.named()) - {"--labels", "--classes"}):
        raise InputError(f"{other[0]} names a column, and {folder} holds no table.")
    if spec.labels and spec.labels != FOLDER:
        raise InputError(f"--labels: {folder} holds no table; `--labels folder` takes the folder above each film.")
    names = list_films(folder)
    tagged = [is_dicom(folder / name) for name in names]
    notes: list[str] = []
    if not any(tagged) and not spec.labels:
        raise InputError(
            f"{folder} holds {counted(len(names), 'image')} and no table: `--labels folder` takes the folder above "
            "each film as its finding; else write a table (docs/how-to/own_tables.md)."
        )
    if all(tagged) or not spec.labels:
        tags, lost = read_tags(folder, names)
        notes += [f"left out {count:,} file(s) {why}." for why, count in lost.items()]
        rows = [(name, tag) for name, tag in zip(names, tags, strict=True) if tag is not None]
        if not rows:
            raise InputError(f"{folder} holds no DICOM film whose tags can be read.")
        names = [name for name, _ in rows]
        columns = to_columns(names, [tag for _, tag in rows])
        groups, studies, views, subgroups = columns.groups, columns.studies, columns.views, columns.subgroups
        notes += columns.notes
    else:
        groups, studies, views, subgroups = names, names, None, {}
        notes.append(
            "No patient is known: each film is a group of its own, so one patient can be on both sides of a fold. "
            "Write the patients into the column group."
        )
    classes, labels, splits = _label(folder, names, spec, notes)
    return ListedImages(
        kind="folders" if spec.labels else "dicom",
        file=folder,
        images=names,
        groups=groups,
        studies=studies,
        views=views,
        splits=splits,
        classes=classes,
        labels=labels,
        subgroups=subgroups,
        notes=tuple(notes),
    )


def _label(
    folder: Path, names: Sequence[str], spec: TableSpec, notes: list[str]
) -> tuple[tuple[str, ...], np.ndarray, list[str] | None]:
    """Classes, labels (N, C) and the split, by the folders of the films; adds to `notes`."""
    if not spec.labels:
        return spec.classes, np.full((len(names), len(spec.classes)), UNKNOWN, np.int8), None
    parents = [name.split("/")[:-1] for name in names]
    if bare := [name for name, parent in zip(names, parents, strict=True) if not parent]:
        raise InputError(f"--labels folder: {folder / bare[0]} lies in no folder of a finding; move it into one.")
    found = [parent[-1] for parent in parents]
    classes = tuple(sorted(set(found), key=str.casefold))
    if split := sorted({name for name in classes if name.casefold() in SPLIT_WORDS}):
        raise InputError(f"--labels folder: {split[0]!r} in {folder} holds films and is no finding; give its folders.")
    if spec.classes:
        classes = tuple(classes[c] for c in select_classes(classes, spec.classes, f"a folder of films in {folder}"))
    labels = (np.array(found)[:, None] == np.array(classes)[None, :]).astype(np.int8)
    twice = Counter(name.rpartition("/")[2] for name in names)
    if shared := sum(count > 1 for count in twice.values()):
        notes.append(
            f"{shared:,} file name(s) are in more than one folder; a film has the finding of its own folder alone."
        )
    words = [
        [SPLIT_WORDS[part.casefold()] for part in parent[:-1] if part.casefold() in SPLIT_WORDS] for parent in parents
    ]
    if not any(words):
        return classes, labels, None
    notes.append("Folders named train, val and test say the split: val is training, test is held out.")
    return classes, labels, [word[0] if word else "" for word in words]
