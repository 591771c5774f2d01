"""Caching on a Ray cluster of one and of two single-CPU nodes, and its parts: what `scale_model.py` is checked against.

    python benchmarks/run_cluster.py [--films 32 64] [--rounds 3]          # some 5 minutes a round

Phantoms at acquisition size through `cxrfast cache --shards`, a process of its own each time, plain view, one thread:
without Ray, on a cluster of one node and of two, in turns. Every node is held to one core, with all its workers; so is
the command without Ray. The command that waits for the nodes has both cores. Each run's rows must be those of the
first, bit for bit, before its time counts.

Start-up is told from work by three runs an arm, as seconds = start + (film x films + shard x shards) / nodes:
few films in 4 shards, twice the films in 4, and as many in 8. The clusters' own start and Ray's bare tasks are apart.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from PIL import Image
from run_search import flops

from cxr_fast.activations import encoder as encode
from cxr_fast.activations import file
from cxr_fast.activations.loader import (
    Activations,
)
from cxr_fast.bench import caching
from cxr_fast.config import CacheSpec, PreprocessSpec, TrainSpec
from cxr_fast.data.images import load
from cxr_fast.data.phantom.dataset import draw
from cxr_fast.models import backbone, device
from cxr_fast.system import hardware
from cxr_fast.training.fold import Fold

ROOT = Path(__file__).resolve().parent.parent
FEW, MANY = 4, 8
# (nodes, 0 without Ray) of each arm; runs as (films: 0 the fewer, 1 the more; shards).
ARMS = {"without Ray": 0, "one node": 1, "two nodes": 2}
RUNS = ((0, FEW), (1, FEW), (1, MANY))
# Films by how large data sets keep them: height, width, suffix.
FILMS = {
    "PNG 2400x2000": (2400, 2000, "png"),
    "JPEG 3056x2544": (3056, 2544, "jpg"),
    "PNG 1024x1024": (1024, 1024, "png"),
}
TASKS = 200


# One command, on nodes held to a core each.


@contextlib.contextmanager
def held(core: int) -> Iterator[None]:
    """This thread, and every process it starts meanwhile, on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def start_cluster(nodes: int, cores: Sequence[int]) -> Any:
    """A local Ray cluster of nodes with one CPU each, each on a core of its own."""
    from ray.cluster_utils import Cluster

    made = Cluster()
    for core in cores[:nodes]:
        with held(core):
            made.add_node(num_cpus=1, include_dashboard=False)
    return made


def command(folder: Path, source: Path, weights: str, shards: int, address: str | None) -> list[str]:
    """`cxrfast cache` of `source` into `folder`."""
    words = [sys.executable, "-m", "cxr_fast", "cache", str(source), "--weights", weights, "--views", "plain"]
    words += ["--out", str(folder / "c.shards.json"), "--shards", str(shards), "--threads", "1", "--workers", "1"]
    return words + ["--device", "cpu"] + (["--cluster", address] if address else [])


def rows(folder: Path) -> np.ndarray:
    """The activations of every shard, in order."""
    return np.concatenate([np.array(file.ActivationFile(path).activations) for path in sorted(folder.glob("*.h5"))])


def once(source: Path, weights: str, shards: int, address: str | None, core: int) -> tuple[float, np.ndarray]:
    """Seconds of one command from process start to end, and the rows it wrote."""
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        words = command(Path(scratch), source, weights, shards, address)
        began = time.perf_counter()
        with contextlib.nullcontext() if address else held(core):
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}\n{done.stdout}\n{done.stderr}")
        return seconds, rows(Path(scratch))


def ray_tasks(address: str) -> dict[str, float]:
    """Seconds to connect, of the first task (a worker starts), and of each of many that do nothing."""
    import ray

    def nothing() -> None:
        pass

    began = time.perf_counter()
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        task, marks = ray.remote(num_cpus=1)(nothing), [began, time.perf_counter()]
        for count in (1, TASKS):
            ray.get([task.remote() for _ in range(count)])
            marks.append(time.perf_counter())
    finally:
        ray.shutdown()
    connect, first, many = (float(seconds) for seconds in np.diff(marks))
    return {"connect": connect, "first task": first, "task": many / TASKS}


def start_and_work(seconds: Sequence[float], films: Sequence[int], nodes: int) -> dict[str, float]:
    """`start`, and node-seconds a `film` and a `shard`, from the three runs of an arm (see the head of this file)."""
    fewer, more, cut = seconds
    film = (more - fewer) * nodes / (films[1] - films[0])
    shard = (cut - more) * nodes / (MANY - FEW)
    return {"start": fewer - (film * films[0] + shard * FEW) / nodes, "film": film, "shard": shard}


def arms(sources: Sequence[Path], args: argparse.Namespace, cores: Sequence[int]) -> dict[str, Any]:
    """Every arm in turn, `--rounds` times."""
    found: dict[str, Any] = {name: [] for name in ARMS}
    clusters: dict[str, list[float]] = {name: [] for name, nodes in ARMS.items() if nodes}
    bare: list[dict[str, float]] = []
    wanted: dict[int, np.ndarray] = {}
    with hardware.OtherCpu() as noise:
        for _ in range(args.rounds):
            for name, nodes in ARMS.items():
                began = time.perf_counter()
                cluster = start_cluster(nodes, cores) if nodes else None
                if cluster:
                    clusters[name].append(time.perf_counter() - began)
                try:
                    times = []
                    for which, shards in RUNS:
                        address = cluster.address if cluster else None
                        seconds, values = once(sources[which], args.weights, shards, address, cores[0])
                        assert np.array_equal(values, wanted.setdefault(which, values)), f"{name}: other rows"
                        times.append(seconds)
                    found[name].append(times)
                    bare += [ray_tasks(cluster.address)] if nodes == 1 else []
                finally:
                    if cluster:
                        cluster.shutdown()
    return summary(found, args.films) | {
        "cluster_start_seconds": {name: common.spread(values) for name, values in clusters.items()},
        "ray_seconds": {key: common.spread([each[key] for each in bare]) for key in bare[0]},
        # The commands are other processes to this one, so their share is the load that was meant.
        "cpu_share_of_other_processes_and_arms": noise.share,
    }


def summary(found: dict[str, list[list[float]]], films: Sequence[int]) -> dict[str, Any]:
    """Spreads of whole commands by arm and run, and of what they split into, round by round."""
    names = [f"{films[which]} films, {shards} shards" for which, shards in RUNS]
    whole = {
        arm: {name: common.spread(times) for name, times in zip(names, zip(*rounds, strict=True), strict=True)}
        for arm, rounds in found.items()
    }
    split = {}
    for arm, rounds in found.items():
        each = [start_and_work(times, films, max(ARMS[arm], 1)) for times in rounds]
        split[arm] = {key: common.spread([values[key] for values in each]) for key in each[0]}
    gains = [one[1] / two[1] for one, two in zip(found["one node"], found["two nodes"], strict=True)]
    for arm in ARMS:
        print(arm)
        common.show(whole[arm] | {f"  {key}": value for key, value in split[arm].items()}, "s")
    return {"seconds": whole, "split": split, "two_nodes_times_faster": common.spread(gains)}


# Its parts, one thread.


def repeated(work: Callable[[], int], repeats: int) -> dict[str, float | int]:
    """Seconds of each of the units that a call of `work` returns the number of."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        count = work()
        times.append((time.perf_counter() - began) / count)
    return common.spread(times)


def decode_seconds(folder: Path, spec: PreprocessSpec, repeats: int) -> dict[str, Any]:
    """Seconds to decode a film, and its bytes, by size and format."""
    out = {}
    for name, (height, width, suffix) in FILMS.items():
        path = folder / f"{height}.{suffix}"
        Image.fromarray(draw(np.random.default_rng(0), size=(height, width))).save(path)
        spread = repeated(lambda path=path: len([load(path, spec) for _ in range(4)]), repeats)  # type: ignore[misc]
        out[name] = {"seconds": spread, "bytes": path.stat().st_size}
    return out


def write_seconds(folder: Path, tower: backbone.Backbone, spec: CacheSpec, manifest: Any, repeats: int) -> Any:
    """Seconds a row of the writing thread: checksum, write, wait for the disk."""
    header = encode.header_for(manifest, tower, spec, block=8)
    values = np.random.default_rng(0).standard_normal(header.shape, np.float32).astype(np.float16)
    count, made = len(values), iter(range(repeats + 1))

    def work() -> int:
        path = folder / f"w{next(made)}.h5"
        file.create(path, header)
        with file.Writer(path) as writer:
            for start in range(0, count, 8):
                some = range(start, min(start + 8, count))
                writer.rows(some, values[some.start : some.stop], ["0" * 64] * len(some), [None] * len(some))
            writer.finish()
        path.unlink()
        return count

    return repeated(work, repeats)


def step_seconds(tower: backbone.Backbone, repeats: int) -> dict[str, Any]:
    """Seconds a sample of a training step from cached tokens, and its FLOPs as `run_search.py` counts them."""
    n, classes, tokens, width = 64, 35, *tower.shape[:2]
    values = np.random.default_rng(0).standard_normal((n, 1, tokens, width), np.float32).astype(np.float16)
    labels = (np.random.default_rng(0).random((n, classes)) < 0.2).astype(np.int8)
    labels[:2] = [[1], [0]]
    found: dict[str, Any] = {}
    for kind in ("bfloat16", "float32"):
        spec = TrainSpec(precision=kind)
        fold = Fold(
            *(tower.visual, Activations(values, torch.device("cpu")), labels, np.arange(n), np.arange(n)),
            spec=spec,
            unfreeze_blocks=2,
            seed=0,
        )

        def work(fold: Fold = fold) -> int:
            fold.train_epoch(fold.draw())
            return n

        found[kind] = repeated(work, repeats)
    training, forward = flops(fold.tail, tokens)
    return {"seconds_per_sample": found, "training_flops": training, "forward_flops": forward}


def parts(folder: Path, manifest: Any, args: argparse.Namespace, core: int) -> dict[str, Any]:
    """Seconds of decoding, frozen layers, writing and training, one thread on one core."""
    tower = backbone.load(args.weights)
    spec = encode.with_size(CacheSpec(weights=args.weights, views=("plain",)), tower)
    with held(core):
        device.prepare(1)
        encoder = encode.Encoder(tower, spec, torch.device("cpu"), block=8)
        pixels = np.zeros((8, *(spec.preprocess.size,) * 2), np.uint8)
        found = {
            "decode": decode_seconds(folder, spec.preprocess, args.repeats),
            "prefix": repeated(lambda: len(encoder(pixels)), args.repeats),
            "write": write_seconds(folder, tower, spec, manifest, args.repeats),
            "train": step_seconds(tower, args.repeats),
        }
    flat = {f"decode {name}": each["seconds"] for name, each in found["decode"].items()}
    flat |= {"prefix, a view": found["prefix"], "write, a row": found["write"]}
    flat |= {f"train step, {kind}": each for kind, each in found["train"]["seconds_per_sample"].items()}
    common.show(flat, "s an image, one thread")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, nargs=2, default=(32, 64), help="whole blocks of 8 in every shard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="of each part")
    parser.add_argument("--weights", default="random:0")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if len(cores) < 2:
        raise SystemExit("needs Linux and two cores, one a node.")
    # Workers are started by Ray, not by this process, and must find the same package.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        manifests = []
        for count in args.films:
            (folder / str(count)).mkdir()
            manifests.append(caching.copies(folder / str(count), None, count))
        sources = [folder / str(count) / "manifest.csv" for count in args.films]
        found = parts(folder, manifests[-1], args, cores[0])
        found_arms = arms(sources, args, cores)
    about = {"weights": args.weights, "films": list(args.films), "shards": [FEW, MANY]}
    common.save("cluster", about | {"parts": found, **found_arms}, args.json)


if __name__ == "__main__":
    main()
