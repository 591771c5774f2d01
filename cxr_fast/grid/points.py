"""The configurations of a sweep: every combination of a grid's axes, or random draws from them, on each seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..config import TrainSpec
from ..errors import InputError
from .axes import MOST, SEED, Axis, read_axis

AGAIN = 1000  # draws of one trial before all that can be drawn counts as drawn


@dataclass(frozen=True, kw_only=True)
class Point:
    """One configuration: what it changes (by the grid's fields, `seed` among them), its training spec and its seed.

    `group` numbers the points that differ in more than the seed; those of a group stand side by side.
    """

    changes: dict[str, Any]
    train: TrainSpec
    seed: int
    group: int


def make_points(train: TrainSpec, flags: Sequence[str], *, seed: int = 0, trials: int | None = None) -> list[Point]:
    """The points of `--grid NAME=...` flags on top of a spec; without flags the spec alone, with nothing that differs.

    Every combination, the last flag fastest; or with `trials` so many random draws, each value of a list as likely as
    another, none drawn twice. The draws follow from `seed` and from the flags in their order, and those of fewer trials
    are the first of more. An axis `seed` is never drawn: each point is trained on every seed, one after the other.
    Raises InputError on a bad flag or combination, and where there are fewer combinations than trials.

    >>> [point.changes for point in make_points(TrainSpec(), ["lr=1e-5,2e-5"])]
    [{'lr': 1e-05}, {'lr': 2e-05}]
    """
    axes = read_axes(flags, drawn=trials is not None)
    seeds = next((axis.values for axis in axes if axis.name == SEED), None)
    others = [axis for axis in axes if axis.name != SEED]
    for value in seeds or ():
        if not 0 <= value < 2**32:
            raise InputError(f"--grid: seed={value} must be between 0 and 4294967295.")
    found = list(_draw(others, trials, seed) if trials is not None else _combine(others, len(seeds or (0,))))
    names = [axis.name for axis in axes]
    points = []
    for group, changes in enumerate(found):
        try:
            spec = replace(train, **changes)
        except InputError as error:
            raise InputError(f"--grid: {error}") from error
        for value in (seed,) if seeds is None else seeds:
            every = changes | ({} if seeds is None else {SEED: value})
            ordered = {name: every[name] for name in names}
            points.append(Point(changes=ordered, train=spec, seed=value, group=group))
    return points


def read_axes(flags: Sequence[str], *, drawn: bool = False) -> list[Axis]:
    """The axes of `--grid` flags, in their order. Raises InputError on a flag without `=` and on a name given twice."""
    axes: dict[str, Axis] = {}
    for flag in flags:
        name, equals, text = flag.partition("=")
        if not equals or name in axes:
            raise InputError(f"--grid: {flag!r} must be NAME=A,B,..., each NAME once.")
        axes[name] = read_axis(name, text, drawn=drawn)
    return list(axes.values())


def _combine(axes: Sequence[Axis], seeds: int) -> Iterator[dict[str, Any]]:
    for axis in axes:
        if axis.values is None:
            raise InputError(f"--grid: {axis.name} is a range; say how many draws from it with --trials N.")
    each = [axis.values or () for axis in axes]
    if (count := math.prod(map(len, each)) * seeds) > MOST:
        raise InputError(f"--grid: {count:,} configurations; at most {MOST:,}. Name fewer, or draw with --trials N.")
    names = [axis.name for axis in axes]
    return (dict(zip(names, values, strict=True)) for values in itertools.product(*each))


def _draw(axes: Sequence[Axis], trials: int, seed: int) -> Iterator[dict[str, Any]]:
    if not axes:
        raise InputError("--trials: there is nothing to draw from; add --grid NAME=A..B or NAME=A,B.")
    if not 1 <= trials <= MOST:
        raise InputError(f"--trials: {trials} must be between 1 and {MOST:,}.")
    few = math.prod(len(axis.values) for axis in axes if axis.values) if all(axis.values for axis in axes) else None
    if few is not None and few <= trials:
        raise InputError(f"--trials: the grid has {few:,} combinations; leave --trials out to train each of them.")
    rng = np.random.default_rng(seed)
    seen: set[str] = set()
    for _ in range(trials):
        for _ in range(AGAIN):
            changes = {axis.name: axis.draw(rng) for axis in axes}
            if (key := repr(changes)) not in seen:
                break
        else:
            raise InputError(
                f"--trials: {len(seen):,} different draws were found and no more; ask for fewer or widen the grid."
            )
        seen.add(key)
        yield changes
