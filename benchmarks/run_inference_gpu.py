"""The float16 file on a GPU: one image plain, with bound buffers, and as a CUDA graph; batches; a folder of films.

    python benchmarks/run_inference_gpu.py [--images DIR] [--rounds 8] [--peak-tflops 790]

The three ways of one image are compared with torch on the CPU before they are timed, and take turns.
The floor of a batch is the graph's products over the peak (float16, dense; 790 TFLOP/s is an H200's measured best).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import models
import numpy as np

from cxr_fast.bench import measure
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
    providers = [("CUDAExecutionProvider", options)]
    session = onnxruntime.InferenceSession(path, providers=providers, enable_fallback=0)
    assert session.get_providers()[0] == "CUDAExecutionProvider", session.get_providers()
    classes = next(node.shape[1] for node in session.get_outputs() if node.name == "probabilities")
    source = onnxruntime.OrtValue.ortvalue_from_numpy(pixels, "cuda", 0)
    answer = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((len(pixels), classes), np.float32), "cuda", 0)
    binding = session.io_binding()
    binding.bind_ortvalue_input("pixels", source)
    binding.bind_ortvalue_output("probabilities", answer)
    for node in session.get_outputs():
        if node.name != "probabilities":
            rest = onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros((len(pixels), node.shape[1]), np.float32), "cuda", 0
            )
            binding.bind_ortvalue_output(node.name, rest)

    def call() -> np.ndarray:
        source.update_inplace(pixels)
        session.run_with_iobinding(binding)
        return np.asarray(answer.numpy())

    return call


def single(path: Path, rounds: int, slow: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    """Seconds of one image, three ways in turns."""
    pixels = golden_pixels(224)
    predictor = Predictor(path, device="cuda")
    arms: dict[str, Callable[[], np.ndarray]] = {
        "plain": lambda: predictor.run(pixels),
        "bound buffers": bound(path, pixels, graph=False),
        "CUDA graph": bound(path, pixels, graph=True),
    }
    want = slow(pixels)
    for name, call in arms.items():
        for _ in range(5):  # a graph is captured on the way
            apart = float(np.abs(call() - want).max())
        assert apart <= AGREE, f"{name} differs from torch by {apart:.1e}"
    seconds = measure.interleave(arms, rounds * 25, 10)
    common.show(spreads := {name: common.spread(values) for name, values in seconds.items()}, "s/image")
    return {"seconds": spreads}


def batches(path: Path, rounds: int, peak: float) -> dict[str, Any]:
    """Images a second at each batch, and their share of the floor."""
    predictor = Predictor(path, device="cuda")
    rows = {}
    for batch in BATCHES:
        pixels = np.repeat(golden_pixels(224), batch, axis=0)
        seconds = measure.measure(lambda pixels=pixels: predictor.run(pixels), warmup=5, repeats=max(10, rounds))  # type: ignore[misc]
        rate = batch / measure.median(seconds)
        share = rate * GFLOP_AN_IMAGE / 1000 / peak
        rows[str(batch)] = {"images_per_second": rate, "share_of_peak": share, "seconds": common.spread(seconds)}
        print(f"batch {batch}: {rate:,.0f} images/s, {share:.0%} of {peak:g} TFLOP/s")
    return rows


def folder(path: Path, films: list[str], rounds: int) -> dict[str, Any]:
    """Seconds a film from files, through the stream."""
    predictor, seconds = Predictor(path, device="cuda"), []
    for _ in range(rounds):
        began = time.perf_counter()
        assert all(result.ok for result in predictor.stream(films, batch_size=64))
        seconds.append((time.perf_counter() - began) / len(films))
    common.show({"folder": common.spread(seconds)}, "s/image")
    return common.spread(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--weights", default="random:0")
    parser.add_argument("--peak-tflops", type=float, default=790.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if reason := runtime.obstacle("cuda"):
        raise SystemExit(f"ONNX Runtime has no GPU here: {reason}")
    with tempfile.TemporaryDirectory() as scratch:
        where = Path(scratch)
        (found,) = models.exported(where, args.weights, ("fp16",))
        result: dict[str, Any] = {"weights": args.weights, "nodes": found.info["nodes"]}
        result["single"] = single(found.path, args.rounds, models.torch_road(where))
        result["batches"] = batches(found.path, args.rounds, args.peak_tflops)
        result["folder"] = folder(found.path, models.films(where, args.images, args.count), args.rounds)
        common.save("inference-gpu", result, args.json)


if __name__ == "__main__":
    main()
