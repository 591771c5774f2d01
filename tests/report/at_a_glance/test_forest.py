"""Forest plots: what they draw is what the comparison says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.text import Text

from cxr_fast.cli.main import main
from cxr_fast.errors import InputError
from cxr_fast.report.at_a_glance import forest
from tests.helpers.pages import Page


def difference(value: float | None, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"a": 0.5, "b": 0.6, "difference": value, "low": low, "high": high}


def pair(**figures: dict[str, Any]) -> dict[str, Any]:
    """What a comparison holds, as far as it is drawn."""
    return {"figures": figures, "per_class": []}


def drawn(made: Any) -> list[tuple[str, float, str]]:
    """Text, difference and colour of each row, from the top."""
    (axes,) = made.axes
    ticks = dict(zip(axes.get_yticks(), [found.get_text() for found in axes.get_yticklabels()], strict=True))
    squares = [line for line in axes.lines if line.get_marker() == "s"]
    rows = [(ticks[line.get_ydata()[0]], float(line.get_xdata()[0]), line.get_color()) for line in squares]
    return sorted(rows, key=lambda row: -next(place for place, text in ticks.items() if text == row[0]))


def test_a_forest_has_a_row_a_run_and_figure() -> None:
    pairs = {
        "b": pair(macro_auc=difference(0.1, 0.05, 0.2), map=difference(-0.02, -0.1, 0.1), brier=difference(0.3)),
        "c": pair(macro_auc=difference(-0.1), map=difference(None)),
    }
    made = forest.forest(pairs, "a")
    orange, blue = forest.charts.COLOURS[1], forest.charts.ACCENT
    assert drawn(made) == [("Macro AUC, b", 0.1, orange), ("Macro AUC, c", -0.1, blue), ("mAP, b", -0.02, blue)]
    assert made is not None
    assert made.axes[0].get_xlabel() == "minus a"
    spans = [line for line in made.axes[0].lines if line.get_marker() == "None" and len(set(line.get_ydata())) == 1]
    assert [tuple(map(float, line.get_xdata())) for line in spans] == [(-0.1, 0.1), (0.05, 0.2)]
    assert forest.forest({"b": pair(macro_auc=difference(None))}, "a") is None
    assert forest.forest({}, "a") is None


def test_an_interval_over_few_classes_stands_beside_their_own_mean() -> None:
    """The mean over all classes may lie outside an interval that is over some of them."""
    over = {"classes": 5, "value": 0.065, "left_out": ["x"]}
    made = forest.forest({"b": pair(macro_auc=difference(-0.002, 0.02, 0.11) | {"over": over})}, "a")
    assert drawn(made) == [("Macro AUC of 5 classes, b", 0.065, forest.charts.COLOURS[1])]
    every = {"classes": 14, "value": 0.1, "left_out": []}
    made = forest.forest({"b": pair(macro_auc=difference(0.1, 0.02, 0.2) | {"over": every})}, "a")
    assert drawn(made) == [("Macro AUC, b", 0.1, forest.charts.COLOURS[1])]


def test_curves_are_drawn_over_each_other() -> None:
    curves = {"micro": {"roc": [[0, 0], [0.5, 1], [1, 1]], "pr": [[0.5, 1], [1, 0.5]]}}
    made = forest.overlaid({"a": {"curves": curves}, "b": {"curves": curves}, "c": None, "d": {"curves": {}}})
    assert made is not None
    assert [len(axes.lines) for axes in made.axes] == [2, 2]
    assert {found.get_text() for found in made.findobj(Text)} >= {"a", "b", "sensitivity", "precision (PPV)"}
    assert forest.overlaid({"a": {"curves": curves}, "b": None}) is None


def test_compare_writes_a_forest_plot(toy_run: Path, tmp_path: Path) -> None:
    """And refuses a name of another ending before it compares."""
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        out = tmp_path / f"forest.{kind}"
        told = CliRunner().invoke(
            main, ["compare", str(toy_run), str(toy_run), "--resamples", "100", "--plot", str(out)]
        )
        assert told.exit_code == 0, told.output
        assert f"wrote {out}" in told.stdout
        assert out.read_bytes().startswith(start)
    said = (tmp_path / "forest.svg").read_text("utf-8")
    assert "Macro AUC" in said
    assert "B minus A" in said
    with pytest.raises(InputError, match=r"--plot: .*forest.gif must end in .png, .svg, .pdf"):
        forest.check_path(tmp_path / "forest.gif")
    nothing = {"figures": {}, "per_class": []}
    with pytest.raises(InputError, match="no figure of these runs has a difference"):
        forest.write_forest(nothing, tmp_path / "f.png")


def test_the_comparison_page_has_both_pictures(toy_run: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(toy_run, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    with np.load(tmp_path / "two" / "predictions.npz") as file:
        arrays = {name: file[name] for name in file.files}
    arrays["final"] = arrays["final"] ** 1.1
    np.savez_compressed(tmp_path / "two" / "predictions.npz", **arrays)
    words = ["report", str(tmp_path / "one"), str(tmp_path / "two"), "--resamples", "20"]
    told = CliRunner().invoke(main, words)
    assert told.exit_code == 0, told.output
    page = Page((tmp_path / "one" / "comparison.html").read_text("utf-8"))
    assert page.sections[:2] == ["beside", "glance"]
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert "Differences of each run to one in five figures, with intervals" in alts
    assert "ROC and precision-recall curves of the runs over each other" in alts
    assert json.loads((tmp_path / "one" / "evaluation.json").read_text("utf-8"))["curves"]["micro"]
