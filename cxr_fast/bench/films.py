"""The films a benchmark runs on: the user's own, or phantoms drawn at acquisition size."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..config import PreprocessSpec
from ..data import manifest
from ..data.images import load
from ..data.paths import expand
from ..errors import ImageError, InputError
from ..export.film_changes import CHANGES, load_changed
from ..system import hardware
from ..system.files import write_csv

# A study at acquisition size, as the full-size films of public sets are: about 2,400 x 2,000.
FILM = (2400, 2000)

T = TypeVar("T")
Decoded = tuple[np.ndarray, str]  # pixels (S, S) and the file's sha256


def draw_films(folder: Path, count: int = 6) -> list[str]:
    """Draw phantoms at acquisition size into `folder`; their paths."""
    from PIL import Image

    from ..data.phantom.dataset import draw

    rng, paths = np.random.default_rng(0), []
    for i in range(count):
        path = folder / f"film{i}.png"
        Image.fromarray(draw(rng, view=("Frontal", "Lateral")[i % 2], size=FILM)).save(path)
        paths.append(str(path))
    return paths


@contextlib.contextmanager
def sample_images(images: Path | None) -> Iterator[list[str]]:
    """Paths of the images in a file or folder; of six phantoms, deleted afterwards, where it is None."""
    if images is not None:
        yield expand([str(images)])
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield draw_films(Path(scratch))


def spread_evenly(total: int, count: int) -> np.ndarray:
    """Up to `count` places evenly spread over 0 .. total - 1, the first and the last among them."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(int))


def decode_all(paths: Sequence[str | Path], spec: PreprocessSpec) -> list[Decoded | ImageError]:
    """Pixels and sha256 of every file, or why it cannot be read; on all cores."""

    return _read_all(paths, lambda path: load(path, spec)[:2])


def _read_all(paths: Sequence[str | Path], read: Callable[[str | Path], T]) -> list[T | ImageError]:
    """What `read` makes of every file, or why it cannot be read; on all cores."""

    def attempt(path: str | Path) -> T | ImageError:
        try:
            return read(path)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(hardware.cpu_count()) as pool:
        return list(pool.map(attempt, paths))


def readable(paths: Sequence[str | Path], spec: PreprocessSpec) -> dict[int, Decoded]:
    """Pixels and sha256 of the files that can be read, by their place in `paths`."""
    return {i: found for i, found in enumerate(decode_all(paths, spec)) if not isinstance(found, ImageError)}


def copy_films(folder: Path, images: Path | None, count: int) -> manifest.Manifest:
    """Make a dataset of `count` files in `folder`: copies of those in `images` in turn, or of phantoms."""
    if images is None:
        sources = [Path(path) for path in draw_films(folder)]
    else:
        sources = [Path(path) for path in expand([str(images)])]
    rows = []
    for i in range(count):
        source = sources[i % len(sources)]
        shutil.copy(source, folder / f"copy{i}{source.suffix}")
        rows.append([f"copy{i}{source.suffix}", str(i), str(i % 2)])
    write_csv(folder / "manifest.csv", ["image", "group", "A"], rows)
    return manifest.read_dataset(folder / "manifest.csv")


@dataclass(frozen=True, kw_only=True)
class ComparedFilms:
    """Films that two models answer: pixels (n, S, S) by the preprocessing of each, those of the first model by each of
    CHANGES, labels (n, C) with -1 unknown, and n groups, each of them one `unit`."""

    pixels: dict[PreprocessSpec, np.ndarray]
    changed: dict[str, np.ndarray]
    labels: np.ndarray
    groups: list[str]
    unit: str
    left_out: int


def read_compared(
    images: Path | None,
    source: Path | None,
    count: int,
    classes: Sequence[str],
    specs: tuple[PreprocessSpec, PreprocessSpec],
) -> ComparedFilms:
    """Read `count` films of a manifest `source`, else of `images`, else phantoms, which both models can read.

    Of a manifest its groups are those of the interval, else each film is its own. Raises InputError where none is left.
    """
    first, second = specs
    with contextlib.ExitStack() as stack:
        if source is not None:
            paths, labels, groups = _listed(source, count, classes)
        else:
            every = stack.enter_context(sample_images(images))
            paths = [every[place] for place in spread_evenly(len(every), count)]
            labels, groups = np.full((len(paths), len(classes)), -1, np.int8), [str(i) for i in range(len(paths))]
        found = _read_all(paths, lambda path: load_changed(path, first))
        others = found if second == first else _read_all(paths, lambda path: load_changed(path, second))
    bad = [each for pair in zip(found, others, strict=True) for each in pair if isinstance(each, ImageError)]
    good = [
        (i, a, b)
        for i, (a, b) in enumerate(zip(found, others, strict=True))
        if not isinstance(a, ImageError) and not isinstance(b, ImageError)
    ]
    if not good:
        raise InputError(f"none of the {len(paths)} images can be read; the first, {bad[0]}")
    rows = [i for i, _, _ in good]
    return ComparedFilms(
        pixels={second: np.stack([b.pixels for _, _, b in good]), first: np.stack([a.pixels for _, a, _ in good])},
        changed={name: np.stack([a.changed[name] for _, a, _ in good]) for name in CHANGES},
        labels=labels[rows],
        groups=[groups[i] for i in rows],
        unit="film" if source is None else "group",
        left_out=len(paths) - len(good),
    )


def _listed(source: Path, count: int, classes: Sequence[str]) -> tuple[list[str], np.ndarray, list[str]]:
    """Paths and groups (n) of a manifest's images, and labels (n, C) for the model's classes, -1 for one it lacks."""
    read = manifest.read_dataset(source)
    shared = [name for name in classes if name in read.classes]
    if not shared:
        raise InputError(f"--manifest: {source} has none of the model's classes ({', '.join(classes[:3])}, ...).")
    rows = spread_evenly(len(read), count)
    labels = np.full((len(rows), len(classes)), -1, np.int8)
    for name in shared:
        labels[:, list(classes).index(name)] = np.maximum(read.labels[rows, read.classes.index(name)], -1)
    return [str(read.path(row)) for row in rows], labels, [read.groups[row] for row in rows]
