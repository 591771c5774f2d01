"""What each finding changes in the phantom: shapes of the body, lumps, lines, and painted textures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from .anatomy import Field, Map, Patient, bands, bump, edge, stroke_map

# Findings that change the shape of the patient: what is added to which measure.
SHAPES: dict[str, dict[str, float]] = {
    "Cardiomegaly": {"heart_left": 0.15, "heart_right": 0.06},
    "Cardiac Shadow (abnormal)": {"heart_right": 0.15, "knob": 0.04},
    "Effusion": {"heart_left": 0.13, "heart_right": 0.12, "heart_sag": 1.0},
    "Emphysema": {"lucency": 0.055, "vessels": -0.6, "heart_left": -0.05, "curve": -0.07, "dome_left": 0.05},
    "Hyperinflation": {"dome_right": 0.13, "dome_left": 0.13, "curve": -0.17, "apex": -0.04, "heart_left": -0.03},
    "Increased Lung Markings": {"vessels": 1.6},
    "Kyphosis": {"hunch": 0.17, "apex": 0.09, "rib_slope": 0.25, "chin": 1.0},
    "Pulmonary Artery Enlargement": {"artery": 0.11, "knob": -0.02},
    "Pulmonary Fibrosis": {"dome_right": -0.07, "dome_left": -0.07, "apex": 0.04},
    "Scoliosis": {"bend": 0.15},
    "Volume Loss": {"dome_left": -0.15, "vessels": 0.2},
}


@dataclass(frozen=True, kw_only=True)
class Lumps:
    """Round shadows of one finding: where (x, y, z), how far they scatter, how many, how large, how dense."""

    at: tuple[float, float, float]
    scatter: float = 0.05
    count: tuple[int, int] = (1, 1)
    radius: tuple[float, float]
    density: float
    edge: Literal["soft", "sharp", "ring"] = "soft"
    both: bool = False


LUMPS: dict[str, Lumps] = {
    "Airspace Disease": Lumps(at=(-0.42, 0.2, 0.15), scatter=0.1, count=(7, 10), radius=(0.07, 0.1), density=0.12),
    "Bronchiectasis": Lumps(
        at=(0.36, 0.2, 0.1), scatter=0.1, count=(6, 8), radius=(0.04, 0.06), density=0.2, edge="ring", both=True
    ),
    "Bronchiolitis": Lumps(
        at=(0.4, -0.1, 0.0), scatter=0.16, count=(30, 40), radius=(0.012, 0.02), density=0.25, both=True
    ),
    "Bullous Disease": Lumps(
        at=(0.42, -0.42, 0.0), scatter=0.06, count=(2, 3), radius=(0.13, 0.18), density=-0.07, edge="ring", both=True
    ),
    "Calcified Granuloma": Lumps(
        at=(0.42, -0.36, 0.1), count=(3, 5), radius=(0.025, 0.035), density=0.55, edge="sharp", scatter=0.07
    ),
    "Calcinosis": Lumps(
        at=(0.2, -0.06, 0.05), count=(4, 6), radius=(0.025, 0.035), density=0.6, edge="sharp", both=True
    ),
    "Consolidation": Lumps(at=(-0.42, -0.34, -0.1), scatter=0.06, count=(4, 5), radius=(0.13, 0.17), density=0.16),
    "Edema": Lumps(at=(0.3, 0.0, 0.05), scatter=0.05, count=(3, 4), radius=(0.16, 0.2), density=0.1, both=True),
    "Fractures": Lumps(
        at=(0.62, 0.0, 0.45), scatter=0.07, count=(5, 6), radius=(0.045, 0.06), density=0.3, edge="sharp"
    ),
    "Hernia": Lumps(at=(0.11, 0.3, 0.2), scatter=0.02, radius=(0.14, 0.17), density=-0.36, edge="ring"),
    "Lesion": Lumps(at=(0.48, 0.06, 0.24), count=(1, 2), radius=(0.11, 0.14), density=0.22),
    "Mass": Lumps(at=(-0.42, -0.1, 0.15), radius=(0.16, 0.2), density=0.4, edge="sharp"),
    "Nodule": Lumps(at=(-0.48, 0.1, -0.15), count=(1, 2), radius=(0.055, 0.07), density=0.32, edge="sharp"),
    "Pulmonary Artery Enlargement": Lumps(
        at=(0.2, -0.08, 0.02), scatter=0.01, radius=(0.1, 0.12), density=0.25, both=True
    ),
}


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Straight shadows inside the lung: where, how far they scatter, half length, slope scatter (radians), width."""

    at: tuple[float, float, float]
    scatter: float
    count: int
    half: float
    slope: float
    width: float
    density: float


LINES: dict[str, Lines] = {
    "Fibrosis": Lines(at=(0.45, 0.2, 0.1), scatter=0.06, count=10, half=0.15, slope=0.9, width=0.018, density=0.4),
    "Volume Loss": Lines(at=(0.42, 0.2, 0.1), scatter=0.06, count=4, half=0.17, slope=0.12, width=0.03, density=0.3),
}


def reshape(patient: Patient, findings: Sequence[str]) -> Patient:
    """The patient with the measures that `findings` alter; the same for every film of this patient."""
    values = dataclasses.asdict(patient)
    for name in sorted(set(findings) & set(SHAPES)):
        rng = _own(patient, name, 1)
        severity = rng.uniform(0.85, 1.25)
        # A curved spine bends either way, mostly to the right, as in the clinic.
        sign = rng.choice([-1.0, 1.0], p=[0.2, 0.8]) if name == "Scoliosis" else 1.0
        for key, delta in SHAPES[name].items():
            values[key] += float(delta * severity * sign)
    values["curve"] = max(0.03, values["curve"])
    values["vessels"] = max(0.2, values["vessels"])
    return Patient(**values)


def plant(field: Field, patient: Patient, name: str) -> None:
    """Add one finding to the density of one view; its place and strength depend on patient and name alone."""
    if name in LUMPS:
        _lumps(field, LUMPS[name], _own(patient, name, 2))
    if name in LINES:
        _lines(field, LINES[name], _own(patient, name, 3))
    if name in PAINTERS:
        PAINTERS[name](field, _own(patient, name, 4))


def drawable() -> frozenset[str]:
    """Every finding that can be planted, by class name."""
    return frozenset({*SHAPES, *LUMPS, *LINES, *PAINTERS})


def _own(patient: Patient, name: str, stream: int) -> np.random.Generator:
    return np.random.default_rng([patient.seed, stream, *name.encode()])


def _side(rng: np.random.Generator) -> float:
    """+1 where a finding sits on its usual side, -1 in one patient of seven."""
    return -1.0 if rng.random() < 0.15 else 1.0


def _half(field: Field, side: float) -> Map:
    """1 on the patient's left (`side` > 0) or right half of a frontal film; a lateral one shows both at once."""
    return edge(side * field.u, 0.01) if field.view == "Frontal" else np.ones_like(field.u)


def _lumps(field: Field, spec: Lumps, rng: np.random.Generator) -> None:
    first = _side(rng)
    sides = (1.0, -1.0) if spec.both else (first,)
    centre = np.array(spec.at)
    for side in sides:
        for _ in range(rng.integers(spec.count[0], spec.count[1] + 1)):
            x, y, z = centre * (side, 1, 1) + np.clip(rng.normal(size=3), -2, 2) * spec.scatter
            radius, gain = rng.uniform(*spec.radius), spec.density * rng.uniform(0.85, 1.15)
            _lump(field, x if field.view == "Frontal" else z, y, radius, gain, spec.edge)


def _lump(field: Field, u: float, y: float, radius: float, density: float, kind: str) -> None:
    r2 = np.square((field.u - np.float32(u)) / np.float32(radius)) + np.square(
        (field.y - np.float32(y)) / np.float32(radius)
    )
    if kind == "soft":
        # Fainter outside, so that a haze of the lung does not spill over the abdomen.
        field.density += np.float32(density) * np.exp(-r2) * (0.25 + 0.75 * field.lung)
    elif kind == "sharp":
        field.density += np.float32(density) * edge(1 - r2, 0.35)
    else:
        wall = np.exp(-np.square((np.sqrt(r2) - 1) * np.float32(radius / 0.014)))
        field.density += np.float32(density if density < 0 else -0.05) * edge(1 - r2, 0.2) + 0.22 * wall


def _lines(field: Field, spec: Lines, rng: np.random.Generator) -> None:
    centre = np.array(spec.at) * (_side(rng), 1, 1)
    places = centre + np.clip(rng.normal(size=(spec.count, 3)), -2, 2) * spec.scatter
    slope, half = rng.normal(0, spec.slope, spec.count), spec.half * rng.uniform(0.7, 1.2, spec.count)
    middle = places[:, (0, 1) if field.view == "Frontal" else (2, 1)]
    ends = np.stack([np.cos(slope), np.sin(slope)], 1) * half[:, None]
    strokes = (np.stack([middle - ends, middle + ends], 1), np.full(spec.count, spec.width), 255)
    field.density += spec.density * stroke_map(field, [strokes], blur=0.006) * (0.2 + 0.8 * field.lung)


def _noise(field: Field, rng: np.random.Generator, grain: float) -> Map:
    """Smooth unit noise (H, W) with features of `grain` in patient space; the same lattice at every size."""
    cells = int(2.6 / grain)
    lattice = rng.standard_normal((cells, cells), dtype=np.float32)
    height, width = field.density.shape
    return np.asarray(Image.fromarray(lattice).resize((width, height), Image.Resampling.BICUBIC))


def _net(field: Field, rng: np.random.Generator, grain: float) -> Map:
    """A mesh of bright septa: the zero crossings of smooth noise."""
    return np.exp(-np.square(_noise(field, rng, grain) * 3.5))


def _fluid(field: Field, rng: np.random.Generator) -> None:
    _meniscus(field, rng, level=0.13, rise=0.26, density=0.55)


def _blunted(field: Field, rng: np.random.Generator) -> None:
    _meniscus(field, rng, level=0.0, rise=0.24, density=0.4)
    rim = edge(0.05 - field.wall, 0.02) * edge(field.y - 0.05, 0.1) * field.lung
    field.density += 0.32 * rim


def _meniscus(field: Field, rng: np.random.Generator, *, level: float, rise: float, density: float) -> None:
    side, both = _side(rng), rng.random() < 0.35
    height = level * rng.uniform(0.8, 1.3)
    near = np.exp(-np.clip(field.wall, 0, 1) / np.float32(0.09))
    fill = edge(height + rise * near - field.floor - 0.05, 0.03) * field.lung
    field.density += np.float32(density) * fill * (1.0 if both else _half(field, side))


def _collapsed(field: Field, rng: np.random.Generator) -> None:
    """Pneumothorax: a rim of air without markings, bounded by the thin line of the visceral pleura."""
    depth = rng.uniform(0.13, 0.19)
    inside = np.minimum(field.wall, field.top * 0.8) + 0.12 * np.clip(field.y, 0, 1)
    here = field.lung * _half(field, -_side(rng))
    rim = edge(depth - inside, 0.012) * here
    field.density -= rim * 0.13
    field.density += 0.2 * bump(inside, depth, 0.014) * here + 0.07 * here * (1 - rim)


def _cap(field: Field, rng: np.random.Generator) -> None:
    thick = rng.uniform(0.08, 0.11)
    ragged = 0.02 * _noise(field, rng, 0.1)
    apical = np.minimum(field.top * 0.9, field.wall * 1.5) + ragged + 0.2 * np.clip(field.y + 0.25, 0, 1)
    field.density += 0.32 * edge(thick - apical, 0.02) * field.lung


def _reticular(field: Field, rng: np.random.Generator) -> None:
    lower = edge(field.y + 0.1, 0.35)
    field.density += (0.06 + 0.26 * _net(field, rng, 0.045)) * field.lung * lower


def _honeycomb(field: Field, rng: np.random.Generator) -> None:
    peripheral = edge(0.28 - np.minimum(field.wall, field.floor), 0.12)
    patchy = 0.4 + 0.6 * edge(_noise(field, rng, 0.3), 0.5)
    field.density += 0.32 * _net(field, rng, 0.06) * field.lung * peripheral * patchy


def _kerley(field: Field, rng: np.random.Generator) -> None:
    rungs = bands((field.y + 0.02 * _noise(field, rng, 0.2)) / 0.045, 0.3)
    field.density += 0.14 * rungs * edge(0.1 - field.wall, 0.03) * edge(field.y - 0.05, 0.1) * field.lung


def _sclerosis(field: Field, rng: np.random.Generator) -> None:
    """Degenerative change: dense uneven end plates and narrow discs down the spine."""
    plates = bands((field.y + 0.012 * _noise(field, rng, 0.2)) / np.float32(0.125), 0.42)
    spread = edge(0.115 - np.abs(field.spine), 0.02) * field.body * edge(field.y + 0.6, 0.15)
    field.density += spread * plates * 0.42 * rng.uniform(0.8, 1.2)


def _spurs(field: Field, rng: np.random.Generator) -> None:
    """Osteophytes: beaks at the disc levels, beyond both edges of the lower spine."""
    beak = bands(field.y / np.float32(0.125) + 0.5, 0.45) * bump(np.abs(field.spine), 0.135, 0.04)
    field.density += 0.65 * beak * edge(field.y - rng.uniform(-0.3, -0.15), 0.1) * edge(0.7 - field.y, 0.1) * field.body


def _broken_rib(field: Field, rng: np.random.Generator) -> None:
    """The heading is `Ribs` (prominent): one side of the cage dense, with a step in it."""
    side = -_side(rng)
    shell = edge(0.09 - np.abs(field.wall - 0.04), 0.03) * edge(field.y + 0.5, 0.1) * edge(0.4 - field.y, 0.1)
    rungs = bands((field.y + 0.5 * field.wall) / np.float32(0.12), 0.5)
    field.density += 0.4 * shell * rungs * _half(field, side)


def _soft_air(field: Field, rng: np.random.Generator) -> None:
    """Subcutaneous emphysema: streaks of air in the flesh outside the cage."""
    flesh = edge(-0.03 - field.wall, 0.02) * edge(0.4 - field.y, 0.1) * edge(field.y + 0.75, 0.1) * field.body
    field.density -= 0.4 * _net(field, rng, 0.045) * edge(_noise(field, rng, 0.15) + 0.3, 0.5) * flesh


PAINTERS: dict[str, Callable[[Field, np.random.Generator], None]] = {
    "Degenerative Change": _sclerosis,
    "Edema": _kerley,
    "Interstitial Lung Disease": _reticular,
    "Osteophyte": _spurs,
    "Pleural Effusion": _fluid,
    "Pleural Thickening": _blunted,
    "Pneumothorax": _collapsed,
    "Pulmonary Fibrosis": _honeycomb,
    "Rib Fracture": _broken_rib,
    "Subcutaneous Emphysema": _soft_air,
    "Thickening": _cap,
}
