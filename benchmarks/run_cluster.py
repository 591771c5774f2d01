"""Caching on a Ray cluster of one and of two single-CPU nodes, and its parts: what `scale_model.py` is checked against.

    python benchmarks/run_cluster.py [--films 32 64] [--rounds 3]          # some 5 minutes a round

Phantoms at acquisition size through `cxrfast cache --shards`, a process of its own each time, plain view, one thread:
without Ray, on a cluster of one node and of two, in turns. Every node is held to one core, with all its workers; so is
the command without Ray. The command that waits for the nodes has both cores. Each run's rows must be those of the
first, bit for bit, before its time counts. --films are whole blocks of 8 in every shard.

Start-up is told from work by three runs an arm, as seconds = start + (film x films + shard x shards) / nodes:
few films in 4 shards, twice the films in 4, and as many in 8. The clusters' own start and Ray's bare tasks are apart.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import models
import numpy as np
import torch
from PIL import Image
from run_search import flops

from cxr_fast.activations import file
from cxr_fast.activations.encoder import Encoder, with_size
from cxr_fast.activations.job import CacheJob, make_header
from cxr_fast.bench import caching
from cxr_fast.bench import measure as timing
from cxr_fast.config import CacheSpec, PreprocessSpec, TrainSpec
from cxr_fast.data.images import load
from cxr_fast.data.phantom.dataset import draw
from cxr_fast.models import backbone, device

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


# The command, on nodes held to a core each.


@contextlib.contextmanager
def held(core: int) -> Iterator[None]:
    """This thread, and every process it starts meanwhile, on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def cluster(nodes: int, cores: Sequence[int]) -> Iterator[str | None]:
    """The address of a local Ray cluster of nodes with one CPU each, each on a core of its own; None without nodes."""
    if not nodes:
        yield None
        return
    from ray.cluster_utils import Cluster

    made = Cluster()
    try:
        for core in cores[:nodes]:
            with held(core):
                made.add_node(num_cpus=1, include_dashboard=False)
        yield made.address
    finally:
        made.shutdown()


def once(source: Path, weights: str, shards: int, address: str | None, core: int) -> tuple[float, np.ndarray]:
    """Seconds of one `cxrfast cache` from process start to end, and the rows of its shards, in order."""
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        words = ["cache", source, "--weights", weights, "--views", "plain", "--device", "cpu"]
        words += ["--out", Path(scratch) / "c.shards.json", "--shards", shards, "--threads", 1, "--workers", 1]
        with contextlib.nullcontext() if address else held(core):
            seconds, _ = common.cxrfast(*words, *(["--cluster", address] if address else []))
        files = sorted(Path(scratch).glob("*.h5"))
        return seconds, np.concatenate([np.array(file.ActivationFile(path).activations) for path in files])


def ray_tasks(address: str) -> dict[str, float]:
    """Seconds to connect, of the first task (a worker starts), and of each of many that do nothing."""
    import ray

    def nothing() -> None:
        pass

    marks = [time.perf_counter()]
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        task = ray.remote(num_cpus=1)(nothing)
        marks.append(time.perf_counter())
        for count in (1, TASKS):
            ray.get([task.remote() for _ in range(count)])
            marks.append(time.perf_counter())
    finally:
        ray.shutdown()
    connect, first, many = (float(seconds) for seconds in np.diff(marks))
    return {"connect": connect, "first task": first, "task": many / TASKS}


def arm(
    nodes: int, sources: Sequence[Path], weights: str, cores: Sequence[int], seen: dict[int, np.ndarray]
) -> dict[str, Any]:
    """Seconds of the three runs, of the cluster's start, and of Ray's bare tasks; `seen` holds the first arm's rows."""
    began = time.perf_counter()
    with cluster(nodes, cores) as address:
        found: dict[str, Any] = {"start": time.perf_counter() - began, "runs": []}
        for which, shards in RUNS:
            seconds, rows = once(sources[which], weights, shards, address, cores[0])
            assert np.array_equal(rows, seen.setdefault(which, rows)), f"{nodes} nodes: other rows"
            found["runs"].append(seconds)
        return found | ({"ray": ray_tasks(address)} if address and nodes == 1 else {})


def start_and_work(seconds: Sequence[float], films: Sequence[int], nodes: int) -> dict[str, float]:
    """`start`, and node-seconds a `film` and a `shard`, from the three runs of an arm (see the head of this file)."""
    fewer, more, cut = seconds
    film = (more - fewer) * nodes / (films[1] - films[0])
    shard = (cut - more) * nodes / (MANY - FEW)
    return {"start": fewer - (film * films[0] + shard * FEW) / nodes, "film": film, "shard": shard}


def summary(found: dict[str, list[list[float]]], films: Sequence[int]) -> dict[str, Any]:
    """Spreads of whole commands by arm and run, and of what they split into, round by round."""
    whole, split = {}, {}
    names = [f"{films[which]} films, {shards} shards" for which, shards in RUNS]
    for name, rounds in found.items():
        each = [start_and_work(times, films, max(ARMS[name], 1)) for times in rounds]
        whole[name] = common.spreads(dict(zip(names, zip(*rounds, strict=True), strict=True)), f"s, {name}")
        split[name] = common.spreads(common.by_key(each), f"of it, s, {name}")
    gains = common.ratios(*([times[1] for times in found[name]] for name in ("one node", "two nodes")))
    return {"seconds": whole, "split": split, "two_nodes_times_faster": common.spread(gains)}


# Its parts, one thread.


def repeated(work: Callable[[], object], count: int, repeats: int) -> dict[str, float | int]:
    """Seconds of each of the `count` images that a call of `work` takes."""
    return common.spread([seconds / count for seconds in timing.measure(work, warmup=1, repeats=repeats)])


def decode_seconds(folder: Path, spec: PreprocessSpec, repeats: int) -> dict[str, Any]:
    """Seconds to decode a film, and its bytes, by size and format."""
    out = {}
    for name, (height, width, suffix) in FILMS.items():
        path = folder / f"{height}.{suffix}"
        Image.fromarray(draw(np.random.default_rng(0), size=(height, width))).save(path)
        out[name] = {"seconds": repeated(partial(load, path, spec), 1, 4 * repeats), "bytes": path.stat().st_size}
    return out


def write_seconds(folder: Path, tower: backbone.Backbone, spec: CacheSpec, manifest: Any, repeats: int) -> Any:
    """Seconds a row of the writing thread: checksum, write, wait for the disk."""
    path = folder / "w.h5"
    header = make_header(CacheJob(manifest=manifest, backbone=tower, spec=spec, out=path, batch_size=8), manifest)
    values = np.random.default_rng(0).standard_normal(header.shape, np.float32).astype(np.float16)

    def work() -> None:
        path.unlink(missing_ok=True)
        file.create(path, header)
        with file.Writer(path) as writer:
            for start in range(0, len(values), 8):
                some = range(start, min(start + 8, len(values)))
                writer.rows(some, values[some.start : some.stop], ["0" * 64] * len(some), [None] * len(some))
            writer.finish()

    return repeated(work, len(values), repeats)


def step_seconds(tower: backbone.Backbone, repeats: int) -> dict[str, Any]:
    """Seconds a sample of a training step from cached tokens, and its FLOPs as `common.tail_flops` counts them."""
    folds = {kind: models.fold(tower, TrainSpec(precision=kind)) for kind in ("bfloat16", "float32")}
    training, forward = flops(folds["float32"].tail, tower.shape[0])
    seconds = {
        kind: repeated(lambda fold=fold: fold.train_epoch(fold.draw()), len(fold.train_rows), repeats)  # type: ignore[misc]
        for kind, fold in folds.items()
    }
    return {"seconds_per_sample": seconds, "training_flops": training, "forward_flops": forward}


def parts(folder: Path, manifest: Any, args: argparse.Namespace, core: int) -> dict[str, Any]:
    """Seconds of decoding, frozen layers, writing and training, one thread on one core."""
    tower = backbone.load(args.weights)
    spec = with_size(CacheSpec(weights=args.weights, views=("plain",)), tower)
    with held(core):
        device.prepare(1)
        encoder = Encoder(tower, spec, torch.device("cpu"), block=8)
        pixels = np.zeros((8, *(spec.preprocess.size,) * 2), np.uint8)
        return {
            "decode": decode_seconds(folder, spec.preprocess, args.repeats),
            "prefix": repeated(partial(encoder, pixels), len(pixels), args.repeats),
            "write": write_seconds(folder, tower, spec, manifest, args.repeats),
            "train": step_seconds(tower, args.repeats),
        }


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if len(cores) < 2:
        raise SystemExit("needs Linux and two cores, one a node.")
    # Workers are started by Ray, not by this process, and must find the same package.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(common.ROOT), os.environ.get("PYTHONPATH")]))
    sources = [folder / str(count) / "manifest.csv" for count in args.films]
    for source in sources:
        source.parent.mkdir()
    manifests = [caching.copies(path.parent, None, n) for path, n in zip(sources, args.films, strict=True)]
    found: dict[str, Any] = {"parts": parts(folder, manifests[-1], args, cores[0])}
    given = (sources, args.weights, cores, {})
    samples, noise = common.turns({name: partial(arm, nodes, *given) for name, nodes in ARMS.items()}, args.rounds)
    found |= summary({name: [each["runs"] for each in rounds] for name, rounds in samples.items()}, args.films)
    starts = {name: [each["start"] for each in samples[name]] for name, nodes in ARMS.items() if nodes}
    return found | {
        "weights": args.weights,
        "films": list(args.films),
        "shards": [FEW, MANY],
        "cluster_start_seconds": common.spreads(starts, "s, start of the cluster"),
        "ray_seconds": common.spreads(common.by_key([each["ray"] for each in samples["one node"]]), "s, bare Ray"),
        # The commands are other processes to this one, so their share is the load that was meant.
        "cpu_share_of_other_processes_and_arms": noise["share"],
    }


if __name__ == "__main__":
    common.run(measure, "cluster", __doc__, films=[32, 64], rounds=3, repeats=5, weights="random:0")
