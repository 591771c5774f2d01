"""What every command shares: options, the progress line, and errors as one or two lines."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from ..config import choices, default, reference_value
from ..errors import CxrFastError
from ..system.text import duration

PATH = click.Path(path_type=Path)


class Group(click.Group):
    """A plain group that turns this package's errors into one or two lines and their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that half-written files are cleaned up
        try:
            return super().invoke(ctx)
        except CxrFastError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except click.UsageError as error:
            if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
                raise
            usage = error.ctx.command_path if error.ctx else "cxrfast"
            click.echo(f"error: {error.format_message()}\n`{usage} --help` lists what it takes.", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("interrupted; no unfinished file has a final name, run the same command again", err=True)
            ctx.exit(130)
        except (MemoryError, RuntimeError) as error:
            if not (whose := full_memory(error)):
                raise
            why = str(error).partition("\n")[0][:120]
            mend = "try a smaller --batch-size, for a sweep also --residency stream."
            click.echo(f"error: {whose} memory is full ({why}); {mend}", err=True)
            ctx.exit(2)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)


def full_memory(error: Exception) -> str:
    """Whose memory an error says is full, empty for another error; torch's own are told without importing it."""
    if type(error).__name__ == "OutOfMemoryError":
        return "the GPU's"
    return "this machine's" if isinstance(error, MemoryError) or "can't allocate memory" in str(error) else ""


def setting(cls: type, name: str, help: str, flag: str | None = None, **kwargs: Any) -> Callable[[Any], Any]:
    """An option whose name, choices and default come from a field of a config dataclass."""
    value = default(cls, name)
    try:
        kind: Any = click.Choice(choices(cls, name)) if choices(cls, name) and isinstance(value, str) else None
    except TypeError:
        kind = None
    if isinstance(value, tuple):
        value, kind = ",".join(map(str, value)), str
    if isinstance(value, bool):
        flag = flag or f"--{name.replace('_', '-')}/--no-{name.replace('_', '-')}"
    kind = kwargs.pop("type", kind)
    flag = flag or "--" + name.replace("_", "-")
    return click.option(flag, name, default=value, show_default=value is not None, type=kind, help=help, **kwargs)


threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    help="Threads of the model; fewer on a shared machine.  [default: usable cores]",
)

recipe_option = click.option(
    "--recipe",
    type=click.Choice(["default", "reference"]),
    default="default",
    show_default=True,
    help="reference: the published choices where our defaults differ.",
)

device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N; for ONNX files also tensorrt."
)

cluster_option = click.option(
    "--cluster",
    metavar="auto|ADDRESS",
    help="Spread the work over a Ray cluster: the one this machine belongs to (else all of this machine), or HOST:6379 "
    "or ray://HOST:10001.",
)

source_argument = click.argument("source", type=PATH)

images_option = click.option("--images", type=PATH, help="Folder to look for the images in, where it is not SOURCE.")

skip_option = click.option("--skip-missing", is_flag=True, help="Go on without the images that are not there.")

unindexed_option = click.option(
    "--unindexed",
    type=click.Choice(["normal", "unknown"]),
    default="normal",
    show_default=True,
    help='How Indiana studies headed "No Indexing" count; the published labels say normal.',
)


def by_recipe(ctx: click.Context, recipe: str, cls: type, name: str) -> Any:
    """A flag's value; where it was not given, the recipe's."""
    from click.core import ParameterSource

    given = ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE
    return ctx.params[name] if given or recipe == "default" else reference_value(cls, name)


class Progress:
    """One line that updates on a terminal; elsewhere a plain line every few seconds."""

    def __init__(self, every: float = 20.0) -> None:
        self.live = sys.stderr.isatty()
        self.every = 0.1 if self.live else every
        self.began = self.last = time.monotonic()

    def show(
        self,
        done: float,
        total: float,
        text: str,
        *,
        before: float = 0,
        seconds: float | None = None,
        force: bool = False,
    ) -> None:
        """`done` of `total` in any unit, `before` of them by an earlier run.

        The time left follows from what this run did, in `seconds` or since the line began.
        """
        now = time.monotonic()
        if now - self.last < self.every and not force:
            return
        self.last = now
        took = now - self.began if seconds is None else seconds
        left = f", {duration(took / (done - before) * (total - done))} left" if done > before else ""
        line = f"{100 * done / total:5.1f} %  {text}{left}"
        click.echo(f"\r{line:<100}" if self.live else line, err=True, nl=not self.live)

    @property
    def seconds(self) -> float:
        """Since the line began."""
        return time.monotonic() - self.began

    def done(self) -> None:
        """Leave the line."""
        if self.live:
            click.echo("\r" + " " * 100 + "\r", err=True, nl=False)


def echo_notes(notes: Iterable[str]) -> None:
    """What a user should know of the data and nothing went wrong with."""
    for note in notes:
        click.echo(f"note: {note}", err=True)
