"""What a run keeps of every configuration of a grid, and of the linear probe, in files, tables and on the page."""

from __future__ import annotations

import csv
import dataclasses
import html
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sklearn.linear_model import LogisticRegression

from cxr_fast.cli.main import main
from cxr_fast.config import SweepOptions, SweepSpec, TrainSpec
from cxr_fast.metrics import figures
from cxr_fast.metrics.rarity import GROUPS, group_maps
from cxr_fast.models import probe
from cxr_fast.report import tables
from cxr_fast.system.text import to_plain
from cxr_fast.training.sweep import SweepJob

SPEC = SweepSpec(epochs=(1, 2), folds=2, train=TrainSpec(lr=1e-3, batch_size=4))
FLAGS = ("loss=focal,asl", "train_blocks=0,1")


@dataclasses.dataclass
class Grid:
    """A run over a grid by the command, and each of its configurations run alone."""

    out: Path
    alone: list[Path]
    said: str


@pytest.fixture(scope="module")
def grid(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Grid:
    folder = tmp_path_factory.mktemp("grid")
    flags = ["--epochs", "1,2", "--folds", "2", "--lr", "1e-3", "--batch-size", "4", "--threads", "1"]
    asked = ["sweep", str(toy_cache), "--out", str(folder / "run"), *flags, "--device", "cpu"]
    found = CliRunner().invoke(main, [*asked, "--grid", FLAGS[0], "--grid", FLAGS[1]])
    assert found.exit_code == 0, found.output
    alone = []
    for loss in ("focal", "asl"):
        for blocks in (0, 1):
            train = dataclasses.replace(SPEC.train, loss=loss, train_blocks=blocks)
            alone.append(folder / f"{loss}{blocks}")
            SweepJob(toy_cache, alone[-1], dataclasses.replace(SPEC, train=train), SweepOptions(device="cpu")).run()
    return Grid(folder / "run", alone, found.output)


def info(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def arrays(run: Path, name: str = "predictions.npz") -> dict[str, np.ndarray]:
    with np.load(run / name) as file:
        return {key: file[key] for key in file.files}


def table(run: Path, name: str) -> list[dict[str, str]]:
    with open(run / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def best(run: dict[str, Any]) -> int:
    return next(i for i, b in enumerate(run["budgets"]) if b["chosen"])


def test_histories_of_all_are_those_of_each_alone(grid: Grid) -> None:
    kept = table(grid.out, "grid_history.csv")
    for number, folder in enumerate(grid.alone):
        mine = [row for row in kept if row["config"] == str(number)]
        theirs = table(folder, "history.csv")
        assert len(mine) == len(theirs) == 4
        for one, two in zip(mine, theirs, strict=True):
            assert {k: v for k, v in one.items() if k not in ("config", "seconds")} == {
                k: v for k, v in two.items() if k != "seconds"
            }
    assert len(kept) == 16


def test_folds_of_all_are_those_of_each_alone(grid: Grid) -> None:
    kept = table(grid.out, "grid_folds.csv")
    assert len(kept) == 8
    for number, folder in enumerate(grid.alone):
        mine = [row for row in kept if row["config"] == str(number)]
        for one, two in zip(mine, table(folder, "folds.csv"), strict=True):
            assert {k: one[k] for k in ("fold", "auc_1", "auc_2")} == {k: two[k] for k in ("fold", "auc_1", "auc_2")}


def test_predictions_of_all_are_those_of_each_alone(grid: Grid) -> None:
    kept = arrays(grid.out, "grid.npz")
    for number, folder in enumerate(grid.alone):
        budget = best(info(folder))
        assert kept["epochs"][number] == SPEC.epochs[budget]
        np.testing.assert_array_equal(kept["out_of_fold"][number], arrays(folder)["out_of_fold"][budget])
    chosen = info(grid.out)["config"]
    one, two = arrays(grid.out)["out_of_fold"][best(info(grid.out))], kept["out_of_fold"][chosen]
    np.testing.assert_array_equal(one, two)


def test_map_of_head_medium_and_tail(grid: Grid) -> None:
    """In run.json, in grid.csv, in the printed table and on the page."""
    saved, run = arrays(grid.out), info(grid.out)
    dev = saved["fold"] >= 0
    page = html.unescape((grid.out / "report.html").read_text(encoding="utf-8"))
    rows = {int(row["config"]): row for row in table(grid.out, "grid.csv")}
    for row in run["grid"]:
        found = group_maps(saved["labels"][dev], arrays(grid.out, "grid.npz")["out_of_fold"][row["config"]][dev])
        for name in GROUPS:
            value = found[f"{name}_map"]
            assert row[f"{name}_classes"] == found[f"{name}_classes"]
            if np.isnan(value):
                assert row[f"{name}_map"] is None
                assert rows[row["config"]][f"{name}_map"] == ""
                continue
            assert row[f"{name}_map"] == pytest.approx(value)
            assert float(rows[row["config"]][f"{name}_map"]) == pytest.approx(value)
            assert f"{value:.4f}" in grid.said
            assert f"{value:.3f}" in page
    for text in (grid.said, page):
        assert all(f"{name} mAP" in text for name in GROUPS)
    assert "more than 10 % positives" in " ".join(grid.said.split())


def test_a_run_without_a_grid_has_none_of_it(grid: Grid) -> None:
    assert not [path.name for path in grid.alone[0].iterdir() if path.name.startswith("grid")]


# --------------------------------------------------------------------------------------------- the probe


def test_the_probe_of_a_run_is_scikit_learn_s(grid: Grid, toy_cache: Path, tmp_path: Path) -> None:
    """A loop over folds and classes on the embeddings of the untrained blocks; the same whatever was trained."""
    run, saved = info(grid.out), arrays(grid.out)
    job = SweepJob(toy_cache, tmp_path / "unused", SPEC, SweepOptions(device="cpu"))
    tail = job.search.tail(SPEC.train).eval()
    with torch.inference_mode():
        rows = torch.from_numpy(job.data.rows)
        x = tail.embedding(job.activations.gather(rows, torch.zeros_like(rows))).double().numpy()
    x = x * x.shape[1] ** 0.5
    labels, fold = saved["labels"], saved["fold"]
    out = np.zeros(labels.shape)
    for k in range(2):
        for c in range(labels.shape[1]):
            train = (fold >= 0) & (fold != k) & (labels[:, c] >= 0)
            y, found = labels[train, c], np.full(len(labels), 0.5)
            if 0 < y.sum() < len(y):
                model = LogisticRegression(C=probe.STRENGTH, tol=1e-8, max_iter=1000).fit(x[train], y)
                found = model.predict_proba(x)[:, 1]
            out[fold == k, c] = found[fold == k]
            out[fold < 0, c] += found[fold < 0] / 2
    np.testing.assert_allclose(saved["probe"], out, atol=2e-3)  # embeddings in float16 there, for training too
    assert np.abs(saved["probe"] - out).mean() < 2e-4
    for folder in grid.alone:
        np.testing.assert_array_equal(arrays(folder)["probe"], saved["probe"])
    for name, place in (("out_of_fold", fold >= 0), ("holdout", fold < 0)):
        part = run["probe"][name]
        auc, classes = figures.macro(figures.auc(labels[place], saved["probe"][place]))
        assert (part["macro_auc"], part["classes_defined"]) == (pytest.approx(auc), classes)
        mean = figures.macro(figures.average_precision(labels[place], saved["probe"][place]))[0]
        assert part["map"] == pytest.approx(mean)
    each = [figures.macro(figures.auc(labels[fold == k], saved["probe"][fold == k]))[0] for k in range(2)]
    assert run["probe"]["mean_auc"] == pytest.approx(np.mean(each))
    assert run["probe"]["std_auc"] == pytest.approx(np.std(each))


def test_the_probe_is_printed_and_on_the_page(grid: Grid) -> None:
    run = info(grid.out)
    page = (grid.out / "report.html").read_text(encoding="utf-8")
    values = (run["probe"]["mean_auc"], run["probe"]["out_of_fold"]["map"], run["probe"]["holdout"]["macro_auc"])
    for text, digits in ((grid.said, 4), (page, 3)):
        assert "linear probe" in text
        assert all(f"{value:.{digits}f}" in text for value in values)
    assert "A trained model below it was trained badly" in " ".join(page.split())
    assert "A trained model below it was trained badly" in " ".join(grid.said.split())


def test_the_row_beside_the_probe_is_of_the_final_model(toy_cache: Path, tmp_path: Path) -> None:
    """Retrained heads have out-of-fold predictions, and so a mean over folds, of their own."""
    spec = dataclasses.replace(SPEC, epochs=(1,), retrain_head="balanced", final="retrained")
    run = SweepJob(toy_cache, tmp_path / "run", spec, SweepOptions(device="cpu")).run()
    saved = arrays(tmp_path / "run")
    found = [
        figures.macro(figures.auc(saved["labels"][fold], saved["out_of_fold_retrained"][fold]))[0]
        for fold in (saved["fold"] == 0, saved["fold"] == 1)
    ]
    shown = tables.probe_table(run, 4)
    assert shown.rows[1][0] == "trained (retrained)"
    assert f"{np.mean(found):.4f}" in to_plain(shown)
    assert run["decisions"]["folds"]["mean_auc"] == pytest.approx(run["budgets"][0]["mean_auc"])
    assert not tables.probe_table({**run, "probe": None}).rows, "a run of an earlier version has none"
