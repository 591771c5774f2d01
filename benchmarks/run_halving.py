"""What successive halving would have chosen in a search that was trained in full, what it loses and what it saves.

    python benchmarks/run_halving.py --run exports/search [--trials 8] [--draws 300]

The run is one of `cxrfast sweep --trials N --grid ...`, whose folds at every budget are in `grid_folds.csv`. One run
of a fold passes through every budget, so what halving would have trained is in it exactly. For each seed and each of
`draws` random choices of `trials` configurations: halving keeps the best half (or third) at each budget, by mean
validation macro AUC so far, and its choice is compared with the choice after training all. Beside it stands the
simplest way to spend less: fewer configurations, all trained in full. A loss is a difference of validation macro AUC.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import common
import numpy as np


def read_scores(run: Path) -> tuple[list[int], dict[int, np.ndarray]]:
    """The budgets, and for each seed the mean validation macro AUC (configurations, budgets)."""
    info = json.loads((run / "run.json").read_text(encoding="utf-8"))
    epochs = info["spec"]["epochs"]
    seeds = {row["config"]: row.get("seed", 0) for row in info["grid"]}
    folds: dict[int, list[list[float]]] = defaultdict(list)
    with open(run / "grid_folds.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            folds[int(row["config"])].append([float(row[f"auc_{budget}"] or "nan") for budget in epochs])
    found: dict[int, list[np.ndarray]] = defaultdict(list)
    for config in sorted(folds):
        found[seeds[config]].append(np.nanmean(folds[config], axis=0))
    return epochs, {seed: np.stack(rows) for seed, rows in found.items()}


def halve(scores: np.ndarray, epochs: list[int], part: int) -> tuple[float, float]:
    """What is lost by keeping one of `part` configurations at each budget, and the share of the epochs it trains."""
    alive, trained, before = np.arange(len(scores)), 0, 0
    for place, budget in enumerate(epochs):
        trained, before = trained + len(alive) * (budget - before), budget
        if place < len(epochs) - 1:
            order = np.argsort(-scores[alive, : place + 1].max(axis=1), kind="stable")
            alive = alive[order[: max(math.ceil(len(alive) / part), 1)]]
    return float(scores.max() - scores[alive].max()), trained / (len(scores) * epochs[-1])


def describe(losses: list[float], cost: float) -> dict[str, float]:
    """Mean, 95th percentile and largest loss, how often the choice is the same, and the share of epochs trained."""
    values = np.array(losses)
    return {
        "epochs": cost,
        "loss_mean": float(values.mean()),
        "loss_p95": float(np.quantile(values, 0.95)),
        "loss_max": float(values.max()),
        "same_choice": float((values == 0).mean()),
    }


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    epochs, seeds = read_scores(args.run)
    rng = np.random.default_rng(0)
    draws = [
        scores[rng.choice(len(scores), min(args.trials, len(scores)), replace=False)]
        for scores in seeds.values()
        for _ in range(args.draws)
    ]
    found = {}
    for part in (2, 3):
        each = [halve(scores, epochs, part) for scores in draws]
        found[f"halving, one of {part} kept"] = describe(
            [loss for loss, _ in each], float(np.mean([c for _, c in each]))
        )
    for count in range(2, args.trials // 2 + 1):
        losses = [float(scores.max() - scores[:count].max()) for scores in draws]
        found[f"{count} configurations in full"] = describe(losses, count / args.trials)
    print(f"{'':28}{'epochs':>8}{'loss':>9}{'p95':>9}{'max':>9}{'same choice':>13}")
    for name, row in found.items():
        losses = "".join(f"{row[key]:9.4f}" for key in ("loss_mean", "loss_p95", "loss_max"))
        print(f"{name:28}{row['epochs']:8.2f}{losses}{row['same_choice']:13.2f}")
    return {
        "what": "validation macro AUC lost by successive halving, against all configurations trained in full",
        "budgets": epochs,
        "seeds": len(seeds),
        "configurations": len(next(iter(seeds.values()))),
        "trials": args.trials,
        "draws": len(draws),
        "found": found,
    }


if __name__ == "__main__":
    common.run(measure, "halving", __doc__, run=Path, trials=8, draws=300)
