"""Read one axis of a grid from its flag: a list of values, or a range."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..config import TrainSpec
from ..errors import InputError

SEED = "seed"  # the field of the sweep itself that may stand in a grid
LOG = ":log"
DIGITS = 3  # significant digits of a drawn number, so that people can read it and pass it on
MOST = 10_000  # configurations of one sweep


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One field of a grid: its `values` in order, or where these are None a range that is drawn from.

    A range has a lowest and a highest number, both included. `log` draws evenly over the logarithm, `whole` draws whole
    numbers.
    """

    name: str
    values: tuple[Any, ...] | None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def draw(self, rng: np.random.Generator) -> Any:
        """One value, each value of a list as likely as another; a drawn number has three significant digits."""
        share = float(rng.random())
        if self.values is not None:
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        if self.log:
            found = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        elif self.whole:
            return min(int(self.low + share * (self.high - self.low + 1)), int(self.high))
        else:
            found = self.low + share * (self.high - self.low)
        rounded = round(found) if self.whole else float(f"{found:.{DIGITS}g}")
        return type(rounded)(min(max(rounded, self.low), self.high))


def read_axis(name: str, text: str, *, drawn: bool = False) -> Axis:
    """Read `--grid NAME=TEXT`: `A,B,...` are values, `A..B` is a range, `A..B:log` one that is drawn by its logarithm.

    A range of whole numbers is the list of all of them, unless `drawn` (with --trials) or it ends with `:log`. Raises
    InputError on an unknown field, an empty list, a value of the wrong type or named twice, a range that is none.

    >>> read_axis("batch_size", "8..10").values
    (8, 9, 10)
    """
    hint = _field_type(name)
    if ".." in text:
        return _read_range(name, text, hint, drawn=drawn and name != SEED)
    values = [_parse(name, hint, part.strip()) for part in text.split(",")]
    if len(set(map(repr, values))) < len(values):
        raise InputError(f"--grid: {name}={text} names a value twice.")
    return Axis(name=name, values=tuple(values))


def _read_range(name: str, text: str, hint: Any, *, drawn: bool) -> Axis:
    log = text.endswith(LOG)
    ends = [part.strip() for part in text.removesuffix(LOG).split("..")]
    kinds = set(typing.get_args(hint) or (hint,))
    if len(ends) != 2 or "," in text or hint is bool or not kinds & {int, float}:
        raise InputError(
            f"--grid: {name}={text!r} is no range; a range is A..B or A..B{LOG} of a field that is a number."
        )
    if name == SEED and log:
        raise InputError(f"--grid: {name}={text!r}: seeds are all trained, not drawn; leave {LOG} out.")
    low, high = (_parse(name, hint, end) for end in ends)
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"--grid: {name}={text!r} must have a number at either end.")
    if low >= high:
        raise InputError(f"--grid: {name}={text!r} must rise, from the lowest value to the highest.")
    if log and low <= 0:
        raise InputError(f"--grid: {name}={text!r} must begin above 0, for it is drawn by its logarithm.")
    whole = int in kinds
    if whole and not drawn and not log:
        if high - low >= MOST:
            raise InputError(f"--grid: {name}={text!r} is over {MOST:,} values; name fewer, or draw with --trials N.")
        return Axis(name=name, values=tuple(range(low, high + 1)))
    return Axis(name=name, values=None, low=low, high=high, log=log, whole=whole)


def _field_type(name: str) -> Any:
    if name == SEED:
        return int
    fields = {f.name for f in dataclasses.fields(TrainSpec)}
    if name not in fields:
        takes = ", ".join(sorted({*fields, SEED}))
        raise InputError(f"--grid: {name!r} is no training field; it takes {takes}.")
    return typing.get_type_hints(TrainSpec)[name]


def _parse(name: str, hint: Any, text: str) -> Any:
    if typing.get_origin(hint) is Literal:
        if text in typing.get_args(hint):
            return text
        raise InputError(f"--grid: {name}={text!r} is not one of {', '.join(map(str, typing.get_args(hint)))}.")
    if hint is bool:
        if text in ("true", "false"):
            return text == "true"
        raise InputError(f"--grid: {name}={text!r} must be true or false.")
    kinds = typing.get_args(hint) or (hint,)
    if type(None) in kinds and text == "none":
        return None
    kind = int if int in kinds else float
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"--grid: {name}={text!r} is not a number.") from None
