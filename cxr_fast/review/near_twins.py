"""Find near twins: one picture saved twice (as JPEG, at another size or window, cut at its edges) as two films.

Candidates are the nearest films by what the cache holds; the pixels of both decide.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..activations.cache import Cache, open_cache
from ..config import PreprocessSpec, from_dict
from ..data.images import decode_grey, read_bytes
from ..data.paths import recorded_places
from ..errors import ImageError
from ..system import hardware
from ..system.files import AnyPath, write_csv
from ..training import predictions
from ..training.predictions import Saved
from ..training.run_folder import read_info
from . import neighbours

CANDIDATES = 20  # nearest films whose pixels are compared with a film's
KEPT, SIDE = 80, 64  # pixels a side: of what is kept of a film, and of what is compared
BLUR = 2.0  # pixels; coarser structure than about this is the same in every chest film
CUTS = (0.02, 0.04, 0.06)  # of each side, tried on either film
SPECTRA = 10_000  # films whose Fourier transform is kept, 17 kB each
SHIFT = 3  # pixels of SIDE that two films may be moved against each other
# Pairs of other patients on real films reach 0.49, of the same patient 0.66; a film saved again under another window
# 0.83, as JPEG or at another size 0.99 (benchmarks/LOG.md, 2026-11-29).
LEAST = 0.75
UNSEEN = 0.97  # cosine from which a pair is listed without its pixels; films of other patients reach 0.86
HEAD = (
    *("kind", "correlation", "cosine", "same_bytes", "classes"),
    *(f"{name}_{side}" for side in "ab" for name in ("cache_row", "image", "group", "part", "image_sha256")),
)
OTHER_GROUP, OTHER_LABELS = "other group", "other labels"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Film:
    """One film of a pair: its place in the run's predictions, row in the cache, and fold, -1 for the hold-out."""

    place: int
    row: int
    image: str
    sha256: str
    group: str
    fold: int


@dataclass(frozen=True, kw_only=True)
class Twin:
    """Two films that are one picture.

    `correlation` is of the pixels, -1 to 1, None where they could not be compared; `cosine` of what the cache holds;
    `classes` those that are 1 in one film and 0 in the other.
    """

    a: Film
    b: Film
    cosine: float
    correlation: float | None
    classes: tuple[str, ...]

    @property
    def same_bytes(self) -> bool:
        """Whether both files are the same."""
        return self.a.sha256 == self.b.sha256

    @property
    def kind(self) -> str:
        """What is wrong: `other group`, `other labels`, or both."""
        wrong = [OTHER_GROUP] * (self.a.group != self.b.group) + [OTHER_LABELS] * bool(self.classes)
        return ", ".join(wrong)


@dataclass(frozen=True, kw_only=True)
class Twins:
    """The pairs, the surest first, and what leaks by them.

    `compared` counts pairs whose pixels were compared; `missing` films that were not found or changed since they were
    encoded or cannot be read. `between_folds` counts pairs with films in two folds; `held_out` films of the hold-out
    with a twin in a fold.
    """

    pairs: tuple[Twin, ...]
    films: int
    compared: int
    missing: int
    between_folds: int
    held_out: int

    def notes(self) -> list[str]:
        """Lines for people."""
        out = [f"{len(self.pairs):,} near twins among {self.films:,} films, {self.compared:,} pairs compared by pixels"]
        if self.between_folds or self.held_out:
            out.append(
                f"{self.between_folds:,} pairs are in two folds, and {self.held_out:,} films of the hold-out have a "
                "twin that was trained on: give both films one group in the manifest, or list one of them"
            )
        if self.missing:
            out.append(
                f"{self.missing:,} films were not found, or changed since they were encoded: their pairs are listed "
                f"from a cosine of {UNSEEN:g} on, unchecked; --images gives the folder of the films"
            )
        return out


def near_twins(
    run: AnyPath, cache: AnyPath | Cache | None = None, images: AnyPath | None = None, progress: Progress | None = None
) -> Twins:
    """The films of a run that are one picture and have different groups, or labels that contradict each other.

    `cache` None takes the one that the run names; `images` is where the films are now. `progress` gets the films read
    and their number. Raises InputError where the cache is not the run's.
    """
    folder = Path(run)
    saved = predictions.read(folder, info := read_info(folder))
    file = cache if isinstance(cache, Cache) else open_cache(cache or info["cache"]["path"])
    return find_twins(saved, file, None if images is None else Path(images), progress)


def find_twins(saved: Saved, cache: Cache, images: Path | None = None, progress: Progress | None = None) -> Twins:
    """As `near_twins`, of what is read already."""
    rows = neighbours.match_rows(saved, cache)
    labels, groups = saved.arrays["labels"], saved.arrays["group"].tolist()
    cosines = _candidates(neighbours.describe_films(cache, rows), labels, groups)
    wanted = sorted({place for pair in cosines for place in pair})
    small = _read_films(wanted, rows, cache, images, progress)
    found = _compare(small, cosines)
    films = {place: _film(saved, rows, place) for place in wanted}
    pairs = []
    for (i, j), cosine in cosines.items():
        correlation = 1.0 if films[i].sha256 == films[j].sha256 else found.get((i, j))
        if cosine >= UNSEEN if correlation is None else correlation >= LEAST:
            apart = _contradicting(labels[i], labels[j])
            classes = tuple(saved.run["classes"][c] for c in np.flatnonzero(apart))
            pairs.append(Twin(a=films[i], b=films[j], cosine=cosine, correlation=correlation, classes=classes))
    pairs.sort(key=lambda twin: (twin.correlation is None, -(twin.correlation or twin.cosine), twin.a.place))
    split = [twin for twin in pairs if twin.a.fold != twin.b.fold]
    held = {film.place for twin in split for film in (twin.a, twin.b) if film.fold < 0}
    return Twins(
        pairs=tuple(pairs),
        films=len(rows),
        compared=len(found),
        missing=len(wanted) - len(small),
        between_folds=sum(twin.a.fold >= 0 and twin.b.fold >= 0 for twin in split),
        held_out=len(held),
    )


def _film(saved: Saved, rows: np.ndarray, place: int) -> Film:
    image, sha256, group = (str(saved.arrays[name][place]) for name in ("image", "sha256", "group"))
    fold = int(saved.arrays["fold"][place])
    return Film(place=place, row=int(rows[place]), image=image, sha256=sha256, group=group, fold=fold)


def _contradicting(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Classes (..., C) that are 1 in one of two label rows and 0 in the other; unknown contradicts nothing."""
    return np.asarray((a >= 0) & (b >= 0) & ((a == 1) != (b == 1)))


def _candidates(vectors: np.ndarray, labels: np.ndarray, groups: Sequence[str]) -> dict[tuple[int, int], float]:
    """Pairs (i < j) to look at, with their cosine: nearest films of other groups, and nearest films of any group whose
    labels contradict each other."""
    out: dict[tuple[int, int], float] = {}
    for own in (groups, None):
        near, cosines = neighbours.find_nearest(vectors, CANDIDATES, groups=own)
        places = np.broadcast_to(np.arange(len(near))[:, None], near.shape)
        kept = near >= 0
        pairs = np.sort(np.stack([places[kept], near[kept]], axis=1), axis=1)
        found = cosines[kept]
        if own is None:
            contradict = _contradicting(labels[pairs[:, 0]], labels[pairs[:, 1]]).any(axis=1)
            pairs, found = pairs[contradict], found[contradict]
        out |= {(i, j): cosine for (i, j), cosine in zip(pairs.tolist(), found.tolist(), strict=True)}
    return out


# ------------------------------------------------------------------ pixels


def _read_films(
    places: Sequence[int], rows: np.ndarray, cache: Cache, images: Path | None, progress: Progress | None
) -> dict[int, np.ndarray]:
    """Small pictures (KEPT, KEPT) uint8 of the films at `places` that exist and have the bytes that were encoded."""
    root = Path(cache.meta["dataset"]["root"])
    spec = from_dict(PreprocessSpec, cache.meta["spec"]["preprocess"])

    def read(place: int) -> np.ndarray | None:
        name = cache.header.images[rows[place]]
        path = next((path for path in recorded_places(name, root, images) if path.is_file()), None)
        try:
            data = b"" if path is None else read_bytes(path)
            if hashlib.sha256(data).hexdigest() != cache.sha256[rows[place]]:
                return None
            return shrink(decode_grey(data, spec=spec, name=name))
        except ImageError:
            return None

    found = {}
    with ThreadPoolExecutor(hardware.cpu_count()) as pool:
        for done, (place, small) in enumerate(zip(places, pool.map(read, places), strict=True), 1):
            if small is not None:
                found[place] = small
            if progress is not None:
                progress(done, len(places))
    return found


def shrink(grey: np.ndarray) -> np.ndarray:
    """A film uint8 (H, W) at KEPT pixels a side, its aspect ignored."""
    return np.asarray(Image.fromarray(grey).resize((KEPT, KEPT), Image.Resampling.BICUBIC))


def _compare(small: dict[int, np.ndarray], pairs: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    """The correlation of each pair of small pictures, either of them cut at its edges."""
    beside: dict[int, list[int]] = {}
    for i, j in pairs:
        if i in small and j in small:
            beside.setdefault(i, []).append(j)
            beside.setdefault(j, []).append(i)
    whole = functools.lru_cache(SPECTRA)(lambda place: _spectrum(small[place], 0.0))
    out: dict[tuple[int, int], float] = {}
    for i, others in beside.items():
        cut = np.stack([whole(i), *(_spectrum(small[i], share) for share in CUTS)])
        for j in others:
            pair = (min(i, j), max(i, j))
            out[pair] = max(out.get(pair, -1.0), _highest(cut, whole(j)))
    return out


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of two films uint8 (H, W), of any sizes, -1 to 1: 1 for one picture, under LEAST for two.

    Of both the coarse structure is taken out and the contrast made even everywhere, so that a window or gamma changes
    little; the highest over shifts up to SHIFT and over the CUTS of either film counts.
    """
    return _compare({0: shrink(a), 1: shrink(b)}, {(0, 1): 0.0})[0, 1]


def _spectrum(small: np.ndarray, cut: float) -> np.ndarray:
    """Fourier transform of what of a small picture is compared, `cut` of each side left out; of length 1."""
    from scipy.ndimage import gaussian_filter

    box = (cut * KEPT, cut * KEPT, (1 - cut) * KEPT, (1 - cut) * KEPT)
    picture = Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
    values = np.asarray(picture, dtype=np.float64)
    fine = values - gaussian_filter(values, BLUR)
    even = fine / (np.sqrt(gaussian_filter(fine * fine, 2 * BLUR)) + 2)  # 2 grey levels: noise of a flat part stays low
    even -= even.mean()
    length = float(np.linalg.norm(even))
    return np.fft.rfft2(even / length if length > 0 else even).astype(np.complex64)


def _highest(cut: np.ndarray, other: np.ndarray) -> float:
    """The highest correlation of spectra (k, ...) with another over shifts up to SHIFT."""
    found = np.fft.irfft2(cut * other.conj(), s=(SIDE, SIDE))
    near = np.r_[0 : SHIFT + 1, -SHIFT:0]
    return float(found[:, near[:, None], near].max())


# ------------------------------------------------------------------ a table


def write_near_twins(path: Path, found: Twins) -> None:
    """Write `near_twins.csv`, a pair a row; `cache_row` counts from 0."""
    write_csv(path, HEAD, _records(found))


def _records(found: Twins) -> Iterator[tuple[object, ...]]:
    for twin in found.pairs:
        sides = [
            (film.row, film.image, film.group, "holdout" if film.fold < 0 else f"fold {film.fold}", film.sha256)
            for film in (twin.a, twin.b)
        ]
        seen = "" if twin.correlation is None else f"{twin.correlation:.3f}"
        classes = ", ".join(twin.classes)
        yield (twin.kind, seen, f"{twin.cosine:.3f}", int(twin.same_bytes), classes, *sides[0], *sides[1])
