"""A row of the list of runs equals what run.json, the plan and the saved states say."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from cxr_fast.config import SweepOptions, SweepSpec, TrainSpec
from cxr_fast.errors import InputError, Interrupted
from cxr_fast.recipes import sweep_spec
from cxr_fast.runs.entry import RUNNING, STOPPED, UNREADABLE, describe_settings, encoder_name, read_entry
from cxr_fast.runs.note import read_note, write_note
from cxr_fast.runs.progress import read_progress
from cxr_fast.system.locks import FileLock
from cxr_fast.training.folds.fold import Epoch
from cxr_fast.training.run_folder import ABOUT
from cxr_fast.training.sweep import SweepJob


@pytest.fixture(scope="module")
def stopped(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of 3 folds and 6 epochs that was stopped in its second fold; do not write into it."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    spec = SweepSpec(epochs=(4, 5, 6), folds=3, train=TrainSpec(lr=1e-3, batch_size=4))

    def end(config: int, fold: int, epoch: Epoch) -> None:
        if (fold, epoch.epoch) == (1, 3):
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        SweepJob(toy_cache, out, spec, SweepOptions(device="cpu")).run(end)
    return out.with_name("run.partial")


def test_a_finished_run_shows_the_figures_of_its_record(toy_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(toy_run, run)
    (run / "model.int8.onnx").write_bytes(b"x" * 100)
    write_note(run, "  with the\nnew labels ")
    info, entry = json.loads((run / "run.json").read_text()), read_entry(run)
    budget = next(row for row in info["budgets"] if row["chosen"])
    assert (entry.valid_auc, entry.valid_std) == (budget["mean_auc"], budget["std_auc"])
    assert entry.holdout_auc == info["metrics"]["holdout"]["macro_auc"]
    assert entry.holdout_map == info["metrics"]["holdout"]["map"]
    assert (entry.name, entry.state, entry.done, entry.folds) == ("run", "done", 1.0, 3)
    assert (entry.epochs, entry.created) == (info["chosen"]["epochs"], info["created"])
    assert entry.data == info["cache"]["dataset"]["name"]
    assert (entry.files, entry.note, entry.problem) == (("int8",), "with the new labels", "")
    assert entry.size == sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    assert "epochs 4,5,6" in entry.settings
    assert "lr 0.001" in entry.settings
    assert "batch_size 4" in entry.settings
    write_note(run, "")
    assert read_note(run) == ""
    assert not (run / "note.txt").exists()


def test_an_unfinished_run_says_how_far_it_is(stopped: Path, toy_cache: Path) -> None:
    found = read_progress(stopped)
    assert found.configurations == 1
    assert (found.epochs_done, found.epochs_in_all) == (9, 18), "six epochs of the first fold, three of the second"
    entry = read_entry(stopped)
    assert (entry.name, entry.state, entry.done) == ("run", STOPPED, 0.5)
    assert entry.data == "phantom"
    assert entry.encoder
    assert entry.valid_auc is None
    with FileLock(stopped.with_name("run")):
        assert read_entry(stopped).state == RUNNING
    assert read_entry(stopped).state == STOPPED


def test_what_people_read_of_an_unfinished_run_decides_nothing(stopped: Path, tmp_path: Path) -> None:
    """A run that an earlier version began has no about.json, and one whose state is damaged counts it as nothing."""
    folder = tmp_path / "run.partial"
    shutil.copytree(stopped, folder)
    (folder / ABOUT).unlink()
    assert read_progress(folder).data == ""
    for path in (folder / "states").iterdir():
        path.write_bytes(path.read_bytes()[:5])
    assert read_progress(folder).epochs_done == 6, "the first fold's snapshot of 6 epochs is whole"


def test_a_grid_counts_configurations_that_lost(stopped: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run.partial"
    shutil.copytree(stopped, folder)
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"grid": [{"lr": 1e-3}, {"lr": 1e-2}]}))
    for part in ("states", "snapshots"):
        for path in (folder / part).iterdir():
            path.rename(path.with_name(path.name.replace("config0", "config1")))
    found = read_progress(folder)
    assert (found.epochs_done, found.epochs_in_all) == (18 + 9, 36)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "cxr-fast run", "schema": 2}', '{"kind": "other"}'])
def test_a_folder_that_cannot_be_read_has_a_row_that_says_why(text: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(text)
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "plan.json").write_text(text)
    for name in ("run", "other.partial"):
        entry = read_entry(tmp_path / name)
        assert entry.state == UNREADABLE
        assert name in entry.problem
        assert "\n" not in entry.problem
    with pytest.raises(InputError, match="not an unfinished run"):
        read_progress(tmp_path / "nothing.partial")


def test_settings_are_what_differs_from_the_nearest_recipe() -> None:
    tuned = sweep_spec("tuned")
    assert describe_settings(SweepSpec(), {}) == ""
    assert describe_settings(tuned, {}) == "tuned"
    assert describe_settings(dataclasses.replace(tuned, seed=4), {}) == "tuned, seed 4"
    assert describe_settings(sweep_spec("longtail"), {"dtype": "float32"}) == "longtail, cache dtype float32"
    assert describe_settings(SweepSpec(folds=2), {"weights": "x", "image_size": 336}) == "cache image_size 336"


def test_encoders_have_short_names() -> None:
    assert encoder_name("random:0:test_vit") == "random:0:test_vit"
    assert encoder_name("hf-hub:microsoft/rad-dino") == "rad-dino"
    assert encoder_name("somewhere/vit_s16/") == "vit_s16"


def test_a_run_over_a_grid_names_what_was_chosen_and_of_how_many(toy_run: Path, stopped: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    info = json.loads((toy_run / "run.json").read_text())
    (row,) = info["grid"]
    rows = [row | {"config": 1, "lr": 0.002, "seed": 4}, row | {"config": 0, "lr": 0.001, "seed": 4, "chosen": False}]
    (run / "run.json").write_text(json.dumps(info | {"config": 1, "grid": rows}))
    assert read_entry(run).settings.endswith(", best of 2 configurations: lr 0.002, seed 4")
    assert "best of" not in read_entry(toy_run).settings
    folder = tmp_path / "run.partial"
    shutil.copytree(stopped, folder)
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"grid": [{"lr": 1e-3}, {"lr": 1e-2}]}))
    assert read_entry(folder).settings.endswith(", 2 configurations")
