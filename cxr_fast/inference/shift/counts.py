"""Count values while they pass by: films at or over a threshold, and films in each bin, of any number of rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BLOCK = 256  # rows counted in one call of numpy


class AnswerCounts:
    """How many films reach each threshold, (C,), and how many lie in each bin of each column, a list of (b,).

    `edges` are those of each column, rising, (b - 1,). Memory does not grow with the rows.
    """

    def __init__(self, thresholds: np.ndarray, edges: Sequence[np.ndarray]) -> None:
        self._films = 0
        self._positives = np.zeros(len(thresholds), np.int64)
        self._thresholds = thresholds
        self._sizes = [len(each) + 1 for each in edges]
        self._edges = np.full((len(edges), max(self._sizes, default=1) - 1), np.inf)
        for row, each in zip(self._edges, edges, strict=True):
            row[: len(each)] = each
        self._counts = np.zeros((len(edges), self._edges.shape[1] + 1), np.int64)
        self._block: list[np.ndarray] = []

    def add(self, values: np.ndarray) -> None:
        """Count the values (C,) of one film."""
        self._block.append(values)
        if len(self._block) == BLOCK:
            self._add_block()

    @property
    def films(self) -> int:
        """Films that were counted."""
        return self._films + len(self._block)

    @property
    def positives(self) -> np.ndarray:
        """Films at or over each threshold, (C,)."""
        self._add_block()
        return self._positives

    @property
    def bins(self) -> list[np.ndarray]:
        """Films in each bin of each column."""
        self._add_block()
        return [row[:size] for row, size in zip(self._counts, self._sizes, strict=True)]

    def _add_block(self) -> None:
        if not self._block:
            return
        values = np.stack(self._block).astype(np.float64)
        self._block.clear()
        self._films += len(values)
        self._positives += (values >= self._thresholds).sum(axis=0)
        places = (values[:, :, None] >= self._edges).sum(axis=2)
        columns = np.broadcast_to(np.arange(places.shape[1]), places.shape)
        np.add.at(self._counts, (columns, places), 1)
