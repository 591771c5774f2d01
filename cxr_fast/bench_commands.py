"""The commands of `cxrfast bench`: parse, call one function, print, end with the verdict."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .shell import PATH, device_option, threads_option


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
