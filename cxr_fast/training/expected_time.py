"""The plan of a search: counts, memory, and the time of each epoch, expected from a few timed training steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ..activations.file import Header
from ..activations.forward import predict, run_blocks
from ..activations.job import CacheJob
from ..activations.loader import Activations
from ..config import SweepSpec, TrainSpec
from ..data.manifest import Manifest
from ..models.tail import Tail
from .dataset import Data
from .final_models import retrained_spec
from .search import Search, require_cached

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


@dataclass(frozen=True, kw_only=True)
class FoldSizes:
    """Images of a search: that a fold trains on and is scored on (means over folds), of all folds, and of all."""

    trained: float
    scored: float
    folds: float
    all: float


def count_images(search: Search) -> FoldSizes:
    """Count the images of a search by its data."""
    spec, data = search.spec, search.data
    trained, scored = (np.mean([len(part(k)) for k in range(spec.folds)]) for part in (data.train, data.valid))
    folds = float((data.assignment >= 0).sum())
    return FoldSizes(trained=float(trained), scored=float(scored), folds=folds, all=len(data.rows))


def expect(
    search: Search,
    trains: Sequence[TrainSpec],
    *,
    at_once: int | None,
    refit: bool,
    counts: FoldSizes | None = None,
) -> EpochTimes:
    """Time a few steps for each number of trained blocks, on throw-away folds.

    `at_once` folds train at the same time on a cluster; None here, where the search knows. `counts` are those of the
    search's own data, unless that is made up.
    """
    spec, counts = search.spec, counts or count_images(search)
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
        # Heads side by side have a thread each; on a busy machine their refit, which has all, took 37 times as long.
        return by_epoch(train, counts.trained, counts.scored, at_once is None and own > 1) / (at_once or own)

    def retrained(train: TrainSpec) -> np.ndarray:
        if search.depth(train) == 0:
            return fold(retrained_spec(train, spec.retrain_head))
        # The blocks, once over all images of each view, take longer than a head's epochs.
        blocks = pace(replace(train, head_first=0)).scored * counts.all * search.activations.views
        return np.full(spec.epochs[-1], blocks / spec.epochs[-1])

    none = np.zeros(spec.epochs[-1])
    return EpochTimes(
        each=np.stack([fold(train) for train in trains]),
        refit=by_epoch(trains[0], counts.folds, 0.0) if refit else none,
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


# ------------------------------------------------------------------ before the cache exists


class MadeUpSearch(Search):
    """A search on activations of the right shape that mean nothing, to time its steps while there is no cache.

    Blocks that stay frozen are not run: what lies behind them is made up too.
    """

    def __init__(self, job: CacheJob, spec: SweepSpec, trains: Sequence[TrainSpec], device: torch.device) -> None:
        self.job = job
        steps = (2 + CHUNKS * STEPS) * max(train.batch_size for train in trains)
        self.count = spec.folds * max(SCORED, math.ceil(steps / (spec.folds - 1)))
        super().__init__(
            job.backbone,
            Activations(self._array(job.spec.unfreeze_blocks), device),
            self._data(spec.folds),
            spec,
            unfreeze_blocks=job.spec.unfreeze_blocks,
        )

    def _array(self, blocks: int) -> np.ndarray:
        """Activations before the last `blocks` blocks, all rows alike: one row in memory."""
        tokens, width, embedding = self.job.backbone.shape
        row = (embedding,) if blocks == 0 else (tokens, width)
        values = np.random.default_rng(0).standard_normal(row).astype(self.job.spec.dtype)
        return np.broadcast_to(values, (self.count, len(self.job.spec.views), *row))

    def _data(self, folds: int) -> Data:
        """Rows in turn to each fold, and labels of which each fold has both signs."""
        rows, classes = np.arange(self.count), self.job.manifest.classes
        labels = ((rows[:, None] // folds + np.arange(len(classes))) % 2).astype(np.int8)
        names = tuple(map(str, rows))
        header = Header(
            meta={}, shape=(self.count,), dtype=self.job.spec.dtype, images=names, groups=names, studies=names,
            views=names, classes=classes, labels=labels,
        )  # fmt: skip
        return Data(file=cast(Any, None), header=header, rows=rows, labels=labels, assignment=rows % folds)

    def behind(self, blocks: int, views: int) -> Activations:
        """Made-up activations before the last `blocks` blocks, of all views."""
        if blocks == self.unfreeze_blocks:
            return self.activations
        return Activations(self._array(blocks), self.activations.device)

    def frozen_seconds(self, train: TrainSpec) -> float:
        """Time the blocks that stay frozen, per image and view: they run once over all images."""
        cuts = {self.depth(train)} | ({0} if train.head_first else set())
        tail = Tail(self.backbone.visual, unfreeze_blocks=self.unfreeze_blocks, classes=1)
        tail.to(self.activations.device)
        seconds = 0.0
        for cut in cuts - {self.unfreeze_blocks}:
            for last in (False, True):  # the first call warms up
                began = time.perf_counter()
                run_blocks(tail, self.activations, cut, np.arange(SCORED), views=1)
                seconds += (time.perf_counter() - began) / SCORED if last else 0.0
        return seconds


def expect_before_cache(job: CacheJob, spec: SweepSpec, trains: Sequence[TrainSpec], device: torch.device) -> float:
    """Expect the seconds of a sweep over a cache that is not there yet: of its epochs, and of blocks that stay frozen.

    Films that will fail are not known, and how groups will fall into parts is known by its shares alone. Raises
    InputError where a configuration asks for what the cache will not hold.
    """
    for train in trains:
        require_cached(train, job.spec.unfreeze_blocks, job.spec.views)
    search = MadeUpSearch(job, spec, trains, device)
    held = expect_holdout(job.manifest, spec)
    folds = len(job.manifest) - held
    counts = FoldSizes(
        trained=folds * (1 - 1 / spec.folds), scored=folds / spec.folds, folds=folds, all=len(job.manifest)
    )
    times = expect(search, trains, at_once=None, refit=held > 0 or spec.final == "refit", counts=counts)
    frozen = max(search.frozen_seconds(train) for train in trains)
    return times.total + frozen * len(job.manifest) * search.activations.views


def expect_holdout(manifest: Manifest, spec: SweepSpec) -> float:
    """Expect how many images are held out: those that the column says, and the share of those that it leaves open."""
    if spec.split != "drawn" and manifest.splits:
        given = sum(word == "holdout" for word in manifest.splits)
        return given + (0.0 if given else spec.holdout * sum(word == "" for word in manifest.splits))
    return spec.holdout * len(manifest)
