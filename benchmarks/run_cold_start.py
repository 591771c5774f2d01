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
import time
from functools import partial
from pathlib import Path
from typing import Any

import common
import models

from cxr_fast.models import device
from cxr_fast.system import hardware

SAME = 1e-4
STAGES = ("interpreter", "import", "load", "first answer")
TORCH = "torch + open_clip"
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
from cxr_fast.cli import main
from cxr_fast.inference import batch
from cxr_fast.predict import Predictor
marks.append(time.monotonic())
predictor = Predictor(sys.argv[2], device="cpu")
marks.append(time.monotonic())
row = predictor([sys.argv[3]])[0].values()
"""
EAGER = """
import torch, open_clip
from cxr_fast.metrics import calibration
from cxr_fast.models import device
from cxr_fast.config import PreprocessSpec, from_dict
from cxr_fast.activations.encoder import normalise
from cxr_fast.data.images import load
from cxr_fast.training.run_folder import read_run
marks.append(time.monotonic())
device.prepare()
from pathlib import Path
run = read_run(Path(sys.argv[2]))
marks.append(time.monotonic())
pixels = torch.from_numpy(load(sys.argv[3], from_dict(PreprocessSpec, run.info["preprocess"]))[0][None])
mean, std = (torch.tensor(run.info[k]).reshape(1, 3, 1, 1) for k in ("mean", "std"))
row = calibration.apply(run.info["calibration"], run.raw_probabilities(normalise(pixels, mean, std)))[0]
"""


def once(code: str, model: Path, film: str) -> dict[str, Any]:
    """Marks and answer of one fresh process."""
    printed = common.python(HEAD + code + TAIL, time.monotonic(), model, film)
    return dict(json.loads(printed.splitlines()[-1]))


def stages(code: str, model: Path, film: str) -> dict[str, float]:
    """Seconds of each stage of one fresh process, and of the whole."""
    marks = once(code, model, film)["marks"]
    found = {name: b - a for name, (a, b) in zip(STAGES, itertools.pairwise(marks), strict=True)}
    return found | {"whole": marks[-1] - marks[0]}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every arm in turn, a fresh process each time."""
    if args.run is None:
        device.prepare()
        models.exported(folder, args.weights, ("fp32", "int8"))
    run = args.run or folder / "run"
    film = str(args.film or models.films(folder, None, 1)[0])
    processes = {form: (ONNX, run / f"model.{form}.onnx", film) for form in ("fp32", "int8")}
    processes[TORCH] = (EAGER, run, film)
    answers = {name: once(*words)["answer"] for name, words in processes.items()}
    apart = {
        form: max(abs(p - q) for p, q in zip(answers[form], answers[TORCH], strict=True)) for form in ("fp32", "int8")
    }
    print(f"largest difference to torch: {apart}")
    assert apart["fp32"] < SAME, f"fp32 and torch differ by {apart['fp32']:.1e}"
    samples, noise = common.turns({name: partial(stages, *words) for name, words in processes.items()}, args.rounds)
    each = {name: common.by_key(found) for name, found in samples.items()}
    whole = {name: found["whole"] for name, found in each.items()}
    common.spreads(whole, "s to the first probability")
    ratios = {form: common.ratios(whole[TORCH], whole[form]) for form in ("fp32", "int8")}
    return {
        "weights": args.run.name if args.run else args.weights,
        "threads": hardware.cpu_count(),
        "seconds": {name: {stage: common.spread(v) for stage, v in found.items()} for name, found in each.items()},
        "ratios": common.spreads(ratios, f"times as fast as {TORCH}"),
        "difference_to_torch": apart,
        "noise": noise,
    }


if __name__ == "__main__":
    common.run(measure, "cold-start", __doc__, run=Path, film=Path, rounds=7, weights="random:0")
