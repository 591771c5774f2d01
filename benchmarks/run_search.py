"""How long the whole search takes with its folds trained together, against the time its arithmetic needs at least.

    python benchmarks/run_search.py [--images 7466] [--folds 5] [--epochs 100] [--batch-size 16] [--compile]

Random activations of Indiana's size (V=2, float16), made on the device; 20 % held out, the rest in folds, validation
every epoch, a snapshot of every fold at each budget. The search is 100 epochs; with fewer --epochs the figure for it is
extrapolated, and said to be. Stacked and one-by-one folds are compared before anything is timed. Saving states to disk
is left out. The peak is bfloat16's, as measured on an H100 or H200; `common.tail_flops` has the arithmetic. Validation
is float32 and counted at that peak too, so the least time is lower than any card's.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from cxr_fast.activations.loader import (
    Activations,
)
from cxr_fast.config import SweepSpec, TrainSpec
from cxr_fast.models import backbone
from cxr_fast.models.device import pick_device
from cxr_fast.models.tail import HEAD_WIDTHS, Tail
from cxr_fast.training.folds.fold import Fold, FoldData
from cxr_fast.training.folds.stacked_folds import Stack, lay_out

CLASSES, UNFREEZE, HOLDOUT = 35, 2, 0.2
BUDGETS = SweepSpec().epochs
# Of a mean loss after 2 epochs of 3 steps, stacked against one by one: bfloat16 keeps 8 bits.
TOLERANCE = {"bfloat16": 0.02, "float32": 1e-3}


def random_activations(visual: Any, images: int, device: torch.device) -> Activations:
    """(N, 2, T, D) float16, on the device; in host memory there is one number of that shape."""
    trunk = visual.trunk
    shape = (images, 2, trunk.patch_embed.num_patches + trunk.num_prefix_tokens, trunk.embed_dim)
    activations = Activations(np.broadcast_to(np.float16(0), shape), device, residency="host")
    generator = torch.Generator(device).manual_seed(0)
    activations.resident = torch.randn(shape, dtype=torch.float16, device=device, generator=generator)
    activations.residency = "device"
    return activations


def make(visual: Any, activations: Activations, labels: np.ndarray, args: argparse.Namespace, rows: int) -> list[Fold]:
    """Folds over the first `rows` images."""
    spec, parts = TrainSpec(batch_size=args.batch_size), np.array_split(np.arange(rows), args.folds)
    given = partial(FoldData, activations=activations, labels=labels)
    each = [
        given(train_rows=np.concatenate(parts[:i] + parts[i + 1 :]), valid_rows=parts[i], number=i)
        for i in range(args.folds)
    ]
    return [Fold(visual, data, spec, unfreeze_blocks=UNFREEZE, seed=0) for data in each]


def compare(together: list[Fold], alone: list[Fold], args: argparse.Namespace) -> dict[str, float]:
    """Largest relative difference of the mean losses of two epochs; beyond the tolerance nothing is worth timing."""
    stack, worst, allowed = Stack(together, compile=args.compile), 0.0, TOLERANCE[together[0].kind]
    for _ in range(2):
        losses = stack.train_epoch([fold.draw() for fold in together])
        wanted = [fold.train_epoch(fold.draw()) for fold in alone]
        worst = max([worst, *(abs(a - b) / b for a, b in zip(losses, wanted, strict=True))])
    assert worst < allowed, f"stacked and single folds differ by {worst:.2%} in {together[0].kind}"
    print(f"stacked and single folds agree: losses within {worst:.2%} ({together[0].kind}, allowed {allowed:.1%})")
    return {"largest": worst, "allowed": allowed}


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
    """(training, forward alone) of one sample through this tail."""
    block = tail.blocks[0]
    return common.tail_flops(
        (tokens, block.mlp.fc1.in_features, block.mlp.fc1.out_features, block.attn.num_heads),
        len(tail.blocks),
        (tail.head[0].in_features, *HEAD_WIDTHS, CLASSES),
        class_token=tail.pool == "token",
    )


def summary(
    stack: Stack, epochs: Sequence[dict[str, float]], capture: float, snapshots: float, peak_tflops: float
) -> dict[str, Any]:
    """What was measured, the search that it adds up to, and the least its arithmetic takes."""
    samples, total, ran = common.by_key(epochs), BUDGETS[-1], len(epochs)
    trained = sum(samples["epoch"]) * total / ran
    seconds = capture + trained + snapshots * len(BUDGETS)
    training, forward = flops(stack.first.tail, int(stack.first.activations.array.shape[2]))
    seen, validated = (sum(len(getattr(f, rows)) for f in stack.folds) for rows in ("train_rows", "valid_rows"))
    work = total * (seen * training + validated * forward)
    step, floor = ran * seen * training / sum(samples["train"]) / 1e12, work / peak_tflops / 1e12
    how = "measured" if ran == total else f"extrapolated from {ran} epoch(s)"
    on_gpu = stack.device.type == "cuda"
    memory = int(torch.cuda.max_memory_allocated(stack.device)) if on_gpu else common.peak_memory()
    spreads = common.spreads(samples, "s/epoch of all folds")
    print(f"whole search, {len(stack.folds)} folds x {total} epochs: {seconds:.4g} s ({how}; target 60 on an H200)")
    print(f"  capture {capture:.3g} s; epochs {trained:.4g} s; {len(BUDGETS)} snapshot rounds of {snapshots:.3g} s")
    print(f"  {work / 1e15:.3g} PFLOP: {work / seconds / 1e12:.4g} TFLOP/s overall, {step:.4g} in training steps")
    print(f"  floor at {peak_tflops:g} TFLOP/s: {floor:.3g} s, {floor / seconds:.1%} of the time taken")
    print(f"  peak memory {memory / 1e9:.2f} GB")
    return {
        "folds": len(stack.folds),
        "epochs_run": ran,
        "device": stack.device.type,
        "precision": stack.first.kind,
        "graph": stack.graph,
        "seconds_per_epoch": spreads,
        "capture_seconds": capture,
        "snapshot_seconds": snapshots,
        "search_seconds": {"value": seconds, "how": how, "epochs": total, "target": 60},
        "flops": {"training_sample": training, "forward_sample": forward, "search": work},
        "tflops": {"search": work / seconds / 1e12, "steps": step, "peak": peak_tflops},
        "floor_seconds": floor,
        "share_of_floor": floor / seconds,
        "peak_memory_bytes": memory,
    }


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    device, visual = pick_device(args.device), backbone.load(args.weights).visual
    activations = random_activations(visual, args.images, device)
    labels = (np.random.default_rng(0).random((args.images, CLASSES)) < 0.05).astype(np.int8)
    rows = round((1 - HOLDOUT) * args.images)
    few = min(rows, 3 * args.batch_size * args.folds // (args.folds - 1))
    difference = compare(*(make(visual, activations, labels, args, few) for _ in range(2)), args)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    stack = Stack(make(visual, activations, labels, args, rows), compile=args.compile)
    capture = captured(stack)
    samples, noise = common.turns({"epoch": partial(epoch, stack)}, args.epochs)
    snapshots = common.seconds(lambda: [fold.snapshot(fold.epoch) for fold in stack.folds])
    given = {name: getattr(args, name) for name in ("images", "batch_size", "weights", "compile")}
    found = given | summary(stack, samples["epoch"], capture, snapshots, args.peak_tflops)
    name = "search-compiled" if args.compile else "search"
    return {"name": name, **found, "difference": difference, "noise": noise}


if __name__ == "__main__":
    size = {"images": 7466, "folds": 5, "epochs": BUDGETS[-1], "batch_size": TrainSpec().batch_size}
    how = {"compile": False, "weights": "random:0", "device": "auto", "peak_tflops": 790.0}
    common.run(measure, "search", __doc__, **size, **how)
