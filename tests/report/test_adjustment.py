"""Logit adjustment after training, in a report and in a model file: decisions stay, probabilities move."""

from __future__ import annotations

import csv
import dataclasses
import html
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cxr_fast.cli.main import main
from cxr_fast.config import SweepOptions, SweepSpec, TrainSpec
from cxr_fast.errors import InputError
from cxr_fast.export.entries.settings import ExportSpec
from cxr_fast.export.parity import check_images
from cxr_fast.export.variants import export_run
from cxr_fast.inference.predictor import Predictor
from cxr_fast.metrics.calibration import logit, prior_log_odds
from cxr_fast.report.evaluation import evaluate
from cxr_fast.report.writer import write_report
from cxr_fast.training import predictions
from cxr_fast.training.run_folder import read_info, read_run, read_run_info
from cxr_fast.training.sweep import SweepJob

# Of ranking and of decisions at the thresholds; Brier score and calibration error follow the probabilities.
KEPT = ("macro_auc", "map", "label_accuracy", "macro_f1", "micro_f1", "sample_jaccard")
MOVED = ("brier", "ece")


@pytest.mark.parametrize("part", ["holdout", "out_of_fold", "train"])
def test_decisions_stay_and_probabilities_move(part: str, toy_run: Path) -> None:
    raw, moved = read_info(toy_run), read_run_info(toy_run, logit_adjustment=1.0)
    before, after = (predictions.read(toy_run, run).part(part) for run in (raw, moved))
    limits, others = (np.array(run["thresholds"]) for run in (raw, moved))
    np.testing.assert_array_equal(before.probs >= limits, after.probs >= others)
    assert np.abs(before.probs - after.probs).max() > 0.1
    saved = predictions.read(toy_run, raw).arrays
    odds = prior_log_odds(saved["labels"][saved["fold"] >= 0])  # of the films that were trained on
    np.testing.assert_allclose(logit(after.probs), logit(before.probs) - odds, atol=1e-4)


def test_the_figures_of_a_report(toy_run: Path) -> None:
    plain, moved = (evaluate(toy_run, resamples=0, logit_adjustment=tau)["parts"] for tau in (0.0, 1.0))
    for part in plain:
        for key in KEPT:
            one, two = (found[part]["figures"][key]["value"] for found in (plain, moved))
            assert one == pytest.approx(two, abs=1e-9), key
        for key in MOVED:
            assert plain[part]["figures"][key] != moved[part]["figures"][key], key


def test_the_page_says_so_and_a_second_report_takes_it_back(toy_cache: Path, tmp_path: Path) -> None:
    spec = SweepSpec(epochs=(1,), folds=2, train=TrainSpec(lr=1e-3, batch_size=4))
    SweepJob(toy_cache, tmp_path / "run", spec, SweepOptions(device="cpu")).run()
    before = (tmp_path / "run" / "run.json").read_bytes()
    write_report(tmp_path / "run", resamples=0)
    page = tmp_path / "run" / "report.html"
    plain = page.read_text(encoding="utf-8")
    asked = ["report", str(tmp_path / "run"), "--resamples", "0", "--logit-adjustment", "1"]
    found = CliRunner().invoke(main, asked)
    assert found.exit_code == 0, found.output
    moved = html.unescape(page.read_text(encoding="utf-8"))
    for text in (moved, (tmp_path / "run" / "MODEL_CARD.md").read_text(encoding="utf-8")):
        assert "logits adjusted by 1 times each class's log odds in training" in text
        assert "moved with the logit adjustment" in text
    assert "adjusted" not in plain
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    with open(tmp_path / "run" / "per_class.csv", newline="", encoding="utf-8") as file:
        limits = {row["class"]: float(row["threshold"]) for row in csv.DictReader(file)}
    info = read_run_info(tmp_path / "run", logit_adjustment=1.0)
    assert [limits[name] for name in info["classes"]] == pytest.approx(info["thresholds"], abs=1e-4)
    write_report(tmp_path / "run", resamples=0)
    assert page.read_text(encoding="utf-8") == plain


@pytest.mark.parametrize("final", ["best-fold", "ensemble"])
def test_a_model_file_decides_alike(final: str, toy_run: Path, tmp_path: Path) -> None:
    spec = ExportSpec(final=final, count=24)
    (plain,) = export_run(toy_run, dataclasses.replace(spec, out=tmp_path / "plain.onnx"))
    (moved,) = export_run(toy_run, dataclasses.replace(spec, out=tmp_path / "moved.onnx", logit_adjustment=1.0))
    pixels = check_images(read_run(toy_run), None, most=24)[0]
    one, two = (Predictor(found.path, device="cpu") for found in (plain, moved))
    a, b = one.probabilities(pixels), two.probabilities(pixels)
    np.testing.assert_array_equal(a >= one.thresholds, b >= two.thresholds)
    assert np.abs(a - b).max() > 0.1
    np.testing.assert_allclose(two.run(pixels, output="raw_probabilities"), a, atol=1e-6)
    assert moved.info["calibration"]["adjusted"] == 1.0
    assert moved.info["threshold_source"].endswith("moved with the logit adjustment")


def test_the_export_says_so(toy_run: Path, tmp_path: Path) -> None:
    asked = ["export", str(toy_run), "--logit-adjustment", "0.5", "--out", str(tmp_path / "m.onnx")]
    found = CliRunner().invoke(main, [*asked, "--variants", "fp32", "--check", "8"])
    assert found.exit_code == 0, found.output
    assert "logits adjusted by 0.5 times" in found.output


def test_a_calibrated_run_is_refused(toy_cache: Path, tmp_path: Path) -> None:
    train = TrainSpec(lr=1e-3, batch_size=4, train_blocks=0)
    spec = SweepSpec(epochs=(1,), folds=2, calibration="platt", train=train)
    SweepJob(toy_cache, tmp_path / "run", spec, SweepOptions(device="cpu")).run()
    for call in (
        lambda: export_run(tmp_path / "run", ExportSpec(logit_adjustment=1.0)),
        lambda: write_report(tmp_path / "run", resamples=0, logit_adjustment=1.0),
    ):
        with pytest.raises(InputError, match="--logit-adjustment: this run is calibrated"):
            call()
    assert not list((tmp_path / "run").glob("*.onnx"))
    assert not list((tmp_path / "run").glob("*.html"))


def test_several_runs_are_compared_as_they_are(toy_run: Path) -> None:
    found = CliRunner().invoke(main, ["report", str(toy_run), str(toy_run), "--logit-adjustment", "1"])
    assert found.exit_code == 2
    assert "--logit-adjustment" in found.output
