"""One place for every figure: what run.json says, what scikit-learn says, and intervals that mean what they say."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.data.disclosure import GROUPS
from cxr_fast.errors import InputError, SchemaError
from cxr_fast.metrics import calibration as calibrate
from cxr_fast.metrics import figures as metrics
from cxr_fast.metrics.intervals import Resampling, bootstrap
from cxr_fast.report.evaluation import (
    FEW,
    cooccurrence,
    enough_groups,
    evaluate,
    reliability,
)
from cxr_fast.training import predictions
from tests.helpers import made

ROW = {"class", "positives", "negatives", "unknown", "prevalence", "threshold", "tier", *metrics.OF_CLASSES}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 images of 120 groups, 4 classes, a column of sexes and one of ages; do not write into it."""
    found = made.arrays(240, 4)
    found["meta:sex"] = np.array(["F", "M", ""])[np.arange(240) // 2 % 3]
    found["meta:age"] = np.array([str(20 + 7 * (g % 9)) for g in np.arange(240) // 2])
    return made.write(tmp_path_factory.mktemp("made") / "run", found)


@pytest.fixture(scope="module")
def found(run: Path) -> dict[str, Any]:
    """Its evaluation."""
    return evaluate(run, resamples=300)


def values(part: dict[str, Any]) -> dict[str, float | None]:
    return {name: figure["value"] for name, figure in part["figures"].items()}


# ------------------------------------------------------------------------------------------ one place


def test_the_figures_are_run_jsons_to_the_last_bit(toy_run: Path) -> None:
    run, found = json.loads((toy_run / "run.json").read_text()), evaluate(toy_run, resamples=50)
    for name in ("out_of_fold", "holdout"):
        said, part = run["metrics"][name], found["parts"][name]
        assert values(part) == {key: said[key] for key in metrics.HEADLINE}
        for key in ("n", "classes_defined", "classes_total"):
            assert part[key] == said[key]
    assert found["per_class_of"] == "holdout"
    assert [row["class"] for row in found["per_class"]] == run["classes"]
    for row, said in zip(found["per_class"], run["per_class"], strict=True):
        assert row.keys() == ROW
        for key, value in row.items():
            assert (value["value"] if isinstance(value, dict) else value) == said[key], key


def test_it_reads_files_and_never_a_model(run: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom cxr_fast.report.evaluation import evaluate\n"
        "from cxr_fast.report.comparison import compare_runs\nfolder = Path(sys.argv[1])\n"
        "evaluate(folder, resamples=5)\ncompare_runs(folder, folder, resamples=5)\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'h5py'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_the_result_is_json_and_repeats(run: Path, found: dict[str, Any]) -> None:
    text = json.dumps(found, allow_nan=False)
    assert json.loads(text) == found
    assert evaluate(run, resamples=300) == found
    other = evaluate(run, resamples=300, seed=1)
    assert values(other["parts"]["holdout"]) == values(found["parts"]["holdout"])
    assert other["parts"]["holdout"]["figures"]["macro_auc"] != found["parts"]["holdout"]["figures"]["macro_auc"]


def test_every_part_has_every_figure(found: dict[str, Any]) -> None:
    assert list(found["parts"]) == ["train", "out_of_fold", "holdout"]
    parts = [*found["parts"].values(), *found["studies"]["parts"].values(), *found["views"].values()]
    parts += [part for column in found["subgroups"].values() for part in column.values()]
    assert len(parts) > 8
    for part in parts:
        assert list(part["figures"]) == list(metrics.HEADLINE)
        for figure in part["figures"].values():
            assert figure["value"] is not None
    for part in (found["parts"]["holdout"], found["studies"]["parts"]["out_of_fold"]):
        for name, figure in part["figures"].items():
            if figure["low"] is None:  # a class whose PPV (NPV) is 1 in every resample
                assert name in ("macro_ppv", "macro_npv")
                assert any(line.startswith(f"interval of {name},") for line in found["missing"])
            else:
                assert figure["low"] <= figure["value"] <= figure["high"]
    assert all(figure["low"] is None for figure in found["parts"]["train"]["figures"].values())
    assert any("training images: no intervals" in line for line in found["missing"])


def test_the_figures_are_scikit_learns_on_the_saved_arrays(run: Path, found: dict[str, Any]) -> None:
    with np.load(run / "predictions.npz") as file:
        held = file["fold"] == -1
        labels, probs = file["labels"][held], file["final"][held].astype(np.float64)
    limits = np.array(made.description(4)["thresholds"])
    each = []
    for c in range(4):
        known = labels[:, c] >= 0
        y, p, d = labels[known, c], probs[known, c], probs[known, c] >= limits[c]
        each.append(
            {
                "macro_auc": sk.roc_auc_score(y, p),
                "map": sk.average_precision_score(y, p),
                "macro_f1": sk.f1_score(y, d),
                "macro_sensitivity": sk.recall_score(y, d),
                "macro_specificity": sk.recall_score(y, d, pos_label=0),
                "macro_ppv": sk.precision_score(y, d),
                "macro_npv": sk.precision_score(y, d, pos_label=0),
                "class_jaccard": sk.jaccard_score(y, d),
            }
        )
    got, known = values(found["parts"]["holdout"]), labels >= 0
    for name in each[0]:
        assert got[name] == pytest.approx(np.mean([row[name] for row in each]), abs=1e-12), name
    assert got["brier"] == pytest.approx(sk.brier_score_loss(labels[known], probs[known]), abs=1e-12)
    assert got["micro_auc"] == pytest.approx(sk.roc_auc_score(labels[known], probs[known]), abs=1e-12)
    assert got["label_accuracy"] == pytest.approx(((probs >= limits) == (labels == 1))[known].mean(), abs=1e-12)
    assert got["ece"] == found["reliability"]["ece"]


def test_thresholds_meet_calibrated_probabilities(tmp_path: Path) -> None:
    raw = made.arrays()
    dev = raw["fold"] >= 0
    calibration = calibrate.fit(raw["labels"][dev], raw["out_of_fold"][1][dev], "platt")
    found = evaluate(made.write(tmp_path / "run", raw, calibration=calibration), resamples=0)
    probs = calibrate.apply(calibration, raw["final"][~dev])
    expected = metrics.headline(raw["labels"][~dev], probs, np.array(made.description(4)["thresholds"]))
    assert values(found["parts"]["holdout"]) == {name: expected[name] for name in metrics.HEADLINE}


# ------------------------------------------------------------------------------- studies, views, subgroups


def test_studies_are_counted_and_pooled(run: Path, found: dict[str, Any]) -> None:
    images, studies = found["parts"]["holdout"], found["studies"]["parts"]["holdout"]
    assert found["studies"]["pool"] == "mean"
    assert studies["n"] * 2 == images["n"] == studies["groups"] * 2
    most = evaluate(run, resamples=0, pool="max")["studies"]
    assert most["pool"] == "max"
    assert values(most["parts"]["holdout"]) != values(studies)
    # Two independent looks at one patient see more than one.
    assert studies["figures"]["macro_auc"]["value"] > images["figures"]["macro_auc"]["value"]


def test_views_and_subgroups_hold_every_image_of_the_hold_out(found: dict[str, Any]) -> None:
    total = found["parts"]["holdout"]["n"]
    assert list(found["views"]) == ["Frontal", "Lateral"]
    assert sum(part["n"] for part in found["views"].values()) == total
    assert list(found["subgroups"]) == ["sex", "age"]
    assert list(found["subgroups"]["sex"]) == ["F", "M", "unknown"]
    assert sum(part["n"] for part in found["subgroups"]["sex"].values()) == total
    left = [line for line in found["missing"] if line.startswith("by age: ")]
    assert left == []
    assert list(found["subgroups"]["age"])[-1] == "other values", "decades that few groups have"
    assert sum(part["n"] for part in found["subgroups"]["age"].values()) == total
    parts = [part for column in found["subgroups"].values() for part in column.values()]
    assert all(part["groups"] >= GROUPS for part in parts)


def test_a_view_is_scored_as_those_images_alone(run: Path, found: dict[str, Any]) -> None:
    with np.load(run / "predictions.npz") as file:
        rows = (file["fold"] == -1) & (file["view"] == "Lateral")
        labels, probs = file["labels"][rows], file["final"][rows]
    expected = metrics.headline(labels, probs, np.array(made.description(4)["thresholds"]))
    assert values(found["views"]["Lateral"]) == {name: expected[name] for name in metrics.HEADLINE}


# --------------------------------------------------------------------------------------- tables and curves


def test_tables_are_plain_loops(run: Path, found: dict[str, Any]) -> None:
    with np.load(run / "predictions.npz") as file:
        held, labels, probs = file["fold"] == -1, file["labels"], file["final"]
    for c, row in enumerate(found["confusion"]):
        y, p = labels[held, c], probs[held, c]
        matrix = sk.confusion_matrix(y[y >= 0], p[y >= 0] >= made.description(4)["thresholds"][c])
        assert [row[cell] for cell in ("tn", "fp", "fn", "tp")] == matrix.ravel().tolist()
    for i, line in enumerate(found["cooccurrence"]["counts"]):
        for j, count in enumerate(line):
            assert count == sum(a == b == 1 for a, b in zip(labels[:, i], labels[:, j], strict=True))
    bins = found["reliability"]
    assert sum(bins["count"]) == (labels[held] >= 0).sum()
    assert [x is None for x in bins["confidence"]] == [n == 0 for n in bins["count"]]
    assert found["curves"].keys() == {"micro", *(f"class {c}" for c in range(4))}
    for name, lines in found["curves"].items():
        assert len(lines["roc"]) <= 200
        assert len(lines["pr"]) <= 200
        area = np.trapezoid([y for _, y in lines["roc"]], [x for x, _ in lines["roc"]])
        figures = found["parts"]["holdout"]["figures"]
        expected = figures["micro_auc"] if name == "micro" else found["per_class"][int(name[-1])]["auc"]
        assert area == pytest.approx(expected["value"], abs=1e-12)


def test_small_parts_by_hand() -> None:
    labels = np.array([[1, 1, -1], [1, 0, 0], [-1, 1, 0]], np.int8)
    assert cooccurrence(labels, "abc")["counts"] == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    bins = reliability(np.array([[1, 0], [-1, 1]], np.int8), np.array([[1.0, 0.0], [0.5, 0.05]]))
    assert bins["count"][0] == 2
    assert (bins["frequency"][0], bins["confidence"][0]) == (0.5, 0.025)
    assert bins["ece"] == pytest.approx(0.95 / 3)
    groups = np.array([str(g) for g in range(FEW)] * 2)
    labels = np.repeat(np.array([[1], [0]], np.int8), FEW, axis=0)
    assert enough_groups(labels, groups).tolist() == [True]
    assert enough_groups(labels[:-1], groups[:-1]).tolist() == [False]
    assert enough_groups(np.repeat(labels, 9, axis=0), np.full(18 * FEW, "one")).tolist() == [False]


# ------------------------------------------------------------------------------------------- intervals


def population(random: np.random.Generator, groups: int, views: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images of `groups` patients: labels and half the variance of the scores are the patient's."""
    labels = np.repeat((random.random((groups, 2)) < (0.3, 0.5)).astype(np.int8), views, axis=0)
    shared = np.repeat(random.normal(0, math.sqrt(0.5), (groups, 2)), views, axis=0)
    scores = 1.2 * labels + shared + random.normal(0, math.sqrt(0.5), labels.shape)
    return labels, 1 / (1 + np.exp(-scores)), [str(g) for g in np.repeat(np.arange(groups), views)]


def test_the_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """AUC of two normal distributions 1.2 apart is Phi(1.2 / sqrt 2); sensitivity at p >= 1/2 is Phi(1.2)."""
    truth = {
        "macro_auc": 0.5 * (1 + math.erf(1.2 / 2)),
        "macro_sensitivity": 0.5 * (1 + math.erf(1.2 / math.sqrt(2))),
        "macro_specificity": 0.5,
    }
    random, times = np.random.default_rng(0), 200
    hit = dict.fromkeys(truth, 0)
    naive = 0
    for k in range(times):
        labels, probs, groups = population(random, 100, 3)
        how = Resampling(resamples=200, seed=k)
        found = bootstrap(labels, probs, groups, 0.5, how)
        for name, value in truth.items():
            hit[name] += bool(found[name].low <= value <= found[name].high)
        alone = bootstrap(labels, probs, [str(i) for i in range(300)], 0.5, how)["macro_auc"]
        naive += bool(alone.low <= truth["macro_auc"] <= alone.high)
    for name, count in hit.items():
        assert 0.90 <= count / times <= 0.985, name
    assert naive / times < 0.88, "by image, an interval of these data claims too much"


def test_a_second_view_that_says_the_same_narrows_nothing(tmp_path: Path) -> None:
    once = made.arrays(200, 3, views=1)
    order = np.repeat(np.arange(200), 4)
    again = {name: array[:, order] if name == "out_of_fold" else array[order] for name, array in once.items()}
    again["image"] = np.array([f"{i}.png" for i in range(800)])
    apart = again | {"group": again["image"]}
    widths = []
    for name, arrays in (("once", once), ("again", again), ("apart", apart)):
        found = evaluate(made.write(tmp_path / name, arrays), resamples=400)["parts"]["holdout"]["figures"]
        widths.append(found["macro_auc"]["high"] - found["macro_auc"]["low"])
    assert widths[1] == pytest.approx(widths[0], rel=1e-9)
    assert widths[2] == pytest.approx(widths[0] / 2, rel=0.2), "what it would be if images counted"


def test_no_interval_is_given_that_means_nothing(tmp_path: Path) -> None:
    found = made.arrays(200, 3, views=1)
    held = np.flatnonzero(found["fold"] == -1)
    found["labels"][held, 0] = 0
    found["labels"][held[: FEW - 1], 0] = 1
    found["final"][held, 1] = np.where(found["labels"][held, 1] == 1, 0.9, 0.1)
    got = evaluate(made.write(tmp_path / "run", found), resamples=100)
    rare, perfect, plain = got["per_class"]
    assert all(rare[name]["low"] is None for name in metrics.OF_CLASSES)
    assert rare["auc"]["value"] is not None
    assert any("intervals of 1 of 3 classes" in line and "class 0" in line for line in got["missing"])
    assert perfect["auc"] == {"value": 1.0, "low": None, "high": None}
    assert plain["auc"]["low"] < plain["auc"]["value"] < plain["auc"]["high"]


# ------------------------------------------------------------------------------------------- bad input


def test_a_run_without_hold_out(tmp_path: Path) -> None:
    found = evaluate(made.write(tmp_path / "run", made.arrays(holdout=False)), resamples=20)
    assert list(found["parts"]) == ["train", "out_of_fold"]
    assert found["per_class_of"] == "out_of_fold"
    assert len(found["per_class"]) == 4
    assert "hold-out: this run has none." in found["missing"]


def test_nan_costs_that_part_alone(tmp_path: Path) -> None:
    arrays = made.arrays()
    arrays["out_of_fold"][1, np.flatnonzero(arrays["fold"] == 0)[0], 2] = np.nan
    found = evaluate(made.write(tmp_path / "run", arrays), resamples=20)
    assert list(found["parts"]) == ["train", "holdout"]
    assert any(line.startswith("out-of-fold: 1 of ") and "NaN" in line for line in found["missing"])
    arrays["final"][:] = np.nan
    arrays["out_of_fold"][:] = np.nan
    found = evaluate(made.write(tmp_path / "all", arrays), resamples=20)
    assert (found["parts"], found["per_class"], found["per_class_of"]) == ({}, [], None)
    assert sum("NaN" in line for line in found["missing"]) == 3


@pytest.mark.parametrize("images", [2, 3, 5])
def test_a_handful_of_images(tmp_path: Path, images: int) -> None:
    arrays = made.arrays(images, 1, views=1)
    arrays["fold"] = np.array([-1, *(i % 2 for i in range(images - 1))])
    found = evaluate(made.write(tmp_path / "run", arrays, chosen={"epochs": 8, "fold": 0}), resamples=20)
    json.dumps(found, allow_nan=False)
    assert found["parts"]["holdout"]["n"] == 1
    assert "hold-out: no intervals, all its images are of one group" in found["missing"]
    assert found["views"] == {}


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 3), st.sampled_from([0.0, 0.0, 0.1]))
def test_whatever_is_saved_there_is_an_answer_in_json(seed: int, images: int, classes: int, broken: float) -> None:
    random = np.random.default_rng(seed)
    arrays = made.arrays(images, classes, seed=seed)
    arrays["fold"] = random.integers(-1, 3, images)
    arrays["labels"] = random.integers(-1, 2, (images, classes)).astype(np.int8)
    for name in ("out_of_fold", "final"):
        arrays[name] = np.round(random.random(arrays[name].shape) * 2).astype(np.float32) / 2
        arrays[name][random.random(arrays[name].shape) < broken] = np.nan
    for name in ("study", "view", "group", "meta:age"):
        arrays[name] = random.choice(["", "1", "2", "30-39", "x"], images)
    with tempfile.TemporaryDirectory() as folder:
        found = evaluate(made.write(Path(folder), arrays), resamples=7, pool="max")
    json.dumps(found, allow_nan=False)
    told = " ".join(found["missing"])
    for name, title in predictions.PARTS.items():
        assert name in found["parts"] or f"{title}: " in told
    chief = found["per_class_of"]
    assert (chief is None) == (found["parts"] == {})
    if chief:
        assert len(found["per_class"]) == len(found["confusion"]) == classes
        assert sum(found["reliability"]["count"]) == sum(r["positives"] + r["negatives"] for r in found["per_class"])


def test_one_class_and_one_of_unknown_labels_alone(tmp_path: Path) -> None:
    found = evaluate(made.write(tmp_path / "one", made.arrays(classes=1)), resamples=50)
    assert found["parts"]["holdout"]["classes_total"] == 1
    figures = values(found["parts"]["holdout"])
    assert figures["macro_auc"] == figures["micro_auc"] == found["per_class"][0]["auc"]["value"]
    arrays = made.arrays()
    arrays["labels"][:, 1] = -1
    found = evaluate(made.write(tmp_path / "unknown", arrays), resamples=50)
    row = found["per_class"][1]
    assert (row["auc"]["value"], row["unknown"], row["tier"]) == (None, 30, "insufficient data")
    assert found["parts"]["holdout"]["classes_defined"] == 3
    assert "class 1" not in found["curves"]
    arrays["labels"][:] = -1
    found = evaluate(made.write(tmp_path / "nothing", arrays), resamples=50)
    assert found["parts"]["holdout"]["classes_defined"] == 0
    assert all(value is None for value in values(found["parts"]["holdout"]).values())
    json.dumps(found, allow_nan=False)


def test_without_views_or_studies(tmp_path: Path) -> None:
    arrays = made.arrays()
    arrays["view"], arrays["study"] = np.full(120, ""), np.full(120, "")
    arrays["meta:scanner"] = np.array([f"s{i}" for i in range(120)])
    found = evaluate(made.write(tmp_path / "run", arrays), resamples=20)
    assert (found["views"], found["studies"]["parts"], found["subgroups"]) == ({}, {}, {})
    for line in ("by view: the data names none", "studies, hold-out: the data names none"):
        assert line in found["missing"]
    assert found["columns_not_shown"] == 1
    assert any(line.startswith("1 column not shown") for line in found["missing"])


def test_another_schema_or_no_predictions_are_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="schema 99"):
        evaluate(made.write(tmp_path / "run", schema=99))
    shutil.copytree(run, tmp_path / "bare")
    (tmp_path / "bare" / "predictions.npz").unlink()
    with pytest.raises(InputError, match=r"predictions\.npz is missing; run the sweep again\.$"):
        evaluate(tmp_path / "bare")
    with pytest.raises(InputError, match="not a run folder"):
        evaluate(tmp_path / "nowhere")


def test_headline_names_are_those_of_the_bootstrap() -> None:
    labels, probs, groups = population(np.random.default_rng(0), 20, 1)
    found = bootstrap(labels, probs, groups, 0.5, Resampling(resamples=5))
    scalars = {name for name, interval in found.items() if interval.value.shape == ()}
    assert {metrics.overall_key(name) for name in metrics.HEADLINE} == scalars
    assert set(metrics.OF_CLASSES) | {"accuracy"} == found.keys() - scalars
    assert set(metrics.HEADLINE) == metrics.headline(labels, probs, 0.5).keys() - {
        "n",
        "classes_defined",
        "classes_total",
    }
