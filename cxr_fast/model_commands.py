"""Commands on trained models: parse, call one function, print."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .shell import PATH, Progress, device_option, gigabytes, images_option, threads_option


@click.command()
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, help="The ONNX file.  [default: RUN/model.fp32.onnx]")
@images_option
def export(run: Path, out: Path | None, images: Path | None) -> None:
    """Write one self-describing ONNX file, kept only when ONNX Runtime and torch agree on real cached images."""
    from . import export as exports

    path, parity, info = exports.export(run, out=out, images=images)
    each = ", ".join(f"batch {b}: {d:.1e}" for b, d in parity.by_batch.items())
    click.echo(f"wrote {path} ({gigabytes(path.stat().st_size)}), {len(info['labels'])} classes")
    click.echo(
        f"largest probability difference to torch on {parity.images} images: {parity.largest:.1e} "
        f"(limit {exports.LIMIT:g}; {each})"
    )
    if parity.cached is not None:
        click.echo(f"largest difference to the sweep's own predictions from stored activations: {parity.cached:.1e}")
    if info["provenance"]:
        click.echo(f"note: {info['provenance'].upper()}")


@click.command()
@click.argument("model", type=PATH)
@click.argument("inputs", nargs=-1, required=True)
@click.option("--out", type=PATH, required=True, help="CSV of path, status, reason and one probability a class.")
@click.option("--decide", is_flag=True, help="Add the findings over their thresholds.")
@device_option
@threads_option
@click.option("--batch-size", type=click.IntRange(1, 4096), default=8, show_default=True, help="Images a model call.")
@click.option("--workers", type=click.IntRange(1, 256), help="Decoding threads.  [default: usable cores]")
def predict(
    model: Path,
    inputs: tuple[str, ...],
    out: Path,
    decide: bool,
    device: str,
    threads: int | None,
    batch_size: int,
    workers: int | None,
) -> None:
    """Probabilities for files, folders (recursive) and globs, from the ONNX file alone; needs no torch."""
    from . import predict as predicting

    predictor = predicting.Predictor(model, device=device, threads=threads)
    paths = predicting.expand(inputs)
    bar = Progress()

    def show(done: int, failed: int) -> None:
        bar.show(done, len(paths), f"{done:,} of {len(paths):,} images, {failed} failed")

    summary = predicting.write_csv(
        predictor, paths, out, batch_size=batch_size, workers=workers, decide=decide, on_result=show
    )
    bar.done()
    good, rate = summary["images"] - summary["failed"], summary["images"] / max(summary["seconds"], 1e-9)
    click.echo(
        f"{good:,} of {summary['images']:,} images predicted in {summary['seconds']:.1f} s ({rate:.1f}/s) "
        f"on {predictor.where}: {out}"
    )
    if predictor.warning:
        click.echo(f"note: {predictor.warning.upper()}: these probabilities say nothing about a patient", err=True)
    if summary["failed"]:
        click.echo(f"{summary['failed']:,} image(s) failed; their rows say why", err=True)
        sys.exit(1)


@click.group()
def bench() -> None:
    """Measure, on this machine."""


@bench.command()
@click.argument("model", type=PATH)
@click.option("--images", type=PATH, help="Folder of images to time.  [default: phantoms at acquisition size]")
@click.option("--repeats", type=click.IntRange(1), default=100, show_default=True, help="Timed images.")
@click.option("--warmup", type=click.IntRange(0), default=5, show_default=True, help="Untimed images first.")
@click.option(
    "--budget-ms",
    type=click.FloatRange(min=0, min_open=True),
    default=100.0,
    show_default=True,
    help="Milliseconds from file to probabilities.",
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
@click.option("--json", "json_out", type=PATH, help="Write the result here.")
def latency(
    model: Path,
    images: Path | None,
    repeats: int,
    warmup: int,
    budget_ms: float,
    percentile: str,
    device: str,
    threads: int | None,
    json_out: Path | None,
) -> None:
    """One image at a time: file to probabilities and model only, with a verdict against a budget."""
    from . import bench as benches

    result = benches.latency(
        model,
        images=images,
        repeats=repeats,
        warmup=warmup,
        budget_ms=budget_ms,
        percentile=int(percentile),
        device=device,
        threads=threads,
    )
    click.echo(benches.describe_latency(result))
    if json_out is not None:
        benches.write_json(result, json_out)
        click.echo(f"wrote {json_out}")
    sys.exit(benches.EXIT[result["verdict"]["result"]])
