"""The tables of a run from its records, as text."""

from __future__ import annotations

from typing import Any

import pytest

from cxr_fast.report import comparison, settings, tables
from cxr_fast.report.evaluation import csv_tables
from cxr_fast.report.summary import ReportData
from cxr_fast.system.text import to_csv

BUDGETS = [
    {"epochs": 4, "chosen": False, "mean_auc": 0.6, "std_auc": 0.05},
    {"epochs": 8, "chosen": True, "mean_auc": 0.71236, "std_auc": None},
]
FOLDS = [
    {"fold": 0, "images": 1200, "classes_defined": 3, "best": False, "auc_4": 0.5, "auc_8": None},
    {"fold": 1, "images": 1100, "classes_defined": 4, "best": True, "auc_4": 0.7, "auc_8": 0.71236},
]
RUN: dict[str, Any] = {"budgets": BUDGETS, "folds": FOLDS}


def test_folds_with_the_best_marked_and_the_budgets_in_the_foot() -> None:
    table = tables.fold_table(RUN, digits=4)
    assert table.columns == ["fold", "images", "classes with an AUC", "4 epochs", "8 epochs (chosen)"]
    assert list(table.texts()) == [
        ["1", "1,200", "3", "0.5000", "–"],
        ["2", "1,100", "4", "0.7000", "0.7124"],
        ["mean", "", "", "0.6000", "0.7124"],
        ["std", "", "", "0.0500", "–"],
    ]
    assert (table.chosen, len(table.foot)) == ([1], 2)
    assert list(tables.budget_table(RUN).texts()) == [["4", "0.600", "0.050"], ["8", "0.712", "–"]]
    assert tables.budget_table(RUN).chosen == [1]


def test_positives_of_each_fold_count_folds_from_one() -> None:
    rows = [
        {"class": "(images)", "fold_0": 10, "holdout": 5},
        {"class": "(groups)", "fold_0": 8, "holdout": 4},
        {"class": "(images)", "fold_0": 3, "holdout": 0},
    ]
    table = tables.positives_table({"split_table": rows})
    assert table.columns == ["class", "fold 1", "hold-out"]
    assert list(table.texts()) == [["(images)", "3", "0"], ["images", "10", "5"], ["groups", "8", "4"]]
    assert [cell.alarm for cell in table.rows[0][1:]] == [False, True]  # type: ignore[union-attr]
    assert tables.positives_table({"split_table": []}).rows == []


def test_figures_of_run_json_have_no_intervals_and_no_groups() -> None:
    metrics = {"n": 1234, "classes_defined": 3, "classes_total": 4, "macro_auc": 0.75, "map": None}
    table = tables.run_figure_table({"metrics": {"out_of_fold": metrics, "holdout": None}}, digits=4)
    assert table.columns == ["figure", "Validation (out of fold)"]
    assert list(table.texts()) == [
        ["Images", "1,234"],
        ["Classes with an AUC", "3 of 4"],
        ["Macro AUC", "0.7500"],
        ["mAP", "–"],
    ]


def test_a_difference_is_signed_and_a_clear_one_chosen() -> None:
    clear = {"a": 0.5, "b": 0.7, "difference": 0.2, "low": 0.1, "high": 0.3}
    unclear = {"a": 0.5, "b": 0.45, "difference": -0.05, "low": -0.1, "high": 0.02}
    undefined = {"a": None, "b": None, "difference": None, "low": None, "high": None}
    pair = {"figures": {"macro_auc": clear, "map": unclear}}
    table = comparison.comparison_table(pair, ("old", "new"), digits=4)
    assert list(table.texts()) == [
        ["Macro AUC", "0.5000", "0.7000", "+0.2000 [+0.1000, +0.3000]"],
        ["mAP", "0.5000", "0.4500", "-0.0500 [-0.1000, +0.0200]"],
    ]
    assert table.chosen == [0]
    rows = [{"class": "Mass", "positives": 7, "auc": clear, "ap": unclear}]
    rows += [{"class": "Edema", "positives": 0, "auc": undefined, "ap": undefined}]
    first, _ = comparison.class_comparison_table(rows, ("old", "new"), "ap").texts()
    assert first == ["Mass", "7", "0.500", "0.450", "-0.050 [-0.100, +0.020]"]
    assert list(comparison.difference_table(rows, ("old", "new")).texts()) == [
        ["Mass", "7", "0.500", "0.700", "+0.200 [+0.100, +0.300]", "-0.050 [-0.100, +0.020]"],
        ["Edema", "0", "–", "–", "–", "–"],
    ]


@pytest.mark.parametrize(("value", "text"), [([30, 50], "30,50"), (0.1, "0.1"), (None, "None")])
def test_a_setting_reads_as_its_flag(value: Any, text: str) -> None:
    assert settings.setting(value) == text


def test_csv_has_every_digit_and_an_empty_field_for_what_is_undefined() -> None:
    undefined = {"value": None, "low": None, "high": None}
    evaluation: dict[str, Any] = {
        "parts": {},
        "studies": {"pool": "mean", "parts": {}},
        "views": {},
        "subgroups": {},
        "per_class_of": "holdout",
        "per_class": [
            {"class": "a, b", "positives": 2, "auc": {"value": 1 / 3, "low": 0.1, "high": 0.5}, "ap": undefined}
        ],
        "curves": {"a, b": {"roc": [[0.0, 0.5]]}},
        "reliability": None,
        "confusion": [],
        "cooccurrence": {"classes": ["a, b"], "counts": [[2]]},
    }
    found = {name: to_csv(table) for name, table in csv_tables(evaluation).items()}
    assert found == {
        "per_class.csv": "class,positives,auc,auc_low,auc_high,ap,ap_low,ap_high\n"
        '"a, b",2,0.3333333333333333,0.1,0.5,,,\n',
        "curves.csv": 'class,curve,x,y\n"a, b",roc,0.0,0.5\n',
        "cooccurrence.csv": 'class,"a, b"\n"a, b",2\n',
    }


def test_a_history_of_another_arithmetic_says_so() -> None:
    """Only in a run of an earlier version, which validated in what it trained in."""
    runs = [{"precision": "float32"}, {"precision": "bfloat16"}, {"precision": "bfloat16", "validated_in": "float32"}]
    said = [ReportData(run=run, evaluation=None).old_validation for run in runs]
    assert "validated in bfloat16" in said[1]
    assert not said[0]
    assert not said[2]
