"""The command that draws heat maps: parse, call one function, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ...config import NOTICE
from ...system.text import Table, number
from ..console import show
from ..options import PATH


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
    from ...export import heatmaps
    from ...export.overlay import Style
    from ...training.run_folder import read_info

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
