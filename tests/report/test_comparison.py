"""Two runs: the right images side by side, intervals that hold the truth, and refusals in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cxr_fast.cli.main import main
from cxr_fast.cli.report import describe_comparison
from cxr_fast.errors import InputError, SchemaError
from cxr_fast.metrics import figures
from cxr_fast.metrics.intervals import Resampling, paired_bootstrap
from cxr_fast.report.comparison import compare_runs
from cxr_fast.report.evaluation import evaluate
from cxr_fast.report.writer import render_comparison
from tests.helpers import made

Arrays = dict[str, np.ndarray]


def taken(arrays: Arrays, rows: np.ndarray) -> Arrays:
    return {name: values[:, rows] if name == "out_of_fold" else values[rows] for name, values in arrays.items()}


def worse(arrays: Arrays, seed: int = 9) -> Arrays:
    """The same images, their probabilities half noise."""
    random = np.random.default_rng(seed)
    noisy = {name: 0.5 * arrays[name] + 0.5 * random.random(arrays[name].shape) for name in ("final", "out_of_fold")}
    return arrays | {name: values.astype(np.float32) for name, values in noisy.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run and a worse one on the same 240 images; do not write into them."""
    folder, arrays = tmp_path_factory.mktemp("made"), made.arrays(240, 4)
    return made.write(folder / "a", arrays), made.write(folder / "b", worse(arrays))


@pytest.mark.parametrize("part", ["holdout", "out_of_fold"])
def test_figures_are_those_of_each_run(two: tuple[Path, Path], part: Any) -> None:
    found = compare_runs(*two, part=part, resamples=100)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    each = [evaluate(run, resamples=0)["parts"][part] for run in two]
    assert found["images"] == each[0]["n"]
    assert (found["only_a"], found["only_b"]) == (0, 0)
    assert list(found["figures"]) == list(figures.HEADLINE)
    for name, figure in found["figures"].items():
        assert [figure["a"], figure["b"]] == [side["figures"][name]["value"] for side in each]
        assert figure["difference"] == figure["b"] - figure["a"]
        assert figure["low"] <= figure["difference"] <= figure["high"]
    assert found["figures"]["macro_auc"]["high"] < 0
    back = compare_runs(two[1], two[0], part=part, resamples=100)
    assert back["figures"]["macro_auc"]["low"] == pytest.approx(-found["figures"]["macro_auc"]["high"], abs=0.02)
    if part == "holdout":
        rows = evaluate(two[0], resamples=0)["per_class"]
        assert [row["auc"]["a"] for row in found["per_class"]] == [row["auc"]["value"] for row in rows]
        assert [row["positives"] for row in found["per_class"]] == [row["positives"] for row in rows]


def test_a_run_against_itself_differs_by_nothing(two: tuple[Path, Path]) -> None:
    found = compare_runs(two[0], two[0], resamples=100)
    for figure in [*found["figures"].values(), *(row[name] for row in found["per_class"] for name in ("auc", "ap"))]:
        assert (figure["difference"], figure["low"], figure["high"]) == (0, 0, 0)


def test_only_common_images_count_in_whatever_order(two: tuple[Path, Path], tmp_path: Path) -> None:
    """Half of B's hold-out, shuffled, other names, its classes in another order."""
    arrays = worse(made.arrays(240, 4))
    random, held = np.random.default_rng(0), np.flatnonzero(arrays["fold"] == -1)
    kept = np.concatenate([held[::2], np.flatnonzero(arrays["fold"] >= 0)])
    random.shuffle(kept)
    half = taken(arrays, kept)
    half["image"] = np.array([f"elsewhere/{name}" for name in half["image"]])
    plain = compare_runs(two[0], made.write(tmp_path / "half", half), resamples=100)
    assert plain["images"] == len(held[::2])
    assert plain["only_a"] == len(held) - len(held[::2])
    whole = made.arrays(240, 4)
    limits = np.array(made.description(4)["thresholds"])
    expected = figures.headline(whole["labels"][held[::2]], whole["final"][held[::2]], limits)
    assert all(plain["figures"][name]["a"] == expected[name] for name in figures.HEADLINE)
    turned = half | {name: half[name][..., ::-1] for name in ("labels", "final", "out_of_fold")}
    changes = {"classes": made.description(4)["classes"][::-1], "thresholds": limits[::-1].tolist()}
    other = compare_runs(two[0], made.write(tmp_path / "turned", turned, **changes), resamples=100)
    assert other["figures"] == plain["figures"]
    assert other["per_class"] == plain["per_class"]


def test_files_of_equal_bytes_are_matched_one_to_one(tmp_path: Path) -> None:
    arrays = made.arrays(60, 2)
    arrays["sha256"][:] = arrays["sha256"][0]
    found = compare_runs(*[made.write(tmp_path / name, arrays) for name in "ab"], resamples=100)
    assert (found["images"], found["only_a"], found["only_b"]) == ((arrays["fold"] == -1).sum(), 0, 0)


def test_pairing_narrows_the_interval(tmp_path: Path) -> None:
    """Two models that err on the same images: the difference is known better than either figure."""
    arrays = made.arrays(300, 3)
    near = arrays | {"final": (arrays["final"] * 0.9 + 0.1 * worse(arrays)["final"]).astype(np.float32)}
    runs = [made.write(tmp_path / "a", arrays), made.write(tmp_path / "b", near)]
    paired = compare_runs(*runs, resamples=300)["figures"]["macro_auc"]
    alone = [evaluate(run, resamples=300)["parts"]["holdout"]["figures"]["macro_auc"] for run in runs]
    unpaired = math.hypot(*(figure["high"] - figure["low"] for figure in alone))
    assert paired["high"] - paired["low"] < 0.5 * unpaired


def test_the_interval_holds_the_true_difference_about_as_often_as_it_says() -> None:
    """Scores 1.2 and 0.8 apart: AUC Phi(1.2 / sqrt 2) and Phi(0.8 / sqrt 2); a patient's noise is shared by both."""
    truth = 0.5 * (math.erf(0.4) - math.erf(0.6))
    random, times, hit, null = np.random.default_rng(1), 200, 0, 0
    for k in range(times):
        labels = np.repeat((random.random((100, 1)) < 0.4).astype(np.int8), 2, axis=0)
        shared = np.repeat(random.normal(0, math.sqrt(0.5), (100, 1)), 2, axis=0)
        own = [random.normal(0, math.sqrt(0.5), labels.shape) for _ in range(3)]
        a, b, c = (1 / (1 + np.exp(-skill * labels - shared - own[i])) for i, skill in enumerate((1.2, 0.8, 1.2)))
        groups = [str(g) for g in np.repeat(np.arange(100), 2)]
        how = Resampling(resamples=200, seed=k)
        found = paired_bootstrap(labels, (a, 0.5), (b, 0.5), groups, how)["macro_auc"]
        hit += bool(found.low <= truth <= found.high)
        same = paired_bootstrap(labels, (a, 0.5), (c, 0.5), groups, how)["macro_auc"]
        null += bool(same.low <= 0 <= same.high)
    assert 0.90 <= hit / times <= 0.985
    assert 0.90 <= null / times <= 0.985


def test_a_class_in_few_groups_has_no_interval(tmp_path: Path) -> None:
    arrays = made.arrays(120, 2)
    arrays["labels"][:, 1] = 0
    arrays["labels"][np.flatnonzero(arrays["fold"] == -1)[:2], 1] = 1
    row = compare_runs(made.write(tmp_path / "a", arrays), made.write(tmp_path / "b", worse(arrays)), resamples=100)[
        "per_class"
    ][1]
    assert row["auc"]["difference"] is not None
    assert (row["auc"]["low"], row["auc"]["high"]) == (None, None)


def other_images(arrays: Arrays) -> Arrays:
    return arrays | {"sha256": np.array([f"f{i:063x}" for i in range(len(arrays["fold"]))])}


def other_labels(arrays: Arrays) -> Arrays:
    labels = arrays["labels"].copy()
    labels[np.flatnonzero(arrays["fold"] == -1)[:3]] = -1
    return arrays | {"labels": labels}


def not_numbers(arrays: Arrays) -> Arrays:
    return arrays | {"final": np.full_like(arrays["final"], np.nan)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_images, "have no hold-out image in common.*--part out_of_fold"),
        (other_labels, r"3 of 30 common images have other labels in .*b than in .*a; .*--manifest"),
        (not_numbers, "b: hold-out: 120 of 120 saved probabilities are NaN"),
        (lambda arrays: made.arrays(120, 3), "4 classes and .* 3; not in both: class 3"),
        (lambda arrays: made.arrays(120, 4, holdout=False), "b: hold-out: this run has none"),
        (lambda arrays: taken(arrays, np.arange(120)[arrays["group"] == "p0"]), "none|one group|common"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path: Path, change: Any, said: str) -> None:
    arrays = made.arrays(120, 4)
    runs = made.write(tmp_path / "a", arrays), made.write(tmp_path / "b", change(arrays))
    with pytest.raises(InputError, match=said) as caught:
        compare_runs(*runs, resamples=100)
    assert "\n" not in str(caught.value)


def test_another_schema_is_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="schema 99"):
        compare_runs(two[0], made.write(tmp_path / "b", schema=99))


# ------------------------------------------------------------------------------------------- the command


def test_the_command_prints_what_the_file_holds(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "c.json"
    done = CliRunner().invoke(
        main, ["compare", *map(str, two), "--resamples", "100", "--part", "out_of_fold", "--json", str(out)]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert found == compare_runs(*two, part="out_of_fold", resamples=100)
    lines = {line.split("  ")[0]: line for line in done.output.splitlines()}
    figure = found["figures"]["macro_auc"]
    for value in (f"{figure['a']:.4f}", f"{figure['b']:.4f}", f"[{figure['low']:+.4f}, {figure['high']:+.4f}]"):
        assert value in lines["Macro AUC"]
    assert ("<- differs" in lines["Macro AUC"]) == (figure["low"] > 0 or figure["high"] < 0)
    assert f"{found['images']} out-of-fold images of {found['groups']} groups in common" in done.output
    assert all(f"\nclass {c} " in done.output for c in range(4))
    assert "Not a medical device" in done.output or "not a medical device" in done.output


def test_the_command_says_what_the_figures_are_worth(tmp_path: Path) -> None:
    arrays = made.arrays(240, 4)
    arrays["labels"][:, 1] = 0
    arrays["labels"][np.flatnonzero(arrays["fold"] == -1)[:2], 1] = 1
    arrays["labels"][:, 2] = -1
    runs = made.write(tmp_path / "a", arrays, provenance="random backbone"), made.write(tmp_path / "b", arrays)
    text = CliRunner().invoke(main, ["compare", *map(str, runs), "--resamples", "100"]).output
    assert f"A: {runs[0]} (RANDOM BACKBONE)\nB: {runs[1]}\n" in text
    assert "1 of 4 classes have no positive or no negative among these images and are left out." in text
    assert "1 of 4 classes are in too few groups for an interval." in text
    assert "about 0.1 of 2 AUC intervals are marked" in text
    assert "\nclass 2 " not in text
    assert "<- differs" not in text.split("<- differs: the 95% interval")[0], "nothing differs"


# What a page of several runs says of each.
SAID: dict[str, Any] = {
    **made.description(2, preprocess={}, train={}, device="cpu", precision="float32", unfreeze_blocks=2),
    "cache": {"dataset": {"name": "data"}, "weights": "w", "fingerprint": "f", "labels_from": "l"},
}


def test_chance_is_not_told_of_no_intervals(tmp_path: Path) -> None:
    arrays = made.arrays(240, 2)
    arrays["labels"][:] = 0
    arrays["labels"][np.flatnonzero(arrays["fold"] == -1)[:2]] = 1
    runs = [str(made.write(tmp_path / name, arrays)) for name in "ab"]
    text = CliRunner().invoke(main, ["compare", *runs, "--resamples", "100"]).output
    assert (
        "2 of 2 classes are in too few groups for an interval.\n<- differs: the 95% interval holds no 0; 100 paired"
        in text
    )
    assert "by chance" not in text
    pair = compare_runs(*map(Path, runs), resamples=100)
    page = " ".join(
        render_comparison(dict.fromkeys("ab", SAID), {"a": None, "b": None}, {"b": pair}, []).decode().split()
    )
    assert "No class is in enough groups for an interval." in page
    assert "by chance" not in page


def test_a_page_of_runs_without_any_auc(tmp_path: Path) -> None:
    arrays = made.arrays(240, 2)
    arrays["labels"][:] = 0
    pair = compare_runs(*(made.write(tmp_path / name, arrays) for name in "ab"), resamples=100)
    runs: dict[str, Any] = {"a": SAID, "b": SAID | {"provenance": "<drawn>", "device": "cuda"}}
    page = " ".join(render_comparison(runs, {"a": None, "b": None}, {"b": pair}, ["one <thing>."]).decode().split())
    for said in (
        "b against a: no class has an AUC on the images both scored.",
        "b: &lt;drawn&gt;. Its figures say nothing about real radiographs",
        "<li>One &lt;thing&gt;</li>",
        '<th scope="row">device</th><td>cpu</td><td>cuda</td>',
        '<th scope="row">Images</th><td data-v="">–</td>',
    ):
        assert said in page
    assert "<img" not in page


def test_the_command_refuses_in_one_line(two: tuple[Path, Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["compare", str(two[0]), str(tmp_path)])
    assert done.exit_code == 2
    assert len(done.output.splitlines()) == 1
    assert "not a run folder" in done.output


def test_a_film_that_one_run_was_trained_on_and_the_other_held_out_is_refused(tmp_path: Path) -> None:
    arrays = made.arrays()
    other = {**arrays, "fold": np.where(arrays["fold"] == -1, 0, arrays["fold"])}
    held = np.flatnonzero(arrays["fold"] == -1)
    other["fold"][held[: len(held) // 2]] = -1
    a, b = made.write(tmp_path / "a", arrays), made.write(tmp_path / "b", other)
    left = len(held) - len(held) // 2
    with pytest.raises(InputError, match=f"b was trained on {left} hold-out images of .*a; sweep one") as caught:
        compare_runs(a, b, resamples=100)
    assert "\n" not in str(caught.value)
    found = compare_runs(a, b, resamples=100, allow_trained=True)
    assert (found["trained_a"], found["trained_b"], found["only_a"]) == (0, left, left)
    assert f"{left} left out; of these B on {left}" in str(describe_comparison(found)[1])
