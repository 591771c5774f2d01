"""How long the intervals take: bootstrap over groups and paired bootstrap; and how true they are.

    python benchmarks/run_bootstrap.py [--images 1494] [--classes 35] [--resamples 1000] [--rounds 5]

The weighted figures are checked against rows that were really repeated before anything is timed. `--coverage 400` also
counts, over that many drawn data sets, how often the 95 % interval holds the true value: of a class, by the number
of groups with a positive, and of the headline figures over rare and common classes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

from cxr_fast.metrics import figures, intervals
from cxr_fast.system import hardware

SKILL = 1.2
LIMIT = 1 / (1 + math.exp(-SKILL / 2))


def data(images: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Labels as rare as Indiana's (0.5 to 40 %), probabilities of some skill, two images a group."""
    random = np.random.default_rng(seed)
    groups = np.arange(images) // 2
    shares = np.geomspace(0.005, 0.4, classes)
    labels = (random.random((groups[-1] + 1, classes)) < shares).astype(np.int8)[groups]
    scores = SKILL * labels + random.normal(size=labels.shape)
    return labels, (1 / (1 + np.exp(-scores))).astype(np.float32), [f"p{g}" for g in groups]


def naive(labels: np.ndarray, probs: np.ndarray, groups: list[str], resamples: int, seed: int) -> list[float]:
    """Macro AUC of rows really repeated, one resample after another."""
    ids = np.unique(groups, return_inverse=True)[1]
    out = []
    for weights in intervals.group_weights(ids, resamples, seed):
        for column in weights.T:
            rows = np.repeat(np.arange(len(labels)), column)
            out.append(figures.macro(figures.auc(labels[rows], probs[rows]))[0])
    return out


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def draw(random: np.random.Generator, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Two images for each row of labels (groups, C); half the variance of the scores is the group's."""
    labels, half = np.repeat(labels, 2, axis=0).astype(np.int8), math.sqrt(0.5)
    shared = np.repeat(random.normal(0, half, labels[::2].shape), 2, axis=0)
    scores = SKILL * labels + shared + random.normal(0, half, labels.shape)
    return labels, 1 / (1 + np.exp(-scores)), [str(i // 2) for i in range(len(labels))]


def covered(
    make: Callable[[int], np.ndarray], names: dict[str, str], times: int, seed: int, groups: int
) -> dict[str, float]:
    """Share of drawn data sets whose interval holds the figure of 400 times as many; make(groups) gives labels."""
    random = np.random.default_rng(seed)
    labels, probs, _ = draw(random, make(400 * groups))
    limits, hit = np.full(labels.shape[1], LIMIT), dict.fromkeys(names, 0)
    whole = figures.headline(labels, probs, limits)
    whole |= figures.per_class(labels, probs, limits, [""] * len(limits))[0]
    for k in range(times):
        found = intervals.bootstrap(*draw(random, make(groups)), limits, intervals.Resampling(resamples=400, seed=k))
        for name, key in names.items():
            low, high = (np.ravel(end)[0] for end in (found[key].low, found[key].high))
            hit[name] += bool(low <= whole[name] <= high)
    return {name: count / times for name, count in hit.items()}


def coverage(times: int) -> dict[str, dict[str, float]]:
    """A class with so many positive groups of 400, and the headline figures of 20 of 0.5 to 40 % in 500 groups."""
    of_class = {name: name for name in ("auc", "ap", "sensitivity", "specificity", "f1")}
    out = {}
    for positive in (2, 3, 5, 10, 20, 50):

        def make(groups: int, positive: int = positive) -> np.ndarray:
            return (np.arange(groups) < positive * groups // 400)[:, None]

        out[f"{positive} positive groups"] = covered(make, of_class, times, positive, 400)
    random, shares = np.random.default_rng(0), np.geomspace(0.005, 0.4, 20)
    every = {name: name for name in figures.HEADLINE if name not in ("brier", "ece")}  # per_class has those names
    out["20 classes"] = covered(lambda groups: random.random((groups, 20)) < shares, every, times, 1, 500)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1494)
    parser.add_argument("--classes", type=int, default=35)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--coverage", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    labels, probs, groups = data(args.images, args.classes, 0)
    other = data(args.images, args.classes, 1)[1]
    thresholds = np.full(args.classes, 0.5)
    ids = np.unique(groups, return_inverse=True)[1]
    weigh = intervals.weighted_figures(labels, probs, thresholds)
    drawn = intervals.resample(weigh, ids, intervals.Resampling(resamples=50, seed=1))["macro_auc"]
    assert np.allclose(drawn, naive(labels, probs, groups, 50, 1), rtol=0, atol=1e-12)
    how = intervals.Resampling(resamples=args.resamples)
    arms: dict[str, Callable[[], object]] = {
        "every figure, one run": lambda: intervals.bootstrap(labels, probs, groups, thresholds, how),
        "paired, two runs": lambda: intervals.paired_bootstrap(
            labels, (probs, thresholds), (other, thresholds), groups, how
        ),
        "AUC of every class once, as after each epoch": lambda: figures.auc(labels, probs),
        "macro AUC alone, rows repeated": lambda: naive(labels, probs, groups, args.resamples, 0),
    }
    found: dict[str, list[float]] = {name: [] for name in arms}
    with hardware.other_cpu_share() as noise:
        for _ in range(args.rounds):
            for name, work in arms.items():
                found[name].append(seconds(work))
    spreads = {name: common.spread(values) for name, values in found.items()}
    common.show(spreads, "seconds")
    if noise.noisy:
        print(f"NOISY: other processes took {noise.share:.0%} of the machine")
    result: dict[str, Any] = {"images": args.images, "classes": args.classes, "resamples": args.resamples}
    result |= {"seconds": spreads, "noise": {"share": noise.share, "noisy": noise.noisy}}
    if args.coverage:
        result["coverage"] = {"times": args.coverage, "nominal": 0.95, **coverage(args.coverage)}
        for name, shares in result["coverage"].items():
            print(name, shares)
    common.save("bootstrap", result, args.json)


if __name__ == "__main__":
    main()
