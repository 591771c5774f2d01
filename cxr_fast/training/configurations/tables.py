"""What a run records of every configuration: tables over configurations and seeds, histories, folds, predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import SweepSpec
from ...grid.axes import SEED
from ...metrics import figures
from ...metrics.rarity import group_maps
from ...system.files import write_csv
from .choose import Chosen, group_by_point, score_seeds

if TYPE_CHECKING:
    from ..dataset import Data
    from ..search import Trained

Values = dict[str, Any]


def grid_table(configurations: Sequence[Trained], chosen: Trained, data: Data, spec: SweepSpec) -> list[Values]:
    """One row per configuration, best first: what differs, its best budget, mean and spread over folds, mAP of head,
    medium and tail classes out of fold, seconds."""
    rows = []
    for trained in configurations:
        budget, dev = trained.best_budget, data.assignment >= 0
        rows.append(
            {
                "config": trained.number,
                **trained.changes,
                "epochs": spec.epochs[budget],
                "mean_auc": np.nanmean(trained.scores[budget]),
                "std_auc": np.nanstd(trained.scores[budget]),
                **group_maps(data.labels[dev], trained.probabilities[budget][dev]),
                "seconds": trained.seconds,
                "chosen": trained is chosen,
            }
        )
    return sorted(rows, key=lambda row: (-row["mean_auc"], row["config"]))


def seed_table(configurations: Sequence[Trained], chosen: Chosen, data: Data, spec: SweepSpec) -> list[Values]:
    """One row per point over its seeds, best first; empty where each point has one seed.

    What differs, the number of seeds, the budget with the highest mean, and there over seeds: mean, spread (sample
    standard deviation), least and highest of the validation macro AUC (a mean over folds), mean and spread of the
    out-of-fold macro average precision. `config` is the configuration of the first seed.
    """
    groups, dev = group_by_point(configurations), data.assignment >= 0
    if all(len(group) == 1 for group in groups):
        return []
    rows = []
    for group in groups:
        scores = score_seeds(group)
        budget = int(np.nanargmax(scores.mean(axis=0)))
        found, labels = scores[:, budget], data.labels[dev]
        maps = [figures.macro(figures.average_precision(labels, each.probabilities[budget][dev]))[0] for each in group]
        rows.append(
            {
                "config": group[0].number,
                **{name: value for name, value in group[0].changes.items() if name != SEED},
                "seeds": len(group),
                "epochs": spec.epochs[budget],
                "mean_auc": found.mean(),
                "std_auc": found.std(ddof=1) if len(group) > 1 else np.nan,
                "min_auc": found.min(),
                "max_auc": found.max(),
                "mean_map": np.mean(maps),
                "std_map": np.std(maps, ddof=1) if len(group) > 1 else np.nan,
                "chosen": chosen.trained in group,
            }
        )
    return sorted(rows, key=lambda row: (-row["mean_auc"], row["config"]))


def write_grid(folder: Path, configurations: Sequence[Trained], run: Values, assignments: np.ndarray) -> None:
    """Write `grid.csv`, `seeds.csv` where there are several, and what is kept of every configuration.

    `grid_history.csv` and `grid_folds.csv` hold history and folds. `grid.npz` has the out-of-fold predictions at the
    best budget, `out_of_fold` (configurations, N, C), the budgets, `epochs`, and the folds, `fold` (configurations, N),
    of `assignments`, and the numbers, `config`; images and labels are those of `predictions.npz`.
    """
    write_table(folder / "grid.csv", run["grid"])
    write_table(folder / "seeds.csv", run.get("seeds", []))
    lines = [
        {"config": trained.number, "fold": k, **asdict(epoch)}
        for trained in configurations
        for k, history in enumerate(trained.histories)
        for epoch in history
    ]
    write_table(folder / "grid_history.csv", lines)
    epochs = run["spec"]["epochs"]
    folds = [
        {"config": trained.number, "fold": k, **{f"auc_{b}": trained.scores[i, k] for i, b in enumerate(epochs)}}
        for trained in configurations
        for k in range(len(trained.histories))
    ]
    write_table(folder / "grid_folds.csv", folds)
    best = np.stack([trained.probabilities[trained.best_budget] for trained in configurations])
    budgets = np.array([epochs[trained.best_budget] for trained in configurations])
    numbers = np.array([trained.number for trained in configurations])
    np.savez_compressed(folder / "grid.npz", out_of_fold=best, epochs=budgets, fold=assignments, config=numbers)


def write_table(path: Path, rows: list[Values]) -> None:
    """Write rows as a CSV file with the names of the first as its header; no file where there are none."""
    if rows:
        write_csv(path, list(rows[0]), ([row[name] for name in rows[0]] for row in rows))
