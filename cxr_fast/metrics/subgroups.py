"""Split images into subgroups by a column: sex, age, scanner, view."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ..data.public_tables import decade
from ..errors import InputError

UNKNOWN = "unknown"
# A column of more different values than this is grouped first: ages into decades, other numbers into quarters.
MOST = 12


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
