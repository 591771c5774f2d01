"""The nearest training films of a film, by what the frozen part of the backbone makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..activations.cache import Cache, open_cache
from ..errors import InputError
from ..training.predictions import Saved
from .films import RunFilms
from .neighbours import match_rows

COUNT = 3
Neighbours = dict[int, list[tuple[int, float]]]


def open_run_cache(saved: Saved, path: Path | None) -> tuple[Cache, np.ndarray]:
    """The cache that a run was trained from, or one like it at another `path`, and the row of each film in it (N,).

    InputError, without the name of a film, where it is another or lacks a film.
    """
    place = path or Path(saved.run["cache"]["path"])
    try:
        cache = open_cache(place)
    except InputError as error:
        said = f"{error} Name it with --cache where it moved." if path is None else f"--cache: {error}"
        raise InputError(said) from None
    if cache.meta["fingerprint"] != saved.run["cache"]["fingerprint"]:
        raise InputError(f"{place} is not the cache that this run was trained from; name that with --cache.")
    try:
        return cache, match_rows(saved, cache)
    except InputError:
        raise InputError(f"{place} lacks films of this run or holds others; name its cache with --cache.") from None


def find_nearest(films: RunFilms, run: Mapping[str, Any], vectors: np.ndarray, rows: Sequence[int]) -> Neighbours:
    """The COUNT nearest films of each of `rows`, with the cosine of their vectors (N, D) of length 1.

    Only films that the model which scored a film was trained on, and none of the film's own group.
    """
    chosen = run["chosen"]["fold"] if run["final"]["kind"] == "best-fold" else None
    found: Neighbours = {}
    for row in rows:
        fold = int(films.fold[row])
        trained = (films.fold >= 0) & (films.fold != (fold if fold >= 0 else -2 if chosen is None else chosen))
        others = trained & (films.groups != films.groups[row])
        cosine = np.where(others, vectors @ vectors[row], -np.inf)
        nearest = np.argsort(-cosine, kind="stable")[: min(COUNT, int(others.sum()))]
        found[row] = [(int(place), float(cosine[place])) for place in nearest]
    return found
