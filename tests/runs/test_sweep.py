"""`cxr_fast.Sweep`: the run and the report that the command leaves, from Python."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import cxr_fast
from cxr_fast.cli.main import main
from cxr_fast.config import SweepOptions, SweepSpec, TrainSpec
from cxr_fast.errors import InputError
from cxr_fast.report import writer
from cxr_fast.runs.sweep import Sweep

SPEC = SweepSpec(epochs=(1, 2), folds=2, train=TrainSpec(lr=1e-3, batch_size=8))
FLAGS = ["--epochs", "1,2", "--folds", "2", "--lr", "1e-3", "--batch-size", "8", "--device", "cpu"]
ON_CPU = SweepOptions(device="cpu")


@pytest.mark.usefixtures("sketched")
def test_it_leaves_what_the_command_leaves(toy_cache: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["sweep", str(toy_cache), "--out", str(tmp_path / "command" / "run"), *FLAGS])
    assert done.exit_code == 0, done.output
    job = cxr_fast.Sweep(toy_cache, tmp_path / "python" / "run", SPEC, ON_CPU)
    job.run()
    one, two = ({file.name: file for file in (tmp_path / by / "run").iterdir()} for by in ("command", "python"))
    assert set(one) == set(two)
    assert {"report.html", "MODEL_CARD.md", "evaluation.json", "figures.csv"} <= set(two)
    for name in ("evaluation.json", "figures.csv", "curves.csv", "model.safetensors"):
        assert one[name].read_bytes() == two[name].read_bytes(), name


def test_the_report_can_wait(toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(writer, "write_report", asked.append)
    job = Sweep(toy_cache, tmp_path / "run", SPEC, ON_CPU)
    assert job.run(report=False)["final"]["kind"] == "best-fold"
    assert asked == []
    assert not (tmp_path / "run" / "report.html").exists()
    job.write_report()
    assert asked == [tmp_path / "run"]


def test_a_report_that_fails_leaves_the_run(toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise InputError("the disk is full.")

    monkeypatch.setattr(writer, "write_report", refuse)
    out = tmp_path / "run"
    with pytest.raises(InputError, match=rf"disk is full\. The run is complete; `cxrfast report {out}`"):
        Sweep(toy_cache, out, SPEC, ON_CPU).run()
    assert (out / "run.json").is_file()
