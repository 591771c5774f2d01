"""The distance of a film from the training films: fitted, scaled, kept in a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..system.files import file_sha256
from .features import norm_features

FILE = "unlikeness.safetensors"
LEAST_FILMS, LEAST_GROUPS, FOLDS = 100, 5, 5
MOST = 20_000  # films that it is fitted to, drawn at random; more change little
# Share of the identity in the covariance, beside Ledoit and Wolf's. Without it int8's rounding moved one of 135 films
# by 0.023, with it by 0.014 at most, and more of the turned and inverted films were over 1 (benchmarks/LOG.md).
IDENTITY = 0.5
LIMIT_QUANTILE = 0.99  # of the training films out of fold; its distance becomes 1
QUANTILES = 101
FLAT = 1e-6  # the spread of a normed feature that never varies


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A fitted distance: `mean` (F,) and `whitening` (F, F), both float32, scaled so that 1 is the limit.

    `measure` is the length of (normed features - mean) @ whitening: Mahalanobis's distance (Lee et al. 2018), with the
    covariance of Ledoit and Wolf (2004) shrunk further.
    """

    mean: np.ndarray
    whitening: np.ndarray

    def measure(self, features: np.ndarray) -> np.ndarray:
        """Return the unlikeness (N,) float64 of features (N, F), not normed."""
        apart = norm_features(features) - self.mean.astype(np.float64)
        return np.asarray(np.linalg.norm(apart @ self.whitening.astype(np.float64), axis=1))


@dataclass(frozen=True, kw_only=True)
class FittedDistance:
    """A distance, the unlikeness (N,) of the films it was fitted to, each by a fit without its group, and how far the
    covariance was shrunk by the rule of Ledoit and Wolf (0 to 1)."""

    distance: Distance
    out_of_fold: np.ndarray
    shrinkage: float


def why_not(groups: Sequence[str]) -> str:
    """Say why films of these groups are too few for a distance; empty where they are enough."""
    films, count = len(groups), len(set(groups))
    if films >= LEAST_FILMS and count >= LEAST_GROUPS:
        return ""
    return (
        f"no unlikeness: {films:,} training film(s) of {count:,} group(s), and it needs {LEAST_FILMS} of {LEAST_GROUPS}"
    )


def fit_distance(features: np.ndarray, groups: Sequence[str], seed: int = 0) -> FittedDistance:
    """Fit to features (N, F), not normed, of films of `groups` (N,); 1 is LIMIT_QUANTILE of the films out of fold.

    Raises InputError where `why_not` gives a reason, or where all films have the same features.
    """
    if reason := why_not(groups):
        raise InputError(f"{reason}.")
    x = norm_features(features)
    if not x.std(axis=0).max() > FLAT:
        raise InputError("no unlikeness: the training films all have the same features.")
    folds = _deal_folds(groups, seed)
    out_of_fold = np.empty(len(x))
    for fold in range(FOLDS):
        mean, whitening, _ = _fit(x[folds != fold])
        out_of_fold[folds == fold] = np.linalg.norm((x[folds == fold] - mean) @ whitening, axis=1)
    mean, whitening, shrinkage = _fit(x)
    scale = float(np.quantile(out_of_fold, LIMIT_QUANTILE))
    distance = Distance(mean=mean.astype(np.float32), whitening=(whitening / scale).astype(np.float32))
    return FittedDistance(distance=distance, out_of_fold=out_of_fold / scale, shrinkage=shrinkage)


def draw_places(count: int, seed: int = 0) -> np.ndarray:
    """Draw at most MOST of `count` places, in order."""
    if count <= MOST:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, MOST, replace=False))


def _deal_folds(groups: Sequence[str], seed: int) -> np.ndarray:
    """Deal films (N,) into FOLDS by group, groups of many films first, each to the smallest fold."""
    names, inverse, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-sizes[order], kind="stable")]
    fold_of, filled = np.empty(len(names), np.int64), np.zeros(FOLDS, np.int64)
    for name in order:
        fold_of[name] = np.argmin(filled)
        filled[fold_of[name]] += sizes[name]
    return np.asarray(fold_of[inverse])


def _fit(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return mean (F,), whitening (F, F) and shrinkage of normed features; the spread of each feature is taken out
    before the covariance is shrunk, and put back."""
    from sklearn.covariance import ledoit_wolf

    mean, spread = x.mean(axis=0), x.std(axis=0)
    spread = np.where(spread > FLAT, spread, 1.0)
    covariance, shrinkage = ledoit_wolf((x - mean) / spread, assume_centered=True)
    level = np.trace(covariance) / len(covariance)
    values, vectors = np.linalg.eigh(covariance)
    values = (1 - IDENTITY) * np.maximum(values, 0) + IDENTITY * max(level, 1e-12)
    whitening = vectors / np.sqrt(values) / spread[:, None]
    return mean, whitening, float(shrinkage)


def quantiles(values: np.ndarray) -> list[float]:
    """Return the QUANTILES of values (N,), from the least to the largest."""
    return [float(q) for q in np.quantile(values, np.linspace(0, 1, QUANTILES))]


def save_distance(folder: Path, distance: Distance) -> str:
    """Write FILE into a run folder; return its sha256."""
    from safetensors.numpy import save_file

    path = folder / FILE
    save_file({"mean": distance.mean, "whitening": np.ascontiguousarray(distance.whitening)}, path)
    path.chmod((folder / "..").stat().st_mode & 0o666)  # safetensors writes for the owner alone
    return file_sha256(path)


def load_distance(folder: Path, record: dict[str, Any]) -> Distance:
    """Read FILE of a run folder whose `run.json` has `record`. InputError where it is not the file written then."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / FILE
    try:
        if file_sha256(path) != record["sha256"]:
            raise InputError(f"{path}: not the file that run.json was written with; run the sweep again.")
        tensors = load_file(path)
        return Distance(mean=tensors["mean"], whitening=tensors["whitening"])
    except (OSError, KeyError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({str(error)[:120]}); run the sweep again.") from error
