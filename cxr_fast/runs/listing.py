"""The list of all runs below a folder: found, filtered, sorted, as a table."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..config import PARTIAL
from ..errors import InputError
from ..system.text import Cell, Figure, Label, Table, gigabytes
from .entry import DONE, UNREADABLE, RunEntry, read_entry

COLUMNS = tuple(field.name for field in msgspec.structs.fields(RunEntry))
NUMBERS = frozenset({"done", "folds", "epochs", "valid_auc", "valid_std", "holdout_auc", "holdout_map"}) | {
    *("size", "seconds")
}
_CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|!=|=|<|>|~)\s*(.*?)\s*")
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


def list_runs(folder: Path) -> list[RunEntry]:
    """Every run and unfinished run in a folder and the folders below it, the newest first.

    Raises InputError where the folder does not exist.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; `cxrfast sweep` makes exports/NAME.")
    return sorted(map(read_entry, find_runs(folder)), key=lambda entry: (entry.created, entry.path), reverse=True)


def find_runs(folder: Path) -> list[Path]:
    """The folders that hold run.json, or are `NAME.partial` with a plan; nothing inside of these is looked at."""
    found = []
    for path, folders, names in os.walk(folder):
        unfinished = path.endswith(PARTIAL) and "plan.json" in names
        if "run.json" in names or unfinished:
            found.append(Path(path))
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return found


def filter_runs(entries: Iterable[RunEntry], conditions: Sequence[str]) -> list[RunEntry]:
    """Those that meet every condition `COLUMN=VALUE`, with <, >, <=, >=, != or ~ (holds the text) in place of =.

    A figure that is not known meets none but `!=`. Raises InputError on a condition that is none.
    """
    parsed = [_parse(text) for text in conditions]
    return [entry for entry in entries if all(_meets(entry, *condition) for condition in parsed)]


def _parse(text: str) -> tuple[str, str, Any]:
    if not (match := _CONDITION.fullmatch(text)):
        raise InputError(f"--where: {text!r} must be COLUMN=VALUE, or with <, >, <=, >=, != or ~ in place of =.")
    column, sign, value = match.groups()
    _require_column(column, "--where")
    if column in NUMBERS and sign != "~":
        try:
            return column, sign, float(value)
        except ValueError:
            raise InputError(f"--where: {value!r} is not a number, which {column} is compared to.") from None
    if sign in ("<", ">", "<=", ">=") and column != "created":
        raise InputError(f"--where: {column} is text, which = and ~ (holds) compare; not {sign}.")
    return column, sign, value


def _meets(entry: RunEntry, column: str, sign: str, value: Any) -> bool:
    own = getattr(entry, column)
    if column in NUMBERS and sign != "~":
        return sign == "!=" if own is None else bool(_ORDER[sign](float(own), value))
    text = _text(own)
    if sign == "~":
        return value.casefold() in text.casefold()
    if column == "created" and sign not in ("=", "!="):
        return bool(_ORDER[sign](text, value))
    same = text.casefold() == value.casefold() or (column == "created" and text.startswith(value) and bool(value))
    return same == (sign == "=")


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def sort_runs(entries: Iterable[RunEntry], column: str, *, reverse: bool = False) -> list[RunEntry]:
    """Sort by a column: figures and dates the largest first, text from A to Z, unknown last; `reverse` turns it.

    Raises InputError on an unknown column.
    """
    _require_column(column, "--sort")
    down = (column in NUMBERS or column == "created") != reverse
    known = [entry for entry in entries if getattr(entry, column) not in (None, "")]
    rest = [entry for entry in entries if getattr(entry, column) in (None, "")]

    def key(entry: RunEntry) -> Any:
        value = getattr(entry, column)
        return value if column in NUMBERS else _text(value).casefold()

    return sorted(known, key=key, reverse=down) + rest


def _require_column(column: str, flag: str) -> None:
    if column not in COLUMNS:
        raise InputError(f"{flag}: {column!r} is no column; it takes {', '.join(COLUMNS)}.")


def runs_table(entries: Sequence[RunEntry], folder: Path, digits: int = 3) -> Table:
    """The runs below a folder as a table, one row each; columns that are empty for all are left out."""
    columns: dict[str, list[Cell]] = {
        "run": [os.path.relpath(entry.path, folder).removesuffix(PARTIAL) for entry in entries],
        "state": [_state(entry) for entry in entries],
        "date": [entry.created[:16].replace("T", " ") for entry in entries],
        "data": [entry.data for entry in entries],
        "encoder": [f"{entry.encoder} (RANDOM)" if entry.random else entry.encoder for entry in entries],
        "settings": [entry.settings for entry in entries],
        "folds": [entry.folds for entry in entries],
        "epochs": [entry.epochs for entry in entries],
        "validation AUC": [_spread(entry, digits) for entry in entries],
        "hold-out AUC": [Figure(value=entry.holdout_auc, digits=digits) for entry in entries],
        "mAP": [Figure(value=entry.holdout_map, digits=digits) for entry in entries],
        "files": [" ".join(entry.files) for entry in entries],
        "size": [Label(text=gigabytes(entry.size), value=entry.size) for entry in entries],
        "note": [entry.note or entry.problem for entry in entries],
    }
    keep = {name: cells for name, cells in columns.items() if name == "run" or any(map(_filled, cells))}
    rows = [list(row) for row in zip(*keep.values(), strict=True)]
    return Table(columns=list(keep), rows=rows, left=("state", "data", "encoder", "settings", "files", "note"))


def _filled(cell: Cell) -> bool:
    return cell.defined if isinstance(cell, Figure) else cell not in (None, "")


def _state(entry: RunEntry) -> str:
    return entry.state if entry.state in (DONE, UNREADABLE) else f"{entry.state} at {100 * entry.done:.0f} %"


def _spread(entry: RunEntry, digits: int) -> Cell:
    if entry.valid_auc is None:
        return None
    spread = "" if entry.valid_std is None else f" ± {entry.valid_std:.{digits}f}"
    return Label(text=f"{entry.valid_auc:.{digits}f}{spread}", value=entry.valid_auc)


def to_rows(entries: Sequence[RunEntry]) -> list[dict[str, Any]]:
    """Every column of every run in full precision, JSON-ready."""
    return [msgspec.json.decode(msgspec.json.encode(entry)) for entry in entries]
