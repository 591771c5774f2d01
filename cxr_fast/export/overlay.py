"""Draw a film beside its heat maps, as one PNG or SVG."""

from __future__ import annotations

import io
import textwrap
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image

from ..config import NOTICE, PreprocessSpec
from ..data.images import placed

FEW = 4  # up to so many panels stand in two columns, which a phone shows large enough to read; more in four
LONGEST = (1024, 512)  # pixels per film: up to FEW panels, and more than that
NARROWEST = 400  # room for the text
FONT = "DejaVu Sans"  # matplotlib brings it; class names may need letters that Pillow's own font lacks
LETTER = 0.7  # width of a letter in font sizes; that of capitals, wider than that of most text
COLOURS = "inferno"  # lightness rises evenly, so that it survives a grey print and colour blindness
FAINTEST = 0.25  # the colours below are too dark to be told from a film's own black
OPACITY = 0.65
DIM = 0.35
INK, GREY, RED = "#1b2a3a", "#6b7884", "#be1414"
LINE, RIM = (255, 214, 10), (20, 20, 20)  # an outline is seen on black and on white alike
FINEST = 256  # the line of an outline is the film's shorter side over this, in pixels
SHARE = 0.5
SVG = {"svg.fonttype": "none", "svg.hashsalt": "cxr-fast", "image.composite_image": False}

Kind = Literal["overlay", "contour", "side"]

Lines = list[tuple[str, str]]  # a line of text and its colour


@dataclass(frozen=True, kw_only=True)
class Style:
    """How maps are drawn: `overlay` tints the film, `contour` outlines the strongest part, `side` draws the map alone.

    `opacity` of an overlay's strongest place, 0 to 1; `share` of the map, 0 to 1, inside the outline.
    """

    kind: Kind = "overlay"
    opacity: float = OPACITY
    share: float = SHARE


@dataclass(frozen=True, kw_only=True)
class Map:
    """One class on one image: calibrated probability, threshold, and shares (rows, columns) of the patch grid.

    The shares sum to 1, or are all 0 where no patch raises the logit of the class.
    """

    name: str
    probability: float
    threshold: float
    shares: np.ndarray = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Explained:
    """A film, uint8 grey (H, W) upright at full size, and its maps.

    `members` is how many models they are the mean of; `warning` is drawn in red. `query` says whose attention it is,
    and `source` whose probabilities are written.
    """

    name: str
    grey: np.ndarray = field(repr=False)
    spec: PreprocessSpec
    maps: tuple[Map, ...]
    members: int
    warning: str
    query: str = "the class token looked in the last block"
    source: str = ""


def on_film(
    shares: np.ndarray, film: tuple[int, int], shown: tuple[int, int], spec: PreprocessSpec
) -> tuple[np.ndarray, np.ndarray]:
    """Stretch a patch grid (rows, columns) over a film of (width, height), shown at another (width, height).

    Linear between the centres of patches. Returns the map and what of the film the model saw, (height, width) each.
    """
    wide, high, left, top = placed(*film, spec)
    down, rows_seen = _weights(shares.shape[0], spec.size, high, top, shown[1])
    across, columns_seen = _weights(shares.shape[1], spec.size, wide, left, shown[0])
    return down @ shares @ across.T, rows_seen[:, None] & columns_seen


def _weights(cells: int, size: int, resized: int, offset: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return, along one side, each shown pixel's weight on each patch (pixels, cells), and whether the model saw it."""
    at = (np.arange(pixels) + 0.5) * resized / pixels - offset  # centres, in the square's pixels
    place = np.clip(at * cells / size - 0.5, 0, cells - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(cells))), (at >= 0) & (at <= size)


def shown_size(width: int, height: int, longest: int) -> tuple[int, int]:
    """Return the film's size in the picture, its aspect kept: the longer side `longest` at most, and at least half."""
    longer = max(width, height)
    scale = min(longest, max(longer, longest // 2)) / longer
    return max(1, round(width * scale)), max(1, round(height * scale))


def painted(
    film: np.ndarray,
    shares: np.ndarray,
    level: np.ndarray,
    seen: np.ndarray,
    style: Style = Style(),
) -> np.ndarray:
    """Draw a map (h, w) on the film (h, w) uint8, or alone, to uint8 RGB: the highest of `shares` most, 0 not at all.

    What the model did not see is dimmed.
    """
    highest = shares.max()
    grey, level = np.where(seen, film, DIM * film), np.where(seen, level / highest if highest > 0 else 0.0, 0.0)
    if style.kind == "side":
        return np.where(seen[..., None], _blend(np.zeros(film.shape), level, 1.0), round(255 * DIM)).astype(np.uint8)
    if style.kind == "overlay":
        return _blend(grey, level, style.opacity)
    out = np.repeat(np.rint(grey)[..., None], 3, axis=2).astype(np.uint8)
    inside = strongest(level, style.share)
    wide = max(1, round(min(film.shape) / FINEST))
    line = _grown(inside, wide) & ~inside
    out[_grown(line, wide) & ~line] = RIM
    out[line] = LINE
    return out


def strongest(level: np.ndarray, share: float) -> np.ndarray:
    """The smallest set of places (h, w) that holds `share` of a map (h, w) >= 0; empty where the map is."""
    order = np.sort(level, axis=None)[::-1]
    total = np.cumsum(order)
    if total[-1] <= 0:
        return np.zeros(level.shape, bool)
    place = min(int(np.searchsorted(total, share * total[-1])), len(order) - 1)
    return np.asarray((level >= order[place]) & (level > 0))


def _grown(mask: np.ndarray, by: int) -> np.ndarray:
    """A mask (h, w) and all places at most `by` steps beside it, of four neighbours each."""
    for _ in range(by):
        out = mask.copy()
        out[1:] |= mask[:-1]
        out[:-1] |= mask[1:]
        out[:, 1:] |= mask[:, :-1]
        out[:, :-1] |= mask[:, 1:]
        mask = out
    return mask


def _blend(grey: np.ndarray, level: np.ndarray, most: float) -> np.ndarray:
    """Colour grey (h, w) by a level from 0 to 1, opaque by `most` at 1; with `most` 1 by the colour alone."""
    import matplotlib

    colour = matplotlib.colormaps[COLOURS](FAINTEST + (1 - FAINTEST) * level)[..., :3] * 255
    opacity = (most * level)[..., None]
    return np.rint((1 - opacity) * grey[..., None] + opacity * colour).astype(np.uint8)


def picture(found: Explained, style: Style = Style(), form: str = "png") -> bytes:
    """Draw the PNG, or with `form` "svg" an SVG whose text is text: film and maps, each with its class, probability,
    threshold and highest patch."""
    height, width = found.grey.shape
    shown = shown_size(width, height, LONGEST[len(found.maps) >= FEW])
    film = np.array(Image.fromarray(found.grey).resize(shown, Image.Resampling.BICUBIC))
    panels = [(_film_text(found), np.repeat(film[..., None], 3, axis=2))]
    for each in found.maps:
        level, seen = on_film(each.shares, (width, height), shown, found.spec)
        panels.append((_map_text(each, level, seen, style), painted(film, each.shares, level, seen, style)))
    warning = f"{found.warning.upper()}: this picture says nothing about a patient." if found.warning else ""
    return _page(panels, warning, _notes(found, style), style, form)


def _film_text(found: Explained) -> Lines:
    height, width = found.grey.shape
    members = f"mean of {found.members} models' maps" if found.members > 1 else ""
    return [(found.name, INK), (f"{width} x {height} pixels", GREY), (members, GREY)]


def _map_text(each: Map, level: np.ndarray, seen: np.ndarray, style: Style) -> Lines:
    over = "over" if each.probability >= each.threshold else "under"
    highest = f"highest patch: {each.shares.max():.1%} of the map; even: {1 / each.shares.size:.1%}"
    if style.kind == "contour" and each.shares.any():
        area = strongest(np.where(seen, level, 0.0), style.share).sum() / seen.sum()
        highest = f"outline: {style.share:.0%} of the map, {area:.1%} of the area"
    return [
        (each.name, INK),
        (f"probability {each.probability:.3f}, {over} its threshold {each.threshold:.3f}", INK),
        (highest if each.shares.any() else "no patch speaks for it: the map is empty", GREY),
    ]


def _notes(found: Explained, style: Style) -> list[str]:
    rows, columns = found.maps[0].shares.shape
    drawn = "Colour" if style.kind != "contour" else "Outline"
    how = (
        "each map is coloured to its own highest patch"
        if style.kind != "contour"
        else f"the outline is around the smallest area that holds {style.share:.0%} of the map; areas are shares of "
        "what the model saw"
    )
    notes = [
        f"{drawn}: where {found.query}, weighted by the gradient of that class's logit; only "
        f"what speaks for the class. {rows} x {columns} patches, smoothed between their centres; {how}.",
        "This is no proof of a finding, and no outline of one.",
    ]
    if found.source:
        notes.append(f"Probabilities: {found.source}.")
    if found.members > 1:
        notes.append(f"Mean over {found.members} models, each model's map as shares of its own sum.")
    if found.spec.resize == "crop":
        notes.append("Dimmed: outside the square that the model saw.")
    return [*notes, NOTICE]


def _page(panels: list[tuple[Lines, np.ndarray]], warning: str, notes: list[str], style: Style, form: str) -> bytes:
    """Draw warning, panels with three lines of text above each, colour bar and notes, as a file of form png or svg."""
    from matplotlib.figure import Figure
    from matplotlib.transforms import IdentityTransform

    shown = panels[0][1].shape[1::-1]
    wide = max(shown[0], NARROWEST)
    size = max(wide // 28, 14)
    line, gap = round(1.4 * size), size
    columns = min(len(panels), 2 if len(panels) <= FEW else 4)
    total = columns * (wide + gap) + gap
    above, below = (_wrapped(texts, int((total - 2 * gap) / (LETTER * size))) for texts in ([warning], notes))
    row = 3 * line + shown[1] + gap
    top = gap + (len(above) * line + gap if above else 0)
    bottom = top + -(-len(panels) // columns) * row
    bar = _bar(style, 8 * line, line)
    under = bottom + 2 * line * len(bar)
    high = under + len(below) * line + gap
    # 72 dots per inch: a point is a pixel. Half a pixel more, which is cut off, for what is lost by the division.
    figure = Figure(figsize=((total + 0.5) / 72, (high + 0.5) / 72), dpi=72)

    def write(lines: Lines, x: int, y: int) -> None:
        for k, (text, colour) in enumerate(lines):
            place: dict[str, Any] = {"x": x, "y": high - y - size - k * line, "transform": IdentityTransform()}
            figure.text(s=text, color=colour, size=size, family=FONT, parse_math=False, **place)

    corners = [(gap + i % columns * (wide + gap), top + i // columns * row) for i in range(len(panels))]
    write([(text, RED) for text in above], gap, gap)
    for (lines, _), (x, y) in zip(panels, corners, strict=True):
        write([(_shortened(text, size, wide), colour) for text, colour in lines], x, y)
    if bar:
        write([("from nothing to that map's highest patch", GREY)], gap + 8 * line + line // 2, bottom)
    write([(text, INK) for text in below], gap, under)
    placed_at = [
        (pixels, x + (wide - shown[0]) // 2, y + 3 * line) for (_, pixels), (x, y) in zip(panels, corners, strict=True)
    ]
    placed_at += [(pixels, gap, bottom) for pixels in bar]
    return (_as_svg if form == "svg" else _as_png)(figure, placed_at, high)


def _bar(style: Style, width: int, height: int) -> list[np.ndarray]:
    """The colours of a map from nothing to its highest place; none for an outline."""
    if style.kind == "contour":
        return []
    level = np.tile(np.linspace(0, 1, width), (height, 1))
    grey, most = (0.0, 1.0) if style.kind == "side" else (128.0, style.opacity)
    return [_blend(np.full(level.shape, grey), level, most)]


Placed = list[tuple[np.ndarray, int, int]]  # pixels (h, w, 3), and the column and row of their upper left corner


def _as_png(figure: Any, placed_at: Placed, _: int) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    page = np.array(canvas.buffer_rgba())[..., :3]
    for pixels, left, up in placed_at:
        page[up : up + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    buffer = io.BytesIO()
    Image.fromarray(page).save(buffer, "PNG")
    return buffer.getvalue()


def _as_svg(figure: Any, placed_at: Placed, high: int) -> bytes:
    """Text stays text, for editors and searches; no date, so that the same picture is the same bytes."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    for pixels, left, up in placed_at:
        figure.figimage(pixels, left, high - up - pixels.shape[0], origin="upper")
    with rc_context(SVG):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()


def _wrapped(texts: list[str], letters: int) -> list[str]:
    return [line for text in texts for line in textwrap.wrap(text, letters)]


def _shortened(text: str, size: int, width: int) -> str:
    """Leave the middle out of a text that is wider than `width` pixels: names of films differ at their ends."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(FONT))
    font.set_size(size, 72)

    def fits(text: str) -> bool:
        font.set_text(text)
        return bool(font.get_width_height()[0] / 64 <= width)

    # A file name that is not UTF-8 holds surrogates, which no font can draw.
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    kept, short = len(text), text
    while kept > 2 and not fits(short):
        kept -= 1
        short = f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"
    return short
