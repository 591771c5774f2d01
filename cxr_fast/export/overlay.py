"""A film beside its heat maps, as one PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..config import NOTICE, PreprocessSpec
from ..data.images import placed

COLUMNS = 4
LONGEST = (1024, 512)  # pixels a film: up to COLUMNS panels, and more than that
NARROWEST = 400  # room for the text
COLOURS = "inferno"  # lightness rises evenly, so that it survives a grey print and colour blindness
FAINTEST = 0.25  # the colours below are too dark to be told from a film's own black
OPACITY = 0.65
DIM = 0.35
PAPER, INK, GREY, RED = (255, 255, 255), (27, 42, 58), (107, 120, 132), (190, 20, 20)


@dataclass(frozen=True, kw_only=True)
class Map:
    """One class on one image: calibrated probability, threshold, and shares (rows, columns) of the patch grid.

    The shares sum to 1, or are all 0 where no patch speaks for the class.
    """

    name: str
    probability: float
    threshold: float
    shares: np.ndarray = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Explained:
    """A film, uint8 grey (H, W) upright at full size, and its maps.

    `members` is how many models they are the mean of; `warning` must be said in red.
    """

    name: str
    grey: np.ndarray = field(repr=False)
    spec: PreprocessSpec
    maps: tuple[Map, ...]
    members: int
    warning: str


def on_film(
    shares: np.ndarray, film: tuple[int, int], shown: tuple[int, int], spec: PreprocessSpec
) -> tuple[np.ndarray, np.ndarray]:
    """A patch grid (rows, columns) over a film of (width, height), shown at another (width, height).

    Linear between the centres of patches. Returns the map and what of the film the model saw, (height, width) each.
    """
    wide, high, left, top = placed(*film, spec)
    down, rows_seen = _weights(shares.shape[0], spec.size, high, top, shown[1])
    across, columns_seen = _weights(shares.shape[1], spec.size, wide, left, shown[0])
    return down @ shares @ across.T, rows_seen[:, None] & columns_seen


def _weights(cells: int, size: int, resized: int, offset: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Along one side: each shown pixel's weight on each patch (pixels, cells), and whether the model saw it."""
    at = (np.arange(pixels) + 0.5) * resized / pixels - offset  # centres, in the square's pixels
    place = np.clip(at * cells / size - 0.5, 0, cells - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(cells))), (at >= 0) & (at <= size)


def shown_size(width: int, height: int, longest: int) -> tuple[int, int]:
    """The film's size in the picture, its aspect kept: the longer side at most `longest`, and at least half of it."""
    longer = max(width, height)
    scale = min(longest, max(longer, longest // 2)) / longer
    return max(1, round(width * scale)), max(1, round(height * scale))


def painted(film: np.ndarray, shares: np.ndarray, level: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The film (h, w) uint8 under a map (h, w), uint8 RGB: the highest of `shares` is coloured most, none not at all.

    What the model did not see is dimmed.
    """
    highest = shares.max()
    return _mix(np.where(seen, film, DIM * film), np.where(seen, level / highest if highest > 0 else 0.0, 0.0))


def _mix(grey: np.ndarray, level: np.ndarray) -> np.ndarray:
    import matplotlib

    colour = matplotlib.colormaps[COLOURS](FAINTEST + (1 - FAINTEST) * level)[..., :3] * 255
    opacity = (OPACITY * level)[..., None]
    return np.rint((1 - opacity) * grey[..., None] + opacity * colour).astype(np.uint8)


def picture(found: Explained) -> bytes:
    """The PNG: film and overlays in rows of COLUMNS, each with its class, probability, threshold and highest patch."""
    height, width = found.grey.shape
    longest = LONGEST[len(found.maps) >= COLUMNS]
    shown = shown_size(width, height, longest)
    film = np.array(Image.fromarray(found.grey).resize(shown, Image.Resampling.BICUBIC))
    panels = [(_film_text(found), np.repeat(film[..., None], 3, axis=2))]
    for each in found.maps:
        level, seen = on_film(each.shares, (width, height), shown, found.spec)
        panels.append((_map_text(each), painted(film, each.shares, level, seen)))
    return _png(_page(panels, found, shown))


def _film_text(found: Explained) -> list[tuple[str, tuple[int, int, int]]]:
    height, width = found.grey.shape
    members = f"mean of {found.members} models' maps" if found.members > 1 else ""
    return [(found.name, INK), (f"{width} x {height} pixels", GREY), (members, GREY)]


def _map_text(each: Map) -> list[tuple[str, tuple[int, int, int]]]:
    over = "over" if each.probability >= each.threshold else "under"
    highest = f"highest patch: {each.shares.max():.1%} of the map; even: {1 / each.shares.size:.1%}"
    return [
        (each.name, INK),
        (f"probability {each.probability:.3f}, {over} its threshold {each.threshold:.3f}", INK),
        (highest if each.shares.any() else "no patch speaks for it: the map is empty", GREY),
    ]


def _notes(found: Explained) -> list[str]:
    rows, columns = found.maps[0].shares.shape
    notes = [
        "Colour: where the class token looked in the last block, weighted by the gradient of that class's logit; only "
        f"what speaks for the class. {rows} x {columns} patches, smoothed between their centres; each map is coloured "
        "to its own highest patch.",
        "This is no proof of a finding, and no outline of one.",
    ]
    if found.members > 1:
        notes.append(f"Mean over {found.members} models, each model's map as shares of its own sum.")
    if found.spec.resize == "crop":
        notes.append("Dimmed: outside the square that the model saw.")
    return [*notes, NOTICE]


def _page(panels: Sequence[tuple[list[Any], np.ndarray]], found: Explained, shown: tuple[int, int]) -> Image.Image:
    """Warning, panels with three lines of text above each, colour bar, notes."""
    wide = max(shown[0], NARROWEST)
    size = min(max(wide // 28, 14), 26)
    font, line, gap = _font(size), round(1.4 * size), size
    columns = min(len(panels), COLUMNS)
    total = columns * (wide + gap) + gap
    warning = [f"{found.warning.upper()}: this picture says nothing about a patient."] if found.warning else []
    warning = _wrap(warning, font, total - 2 * gap)
    notes = _wrap(_notes(found), font, total - 2 * gap)
    rows = -(-len(panels) // columns)
    row_height = 3 * line + shown[1] + gap
    page = Image.new("RGB", (total, 3 * gap + line * (len(warning) + len(notes) + 2) + rows * row_height), PAPER)
    draw = ImageDraw.Draw(page)
    y = _lines(draw, warning, gap, gap, font, line, RED) + (gap if warning else 0)
    for i, (text, pixels) in enumerate(panels):
        x, up = gap + (i % columns) * (wide + gap), y + i // columns * row_height
        for k, (words, colour) in enumerate(text):
            draw.text((x, up + k * line), _fit(words, font, wide), colour, font)
        page.paste(Image.fromarray(pixels), (x + (wide - shown[0]) // 2, up + 3 * line))
    y = _bar(page, draw, gap, y + rows * row_height, font, line)
    _lines(draw, notes, gap, y, font, line, INK)
    return page


def _bar(page: Image.Image, draw: ImageDraw.ImageDraw, x: int, y: int, font: Any, line: int) -> int:
    """The colours as they lie over mid-grey; returns where the next line goes."""
    words, long = "nothing", 8 * line
    draw.text((x, y), words, GREY, font)
    x += round(font.getlength(words)) + line // 2
    level = np.tile(np.linspace(0, 1, long), (line, 1))
    page.paste(Image.fromarray(_mix(np.full(level.shape, 128.0), level)), (x, y))
    draw.text((x + long + line // 2, y), "that map's highest patch", GREY, font)
    return y + 2 * line


def _lines(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], x: int, y: int, font: Any, line: int, colour: tuple[int, int, int]
) -> int:
    for words in lines:
        draw.text((x, y), words, colour, font)
        y += line
    return y


def _wrap(texts: Sequence[str], font: Any, width: int) -> list[str]:
    lines: list[str] = []
    for text in texts:
        lines.append("")
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and font.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    return lines


def _fit(text: str, font: Any, width: int) -> str:
    """The text, its middle left out where it is too long: names of films differ at their ends."""
    text = " ".join(text.split())
    kept = len(text)
    short = text
    while kept > 2 and font.getlength(short) > width:
        kept -= 1
        short = f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"
    return short


def _font(size: int) -> Any:
    """DejaVu Sans, which matplotlib brings: class names may need letters that Pillow's own font lacks."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _png(page: Image.Image) -> bytes:
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    return buffer.getvalue()
