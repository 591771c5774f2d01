"""One page that needs nothing beside it, and says what run.json and evaluation.json say."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from cxr_fast.cli.main import main
from cxr_fast.errors import InputError, SchemaError
from cxr_fast.inference import model_file
from cxr_fast.metrics import subgroups
from cxr_fast.report import charts, comparison, evaluation, writer
from cxr_fast.report.at_a_glance import pictures
from cxr_fast.report.summary import FIGURES, PARTS, ReportData, as_figure
from cxr_fast.system.text import Figure, duration
from cxr_fast.training.run_folder import read_info
from tests.helpers.model_edits import changed, put
from tests.helpers.pages import Page, browse

SECTIONS = [
    "figures",
    "classes",
    "curves",
    "glance",
    "calibration",
    "decisions",
    "cooccurrence",
    "views",
    "shortcuts",
    "search",
]
SECTIONS += ["data"]
SECTIONS += ["recipe", "made"]
FEW = {"resamples": 40}


@pytest.fixture(scope="module")
def made(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run with its report; read it, do not write into it."""
    folder = tmp_path_factory.mktemp("made") / "run"
    shutil.copytree(toy_run, folder)
    edit_predictions(
        folder, lambda arrays: arrays.update({"meta:sex": np.array(["F", "M"])[np.arange(len(arrays["fold"])) % 2]})
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subgroups, "GROUPS", 2)  # the toy's views are few images
        patch.setattr(pictures, "FEW", 1)  # and so are its missed findings
        writer.write_report(folder, **FEW)
    return folder


@pytest.fixture(scope="module")
def parsed(made: Path) -> Page:
    return Page((made / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def folder(toy_run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may write into."""
    shutil.copytree(toy_run, tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "run"


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures: they take most of the time and have tests of their own."""
    monkeypatch.setattr(charts, "all_plots", lambda *_: {})


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    run: dict[str, Any] = json.loads((folder / "run.json").read_text())
    change(run)
    (folder / "run.json").write_text(json.dumps(run))
    return run


def edit_predictions(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    with np.load(folder / "predictions.npz") as file:
        arrays = {name: file[name] for name in file.files}
    change(arrays)
    np.savez_compressed(folder / "predictions.npz", **arrays)  # type: ignore[arg-type]


def page(folder: Path) -> Page:
    return Page(writer.write_report(folder, **FEW).page.read_text(encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def with_interval(figure: dict[str, Any]) -> str:
    return str(as_figure(figure))


def number(value: float | None) -> str:
    return str(Figure(value=value))


def cxr(*words: Any) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


# The page itself.


def test_the_page_needs_nothing_beside_it(parsed: Page) -> None:
    assert parsed.requests() == []
    assert "default-src 'none'" in parsed.source
    assert not [a for tag, a in parsed.tags if tag == "a" and not (a["href"] or "").startswith("#")]
    assert "http://" not in parsed.source
    assert "https://" not in parsed.source


@pytest.mark.parametrize(
    "planted",
    [
        '<img src="https://x.org/a.png">',
        '<link rel="stylesheet" href="https://x.org/a.css">',
        '<script src="a.js"></script>',
        "<style>p{background:url(https://x.org/a.png)}</style>",
        "<style>@import 'a.css';</style>",
        "<script>fetch('a')</script>",
        '<p style="background:url(a.png)"></p>',
        '<form action="https://x.org/"></form>',
    ],
)
def test_the_check_for_requests_finds_a_planted_one(planted: str) -> None:
    assert Page(planted).requests()


def test_every_section_is_there_and_linked(parsed: Page) -> None:
    assert parsed.sections == SECTIONS
    assert [a["href"] for tag, a in parsed.tags if tag == "a"] == [f"#{name}" for name in SECTIONS]


def test_the_pictures_are_the_files(made: Path, parsed: Page) -> None:
    shown = [base64.b64decode((a["src"] or "").partition(",")[2]) for tag, a in parsed.tags if tag == "img"]
    files = {path.name: path.read_bytes() for path in made.glob("*.png")}
    assert sorted(shown) == sorted(files.values())
    assert {"epoch_search_plot.png", "evaluation_plot.png", "confusion_matrices.png"} < set(files)
    one = {"grid_plot.png"}  # this run is of one configuration
    assert set(files) == {name for name in writer.OWN if name.endswith(".png")} - one
    for data in files.values():
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert image.width > 400
    assert all(a["alt"] for tag, a in parsed.tags if tag == "img")


def test_pictures_for_papers_lie_beside(made: Path) -> None:
    names = {path.stem for path in made.glob("*.png")}
    assert names == set(charts.PICTURES) - {"grid_plot"}
    for name in names:
        svg, pdf = (made / f"{name}.svg").read_bytes(), (made / f"{name}.pdf").read_bytes()
        ElementTree.fromstring(svg)
        assert b"<text" in svg, "text is text"
        assert b"<dc:date>" not in svg
        assert pdf.startswith(b"%PDF-")
        assert b"/FontFile2" in pdf, "a TrueType font, which journals take, and no Type 3"
        assert b"/Type3" not in pdf
        assert b"/CreationDate" not in pdf
        assert str(made).encode() not in svg + pdf


def test_a_picture_is_the_same_bytes_again(made: Path) -> None:
    found = json.loads((made / "evaluation.json").read_bytes())
    again = charts.render(charts.curve_plot(found, "pr"))
    assert again == {kind: (made / f"pr_curves.{kind}").read_bytes() for kind in charts.FORMATS}


def texts(figure: Any) -> list[str]:
    """Every text that a figure shows, but for numbers on axes."""
    from matplotlib.text import Text

    return [found.get_text() for found in figure.findobj(Text) if found.get_text()]


def test_curves_name_their_figure_and_its_interval(made: Path) -> None:
    found = json.loads((made / "evaluation.json").read_bytes())
    for kind, key, word in (("roc", "auc", "AUC"), ("pr", "ap", "AP")):
        said = texts(charts.curve_plot(found, kind))
        for name in (row["class"] for row in charts.largest(found)):
            figure = next(row[key] for row in found["per_class"] if row["class"] == name)
            ends = "" if figure["low"] is None else f" ({figure['low']:.2f}–{figure['high']:.2f})"
            assert f"{charts.label(name)}: {word} {figure['value']:.2f}{ends}" in said
    micro = found["parts"][found["per_class_of"]]["figures"]["micro_auc"]
    pooled = f"all labels pooled (micro): AUC {micro['value']:.2f} ({micro['low']:.2f}–{micro['high']:.2f})"
    assert pooled in texts(charts.curve_plot(found, "roc"))


def test_precision_is_drawn_as_the_steps_that_average_precision_sums(made: Path) -> None:
    found = json.loads((made / "evaluation.json").read_bytes())
    (axes,) = charts.curve_plot(found, "pr").axes
    name = charts.largest(found)[0]["class"]
    line = next(each for each in axes.lines if each.get_label().startswith(charts.label(name)))
    assert line.get_drawstyle() == "steps-pre", "each step as high as at the recall it ends at"
    x, y = line.get_data()
    assert (x[0], y[0]) == (0, y[1])
    area = float((np.diff(x) * y[1:]).sum())
    assert area == pytest.approx(next(row["ap"]["value"] for row in found["per_class"] if row["class"] == name))


def test_confusion_matrices_have_the_words_that_journals_print(made: Path) -> None:
    found = json.loads((made / "evaluation.json").read_bytes())
    row = charts.largest(found)[0]
    said = texts(charts.confusion([row]))
    assert {"predicted", "reference standard", "positive", "negative"} <= set(said)
    positives = max(row["tp"] + row["fn"], 1)
    assert f"true positive\nn = {row['tp']:,}\n({100 * row['tp'] / positives:.0f} %)" in said
    assert f"false negative\nn = {row['fn']:,}\n({100 * row['fn'] / positives:.0f} %)" in said


def test_every_table_scrolls_by_keyboard_and_has_heads(parsed: Page) -> None:
    regions = [a for tag, a in parsed.tags if tag == "div" and a.get("role") == "region"]
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in regions)
    scopes = {a.get("scope") for tag, a in parsed.tags if tag == "th"}
    assert scopes == {"row", "col"}


# The figures come from one place.


def test_the_main_table_is_evaluation_json_figures_csv_and_run_json(made: Path, parsed: Page) -> None:
    run, found = read_json(made / "run.json"), read_json(made / "evaluation.json")
    rows = {row[0]: row[1:] for row in parsed.tables["Figures of each part"]}
    assert rows["figure"] == [PARTS[name] for name in ("train", "out_of_fold", "holdout")]
    parts = [found["parts"][name] for name in ("train", "out_of_fold", "holdout")]
    for key, title in FIGURES.items():
        assert rows[title] == [with_interval(part["figures"][key]) for part in parts]
    assert rows["Images"] == [f"{part['n']:,}" for part in parts]
    assert rows["Classes with an AUC"] == [f"{part['classes_defined']} of 35" for part in parts]
    lines = [r for r in read_csv(made / "figures.csv") if (r["level"], r["by"]) == ("image", "")]
    by_name = {(line["part"], line["figure"]): line for line in lines}
    for part in ("out_of_fold", "holdout"):
        of_run = run["metrics"][part]
        for key, figure in found["parts"][part]["figures"].items():
            line = by_name[part, key]
            over = figure.get("over") or {"classes": None, "value": None}
            of = {"interval_classes": over["classes"], "interval_value": over["value"]}
            shown = {**{end: figure[end] for end in ("value", "low", "high")}, **of}
            assert [line[end] for end in shown] == [csv_text(value) for value in shown.values()]
            if key in of_run:
                assert figure["value"] == pytest.approx(of_run[key], abs=1e-12)
        assert found["parts"][part]["n"] == of_run["n"] == int(by_name[part, "map"]["n"])


def csv_text(value: Any) -> str:
    return "" if value is None else str(value)


def test_the_class_table_is_evaluation_json_per_class_csv_and_run_json(made: Path, parsed: Page) -> None:
    run, found = read_json(made / "run.json"), read_json(made / "evaluation.json")
    rows = {row[0]: row[1:] for row in parsed.tables["All classes"][1:]}
    assert rows.keys() == set(run["classes"])
    lines = {line["class"]: line for line in read_csv(made / "per_class.csv")}
    of_run = {row["class"]: row for row in run["per_class"]}
    for row in found["per_class"]:
        auc, ap, prevalence, jaccard, f1, threshold, positives, _, tier = rows[row["class"]]
        assert auc == with_interval(row["auc"])
        assert (ap, jaccard, f1) == tuple(number(row[key]["value"]) for key in ("ap", "jaccard", "f1"))
        assert (prevalence, threshold) == (number(row["prevalence"]), number(row["threshold"]))
        assert (positives, tier) == (f"{row['positives']:,}", row["tier"])
        for key in ("auc", "ap", "jaccard", "f1"):
            assert lines[row["class"]][key] == csv_text(row[key]["value"])
            assert row[key]["value"] == pytest.approx(of_run[row["class"]][key], abs=1e-12)
            assert lines[row["class"]][f"{key}_low"] == csv_text(row[key]["low"])
    known = [float(row[1].split()[0]) for row in parsed.tables["All classes"][1:] if row[1] != "–"]
    assert known == sorted(known, reverse=True)
    assert [row[1] for row in parsed.tables["All classes"][1 + len(known) :]] == ["–"] * (35 - len(known))


def test_the_fold_table_is_run_jsons_and_the_best_is_marked(made: Path, parsed: Page) -> None:
    run = read_json(made / "run.json")
    head, *rows = parsed.tables["Validation macro AUC of each fold"]
    budgets = [b["epochs"] for b in run["budgets"]]
    assert [name for name in head[3:] if "(chosen)" in name] == [f"{run['chosen']['epochs']} epochs (chosen)"]
    assert [row[3:] for row in rows[:3]] == [[number(f[f"auc_{b}"]) for b in budgets] for f in run["folds"]]
    assert [row[0] for row in parsed.marked if "best" in row[0] and row in rows] == [
        f"{run['chosen']['fold'] + 1} (best)"
    ]
    for name, key in (("mean", "mean_auc"), ("std", "std_auc")):
        assert [r[3:] for r in rows if r[0] == name] == [[number(b[key]) for b in run["budgets"]]]


@pytest.mark.usefixtures("unpainted")
def test_groups_that_count_as_studies_are_told(folder: Path) -> None:
    """A patient's visits would be pooled as one study where nothing names them."""
    said = "Here each group counts as one study"
    assert said in page(folder).text
    edit_predictions(folder, lambda arrays: arrays.update(study=arrays["image"]))
    assert said not in page(folder).text


@pytest.mark.usefixtures("unpainted")
def test_page_and_card_name_the_seed_of_the_folds_where_a_grid_gave_another(folder: Path) -> None:
    run = read_json(folder / "run.json")
    assert (run["spec"]["seed"], run["search"]["seed"]) == (0, 0)
    run["search"]["seed"] = 5
    (folder / "run.json").write_text(json.dumps(run))
    assert "seed 0 (the folds shown: seed 5)" in page(folder).text
    said = "- seed 0\n- folds and draws of the chosen configuration: seed 5\n\n## Training"
    assert said in (folder / "MODEL_CARD.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("unpainted")
def test_page_and_card_count_the_classes_that_are_not_calibrated(folder: Path) -> None:
    run = read_json(folder / "run.json")
    classes = len(run["classes"])
    run["calibration"] = {"kind": "platt", "fitted": classes - 2, "a": [1.0] * classes, "b": [0.0] * classes}
    (folder / "run.json").write_text(json.dumps(run))
    said = f"platt per class, fitted out of fold; 2 of {classes} classes could not be fitted"
    assert said in page(folder).text
    assert said in (folder / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_confusions_bins_and_pairs_are_evaluation_jsons(made: Path, parsed: Page) -> None:
    found = read_json(made / "evaluation.json")
    by_size = sorted(found["confusion"], key=lambda row: -(row["tp"] + row["fn"]))[:6]
    counts = [[row["class"], *(f"{row[key]:,}" for key in ("tp", "fp", "fn", "tn"))] for row in by_size]
    assert parsed.tables["Counts of the six largest classes"][1:] == counts
    bins = found["reliability"]
    filled = [f"{count:,}" for count in bins["count"] if count]
    assert [row[1] for row in parsed.tables["Bins that hold a label"][1:]] == filled
    assert f"(ECE) {number(bins['ece'])}" in parsed.text
    pair, count, *_ = parsed.tables["Most frequent pairs"][1]
    names, matrix = found["cooccurrence"]["classes"], found["cooccurrence"]["counts"]
    first, second = (names.index(name) for name in pair.split(" + "))
    assert int(count) == matrix[first][second] == max(m for i, row in enumerate(matrix) for m in row[i + 1 :])
    assert [row["class"] for row in read_csv(made / "cooccurrence.csv")] == names


def test_views_and_studies_are_evaluation_jsons(made: Path, parsed: Page) -> None:
    found = read_json(made / "evaluation.json")
    rows = {row[0]: row[1:] for row in parsed.tables.get("By view", [])[1:]}
    assert set(rows) == set(found["views"])
    for name, part in found["views"].items():
        assert rows[name][0] == f"{part['n']:,}"
        assert rows[name][3] == with_interval(part["figures"]["macro_auc"])
    sexes = {row[0]: row[1:] for row in parsed.tables["By sex"][1:]}
    assert set(sexes) == {"F", "M"}
    assert sexes["F"][3] == with_interval(found["subgroups"]["sex"]["F"]["figures"]["macro_auc"])
    by = {row[0]: row[1:] for row in parsed.tables["Figures by image and by study"]}
    column = by["figure"].index("Hold-out, by study")
    assert by["Macro AUC"][column] == with_interval(found["studies"]["parts"]["holdout"]["figures"]["macro_auc"])
    levels = {row["level"] for row in read_csv(made / "figures.csv")}
    assert levels == {"image", "study (mean)"}


def test_the_data_flow_adds_up(made: Path, parsed: Page) -> None:
    run, rows = read_json(made / "run.json"), dict(map(tuple, parsed.tables["From the dataset to the folds"]))
    count = {name: int(text.split()[0].replace(",", "")) for name, text in rows.items()}
    assert count["Images in"] == count["Images used"] + count["Failed to read, left out"] == run["images"]["in"]
    assert count["Images used"] == count["… in the folds"] + count["… held out"]
    with np.load(made / "predictions.npz") as file:
        assert count["Unknown labels, masked everywhere"] == int((file["labels"] == -1).sum()) > 0
    positives = {row[0]: row[1:] for row in parsed.tables["Positives a fold"]}
    for row in run["split_table"][2:]:
        assert positives[row["class"]] == [f"{value:,}" for value in row.values() if isinstance(value, int)]


@pytest.mark.usefixtures("unpainted")
def test_the_summary_is_three_sentences_of_the_same_figures(made: Path) -> None:
    material, whole = writer.gather(made, resamples=40, seed=0, pool="mean")
    run, parts = material.run, material.parts
    trained, found, trust = material.summary()
    assert whole
    chosen = run["chosen"]
    assert f"chose {chosen['epochs']} epochs and fold {chosen['fold'] + 1}, on validation alone" in trained
    assert f"{run['trainable']['total']:,} trained parameters" in trained
    assert f"macro AUC is {with_interval(parts['holdout']['figures']['macro_auc'])} over" in found
    assert f"{parts['holdout']['classes_defined']} of 35 classes" in found
    assert material.frequent_auc() == pytest.approx(run["metrics"]["holdout"]["frequent_auc"])
    assert f"{sum(row['tier'] == 'excellent' for row in material.rows)} " in trust
    best, worst = ([row["class"] for row in rows] for rows in material.best_and_worst())
    scored = [row for row in material.ranked() if row["auc"]["value"] is not None]
    assert max(row["positives"] for row in scored) < 10, "else they alone are listed"
    known = [row["class"] for row in scored]
    assert best == known[: min(5, -(-len(known) // 2))]
    assert worst == known[::-1][: min(5, len(known) // 2)]
    assert not set(best) & set(worst)


def test_a_class_of_one_positive_is_not_among_the_best_where_others_have_enough() -> None:
    rows = [
        {"class": name, "positives": positives, "auc": {"value": auc}}
        for name, positives, auc in (
            ("lucky", 1, 0.99),
            ("a", 10, 0.9),
            ("b", 50, 0.8),
            ("rare", 9, 0.7),
            ("c", 99, None),
        )
    ]
    best, worst = ReportData.best_and_worst(SimpleNamespace(ranked=lambda: rows))  # type: ignore[arg-type]
    assert [[row["class"] for row in each] for each in (best, worst)] == [["a"], ["b"]]


def test_the_recipe_and_the_making_are_told(made: Path, parsed: Page) -> None:
    run = read_json(made / "run.json")
    rows = {row[0]: row[1:] for row in parsed.tables["Choices"][1:]}
    assert rows["split_by"][:2] == ["group", "image"]
    assert rows["lr"] == ["0.001", "2e-05", "by flag"]
    assert rows["epochs"] == ["4,5,6", "30,50,75,90,100", "by flag"]
    assert "seed" not in rows
    assert "trained the head alone" in parsed.text
    facts = dict(map(tuple, parsed.tables["Facts"]))
    assert facts["cache fingerprint"] == run["cache"]["fingerprint"]
    assert run["toolchain"]["torch"] in facts["versions"]
    assert facts["time"] == duration(run["seconds"], tenths=True)
    assert "Not a medical device" in parsed.text
    assert [row[0] for row in parsed.tables["Training progression, means over folds"][1:]] == ["1", "6"]
    assert "chosen among folds with different validation images" in parsed.text


@pytest.mark.usefixtures("unpainted")
def test_the_grid_is_shown_where_there_was_one(folder: Path, parsed: Page) -> None:
    assert "Configurations, by validation AUC" not in parsed.tables

    def change(run: dict[str, Any]) -> None:
        first = {**run["grid"][0], "lr": 0.1}
        run["grid"] = [first, {**first, "config": 1, "lr": 0.2, "mean_auc": None, "chosen": False}]

    edit(folder, change)
    shown = page(folder)
    head, first, second = shown.tables["Configurations, by validation AUC"]
    counts = [read_info(folder)["grid"][0][f"{name}_classes"] for name in ("head", "medium", "tail")]
    maps = [f"{name} mAP ({n})" for name, n in zip(("head", "medium", "tail"), counts, strict=True)]
    assert sum(counts) > 0
    assert head == ["configuration", "lr", "epochs", "mean AUC", "std", *maps, "time"]
    assert (first[0], first[1], second[1], second[3]) == ("1 (chosen)", "0.1", "0.2", "–")
    assert first in shown.marked

    def earlier(run: dict[str, Any]) -> None:
        run["grid"] = [{k: v for k, v in row.items() if "_map" not in k and "_classes" not in k} for row in run["grid"]]

    edit(folder, earlier)
    head, *_ = page(folder).tables["Configurations, by validation AUC"]
    assert head == ["configuration", "lr", "epochs", "mean AUC", "std", "time"]


# Provenance, names, other inputs.


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize(
    ("provenance", "starts"),
    [("", None), ("phantom images", "Phantom images:"), ("random backbone, x images", "Random backbone, x images:")],
)
def test_the_red_warning_is_there_when_the_figures_mean_nothing(
    folder: Path, provenance: str, starts: str | None
) -> None:
    edit(folder, lambda run: run.update(provenance=provenance, random_weights="random" in provenance))
    parsed = page(folder)
    assert len([a for _, a in parsed.tags if a.get("class") == "warn"]) == (starts is not None)
    assert ("no figure here says anything" in parsed.text) == (starts is not None)
    assert starts is None or starts in parsed.text
    assert re.search(r"\.warn\{color:#a8071a", parsed.source)
    assert ("RANDOM WEIGHTS" in (folder / "MODEL_CARD.md").read_text()) == ("random" in provenance)


EVIL = "</td><script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'too' | *a* `b`"


@pytest.mark.usefixtures("unpainted")
def test_names_are_text_and_never_markup(folder: Path) -> None:
    def change(run: dict[str, Any]) -> None:
        run["cache"]["dataset"]["name"] = run["classes"][0] = run["split_table"][2]["class"] = EVIL
        run["provenance"] = f"{EVIL} images"
        run["cache"]["weights"] = run["device"] = EVIL

    edit(folder, change)
    parsed = page(folder)
    assert len([tag for tag, _ in parsed.tags if tag == "script"]) == 1
    assert not [a for _, a in parsed.tags if "onerror" in a]
    assert parsed.requests() == []
    assert EVIL in [row[0] for row in parsed.tables["All classes"]]
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "<script" not in card.partition("\n---\n")[2]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["$x$", "$\\frac$ of $5$", "50 % _of_ ^all^", "\\alpha", "a" * 300, "心脏肥大"])
def test_names_in_plots_are_no_formulas(made: Path, name: str) -> None:
    """matplotlib reads what stands between two dollars as mathematics, and fails where it is none."""
    text = (made / "evaluation.json").read_text(encoding="utf-8")
    found = json.loads(text.replace('"Normal"', json.dumps(name)))
    assert charts.png(charts.class_intervals(found["per_class"], "auc", "AUC"))
    assert charts.png(charts.curve_plot(found, "roc"))
    (row,) = (row for row in charts.largest(found) if row["class"] == name)
    for data in charts.render(charts.confusion([row])).values():
        assert data


@pytest.mark.usefixtures("unpainted")
def test_a_run_without_a_hold_out(folder: Path) -> None:
    edit_predictions(folder, lambda arrays: arrays.update(fold=np.maximum(arrays["fold"], 0)))

    def change(run: dict[str, Any]) -> None:
        run["images"]["holdout"] = 0
        run.update(per_class=[], finals={}, metrics={**run["metrics"], "holdout": None})

    edit(folder, change)
    # Held-out images have no out-of-fold prediction: here they stand for folds' images.
    edit_predictions(folder, lambda arrays: arrays.update(out_of_fold=np.nan_to_num(arrays["out_of_fold"], nan=0.3)))
    written = writer.write_report(folder, **FEW)
    parsed = Page(written.page.read_text(encoding="utf-8"))
    assert written.whole
    assert "There is no hold-out" in parsed.text
    assert any("hold-out: this run has none" in line for line in written.missing)
    assert parsed.tables["Figures of each part"][0] == ["figure", "Training", "Validation (out of fold)"]
    assert "Classes on validation, out of fold" in parsed.text
    assert "split: validation" in (folder / "MODEL_CARD.md").read_text()


def only(arrays: dict[str, np.ndarray], rows: list[int], classes: slice) -> None:
    for name, values in arrays.items():
        kept = values[:, rows] if name == "out_of_fold" else None
        if name.startswith("holdout_"):
            kept = values
        if name == "classes":
            kept = values[classes]
        kept = values[rows] if kept is None else kept
        arrays[name] = kept[..., classes] if kept.ndim > 1 else kept


def test_one_class_only(folder: Path) -> None:
    rows = list(range(len(np.load(folder / "predictions.npz")["fold"])))
    edit_predictions(folder, lambda arrays: only(arrays, rows, slice(22, 23)))
    edit(folder, lambda run: run.update(classes=run["classes"][22:23], thresholds=run["thresholds"][22:23]))
    parsed = page(folder)
    assert parsed.requests() == []
    assert len(parsed.tables["All classes"]) == 2
    assert "cooccurrence" not in parsed.sections


def test_two_images(folder: Path) -> None:
    fold = np.load(folder / "predictions.npz")["fold"]
    rows = [int(np.flatnonzero(fold == -1)[0]), int(np.flatnonzero(fold == 0)[0])]
    edit_predictions(folder, lambda arrays: only(arrays, rows, slice(None)))
    written = writer.write_report(folder, **FEW)
    parsed = Page(written.page.read_text(encoding="utf-8"))
    assert parsed.tables["Figures of each part"][1][-1] == "1"
    assert "[" not in "".join(row[-1] for row in parsed.tables["Figures of each part"])
    assert any("no intervals" in line for line in written.missing)


@pytest.mark.usefixtures("unpainted")
def test_predictions_with_nan_leave_a_partial_page(folder: Path) -> None:
    def spoil(arrays: dict[str, np.ndarray]) -> None:
        arrays["final"][arrays["fold"] == -1, 0] = np.nan

    edit_predictions(folder, spoil)
    written = writer.write_report(folder, **FEW)
    parsed = Page(written.page.read_text(encoding="utf-8"))
    assert not written.whole
    assert "saved probabilities are NaN" in parsed.text
    assert "Hold-out" not in parsed.tables["Figures of each part"][0]
    assert "out of fold" in parsed.text
    result = cxr("report", folder, "--resamples", 0)
    assert (result.exit_code, result.stdout) == (1, f"{written.page}\n")
    assert "missing: hold-out" in result.stderr


@pytest.mark.usefixtures("unpainted")
def test_predictions_all_nan(folder: Path) -> None:
    edit_predictions(folder, lambda arrays: arrays.update({n: arrays[n] * np.nan for n in ("final", "out_of_fold")}))
    written = writer.write_report(folder, **FEW)
    parsed = Page(written.page.read_text(encoding="utf-8"))
    assert not written.whole
    assert parsed.sections == ["cooccurrence", "shortcuts", "search", "data", "recipe", "made"]
    assert "could not be judged" in parsed.text


@pytest.mark.parametrize("damage", ["gone", "cut", "text", "other"])
@pytest.mark.usefixtures("unpainted")
def test_damaged_predictions_leave_what_run_json_tells(folder: Path, damage: str) -> None:
    path = folder / "predictions.npz"
    {
        "gone": path.unlink,
        "cut": lambda: path.write_bytes(path.read_bytes()[:900]),
        "text": lambda: path.write_text("not an archive"),
        "other": lambda: edit_predictions(folder, lambda arrays: arrays.update(final=arrays["final"][:3])),
    }[damage]()
    (folder / "evaluation.json").write_text("of an earlier report")
    written = writer.write_report(folder, **FEW)
    parsed = Page(written.page.read_text(encoding="utf-8"))
    assert not written.whole
    assert parsed.sections == ["shortcuts", "search", "data", "recipe", "made"]
    assert "every figure of the predictions" in written.missing[0]
    assert "predictions.npz" in parsed.text
    assert not (folder / "evaluation.json").exists(), "figures of an earlier report do not stay"
    assert "## Classes" not in (folder / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize(
    "text", [None, "", "a,b\n1,2\n", "fold,epoch\n0,x\n", "fold,epoch,train_loss\n0,1,0.1\n", "\0"]
)
@pytest.mark.usefixtures("unpainted")
def test_a_missing_or_foreign_history(folder: Path, text: str | None) -> None:
    path = folder / "history.csv"
    path.unlink() if text is None else path.write_text(text)
    written = writer.write_report(folder, **FEW)
    parsed = Page(written.page.read_text(encoding="utf-8"))
    assert not written.whole
    assert "Training progression: " in parsed.text
    assert "history.csv" in parsed.text
    assert "Training progression, means over folds" not in parsed.tables
    assert "Figures of each part" in parsed.tables


@pytest.mark.parametrize(
    ("break_it", "match"),
    [
        (lambda f: (f / "run.json").unlink(), "not a run folder"),
        (lambda f: (f / "run.json").write_text("{"), "not JSON"),
        (lambda f: edit(f, lambda run: [run.pop("recipe"), run.pop("grid")]), "run.json holds no recipe, grid"),
        (lambda f: (f / "run.json").write_text("[]"), "not written by|not a run"),
        (lambda f: (f / "run.json").write_text('{"kind": "other", "schema": 1}'), "not written by"),
    ],
)
def test_what_is_no_run_is_refused(folder: Path, break_it: Callable[[Path], Any], match: str) -> None:
    break_it(folder)
    with pytest.raises(InputError, match=match):
        writer.write_report(folder)
    assert not (folder / "report.html").exists()


def test_an_unknown_schema_is_refused(folder: Path) -> None:
    edit(folder, lambda run: run.update(schema=99, written_by="cxr-fast 9"))
    with pytest.raises(SchemaError, match=r"schema 99 .*cxr-fast 9"):
        writer.write_report(folder)
    result = cxr("report", folder)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.usefixtures("unpainted")
def test_a_page_written_twice_is_the_same(folder: Path) -> None:
    first = writer.write_report(folder, **FEW).page.read_bytes()
    assert writer.write_report(folder, **FEW).page.read_bytes() == first
    assert not [path for path in folder.iterdir() if "partial" in path.name]


@pytest.mark.usefixtures("unpainted")
def test_a_folder_that_cannot_be_written_is_named(folder: Path) -> None:
    (folder / "report.html").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        writer.write_report(folder, **FEW)


@pytest.mark.usefixtures("unpainted")
def test_pool_and_resamples_reach_the_page(folder: Path) -> None:
    result = cxr("report", folder, "--pool", "max", "--resamples", 0)
    assert result.exit_code == 0, result.output
    parsed = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "replaced by the highest" in parsed.text
    assert not re.search(r"0\.\d{3} \[", " ".join(row[-1] for row in parsed.tables["Figures of each part"]))
    assert "In brackets" not in parsed.text


# The model files.


@pytest.mark.usefixtures("unpainted")
def test_page_and_card_show_each_model_file_beside_the_yardstick(folder: Path, toy_model: Path) -> None:
    parity = {
        **model_file.read(toy_model)["parity"],
        "images": 79,
        "flips_per_10000": 24.0,
        "yardstick": {"jpeg_95": {"flips_per_10000": 29.0}, "one_pixel": {"flips_per_10000": 182.0}},
        "margin": {"more": -5.0, "low": -12.34, "high": 2.0},
        "macro_auc_drop": 0.0012,
        "map_drop": None,
    }
    shutil.copy(toy_model, folder / "model.fp32.onnx")
    changed(toy_model, folder / "model.int8.onnx", put("parity", json.dumps(parity)))
    old = {"images": 79, "flips_per_10000": 3.0, "macro_auc_drop": 0.0}  # of an earlier version
    edits = put("parity", json.dumps(old)), put("model_sha256", json.dumps("0" * 64))
    changed(toy_model, folder / "model.fp16.onnx", *edits)
    (folder / "model.broken.onnx").write_bytes(b"no model")
    written = writer.write_report(folder, resamples=0)
    card, page = (path.read_text(encoding="utf-8") for path in (folder / "MODEL_CARD.md", written.page))
    rows = [line for line in card.splitlines() if line.startswith("| model.")]
    assert [row.split(" | ")[0] for row in rows] == ["| model.fp16.onnx", "| model.fp32.onnx", "| model.int8.onnx"]
    assert "79 | 24.0 | 29.0 | 182.0 | -5.0 [-12.3, +2.0] | -0.0012 | " in rows[2]
    assert "of other weights than this run | 79 | 3.0 | " in rows[0]
    assert "+0.0000" in rows[0]
    assert "of other weights" not in rows[1]
    assert 'id="files"' in page
    assert "182.0" in page
    assert any(line.startswith("drift of model.broken.onnx: ") for line in written.missing)
    assert str(folder) not in page + card
    assert written.whole, "a file that is none of ours is no fault of the run"


# The model card.


@pytest.mark.usefixtures("unpainted")
def test_the_card_is_the_hubs(folder: Path) -> None:
    from huggingface_hub import ModelCard

    edit(folder, lambda run: run.update(random_weights=True, provenance="random backbone, phantom images"))
    page(folder)
    text, found = (folder / "MODEL_CARD.md").read_text(encoding="utf-8"), read_json(folder / "evaluation.json")
    card = ModelCard(text)
    assert card.data.license == "other"
    assert {"random-weights", "synthetic-data", "research-only"} <= set(card.data.tags)
    results = {result.metric_name: result for result in card.data.eval_results}
    assert {result.dataset_split for result in results.values()} == {"holdout"}
    assert "random backbone" in results["mAP"].dataset_name
    for key in ("macro_auc", "map", "macro_f1", "label_accuracy"):
        value = found["parts"]["holdout"]["figures"][key]
        assert results[FIGURES[key]].metric_value == pytest.approx(value["value"], abs=1e-6)
        assert f"| {FIGURES[key]} |" in text
        assert f"{with_interval(value)} |" in text
    for row in found["per_class"]:
        assert f"| {row['class']} | {row['positives']:,} | {with_interval(row['auc'])} |" in text
    assert " (RANDOM), 160 x 160 pixels, the last 2 blocks trained" in text
    assert "RANDOM WEIGHTS: THE BACKBONE IS NOT BIOMEDCLIP" in text
    assert "Label traps" not in text, "drawn images have no traps"


@pytest.mark.usefixtures("unpainted")
def test_the_card_of_real_indiana_data_names_the_traps(folder: Path) -> None:
    def change(run: dict[str, Any]) -> None:
        run["cache"]["dataset"].update(synthetic=False, name="indiana")
        run["cache"]["weights"] = "biomedclip"
        run.update(provenance="", random_weights=False)

    edit(folder, change)
    page(folder)
    text = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "license: mit\n" in text
    assert 'base_model: "microsoft/BiomedCLIP' in text
    assert "none of its 4 studies is a fracture" in text
    assert "hypoinflation" in text
    assert "random" not in text.casefold()


# Several runs.


@pytest.fixture
def other(folder: Path, tmp_path: Path) -> Path:
    """A second run on the same images, its predictions pulled towards a half."""
    shutil.copytree(folder, tmp_path / "other")
    random = np.random.default_rng(0)

    def blur(arrays: dict[str, np.ndarray]) -> None:
        for name in ("final", "out_of_fold"):
            noise = random.random(arrays[name].shape).astype(np.float32)
            arrays[name] = (arrays[name] + noise) / 2

    edit_predictions(tmp_path / "other", blur)
    edit(tmp_path / "other", lambda run: run["train"].update(lr=0.5))
    return tmp_path / "other"


@pytest.mark.usefixtures("unpainted")
def test_two_runs_on_one_page(folder: Path, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.html"
    result = cxr("report", folder, other, "--out", out, "--resamples", 40)
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [str(folder / "report.html"), str(other / "report.html"), str(out)]
    parsed, found = Page(out.read_text(encoding="utf-8")), comparison.compare_runs(folder, other, resamples=40)
    assert parsed.requests() == []
    assert parsed.sections == ["beside", "glance", "pair1", "settings"]
    rows = {row[0]: row[1:] for row in parsed.tables["Differences in the figures, other minus run"]}
    for key, title in FIGURES.items():
        one = found["figures"][key]
        assert rows[title][:2] == [number(one["a"]), number(one["b"])]
        assert rows[title][2].replace("−", "-").startswith(f"{one['difference']:+.3f}")
    classes = {row[0]: row for row in parsed.tables["Differences by class, other minus run"]}
    assert set(classes) == {"class", *(row["class"] for row in found["per_class"])}
    side = {row[0]: row[1:] for row in parsed.tables["Figures of each run"]}
    evaluations = [read_json(path / "evaluation.json") for path in (folder, other)]
    shown = [with_interval(each["parts"]["holdout"]["figures"]["macro_auc"]) for each in evaluations]
    assert side["Macro AUC"] == shown
    assert {row[0]: row[1:] for row in parsed.tables["Settings that differ"]}["lr"] == ["0.001", "0.5"]
    assert len([a for _, a in parsed.tags if a.get("class") == "warn"]) == 2


@pytest.mark.usefixtures("unpainted")
def test_runs_that_cannot_be_compared_stand_beside_each_other(folder: Path, other: Path) -> None:
    edit_predictions(other, lambda arrays: arrays.update(labels=1 - np.abs(arrays["labels"])))
    result = cxr("report", folder, other, "--resamples", 40)
    assert result.exit_code == 1
    assert "the comparison of other with run: " in result.stderr
    parsed = Page((folder / "comparison.html").read_text(encoding="utf-8"))
    assert parsed.sections == ["beside", "glance", "settings"]
    assert "The comparison of other with run: " in parsed.text
    assert "paired comparison below" not in parsed.text


@pytest.mark.usefixtures("unpainted")
def test_runs_with_another_hold_out_are_compared_out_of_fold(folder: Path, other: Path, tmp_path: Path) -> None:
    def swap(arrays: dict[str, np.ndarray]) -> None:
        held = arrays["fold"] == -1
        moved = np.flatnonzero(arrays["fold"] == 0)[: held.sum()]
        arrays["out_of_fold"][:, held] = 0.4
        arrays["fold"][held], arrays["fold"][moved] = 0, -1

    edit_predictions(other, swap)
    found = writer.write_all([folder, other], tmp_path / "c.html", **FEW)[-1]
    assert found.whole
    assert "out-of-fold images both scored" in Page(found.page.read_text(encoding="utf-8")).text
    edit_predictions(other, lambda arrays: arrays.update(sha256=np.char.add(arrays["image"], "x")))
    found = writer.write_all([folder, other], tmp_path / "c.html", **FEW)[-1]
    assert not found.whole
    assert "--part" not in found.missing[0]


@pytest.mark.usefixtures("unpainted")
def test_requests_for_several_runs_that_make_no_sense(folder: Path, tmp_path: Path) -> None:
    for words, said in (
        ([folder, folder], "the same run is given twice"),
        ([folder, tmp_path / "none"], "not a run folder"),
        ([folder, "--out", tmp_path / "x.html"], "--out"),
        ([folder, folder.parent, "--resamples", 0], "--resamples"),
        ([], "RUN"),
    ):
        result = cxr("report", *words)
        assert result.exit_code == 2, result.output
        assert said in result.stderr
        assert len(result.stderr.splitlines()) <= 2
    assert not (folder / "report.html").exists(), "all runs are looked at before anything is written"


def test_runs_are_named_as_briefly_as_they_differ() -> None:
    assert writer.name_runs([Path("/a/run"), Path("/b/other")]) == ["run", "other"]
    assert writer.name_runs([Path("/a/run"), Path("/b/run")]) == ["a/run", "b/run"]
    assert writer.name_runs([Path("/x/a/run")]) == ["run"]


def test_a_difference_plot(folder: Path, other: Path) -> None:
    found = comparison.compare_runs(folder, other, resamples=40)
    assert charts.png(charts.differences(found["per_class"], ("a", "b"))).startswith(b"\x89PNG")


# In a browser.


SORTED = """(function () {
  var table = document.querySelector('#classes table.sortable'), head = table.tHead.rows[0].cells;
  function column(k) {
    return Array.prototype.map.call(table.tBodies[0].rows, function (r) { return r.cells[k].textContent; });
  }
  function press(k) { var b = head[k].querySelector('button'); b.focus(); b.click();
    return [document.activeElement === b, head[k].getAttribute('aria-sort'), column(k)]; }
  var images = document.images, narrow = document.documentElement.scrollWidth <= window.innerWidth;
  return {positives: press(7), again: press(7), names: press(0), auc: press(1), narrow: narrow,
    drawn: Array.prototype.every.call(images, function (i) { return i.complete && i.naturalWidth > 0; })};
})()"""


def test_the_page_loads_without_an_error_and_sorts(made: Path, tmp_path: Path) -> None:
    seen = browse(made / "report.html", tmp_path, SORTED)
    assert (seen["wrong"], seen["asked"]) == ([], [])
    found = seen["found"]
    assert found["drawn"]
    assert found["narrow"], "the page itself does not scroll sideways"
    focused, order, positives = found["positives"]
    assert (focused, order) == (True, "descending")
    assert [int(x) for x in positives] == sorted((int(x) for x in positives), reverse=True)
    assert found["again"][1] == "ascending"
    assert [int(x) for x in found["again"][2]] == sorted(int(x) for x in positives)
    assert found["names"][1] == "ascending"
    assert found["names"][2] == sorted(found["names"][2], key=str.casefold)
    aucs = found["auc"][2]
    known = [float(x.split()[0]) for x in aucs if x != "–"]
    assert known == sorted(known, reverse=True)
    assert aucs[len(known) :] == ["–"] * (35 - len(known)), "undefined ones stay last"


def test_the_browser_check_can_fail(made: Path, tmp_path: Path) -> None:
    text, planted = (made / "report.html").read_text(encoding="utf-8"), tmp_path / "planted.html"
    planted.write_text(text.replace("</main>", '<img src="http://127.0.0.1:9/x.png"><script>gone()</script></main>'))
    wrong = "\n".join(browse(planted, tmp_path)["wrong"])
    assert "gone is not defined" in wrong
    assert "refused http://127.0.0.1:9/x.png" in wrong, "the page may ask for nothing"


# Small parts.


def test_report_needs_no_torch(made: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom cxr_fast.report import writer\n"
        "material, _ = writer.gather(Path(sys.argv[1]), resamples=0, seed=0, pool='mean')\n"
        "writer.render_run(material)\n"
        "print([m for m in ('torch', 'open_clip', 'timm', 'onnx', 'h5py') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code, str(made)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_numbers_as_text() -> None:
    assert number(None) == number(float("nan")) == "–"
    assert with_interval({"value": 0.8124, "low": 0.7791, "high": 0.8432}) == "0.812 [0.779, 0.843]"
    assert with_interval({"value": 0.8, "low": None, "high": None}) == "0.800"
    assert with_interval({"value": None, "low": None, "high": None}) == "–"
    assert [duration(s, tenths=True) for s in (1.23, 42.4, 190, 7500)] == ["1.2 s", "42 s", "3 min 10 s", "2 h 05 min"]


def test_every_csv_opens_as_a_table(made: Path) -> None:
    found = evaluation.csv_tables(read_json(made / "evaluation.json"))
    assert set(found) == {name for name in writer.OWN if name.endswith(".csv")} | {"per_class.csv"}
    for name, table in found.items():
        lines = read_csv(made / name)
        assert len(lines) == len(table.rows)
        assert [column for column in lines[0] if column in table.columns] == list(table.columns)
        assert (made / name).read_bytes().count(b"\r\n") == len(lines) + 1, "line ends of every report so far"


def test_lines_about_a_figure_use_its_name() -> None:
    for key, name in FIGURES.items():
        assert writer.name_figures(f"interval of {key}, which") == f"interval of {name}, which"
    assert writer.name_figures("hold-out: this run has none.") == "hold-out: this run has none."
