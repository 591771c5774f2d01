"""The commands of the group bench: parse, call one function, print, end with the verdict."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from ..config import CacheSpec, PreprocessSpec
from ..errors import InputError
from ..models import device as cpu
from .console import ProgressBar, StageProgress
from .options import (
    PATH,
    FiniteFloat,
    Group,
    dataset_options,
    device_option,
    read_source,
    source_argument,
    spec_from,
    spec_options,
    threads_option,
)

json_option = click.option("--json", "json_out", type=PATH, help="Write the result here.")
plot_option = click.option("--plot", type=PATH, help="Write a picture of it here, NAME.png.")
budget_option = click.option(
    "--budget-ms",
    type=FiniteFloat(min=0, min_open=True),
    default=100.0,
    show_default=True,
    help="Milliseconds from file to probabilities.",
)
timed_images_option = click.option(
    "--images", type=PATH, help="Folder of images to time.  [default: phantoms at acquisition size]"
)


@click.group(cls=Group)
def bench() -> None:
    """Time a model, the cache or training on this machine."""


@bench.command()
@click.argument("model", type=PATH)
@timed_images_option
@click.option("--repeats", type=click.IntRange(1), default=100, show_default=True, help="Timed images.")
@click.option("--warmup", type=click.IntRange(0), default=5, show_default=True, help="Untimed images first.")
@click.option(
    "--budget-ms",
    type=FiniteFloat(min=0, min_open=True),
    help="Give a verdict: milliseconds from file to probabilities that the percentile must keep.",
)
@click.option(
    "--percentile",
    type=click.Choice(["50", "90", "95", "99"]),
    default="90",
    show_default=True,
    help="The percentile that must keep it.",
)
@device_option
@threads_option
@json_option
@plot_option
def latency(
    model: Path,
    images: Path | None,
    repeats: int,
    warmup: int,
    budget_ms: float | None,
    percentile: str,
    device: str,
    threads: int | None,
    json_out: Path | None,
    plot: Path | None,
) -> None:
    """Time one image after the other, from file to probabilities.

    The model alone and each stage are timed too.
    With --budget-ms it ends with a verdict: exit 0 PASS, 1 FAIL, 3 INCONCLUSIVE: more samples are needed.
    """
    from ..bench import latency as measuring

    _writable(json_out, plot)
    spec = measuring.LatencySpec(
        images=images,
        repeats=repeats,
        warmup=warmup,
        budget_ms=budget_ms,
        percentile=int(percentile),
        device=device,
        threads=threads,
    )
    result = measuring.latency(model, spec)
    finish(result, measuring.describe(result), json_out, plot)


@bench.command()
@click.argument("model", type=PATH)
@timed_images_option
@click.option(
    "--scenario",
    type=click.Choice(["offline", "single-stream", "server"]),
    default="offline",
    show_default=True,
    help="All at once by batch size, one after the other, or random arrivals.",
)
@click.option("--max-batch", type=click.IntRange(1, 4096), default=32, show_default=True, help="Largest batch size.")
@click.option(
    "--seconds",
    type=FiniteFloat(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="How long to measure; offline never less than three calls a batch size.",
)
@budget_option
@click.option(
    "--percentile",
    type=click.Choice(["50", "90", "95", "99"]),
    help="The percentile that must keep it.  [default: 90 single-stream, 99 server]",
)
@device_option
@threads_option
@click.option("--workers", type=click.IntRange(1, 256), help="Decoding threads of offline.  [default: usable cores]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the arrivals.")
@json_option
@plot_option
def throughput(
    model: Path,
    images: Path | None,
    scenario: str,
    max_batch: int,
    seconds: float,
    budget_ms: float,
    percentile: str | None,
    device: str,
    threads: int | None,
    workers: int | None,
    seed: int,
    json_out: Path | None,
    plot: Path | None,
) -> None:
    """Measure images a second, or how many keep a budget.

    Offline: the model alone and from files, by batch size. Else what keeps a budget as images arrive.
    --scenario single-stream and server end with a verdict: exit 0 PASS, 1 FAIL, 3 INCONCLUSIVE.
    """
    from ..bench import throughput as measuring

    _writable(json_out, plot)
    bar = ProgressBar()
    spec = measuring.ThroughputSpec(
        images=images,
        scenario=scenario,
        max_batch=max_batch,
        seconds=seconds,
        budget_ms=budget_ms,
        percentile=int(percentile) if percentile else None,
        device=device,
        threads=threads,
        workers=workers,
        seed=seed,
    )
    result = measuring.throughput(model, spec, bar.show)
    bar.done()
    finish(result, measuring.describe(result), json_out, plot)


def _writable(json_out: Path | None, plot: Path | None = None) -> None:
    """Said before minutes are measured."""
    from ..bench import results

    results.writable(json_out, "--json")
    results.writable(plot, "--plot", ".png")


def finish(result: Any, text: str, json_out: Path | None, plot: Path | None = None) -> None:
    """Print the result, write it and its picture, and end with its verdict."""
    from ..bench import results

    click.echo(text)
    if json_out is not None:
        results.write(result, json_out)
        click.echo(f"wrote {json_out}")
    if plot is not None:
        from ..bench import charts
        from ..system import files

        files.write_bytes(plot, charts.draw(result), "--plot")
        click.echo(f"wrote {plot}")
    sys.exit(results.EXIT[result["verdict"]["result"]] if "verdict" in result else 0)


@bench.command()
@click.argument("model_a", type=PATH)
@click.argument("model_b", type=PATH, required=False)
@click.option("--against", type=click.Choice(["torch"]), help="torch: the run's own model instead of MODEL_B.")
@click.option("--run", type=PATH, help="With --against torch, the run folder.  [default: the folder of MODEL_A]")
@click.option("--images", type=PATH, help="Images both answer.  [default: phantoms at acquisition size]")
@click.option("--manifest", type=PATH, help="Images and their labels (manifest or dataset folder), for AUCs too.")
@click.option(
    "--count", type=click.IntRange(1), default=256, show_default=True, help="Images both answer, evenly spread."
)
@click.option("--rounds", type=click.IntRange(1), default=30, show_default=True, help="Timed turns of each.")
@click.option("--batch-size", type=click.IntRange(1, 4096), default=1, show_default=True, help="Images a timed call.")
@device_option
@threads_option
@json_option
@click.pass_context
def compare(
    ctx: click.Context,
    model_a: Path,
    model_b: Path | None,
    against: str | None,
    run: Path | None,
    images: Path | None,
    manifest: Path | None,
    count: int,
    rounds: int,
    batch_size: int,
    device: str,
    threads: int | None,
    json_out: Path | None,
) -> None:
    """Time two models in turn, and compare their answers.

    Each runs in a process of its own; the answers of B are compared with those of A.
    Two float32 models of the same weights must agree before they are timed.
    """
    from ..bench import comparison

    _writable(json_out)
    if (model_b is None) == (against is None):
        raise InputError("give two models, or one and --against torch.")
    if images is not None and manifest is not None:
        raise InputError("--images and --manifest both name the images; give one of them.")
    if model_b is None:
        if device not in ("auto", "cpu"):
            raise InputError(f"--against torch runs on the CPU; --device {device} would compare two devices.")
        arms = comparison.against_torch(model_a, run, threads=threads)
    elif run is not None:
        raise InputError("--run is for --against torch.")
    else:
        arms = tuple(comparison.Arm(path=path, device=device, threads=threads) for path in (model_a, model_b))  # type: ignore[assignment]
    spec = comparison.CompareSpec(images=images, manifest=manifest, count=count, rounds=rounds, batch_size=batch_size)
    result = comparison.compare(*arms, spec, StageProgress().show)
    ProgressBar.close()
    finish(result, comparison.describe(result), json_out)


@bench.command()
@source_argument
@spec_options(CacheSpec, "weights", "image_size", "unfreeze_blocks", "views")
@spec_options(PreprocessSpec, "resize")
@spec_options(CacheSpec, "dtype")
@click.option("--count", type=click.IntRange(1), default=48, show_default=True, help="Images, evenly spread.")
@click.option("--rounds", type=click.IntRange(1), default=6, show_default=True, help="Turns of each part.")
@device_option
@threads_option
@dataset_options
@json_option
def cache(source: Path, count: int, rounds: int, device: str, json_out: Path | None, **flags: Any) -> None:
    """Time `cxrfast cache` and its parts on some images.

    They are SOURCE's, evenly spread. The plain pipeline's pass over the same images is timed beside.
    """
    _writable(json_out)
    manifest = read_source(source, flags)
    from ..activations import encoder
    from ..bench import caching
    from ..models import backbone

    cpu.pick_device(device)
    cpu.prepare(flags["threads"])
    spec = spec_from(CacheSpec, flags, preprocess=spec_from(PreprocessSpec, flags))
    tower = backbone.load(spec.weights, spec.image_size)
    spec = encoder.with_size(spec, tower)
    some, left_out = caching.few(manifest, count, spec.preprocess)
    with tempfile.TemporaryDirectory() as scratch:
        parts = caching.Parts(tower, spec, some, Path(scratch), device)
        try:
            result = caching.measure(parts, rounds, on_round=_rounds(rounds))
        except InputError as error:  # of the caches that are timed, which go into a temporary folder
            text = str(error).replace("--out: ", "TMPDIR, the folder of temporary files: ")
            raise InputError(text) from error
    result["left_out"] = left_out
    finish(result, caching.describe(result), json_out)


@bench.command()
@click.argument("cache", type=PATH)
@click.option("--images", type=PATH, help="Folder of the images, where they are not where the cache found them.")
@click.option("--weights", help="Where the backbone is now, if not where the cache found it.")
@click.option("--count", type=click.IntRange(4), default=96, show_default=True, help="Images, evenly spread.")
@click.option("--rounds", type=click.IntRange(1), default=6, show_default=True, help="Turns of each way.")
@device_option
@threads_option
@json_option
def train(
    cache: Path,
    images: Path | None,
    weights: str | None,
    count: int,
    rounds: int,
    device: str,
    threads: int | None,
    json_out: Path | None,
) -> None:
    """Time an epoch from CACHE beside the plain pipeline.

    The plain pipeline takes every image through the whole model every epoch.
    """
    from ..bench import training

    _writable(json_out)
    cpu.pick_device(device)
    cpu.prepare(threads)
    arms = training.Arms(training.from_cache(cache, count=count, images=images, weights=weights), device)
    result = training.measure(arms, rounds, on_round=_rounds(rounds))
    finish(result, training.describe(result), json_out)


def _rounds(total: int) -> Any:
    bar = ProgressBar()

    def show(done: int) -> None:
        bar.show(done, total, f"round {done} of {total}")
        if done == total:
            bar.done()

    return show
