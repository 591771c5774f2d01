"""The healthy body of the phantom: one patient seen from the front and from the side, as maps of density.

Coordinates are patient space, 1.0 being half the shorter image edge: `x` to the patient's left (image right, as
films hang), `y` down, `z` to the back. A frontal film shows (x, y), a lateral one (z, y), so one place serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Map = NDArray[np.floating[Any]]
Points = NDArray[np.float64]
# M polylines of K points each (M, K, 2) and their widths (M,), in patient space; one grey of 0-255 for all.
Strokes = tuple[Points, Points, int]


@dataclass(frozen=True, kw_only=True)
class Patient:
    """One body, the same on all its films: positions and widths in patient space, gains as plain factors."""

    seed: int = 0
    width: float = 0.70
    apex: float = -0.74
    dome_right: float = 0.40
    dome_left: float = 0.46
    curve: float = 0.24
    heart_left: float = 0.27
    heart_right: float = 0.11
    heart_sag: float = 0.0
    knob: float = 0.09
    artery: float = 0.04
    lucency: float = 0.42
    vessels: float = 1.0
    fat: float = 0.0
    breast: float = 0.0
    rib_gap: float = 0.15
    rib_slope: float = 0.55
    bend: float = 0.0
    hunch: float = 0.12
    chin: float = 0.0

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Patient:
        """A healthy adult; every draw from `rng` is made, so the next caller's stream does not shift."""
        base, step = cls(), rng.normal(size=len(SPREAD))
        values = {k: getattr(base, k) + s * float(np.clip(z, -2, 2)) for (k, s), z in zip(SPREAD, step, strict=True)}
        breast = 0.10 * float(rng.random()) if rng.random() < 0.5 else 0.0
        return cls(seed=int(rng.integers(2**31)), breast=breast, **values)


# Standard deviation of each measure between healthy patients.
SPREAD: tuple[tuple[str, float], ...] = (
    ("width", 0.03), ("apex", 0.02), ("dome_right", 0.025), ("dome_left", 0.025), ("curve", 0.015),
    ("heart_left", 0.018), ("heart_right", 0.012), ("knob", 0.012), ("artery", 0.008), ("lucency", 0.02),
    ("vessels", 0.12), ("fat", 0.04), ("rib_gap", 0.007), ("rib_slope", 0.05), ("bend", 0.008), ("hunch", 0.02),
)  # fmt: skip


@dataclass(kw_only=True)
class Field:
    """One view of one patient as maps (H, W) of signed distances, positive inside; `density` is being summed."""

    view: str
    u: Map
    y: Map
    wall: Map
    floor: Map
    top: Map
    spine: Map
    lung: Map
    body: Map
    density: Map


def edge(distance: Any, soft: float) -> Map:
    """0 outside to 1 inside, smooth over +-`soft`. In place: this is half of the drawing time."""
    t = np.asarray(distance * np.float32(0.5 / soft), dtype=np.float32)
    t += np.float32(0.5)
    np.maximum(t, 0, out=t)
    np.minimum(t, 1, out=t)
    square = t * t
    t *= np.float32(-2)
    t += np.float32(3)
    t *= square
    return t


def bump(v: Any, centre: float, spread: float) -> Map:
    """A Gaussian of height 1 around `centre`."""
    return np.exp(-np.square((v - np.float32(centre)) / np.float32(spread)))


def bands(phase: Any, share: float) -> Map:
    """Periodic bands with bright cortex: `share` of each unit of phase is bone. A table costs one look-up a pixel."""
    p = np.abs(np.linspace(-0.5, 0.5, 256, endpoint=False, dtype=np.float32)) * 2 / share
    table = edge(1 - p, 0.22) * (0.7 + 0.5 * bump(p, 0.85, 0.2))
    return table[(phase * 256).astype(np.int32) & 255]


def frontal(p: Patient, u: Map, y: Map) -> Field:
    """The chest from the front, at coordinates u (across) and y (down)."""
    spine = u - p.bend * np.sin(np.pi * (y - p.apex) / 1.15, dtype=np.float32) * edge(y + 0.8, 0.3)
    a, left = np.abs(spine), spine > 0
    wall_at = p.width * (1 - 0.43 * np.square(np.clip(0.3 - y, 0, 1.2))) + 0.02 * bump(y, 0.55, 0.3)
    wall = wall_at - a
    top = y - (p.apex + 2.6 * np.square(a - 0.27))
    middle = 0.52 * p.width
    dome = np.where(left, np.float32(p.dome_left), np.float32(p.dome_right))
    fall = p.curve * np.square((a - middle) / middle) * np.where(a > middle, np.float32(1.25), np.float32(0.5))
    floor = dome + fall - y
    lung = edge(wall, 0.022) * edge(top, 0.04) * edge(floor, 0.016)
    sag = p.heart_sag
    ventricle = p.heart_left * (edge(y - 0.1 + 0.05 * sag, 0.3) - 0.3 * edge(y - 0.45, 0.2))
    m_left = 0.10 + p.knob * bump(y, -0.36, 0.1) + p.artery * bump(y, -0.15, 0.11) + ventricle
    m_right = 0.11 + 0.02 * bump(y, -0.4, 0.2) + p.heart_right * bump(y, 0.2 + 0.08 * sag, 0.24)
    heart = edge(np.where(left, m_left, m_right) - a, 0.022)
    shoulder = y + 0.95 - 0.26 * np.clip(a - 0.25, 0, 1) + 1.4 * np.clip(0.27 - a, 0, 0.3)
    outer = p.width + 0.15 + p.fat + 0.7 * edge(-0.05 - y, 0.42) - a
    body = edge(outer, 0.03) * edge(shoulder, 0.05)
    flesh = 0.42 + 0.5 * p.fat + 0.22 * np.sqrt(np.clip(outer, 0, 0.5)) + 0.12 * edge(y - 0.1, 0.5)
    air = lung * (1 - 0.93 * heart)
    density = body * (flesh + 0.20 * bump(a, 0, 0.22) + 0.55 * edge(-floor, 0.03) * edge(wall + 0.03, 0.05))
    density -= air * (p.lucency * 1.12 * (0.92 + 0.12 * bump(y, -0.3, 0.35)) + 0.2 * bump(a, 0, 0.22) * (1 - heart))
    density += 0.20 * heart * lung
    # Behind, ribs leave the spine level and fall towards the wall; in front they fall towards the breastbone.
    posterior = bands((y - p.rib_slope * (0.95 * np.square(a) - 0.16 * a)) / p.rib_gap, 0.44)
    anterior = bands((y - p.rib_slope * (0.5 * np.square(a) - 1.1 * a)) / (1.08 * p.rib_gap) + 0.3, 0.42)
    cage = edge(wall + 0.035, 0.02) * edge(y - p.apex + 0.1, 0.08) * edge(0.72 - y, 0.1) * edge(a - 0.08, 0.03)
    density += cage * (1 - 0.6 * heart) * (0.085 * posterior + 0.05 * anterior * edge(a - 0.27, 0.12))
    density += 0.07 * bump(wall, -0.012, 0.014) * edge(y - p.apex, 0.1) * body
    bone = edge(0.075 + 0.012 * np.cos(2 * np.pi * y / 0.125, dtype=np.float32) - a, 0.015)
    density += body * bone * (0.16 + 0.05 * bands(y / 0.125, 0.7) * edge(0.9 - y, 0.3))
    trachea = edge(0.04 - np.abs(spine + 0.008), 0.014) * edge(-0.28 - y, 0.03)
    fork = bump(y - 0.62 * a, -0.29, 0.022) * edge(0.17 - a, 0.03)
    density -= body * (0.34 * trachea + 0.12 * fork)
    _girdle(density, a, y, body, wall)
    if p.breast:
        density += p.breast * edge(0.28 - np.hypot(a - 0.46, (y - 0.3) * 1.1), 0.05) * body
    stomach = np.square((spine - 0.36) / 0.15) + np.square((y - p.dome_left - 0.15) / 0.08)
    density -= 0.3 * edge(1 - stomach, 0.3) * edge(-floor - 0.02, 0.02)
    density += 0.6 * p.chin * edge(0.24 - np.hypot(a, (y + 0.98) * 0.8), 0.05)
    return Field(
        view="Frontal", u=u, y=y, wall=wall, floor=floor, top=top, spine=spine, lung=lung, body=body, density=density
    )


def _girdle(density: Map, a: Map, y: Map, body: Map, wall: Map) -> None:
    """Clavicles, shoulder blades and upper arm bones of a frontal film, added to `density`."""
    line = y + 0.57 + 0.26 * a - 1.1 * (a - 0.05) * (a - 0.45) * (a - 0.85)
    clavicle = edge(0.034 - np.abs(line), 0.012) * (0.8 + 0.6 * bump(np.abs(line), 0.028, 0.01))
    density += 0.16 * clavicle * edge(a - 0.07, 0.015) * edge(0.95 - a, 0.02)
    blade = np.abs(a - 0.73 - 0.28 * (y + 0.45) * (-1.0)) * edge(y + 0.62, 0.05)
    density += (
        body
        * edge(-wall + 0.06, 0.04)
        * edge(y + 0.66, 0.06)
        * edge(0.02 - y, 0.06)
        * (0.10 * bump(blade, 0, 0.02) + 0.06 * edge(a - 0.72, 0.08))
    )
    head = np.hypot(a - 0.98, y + 0.6)
    density += body * 0.14 * edge(0.14 - head, 0.015)


def lateral(p: Patient, u: Map, y: Map) -> Field:
    """The chest from the side, at coordinates u (front to back) and y (down)."""
    bow = 1 - np.square((y + 0.12) / 0.85)
    axis = 0.40 + 1.1 * p.hunch * bow + 0.4 * p.bend * np.sin(5.5 * y, dtype=np.float32)
    spine = u - axis
    front = -0.34 - 0.30 * edge(y + 0.15, 0.65) + 0.12 * edge(y - 0.5, 0.4)
    back = axis + 0.14
    wall = np.minimum(back - u, 1.4 * (u - front))
    top = y - (p.apex - 0.02 + 1.1 * np.square(np.clip(u - 0.15, -1, 1)))
    low, high = max(p.dome_left, p.dome_right) + 0.02, min(p.dome_left, p.dome_right)
    fall = p.curve * (np.square((u + 0.12) / 0.40)) * np.where(u > -0.12, np.float32(0.62), np.float32(0.35))
    floor = high + fall - y
    lung = edge(wall, 0.022) * edge(top, 0.06) * edge(floor, 0.016)
    outer = np.minimum(back + 0.15 + p.fat - u, u - front + 0.10 + 0.6 * p.fat + 1.2 * p.breast * bump(y, 0.1, 0.25))
    shoulders = edge(-0.5 - y, 0.3)
    body = edge(np.maximum(outer, 0.8 * shoulders - 0.22 - np.abs(u - 0.12)), 0.03)
    density = body * (0.46 + 0.4 * p.fat + 0.2 * np.sqrt(np.clip(outer, 0, 0.6)) + 0.30 * shoulders)
    density += body * (0.55 * edge(-floor, 0.02) + 0.14 * edge(y - low - fall, 0.014) * edge(floor, 0.02))
    size = 0.5 * (p.heart_left + p.heart_right) + 0.07
    reach = size * (1.3 + 0.35 * p.heart_sag)
    r = np.hypot((u + 0.24 - 0.45 * (size - 0.26) + 0.35 * (y - 0.2)) / reach, (y - 0.2) / (1.45 * size))
    heart = edge(1 - r, 0.12)
    density -= lung * (p.lucency * 0.95 + 0.06 * bump(u, -0.35, 0.2) * edge(0 - y, 0.2))
    density += lung * (0.30 * heart + 0.09 * bump(np.hypot(u - 0.06, y + 0.1), 0, 0.12 + p.artery))
    arch = np.abs(np.hypot(u - 0.17, y + 0.28) - 0.17)
    density += lung * (0.07 + p.knob * 0.5) * edge(0.05 - arch, 0.03) * edge(0.12 - y, 0.3)
    ribs = bands((y - p.rib_slope * (u - 0.3) * -0.75 - 0.3 * np.square(u)) / p.rib_gap, 0.36)
    ribs += 0.8 * bands((y - p.rib_slope * (u - 0.3) * -0.55 + 0.03) / (1.07 * p.rib_gap) + 0.4, 0.34)
    cage = edge(wall + 0.03, 0.03) * edge(y - p.apex, 0.1) * edge(0.7 - y, 0.15)
    density += 0.055 * cage * ribs * (1 - 0.5 * heart)
    level = y + 0.25 * spine
    bone = edge(0.085 - np.abs(spine) + 0.006 * np.cos(2 * np.pi * level / 0.125, dtype=np.float32), 0.016)
    density += body * bone * (0.10 + 0.13 * bands(level / 0.125, 0.78)) * (1 - 0.5 * edge(y - 0.2, 0.5))
    sternum = u - front + 0.02
    density += 0.16 * edge(0.03 - np.abs(sternum), 0.014) * edge(y + 0.55, 0.05) * edge(0.3 - y, 0.05) * body
    trachea = np.abs(u - 0.08 - 0.12 * (y + 0.5))
    density -= 0.22 * edge(0.04 - trachea, 0.016) * edge(-0.18 - y, 0.04) * body
    density += 0.5 * p.chin * edge(0.3 - np.hypot(u + 0.25, y + 1.0), 0.05)
    return Field(
        view="Lateral", u=u, y=y, wall=wall, floor=floor, top=top, spine=spine, lung=lung, body=body, density=density
    )


def stroke_map(field: Field, strokes: Sequence[Strokes], *, blur: float) -> Map:
    """Polylines as a soft map (H, W) of 0 to 1; later ones lie over earlier ones, `blur` is in patient space."""
    height, width = field.density.shape
    scale = 1 / float(field.y[1, 0] - field.y[0, 0])
    origin = np.array([field.u[0, 0], field.y[0, 0]])
    canvas = Image.new("L", (width, height))
    pen = ImageDraw.Draw(canvas)
    for points, thick, grey in strokes:
        pixels = ((points - origin) * scale).reshape(len(points), -1).tolist()
        for line, wide in zip(pixels, np.maximum(1, np.rint(thick * scale)).astype(int).tolist(), strict=True):
            pen.line(line, fill=grey, width=wide)
    return np.asarray(canvas.filter(ImageFilter.GaussianBlur(blur * scale)), dtype=np.float32) / np.float32(255)


def vessels(field: Field, patient: Patient) -> None:
    """Branching lung markings from both hila, added to the density inside the lung."""
    front = field.view == "Frontal"
    rng = np.random.default_rng([patient.seed, 2])
    lines = stroke_map(field, _branches(rng, front=front, count=13), blur=0.008)
    haze = bump(field.y, -0.08, 0.16) * bump(np.abs(field.u), 0.16 if front else 0.08, 0.12)
    field.density += field.lung * np.float32(patient.vessels) * (0.20 * lines + 0.06 * haze)


def _branches(rng: np.random.Generator, *, front: bool, count: int) -> list[Strokes]:
    """`count` vessels a side with three twigs each: winding, thinner and fainter away from the hilum."""
    m = 2 * count
    side = np.repeat([-1.0, 1.0], count)
    hila = np.stack([0.13 * side, -0.1 + 0.02 * side] if front else [0.06 + 0.04 * side, np.full(m, -0.08)], 1)
    roots = hila + rng.normal(0, (0.02, 0.07), (m, 2))
    angle = np.tile(np.linspace(-1.3, 1.5, count), 2) + rng.normal(0, 0.12, m)
    reach, thick = rng.uniform(0.3, 0.55, m), rng.uniform(0.012, 0.026, m)
    heading = angle[:, None] + np.cumsum(rng.normal(0, 0.16, (m, 7)), 1)
    path = _walk(roots, heading, side, reach / 7)
    strokes: list[Strokes] = [(path[:, k : k + 2], thick * (1 - k / 7) + 0.004, 240 - 26 * k) for k in range(7)]
    for k, turn in ((2, 0.6), (3, -0.6), (5, 0.5)):
        bent = (heading[:, k] + turn + rng.normal(0, 0.15, m))[:, None] + np.array([0.0, 0.1, 0.25])
        strokes.append((_walk(path[:, k], bent, side, reach * 0.13), np.full(m, 0.008), 150 - 14 * k))
    return strokes


def _walk(roots: Points, heading: Points, side: Points, step: Points) -> Points:
    """Paths (M, K + 1, 2) from roots (M, 2) along headings (M, K), mirrored where `side` is -1."""
    moves = np.stack([side[:, None] * np.cos(heading), np.sin(heading)], 2) * step[:, None, None]
    return np.concatenate([roots[:, None], roots[:, None] + np.cumsum(moves, 1)], 1)
