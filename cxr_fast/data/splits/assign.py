"""Assign every image to the hold-out or to one fold: whole groups, what is given first, the rest drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...errors import InputError
from . import balanced, iterative
from .given import FREE, HOLDOUT, TRAIN


@dataclass(frozen=True, kw_only=True)
class SplitSpec:
    """What is asked of a split: the number of folds, the share held out, the seed, the unit, the method.

    >>> SplitSpec(folds=5, holdout=0.2).method
    'balanced'
    """

    folds: int
    holdout: float
    seed: int = 0
    by: Literal["group", "image"] = "group"
    method: Literal["balanced", "iterative"] = "balanced"


def split(labels: np.ndarray, groups: Sequence[str], spec: SplitSpec, given: np.ndarray | None = None) -> np.ndarray:
    """Assign every image to the hold-out (-1) or to one fold (0..K-1), no group to two of them; int16 (N,).

    labels (N, C) int8 with 1, 0, -1 unknown; groups N names; `given` (N,) what is decided already: -1 the hold-out, 0
    and above a fold, -2 any fold, -3 nothing; one value per group. The rest is drawn, so that the share of each class
    in a part, counted in images and in groups, is near the part's share (`balanced`), or by groups alone
    (`iterative`, which takes nothing given). Groups are drawn into the hold-out until it has `holdout` of all groups.
    The same seed gives every group the same place whatever the order of the rows; with by="image" only their position
    distinguishes rows. Raises InputError when there are fewer groups than parts, or when shapes disagree.
    """
    _check(labels, groups, spec)
    unit = _units(groups, spec.by)
    units = int(unit.max()) + 1
    decided = np.full(units, FREE)
    if given is not None:
        decided[unit] = given
    _refuse_few(decided, spec)
    if spec.method == "iterative":
        if (decided != FREE).any():
            raise InputError(
                "--split-method iterative draws every group and takes none that is given; leave it out, or leave the "
                "given parts out (--split drawn, no --holdout-list, no --split-from)."
            )
        place = iterative.assign(labels, unit, spec.folds, spec.holdout, spec.seed)
    else:
        place = balanced.assign(balanced.count(labels, unit), decided, spec.folds, spec.holdout, spec.seed)
    assignment: np.ndarray = place[unit].astype(np.int16)
    pairs = np.unique(np.stack([unit, assignment]), axis=1)
    assert len(pairs[0]) == units, "a group landed in two parts"
    return assignment


def _units(groups: Sequence[str], by: str) -> np.ndarray:
    """The number of the unit of each image: groups in the order of their names, or the images themselves."""
    names = np.asarray(list(groups), dtype=str) if by == "group" else np.arange(len(groups))
    return np.unique(names, return_inverse=True)[1].reshape(-1)


def _check(labels: np.ndarray, groups: Sequence[str], spec: SplitSpec) -> None:
    if labels.ndim != 2 or len(labels) != len(groups) or not len(labels):
        raise InputError(f"labels {labels.shape} and {len(groups)} group names do not describe the same images.")
    if spec.folds < 1:
        raise InputError(f"--folds: {spec.folds} must be at least 1.")
    if not 0 <= spec.holdout < 1:
        raise InputError(f"--holdout: {spec.holdout} must be in [0, 1).")


def _refuse_few(decided: np.ndarray, spec: SplitSpec) -> None:
    """Raise InputError where the units cannot fill every part."""
    kind = "group(s)" if spec.by == "group" else "image(s)"
    held = int((decided == HOLDOUT).sum())
    wants = spec.holdout > 0 or held > 0
    if len(decided) < spec.folds + wants:
        wanted = f"{spec.folds} folds{' and a hold-out' if wants else ''}"
        raise InputError(f"{len(decided)} {kind} cannot fill {wanted}: lower --folds or add data.")
    if len(decided) - held < spec.folds:
        raise InputError(
            f"{held} of {len(decided)} {kind} are given to the hold-out, and the rest cannot fill {spec.folds} folds: "
            "hold fewer out, or lower --folds."
        )
    if spec.holdout > 0 and not held and not (decided == FREE).any():
        raise InputError(
            f"every one of {len(decided)} {kind} is given to training, so nothing can be held out: mark some as "
            "holdout, or pass --holdout 0."
        )
    lacking = sorted(set(range(spec.folds)) - set(decided.tolist()))
    if int(np.isin(decided, (FREE, TRAIN)).sum()) - (wants and not held) < len(lacking):
        raise InputError(f"too few {kind} are left to draw for fold {lacking[0]}: lower --folds or add data.")


def one_sided(labels: np.ndarray, groups: Sequence[str], assignment: np.ndarray) -> dict[int, int]:
    """Classes with positives in two or more groups, all of them held out or all of them not; the part of each.

    labels (N, C), groups N names, assignment (N,) as `split` returns it; class number to -1 (all are held out) or 0.
    Empty where there is no hold-out.
    """
    held = assignment == HOLDOUT
    if not held.any():
        return {}
    unit = _units(groups, "group")
    found = {}
    for c in range(labels.shape[1]):
        positive = labels[:, c] == 1
        if len(np.unique(unit[positive])) > 1 and len(set(held[positive].tolist())) == 1:
            found[c] = HOLDOUT if held[positive][0] else 0
    return found
