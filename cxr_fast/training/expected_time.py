"""The plan of a search: counts, memory, and the time of each epoch, expected from a few timed training steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..activations.forward import predict
from ..config import TrainSpec
from .final_models import retrained_spec
from .search import Search

SCORED = 64  # images of the timed validation
CHUNKS, STEPS = 3, 4  # the fastest of so many timed stretches of so many steps: the first ones also compile
SLOW = 1.0  # seconds of the first two steps from which a stretch has two steps


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds that a fold takes per trained and per scored image."""

    trained: float
    scored: float


@dataclass(frozen=True, kw_only=True)
class EpochTimes:
    """Expected seconds by epoch: of one fold of each configuration (G, E), of the refit (E,), zero where there is none,
    and of one retrained head (E,). `folds` are trained one after another where `in_turn`, else all at once.
    """

    each: np.ndarray
    refit: np.ndarray
    retrained: np.ndarray
    folds: int
    in_turn: bool

    @property
    def total(self) -> float:
        """Seconds of all epochs."""
        return float(self.folds * (self.each.sum() + self.retrained.sum()) + self.refit.sum())

    def of(self, config: int, fold: int) -> np.ndarray:
        """Seconds by epoch (E,) of a fold: the number of folds means the refit, larger ones the retrained heads."""
        return self.each[config] if fold < self.folds else self.refit if fold == self.folds else self.retrained

    def done(self, latest: Mapping[tuple[int, int], int], at: tuple[int, int], others: int = 0) -> float:
        """Add up the seconds of what is done, of `total`, when (configuration, fold) `at` has reported last.

        `latest` are the last epochs reported, from 1 on. A fold before the one that trains is done, wherever it
        stopped; folds that train at once have done `others` epochs before they report, those of an earlier run.
        """
        (config, fold), done = at, 0.0
        for c in range(config):
            done += self.folds * float(self.each[c].sum())
        if fold >= self.folds:  # the chosen configuration's number; all of the search lies behind
            done = self.folds * float(self.each.sum()) + (float(self.refit.sum()) if fold > self.folds else 0.0)
        first = 0 if fold < self.folds else self.folds + 1 if fold > self.folds else fold
        last = fold if fold == self.folds else first + self.folds - 1
        together = fold > self.folds or not self.in_turn
        for k in range(first, last + 1):
            times, stopped = self.of(config, k), not together and k < fold
            epochs = len(times) if stopped else latest.get((config, k), others if together else 0)
            done += float(times[:epochs].sum())
        return done


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What a sweep will do, known before it starts; `seconds` and `times` are estimated from a few timed steps.

    `epochs_in_all` counts an epoch of every fold of every configuration, and those of the refit; `resumed` says that
    an unfinished run will be continued.
    """

    cache: Path
    out: Path
    images: int
    failed: int
    groups: int
    classes: int
    folds: int
    configurations: int
    holdout_images: int
    epochs: tuple[int, ...]
    epochs_in_all: int
    trainable: dict[str, int]
    activation_bytes: int
    where: str
    device: str
    precision: str
    seconds: float
    times: EpochTimes
    resumed: bool
    cluster: str = ""
    notes: tuple[str, ...] = ()


def unknown_times(configurations: int, epochs: int, folds: int, *, refit: bool, retrained: bool) -> EpochTimes:
    """Take all epochs as equally long: the device that trains is not this machine's."""
    one = np.ones(epochs)
    each = np.ones((configurations, epochs))
    return EpochTimes(each=each, refit=one * refit, retrained=one * retrained, folds=folds, in_turn=False)


def expect(search: Search, trains: Sequence[TrainSpec], *, at_once: int | None, refit: bool) -> EpochTimes:
    """Time a few steps for each number of trained blocks, on throw-away folds.

    `at_once` folds train at the same time on a cluster; None here, where the search knows.
    """
    spec, data = search.spec, search.data
    paces: dict[tuple[int, bool], Pace] = {}

    def pace(train: TrainSpec, one_thread: bool = False) -> Pace:
        key = search.depth(train), one_thread
        if key not in paces:
            with _threads(1 if one_thread else torch.get_num_threads()):
                paces[key] = _measure(search, train)
        return paces[key]

    def by_epoch(train: TrainSpec, trained: float, scored: float, one_thread: bool = False) -> np.ndarray:
        numbers = np.arange(1, spec.epochs[-1] + 1)
        out = np.empty(len(numbers))
        for place, one in (
            (numbers > train.head_first, replace(train, head_first=0)),
            (numbers <= train.head_first, retrained_spec(train, train.sampling)),
        ):
            if place.any():
                found = pace(one, one_thread)
                out[place] = found.trained * trained + found.scored * scored
        return out

    def fold(train: TrainSpec) -> np.ndarray:
        own = search.side_by_side(train)
        trained = np.mean([len(data.train(k)) for k in range(spec.folds)])
        scored = np.mean([len(data.valid(k)) for k in range(spec.folds)])
        # Heads side by side have a thread each; on a busy machine their refit, which has all, took 37 times as long.
        return by_epoch(train, float(trained), float(scored), at_once is None and own > 1) / (at_once or own)

    def retrained(train: TrainSpec) -> np.ndarray:
        if search.depth(train) == 0:
            return fold(retrained_spec(train, spec.retrain_head))
        # The blocks, once over all images of each view, take longer than a head's epochs.
        blocks = pace(replace(train, head_first=0)).scored * len(data.rows) * search.activations.views
        return np.full(spec.epochs[-1], blocks / spec.epochs[-1])

    every, none = float((data.assignment >= 0).sum()), np.zeros(spec.epochs[-1])
    return EpochTimes(
        each=np.stack([fold(train) for train in trains]),
        refit=by_epoch(trains[0], every, 0.0) if refit else none,
        retrained=retrained(trains[0]) if spec.retrain_head != "none" else none,
        folds=spec.folds,
        in_turn=at_once is None and search.in_turn(trains[0]),
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(search: Search, train: TrainSpec) -> Pace:
    """Time steps and a validation on a throw-away fold."""
    fold = search.fold(train, 0)
    draws = fold.draw()

    def seconds(steps: list[tuple[int, int]]) -> float:
        began = time.perf_counter()
        fold.train_epoch(replace(draws, steps=steps))
        return time.perf_counter() - began

    warm_up = seconds(draws.steps[:2])
    size = 2 if warm_up > SLOW else STEPS
    starts = [2 + size * i for i in range(CHUNKS)]
    chunks = [draws.steps[start : start + size] for start in starts]
    chunks = [some for some in chunks if some] or [draws.steps[:2]]
    step = min(seconds(some) / sum(b - a for a, b in some) for some in chunks)
    few, inputs = fold.valid_rows[:SCORED], search.inputs(train)
    predict(fold.tail, inputs, few)  # the first call warms up
    began = time.perf_counter()
    predict(fold.tail, inputs, few)
    return Pace(trained=step, scored=(time.perf_counter() - began) / len(few))
