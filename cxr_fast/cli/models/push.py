"""The command that uploads: parse, call one function, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ...config import NOTICE
from ...system.text import Table, gigabytes
from ..console import Part, echo_notes, show
from ..options import PATH, device_option, threads_option


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
    from ...inference import upload

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
