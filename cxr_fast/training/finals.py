"""The final model three ways: the best fold, a refit on all folds' data, the mean of the folds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..models.tail import Tail
from .checkpoints import Journal
from .fold import Epoch, predict, sigmoid
from .search import Search, Trained, choose, fit_one

KINDS = ("best-fold", "refit", "ensemble")
REFIT = "refit"


class Finals:
    """Tails of one chosen configuration at its chosen budget: `fold0`, `fold1`, ... and, once trained, `refit`."""

    def __init__(self, search: Search, trained: Trained, journal: Journal) -> None:
        self.search, self.trained, self.journal = search, trained, journal
        self.budget, self.best = choose(trained.scores)
        self.epochs = search.spec.epochs[self.budget]

    def members(self, kind: str) -> list[str]:
        """The tails a kind of final model consists of."""
        folds = [f"fold{k}" for k in range(self.search.spec.folds)]
        return {"best-fold": [folds[self.best]], "refit": [REFIT], "ensemble": folds}[kind]

    def refit_epochs(self) -> int:
        """The chosen budget; with early stopping the median epoch at which the folds had stopped by then."""
        return int(np.median(self.trained.stopped_at[:, self.budget]))

    def refit(self, on_epoch: Callable[[int, int, Epoch], None] | None, stop: Callable[[], bool]) -> None:
        """Train the refit, or go on with it; its learning rates are the folds' medians, epoch by epoch."""
        epochs = self.refit_epochs()
        key = f"config{self.trained.number}.{REFIT}"
        fold = self.search.refit(self.trained.train, self.trained.rates(epochs))
        taken = self.journal.restore(key, fold)

        def tell(epoch: Epoch) -> None:
            self.journal.save(key, fold)
            if on_epoch is not None:
                on_epoch(self.trained.number, self.search.spec.folds, epoch)

        fit_one(
            fold,
            (epochs,),
            taken=taken,
            on_epoch=tell,
            on_snapshot=lambda snapshot: self.journal.save_snapshot(key, snapshot),
            stop=stop,
        )
        self.journal.flush()

    def state(self, member: str) -> dict[str, torch.Tensor]:
        """Weights of one tail."""
        epochs = self.refit_epochs() if member == REFIT else self.epochs
        return self.journal.load_snapshot(f"config{self.trained.number}.{member}", epochs)[0]

    def probabilities(self, kind: str, rows: np.ndarray) -> np.ndarray:
        """Float32 probabilities (n, C) of file rows: the mean over the members."""
        each = [self._member(name, rows) for name in self.members(kind)]
        return np.asarray(np.mean(each, axis=0, dtype=np.float64), np.float32)

    def _member(self, name: str, rows: np.ndarray) -> np.ndarray:
        tail = self.tail()
        tail.load_state_dict(self.state(name))
        return sigmoid(predict(tail.to(self.search.activations.device), self.search.activations, rows))

    def tail(self) -> Tail:
        """A tail of the right shape, its weights to be loaded."""
        return Tail(
            self.search.backbone.visual,
            unfreeze_blocks=self.search.unfreeze_blocks,
            classes=self.search.data.labels.shape[1],
            train_norm=self.trained.train.train_norm,
        )

    def describe(self, kind: str) -> dict[str, Any]:
        """What `run.json` says of the final model."""
        rule = {
            "best-fold": "the fold with the best validation macro AUC at the chosen budget",
            "refit": "all folds' data for the chosen budget, learning rates the folds' medians",
            "ensemble": "mean of the folds' probabilities at the chosen budget",
        }[kind]
        return {"kind": kind, "members": self.members(kind), "rule": rule}
