"""Count answers while they pass by: films called positive and films in each bin, of any number of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..predictor import Result

BLOCK = 256  # rows counted in one call of numpy


class AnswerCounts:
    """How many films were called positive, (C,), and how many lie in each bin of each class, a list of (b,).

    `edges` are those of each class, rising, (b - 1,). `films` counts answered films alone: one that failed has no
    probabilities. Memory does not grow with the rows.
    """

    def __init__(self, thresholds: np.ndarray, edges: Sequence[np.ndarray]) -> None:
        self.films = 0
        self.positives = np.zeros(len(thresholds), np.int64)
        self._thresholds = thresholds
        self._sizes = [len(each) + 1 for each in edges]
        self._edges = np.full((len(edges), max(self._sizes, default=1) - 1), np.inf)
        for row, each in zip(self._edges, edges, strict=True):
            row[: len(each)] = each
        self._counts = np.zeros((len(edges), self._edges.shape[1] + 1), np.int64)
        self._block: list[np.ndarray] = []

    @property
    def bins(self) -> list[np.ndarray]:
        """Films in each bin of each class."""
        self._add_block()
        return [row[:size] for row, size in zip(self._counts, self._sizes, strict=True)]

    def count(self, results: Iterable[Result]) -> Iterator[Result]:
        """Hand on each result, and count it."""
        for result in results:
            if result.probabilities is not None:
                self._block.append(result.probabilities)
                if len(self._block) == BLOCK:
                    self._add_block()
            yield result
        self._add_block()

    def _add_block(self) -> None:
        if not self._block:
            return
        values = np.stack(self._block).astype(np.float64)
        self._block.clear()
        self.films += len(values)
        self.positives += (values >= self._thresholds).sum(axis=0)
        places = (values[:, :, None] >= self._edges).sum(axis=2)
        classes = np.broadcast_to(np.arange(places.shape[1]), places.shape)
        np.add.at(self._counts, (classes, places), 1)
