"""The epoch search: every configuration over every fold, snapshots at each budget, resumable after any epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..activations.loader import Activations
from ..config import SweepSpec, TrainSpec
from ..metrics import figures
from ..models.backbone import Backbone
from .checkpoints import Journal
from .dataset import Data
from .fold import Epoch, Fold, Snapshot, fit, precision
from .head_fold import HeadFold, fit_side_by_side
from .stacked_folds import fit_together

# Configuration, fold (the number of folds: the refit), and the epoch just trained.
OnEpoch = Callable[[int, int, Epoch], None]


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
        self, number: int, train: TrainSpec, journal: Journal, on_epoch: OnEpoch | None, stop: Callable[[], bool]
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
        self, search: Search, trains: Sequence[TrainSpec], out: Path, *, device: str, residency: str
    ) -> FoldTrainer:
        """Make the search's folds ready to be trained; `trains` are its configurations, precision resolved."""
        ...


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One configuration after all folds.

    `changes` is what differs from the spec's own training fields. probabilities (budgets, N, C) float32, NaN outside
    validation; scores and defined (budgets, folds): macro AUC and the classes it is a mean of; stopped_at
    (folds, budgets): the epoch a snapshot is of; histories: a list of lines a fold; seconds: of the call that
    finished it.
    """

    number: int
    changes: dict[str, Any]
    train: TrainSpec
    probabilities: np.ndarray
    scores: np.ndarray
    defined: np.ndarray
    stopped_at: np.ndarray
    histories: list[list[Epoch]]
    seconds: float

    @property
    def best_mean(self) -> float:
        """Its highest mean over folds."""
        return float(np.nanmax(np.nanmean(self.scores, axis=1)))

    def rates(self, epochs: int) -> list[float]:
        """The learning rate of each of `epochs` epochs: the median over the folds that trained it."""
        return [float(np.median([h[e].lr for h in self.histories if e < len(h)])) for e in range(epochs)]


class Search:
    """Trains configurations over folds with whichever trainer suits the device, and leaves snapshots in the journal.

    A head alone on a CPU: folds side by side, one core each. A GPU: all folds in one step. Else: one after another.
    `train_folds` may be set to who trains them elsewhere.
    """

    def __init__(
        self,
        backbone: Backbone,
        activations: Activations,
        data: Data,
        spec: SweepSpec,
        *,
        unfreeze_blocks: int,
    ) -> None:
        self.backbone, self.activations, self.data, self.spec = backbone, activations, data, spec
        self.unfreeze_blocks = unfreeze_blocks
        # (number, train, journal, on_epoch, stop) to what `configN.json` holds: here, or on a cluster.
        self.train_folds: Callable[..., dict[str, Any]] = self._train

    def fold(self, train: TrainSpec, number: int) -> Fold:
        """Fold `number` of one configuration, ready to train."""
        return self._fold(train, self.data.train(number), self.data.valid(number), number)

    def refit(self, train: TrainSpec, rates: Sequence[float]) -> Fold:
        """A model of all folds' data, at the given learning rates."""
        rows = self.data.rows[self.data.assignment >= 0]
        return self._fold(train, rows, rows[:0], self.spec.folds, rates=rates)

    def _fold(self, train: TrainSpec, rows: np.ndarray, valid: np.ndarray, number: int, **named: Any) -> Fold:
        return self.kind(train)(
            self.backbone.visual,
            self.activations,
            self.data.header.labels,
            rows,
            valid,
            train,
            unfreeze_blocks=self.unfreeze_blocks,
            seed=self.spec.seed,
            fold=number,
            **named,
        )

    def kind(self, train: TrainSpec) -> type[Fold]:
        """The trainer of its folds."""
        device = self.activations.device
        head_alone = self.unfreeze_blocks == 0 and device.type == "cpu"
        return HeadFold if head_alone and precision(train, device, 0) == "float32" else Fold

    def side_by_side(self, train: TrainSpec) -> int:
        """How many folds share the time of one: heads alone on a CPU, a core each."""
        return min(torch.get_num_threads(), self.spec.folds) if self.kind(train) is HeadFold else 1

    def run(
        self,
        number: int,
        changes: dict[str, Any],
        train: TrainSpec,
        journal: Journal,
        *,
        on_epoch: OnEpoch | None = None,
        stop: Callable[[], bool] = bool,
    ) -> Trained:
        """Train configuration `number` over all folds, going on where the journal is; a finished one is only read."""
        saved = journal.read(f"config{number}.json")
        if saved is None:
            saved = self.train_folds(number, train, journal, on_epoch, stop)
            journal.write(f"config{number}.json", saved)
            journal.forget(f"config{number}", states_only=True)
        return self._collect(number, changes, train, journal, saved)

    def _train(
        self, number: int, train: TrainSpec, journal: Journal, on_epoch: OnEpoch | None, stop: Callable[[], bool]
    ) -> dict[str, Any]:
        def key(fold: Fold) -> str:
            return f"config{number}.fold{fold.fold}"

        def keep(fold: Fold, snapshot: Snapshot) -> None:
            journal.save_snapshot(key(fold), snapshot)

        def tell(fold: Fold, epoch: Epoch) -> None:
            journal.save(key(fold), fold)
            if on_epoch is not None:
                on_epoch(number, fold.fold, epoch)

        def ready(k: int) -> tuple[Fold, set[int]]:
            fold = self.fold(train, k)
            return fold, journal.restore(key(fold), fold)

        began = time.perf_counter()
        try:
            histories = self._fit(train, ready, keep, tell, stop)
        finally:
            journal.flush()
        lines = [[asdict(epoch) for epoch in history] for history in histories]
        return {"histories": lines, "seconds": time.perf_counter() - began}

    def _fit(
        self,
        train: TrainSpec,
        ready: Callable[[int], tuple[Fold, set[int]]],
        keep: Callable[[Fold, Snapshot], None],
        tell: Callable[[Fold, Epoch], None],
        stop: Callable[[], bool],
    ) -> list[list[Epoch]]:
        """The histories of all folds, trained by whichever trainer suits."""
        epochs, numbers = self.spec.epochs, range(self.spec.folds)
        if self.kind(train) is Fold and self.activations.device.type == "cpu":
            histories = []
            for k in numbers:
                fold, taken = ready(k)
                fit(
                    fold,
                    epochs,
                    taken=taken,
                    on_epoch=lambda epoch, fold=fold: tell(fold, epoch),  # type: ignore[misc]
                    on_snapshot=lambda snapshot, fold=fold: keep(fold, snapshot),  # type: ignore[misc]
                    stop=stop,
                )
                histories.append(fold.history)
            return histories
        folds, taken_by = zip(*(ready(k) for k in numbers), strict=True)
        named: dict[str, Any] = {"taken": taken_by, "on_epoch": tell, "on_snapshot": keep, "stop": stop}
        if self.kind(train) is HeadFold:
            fit_side_by_side(folds, epochs, threads=torch.get_num_threads(), **named)
        else:
            fit_together(folds, epochs, **named)
        return [fold.history for fold in folds]

    def _collect(
        self, number: int, changes: dict[str, Any], train: TrainSpec, journal: Journal, saved: Mapping[str, Any]
    ) -> Trained:
        """Scores and probabilities of a trained configuration, from its snapshots or from what was kept of them."""
        data, budgets, folds = self.data, self.spec.epochs, self.spec.folds
        kept = journal.folder / f"config{number}.npz"
        if not kept.is_file():
            probabilities = np.full((len(budgets), *data.labels.shape), np.nan, np.float32)
            stopped_at = np.zeros((folds, len(budgets)), int)
            for k, i in np.ndindex(folds, len(budgets)):
                _, found, epoch = journal.load_snapshot(f"config{number}.fold{k}", budgets[i])
                probabilities[i, data.assignment == k], stopped_at[k, i] = found, epoch
            np.savez(kept.with_name("new.npz"), probabilities=probabilities, stopped_at=stopped_at)
            kept.with_name("new.npz").replace(kept)
        with np.load(kept) as arrays:
            probabilities, stopped_at = arrays["probabilities"], arrays["stopped_at"]
        scores, defined = self._scores(probabilities)
        return Trained(
            number=number,
            changes=changes,
            train=train,
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


def fit_one(
    fold: Fold,
    budgets: Sequence[int],
    *,
    taken: set[int],
    on_epoch: Callable[[Epoch], None],
    on_snapshot: Callable[[Snapshot], None],
    stop: Callable[[], bool] = bool,
) -> None:
    """`train.fit`; on a GPU as a stack of one, for the graph: the launches of a step take longer than its work."""
    if fold.device.type == "cpu":
        fit(fold, budgets, taken=taken, on_epoch=on_epoch, on_snapshot=on_snapshot, stop=stop)
        return
    fit_together(
        [fold],
        budgets,
        taken=[taken],
        on_epoch=lambda _, epoch: on_epoch(epoch),
        on_snapshot=lambda _, snapshot: on_snapshot(snapshot),
        stop=stop,
    )


def choose(scores: np.ndarray) -> tuple[int, int]:
    """Budget of the highest mean validation AUC over folds, then the best fold there; (budgets, folds) -> indices.

    Ties go to the smaller budget and the lower fold.
    """
    budget = int(np.nanargmax(np.nanmean(scores, axis=1)))
    return budget, int(np.nanargmax(scores[budget]))
