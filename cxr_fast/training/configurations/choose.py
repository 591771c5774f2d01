"""Choose a configuration and its epoch budget by validation scores, over folds and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..search import Trained


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The configuration that was chosen, of the first seed where its point has several, and the place of its budget."""

    trained: Trained
    budget: int


def group_by_point(configurations: Sequence[Trained]) -> list[list[Trained]]:
    """The configurations of each point side by side: one, or one for each seed, in their order."""
    groups: dict[int, list[Trained]] = {}
    for trained in configurations:
        groups.setdefault(trained.point.group, []).append(trained)
    return list(groups.values())


def score_seeds(group: Sequence[Trained]) -> np.ndarray:
    """Validation macro AUC of each seed at each budget, a mean over folds: (seeds, budgets)."""
    return np.stack([np.nanmean(trained.scores, axis=1) for trained in group])


def choose_configuration(configurations: Sequence[Trained]) -> Chosen:
    """The point and budget with the highest validation macro AUC, a mean over folds and seeds; the first of equals."""
    groups = group_by_point(configurations)
    means = [score_seeds(group).mean(axis=0) for group in groups]
    best = max(range(len(groups)), key=lambda g: float(np.nanmax(means[g])))
    return Chosen(trained=groups[best][0], budget=int(np.nanargmax(means[best])))
