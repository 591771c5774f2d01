"""What more pixels cost: a film into the cache, and one film's answer by the float32 graph, at several image sizes.

    python benchmarks/run_image_size.py --film FILM [--weights random:0] [--sizes 224,336,512] [--rounds 5]

In turns, one thread, CPU seconds of this process: what others take of the machine lengthens waiting, not these. A film
into the cache is decoding, resizing and both views through ten blocks of twelve; an answer is the exported graph, from
pixels to probabilities, its head random. Ratios are round by round, to the first size. `operations`
counts the products of the blocks: 24 T D^2 + 4 T^2 D in each, T tokens of width D.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import common
import numpy as np
import onnxruntime
import torch

from cxr_fast.activations.encoder import Encoder, decode, with_size
from cxr_fast.config import CacheSpec, to_dict
from cxr_fast.data.images import flip
from cxr_fast.export.graph import build
from cxr_fast.models import backbone
from cxr_fast.models.tail import Head
from cxr_fast.training.run_folder import Member, Run

CLASSES = 14


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of one call, of all threads of this process."""
    began = time.process_time()
    call()
    return time.process_time() - began


def operations(tower: backbone.Backbone, blocks: int) -> float:
    """Floating-point operations of the products of some blocks, for one view."""
    tokens, width, _ = tower.shape
    return float(blocks * (24 * tokens * width**2 + 4 * tokens**2 * width))


def encode_film(encoder: Encoder, film: Path) -> None:
    """One film as `cxrfast cache` takes it: decoded, resized, both views through the frozen blocks."""
    found = decode(film, encoder.spec)
    assert found.pixels is not None, found.error
    pixels = found.pixels[None]
    encoder(np.concatenate([pixels, flip(pixels)]))


def session(tower: backbone.Backbone, spec: CacheSpec) -> onnxruntime.InferenceSession:
    """The float32 graph of a run on this tower, with a random head, on one thread."""
    mean, std = tower.statistics(spec.normalize)
    head = Head(tower.config["embed_dim"], CLASSES, dropout=0.0).eval()
    info = {
        "preprocess": to_dict(spec.preprocess),
        "classes": [f"class {c}" for c in range(CLASSES)],
        "calibration": None,
        "train": {},
        "unfreeze_blocks": spec.unfreeze_blocks,
        "mean": mean,
        "std": std,
    }
    run = Run(folder=Path(), info=info, members=(Member(visual=tower.visual, head=head),), chosen="", tta=None)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(build(run).SerializeToString(), options, providers=["CPUExecutionProvider"])


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    arms: dict[str, Callable[[], float]] = {}
    counted, sizes = {}, [int(size) for size in args.sizes.split(",")]
    for size in sizes:
        tower = backbone.load(args.weights, size)
        spec = with_size(CacheSpec(weights=args.weights), tower)
        encoder = Encoder(tower, spec, torch.device("cpu"), block=1)
        model = session(tower, spec)
        pixels = np.random.default_rng(0).integers(0, 256, (1, size, size), dtype=np.uint8)
        for name, call in (
            (f"cache {size}", partial(encode_film, encoder, args.film)),
            (f"answer {size}", partial(model.run, None, {"pixels": pixels})),
        ):
            call()
            arms[name] = partial(cpu_seconds, call)
        counted[size] = {"tokens": tower.shape[0], "operations": operations(tower, tower.depth - spec.unfreeze_blocks)}
    samples, others = common.turns(arms, args.rounds)
    out: dict[str, Any] = {"weights": Path(args.weights).name, "sizes": counted, "others": others}
    out["cpu_seconds"] = common.spreads(samples, "CPU seconds")
    ratios = {
        f"{what} {size} / {sizes[0]}": common.ratios(samples[f"{what} {size}"], samples[f"{what} {sizes[0]}"])
        for what in ("cache", "answer")
        for size in sizes[1:]
    }
    out["ratios"] = common.spreads(ratios, "ratio")
    first = counted[sizes[0]]["operations"]
    out["operations_ratio"] = {size: round(counted[size]["operations"] / first, 3) for size in sizes[1:]}
    print(f"by operations: {out['operations_ratio']}")
    return out


if __name__ == "__main__":
    common.run(measure, "image-size", __doc__, film=Path, weights="random:0", sizes="224,336,512", rounds=5)
