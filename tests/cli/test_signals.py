"""A sweep behind `&` in a script obeys SIGINT at every stage, as `predict` does."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import states

# Held in the plan, or after the first epoch: says so, and waits there until the signal comes.
HELD = """
import sys, time
from cxr_fast.training.sweep import SweepJob
from cxr_fast.training.folds.fold import Fold
place, name = (SweepJob, "plan") if sys.argv.pop(1) == "plan" else (Fold, "run_epoch")
own = getattr(place, name)
def held(*args, **named):
    found = own(*args, **named)
    print("here", flush=True)
    for _ in range(3000 if name == "plan" else 30):
        time.sleep(0.01)
    return found
setattr(place, name, held)
from cxr_fast.cli.main import main
main()
"""


@pytest.mark.kill
@pytest.mark.parametrize("stage", ["plan", "epoch"])
def test_a_sweep_behind_an_ampersand_obeys_sigint(stage: str, toy_cache: Path, tmp_path: Path) -> None:
    """A shell without job control starts `command &` with SIGINT ignored; so does this test."""
    words = [sys.executable, "-c", HELD, stage, "sweep", str(toy_cache), "--out", str(tmp_path / "run")]
    words += ["--epochs", "500", "--folds", "2", "--batch-size", "8", "--device", "cpu", "--threads", "1"]
    ignored = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *words]
    with subprocess.Popen(ignored, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        said = iter(running.stdout.readline, "")
        assert "here\n" in said
        running.send_signal(signal.SIGINT)
        states.wait_until(lambda: running.poll() is not None, "an end")
        _, errors = running.communicate()
    assert running.returncode == 130, errors
    assert "same command again" in errors
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "run.partial" / "plan.json").is_file() == (stage == "epoch")
