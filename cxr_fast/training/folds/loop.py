"""Train a fold to its largest budget, reporting each epoch and each budget's snapshot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...errors import InputError
from .fold import Epoch, Fold, Snapshot


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """What a training loop reports to, one call at a time; with no arguments nothing is kept.

    `epoch` follows the snapshot of its epoch, so that whoever saves the fold there has saved the snapshot before.
    `stop` is asked between steps; once it says so the loop raises Interrupted.
    """

    epoch: Callable[[Fold, Epoch], object] = lambda fold, epoch: None
    snapshot: Callable[[Fold, Snapshot], object] = lambda fold, snapshot: None
    stop: Callable[[], bool] = bool


def fit(fold: Fold, budgets: Sequence[int], recorder: Recorder) -> list[Epoch]:
    """Train to the largest budget, with a snapshot at each budget not yet taken; the whole history.

    Where early stopping ends the fold, the budgets not reached get the state it stopped in: a separate run with that
    budget would have stopped there too.
    """
    while not finished(fold, budgets):
        start = weights_before(fold)
        epoch = fold.run_epoch(recorder.stop)
        require_moved(fold, start)
        take_snapshots(fold, budgets, recorder)
        recorder.epoch(fold, epoch)
    take_snapshots(fold, budgets, recorder)
    return fold.history


def finished(fold: Fold, budgets: Sequence[int]) -> bool:
    """Whether the fold has reached its largest budget, or stopped early."""
    return fold.epoch >= budgets[-1] or fold.stopped


def take_snapshots(fold: Fold, budgets: Sequence[int], recorder: Recorder) -> None:
    """Record the snapshots due after this epoch, and note them in `fold.taken`: the budget reached, and all that
    early stopping leaves out."""
    for budget in budgets:
        due = budget == fold.epoch or (fold.stopped and budget > fold.epoch)
        if due and budget not in fold.taken:
            recorder.snapshot(fold, fold.snapshot(budget))
            fold.taken.add(budget)


def weights_before(fold: Fold) -> dict[str, torch.Tensor]:
    """Copies of the matrices that are trained for the first time in the next epoch; nothing in a later one."""
    if fold.epoch not in (0, fold.spec.head_first):
        return {}
    return {name: p.detach().clone() for name, p in fold.moving().items() if p.ndim >= 2}


def require_moved(fold: Fold, start: Mapping[str, torch.Tensor]) -> None:
    """Every matrix said to be trained must have changed; the published code trained two blocks that never moved."""
    matrices = dict(fold.tail.named_parameters())
    still = [name for name, before in start.items() if torch.equal(matrices[name], before)]
    if still:
        raise InputError(
            f"{len(still)} of {len(start)} weight matrices did not change in the first epoch ({still[0]}); "
            "--lr is too small to train them."
        )
