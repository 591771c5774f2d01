"""What an epoch costs a sample, from cached tokens and the plain way; the head-only search; a fold's memory.

    python benchmarks/run_training.py [--part steps|heads|memory|all] [--images DIR] [--rounds 5]

steps: full ViT-B/16, batch 16, as `cxrfast bench train` measures it on a cache of yours. A sample's share of an epoch
is its training step plus a quarter of a validation pass (four folds train, one validates). Interleaved: the plain
pipeline (`cxr_fast/bench/baseline.py`: two loader workers over full-size PNGs, float32, last two blocks and head
trained),
the same with decoding left out, ours in bfloat16 and in float32, four mini-epochs a round.
heads: 7,466 embeddings, 5 folds to 100 epochs, batch 16, through the real search with its states on disk.
memory: peak resident memory of a process that trains one fold, before and after.
Fast and slow are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from cxr_fast.activations.loader import Activations
from cxr_fast.bench import caching, training
from cxr_fast.bench.training import random_labels
from cxr_fast.config import SweepSpec, TrainSpec
from cxr_fast.models import backbone, device
from cxr_fast.system import hardware
from cxr_fast.training.checkpoints import Journal
from cxr_fast.training.dataset import Data
from cxr_fast.training.fold import Fold
from cxr_fast.training.search import Search

TARGETS = {"whole": 14.0, "float32": 4.5, "heads": 60.0, "memory": 2e9}
CPU = torch.device("cpu")


def steps(args: argparse.Namespace) -> dict[str, Any]:
    """The arms' seconds a sample and their ratios, round by round."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        manifest = caching.copies(folder, args.images, args.count)
        arms = training.Arms(training.fresh(backbone.load(args.weights), manifest, folder))
        found = training.measure(arms, args.rounds)
    assert args.images or found["largest_pixel_difference"] == 0, "the plain pipeline saw other pixels"
    print(training.describe(found))
    samples = found["samples"]
    pairs = {"whole": (training.PLAIN, found["fastest"]), "float32": (training.DECODED, "cached, float32")}
    ratios = {}
    for name, (slow, fast) in pairs.items():
        each = [a / b for a, b in zip(samples[slow], samples[fast], strict=True)]
        ratios[name] = common.spread(each) | {"target": TARGETS[name]}
        print(f"{slow} / {fast}: {ratios[name]['median']:.2f} times, target {TARGETS[name]:g}")
    kept = ("images", "threads", "weights", "fastest", "seconds_per_sample", "noise")
    kept += ("largest_token_difference", "largest_loss_difference", "largest_pixel_difference")
    return {name: found[name] for name in kept} | {"ratios": ratios, "epochs_a_round": training.EPOCHS}


def heads(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the whole head-only search."""
    n, generator = 7466, np.random.default_rng(0)
    array = generator.standard_normal((n, 2, 512)).astype(np.float16)
    assignment = generator.permutation(n) % 25 // 4 - 1  # a fifth held out, five folds on most of the rest
    assignment[assignment == 5] = 0
    spec, tower = SweepSpec(), backbone.load("random:0:test_vit")

    class Header:
        labels = random_labels(n)

    data: Any = Data(file=None, header=Header, rows=np.arange(n), labels=Header.labels, assignment=assignment)  # type: ignore[arg-type]
    seconds = []
    with hardware.OtherCpu() as noise:
        for _ in range(args.search_rounds):
            search = Search(tower, Activations(array, CPU), data, spec, unfreeze_blocks=0)
            with tempfile.TemporaryDirectory() as scratch, Journal(Path(scratch) / "run", {}) as journal:
                began = time.perf_counter()
                search.run(0, {}, spec.train, journal)
                seconds.append(time.perf_counter() - began)
    s = common.spread(seconds)
    print(f"head-only search, 5 folds x 100 epochs: {s['median']:.1f} s [{s['min']:.1f}, {s['max']:.1f}], target 60")
    if noise.noisy:
        print(f"NOISY: other processes took {noise.share:.0%} of the machine")
    sizes = [int((assignment == k).sum()) for k in (-1, *range(5))]
    return {
        "search_seconds": s | {"target": TARGETS["heads"]},
        "images": {"holdout": sizes[0], "folds": sizes[1:]},
        "threads": torch.get_num_threads(),
        "noise": {"share": noise.share, "noisy": noise.noisy},
    }


def peak() -> int:
    """The process's largest resident size so far, in bytes; getrusage's outlives exec and would show the parent's."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024


def memory_child(weights: str) -> None:
    """Train a few steps of a fold and print the peak of resident memory, in bytes, on the way."""
    peaks = {"imports": peak()}
    tower = backbone.load(weights)
    peaks["tower loaded"] = peak()
    tokens, width, _ = tower.shape
    array = np.random.default_rng(0).standard_normal((64, 1, tokens, width)).astype(np.float16)
    rows = np.arange(64)
    fold = Fold(
        tower.visual, Activations(array, CPU), random_labels(64), rows, rows, TrainSpec(), unfreeze_blocks=2, seed=0
    )
    fold.run_epoch()
    fold.state()
    peaks["an epoch and a saved state"] = peak()
    print(json.dumps(peaks | {"activations": array.nbytes}))


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory of a process that does nothing but train a fold."""
    command = [sys.executable, __file__, "--memory-child", args.weights]
    peaks = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    fold = peaks["an epoch and a saved state"] - peaks["imports"] - peaks["activations"]
    for name, value in peaks.items():
        print(f"{name:28} {value / 1e6:8.0f} MB")
    print(f"a fold, the tower included, beside activations and imports: {fold / 1e6:.0f} MB, target under 2,000")
    return {"peaks": peaks, "fold_bytes": fold, "target": TARGETS["memory"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["steps", "heads", "memory", "all"], default="all")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--search-rounds", type=int, default=3)
    parser.add_argument("--weights", default="random:0")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-child", metavar="WEIGHTS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device.prepare()
    if args.memory_child:
        memory_child(args.memory_child)
        return
    parts = {"steps": steps, "heads": heads, "memory": memory}
    chosen = parts if args.part == "all" else {args.part: parts[args.part]}
    found = dict(zip(chosen, itertools.starmap(lambda part: part(args), ((p,) for p in chosen.values())), strict=True))
    common.save("training" if args.part == "all" else f"training-{args.part}", found, args.json)


if __name__ == "__main__":
    main()
