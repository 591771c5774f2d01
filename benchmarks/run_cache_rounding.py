"""What float16 in the cache costs: trained models scored from a float32 cache too, and a recipe trained from both.

    cxrfast cache FILMS --weights WEIGHTS --out CACHE.h5
    cxrfast cache FILMS --weights WEIGHTS --dtype float32 --out FLOAT32.h5
    python benchmarks/run_cache_rounding.py --cache CACHE.h5 --float32 FLOAT32.h5 --work DIR [--runs RUN,RUN]

Rounding alone: the models of each of --runs, trained from either cache, score all films from both. Training: the same
recipe, seed and folds from both, beside another seed on the same folds, which is the noise of training; figures are of
the folds' validation films. --work keeps the folds, so that an interrupted call goes on.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np
from safetensors.torch import load_file

from cxr_fast.activations.cache import open_cache
from cxr_fast.activations.forward import predict, sigmoid
from cxr_fast.activations.loader import Activations
from cxr_fast.config import SweepOptions, SweepSpec, TrainSpec
from cxr_fast.grid.points import Point
from cxr_fast.metrics import drift
from cxr_fast.models import device
from cxr_fast.models.tail import Tail
from cxr_fast.training.checkpoints import Journal
from cxr_fast.training.operating_points import choose_thresholds
from cxr_fast.training.run_folder import read_info
from cxr_fast.training.sweep import SweepJob, backbone_for

KINDS = ("float32", "float16")
TWO_RATES = {"lr": 1e-5, "head_lr": 1e-3, "loss": "bce"}


def compare(one: np.ndarray, other: np.ndarray, labels: np.ndarray, limits: Any) -> dict[str, float]:
    """What differs between two answers (n, C) to the same films, at the thresholds (C,)."""
    found = drift.measure(one, other, labels, limits)
    return {
        "AUC": found.macro_auc,
        "AUC lost": found.macro_drop,
        "mAP lost": found.map_drop,
        "flips of 10,000": found.flips,
        "decisions": found.flipped,
        "p99": found.p99,
        "largest": found.largest,
    }


def rounding(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The folds' models of a finished run on all films, from both caches; no training lies between.

    A film of the folds is scored by the model that did not train on it, one of the hold-out by the mean of all.
    """
    run, caches = read_info(folder), {"float32": open_cache(args.float32), "float16": open_cache(args.cache)}
    with np.load(folder / "predictions.npz") as saved:
        fold, labels, images = saved["fold"], saved["labels"], saved["image"].tolist()
    assert all(list(cache.header.images) == images for cache in caches.values()), "other films"
    visual = backbone_for(caches["float16"]).visual
    blocks = int(caches["float16"].meta["spec"]["unfreeze_blocks"])
    tail = Tail(visual, unfreeze_blocks=blocks, classes=labels.shape[1], dropout=0.0)
    tensors = load_file(folder / "model.safetensors")
    answers = {}
    for kind, cache in caches.items():
        read = Activations(cache.activations, device.pick_device("cpu"), residency="host")
        probs = np.zeros(labels.shape)
        for k in range(fold.max() + 1):
            start = f"tails.fold{k}."
            own = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
            assert not tail.load_state_dict(own, strict=False).unexpected_keys  # a head alone brings no blocks
            for rows, share in ((fold == k, 1), (fold < 0, fold.max() + 1)):
                probs[rows] += sigmoid(predict(tail, read, np.flatnonzero(rows))) / share
        answers[kind] = probs
    found = compare(*(answers[kind] for kind in KINDS), labels, run["thresholds"])
    print(f"{folder.name}, float16 for float32, no training between: {found}", flush=True)
    return found


def trained(
    args: argparse.Namespace, kind: str, blocks: int, seed: int, made: dict[tuple[str, int], SweepJob]
) -> dict[str, Any]:
    """What the folds of a sweep from one of the caches answer to their validation films; all seeds share folds."""
    out, (epochs, folds) = args.work / f"{kind}-{blocks}-{seed}", (10, 5) if blocks == 0 else (args.epochs, args.folds)
    train = replace(TrainSpec(), train_blocks=blocks, **TWO_RATES)
    spec = replace(SweepSpec(), train=train, epochs=(epochs,), folds=folds)
    sweep = SweepJob(args.cache if kind == "float16" else args.float32, out, spec, SweepOptions(device="cpu"))
    search, data = sweep.search, sweep.data
    search.seed = seed  # draws and initialisation; the folds are drawn already
    # The frozen blocks answer alike for every seed, so they run once for each cache.
    search.behind = made.setdefault((kind, blocks), sweep).search.behind
    with Journal(out, sweep.request() | {"seed": seed}) as journal:
        found = search.run(0, Point(changes={}, train=train, seed=seed, group=0), journal)
    dev = data.assignment >= 0
    labels, probs, fold = data.labels[dev], found.probabilities[0][dev], data.assignment[dev]
    print(f"trained {out.name}: macro AUC, mean of folds {np.nanmean(found.scores[found.best_budget]):.4f}", flush=True)
    limits = choose_thresholds(labels, probs, spec.threshold_target, data.header.classes)[0]
    return {"labels": labels, "probs": probs, "thresholds": limits, "fold": fold}


def training(args: argparse.Namespace, blocks: int, seeds: int) -> dict[str, list[dict[str, float]]]:
    """Training from both caches with the same seed, and with two seeds from the same cache."""
    made: dict[tuple[str, int], SweepJob] = {}
    runs = {(kind, seed): trained(args, kind, blocks, seed, made) for seed in range(seeds) for kind in KINDS[::-1]}
    assert all(np.array_equal(run["fold"], runs["float16", 0]["fold"]) for run in runs.values())

    def apart(a: tuple[str, int], b: tuple[str, int]) -> dict[str, float]:
        one, other = runs[a], runs[b]
        return compare(one["probs"], other["probs"], one["labels"], one["thresholds"])

    found = {
        "float16 for float32": [apart(("float32", seed), ("float16", seed)) for seed in range(seeds)],
        "another seed": [apart(("float32", a), ("float32", b)) for a, b in itertools.combinations(range(seeds), 2)],
    }
    for name, each in found.items():
        for one in each:
            print(f"{blocks} trained blocks, {name}: {one}", flush=True)
    return found


def measure(args: argparse.Namespace, _: Path) -> dict[str, Any]:
    device.prepare()
    runs = [Path(run) for run in args.runs.split(",") if run]
    return {
        "rounding": {run.name: rounding(args, run) for run in runs},
        "head": training(args, 0, args.seeds),
        "blocks": training(args, args.blocks, 2),
        "trained_blocks": args.blocks,
        "epochs": args.epochs,
        "folds": args.folds,
    }


if __name__ == "__main__":
    common.run(
        measure,
        "cache_rounding",
        __doc__,
        cache=Path,
        float32=Path,
        work=Path,
        runs="",
        seeds=3,
        blocks=1,
        epochs=3,
        folds=3,
    )
