"""Show tables, plans and progress: drawn by rich on a terminal, as plain text in pipes and logs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from ..system.text import Table, duration, to_plain
from ..system.time_left import TimeLeft

if TYPE_CHECKING:
    from rich.console import Console

    from ..config import SweepSpec

Part = str | Table
BAR, WIDE = 24, 100  # columns of a progress bar, and of a terminal that has room for one


def plain(parts: Iterable[Part]) -> str:
    """The parts as `show` writes them where there is no terminal."""
    lines: list[str] = []
    for part in parts:
        lines += [part] if isinstance(part, str) else [*filter(None, [part.title]), to_plain(part)]
    return "\n".join(lines)


def show(parts: Iterable[Part]) -> None:
    """Write lines and tables to standard output."""
    if not sys.stdout.isatty():
        click.echo(plain(parts))
        return
    from rich.text import Text

    console = _console(sys.stdout)
    for part in parts:
        if isinstance(part, str):
            click.echo(part)
            continue
        title = [Text(part.title, style="bold")] if part.title else []
        console.print(*title, _drawn(part), *map(Text, part.notes), sep="\n")


def show_plan(text: str) -> None:
    """Write what a long command is about to do: in a frame on a terminal."""
    if not sys.stdout.isatty():
        click.echo(text)
        return
    from rich.panel import Panel
    from rich.text import Text

    _console(sys.stdout).print(Panel(Text(text), title="plan", title_align="left"))


def echo_notes(notes: Iterable[str]) -> None:
    """Write to standard error what a user should know although nothing went wrong."""
    for note in notes:
        click.echo(f"note: {note}", err=True)


def _console(file: Any) -> Console:
    """NO_COLOR asks for text without any style, so no escape codes are written."""
    from rich.console import Console

    return Console(file=file, color_system=None if os.environ.get("NO_COLOR") else "auto", highlight=False)


def _drawn(table: Table) -> Any:
    """A table with the chosen rows marked and in bold, the foot below a rule, and cells folded where it is too wide."""
    from rich import box
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(box=box.ROUNDED)
    for place, name in enumerate(table.columns):
        drawn.add_column(Text(name), justify="right" if place and name not in table.left else "left", overflow="fold")
    texts = list(table.texts())
    for place, cells in enumerate(texts):
        chosen = place in table.chosen
        first = f"{cells[0]} <- {table.mark}" if chosen else cells[0]
        last = place == len(table.rows) - 1 and len(texts) > len(table.rows)
        drawn.add_row(*map(Text, [first, *cells[1:]]), style="bold" if chosen else "", end_section=last)
    return drawn


STARTED = time.monotonic()


def took() -> str:
    """Return how long the user has waited since the command line was loaded, plans and model loading included."""
    return f"took {duration(time.monotonic() - STARTED, tenths=True)} in all"


class ProgressBar:
    """How far a long command is: a bar on a terminal, a plain line every few seconds elsewhere."""

    _open: ProgressBar | None = None  # rich draws one at a time
    stage = ""  # of a command of several parts, before each text
    # Of such a command: what is left of all, from what is left of the work reported and whether that is a whole part.
    part_times: Callable[[float | None, bool], str] | None = None

    def __init__(self, every: float = 20.0) -> None:
        self.live = sys.stderr.isatty()
        self.every = 0.1 if self.live else every
        self.began = self.last = time.monotonic()
        self.drawn: Any = None
        self.whole = True  # the work is all of a part of such a command
        self.pace, self.work = TimeLeft(self.began, 0), (0.0, 0.0, False)

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

        The time left follows from the pace of this run, at `seconds` of its work or else by the clock; see `TimeLeft`.
        Every report counts, also one that is not shown. Another total, or less done, is other work.
        """
        now = time.monotonic()
        work = (total, before, seconds is None)
        if work != self.work or done < self.pace.done:
            self.work, self.pace = work, TimeLeft(self.began if seconds is None else 0.0, before)
        self.pace.report(now if seconds is None else seconds, done, total)
        if now - self.last < self.every and not force:
            return
        self.last = now
        left = self.left
        said = "" if left is None else f"{duration(left)} left"
        if ProgressBar.part_times is not None:
            said = ", ".join(filter(None, [said, ProgressBar.part_times(left, self.whole)]))
        text = f"{ProgressBar.stage}{text}"
        if self.live:
            self._draw(100 * done / total, text, said)
        else:
            click.echo(f"{100 * done / total:5.1f} %  {text}{', ' * bool(said)}{said}", err=True)

    @property
    def left(self) -> float | None:
        """Seconds left of the work reported last; None before anything is done."""
        return self.pace.seconds(self.work[0])

    @property
    def seconds(self) -> float:
        """Since the bar began."""
        return time.monotonic() - self.began

    def _draw(self, percent: float, text: str, left: str) -> None:
        from rich.progress import BarColumn, Progress, TaskID, TextColumn

        console = _console(sys.stderr)
        if self.drawn is None:
            ProgressBar.close()
            self.drawn = Progress(
                *([BarColumn(BAR)] if console.width >= WIDE else []),
                TextColumn("{task.percentage:5.1f} %"),
                TextColumn("{task.description}", markup=False),
                console=console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self.drawn.add_task("", total=100)
            self.drawn.start()
            ProgressBar._open = self
        # Where it is narrow the bar goes first, then the end of the text; percentage and time left stay.
        room = console.width - (BAR + 1 if console.width >= WIDE else 0) - len("100.0 %  , ") - len(left)
        short = text if len(text) <= room else f"{text[: max(room - 1, 0)]}…"
        said = ", ".join(filter(None, [short, left]))
        self.drawn.update(TaskID(0), completed=percent, description=said, refresh=True)

    def done(self) -> None:
        """Take the bar away."""
        if self.drawn is not None:
            self.drawn.stop()
            self.drawn, ProgressBar._open = None, None

    @staticmethod
    def close() -> None:
        """Take away whichever bar is drawn: an error leaves one, and with it a hidden cursor."""
        if ProgressBar._open is not None:
            ProgressBar._open.done()


class StageProgress:
    """The lines of a command of several stages: a line at once for each, and a time left that is of this stage alone.

    A second line follows as soon as a tenth of the stage is done, where it goes on for longer than SOON.
    """

    SOON = 10.0

    def __init__(self) -> None:
        self.stage, self.first, self.last, self.bar = "", 0, 0, ProgressBar()
        self.told = True

    def show(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done of a stage; a stage that begins again counts as a new one."""
        begins = stage != self.stage or done < self.last
        if begins:
            ProgressBar.close()
            self.stage, self.first, self.told, self.bar = stage, done, False, ProgressBar()
            self.bar.whole = False
        self.last = done
        self.bar.show(done, total, stage, before=self.first, force=begins)
        if not self.told and done >= total / 10 and self.bar.left is not None:
            self.told = True
            if self.bar.left > self.SOON:
                self.bar.show(done, total, stage, before=self.first, force=True)


class EpochProgress:
    """The line of a sweep: each epoch as it is trained, and a time left in which a slow epoch counts for more."""

    def __init__(self, bar: ProgressBar, plan: Any, spec: SweepSpec) -> None:
        self.bar, self.plan, self.spec = bar, plan, spec
        self.latest: dict[tuple[int, int], int] = {}
        self.before: float | None = None  # what an earlier run had done, in the seconds of the plan
        self.found: dict[tuple[int, bool], int] = {}  # epochs that the folds trained at once had from an earlier run

    def show(self, config: int, fold: int, epoch: Any) -> None:
        """Show an epoch of (configuration, fold)."""
        times, at = self.plan.times, (config, fold)
        folds = self.spec.folds
        others = self.found.setdefault((config, fold > folds), epoch.epoch - 1)
        if self.before is None:
            self.before = times.done({at: others}, at, others)
        self.latest[at] = epoch.epoch
        which = f"configuration {config + 1}/{self.plan.configurations}, " if self.plan.configurations > 1 else ""
        if fold > folds:
            which += f"retrained head {fold - folds}/{folds}"
        else:
            which += f"fold {fold + 1}/{folds}" if fold < folds else "refit"
        score = f", validation macro AUC {epoch.valid_auc:.4f} ({epoch.classes} classes)" if epoch.classes else ""
        done = min(times.done(self.latest, at, others), times.total)
        last = "; figures and report follow" if done >= (1 - 1e-9) * times.total else ""
        self.bar.show(
            done, times.total, f"{which} epoch {epoch.epoch}{score}{last}", before=self.before, force=bool(last)
        )
