"""The command that predicts: parse, call one function, print."""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from ...cluster import connection
from ...system.text import counted
from ..console import ProgressBar, took
from ..options import (
    PATH,
    FiniteFloat,
    cluster_option,
    device_option,
    strict_option,
    threads_option,
)


class UnlikenessLimit(FiniteFloat):
    """A limit; without one the flag must not stand before MODEL or INPUTS, which would be read as the limit."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the float. Fails with what to do where the value is a name."""
        try:
            float(value)
        except ValueError:
            self.fail(f"{value!r} is no number; put the flag last, or give it a limit: --refuse-unlike 1.", param, ctx)
        return super().convert(value, param, ctx)


@click.command()
@click.argument("model", type=PATH)
@click.argument("inputs", nargs=-1, required=True)
@click.option(
    "--out",
    type=PATH,
    required=True,
    help="NAME.csv, .parquet or .jsonl: path, status, reason, note, unlikeness, a probability a class.",
)
@click.option("--decide", is_flag=True, help="Add the findings over their thresholds.")
@click.option(
    "--study-pool",
    "pool",
    type=click.Choice(["mean", "max"]),
    help="Also NAME.studies.csv: the images of a manifest's study (else group) as one.",
)
@click.option("--append", is_flag=True, help="Keep rows of earlier runs whose films are not among the inputs.")
@click.option("--overwrite", is_flag=True, help="Drop what --out holds instead of going on from it.")
@click.option(
    "--watch",
    type=FiniteFloat(0.1, 86400),
    metavar="SECONDS",
    help="Look for new films so often until stopped; keeps rows as --append does.",
)
@strict_option
@click.option(
    "--refuse-unlike",
    type=UnlikenessLimit(0),
    is_flag=False,
    flag_value=1.0,
    metavar="[LIMIT]",
    help="Fail films whose unlikeness to the training films is over LIMIT, 1 by default, and say what would mend them.",
)
@device_option
@threads_option
@click.option("--batch-size", type=click.IntRange(1, 4096), default=8, show_default=True, help="Images a model call.")
@click.option("--workers", type=click.IntRange(1, 256), help="Decoding threads.  [default: usable cores]")
@cluster_option
def predict(
    model: Path, inputs: tuple[str, ...], out: Path, cluster: str | None, watch: float | None, **flags: Any
) -> None:
    """Write probabilities for images; needs no torch.

    MODEL is an ONNX file, or a folder of variants of one model.
    INPUTS are files, folders (recursive), globs, a manifest with a column `image` (.csv, .parquet), @FILE with a path
    per line, or - for such a list on standard input. The same command again does only what is missing or has changed.
    """
    from ...cluster.predict import ClusterPredictor, NodeSpec
    from ...data.paths import read
    from ...inference import batch
    from ...inference.predictor import Predictor

    predictor: Predictor | ClusterPredictor
    here = {name: flags.pop(name) for name in ("device", "threads", "strict")}
    limit = flags.pop("refuse_unlike")
    if watch is not None:
        if cluster is not None or "-" in inputs:
            raise click.UsageError("--watch reads its inputs again and again: leave out --cluster and -")
        predictor = Predictor(model, **here, spin=False)
        predictor.refuse_unlike = limit
        _watch(predictor, inputs, out, batch.BatchSpec(**flags), watch)
        return
    with contextlib.nullcontext() if cluster is None else connection.connect(cluster) as joined:
        if joined is None:
            predictor = Predictor(model, **here, spin=False)
            predictor.refuse_unlike, wanted = limit, read(inputs)
        else:
            wanted, spec = read(inputs), NodeSpec(workers=flags["workers"], refuse_unlike=limit, **here)
            predictor = ClusterPredictor(joined, model, wanted.paths, spec)
            click.echo(f"cluster: {joined}", err=True)
        if not wanted.paths:
            click.echo(f"nothing new: no image among the inputs{_passed_over(wanted)}; {out} is as it was")
            return
        bar = ProgressBar()
        summary = batch.write(predictor, wanted, out, batch.BatchSpec(**flags), partial(show_batch, bar))
    bar.done()
    _echo_predicted(summary, predictor.where, out)
    if wanted.passed_over:
        click.echo(f"passed over in folders{_passed_over(wanted)}", err=True)
    click.echo(f"device: {predictor.why}", err=True)
    if lost := summary.get("cluster", {}).get("lost"):
        click.echo(f"note: node {', '.join(lost)} was lost on the way; other nodes predicted its images", err=True)
    if predictor.warning:
        click.echo(f"note: {predictor.warning.upper()}: these probabilities say nothing about a patient", err=True)
    if summary["failed"]:
        click.echo(f"{summary['failed']:,} image(s) failed: {_failures(summary)}; their rows say why", err=True)
        sys.exit(1)


def _watch(predictor: Any, inputs: tuple[str, ...], out: Path, spec: Any, seconds: float) -> None:
    """Predict what is new until stopped, a line each round."""
    from ...data.paths import read
    from ...inference import batch

    def tell(wanted: Any, summary: dict[str, Any]) -> None:
        _echo_predicted(summary, predictor.where, out)
        if summary["failed"]:
            click.echo(f"{summary['failed']:,} image(s) failed: {_failures(summary)}; their rows say why", err=True)

    if predictor.warning:
        click.echo(f"note: {predictor.warning.upper()}: these probabilities say nothing about a patient", err=True)
    click.echo(f"looking for new films every {seconds:g} s; Ctrl-C or SIGTERM stops", err=True)
    batch.watch(predictor, lambda: read(inputs), out, spec, seconds, tell)


def _failures(summary: dict[str, Any]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in summary["failed_by"].items())


def _passed_over(wanted: Any) -> str:
    found = ", ".join(f"{count:,} {reason}" for reason, count in wanted.passed_over.items())
    return f" ({found})" if found else ""


def show_batch(bar: ProgressBar, state: Any) -> None:
    """Show how far a run of predictions is."""
    fresh = state.done - state.reused
    text = f"{state.done:,} of {state.total:,} images, {fresh / max(bar.seconds, 1e-9):.1f} images/s, "
    text += f"waiting for {state.waiting_for}" + (f", {state.failed:,} failed" if state.failed else "")
    bar.show(state.done, state.total, text, before=state.reused)


def _echo_predicted(summary: dict[str, Any], where: str, out: Path) -> None:
    from ...inference.outputs import studies_path

    images, reused = summary["images"], summary["reused"]
    rate = (images - reused) / max(summary["seconds"], 1e-9)
    before = f", {reused:,} of them by an earlier run," if reused else ""
    if reused == images:
        click.echo(f"nothing new; {counted(reused, 'row')} were already there, {took()}: {out}")
    else:
        click.echo(
            f"{images - summary['failed']:,} of {images:,} images predicted{before} in {summary['seconds']:.1f} s "
            f"({rate:.1f}/s) on {where}, {took()}: {out}"
        )
    if len(summary["answered_by"]) > 1:
        each = "; ".join(f"{count:,} by {who}" for who, count in summary["answered_by"].items())
        click.echo(f"note: not all on one device or version: {each}", err=True)
    click.echo(summary["shift"]["line"])
    if pooled := summary["study_pool"]:
        said = f"{pooled['studies']:,} studies by the column {pooled['column']}, {pooled['how']} of their images"
        click.echo(f"{said}: {studies_path(out)}")
