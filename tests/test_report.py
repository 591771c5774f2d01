"""One page that needs nothing beside it, and says what run.json says."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cxr_fast import report
from cxr_fast.errors import InputError, SchemaError

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Tags with their attributes, the text, and the tables as lists of rows."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def folder(toy_run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may write into."""
    shutil.copytree(toy_run, tmp_path / "run")
    return tmp_path / "run"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    run = json.loads((folder / "run.json").read_text())
    change(run)
    (folder / "run.json").write_text(json.dumps(run))
    return run


def page(folder: Path) -> Page:
    parsed = Page(report.write(folder).read_text(encoding="utf-8"))
    assert parsed.open == [], "a tag is left open"
    return parsed


def test_the_page_needs_nothing_beside_it(folder: Path) -> None:
    path = report.write(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text
    parsed = page(folder)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "svg"}
    for tag, attributes in parsed.tags:
        assert not any(name.startswith("on") or name == "href" for name in attributes)
        if "src" in attributes:
            assert tag == "img"
            assert (attributes["src"] or "").startswith("data:image/png;base64,")


def test_every_picture_is_one_and_lies_beside_the_page(folder: Path) -> None:
    pictures = [attributes for tag, attributes in page(folder).tags if tag == "img"]
    assert [p["alt"] for p in pictures] == ["epoch search", "training", "AUC a class"]
    names = ["epoch_search_plot.png", "training_plot.png", "per_class_plot.png"]
    for picture, name in zip(pictures, names, strict=True):
        data = base64.b64decode((picture["src"] or "").partition(",")[2])
        assert data == (folder / name).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert image.width > 400


def test_the_figures_are_run_jsons(folder: Path) -> None:
    run = json.loads((folder / "run.json").read_text())
    tables = page(folder).tables
    figures = {row[0]: row[1:] for row in tables[0]}
    assert figures["figure"] == ["out of fold", "hold-out", "out of fold, at 0.5", "hold-out, at 0.5"]
    both = run["metrics"]["out_of_fold"], run["metrics"]["holdout"]
    for key, name in report.PUBLISHED.items():
        assert figures[name] == [shown(f[key]) for f in both] + [shown(f["at_0.5"][key]) for f in both]
    assert figures["Classes with an AUC"] == [f"{f['classes_defined']} of 35" for f in both]
    assert figures["Images"] == [str(f["n"]) for f in both]
    assert len(report.PUBLISHED) == 6
    folds = [row[3:] for row in tables[1][1:4]]
    assert folds == [[shown(fold[f"auc_{b}"]) for b in (4, 5, 6)] for fold in run["folds"]]
    assert tables[1][4][3:] == [shown(b["mean_auc"]) for b in run["budgets"]]
    classes = {row[0]: row[1:] for row in tables[2][1:]}
    assert classes.keys() == set(run["classes"])
    for row in run["per_class"]:
        keys = ("auc", "ap", "jaccard", "f1", "threshold")
        assert classes[row["class"]] == [*(shown(row[k]) for k in keys), str(row["positives"]), row["tier"]]
    known = [float(row[1]) for row in tables[2][1:] if row[1] != "–"]
    assert known == sorted(known, reverse=True)
    assert [row[1] for row in tables[2][1 + len(known) :]] == ["–"] * (35 - len(known)), "undefined ones stand last"


def shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def test_the_summary_says_what_was_chosen(folder: Path) -> None:
    run, text = json.loads((folder / "run.json").read_text()), page(folder).text
    chosen = run["chosen"]
    assert f"chose {chosen['epochs']} epochs and fold {chosen['fold'] + 1}, on validation alone" in text
    assert f"{run['trainable']['total']:,} trained parameters" in text
    assert "Not a medical device" in text
    assert run["cache"]["fingerprint"][:16] in text
    assert f"{run['images']['in']} in, 1 failed, {run['images']['used']} used" in text


@pytest.mark.parametrize(
    ("provenance", "starts"),
    [("", None), ("phantom images", "Phantom images:"), ("random backbone, x images", "Random backbone, x images:")],
)
def test_the_warning_is_there_when_the_figures_mean_nothing(folder: Path, provenance: str, starts: str | None) -> None:
    edit(folder, lambda run: run.update(provenance=provenance))
    parsed = page(folder)
    warnings = [attributes for _, attributes in parsed.tags if attributes.get("class") == "warn"]
    assert len(warnings) == (starts is not None)
    assert ("no figure on this page says anything" in parsed.text) == (starts is not None)
    assert starts is None or starts in parsed.text


EVIL = "</td><script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'too'"


def test_names_are_text_and_never_markup(folder: Path) -> None:
    def change(run: dict[str, Any]) -> None:
        run["cache"]["dataset"]["name"] = run["classes"][0] = EVIL
        run["per_class"][0]["class"] = run["split_table"][2]["class"] = EVIL
        run["provenance"] = f"{EVIL} images"
        run["cache"]["weights"] = EVIL
        run["device"] = EVIL

    edit(folder, change)
    parsed = page(folder)
    assert not [tag for tag, attributes in parsed.tags if tag == "script" or "onerror" in attributes]
    assert parsed.text.count("<script>alert(1)</script>") >= 5
    assert EVIL in [row[0] for row in parsed.tables[2]]


@pytest.mark.parametrize("name", ["$x$", "$\\frac$ of $5$", "50 % _of_ ^all^", "\\alpha", "a" * 300])
def test_names_in_plots_are_no_formulas(folder: Path, name: str) -> None:
    """matplotlib reads what stands between two dollars as mathematics, and fails where it is none."""

    def change(run: dict[str, Any]) -> None:
        defined = next(row for row in run["per_class"] if row["auc"] is not None)
        defined["class"] = name

    edit(folder, change)
    assert name in [row[0] for row in page(folder).tables[2]]


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_names_may_be_of_any_script(folder: Path) -> None:
    edit(folder, lambda run: [row.update({"class": f"心脏肥大 {i}"}) for i, row in enumerate(run["per_class"])])
    assert "心脏肥大 0" in [row[0] for row in page(folder).tables[2]]


def test_a_run_without_a_hold_out(folder: Path) -> None:
    edit(folder, lambda run: run.update(per_class=[], metrics={**run["metrics"], "holdout": None}))
    parsed = page(folder)
    assert "There is no hold-out." in parsed.text
    assert parsed.tables[0][0] == ["figure", "out of fold", "out of fold, at 0.5"]
    assert not (folder / "per_class_plot.png").exists()


def test_a_page_written_twice_is_the_same(folder: Path) -> None:
    first = report.write(folder).read_bytes()
    assert report.write(folder).read_bytes() == first
    assert not [path for path in folder.iterdir() if "partial" in path.name]


@pytest.mark.parametrize(
    ("break_it", "match"),
    [
        (lambda f: (f / "run.json").unlink(), "not a run folder"),
        (lambda f: (f / "history.csv").unlink(), "history.csv is missing"),
        (lambda f: (f / "run.json").write_text("{"), "not JSON"),
        (lambda f: (f / "run.json").write_text("[]"), "not written by|not a run"),
        (lambda f: (f / "run.json").write_text('{"kind": "other", "schema": 1}'), "not written by"),
    ],
)
def test_what_is_no_run_is_refused(folder: Path, break_it: Callable[[Path], Any], match: str) -> None:
    break_it(folder)
    with pytest.raises(InputError, match=match):
        report.write(folder)
    assert not (folder / "report.html").exists()


def test_an_unknown_schema_is_refused(folder: Path) -> None:
    edit(folder, lambda run: run.update(schema=99, written_by="cxr-fast 9"))
    with pytest.raises(SchemaError, match=r"schema 99 .*cxr-fast 9"):
        report.write(folder)
    with pytest.raises(InputError, match="not a run folder"):
        report.write(folder / "nowhere")


def test_a_folder_that_cannot_be_written_is_named(folder: Path) -> None:
    (folder / "report.html").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        report.write(folder)
