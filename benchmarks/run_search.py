"""How long the whole search takes with its folds trained together, against the time its arithmetic needs at least.

    python benchmarks/run_search.py [--images 7466] [--folds 5] [--epochs 100] [--batch-size 16] [--compile]

Random activations of Indiana's size (V=2, float16), made on the device; 20 % held out, the rest in folds, validation
every epoch, a snapshot of every fold at each budget. The search is 100 epochs; with fewer --epochs the figure for it is
extrapolated, and said to be. Stacked and one-by-one folds are compared before anything is timed. Saving states to disk
is left out.

FLOPs a sample, counting a multiply-add as two; T tokens, D width, M MLP width, E embedding, C classes:
    full block              2 T (4 D^2 + 2 D M) + 4 T^2 D       qkv and projection, MLP; scores and their sum
    class-token-only block  8 D^2 + 4 D M + 4 H T D             one query, H heads: no token's key or value is made
    projection, head        2 D E; 2 (512 E + 512 256 + 256 C)
    backward                twice forward; once for the projection, which is frozen; and 6 T D^2 less: the first block's
                            queries, keys and values send no gradient on to its input
    validation              forward alone
"""

from __future__ import annotations

import argparse
import itertools
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from cxr_fast.activations import encoder
from cxr_fast.activations.loader import (
    Activations,
)
from cxr_fast.config import SweepSpec, TrainSpec
from cxr_fast.models import backbone
from cxr_fast.models.tail import HEAD_WIDTHS, Tail
from cxr_fast.system import hardware
from cxr_fast.training.fold import Fold
from cxr_fast.training.stacked_folds import Stack, lay_out

CLASSES, UNFREEZE, HOLDOUT = 35, 2, 0.2
BUDGETS = SweepSpec().epochs
# Of a mean loss after 2 epochs of 3 steps, stacked against one by one: bfloat16 keeps 8 bits.
TOLERANCE = {"bfloat16": 0.02, "float32": 1e-3}


def random_activations(visual: Any, images: int, device: torch.device) -> Activations:
    """(N, 2, T, D) float16, on the device; in host memory there is one number of that shape."""
    trunk = visual.trunk
    tokens = trunk.patch_embed.num_patches + trunk.num_prefix_tokens
    shape = (images, 2, tokens, trunk.embed_dim)
    activations = Activations(np.broadcast_to(np.float16(0), shape), device, residency="host")
    generator = torch.Generator(device).manual_seed(0)
    activations.resident = torch.randn(shape, dtype=torch.float16, device=device, generator=generator)
    activations.residency = "device"
    return activations


def make(visual: Any, activations: Activations, labels: np.ndarray, args: argparse.Namespace, rows: int) -> list[Fold]:
    """Folds over the first `rows` images."""
    spec, parts = TrainSpec(batch_size=args.batch_size), np.array_split(np.arange(rows), args.folds)
    return [
        Fold(
            *(visual, activations, labels, np.concatenate(parts[:i] + parts[i + 1 :]), parts[i]),
            spec=spec,
            unfreeze_blocks=UNFREEZE,
            seed=0,
            fold=i,
        )
        for i in range(args.folds)
    ]


def compare(together: list[Fold], alone: list[Fold], args: argparse.Namespace) -> float:
    """Largest relative difference of the mean losses of two epochs; beyond the tolerance nothing is worth timing."""
    stack, worst = Stack(together, compile=args.compile), 0.0
    for _ in range(2):
        losses = stack.train_epoch([fold.draw() for fold in together])
        wanted = [fold.train_epoch(fold.draw()) for fold in alone]
        worst = max([worst, *(abs(a - b) / b for a, b in zip(losses, wanted, strict=True))])
    kind = together[0].kind
    assert worst < TOLERANCE[kind], f"stacked and single folds differ by {worst:.2%} in {kind}"
    print(f"stacked and single folds agree: losses within {worst:.2%} ({kind}, allowed {TOLERANCE[kind]:.1%})")
    return worst


def captured(stack: Stack) -> float:
    """Seconds of warm-up, compilation and capture; the folds' draws are put back."""
    states = [fold.generator.get_state() for fold in stack.folds]
    stack._prepare(lay_out([fold.draw() for fold in stack.folds]))
    for fold, state in zip(stack.folds, states, strict=True):
        fold.generator.set_state(state)
    stack.first.tail.train()
    began = time.perf_counter()
    if stack.graph:
        stack._captured()
        torch.cuda.synchronize()
    return time.perf_counter() - began


def epoch(stack: Stack) -> dict[str, float]:
    """Seconds of one epoch of every fold, by what they went into; as `stacked.run_epoch`, with a clock in between."""
    marks = [time.perf_counter()]
    draws = stack.draw()
    marks.append(time.perf_counter())
    losses = stack.train_epoch(draws)
    marks.append(time.perf_counter())
    for fold, loss in zip(stack.folds, losses, strict=True):
        fold.finish_epoch(loss, marks[0])
    marks.append(time.perf_counter())
    draw, train, validate = (b - a for a, b in itertools.pairwise(marks))
    return {"draw": draw, "train": train, "validate": validate, "epoch": draw + train + validate}


def flops(tail: Tail, tokens: int) -> tuple[float, float]:
    """(training, forward alone) of one sample, by the formula above."""
    width, mlp = tail.blocks[0].mlp.fc1.in_features, tail.blocks[0].mlp.fc1.out_features
    full = 2 * tokens * (4 * width**2 + 2 * width * mlp) + 4 * tokens**2 * width
    heads = tail.blocks[0].attn.num_heads
    alone = 8 * width**2 + 4 * width * mlp + 4 * heads * tokens * width
    blocks = (len(tail.blocks) - 1) * full + (alone if tail.pool == "token" else full)
    widths = [tail.head[0].in_features, *HEAD_WIDTHS, CLASSES]
    head = 2 * sum(a * b for a, b in itertools.pairwise(widths))
    projection = 2 * width * widths[0]
    no_gradient = 6 * tokens * width**2 if len(tail.blocks) > 1 or tail.pool != "token" else 0
    return 3 * (blocks + head) + 2 * projection - no_gradient, blocks + head + projection


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's memory, or of the process's on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=7466)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=BUDGETS[-1], help="epochs actually run")
    parser.add_argument("--batch-size", type=int, default=TrainSpec().batch_size)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--weights", default="random:0")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peak-tflops", type=float, default=790.0, help="bfloat16, as measured on an H100 or H200")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    common.save("search-compiled" if args.compile else "search", run(args), args.json)


def run(args: argparse.Namespace) -> dict[str, Any]:
    device = encoder.pick_device(args.device)
    visual = backbone.load(args.weights).visual
    activations = random_activations(visual, args.images, device)
    labels = (np.random.default_rng(0).random((args.images, CLASSES)) < 0.05).astype(np.int8)
    rows = round((1 - HOLDOUT) * args.images)
    few = min(rows, 3 * args.batch_size * args.folds // (args.folds - 1))
    difference = compare(*(make(visual, activations, labels, args, few) for _ in range(2)), args)
    torch.cuda.reset_peak_memory_stats() if device.type == "cuda" else None
    folds = make(visual, activations, labels, args, rows)
    stack = Stack(folds, compile=args.compile)
    capture = captured(stack)
    with hardware.OtherCpu() as noise:
        epochs = [epoch(stack) for _ in range(args.epochs)]
        began = time.perf_counter()
        for fold in folds:
            fold.snapshot(fold.epoch)
        snapshots = time.perf_counter() - began
    if noise.noisy:
        print(f"NOISY: other processes took {noise.share:.0%} of the machine")
    return summary(stack, epochs, capture, snapshots, args) | {
        "difference": {"largest": difference, "allowed": TOLERANCE[folds[0].kind]},
        "noise": {"share": noise.share, "noisy": noise.noisy},
    }


def summary(
    stack: Stack, epochs: Sequence[dict[str, float]], capture: float, snapshots: float, args: argparse.Namespace
) -> dict[str, Any]:
    """What was measured, the search that it adds up to, and the least its arithmetic takes."""
    folds, tokens = stack.folds, int(stack.first.activations.array.shape[2])
    spreads = {name: common.spread([e[name] for e in epochs]) for name in epochs[0]}
    common.show(spreads, "s/epoch of all folds")
    total = BUDGETS[-1]
    trained = sum(e["epoch"] for e in epochs) * total / args.epochs
    seconds = capture + trained + snapshots * len(BUDGETS)
    training, forward = flops(stack.first.tail, tokens)
    seen, validated = (sum(map(len, rows)) for rows in zip(*((f.train_rows, f.valid_rows) for f in folds), strict=True))
    work = total * (seen * training + validated * forward)
    step = total * seen * training / (sum(e["train"] for e in epochs) * total / args.epochs) / 1e12
    floor = work / args.peak_tflops / 1e12
    how = "measured" if args.epochs == total else f"extrapolated from {args.epochs} epoch(s)"
    print(f"whole search, {len(folds)} folds x {total} epochs: {seconds:.4g} s ({how}; target 60 on an H200)")
    print(
        f"  capture {capture:.3g} s; epochs {trained:.4g} s; {len(BUDGETS)} rounds of snapshots {snapshots:.3g} s each"
    )
    print(f"  {work / 1e15:.3g} PFLOP: {work / seconds / 1e12:.4g} TFLOP/s overall, {step:.4g} in training steps")
    print(f"  floor at {args.peak_tflops:g} TFLOP/s: {floor:.3g} s, {floor / seconds:.1%} of the time taken")
    memory = peak_memory(stack.device)
    print(f"  peak memory {memory / 1e9:.2f} GB")
    return {
        "images": args.images,
        "folds": len(folds),
        "epochs_run": args.epochs,
        "batch_size": args.batch_size,
        "weights": args.weights,
        "device": stack.device.type,
        "precision": stack.first.kind,
        "graph": stack.graph,
        "compile": args.compile,
        "seconds_per_epoch": spreads,
        "capture_seconds": capture,
        "snapshot_seconds": snapshots,
        "search_seconds": {"value": seconds, "how": how, "epochs": total, "target": 60},
        "flops": {"training_sample": training, "forward_sample": forward, "search": work},
        "tflops": {"search": work / seconds / 1e12, "steps": step, "peak": args.peak_tflops},
        "floor_seconds": floor,
        "share_of_floor": floor / seconds,
        "peak_memory_bytes": memory,
    }


if __name__ == "__main__":
    main()
