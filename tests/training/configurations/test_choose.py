"""A configuration is chosen by its mean over folds and seeds, and a table over seeds says what the seeds gave."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from cxr_fast.config import SweepOptions, SweepSpec, TrainSpec
from cxr_fast.errors import InputError, Interrupted
from cxr_fast.grid.points import Point
from cxr_fast.training.configurations.choose import choose_configuration
from cxr_fast.training.configurations.tables import seed_table
from cxr_fast.training.search import Trained
from cxr_fast.training.sweep import SweepJob

SPEC = SweepSpec(epochs=(1, 2), folds=2, train=TrainSpec(lr=1e-3, batch_size=4, train_blocks=0))
FLAGS = ("lr=1e-3,1e-4", "seed=0..2")


def trained(number: int, group: int, scores: list[list[float]]) -> Trained:
    """A configuration of which only the scores (budgets, folds) matter."""
    empty = np.empty(0)
    point = Point(changes={}, train=TrainSpec(), seed=number, group=group)
    return Trained(
        number=number,
        point=point,
        probabilities=empty,
        scores=np.array(scores),
        defined=empty,
        stopped_at=empty,
        histories=[],
        seconds=0.0,
    )


def test_the_mean_over_seeds_decides_and_the_first_seed_is_kept() -> None:
    lucky = [trained(0, 0, [[0.9, 0.9], [0.5, 0.5]]), trained(1, 0, [[0.5, 0.5], [0.5, 0.5]])]
    steady = [trained(2, 1, [[0.6, 0.6], [0.8, 0.7]]), trained(3, 1, [[0.6, 0.6], [0.8, 0.7]])]
    found = choose_configuration([*lucky, *steady])
    assert (found.trained.number, found.budget) == (2, 1)
    alone = choose_configuration([lucky[0], dataclasses.replace(steady[0])])
    assert (alone.trained.number, alone.budget) == (0, 0)


def test_the_first_of_equals_is_chosen_and_undefined_folds_are_left_out() -> None:
    one, two = trained(0, 0, [[0.7, np.nan], [0.7, 0.7]]), trained(1, 1, [[0.7, 0.7], [0.7, 0.7]])
    assert choose_configuration([one, two]).trained is one
    assert choose_configuration([one, two]).budget == 0


# ---------------------------------------------------------------------------------------- a sweep over seeds


def arrays(run: Path, name: str = "predictions.npz") -> dict[str, np.ndarray]:
    with np.load(run / name) as file:
        return {key: file[key] for key in file.files}


def table(run: Path, name: str) -> list[dict[str, str]]:
    with open(run / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def seeds(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("seeds") / "run"
    SweepJob(toy_cache, out, SPEC, SweepOptions(grid=FLAGS, device="cpu")).run()
    return out


def test_every_seed_has_folds_of_its_own_and_the_same_hold_out(seeds: Path, toy_cache: Path, tmp_path: Path) -> None:
    folds, saved = arrays(seeds, "grid.npz")["fold"], arrays(seeds)
    assert folds.shape == (6, len(saved["fold"]))
    assert all(np.array_equal(one == -1, saved["fold"] == -1) for one in folds)
    np.testing.assert_array_equal(folds[:3], folds[3:])
    assert len({one.tobytes() for one in folds[:3]}) == 3
    for one in folds:  # no group in two folds
        pairs = set(zip(saved["group"].tolist(), one.tolist(), strict=True))
        assert len(pairs) == len(set(saved["group"].tolist()))
    SweepJob(toy_cache, tmp_path / "alone", SPEC, SweepOptions(device="cpu")).run()
    np.testing.assert_array_equal(folds[0], arrays(tmp_path / "alone")["fold"])


def test_the_seed_of_the_sweep_is_that_of_a_sweep_without_a_grid(seeds: Path, toy_cache: Path, tmp_path: Path) -> None:
    """And the final model is of the first seed of what was chosen."""
    run = json.loads((seeds / "run.json").read_text())
    assert (run["search"]["grid"], run["search"]["trials"], run["search"]["seed"]) == (list(FLAGS), None, 0)
    train = dataclasses.replace(SPEC.train, lr=run["train"]["lr"])
    alone = SweepJob(
        toy_cache, tmp_path / "alone", dataclasses.replace(SPEC, train=train), SweepOptions(device="cpu")
    ).run()
    one, two = arrays(seeds), arrays(tmp_path / "alone")
    np.testing.assert_array_equal(one["out_of_fold"], two["out_of_fold"])
    assert run["weights_sha256"]["fold0"] == alone["weights_sha256"]["fold0"]


def test_the_table_over_seeds_is_the_mean_of_its_configurations(seeds: Path) -> None:
    run, folds = json.loads((seeds / "run.json").read_text()), table(seeds, "grid_folds.csv")
    assert len(run["seeds"]) == 2
    for row in run["seeds"]:
        numbers = range(row["config"], row["config"] + 3)
        each = np.array(
            [
                np.mean([float(f[f"auc_{row['epochs']}"]) for f in folds if f["config"] == str(number)])
                for number in numbers
            ]
        )
        assert row["seeds"] == 3
        assert row["mean_auc"] == pytest.approx(each.mean())
        assert row["std_auc"] == pytest.approx(each.std(ddof=1))
        assert (row["min_auc"], row["max_auc"]) == pytest.approx((each.min(), each.max()))
    assert [row["chosen"] for row in run["seeds"]] == [True, False]
    assert run["seeds"][0]["mean_auc"] >= run["seeds"][1]["mean_auc"]
    assert run["chosen"]["epochs"] == run["seeds"][0]["epochs"]
    assert [row["config"] for row in table(seeds, "seeds.csv")] == [str(row["config"]) for row in run["seeds"]]


def test_average_precision_over_seeds_is_that_of_the_predictions_at_the_budget() -> None:
    labels, rng = np.array([[1, 0], [0, 1], [1, 1], [0, 0], [1, 0]]), np.random.default_rng(0)
    data: Any = SimpleNamespace(assignment=np.array([0, 0, 1, 1, -1]), labels=labels)
    group = [
        dataclasses.replace(trained(k, 0, [[0.5, 0.5], [0.6, 0.6 + k]]), probabilities=rng.random((2, 5, 2)))
        for k in range(2)
    ]
    (row,) = seed_table(group, choose_configuration(group), data, SPEC)
    each = [
        np.mean([average_precision_score(labels[:4, c], one.probabilities[1, :4, c]) for c in range(2)])
        for one in group
    ]
    assert (row["epochs"], row["mean_map"]) == (2, pytest.approx(np.mean(each)))
    assert row["std_map"] == pytest.approx(np.std(each, ddof=1))


def test_a_sweep_over_seeds_goes_on_where_it_stopped(seeds: Path, toy_cache: Path, tmp_path: Path) -> None:
    """Stopped in the middle of the second seed of the second point."""

    def stop_there(config: int, fold: int, epoch: Any) -> None:
        if config == 4 and fold == 1:
            raise Interrupted("here")

    options = SweepOptions(grid=FLAGS, device="cpu")
    with pytest.raises(Interrupted):
        SweepJob(toy_cache, tmp_path / "run", SPEC, options).run(stop_there)
    SweepJob(toy_cache, tmp_path / "run", SPEC, options).run()
    one, two = arrays(seeds), arrays(tmp_path / "run")
    assert all(one[key].tobytes() == two[key].tobytes() for key in one)
    one, two = arrays(seeds, "grid.npz"), arrays(tmp_path / "run", "grid.npz")
    assert all(one[key].tobytes() == two[key].tobytes() for key in one)


def test_a_refit_takes_the_budget_and_the_rates_of_the_seed_that_is_kept(toy_cache: Path, tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, final="refit")
    run = SweepJob(toy_cache, tmp_path / "run", spec, SweepOptions(grid=FLAGS[1:], device="cpu")).run()
    assert run["final"]["members"] == ["refit"]
    assert run["config"] == 0
    assert run["chosen"]["epochs"] == run["seeds"][0]["epochs"]


def test_a_seed_whose_folds_cannot_be_scored_is_named(toy_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cxr_fast.training import search

    def one_class(data: Any, spec: Any, seed: int) -> np.ndarray:
        out = data.assignment.copy()
        dev = np.flatnonzero(out >= 0)
        out[dev], out[dev[0]] = 1, 0
        return out

    monkeypatch.setattr(search, "redraw_folds", one_class)
    with pytest.raises(InputError, match=r"^--grid seed=1: fold 1: none of the "):
        SweepJob(toy_cache, "unused", SPEC, SweepOptions(grid=("seed=0,1",), device="cpu"))
