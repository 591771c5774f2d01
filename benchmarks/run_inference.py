"""One image through each form of the model, a folder of films, and one film from file to probabilities.

    python benchmarks/run_inference.py [--images DIR] [--rounds 8] [--weights random:0]

Each arm lives in a process of its own, as in `cxrfast bench compare`, since idle sessions of one process spin beside
the one that runs; the arms take turns, so that a machine that drifts drifts for all of them. fp32 and int8 are compared
with torch before any is timed. The folder's bound is the CPU seconds of decoding and the model's over the cores.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from functools import partial
from pathlib import Path
from typing import Any

import common
import models
import numpy as np

from cxr_fast.bench import measure as timing
from cxr_fast.bench.comparison import ModelProcess, working
from cxr_fast.data.images import load
from cxr_fast.inference.predictor import Predictor, golden_pixels
from cxr_fast.models import device
from cxr_fast.system import hardware

TARGETS = {"fp32 of torch": 0.45, "int8 of fp32": 0.38, "folder of its bound": 0.9, "p90 ms": 100.0}
EACH, AGREE = 5, {"fp32": 1e-5, "int8": 0.02}


def single(run: Path, rounds: int) -> dict[str, Any]:
    """Seconds of one image in turns: torch eager float32, ONNX Runtime float32 and int8."""

    def turn(worker: ModelProcess) -> float:
        return timing.median([worker.call("time", 0, 1) for _ in range(EACH)])

    with contextlib.ExitStack() as stack:
        workers = {form: stack.enter_context(working(models.arm(run, form))) for form in ("torch", "fp32", "int8")}
        for worker in workers.values():
            worker.call("pixels", golden_pixels(worker.about.spec.size))
        answers = {form: worker.call("answer", 0, 1) for form, worker in workers.items()}
        apart = {form: float(np.abs(answers[form] - answers["torch"]).max()) for form in AGREE}
        print(f"largest probability difference to torch: {apart}")
        assert all(apart[form] <= AGREE[form] for form in apart), apart
        medians, noise = common.turns({form: partial(turn, worker) for form, worker in workers.items()}, rounds)
    spreads, ratios = common.spreads(medians, "s/image"), {}
    for name in ("fp32 of torch", "int8 of fp32"):
        ratio = timing.ratio_interval(*(medians[form] for form in name.split(" of ")))
        ratios[name] = vars(ratio) | {"target": TARGETS[name]}
        print(f"{name}: {ratio.median:.3f} [{ratio.low}, {ratio.high}], target at most {TARGETS[name]}")
    return {
        "images_a_turn": EACH,
        "seconds_an_image": spreads,
        "ratios": ratios,
        "largest_difference_to_torch": apart,
        # The arms' processes are others to this one, so this is no noise.
        "cpu_share_of_other_processes_and_arms": noise["share"],
    }


def whole(run: Path, paths: list[str], rounds: int) -> dict[str, Any]:
    """The folder's throughput against its bound, and one film after the other from file to probabilities, in int8."""
    predictor = Predictor(run / "model.int8.onnx", device="cpu")
    many = Predictor(run / "model.int8.onnx", device="cpu", spin=False)  # as `predict` opens it
    pixels = np.stack([predictor.pixels(path) for path in paths[:8]])
    predictor.run(pixels)
    latencies: list[float] = []

    def one_round() -> dict[str, float]:
        began = time.process_time()
        for path in paths:
            load(path, predictor.spec)
        decode = (time.process_time() - began) / len(paths)
        # Wall time on all cores, and not CPU time, which counts the spinning of ONNX Runtime's threads.
        model = timing.median([common.seconds(predictor.run, pixels) for _ in range(3)]) / len(pixels)
        bound = decode / hardware.cpu_count() + model
        began = time.perf_counter()
        assert all(result.ok for result in many.stream(paths))
        folder = (time.perf_counter() - began) / len(paths)
        latencies.extend(common.seconds(predictor, [path]) for path in paths[: max(16, 130 // rounds)])
        return {"decode": decode, "model": model, "bound": bound, "folder": folder, "share": bound / folder}

    samples, noise = common.turns({"folder": one_round}, rounds)
    spreads = common.spreads(common.by_key(samples["folder"]), "s/image, and share")
    verdict, middle = timing.verdict(latencies, TARGETS["p90 ms"] / 1000, 90), timing.percentile(latencies, 50)
    print(
        f"file to probabilities, n {verdict.n}: p50 {1000 * middle:.1f} ms, p90 {1000 * verdict.estimate:.1f} ms, "
        f"99 % bound {'-' if verdict.bound is None else f'{1000 * verdict.bound:.1f} ms'}: {verdict.result}"
    )
    return {
        "films": len(paths),
        "folder": spreads | {"target_share": TARGETS["folder of its bound"]},
        "file_to_probabilities": vars(verdict) | {"p50": middle},
        "threads": predictor.threads,
        "noise": noise,
    }


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    device.prepare()
    made = models.exported(folder, args.weights, ("fp32", "int8"))
    paths = models.films(folder, args.images, args.count)
    return {
        "weights": args.weights,
        "nodes": {one.variant: one.info["nodes"] for one in made},
        "single": single(folder / "run", args.rounds),
        "whole": whole(folder / "run", paths, args.rounds),
    }


if __name__ == "__main__":
    common.run(measure, "inference", __doc__, images=Path, count=48, rounds=8, weights="random:0")
