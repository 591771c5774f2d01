"""Loggers get every epoch and figure, one that fails stops nothing, and nothing that names a patient leaves."""

from __future__ import annotations

import csv
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from cxr_fast.cli.main import main
from cxr_fast.errors import InputError
from cxr_fast.loggers import base, choose
from cxr_fast.loggers.base import Guard, SweepFacts, epoch_figures, run_figures, shared_files
from cxr_fast.loggers.choose import open_loggers, parse_log
from cxr_fast.training.folds.fold import Epoch
from cxr_fast.training.run_folder import read_info

EPOCH = Epoch(epoch=3, train_loss=0.5, valid_loss=0.6, valid_auc=math.nan, classes=0, lr=1e-3, seconds=2.0)


class Kept:
    """A logger of one's own: three methods, nothing to inherit."""

    def __init__(self, facts: SweepFacts, where: str) -> None:
        self.facts, self.where, self.epochs, self.runs, self.closed = facts, where, [], [], 0  # type: ignore[var-annotated]

    def log_epoch(self, config: int, fold: int, epoch: base.EpochValues) -> None:
        self.epochs.append((config, fold, epoch.epoch, epoch.valid_auc))

    def log_run(self, run: Any, folder: Path) -> None:
        self.runs.append((run, folder, (folder / "report.html").exists()))

    def close(self) -> None:
        self.closed += 1


class Broken(Kept):
    """A logger whose server is gone after the second epoch."""

    def log_epoch(self, config: int, fold: int, epoch: base.EpochValues) -> None:
        super().log_epoch(config, fold, epoch)
        if len(self.epochs) == 2:
            raise ConnectionError("no\nserver")


@pytest.mark.usefixtures("sketched")
def test_a_sweep_logs_what_its_history_holds_and_a_broken_logger_stops_nothing(
    toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Kept] = []

    def opened(kind: type[Kept]) -> Any:
        def make(facts: SweepFacts, where: str) -> Kept:
            made.append(kind(facts, where))
            return made[-1]

        return make

    monkeypatch.setattr(choose, "KINDS", {"kept": opened(Kept), "broken": opened(Broken)})
    words = ["sweep", str(toy_cache), "--out", str(tmp_path / "run"), "--epochs", "1,2", "--folds", "2", "--seed", "1"]
    words += ["--grid", "lr=1e-3,1e-4", "--batch-size", "8", "--device", "cpu", "--log", "kept:here", "--log", "broken"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    kept, broken = made
    assert (
        result.stderr.count("note: --log broken failed and is left out from here on (ConnectionError: no server)") == 1
    )
    assert (len(broken.epochs), broken.closed, broken.runs) == (2, 0, [])
    with open(tmp_path / "run" / "grid_history.csv", newline="", encoding="utf-8") as file:
        lines = [
            (int(r["config"]), int(r["fold"]), int(r["epoch"]), float(r["valid_auc"])) for r in csv.DictReader(file)
        ]
    assert sorted(e for e in kept.epochs if e[1] < 2) == sorted(lines)
    assert {fold for _, fold, _, _ in kept.epochs} == {0, 1, 2}, "two folds and the refit"
    [(run, folder, reported)] = kept.runs
    assert (folder, reported, kept.closed, kept.where) == (tmp_path / "run", True, 1, "here")
    assert run["model_sha256"] == read_info(folder)["model_sha256"]
    assert kept.facts.settings["seed"] == 1
    assert kept.facts.settings["grid"] == "lr=1e-3,1e-4"
    assert kept.facts.settings["epochs"] == "1,2"
    assert kept.facts.configurations == 2


def test_names_and_figures(toy_run: Path) -> None:
    one, many = (SweepFacts(out=Path("x"), folds=2, configurations=count) for count in (1, 3))
    assert [one.series(0, fold) for fold in range(5)] == ["fold1", "fold2", "refit", "retrained1", "retrained2"]
    assert many.series(1, 0) == "config2.fold1"
    assert epoch_figures(EPOCH) == {"train_loss": 0.5, "valid_loss": 0.6, "lr": 1e-3, "seconds": 2.0}
    run = read_info(toy_run)
    found = run_figures(run)
    assert found["holdout.macro_auc"] == run["metrics"]["holdout"]["macro_auc"]
    assert found["valid.mean_auc"] == max(row["mean_auc"] for row in run["budgets"])
    assert run_figures(run | {"metrics": {"out_of_fold": run["metrics"]["out_of_fold"], "holdout": None}})


def test_what_names_a_patient_is_never_among_the_shared_files(toy_run: Path, tmp_path: Path) -> None:
    for name in ("predictions.npz", "predictions.csv", "split.csv", "run.json", "note.txt", "review.html", "folds.csv"):
        (tmp_path / name).touch()
    assert [path.name for path in shared_files(tmp_path)] == ["folds.csv"]
    assert {path.name for path in shared_files(toy_run)} <= {"folds.csv", "history.csv", "per_class.csv", "grid.csv"}


def test_a_logger_that_cannot_be_opened_is_left_out_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Kept:
        raise OSError("no disk")

    said: list[str] = []
    monkeypatch.setattr(choose, "KINDS", {"a": refuse, "b": Kept})
    guard = open_loggers(["a", "b:x"], SweepFacts(out=Path("x"), folds=2, configurations=1), said.append)
    assert [name for name, _ in guard.loggers] == ["b"]
    assert said == ["--log a cannot be opened and is left out (OSError: no disk)"]
    with pytest.raises(InputError, match="each kind once"):
        open_loggers(["b", "b:y"], SweepFacts(out=Path("x"), folds=2, configurations=1), said.append)


def test_words_of_the_flag() -> None:
    assert parse_log("mlflow:sqlite:///a:b.db") == ("mlflow", "sqlite:///a:b.db")
    with pytest.raises(InputError, match="'comet' is not one of mlflow, tensorboard, wandb"):
        parse_log("comet")


def test_a_missing_library_is_one_line(toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    words = [
        "sweep",
        str(toy_cache),
        "--out",
        str(tmp_path / "run"),
        "--epochs",
        "1",
        "--folds",
        "2",
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(main, [*words, "--log", "mlflow"])
    assert result.exit_code == 2
    assert "needs mlflow, which is not installed; the extra log brings it" in result.stderr
    assert not list(tmp_path.iterdir())


# ------------------------------------------- our side of each library, against a stand-in that records calls


class Recorder:
    """Takes every call of every name, and keeps it."""

    def __init__(self, calls: list[Any], **returns: Any) -> None:
        self.calls, self.returns = calls, returns

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            self.calls.append((name, args, named))
            return self.returns.get(name)

        return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """MLflow and wandb as stand-ins; every call to them."""
    found: list[Any] = []
    run = SimpleNamespace(info=SimpleNamespace(run_id="r1", status="RUNNING"))
    client = Recorder(found, create_experiment="7", create_run=run, search_runs=[], get_experiment_by_name=None)
    tracking = types.ModuleType("mlflow.tracking")
    tracking.MlflowClient = lambda tracking_uri: found.append(("address", tracking_uri)) or client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", types.ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.tracking", tracking)
    wandb = types.ModuleType("wandb")
    own = Recorder(found)
    own.id, own.summary = "w1", {}  # type: ignore[attr-defined]
    wandb.init = lambda **named: found.append(("init", (), named)) or own  # type: ignore[attr-defined]
    wandb.Settings = dict  # type: ignore[attr-defined]
    wandb.Artifact = lambda *args, **named: Recorder(found)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return found


FACTS = SweepFacts(out=Path("exports/x"), folds=2, configurations=1, settings={"lr": 1e-3})


def test_mlflow(calls: list[Any], toy_run: Path) -> None:
    logger = choose.KINDS["mlflow"](FACTS, "")
    assert ("address", "sqlite:///mlflow.db") in calls
    assert ("log_param", ("r1", "lr", 1e-3), {}) in calls
    logger.log_epoch(0, 1, EPOCH)
    assert ("log_metric", ("r1", "fold2.train_loss", 0.5), {"step": 3}) in calls
    logger.log_run(read_info(toy_run), toy_run)
    assert ("log_artifacts", ("r1", str(toy_run)), {}) in calls
    logger.close()
    assert calls[-1] == ("set_terminated", ("r1",), {"status": "FINISHED"})
    calls.clear()
    far = choose.KINDS["mlflow"](FACTS, "https://server")
    far.log_run(read_info(toy_run), toy_run)
    assert not [call for call in calls if call[0] == "log_artifacts"]
    sent = {Path(call[1][1]).name for call in calls if call[0] == "log_artifact"}
    assert "folds.csv" in sent
    assert not {name for name in sent if name.startswith("predictions")}


def test_a_stopped_mlflow_run_is_marked_and_found_again(calls: list[Any]) -> None:
    choose.KINDS["mlflow"](FACTS, "").close()
    assert calls[-1] == ("set_terminated", ("r1",), {"status": "KILLED"})


def test_wandb_is_offline_and_goes_on_under_one_name(calls: list[Any], toy_run: Path) -> None:
    for _ in range(2):
        logger = choose.KINDS["wandb"](FACTS, "team")
    one, two = (call[2] for call in calls if call[0] == "init")
    assert one["id"] == two["id"]
    assert one["resume"] == "allow"
    assert (one["mode"], one["project"], one["config"]) == ("offline", "team", {"lr": 1e-3})
    logger.log_epoch(0, 0, EPOCH)
    assert calls[-1][1][0]["fold1/train_loss"] == 0.5
    logger.log_run(read_info(toy_run), toy_run)
    assert not [call for call in calls if call[0] == "add_file" and "predictions" in call[1][0]]
    logger.close()
    assert calls[-1][0] == "finish"


def test_tensorboard_writes_curves_that_it_reads_back(toy_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = choose.KINDS["tensorboard"](FACTS, str(tmp_path))
    for number in (1, 2):
        logger.log_epoch(0, 0, Epoch(**{**EPOCH.__dict__, "epoch": number, "valid_auc": number / 4}))
    logger.log_run(read_info(toy_run), toy_run)
    logger.close()
    found = EventAccumulator(str(tmp_path / "x" / "fold1")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("valid_auc")] == [(1, 0.25), (2, 0.5)]


def test_the_guard_closes_once() -> None:
    kept = Kept(FACTS, "")
    guard = Guard([("kept", kept)], print)
    guard.close()
    guard.close()
    assert kept.closed == 1
