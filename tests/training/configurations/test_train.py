"""A configuration that diverges costs only itself: it is left out, named with its reason, and not trained again."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cxr_fast.cli.main import main
from cxr_fast.config import SweepOptions, SweepSpec, TrainSpec
from cxr_fast.errors import DivergedError, Interrupted
from cxr_fast.report.writer import write_report
from cxr_fast.runs.entry import read_entry
from cxr_fast.training.sweep import SweepJob

SPEC = SweepSpec(epochs=(1,), folds=2, train=TrainSpec(lr=1e-3, batch_size=4, train_blocks=0))


def run(cache: Path, out: Path, *grid: str, **calls: Any) -> dict[str, Any]:
    return SweepJob(cache, out, SPEC, SweepOptions(grid=grid, device="cpu")).run(**calls)


def test_the_others_are_trained_and_the_lost_one_is_named_everywhere(toy_cache: Path, tmp_path: Path) -> None:
    flags = ["--epochs", "1", "--folds", "2", "--train-blocks", "0", "--batch-size", "4", "--device", "cpu"]
    words = ["sweep", str(toy_cache), "--out", str(tmp_path / "run"), *flags, "--grid", "lr=1e30,1e-3"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [(row["config"], row["lr"]) for row in found["lost"]] == [(0, 1e30)]
    assert "diverged" in found["lost"][0]["reason"]
    assert (found["config"], found["train"]["lr"], len(found["grid"])) == (1, 1e-3, 1)
    said = "Left out: configuration 1 (lr 1e+30): training diverged in epoch 1"
    assert said in " ".join(done.output.split())
    assert said in (tmp_path / "run" / "report.html").read_text()
    assert read_entry(tmp_path / "run").state == "done"
    alone = dataclasses.replace(SPEC, train=dataclasses.replace(SPEC.train, lr=1e-3))
    SweepJob(toy_cache, tmp_path / "alone", alone, SweepOptions(device="cpu")).run()
    with np.load(tmp_path / "run" / "predictions.npz") as one, np.load(tmp_path / "alone" / "predictions.npz") as two:
        np.testing.assert_array_equal(one["out_of_fold"], two["out_of_fold"])


def test_the_numbers_of_those_left_are_their_own(toy_cache: Path, tmp_path: Path) -> None:
    found = run(toy_cache, tmp_path / "run", "lr=1e-3,1e30,1e-4")
    with np.load(tmp_path / "run" / "grid.npz") as file:
        assert file["config"].tolist() == [0, 2]
        assert file["out_of_fold"].shape[0] == file["fold"].shape[0] == 2
    with open(tmp_path / "run" / "grid_folds.csv", newline="", encoding="utf-8") as lines:
        assert {row["config"] for row in csv.DictReader(lines)} == {"0", "2"}
    shown = read_entry(tmp_path / "run").settings
    assert f"best of 2 configurations: lr {found['train']['lr']}" in shown
    write_report(tmp_path / "run", resamples=0)


def test_a_point_that_diverges_on_one_seed_is_left_out_on_all(
    toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cxr_fast.training.search import Search

    train = Search.run

    def lose(self: Search, number: int, *arguments: Any, **named: Any) -> Any:
        if number == 1:
            raise DivergedError("training diverged in epoch 1 (loss nan); use a smaller --lr.")
        return train(self, number, *arguments, **named)

    monkeypatch.setattr(Search, "run", lose)
    found = run(toy_cache, tmp_path / "run", "lr=1e-3,1e-4", "seed=0,1")
    assert sorted(row["config"] for row in found["grid"]) == [2, 3]
    assert [row["config"] for row in found["lost"]] == [1]
    assert [row["config"] for row in found["seeds"]] == [2]
    assert found["config"] == 2


def test_one_that_was_lost_is_not_trained_again(toy_cache: Path, tmp_path: Path) -> None:
    def stop(config: int, fold: int, epoch: Any) -> None:
        if config == 1:
            raise Interrupted("here")

    with pytest.raises(Interrupted):
        run(toy_cache, tmp_path / "run", "lr=1e30,1e-3", on_epoch=stop)
    seen: list[int] = []
    run(toy_cache, tmp_path / "run", "lr=1e30,1e-3", on_epoch=lambda config, *_: seen.append(config))
    assert 0 not in seen


def test_where_none_is_left_or_one_is_alone_the_search_ends(toy_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"^every configuration diverged; configuration 1: training diverged"):
        run(toy_cache, tmp_path / "run", "lr=1e30,1e29")
    with pytest.raises(DivergedError, match=r"^training diverged in epoch 1"):
        run(toy_cache, tmp_path / "alone", "lr=1e30")
