"""What an epoch leaves to chance: the order and view of its samples, and the dropout masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...config import TrainSpec
from ...models.tail import HEAD_WIDTHS


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Everything an epoch leaves to chance, drawn at its start: order and view of the samples (n,), dropout masks
    (n, M) bool in that order, and the (start, end) of each step. `seed` is for random numbers of a user's own head."""

    rows: torch.Tensor
    views: torch.Tensor
    masks: torch.Tensor
    steps: list[tuple[int, int]]
    seed: int | None = None


def draw(
    generator: torch.Generator,
    rows: torch.Tensor,
    spec: TrainSpec,
    *,
    views: int,
    weights: torch.Tensor | None = None,
) -> Draws:
    """Draw one epoch over `rows` (n,); a last step of one sample joins its neighbour (batch norm needs two).

    With `weights` (n,) as many rows are drawn by them, with replacement.
    """
    n = len(rows)
    if weights is not None:
        order = rows[torch.multinomial(weights, n, replacement=True, generator=generator)]
    elif spec.shuffle == "full":
        order = rows[torch.randperm(n, generator=generator)]
    else:
        order = order_by_block(generator, rows, spec)
    flips = torch.zeros(n, dtype=torch.long)
    if spec.flip and views > 1:
        flips = torch.randint(0, 2, (n,), generator=generator)
    edges = list(range(0, n, spec.batch_size))
    if n - edges[-1] == 1 and len(edges) > 1:
        edges.pop()
    steps = list(zip(edges, [*edges[1:], n], strict=True))
    return Draws(rows=order, views=flips, masks=draw_masks(generator, n, spec.dropout), steps=steps)


def sampling_weights(labels: np.ndarray, spec: TrainSpec) -> torch.Tensor | None:
    """Weight (n,) float64 of each film's draw from training labels (n, C), sum 1; None where each is drawn once.

    A film belongs to the rarest finding it has, the first of equals, or to "none". `balanced` gives each of these
    groups the same weight, `sqrt` the square root of its number of films; inside a group all films are alike.
    """
    if spec.sampling == "none":
        return None
    positive = labels == 1
    count = np.where(positive.any(axis=0), positive.sum(axis=0), len(labels) + 1)
    group = np.where(positive, count, len(labels) + 2).argmin(axis=1)
    group[~positive.any(axis=1)] = labels.shape[1]
    films = np.bincount(group, minlength=labels.shape[1] + 1)[group]
    weights = 1 / films if spec.sampling == "balanced" else films**-0.5
    return torch.from_numpy(weights / weights.sum())


def order_by_block(generator: torch.Generator, rows: torch.Tensor, spec: TrainSpec) -> torch.Tensor:
    """`rows` (n,) once each: blocks of neighbours in the file permuted, then the rows of a window of blocks.

    Any row of a window may follow any other of it; which blocks share a window is drawn anew at each call.
    """
    n, ordered = len(rows), rows.sort().values
    place = torch.randperm(-(-n // spec.shuffle_block), generator=generator)
    window = place[torch.arange(n) // spec.shuffle_block] // spec.shuffle_window
    mixed = torch.randperm(n, generator=generator)
    return ordered[mixed[window[mixed].argsort(stable=True)]]


def draw_masks(generator: torch.Generator, n: int, p: float) -> torch.Tensor:
    """Bool (n, sum of the hidden widths), false with probability `p` to the nearest of 2**15: 15 bits a value, four
    values a draw: under 2 ns a value, where torch's own Bernoulli takes 12."""
    width = sum(HEAD_WIDTHS)
    if p == 0:
        return torch.ones(n, width, dtype=torch.bool)
    words = torch.empty(n * width // 4, dtype=torch.int64).random_(generator=generator)
    return ((words.view(torch.int16) & 0x7FFF) >= round(p * 2**15)).view(n, width)
