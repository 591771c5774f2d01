"""The float16 file on a GPU: one image plain, with bound buffers, and as a CUDA graph; batches; a folder of films.

    python benchmarks/run_inference_gpu.py [--images DIR] [--rounds 8] [--peak-tflops 790]

The three ways of one image are compared with torch on the CPU before they are timed, and take turns.
The floor of a batch is the graph's products over the peak (float16, dense; 790 TFLOP/s is an H200's measured best).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import models
import numpy as np

from cxr_fast.bench import measure as timing
from cxr_fast.bench.comparison import working
from cxr_fast.inference import runtime
from cxr_fast.inference.predictor import Predictor, golden_pixels
from cxr_fast.inference.runtime import onnxruntime

BATCHES = (32, 64, 128, 256)
AGREE = 0.02
# Multiply-adds of a ViT-B/16 at 224 pixels with its last block for one token, times two.
GFLOP_AN_IMAGE = 32.1


def bound(path: Path, pixels: np.ndarray, *, graph: bool) -> Callable[[], np.ndarray]:
    """A call on buffers that stay on the device, the copies of input and answer included; optionally a CUDA graph."""
    options = {"device_id": 0, "use_tf32": 0, "enable_cuda_graph": int(graph)}
    session = onnxruntime.InferenceSession(path, providers=[("CUDAExecutionProvider", options)], enable_fallback=0)
    assert session.get_providers()[0] == "CUDAExecutionProvider", session.get_providers()
    binding, source = session.io_binding(), onnxruntime.OrtValue.ortvalue_from_numpy(pixels, "cuda", 0)
    binding.bind_ortvalue_input("pixels", source)
    answers = {}
    for node in session.get_outputs():
        empty = np.zeros((len(pixels), node.shape[1]), np.float32)
        answers[node.name] = onnxruntime.OrtValue.ortvalue_from_numpy(empty, "cuda", 0)
        binding.bind_ortvalue_output(node.name, answers[node.name])

    def call() -> np.ndarray:
        source.update_inplace(pixels)
        session.run_with_iobinding(binding)
        return np.asarray(answers["probabilities"].numpy())

    return call


def single(path: Path, predictor: Predictor, rounds: int) -> dict[str, Any]:
    """Seconds of one image, three ways in turns."""
    pixels = golden_pixels(224)
    arms: dict[str, Callable[[], np.ndarray]] = {
        "plain": partial(predictor.run, pixels),
        "bound buffers": bound(path, pixels, graph=False),
        "CUDA graph": bound(path, pixels, graph=True),
    }
    with working(models.arm(path.parent, "torch")) as slow:
        slow.call("pixels", pixels)
        want = slow.call("answer", 0, 1)
    for name, call in arms.items():
        for _ in range(5):  # a graph is captured on the way
            apart = float(np.abs(call() - want).max())
        assert apart <= AGREE, f"{name} differs from torch by {apart:.1e}"
    return {"seconds": common.spreads(timing.interleave(arms, rounds * 25, 10), "s/image")}


def batches(predictor: Predictor, rounds: int, peak: float) -> dict[str, Any]:
    """Images a second at each batch, and their share of the floor."""
    rows = {}
    for batch in BATCHES:
        work = partial(predictor.run, np.repeat(golden_pixels(224), batch, axis=0))
        seconds = timing.measure(work, warmup=5, repeats=max(10, rounds))
        rate = batch / timing.median(seconds)
        share = rate * GFLOP_AN_IMAGE / 1000 / peak
        rows[str(batch)] = {"images_per_second": rate, "share_of_peak": share, "seconds": common.spread(seconds)}
        print(f"batch {batch}: {rate:,.0f} images/s, {share:.0%} of {peak:g} TFLOP/s")
    return rows


def folder_of_films(predictor: Predictor, films: list[str], rounds: int) -> dict[str, Any]:
    """Seconds a film from files, through the stream."""

    def work() -> None:
        assert all(result.ok for result in predictor.stream(films, batch_size=64))

    samples = {"folder": [common.seconds(work) / len(films) for _ in range(rounds)]}
    return common.spreads(samples, "s/image")["folder"]


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if reason := runtime.obstacle("cuda"):
        raise SystemExit(f"ONNX Runtime has no GPU here: {reason}")
    (made,) = models.exported(folder, args.weights, ("fp16",))
    predictor = Predictor(made.path, device="cuda")
    return {
        "weights": args.weights,
        "nodes": made.info["nodes"],
        "single": single(made.path, predictor, args.rounds),
        "batches": (found := batches(predictor, args.rounds, args.peak_tflops)),
        "best_share_of_peak": max(each["share_of_peak"] for each in found.values()),
        "folder": folder_of_films(predictor, models.films(folder, args.images, args.count), args.rounds),
    }


if __name__ == "__main__":
    options = {"images": Path, "count": 512, "rounds": 8, "weights": "random:0", "peak_tflops": 790.0}
    common.run(measure, "inference-gpu", __doc__, **options)
