"""From the start of a process to the first probability: the exported file in fp32 and int8, and torch with open_clip.

    python benchmarks/run_cold_start.py [--run RUN] [--rounds 7]

Each a fresh Python process, in turn: the road of `cxrfast predict` (import, open the file and check its seal, decode a
film, first run), and the same model in torch (import torch and open_clip, build the tower and check its hash, decode,
first run). The files are in the page cache. Without --run, a ViT-B/16 of random weights is cached, trained for one
epoch and exported first (see `models.py`). The answers are compared before anything is timed: fp32 with torch to
1e-4; how far int8 is off is in the result.
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
import models

from cxr_fast.bench.latency import films
from cxr_fast.models import device
from cxr_fast.system import hardware

SAME = 1e-4
STAGES = ("interpreter", "import", "load", "first answer")
# `time.monotonic` counts from the same moment in every process, so the parent's start is the child's too.
HEAD = """
import sys, time
marks = [float(sys.argv[1]), time.monotonic()]
"""
TAIL = """
marks.append(time.monotonic())
import json
print(json.dumps({"marks": marks, "answer": [float(p) for p in row]}))
"""
ONNX = """
from cxr_fast import answers, cli
from cxr_fast.inference.predictor import Predictor
marks.append(time.monotonic())
predictor = Predictor(sys.argv[2], device="cpu")
marks.append(time.monotonic())
row = predictor([sys.argv[3]])[0].values()
"""
TORCH = """
import torch, open_clip
from cxr_fast import calibrate, cpu
from cxr_fast.config import PreprocessSpec, from_dict
from cxr_fast.activations.encoder import normalise
from cxr_fast.data.images import load
from cxr_fast.training.run_folder import read_run
marks.append(time.monotonic())
cpu.prepare()
from pathlib import Path
run = read_run(Path(sys.argv[2]))
marks.append(time.monotonic())
pixels = torch.from_numpy(load(sys.argv[3], from_dict(PreprocessSpec, run.info["preprocess"]))[0][None])
mean, std = (torch.tensor(run.info[k]).reshape(1, 3, 1, 1) for k in ("mean", "std"))
row = calibrate.apply(run.info["calibration"], run.raw_probabilities(normalise(pixels, mean, std)))[0]
"""


def once(code: str, model: Path, film: Path) -> dict[str, Any]:
    """One fresh process: seconds of each stage and of the whole, and its answer."""
    command = [sys.executable, "-c", HEAD + code + TAIL, str(time.monotonic()), str(model), str(film)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    marks = found["marks"]
    seconds = {name: b - a for name, (a, b) in zip(STAGES, itertools.pairwise(marks), strict=True)}
    return {"seconds": seconds | {"whole": marks[-1] - marks[0]}, "answer": found["answer"]}


def compare(arms: dict[str, tuple[str, Path]], film: Path) -> dict[str, float]:
    """Largest difference in probability of each arm to torch, and a warm page cache; fp32 must be torch's."""
    answers = {name: once(code, model, film)["answer"] for name, (code, model) in arms.items()}
    torch_says = answers["torch + open_clip"]
    apart = {
        name: max(abs(p - q) for p, q in zip(answer, torch_says, strict=True))
        for name, answer in answers.items()
        if answer is not torch_says
    }
    assert apart["fp32"] < SAME, f"fp32 and torch differ by {apart['fp32']:.1e}"
    print("largest difference to torch: " + ", ".join(f"{name} {value:.1e}" for name, value in apart.items()))
    return apart


def measure(run: Path, film: Path, rounds: int) -> dict[str, Any]:
    """Every arm in turn, a fresh process each time."""
    arms = {
        "fp32": (ONNX, run / "model.fp32.onnx"),
        "int8": (ONNX, run / "model.int8.onnx"),
        "torch + open_clip": (TORCH, run),
    }
    apart = compare(arms, film)
    samples: dict[str, dict[str, list[float]]] = {name: {s: [] for s in (*STAGES, "whole")} for name in arms}
    with hardware.OtherCpu() as noise:
        for _ in range(rounds):
            for name, (code, model) in arms.items():
                for stage, value in once(code, model, film)["seconds"].items():
                    samples[name][stage].append(value)
    whole = {name: found["whole"] for name, found in samples.items()}
    common.show({name: common.spread(values) for name, values in whole.items()}, "s to the first probability")
    if noise.noisy:
        print(f"NOISY: other processes took {noise.share:.0%} of the machine")
    ratios = {
        name: common.spread([a / b for a, b in zip(whole["torch + open_clip"], whole[name], strict=True)])
        for name in ("fp32", "int8")
    }
    for name, r in ratios.items():
        print(f"torch + open_clip over {name}: {r['median']:.2f} [{r['min']:.2f}, {r['max']:.2f}] times")
    spreads = {name: {s: common.spread(v) for s, v in found.items()} for name, found in samples.items()}
    return {
        "seconds": spreads,
        "ratios": ratios,
        "difference_to_torch": apart,
        "noise": {"share": noise.share, "noisy": noise.noisy},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run folder with model.fp32.onnx and model.int8.onnx")
    parser.add_argument("--film", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--weights", default="random:0")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.run is None:
            device.prepare()
            models.exported(Path(scratch), args.weights, ("fp32", "int8"))
        film = args.film or Path(films(Path(scratch), count=1)[0])
        result = measure(args.run or Path(scratch) / "run", film, args.rounds)
    weights = str(args.run.name) if args.run else args.weights
    common.save("cold-start", {"weights": weights, "threads": hardware.cpu_count(), **result}, args.json)


if __name__ == "__main__":
    main()
