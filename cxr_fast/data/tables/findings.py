"""Read findings from a table: a column per finding, or one column that lists them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ...errors import InputError
from ...system.tables import Cells, multi_hot
from ..labels import SOFT, UNCERTAIN, UNKNOWN
from .columns import TableSpec, find_column, find_word

YES = ("1", "1.0", "true", "yes", "y", "x", "positive", "pos", "present")
NO = ("0", "0.0", "false", "no", "n", "negative", "neg", "absent")
BLANK = ("", "nan", "na", "n/a", "null", "unknown", "?")
CODES = dict.fromkeys(YES, 1) | dict.fromkeys(NO, 0) | dict.fromkeys(BLANK, UNKNOWN) | {f"{SOFT:g}": UNCERTAIN}
MOST = 500  # PadChest has 193 findings and diagnoses
SEPARATOR, OTHERS = "|", ";,"


def read_columns(cells: Cells, spec: TableSpec, file: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """The columns that --classes names, as classes and labels (N, C).

    Raises InputError naming column, value and row.
    """
    classes = tuple(find_column(cells, name, "--classes", file) for name in spec.classes)
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        raise InputError(f"--classes: {twice[0]!r} is named twice.")
    labels = np.empty((len(next(iter(cells.values()))), len(classes)), np.int8)
    for c, name in enumerate(classes):
        for row, value in enumerate(cells[name]):
            code = CODES.get(value.casefold())
            if code is None:
                shown = value if len(value) <= 20 else f"{value[:20]}..."
                raise InputError(
                    f"{file}: column {name!r} holds {shown!r} in data row {row + 1}; a finding takes 1 or yes, 0 or "
                    f"no, nothing for unknown, {SOFT:g} for uncertain."
                )
            labels[row, c] = code
    return classes, labels


def list_candidates(cells: Cells, used: Iterable[str]) -> list[str]:
    """Name the columns that could be findings: not used, not blank, and of nothing but codes."""
    free = [name for name in cells if name and name not in set(used)]
    words = {name: {value.casefold() for value in cells[name]} for name in free}
    return [name for name in free if words[name] <= set(CODES) and any(CODES[word] >= 0 for word in words[name])]


def read_listed(cells: Cells, spec: TableSpec, file: Path) -> tuple[tuple[str, ...], np.ndarray, tuple[str, ...]]:
    """The words of the column that --labels names, as classes and labels (N, C), and notes.

    A word that is listed is 1, the others are 0; a blank cell is unknown in every class. Words that differ in case
    and spaces alone are one. Without --classes every word is a class. Raises InputError.
    """
    column = find_column(cells, spec.labels, "--labels", file)
    mark = spec.label_sep or SEPARATOR
    if not spec.label_sep:
        _refuse_other_separator(cells[column], file, column)
    listed = [_split(text, mark) for text in cells[column]]
    counts = Counter(word for words in listed for word in words)
    best: dict[str, str] = {}
    for word, _ in counts.most_common():
        best.setdefault(_spell(word), word)
    if not best:
        raise InputError(f"{file}: column {column!r} is blank in every row.")
    if len(best) > MOST:
        raise InputError(
            f"{file}: column {column!r} lists {len(best):,} different findings between {mark!r}, first "
            f"{_shorten(min(best.values()))!r}; name another column with --labels, or what separates with --label-sep."
        )
    words = sorted(best.values(), key=str.casefold)
    classes = tuple(words)
    if spec.classes:
        where = f"listed in column {column!r} of {file}"
        classes = tuple(dict.fromkeys(find_word(words, name, "--classes", where) for name in spec.classes))
    found = [{best[_spell(word)] for word in row} for row in listed]
    labels = multi_hot([row & set(classes) for row in found], classes)
    blank = np.array([not row for row in listed], bool)
    labels[blank] = UNKNOWN
    notes = []
    if blank.any():
        notes.append(f"{int(blank.sum()):,} row(s) list nothing in {column!r}: unknown, or none with --blank negative.")
    if len(best) < len(counts):
        notes.append(
            f"{len(counts) - len(best):,} spelling(s) of findings differ in case or spaces alone: read as one."
        )
    return classes, labels, tuple(notes)


def _split(text: str, mark: str) -> list[str]:
    """The findings of one cell; a list as Python writes it, `['a', 'b']`, has no brackets and quotes."""
    listed = text.startswith("[") and text.endswith("]")
    parts = (text[1:-1] if listed else text).split(mark)
    words = [part.strip().strip("'\"").strip() if listed else part.strip() for part in parts]
    return [word for word in words if word]


def _spell(word: str) -> str:
    return " ".join(word.split()).casefold()


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."


def _refuse_other_separator(texts: Iterable[str], file: Path, column: str) -> None:
    """Raise InputError where no cell holds the usual separator and some hold another."""
    texts = list(texts)
    if any(SEPARATOR in text for text in texts):
        return
    for mark in OTHERS:
        if holding := [text for text in texts if mark in text]:
            raise InputError(
                f"{file}: no cell of column {column!r} holds {SEPARATOR!r}, and {len(holding):,} hold {mark!r}, first "
                f"{_shorten(holding[0])!r}; say what separates findings with --label-sep '{mark}' (or '{SEPARATOR}')."
            )


def count_blanks_as_negative(labels: np.ndarray) -> int:
    """Set unknown labels (N, C) to 0 in place, as --blank negative says; return how many these were."""
    blank = labels == UNKNOWN
    labels[blank] = 0
    return int(blank.sum())


def select_classes(classes: Sequence[str], wanted: Sequence[str], where: str) -> list[int]:
    """Return the numbers of the classes that --classes names. Raises InputError with the nearest."""
    return [list(classes).index(find_word(classes, name, "--classes", where)) for name in dict.fromkeys(wanted)]
