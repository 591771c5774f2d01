"""What an epoch leaves to chance: the order and view of its samples, and the dropout masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import TrainSpec
from ..models.tail import HEAD_WIDTHS


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Everything an epoch leaves to chance, drawn at its start: order and view of the samples (n,), dropout masks
    (n, M) bool in that order, and the (start, end) of each step."""

    rows: torch.Tensor
    views: torch.Tensor
    masks: torch.Tensor
    steps: list[tuple[int, int]]


def draw(generator: torch.Generator, rows: torch.Tensor, spec: TrainSpec, *, views: int) -> Draws:
    """Draw one epoch over `rows`; a last step of one sample joins its neighbour (batch norm needs two)."""
    n = len(rows)
    whole = spec.shuffle == "full"
    order = rows[torch.randperm(n, generator=generator)] if whole else order_by_block(generator, rows, spec)
    flips = torch.zeros(n, dtype=torch.long)
    if spec.flip and views > 1:
        flips = torch.randint(0, 2, (n,), generator=generator)
    edges = list(range(0, n, spec.batch_size))
    if n - edges[-1] == 1 and len(edges) > 1:
        edges.pop()
    steps = list(zip(edges, [*edges[1:], n], strict=True))
    return Draws(rows=order, views=flips, masks=draw_masks(generator, n, spec.dropout), steps=steps)


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
