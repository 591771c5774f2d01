"""Time and cost of caching, sweep and prediction on 1 to 64 GPUs: a model, beside what was measured here with 1 and 2.

    python benchmarks/scale_model.py [--price 3.0] [--configurations 6] [--set 'link=12e9'] [--out DIR]

Fills the tables of `SCALE.md` (inputs with their sources, the check, the outcome) and of docs/explanation/scaling.md
from `results/`, and draws docs/images/scale.png (with --out: `scale.png` there). Nothing was measured on a GPU; the
checks hold the same arithmetic to one and two CPU cores.

Work is a pipeline: stages of one worker overlap on a GPU node (the slowest counts) and add up where they share a core.
What all workers share (a node's link, the storage) bounds them together. A phase ends with its last task.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
from common import figure, table
from PIL import Image

from cxr_fast.report import charts

PAGE, INPUTS = common.HERE / "SCALE.md", common.HERE / "scale_inputs.csv"
SHORT = common.ROOT / "docs" / "explanation" / "scaling.md"
PICTURE = common.ROOT / "docs" / "images" / "scale.png"
GPUS, FEW_GPUS = (1, 2, 4, 8, 16, 32, 64), (1, 8, 64)
Numbers = Mapping[str, float]


# What it stands on. ViT-B/16 at 224 pixels: tokens, width, MLP, heads; embedding and head as trained for 35 classes.

SHAPE, DEPTH, PATCHES, UNFREEZE = (197, 768, 3072, 12), 12, 196, 2
TOKENS, WIDTH, MLP, _ = SHAPE
PREFIX = (DEPTH - UNFREEZE) * common.block_flops(TOKENS, WIDTH, MLP) + 2 * PATCHES * (16 * 16 * 3) * WIDTH
TRAINING, FORWARD = common.tail_flops(SHAPE, UNFREEZE, (512, 512, 256, 35))
ARITHMETIC = {
    "row": TOKENS * WIDTH * 2,
    "prefix work": PREFIX,
    "training work": TRAINING,
    "validation work": FORWARD,
    "model work": PREFIX + FORWARD,
}
TRAINED, VALIDATED = 0.8 * 0.8, 0.8 * 0.2
# Of memory, as `activations.SHARE`.
MEMORY_SHARE = 0.8
# GFLOP/s of large products on the two cores the results are from, by LOG.md.
SPEED = {"bfloat16": 426.0, "float32": 202.0}


@dataclass(frozen=True)
class DataSet:
    """How many images, how they are kept (as in `run_cluster.FILMS`), their pixels over that film's, a file's bytes."""

    name: str
    images: int
    film: str
    pixels: float
    file_bytes: float


PNG, JPEG, SMALL = "PNG 2400x2000", "JPEG 3056x2544", "PNG 1024x1024"
DATA_SETS = (
    DataSet("Indiana", 7_466, PNG, 1.0, 2.0e6),
    DataSet("NIH-14", 112_120, SMALL, 1.0, 0.4e6),
    DataSet("CheXpert", 224_316, JPEG, 0.85, 2.0e6),
    DataSet("MIMIC-CXR", 377_110, JPEG, 1.0, 1.5e6),
    DataSet("ten million", 10_000_000, JPEG, 1.0, 1.5e6),
)


@dataclass(frozen=True)
class Input:
    """A line of `scale_inputs.csv`: `kind` is measured (a result holds it), computed, noted (seen, but in no file) or
    assumed; `result` and `figure` say which result would hold it, and where in it.
    """

    name: str
    value: float
    unit: str
    kind: str
    source: str
    result: str = ""
    figure: str = ""


def newest(name: str, folder: Path = common.RESULTS) -> dict[str, Any] | None:
    """The newest result of a name on the CPU of `run_cluster.py`'s newest, or on any where that has not run; None where
    there is none. Figures of two machines say nothing about each other.
    """

    def cpu(result: Mapping[str, Any]) -> str:
        return str(result.get("machine", {}).get("cpu"))

    found = [result for result in common.results(folder) if not result["gpu"]]
    here = next((cpu(result) for result in found if result["name"] == "cluster"), None)
    return next((result for result in found if result["name"] == name and here in (None, cpu(result))), None)


def collect(folder: Path = common.RESULTS) -> dict[str, Input]:
    """Every input by name: from a result where one holds it, else what is assumed in its place."""
    found = {}
    for name, value, *rest in csv.reader(INPUTS.read_text(encoding="utf-8").splitlines()[1:]):
        one = found[name] = Input(name, float(value) if value else ARITHMETIC[name], *rest)
        if one.result and (result := newest(one.result, folder)) is not None:
            # Differences of two times may come out below zero.
            value, source = max(0.0, figure(result, one.figure)), f"`{result['file']}`"
            found[name] = replace(one, value=value, kind="measured", source=source)
    return found


def values(found: Mapping[str, Input]) -> dict[str, float]:
    """The numbers alone."""
    return {name: each.value for name, each in found.items()}


# The phases, in seconds.


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
    stages: Numbers
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
    waits = {name: work.most(rounds) * seconds / work.overlap for name, seconds in stages.items()}
    carried = work.images * work.bytes_an_image
    waits |= {"network": carried / (nodes(workers, n) * n["link"]), "storage": carried / n["storage"]}
    busy, start = max(waits.values()), n["start-up"] + rounds * n["task"]
    waits["start-up"] = start
    slowest = max(waits, key=lambda name: waits[name])
    if work.tasks < workers and slowest != "start-up":
        slowest = "number of tasks"
    seconds = with_losses(start + busy, (start + busy) / rounds, n)
    return Phase(seconds=seconds, bottleneck=slowest, workers=min(workers, work.tasks))


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


def from_films(data: DataSet, workers: int, n: Numbers, stages: Numbers, written: float) -> Phase:
    """Every film read and decoded, then these stages and bytes written, in as many tasks as a cache has shards."""
    work = Pipeline(
        images=data.images,
        tasks=shards(data.images, workers, n),
        block=int(n["block"]),
        stages={"decode": n[f"decode {data.film}"] * data.pixels / n["cores"], **stages},
        bytes_an_image=data.file_bytes + written,
        overlap=min(1.0, n["overlap"]),
    )
    return pipeline_seconds(work, workers, n)


def cache(data: DataSet, workers: int, n: Numbers) -> Phase:
    """Every film decoded, through the frozen layers in each view, and written."""
    prefix = n["views"] * n["prefix work"] / (n["float32 speed"] * n["share, prefix"])
    return from_films(data, workers, n, {"prefix": prefix, "write": n["views"] * n["write"]}, n["views"] * n["row"])


def predict(data: DataSet, workers: int, n: Numbers) -> Phase:
    """Every film decoded and through the whole model."""
    return from_films(data, workers, n, {"model": n["model work"] / (n["16-bit speed"] * n["share, model"])}, 0.0)


def where(data: DataSet, workers: int, n: Numbers) -> str:
    """`GPU`, `host` or `disk`: the first that holds the activations of all views."""
    size = data.images * n["views"] * n["row"]
    if size <= MEMORY_SHARE * n["GPU memory"]:
        return "GPU"
    return "host" if size <= MEMORY_SHARE * n["host memory"] * min(workers, n["GPUs a node"]) else "disk"


def sweep(data: DataSet, workers: int, n: Numbers) -> Phase:
    """Folds x configurations, a task a GPU, on as many GPUs as are fastest: more nodes may mean more copies to load."""
    places = {where(data, rented, n) for rented in range(1, workers + 1)}  # where more fits, less may be used
    each = [sweep_on(data, use, place, n) for use in range(1, workers + 1) for place in sorted(places)]
    best = min(each, key=lambda phase: phase.seconds)
    # All of them, unless fewer are really faster: an epoch's end more or less decides nothing.
    return replace(best, workers=max(p.workers for p in each if p.seconds <= 1.01 * best.seconds))


def sweep_on(data: DataSet, use: int, place: str, n: Numbers) -> Phase:
    """A sweep on `use` GPUs with the activations in one place; the tasks are spread over their nodes."""
    tasks = int(n["folds"] * n["configurations"])
    busy, size = min(use, tasks), data.images * n["views"] * n["row"]
    active, rounds = min(nodes(use, n), tasks), math.ceil(tasks / busy)
    trained, validated = (n["epochs"] * share * data.images for share in (TRAINED, VALIDATED))
    products = trained * n["training work"] / (n["16-bit speed"] * n["share, training"])
    products += validated * n["validation work"] / (n["float32 speed"] * n["share, prefix"])  # validation is float32
    waits = {"training step": rounds * products}
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


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the table: a data set on so many GPUs."""

    data: str
    gpus: int
    cache: Phase
    sweep: Phase
    predict: Phase

    @property
    def seconds(self) -> float:
        """Cache and sweep: what a model costs."""
        return self.cache.seconds + self.sweep.seconds

    @property
    def bottleneck(self) -> str:
        """Of the longer of the two."""
        return max((self.cache, self.sweep), key=lambda phase: phase.seconds).bottleneck


def lines(n: Numbers) -> list[Line]:
    """Every data set on every number of GPUs."""
    phases = {"cache": cache, "sweep": sweep, "predict": predict}
    return [
        Line(data=data.name, gpus=gpus, **{name: phase(data, gpus, n) for name, phase in phases.items()})
        for data, gpus in itertools.product(DATA_SETS, GPUS)
    ]


# The check.


@dataclass(frozen=True)
class Check:
    """A figure from one measurement by the model's arithmetic, beside another measurement of the same, in seconds."""

    what: str
    predicted: float
    measured: float
    source: str

    @property
    def error(self) -> float:
        """Of the measured figure."""
        return self.predicted / self.measured - 1


UNSHARED = {"link": 1e12, "storage": 1e12, "nodes lost": 0.0, "replacement": 0.0, "GPUs a node": 1.0}


def on_cores(images: int, tasks: int, seconds: float, workers: int, start: Mapping[str, float]) -> float:
    """Seconds of a pipeline whose stages share a core a worker, by the arithmetic that the table is made with."""
    work = Pipeline(images=images, tasks=tasks, block=8, stages={"all": seconds}, bytes_an_image=0.0, shared=True)
    return pipeline_seconds(work, workers, {**UNSHARED, **start}).seconds


def checks(folder: Path = common.RESULTS) -> tuple[list[Check], list[str]]:
    """What can be checked from the results there are, and a line on each that is missing."""
    drivers = {"cluster": "run_cluster.py", "cache": "run_cache.py", "training-steps": "run_training.py --part steps"}
    found = {name: result for name in drivers if (result := newest(name, folder)) is not None}
    missing = [
        f"no `results/{name}-*.json`, so what it would check is not checked: run `{driver}`"
        for name, driver in drivers.items()
        if name not in found
    ]
    out = node_checks(found) if "cluster" in found else []
    if cached := found.get("cache"):
        decode, forward, whole = (
            figure(cached, f"seconds_per_image/{n}/median") for n in ("decode", "forward", "whole")
        )
        alone = on_cores(cached["images"], 1, decode + forward, 1, {"start-up": 0.0, "task": 0.0}) / cached["images"]
        what = f"cache, {cached['workers']} cores in one process: a film from decode + frozen layers"
        out.append(Check(what, alone, whole, cached["file"]))
    if trained := found.get("training-steps"):
        seconds = {kind: figure(trained, f"steps/seconds_per_sample/cached, {kind}/median") for kind in SPEED}
        predicted = seconds["bfloat16"] * SPEED["bfloat16"] / SPEED["float32"]
        what = "float32 training: a sample from bfloat16's share of the products' speed"
        out.append(Check(what, predicted, seconds["float32"], trained["file"]))
    return out, missing


def node_checks(found: Mapping[str, dict[str, Any]]) -> list[Check]:
    """Two nodes from one, by the times of a command; a film on one node from its parts; two cores from one."""
    nodes = found["cluster"]
    one = {key: max(0.0, value["median"]) for key, value in nodes["split"]["one node"].items()}
    start, parts, file, out = {"start-up": one["start"], "task": one["shard"]}, nodes["parts"], nodes["file"], []
    (fewer, more), (few, many) = nodes["films"], nodes["shards"]
    for films, count in ((fewer, few), (more, few), (more, many)):
        what = f"cache, two nodes from one: {films} films in {count} shards, the whole command"
        measured = figure(nodes, f"seconds/two nodes/{films} films, {count} shards/median")
        out.append(Check(what, on_cores(films, count, one["film"], 2, start), measured, file))
    film = parts["decode"][PNG]["seconds"]["median"] + parts["prefix"]["median"] + parts["write"]["median"]
    for arm in ("without Ray", "one node"):
        what = f"cache, {arm}, one core: a film from decode + frozen layers + write"
        out.append(Check(what, film, figure(nodes, f"split/{arm}/film/median"), file))
    if cached := found.get("cache"):
        what = f"cache, {cached['workers']} cores in one process without Ray: a film from one core's parts"
        whole = figure(cached, "seconds_per_image/whole/median")
        out.append(Check(what, film / cached["workers"], whole, f"{file}, {cached['file']}"))
    if trained := found.get("training-steps"):
        what = "bfloat16 training, 2 cores: a sample's step from one core's"
        step = figure(parts, "train/seconds_per_sample/bfloat16/median") / 2
        measured = figure(trained, "steps/seconds_per_sample/cached, bfloat16/median")
        out.append(Check(what, step, measured, f"{file}, {trained['file']}"))
    return out


# The page and the picture.


def duration(seconds: float) -> str:
    """Two or three digits in the unit that fits."""
    for unit, size, least in (("d", 86400.0, 48 * 3600.0), ("h", 3600.0, 2 * 3600.0), ("min", 60.0, 120.0)):
        if seconds >= least:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def dollars(line: Line, price: float) -> str:
    """USD of cache and sweep, whole ones from ten."""
    value = line.seconds / 3600 * line.gpus * price
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def results_table(found: list[Line], price: float) -> str:
    """The figures, a line a data set and number of GPUs."""
    rows = []
    for line in found:
        idle = "" if line.sweep.workers == line.gpus else f", {line.sweep.workers} busy"
        row = [line.data, str(line.gpus), duration(line.cache.seconds), line.cache.bottleneck]
        row += [duration(line.sweep.seconds), line.sweep.where, f"{line.sweep.bottleneck}{idle}"]
        row += [duration(line.predict.seconds), line.predict.bottleneck]
        rows.append([*row, duration(line.seconds), dollars(line, price)])
    head = ["data set", "GPUs", "cache", "waits for", "sweep", "activations in", "waits for"]
    return table([*head, "predict", "waits for", "cache + sweep", "USD"], rows)


def short_table(found: list[Line], price: float) -> str:
    """Cache, sweep and their cost by data set on few numbers of GPUs: what docs/explanation/scaling.md shows."""
    rows: dict[str, list[str]] = {}
    for line in (line for line in found if line.gpus in FEW_GPUS):
        cell = f"{duration(line.cache.seconds)} + {duration(line.sweep.seconds)}, {dollars(line, price)} USD"
        rows.setdefault(line.data, [line.data]).append(cell)
    head = [f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in FEW_GPUS]
    return table(["MODELLED: cache + sweep, cost", *head], list(rows.values()))


def page(found: Mapping[str, Input], folder: Path = common.RESULTS) -> str:
    """SCALE.md: what is modelled from these inputs, and how it was checked on the results of `folder`."""
    (checked, missing), n = checks(folder), values(found)
    row, worst = n["views"] * n["row"], max((abs(c.error) for c in checked), default=None)
    grid = " x ".join(f"{n[name]:g} {name}" for name in ("folds", "configurations", "epochs"))
    check_rows = [
        [c.what, f"{c.predicted:.4g}", f"{c.measured:.4g}", f"{c.error:+.0%}", f"`{c.source}`"] for c in checked
    ]
    set_rows = [
        [d.name, f"{d.images:,}", d.film, f"{d.pixels:g}", f"{d.file_bytes / 1e6:g}", f"{d.images * row / 1e9:,.1f}"]
        for d in DATA_SETS
    ]
    input_rows = [[i.name, f"{i.value:.4g}", i.unit, i.kind, i.source] for i in found.values()]
    said = "Nothing could be checked." if worst is None else f"The largest error is {worst:.0%}."
    set_head = ["data set", "images", "kept as", "pixels over that film's", "MB a file", "activations, GB"]
    blocks = {
        "plan": f"- **Sweep**: {grid}, so {n['folds'] * n['configurations']:g} tasks, a GPU each.\n"
        f"- **USD**: {n['price']:g} a GPU and hour, an example.",
        "times": results_table(lines(n), n["price"]),
        "checks": f"{said}\n\n{table(['what, s', 'modelled', 'measured', 'error', 'from'], check_rows)}"
        + "".join(f"\n\n- {line}" for line in missing),
        "sets": table(set_head, set_rows),
        "inputs": table(["input", "value", "unit", "kind", "source"], input_rows),
    }
    text = PAGE.read_text(encoding="utf-8")
    for name, inside in blocks.items():
        text = common.filled(text, name, inside)
    return text


MARKERS = {"training step": "o", "number of tasks": "s", "network": "^", "storage": "v", "copies to the GPU": "P"}
MARKERS |= {"decode": "D", "prefix": "X", "write": "p", "start-up": "<"}
TICKS = {60.0: "1 min", 600.0: "10 min", 3600.0: "1 h", 36000.0: "10 h", 360000.0: "100 h", 3.6e6: "1,000 h"}


def picture(found: list[Line]) -> bytes:
    """PNG: time of cache and sweep over the number of GPUs, a line a data set, a marker for what it waits for.

    In 64 colours it has a third of the bytes, and nothing of the library that drew it is kept in it.
    """
    made, axes = charts.figure(6.8, 4.4)
    groups = itertools.groupby(found, key=lambda line: line.data)
    for (name, some), colour in zip(groups, charts.COLOURS, strict=False):
        points = [(line.gpus, line.seconds, MARKERS[line.bottleneck]) for line in some]
        gpus, seconds, _ = zip(*points, strict=True)
        axes.plot(gpus, seconds, color=colour, lw=1.4, zorder=2)
        for x, y, marker in points:
            axes.plot(x, y, marker, color=colour, ms=6.5, mec="white", mew=0.7, zorder=3)
        axes.text(72, seconds[-1], name, color=colour, fontsize=9, va="center")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(GPUS, map(str, GPUS))
    least, most = min(line.seconds for line in found), max(line.seconds for line in found)
    shown = {at: text for at, text in TICKS.items() if least / 3 < at < most * 3}
    axes.set_yticks(list(shown), list(shown.values()))
    axes.minorticks_off()
    axes.grid(True, axis="y", color=charts.FAINT, lw=0.5)
    axes.set(xlabel="GPUs", ylabel="time of cache and sweep", xlim=(0.9, 150))
    axes.set_title("MODELLED; nothing here was measured on a GPU", fontsize=10, loc="left")
    for name in sorted({line.bottleneck for line in found}):
        axes.plot([], [], MARKERS[name], color=charts.GREY, ms=6.5, label=name)
    title = "what the longer of the two waits for"
    made.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False, title=title, title_fontsize=8)
    buffer, drawn = io.BytesIO(), Image.open(io.BytesIO(charts.png(made)))
    drawn.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def changed(found: Mapping[str, Input], changes: list[str]) -> dict[str, Input]:
    """The inputs with other values, NAME=NUMBER, which are then called given; SystemExit for what is no input."""
    out = dict(found)
    for text in changes:
        name, _, value = text.rpartition("=")
        try:
            out[name] = replace(out[name], value=float(value), kind="given", source="`--set`")
        except (KeyError, ValueError):
            raise SystemExit(f"--set {text}: not NAME=NUMBER with one of {', '.join(found)}") from None
        if not out[name].value > 0:
            raise SystemExit(f"--set {text}: not above 0")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--price", help="USD a GPU and hour")
    parser.add_argument("--configurations", help="of the grid")
    parser.add_argument("--set", action="append", default=[], metavar="INPUT=VALUE", help="another value of any input")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--out", type=Path, default=common.HERE, help="folder of SCALE.md and scale.png")
    args = parser.parse_args()
    named = [f"{name}={getattr(args, name)}" for name in ("price", "configurations") if getattr(args, name)]
    found = changed(collect(args.results), named + args.set)
    text, modelled = page(found, args.results), lines(values(found))
    (args.out / "SCALE.md").write_text(text, encoding="utf-8")
    drawn = PICTURE if args.out == common.HERE else args.out / "scale.png"
    drawn.write_bytes(picture(modelled))
    if args.out == common.HERE:
        short = common.filled(SHORT.read_text(encoding="utf-8"), "scale", short_table(modelled, found["price"].value))
        SHORT.write_text(short, encoding="utf-8")
    print(f"{text}\nwrote SCALE.md and {drawn.name}")


if __name__ == "__main__":
    main()
