"""Columns of text to and from CSV and Parquet, strictly.

UTF-8 (or UTF-16 with its mark), separated by commas, semicolons or tabs, every row as long as the header, no column
twice: a table read half is a model trained on wrong labels. Nothing is guessed as missing, which is why this is not
pandas: the word "None" stays a word.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import importlib
import io
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import InputError
from .extras import install
from .files import atomic, write_csv

Cells = dict[str, list[str]]
TEXTS, EXCEL = (".csv", ".csv.gz", ".tsv", ".tab", ".txt"), (".xlsx", ".xlsm")
KNOWN_OR_NOT = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "": -1}


DELIMITERS = ",;\t"
SAMPLE = 1 << 16


def _open_text(path: Path) -> IO[str]:
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        marked = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    text: IO[str] = opened(path, "rt", encoding="utf-16" if marked else "utf-8-sig", newline="")
    return text


def find_delimiter(text: str) -> str:
    """Return which of comma, semicolon and tab separates the columns of a CSV that begins with `text`.

    It is the one that gives the most columns, in header and first row alike; the comma where none gives two.
    """
    found = {}
    for mark in DELIMITERS:
        widths: list[int] = []
        with contextlib.suppress(csv.Error):
            for row in csv.reader(io.StringIO(text, newline=""), delimiter=mark):
                widths += [len(row)] * any(map(str.strip, row))
                if len(widths) == 2:
                    break
        widths = widths or [0]
        found[mark] = (widths[0] > 1 and widths[0] == widths[-1], widths[0])
    return max(found, key=lambda mark: found[mark])


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, stripped cells) of a CSV's rows that are not blank."""
    try:
        with _open_text(path) as file:
            delimiter = find_delimiter(file.read(SAMPLE))
            file.seek(0)
            reader = csv.reader(file, strict=True, delimiter=delimiter)
            for row in reader:
                if any(cells := [cell.strip() for cell in row]):
                    yield reader.line_num, cells
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: save it as 'CSV UTF-8'.") from None
    except csv.Error as error:
        raise InputError(f"{path} is not a whole CSV, line {reader.line_num}: {error}.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise InputError(f"{path} is not a whole gzip file: fetch it again.") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}.") from None


def read_header(path: Path) -> list[str]:
    """The column names of a CSV. Raises InputError where the file is empty or is not one."""
    for _, cells in _lines(path):
        return cells
    raise InputError(f"{path} is empty.")


def read_csv(path: Path) -> Cells:
    """A CSV as column name to stripped cells, in the order of the file. Raises InputError on any doubt."""
    lines = _lines(path)
    _, header = next(lines, (0, []))
    if not header:
        raise InputError(f"{path} is empty.")
    return to_cells(path, header, lines)


def to_cells(path: Path, header: Sequence[str], lines: Iterable[tuple[int, list[str]]]) -> Cells:
    """Rows with their line numbers as column name to cells. Raises InputError on any doubt."""
    if twice := [name for name, count in Counter(header).items() if name and count > 1]:
        raise InputError(f"{path} has two columns named {twice[0]!r}.")
    rows = []
    for number, row in lines:
        if len(row) > len(header) and not any(row[len(header) :]):
            row = row[: len(header)]
        if len(row) != len(header):
            raise InputError(f"{path}, line {number}: {len(row)} fields where the header has {len(header)}.")
        rows.append(row)
    if not rows:
        raise InputError(f"{path} has a header and no rows.")
    return {name: list(column) for name, column in zip(header, zip(*rows, strict=True), strict=True)}


def need(cells: Iterable[str], columns: Iterable[str] | Mapping[str, str], file: Path) -> None:
    """Raises InputError naming the columns that `file` lacks, what each holds where `columns` says it, and a column
    whose name differs in upper and lower case alone."""
    given = list(cells)
    if not (lacking := [name for name in columns if name not in given]):
        return
    meaning = columns if isinstance(columns, Mapping) else {}
    named = ", ".join(name + (f" ({meaning[name]})" if name in meaning else "") for name in lacking)
    alike = [(there, name) for name in lacking for there in given if there.lower() == name.lower()]
    case = ", ".join(f"write {there!r} as {name!r}" for there, name in alike)
    raise InputError(
        f"{file} lacks the column(s) {named}." + (f" Upper and lower case matter: {case}." if case else "")
    )


def filled(cells: Cells, column: str, file: Path) -> list[str]:
    """A column that may hold no blank. Raises InputError naming the first blank row."""
    if "" in cells[column]:
        raise InputError(f"{file}: column {column!r} is blank in data row {cells[column].index('') + 1}.")
    return cells[column]


def coded(cells: Cells, classes: Sequence[str], codes: Mapping[str, int], file: Path) -> np.ndarray:
    """Label columns as (N, C) int8. Raises InputError naming column, value and row of one not in `codes`."""
    out = np.empty((len(next(iter(cells.values()))), len(classes)), np.int8)
    for c, name in enumerate(classes):
        try:
            out[:, c] = [codes[value] for value in cells[name]]
        except KeyError as error:
            value = error.args[0]
            allowed = ", ".join(code for code in codes if code and "." not in code)
            raise InputError(
                f"{file}: column {name!r} holds {value!r} in data row {cells[name].index(value) + 1}; "
                f"a class takes {allowed} or nothing for unknown."
            ) from None
    return out


def multi_hot(found: Sequence[Collection[str]], classes: Sequence[str]) -> np.ndarray:
    """Sets of class names as (N, C) int8 of 1 and 0. Names must be in `classes`."""
    column = {name: c for c, name in enumerate(classes)}
    out = np.zeros((len(found), len(classes)), np.int8)
    for row, names in enumerate(found):
        for name in names:
            out[row, column[name]] = 1
    return out


def pyarrow(module: str, file: Path) -> Any:
    """A module of pyarrow, loaded only where Parquet is asked for. Raises InputError naming the extra."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{file}: Parquet needs pyarrow: {install('parquet')}, or use CSV.") from None


def _cell(value: Any) -> str:
    if value is None or value != value:
        return ""
    return str(int(value) if isinstance(value, bool) else value).strip()


def read_parquet(path: Path) -> Cells:
    """A Parquet file as column name to stripped cells; null and NaN are "". Raises InputError."""
    parquet = pyarrow("pyarrow.parquet", path)
    try:
        columns = parquet.read_table(path).to_pydict()
    except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of these
        raise InputError(f"{path} is not a whole Parquet file: {str(error).splitlines()[0]}") from None
    if not columns or not next(iter(columns.values())):
        raise InputError(f"{path} has no rows.")
    return {name.strip(): [_cell(value) for value in values] for name, values in columns.items()}


def write_table(columns: Mapping[str, Sequence[Any]], path: Path, flag: str = "") -> None:
    """Write columns (text, or 1, 0 and None) to `path`, .csv or .parquet, whole or not at all.

    Raises InputError, which names `flag` if one is given, for another suffix, and where the folder cannot be written.
    """
    if path.suffix == ".csv":
        write_csv(path, columns, zip(*columns.values(), strict=True), flag, end="\n", folders=True)
    elif path.suffix == ".parquet":
        table = pyarrow("pyarrow", path).table(dict(columns))
        with atomic(path, flag, folders=True) as file:
            pyarrow("pyarrow.parquet", path).write_table(table, file)
    else:
        what = f"{flag}: {path}" if flag else str(path)
        raise InputError(f"{what}: a manifest is written as .csv or .parquet.")
