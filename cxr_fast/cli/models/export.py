"""The command that exports: parse, call one function, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ...errors import InputError
from ..console import ProgressBar, StageProgress, show
from ..options import (
    PATH,
    adjustment_option,
    images_option,
    point_options,
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
    from ...inference.model_file import split_variants

    names = split_variants(variants)
    out = flags["out"]
    if out is not None and not (above := next(p for p in Path(out).absolute().parents if p.exists())).is_dir():
        raise InputError(f"--out: cannot write {out}: {above} is a file.")
    if sys.stderr.isatty():  # somebody waits; scripts get what comes of it
        click.echo(f"exporting {', '.join(names)} of {run}; each is checked on up to {check:,} cached images", err=True)
    from ...export.summary import describe_export
    from ...export.variants import ExportSpec, export_run

    spec = ExportSpec(variants=names, count=check, **flags)
    found = export_run(run, spec, on_progress=StageProgress().show)
    ProgressBar.close()
    show(describe_export(found))
    if out is None and any(one.kept for one in found):
        click.echo(f"`cxrfast report {run}` puts these files onto its page and its model card")
    sys.exit(0 if variants is None or all(one.kept for one in found) else 1)
