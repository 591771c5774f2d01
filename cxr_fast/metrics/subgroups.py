"""Split images into the subgroups of a column that may be shown: sex, age, scanner, view."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..data.disclosure import GROUPS, META, PROJECTIONS, VALUES, is_date, is_identifier, why_hidden
from ..data.public_tables import decade
from ..errors import InputError

UNKNOWN, OTHER = "unknown", "other values"
VIEW = "view"


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
