"""Fit one fold of the tail from cached activations.

No step depends on the total number of epochs, so one run to the largest budget passes through every smaller one:
its snapshots are those runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ..activations.loader import Activations
from ..config import TrainSpec
from ..errors import InputError, Interrupted
from ..metrics.figures import auc, macro
from ..models import onednn
from ..models.tail import Tail
from .draws import Draws, draw
from .losses import class_weights, losses

# Images scored at once. On a CPU 64 do not fit the cache: 12 ms an image against 10 with 16 (bfloat16, ViT-B/16).
EVAL_BATCH, EVAL_BATCH_HEAD = {"cpu": 16, "cuda": 256}, 1024
# Of the scheduler's own state; the rest are settings.
SCHEDULER_KEYS = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr")


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One line of history; the validation figures are NaN where a fold has no validation images."""

    epoch: int
    train_loss: float
    valid_loss: float
    valid_auc: float
    classes: int
    lr: float
    seconds: float


# Configuration, fold (the number of folds: the refit), and the epoch just trained.
OnEpoch = Callable[[int, int, Epoch], None]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A fold at one epoch budget: weights, and float32 validation probabilities (n_valid, C).

    `epoch` is smaller than `budget` where training stopped early.
    """

    budget: int
    epoch: int
    state: Mapping[str, torch.Tensor] = field(repr=False)
    probabilities: np.ndarray = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class FoldData:
    """What one fold learns from: all activations and labels (N, C), and the rows it trains on and is scored on.

    `number` and the seed decide every draw: head initialisation, order, views and dropout. A refit has no `valid_rows`.
    """

    activations: Activations
    labels: np.ndarray
    train_rows: np.ndarray
    valid_rows: np.ndarray
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """What a training loop reports to, one call at a time; with no arguments nothing is kept.

    `epoch` follows the snapshot of its epoch, so that whoever saves the fold there has saved the snapshot before.
    `stop` is asked between steps; once it says so the loop raises Interrupted.
    """

    epoch: Callable[[Fold, Epoch], object] = lambda fold, epoch: None
    snapshot: Callable[[Fold, Snapshot], object] = lambda fold, snapshot: None
    stop: Callable[[], bool] = bool


def precision(spec: TrainSpec, device: torch.device, unfreeze_blocks: int) -> str:
    """`float32` or `bfloat16`: what `auto` means on this device (bfloat16 where the hardware computes in it).

    A head alone on a CPU is float32: its matrices are so small that converting them costs more than it saves.
    """
    if spec.precision != "auto":
        return spec.precision
    if unfreeze_blocks == 0 and device.type == "cpu":
        return "float32"
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bfloat16" if any(probe() for probe in probes if probe is not None) else "float32"


def autocast(device: torch.device, kind: str) -> AbstractContextManager[Any]:
    """bfloat16 autocast on the device, or the way float32 is fastest there."""
    return torch.autocast(device.type, torch.bfloat16) if kind == "bfloat16" else onednn.float32(device)


def predict(tail: Tail, activations: Activations, rows: np.ndarray, *, kind: str = "float32") -> np.ndarray:
    """Logits (n, C) float32 of the plain view of `rows`, in evaluation mode."""
    tail.eval()
    size = EVAL_BATCH[activations.device.type] if len(tail.blocks) else EVAL_BATCH_HEAD
    parts = [torch.from_numpy(rows[start : start + size]) for start in range(0, len(rows), size)]
    out = []
    with torch.inference_mode(), autocast(activations.device, kind):
        for x in activations.ahead((part, torch.zeros_like(part)) for part in parts):
            out.append(tail(x).float())
    return torch.cat(out).cpu().numpy()


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits, float32."""
    return torch.sigmoid(torch.from_numpy(logits)).numpy()


def require_scorable(labels: np.ndarray, train_rows: np.ndarray, valid_rows: np.ndarray, *, fold: int) -> None:
    """InputError, naming the fold as people count, when it cannot be trained or nothing could be selected on it."""
    name, valid, train = f"fold {fold + 1}", labels[valid_rows], labels[train_rows]
    if not ((valid == 1).any(axis=0) & (valid == 0).any(axis=0)).any():
        raise InputError(
            f"{name}: none of the {labels.shape[1]} classes has both a positive and a negative among its "
            f"{len(valid_rows)} validation images; use fewer --folds or more images."
        )
    require_trainable(train, name)


def require_trainable(labels: np.ndarray, name: str) -> None:
    """InputError when the training labels (n, C) of what is called `name` are too few or all unknown."""
    if len(labels) < 2:
        raise InputError(f"{name} would train on {len(labels)} image(s); use more images.")
    if (labels < 0).all():
        raise InputError(f"{name}: every label of its {len(labels)} training images is unknown.")


class Fold:
    """One fold in training: model, optimiser, scheduler and generator, an epoch at a time.

    `rates`, one learning rate an epoch, replaces the scheduler where there are no validation images. `taken` are the
    budgets whose snapshots exist. Raises InputError when the fold cannot be trained or scored.
    """

    def __init__(
        self,
        visual: Any,
        data: FoldData,
        spec: TrainSpec,
        *,
        unfreeze_blocks: int,
        seed: int,
        rates: Sequence[float] | None = None,
    ) -> None:
        labels, train_rows = data.labels, data.train_rows
        if rates is None:
            require_scorable(labels, train_rows, data.valid_rows, fold=data.number)
        self.activations, self.device = data.activations, data.activations.device
        self.number, self.spec, self.rates = data.number, spec, rates
        draws, head = (int(s) for s in np.random.SeedSequence([seed, data.number]).generate_state(2))
        self.labels = torch.from_numpy(labels.astype(np.int8))
        self.device_labels = self.labels.to(self.device)
        self.train_rows, self.valid_rows = torch.from_numpy(train_rows), data.valid_rows
        weights = class_weights(labels[train_rows], spec)
        self.class_weights = None if weights is None else torch.from_numpy(weights).to(self.device)
        self.generator = torch.Generator().manual_seed(draws)
        self.tail = Tail(
            visual,
            unfreeze_blocks=unfreeze_blocks,
            classes=labels.shape[1],
            dropout=spec.dropout,
            train_norm=spec.train_norm,
        )
        self.tail.head.reset(torch.Generator().manual_seed(head))
        self.tail.to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.tail.trainable(), lr=spec.lr, weight_decay=spec.weight_decay, fused=True
        )
        for p in self.tail.trainable():  # what AdamW makes at its first step; here already, so that it can be restored
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, mode="max", factor=spec.plateau_factor, patience=spec.plateau_patience
        )
        self.kind = precision(spec, self.device, unfreeze_blocks)
        self.epoch, self.best, self.stale = 0, -math.inf, 0
        self.history: list[Epoch] = []
        self.taken: set[int] = set()

    @property
    def stopped(self) -> bool:
        """Whether early stopping has ended this fold."""
        return self.spec.patience is not None and self.stale >= self.spec.patience

    @property
    def lr(self) -> float:
        """The learning rate of the next epoch."""
        return float(self.optimizer.param_groups[0]["lr"])

    def draw(self) -> Draws:
        """The draws of the next epoch; each call moves the generator on."""
        return draw(self.generator, self.train_rows, self.spec, views=self.activations.views)

    def step(self, x: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """One optimiser step on activations (B, ...), rows (B,) and masks (B, M); the loss, a scalar on the device."""
        self.tail.head.set_masks(masks.to(self.device))
        with autocast(self.device, self.kind):
            logits = self.tail(x)
        loss = losses(logits.float(), self.device_labels[rows.to(self.device)], self.spec, self.class_weights)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._clip()
        self.optimizer.step()
        return loss.detach()

    def _clip(self) -> None:
        """`clip_grad_norm_`, which on a CPU passes over the gradients only when there is something to clip."""
        parameters = self.tail.trainable()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if norm.device.type != "cpu" or not float(norm) + 1e-6 <= self.spec.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.spec.clip_norm, norm)

    def train_epoch(self, draws: Draws, stop: Callable[[], bool] = bool) -> float:
        """Train on one epoch's draws; the mean loss. Raises Interrupted between two steps once `stop` says so."""
        self.tail.train()
        total = torch.zeros((), device=self.device)
        batches = ((draws.rows[a:b], draws.views[a:b]) for a, b in draws.steps)
        for x, (a, b) in zip(self.activations.ahead(batches), draws.steps, strict=True):
            if stop():
                raise Interrupted("stopped.")
            total += self.step(x, draws.rows[a:b], draws.masks[a:b]) * (b - a)
        return float(total) / len(draws.rows)

    def run_epoch(self, stop: Callable[[], bool] = bool) -> Epoch:
        """Train one epoch, validate, step the scheduler."""
        began = time.perf_counter()
        self.set_rate()
        return self.finish_epoch(self.train_epoch(self.draw(), stop), began)

    def set_rate(self) -> None:
        """Take the next epoch's learning rate from `rates`, where those are given."""
        if self.rates is not None:
            self.optimizer.param_groups[0]["lr"] = self.rates[self.epoch]

    def finish_epoch(self, train_loss: float, began: float) -> Epoch:
        """Validate after a trained epoch, step the scheduler and early stopping, add a line to the history."""
        if not math.isfinite(train_loss):
            raise InputError(f"training diverged in epoch {self.epoch + 1} (loss {train_loss}); use a smaller --lr.")
        lr, (valid_loss, score, classes) = self.lr, self.validate()
        if self.spec.scheduler == "plateau" and self.rates is None:
            self.scheduler.step(score)
        self.epoch += 1
        self.best, self.stale = (score, 0) if score > self.best else (self.best, self.stale + 1)
        self.history.append(
            Epoch(
                epoch=self.epoch,
                train_loss=train_loss,
                valid_loss=valid_loss,
                valid_auc=score,
                classes=classes,
                lr=lr,
                seconds=time.perf_counter() - began,
            )
        )
        return self.history[-1]

    def validate(self) -> tuple[float, float, int]:
        """Loss, macro AUC and the number of classes it is a mean of, on the validation rows."""
        if not len(self.valid_rows):
            return math.nan, math.nan, 0
        logits = predict(self.tail, self.activations, self.valid_rows, kind=self.kind)
        if not np.isfinite(logits).all():  # the last step of the epoch, which its own loss does not show
            raise InputError(f"training diverged in epoch {self.epoch + 1} (logits not finite); use a smaller --lr.")
        labels = self.labels[torch.from_numpy(self.valid_rows)]
        weights = None if self.class_weights is None else self.class_weights.cpu()
        loss = float(losses(torch.from_numpy(logits), labels, self.spec, weights))
        return loss, *macro(auc(labels.numpy(), logits))

    def snapshot(self, budget: int) -> Snapshot:
        """Weights as they are, and float32 validation probabilities: what the exported model would answer."""
        state = {name: tensor.detach().cpu().clone() for name, tensor in self.tail.state_dict().items()}
        classes = self.labels.shape[1]
        probabilities = np.zeros((0, classes), np.float32)
        if len(self.valid_rows):
            probabilities = sigmoid(predict(self.tail, self.activations, self.valid_rows))
        return Snapshot(budget=budget, epoch=self.epoch, state=state, probabilities=probabilities)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Copies of all that decides the rest of the training: tensors by name, and JSON-ready values."""
        tensors = {f"tail.{name}": t for name, t in self.tail.state_dict().items() if name.startswith("head.")}
        for name, p in self.named().items():
            tensors |= {f"tail.{name}": p} | {f"{key}.{name}": t for key, t in self.optimizer.state[p].items()}
        out = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        out["generator"] = self.generator.get_state()
        scheduler = {key: value for key, value in self.scheduler.state_dict().items() if key in SCHEDULER_KEYS}
        values = {"epoch": self.epoch, "best": self.best, "stale": self.stale, "lr": self.lr, "scheduler": scheduler}
        return out, values | {"history": [asdict(epoch) for epoch in self.history]}

    def restore(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Go on from a `state`, in place; raises KeyError or RuntimeError on one of another model."""
        own = self.tail.state_dict()
        for name, tensor in tensors.items():
            if name.startswith("tail."):
                own[name.removeprefix("tail.")].copy_(tensor)
        with torch.no_grad():
            for name, p in self.named().items():
                for key, tensor in self.optimizer.state[p].items():
                    tensor.copy_(tensors[f"{key}.{name}"])
        self.generator.set_state(tensors["generator"])
        self.scheduler.load_state_dict(dict(values["scheduler"]))
        self.optimizer.param_groups[0]["lr"] = values["lr"]
        self.epoch, self.best, self.stale = values["epoch"], values["best"], values["stale"]
        self.history = [Epoch(**line) for line in values["history"]]

    def named(self) -> dict[str, nn.Parameter]:
        """The trained parameters by their names in the tail."""
        return {name: p for name, p in self.tail.named_parameters() if p.requires_grad}


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
    """Copies of the trained matrices before the first epoch; nothing later."""
    if fold.epoch:
        return {}
    return {name: p.detach().clone() for name, p in fold.tail.named_parameters() if p.requires_grad and p.ndim >= 2}


def require_moved(fold: Fold, start: Mapping[str, torch.Tensor]) -> None:
    """Every matrix said to be trained must have changed; the published code trained two blocks that never moved."""
    matrices = dict(fold.tail.named_parameters())
    still = [name for name, before in start.items() if torch.equal(matrices[name], before)]
    if still:
        raise InputError(
            f"{len(still)} of {len(start)} weight matrices did not change in the first epoch ({still[0]}); "
            "--lr is too small to train them."
        )
