"""What an epoch costs a sample, from cached tokens and the plain way; the head-only search; a fold's memory.

    python benchmarks/run_training.py [--part steps|heads|memory|recipes|all] [--images DIR] [--rounds 5]

steps: full ViT-B/16, batch 16, as `cxrfast bench train` measures it on a cache of yours. A sample's share of an epoch
is its training step plus a quarter of a validation pass (four folds train, one validates). Interleaved: the plain
pipeline (`cxr_fast/bench/baseline.py`: two loader workers over full-size PNGs, float32, last two blocks and head
trained),
the same with decoding left out, ours in bfloat16 and in float32, four mini-epochs a round.
heads: 7,466 embeddings, 5 folds to 100 epochs, batch 16, through the real search with its states on disk.
memory: peak resident memory of a process that trains one fold, before and after.
recipes: a step with other losses, two rates and averaged weights over a step with focal loss, in turns: of the trained
blocks and head, and of a head alone.
Fast and slow are compared before anything is timed. `run_commits.py` sets the steps of two commits side by side.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import models
import numpy as np
import torch

from cxr_fast.activations.loader import Activations
from cxr_fast.bench import training
from cxr_fast.bench.films import copy_films
from cxr_fast.bench.training import random_labels
from cxr_fast.config import SweepSpec, TrainSpec
from cxr_fast.models import backbone, device
from cxr_fast.training.checkpoints import Journal
from cxr_fast.training.dataset import Data
from cxr_fast.training.folds.fold import Fold, FoldData
from cxr_fast.training.folds.head_fold import HeadFold
from cxr_fast.training.search import Search

TARGETS = {"whole": 14.0, "float32": 4.5, "heads": 60.0, "memory": 2e9}
KEPT = ("images", "threads", "weights", "fastest", "seconds_per_sample", "noise")
KEPT += ("largest_token_difference", "largest_loss_difference", "largest_pixel_difference")
CPU = torch.device("cpu")


def steps(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The arms' seconds a sample and their ratios, round by round."""
    manifest = copy_films(folder, args.images, args.count)
    arms = training.Arms(training.fresh(backbone.load(args.weights), manifest, folder))
    found = training.measure(arms, args.rounds)
    assert args.images or found["largest_pixel_difference"] == 0, "the plain pipeline saw other pixels"
    print(training.describe(found))
    samples = found["samples"]
    pairs = {"whole": (training.PLAIN, found["fastest"]), "float32": (training.DECODED, "cached, float32")}
    each = {name: common.ratios(samples[slow], samples[fast]) for name, (slow, fast) in pairs.items()}
    found_ratios = common.spreads(each, f"times as fast (targets {TARGETS['whole']:g}, {TARGETS['float32']:g})")
    return {name: found[name] for name in KEPT} | {
        "ratios": {name: value | {"target": TARGETS[name]} for name, value in found_ratios.items()},
        "epochs_a_round": training.EPOCHS,
    }


def heads(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of the whole head-only search."""
    n, generator = args.embeddings, np.random.default_rng(0)
    array = generator.standard_normal((n, 2, 512)).astype(np.float16)
    assignment = generator.permutation(n) % 25 // 4 - 1  # a fifth held out, five folds on most of the rest
    assignment[assignment == 5] = 0
    spec, tower = SweepSpec(), backbone.load("random:0:test_vit")
    header: Any = SimpleNamespace(labels=random_labels(n))
    data: Any = Data(file=None, header=header, rows=np.arange(n), labels=header.labels, assignment=assignment)  # type: ignore[arg-type]

    def search() -> float:
        whole = Search(tower, Activations(array, CPU), data, spec, unfreeze_blocks=0)
        with tempfile.TemporaryDirectory(dir=folder) as scratch, Journal(Path(scratch) / "run", {}) as journal:
            began = time.perf_counter()
            whole.run(0, {}, spec.train, journal)
            return time.perf_counter() - began

    name = f"s, 5 folds x 100 epochs, head alone (target {TARGETS['heads']:g})"
    samples, noise = common.turns({"search": search}, args.search_rounds)
    sizes = [int((assignment == k).sum()) for k in (-1, *range(5))]
    return {
        "search_seconds": common.spreads(samples, name)["search"] | {"target": TARGETS["heads"]},
        "images": {"holdout": sizes[0], "folds": sizes[1:]},
        "threads": torch.get_num_threads(),
        "noise": noise,
    }


def train_once(weights: str) -> None:
    """What the process of `memory` does: a few steps of a fold; prints its peaks on the way."""
    device.prepare()
    peaks = {"imports": common.peak_memory()}
    tower = backbone.load(weights)
    peaks["tower loaded"] = common.peak_memory()
    fold = models.fold(tower, TrainSpec())
    fold.run_epoch()
    fold.state()
    peaks["an epoch and a saved state"] = common.peak_memory()
    print(json.dumps(peaks | {"activations": fold.activations.array.nbytes}))


def memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peak resident memory of a process that does nothing but train a fold."""
    code = "import sys, run_training\nrun_training.train_once(sys.argv[1])"
    peaks = json.loads(common.python(code, args.weights).splitlines()[-1])
    fold = peaks["an epoch and a saved state"] - peaks["imports"] - peaks["activations"]
    for name, value in peaks.items():
        print(f"{name:28} {value / 1e6:8.0f} MB")
    print(f"a fold, the tower included, beside activations and imports: {fold / 1e6:.0f} MB, target under 2,000")
    return {"peaks": peaks, "fold_bytes": fold, "target": TARGETS["memory"]}


FIELDS: dict[str, dict[str, Any]] = {
    "focal": {},
    "asl": {"loss": "asl"},
    "ldam": {"loss": "ldam"},
    "smoothing": {"label_smoothing": 0.1},
    "two rates": {"head_lr": 1e-3},
    "EMA": {"ema": 0.99},
}


def recipes(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Ratios of a step with each field to one with focal loss, round by round."""
    tower = backbone.load(args.weights)
    embeddings = np.random.default_rng(0).standard_normal((800, 2, 512)).astype(np.float32)
    data = FoldData(
        activations=Activations(embeddings, CPU),
        labels=random_labels(800),
        train_rows=np.arange(640),
        valid_rows=np.arange(640, 800),
    )
    tails = {name: models.fold(tower, TrainSpec(**fields)) for name, fields in FIELDS.items()}
    heads = {
        name: HeadFold(tower.visual, data, TrainSpec(**fields), unfreeze_blocks=0, seed=0)
        for name, fields in FIELDS.items()
    }

    def step(fold: Fold, count: int) -> float:
        draws = fold.draw()
        draws = replace(draws, steps=draws.steps[:count], rows=draws.rows[: draws.steps[count - 1][1]])
        return common.seconds(fold.train_epoch, draws) / count

    out: dict[str, Any] = {"threads": torch.get_num_threads()}
    for what, folds, count, rounds in (("tail", tails, 2, args.rounds), ("head alone", heads, 40, 20 * args.rounds)):
        if what == "head alone":
            torch.set_num_threads(1)  # as folds side by side are trained
        for fold in folds.values():
            step(fold, count)
        arms = {name: partial(step, fold, count) for name, fold in folds.items()}
        samples, noise = common.turns(arms, rounds)
        each = {name: common.ratios(values, samples["focal"]) for name, values in samples.items()}
        seconds = common.spreads(samples, f"s a step, {what}")
        out[what] = {"seconds": seconds, "ratios": common.spreads(each, f"over focal, {what}"), "noise": noise}
    return out


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    device.prepare()
    parts = {"steps": steps, "heads": heads, "memory": memory, "recipes": recipes}
    if args.part == "all":
        return {name: part(args, folder) for name, part in parts.items()}
    part = parts[args.part]
    return {"name": f"training-{args.part}", args.part: part(args, folder)}


if __name__ == "__main__":
    options = {"images": Path, "count": 96, "rounds": 5, "search_rounds": 3, "embeddings": 7466, "weights": "random:0"}
    common.run(measure, "training", __doc__, part=("all", "steps", "heads", "memory", "recipes"), **options)
