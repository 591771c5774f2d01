"""Offer the flags of other commands with a prefix, and call those commands with them."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import click
from click.core import ParameterSource

from ...errors import CxrFastError
from ..console import ProgressBar
from .part_times import PartTimes

# Flags of `fit` itself that go to every part which has one of that name, where the part's own is not given.
SHARED = ("recipe", "device", "threads")
FLAG = re.compile(r"(?<![\w-])--(?!no-)([a-z][a-z0-9-]*)")


def part_options(command: click.Command, part: str, *left_out: str) -> list[click.Parameter]:
    """The options of a command as `--PART-NAME`, or as they are where `part` is empty; `left_out` by parameter name."""
    found: list[click.Parameter] = []
    for param in command.params:
        if isinstance(param, click.Option) and param.name not in left_out:
            own = copy.copy(param)
            if part:
                own.name = f"{part}_{param.name}"
                own.opts = [_prefixed(text, part) for text in param.opts]
                own.secondary_opts = [_prefixed(text, part) for text in param.secondary_opts]
            found.append(own)
    return found


def _prefixed(flag: str, part: str) -> str:
    return f"--{part}-{flag.removeprefix('--')}"


def part_context(ctx: click.Context, command: click.Command, part: str, **given: Any) -> click.Context:
    """The context in which a command sees the flags of `fit` as its own: values, and whether the user gave them.

    A parameter without a flag of its own is that of `fit` with the same name, or comes from `given`.
    """
    found = click.Context(command, parent=ctx, info_name=command.name)
    for param in command.params:
        name = str(param.name)
        if name in given:
            found.params[name] = given[name]
            continue
        own = f"{part}_{name}"
        if own not in ctx.params or (name in SHARED and not is_given(ctx, own) and is_given(ctx, name)):
            own = name
        found.params[name] = ctx.params[own]
        found.set_parameter_source(name, ctx.get_parameter_source(own) or ParameterSource.DEFAULT)
    return found


def is_given(ctx: click.Context, name: str) -> bool:
    """Whether a flag stands on the command line."""
    return ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE


@contextlib.contextmanager
def stage(ctx: click.Context, part: str, number: str = "", part_times: PartTimes | None = None) -> Iterator[None]:
    """Name the part in its progress, with what is left of all parts, and its flags as those of `fit` in errors."""
    ProgressBar.stage = f"{part} ({number}): " if number else ""
    if part_times is not None:
        part_times.begin(part)
        ProgressBar.part_times = part_times.left
    try:
        yield
    except CxrFastError as error:
        error.args = (rename_flags(ctx, part, str(error)),)
        raise
    finally:
        ProgressBar.close()
        ProgressBar.stage, ProgressBar.part_times = "", None


def rename_flags(ctx: click.Context, part: str, text: str) -> str:
    """`--lr` of a part as `--sweep-lr`; commands between backticks stay as they are."""

    def rename(match: re.Match[str]) -> str:
        name = match[1].replace("-", "_")
        return f"--{part}-{match[1]}" if f"{part}_{name}" in ctx.params else match[0]

    pieces = text.split("`")
    return "`".join(piece if place % 2 else FLAG.sub(rename, piece) for place, piece in enumerate(pieces))


def exit_code(run: Callable[[], Any]) -> int:
    """Call a command; the exit code with which it would have ended."""
    try:
        run()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    return 0
