"""A cache as a torch `Dataset`, for training loops of one's own."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from ..data.labels import SOFT, UNCERTAIN, UNKNOWN


class EncodedFilms(Protocol):
    """What the dataset reads of a `Cache`."""

    ok: np.ndarray
    header: Any

    @property
    def activations(self) -> Any:
        """(N, V, T, D) or (N, V, E)."""
        ...


class CacheDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Encoded films of a cache: (activations, labels) of one film, float32 (T, D) or (E,), and (C,).

    A label is 1, 0, NaN where it is unknown, or 0.7 where it is uncertain and soft. `rows` are the rows of the cache,
    those that failed left out; `view` is `plain` or `flip`. It can be pickled, so that a DataLoader may have workers.
    Made by `Cache.dataset`.
    """

    def __init__(self, cache: EncodedFilms, view: int) -> None:
        self.cache, self.view = cache, view
        self.rows = np.flatnonzero(cache.ok)
        self.labels = targets(cache.header.labels[self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"film {index} of {len(self)}")
        row = np.asarray(self.cache.activations[int(self.rows[index])][self.view], np.float32)
        return torch.from_numpy(row), torch.from_numpy(self.labels[index])


def targets(labels: np.ndarray) -> np.ndarray:
    """Labels (N, C) of a cache as targets: 1, 0, NaN for unknown, 0.7 for uncertain ones that are soft; float32."""
    out = labels.astype(np.float32)
    out[labels == UNKNOWN], out[labels == UNCERTAIN] = np.nan, SOFT
    return out
