"""One image through each form of the model, a folder of films, and one film from file to probabilities.

    python benchmarks/run_inference.py [--images DIR] [--rounds 8] [--weights random:0]

Each arm lives in a process of its own, since idle sessions of one process spin beside the one that runs; the arms take
turns, so that a machine that drifts drifts for all of them. fp32 and int8 are compared with torch before any is timed.
The folder's bound is the CPU seconds of decoding and model over the cores. `--arm` is for the processes it starts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import models
import numpy as np

from cxr_fast.bench import measure
from cxr_fast.data.images import load
from cxr_fast.inference.predictor import Predictor, golden_pixels
from cxr_fast.models import device
from cxr_fast.system import hardware

TARGETS = {"fp32 of torch": 0.45, "int8 of fp32": 0.38, "folder of its bound": 0.9, "p90 ms": 100.0}
EACH, AGREE = 10, {"fp32": 1e-5, "int8": 0.02}


class Arm:
    """A process that loads one form of the model, answers once, then times images when told to."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        command = [sys.executable, __file__, "--arm", name, "--folder", str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer = np.array(self._read())

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the process of {self.name} ended"
        return json.loads(line)

    def turn(self, count: int) -> list[float]:
        """Seconds of `count` images, after one that is not timed."""
        assert self.process.stdin is not None
        print(count, file=self.process.stdin, flush=True)
        return [float(seconds) for seconds in self._read()]

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def serve(name: str, folder: Path) -> None:
    """What an arm's process does."""
    device.prepare()
    if name == "torch":
        run, size = models.torch_road(folder), 224
    else:
        predictor = Predictor(folder / "run" / f"model.{name}.onnx", device="cpu")
        run, size = predictor.run, predictor.spec.size
    pixels = golden_pixels(size)
    print(json.dumps(run(pixels)[0].tolist()), flush=True)
    for line in sys.stdin:
        time.sleep(0.2)  # until the threads of the arm before no longer spin
        run(pixels)
        times = []
        for _ in range(int(line)):
            began = time.perf_counter()
            run(pixels)
            times.append(time.perf_counter() - began)
        print(json.dumps(times), flush=True)


def single(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of one image in turns: torch eager float32, ONNX Runtime float32 and int8."""
    arms = [Arm(name, folder) for name in ("torch", "fp32", "int8")]
    apart = {arm.name: float(np.abs(arm.answer - arms[0].answer).max()) for arm in arms[1:]}
    print(f"largest probability difference to torch: {apart}")
    assert all(apart[name] <= AGREE[name] for name in apart), apart
    medians: dict[str, list[float]] = {arm.name: [] for arm in arms}
    with hardware.OtherCpu() as noise:
        for _ in range(rounds):
            for arm in arms:
                medians[arm.name].append(measure.median(arm.turn(EACH)))
    for arm in arms:
        arm.end()
    ratios = {
        "fp32 of torch": measure.ratio_interval(medians["fp32"], medians["torch"]),
        "int8 of fp32": measure.ratio_interval(medians["int8"], medians["fp32"]),
    }
    common.show(spreads := {name: common.spread(values) for name, values in medians.items()}, "s/image")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio.median:.3f} [{ratio.low}, {ratio.high}], target at most {TARGETS[name]}")
    # The arms' own processes count as others here, so the noise can only be told where nothing else ran: it is not.
    return {
        "images_a_turn": EACH,
        "seconds_an_image": spreads,
        "ratios": {name: vars(ratio) | {"target": TARGETS[name]} for name, ratio in ratios.items()},
        "largest_difference_to_torch": apart,
        "cpu_share_of_other_processes_and_arms": noise.share,
    }


def whole(folder: Path, paths: list[str], rounds: int) -> dict[str, Any]:
    """The folder's throughput against its bound, and one film after the other from file to probabilities, in int8."""
    predictor = Predictor(folder / "run" / "model.int8.onnx", device="cpu")
    cores, pixels = hardware.cpu_count(), np.stack([predictor.pixels(path) for path in paths[:8]])
    predictor.run(pixels)
    rows: dict[str, list[float]] = {"decode": [], "model": [], "bound": [], "folder": [], "share": []}
    latencies = []
    with hardware.OtherCpu() as noise:
        for _ in range(rounds):
            began = time.process_time()
            for path in paths:
                load(path, predictor.spec)
            rows["decode"].append((time.process_time() - began) / len(paths))
            # Wall time on all cores, and not CPU time, which counts the spinning of ONNX Runtime's threads.
            began = time.perf_counter()
            for _ in range(3):
                predictor.run(pixels)
            rows["model"].append((time.perf_counter() - began) / (3 * len(pixels)))
            rows["bound"].append(rows["decode"][-1] / cores + rows["model"][-1])
            began = time.perf_counter()
            assert all(result.ok for result in predictor.stream(paths))
            rows["folder"].append((time.perf_counter() - began) / len(paths))
            rows["share"].append(rows["bound"][-1] / rows["folder"][-1])
            for path in paths[: max(16, 130 // rounds)]:
                began = time.perf_counter()
                predictor([path])
                latencies.append(time.perf_counter() - began)
    spreads = {name: common.spread(values) for name, values in rows.items()}
    common.show(spreads, "s/image, and share")
    verdict = measure.verdict(latencies, TARGETS["p90 ms"] / 1000, 90)
    bound = "-" if verdict.bound is None else f"{1000 * verdict.bound:.1f} ms"
    print(
        f"file to probabilities, n {verdict.n}: p50 {1000 * measure.percentile(latencies, 50):.1f} ms, p90 "
        f"{1000 * verdict.estimate:.1f} ms, 99 % bound {bound}: {verdict.result}"
    )
    if noise.noisy:
        print(f"NOISY: other processes took {noise.share:.0%} of the machine")
    return {
        "films": len(paths),
        "folder": spreads | {"target_share": TARGETS["folder of its bound"]},
        "file_to_probabilities": vars(verdict) | {"p50": measure.percentile(latencies, 50)},
        "threads": predictor.threads,
        "noise": {"share": noise.share, "noisy": noise.noisy},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of full-size films; phantoms otherwise")
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--weights", default="random:0")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm", choices=["torch", "fp32", "int8"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        serve(args.arm, args.folder)
        return
    device.prepare()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        found = models.exported(folder, args.weights, ("fp32", "int8"))
        paths = models.films(folder, args.images, args.count)
        result = {"weights": args.weights, "nodes": {one.variant: one.info["nodes"] for one in found}}
        result |= {"single": single(folder, args.rounds), "whole": whole(folder, paths, args.rounds)}
    common.save("inference", result, args.json)


if __name__ == "__main__":
    main()
