"""The final models of a search: best fold, refit on all folds' data, the folds' mean, that of retrained heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from ..activations.forward import probabilities, run_blocks
from ..config import TrainSpec
from ..models.tail import Tail
from .checkpoints import REFIT, Journal, fold_key
from .folds.fold import Epoch, Fold, FoldData, OnEpoch
from .folds.head_fold import HeadFold, fit_side_by_side
from .search import Search, Trained, fit_one

# The kinds of final model.
KINDS = ("best-fold", "refit", "ensemble")
RETRAINED = "retrained"


def choose(scores: np.ndarray, budget: int | None = None) -> tuple[int, int]:
    """Budget of the highest mean validation AUC over folds, then the best fold there; (budgets, folds) -> indices.

    `budget` is the place of one that was chosen already. Ties go to the smaller budget and the lower fold.
    """
    if budget is None:
        budget = int(np.nanargmax(np.nanmean(scores, axis=1)))
    return budget, int(np.nanargmax(scores[budget]))


class FinalModels:
    """The models a search can end with: the best fold, a refit on all folds' data, the mean of the folds, and where
    asked for that of folds with a retrained head.

    They are made of the tails of one configuration at its chosen budget: `fold0`, `fold1`, ..., and `refit` and
    `retrained0`, `retrained1`, ... once trained.
    """

    def __init__(self, search: Search, trained: Trained, journal: Journal, budget: int | None = None) -> None:
        self.search, self.trained, self.journal = search.with_seed(trained.point.seed), trained, journal
        self.budget, self.best = choose(trained.scores, budget)
        self.epochs = search.spec.epochs[self.budget]

    @property
    def extra(self) -> tuple[str, ...]:
        """The kind with thresholds of its own, where it was asked for."""
        return () if self.search.spec.retrain_head == "none" else (RETRAINED,)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds there are."""
        return (*KINDS, *self.extra)

    def members(self, kind: str) -> list[str]:
        """Names of the tails that a kind of final model consists of."""
        numbers = range(self.search.spec.folds)
        folds, retrained = ([f"{name}{k}" for k in numbers] for name in ("fold", RETRAINED))
        return {"best-fold": [folds[self.best]], "refit": [REFIT], "ensemble": folds, RETRAINED: retrained}[kind]

    def refit_epochs(self) -> int:
        """The chosen budget; with early stopping the median epoch at which the folds had stopped by then."""
        return int(np.median(self.trained.stopped_at[:, self.budget]))

    def refit(self, on_epoch: OnEpoch | None, stop: Callable[[], bool]) -> None:
        """Train the refit, or go on with it; its learning rates are the folds' medians, epoch by epoch."""
        epochs, number = self.refit_epochs(), self.trained.number
        fold = self.search.refit(self.trained.train, self.trained.rates(epochs))
        self.journal.restore(fold_key(number, fold), fold)
        fit_one(fold, (epochs,), self.journal.recorder(number, on_epoch, stop))
        self.journal.flush()

    def retrain(self, on_epoch: OnEpoch | None, stop: Callable[[], bool]) -> None:
        """Train a fresh head on the embeddings of each fold's blocks, or go on with it; heads on a CPU side by side."""
        number, spec = self.trained.number, retrained_spec(self.trained.train, self.search.spec.retrain_head)
        count = self.search.spec.folds

        def tell(config: int, fold: int, epoch: Epoch) -> None:
            assert on_epoch is not None
            on_epoch(config, count + 1 + fold, epoch)

        recorder = self.journal.recorder(number, tell if on_epoch else None, stop)
        folds = [self._retrained(k, spec) for k in range(count)]
        for fold in folds:
            self.journal.restore(fold_key(number, fold), fold)
        if isinstance(folds[0], HeadFold):
            fit_side_by_side(folds, (self.epochs,), recorder, threads=torch.get_num_threads())
        else:
            for fold in folds:
                fit_one(fold, (self.epochs,), recorder)
        self.journal.flush()

    def _retrained(self, k: int, spec: TrainSpec) -> Fold:
        search, data = self.search, self.search.data
        inputs = search.inputs(self.trained.train)
        if search.depth(self.trained.train):
            tail = self._tail(f"fold{k}")
            inputs = run_blocks(tail, inputs, 0, data.rows, views=inputs.views)
        return search.kind(spec)(
            search.backbone.visual,
            FoldData(
                activations=inputs,
                labels=data.header.labels,
                train_rows=data.train(k),
                valid_rows=data.valid(k),
                number=k,
                name=f"{RETRAINED}{k}",
                custom=search.custom,
            ),
            spec,
            unfreeze_blocks=0,
            seed=search.seed,
        )

    def state(self, member: str) -> dict[str, torch.Tensor]:
        """Load the weights of one tail; a retrained one has its fold's blocks and its own head."""
        epochs = self.refit_epochs() if member == REFIT else self.epochs
        found = self.journal.load_snapshot(f"config{self.trained.number}.{member}", epochs)[0]
        if member.startswith(RETRAINED):
            blocks = self.state(f"fold{member.removeprefix(RETRAINED)}")
            found = blocks | {name: tensor for name, tensor in found.items() if name.startswith("head.")}
        return found

    def out_of_fold(self, kind: str) -> np.ndarray:
        """Float32 probabilities (N, C) of the folds' images, each by the one model that did not train on it, NaN for
        the hold-out: of the retrained heads, or for any other kind of the folds as the search left them."""
        if kind != RETRAINED:
            return self.trained.probabilities[self.budget]
        data = self.search.data
        out = np.full(data.labels.shape, np.nan, np.float32)
        for k in range(self.search.spec.folds):
            out[data.assignment == k] = self._predict(f"{RETRAINED}{k}", data.valid(k))
        return out

    def probabilities(self, kind: str, rows: np.ndarray) -> np.ndarray:
        """Float32 probabilities (n, C) of file rows: the mean over the members."""
        each = [self._predict(name, rows) for name in self.members(kind)]
        return np.asarray(np.mean(each, axis=0, dtype=np.float64), np.float32)

    def _predict(self, name: str, rows: np.ndarray) -> np.ndarray:
        inputs = self.search.inputs(self.trained.train)
        return probabilities(self._tail(name), inputs, rows, tta=self.trained.train.tta)

    def _tail(self, name: str) -> Tail:
        """One tail with its weights, on the device."""
        tail = self.search.tail(self.trained.train)
        tail.load_state_dict(self.state(name))
        return tail.to(self.search.activations.device)


def retrained_spec(train: TrainSpec, sampling: str) -> TrainSpec:
    """The training of a head alone, films drawn by `sampling`, after a configuration's own training."""
    return replace(
        train,
        lr=train.head_lr or train.lr,
        head_lr=None,
        layer_decay=1.0,
        train_blocks=0,
        head_first=0,
        train_norm=False,
        shuffle="full",
        sampling=cast(Any, sampling),
    )
