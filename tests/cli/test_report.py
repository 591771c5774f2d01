"""The commands of `cxrfast runs`, from the first word to the exit code."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cxr_fast.cli.main import main


@pytest.fixture
def exports(toy_run: Path, tmp_path: Path) -> Path:
    """A folder with one run in it."""
    shutil.copytree(toy_run, tmp_path / "exports" / "one")
    return tmp_path / "exports"


def call(*words: object, answer: str = "") -> Result:
    return CliRunner().invoke(main, ["runs", *map(str, words)], input=answer)


def test_the_list_in_three_forms(exports: Path) -> None:
    plain = call(exports)
    assert plain.exit_code == 0
    assert plain.output == call("list", exports).output
    assert plain.output.splitlines()[2].startswith("one  done")
    [row] = json.loads(call(exports, "--json").output)
    [line] = csv.DictReader(io.StringIO(call(exports, "--csv").output))
    assert list(line) == list(row)
    assert float(line["holdout_auc"]) == row["holdout_auc"]
    assert line["files"] == ""
    assert row["files"] == []
    assert call(exports, "--where", "state!=done").output == f"no runs in {exports}; 1 run left out by --where\n"
    assert call(exports, "--json", "--csv").exit_code == 2
    assert call(exports / "nothing").exit_code == 2


def test_notes_names_and_removal(exports: Path) -> None:
    run = exports / "one"
    assert call("note", run).output.endswith("has no note\n")
    assert call("note", run, "the good one").exit_code == 0
    assert call("note", run).output == "the good one\n"
    assert "the good one" in call(exports).output
    assert call("rename", run, "best").output == f"{exports / 'best'}\n"
    refused = call("remove", exports / "best", answer="n\n")
    assert refused.exit_code == 1
    assert (exports / "best").is_dir()
    assert "note: the good one" in refused.output
    assert call("remove", exports / "best", exports / "best", answer="y\n").exit_code == 0
    assert not list(exports.iterdir())
    assert call(exports).output == f"no runs in {exports}\n"
    assert call("remove", exports, "--yes").exit_code == 2


def test_a_sweep_takes_a_name_and_a_note(toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["sweep", str(toy_cache), "--epochs", "1", "--folds", "2", "--batch-size", "8", "--device", "cpu"]
    made = CliRunner().invoke(main, [*words, "--name", "first", "--note", "a try"])
    assert made.exit_code == 0, made.output
    [row] = json.loads(call("--json").output)
    assert (row["name"], row["path"], row["note"]) == ("first", "exports/first", "a try")
    both = CliRunner().invoke(main, [*words, "--name", "first", "--out", "x"])
    assert both.exit_code == 2
    assert "--name is short for --out" in both.output
    assert CliRunner().invoke(main, [*words, "--name", "a/b"]).exit_code == 2


def test_listing_loads_no_torch(exports: Path) -> None:
    code = (
        "import sys; from cxr_fast.cli.main import main; main(['runs', sys.argv[1]], standalone_mode=False); "
        "sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(exports)], check=False).returncode == 0
