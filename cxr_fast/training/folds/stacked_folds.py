"""Folds trained together: stacked weights, one step for all, captured as a CUDA graph.

A fold's step at batch 16 is hundreds of small kernels, which Python would launch one by one (not measured on a GPU).
Here every weight carries a leading axis of K folds, so that all folds share those kernels, and a graph launches them
at once.
`Fold` is the slow twin this is tested against.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import Interrupted
from ...models.stacked_tail import Weights, embedding, head, part
from .draws import Draws
from .fold import Epoch, Fold
from .loop import Recorder, finished, require_moved, take_snapshots, weights_before
from .losses import ClassTerms, losses

# Steps before capture: cuBLAS, autograd and torch.compile make what they keep in the first; PyTorch's notes ask for 3.
WARM_UP = 3
MOMENTS = ("exp_avg", "exp_avg_sq")


class Stack:
    """K folds of one architecture and spec in shared tensors (K, ...); each may have its own rows, rate and epoch.

    The folds' parameters, moments, step counts and batch norm statistics become views of the shared tensors, so a fold
    still validates, saves and restores itself. `graph` captures the step (by default on CUDA only, where alone it can
    be); `compile` compiles forward and loss. A fold belongs to its latest stack.
    """

    def __init__(self, folds: Sequence[Fold], *, graph: bool | None = None, compile: bool = False) -> None:
        first = folds[0]
        for fold in folds:
            assert fold.source is first.source, "folds trained together read the same activations"
            assert (fold.spec, fold.kind) == (first.spec, first.kind), "folds trained together share a spec"
            assert torch.equal(fold.labels, first.labels)
        self.folds, self.first, self.spec, self.device = list(folds), first, first.spec, first.device
        self.source, self.kind = first.source, first.arithmetic
        self.graph = self.device.type == "cuda" if graph is None else graph
        self.captured: torch.cuda.CUDAGraph | None = None
        self.groups = self._groups()
        self._share_parameters()
        self._share_statistics()
        self._share_average()
        self.terms = ClassTerms.stack([fold.terms for fold in folds])
        self.rates, self.total = (torch.zeros(len(folds), device=self.device) for _ in range(2))
        self.at = torch.zeros(1, dtype=torch.long, device=self.device)
        self.plan: dict[str, torch.Tensor] = {}
        self.buffer = torch.zeros(0, device=self.device)
        # Not bound: a stack that held its own method would keep its memory, a graph's too, until cycles are collected.
        self.forward: Callable[..., Any] = torch.compile(Stack._forward, dynamic=False) if compile else Stack._forward

    def _share_parameters(self) -> None:
        """Weights and AdamW's moments to (K, ...), its step counts to (K, number of weights)."""
        named = [fold.moving() for fold in self.folds]
        states = [fold.optimizer.state for fold in self.folds]
        self.weights: dict[str, torch.Tensor] = {}
        self.moments: dict[str, list[torch.Tensor]] = {key: [] for key in MOMENTS}
        self.counts = torch.stack(
            [torch.stack([state[p]["step"] for p in own.values()]) for own, state in zip(named, states, strict=True)]
        )
        for i, name in enumerate(named[0]):
            own = [parameters[name] for parameters in named]
            self.weights[name] = torch.stack([p.detach() for p in own])
            for key, stacked in self.moments.items():
                stacked.append(torch.stack([state[p][key] for p, state in zip(own, states, strict=True)]))
            for k, (p, state) in enumerate(zip(own, states, strict=True)):
                p.data = self.weights[name][k]
                state[p] |= {"step": self.counts[k, i]} | {key: self.moments[key][i][k] for key in MOMENTS}

    def _share_average(self) -> None:
        """The running averages to (K, ...), in the order of `weights` and then of `statistics`."""
        self.averages: list[tuple[torch.Tensor, torch.Tensor]] = []  # each beside what it is the average of
        if self.first.average is None:
            return
        tails = [fold.average for fold in self.folds if fold.average is not None]
        for name, weight in self.weights.items():
            own = [tail.get_parameter(name) for tail in tails]
            self.averages.append((torch.stack([p.detach() for p in own]), weight))
            for k, p in enumerate(own):
                p.data = self.averages[-1][0][k]
        for i, (mean, variance, _) in self.statistics.items():
            norms = [tail.head[i] for tail in tails]
            for name, now in (("running_mean", mean), ("running_var", variance)):
                self.averages.append((torch.stack([getattr(norm, name) for norm in norms]), now))
                for k, norm in enumerate(norms):
                    setattr(norm, name, self.averages[-1][0][k])

    def _share_statistics(self) -> None:
        """Batch norm's running mean and variance (K, F) and count (K,), by the layer's place in the head."""
        self.statistics: dict[int, list[torch.Tensor]] = {}
        for i, layer in enumerate(self.first.tail.head):
            if isinstance(layer, nn.BatchNorm1d):
                own = [fold.tail.head[i] for fold in self.folds]
                names = ("running_mean", "running_var", "num_batches_tracked")
                self.statistics[i] = [torch.stack([getattr(norm, name) for norm in own]) for name in names]
                for k, norm in enumerate(own):
                    for name, stacked in zip(names, self.statistics[i], strict=True):
                        setattr(norm, name, stacked[k])

    def _state(self) -> list[torch.Tensor]:
        """All that a step changes."""
        statistics = [tensor for three in self.statistics.values() for tensor in three]
        moments = [tensor for stacked in self.moments.values() for tensor in stacked]
        averages = [average for average, _ in self.averages]
        return [*self.weights.values(), *moments, self.counts, *statistics, *averages, self.total, self.at]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Undo, to the bit, whatever steps do inside: warm-up and capture must not be part of the training."""
        saved = [tensor.clone() for tensor in self._state()]
        yield
        for tensor, before in zip(self._state(), saved, strict=True):
            tensor.copy_(before)

    def draw(self) -> list[Draws]:
        """The next epoch's draws of each fold, on a thread each: a fold of 4,779 images takes 14 ms for its dropout."""
        with ThreadPoolExecutor(len(self.folds)) as pool:
            return list(pool.map(Fold.draw, self.folds))

    def train_epoch(self, draws: Sequence[Draws], stop: Callable[[], bool] = bool) -> list[float]:
        """Train each fold on one epoch's draws; K mean losses. Raises Interrupted between steps once `stop` says so.

        A fold with fewer steps stands still, to the bit, while the others finish.
        """
        self.first.tail.train()
        plan = lay_out(draws)
        self._prepare(plan)
        step = self._captured().replay if self.graph else self.step
        for x in self._feed(plan):
            if stop():
                raise Interrupted("stopped.")
            if x is not None:
                self.buffer.copy_(x.view(self.buffer.shape))
            step()
        return [total / len(d.rows) for total, d in zip(self.total.tolist(), draws, strict=True)]

    def _feed(self, plan: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor | None]:
        """What each step must be handed: nothing where activations are resident, else its own (K*B, ...)."""
        if self.source.resident is not None:
            return repeat(None, len(plan["index"]))
        return self.source.ahead((plan["rows"][i], plan["views"][i]) for i in plan["index"].flatten(1))

    def _prepare(self, plan: Mapping[str, torch.Tensor]) -> None:
        """Bring an epoch's plan to the device, and set rates and counters.

        The tensors stay where they are from epoch to epoch: a captured graph knows them by address.
        """
        if not self.plan:
            self.plan = {name: torch.empty_like(tensor, device=self.device) for name, tensor in plan.items()}
            if self.source.resident is None:
                shape = (*plan["index"].shape[1:], *self.source.array.shape[2:])
                self.buffer = torch.zeros(shape, device=self.device)
        for name, tensor in plan.items():
            assert self.plan[name].shape == tensor.shape, "a fold's rows do not change between epochs"
            self.plan[name].copy_(tensor)
        self.rates.copy_(torch.tensor([fold.lr for fold in self.folds]))
        self.total.zero_()
        self.at.zero_()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The step as a graph, captured in the first epoch."""
        if self.captured is None:
            with torch.cuda.device(self.device), self.kept():
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(WARM_UP):
                        self.at.zero_()  # an epoch may be shorter than the warm-up
                        self.step()
                torch.cuda.current_stream().wait_stream(side)
                self.captured = torch.cuda.CUDAGraph()
                # On the warm-up's stream: cuBLAS makes a handle and workspace per stream, which a capture cannot.
                with torch.cuda.graph(self.captured, stream=side):
                    self.step()
        return self.captured

    def step(self) -> None:
        """One step of every fold that has one left, entirely on the device: the plan says which samples are next."""
        plan = self.plan
        index, count = (plan[name].index_select(0, self.at).squeeze(0) for name in ("index", "count"))  # (K, B), (K,)
        valid = torch.arange(index.shape[1], device=self.device) < count[:, None]
        rows, views = plan["rows"][index], plan["views"][index]
        resident = self.source.resident
        x = self.buffer if resident is None else resident[rows, views].float()
        # Not torch.where with a number: that copies the number from host memory, which a capture cannot.
        labels = self.first.device_labels[rows].masked_fill(~valid[..., None], -1)
        leaves = self._leaves()
        loss, means, variances = self.forward(self, leaves, x, valid, plan["masks"][index], labels)
        gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
        with torch.no_grad():
            active = count > 0
            self._track(means, variances, count)
            self._update(gradients, active)
            self._take_average(active)
            self.total.add_((loss * count).masked_fill(~active, 0))
            self.at.add_(1)

    def _leaves(self) -> dict[str, torch.Tensor]:
        """What gradients are taken of: matrices in the precision they are multiplied in, vectors as they are.

        Left to autocast, a bfloat16 gradient would be widened twice: into the graph and for the optimiser.
        """
        low = self.kind == "bfloat16"
        return {
            name: (w.bfloat16() if low and w.ndim == 3 else w.detach()).requires_grad_()
            for name, w in self.weights.items()
        }

    def _forward(
        self, leaves: Weights, x: torch.Tensor, valid: torch.Tensor, masks: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Losses (K,), and mean and variance (K, F) of each batch norm, from activations (K, B, T, D) or (K, B, E)."""
        low = self.kind == "bfloat16"
        # Without its cache, which would outlive the graph's memory; no weight is cast twice in a step.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low, cache_enabled=False):
            z = x if x.ndim == 3 else embedding(self.first.tail, leaves, x)
            z = F.normalize(z.float(), dim=-1)
            logits, means, variances = head(self.first.tail.head, part(leaves, "head."), z, valid, masks)
        return losses(logits.float(), labels, self.spec, self.terms), means, variances

    def _track(self, means: list[torch.Tensor], variances: list[torch.Tensor], count: torch.Tensor) -> None:
        """Running statistics as torch keeps them: momentum 0.1, the variance unbiased."""
        active = (count > 0)[:, None]
        unbiased = (count / (count - 1).clamp(min=1))[:, None]
        for (i, (mean, variance, tracked)), m, v in zip(self.statistics.items(), means, variances, strict=True):
            momentum = self.first.tail.head[i].momentum
            mean.copy_(torch.where(active, mean.lerp(m, momentum), mean))
            variance.copy_(torch.where(active, variance.lerp(v * unbiased, momentum), variance))
            tracked.add_(active[:, 0])

    def _update(self, gradients: Sequence[torch.Tensor], active: torch.Tensor) -> None:
        """Clip as clip_grad_norm_ does, then AdamW; folds not `active` (K,) are passed over.

        Bytes a parameter in bfloat16: 6 to narrow the weight, 6 to widen the gradient, 4 for its norm, 32 for AdamW
        (reads 4 tensors, writes 4: it stores the scaled gradient). 48 x 72.9 M for five folds is 3.5 GB a step, 0.73 ms
        at the 4.8 TB/s of an H200; fused by hand it would be 30 (24 for weight and moments, 6 for bfloat16 copies).
        """
        assert all(g.is_contiguous() for g in gradients), "fused AdamW goes by memory, not by strides"
        gradients = [g.float() for g in gradients]
        split = [[g[k] for g in gradients] for k in range(len(self.folds))]
        norms = torch.stack(torch._foreach_norm([g for own in split for g in own])).view(len(split), -1)
        scale = ((torch.linalg.vector_norm(norms, dim=1) + 1e-6) / self.spec.clip_norm).clamp(min=1)
        skip = (~active).float()
        self.counts.add_(active[:, None])
        options = self.first.optimizer.param_groups[0]
        for k, own in enumerate(split):
            for share, places in self.groups:

                def of(values: Sequence[torch.Tensor], places: list[int] = places) -> list[torch.Tensor]:
                    return [values[i] for i in places]

                torch._fused_adamw_(
                    of([w[k] for w in self.weights.values()]),
                    of(own),
                    *(of([moment[k] for moment in self.moments[key]]) for key in MOMENTS),
                    [],
                    of(self.counts[k].unbind()),
                    lr=self.rates[k] if share == 1 else self.rates[k] * share,
                    beta1=options["betas"][0],
                    beta2=options["betas"][1],
                    weight_decay=options["weight_decay"],
                    eps=options["eps"],
                    amsgrad=False,
                    maximize=False,
                    grad_scale=scale[k],
                    found_inf=skip[k],
                )

    def _groups(self) -> list[tuple[float, list[int]]]:
        """The places of the weights in each group of one rate, with the group's share of the fold's rate."""
        place = {id(p): i for i, p in enumerate(self.first.moving().values())}
        found = zip(self.first.shares, self.first.optimizer.param_groups, strict=True)
        groups = [(share, [place[id(p)] for p in group["params"] if id(p) in place]) for share, group in found]
        return [(share, places) for share, places in groups if places]

    def _take_average(self, active: torch.Tensor) -> None:
        """Move the running averages one step on; those of folds not `active` (K,) stand still."""
        if not self.averages:
            return
        step = self.counts[:, -1]
        new = 1 - ((1 + step) / (10 + step)).clamp(max=self.spec.ema)
        new = new.masked_fill(~active, 0)
        for average, now in self.averages:
            average.lerp_(now, new.view(-1, *(1,) * (now.ndim - 1)))


def lay_out(draws: Sequence[Draws]) -> dict[str, torch.Tensor]:
    """Draws of K folds joined, and for each step the `count` (S, K) of samples a fold has and their `index` (S, K, B).

    B is the largest step of any fold; where a fold has fewer samples, its last one stands in and is masked.
    """
    steps, width = max(len(d.steps) for d in draws), max(b - a for d in draws for a, b in d.steps)
    start, count = (torch.zeros(steps, len(draws), dtype=torch.long) for _ in range(2))
    offset = 0
    for k, d in enumerate(draws):
        edges = torch.tensor(d.steps)
        start[:, k] = offset
        start[: len(edges), k] += edges[:, 0]
        count[: len(edges), k] = edges[:, 1] - edges[:, 0]
        offset += len(d.rows)
    index = start[..., None] + torch.minimum(torch.arange(width), (count[..., None] - 1).clamp(min=0))
    joined = {name: torch.cat([getattr(d, name) for d in draws]) for name in ("rows", "views", "masks")}
    return joined | {"index": index, "count": count}


def fit_together(
    folds: Sequence[Fold],
    budgets: Sequence[int],
    recorder: Recorder,
    *,
    graph: bool | None = None,
    compile: bool = False,
) -> None:
    """`fold.fit` for several folds at once, an epoch of every unfinished fold at a time.

    Folds may be at different epochs, as after a resume; one that is done leaves, and the rest are stacked anew.
    """
    stack: Stack | None = None
    while running := [fold for fold in folds if not finished(fold, budgets)]:
        # After a resume some folds may still train the head alone; they catch up first.
        running = [fold for fold in running if fold.head_only] or running
        if stack is None or stack.folds != running or stack.source is not running[0].source:
            stack = None  # its memory first
            stack = Stack(running, graph=graph, compile=compile)
        for fold, epoch in zip(running, run_epoch(stack, recorder.stop), strict=True):
            take_snapshots(fold, budgets, recorder)
            recorder.epoch(fold, epoch)
    for fold in folds:
        take_snapshots(fold, budgets, recorder)


def run_epoch(stack: Stack, stop: Callable[[], bool] = bool) -> Iterator[Epoch]:
    """Train one epoch of every fold of a stack, then validate them one by one; a line of history each.

    A fold's seconds are its share of the training and its own validation, so that they add up to the time taken.
    """
    began, folds = time.perf_counter(), stack.folds
    starts = [weights_before(fold) for fold in folds]
    for fold in folds:
        fold.set_rate()
    means = stack.train_epoch(stack.draw(), stop)
    share = (time.perf_counter() - began) / len(folds)
    for fold, loss, start in zip(folds, means, starts, strict=True):
        epoch = fold.finish_epoch(loss, time.perf_counter() - share)
        require_moved(fold, start)
        yield epoch
