"""What an epoch costs a sample, from cached tokens and the plain way; the head-only search; a fold's memory.

    python benchmarks/run_training.py [--part steps|heads|memory|all] [--images DIR] [--rounds 5]

steps: full ViT-B/16, batch 16. A sample's share of an epoch is its training step plus a quarter of a validation pass
(four folds train, one validates). Interleaved: the plain pipeline (`reference.py`: two loader workers over full-size
PNGs, float32, last two blocks and head trained), the same with decoding left out, ours in bfloat16 and in float32.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from reference import Films, Model, Trainer, loader
from run_cache import dataset

from cxr_fast import backbone, cpu, encode, store, timing
from cxr_fast.activations import Activations
from cxr_fast.config import CacheSpec, SweepSpec, TrainSpec
from cxr_fast.journal import Journal
from cxr_fast.preprocess import load
from cxr_fast.search import Search
from cxr_fast.selection import Data
from cxr_fast.train import Fold, predict

CLASSES, VALID_SHARE = 35, 0.25
TARGETS = {"whole": 14.0, "float32": 4.5, "heads": 60.0, "memory": 2e9}
CPU = torch.device("cpu")


def labels(n: int) -> np.ndarray:
    """Random labels (n, C), one in twenty positive."""
    return (np.random.default_rng(0).random((n, CLASSES)) < 0.05).astype(np.int8)


class Bench:
    """The four arms over the same images; each method is one mini-epoch and returns seconds a sample."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.tower = backbone.load(args.weights)
        manifest = dataset(folder, args.images, args.count)
        self.paths, self.n = [manifest.path(i) for i in range(len(manifest))], len(manifest)
        self.labels = labels(self.n)
        spec = encode.with_size(CacheSpec(weights=args.weights, dtype="float32", views=("plain",)), self.tower)
        encode.run(self.tower, manifest, spec, folder / "c.h5", device="cpu")
        self.activations = Activations(np.array(store.ActivationFile(folder / "c.h5").activations), CPU)
        self.pixels = np.stack([load(path, spec.preprocess)[0] for path in self.paths])
        self.mean, self.std = self.tower.statistics("model")
        self.films = Films(self.paths, self.labels, self.mean, self.std)
        self.plain = Trainer(Model(self.tower.visual, CLASSES), TrainSpec())
        self.folds = {kind: self.fold(TrainSpec(precision=kind)) for kind in ("auto", "float32")}

    def fold(self, spec: TrainSpec) -> Fold:
        """A fold that trains on every image; the validation rows only have to be scorable."""
        rows = np.arange(self.n)
        return Fold(self.tower.visual, self.activations, self.labels, rows, rows, spec, unfreeze_blocks=2, seed=0)

    def compare(self) -> float:
        """Largest relative difference of the losses of three steps, without dropout: pixels against cached tokens."""
        spec = TrainSpec(dropout=0.0, precision="float32")
        fold, model = self.fold(spec), Model(self.tower.visual, CLASSES, dropout=0.0)
        model.head.load_state_dict(fold.tail.head.state_dict())
        slow, draws, apart = Trainer(model, spec), fold.draw(), []
        fold.tail.train()
        for a, b in draws.steps[:3]:
            rows = draws.rows[a:b]
            x = encode.normalise(torch.from_numpy(self.pixels[rows]), *self.statistics())
            want = slow.step(x, torch.from_numpy(self.labels[rows]).float())
            found = float(fold.step(self.activations.gather(rows, draws.views[a:b]), rows, draws.masks[a:b]))
            apart.append(abs(found - want) / want)
        assert max(apart) < 1e-4, f"cached and plain training differ by {max(apart):.1e}"
        return max(apart)

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (self.mean, self.std))
        return mean, std

    def whole(self) -> float:
        """The plain pipeline, files to step, and its validation pass."""
        began = time.perf_counter()
        for x, y in loader(self.films, 16):
            self.plain.step(x, y)
        trained = time.perf_counter() - began
        count = round(self.n * VALID_SHARE)
        few = Films(self.paths[:count], self.labels[:count], self.mean, self.std, flip=False)
        for x, _ in loader(few, 16, shuffle=False):
            self.plain.score(x)
        return (trained + (time.perf_counter() - began - trained)) / self.n

    def decoded(self) -> float:
        """The plain pipeline with decoding and resizing left out."""
        began = time.perf_counter()
        for rows in torch.randperm(self.n).split(16):
            x = encode.normalise(torch.from_numpy(self.pixels[rows]), *self.statistics())
            self.plain.step(x, torch.from_numpy(self.labels[rows]).float())
        for rows in torch.arange(round(self.n * VALID_SHARE)).split(16):
            self.plain.score(encode.normalise(torch.from_numpy(self.pixels[rows]), *self.statistics()))
        return (time.perf_counter() - began) / self.n

    def ours(self, kind: str) -> float:
        """From cached tokens: one epoch and its validation."""
        fold, began = self.folds[kind], time.perf_counter()
        fold.train_epoch(fold.draw())
        predict(fold.tail, fold.activations, np.arange(round(self.n * VALID_SHARE)), kind=fold.kind)
        return (time.perf_counter() - began) / self.n


def steps(args: argparse.Namespace) -> dict[str, Any]:
    """The ratios of the four arms, round by round."""
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), args)
        difference = bench.compare()
        print(f"cached and plain training agree: losses of three steps within {difference:.1e}")
        arms: dict[str, Callable[[], float]] = {
            "plain, from files": bench.whole,
            "plain, decoded": bench.decoded,
            f"cached, {bench.folds['auto'].kind}": lambda: bench.ours("auto"),
            "cached, float32": lambda: bench.ours("float32"),
        }
        names = list(arms)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        bench.ours("auto"), bench.ours("float32"), bench.decoded()  # warm-up
        with timing.other_cpu_share() as noise:
            for _ in range(args.rounds):
                for name in names:
                    seconds[name].append(arms[name]())
    ratios = {
        "whole": [a / b for a, b in zip(seconds[names[0]], seconds[names[2]], strict=True)],
        "float32": [a / b for a, b in zip(seconds[names[1]], seconds[names[3]], strict=True)],
    }
    spreads = {name: common.spread(values) for name, values in seconds.items()}
    common.show(spreads, "s/sample")
    for name, what in (("whole", f"from files / cached {bench.folds['auto'].kind}"), ("float32", "decoded / cached")):
        r = common.spread(ratios[name])
        print(f"{what}: {r['median']:.2f} [{r['min']:.2f}, {r['max']:.2f}] times, target {TARGETS[name]:g}")
    if noise.noisy:
        print(f"NOISY: other processes took {noise.share:.0%} of the machine")
    return {
        "images": bench.n,
        "threads": torch.get_num_threads(),
        "weights": args.weights,
        "seconds_per_sample": spreads,
        "ratios": {name: common.spread(values) | {"target": TARGETS[name]} for name, values in ratios.items()},
        "largest_loss_difference": difference,
        "noise": {"share": noise.share, "noisy": noise.noisy},
    }


def heads(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the whole head-only search."""
    n, generator = 7466, np.random.default_rng(0)
    array = generator.standard_normal((n, 2, 512)).astype(np.float16)
    assignment = generator.permutation(n) % 25 // 4 - 1  # a fifth held out, five folds on most of the rest
    assignment[assignment == 5] = 0
    spec, tower = SweepSpec(), backbone.load("random:0:test_vit")

    class Header:
        labels = globals()["labels"](n)

    data: Any = Data(file=None, header=Header, rows=np.arange(n), labels=Header.labels, assignment=assignment)  # type: ignore[arg-type]
    seconds = []
    with timing.other_cpu_share() as noise:
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
    fold = Fold(tower.visual, Activations(array, CPU), labels(64), rows, rows, TrainSpec(), unfreeze_blocks=2, seed=0)
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
    cpu.prepare()
    if args.memory_child:
        memory_child(args.memory_child)
        return
    parts = {"steps": steps, "heads": heads, "memory": memory}
    chosen = parts if args.part == "all" else {args.part: parts[args.part]}
    found = dict(zip(chosen, itertools.starmap(lambda part: part(args), ((p,) for p in chosen.values())), strict=True))
    common.save("training" if args.part == "all" else f"training-{args.part}", found, args.json)


if __name__ == "__main__":
    main()
