"""The command that exports: parse, call one function, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...errors import InputError
from ..console import ProgressBar, StageProgress, echo_notes, show
from ..options import PATH, adjustment_option, images_option, point_options

if TYPE_CHECKING:
    from ...export.entries.settings import EarlierExport


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
@click.option("--embedding/--no-embedding", help="Also put out the L2-normalised embedding.")
@click.option("--allow-drift/--no-allow-drift", help="Keep fp16 and int8 files over their limits.")
@click.option(
    "--check",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Cached images that each variant is checked on, hold-out first.",
)
@images_option
@click.option(
    "--from",
    "earlier",
    type=PATH,
    metavar="RUN|MODEL",
    help="Export as this was: a run folder, or one of its model files; flags go before its settings.",
)
@click.pass_context
def export(ctx: click.Context, run: Path, **flags: Any) -> None:
    """Write ONNX files, each kept only if it agrees with torch.

    Each file describes itself, and is compared on real cached images. fp16 and int8 may change as many decisions as the
    same films saved as JPEG 95.
    Exit 1 where a variant that --variants names was over its limit and not kept.
    """
    from ...inference.model_file import split_variants

    before = take_earlier(ctx, flags)
    names, check, out = split_variants(flags.pop("variants")), flags.pop("check"), flags["out"]
    if out is not None and not (above := next(p for p in Path(out).absolute().parents if p.exists())).is_dir():
        raise InputError(f"--out: cannot write {out}: {above} is a file.")
    if sys.stderr.isatty():  # somebody waits; scripts get what comes of it
        click.echo(f"exporting {', '.join(names)} of {run}; each is checked on up to {check:,} cached images", err=True)
    from ...export.entries.settings import ExportSpec
    from ...export.summary import describe_export
    from ...export.variants import export_run

    spec = ExportSpec(variants=names, count=check, **flags)
    if before is not None:
        show_earlier(before, spec)
    found = export_run(run, spec, on_progress=StageProgress().show)
    ProgressBar.close()
    show(describe_export(found))
    if out is None and any(one.kept for one in found):
        click.echo(f"`cxrfast report {run}` puts these files onto its page and its model card")
    sys.exit(0 if not _is_given(ctx, "variants") or all(one.kept for one in found) else 1)


def take_earlier(ctx: click.Context, flags: dict[str, Any]) -> EarlierExport | None:
    """Put the settings of the export of --from into the flags that were not given; that export, None without --from."""
    from ...export.entries.settings import read_export

    path = flags.pop("earlier")
    if path is None:
        return None
    before = read_export(path)
    flags.update({name: value for name, value in before.record.flags().items() if not _is_given(ctx, name)})
    return before


def show_earlier(before: EarlierExport, spec: Any) -> None:
    """Say what differs from the export of --from, and what is not taken from it."""
    from ...export.entries.settings import describe_changes, record_export

    changes = describe_changes(before.record, record_export(spec))
    click.echo(f"settings of {before.source}" + (f", but {'; '.join(changes)}" if changes else ", all of them"))
    echo_notes(before.notes)


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
