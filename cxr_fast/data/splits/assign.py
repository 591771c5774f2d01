"""Split images into hold-out and folds: no group in two of them, every label spread over all of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ...errors import InputError

HOLDOUT = -1


def split(
    labels: np.ndarray,
    groups: Sequence[str],
    *,
    folds: int,
    holdout: float,
    seed: int,
    by: Literal["group", "image"] = "group",
) -> np.ndarray:
    """Assign every image to the hold-out or to one fold by iterative stratification of whole groups.

    labels (N, C) int8 with 1, 0, -1 unknown; groups N names; the answer is (N,) int16: -1 for the hold-out,
    else 0..K-1. A group counts as positive for a class when any of its images is. `holdout` is a fraction of
    the groups, met to about 2 %, and 0 gives no -1. The same seed gives every group the same place whatever
    the order of the rows; with by="image" only their position distinguishes rows.
    Raises InputError when there are fewer groups than parts, or when shapes disagree.
    Source: Sechidis, Tsoumakas, Vlahavas, On the Stratification of Multi-Label Data, 2011.
    """
    _check(labels, groups, folds, holdout)
    names = np.asarray(list(groups), dtype=str) if by == "group" else np.arange(len(labels))
    unit = np.unique(names, return_inverse=True)[1].reshape(-1)
    parts = folds + (holdout > 0)
    if (units := int(unit.max()) + 1) < parts:
        wanted = f"{folds} folds{' and a hold-out' if holdout else ''}"
        kind = "group(s)" if by == "group" else "image(s)"
        raise InputError(f"{units} {kind} cannot fill {wanted}: lower --folds or add data.")
    place = _assign(_targets(labels, unit, units), folds, holdout, np.random.RandomState(seed))
    assignment: np.ndarray = place[unit].astype(np.int16)
    assert _parts_of_each(unit, assignment).max() == 1, "a group landed in two parts"
    return assignment


def _check(labels: np.ndarray, groups: Sequence[str], folds: int, holdout: float) -> None:
    if labels.ndim != 2 or len(labels) != len(groups) or not len(labels):
        raise InputError(f"labels {labels.shape} and {len(groups)} group names do not describe the same images.")
    if folds < 1:
        raise InputError(f"--folds: {folds} must be at least 1.")
    if not 0 <= holdout < 1:
        raise InputError(f"--holdout: {holdout} must be in [0, 1).")


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


def _parts_of_each(unit: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    pairs = np.unique(np.stack([unit, assignment]), axis=1)
    return np.bincount(pairs[0])
