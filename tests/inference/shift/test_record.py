"""The comparison with the hold-out in NAME.run.json and in what `cxrfast predict` prints: of the whole table."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cxr_fast.cli.main import main
from cxr_fast.data.paths import Inputs, read
from cxr_fast.errors import InputError
from cxr_fast.inference import batch
from cxr_fast.inference.batch import BatchSpec
from cxr_fast.inference.outputs import run_path
from cxr_fast.inference.predictor import Predictor
from cxr_fast.inference.shift import reference
from tests.helpers.model_edits import changed, put


@pytest.fixture(scope="module")
def files(toy_data: Path) -> list[str]:
    """Images in name order; the fourth is cut short."""
    return [str(path) for path in sorted((toy_data / "images").iterdir())][:40]


@pytest.fixture(scope="module")
def model(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file whose hold-out is 100 films of 100 patients that all answered near 0."""
    info = Predictor(toy_model, device="cpu", threads=1).info
    probs = np.random.default_rng(0).uniform(0, 1e-3, (100, len(info["labels"])))
    entry = reference.summarise_holdout(probs, [0.5] * len(info["labels"]), [str(i) for i in range(100)])
    out = tmp_path_factory.mktemp("model") / "m.onnx"
    return changed(toy_model, out, put("holdout", json.dumps(entry)), put("thresholds", json.dumps([0.5] * 35)))


def counts_of(out: Path, edges: list[float], c: int) -> list[int]:
    """The films in each bin, by a plain loop over the table."""
    with open(out, newline="", encoding="utf-8") as file:
        values = [float(row[5 + c]) for row in list(csv.reader(file))[1:] if row[1] == "ok"]
    places = [sum(value >= edge for edge in edges) for value in values]
    return [places.count(b) for b in range(len(edges) + 1)]


def test_run_json_compares_the_whole_table(model: Path, files: list[str], tmp_path: Path) -> None:
    """Also where rows are of an earlier run, of films that are no longer among the inputs."""
    predictor, out = Predictor(model, device="cpu", threads=1), tmp_path / "p.csv"
    batch.write(predictor, Inputs(paths=files[:20]), out)
    first = json.loads(run_path(out).read_text())["shift"]
    assert first["films"] == 19
    assert first["line"].startswith("too few films to compare with the hold-out")
    batch.write(predictor, Inputs(paths=files[15:]), out, BatchSpec(append=True))
    found = json.loads(run_path(out).read_text())["shift"]
    assert (found["films"], found["effective_films"]) == (39, 39)
    assert found["holdout"] == {"films": 100, "groups": 100, "effective_films": 100}
    assert "differ from the hold-out by more than chance (39 films against 100)" in found["line"]
    assert [row["class"] for row in found["classes"]] == list(predictor.labels)
    for c, row in enumerate(found["classes"]):
        assert row["counts"] == counts_of(out, row["edges"], c)
        assert sum(row["holdout_counts"]) == 100
    again = batch.write(predictor, Inputs(paths=files), out)
    assert again["reused"] == 39
    assert again["shift"] == found


def test_studies_of_a_manifest_count_as_one(model: Path, files: list[str], tmp_path: Path) -> None:
    predictor = Predictor(model, device="cpu", threads=1)
    studies = [f"s{i // 4}" for i in range(40)]
    summary = batch.write(predictor, Inputs(paths=files, studies=studies, by="study"), tmp_path / "p.csv")
    assert summary["shift"]["effective_films"] == pytest.approx(39 / 4, abs=0.1)
    assert "there are 39, which count as 10 because several may be of one patient" in summary["shift"]["line"]


def test_studies_of_one_patient_count_as_one(model: Path, files: list[str], tmp_path: Path) -> None:
    # Counted by study, films of few patients differ from the hold-out by chance in 5 % of tables instead of 1 %.
    predictor = Predictor(model, device="cpu", threads=1)
    table = tmp_path / "m.csv"
    rows = [f"{Path(path).resolve()},s{i},p{i // 4}" for i, path in enumerate(files)]
    table.write_text("\n".join(["image,study,group", *rows]))
    summary = batch.write(predictor, read([str(table)]), tmp_path / "p.csv")
    assert summary["shift"]["effective_films"] == pytest.approx(39 / 4, abs=0.1)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (None, "not compared with the hold-out: the model file keeps no summary of one for its thresholds"),
        ("null", "not compared with the hold-out: the model file keeps no summary of one for its thresholds"),
        ("same", "35 of 35 classes differ from the hold-out by more than chance (39 films against 100): "),
    ],
)
def test_predict_prints_the_line(model: Path, files: list[str], tmp_path: Path, entry: Any, said: str) -> None:
    """Of old files too, and where nothing is new."""
    edited = model if entry == "same" else changed(model, tmp_path / "m.onnx", put("holdout", entry))
    arguments = ["predict", str(edited), *files, "--out", str(tmp_path / "p.csv"), "--device", "cpu"]
    for _ in range(2):
        told = CliRunner().invoke(main, arguments)
        assert told.exit_code == 1, told.output  # of the film that is cut short
        (line,) = [line for line in told.stdout.splitlines() if "hold-out" in line]
        assert line.startswith(said)
        assert line == json.loads((tmp_path / "p.run.json").read_text())["shift"]["line"]


def test_each_round_of_watch_says_it(model: Path, files: list[str], tmp_path: Path) -> None:
    predictor, said = Predictor(model, device="cpu", threads=1), []

    class Enough(Exception):
        """Ends the watch."""

    def tell(_: Inputs, summary: dict[str, Any]) -> None:
        said.append((summary["shift"]["films"], summary["shift"]["line"]))
        if len(said) == 2:
            raise Enough

    looks = iter([files[:6], files[4:]])
    with pytest.raises(Enough):
        batch.watch(predictor, lambda: Inputs(paths=next(looks)), tmp_path / "p.csv", BatchSpec(), 0.01, tell)
    assert [films for films, _ in said] == [5, 39]
    assert said[1][1].startswith("35 of 35 classes differ")


def test_a_damaged_summary_is_found_before_anything_is_predicted(model: Path, tmp_path: Path) -> None:
    edited = changed(model, tmp_path / "m.onnx", put("holdout", '{"films": 3}'))
    with pytest.raises(InputError, match=r"damaged metadata .holdout is no summary of 35 classes"):
        Predictor(edited, device="cpu")
