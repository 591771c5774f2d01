"""One run as one page: the summary, what is missing, then every section."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import NOTICE
from . import making, outcome
from .html import contents, document, listing, paragraph, text
from .summary import Material


def page(material: Material) -> bytes:
    """The whole page of a run, complete in itself."""
    run = material.run
    title = f"{material.name}: fine-tuning report"
    sections = [made for make in (*outcome.ALL, *making.ALL) if (made := make(material))]
    parts = [
        "<header>",
        f"<h1>{text(title)}</h1>",
        paragraph(f"{run['written_by']}, {run['created']}. {NOTICE}", "note"),
        paragraph(material.warning, "warn"),
        paragraph(" ".join(material.summary()), "lead"),
        missing(material.missing),
        contents(sections),
        "</header>",
        "<main>",
        *sections,
        "</main>",
        f'<footer><p class="note">{text(NOTICE)}</p></footer>',
    ]
    return document(f"cxr-fast: {material.name}", "\n".join(part for part in parts if part))


def missing(lines: Sequence[str]) -> str:
    """What is not on the page, and why; nothing where all is there."""
    if not lines:
        return ""
    told = [f"{line[0].upper()}{line[1:]}".rstrip(".") for line in lines]
    return f'<div class="lacking" id="missing"><p><strong>Not on this page:</strong></p>{listing(told)}</div>'
