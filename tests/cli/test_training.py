"""`cxrfast sweep`, called again after a kill that came late."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cxr_fast.cli.main import main


def sweep(cache: Path, out: Path, *more: str) -> Result:
    words = ["sweep", str(cache), "--out", str(out), "--folds", "3", "--epochs", "1,2", "--batch-size", "8"]
    return CliRunner().invoke(main, [*words, "--device", "cpu", *more])


@pytest.mark.usefixtures("sketched")
def test_a_run_that_only_lacks_its_report_gets_it_from_the_same_command(toy_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert sweep(toy_cache, out).exit_code == 0
    page, run = (out / "report.html").read_bytes(), (out / "run.json").read_bytes()
    (out / "report.html").unlink()
    shutil.copytree(out, tmp_path / "other")
    planned = sweep(toy_cache, out, "--dry-run")
    assert (planned.exit_code, planned.output) == (0, f"{out} is trained; it lacks its report\n")
    assert not (out / "report.html").exists()
    again = sweep(toy_cache, out, "--note", "late")
    assert again.exit_code == 0, again.output
    assert f"{out} is trained; it lacks its report" in again.output
    assert ((out / "report.html").read_bytes(), (out / "run.json").read_bytes()) == (page, run)
    assert (out / "note.txt").read_text() == "late\n"
    # A whole run, and one of other settings, are not touched.
    for folder, more in ((out, ()), (tmp_path / "other", ("--lr", "1e-3"))):
        refused = sweep(toy_cache, folder, *more)
        assert refused.exit_code == 2
        assert f"--out: {folder} exists; give another --out, or pass --overwrite." in refused.output
    assert not (tmp_path / "other" / "report.html").exists()
