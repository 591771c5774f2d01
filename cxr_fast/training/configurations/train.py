"""Train the points of a search one after another, choose among them, and go on where one diverges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import DivergedError
from ...grid.points import Point
from ..checkpoints import Journal
from ..folds.fold import OnEpoch
from ..search import Search, Trained
from .choose import Chosen, choose_configuration


@dataclass(frozen=True, kw_only=True)
class TrainedPoints:
    """The configurations that can be chosen, the choice, and a row (`config`, what it changes, `reason`) for each that
    diverged. A point that diverged on one seed is left out with all its seeds."""

    configurations: list[Trained]
    chosen: Chosen
    lost: list[dict[str, Any]]


def train_points(
    search: Search,
    points: Sequence[Point],
    journal: Journal,
    on_epoch: OnEpoch | None,
    stop: Callable[[], bool],
    *,
    go_on: bool,
) -> TrainedPoints:
    """Train every point, or go on where the journal is; of each but the best only its predictions are kept.

    Raises DivergedError where no point is left, where there is one alone, and without `go_on` for the first.
    """
    every: list[Trained] = []
    lost: list[dict[str, Any]] = []
    left: list[Trained] = []
    chosen: Chosen | None = None
    for number, point in enumerate(points):
        found = journal.read(_lost_file(number))
        if found is None:
            try:
                every.append(search.run(number, point, journal, on_epoch=on_epoch, stop=stop))
            except DivergedError as error:
                if len(points) == 1:
                    raise
                if not go_on:
                    raise DivergedError(f"configuration {number + 1} ({_name(point)}): {error}") from error
                found = {"config": number, **point.changes, "reason": str(error)}
                journal.forget(f"config{number}")
                journal.write(_lost_file(number), found)
        if found is not None:
            lost.append(found)
        if number + 1 < len(points) and points[number + 1].group == point.group:
            continue  # a point is judged when all its seeds are trained
        gone = {points[row["config"]].group for row in lost}
        left = [trained for trained in every if trained.point.group not in gone]
        chosen = choose_configuration(left) if left else None
        for other in every:
            if chosen is None or other is not chosen.trained:
                journal.forget(f"config{other.number}")
    if chosen is None:
        raise DivergedError(f"every configuration diverged; configuration 1: {lost[0]['reason']}")
    return TrainedPoints(configurations=left, chosen=chosen, lost=lost)


def _lost_file(number: int) -> str:
    return f"config{number}.lost.json"


def _name(point: Point) -> str:
    return ", ".join(f"{name} {value}" for name, value in point.changes.items())
