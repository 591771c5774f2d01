"""One model in our files, in OpenVINO and in torch, eager and compiled: the time of one image, and what it costs.

    python benchmarks/run_peers.py --run RUN [--images DIR] [--films 256] [--rounds 8] [--calls 11] [--threads 2]
        [--more FILE.onnx,FILE.onnx] [--calibration 160] [--only "ours int8,OpenVINO int8"]

RUN is a run folder with model.fp32.onnx, and model.int8.onnx where `cxrfast export` kept one. OpenVINO and NNCF are of
their own: benchmarks/README.md says how to install them. An engine that is missing, or that this CPU cannot run, is a
row with the reason.

Each engine has a process of its own, as in `cxrfast bench compare`, the same number of threads, and one image at a
time, on the CPU. First all of them answer the check films of the export: how far their probabilities are from torch
float32 stands beside what the same films do when they are saved as JPEG 95 or moved by one pixel. Then they are timed
in rounds, in turn. NNCF takes its ranges from training films that are not among those checked.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnxruntime
import peers

from cxr_fast.bench import measure as timing
from cxr_fast.bench.comparison import SAME, Arm, ModelProcess, working
from cxr_fast.bench.results import describe_ratio
from cxr_fast.config import FILM_CHANGES
from cxr_fast.errors import CxrFastError, InputError, ParityError
from cxr_fast.export.parity import Checks, checks_of
from cxr_fast.export.variants import measure_yardstick
from cxr_fast.inference import model_file
from cxr_fast.metrics import calibration, drift
from cxr_fast.models import device
from cxr_fast.system import hardware
from cxr_fast.training.run_folder import Run, clean, read_run

OURS, OURS_FP16, OURS_INT8, EAGER = "ours float32", "ours float16", "ours int8", "torch eager float32"
COMPILED, OPENVINO = "torch compiled float32", "OpenVINO float32"
OPENVINO_BF16, OPENVINO_INT8 = "OpenVINO bfloat16", "OpenVINO int8 (NNCF)"
# What must answer as torch float32 does; another engine that does not is left out, and ours is a fault.
EXACT = (OURS, EAGER, COMPILED, OPENVINO)
FEW = 16
Samples = Mapping[str, list[list[float]]]  # seconds of each call, by engine and round


def engines(folder: Path, run: Run, args: argparse.Namespace, films: Path) -> dict[str, Arm]:
    """Every engine by name, ours first; `films` holds the pixels that NNCF takes its ranges from."""
    final, file = run.info["final"]["kind"], folder / "model.fp32.onnx"
    ours = {OURS: file, OURS_INT8: folder / "model.int8.onnx"}
    if (half := folder / "model.fp16.onnx").is_file():
        ours[OURS_FP16] = half
    ours |= {f"ours {Path(name).name}": Path(name) for name in filter(None, args.more.split(","))}
    every = {name: Arm(path=path, device="cpu", threads=args.threads) for name, path in ours.items()}
    every[EAGER] = Arm(path=folder, torch=True, final=final, threads=args.threads)
    every[COMPILED] = Arm(path=folder, final=final, threads=args.threads, opener=peers.compiled_torch)
    for name, how in (
        (OPENVINO, {}),
        (OPENVINO_BF16, {"precision": peers.BFLOAT16}),
        (OPENVINO_INT8, {"films": films}),
    ):
        every[name] = Arm(path=file, threads=args.threads, opener=partial(peers.openvino, **how))
    return every


def opened(
    stack: contextlib.ExitStack, arms: Mapping[str, Arm], checks: Checks, reference: np.ndarray
) -> tuple[dict[str, ModelProcess], dict[str, np.ndarray], dict[str, str]]:
    """The processes of the engines that open, their probabilities (n, C) of the check films, and why others do not.

    The films are answered one at a time, by as many engines beside each other as there are cores for, and stay with
    each for the timing. Eager torch made the reference (n, C), and answers the first FEW again.
    """

    def attempt(name: str) -> tuple[ModelProcess, np.ndarray] | str:
        print(f"opening {name}", flush=True)
        arm, pixels = arms[name], checks.pixels
        count = min(FEW, len(pixels)) if name == EAGER else len(pixels)
        try:
            worker = stack.enter_context(working(arm))
            worker.call("pixels", pixels)
            each = [worker.call("answer", i, 1) for i in range(count)]
        except CxrFastError as error:
            return str(error).replace(f"{arm.path.parent}{os.sep}", "")  # no folder of this machine
        print(f"{name} answered {count} films", flush=True)
        return worker, np.concatenate([*each, reference[count:]])

    threads = max(arm.threads or 1 for arm in arms.values())
    with ThreadPoolExecutor(max(1, hardware.cpu_count() // threads)) as pool:
        slowest_first = list(arms)[::-1]  # NNCF
        made = dict(zip(slowest_first, pool.map(attempt, slowest_first), strict=True))
    found = {name: each for name in arms if not isinstance(each := made[name], str)}
    missing = {name: each for name in arms if isinstance(each := made[name], str)}
    workers = {name: worker for name, (worker, _) in found.items()}
    return workers, {name: answers for name, (_, answers) in found.items()}, missing


def differing(drifts: Mapping[str, drift.Drift]) -> dict[str, str]:
    """Why engines that compute in float32 are not timed; ParityError for ours and torch's own."""
    apart = {name: drifts[name].largest for name in EXACT if name in drifts and not drifts[name].largest <= SAME}
    texts = {
        name: f"differs from torch float32 by {far:.1e} in probability (limit {SAME:g})" for name, far in apart.items()
    }
    for name in (OURS, EAGER):
        if name in texts:
            raise ParityError(f"{name} {texts[name]}; nothing was timed. `cxrfast verify` says what is wrong.")
    return texts


def timed(workers: Mapping[str, ModelProcess], rounds: int, calls: int) -> Samples:
    """Seconds of single images: in each round every engine's turn of `calls`, the same films for all."""
    samples: dict[str, list[list[float]]] = {name: [] for name in workers}
    for done in range(rounds):
        print(f"round {done + 1} of {rounds}", flush=True)
        for name, worker in workers.items():
            samples[name].append([worker.call("time", done * calls + k, 1) for k in range(calls)])
    return samples


def figures(samples: Samples, drifts: Mapping[str, drift.Drift]) -> dict[str, dict[str, Any]]:
    """Times, the ratio to ours in float32 of the same round, and drift of each engine, JSON-ready."""
    medians = {name: [timing.median(turn) for turn in turns] for name, turns in samples.items()}
    out = {}
    for name, turns in samples.items():
        every = [seconds for turn in turns for seconds in turn]
        out[name] = {
            "seconds": {**timing.spread(every), **timing.summary(every)},
            "round_medians": medians[name],
            "over_ours_float32": timing.ratio_fields(medians[name], medians[OURS]) if OURS in medians else None,
            "drift": clean(asdict(drifts[name])),
        }
    return out


def at_equal_drift(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each other engine: the fastest of ours that changes no more decisions, and its time over the other's."""
    out = {}
    for name, row in rows.items():
        limit = row["drift"]["flips"]
        ours = [each for each in rows if each.startswith("ours ") and rows[each]["drift"]["flips"] <= limit]
        if name.startswith("ours ") or not ours:
            continue
        best = min(ours, key=lambda each: rows[each]["seconds"]["median"])
        ratio = timing.ratio_fields(rows[best]["round_medians"], row["round_medians"])
        out[name] = {"ours": best, "ratio": ratio}
    return out


def page(rows: Mapping[str, Any], missing: Mapping[str, str], yardstick: Mapping[str, Any]) -> str:
    """The engines as a table in Markdown, the yardstick below them, and why an engine is not there."""

    def costs(far: Mapping[str, Any]) -> list[str]:
        drops = [far["p99"], far["macro_drop"], far["map_drop"]]
        return [f"{far['flips']:.1f}", *("" if d is None else f"{d:.4f}" for d in drops)]

    lines = []
    for name, row in rows.items():
        s, ratio = row["seconds"], row["over_ours_float32"]
        p90 = s["percentiles"].get("90")
        times = [s["median"], p90, s["min"], s["max"]]
        shown = ["" if t is None else f"{1000 * t:.1f}" for t in times]
        lines.append([name, *shown, str(s["n"]), describe_ratio(ratio) if ratio else "", *costs(row["drift"])])
    lines += [[name, *[""] * 10] for name in missing]
    lines += [[f"film: {FILM_CHANGES[name]}", *[""] * 6, *costs(far)] for name, far in yardstick.items()]
    head = ["engine", "median, ms", "p90", "min", "max", "n", "times ours float32", "decisions changed of 10,000"]
    text = common.table([*head, "p99 of difference", "AUC drop", "mAP drop"], lines)
    return "\n".join([text, *(f"- {name}: not measured, {why}" for name, why in missing.items())])


def read(folder: Path) -> Run:
    """The run with the final model that its float32 file is of; InputError where they are of different weights."""
    file = folder / "model.fp32.onnx"
    said = model_file.read(file)
    run = read_run(folder, said["final"]["kind"])
    if said["model_sha256"] != run.info["model_sha256"]:
        raise InputError(f"--run: {file} was exported from other weights than those of {folder}.")
    return run


def prepared(args: argparse.Namespace, run: Run, films: Path) -> tuple[Checks, drift.Yardstick]:
    """The check films with torch's answers, and what changed films do; writes the pixels for NNCF to `films`."""
    stages = set[str]()

    def say(stage: str, done: int, total: int) -> None:
        if stage not in stages:
            print(stage, flush=True)
            stages.add(stage)

    checks = checks_of(run, args.images, args.films, say, rounding=args.calibration)
    if not len(checks.rounding):
        raise InputError("--images: no training film besides the checked ones is readable; NNCF needs some.")
    np.save(films, checks.rounding)
    return checks, measure_yardstick(run, checks, args.run / "model.fp32.onnx", say)


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    if args.run is None:
        raise SystemExit("--run: give a run folder with model.fp32.onnx (`cxrfast export RUN --variants fp32,int8`).")
    cores = device.prepare()  # of the reference and the yardstick, which are not timed
    args.threads = args.threads or cores
    load = [os.getloadavg()[0]]
    run, films = read(args.run), scratch / "films.npy"
    arms = engines(args.run, run, args, films)
    asked = [name.strip() for name in args.only.split(",")] if args.only else list(arms)
    if unknown := [name for name in asked if name not in arms]:
        raise SystemExit(f"--only: {unknown[0]!r} is not one of {', '.join(arms)}.")
    checks, yardstick = prepared(args, run, films)
    reference = calibration.apply(run.info["calibration"], checks.raw)
    with hardware.OtherCpu() as others, contextlib.ExitStack() as stack:  # children are waited for first: our own CPU
        workers, answers, missing = opened(stack, {name: arms[name] for name in asked}, checks, reference)
        where = {name: worker.about.where for name, worker in workers.items()}
        drifts = {
            name: drift.measure(reference, found, checks.labels, run.info["thresholds"], yardstick)
            for name, found in answers.items()
        }
        missing |= differing(drifts)
        samples = timed({name: w for name, w in workers.items() if name not in missing}, args.rounds, args.calls)
    load.append(os.getloadavg()[0])
    rows = figures(samples, drifts)
    equal, changes = at_equal_drift(rows), {name: clean(asdict(far)) for name, far in yardstick.changes.items()}
    print(page(rows, missing, changes))
    for name, found in equal.items():
        print(f"{found['ours']} over {name}, which changes no fewer decisions: {describe_ratio(found['ratio'])}")
    print(f"int8 on this CPU: {hardware.describe_int8()}")
    print(f"other processes took {others.share or 0:.0%} of the machine")
    return {
        "gpu": None,  # nothing here runs on one
        "peers": {"onnxruntime": onnxruntime.__version__, **versions("openvino", "nncf")},
        "run": args.run.name,
        "weights": Path(run.info["cache"]["weights"]).name,
        "data": {"name": run.info["cache"]["dataset"]["name"], "classes": len(run.info["classes"])},
        "films": {"checked": len(checks.pixels), "part": checks.part, "calibration": len(checks.rounding)},
        "batch": 1,
        "threads": args.threads,
        "rounds": args.rounds,
        "calls_a_round": args.calls,
        "engines": {name: {"where": where[name], **row} for name, row in rows.items()},
        "not_measured": missing,
        "yardstick": changes,
        "at_equal_drift": equal,
        "int8_on_this_cpu": hardware.describe_int8(),
        "noise": {"share": others.share, "noisy": others.noisy},
        "load_before_and_after": load,
    }


def versions(*names: str) -> dict[str, str | None]:
    """The installed version of each library, None for one that is not."""
    found: dict[str, str | None] = dict.fromkeys(names)
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


OPTIONS: dict[str, Any] = {
    "run": Path,
    "images": Path,
    "films": 256,
    "rounds": 8,
    "calls": 11,
    "threads": 0,
    "calibration": 160,
    "more": "",
    "only": "",
}


if __name__ == "__main__":
    common.run(measure, "peers", __doc__, **OPTIONS)
