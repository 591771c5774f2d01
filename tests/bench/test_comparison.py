"""Two models side by side: what differs is in the table, and what may not differ stops it before a clock starts."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cxr_fast.bench import comparison, measure, results
from cxr_fast.bench import films as compared_films
from cxr_fast.bench.comparison import About, Arm, difference
from cxr_fast.cli.main import main
from cxr_fast.config import PreprocessSpec
from cxr_fast.data.images import decode_grey, read_bytes, resize
from cxr_fast.errors import InputError, ParityError, SchemaError
from cxr_fast.export import film_changes
from cxr_fast.inference import model_file
from cxr_fast.inference.predictor import Predictor
from cxr_fast.metrics import drift, figures
from tests.helpers.model_edits import changed, put, weights

ALL = {"device": "cpu", "threads": 1}


def moved(proto: Any) -> None:
    """Other weights in the last layer of the head."""
    import onnx

    tensor = min((t for t in weights(proto).values() if len(t.dims) == 2 and 35 in t.dims), key=lambda t: t.name)
    values = onnx.numpy_helper.to_array(tensor) * np.float32(1.5)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))


@pytest.fixture(scope="module")
def other(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model with another last layer, that says of itself that it is another precision of it."""
    return changed(toy_model, tmp_path_factory.mktemp("m") / "other.onnx", moved, put("variant", '"int8"'))


@pytest.fixture(scope="module")
def result(toy_model: Path, other: Path, toy_data: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "REST", 0.0)
        a, b = (Arm(path=path, device="cpu", threads=1) for path in (toy_model, other))
        return comparison.compare(a, b, comparison.CompareSpec(manifest=toy_data, count=40, rounds=6))


def test_answers_are_those_of_the_files_themselves(
    result: dict[str, Any], toy_model: Path, other: Path, toy_data: Path
) -> None:
    from cxr_fast.data.manifest import read_dataset

    manifest = read_dataset(toy_data)
    rows = np.unique(np.linspace(0, len(manifest) - 1, 40).astype(int))
    a, b = Predictor(toy_model, **ALL), Predictor(other, **ALL)
    good = [row for row in rows if next(a.stream([manifest.path(row)])).ok]
    assert result["images"] == {"answered": len(good), "left_out": len(rows) - len(good), "source": "manifest"}
    ours, theirs = (p.probabilities(np.stack([p.pixels(manifest.path(row)) for row in good])) for p in (a, b))
    labels = manifest.labels[good]
    far = drift.measure(ours, theirs, labels, a.thresholds)
    found = result["difference"]
    assert found["largest"] == pytest.approx(far.largest, abs=1e-6)
    assert found["largest"] > 0.01, "the two do not differ: the comparison shows nothing"
    assert found["flipped"] == int(((ours >= a.thresholds) != (theirs >= a.thresholds)).sum())
    assert found["macro_auc"] == pytest.approx(figures.macro(figures.auc(labels, ours))[0], abs=1e-6)
    assert not found["expected_alike"]


def test_what_changed_films_do_to_a_stands_beside_b(
    result: dict[str, Any], toy_model: Path, other: Path, toy_data: Path
) -> None:
    """Against film by film with Pillow; the groups of the interval are those of the manifest."""
    from cxr_fast.data.manifest import read_dataset

    manifest, a, b = read_dataset(toy_data), Predictor(toy_model, **ALL), Predictor(other, **ALL)
    rows = np.unique(np.linspace(0, len(manifest) - 1, 40).astype(int))
    good = [row for row in rows if next(a.stream([manifest.path(row)])).ok]
    films = [decode_grey(read_bytes(manifest.path(row)), spec=a.spec) for row in good]
    plain = np.stack([resize(grey, a.spec) for grey in films])
    ours = a.probabilities(plain) >= a.thresholds

    def counts(model: Predictor, pixels: np.ndarray) -> np.ndarray:
        return np.asarray(((model.probabilities(pixels) >= model.thresholds) != ours).sum(axis=1))

    moved = np.stack([resize(np.hstack([grey[:, :1], grey[:, :-1]]), a.spec) for grey in films])
    jpeg = np.stack([resize(film_changes.save_as_jpeg(grey), a.spec) for grey in films])
    size = len(good) * len(a.labels)
    assert result["yardstick"]["one_pixel"]["flips"] == pytest.approx(1e4 * counts(a, moved).sum() / size)
    assert result["yardstick"]["jpeg_95"]["flips"] == pytest.approx(1e4 * counts(a, jpeg).sum() / size)
    margin, apart = result["difference"]["margin"], counts(b, plain) - counts(a, jpeg)
    assert margin["more"] == pytest.approx(1e4 * apart.sum() / size)
    assert (margin["groups"], margin["unit"]) == (len({manifest.groups[row] for row in good}), "group")
    text, flips = comparison.describe(result), result["yardstick"]["one_pixel"]["flips"]  # type: ignore[arg-type]
    assert f"one pixel {flips:.1f}; difference to JPEG 95 " in text
    assert "95 % interval" in text
    old = {name: value for name, value in result.items() if name != "yardstick"}
    assert "JPEG" not in comparison.describe(old), "a result of an earlier version"  # type: ignore[arg-type]


def test_both_are_timed_in_turn(result: dict[str, Any]) -> None:
    a, b = result["samples"]["a"], result["samples"]["b"]
    assert len(a) == len(b) == 6
    assert min(a + b) > 0
    ratio = measure.ratio_interval(b, a)
    assert (result["ratio"]["median"], result["ratio"]["low"], result["ratio"]["n"]) == (ratio.median, ratio.low, 6)
    assert json.loads(json.dumps(result), parse_constant=pytest.fail)["models"]["b"]["variant"] == "int8"


def test_the_text_has_times_and_differences_in_one_place(result: dict[str, Any]) -> None:
    text = comparison.describe(result)
    assert f"{result['difference']['flips']:.1f}" in text
    assert f"{result['ratio']['median']:.2f} [" in text
    assert results.RATIOS in text
    assert "the same weights in another precision" in text
    assert "1 image(s) cannot be read and were left out" in text or result["images"]["left_out"] == 0
    assert "note: PHANTOM IMAGES" in text
    assert "no AUC" not in text


def test_turns_alternate_and_images_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, seen = np.arange(3, dtype=np.uint8), []
    monkeypatch.setattr(comparison, "REST", 0.0)
    for turn in range(3):
        comparison._timed(lambda batch: seen.append(batch.tolist()) or batch, pixels, turn, 2)
    assert seen == [[0, 1], [0, 1], [2, 0], [2, 0], [1, 2], [1, 2]], "the first of each pair is not timed"


def test_models_of_other_labels_are_refused_in_one_line(toy_model: Path, tmp_path: Path, toy_data: Path) -> None:
    names = list(model_file.read(toy_model)["labels"])
    for labels, said in (
        ([*names[1:], names[0]], "the same classes in another order"),
        (["X", *names[1:]], "other classes"),
    ):
        edits = put("labels", json.dumps(labels)), put("labels_sha256", json.dumps(model_file.labels_sha256(labels)))
        model = changed(toy_model, tmp_path / "renamed.onnx", *edits)
        command = [
            "bench",
            "compare",
            str(toy_model),
            str(model),
            "--images",
            str(toy_data / "images"),
            "--device",
            "cpu",
        ]
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 2
        assert len(done.output.strip().splitlines()) == 1
        assert said in done.output


def test_the_same_weights_in_float32_must_agree(toy_model: Path, toy_data: Path, tmp_path: Path) -> None:
    wrong = changed(toy_model, tmp_path / "wrong.onnx", moved)
    arms = [Arm(path=path, device="cpu", threads=1) for path in (toy_model, wrong)]
    with pytest.raises(ParityError, match=r"the same weights in float32 and differ by .*; nothing was timed"):
        comparison.compare(*arms, comparison.CompareSpec(images=toy_data / "images", count=8, rounds=1))


# ------------------------------------------------------------------------------------------- the difference alone


def about(**changes: Any) -> About:
    plain = About(
        name="m", variant="fp32", where="CPU", labels=("x", "y"), thresholds=(0.5, 0.5), spec=PreprocessSpec(),
        weights="w", warning="",
    )  # fmt: skip
    return replace(plain, **changes)


A = np.array([[0.4, 0.6], [0.2, 0.9]], np.float32)
UNKNOWN = np.full((2, 2), -1, np.int8)


@pytest.mark.parametrize(
    ("changes", "alike"),
    [({}, True), ({"variant": "torch"}, True), ({"variant": "int8"}, False), ({"weights": "v"}, False),
     ({"spec": PreprocessSpec(resize="pad")}, False)],
)  # fmt: skip
def test_only_what_should_be_alike_must_be(changes: dict[str, Any], alike: bool) -> None:
    far = A + np.float32(0.01)
    if alike:
        with pytest.raises(ParityError):
            difference(about(), about(**changes), A, far, UNKNOWN)
        assert difference(about(), about(**changes), A, A + np.float32(1e-5), UNKNOWN)["expected_alike"]
    else:
        assert difference(about(), about(**changes), A, far, UNKNOWN)["largest"] == pytest.approx(0.01, abs=1e-6)
    with pytest.raises(ParityError):
        difference(about(), about(), A, np.full_like(A, np.nan), UNKNOWN)


def test_each_model_decides_by_its_own_thresholds() -> None:
    b = about(variant="int8", thresholds=(0.3, 0.5))
    found = difference(about(), b, A, A, UNKNOWN)
    assert (found["flipped"], found["flips"]) == (1, 2500.0)
    assert difference(about(), about(variant="int8"), A, A, UNKNOWN)["flipped"] == 0
    assert found["macro_auc"] is None


# ------------------------------------------------------------------------------------------------ torch, processes


def test_against_torch_from_the_runs_folder(toy_run: Path, toy_model: Path, toy_data: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_run, tmp_path / "run")
    shutil.copy(toy_model, tmp_path / "run" / "model.fp32.onnx")
    out = tmp_path / "c.json"
    command = ["bench", "compare", str(tmp_path / "run"), "--against", "torch", "--images", str(toy_data / "images")]
    done = CliRunner().invoke(main, [*command, "--count", "6", "--rounds", "2", "--threads", "1", "--json", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert [found["models"][k]["variant"] for k in "ab"] == ["fp32", "torch"]
    assert 0 <= found["difference"]["largest"] < 1e-5
    assert "the same weights in float32: checked before timing" in done.output
    assert "no AUC" in done.output


def test_torch_of_another_run_is_refused(toy_model: Path, toy_run: Path, toy_run_average: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--run: .* was exported from other weights"):
        comparison.against_torch(toy_model, toy_run_average)
    with pytest.raises(InputError, match=r"is not a run folder; give the one .* is of with --run"):
        comparison.against_torch(toy_model, None)
    one, other = comparison.against_torch(toy_model, toy_run)
    assert (one.path, other.path, other.torch) == (toy_model, toy_run, True)


@pytest.mark.kill
def test_what_goes_wrong_in_the_other_process_is_said_here(tmp_path: Path, toy_model: Path) -> None:
    with (
        pytest.raises(InputError, match=r"gone\.onnx: no such model"),
        comparison.working(Arm(path=tmp_path / "gone.onnx")),
    ):
        pass
    with comparison.working(Arm(path=toy_model, device="cpu", threads=1)) as worker:
        pid = worker.process.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(InputError, match="its process ended with code -9"):
            worker.call("answer", 0, 1)
    assert not worker.process.is_alive()


def test_no_process_outlives_a_comparison(toy_model: Path) -> None:
    with pytest.raises(ZeroDivisionError), comparison.working(Arm(path=toy_model, device="cpu", threads=1)) as worker:
        raise ZeroDivisionError
    assert worker.process.exitcode == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give two models, or one and --against torch"),
        (["model.onnx", "--against", "torch"], "give two models, or one and --against torch"),
        (["model.onnx", "--run", "run"], "--run is for --against torch"),
        (["model.onnx", "--images", "a", "--manifest", "b"], "--images and --manifest both name the images"),
        (["--against", "torch", "--device", "cuda"], "--against torch runs on the CPU"),
    ],
)
def test_a_request_that_means_nothing_is_refused(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(main, ["bench", "compare", "m.onnx", *arguments])
    assert done.exit_code == 2
    assert said in done.output


def test_a_manifest_of_other_classes_is_refused(toy_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "m.csv").write_text("image,group,Nothing\na.png,p,1\n")
    with pytest.raises(InputError, match="has none of the model's classes"):
        compared_films._listed(tmp_path / "m.csv", 5, ("Cardiomegaly", "Effusion"))


def test_the_result_is_checked_as_every_benchmarks_is(result: dict[str, Any]) -> None:
    results.check(result, "it")
    assert {"date", "commit", "versions", "gpus"} <= set(result)
    assert {"share", "noisy", "stretches"} <= set(result["noise"])
    arm, values = next(iter(result["samples"].items()))
    assert len(result["window_medians"][arm]) == min(3, len(values))
    for changed_part in ({"samples": {arm: [*values, 1.0]}}, {"window_medians": {}}, {"schema": 99}, {"machine": {}}):
        with pytest.raises((InputError, SchemaError), match="it: "):
            results.check(result | changed_part, "it")
