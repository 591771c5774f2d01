"""Read the one sheet of an Excel file as columns of text, with openpyxl (the extra `excel`)."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError
from .extras import needs
from .tables import Cells, to_cells


def read_excel(path: Path) -> Cells:
    """An .xlsx file as column name to stripped cells; numbers as they read in a CSV, days as 2024-05-31.

    Raises InputError for a file of several sheets with data, a formula without its value, an error value such as #N/A,
    and a file that is no Excel file.
    """
    try:
        import openpyxl
    except ImportError:
        raise InputError(f"{path}: Excel {needs('openpyxl')}, or save it as CSV.") from None
    try:
        with path.open("rb") as file, path.open("rb") as again:
            values = openpyxl.load_workbook(file, read_only=True, data_only=True)
            formulas = openpyxl.load_workbook(again, read_only=True)
            sheets = {sheet.title: _rows(path, sheet, formulas[sheet.title]) for sheet in values.worksheets}
            filled = {title: rows for title, rows in sheets.items() if rows}
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}.") from None
    except Exception as error:  # openpyxl raises whatever its XML and zip readers raise
        why = str(error).partition("\n")[0][:120] or type(error).__name__
        raise InputError(f"{path} is not a whole Excel file ({why}): save it again, or as CSV.") from None
    if not filled:
        raise InputError(f"{path} is empty.")
    if len(filled) > 1:
        raise InputError(
            f"{path} has {len(filled)} sheets with data ({', '.join(filled)}): save one as a file of its own."
        )
    (rows,) = filled.values()
    (_, header), *body = rows
    while header and not header[-1]:
        header.pop()
    return to_cells(path, header, ((number, row + [""] * (len(header) - len(row))) for number, row in body))


def _rows(path: Path, sheet: Any, formulas: Any) -> list[tuple[int, list[str]]]:
    """(row number, cells) of the rows that are not blank."""
    for each in (sheet, formulas):
        each.reset_dimensions()  # files name any size there
    return list(_filled(path, sheet, formulas))


def _filled(path: Path, sheet: Any, formulas: Any) -> Iterator[tuple[int, list[str]]]:
    pairs = zip(sheet.iter_rows(values_only=True), formulas.iter_rows(values_only=True), strict=True)
    for number, (row, written) in enumerate(pairs, start=1):
        for value, formula in zip(row, written, strict=False):
            if value is None and isinstance(formula, str) and formula.startswith("="):
                raise InputError(
                    f"{path}, row {number}: {formula[:40]} has no value; open the file in Excel and save it."
                )
            if isinstance(value, str) and value in ("#N/A", "#REF!", "#VALUE!", "#NAME?", "#DIV/0!", "#NUM!", "#NULL!"):
                raise InputError(f"{path}, row {number}: a cell holds the error {value}; correct it.")
        if any(cells := [_text(value) for value in row]):
            yield number, cells


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    return str(value).strip()
