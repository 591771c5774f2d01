"""What a run folder holds of unlikeness: fitted when a sweep ends, read again for an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from .distance import (
    Distance,
    FittedDistance,
    draw_places,
    fit_distance,
    load_distance,
    quantiles,
    save_distance,
    why_not,
)
from .features import FeatureSource, find_source, read_features
from .oddest import COUNT, rank_oddest

if TYPE_CHECKING:
    from ..activations.cache import Cache


@dataclass(frozen=True, kw_only=True)
class RunUnlikeness:
    """The distance of a run and where its features are taken; `record` is `unlikeness` in `run.json`."""

    distance: Distance
    source: FeatureSource
    record: dict[str, Any]


def fit_rows(
    cache: Cache, visual: Any, rows: np.ndarray, groups: Sequence[str]
) -> tuple[FittedDistance, FeatureSource, np.ndarray]:
    """Fit to the plain view of rows (n,) of `groups` (n,) of a cache made from the tower `visual`, or of MOST of them.

    Returns the fit, where its features are from, and the places (m,) in `rows` of the films it was fitted to.
    InputError as `fit_distance`.
    """
    if reason := why_not(groups):
        raise InputError(f"{reason}.")
    source = find_source(visual, int(cache.meta["spec"]["unfreeze_blocks"]))
    places = draw_places(len(rows))
    features = read_features(cache, rows[places], source)
    return fit_distance(features, [groups[place] for place in places]), source, places


def write_unlikeness(
    folder: Path, cache: Cache, visual: Any, rows: np.ndarray, groups: Sequence[str]
) -> dict[str, Any]:
    """Fit to the training rows (n,) of `groups` (n,), write the file into the run folder, return what `run.json` says.

    `quantiles` are the 101 quantiles (0, 0.01, ..., 1) of the training films' unlikeness out of fold. Where it cannot
    be had, the record has `skipped` alone, a line that says why.
    """
    try:
        fitted, source, places = fit_rows(cache, visual, rows, groups)
    except InputError as error:
        return {"skipped": str(error)}
    return {
        "features": source.text,
        "films": len(places),
        "groups": len({groups[place] for place in places}),
        "shrinkage": fitted.shrinkage,
        "quantiles": quantiles(fitted.out_of_fold),
        "sha256": save_distance(folder, fitted.distance),
    }


def read_unlikeness(folder: Path, info: Mapping[str, Any], visual: Any) -> RunUnlikeness | None:
    """Read what a run folder holds, `info` being its `run.json`; None for an earlier run, and where it was skipped.

    Raises InputError where the file is missing or is another.
    """
    record = info.get("unlikeness") or {}
    if "sha256" not in record:
        return None
    source = find_source(visual, int(info["cache"]["spec"]["unfreeze_blocks"]))
    return RunUnlikeness(distance=load_distance(folder, record), source=source, record=record)


def find_oddest(cache: Cache, visual: Any, count: int = COUNT) -> list[tuple[str, float]]:
    """Return the encoded images of a cache that are furthest from the others, and their unlikeness, by a distance
    fitted to the cache itself. InputError where they are too few."""
    rows = np.flatnonzero(cache.ok)
    fitted, _, places = fit_rows(cache, visual, rows, [cache.header.groups[row] for row in rows])
    images = [cache.header.images[row] for row in rows[places]]
    return rank_oddest(images, fitted.out_of_fold.tolist(), count)
