"""The tables over configurations and seeds, from run.json alone."""

from __future__ import annotations

from typing import Any

from cxr_fast.config import TrainSpec
from cxr_fast.grid.points import make_points
from cxr_fast.report.configurations import grid_tables


def test_a_grid_shows_what_was_varied() -> None:
    row = {"config": 1, "lr": 0.1, "epochs": 8, "mean_auc": 0.7, "std_auc": 0.1, "seconds": 75, "chosen": True}
    table = grid_tables.grid_table({"grid": [row]})
    assert table.columns == ["configuration", "lr", "epochs", "mean AUC", "std", "time"]
    assert list(table.texts()) == [["2", "0.1", "8", "0.700", "0.100", "1 min 15 s"]]
    assert table.rows[0][-1].value == 75  # type: ignore[union-attr]


def seed_row(config: int, lr: float, mean: float, *, chosen: bool = False) -> dict[str, Any]:
    values = {"mean_auc": mean, "std_auc": 0.01, "min_auc": mean - 0.02, "max_auc": mean + 0.02}
    maps = {"mean_map": 0.3, "std_map": None}
    return {"config": config, "lr": lr, "seeds": 3, "epochs": 4, **values, **maps, "chosen": chosen}


def test_a_table_over_seeds_has_a_row_for_each_point() -> None:
    table = grid_tables.seed_table({"seeds": [seed_row(3, 0.1, 0.7, chosen=True), seed_row(0, 0.2, 0.6)]})
    assert table.columns[:4] == ["configuration", "lr", "seeds", "epochs"]
    assert "other folds unless these were given" in table.notes[0]
    assert next(iter(table.texts())) == ["4", "0.1", "3", "4", "0.700", "0.010", "0.680", "0.720", "0.300", "–"]
    assert table.chosen == [0]
    assert table.notes
    assert grid_tables.seed_table({}).rows == []


def test_the_points_of_a_plan_are_numbered_from_one() -> None:
    table = grid_tables.points_table(make_points(TrainSpec(), ["lr=1e-5,2e-5", "head_lr=none"]))
    assert list(table.texts()) == [["1", "1e-05", "None"], ["2", "2e-05", "None"]]


def test_a_long_grid_shows_the_best_and_the_chosen_and_says_where_the_others_are() -> None:
    values = {"epochs": 8, "std_auc": 0.1, "seconds": 75}
    rows = [{"config": k, "lr": 0.1, "mean_auc": 0.7, **values, "chosen": k == 7} for k in range(9)]
    table = grid_tables.grid_table({"grid": rows}, most=3)
    assert [row[0] for row in table.texts()] == ["1", "2", "3", "8"]
    assert table.chosen == [3]
    assert table.notes == ["5 more are in grid.csv and on the page."]
    assert len(grid_tables.grid_table({"grid": rows}).rows) == 9
