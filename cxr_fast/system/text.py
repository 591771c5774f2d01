"""Numbers, durations, sizes and tables as text for a terminal."""

from __future__ import annotations

import re
from typing import Any


def table(head: list[str], rows: list[list[str]], *, mark: int | None = None, name: str = "chosen") -> str:
    """Columns aligned, first left, the others right; `mark` puts an arrow with `name` behind one row."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "  ".join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]).rstrip()

    body = [line(row) + (f"  <- {name}" if i == mark else "") for i, row in enumerate(rows)]
    return "\n".join([line(head), "  ".join("-" * w for w in widths), *body])


def duration(seconds: float) -> str:
    """`42 s`, `3 min 10 s`, `2 h 05 min`."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"


def gigabytes(count: float) -> str:
    """`4.5 GB`, `83 MB`, `210 kB`."""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def number(value: Any) -> str:
    """Four decimals, or `-` where a figure is undefined."""
    return "-" if value is None else f"{value:.4f}"


def file_name(name: str) -> str:
    """A dataset's name as part of a path: separators and what hides a file become a dash."""
    return re.sub(r"[/\\\0]+|^\.+", "-", name).strip() or "dataset"
