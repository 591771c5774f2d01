"""Commands that list runs and change their notes and names: parse, call one function, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from ..system.text import counted, gigabytes
from .console import show
from .options import PATH


class ListByDefault(click.Group):
    """A group that takes a folder or an option in place of a command as an argument of `list`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `list` first where no command is named."""
        named = args[:1] and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named else ["list", *args])


@click.group(cls=ListByDefault, context_settings={"help_option_names": ["-h", "--help"]})
def runs() -> None:
    """List runs, finished or not; note, rename, remove them.

    `cxrfast runs [FOLDER]` is short for `cxrfast runs list [FOLDER]`.
    """


@runs.command(name="list")
@click.argument("folder", type=PATH, default=Path("exports"))
@click.option(
    "--where",
    multiple=True,
    metavar="COLUMN=VALUE",
    help="Only those; <, >, <=, >=, !=, and ~ (holds) work too, and several flags.",
)
@click.option("--sort", metavar="COLUMN", default="created", show_default=True, help="Figures: the largest first.")
@click.option("--reverse", is_flag=True, help="The other way round.")
@click.option("--json", "json_out", is_flag=True, help="Write every column as JSON to standard output.")
@click.option("--csv", "csv_out", is_flag=True, help="Write every column as CSV to standard output.")
def list_command(folder: Path, where: tuple[str, ...], sort: str, reverse: bool, **to: bool) -> None:
    """List all runs in a folder, newest first.

    FOLDER is searched with the folders below it. Figures are macro AUC: of validation the mean over folds, and of the
    hold-out. A condition and --sort name a column of --json, such as holdout_auc or data.
    """
    from ..runs import listing
    from ..system.text import Table, to_csv

    if to["json_out"] and to["csv_out"]:
        raise InputError("--json and --csv: give one of them.")
    found = listing.list_runs(folder)
    entries = listing.sort_runs(listing.filter_runs(found, where), sort, reverse=reverse)
    rows = listing.to_rows(entries)
    if to["json_out"]:
        click.echo(json.dumps(rows, indent=1))
    elif to["csv_out"]:
        cells: list[list[Any]] = [[" ".join(v) if isinstance(v, list) else v for v in row.values()] for row in rows]
        click.echo(to_csv(Table(columns=listing.COLUMNS, rows=cells)), nl=False)
    elif not entries:
        left = f"; {counted(len(found), 'run')} left out by --where" if found else ""
        click.echo(f"no runs in {folder}{left}")
    else:
        show([listing.runs_table(entries, folder)])


@runs.command()
@click.argument("run", type=PATH)
@click.argument("text", required=False)
def note(run: Path, text: str | None) -> None:
    """Write a note to a run; without TEXT print it.

    An empty TEXT ("") removes the note. It is kept in RUN/note.txt.
    """
    from ..runs.changes import require_run
    from ..runs.note import read_note, write_note

    folder = require_run(run)
    if text is None:
        click.echo(read_note(folder) or f"{run} has no note")
    else:
        write_note(folder, text)


@runs.command()
@click.argument("run", type=PATH)
@click.argument("name")
def rename(run: Path, name: str) -> None:
    """Give a run another NAME in its folder."""
    from ..runs.changes import rename_run

    click.echo(rename_run(run, name))


@runs.command()
@click.argument("run", type=PATH, nargs=-1, required=True, metavar="RUN...")
@click.option("--yes", is_flag=True, help="Do not ask.")
def remove(run: tuple[Path, ...], yes: bool) -> None:
    """Remove runs and all their files, after a question.

    A run that a sweep is writing is refused.
    """
    from ..runs.changes import remove_run, require_run
    from ..runs.entry import read_entry

    folders = list(dict.fromkeys(map(require_run, run)))
    for folder in folders:
        entry = read_entry(folder)
        extra = f", {' '.join(entry.files)} exported" if entry.files else ""
        click.echo(f"{folder}: {entry.state}, {gigabytes(entry.size)}{extra}{entry.note and f', note: {entry.note}'}")
    if not yes:
        click.confirm(f"Remove {counted(len(folders), 'run')}?", abort=True)
    for folder in folders:
        remove_run(folder)
        click.echo(f"removed {folder}")
