"""Corrections of labels: a table of films by hash, a class, the label as it was, and a mark a person set."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ...system.files import file_sha256
from ...system.table_files import read_table
from ...system.tables import KNOWN_OR_NOT, TEXTS, need, read_header
from ..labels import UNKNOWN

COLUMNS = {
    "image_sha256": "of the film's file",
    "class": "one of the run's",
    "label": "1, 0 or nothing, as it was when the mark was set",
    "mark": "keep, flip, unknown, or nothing",
}
KEEP, FLIP, MASK = "keep", "flip", "unknown"
MARKS = (KEEP, FLIP, MASK)
NO_FILM, OTHER_LABEL = "their film is not among those of the sweep", "the label is another now"


@dataclass(frozen=True, kw_only=True)
class Correction:
    """One marked label: `label` 1, 0 or -1 as it was, `mark` of MARKS; `row` counts the table's data rows from 1."""

    row: int
    sha256: str
    name: str
    label: int
    mark: str


@dataclass(frozen=True, kw_only=True)
class Corrections:
    """The marked labels of a table, each film and class once; `sha256` is that of the file."""

    file: Path
    sha256: str
    marks: tuple[Correction, ...]


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """Labels (N, C) after corrections, which of them changed (N, C), and how many marks did what.

    `skipped` counts by reason; keep, flipped and unknown count labels of films: two films of the same bytes are two.
    """

    labels: np.ndarray
    changed: np.ndarray
    kept: int
    flipped: int
    unknown: int
    skipped: dict[str, int]


def read_corrections(file: Path) -> Corrections:
    """Read the rows of a table that hold a mark. `card` and other columns are passed over.

    Raises InputError naming the row: of a mark or a label that is none, of a flip of an unknown label, of two marks of
    one label that contradict each other; and where the table has no mark at all.
    """
    cells = read_table(file)
    need(cells, COLUMNS, file)
    found: dict[tuple[str, str], Correction] = {}
    columns = (cells[name] for name in COLUMNS)
    for row, (value, name, label, mark) in enumerate(zip(*columns, strict=True), 1):
        if not mark:
            continue
        each = _correction(file, row, (value, name, label, mark))
        before = found.setdefault((each.sha256, name), each)
        if (before.mark, before.label) != (each.mark, each.label):
            raise InputError(
                f"{file}: data rows {before.row} and {row} mark one label of one film differently ({name}); keep one."
            )
    if not found:
        raise InputError(f"{file}: no row has a mark; the column 'mark' takes {', '.join(MARKS)}, or nothing.")
    return Corrections(file=file, sha256=file_sha256(file), marks=tuple(found.values()))


def _correction(file: Path, row: int, cells: tuple[str, str, str, str]) -> Correction:
    value, name, label, mark = cells
    word = mark.lower()
    if word not in MARKS:
        raise InputError(f"{file}: data row {row}: mark {mark!r} is not {', '.join(MARKS)}, or nothing.")
    if label not in KNOWN_OR_NOT:
        raise InputError(f"{file}: data row {row}: label {label!r} is not 1, 0, or nothing for unknown.")
    if word == FLIP and KNOWN_OR_NOT[label] < 0:
        raise InputError(f"{file}: data row {row}: an unknown label cannot be flipped; write it in the manifest.")
    if not value:
        raise InputError(f"{file}: data row {row}: image_sha256 is blank, so the film cannot be found.")
    return Correction(row=row, sha256=value.lower(), name=name, label=KNOWN_OR_NOT[label], mark=word)


def apply(given: Corrections, labels: np.ndarray, sha256: Sequence[str], classes: Sequence[str]) -> Corrected:
    """Flip or mask the marked labels of N films; labels (N, C) 1, 0, -1, -2, unchanged themselves.

    A mark is skipped, and counted, where no film has its bytes, and where the label is no longer what it was when the
    mark was set. Raises InputError for a class that is none of `classes`, and where no mark's film is here.
    """
    column = {name: c for c, name in enumerate(classes)}
    rows: dict[str, list[int]] = defaultdict(list)
    for row, value in enumerate(sha256):
        rows[value].append(row)
    out, changed = labels.copy(), np.zeros(labels.shape, bool)
    count: Counter[str] = Counter()
    for mark in given.marks:
        if mark.name not in column:
            raise InputError(f"{given.file}: data row {mark.row}: there is no class {mark.name!r}.")
        c = column[mark.name]
        films = rows.get(mark.sha256, [])
        fits = [row for row in films if max(int(labels[row, c]), UNKNOWN) == mark.label]
        if not fits:
            count[OTHER_LABEL if films else NO_FILM] += 1
            continue
        count[mark.mark] += len(fits)
        if mark.mark != KEEP:
            out[fits, c] = UNKNOWN if mark.mark == MASK else 1 - mark.label
            changed[fits, c] = True
    if count[NO_FILM] == len(given.marks):
        raise InputError(
            f"{given.file}: no film of its {len(given.marks):,} marks is among those of the sweep; give the list that "
            "was made of a run on these films."
        )
    skipped = {reason: count[reason] for reason in (NO_FILM, OTHER_LABEL) if count[reason]}
    return Corrected(
        labels=out, changed=changed, kept=count[KEEP], flipped=count[FLIP], unknown=count[MASK], skipped=skipped
    )


def describe_source(source: str, made: Mapping[str, Any] | None) -> str:
    """Say where labels are from: `source`, and the list that corrected some of them, as `run.json` records it."""
    return f"{source}, {made['flipped'] + made['unknown']:,} of them corrected by {made['file']}" if made else source


def is_corrections(file: Path) -> bool:
    """Whether the header of a CSV is that of corrections and not of a manifest."""
    if not file.is_file() or not file.name.lower().endswith(TEXTS):
        return False
    try:
        return set(COLUMNS) <= set(read_header(file))
    except InputError:
        return False
