"""The review page as HTML, with its films as large as fit into its limit."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from markupsafe import Markup
from PIL import Image

from ..report.html import ASSETS, render_page
from .cards import Card, Section, all_cards, filters, kinds_of
from .films import PARTS, RunFilms
from .pictures import shrink

LIMIT = 8_000_000  # bytes of the whole page
# Longer side and WebP quality of a film, and of one that is only near another: the first that fits is taken.
SIZES = (
    *((384, 75, 112, 60), (320, 70, 96, 60), (256, 65, 80, 55), (224, 60, 80, 50), (192, 55, 64, 50)),
    *((160, 45, 56, 40), (128, 40, 48, 35), (96, 35, 0, 0)),
)
SAMPLE = 40  # films of which a size is tried before all are made


@dataclass(frozen=True, kw_only=True)
class PagePicture:
    """A film in the page: base64 of a WebP, and its size in pixels."""

    base64: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Heat:
    """A heat map in the page: base64 of a PNG, and where it lies on the film as CSS."""

    base64: str
    style: str

    @classmethod
    def of(cls, png: bytes, style: str) -> Heat:
        """A heat map from its PNG."""
        return cls(base64=base64.b64encode(png).decode(), style=style)


@dataclass(frozen=True, kw_only=True)
class ReviewPage:
    """Everything the page shows. `heat` by row and class number, `pictures` and `lost` by row."""

    name: str
    films: RunFilms
    sections: tuple[Section, ...]
    notes: tuple[str, ...]
    missing: tuple[str, ...]
    warning: str
    heat: Mapping[tuple[int, int], Heat]
    lost: Mapping[int, str]
    pictures: Mapping[int, PagePicture] = field(default_factory=dict)

    @functools.cached_property
    def cards(self) -> list[Card]:
        """All cards in order."""
        return all_cards(self.sections)

    @functools.cached_property
    def classes(self) -> dict[int, str]:
        """Names of the classes that cards have, by number."""
        return {c: self.films.classes[c] for c in sorted({card.c for card in self.cards}) if c >= 0}

    @functools.cached_property
    def parts(self) -> dict[str, str]:
        """Titles of the parts that cards have."""
        found = {card.part for card in self.cards}
        return {key: title for key, title in PARTS.items() if key in found}

    @functools.cached_property
    def kinds(self) -> list[str]:
        """Kinds that cards have."""
        return kinds_of(self.cards)

    @functools.cached_property
    def filters(self) -> Mapping[str, list[str]]:
        """Columns to filter by, with their values."""
        return filters(self.films, self.cards)

    def fact(self, card: Card, title: str) -> str:
        """The value of a column on a card."""
        return card.facts[self._places[title]]

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {title: place for place, title in enumerate(self.films.columns)}

    def sha256(self, row: int) -> str:
        """The hash of a film's bytes."""
        return str(self.films.sha256[row])


def render_review(page: ReviewPage, thumbnails: Mapping[int, bytes], limit: int = LIMIT) -> bytes:
    """The page with the films of `thumbnails` (WebP by row), as large as lets the whole stay below `limit` bytes.

    Where even the smallest do not fit, films that are only near others go first, then those of the last cards.
    """
    style, script = (Markup((ASSETS / f"review.{kind}").read_text("utf-8")) for kind in ("css", "js"))

    def render(pictures: Mapping[int, PagePicture]) -> bytes:
        whole = replace(page, pictures=pictures)
        return render_page("review.html.j2", page=whole, style=style, script=script)

    cards = page.cards
    own = dict.fromkeys((row for card in cards for row in card.rows if row in thumbnails), True)
    near = (each.row for card in cards for each in card.near)
    rows = own | dict.fromkeys((row for row in near if row in thumbnails and row not in own), False)
    room = limit - len(render(dict.fromkeys(rows, PagePicture(base64="", width=SIZES[0][0], height=SIZES[0][0]))))
    made: dict[int, PagePicture] = {}
    for side, quality, small, low in SIZES:
        sizes = {row: (side, quality) if shown else (small, low) for row, shown in rows.items()}
        if side > SIZES[-1][0] and _guess(thumbnails, sizes) > room:
            continue
        made = _make(thumbnails, sizes)
        if _bytes(made) <= room:
            return render(made)
    while made and _bytes(made) > room:
        made.popitem()
    return render(made)


def _guess(thumbnails: Mapping[int, bytes], sizes: Mapping[int, tuple[int, int]]) -> float:
    """About how many bytes films of these sizes take, from some of each size."""
    total = 0.0
    for size in set(sizes.values()):
        rows = [row for row, each in sizes.items() if each == size]
        some = rows[:: max(1, len(rows) // SAMPLE)]
        made = _make(thumbnails, dict.fromkeys(some, size))
        total += _bytes(made) * len(rows) / len(some)
    return 0.97 * total  # a guess that is a little too low costs one try, one too high a size


def _make(thumbnails: Mapping[int, bytes], sizes: Mapping[int, tuple[int, int]]) -> dict[int, PagePicture]:
    made = {}
    for row, (side, quality) in sizes.items():
        if side:
            with Image.open(io.BytesIO(thumbnails[row])) as image:
                small = shrink(image, side, quality)
                width, height = image.size
            made[row] = PagePicture(base64=base64.b64encode(small).decode(), width=width, height=height)
    return made


def _bytes(made: Mapping[int, PagePicture]) -> int:
    """Bytes that these pictures add to the page."""
    return sum(len(each.base64) for each in made.values())
