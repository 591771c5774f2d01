"""How well a column such as sex or view is read from scores, and how far each label follows it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from ..data.disclosure import GROUPS
from . import figures
from .arrays import mean_of_classes, number_groups
from .intervals import Resampling, resample, tail_shares
from .subgroups import UNKNOWN, in_order, is_ordered, split

FOLDS, RESAMPLES = 5, 400
ANY = "any finding"
# Classes that mean that there is none.
NONE = ("no finding", "normal")


@dataclass(frozen=True, kw_only=True)
class Trait:
    """What could be read from an image: `value` of `column` against all its other known values.

    present (N,) int8: 1 has it, 0 has another value, -1 unknown.
    """

    column: str
    value: str
    present: np.ndarray


def find_traits(columns: Mapping[str, np.ndarray], groups: Sequence[str]) -> list[Trait]:
    """List the values that at least `GROUPS` groups have and as many have not, of columns of subgroups, (N,) each.

    Of two values only the rarer is listed. Ages and quarters are in order: they are cut once, next to the middle.
    """
    names = np.array(groups, dtype=str)
    return [
        Trait(column=column, value=value, present=present)
        for column, named in columns.items()
        for value, present in _present(named, names)
        if min(_groups_with(present, names, side) for side in (0, 1)) >= GROUPS
    ]


def _present(named: np.ndarray, groups: np.ndarray) -> list[tuple[str, np.ndarray]]:
    known, values = named != UNKNOWN, [value for value in in_order(named) if value != UNKNOWN]
    if len(values) > 1 and is_ordered(values):
        above = [np.isin(named, values[k:]) for k in range(1, len(values))]
        first = int(np.argmin([abs(each[known].mean() - 0.5) for each in above]))
        start = re.split(r"-| to ", values[first + 1])[0]
        return [(start if start.startswith("over ") else f"{start} and above", _coded(above[first], known))]
    many = [value for value in split(named, groups)[0] if value in values]
    if len(values) == 2:
        many = sorted(many, key=lambda value: int((named == value).sum()))[:1]
    return [(value, _coded(named == value, known)) for value in many]


def _coded(has: np.ndarray, known: np.ndarray) -> np.ndarray:
    return np.where(known, has, -1).astype(np.int8)


def _groups_with(present: np.ndarray, groups: np.ndarray, side: int) -> int:
    return len(set(groups[present == side].tolist()))


def deal_folds(traits: Sequence[Trait], groups: Sequence[str], seed: int) -> np.ndarray:
    """Assign N images to FOLDS folds, (N,), no group to two: groups with the same traits are dealt out in turn."""
    ids = number_groups(groups, len(groups))
    has = np.zeros((len(traits), int(ids.max()) + 1), bool)
    for row, trait in zip(has, traits, strict=True):
        np.logical_or.at(row, ids, trait.present == 1)
    order = np.lexsort((np.random.default_rng(seed).permutation(has.shape[1]), *has))
    place = np.empty(has.shape[1], dtype=np.int64)
    place[order] = np.arange(has.shape[1]) % FOLDS
    return np.asarray(place[ids])


def read_aucs(
    traits: Sequence[Trait], scores: np.ndarray, folds: np.ndarray, groups: Sequence[str], how: Resampling
) -> list[dict[str, float]]:
    """Return the AUC of scores (N, K) for each of K traits, the mean over folds (N,), and its interval over groups."""
    ids, present = number_groups(groups, len(folds)), np.stack([trait.present for trait in traits], axis=1)
    places = [np.flatnonzero(folds == fold) for fold in range(FOLDS)]
    ranked = [
        [figures.rank_class(y[rows], s[rows]) for rows in places] for y, s in zip(present.T, scores.T, strict=True)
    ]

    def weigh(weights: np.ndarray) -> dict[str, np.ndarray]:
        parts = [np.ascontiguousarray(weights[rows]) for rows in places]
        each = [[one.areas(part)[0] for one, part in zip(of, parts, strict=True)] for of in ranked]
        return {"auc": np.stack([mean_of_classes(np.array(areas)) for areas in each])}

    values, drawn = weigh(np.ones((len(folds), 1), np.int32))["auc"][:, 0], resample(weigh, ids, how)["auc"]
    out = []
    for value, draws, tail in zip(values, drawn, tail_shares(present, ids, how.level)["of_class"], strict=True):
        low, high = np.nanquantile(draws, (tail, 1 - tail))
        out.append({"auc": float(value), "low": float(min(low, value)), "high": float(max(high, value))})
    return out


def follow(trait: Trait, labels: np.ndarray, groups: Sequence[str], classes: Sequence[str]) -> list[dict[str, Any]]:
    """How far each label follows a trait: a row a class, and one for any finding, the strongest first.

    labels (N, C) 1, 0, -1 unknown. `with` and `without` are the shares of positives among images that have the trait
    and among those that have not; `auc` is that of the trait for the label, turned to 0.5 or more. Classes that
    fewer than `GROUPS` groups have, or have not, are left out. The order is that of `low`: the interval is of the
    difference of two shares, each with as many trials as it has groups, one success and one failure added, at 95 % for
    all classes together. Source: AUC of a yes or no is 0.5 + (share among positives - share among negatives) / 2;
    Agresti and Caffo 2000; Bonferroni's correction.
    """
    ids = number_groups(groups, len(labels))
    rows: list[dict[str, Any]] = []
    z = NormalDist().inv_cdf(1 - 0.025 / len(classes))
    columns = {name: labels[:, c] for c, name in enumerate(classes)} | _any_finding(labels, classes)
    for name, label in columns.items():
        known = (label >= 0) & (trait.present >= 0)
        has, positive = trait.present[known] == 1, label[known] == 1
        counts = np.array([len(np.unique(ids[known][positive == side])) for side in (True, False)])
        if counts.min() < GROUPS or has.all() or not has.any():
            continue
        shares = np.array([has[positive].mean(), has[~positive].mean()])
        drawn = (shares * counts + 1) / (counts + 2)
        half = z / 2 * float(np.sqrt((drawn * (1 - drawn) / (counts + 2)).sum()))
        middle, area = abs(drawn[0] - drawn[1]) / 2, abs(shares[0] - shares[1]) / 2
        rows.append(
            {
                "class": name,
                "with": float(positive[has].mean()),
                "without": float(positive[~has].mean()),
                "auc": 0.5 + float(area),
                "low": 0.5 + float(min(max(middle - half, 0), area)),
                "high": 0.5 + float(min(max(middle + half, area), 0.5)),
            }
        )
    return sorted(rows, key=lambda row: (-row["low"], -row["auc"]))


def _any_finding(labels: np.ndarray, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """One label more: 1 with any finding, 0 where all are known to be absent; none where it equals a class."""
    found = labels[:, [name.casefold() not in NONE for name in classes]]
    either = np.where((found == 1).any(axis=1), 1, np.where((found == 0).all(axis=1), 0, -1))
    return {} if (labels == either[:, None]).all(axis=0).any() else {ANY: either}


def describe(
    trait: Trait, area: Mapping[str, float], groups: Sequence[str], labels: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a row of the audit, JSON-ready: the trait, how many have it, how well it is read, and what follows it."""
    names = np.array(groups, dtype=str)
    return {
        "column": trait.column,
        "value": trait.value,
        "images": int((trait.present >= 0).sum()),
        "images_with": int((trait.present == 1).sum()),
        "groups_with": _groups_with(trait.present, names, 1),
        "groups_without": _groups_with(trait.present, names, 0),
        **area,
        "labels": list(labels),
    }


def strength(row: Mapping[str, Any]) -> float:
    """How well the label that follows a trait most would be told by what is read of the trait: 0 is chance, 1 always.

    The product of the two AUCs above chance, where the trait is read from an image regardless of the label.
    """
    follows = row["labels"][0]["auc"] if row["labels"] and row["labels"][0]["low"] > 0.5 else 0.5
    return float(max(2 * row["auc"] - 1, 0) * (2 * follows - 1))
