"""Means over classes say over which: in the record, in the cell, in CSV, in a comparison; head, medium, tail; gaps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxr_fast.metrics.figures import MEANS
from cxr_fast.metrics.rarity import class_groups, group_means
from cxr_fast.report import class_means, comparison, tables
from cxr_fast.report.comparison import compare_runs
from cxr_fast.report.evaluation import csv_tables, evaluate
from cxr_fast.report.probabilities import POOLED, benefit_table, recalibration_table
from cxr_fast.system.text import to_plain
from tests.helpers import made

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    """240 images of 120 groups, 4 classes, the first rare: in 2 groups of the hold-out; a column of sexes."""
    found = made.arrays(240, 4)
    found["labels"][:, 0] = 0
    found["labels"][np.flatnonzero(found["fold"] == -1)[:4], 0] = 1
    found["labels"][np.flatnonzero(found["fold"] == 0)[:2], 0] = 1
    found["meta:sex"] = np.array(["F", "M"])[np.arange(240) // 2 % 2]
    return found


@pytest.fixture(scope="module")
def run(arrays: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write(tmp_path_factory.mktemp("made") / "run", arrays)


@pytest.fixture(scope="module")
def found(run: Path) -> dict[str, Any]:
    return evaluate(run, resamples=100)


def test_the_interval_of_a_mean_says_over_which_classes_it_is(found: dict[str, Any]) -> None:
    part = found["parts"]["holdout"]
    others = [row["auc"]["value"] for row in found["per_class"][1:]]
    figure = part["figures"]["macro_auc"]
    assert figure["over"] == {"classes": 3, "value": pytest.approx(np.mean(others)), "left_out": ["class 0"]}
    assert figure["low"] < figure["over"]["value"] < figure["high"]
    assert figure["value"] == pytest.approx((3 * np.mean(others) + found["per_class"][0]["auc"]["value"]) / 4)
    assert all("over" in part["figures"][name] for name in MEANS)
    assert "over" not in part["figures"]["micro_auc"]
    assert found["parts"]["train"]["figures"]["macro_auc"]["over"] is None
    table = to_plain(tables.figure_table({"Hold-out": part}))
    assert f"(3 classes: {np.mean(others):.3f} [" in table
    assert "Classes behind intervals of means" in table
    assert "3 of 4" in table
    assert class_means.left_out(part).startswith("intervals of means are over 3 of 4 classes, without class 0, which")
    rows = csv_tables(found)["figures.csv"]
    line = next(row for row in rows.rows if row[0] == "holdout" and row[3] == "" and row[4] == "macro_auc")
    assert dict(zip(rows.columns, line, strict=True))["interval_classes"] == 3


def test_head_medium_and_tail_are_means_of_their_classes(found: dict[str, Any], arrays: Arrays) -> None:
    held = arrays["fold"] == -1
    groups = class_groups(arrays["labels"][~held])  # the hold-out's labels divide nothing
    expected = group_means(arrays["labels"][held], arrays["final"][held], groups)
    part = found["parts"]["holdout"]["rarity"]
    assert set(part) == set(groups.tolist())
    assert "medium" in part
    for name, each in part.items():
        assert each["auc"]["value"] == pytest.approx(expected[name]["auc"], abs=1e-12)
        assert each["map"]["value"] == pytest.approx(expected[name]["map"], abs=1e-12)
        inside = [k for k, group in enumerate(groups) if group == name]
        assert found["rarity"][name]["classes"] == [f"class {k}" for k in inside]
    assert part["medium"]["auc"]["over"]["left_out"] == ["class 0"]
    assert part["medium"]["auc"]["low"] is None
    text = to_plain(class_means.rarity_table({"Hold-out": found["parts"]["holdout"]}, found["rarity"]))
    assert "Hold-out, medium" in text
    positives = int((arrays["labels"][~held, 0] == 1).sum())
    assert f"Medium (1 to 10 % positive): class 0, {positives} positives" in text
    assert class_means.rarity_table({"Hold-out": {}}).rows == [], "runs of earlier versions have none"


def test_a_comparison_says_the_same(run: Path, arrays: Arrays, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    noisy = {"final": (0.5 * arrays["final"] + 0.5 * random.random(arrays["final"].shape)).astype(np.float32)}
    pair = compare_runs(run, made.write(tmp_path / "b", arrays | noisy), resamples=100)
    figure = pair["figures"]["macro_auc"]
    assert (figure["over"]["classes"], figure["over"]["left_out"]) == (3, ["class 0"])
    assert figure["low"] < figure["over"]["value"] < figure["high"]
    assert pair["rarity"]["medium"]["auc"]["low"] is None
    assert pair["rarity"]["head"]["auc"]["low"] < pair["rarity"]["head"]["auc"]["difference"]
    assert "without class 0" in to_plain(comparison.comparison_table(pair, "AB"))
    assert "AUC, head classes" in to_plain(class_means.rarity_comparison_table(pair, "AB"))


def test_gaps_slopes_and_decision_curves_are_there(found: dict[str, Any]) -> None:
    gap = found["gaps"]["sex"]["macro_auc"]
    assert {gap["higher"], gap["lower"]} == {"F", "M"}
    each = {name: part["figures"]["macro_auc"] for name, part in found["subgroups"]["sex"].items()}
    if all(figure["over"]["left_out"] == gap["left_out"] for figure in each.values()):
        assert gap["value"] == pytest.approx(abs(each["F"]["over"]["value"] - each["M"]["over"]["value"]))
    assert gap["low"] < gap["value"] < gap["high"]
    assert "above" in to_plain(class_means.gap_table(found["gaps"]))
    assert [row["class"] for row in found["recalibration"]] == [POOLED, *(f"class {c}" for c in range(4))]
    assert found["recalibration"][0]["slope"]["low"] < found["recalibration"][0]["slope"]["value"]
    assert found["recalibration"][1]["slope"]["low"] is None, "class 0 is in two groups"
    curve = found["decisions"]["curves"]["class 1"]
    row = found["per_class"][1]
    assert curve["everyone"][0] == pytest.approx(row["prevalence"] - (1 - row["prevalence"]) / 99)
    assert len(recalibration_table(found["recalibration"]).rows) == 5
    assert len(benefit_table(found["decisions"]).rows) == 6
    written = csv_tables(found)
    assert len(written["decision_curves.csv"].rows) == 6 * 99
    assert len(written["recalibration.csv"].rows) == 5
