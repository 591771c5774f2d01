"""The epoch search: each configuration over all folds, a snapshot at each budget.

A search can be resumed after any epoch.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..activations.forward import precision, run_blocks
from ..activations.loader import Activations
from ..config import SweepSpec, TrainSpec
from ..errors import InputError
from ..grid.points import Point
from ..metrics import figures
from ..models.backbone import Backbone
from ..models.heads import NOTHING_OWN, Custom
from ..models.tail import Tail, embedding_width
from .checkpoints import REFIT, Journal, fold_key
from .dataset import Data, redraw_folds
from .folds.fold import Epoch, Fold, FoldData, OnEpoch
from .folds.head_fold import HeadFold, fit_side_by_side
from .folds.loop import Recorder, fit
from .folds.stacked_folds import fit_together


class FoldTrainer(Protocol):
    """Trains the folds of one search, and its refit, elsewhere than in this process.

    `str()` is its line in a plan. Close it when the search is done.
    """

    @property
    def at_once(self) -> int:
        """How many folds train at the same time."""
        ...

    @property
    def notes(self) -> list[str]:
        """Lines that a user must see before it starts."""
        ...

    def train_folds(
        self, number: int, point: Point, journal: Journal, on_epoch: OnEpoch | None, stop: Callable[[], bool]
    ) -> dict[str, Any]:
        """Train the folds of configuration `number` into the journal: their histories and seconds."""
        ...

    def refit(
        self,
        number: int,
        epochs: int,
        rates: Sequence[float],
        journal: Journal,
        on_epoch: OnEpoch | None,
        stop: Callable[[], bool],
    ) -> None:
        """Train the refit of configuration `number` into the journal."""
        ...

    def describe(self) -> dict[str, Any]:
        """What `run.json` records of where the folds were trained."""
        ...

    def close(self) -> None:
        """Stop what still runs."""
        ...


class Trainers(Protocol):
    """A place where folds can be trained: it lends a device, and starts a `FoldTrainer` for a search."""

    def target(self, device: str) -> str:
        """`cpu` or `cuda`, by `--device`. Raises DeviceError where it cannot be had."""
        ...

    def gpu(self) -> tuple[str, bool]:
        """The name of its GPU, and whether that computes in bfloat16."""
        ...

    def start(
        self, search: Search, points: Sequence[tuple[Point, str]], out: Path, *, device: str, residency: str
    ) -> FoldTrainer:
        """Make the search's folds ready to be trained; `points` are its configurations, each with the precision of its
        blocks."""
        ...


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One configuration after all folds.

    probabilities (budgets, N, C) float32, NaN outside
    validation; scores and defined (budgets, folds): macro AUC and the classes it is a mean of; stopped_at
    (folds, budgets): the epoch a snapshot is of; histories: a list of lines a fold; seconds: of the call that
    finished it.
    """

    number: int
    point: Point
    probabilities: np.ndarray
    scores: np.ndarray
    defined: np.ndarray
    stopped_at: np.ndarray
    histories: list[list[Epoch]]
    seconds: float

    @property
    def changes(self) -> dict[str, Any]:
        """What differs from the spec of the sweep."""
        return self.point.changes

    @property
    def train(self) -> TrainSpec:
        """Its training fields."""
        return self.point.train

    @property
    def best_budget(self) -> int:
        """The place of the budget with the highest mean over folds."""
        return int(np.nanargmax(np.nanmean(self.scores, axis=1)))

    def rates(self, epochs: int) -> list[float]:
        """The learning rate of each of `epochs` epochs: the median over the folds that trained it."""
        return [float(np.median([h[e].lr for h in self.histories if e < len(h)])) for e in range(epochs)]


class Search:
    """Trains configurations over folds with whichever trainer suits the device, and leaves snapshots in the journal.

    `seed` decides initialisation and every draw; `data` has the folds of that seed (`with_seed`).
    A head alone on a CPU: folds side by side, one core each. A GPU: all folds in one step. Else: one after another.
    `train_folds` may be replaced by that of a `FoldTrainer`, which trains them elsewhere.
    """

    def __init__(
        self,
        backbone: Backbone,
        activations: Activations,
        data: Data,
        spec: SweepSpec,
        *,
        unfreeze_blocks: int,
        custom: Custom = NOTHING_OWN,
    ) -> None:
        self.custom = custom
        self.backbone, self.activations, self.data, self.spec = backbone, activations, data, spec
        self.unfreeze_blocks, self.seed = unfreeze_blocks, spec.seed
        self.assignments = {spec.seed: data.assignment}  # by seed
        self.scratch: Path | None = None  # the folder for tokens that do not fit into memory
        self._deeper: dict[tuple[int, int], Activations] = {}
        # (number, point, journal, on_epoch, stop) to what `configN.json` holds: here, or on a cluster.
        self.train_folds: Callable[..., dict[str, Any]] = self._train

    def with_seed(self, seed: int) -> Search:
        """The same search with folds and draws of another seed; the hold-out stays, cached activations are shared."""
        if seed == self.seed:
            return self
        if seed not in self.assignments:
            self.assignments[seed] = redraw_folds(self.data, self.spec, seed)
        other = copy.copy(self)
        other.seed, other.data = seed, replace(self.data, assignment=self.assignments[seed])
        return other

    def depth(self, train: TrainSpec) -> int:
        """How many blocks a configuration trains."""
        return trained_blocks(train, self.unfreeze_blocks)

    def inputs(self, train: TrainSpec) -> Activations:
        """What a configuration's tail takes: the cache's activations, or those behind its frozen blocks."""
        return self.behind(self.depth(train), self.activations.views)

    def behind(self, blocks: int, views: int) -> Activations:
        """Activations before the last `blocks` blocks, of the first `views` views; made once and kept."""
        if blocks == self.unfreeze_blocks:
            return self.activations
        kept = self._deeper.get((blocks, views))
        if kept is None:
            tail = Tail(self.backbone.visual, unfreeze_blocks=self.unfreeze_blocks, classes=1)
            tail.to(self.activations.device)
            kept = run_blocks(tail, self.activations, blocks, self.data.rows, views=views, folder=self.scratch)
            self._deeper[blocks, views] = kept
        return kept

    def fold(self, train: TrainSpec, number: int) -> Fold:
        """Fold `number` of one configuration, ready to train."""
        return self._fold(train, self.data.train(number), self.data.valid(number), number)

    def refit(self, train: TrainSpec, rates: Sequence[float]) -> Fold:
        """A model of all folds' data, at the given learning rates."""
        rows = self.data.rows[self.data.assignment >= 0]
        return self._fold(train, rows, rows[:0], self.spec.folds, rates)

    def _fold(
        self, train: TrainSpec, rows: np.ndarray, valid: np.ndarray, number: int, rates: Sequence[float] | None = None
    ) -> Fold:
        return self.kind(train)(
            self.backbone.visual,
            FoldData(
                activations=self.inputs(train),
                labels=self.data.header.labels,
                train_rows=rows,
                valid_rows=valid,
                number=number,
                name="" if rates is None else REFIT,
                embeddings=self.behind(0, self.activations.views) if train.head_first else None,
                custom=self.custom,
            ),
            train,
            unfreeze_blocks=self.depth(train),
            seed=self.seed,
            rates=rates,
        )

    def tail(self, train: TrainSpec) -> Tail:
        """Build a tail of the shape that this configuration trains; its head is not initialised."""
        visual, classes = self.backbone.visual, self.data.labels.shape[1]
        own = None if self.custom.head is None else self.custom.make_head(embedding_width(visual), classes, 0)
        return Tail(
            visual,
            unfreeze_blocks=self.depth(train),
            classes=classes,
            head=own,
            dropout=train.dropout,
            train_norm=train.train_norm,
        )

    def kind(self, train: TrainSpec) -> type[Fold]:
        """The kind of fold that this configuration trains."""
        device = self.activations.device
        head_alone = self.depth(train) == 0 and device.type == "cpu" and not self.custom
        return HeadFold if head_alone and precision(train, device, 0) == "float32" else Fold

    def side_by_side(self, train: TrainSpec) -> int:
        """How many folds train in the time of one: heads alone on a CPU, a core each."""
        return min(torch.get_num_threads(), self.spec.folds) if self.kind(train) is HeadFold else 1

    def in_turn(self, train: TrainSpec) -> bool:
        """Whether the folds of a configuration train one after another here."""
        return self.kind(train) is Fold and (self.activations.device.type == "cpu" or bool(self.custom))

    def run(
        self,
        number: int,
        point: Point,
        journal: Journal,
        *,
        on_epoch: OnEpoch | None = None,
        stop: Callable[[], bool] = bool,
    ) -> Trained:
        """Train configuration `number` over all folds, going on where the journal is; a finished one is only read."""
        saved = journal.read(f"config{number}.json")
        if saved is None:
            saved = self.train_folds(number, point, journal, on_epoch, stop)
            journal.write(f"config{number}.json", saved)
            journal.forget(f"config{number}", states_only=True)
        return self.with_seed(point.seed)._collect(number, point, journal, saved)

    def _train(
        self, number: int, point: Point, journal: Journal, on_epoch: OnEpoch | None, stop: Callable[[], bool]
    ) -> dict[str, Any]:
        began, search = time.perf_counter(), self.with_seed(point.seed)
        try:
            histories = search._fit(number, point.train, journal, journal.recorder(number, on_epoch, stop))
        finally:
            journal.flush()
        lines = [[asdict(epoch) for epoch in history] for history in histories]
        return {"histories": lines, "seconds": time.perf_counter() - began}

    def _fit(self, number: int, train: TrainSpec, journal: Journal, recorder: Recorder) -> list[list[Epoch]]:
        """Train all folds with whichever trainer suits; their histories."""
        epochs, numbers = self.spec.epochs, range(self.spec.folds)

        def ready(k: int) -> Fold:
            fold = self.fold(train, k)
            journal.restore(fold_key(number, fold), fold)
            return fold

        if self.in_turn(train):
            return [fit(ready(k), epochs, recorder) for k in numbers]  # one at a time in memory
        folds = [ready(k) for k in numbers]
        if self.kind(train) is HeadFold:
            fit_side_by_side(folds, epochs, recorder, threads=torch.get_num_threads())
        else:
            fit_together(folds, epochs, recorder)
        return [fold.history for fold in folds]

    def _collect(self, number: int, point: Point, journal: Journal, saved: Mapping[str, Any]) -> Trained:
        """Scores and probabilities of a trained configuration, from its snapshots or from what was kept of them."""
        data, budgets, folds = self.data, self.spec.epochs, self.spec.folds
        kept = journal.folder / f"config{number}.npz"
        if not kept.is_file():
            probabilities = np.full((len(budgets), *data.labels.shape), np.nan, np.float32)
            stopped_at = np.zeros((folds, len(budgets)), int)
            for k, i in np.ndindex(folds, len(budgets)):
                _, found, epoch = journal.load_snapshot(f"config{number}.fold{k}", budgets[i])
                probabilities[i, data.assignment == k], stopped_at[k, i] = found, epoch
            with journal.replace(kept.name) as file:
                np.savez(file, probabilities=probabilities, stopped_at=stopped_at)
        with np.load(kept) as arrays:
            probabilities, stopped_at = arrays["probabilities"], arrays["stopped_at"]
        scores, defined = self._scores(probabilities)
        return Trained(
            number=number,
            point=point,
            probabilities=probabilities,
            scores=scores,
            defined=defined,
            stopped_at=stopped_at,
            histories=[[Epoch(**line) for line in history] for history in saved["histories"]],
            seconds=saved["seconds"],
        )

    def _scores(self, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Validation macro AUC (budgets, folds) of the float32 snapshots, and how many classes each is a mean of."""
        shape = (len(self.spec.epochs), self.spec.folds)
        scores, defined = np.zeros(shape), np.zeros(shape, int)
        for b, k in np.ndindex(shape):
            place = self.data.assignment == k
            scores[b, k], defined[b, k] = figures.macro(figures.auc(self.data.labels[place], probabilities[b, place]))
        return scores, defined


def fit_one(fold: Fold, budgets: Sequence[int], recorder: Recorder) -> None:
    """`fold.fit`; on a GPU as a stack of one, for the graph: the launches of a step take longer than its work."""
    if fold.device.type == "cpu" or fold.custom:
        fit(fold, budgets, recorder)
    else:
        fit_together([fold], budgets, recorder)


def trained_blocks(train: TrainSpec, cut: int) -> int:
    """How many blocks a configuration trains from a cache that leaves `cut`."""
    return cut if train.train_blocks is None else train.train_blocks


def require_cached(train: TrainSpec, cut: int, views: Sequence[str]) -> None:
    """InputError where a training field asks for what the cache does not hold."""
    if train.train_blocks is not None and train.train_blocks > cut:
        raise InputError(
            f"--train-blocks: {train.train_blocks} is more than the {cut} block(s) this cache leaves to train; "
            f"`cxrfast cache SOURCE --unfreeze-blocks {train.train_blocks}` makes one that leaves more."
        )
    alone = [
        f"--{name}" for name, on in (("head-first", train.head_first), ("layer-decay", train.layer_decay < 1)) if on
    ]
    if alone and cut == 0:
        raise InputError(f"{alone[0]}: this cache leaves no block to train, so it changes nothing; leave it out.")
    if train.tta == "flip" and "flip" not in views:
        raise InputError(
            "--tta flip: this cache has no flipped view; make one with `cxrfast cache --views plain,flip`, or pass "
            "--tta none."
        )
