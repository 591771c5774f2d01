"""Fit one fold of the tail from cached activations.

No step depends on the total number of epochs, so one run to the largest budget passes through every smaller one:
its snapshots are those runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .config import TrainSpec
from .errors import InputError
from .metrics import auc, macro
from .tail import Dropout, Tail

EVAL_BATCH = 64


class Activations:
    """Rows of an activation array, brought to a device batch by batch.

    `array` is (N, V, T, D) or (N, V, E), float16 or float32, usually a memory map. On a CUDA device the array
    is copied there once when it fits into `share` of the free memory, else rows are gathered on the host.
    """

    def __init__(self, array: np.ndarray, device: torch.device, *, share: float = 0.8) -> None:
        self.array, self.device = array, device
        self.resident: torch.Tensor | None = None
        if device.type == "cuda" and array.nbytes < share * torch.cuda.mem_get_info(device)[0]:
            self.resident = _upload(array, device)

    @property
    def where(self) -> str:
        """Where the activations live, for the plan."""
        if self.resident is not None:
            return f"on {self.device}"
        return "memory map, gathered on the host" if self.device.type == "cuda" else "memory map"

    @property
    def views(self) -> int:
        """V, the number of cached views."""
        return int(self.array.shape[1])

    def gather(self, rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """(B,) row and view numbers to float32 activations (B, ...) on the device."""
        if self.resident is not None:
            return self.resident[rows.to(self.device), views.to(self.device)].float()
        return torch.from_numpy(self.array[rows.numpy(), views.numpy()]).to(self.device).float()


def _upload(array: np.ndarray, device: torch.device, *, chunk: int = 256) -> torch.Tensor:
    dtype = torch.float16 if array.dtype == np.float16 else torch.float32
    out = torch.empty(array.shape, dtype=dtype, device=device)
    for start in range(0, len(array), chunk):
        out[start : start + chunk] = torch.from_numpy(np.ascontiguousarray(array[start : start + chunk]))
    return out


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One line of history."""

    epoch: int
    train_loss: float
    valid_loss: float
    valid_auc: float
    classes: int
    lr: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A fold at one epoch budget: weights, and float32 validation probabilities (n_valid, C).

    `epoch` is smaller than `budget` where training stopped early.
    """

    budget: int
    epoch: int
    state: Mapping[str, torch.Tensor] = field(repr=False)
    probabilities: np.ndarray = field(repr=False)


def losses(logits: torch.Tensor, labels: torch.Tensor, spec: TrainSpec) -> torch.Tensor:
    """Mean loss over known labels; `logits` (B, C), `labels` (B, C) with 1, 0, -1 unknown.

    Focal loss of Lin et al. 2017, eq. 5: alpha_t (1 - p_t)^gamma times cross entropy, alpha for positives.
    """
    known = labels >= 0
    target = (labels > 0).float()
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if spec.loss == "focal":
        # log(1 - p_t) straight from the logit: 1 - p_t rounds to 0 above logit 17, and 0 ** 0.5 has no gradient.
        log_miss = F.logsigmoid(torch.where(labels > 0, -logits, logits))
        alpha = spec.focal_alpha * target + (1 - spec.focal_alpha) * (1 - target)
        each = alpha * torch.exp(spec.focal_gamma * log_miss) * each
    return (each * known).sum() / known.sum().clamp(min=1)


def precision(spec: TrainSpec, device: torch.device) -> str:
    """`float32` or `bfloat16`: what `auto` means on this device (bfloat16 where the hardware computes in it)."""
    if spec.precision != "auto":
        return spec.precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bfloat16" if any(probe() for probe in probes if probe is not None) else "float32"


def autocast(device: torch.device, kind: str) -> AbstractContextManager[Any]:
    """bfloat16 autocast on the device, or nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16) if kind == "bfloat16" else nullcontext()


def predict(tail: Tail, activations: Activations, rows: np.ndarray, *, kind: str = "float32") -> np.ndarray:
    """Logits (n, C) float32 of the plain view of `rows`, in evaluation mode."""
    tail.eval()
    out = []
    with torch.inference_mode(), autocast(activations.device, kind):
        for start in range(0, len(rows), EVAL_BATCH):
            batch = torch.from_numpy(rows[start : start + EVAL_BATCH])
            out.append(tail(activations.gather(batch, torch.zeros_like(batch))).float().cpu())
    return torch.cat(out).numpy()


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits, float32."""
    return torch.sigmoid(torch.from_numpy(logits)).numpy()


class Fold:
    """One fold in training: model, optimiser, scheduler and generators, an epoch at a time.

    `seed` and `fold` decide every draw: head initialisation, order, views and dropout. Raises InputError when the
    validation rows have no class with both a positive and a negative, since nothing could then be selected.
    """

    def __init__(
        self,
        visual: Any,
        activations: Activations,
        labels: np.ndarray,
        train_rows: np.ndarray,
        valid_rows: np.ndarray,
        spec: TrainSpec,
        *,
        unfreeze_blocks: int,
        seed: int,
        fold: int = 0,
    ) -> None:
        device = activations.device
        draws, head, dropout = (int(s) for s in np.random.SeedSequence([seed, fold]).generate_state(3))
        self.activations, self.spec, self.device = activations, spec, device
        self.labels = torch.from_numpy(labels.astype(np.int8))
        self.device_labels = self.labels.to(device)
        self.train_rows, self.valid_rows = torch.from_numpy(train_rows), valid_rows
        self.generator = torch.Generator().manual_seed(draws)
        self.tail = Tail(visual, unfreeze_blocks=unfreeze_blocks, classes=labels.shape[1], dropout=spec.dropout)
        self.tail.head.reset(torch.Generator().manual_seed(head))
        self.tail.to(device)
        noise = torch.Generator(device).manual_seed(dropout)
        for module in self.tail.modules():
            if isinstance(module, Dropout):
                module.generator = noise
        self.optimizer = torch.optim.AdamW(
            self.tail.trainable(), lr=spec.lr, weight_decay=spec.weight_decay, fused=True
        )
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, mode="max", factor=spec.plateau_factor, patience=spec.plateau_patience
        )
        self.kind = precision(spec, device)
        self.epoch, self.best, self.stale = 0, -math.inf, 0
        if not ((labels[valid_rows] == 1).any(axis=0) & (labels[valid_rows] == 0).any(axis=0)).any():
            raise InputError(
                f"fold {fold}: none of the {labels.shape[1]} classes has both a positive and a negative among its "
                f"{len(valid_rows)} validation images; use fewer --folds or more images."
            )
        if len(train_rows) < 2:
            raise InputError(f"fold {fold} would train on {len(train_rows)} image(s); use more images.")
        if (labels[train_rows] < 0).all():
            raise InputError(f"fold {fold}: every label of its {len(train_rows)} training images is unknown.")

    @property
    def stopped(self) -> bool:
        """Whether early stopping has ended this fold."""
        return self.spec.patience is not None and self.stale >= self.spec.patience

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The rows and views of one epoch's steps; a last batch of one joins its neighbour (batch norm needs two)."""
        order = self.train_rows[torch.randperm(len(self.train_rows), generator=self.generator)]
        flips = torch.zeros(len(order), dtype=torch.long)
        if self.spec.flip and self.activations.views > 1:
            flips = torch.randint(0, 2, (len(order),), generator=self.generator)
        edges = list(range(0, len(order), self.spec.batch_size))
        if len(order) - edges[-1] == 1 and len(edges) > 1:
            edges.pop()
        ends = [*edges[1:], len(order)]
        return [(order[a:b], flips[a:b]) for a, b in zip(edges, ends, strict=True)]

    def step(self, rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """One optimiser step on (B,) rows and views; the loss, a scalar on the device."""
        x = self.activations.gather(rows, views)
        with autocast(self.device, self.kind):
            logits = self.tail(x)
        loss = losses(logits.float(), self.device_labels[rows.to(self.device)], self.spec)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.tail.trainable(), self.spec.clip_norm)
        self.optimizer.step()
        return loss.detach()

    def run_epoch(self) -> Epoch:
        """Train one epoch, validate, step the scheduler."""
        began = time.perf_counter()
        lr = self.optimizer.param_groups[0]["lr"]
        self.tail.train()
        batches = self.batches()
        total = torch.zeros((), device=self.device)
        for rows, views in batches:
            total += self.step(rows, views) * len(rows)
        train_loss = float(total) / len(self.train_rows)
        if not math.isfinite(train_loss):
            raise InputError(f"training diverged in epoch {self.epoch + 1} (loss {train_loss}); use a smaller --lr.")
        logits = predict(self.tail, self.activations, self.valid_rows, kind=self.kind)
        if not np.isfinite(logits).all():  # the last step of the epoch, which its own loss does not show
            raise InputError(f"training diverged in epoch {self.epoch + 1} (logits not finite); use a smaller --lr.")
        valid = self.labels[torch.from_numpy(self.valid_rows)]
        valid_loss = float(losses(torch.from_numpy(logits), valid, self.spec))
        score, classes = macro(auc(valid.numpy(), logits))
        if self.spec.scheduler == "plateau":
            self.scheduler.step(score)
        self.epoch += 1
        self.best, self.stale = (score, 0) if score > self.best else (self.best, self.stale + 1)
        return Epoch(
            epoch=self.epoch,
            train_loss=train_loss,
            valid_loss=valid_loss,
            valid_auc=score,
            classes=classes,
            lr=lr,
            seconds=time.perf_counter() - began,
        )

    def snapshot(self, budget: int) -> Snapshot:
        """Weights as they are, and float32 validation probabilities: what the exported model would answer."""
        state = {name: tensor.detach().cpu().clone() for name, tensor in self.tail.state_dict().items()}
        logits = predict(self.tail, self.activations, self.valid_rows)
        return Snapshot(budget=budget, epoch=self.epoch, state=state, probabilities=sigmoid(logits))


def fit(
    fold: Fold,
    budgets: Sequence[int],
    *,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_snapshot: Callable[[Snapshot], None],
) -> list[Epoch]:
    """Train to the largest budget, handing a snapshot to `on_snapshot` at each; the history, one Epoch a line.

    Where early stopping ends the fold, the budgets not reached get the state it stopped in: a separate run with
    that budget would have stopped there too.
    """
    history: list[Epoch] = []
    start = {name: p.detach().clone() for name, p in fold.tail.named_parameters() if p.requires_grad}
    reached = 0
    while reached < len(budgets):
        if not fold.stopped:
            history.append(fold.run_epoch())
            if on_epoch is not None:
                on_epoch(history[-1])
        if fold.epoch == 1 and len(history) == 1:
            _require_moved(fold.tail, start)
            start.clear()
        while reached < len(budgets) and (fold.stopped or budgets[reached] == fold.epoch):
            on_snapshot(fold.snapshot(budgets[reached]))
            reached += 1
    return history


def _require_moved(tail: Tail, start: Mapping[str, torch.Tensor]) -> None:
    """Every matrix said to be trained must have changed; the published code trained two blocks that never moved."""
    matrices = {name: p for name, p in tail.named_parameters() if name in start and p.ndim >= 2}
    still = [name for name, p in matrices.items() if torch.equal(p, start[name])]
    if still:
        raise InputError(
            f"{len(still)} of {len(matrices)} weight matrices did not change in the first epoch ({still[0]}); "
            "--lr is too small to train them."
        )
