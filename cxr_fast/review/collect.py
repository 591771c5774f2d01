"""Collect thumbnails and heat maps of films: those that an earlier review kept, the others from the files."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ..system.text import counted
from .films import RunFilms
from .heat import HeatMaps, as_png, place_style
from .page import Heat
from .pictures import MISSING, Reader, ReadFilm, ahead
from .state import KeptFiles

Job = tuple[int, list[int]]  # a film's row, and the classes whose heat maps are to be drawn


@dataclass
class Collector:
    """What is known of the films' pictures, by row: WebP thumbnails, heat maps, and why there are none.

    `models` is None where no heat maps can be drawn.
    """

    films: RunFilms
    kept: KeptFiles
    reader: Reader
    models: HeatMaps | None
    thumbnails: dict[int, bytes] = field(default_factory=dict)
    heat: dict[tuple[int, int], Heat] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)

    def collect(self, wanted: Mapping[int, Collection[int]], on_done: Callable[[int, int], None]) -> None:
        """Collect the films of `wanted`, a row and the classes of its heat maps each; `on_done` gets films done, all.

        Each film is kept as soon as it is done.
        """
        jobs = []
        for row, classes in wanted.items():
            left = self._take_kept(row, set(classes) if self.models else set())
            if left or row not in self.thumbnails:
                jobs.append((row, left))
        done = len(wanted) - len(jobs)
        on_done(done, len(wanted))
        for batch in ahead(jobs, self._read):
            self._keep(batch)
            done += len(batch)
            on_done(done, len(wanted))

    def describe_lost(self) -> list[str]:
        """A line for each reason why films have no picture."""
        mend = {MISSING: "; give the folder of the films with --images"}
        return [
            f"pictures of {counted(count, 'film')}: {reason}{mend.get(reason, '')}"
            for reason, count in Counter(self.lost.values()).items()
        ]

    def _read(self, job: Job) -> ReadFilm:
        return self.reader.read(str(self.films.images[job[0]]), self._sha256(job[0]))

    def _take_kept(self, row: int, classes: set[int]) -> list[int]:
        """Take what an earlier review kept of a film; returns the classes that have no heat map yet."""
        webp = self.kept.thumbnail(self._sha256(row))
        if webp is None or (size := _size(webp)) is None:
            return sorted(classes)
        self.thumbnails[row] = webp
        if self.models is None or not classes:
            return []
        kept = self.kept.maps(self._sha256(row), self.models.model(row))
        for c in classes & set(kept):
            self._add_heat(row, c, kept[c], size)
        return sorted(classes - set(kept))

    def _keep(self, batch: Sequence[tuple[Job, ReadFilm]]) -> None:
        """Keep the thumbnails of a batch, draw its heat maps and keep them."""
        found = []
        for (row, classes), picture in batch:
            if picture.pixels is None:
                if row not in self.thumbnails:
                    self.lost[row] = picture.lost
                continue
            self.thumbnails[row] = picture.webp
            self.kept.keep_thumbnail(self._sha256(row), picture.webp)
            if classes:
                found.append((row, classes, picture.pixels))
        if self.models is None or not found:
            return
        rows, classes_of, pixels = zip(*found, strict=True)
        drawn = self.models.draw(rows, np.stack(pixels), classes_of)
        for row, classes, maps in zip(rows, classes_of, drawn, strict=True):
            named = dict(zip(classes, maps, strict=True))
            self.kept.keep_maps(self._sha256(row), self.models.model(row), named)
            for c, shares in named.items():
                self._add_heat(row, c, shares, _size(self.thumbnails[row]) or (1, 1))

    def _add_heat(self, row: int, c: int, shares: np.ndarray, size: tuple[int, int]) -> None:
        # As it is kept: a page that goes on from kept maps is the same to the byte.
        self.heat[row, c] = Heat.of(as_png(shares.astype(np.float16)), place_style(size, self.reader.spec))

    def _sha256(self, row: int) -> str:
        return str(self.films.sha256[row])


def _size(webp: bytes) -> tuple[int, int] | None:
    """Width and height of a thumbnail; None where the kept file is damaged."""
    try:
        with Image.open(io.BytesIO(webp)) as image:
            return image.size
    except OSError:
        return None
