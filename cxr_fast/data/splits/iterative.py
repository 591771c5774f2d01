"""Iterative stratification of whole groups: each class spread over the parts, counted in groups.

Source: Sechidis, Tsoumakas, Vlahavas, On the Stratification of Multi-Label Data, 2011.
"""

from __future__ import annotations

import warnings

import numpy as np

from ...errors import InputError
from .given import HOLDOUT


def assign(labels: np.ndarray, unit: np.ndarray, folds: int, holdout: float, seed: int) -> np.ndarray:
    """The part of each unit (G,): -1 for the hold-out, else 0..K-1.

    labels (N, C) int8; unit (N,) the number of each image's unit. A unit counts as positive for a class when any of
    its images is. `holdout` is a fraction of the units, met to about 2 %, and 0 gives no -1.
    """
    return _assign(_targets(labels, unit, int(unit.max()) + 1), folds, holdout, np.random.RandomState(seed))


def _targets(labels: np.ndarray, unit: np.ndarray, units: int) -> np.ndarray:
    """What is spread, bool (G, C + sizes): a group's findings, and its number of images by powers of two.

    The library balances numbers of groups only; the size columns are what balances numbers of images.
    """
    positive = np.zeros((units, labels.shape[1]), dtype=bool)
    rows, columns = np.nonzero(labels == 1)
    positive[unit[rows], columns] = True
    size = np.floor(np.log2(np.bincount(unit, minlength=units))).astype(int)
    return np.hstack([positive, size[:, None] == np.unique(size)])


def _assign(targets: np.ndarray, folds: int, holdout: float, random: np.random.RandomState) -> np.ndarray:
    """Part of each group, (G,): hold-out first, then folds on the rest, then no part left empty."""
    place = np.zeros(len(targets), dtype=int)
    if holdout:
        taken, equal = _fraction(holdout)
        place[_stratify(targets, equal, random) < taken] = HOLDOUT
    rest = np.flatnonzero(place != HOLDOUT)
    place[rest] = _stratify(targets[rest], folds, random)
    return _fill_empty(place, [*range(folds), *([HOLDOUT] if holdout else [])])


def _stratify(targets: np.ndarray, parts: int, random: np.random.RandomState) -> np.ndarray:
    """Equal parts of rows. Only equal ones: with unequal shares every label that occurs once goes to the
    largest part, because the library looks at sizes only to break ties between shares."""
    if parts == 1 or not len(targets):
        return np.zeros(len(targets), dtype=int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shares = np.full(parts, 1 / parts)
        from iterstrat.ml_stratifiers import IterativeStratification

        return np.asarray(IterativeStratification(labels=targets, r=shares, random_state=random))


def _fraction(share: float) -> tuple[int, int]:
    """The fraction p / q with the smallest q that is within 2 % of the share: 0.2 is one part of five."""
    for q in range(2, 10_000):
        p = round(share * q)
        if 0 < p < q and abs(p / q - share) <= 0.02 * min(share, 1 - share):
            return p, q
    raise InputError(f"--holdout: {share} is too close to 0 or 1.")


def _fill_empty(place: np.ndarray, parts: list[int]) -> np.ndarray:
    """With about as many groups as parts the library may leave one empty; the largest part gives a group."""
    while True:
        counts = np.array([(place == part).sum() for part in parts])
        if counts.min() > 0:
            return place
        largest = parts[int(np.argmax(counts))]
        place[np.flatnonzero(place == largest)[0]] = parts[int(np.argmin(counts))]
