"""The head alone, on a CPU: a step written out by hand, folds side by side on the cores.

With nothing unfrozen a step is 30 MFLOP in some forty small operations, so that what calls them costs time too.
Here the gradient is written out, all parameters lie in one array, and the steps run in TorchScript where torch has
it, which holds no interpreter lock: two folds train on two cores. `Fold` is the slow twin it is tested against.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ...config import TrainSpec
from ...data.labels import UNCERTAIN, UNKNOWN
from ...errors import Interrupted
from ...models.tail import HEAD_WIDTHS, Tail
from .draws import Draws
from .fold import Fold
from .loop import Recorder, finished, require_moved, take_snapshots, weights_before
from .losses import JACCARD_SHARE, SMOOTH, ClassTerms, other_share

# Steps between two looks at whether to stop, and gathered at once.
CHUNK = 256


class HeadFold(Fold):
    """A `Fold` with nothing unfrozen on a CPU, in float32, on one thread; the same draws, states and snapshots."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        assert self.device.type == "cpu"
        assert not len(self.tail.blocks)
        parameters = self.tail.trainable()
        count = sum(p.numel() for p in parameters)
        self.flat, self.gradient, self.mean, self.square = (torch.zeros(count) for _ in range(4))
        self.parts, self.gradient_parts = _views(self.flat, parameters), _views(self.gradient, parameters)
        moments = zip(_views(self.mean, parameters), _views(self.square, parameters), strict=True)
        for p, part, (mean, square) in zip(parameters, self.parts, moments, strict=True):
            p.data = part.copy_(p.data)
            self.optimizer.state[p] |= {"exp_avg": mean, "exp_avg_sq": square}
        self.flat_average = torch.zeros(count if self.average is not None else 0)
        if self.average is not None:
            own = list(self.average.head.parameters())
            for p, part in zip(own, _views(self.flat_average, own), strict=True):
                p.data = part.copy_(p.data)

    def train_epoch(self, draws: Draws, stop: Callable[[], bool] = bool) -> float:
        """Train on one epoch's draws; the mean loss. Raises Interrupted between two chunks of steps."""
        states = list(self.optimizer.state.values())
        count = states[0]["step"].clone()
        total = 0.0
        with torch.no_grad():
            chunks = [draws.steps[first : first + CHUNK] for first in range(0, len(draws.steps), CHUNK)]
            parts = [slice(chunk[0][0], chunk[-1][1]) for chunk in chunks]
            ahead = self.activations.ahead((draws.rows[part], draws.views[part]) for part in parts)
            for x, chunk in zip(ahead, chunks, strict=True):
                if stop():
                    raise Interrupted("stopped.")
                total += self._chunk(x, draws, chunk, count)
        for state in states:
            state["step"].copy_(count)
        for layer in self.tail.head:
            if isinstance(layer, torch.nn.BatchNorm1d):
                assert layer.num_batches_tracked is not None
                layer.num_batches_tracked += len(draws.steps)
        return total / len(draws.rows)

    def _chunk(self, x: torch.Tensor, draws: Draws, steps: list[tuple[int, int]], count: torch.Tensor) -> float:
        """Some consecutive steps on their activations (n, E); the sum of their samples' losses."""
        part, sizes = slice(steps[0][0], steps[-1][1]), [b - a for a, b in steps]
        # Embeddings are cached as the projection leaves them; the tail takes their length out, and so must this.
        x = F.normalize(x, dim=-1)
        masks = draws.masks[part].float().div_(1 - self.spec.dropout).split(HEAD_WIDTHS, dim=1)
        targets = _targets(self.targets[draws.rows[part]], sizes, self.spec, self.terms)
        loss, spec = _Loss.of(self.spec), self.spec
        total: torch.Tensor = _compiled()(
            self.parts,
            self.gradient_parts,
            *(_statistics(tail) for tail in (self.tail, self.average)),
            *([t] for t in (self.flat, self.gradient, self.mean, self.square, count, self.flat_average)),
            *(list(t.split(sizes, -2)) for t in (x, *(m.contiguous() for m in masks), *targets)),
            self.lr,
            spec.weight_decay,
            spec.clip_norm,
            spec.ema,
            loss.gamma_pos,
            loss.gamma_neg,
            loss.clip,
            SMOOTH if spec.loss == "focal+jaccard" else 0.0,
        )
        return float(total)


def _views(flat: torch.Tensor, shapes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Consecutive parts of a flat array in the shapes of the given tensors."""
    parts = flat.split([t.numel() for t in shapes])
    return [part.view(t.shape) for part, t in zip(parts, shapes, strict=True)]


def _statistics(tail: Tail | None) -> list[torch.Tensor]:
    """Running mean and variance of each batch norm of a head."""
    norms = [] if tail is None else [layer for layer in tail.head if isinstance(layer, torch.nn.BatchNorm1d)]
    return [stat for norm in norms for stat in (norm.running_mean, norm.running_var) if stat is not None]


class _Loss(NamedTuple):
    """The loss of an entry whose label has probability p: -(1 - q)^gamma log q with q = min(p + clip, 1), gamma by the
    label, the clip for negatives alone; below 0 nothing is clipped."""

    gamma_pos: float
    gamma_neg: float
    clip: float

    @staticmethod
    def of(spec: TrainSpec) -> _Loss:
        """Read exponents and clip of the spec's loss; cross entropy has exponents of 0."""
        if spec.loss == "asl":
            return _Loss(spec.asl_gamma_pos, spec.asl_gamma_neg, spec.asl_clip)
        gamma = spec.focal_gamma if spec.loss in ("focal", "focal+jaccard") else 0.0
        return _Loss(gamma, gamma, -1.0)


def _targets(labels: torch.Tensor, sizes: list[int], spec: TrainSpec, terms: ClassTerms) -> tuple[torch.Tensor, ...]:
    """What the loss needs of the labels (n, C), made once for many steps; with label smoothing or uncertain labels, of
    the labels and of their opposites, (2, n, C).

    sign: +1 for a positive, else -1. weight: an entry's factor in its step's mean loss, 0 where unknown. shift: what is
    added to its logit. jaccard (n, C): an image's factor in the mean soft Jaccard at its known classes, else 0.
    """
    known, positive, certain = labels != UNKNOWN, labels > 0, labels >= 0
    if terms.soft:
        positive |= labels == UNCERTAIN
    has_label, parts = certain.any(1), torch.tensor(sizes)
    step = torch.repeat_interleave(torch.arange(len(sizes)), parts)
    entries, images = (
        torch.zeros(len(sizes), dtype=torch.long).index_add_(0, step, t).clamp_(min=1)
        for t in (known.sum(1), has_label.long())
    )
    share = JACCARD_SHARE if spec.loss == "focal+jaccard" else 0.0
    factor = ((1 - share) / entries[step])[:, None]

    def of(
        positive: torch.Tensor, portion: torch.Tensor | float | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight = known.float()
        if spec.loss in ("focal", "focal+jaccard"):
            weight *= torch.where(positive, spec.focal_alpha, 1 - spec.focal_alpha)
        if terms.weights is not None:
            weight *= terms.weights
        weight *= factor
        shift = torch.zeros(weight.shape if terms.prior is not None or terms.margin is not None else (len(weight), 0))
        if terms.prior is not None:
            shift += terms.prior
        if terms.margin is not None:
            shift -= positive * terms.margin
        return positive.float().mul_(2).sub_(1), weight if portion is None else weight * portion, shift

    jaccard = certain * (share / images[step])[:, None]
    if not (spec.label_smoothing or terms.soft):
        return *of(positive, None), jaccard
    portion = other_share(labels, spec, terms)
    both = zip(of(positive, 1 - portion), of(~positive, portion), strict=True)
    sign, weight, shift = (torch.stack(pair) for pair in both)
    return sign, weight, shift, jaccard


def _entry_losses(
    logits: torch.Tensor,
    sign: torch.Tensor,
    weight: torch.Tensor,
    gamma: float,
    gamma_neg: float,
    clipped: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of the entries' losses, and its gradient (n, C) by the logits; see `_Loss` and `_targets`."""
    # With u = +-logit, p = sigmoid(u): loss = -w (1-p)^gamma log p, gradient w (1-p)^gamma (gamma p log p - (1-p)).
    u = logits * sign
    log_p = torch.nn.functional.logsigmoid(u)
    miss = (log_p - u).exp_()
    if clipped < 0.0:
        factor = weight * (miss * miss if gamma == 2.0 else miss.pow(gamma))
        loss = (factor * log_p).sum().neg_()
        d = torch.addcmul(miss.neg_(), log_p.exp(), log_p, value=gamma).mul_(factor).mul_(sign)
    else:
        # q = p, for a negative min(p + clip, 1), and m = 1 - q: loss = -w m^gamma log q,
        # gradient w m^(gamma-1) (gamma log q - m / q) p (1-p), 0 where q is clipped.
        yes = sign > 0
        m = torch.where(yes, miss, (miss - clipped).clamp_(min=0))
        log_q = torch.where(yes, log_p, torch.log1p(-m) if clipped > 0.0 else log_p)
        power = torch.where(yes, m.pow(gamma), m.pow(gamma_neg))
        loss = (weight * power * log_q).sum().neg_()
        # p / q as a difference of logarithms: both vanish for a positive far below 0.
        inner = power * (log_p - log_q).exp_() * miss
        before = torch.where(yes, gamma * m.pow(max(gamma - 1.0, 0.0)), gamma_neg * m.pow(max(gamma_neg - 1.0, 0.0)))
        d = before * log_q * log_p.exp() * miss - inner
        d = d.mul_(weight).mul_(sign).mul_(m > 0)
    return loss, d.sum(0) if d.dim() == 3 else d


def _steps(
    parts: list[torch.Tensor],
    gradients: list[torch.Tensor],
    statistics: list[torch.Tensor],
    averaged: list[torch.Tensor],
    flat: list[torch.Tensor],
    gradient: list[torch.Tensor],
    mean: list[torch.Tensor],
    square: list[torch.Tensor],
    count: list[torch.Tensor],
    average: list[torch.Tensor],
    xs: list[torch.Tensor],
    masks1: list[torch.Tensor],
    masks2: list[torch.Tensor],
    signs: list[torch.Tensor],
    weights: list[torch.Tensor],
    shifts: list[torch.Tensor],
    jaccards: list[torch.Tensor],
    lr: float,
    decay: float,
    clip: float,
    ema: float,
    gamma: float,
    gamma_neg: float,
    clipped: float,
    smooth: float,
) -> torch.Tensor:
    """Forward, gradient, clipping, AdamW and running average for each step; the sum of the samples' losses.

    Parameters in the order weight, bias, scale, shift of each hidden layer, then weight and bias. The biases before
    the batch norms have no gradient: it subtracts them.
    """
    w1, b1, g1, s1, w2, b2, g2, s2, w3, b3 = parts
    t1, t2, t3 = w1.t(), w2.t(), w3.t()
    total = torch.zeros([])
    for i in range(len(xs)):
        x, sign, weight = xs[i], signs[i], weights[i]
        # Not addmm: TorchScript takes that apart, and then rounds otherwise than plain Python.
        z1 = torch.mm(x, t1).add_(b1)
        y1, mean1, r1 = torch.native_batch_norm(z1, g1, s1, statistics[0], statistics[1], True, 0.1, 1e-5)
        y1.relu_()
        h1 = y1 * masks1[i]
        z2 = torch.mm(h1, t2).add_(b2)
        y2, mean2, r2 = torch.native_batch_norm(z2, g2, s2, statistics[2], statistics[3], True, 0.1, 1e-5)
        y2.relu_()
        h2 = y2 * masks2[i]
        logits = torch.mm(h2, t3).add_(b3)
        if shifts[i].size(-1) > 0:
            logits = logits + shifts[i]
        loss, d = _entry_losses(logits, sign, weight, gamma, gamma_neg, clipped)
        if smooth > 0.0:
            share = jaccards[i]
            known = (share > 0).float()
            own = sign[0] if sign.dim() == 3 else sign
            p, y = torch.sigmoid(logits) * known, (own > 0).float() * known
            both = (p * y).sum(1, keepdim=True) + smooth
            union = p.sum(1, keepdim=True) + y.sum(1, keepdim=True) - both + 2 * smooth
            loss = loss + (share.amax(1, keepdim=True) * (1 - both / union)).sum()
            d = d - share * (y * union - both * (1 - y)) / (union * union) * p * (1 - p)
        total.add_(loss * x.size(0))
        torch.sum(d, [0], out=gradients[9])
        torch.mm(d.t(), h2, out=gradients[8])
        d2 = torch.ops.aten.threshold_backward(torch.mm(d, w3).mul_(masks2[i]), y2, 0)
        d2, scale2, shift2 = torch.ops.aten.native_batch_norm_backward(
            d2, z2, g2, None, None, mean2, r2, True, 1e-5, [True, True, True]
        )
        gradients[6].copy_(scale2)
        gradients[7].copy_(shift2)
        torch.mm(d2.t(), h1, out=gradients[4])
        d1 = torch.ops.aten.threshold_backward(torch.mm(d2, w2).mul_(masks1[i]), y1, 0)
        d1, scale1, shift1 = torch.ops.aten.native_batch_norm_backward(
            d1, z1, g1, None, None, mean1, r1, True, 1e-5, [True, True, True]
        )
        gradients[2].copy_(scale1)
        gradients[3].copy_(shift1)
        torch.mm(d1.t(), x, out=gradients[0])
        share_of_clip = clip / (float(torch.dot(gradient[0], gradient[0])) ** 0.5 + 1e-6)
        if share_of_clip < 1.0:
            gradient[0].mul_(share_of_clip)
        count[0].add_(1)
        # Lists made here would look unused to TorchScript, which would then leave the call out.
        torch.ops.aten._fused_adamw_(
            flat,
            gradient,
            mean,
            square,
            [],
            count,
            lr=lr,
            beta1=0.9,
            beta2=0.999,
            weight_decay=decay,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
        if ema > 0.0:
            step = float(count[0])
            share_of_new = 1.0 - min(ema, (1.0 + step) / (10.0 + step))
            average[0].lerp_(flat[0], share_of_new)
            for j in range(len(averaged)):
                averaged[j].lerp_(statistics[j], share_of_new)
    return total


@cache
def _compiled() -> Callable[..., torch.Tensor]:
    """`_steps` in TorchScript, or as it is where torch has that no longer; the arithmetic is the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            scripted: Callable[..., torch.Tensor] = torch.jit.script(_steps)
        except (AttributeError, RuntimeError):
            return _steps
    return scripted


def fit_side_by_side(folds: Sequence[Fold], budgets: Sequence[int], recorder: Recorder, *, threads: int) -> None:
    """`fold.fit` for several folds at once, an epoch of a fold on one thread; the fold least far on goes first, so
    that five folds keep two cores busy to the end. The recorder is called by one thread at a time.
    """
    lock, idle, errors = threading.Lock(), list(range(len(folds))), list[BaseException]()
    before = torch.get_num_threads()
    _compiled()  # here and not in a thread: warnings are silenced meanwhile, which is not safe across threads

    def take() -> int | None:
        with lock:
            waiting = [i for i in idle if not finished(folds[i], budgets)]
            if errors or not waiting:
                return None
            number = min(waiting, key=lambda i: folds[i].epoch)
            idle.remove(number)
            return number

    def work() -> None:
        torch.set_num_threads(1)
        try:
            while (i := take()) is not None:
                start = weights_before(folds[i])
                epoch = folds[i].run_epoch(recorder.stop)
                require_moved(folds[i], start)
                with lock:
                    take_snapshots(folds[i], budgets, recorder)
                    recorder.epoch(folds[i], epoch)
                    idle.append(i)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(min(threads, len(folds)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(before)
    if errors:
        raise errors[0]
    for fold in folds:
        take_snapshots(fold, budgets, recorder)
