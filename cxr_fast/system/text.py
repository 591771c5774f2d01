"""Numbers, durations, sizes, and tables that are made once and shown in every medium."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NONE = "–"  # a figure that is undefined, on a page and in Markdown


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A value with its interval, shown with `digits` decimals; None or NaN where it is undefined.

    `signed` is for differences: a plus stands before what is not negative. Where the interval is of a mean over fewer
    classes than the value is, `over` is how many, and `over_value` their mean.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    digits: int = 3
    signed: bool = False
    over: int | None = None
    over_value: float | None = None

    def __str__(self) -> str:
        return f"{self.text} {self.interval}".strip()

    @property
    def defined(self) -> bool:
        """Whether there is a finite value."""
        return self.value is not None and math.isfinite(self.value)

    @property
    def text(self) -> str:
        """`0.812`, or a dash."""
        return self._shown(self.value) if self.value is not None and self.defined else NONE

    @property
    def interval(self) -> str:
        """`[0.779, 0.843]`, or `(11 classes: 0.806 [0.779, 0.843])`; empty where there is none."""
        if not self.defined or self.low is None or self.high is None:
            return ""
        ends = f"[{self._shown(self.low)}, {self._shown(self.high)}]"
        if self.over is None or self.over_value is None:
            return ends
        return f"({self.over} class{'es' * (self.over != 1)}: {self._shown(self.over_value)} {ends})"

    def _shown(self, value: float) -> str:
        return f"{value:{'+' if self.signed else ''}.{self.digits}f}"


@dataclass(frozen=True, kw_only=True)
class Label:
    """Text that sorts by a value (None: last), as a duration does by its seconds; `alarm` shows it in red on a page."""

    text: str
    value: float | None = None
    alarm: bool = False

    def __str__(self) -> str:
        return self.text


Cell = str | int | float | Figure | Label | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells under columns: the first column names the row, the others are its figures.

    `chosen` are indices of rows that stand out and `mark` is the word for them in text, `foot` rows close the table,
    `notes` say how to read it, `left` names columns of text that begin at the left, as the first does. Made once;
    `to_plain`, `to_markdown` and `to_csv` show it here, the command line draws it with rich, a page with jinja2.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    chosen: Sequence[int] = ()
    foot: Sequence[Sequence[Cell]] = ()
    notes: Sequence[str] = ()
    sortable: bool = False
    mark: str = "chosen"
    left: Sequence[str] = ()

    def texts(self) -> Iterator[list[str]]:
        """Every row and foot row as text."""
        for row in (*self.rows, *self.foot):
            yield [cell_text(value) for value in row]


def cell_text(value: Cell) -> str:
    """A cell as a person reads it: a dash for None, thousands apart in whole numbers."""
    if value is None:
        return NONE
    return f"{value:,}" if isinstance(value, int) else str(value)


def to_plain(table: Table) -> str:
    """As aligned text without colour, for pipes and logs: an arrow with the table's `mark` behind the chosen rows."""
    head, rows = list(table.columns), list(table.texts())
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    sides = [str.ljust if i == 0 or name in table.left else str.rjust for i, name in enumerate(head)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(side(c, w) for side, c, w in zip(sides, cells, widths, strict=True)).rstrip()

    body = [line(row) + (f"  <- {table.mark}" if i in table.chosen else "") for i, row in enumerate(rows)]
    return "\n".join([line(head), "  ".join("-" * w for w in widths), *body, *table.notes])


def to_markdown(table: Table) -> str:
    """As a Markdown table, its notes below it."""
    rows = [table.columns, ["---", *["---:"] * (len(table.columns) - 1)], *table.texts()]
    lines = ["| " + " | ".join(_in_markdown(text) for text in row) + " |" for row in rows]
    return "\n".join([*lines, *(f"\n{_in_markdown(note)}" for note in table.notes)])


def _in_markdown(text: str) -> str:
    """One line that is neither markup nor the end of a cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def to_csv(table: Table, end: str = "\n") -> str:
    """As CSV in full precision without the foot: a column that holds Figures becomes value, `_low` and `_high`."""
    wide = [any(isinstance(row[i], Figure) for row in table.rows) for i in range(len(table.columns))]

    def cells(value: Cell, spread: bool) -> list[Any]:
        if not spread:
            return [value]
        return [value.value, value.low, value.high] if isinstance(value, Figure) else [value, None, None]

    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=end)
    pairs = zip(table.columns, wide, strict=True)
    writer.writerow([name for c, w in pairs for name in ([c, f"{c}_low", f"{c}_high"] if w else [c])])
    for row in table.rows:
        writer.writerow([each for value, w in zip(row, wide, strict=True) for each in cells(value, w)])
    return out.getvalue()


def table(head: list[str], rows: list[list[str]], *, mark: int | None = None, name: str = "chosen") -> str:
    """Columns aligned, first left, the others right; `mark` puts an arrow with `name` behind one row."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "  ".join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]).rstrip()

    body = [line(row) + (f"  <- {name}" if i == mark else "") for i, row in enumerate(rows)]
    return "\n".join([line(head), "  ".join("-" * w for w in widths), *body])


def duration(seconds: float, *, tenths: bool = False) -> str:
    """`4 s` (with `tenths` `4.2 s`), `42 s`, `3 min 10 s`, `2 h 05 min`."""
    s = round(seconds)
    if s < 60:
        return f"{seconds:.1f} s" if tenths and s < 10 else f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"


def gigabytes(count: float) -> str:
    """`4.5 GB`, `83 MB`, `210 kB`."""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def counted(count: int, noun: str) -> str:
    """`1 epoch`, `5 epochs`.

    >>> counted(1, "epoch"), counted(1200, "image")
    ('1 epoch', '1,200 images')
    """
    return f"{count:,} {noun}{'s' * (count != 1)}"


def note_own_size(backbone: Mapping[str, Any]) -> str:
    """Note the image size that a backbone was made for, from its config; empty where it is used at that size."""
    own = backbone.get("own_image_size")
    return f" (positions interpolated from those for {own})" if own else ""


def number(value: Any) -> str:
    """Four decimals, or `-` where a figure is undefined."""
    return "-" if value is None else f"{value:.4f}"


def file_name(name: str) -> str:
    """A dataset's name as part of a path: separators and what hides a file become a dash."""
    return re.sub(r"[/\\\0]+|^\.+", "-", name).strip() or "dataset"
