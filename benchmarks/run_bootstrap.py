"""How long the intervals take: bootstrap over groups and paired bootstrap.

    python benchmarks/run_bootstrap.py [--images 1494] [--classes 35] [--resamples 1000] [--rounds 5]

The weighted figures are checked against rows that were really repeated before anything is timed.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np

from cxr_fast.metrics import figures, intervals


def draw(random: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Probabilities of some skill for labels (N, C)."""
    scores = 1.2 * labels + random.normal(size=labels.shape)
    return (1 / (1 + np.exp(-scores))).astype(np.float32)


def naive(labels: np.ndarray, probs: np.ndarray, groups: list[str], resamples: int, seed: int) -> list[float]:
    """Mean AUC of rows really repeated, one resample after another."""
    ids = np.unique(groups, return_inverse=True)[1]
    out = []
    for weights in intervals.group_weights(ids, resamples, seed):
        for column in weights.T:
            rows = np.repeat(np.arange(len(labels)), column)
            out.append(figures.macro(figures.auc(labels[rows], probs[rows]))[0])
    return out


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    # As rare as Indiana's, two images a group.
    random, shares = np.random.default_rng(0), np.geomspace(0.005, 0.4, args.classes)
    labels = np.repeat(random.random((args.images // 2, args.classes)) < shares, 2, axis=0).astype(np.int8)
    groups = [f"p{row // 2}" for row in range(len(labels))]
    probs, other, limit = draw(random, labels), draw(random, labels), np.full(args.classes, 0.5)
    ids = np.unique(groups, return_inverse=True)[1]
    weigh = intervals.weighted_figures(labels, probs, limit)
    drawn = intervals.resample(weigh, ids, intervals.Resampling(resamples=50, seed=1))["auc"]
    assert np.allclose(np.nanmean(drawn, axis=0), naive(labels, probs, groups, 50, 1), rtol=0, atol=1e-12)
    how = intervals.Resampling(resamples=args.resamples, seed=0)
    sides = ((probs, limit), (other, limit))
    arms = {
        "every figure, one run": partial(common.seconds, intervals.bootstrap, labels, probs, groups, limit, how),
        "paired, two runs": partial(common.seconds, intervals.paired_bootstrap, labels, *sides, groups, how),
        "AUC of every class once, as after each epoch": partial(common.seconds, figures.auc, labels, probs),
        "macro AUC alone, rows repeated": partial(common.seconds, naive, labels, probs, groups, args.resamples, 0),
    }
    samples, noise = common.turns(arms, args.rounds)
    size = {"images": len(labels), "classes": args.classes, "resamples": args.resamples}
    return {**size, "seconds": common.spreads(samples, "seconds"), "noise": noise}


if __name__ == "__main__":
    options = {"images": 1494, "classes": 35, "resamples": 1000, "rounds": 5}
    common.run(measure, "bootstrap", __doc__, **options)
