"""Read a table by its suffix: CSV, Excel or Parquet."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from .excel import read_excel
from .tables import EXCEL, TEXTS, Cells, read_csv, read_parquet

SUFFIXES = (*TEXTS, *EXCEL, ".parquet")


def read_table(path: Path) -> Cells:
    """A CSV, Excel or Parquet file, by its suffix, as column name to stripped cells. Raises InputError."""
    name = path.name.lower()
    if name.endswith(TEXTS):
        return read_csv(path)
    if name.endswith(".parquet"):
        return read_parquet(path)
    if name.endswith(EXCEL):
        return read_excel(path)
    raise InputError(f"{path} is no table: give a file that ends in {', '.join(SUFFIXES)}.")
