"""How fast each part of a tail learns, and how slowly its running average follows."""

from __future__ import annotations

from torch import nn

from ...config import TrainSpec
from ...models.tail import Tail


def rate_groups(tail: Tail, spec: TrainSpec) -> tuple[float, list[tuple[float, list[nn.Parameter]]]]:
    """The rate of a fold, that of its last block or of a head alone, and groups of parameters with their share of it.

    One group where all have one rate. Norm and projection, where trained, go with the last block.
    """
    if not len(tail.blocks):
        return spec.head_lr or spec.lr, [(1.0, tail.trainable())]
    head = 1.0 if spec.head_lr is None else spec.head_lr / spec.lr
    depth, shares = len(tail.blocks), {1.0: list[nn.Parameter]()}  # the last block's first, which `Fold.lr` reads
    for name, p in tail.named_parameters():
        part, _, rest = name.partition(".")
        below = depth - 1 - int(rest.partition(".")[0]) if part == "blocks" else 0
        if p.requires_grad:
            shares.setdefault(head if part == "head" else spec.layer_decay**below, []).append(p)
    return spec.lr, list(shares.items())


def average_decay(most: float, step: float) -> float:
    """Decay of the running average at a step, counted from 1: little at first, `most` in the end.

    Source: the moving average of TensorFlow's training library, which counts steps in the same way.
    """
    return min(most, (1 + step) / (10 + step))
