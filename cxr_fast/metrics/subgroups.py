"""Subgroups of images by a column that may be shown (sex, age, scanner, view), and the widest gap between two."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from ..data.disclosure import GROUPS, META, PROJECTIONS, VALUES, is_date, is_identifier, why_hidden
from ..data.public_tables import decade
from ..errors import InputError
from .arrays import number_groups
from .figures import decisions
from .intervals import FEW, Resampling, group_weights, groups_behind, mean_ends, weighted_figures

UNKNOWN, OTHER = "unknown", "other values"
VIEW = "view"
# The means over classes that gaps are given of, and the figure of each class behind each. None hangs on prevalence.
GAPS = {"macro_auc": "auc", "macro_sensitivity": "sensitivity", "macro_specificity": "specificity"}


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Columns that may be shown, by title: the subgroup of each of N images. `hidden` says of every other column, by
    its title, why not; `empty` are the titles of those without a value."""

    columns: dict[str, np.ndarray]
    hidden: dict[str, str]
    empty: tuple[str, ...] = ()

    def __str__(self) -> str:
        """`12 columns not shown: ...`, without a name; empty where all are shown."""
        count = len(self.hidden)
        what = f"values that could identify a person, or more than {VALUES} of them"
        return f"{count} column{'s' if count > 1 else ''} not shown: {what}" if count else ""

    def warning(self) -> str:
        """Name the columns that no report shows, and why, for whoever holds the table; empty where all are shown."""
        named = [f"{_name_safely(title)} ({why})" for title, why in self.hidden.items()]
        return (
            f"{len(named)} of {len(named) + len(self.columns)} columns of the table will not be shown in any report: "
            f"{'; '.join(named)}. The cache and the run keep their values; leave out what no report needs."
            if named
            else ""
        )


def _name_safely(title: str) -> str:
    return "a column" if is_date(title) or is_identifier(title) else title


def choose(columns: Mapping[str, Sequence[str]], groups: Sequence[str]) -> Shown:
    """Apply the rule of `data.disclosure` to the columns `view` and `meta:...`, N texts each, of N images.

    A title is the name without `meta:`, but `meta:view` beside the column `view`.
    """
    found, hidden, empty = {}, {}, []
    for name, values in columns.items():
        plain = name.removeprefix(META)
        title = name if plain == VIEW else plain
        if not any(values):
            empty.append(title)
            continue
        try:
            found[title] = name_subgroups(plain, values, groups)
        except InputError as error:
            hidden[title] = str(error)
    return Shown(columns=found, hidden=hidden, empty=tuple(empty))


def name_subgroups(name: str, values: Sequence[str], groups: Sequence[str]) -> np.ndarray:
    """Name the subgroup of each of N images by one column of N texts: ages in decades, more than VALUES other numbers
    in quarters, an empty text `unknown`.

    Raises InputError, without a value of the column, where it must not be shown.
    """
    values = [value.strip() for value in values]
    if "age" in re.split(r"[^a-z]+", name.lower()) and all(map(decade, {*values} - {""})):
        values = [decade(value) for value in values]
    elif reason := why_hidden(name, values, groups):
        raise InputError(reason)
    elif len({*values} - {""}) > VALUES:
        values = _quarters(values)
    return np.array([value or UNKNOWN for value in values])


def split(named: np.ndarray, groups: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
    """Return the row numbers of each subgroup that at least GROUPS groups are in, in reading order, and how many other
    subgroups there are: these together are `other values` where as many groups are in them, else left out.

    named (N,) from `name_subgroups`, groups (N,) names.
    """
    rows = {value: np.flatnonzero(named == value) for value in in_order(named)}
    out = {value: members for value, members in rows.items() if _enough(groups[members])}
    rest = [members for value, members in rows.items() if value not in out]
    if len(rest) > 1 and _enough(groups[together := np.sort(np.concatenate(rest))]):
        out[OTHER] = together
    return out, len(rest)


def in_order(named: np.ndarray) -> list[str]:
    """List the subgroups of (N,) in reading order."""
    return sorted(map(str, set(named.tolist())), key=_reading_order)


def is_ordered(values: Sequence[str]) -> bool:
    """Whether subgroups are ages or quarters, which are in order."""
    return all(re.fullmatch(r"\d+-\d+|(up to|over) \S+|\S+ to \S+", value) for value in values)


def count_views(views: Sequence[str], groups: Sequence[str]) -> dict[str, int]:
    """Count N images by view, most first: views that enough groups have, and words of PROJECTIONS; the rest together.

    A column that must not be shown is counted as `not shown`.
    """
    try:
        named = name_subgroups(VIEW, views, groups) if any(views) else np.full(len(views), UNKNOWN)
    except InputError:
        return {"not shown": len(views)}
    many = split(named, np.array(groups, dtype=str))[0] if len(views) else {}
    texts = (text if text in many or PROJECTIONS.issuperset(text.casefold().split()) else OTHER for text in named)
    return dict(Counter(map(str, texts)).most_common())


def _enough(groups: np.ndarray) -> bool:
    return len(set(groups.tolist())) >= GROUPS


def _quarters(values: Sequence[str]) -> list[str]:
    """Group numbers between their quartiles, `up to 10`, `10 to 30`, ...; equal values stay in one quarter.

    Quartiles are rounded to an eighth of their distance or less, so that no patient's own number is read from them.
    """
    try:
        numbers = np.array([float(value) if value else np.nan for value in values])
    except ValueError as error:
        raise InputError(f"it has more than {VALUES} different values that are no numbers") from error
    if np.isinf(numbers).any() or np.isnan(numbers).all():
        raise InputError(f"it has more than {VALUES} different values that are no numbers")
    quartiles = np.nanquantile(numbers, [0.25, 0.5, 0.75])
    step = _step((quartiles[2] - quartiles[0]) or (np.nanmax(numbers) - np.nanmin(numbers)))
    edges = np.unique(np.round(quartiles / step) * step) + 0.0
    texts = [f"{edge:.10g}" for edge in edges]
    names = [f"up to {texts[0]}", *(f"{a} to {b}" for a, b in pairwise(texts)), f"over {texts[-1]}"]
    slots = np.searchsorted(edges, numbers, "left")
    return ["" if math.isnan(number) else names[slot] for slot, number in zip(slots, numbers, strict=True)]


def _step(spread: float) -> float:
    """Return the largest of 1, 2, 5, 10, ... (and of 0.5, 0.2, ...) that is no more than an eighth of the spread."""
    if not spread:  # the same number in several spellings
        return 1.0
    power = 10.0 ** math.floor(math.log10(spread / 8))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= spread / 8 or factor == 1)


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
