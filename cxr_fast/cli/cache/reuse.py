"""Say which caches hold rows of the films that are about to be encoded, and the command that copies them."""

from __future__ import annotations

import shlex
from typing import Any

import click
from click.core import ParameterSource

from ..console import echo_notes

MOST = 3  # caches that are named


def echo_others(ctx: click.Context, work: Any, flag: str = "--reuse") -> None:
    """Name each cache in the folder of the new one that was made in the same way and holds some of its images.

    Nothing is said where no image is left to encode, where --reuse is given, and for a cluster. `flag` is what --reuse
    is called in this command.
    """
    from ...activations.reuse import find_others

    plan, job = work.plan, work.job
    if work.remote or job.reuse or plan.rows_done >= plan.images:
        return
    for path, rows in find_others(job.files[0].header, job.manifest, job.out)[:MOST]:
        again = command_line(ctx, flag, str(path))
        echo_notes([f"{path} was encoded in the same way and holds {rows:,} of these images; to copy rows: {again}"])


def command_line(ctx: click.Context, *more: str) -> str:
    """The command as it was given, with `more` at its end and without `--dry-run`, so that it does its work."""
    words = ["cxrfast", str(ctx.info_name)]
    for param in ctx.command.params:
        value = ctx.params.get(str(param.name))
        if isinstance(param, click.Argument):
            words += map(str, value if isinstance(value, tuple) else (value,))
        elif (
            isinstance(param, click.Option)
            and param.name != "dry_run"
            and ctx.get_parameter_source(str(param.name)) == ParameterSource.COMMANDLINE
        ):
            words += _option_words(param, value)
    return shlex.join([*words, *more])


def _option_words(param: click.Option, value: Any) -> list[str]:
    """The words that give an option this value."""
    if param.is_flag:
        names = param.opts if value else param.secondary_opts
        return names[-1:]
    values = value if param.multiple else (value,)
    return [word for each in values for word in (param.opts[-1], str(each))]
