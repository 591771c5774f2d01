"""The picture of a search has a panel for each field that varies, and shows which configuration was chosen."""

from __future__ import annotations

from typing import Any

import pytest

from cxr_fast.report import charts
from cxr_fast.report.configurations.grid_pictures import draw_grid, drawings


def row(config: int, mean: float | None, **fields: Any) -> dict[str, Any]:
    values = {"epochs": 4, "mean_auc": mean, "std_auc": 0.02, "seconds": 1.0, "chosen": config == 0}
    return {"config": config, **fields, **values}


ROWS = [
    row(0, 0.7, lr=1e-3, loss="bce", head_lr=None, dropout=0.5),
    row(1, 0.6, lr=1e-5, loss="focal", head_lr=1e-3, dropout=0.5),
    row(2, None, lr=1e-4, loss="asl", head_lr=1e-3, dropout=0.5),
]


def test_a_panel_for_each_field_that_varies() -> None:
    search = {"grid": ["lr=1e-5..1e-3:log", "loss=bce,focal,asl", "head_lr=none,1e-3", "dropout=0.5"]}
    (draw,) = drawings({"grid": ROWS, "search": search}).values()
    panels = [axes for axes in draw().axes if axes.get_visible()]
    assert [axes.get_xlabel() for axes in panels] == ["lr", "loss", "head_lr"]
    assert [axes.get_xscale() for axes in panels] == ["log", "linear", "linear"]
    assert [text.get_text() for text in panels[1].get_xticklabels()] == ["bce", "focal"]
    assert charts.png(draw()).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flag", "scale"),
    [("lr=1e-5,1e-3", "log"), ("lr=1e-3..2e-3", "linear"), ("lr=0,1e-3", "linear"), ("lr=1e-5..1e-3:log", "log")],
)
def test_an_axis_is_logarithmic_where_it_was_drawn_so_or_its_list_is_wide(flag: str, scale: str) -> None:
    (draw,) = drawings({"grid": ROWS[:2], "search": {"grid": [flag, "loss=bce,focal"]}}).values()
    assert draw().axes[0].get_xscale() == scale


def test_nothing_is_drawn_of_one_configuration_and_a_run_of_before_has_its_picture() -> None:
    assert drawings({"grid": ROWS[:1]}) == {}
    assert drawings({"grid": [row(0, 0.7, lr=1e-3), row(1, 0.6, lr=1e-3)]}) == {}
    assert list(drawings({"grid": ROWS})) == ["grid_plot"]


def test_many_fields_take_several_lines() -> None:
    rows = [row(k, 0.6, **{f"f{n}": k for n in range(5)}) for k in range(3)]
    made = draw_grid(rows, [f"f{n}" for n in range(5)])
    assert sum(axes.get_visible() for axes in made.axes) == 5
    assert [round(t) for t in made.axes[0].get_xticks()] == [0, 1, 2]
