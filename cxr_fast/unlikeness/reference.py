"""Unlikeness as torch computes it, with which a model file is compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from .features import pool_activations
from .record import RunUnlikeness

# How far a model file's unlikeness may be from torch's, by `furthest`.
LIMITS = {"fp32": 1e-3, "fp16": 0.02, "int8": 0.02}


@contextmanager
def watch_features(kept: RunUnlikeness | None, visual: Any) -> Iterator[list[np.ndarray]]:
    """Add the features (B, F) of each batch that goes through the tower `visual` meanwhile to the list it gives."""
    seen: list[np.ndarray] = []
    if kept is None:
        yield seen
        return
    source = kept.source

    def keep(_: Any, inputs: Any, output: Any = None) -> None:
        found = output if source.block is None else inputs[0]
        seen.append(pool_activations(found.detach().cpu().numpy(), source))

    if source.block is None:
        handle = visual.register_forward_hook(keep)
    else:
        handle = visual.trunk.blocks[source.block].register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def measure_seen(kept: RunUnlikeness | None, seen: Sequence[np.ndarray], *, both_views: bool) -> np.ndarray | None:
    """Return the unlikeness (N,) float64 of the features seen; with `both_views` each second batch is of the mirrored
    films, and does not count."""
    return None if kept is None else kept.distance.measure(np.concatenate(seen[:: 2 if both_views else 1]))


def furthest(found: np.ndarray, want: np.ndarray) -> float:
    """Return the largest difference of two unlikenesses (N,), as a share of `want` or of 1, whichever is larger; NaN
    where one is NaN."""
    return float(np.max(np.abs(found - want) / np.maximum(want, 1)))


def describe_output(kept: RunUnlikeness) -> dict[str, Any]:
    """Return `cxr.unlikeness` of a model file: no feature of any film, and no film."""
    return {key: value for key, value in kept.record.items() if key != "sha256"}
