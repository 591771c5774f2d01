"""Tables, plans and progress: drawn on a terminal, plain in a pipe, without escape codes under NO_COLOR."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cxr_fast.cli import console

SHOW = """
from cxr_fast.cli.console import show, show_plan
from cxr_fast.system.text import Table
show_plan("two folds [of three]")
table = Table(
    columns=["fold", "AUC"], rows=[["1", "0.8"], ["2", "0.9"]], foot=[["mean", "0.85"]], chosen=[1], mark="best",
    notes=["higher [or equal] is better"], title="AUC [valid]",
)
show(["validation", table])
"""
BAR = """
import sys
from cxr_fast.cli.console import ProgressBar
bar = ProgressBar()
bar.show(5, 10, "half [done]", seconds=4.0, force=True)
bar.done()
print("after", file=sys.stderr)
"""
FAIL = """
import click
from cxr_fast.cli.console import ProgressBar
from cxr_fast.cli.options import Group
from cxr_fast.errors import InputError

@click.group(cls=Group)
def main(): pass

@main.command()
def fail():
    ProgressBar().show(5, 10, "half", force=True)
    raise InputError("wrong.")

try:
    main(["fail"])
except SystemExit as end:
    assert end.code == 2
"""


def on_terminal(code: str, **environment: str) -> str:
    """What a fresh interpreter writes to a terminal of 100 columns, standard output and error together."""
    ours, theirs = pty.openpty()
    names = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    terminal = {"TERM": "xterm-256color", "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**names, **terminal, **environment},
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            more = os.read(ours, 65536)
        except OSError:  # Linux answers EIO when the other end is closed
            break
        if not more:
            break
        said += more
    os.close(ours)
    assert process.wait(60) == 0, said.decode()
    return said.decode()


def test_a_table_and_a_plan_are_drawn_on_a_terminal() -> None:
    said = on_terminal(SHOW)
    assert "\x1b[1m" in said, "the chosen row is in bold"
    lines = re.sub(r"\x1b\[[0-9;]*m", "", said).splitlines()
    assert lines[0].startswith("╭─ plan ─")
    assert re.fullmatch(r"│ two folds \[of three\] +│", lines[1])
    assert any(re.fullmatch(r"│ 2 <- best │ +0\.9 │", line) for line in lines)
    assert any(line.startswith("├──") for line in lines[lines.index("AUC [valid]") + 4 :]), "a rule above the foot"
    assert lines[-1] == "higher [or equal] is better"
    assert lines[lines.index("validation") + 1] == "AUC [valid]"


def test_no_color_means_no_escape_codes() -> None:
    said = on_terminal(SHOW, NO_COLOR="1")
    assert "\x1b" not in said
    assert "│ 2 <- best │" in said


def test_a_pipe_gets_plain_text_without_rich() -> None:
    code = SHOW + "import sys\nprint('rich' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.splitlines() == [
        "two folds [of three]",
        "validation",
        "AUC [valid]",
        "fold   AUC",
        "----  ----",
        "1      0.8",
        "2      0.9  <- best",
        "mean  0.85",
        "higher [or equal] is better",
        "False",
    ]


def test_progress_is_a_bar_with_the_time_left_and_goes_away() -> None:
    said = on_terminal(BAR)
    assert "━" in said
    assert "50.0 %" in said
    assert re.search(r"half \[done\], \S+ s left", said)
    assert said.rstrip().endswith("after")
    assert "\x1b[?25h" in said, "the cursor is shown again"
    assert not re.search(r"\x1b\[[0-9;]*m", on_terminal(BAR, NO_COLOR="1"))


def test_an_error_takes_the_bar_away_before_it_is_written() -> None:
    said = on_terminal(FAIL)
    assert said.index("\x1b[?25h") < said.index("error: wrong.")


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}])
def test_a_command_draws_its_table(phantoms: Path, environment: dict[str, str]) -> None:
    code = f"from cxr_fast.cli.main import main\nmain(['prepare', {str(phantoms)!r}], standalone_mode=False)"
    said = on_terminal(code, **environment)
    assert re.search(r"│ Normal +│ +\d+ │", said)
    assert ("\x1b[" in said) != bool(environment)


@pytest.mark.parametrize("width", [30, 60, 80, 140])
def test_a_narrow_terminal_keeps_percentage_and_time_left(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    out = io.StringIO()
    monkeypatch.setattr(console, "_console", lambda file: Console(file=out, width=width, force_terminal=True))
    bar = console.ProgressBar()
    bar.live = True
    bar.show(8, 47, "8 of 47 images, 17.3 images/s, waiting for the model", seconds=8.0, force=True)
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    bar.done()
    assert "17.0 %" in drawn
    assert "39 s left" in drawn
    assert all(len(line) <= width for line in re.split(r"[\r\n]", drawn))
    assert ("━" in drawn) == (width >= console.WIDE)
