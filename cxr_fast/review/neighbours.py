"""Nearest films by what a cache holds of them, in blocks of bounded memory; needs neither torch nor the weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..activations.cache import Cache
from ..errors import InputError
from ..metrics.arrays import number_groups
from ..training.predictions import Saved

READ_AT_ONCE = 1 << 27  # bytes of activations
CELLS = 1 << 24  # cosines in memory at once: 64 MiB


def match_rows(saved: Saved, cache: Cache) -> np.ndarray:
    """The row of a cache (n,) for each image of a run's predictions, by name and hash.

    Raises InputError where the cache lacks an image of the run, or holds other bytes under its name.
    """
    rows = {image: row for row, image in enumerate(cache.header.images)}
    images, hashes = saved.arrays["image"].tolist(), saved.arrays["sha256"].tolist()
    found = [rows.get(image, -1) for image in images]
    if lost := [image for image, row in zip(images, found, strict=True) if row < 0 or not cache.ok[row]]:
        raise InputError(
            f"{cache.path}: lacks {len(lost):,} of the run's {len(images):,} images, such as {lost[0]}; give the cache "
            "the run was trained from."
        )
    other = [image for image, row, value in zip(images, found, hashes, strict=True) if cache.sha256[row] != value]
    if other:
        raise InputError(
            f"{cache.path}: {len(other):,} of the run's {len(images):,} images have other bytes than when it was "
            f"trained, such as {other[0]}; run the sweep again on this cache."
        )
    return np.array(found, dtype=np.int64)


def describe_films(cache: Cache, rows: np.ndarray) -> np.ndarray:
    """Unit vectors (n, D) float32 of `rows`: the mean of the cached tokens of the plain view.

    Each of the D values is brought to mean 0 and spread 1 over the rows first: a few channels of a trained tower are
    many times larger than the rest. A cache cut behind the pooling holds one vector a view instead of tokens.
    """
    stored = cache.activations
    step = max(1, READ_AT_ONCE // (stored.nbytes // max(len(stored), 1) or 1))
    out = np.empty((len(rows), stored.shape[-1]), np.float32)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        found = np.asarray(stored[part, np.zeros_like(part)], dtype=np.float32)
        out[start : start + step] = found if found.ndim == 2 else found.mean(axis=1)
    spread = out.std(axis=0)
    out = (out - out.mean(axis=0)) / np.where(spread > 0, spread, 1)
    length = np.linalg.norm(out, axis=1, keepdims=True)
    return np.divide(out, length, out=np.zeros_like(out), where=length > 0)


def find_nearest(
    vectors: np.ndarray, count: int, *, groups: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` nearest others of each unit vector (n, D), the nearest first: places (n, k) and cosines (n, k).

    With `groups`, a name a film, those of its own group are left out. k is less than `count` where there are not as
    many films; a place without a film is -1 and its cosine -inf. Memory is bounded whatever n.
    """
    films = len(vectors)
    k = max(0, min(count, films - 1))
    owner = np.arange(films) if groups is None else number_groups(groups, films)
    places, cosines = np.full((films, k), -1, np.int64), np.full((films, k), -np.inf, np.float32)
    step = max(1, CELLS // max(films, 1))
    for start in range(0, films if k else 0, step):
        block = vectors[start : start + step] @ vectors.T
        block[owner[start : start + step, None] == owner[None, :]] = -np.inf
        near = np.argpartition(-block, k - 1, axis=1)[:, :k]
        found = np.take_along_axis(block, near, axis=1)
        order = np.lexsort((near, -found), axis=1)
        near, found = np.take_along_axis(near, order, axis=1), np.take_along_axis(found, order, axis=1)
        places[start : start + step] = np.where(np.isfinite(found), near, -1)
        cosines[start : start + step] = found
    return places, cosines
