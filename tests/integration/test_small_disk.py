"""Commands that write, on a small disk that is full, read-only or closed: one line, and nothing is half written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from cxr_fast.cli.options import Group
from cxr_fast.data.phantom.dataset import write_dataset
from tests.helpers.small_disk import CASES

RUNS = [(name, condition) for name, case in CASES.items() for condition in case.only]


@pytest.fixture(scope="module")
def came(toy_cache: Path, toy_run: Path, toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of every command under every condition, all in one process of its own."""
    folder = tmp_path_factory.mktemp("disk")
    (folder / "disk").mkdir()
    write_dataset(folder / "data", studies=12, size=48)
    film = min((folder / "data" / "images").iterdir())
    paths = {"DATA": folder / "data", "CACHE": toy_cache, "RUN": toy_run, "MODEL": toy_model, "FILM": film}
    request = {
        "disk": str(folder / "disk"),
        "answers": str(folder / "answers.json"),
        "paths": {name: str(path) for name, path in paths.items()},
    }
    (folder / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-m", "tests.helpers.small_disk", str(folder / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads((folder / "answers.json").read_text())
    return found


def outcome(came: dict[str, Any], name: str, condition: str) -> dict[str, Any]:
    found: dict[str, Any] | None = came.get(f"{name}, {condition}")
    if found is None:
        pytest.skip("not run: neither this user nor a name space of its own may mount a small file system here")
    return found


@pytest.mark.parametrize(("name", "condition"), RUNS)
def test_command_ends_with_one_line_and_leaves_nothing_half_written(
    name: str, condition: str, came: dict[str, Any]
) -> None:
    one, case = outcome(came, name, condition), CASES[name]
    assert one["error"] == ""
    lines = [line for line in one["said"].splitlines() if line.startswith("error: ")]
    assert one["code"] == 2, one["said"]
    assert len(lines) == 1
    assert one["said"].rstrip().endswith(lines[0])
    # The flag, else the path that the command was given.
    assert any(word in lines[0] for word in case.words if word.startswith("--")) or "/desk/" in lines[0]
    assert "0x" not in lines[0]
    kept = case.keeps if condition == "short" else ()
    left = [path for path in one["changed"] if not kept or path not in ("new", "new/run.partial")]
    assert [path for path in left if not any(end in path for end in kept)] == []
    assert not [path for path in one["changed"] if path.endswith(".lock")]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.keeps])
def test_work_that_was_done_is_kept_and_gone_on_with(name: str, came: dict[str, Any]) -> None:
    one, case = outcome(came, name, "short"), CASES[name]
    assert [path for path in one["changed"] if any(end in path for end in case.keeps)]
    assert one["again"] == 0, one["again_said"]
    assert not [path for path in one["again_left"] if "partial" in path or path.endswith((".lock", "-wal"))]


def test_a_disk_that_no_command_looks_after_is_one_line_too() -> None:
    group = Group("cxrfast")

    @group.command()
    @click.argument("number", type=int)
    def write(number: int) -> None:
        raise OSError(number, os.strerror(number), "/some/file")

    for number in (errno.ENOSPC, errno.EROFS, errno.EACCES):
        result = CliRunner().invoke(group, ["write", str(number)])
        assert (result.exit_code, result.stderr) == (2, f"error: /some/file: {os.strerror(number)}.\n")
    other = CliRunner().invoke(group, ["write", str(errno.ECONNRESET)])
    assert isinstance(other.exception, OSError)
