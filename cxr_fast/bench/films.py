"""The films a benchmark runs on: the user's own, or phantoms drawn at acquisition size."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..config import PreprocessSpec
from ..data import manifest
from ..data.images import load
from ..data.paths import expand
from ..errors import ImageError
from ..system import hardware
from ..system.files import write_csv

# A study at acquisition size, as the full-size films of public sets are: about 2,400 x 2,000.
FILM = (2400, 2000)

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

    def decode(path: str | Path) -> Decoded | ImageError:
        try:
            return load(path, spec)[:2]
        except ImageError as error:
            return error

    with ThreadPoolExecutor(hardware.cpu_count()) as pool:
        return list(pool.map(decode, paths))


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
