"""The section in a browser: the slider says what evaluation.json does, and the page asks for nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cxr_fast.report import writer
from tests.helpers.pages import Page, browse

# Every class at its own threshold, then one class at every point; then the button.
MOVED = """(function () {
  var part = document.getElementById("thresholds"), select = part.querySelector("select");
  var range = part.querySelector("input"), row = part.querySelector("tbody tr"), own = {}, moved = [];
  function texts() { return Array.prototype.map.call(row.cells, function (cell) { return cell.textContent; }); }
  Array.prototype.forEach.call(select.options, function (option, place) {
    select.selectedIndex = place;
    select.dispatchEvent(new Event("change"));
    own[option.text] = texts();
  });
  select.selectedIndex = 0;
  select.dispatchEvent(new Event("change"));
  for (var place = 0; place <= Number(range.max); place++) {
    range.value = place;
    range.dispatchEvent(new Event("input"));
    moved.push(texts());
  }
  part.querySelector("button").click();
  return {hidden: part.hidden, own: own, moved: moved, back: texts(),
    narrow: document.documentElement.scrollWidth <= document.documentElement.clientWidth};
})()"""


@pytest.fixture(scope="module")
def made(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run with its report."""
    folder = tmp_path_factory.mktemp("made") / "run"
    shutil.copytree(toy_run, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    writer.write_report(folder, resamples=0)
    return folder


def test_the_slider_shows_the_counts_of_evaluation_json(made: Path, tmp_path: Path) -> None:
    seen = browse(made / "report.html", tmp_path, MOVED)
    assert (seen["wrong"], seen["asked"]) == ([], [])
    found, evaluation = seen["found"], json.loads((made / "evaluation.json").read_text("utf-8"))
    assert found["narrow"]
    assert found["hidden"] is False
    both = {row["class"]: row for row in evaluation["per_class"] if row["auc"]["value"] is not None}
    assert list(found["own"]) == list(both)
    for name, (limit, *figures) in found["own"].items():
        assert float(limit.removesuffix(" (model file)")) == float(f"{both[name]['threshold']:.4g}")
        assert limit.endswith(" (model file)")
        for key, text in zip(("sensitivity", "specificity", "ppv", "npv"), figures, strict=False):
            value = both[name][key]["value"]
            assert text == ("–" if value is None else text)
            assert value is None or abs(float(text) - value) <= 0.0005 + 1e-9
    first = next(iter(both))
    points = evaluation["operating_points"][first]
    assert len(found["moved"]) == len(points["points"])
    for (limit, *told), (x, tp, fp) in zip(found["moved"], points["points"], strict=True):
        fn, tn = points["positives"] - tp, points["negatives"] - fp
        assert (limit == "above all") == (x is None)
        pairs = ((tp, tp + fn), (tn, tn + fp), (tp, tp + fp), (tn, tn + fn))
        for text, (count, of) in zip(told, pairs, strict=False):
            assert text == "–" if not of else abs(float(text) - count / of) <= 0.0005 + 1e-9
        assert told[4:] == [str(n) for n in (tp, fp, fn, tn)]
    assert found["back"] == found["own"][first]


def test_the_page_is_complete_without_a_script(made: Path) -> None:
    page = Page((made / "report.html").read_text(encoding="utf-8"))
    (part,) = [attributes for tag, attributes in page.tags if attributes.get("id") == "thresholds"]
    assert "hidden" in part
    assert "glance" in page.sections


def test_a_class_may_be_called_anything(made: Path, tmp_path: Path) -> None:
    """The name of a class cannot end the script that holds it."""
    run = shutil.copytree(made, tmp_path / "run")
    text = (run / "run.json").read_text("utf-8")
    name = json.loads(text)["classes"][0]
    odd = "</script><b>'\"&amp;"
    (run / "run.json").write_text(text.replace(json.dumps(name), json.dumps(odd)), encoding="utf-8")
    page = writer.write_report(run, resamples=0).page
    assert odd not in page.read_text("utf-8")
    Page(page.read_text("utf-8"))
    seen = browse(page, tmp_path, MOVED)
    assert seen["wrong"] == []
    assert not seen["found"]["own"] or odd in seen["found"]["own"] or name not in seen["found"]["own"]


def test_csv_tables_hold_the_same(made: Path) -> None:
    found = json.loads((made / "evaluation.json").read_text("utf-8"))
    lines = (made / "operating_points.csv").read_text("utf-8").splitlines()
    assert lines[0] == "class,threshold,true_positives,false_positives,false_negatives,true_negatives"
    assert len(lines) == 1 + sum(len(each["points"]) for each in found["operating_points"].values())
    pairs = (made / "mistaken.csv").read_text("utf-8").splitlines() if (made / "mistaken.csv").exists() else ["head"]
    assert len(pairs) - 1 == sum(count > 0 for row in found["mistaken"]["counts"] for count in row)
