"""How many flipped labels are among the first 50 suspects of a class.

    cxrfast cache FILMS --weights WEIGHTS --out CACHE.h5
    python benchmarks/run_flips.py --cache CACHE.h5 [--pooled POOLED.h5] [--classes Effusion,Edema] [--seeds 5]

5 % of the labels of one class are flipped at random, the head is trained with the flipped labels, and the suspects are
ranked as `review` does. Given are the share of flips among the first 50 suspects over the share in all (the lift), for
each class and seed; beside it that of the probability alone, of the neighbours alone, and of the class's positives in
any order, which for a rare class is most of the lift: 5 % of its negatives are more than all its positives. --pooled
is a cache of the same films with --unfreeze-blocks 0: the same head is trained in less time.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

from cxr_fast.activations.cache import Cache, open_cache
from cxr_fast.config import SweepOptions, SweepSpec, TrainSpec
from cxr_fast.models import device
from cxr_fast.review import neighbours
from cxr_fast.review.suspects import NEIGHBOURS, own_probabilities, positive_shares, suspicion
from cxr_fast.training import predictions
from cxr_fast.training.run_folder import read_info
from cxr_fast.training.sweep import SweepJob

FIRST, FEWEST = 50, 10  # suspects looked at; positives of a class that is taken by itself
RATE = 1e-3


def flip(cache: Cache, name: str, share: float, seed: int, out: Path) -> np.ndarray:
    """Write the corrections that flip `share` of the known labels of a class; the rows flipped."""
    c = cache.header.classes.index(name)
    labels = cache.header.labels[:, c]
    known = np.flatnonzero((labels >= 0) & cache.ok)
    drawn = np.random.default_rng([seed, c]).choice(known, round(share * len(known)), replace=False)
    with open(out, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["card", "image_sha256", "class", "label", "mark"])
        writer.writerows([row, cache.sha256[row], name, labels[row], "flip"] for row in drawn.tolist())
    return np.sort(drawn)


def lift(scores: np.ndarray, flipped: np.ndarray) -> float:
    """Share of flips among the first 50 by score over the share in all; scores and flipped (n,)."""
    first = np.argsort(-scores, kind="stable")[:FIRST]
    return float(flipped[first].mean() / flipped.mean())


def trial(args: argparse.Namespace, cache: Cache, name: str, seed: int, work: Path) -> dict[str, Any]:
    """One class and seed: flip, train, rank."""
    rows = flip(cache, name, args.share, seed, work / "flips.csv")
    train = TrainSpec(train_blocks=0, lr=RATE, loss=args.loss)
    spec = SweepSpec(epochs=(args.epochs,), folds=args.folds, seed=seed, train=train)
    options = SweepOptions(device="cpu", corrections=str(work / "flips.csv"))
    SweepJob(args.pooled or args.cache, work / "run", spec, options).run()
    saved = predictions.read(work / "run", read_info(work / "run"))
    place = neighbours.match_rows(saved, cache)
    c, flipped = saved.run["classes"].index(name), np.isin(place, rows)
    labels, groups = saved.arrays["labels"], saved.arrays["group"].tolist()
    near, _ = neighbours.find_nearest(neighbours.describe_films(cache, place), NEIGHBOURS, groups=groups)
    probs, shares = own_probabilities(saved), positive_shares(labels, near)
    nothing = np.full(probs.shape, np.nan)
    both, alone, beside = (
        suspicion(labels, p, q, groups)[:, c] for p, q in ((probs, shares), (probs, nothing), (nothing, shares))
    )
    first = np.argsort(-both, kind="stable")[:FIRST]
    positive = labels[:, c] == 1
    any_positive = flipped[positive].mean() * min(1, positive.sum() / FIRST) / flipped.mean()
    return {
        "class": name,
        "seed": seed,
        "films": len(flipped),
        "positives": int((cache.header.labels[place, c] == 1).sum()),
        "flips": int(flipped.sum()),
        "flips_in_first": int(flipped[first].sum()),
        "flipped_to_negative_in_first": int((flipped & ~positive)[first].sum()),
        "lift": lift(both, flipped),
        "lift_probability_alone": lift(alone, flipped),
        "lift_neighbours_alone": lift(beside, flipped),
        "lift_positives_in_any_order": float(any_positive),
        "flips_to_negative": int((flipped & ~positive).sum()),
        "flips_to_negative_in_first_negatives": int((flipped & ~positive)[first_of(both, ~positive)].sum()),
        "negatives": int((labels[:, c] == 0).sum()),
    }


def first_of(scores: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Places of the first 50 by score among those of `which`."""
    return np.argsort(np.where(which, -scores, np.inf), kind="stable")[:FIRST]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, spread and least lift of each class over seeds."""
    out = []
    for name in dict.fromkeys(row["class"] for row in rows):
        own = [row for row in rows if row["class"] == name]
        lifts = np.array([row["lift"] for row in own])
        means = {key: float(np.mean([row[key] for row in own])) for key in own[0] if key.startswith("lift_")}
        shown = {"class": name, "positives": own[0]["positives"], "seeds": len(own), "mean": float(lifts.mean())}
        spread = {"std": float(lifts.std(ddof=1)) if len(own) > 1 else None, "least": float(lifts.min())}
        to_negative = sum(row["flips_to_negative_in_first_negatives"] for row in own)
        base = sum(row["flips_to_negative"] / row["negatives"] * FIRST for row in own)
        out.append(shown | spread | means | {"lift_of_missed_among_negatives": to_negative / base if base else None})
    return out


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Every class and seed."""
    device.prepare(1)
    cache, began = open_cache(args.cache), time.perf_counter()
    counts = (cache.header.labels == 1).sum(axis=0).tolist()
    many = [name for name, count in zip(cache.header.classes, counts, strict=True) if count >= FEWEST]
    rows = []
    for name in args.classes.split(",") if args.classes else many:
        for seed in range(args.seeds):
            rows.append(trial(args, cache, name, seed, scratch))
            shutil.rmtree(scratch / "run")
            print(
                {key: value for key, value in rows[-1].items() if "lift" in key or key in ("class", "seed")}, flush=True
            )
    return {
        "what": "share of flips among the first 50 suspects of a class over their share in all",
        "cache": args.cache.name,
        "weights": Path(str(cache.meta["weights"])).name,
        "blocks_left": cache.meta["spec"]["unfreeze_blocks"],
        "share": args.share,
        "training": {"head_lr": RATE, "epochs": args.epochs, "folds": args.folds, "loss": args.loss},
        "classes": summary(rows),
        "trials": rows,
        "seconds": time.perf_counter() - began,
    }


OPTIONS = {
    "cache": Path,
    "pooled": Path,
    "classes": "",
    "seeds": 5,
    "share": 0.05,
    "epochs": 10,
    "folds": 5,
    "loss": ("bce", "focal", "asl"),
}


if __name__ == "__main__":
    common.run(measure, "flips", __doc__, **OPTIONS)
