"""Seconds of caching, sweep and prediction on 1 to many GPUs, from plain numbers; nothing here is a measurement.

Work is a pipeline: stages of one worker overlap on a GPU node (the slowest counts) and add up where they share a core.
What all workers share (a node's link, the storage) bounds them together. A phase ends with its last task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from scale_inputs import DataSet

TRAINED, VALIDATED = 0.8 * 0.8, 0.8 * 0.2
# Of memory, as `activations.SHARE`.
MEMORY_SHARE = 0.8
Numbers = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Seconds of a phase, what it waits for, the GPUs that have work, and where the sweep's activations lie."""

    seconds: float
    bottleneck: str
    workers: int
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Images in tasks of whole blocks: seconds an image of each stage of one worker, and bytes an image over the wire.

    `shared`: the stages share the worker's core, so their seconds add up. `overlap` is the share of the pipeline's
    bound that is reached.
    """

    images: int
    tasks: int
    block: int
    stages: Mapping[str, float]
    bytes_an_image: float
    shared: bool = False
    overlap: float = 1.0

    def most(self, rounds: int) -> int:
        """Images of the worker that has most, in so many tasks: whole blocks, and tasks differ by a block at most."""
        blocks = math.ceil(self.images / self.block)
        least = math.ceil(blocks / self.tasks)
        return min(self.images, max(least, math.ceil(rounds * blocks / self.tasks)) * self.block)


def pipeline_seconds(work: Pipeline, workers: int, n: Numbers) -> Phase:
    """Seconds of a pipeline over `workers`, start-up and expected losses in it."""
    rounds = math.ceil(work.tasks / workers)
    stages = {"all stages": sum(work.stages.values())} if work.shared else work.stages
    images = work.most(rounds)
    waits = {name: images * seconds / work.overlap for name, seconds in stages.items()}
    carried = work.images * work.bytes_an_image
    waits |= {
        "network": carried / (nodes(workers, n) * n["link"]),
        "storage": carried / n["storage"],
        "start-up": n["start-up"] + rounds * n["task"],
    }
    start = waits["start-up"]
    slowest = max(waits, key=lambda name: waits[name])
    busy = max(seconds for name, seconds in waits.items() if name != "start-up")
    total = with_losses(start + busy, (start + busy) / rounds, n)
    if work.tasks < workers and slowest != "start-up":
        slowest = "number of tasks"
    return Phase(seconds=total, bottleneck=slowest, workers=min(workers, work.tasks))


def nodes(workers: int, n: Numbers) -> int:
    """Nodes that so many GPUs are in."""
    return math.ceil(workers / n["GPUs a node"])


def with_losses(seconds: float, unit: float, n: Numbers) -> float:
    """Seconds with what lost nodes cost: each its GPUs' half-done `unit` of work again, a start, and a replacement.

    Losses grow with the nodes as the share of the work on one shrinks, so the fraction is the same for any number.
    """
    again = unit / 2 + n["start-up"] + n["replacement"]
    return seconds * (1 + n["nodes lost"] / 3600 * again)


def shards(images: int, workers: int, n: Numbers) -> int:
    """Shards of a cache: a few for each GPU, more where they would be too large; never more than blocks."""
    each = max(n["shards"], math.ceil(images / n["shard"] / workers))
    return min(workers * int(each), math.ceil(images / n["block"]))


def cache(data: DataSet, workers: int, n: Numbers) -> Phase:
    """Every film decoded, through the frozen layers in each view, and written."""
    decode = n[f"decode {data.film}"] * data.pixels / n["cores"]
    prefix = n["views"] * n["prefix work"] / (n["float32 speed"] * n["share, prefix"])
    work = Pipeline(
        images=data.images,
        tasks=shards(data.images, workers, n),
        block=int(n["block"]),
        stages={"decode": decode, "prefix": prefix, "write": n["views"] * n["write"]},
        bytes_an_image=data.file_bytes + n["views"] * n["row"],
        overlap=n["overlap"],
    )
    return pipeline_seconds(work, workers, n)


def predict(data: DataSet, workers: int, n: Numbers) -> Phase:
    """Every film decoded and through the whole model, in as many tasks as the cache has shards."""
    stages = {
        "decode": n[f"decode {data.film}"] * data.pixels / n["cores"],
        "model": n["model work"] / (n["16-bit speed"] * n["share, model"]),
    }
    work = Pipeline(
        images=data.images,
        tasks=shards(data.images, workers, n),
        block=int(n["block"]),
        stages=stages,
        bytes_an_image=data.file_bytes,
        overlap=n["overlap"],
    )
    return pipeline_seconds(work, workers, n)


def where(data: DataSet, workers: int, n: Numbers) -> str:
    """`GPU`, `host` or `disk`: the first that holds the activations of all views."""
    size = data.images * n["views"] * n["row"]
    if size <= MEMORY_SHARE * n["GPU memory"]:
        return "GPU"
    return "host" if size <= MEMORY_SHARE * n["host memory"] * min(workers, n["GPUs a node"]) else "disk"


def sweep(data: DataSet, workers: int, n: Numbers) -> Phase:
    """Folds x configurations, a task a GPU, on as many GPUs as are fastest: more nodes may mean more copies to load."""
    each = [_sweep_on(data, use, workers, n) for use in range(1, workers + 1)]
    best = min(each, key=lambda phase: phase.seconds)
    # All of them, unless fewer are really faster: an epoch's end more or less decides nothing.
    return replace(best, workers=max(p.workers for p in each if p.seconds <= 1.01 * best.seconds))


def _sweep_on(data: DataSet, use: int, rented: int, n: Numbers) -> Phase:
    """On `use` GPUs of those rented; the tasks are spread over their nodes."""
    tasks = int(n["folds"] * n["configurations"])
    busy, place, size = min(use, tasks), where(data, rented, n), data.images * n["views"] * n["row"]
    active, rounds = min(nodes(use, n), tasks), math.ceil(tasks / busy)
    trained, validated = (n["epochs"] * share * data.images for share in (TRAINED, VALIDATED))
    work = trained * n["training work"] + validated * n["validation work"]
    waits = {"training step": rounds * work / (n["16-bit speed"] * n["share, training"])}
    load, samples = 0.0, trained + validated
    if place == "disk":
        read = tasks * samples * n["row"] / n["share, streaming"]
        waits |= {"network": read / (active * n["link"]), "storage": read / n["storage"]}
    else:
        load = max(size / n["link"], active * size / n["storage"])
    if place != "GPU":
        waits["copies to the GPU"] = rounds * samples * max(n["row"] / n["host to GPU"], 1 / n["rows from memory"])
    working = max(waits.values())
    waits["start-up"] = start = n["start-up"] + rounds * n["task"] + load
    # A lost task goes on from its last finished epoch.
    seconds = with_losses(start + working, working / rounds / n["epochs"], n)
    slowest = max(waits, key=lambda name: waits[name])
    if tasks <= use and slowest in ("training step", "copies to the GPU"):
        slowest = "number of tasks"
    return Phase(seconds=seconds, bottleneck=slowest, workers=busy, where=place)
