"""Fit one fold of the tail from cached activations.

No step depends on the total number of epochs, so one run to the largest budget passes through every smaller one:
its snapshots are those runs.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ...activations.forward import autocast, precision, predict, probabilities, sigmoid, with_flipped
from ...activations.loader import Activations
from ...config import TrainSpec
from ...data.labels import UNKNOWN
from ...errors import DivergedError, InputError, Interrupted
from ...metrics.figures import auc, macro
from ...models.heads import NOTHING_OWN, Custom
from ...models.tail import Tail, embedding_width
from .draws import Draws, draw, sampling_weights
from .losses import ClassTerms, class_terms, losses
from .rates import average_decay, rate_groups

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


# Configuration, fold (the number of folds: the refit; beyond it, the retrained head of each fold), the epoch trained.
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
    `name` is what its files are called, by default `fold0`, `fold1`, ... `embeddings` (N, V, E) are those of the blocks
    before training, for the epochs that train the head alone. `custom` are a head and a loss of the user's own.
    """

    activations: Activations
    labels: np.ndarray
    train_rows: np.ndarray
    valid_rows: np.ndarray
    number: int = 0
    name: str = ""
    embeddings: Activations | None = None
    custom: Custom = NOTHING_OWN


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
        self.embeddings = data.embeddings
        self.number, self.spec, self.rates = data.number, spec, rates
        self.name, self.custom = data.name or f"fold{data.number}", data.custom
        draws, head = (int(s) for s in np.random.SeedSequence([seed, data.number]).generate_state(2))
        self.targets = torch.from_numpy(labels.astype(np.int8))  # uncertain labels are trained on, and never scored
        self.labels = self.targets.clamp(min=UNKNOWN)
        self.device_labels = self.targets.to(self.device)
        self.train_rows, self.valid_rows = torch.from_numpy(train_rows), data.valid_rows
        self.terms = class_terms(labels[train_rows], spec).map(lambda t: t.to(self.device))
        if self.custom.loss is not None and self.terms.soft:
            raise InputError(
                "loss: these labels hold uncertain ones with a soft target, which a loss of your own does not know; "
                "read them with --uncertain unknown, positive or negative."
            )
        self.sampling = sampling_weights(labels[train_rows], spec)
        self.generator = torch.Generator().manual_seed(draws)
        self.tail = Tail(
            visual,
            unfreeze_blocks=unfreeze_blocks,
            classes=labels.shape[1],
            dropout=spec.dropout,
            train_norm=spec.train_norm,
            head=self.custom.make_head(embedding_width(visual), labels.shape[1], head) if self.custom.head else None,
        )
        if self.custom.head is None:
            self.tail.head.reset(torch.Generator().manual_seed(head))
        self.tail.to(self.device)
        self.average = copy.deepcopy(self.tail).requires_grad_(False) if spec.ema else None
        moved = {name for name in self.tail.state_dict() if name.startswith("head.")} | set(self.named())
        floats = {name for name, tensor in self.tail.state_dict().items() if tensor.is_floating_point()}
        self._averaged = sorted(moved & floats)
        self._make_optimizer()
        self.kind = precision(spec, self.device, unfreeze_blocks)
        self.epoch, self.best, self.stale = 0, -math.inf, 0
        self.history: list[Epoch] = []
        self.taken: set[int] = set()
        self.validated: np.ndarray | None = None  # what the latest validation found, (n_valid, C) float32

    def _make_optimizer(self) -> None:
        """AdamW with a group for each rate, and the scheduler."""
        spec = self.spec
        base, groups = rate_groups(self.tail, spec)
        self.shares = [share for share, _ in groups]
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters, "lr": base * share} for share, parameters in groups],
            lr=base,
            weight_decay=spec.weight_decay,
            fused=True,
        )
        for p in self.tail.trainable():  # what AdamW makes at its first step; here already, so that it can be restored
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, mode="max", factor=spec.plateau_factor, patience=spec.plateau_patience
        )

    @property
    def head_only(self) -> bool:
        """Whether the next epoch trains the head alone, on the embeddings of the blocks before training."""
        return self._head_only_after(self.epoch)

    def _head_only_after(self, epochs: int) -> bool:
        return epochs < self.spec.head_first and len(self.tail.blocks) > 0

    @property
    def source(self) -> Activations:
        """What the next epoch trains on, and is validated on."""
        return self._source_after(self.epoch)

    def _source_after(self, epochs: int) -> Activations:
        if not self._head_only_after(epochs):
            return self.activations
        assert self.embeddings is not None, "the epochs of --head-first need embeddings"
        return self.embeddings

    @property
    def arithmetic(self) -> str:
        """`float32` or `bfloat16`: what the next epoch computes in."""
        return precision(self.spec, self.device, 0) if self.head_only else self.kind

    @property
    def scored(self) -> Tail:
        """The model that is validated and kept: the trained weights, or their running average."""
        return self.tail if self.average is None else self.average

    @property
    def stopped(self) -> bool:
        """Whether early stopping has ended this fold."""
        return self.spec.patience is not None and self.stale >= self.spec.patience

    @property
    def lr(self) -> float:
        """The learning rate of the next epoch: of the last block, or of a head alone."""
        return float(self.optimizer.param_groups[0]["lr"])

    def _set_lr(self, lr: float) -> None:
        for group, share in zip(self.optimizer.param_groups, self.shares, strict=True):
            group["lr"] = lr * share

    def draw(self) -> Draws:
        """The draws of the next epoch; each call moves the generator on."""
        drawn = draw(self.generator, self.train_rows, self.spec, views=self.activations.views, weights=self.sampling)
        if not self.custom:
            return drawn
        # From a copy: our own draws are the same with and without a head or loss of the user's.
        copied = self.generator.clone_state()
        return replace(drawn, seed=int(torch.randint(2**62, (), generator=copied)))

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, terms: ClassTerms) -> torch.Tensor:
        """The loss of logits (B, C) float32 and labels (B, C) on one device, a scalar."""
        if self.custom.loss is not None:
            return self.custom.loss(logits, labels)
        return losses(logits, labels, self.spec, terms)

    def step(self, x: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """One optimiser step on activations (B, ...), rows (B,) and masks (B, M); the loss, a scalar on the device.

        From embeddings (B, E) the blocks get no gradient, and AdamW passes them over.
        """
        if self.custom.head is None:
            self.tail.head.set_masks(masks.to(self.device))
        with autocast(self.device, self.arithmetic):
            logits = self.tail(x)
        loss = self.loss(logits.float(), self.device_labels[rows.to(self.device)], self.terms)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._clip()
        self.optimizer.step()
        self._take_average()
        return loss.detach()

    def _clip(self) -> None:
        """`clip_grad_norm_`, which on a CPU passes over the gradients only when there is something to clip."""
        parameters = self.tail.trainable()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if norm.device.type != "cpu" or not float(norm) + 1e-6 <= self.spec.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.spec.clip_norm, norm)

    @torch.no_grad()
    def _take_average(self) -> None:
        """Move the running average one step on; batch norm's statistics are averaged too."""
        if self.average is None:
            return
        decay = average_decay(self.spec.ema, float(self.optimizer.state[self.tail.trainable()[-1]]["step"]))
        new, old = (part.state_dict() for part in (self.tail, self.average))
        torch._foreach_lerp_([old[name] for name in self._averaged], [new[name] for name in self._averaged], 1 - decay)

    def train_epoch(self, draws: Draws, stop: Callable[[], bool] = bool) -> float:
        """Train on one epoch's draws; the mean loss. Raises Interrupted between two steps once `stop` says so."""
        self.tail.train()
        total = torch.zeros((), device=self.device)
        batches = ((draws.rows[a:b], draws.views[a:b]) for a, b in draws.steps)
        with self._seeded(draws):
            for x, (a, b) in zip(self.source.ahead(batches), draws.steps, strict=True):
                if stop():
                    raise Interrupted("stopped.")
                total += self.step(x, draws.rows[a:b], draws.masks[a:b]) * (b - a)
        return float(total) / len(draws.rows)

    @contextmanager
    def _seeded(self, draws: Draws) -> Iterator[None]:
        """Torch's own random numbers, which a user's head or loss may draw, follow the epoch's draws inside."""
        if draws.seed is None:
            yield
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(draws.seed)
            yield

    def run_epoch(self, stop: Callable[[], bool] = bool) -> Epoch:
        """Train one epoch, validate, step the scheduler."""
        began = time.perf_counter()
        self.set_rate()
        return self.finish_epoch(self.train_epoch(self.draw(), stop), began)

    def set_rate(self) -> None:
        """Take the next epoch's learning rate from `rates`, where those are given."""
        if self.rates is not None:
            self._set_lr(self.rates[self.epoch])

    def finish_epoch(self, train_loss: float, began: float) -> Epoch:
        """Validate after a trained epoch, step the scheduler and early stopping, add a line to the history."""
        if not math.isfinite(train_loss):
            raise DivergedError(f"training diverged in epoch {self.epoch + 1} (loss {train_loss}); use a smaller --lr.")
        lr, (valid_loss, score, classes) = self.lr, self.validate()
        if self.spec.scheduler == "plateau" and self.rates is None:
            self.scheduler.step(score)
            self._set_lr(self.lr)  # one rate for all, however small the others got
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
        """Loss, macro AUC and the number of classes it is a mean of, on the validation rows; float32 arithmetic.

        Also where training computes in bfloat16: on 54 films that moved a fold's AUC from 0.778 to 0.861, and the
        budget, the fold, the plateau and early stopping all follow this figure.
        """
        if not len(self.valid_rows):
            return math.nan, math.nan, 0
        logits = predict(self.scored, self.source, self.valid_rows)
        if not np.isfinite(logits).all():  # the last step of the epoch, which its own loss does not show
            raise DivergedError(f"training diverged in epoch {self.epoch + 1} (logits not finite); use a smaller --lr.")
        labels = self.labels[torch.from_numpy(self.valid_rows)]
        place = torch.device("cpu") if self.custom.loss is None else self.device  # a user's own may hold tensors there
        terms = self.terms.map(lambda t: t.to(place))
        with torch.no_grad():
            loss = float(self.loss(torch.from_numpy(logits).to(place), labels.to(place), terms))
        both = self.spec.tta == "flip"
        self.validated = with_flipped(logits, self.scored, self.source, self.valid_rows) if both else sigmoid(logits)
        return loss, *macro(auc(labels.numpy(), self.validated))

    def snapshot(self, budget: int) -> Snapshot:
        """Weights as they are, and the float32 probabilities of their validation, whose AUC the history holds."""
        trained, scored = self.tail.state_dict(), self.scored.state_dict()
        # What is not averaged is the trained model's: frozen weights, batch norm's count of steps.
        kept = {name: scored[name] if name in self._averaged else tensor for name, tensor in trained.items()}
        state = {name: tensor.detach().cpu().clone() for name, tensor in kept.items()}
        found = np.zeros((0, self.labels.shape[1]), np.float32) if self.validated is None else self.validated
        if len(self.valid_rows) and self.validated is None:  # restored, and not trained since
            source = self._source_after(max(self.epoch - 1, 0))
            found = probabilities(self.scored, source, self.valid_rows, tta=self.spec.tta)
        return Snapshot(budget=budget, epoch=self.epoch, state=state, probabilities=found)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Copies of all that decides the rest of the training: tensors by name, and JSON-ready values."""
        tensors = {f"tail.{name}": t for name, t in self.tail.state_dict().items() if name.startswith("head.")}
        for name, p in self.named().items():
            tensors |= {f"tail.{name}": p} | {f"{key}.{name}": t for key, t in self.optimizer.state[p].items()}
        if self.average is not None:
            averaged = self.average.state_dict()
            tensors |= {f"average.{name}": averaged[name] for name in self._averaged}
        out = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        out["generator"] = self.generator.get_state()
        scheduler = {key: value for key, value in self.scheduler.state_dict().items() if key in SCHEDULER_KEYS}
        values = {"epoch": self.epoch, "best": self.best, "stale": self.stale, "lr": self.lr, "scheduler": scheduler}
        return out, values | {"history": [asdict(epoch) for epoch in self.history]}

    def restore(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Go on from a `state`, in place; raises KeyError or RuntimeError on one of another model."""
        for part, module in (("tail.", self.tail), ("average.", self.average)):
            own = {} if module is None else module.state_dict()
            for name, tensor in tensors.items():
                if module is not None and name.startswith(part):
                    own[name.removeprefix(part)].copy_(tensor)
        with torch.no_grad():
            for name, p in self.named().items():
                for key, tensor in self.optimizer.state[p].items():
                    tensor.copy_(tensors[f"{key}.{name}"])
        self.generator.set_state(tensors["generator"])
        self.scheduler.load_state_dict(dict(values["scheduler"]))
        self._set_lr(values["lr"])
        self.epoch, self.best, self.stale = values["epoch"], values["best"], values["stale"]
        self.history, self.validated = [Epoch(**line) for line in values["history"]], None

    def named(self) -> dict[str, nn.Parameter]:
        """The trained parameters by their names in the tail."""
        return {name: p for name, p in self.tail.named_parameters() if p.requires_grad}

    def moving(self) -> dict[str, nn.Parameter]:
        """Those of them that the next epoch changes."""
        return {name: p for name, p in self.named().items() if not self.head_only or name.startswith("head.")}
