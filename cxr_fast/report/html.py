"""Pages and cards from the templates; a page holds its style, script and pictures and asks for nothing else."""

from __future__ import annotations

import base64
import functools
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..config import NOTICE
from ..system.text import Figure, Label, Table, cell_text, to_markdown

TEMPLATES = Path(__file__).parent / "templates"
ASSETS = Path(__file__).parents[1] / "assets"
# Pixels of a picture to one of the page: plots are drawn at 160 an inch, a page has 96.
DENSITY = 160 / 96
# The page can ask for nothing, whatever its text: a browser that reads this refuses every address but its own data.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG as a page holds it: its address, and its size in pixels of the page."""

    source: str
    width: int
    height: int


def embed(png: bytes) -> Picture:
    """Return a PNG as a data address with its size on the page."""
    width, height = (round(side / DENSITY) for side in struct.unpack(">II", png[16:24]))
    return Picture(source=f"data:image/png;base64,{base64.b64encode(png).decode()}", width=width, height=height)


def capitalise(text: str) -> str:
    """Return the text with a capital first letter, all others as they are."""
    return text[:1].upper() + text[1:]


def environment(*, markdown: bool = False) -> Environment:
    """Return the templates' environment: every value printed is text and never markup, and an unknown name an error."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=not markdown,
        finalize=as_markdown if markdown else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.do"],
    )
    made.globals |= {"notice": NOTICE, "policy": Markup(POLICY)}
    made.filters |= {"shown": cell_text, "capitalise": capitalise, "embed": embed}
    made.filters |= {"quoted": quote, "markdown": table_as_markdown}
    made.tests |= {"figure": lambda x: isinstance(x, Figure), "label": lambda x: isinstance(x, Label)}
    return made


def as_markdown(value: Any) -> Any:
    """Return one line of text that Markdown does not take for markup; Markup stays as it is."""
    return value if isinstance(value, Markup) else " ".join(str(value).split()).replace("<", "&lt;")


def quote(value: str) -> Markup:
    """Return a string quoted as JSON, which YAML reads."""
    return Markup(json.dumps(value, ensure_ascii=False))


def table_as_markdown(table: Table) -> Markup:
    """Return a table as Markdown."""
    return Markup(to_markdown(table))


@functools.cache
def _pages() -> Environment:
    made = environment()
    texts = {"css_text": ("report.css",), "js_text": ("report.js", "thresholds.js")}
    made.globals |= {
        key: Markup("".join((ASSETS / name).read_text("utf-8") for name in names)) for key, names in texts.items()
    }
    return made


def render_page(template: str, **values: Any) -> bytes:
    """Return a whole page as UTF-8. The template appends each section that is not empty to `nav`."""
    return _pages().get_template(template).render(nav=[], **values).encode()


def render_markdown(template: str, **values: Any) -> bytes:
    """Return a Markdown file as UTF-8."""
    return environment(markdown=True).get_template(template).render(values).encode()
