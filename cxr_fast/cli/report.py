"""Commands on runs (list, report, compare, review): parse, call one function, print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ..config import NOTICE
from ..errors import InputError
from ..system.files import write_json
from ..system.text import counted, gigabytes
from .console import Part, ProgressBar, StageProgress, show, took
from .options import PATH, adjustment_option, point_options, pool_option, prevalence_option, resamples_option


@click.command()
@click.argument("runs", metavar="RUN...", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, help="The comparison of several runs.  [default: FIRST_RUN/comparison.html]")
@pool_option
@resamples_option
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the resamples.")
@adjustment_option
@point_options
@prevalence_option
def report(runs: tuple[Path, ...], out: Path | None, **flags: Any) -> None:
    """Write a run's page, model card and tables from saved files.

    RUN/report.html, its model card, CSV and pictures; of several runs, a comparison too.
    Exit 1 where a saved file is missing or damaged: the page then says what it lacks.
    """
    if out is not None and len(runs) < 2:
        raise InputError("--out: where the comparison of several runs goes; a single run's page goes into its folder.")
    if out is not None and out.is_dir():
        raise InputError(f"--out: {out} is a folder; give the name of a file, such as {out / 'comparison.html'}.")
    if len(runs) > 1 and flags["resamples"] < 1:
        raise InputError("--resamples: a comparison needs at least 1; 1000 is usual.")
    for name in ("logit_adjustment", "threshold_target", "calibration"):
        if len(runs) > 1 and flags[name]:
            raise InputError(f"--{name.replace('_', '-')}: of one run; a comparison takes runs as they are.")
    from ..report.writer import write_all
    from ..training.operating_points import OperatingPoint

    point = OperatingPoint(**{name: flags.pop(name) for name in ("threshold_target", "calibration", "prevalence")})
    pages = write_all(runs, out, point=point, **flags)
    for written in pages:
        click.echo(written.page)
        for line in written.missing if not written.whole else ():
            click.echo(f"  missing: {line}", err=True)
    sys.exit(0 if all(written.whole for written in pages) else 1)


@click.command()
@click.argument("run_a", type=PATH)
@click.argument("run_b", type=PATH)
@click.option(
    "--part",
    type=click.Choice(["holdout", "out_of_fold"]),
    default="holdout",
    show_default=True,
    help="Which images of the runs.",
)
@click.option("--resamples", type=click.IntRange(100), default=1000, show_default=True, help="Of the groups.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the resamples.")
@click.option("--allow-trained", is_flag=True, help="Compare even where one run was trained on the other's hold-out.")
@click.option("--json", "json_out", type=PATH, help="Write the result here.")
@click.option("--plot", type=PATH, help="Write a forest plot of the differences here: .png, .svg or .pdf.")
def compare(run_a: Path, run_b: Path, json_out: Path | None, plot: Path | None, **flags: Any) -> None:
    """Give the differences of two runs, with intervals.

    They are of the images both scored; the 95 % intervals are paired, over groups.
    """
    from ..report import comparison
    from ..report.at_a_glance import forest

    if plot is not None:
        forest.check_path(plot)
    result = comparison.compare_runs(run_a, run_b, **flags)
    show(describe_comparison(result))
    if json_out is not None:
        write_json(json_out, result, "--json")
        click.echo(f"wrote {json_out}")
    if plot is not None:
        forest.write_forest(result, plot)
        click.echo(f"wrote {plot}")


def describe_comparison(result: dict[str, Any]) -> list[Part]:
    """What was compared, the headline figures, and each class."""
    from ..report.class_means import rarity_comparison_table
    from ..report.comparison import class_comparison_table, comparison_table

    part = result["part"].replace("holdout", "hold-out").replace("_", "-")
    said = {side: f" ({text.upper()})" if (text := result[f"provenance_{side}"]) else "" for side in "ab"}
    shown = [row for row in result["per_class"] if row["auc"]["difference"] is not None]
    return [
        f"A: {result['a']}{said['a']}\nB: {result['b']}{said['b']}",
        f"{result['images']:,} {part} images of {result['groups']:,} groups in common; "
        f"{result['only_a']:,} only in A, {result['only_b']:,} only in B{left_out(result)}",
        "",
        comparison_table(result, "AB", 4),
        "",
        rarity_comparison_table(result, "AB", 4),
        "",
        class_comparison_table(shown, "AB", "auc", 4),
        "",
        class_comparison_table(shown, "AB", "ap", 4),
        "",
        *comparison_notes(result, shown),
        NOTICE,
    ]


def left_out(result: dict[str, Any]) -> str:
    """How many images the comparison leaves out, and how many of them the other run was trained on."""
    if not (count := result["only_a"] + result["only_b"]):
        return ""
    leaks = [(side, result.get(f"trained_{side.lower()}", 0)) for side in "AB"]
    said = " and ".join(f"{side} on {number:,}" for side, number in leaks if number)
    return f": {count:,} left out" + (f"; of these {said} of the other's hold-out was trained" if said else "")


def comparison_notes(result: dict[str, Any], shown: list[dict[str, Any]]) -> list[str]:
    """What is left out, and what a marked row is worth."""
    total, sure = len(result["per_class"]), sum(r["auc"]["low"] is not None for r in shown)
    notes = []
    if left := total - len(shown):
        notes.append(f"{left} of {total} classes have no positive or no negative among these images and are left out.")
    if few := len(shown) - sure:
        notes.append(f"{few} of {total} classes are in too few groups for an interval.")
    level, resamples = f"{result['level']:.0%}", f"{result['resamples']:,}"
    mark = (
        f"<- differs: the {level} interval holds no 0; {resamples} paired resamples of groups, seed {result['seed']}."
    )
    chance = f"about {sure * (1 - result['level']):.1f} of {sure} AUC intervals are marked by chance."
    notes.append(f"{mark} Where nothing differs, {chance}" if sure else mark)
    return notes


@click.command()
@click.argument("run", type=PATH)
@click.option("--images", type=PATH, help="Folder of the films, where they are no longer where they were cached from.")
@click.option("--cache", type=PATH, help="The cache of the run, where it is no longer where the run names it.")
@click.option("--class", "classes", multiple=True, help="A class to show; may be given again.  [default: all]")
@click.option(
    "--top",
    type=click.IntRange(1, 1000),
    default=24,
    show_default=True,
    help="Films of each class, part and kind of error at most.",
)
@click.option(
    "--twins/--no-twins",
    default=True,
    show_default=True,
    help="Look for films that are one picture; this reads nearly all films.",
)
@click.option("--link", is_flag=True, help="Put a link to the page into RUN/report.html, until that is written again.")
def review(run: Path, **flags: Any) -> None:
    """Show the films behind a run's errors on one page.

    RUN/review.html: the worst false negatives and false positives of each class with heat maps and the nearest training
    films, label suspects, near twins and odd films. RUN/review.csv says which film each card is; suspects.csv and
    near_twins.csv list all suspects and twins. These are pictures and names of patients: `push` never uploads them.
    Where it was stopped, the same command goes on. Exit 1 where a film is missing or has changed: the page says so.
    """
    from ..review.writer import ReviewSpec, write_review

    found = write_review(run, ReviewSpec(**flags), StageProgress().show)
    ProgressBar.close()
    cards, films = counted(found.cards, "card"), counted(found.films, "film")
    click.echo(f"{cards} of {films}, {gigabytes(found.size)}, {took()}")
    click.echo(f"wrote {found.page}; tables beside it: {', '.join(found.tables)}")
    for line in found.missing:
        click.echo(f"  missing: {line}", err=True)
    click.echo("note: these are pictures of patients; keep the page where the films may be kept", err=True)
    sys.exit(0 if found.whole else 1)


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
