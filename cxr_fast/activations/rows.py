"""Several arrays read as one: the activations of a sharded cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


class Rows:
    """`parts` (n_k, V, ...) of one row shape and dtype, end to end, read-only.

    Takes what the trainer asks of an array: a row number, a slice of rows, or (rows, views) index arrays. Only the
    rows asked for are read; `np.asarray` reads them all.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        assert len({(part.shape[1:], part.dtype) for part in parts}) == 1, "parts of different kinds"
        self.parts = tuple(parts)
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        self.dtype = parts[0].dtype
        self.shape: tuple[int, ...] = (int(self.starts[-1]), *parts[0].shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(part.nbytes for part in self.parts)

    def __len__(self) -> int:
        return self.shape[0]

    def place(self, row: int) -> tuple[int, int]:
        """The part that holds a row, and the row's number in it. IndexError outside."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return part, int(row - self.starts[part])

    def by_part(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each part that holds any of `rows` (n,): its number, the places in `rows`, and the rows in the part."""
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of {len(self)}")
        parts = np.searchsorted(self.starts, rows, side="right") - 1
        for part in np.unique(parts):
            places = np.flatnonzero(parts == part)
            yield int(part), places, rows[places] - self.starts[part]

    def __getitem__(self, key: Any) -> np.ndarray:
        if isinstance(key, int | np.integer):
            part, row = self.place(int(key) + (len(self) if key < 0 else 0))
            return np.asarray(self.parts[part][row])
        rows, rest = key if isinstance(key, tuple) else (key, None)
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        rest = None if rest is None else np.broadcast_to(np.asarray(rest), rows.shape)
        out = np.empty((len(rows), *self.shape[1 if rest is None else 2 :]), self.dtype)
        for part, places, inside in self.by_part(rows):
            out[places] = self.parts[part][inside] if rest is None else self.parts[part][inside, rest[places]]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self.parts).astype(dtype or self.dtype, copy=False)
