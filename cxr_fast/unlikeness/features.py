"""Frozen features of cached activations, in which films are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..activations.cache import Cache

BATCH = 64  # rows of tokens in memory at once
EPSILON = 1e-8  # of the layer norm: what scale features have does not count, such as the embedding's L2 norm


@dataclass(frozen=True, kw_only=True)
class FeatureSource:
    """Where features are taken: before block `block`, or None for the embedding.

    With `class_token` it is the class token there, else the mean of all tokens.
    """

    block: int | None
    class_token: bool

    @property
    def text(self) -> str:
        """Say it for records and pages."""
        if self.block is None:
            return "embedding"
        return f"{'class token' if self.class_token else 'mean of the tokens'} before block {self.block}"


def find_source(visual: Any, unfreeze_blocks: int) -> FeatureSource:
    """Return the source of a cache made from the tower `visual` and cut `unfreeze_blocks` before its end."""
    trunk = visual.trunk
    block = len(trunk.blocks) - unfreeze_blocks if unfreeze_blocks else None
    return FeatureSource(block=block, class_token=trunk.cls_token is not None)


def pool_activations(activations: np.ndarray, source: FeatureSource) -> np.ndarray:
    """Return features (N, F) float32, not normed, of activations at the cut, (N, T, D) or (N, E)."""
    x = np.asarray(activations, np.float32)
    if source.block is None:
        return x
    return x[:, 0] if source.class_token else x.mean(axis=1, dtype=np.float64).astype(np.float32)


def norm_features(features: np.ndarray) -> np.ndarray:
    """Return float64 features (N, F) of mean 0 and variance 1 in each row: a layer norm without weights."""
    x = np.asarray(features, np.float64)
    x = x - x.mean(axis=1, keepdims=True)
    return x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + EPSILON)


def read_features(cache: Cache, rows: np.ndarray, source: FeatureSource) -> np.ndarray:
    """Return `pool_activations` (n, F) of the plain view of rows (n,) of a cache."""
    out = []
    for start in range(0, len(rows), BATCH):
        part = np.asarray(rows[start : start + BATCH])
        out.append(pool_activations(cache.activations[part, np.zeros_like(part)], source))
    return np.concatenate(out)
