"""`cxrfast evaluate`: every figure of a model file on labelled films, a comparison of two, and a copy set there."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from sklearn import metrics

from cxr_fast.cli.main import main
from cxr_fast.export.entries.settings import ExportSpec
from cxr_fast.export.variants import export_run
from cxr_fast.external.films import RawPredictor
from cxr_fast.inference import model_file
from cxr_fast.inference.predictor import Predictor
from cxr_fast.inference.shift.reference import read_holdout
from cxr_fast.inference.verify import verify
from cxr_fast.metrics import calibration
from cxr_fast.metrics.figures import decisions, per_class
from cxr_fast.metrics.intervals import paired_bootstrap
from cxr_fast.system.tables import read_csv
from tests.helpers.model_edits import changed, put
from tests.helpers.pages import browse
from tests.helpers.unlike import noise, write_run

from .conftest import CLASSES, RENAMED

FAST = ("--resamples", "100", "--device", "cpu", "--threads", "1")


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, words), *FAST], catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(toy_model: Path, films: Path, renamed: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of the toy model, with pictures."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    found = run(toy_model, films, "--out", out, "--map", renamed)
    assert found.exit_code == 1, found.output  # one film is broken
    assert "1 film(s) failed: 1 truncated" in found.output
    assert "29 of 35 classes of the model have no column in site" in found.output
    assert "1 column of site is no class of the model: 'Old fracture'" in found.output
    return out


def arrays(folder: Path, films: Path, model: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels and probabilities (n, 6) of the films that were answered, their groups, and thresholds, read plainly."""
    info = model_file.read(model)
    table, answers = read_csv(films), read_csv(folder / "predictions.csv")
    names = info["labels"][:CLASSES]
    good = [row for row, status in enumerate(answers["status"]) if status == "ok"]
    assert answers["path"] == table["image"]
    columns = [table[RENAMED if c == 0 else name] for c, name in enumerate(names)]
    labels = np.array([[int(column[row] or -1) for column in columns] for row in good])
    probs = np.array([[np.float32(answers[name][row]) for name in names] for row in good])
    return labels, probs, np.array(table["group"])[good], np.array(info["thresholds"][:CLASSES])


def test_every_figure_is_that_of_scikit_learn(folder: Path, films: Path, toy_model: Path) -> None:
    found = json.loads((folder / "evaluation.json").read_text())
    labels, probs, _, limits = arrays(folder, films, toy_model)
    assert found["data"]["failed"] == 1
    assert len(labels) == found["parts"]["external"]["n"]
    for c, row in enumerate(found["per_class"]):
        known = labels[:, c] >= 0
        y, p = labels[known, c], probs[known, c]
        called = p >= limits[c]
        plain = {
            "auc": metrics.roc_auc_score(y, p),
            "ap": metrics.average_precision_score(y, p),
            "f1": metrics.f1_score(y, called),
            "jaccard": metrics.jaccard_score(y, called),
            "sensitivity": metrics.recall_score(y, called),
            "specificity": metrics.recall_score(y, called, pos_label=0),
            "brier": metrics.brier_score_loss(y, p.astype(np.float64)),
        }
        if called.any():
            plain["ppv"] = metrics.precision_score(y, called)
        if not called.all():
            plain["npv"] = metrics.precision_score(y, called, pos_label=0)
        for name, value in plain.items():
            assert row[name]["value"] == pytest.approx(value, abs=1e-9), (row["class"], name)
        assert row["positives"] == (y == 1).sum()
        curve = found["curves"][row["class"]]["roc"]
        assert metrics.auc(*np.array(curve).T) == pytest.approx(plain["auc"])
    figures = found["parts"]["external"]["figures"]
    aucs = [row["auc"]["value"] for row in found["per_class"]]
    assert figures["macro_auc"]["value"] == pytest.approx(np.mean(aucs))
    known = labels >= 0
    assert figures["micro_auc"]["value"] == pytest.approx(metrics.roc_auc_score(labels[known], probs[known]))
    assert figures["label_accuracy"]["value"] == pytest.approx(((probs >= limits) == labels)[known].mean())
    assert set(found["subgroups"]) == {"sex"}
    assert set(found["views"]) == {"LAT", "PA"}
    studies = found["studies"]["parts"]["external"]
    assert studies["n"] == studies["groups"]
    assert found["rarity"]["head"]["classes"]


def test_training_figures_stand_beside_them(folder: Path, toy_model: Path) -> None:
    info = model_file.read(toy_model)
    found = json.loads((folder / "evaluation.json").read_text())
    then = {row["class"]: row for row in info["data"]["per_class"]}
    beside = found["training"]
    assert beside["part"] == "holdout"
    pairs = [(then[row["class"]]["auc"], row["auc"]["value"]) for row in found["per_class"]]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    macro = beside["figures"]["macro_auc"]
    assert macro["classes"] == len(known)
    if known:
        assert macro["training"] == pytest.approx(np.mean([a for a, _ in known]))
        assert macro["difference"] == pytest.approx(np.mean([b - a for a, b in known]))
    # The films lack classes, so figures over all labels as one do not compare.
    assert beside["figures"]["micro_auc"]["training"] == info["data"]["metrics"]["holdout"]["micro_auc"]
    assert beside["figures"]["micro_auc"]["difference"] is None


def test_a_second_run_predicts_nothing(folder: Path, toy_model: Path, films: Path, renamed: str) -> None:
    before = (folder / "predictions.csv").read_bytes()
    pictures = sorted(path.name for path in folder.glob("*.svg"))
    assert len(pictures) == 10
    again = run(toy_model, films, "--out", folder, "--map", renamed)
    assert again.exit_code == 1
    made = json.loads((folder / "predictions.run.json").read_text())
    assert made["reused"] == made["images"] - 1  # a failed film is tried again
    assert (folder / "predictions.csv").read_bytes() == before


def test_the_page_asks_for_nothing_and_names_no_path(folder: Path, films: Path, tmp_path: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert str(films.parent) not in text
    assert str(films.parent) not in (folder / "evaluation.json").read_text()
    assert "out on site" not in text
    seen = browse(folder / "report.html", tmp_path, "document.querySelectorAll('section').length")
    assert seen["wrong"] == []
    assert seen["asked"] == []
    assert seen["found"] >= 8


def test_torch_is_not_imported(toy_model: Path, films: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom cxr_fast.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    print('exit', end.code)\n"
        "assert 'torch' not in sys.modules and 'onnx' not in sys.modules and 'h5py' not in sys.modules"
    )
    words = ["evaluate", toy_model, films, "--out", tmp_path / "o", "--recalibrate", tmp_path / "copy.onnx", *FAST]
    result = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "exit 1" in result.stdout
    assert verify(tmp_path / "copy.onnx", device="cpu", threads=1).ok


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("kind", ["platt", "isotonic", "none"])
def test_a_copy_set_here(toy_model: Path, films: Path, renamed: str, tmp_path: Path, kind: str, folder: Path) -> None:
    copy, out = tmp_path / "made" / "copy.onnx", tmp_path / "out"
    out.mkdir()
    for name in ("predictions.csv", "predictions.csv.resume", "predictions.run.json"):
        (out / name).write_bytes((folder / name).read_bytes())
    words = ("--recalibrate", copy, "--threshold-target", "sensitivity=0.8", "--calibration", kind)
    found = run(toy_model, films, "--out", out, "--map", renamed, *words)
    assert found.exit_code == 1, found.output
    assert "which `cxrfast verify` passes" in found.output
    old, new = model_file.read(toy_model), model_file.read(copy)
    for name in ("model_sha256", "tower_sha256", "labels", "data", "golden" if kind == "none" else "preprocess"):
        assert new[name] == old[name]
    said = new["recalibrated"]
    assert said["data"] == "site"
    assert said["trained_on"] == old["data"]["name"]
    assert old["labels"][5] in said["kept"]
    assert said["kept"][old["labels"][5]].startswith(("1 positive in", "2 positives in"))
    assert said["kept"][old["labels"][20]] == "not in this data"
    assert new["threshold_source"].startswith("sensitivity 0.8 on site, for ")
    # What the copy answers, and calls.
    labels, _, _, _ = arrays(out, films, toy_model)
    one, two = (Predictor(path, device="cpu", threads=1) for path in (toy_model, copy))
    good = list(read_csv(films)["image"])
    answers = np.array([r.probabilities for r in two.stream(good) if r.ok])
    raw = np.array([r.probabilities for r in one.stream(good) if r.ok])
    np.testing.assert_allclose(answers, calibration.apply(new["calibration"], raw), atol=3e-6)
    for c, name in enumerate(old["labels"][:CLASSES]):
        if name in said["classes"]:
            called = answers[labels[:, c] == 1, c] >= new["thresholds"][c]
            assert called.mean() >= 0.8 - 1e-9
        else:
            assert new["thresholds"][c] == old["thresholds"][c]
    assert verify(copy, device="cpu", threads=1).ok
    kept = read_holdout(new, copy)
    assert kept is not None, "daily films are compared with the films it was set on"
    assert kept.films == len(answers)
    record = json.loads((out / "evaluation.json").read_text())["set_here"]
    assert ("become equal" in found.output) == (kind == "isotonic")
    assert "macro_auc" not in record["part"]["figures"]
    assert {row["class"]: row["kept"] for row in record["per_class"]}[old["labels"][5]]
    # A second time, on the copy: its raw probabilities are fitted, and those are the same.
    twice = tmp_path / "twice.onnx"
    again = run(copy, films, "--out", tmp_path / "two", "--map", renamed, *words[2:], "--recalibrate", twice)
    assert again.exit_code == 1, again.output
    assert "The thresholds of this file were set on films called site" in again.output
    np.testing.assert_allclose(model_file.read(twice)["thresholds"], new["thresholds"], atol=1e-5)


@pytest.mark.usefixtures("sketched")
def test_two_models_with_paired_intervals(toy_model: Path, films: Path, renamed: str, tmp_path: Path) -> None:
    info = model_file.read(toy_model)
    other = changed(toy_model, tmp_path / "other.onnx", put("thresholds", json.dumps([0.5] * len(info["labels"]))))
    out = tmp_path / "both"
    found = run(toy_model, other, films, "--out", out, "--map", renamed)
    assert found.exit_code == 1, found.output
    assert "external images" in found.output
    pair = json.loads((out / "comparison.json").read_text())
    labels, probs, groups, limits = arrays(out / "toy", films, toy_model)
    plain = paired_bootstrap(labels, (probs, limits), (probs, 0.5), groups.tolist(), how=_how())
    for name in ("macro_f1", "label_accuracy"):
        each = pair["figures"][name]
        assert (each["low"], each["high"]) == pytest.approx((float(plain[name].low), float(plain[name].high)))
    assert pair["figures"]["macro_auc"]["difference"] == 0
    assert "other minus toy" in (out / "comparison.html").read_text()
    assert (out / "other" / "report.html").is_file()
    seen = browse(out / "comparison.html", tmp_path)
    assert seen["wrong"] == []


def _how() -> Any:
    from cxr_fast.metrics.intervals import Resampling

    return Resampling(resamples=100)


@pytest.mark.usefixtures("sketched")
def test_requests_that_are_refused_in_one_line(toy_model: Path, films: Path, tmp_path: Path) -> None:
    cells = read_csv(films)
    names = list(cells)

    def table(name: str, **columns: list[str] | None) -> Path:
        shown = {**cells, **columns}
        kept = {key: value for key, value in shown.items() if value is not None}
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(kept)
            rows.writerows(zip(*kept.values(), strict=True))
        return tmp_path / name

    count = len(cells["image"])
    classes = names[6 : 5 + CLASSES]
    known = table("no_known.csv", **dict.fromkeys(classes))
    unknown = table("unknown.csv", **dict.fromkeys(classes, [""] * count))
    few = table("few.csv", **dict.fromkeys(classes, ["1"] * 3 + ["0"] * (count - 3)))
    groups = table("groups.csv", group=None)
    copy, a_run = tmp_path / "copy.onnx", tmp_path / "run"
    a_run.mkdir()
    (a_run / "run.json").touch()
    for words, said in (
        ((toy_model, known), "no_known has none of the 35 classes of the model"),
        ((toy_model, unknown), "unknown: no label of the 5 classes that the model has is known"),
        ((toy_model, groups), "lacks the column(s) group"),
        ((toy_model, few, "--recalibrate", copy), "--recalibrate: no class has 10 positives"),
        ((toy_model, films, "--recalibrate", toy_model), "is the model itself"),
        (
            (toy_model, films, "--recalibrate", tmp_path / "copy.int8.onnx"),
            "names the variant int8, and the model is fp32",
        ),
        ((toy_model, films, "--recalibrate", tmp_path / "copy"), "must be the name of a file that ends in .onnx"),
        ((toy_model, films, "--recalibrate", copy, "--threshold-target", "x"), "--threshold-target: 'x' is not f1"),
        ((toy_model, films, "--threshold-target", "f1"), "--threshold-target is for --recalibrate OUT.onnx"),
        ((toy_model, films, "--map", "a"), "--map a: write THEIRS=OURS"),
        ((toy_model, toy_model, toy_model, films), "one or two models can be evaluated at a time"),
        ((toy_model, toy_model, films, "--recalibrate", copy), "--recalibrate writes a copy of one model"),
        ((tmp_path / "absent.onnx", films), "no such model"),
        ((toy_model, films, "--out", films), "is a file; give a folder"),
        ((toy_model, films, "--out", a_run, "--overwrite"), "is a run, whose report would be replaced"),
    ):
        found = run(*words, *(() if "--out" in words else ("--out", tmp_path / "never")))
        assert found.exit_code == 2, (words, found.output)
        error = next(line for line in found.output.splitlines() if line.startswith("error: "))
        assert said in error, found.output
    assert not (tmp_path / "never" / "report.html").exists()
    assert not copy.exists()


def test_thresholds_of_each_image() -> None:
    random = np.random.default_rng(0)
    labels, probs = random.integers(0, 2, (50, 3)), random.random((50, 3)).astype(np.float32)
    each = random.random((50, 3))
    np.testing.assert_array_equal(decisions(probs, each), probs >= each)
    same = np.tile([0.2, 0.5, 0.7], (50, 1))
    one, two = (per_class(labels, probs, limits, list("abc")) for limits in (same, same[0]))
    for a, b in zip(one, two, strict=True):
        assert np.isnan(a.pop("threshold"))
        b.pop("threshold")
        assert a == b


def test_raw_answers_stay_raw_in_a_file_that_gives_unlikeness(toy_run: Path, tmp_path: Path) -> None:
    run = write_run(toy_run, tmp_path / "run", noise(110, 5))
    (one,) = export_run(run, ExportSpec(calibration="platt", count=8))
    own = RawPredictor(one.path, device="cpu", threads=1)
    assert own.gives_unlikeness
    rows, unlikeness = own._rows(noise(3))
    np.testing.assert_array_equal(rows, own.run(noise(3), output="raw_probabilities"))
    assert not np.array_equal(rows, own.run(noise(3)))
    assert unlikeness is not None
    assert unlikeness.shape == (3,)
