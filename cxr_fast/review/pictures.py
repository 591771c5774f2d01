"""Read the films of a review: the file that was cached and no other, its thumbnail, and its pixels for the model."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from ..config import PreprocessSpec
from ..data.images import decode_grey, read_bytes, resize
from ..data.paths import recorded_places
from ..errors import ImageError
from ..system.hardware import cpu_count

SIDE, QUALITY = 384, 90  # of the thumbnails that are kept; those of the page are made from them
MISSING, CHANGED = "not found", "changed since it was cached"
BATCH = 16

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class ReadFilm:
    """One film as it was read: its WebP thumbnail and its pixels (S, S) uint8, or the reason why there are none."""

    webp: bytes = field(default=b"", repr=False)
    pixels: np.ndarray | None = field(default=None, repr=False)
    lost: str = ""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Reads films that a run names: below `images`, else below `root`, the folder that they were cached from."""

    root: Path
    images: Path | None
    spec: PreprocessSpec

    def read(self, name: str, sha256: str) -> ReadFilm:
        """Read one film; its bytes must be those that were cached. No error is raised: `lost` says what is wrong."""
        places = [place for place in recorded_places(name, self.root, self.images) if place.is_file()]
        reason = MISSING
        for place in places:
            try:
                data = read_bytes(place)
                if hashlib.sha256(data).hexdigest() != sha256:
                    reason = CHANGED
                    continue
                grey = decode_grey(data, spec=self.spec, name=name)
                return ReadFilm(webp=shrink(Image.fromarray(grey), SIDE, QUALITY), pixels=resize(grey, self.spec))
            except ImageError as error:
                reason = error.reason.replace("_", " ")
        return ReadFilm(lost=reason)


def shrink(grey: Image.Image, side: int, quality: int) -> bytes:
    """A picture as WebP, its longer side `side` pixels at most; a smaller one keeps its size."""
    grey = grey.convert("L")
    scale = min(1.0, side / max(grey.size))
    size = tuple(max(1, round(length * scale)) for length in grey.size)
    buffer = io.BytesIO()
    grey.resize((size[0], size[1]), Image.Resampling.LANCZOS).save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


def ahead(items: Sequence[Item], work: Callable[[Item], Answer]) -> Iterator[list[tuple[Item, Answer]]]:
    """Yield the items with their answers in batches of BATCH, while threads work on the next batch."""
    batches = [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
    with ThreadPoolExecutor(cpu_count()) as pool:
        waiting = [pool.submit(work, item) for item in batches[0]] if batches else []
        for number, batch in enumerate(batches):
            following = batches[number + 1] if number + 1 < len(batches) else []
            after = [pool.submit(work, item) for item in following]
            yield [(item, each.result()) for item, each in zip(batch, waiting, strict=True)]
            waiting = after
