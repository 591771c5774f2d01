"""How often the intervals of means over classes hold the truth, of one run and of the difference of two.

    python benchmarks/run_coverage.py [--times 400] [--resamples 200] [--only NAME]

Data sets are drawn from a known population: labels of groups (patients) with common and rare classes, one or two images
a group, scores of some skill, thresholds chosen on other data. The truth of an interval is the mean of the population's
figures over the classes of that very interval.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import common
import numpy as np

from cxr_fast.metrics import figures, intervals
from cxr_fast.metrics.thresholds import best_f1_thresholds

POPULATION = 100_000
SHOWN = ("macro_auc", "map", "macro_f1", "class_jaccard")


@dataclass(frozen=True)
class World:
    """`classes` from `rarest` expected groups with a positive to a `commonest` share; `tied`: how far the findings of a
    patient go together, `skill`: by how many standard deviations a finding raises a score."""

    classes: int
    rarest: float
    groups: int
    images: int
    skill: float
    tied: float
    commonest: float = 0.4

    @property
    def shares(self) -> np.ndarray:
        """Prevalence of each class, (C,)."""
        return np.geomspace(self.rarest / self.groups, self.commonest, self.classes)

    def draw(self, random: np.random.Generator, groups: int, images: int) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Labels (N, C) and the probabilities of two models, the second of less skill; images of a group are alike."""
        shape = (groups, self.classes)
        cuts = np.array([NormalDist().inv_cdf(share) for share in self.shares])
        latent = math.sqrt(self.tied) * random.normal(size=(groups, 1)) + math.sqrt(1 - self.tied) * random.normal(
            size=shape
        )
        labels = np.repeat((latent < cuts).astype(np.int8), images, axis=0)

        def noise(variance: float) -> np.ndarray:
            of_group = np.repeat(random.normal(size=shape), images, axis=0)
            return np.asarray(math.sqrt(variance / 2) * (of_group + random.normal(size=labels.shape)))

        shared = noise(0.7)
        sides = []
        for skill in (self.skill, 0.8 * self.skill):
            log_odds = skill * (skill * labels + shared + noise(0.3)) - skill**2 / 2
            log_odds += np.log(self.shares / (1 - self.shares))
            sides.append((1 / (1 + np.exp(-log_odds))).astype(np.float32))
        return labels, tuple(sides)


WORLDS = {
    "2 classes, one rare": World(2, 8, 200, 2, 1.2, 0.0, 0.2),
    "2 classes, one very rare": World(2, 6, 400, 1, 1.8, 0.0, 0.2),
    "3 classes, all rare": World(3, 8, 300, 1, 1.2, 0.1, 0.06),
    "5 classes": World(5, 8, 200, 2, 1.2, 0.2),
    "8 classes, skilled": World(8, 7, 150, 1, 1.8, 0.1),
    "14 classes, as many patients as nih_512": World(14, 8, 345, 2, 1.2, 0.1),
    "14 classes, the rarest often left out": World(14, 5, 300, 1, 1.5, 0.0),
    "14 classes of 100 patients": World(14, 10, 100, 2, 2.0, 0.2),
}


def coverage(world: World, times: int, resamples: int) -> dict[str, Any]:
    """Share of intervals that hold the truth, those below and above it, and how many classes they are of."""
    random = np.random.default_rng(0)
    labels, sides = world.draw(random, POPULATION, 1)
    limits = [best_f1_thresholds(labels[: POPULATION // 5], probs[: POPULATION // 5]) for probs in sides]
    truths = [figures.every_figure(labels, *side) for side in zip(sides, limits, strict=True)]
    ids = np.repeat(np.arange(world.groups), world.images)
    groups, held = ids.astype(str).tolist(), defaultdict(list)
    for k in range(times):
        labels, sides = world.draw(random, world.groups, world.images)
        how = intervals.Resampling(resamples=resamples, seed=k)
        decided = list(zip(sides, limits, strict=True))
        one = intervals.bootstrap(labels, sides[0], groups, limits[0], how)
        two = intervals.paired_bootstrap(labels, *decided, groups, how)
        for kind, found in (("one run", one), ("two runs", two)):
            for name in figures.MEANS:
                interval, each = found[name], figures.MEANS[name]
                truth = truths[0][each] if kind == "one run" else truths[1][each] - truths[0][each]
                if interval.classes is None or np.isnan(interval.low):
                    continue  # withheld: `n` counts those given
                target = truth[interval.classes].mean()
                below, above = bool(interval.high < target), bool(interval.low > target)
                width = float(interval.high - interval.low)
                held[kind, name].append((not below and not above, below, above, int(interval.classes.sum()), width))
    out: dict[str, Any] = {"world": vars(world), "times": times, "one run": {}, "two runs": {}}
    for (kind, name), rows in held.items():
        share, below, above, classes, width = np.mean(np.array(rows, float), axis=0)
        found = {"share": share, "too low": below, "too high": above, "classes": classes, "width": width}
        out[kind][name] = {key: round(float(value), 4) for key, value in found.items()} | {"n": len(rows)}
    return out


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    found = {}
    for name, world in WORLDS.items():
        if args.only not in ("", name):
            continue
        began = time.process_time()
        found[name] = coverage(world, args.times, args.resamples) | {"cpu_seconds": time.process_time() - began}
        for kind in ("one run", "two runs"):
            shares = (f"{each} {found[name][kind][each]['share']:.3f}" for each in SHOWN)
            print(f"{name}, {kind}: {', '.join(shares)}", flush=True)
    return {"nominal": 0.95, "resamples": args.resamples, "worlds": found}


if __name__ == "__main__":
    common.run(measure, "coverage", __doc__, times=400, resamples=200, only="")
