"""Time and cost of caching, sweep and prediction on 1 to 64 GPUs: a model, beside what was measured here with 1 and 2.

    python benchmarks/scale_model.py [--price 3.0] [--configurations 6] [--set 'link=12e9'] [--out DIR]

Writes `SCALE.md` (inputs with their sources, the check, the table) and `scale.png` from `results/`, and the short table
between the README's two `scale` markers where those are. Nothing was measured on a GPU; the checks hold the same
arithmetic to one and two CPU cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scale_inputs import DATA_SETS, RESULTS, Input, changed, collect, newest, values
from scale_phases import Phase, Pipeline, cache, pipeline_seconds, predict, sweep

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- scale: begin -->", "<!-- scale: end -->"
GPUS = (1, 2, 4, 8, 16, 32, 64)
FEW_GPUS = (1, 8, 64)
# GFLOP/s of large products on the two cores the results are from, by LOG.md.
SPEED = {"bfloat16": 426.0, "float32": 202.0}
UNSHARED = {"link": 1e12, "storage": 1e12, "nodes lost": 0.0, "replacement": 0.0, "GPUs a node": 1.0}


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


@dataclass(frozen=True, kw_only=True)
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


def lines(n: Mapping[str, float]) -> list[Line]:
    """Every data set on every number of GPUs."""
    return [
        Line(
            data=data.name,
            gpus=gpus,
            cache=cache(data, gpus, n),
            sweep=sweep(data, gpus, n),
            predict=predict(data, gpus, n),
        )
        for data in DATA_SETS
        for gpus in GPUS
    ]


# The check.


def on_cores(images: int, tasks: int, seconds: float, start: float, task: float, workers: int) -> float:
    """Seconds of a pipeline whose stages share a core a worker, by the arithmetic that the table is made with."""
    work = Pipeline(images=images, tasks=tasks, block=8, stages={"all": seconds}, bytes_an_image=0.0, shared=True)
    return pipeline_seconds(work, workers, UNSHARED | {"start-up": start, "task": task}).seconds


def checks(folder: Path = RESULTS) -> tuple[list[Check], list[str]]:
    """What can be checked from the results there are, and a line on each that is missing."""
    found: list[Check] = []
    missing = []
    for name, driver, check in (
        ("cluster", "run_cluster.py", cluster_checks),
        ("cache", "run_cache.py", cache_checks),
        ("training-steps", "run_training.py --part steps", training_checks),
    ):
        result = newest(name, folder)
        if result is None:
            missing.append(f"no `results/{name}-*.json`, so what it would check is not checked: run `{driver}`")
        else:
            found += check(result, folder)
    return found, missing


def cluster_checks(result: dict, folder: Path) -> list[Check]:
    """Two nodes from one, by the times of a command; a film on one node from its parts."""
    split, whole, parts = result["split"], result["seconds"], result["parts"]
    one, source = {key: max(0.0, value["median"]) for key, value in split["one node"].items()}, result["file"]
    (fewer, more), (few, many) = result["films"], result["shards"]
    out = [
        Check(
            what=f"cache, two nodes from one: {films} films in {shards} shards, the whole command",
            predicted=on_cores(films, shards, one["film"], one["start"], one["shard"], 2),
            measured=whole["two nodes"][f"{films} films, {shards} shards"]["median"],
            source=source,
        )
        for films, shards in ((fewer, few), (more, few), (more, many))
    ]
    film = parts["decode"]["PNG 2400x2000"]["seconds"]["median"] + parts["prefix"]["median"] + parts["write"]["median"]
    for arm in ("without Ray", "one node"):
        out.append(
            Check(
                what=f"cache, {arm}, one core: a film from decode + frozen layers + write",
                predicted=film,
                measured=split[arm]["film"]["median"],
                source=source,
            )
        )
    if cached := newest("cache", folder):
        cores = cached["workers"]
        out.append(
            Check(
                what=f"cache, {cores} cores in one process without Ray: a film from one core's parts",
                predicted=film / cores,
                measured=cached["seconds_per_image"]["whole"]["median"],
                source=f"{source}, {cached['file']}",
            )
        )
    if trained := newest("training-steps", folder):
        out.append(
            Check(
                what="bfloat16 training, 2 cores: a sample's step from one core's",
                predicted=parts["train"]["seconds_per_sample"]["bfloat16"]["median"] / 2,
                measured=trained["steps"]["seconds_per_sample"]["cached, bfloat16"]["median"],
                source=f"{source}, {trained['file']}",
            )
        )
    return out


def cache_checks(result: dict, folder: Path) -> list[Check]:
    """The whole of `cxrfast cache` from decode and frozen layers, which share the cores; on two threads."""
    seconds = {name: spread["median"] for name, spread in result["seconds_per_image"].items()}
    images = result["images"]
    whole = on_cores(images, 1, seconds["decode"] + seconds["forward"], 0.0, 0.0, 1) / images
    what = f"cache, {result['workers']} cores in one process: a film from decode + frozen layers"
    return [Check(what=what, predicted=whole, measured=seconds["whole"], source=result["file"])]


def training_checks(result: dict, folder: Path) -> list[Check]:
    """A float32 step from the bfloat16 one at the same share of the products' speed: what is assumed of a GPU."""
    seconds = {name: spread["median"] for name, spread in result["steps"]["seconds_per_sample"].items()}
    float32 = seconds["cached, bfloat16"] * SPEED["bfloat16"] / SPEED["float32"]
    out = [
        Check(
            what="float32 training: a sample from bfloat16's share of the products' speed",
            predicted=float32,
            measured=seconds["cached, float32"],
            source=result["file"],
        )
    ]
    if before := newest("training", folder):
        out.append(
            Check(
                what="bfloat16 training: a sample from an earlier run (nothing modelled: how far two runs are apart)",
                predicted=before["steps"]["seconds_per_sample"]["cached, bfloat16"]["median"],
                measured=seconds["cached, bfloat16"],
                source=f"{before['file']}, {result['file']}",
            )
        )
    return out


# The page.


def duration(seconds: float) -> str:
    """Two or three digits in the unit that fits."""
    for unit, size in (("d", 48 * 3600.0), ("h", 2 * 3600.0), ("min", 120.0)):
        if seconds >= size:
            return f"{seconds / {'d': 86400.0, 'h': 3600.0, 'min': 60.0}[unit]:.3g} {unit}"
    return f"{seconds:.3g} s"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def dollars(value: float) -> str:
    """USD, whole ones from ten."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def results_table(found: list[Line], price: float) -> str:
    """The figures, a line a data set and number of GPUs."""
    rows = []
    for line in found:
        hours = line.seconds / 3600 * line.gpus
        idle = "" if line.sweep.workers == line.gpus else f", {line.sweep.workers} busy"
        row = [line.data, str(line.gpus), duration(line.cache.seconds), line.cache.bottleneck]
        row += [duration(line.sweep.seconds), line.sweep.where, f"{line.sweep.bottleneck}{idle}"]
        row += [duration(line.predict.seconds), line.predict.bottleneck]
        rows.append([*row, duration(line.seconds), dollars(hours * price)])
    head = ["data set", "GPUs", "cache", "waits for", "sweep", "activations in", "waits for"]
    return table([*head, "predict", "waits for", "cache + sweep", "USD"], rows)


def short_table(found: list[Line], price: float) -> str:
    """Cache, sweep and their cost by data set on few numbers of GPUs: what the README has between its markers."""
    by = {(line.data, line.gpus): line for line in found}
    rows = []
    for data in DATA_SETS:
        row = [data.name]
        for gpus in FEW_GPUS:
            line = by[data.name, gpus]
            cost = dollars(line.seconds / 3600 * gpus * price)
            row.append(f"{duration(line.cache.seconds)} + {duration(line.sweep.seconds)}, {cost} USD")
        rows.append(row)
    head = [f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in FEW_GPUS]
    return table(["MODELLED: cache + sweep, cost", *head], rows)


def between(readme: str) -> str | None:
    """What a text has between the markers; None where it has none."""
    _, begin, rest = readme.partition(BEGIN)
    inside, end, _ = rest.partition(END)
    return inside.strip() if begin and end else None


def replaced(readme: str, text: str) -> str:
    """The text with another table between the markers; itself where it has none."""
    if between(readme) is None:
        return readme
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


def inputs_table(found: Mapping[str, Input]) -> str:
    """Every input."""
    rows = [[i.name, f"{i.value:.4g}", i.unit, i.kind, i.source] for i in found.values()]
    return table(["input", "value", "unit", "kind", "source"], rows)


def checks_table(found: list[Check]) -> str:
    """Modelled beside measured."""
    rows = [[c.what, f"{c.predicted:.4g}", f"{c.measured:.4g}", f"{c.error:+.0%}", f"`{c.source}`"] for c in found]
    return table(["what, s", "modelled", "measured", "error", "from"], rows)


def sets_table(n: Mapping[str, float]) -> str:
    """The data sets."""
    rows = []
    for d in DATA_SETS:
        activations = d.images * n["views"] * n["row"] / 1e9
        rows.append(
            [d.name, f"{d.images:,}", d.film, f"{d.pixels:g}", f"{d.file_bytes / 1e6:g}", f"{activations:,.1f}"]
        )
    return table(["data set", "images", "kept as", "pixels over that film's", "MB a file", "activations, GB"], rows)


def page(found: Mapping[str, Input], folder: Path = RESULTS) -> str:
    """SCALE.md: what is modelled from these inputs, and how it was checked on the results of `folder`."""
    checked, missing = checks(folder)
    n = values(found)
    worst = max((abs(c.error) for c in checked), default=None)
    grid = " x ".join(f"{n[name]:g} {name}" for name in ("folds", "configurations", "epochs"))
    return TEXT.format(
        price=n["price"],
        grid=f"{grid}, so {n['folds'] * n['configurations']:g} tasks",
        table=results_table(lines(n), n["price"]),
        checks=checks_table(checked),
        said="Nothing could be checked." if worst is None else f"The largest error is {worst:.0%}.",
        missing="".join(f"\n- {line}" for line in missing),
        sets=sets_table(n),
        inputs=inputs_table(found),
    )


TEXT = """# More GPUs: what to expect, MODELLED

Written by `python benchmarks/scale_model.py`; do not edit. **Every time and cost in the first table is modelled. None
was measured on a GPU, nor on more than two nodes.** How far the arithmetic holds on one and two CPU cores stands below,
and what of that is not checked yet; the speeds of a GPU are assumed.

![cache and sweep over the number of GPUs, modelled](scale.png)

- **Sweep**: {grid}, a GPU each.
- **Predict**: every image of the data set once.
- **USD**: {price:g} a GPU and hour, an example; all GPUs are paid from the start of the cache to the end of the sweep.

{table}

What a phase waits for: *decode* the CPU cores, *prefix* the frozen layers, *write* a worker's writing thread, *network*
a node's link, *storage* the shared file system, *training step* the products of training, *copies to the GPU* PCIe,
*start-up* processes, model loads and the first reading of the cache, *number of tasks* folds x configurations: further
GPUs have nothing to do. `--set "link=12e9"` changes any input below.

## The check

Each line carries one measurement to another by the model's arithmetic. {said}

{checks}
{missing}

## Data sets

Sizes of films and files are assumed, round figures; activations are both views, float16.

{sets}

## Inputs

*measured*: in that file, on 2 CPU cores. *computed*: arithmetic, or a default of the program. *noted*: seen on such a
machine, but no file here holds it. *assumed*: measured by nobody here.

{inputs}

## What is left out

Queues for machines, downloading the data set, copying the cache elsewhere, evaluation and report at the end of a sweep,
saving states, several folds in one training step on a GPU, and the memory bandwidth of a node with eight busy GPUs.
Streaming from disk counts on no page cache and on no disk inside a node, so just beyond memory it is too slow here.
A lost node costs half a shard on each of its GPUs (a sweep: half an epoch), a start and the wait for its replacement:
so it is with `--gather`; on a shared disk a shard goes on from its last row.
"""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--price", type=float, help="USD a GPU and hour")
    parser.add_argument("--configurations", type=float, help="of the grid")
    parser.add_argument("--set", action="append", default=[], metavar="INPUT=VALUE", help="another value of any input")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of SCALE.md and scale.png")
    args = parser.parse_args()
    args.changes = [(name, value) for name in ("price", "configurations") if (value := getattr(args, name)) is not None]
    for text in args.set:
        name, _, value = text.rpartition("=")
        try:
            args.changes.append((name, float(value)))
        except ValueError:
            parser.error(f"--set {text}: not NAME=NUMBER")
    known = collect(args.results)
    for name, value in args.changes:
        if name not in known or not value > 0:
            parser.error(f"{name}={value:g}: not one of {', '.join(known)}, or not above 0")
    return args


def main() -> None:
    args = parse()
    import scale_plot

    found = collect(args.results)
    for name, value in args.changes:
        found = changed(found, name, value)
    text = page(found, args.results)
    modelled = lines(values(found))
    (args.out / "SCALE.md").write_text(text, encoding="utf-8")
    (args.out / "scale.png").write_bytes(scale_plot.draw(modelled))
    if args.out == HERE:
        readme = README.read_text(encoding="utf-8")
        README.write_text(replaced(readme, short_table(modelled, found["price"].value)), encoding="utf-8")
    print(text)
    print("wrote SCALE.md and scale.png")


if __name__ == "__main__":
    main()
