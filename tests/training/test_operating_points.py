"""Thresholds and calibration chosen after a sweep are those that a sweep asked for them would have chosen."""

from __future__ import annotations

import csv
import dataclasses
import html
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.cli.main import main
from cxr_fast.config import SweepOptions, SweepSpec, TrainSpec, parse_target
from cxr_fast.errors import InputError
from cxr_fast.export.entries.settings import ExportSpec
from cxr_fast.export.parity import check_images
from cxr_fast.export.variants import export_run
from cxr_fast.inference import model_file
from cxr_fast.inference.predictor import Predictor
from cxr_fast.metrics import figures
from cxr_fast.metrics.thresholds import best_f1_thresholds, predictive_values, thresholds_for
from cxr_fast.report.evaluation import evaluate
from cxr_fast.report.writer import write_report
from cxr_fast.training import operating_points
from cxr_fast.training.operating_points import OperatingPoint, choose_thresholds, describe_target, read_target
from cxr_fast.training.run_folder import read_info, read_run, read_run_info
from cxr_fast.training.sweep import SweepJob
from tests.helpers import made
from tests.helpers.runs import arrays

pytestmark = pytest.mark.usefixtures("sketched")
TRAIN = TrainSpec(lr=1e-3, batch_size=4, train_blocks=0)
SPEC = SweepSpec(epochs=(2, 3), folds=2, train=TRAIN, retrain_head="balanced")
ON_CPU = SweepOptions(device="cpu")
# What of run.json follows from the operating point.
FOLLOWS = ("thresholds", "calibration", "decisions", "finals", "metrics", "per_class")


def sweep(cache: Path, out: Path, **changes: Any) -> Path:
    SweepJob(cache, out, dataclasses.replace(SPEC, **changes), ON_CPU).run()
    return out


@pytest.fixture(scope="module")
def plain(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep(toy_cache, tmp_path_factory.mktemp("points") / "plain")


def targets(folder: Path, rows: dict[str, str]) -> str:
    path = folder / "targets.csv"
    lines = [["class", "target"], *([name, target] for name, target in rows.items())]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    return str(path)


def without_source(info: Any) -> Any:
    """The text of `threshold_source` aside, which says that it was chosen later."""
    if isinstance(info, dict):
        return {key: without_source(value) for key, value in info.items() if key != "threshold_source"}
    return info


@pytest.mark.parametrize(("kind", "final"), [("none", "best-fold"), ("platt", "retrained"), ("isotonic", "ensemble")])
def test_it_is_what_the_sweep_would_have_chosen(
    kind: Any, final: Any, plain: Path, toy_cache: Path, tmp_path: Path
) -> None:
    asked = sweep(toy_cache, tmp_path / "run", threshold_target="sensitivity=0.9", calibration=kind, final=final)
    point = OperatingPoint(threshold_target="sensitivity=0.9", calibration=kind)
    later, now = read_run_info(plain, final, point=point), read_info(asked)
    for key in FOLLOWS:
        assert without_source(later[key]) == without_source(now[key]), key
    assert later["threshold_source"] == f"{now['threshold_source']}; chosen after the sweep"
    assert later["thresholds"] != read_run_info(plain, final)["thresholds"]


def test_a_file_of_targets_in_a_sweep_and_after_it(plain: Path, toy_cache: Path, tmp_path: Path) -> None:
    classes = read_info(plain)["classes"]
    path = targets(tmp_path, {classes[0]: "sensitivity=1", classes[1]: "specificity=0.8"})
    asked = sweep(toy_cache, tmp_path / "run", threshold_target=read_target(path))
    later = read_run_info(plain, point=OperatingPoint(threshold_target=path))
    for key in FOLLOWS:
        assert without_source(later[key]) == without_source(read_info(asked)[key]), key
    assert (
        f"sensitivity 1 for {classes[0]}; specificity 0.8 for {classes[1]}; F1 for all others"
        in (later["threshold_source"])
    )
    others = [c for c in range(len(classes)) if c > 1]
    assert [later["thresholds"][c] for c in others] == [read_info(plain)["thresholds"][c] for c in others]


def test_asked_for_what_it_has_a_run_stays_as_it_is(plain: Path) -> None:
    point = OperatingPoint(threshold_target="f1", calibration="none")
    for key in FOLLOWS:
        assert without_source(read_run_info(plain, point=point)[key]) == without_source(read_info(plain)[key]), key


def test_page_card_tables_and_model_file_say_the_same(plain: Path, tmp_path: Path) -> None:
    flags = ["--threshold-target", "sensitivity=0.9", "--calibration", "platt"]
    before = (plain / "run.json").read_bytes()
    found = CliRunner().invoke(main, ["report", str(plain), "--resamples", "0", *flags])
    assert found.exit_code == 0, found.output
    out = tmp_path / "m.onnx"
    asked = ["export", str(plain), "--variants", "fp32", "--check", "8", "--out", str(out), *flags]
    exported = CliRunner().invoke(main, asked)
    assert exported.exit_code == 0, exported.output
    assert "sensitivity 0.9 on out-of-fold predictions" in exported.output
    info = model_file.read(out)
    said = "sensitivity 0.9 on out-of-fold predictions; 0.5 where a class had no positive; chosen after the sweep"
    assert info["threshold_source"] == said
    assert info["calibration"]["kind"] == "platt"
    with open(plain / "per_class.csv", newline="", encoding="utf-8") as file:
        shown = {row["class"]: float(row["threshold"]) for row in csv.DictReader(file)}
    assert [shown[name] for name in info["labels"]] == info["thresholds"]
    for name in ("report.html", "MODEL_CARD.md"):
        text = html.unescape((plain / name).read_text(encoding="utf-8"))
        assert said in text, name
        assert "platt per class, fitted out of fold" in text, name
    assert (plain / "run.json").read_bytes() == before
    CliRunner().invoke(main, ["report", str(plain), "--resamples", "0"])
    assert "chosen after the sweep" not in (plain / "report.html").read_text(encoding="utf-8")


def test_figures_in_a_file_are_those_at_its_thresholds(plain: Path, tmp_path: Path) -> None:
    spec = ExportSpec(threshold_target="specificity=0.9", final="ensemble", out=tmp_path / "m.onnx", count=8)
    (found,) = export_run(plain, spec)
    saved, limits = arrays(plain), np.array(found.info["thresholds"])
    held = saved["fold"] < 0
    called = figures.decisions(saved["holdout_ensemble"], limits)
    table = figures.counts(saved["labels"][held], called)
    want = figures.macro(table.specificity())[0]
    assert found.info["data"]["metrics"]["holdout"]["macro_specificity"] == pytest.approx(want)


def test_it_goes_with_the_other_flags(plain: Path) -> None:
    point = OperatingPoint(threshold_target="sensitivity=0.9")
    plainly = read_run_info(plain, point=point)
    moved = read_run_info(plain, logit_adjustment=1.0, point=point)
    assert moved["threshold_source"] == f"{plainly['threshold_source']}; moved with the logit adjustment"
    assert moved["thresholds"] != plainly["thresholds"]
    both = read_run_info(plain, tta="flip", point=point)
    assert both["thresholds"] == plainly["thresholds"]
    assert both["threshold_source"].endswith("; found on the plain view, used on both views")
    with pytest.raises(InputError, match="--logit-adjustment does not go with --calibration platt"):
        read_run_info(plain, logit_adjustment=1.0, point=OperatingPoint(calibration="platt"))


def test_a_calibrated_run_can_be_taken_back(toy_cache: Path, plain: Path, tmp_path: Path) -> None:
    run = sweep(toy_cache, tmp_path / "run", calibration="isotonic")
    point = OperatingPoint(calibration="none")
    for key in FOLLOWS:
        assert without_source(read_run_info(run, point=point)[key]) == without_source(read_info(plain)[key]), key
    assert read_run_info(run, logit_adjustment=1.0, point=point)["calibration"]["adjusted"] == 1.0
    kept = read_run_info(run, point=OperatingPoint(threshold_target="sensitivity=0.9"))
    assert kept["calibration"] == read_info(run)["calibration"], "no other calibration was asked for"


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"Nonsense": "f1"}, "'Nonsense' is not a class of this run"),
        ({"class 0": "sens=2"}, "targets.csv, class 'class 0': 'sens=2' is not f1, sensitivity=X or specificity=X"),
        ({"class 0": "sensitivity=0"}, "'sensitivity=0' is not f1"),
        ({"class 0": '{"class 1": "f1"}'}, "is not f1"),
        ({"class 3": "sensitivity=0.9"}, "class 'class 3' has no positive out of fold, so no threshold reaches sens"),
        ({"class 3": "f1"}, "class 'class 3' has no positive out of fold, so no threshold reaches F1"),
    ],
)
def test_a_bad_file_of_targets_is_one_line(rows: dict[str, str], said: str, tmp_path: Path) -> None:
    found = made.arrays()
    found["labels"][:, 3] = 0
    run = made.write(tmp_path / "run", found, finals={}, metrics={})
    with pytest.raises(InputError) as caught:
        read_run_info(run, point=OperatingPoint(threshold_target=targets(tmp_path, rows)))
    assert said in str(caught.value)
    assert str(caught.value).startswith("--threshold-target: ")
    assert "\n" not in str(caught.value)


def test_a_target_that_no_class_reaches_and_one_that_some_do(tmp_path: Path) -> None:
    found = made.arrays()
    found["labels"][:, 3] = 0
    run = made.write(tmp_path / "run", found, finals={}, metrics={})
    info = read_run_info(run, point=OperatingPoint(threshold_target="sensitivity=0.9"))
    assert info["thresholds"][3] == 0.5
    found["labels"][:] = 0
    run = made.write(tmp_path / "run", found, finals={}, metrics={})
    with pytest.raises(InputError, match=r"no class has a positive out of fold: no threshold reaches sensitivity 0\.9"):
        read_run_info(run, point=OperatingPoint(threshold_target="sensitivity=0.9"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sensitivity=1.5", "'sensitivity=1.5' is not f1"),
        ("no.csv", "no.csv: No such file"),
        ("twice.csv", "names class 'A' twice"),
        ("columns.csv", "lacks the column(s) target"),
        ("empty.csv", "is empty"),
    ],
)
def test_a_bad_target_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "twice.csv").write_text("class,target\nA,f1\nA,f1\n", encoding="utf-8")
    (tmp_path / "columns.csv").write_text("class,goal\nA,f1\n", encoding="utf-8")
    (tmp_path / "empty.csv").write_text("", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_target(str(tmp_path / text) if text.endswith(".csv") else text)
    assert str(caught.value).startswith("--threshold-target: ")
    assert said in str(caught.value)


def test_a_sweep_says_so_before_it_trains(toy_cache: Path, tmp_path: Path) -> None:
    path = targets(tmp_path, {"Nonsense": "f1"})
    asked = ["sweep", str(toy_cache), "--out", str(tmp_path / "run"), "--threshold-target", path, "--folds", "2"]
    found = CliRunner().invoke(main, asked)
    assert found.exit_code == 2
    assert "'Nonsense' is not a class of this run" in found.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", [["--threshold-target", "f1"], ["--calibration", "none"]])
def test_a_comparison_refuses_it_by_name(flag: list[str], plain: Path) -> None:
    found = CliRunner().invoke(main, ["report", str(plain), str(plain), *flag])
    assert found.exit_code == 2
    assert f"{flag[0]}: of one run" in found.output


def test_another_calibration_is_refused() -> None:
    with pytest.raises(InputError, match="--calibration: 'beta' is not none, platt, isotonic"):
        OperatingPoint(calibration="beta")


# ------------------------------------------------------------------------------------------------ choosing


@given(data=st.data())
def test_classes_are_chosen_one_by_one(data: st.DataObject) -> None:
    """The slow twin: each class alone, by the function of its goal."""
    random = np.random.default_rng(data.draw(st.integers(0, 999)))
    labels, probs = random.integers(0, 2, (30, 3)).astype(np.int8), random.random((30, 3)).astype(np.float32)
    labels[:2] = [[1], [0]]
    goals = data.draw(st.lists(st.sampled_from(["f1", "sensitivity=0.9", "specificity=0.7"]), min_size=3, max_size=3))
    found, text = choose_thresholds(labels, probs, json.dumps(dict(zip("ABC", goals, strict=True))), list("ABC"))
    for c, goal in enumerate(goals):
        one = labels[:, c : c + 1], probs[:, c : c + 1]
        name, _, value = goal.partition("=")
        want = best_f1_thresholds(*one) if goal == "f1" else thresholds_for(*one, name, float(value))  # type: ignore[arg-type]
        assert found[c] == want[0]
    assert text.endswith("no positive or no negative") or len(set(goals)) == 1


@pytest.mark.parametrize("text", ["", "F1", "{", "[]", '{"A": 3}', '{"": "f1"}', '{"A": "{}"}', "sensitivity=nan"])
def test_what_is_no_target(text: str) -> None:
    assert parse_target(text) is None
    with pytest.raises(InputError, match=r"threshold_target|--threshold-target"):
        SweepSpec(threshold_target=text)


def test_a_target_in_words() -> None:
    assert describe_target("f1") == "F1"
    assert describe_target("sensitivity=0.95") == "sensitivity 0.95"
    text = json.dumps({"A": "sensitivity=0.9", "B": "f1", "C": "sensitivity=0.9"})
    assert describe_target(text) == "sensitivity 0.9 for A, C; F1 for all others"


# ------------------------------------------------------------------------------------- pooled and mean of folds


def test_pooled_and_mean_of_folds_are_in_run_and_report(plain: Path) -> None:
    run, saved = read_info(plain), arrays(plain)
    found, chosen = run["out_of_fold_auc"], next(b for b in run["budgets"] if b["chosen"])
    assert found["mean_of_folds"] == pytest.approx(chosen["mean_auc"], abs=1e-12)
    assert found["pooled"] == run["metrics"]["out_of_fold"]["macro_auc"]
    assert found["differ"] == (abs(found["pooled"] - found["mean_of_folds"]) > 0.03)
    assert evaluate(plain, resamples=0)["out_of_fold_auc"] == found
    assert len(operating_points.fold_aucs(saved["labels"], saved["fold"], saved["out_of_fold"][0])) == 2


def test_folds_on_two_scales_are_warned_of(tmp_path: Path) -> None:
    """Each fold ranks alike; pooled, the second fold's scores lie above the first's."""
    found = made.arrays()
    found["out_of_fold"] = np.where(
        (found["fold"] > 0)[:, None], found["out_of_fold"] / 2 + 0.5, found["out_of_fold"] / 2
    )
    found["out_of_fold"] = found["out_of_fold"].astype(np.float32)
    both = evaluate(made.write(tmp_path / "run", found), resamples=0)["out_of_fold_auc"]
    assert both["differ"]
    assert both["mean_of_folds"] - both["pooled"] > 0.03
    text = operating_points.describe_two_means(both)
    assert f"{both['pooled']:.3f} pooled over all folds, {both['mean_of_folds']:.3f} as the mean of the folds" in text
    assert "WARNING: they differ by more than 0.03" in text
    alike = evaluate(made.write(tmp_path / "alike"), resamples=0)["out_of_fold_auc"]
    assert "WARNING" not in operating_points.describe_two_means({**alike, "differ": False})


# ------------------------------------------------------------------------------------- tables that people open


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_predictions_csv_is_what_the_model_file_says(plain: Path, tmp_path: Path) -> None:
    """A film of the hold-out, asked of the exported file; thresholds and calibration are those of the report."""
    named = {"threshold_target": "sensitivity=0.9", "calibration": "platt"}
    write_report(plain, resamples=0, point=OperatingPoint(**named))
    (found,) = export_run(plain, ExportSpec(out=tmp_path / "m.onnx", count=8, **named))
    run, rows = read_run(plain), read_table(plain / "predictions.csv")
    pixels, kept, saved = check_images(run, None, most=8)
    predictor = Predictor(found.path, device="cpu")
    held = [i for i in range(len(kept)) if saved["fold"][kept[i]] < 0]
    assert held
    for i in held:
        row, probs = rows[kept[i]], predictor.probabilities(pixels[i : i + 1])[0]
        assert (row["image"], row["part"], row["fold"]) == (saved["image"][kept[i]], "holdout", "")
        for c, name in enumerate(found.info["labels"]):
            p = float(row[f"{name}_probability"])
            assert p == pytest.approx(float(probs[c]), abs=2e-3)  # the sweep's from float16 activations
            assert row[f"{name}_decision"] == str(int(p >= found.info["thresholds"][c]))
    assert len(rows) == len(saved["fold"])


def test_parquet_holds_the_same(plain: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write_report(plain, resamples=0)
    table = parquet.read_table(plain / "predictions.parquet").to_pydict()
    for i, row in enumerate(read_table(plain / "predictions.csv")):
        for name, text in row.items():
            value = table[name][i]
            assert ("" if value is None else text if isinstance(value, float) else str(value)) == text
            assert not isinstance(value, float) or np.float32(text) == np.float32(value)


def test_a_run_says_its_classes(plain: Path) -> None:
    assert arrays(plain)["classes"].tolist() == read_info(plain)["classes"]
    assert read_info(plain)["validated_in"] == "float32"


@pytest.mark.parametrize("text", ["0.02", "file"])
def test_values_at_a_stated_prevalence(text: str, plain: Path, tmp_path: Path) -> None:
    classes = read_info(plain)["classes"]
    shares = dict.fromkeys(classes, 0.02)
    if text == "file":
        shares = {classes[0]: 0.3}
        text = str(tmp_path / "shares.csv")
        Path(text).write_text(f"class,prevalence\n{classes[0]},0.3\n", encoding="utf-8")
    found = CliRunner().invoke(main, ["report", str(plain), "--resamples", "0", "--prevalence", text])
    assert found.exit_code == 0, found.output
    for row in read_table(plain / "per_class.csv"):
        share = shares.get(row["class"], math.nan)
        measured = [float(row[name] or "nan") for name in ("sensitivity", "specificity")]
        want = predictive_values(*measured, share)
        got = [float(row[f"{name}_at_stated_prevalence"] or "nan") for name in ("ppv", "npv")]
        np.testing.assert_allclose(got, want)
        assert row["stated_prevalence"] == ("" if math.isnan(share) else str(share))
    page = html.unescape((plain / "report.html").read_text(encoding="utf-8"))
    assert "PPV at that prevalence" in page
    write_report(plain, resamples=0)
    assert "stated_prevalence" not in read_table(plain / "per_class.csv")[0]


@pytest.mark.parametrize("text", ["0", "1", "two", "-0.1", "nan", "no.csv", "unknown.csv", "bad.csv"])
def test_a_bad_prevalence_is_one_line(text: str, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "unknown.csv").write_text("class,prevalence\nNonsense,0.1\n", encoding="utf-8")
    name = read_info(plain)["classes"][0]
    (tmp_path / "bad.csv").write_text(f"class,prevalence\n{name},2\n", encoding="utf-8")
    given = str(tmp_path / text) if text.endswith(".csv") else text
    found = CliRunner().invoke(main, ["report", str(plain), "--resamples", "0", f"--prevalence={given}"])
    assert found.exit_code == 2
    assert found.output.startswith("error: --prevalence: ")
    assert found.output.count("\n") == 1


def test_training_in_bfloat16_leaves_one_figure(toy_cache: Path, tmp_path: Path) -> None:
    """The AUC of a fold at a budget: history.csv, folds.csv and the saved predictions, to the last digit."""
    train = TrainSpec(lr=1e-3, batch_size=4, precision="bfloat16")
    run = sweep(toy_cache, tmp_path / "run", train=train, retrain_head="none")
    history = {(row["fold"], row["epoch"]): row["valid_auc"] for row in read_table(run / "history.csv")}
    saved = arrays(run)
    for row in read_table(run / "folds.csv"):
        for i, budget in enumerate(SPEC.epochs):
            assert history[row["fold"], str(budget)] == row[f"auc_{budget}"]
            place = saved["fold"] == int(row["fold"])
            found = figures.macro(figures.auc(saved["labels"][place], saved["out_of_fold"][i][place]))[0]
            assert float(row[f"auc_{budget}"]) == found
