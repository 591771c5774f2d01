"""Subgroups of images by a column (sex, age, scanner, view), and the widest gap between two of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from ..data.public_tables import decade
from ..errors import InputError
from .arrays import number_groups
from .figures import decisions
from .intervals import FEW, Resampling, group_weights, groups_behind, mean_ends, weighted_figures

UNKNOWN = "unknown"
# A column of more different values than this is grouped first: ages into decades, other numbers into quarters.
MOST = 12
# The means over classes that gaps are given of, and the figure of each class behind each. None hangs on prevalence.
GAPS = {"macro_auc": "auc", "macro_sensitivity": "sensitivity", "macro_specificity": "specificity"}


def split(name: str, values: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the row numbers of each subgroup of one column of N texts, in reading order; empty texts are `unknown`,
    last.

    Raises InputError, without a path, where the column holds nothing, or too many values that are no numbers.
    """
    filled = {value for value in values if value}
    if not filled:
        raise InputError("the data names none.")
    if "age" in re.split(r"[^a-z]+", name.lower()) and all(map(decade, filled)):
        values = [decade(value) for value in values]
    elif len(filled) > MOST:
        values = _quarters(values, len(filled))
    named = np.array([value or UNKNOWN for value in values])
    return {str(value): np.flatnonzero(named == value) for value in sorted(set(named.tolist()), key=_reading_order)}


def _quarters(values: Sequence[str], different: int) -> list[str]:
    """Group numbers between their quartiles, `up to 12`, `12 to 30`, ...; equal values stay in one quarter."""
    try:
        numbers = np.array([float(value) if value else np.nan for value in values])
    except ValueError as error:
        raise InputError(f"{different} different values that are no numbers; group them in the manifest.") from error
    edges = np.unique(np.nanquantile(numbers, [0.25, 0.5, 0.75]))
    texts = [f"{edge:g}" for edge in edges]
    names = [f"up to {texts[0]}", *(f"{a} to {b}" for a, b in pairwise(texts)), f"over {texts[-1]}"]
    slots = np.searchsorted(edges, numbers, "left")
    return [names[slot] if value else "" for slot, value in zip(slots, values, strict=True)]


def _reading_order(name: str) -> tuple[bool, bool, float, bool, str]:
    """Sort key: `unknown` last; by the first number in the name, `up to` before an equal number, `over` after."""
    number = re.search(r"-?\d+(\.\d+)?(e[+-]?\d+)?", name)
    value = float(number[0]) if number else 0.0
    return name == UNKNOWN, name.startswith("over "), value, not name.startswith("up to "), name


@dataclass(frozen=True, kw_only=True)
class Gap:
    """The widest gap of a mean over classes: `value` is that of `higher` minus that of `lower`, with its interval.

    `classes`, bool (C,), are those the mean is over in both. `pairs` is how many pairs of subgroups were compared.
    """

    higher: str
    lower: str
    value: float
    low: float
    high: float
    classes: np.ndarray
    pairs: int


def widest_gaps(
    labels: np.ndarray,
    probs: np.ndarray,
    thresholds: np.ndarray | float,
    groups: Sequence[str],
    members: Mapping[str, np.ndarray],
    how: Resampling,
) -> dict[str, Gap]:
    """Return the widest gap between two subgroups of each figure of GAPS, left out where no two can be compared.

    labels and probs (N, C), thresholds (C,) or one for all, groups N names, `members` the row numbers of each subgroup.
    Both are scored on the same resamples of all groups, over the classes with positives and negatives in FEW groups of
    each. The interval is of the difference; where the pair is the widest of several, each end takes that share of its
    tail (Bonferroni), since the widest of many gaps is wide by chance.
    """
    ids = number_groups(groups, len(labels))
    weigh = {name: weighted_figures(labels[rows], probs[rows], thresholds) for name, rows in members.items()}
    ones = np.ones((len(labels), 1), dtype=np.int32)
    blocks = [
        {name: weigh[name](weights[rows]) for name, rows in members.items()}
        for weights in (ones, *group_weights(ids, how.resamples, how.seed))
    ]
    drawn = {
        name: {key: np.concatenate([block[name][key] for block in blocks], axis=1) for key in GAPS.values()}
        for name in members
    }
    behind = {n: groups_behind(labels[r], decisions(probs[r], thresholds), ids[r]) for n, r in members.items()}
    found: dict[str, Gap] = {}
    for figure, key in GAPS.items():
        counts = {name: behind[name][key] for name in members}
        gap = _widest({name: drawn[name][key] for name in members}, counts, how.level)
        found |= {figure: gap} if gap is not None else {}
    return found


def _widest(drawn: Mapping[str, np.ndarray], counts: Mapping[str, np.ndarray], level: float) -> Gap | None:
    """Of figures (C, 1 + R) of each subgroup, the first column the value, and the groups (C,) behind them."""
    pairs = []
    for a, b in combinations(drawn, 2):
        few = np.minimum(counts[a], counts[b])
        chosen = few >= FEW
        if chosen.any():
            pairs.append((float((drawn[a] - drawn[b])[chosen, 0].mean()), a, b, few, chosen))
    if not pairs:
        return None
    value, a, b, few, chosen = max(pairs, key=lambda pair: abs(pair[0]))
    if value < 0:
        a, b, value = b, a, -value
    draws = (drawn[a] - drawn[b])[chosen, 1:]
    draws = draws[:, ~np.isnan(draws).any(axis=0)]
    ends = mean_ends(value, draws, few[chosen], 1 - (1 - level) / len(pairs)) if draws.size else (np.nan,) * 2
    return Gap(higher=a, lower=b, value=value, low=ends[0], high=ends[1], classes=chosen, pairs=len(pairs))
