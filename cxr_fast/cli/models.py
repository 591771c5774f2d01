"""Commands on trained models: parse, call one function, print."""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..cluster import connection
from ..config import NOTICE
from ..errors import InputError
from ..system.files import write_json
from ..system.text import Table, counted, gigabytes, number
from .console import Part, ProgressBar, StageProgress, echo_notes, show, took
from .options import (
    PATH,
    FiniteFloat,
    adjustment_option,
    cluster_option,
    device_option,
    images_option,
    point_options,
    strict_option,
    threads_option,
)


@click.command()
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, help="A folder, or a file for one variant.  [default: RUN/model.VARIANT.onnx]")
@click.option(
    "--variants",
    help="fp32 for any machine, fp16 for CUDA, int8 for CPUs with VNNI or AMX.  [default: fp32,fp16,int8]",
)
@click.option(
    "--final",
    type=click.Choice(["best-fold", "refit", "ensemble", "retrained"]),
    help="Another final model of the run.  [default: the one the sweep chose]",
)
@click.option(
    "--tta",
    type=click.Choice(["none", "flip"]),
    help="Answer for the plain view, or for the mean of plain and mirrored, which runs the network on both.  "
    "[default: as the run was scored]",
)
@adjustment_option
@point_options
@click.option("--embedding", is_flag=True, help="Also put out the L2-normalised embedding.")
@click.option("--allow-drift", is_flag=True, help="Keep fp16 and int8 files over their limits.")
@click.option(
    "--check",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Cached images that each variant is checked on, hold-out first.",
)
@images_option
def export(run: Path, variants: str | None, check: int, **flags: Any) -> None:
    """Write ONNX files, each kept only if it agrees with torch.

    Each file describes itself, and is compared on real cached images. fp16 and int8 may change as many decisions as the
    same films saved as JPEG 95.
    Exit 1 where a variant that --variants names was over its limit and not kept.
    """
    from ..inference.model_file import split_variants

    names = split_variants(variants)
    out = flags["out"]
    if out is not None and not (above := next(p for p in Path(out).absolute().parents if p.exists())).is_dir():
        raise InputError(f"--out: cannot write {out}: {above} is a file.")
    if sys.stderr.isatty():  # somebody waits; scripts get what comes of it
        click.echo(f"exporting {', '.join(names)} of {run}; each is checked on up to {check:,} cached images", err=True)
    from ..export.summary import describe_export
    from ..export.variants import ExportSpec, export_run

    spec = ExportSpec(variants=names, count=check, **flags)
    found = export_run(run, spec, on_progress=StageProgress().show)
    ProgressBar.close()
    show(describe_export(found))
    if out is None and any(one.kept for one in found):
        click.echo(f"`cxrfast report {run}` puts these files onto its page and its model card")
    sys.exit(0 if variants is None or all(one.kept for one in found) else 1)


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
    from ..cluster.predict import ClusterPredictor, NodeSpec
    from ..data.paths import read
    from ..inference import batch
    from ..inference.predictor import Predictor

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
    from ..data.paths import read
    from ..inference import batch

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
    from ..inference.outputs import studies_path

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


@click.command()
@click.argument("run", type=PATH)
@click.argument("images", metavar="IMAGE...", type=PATH, nargs=-1, required=True)
@click.option("--class", "classes", multiple=True, help="A class to show; may be given again.  [default: see --top]")
@click.option("--top", type=click.IntRange(1), help="Show those highest above their thresholds.  [default: 3]")
@click.option(
    "--out", type=PATH, required=True, help="PNG or SVG of the film and its maps; of several films, a folder."
)
@click.option("--npy", type=PATH, help="Also the maps on the patch grid, (classes, rows, columns), as a .npy file.")
@click.option(
    "--style",
    type=click.Choice(["overlay", "contour", "side"]),
    default="overlay",
    show_default=True,
    help="Tint the film, outline the strongest part of the map, or draw the map alone beside the film.",
)
@click.option(
    "--opacity",
    type=click.FloatRange(0, 1),
    help="Of an overlay's strongest place.  [default: 0.65]",
)
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="How much of the map is inside the outline of --style contour.  [default: 0.5]",
)
@click.option(
    "--images", "root", type=PATH, help="Folder of the films, for an IMAGE that is named as in the run's tables."
)
def explain(run: Path, images: tuple[Path, ...], classes: tuple[str, ...], top: int | None, **flags: Any) -> None:
    """Draw heat maps of films: where the model looked.

    Its attention is weighted by the gradient of a class's logit. A heat map is no proof of a finding.
    Exit 1 where one of several films cannot be read.
    """
    if classes and top is not None:
        raise click.UsageError("--top chooses classes where no --class does; give one of the two")
    for name, style in (("opacity", "overlay"), ("share", "contour")):
        if flags[name] is not None and flags["style"] != style:
            raise click.UsageError(f"--{name} is of --style {style}")
    out, npy = flags["out"], flags["npy"]
    if npy is not None and len(images) > 1:
        raise click.UsageError("--npy takes one film; give the films one by one")
    from ..export import heatmaps
    from ..export.overlay import Style
    from ..training.run_folder import read_info

    drawn = {name: flags[name] for name in ("opacity", "share") if flags[name] is not None}
    drawing = heatmaps.Drawing(classes=classes, top=top or heatmaps.TOP, style=Style(kind=flags["style"], **drawn))
    films = [heatmaps.find_film(run, image, flags["root"]) for image in images]
    if len(films) == 1 and (out.suffix or npy is not None):
        found = heatmaps.write_one(run, films[0], out, npy, drawing)
        show([_describe_maps(found)])
        click.echo(f"wrote {out}" + (f" and {npy}" if npy else ""))
        failed = 0
    else:
        failed = heatmaps.write_many(run, films, out, drawing, _echo_explained)
    if failed < len(films) and (warning := read_info(run)["provenance"]):
        click.echo(f"note: {warning.upper()}: this picture says nothing about a patient", err=True)
    click.echo(NOTICE)
    if failed:
        click.echo(f"{failed:,} of {len(films):,} films could not be read", err=True)
        sys.exit(1)


def _describe_maps(found: Any) -> Table:
    rows = [
        [each.name, number(each.probability), number(each.threshold), f"{each.shares.max():.1%}"] for each in found.maps
    ]
    columns = ["class", "probability", "threshold", "highest patch"]
    return Table(columns=columns, rows=rows, notes=(f"Probabilities {found.source}.",))


def _echo_explained(path: Path, found: Any) -> None:
    """A line for each film of several: the file, and each class with its probability."""
    if isinstance(found, Exception):
        click.echo(str(found), err=True)
        return
    each = ", ".join(f"{one.name} {number(one.probability)}" for one in found.maps)
    click.echo(f"{path}: {each}")


@click.command()
@click.argument("run", type=PATH)
@click.argument("repository")
@click.option(
    "--private/--public",
    default=True,
    show_default=True,
    help="Visibility of a new repository; an existing one must have it already.",
)
@click.option("--revision", default="main", show_default=True, help="Branch to commit to; made where it is new.")
@click.option("--dry-run", is_flag=True, help="Verify and show what would go; send nothing, ask nothing.")
@device_option
@threads_option
def push(run: Path, repository: str, dry_run: bool, **flags: Any) -> None:
    """Upload a run's model files, card and figures to the hub.

    REPOSITORY is owner/name on the Hugging Face hub; the token is that of HF_TOKEN or of `hf auth login`. Each model
    file is verified first, as `cxrfast verify` does. Predictions, labels, splits, names of images and patients, and
    paths stay here.
    """
    from ..inference import upload

    spec = upload.UploadSpec(repo=repository, dry_run=dry_run, **flags)
    pushed = upload.push(run, spec, lambda plan: show(describe_upload(plan, spec)))
    if pushed is None:
        click.echo("dry run: nothing was sent")
        return
    echo_notes(pushed.notes)
    click.echo(f"uploaded: {pushed.page}")
    access = " (private: others need access to it, and a token)" if spec.private else ""
    click.echo(f"use it with{access}:\n  cxrfast predict {pushed.address} films/ --out p.csv")


def describe_upload(plan: Any, spec: Any) -> list[Part]:
    """What goes where, what of an earlier model is removed there, and what stays here."""
    visibility = "private" if spec.private else "public"
    new = "" if spec.dry_run else "new " if plan.is_new else "existing "
    rows = [[file.name, gigabytes(file.size)] for file in plan.files]
    notes = tuple(f"{file.name}: {file.note}" for file in plan.files if file.note)
    parts: list[Part] = [
        f"to the {new}{visibility} repository {spec.repo}, branch {spec.revision}, in one commit:",
        Table(columns=["file", "size"], rows=rows, notes=notes),
        f"the data set's name goes with them: {plan.data}",
    ]
    if spec.dry_run:
        parts.append(
            "files of these names that the hub holds already, README.md too, will be replaced, and model files and "
            "tables of an earlier model removed; a push says which"
        )
    if plan.replaced:
        parts.append(f"replaced there: {', '.join(plan.replaced)}")
    if plan.removed:
        parts.append(f"removed there, of an earlier model: {', '.join(plan.removed)}")
    return [*parts, f"stays here: {', '.join(plan.stays) or 'nothing'}", NOTICE]


@click.command()
@click.option("--deep", is_flag=True, help="Also import torch, make a CUDA tensor, and run a session on each provider.")
@click.option("--json", "json_out", type=PATH, help="Write the findings here.")
def doctor(deep: bool, json_out: Path | None) -> None:
    """Say what this machine and installation can do.

    Each line begins with ok, -- (absent and optional) or !! (needed and wrong: exit 1).
    """
    from .doctor import describe, examine, healthy, to_json

    findings = examine(deep=deep)
    click.echo(describe(findings))
    if json_out is not None:
        write_json(json_out, to_json(findings), "--json")
        click.echo(f"wrote {json_out}")
    sys.exit(0 if healthy(findings) else 1)
