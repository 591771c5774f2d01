"""The pieces of a page: numbers as text, cells, tables, pictures, and the whole that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "assets"
NONE = "–"
# Pixels of a picture to one of the page: plots are drawn at 160 an inch, a page has 96.
DENSITY = 160 / 96
# The page can ask for nothing, whatever its text: a browser that reads this refuses every address but its own data.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

PARTS = {"train": "Training", "out_of_fold": "Validation (out of fold)", "holdout": "Hold-out"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table: its text, what it sorts by (None: last), and an interval set apart from the text."""

    text: str
    sort: float | None = None
    interval: str = ""
    css: str = ""


# Rows of a table; its first cells are the rows' heads.
Lines = list[list[str | Cell]]


def number(value: Any) -> str:
    """Three decimals, or a dash where a figure is undefined."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.3f}"


def brackets(figure: Mapping[str, Any]) -> str:
    """`[0.779, 0.843]`; empty where there is no interval."""
    low, high = figure["low"], figure["high"]
    return "" if figure["value"] is None or low is None or high is None else f"[{number(low)}, {number(high)}]"


def with_interval(figure: Mapping[str, Any] | None) -> str:
    """`0.812 [0.779, 0.843]`; the figure alone where it has no interval, a dash where it is undefined."""
    if figure is None:
        return NONE
    return f"{number(figure['value'])} {brackets(figure)}".strip()


def figure_cell(figure: Mapping[str, Any] | None) -> Cell:
    """A figure with its interval, sorting by the figure."""
    if figure is None or figure["value"] is None:
        return Cell(text=NONE)
    return Cell(text=number(figure["value"]), sort=figure["value"], interval=brackets(figure))


def value_cell(value: float | None) -> Cell:
    """A bare figure of three decimals."""
    return Cell(text=number(value), sort=value)


def count_cell(value: int | None) -> Cell:
    """A whole number with thousands apart."""
    return Cell(text=NONE if value is None else f"{value:,}", sort=value)


def of_classes(part: Mapping[str, Any]) -> str:
    """`33 of 35`: how many classes a mean is taken over."""
    return f"{part['classes_defined']} of {part['classes_total']}"


def duration(seconds: float) -> str:
    """`4.2 s`, `42 s`, `3 min 10 s`, `2 h 05 min`."""
    s = round(seconds)
    if s < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"


def text(value: Any) -> str:
    """Anything as text of a page, never as markup."""
    return html.escape(str(value))


def paragraph(value: str, css: str = "") -> str:
    """A paragraph of plain text; nothing for no text."""
    return f"<p{_css(css)}>{text(value)}</p>" if value else ""


def note(value: str) -> str:
    """A smaller paragraph that says how to read what stands beside it."""
    return paragraph(value, "note")


def listing(values: Iterable[str], css: str = "") -> str:
    """A bulleted list of plain text."""
    return f"<ul{_css(css)}>" + "".join(f"<li>{text(value)}</li>" for value in values) + "</ul>"


def section(name: str, title: str, *parts: str) -> str:
    """A titled part of the page; nothing where all its parts are empty."""
    inside = "\n".join(part for part in parts if part)
    return f'<section id="{name}">\n<h2>{text(title)}</h2>\n{inside}\n</section>' if inside else ""


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str | Cell]],
    *,
    caption: str,
    foot: Sequence[Sequence[str | Cell]] = (),
    marks: Sequence[bool] = (),
    css: str = "full",
    show_caption: bool = True,
) -> str:
    """A table that scrolls sideways where the screen is narrow, by keyboard too; rows of `marks` stand out.

    `css` may hold `sortable`, `words` (text, not numbers) and `full` (as wide as the page).
    """
    marks = marks or [False] * len(rows)
    body = "\n".join(_row(row, "chosen" if mark else "") for row, mark in zip(rows, marks, strict=True))
    bottom = f"<tfoot>{''.join(_row(row) for row in foot)}</tfoot>" if foot else ""
    top = f"<thead><tr>{''.join(_head(name) for name in head)}</tr></thead>" if any(head) else ""
    named = f"<caption>{text(caption)}</caption>" if show_caption else ""
    return (
        f'<div class="scroll" role="region" aria-label="{text(caption)}" tabindex="0">'
        f"<table{_css(css)}>{named}{top}<tbody>\n{body}\n</tbody>{bottom}</table></div>"
    )


def _head(name: str) -> str:
    return f'<th scope="col">{text(name)}</th>'


def _row(row: Sequence[str | Cell], css: str = "") -> str:
    first, *others = (cell if isinstance(cell, Cell) else Cell(text=str(cell)) for cell in row)
    plain = [isinstance(cell, str) for cell in row]
    cells = [_cell(first, "th", ' scope="row"', plain[0])]
    cells += [_cell(cell, "td", "", is_text) for cell, is_text in zip(others, plain[1:], strict=True)]
    return f"<tr{_css(css)}>{''.join(cells)}</tr>"


def _cell(cell: Cell, tag: str, more: str, is_text: bool) -> str:
    value = "" if is_text else f' data-v="{"" if cell.sort is None else repr(float(cell.sort))}"'
    interval = f' <span class="ci">{text(cell.interval)}</span>' if cell.interval else ""
    return f"<{tag}{more}{value}{_css(cell.css)}>{text(cell.text)}{interval}</{tag}>"


def _css(names: str) -> str:
    return f' class="{names}"' if names else ""


def picture(alt: str, data: bytes | None, caption: str = "", *, wide: bool = False) -> str:
    """A PNG inside the page; `wide` keeps it readable on a phone by letting it scroll."""
    if data is None:
        return ""
    width, height = (round(side / DENSITY) for side in struct.unpack(">II", data[16:24]))
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    image = f'<img{_css("wide" if wide else "")} alt="{text(alt)}" width="{width}" height="{height}" src="{source}">'
    if wide:
        image = f'<div class="scroll" role="region" aria-label="{text(alt)}" tabindex="0">{image}</div>'
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f"<figure>{image}{below}</figure>"


def pair(*parts: str) -> str:
    """Parts beside each other where there is room, else below each other."""
    inside = [f"<div>{part}</div>" for part in parts if part]
    return f'<div class="pair">{"".join(inside)}</div>' if inside else ""


def contents(sections: Sequence[str]) -> str:
    """Links to the sections that are there."""
    links = []
    for part in sections:
        name, _, rest = part.removeprefix('<section id="').partition('"')
        links.append(f'<a href="#{name}">{rest.partition("<h2>")[2].partition("</h2>")[0]}</a>')
    return f'<nav aria-label="Contents">{" ".join(links)}</nav>'


def document(title: str, body: str) -> bytes:
    """The whole page: style, text and script in one file that asks for nothing else."""
    style, script = ((DATA / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="robots" content="noindex">'
        f'<title>{text(title)}</title><link rel="icon" href="data:,">'
    )
    page = f'<!doctype html>\n<html lang="en"><head>{head}\n<style>\n{style}</style></head>\n<body>\n{body}\n'
    return (page + f"<script>\n{script}</script>\n</body></html>\n").encode()
