"""Count images, groups and positives of each class in every part of a split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .given import HOLDOUT


def fold_table(
    labels: np.ndarray,
    assignment: np.ndarray,
    classes: Sequence[str],
    groups: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Rows of a table: images, groups (where given), then positive images of each class, for every part.

    labels (N, C), assignment (N,) as `split` returns it, C class names. Keys: class (a name, or "(images)",
    "(groups)"), total, fold_0 ... fold_K-1, holdout (only where there is one), and empty_folds: the parts without
    a positive, space-separated, empty when there are none.
    """
    columns = {f"fold_{k}": assignment == k for k in range(int(assignment.max()) + 1)}
    if (assignment == HOLDOUT).any():
        columns["holdout"] = assignment == HOLDOUT
    rows = [_row("(images)", len(assignment), {name: int(part.sum()) for name, part in columns.items()})]
    if groups is not None:
        ids = np.unique(np.asarray(list(groups), dtype=str), return_inverse=True)[1].reshape(-1)
        counts = {name: len(np.unique(ids[part])) for name, part in columns.items()}
        rows.append(_row("(groups)", int(np.max(ids)) + 1, counts))
    positive = np.asarray(labels) == 1
    for c, name in enumerate(classes):
        counts = {column: int(positive[part, c].sum()) for column, part in columns.items()}
        rows.append(_row(name, int(positive[:, c].sum()), counts))
    return rows


def _row(name: str, total: int, counts: dict[str, int]) -> dict[str, Any]:
    empty = " ".join(column for column, count in counts.items() if not count)
    return {"class": name, "total": total, **counts, "empty_folds": empty}
