"""The command that evaluates a model file on labelled films: parse, call one function, print."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..config import NOTICE
from ..errors import InputError
from .console import Part, ProgressBar, echo_notes, show
from .models.predict import show_batch
from .options import (
    PATH,
    dataset_options,
    device_option,
    pool_option,
    prevalence_option,
    read_source,
    resamples_option,
    strict_option,
    threads_option,
)


@click.command()
@click.argument("models", metavar="MODEL...", type=PATH, nargs=-1, required=True)
@click.argument("manifest", type=PATH)
@click.option("--out", type=PATH, help="Folder of the page.  [default: evaluations/DATA/MODEL]")
@click.option(
    "--map",
    "renamed",
    metavar="THEIRS=OURS",
    multiple=True,
    help='Take a class column of MANIFEST as a class of the model, such as "Pleural effusion=Effusion"; may be given '
    "again.",
)
@click.option(
    "--recalibrate", metavar="OUT.onnx", type=PATH, help="Write a copy with thresholds and calibration set here."
)
@click.option(
    "--threshold-target",
    metavar="TARGET",
    help="Thresholds of --recalibrate: f1, sensitivity=X, specificity=X, or a CSV file of class,target (others f1).  "
    "[default: f1]",
)
@click.option(
    "--calibration",
    type=click.Choice(["none", "platt", "isotonic"]),
    help="Calibration of --recalibrate; none keeps the file's.  [default: the kind of the file, else platt]",
)
@pool_option
@prevalence_option
@resamples_option
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the resamples and of --recalibrate."
)
@click.option("--overwrite", is_flag=True, help="Predict all films again, also where --out holds other answers.")
@dataset_options
@strict_option
@device_option
@threads_option
@click.option("--batch-size", type=click.IntRange(1, 4096), default=8, show_default=True, help="Images a model call.")
@click.option("--workers", type=click.IntRange(1, 256), help="Decoding threads.  [default: usable cores]")
def evaluate(models: tuple[Path, ...], manifest: Path, out: Path | None, **flags: Any) -> None:
    """Give every figure of a model file on your own labelled films.

    MODEL is an ONNX file, or a folder of variants; two models are compared, with paired intervals. MANIFEST is a table
    or a data set as `cxrfast cache` takes it. Films are predicted as `cxrfast predict` does, without torch. Exit 1
    where films failed.
    """
    for name in ("threshold_target", "calibration"):
        if flags[name] is not None and flags["recalibrate"] is None:
            raise click.UsageError(f"--{name.replace('_', '-')} is for --recalibrate OUT.onnx; add that")
    if len(models) > 1 and flags["resamples"] < 1:
        raise InputError("--resamples: a comparison needs at least 1; 1000 is usual.")
    if out is not None and out.is_file():
        raise InputError(f"--out: {out} is a file; give a folder.")
    source = read_source(manifest, flags)
    from ..external.job import evaluate_models
    from ..external.writer import warn_same_data

    bar = ProgressBar()
    spec, on_batch = external_spec(flags), partial(show_batch, bar)
    done, pair = evaluate_models(models, source, out, spec, on_batch, lambda line: echo_notes([line]))
    bar.done()
    for each in done:
        echo_notes(filter(None, [warn_same_data(each.found)]))
        show(describe(each, flags["recalibrate"]))
        click.echo(f"wrote {each.page}")
    if pair is not None:
        from .report import describe_comparison

        click.echo("")
        show(describe_comparison(pair))
        click.echo(f"wrote {done[0].page.parent.parent / 'comparison.html'}")
    else:
        click.echo(NOTICE)
    for each in done:
        if each.failed:
            reasons = ", ".join(f"{count:,} {name}" for name, count in each.answers.summary["failed_by"].items())
            click.echo(
                f"{each.failed:,} film(s) failed: {reasons}; {each.page.parent / 'predictions.csv'} says why", err=True
            )
    sys.exit(1 if any(each.failed for each in done) else 0)


def external_spec(flags: dict[str, Any]) -> Any:
    """What the flags ask for."""
    from ..external.evaluation import FigureSpec
    from ..external.job import ExternalSpec
    from ..external.recalibration import PointSpec
    from ..inference.batch import BatchSpec

    target, kind = flags["threshold_target"], flags["calibration"]
    return ExternalSpec(
        renamed=flags["renamed"],
        figures=FigureSpec(**{name: flags[name] for name in ("resamples", "seed", "pool", "prevalence")}),
        batch=BatchSpec(**{name: flags[name] for name in ("batch_size", "workers", "overwrite")}),
        recalibrate=flags["recalibrate"],
        point=PointSpec(target="f1" if target is None else target, calibration=kind, seed=flags["seed"]),
        **{name: flags[name] for name in ("device", "threads", "strict")},
    )


def describe(each: Any, copy: Path | None) -> list[Part]:
    """The figures of one model, beside those of its training data, and what was set here."""
    from ..external.improvement import point_class_table, point_table
    from ..external.training_figures import training_table
    from ..external.writer import describe_unlikeness
    from ..report.tables import figure_table
    from ..unlikeness.oddest import describe_oddest, rank_oddest

    found = each.found
    model, data, part = found["model"], found["data"], found["parts"]["external"]
    warned = f" ({model['provenance'].upper()})" if model["provenance"] else ""
    parts: list[Part] = [
        f"{model['file']}{warned}, trained on {model['trained_on']}, on {part['n']:,} films of {part['groups']:,} "
        f"groups of {data['name']}; {len(data['classes'])} of {model['classes']} classes",
        figure_table({"these films": part}),
    ]
    beside = training_table(found["training"])
    parts += ["", beside] if beside.rows else []
    if data["unlikeness"]:
        oddest = rank_oddest(
            each.source.manifest.images, [v if v == v else None for v in each.answers.unlikeness.tolist()]
        )
        parts += ["", f"{describe_unlikeness(data['unlikeness'])}. The oddest:", *describe_oddest(oddest)]
    if copy is not None:
        parts += ["", point_table(found["set_here"]), "", point_class_table(found["set_here"])]
        parts.append(f"wrote {copy}, which `cxrfast verify` passes; the weights are those of the file")
    return [*parts, ""]
