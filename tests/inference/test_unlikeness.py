"""Unlikeness from a model file: the column, what is refused and why, answers kept by earlier versions, `verify`."""

from __future__ import annotations

import csv
import json
import os
import pickle
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image

from cxr_fast.cli.main import main
from cxr_fast.data.images import load
from cxr_fast.errors import InputError
from cxr_fast.export.entries.settings import ExportSpec
from cxr_fast.export.variants import export_run
from cxr_fast.inference import checkpoint, verify
from cxr_fast.inference.checkpoint import Asked, Checkpoint
from cxr_fast.inference.predictor import CAUSES, Predictor, describe_unlike
from cxr_fast.training.run_folder import read_run

from ..helpers.model_edits import changed, put, weights
from ..helpers.unlike import write_run

MODEL = {"model_sha256": "0" * 64, "pixel_check": "1" * 64}


def faces(count: int, seed: int) -> np.ndarray:
    """Pixels (N, S, S) that know up from down and light from dark: a bright half above a dark one, with noise."""
    random, base = np.random.default_rng(seed), np.linspace(200, 30, 160)[:, None] - np.linspace(0, 25, 160)
    return np.clip(base + random.normal(0, 12, (count, 160, 160)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def model(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file whose training films were `faces`."""
    run = write_run(toy_run, tmp_path_factory.mktemp("unlike") / "run", faces(110, 0))
    (one,) = export_run(run, ExportSpec(count=4))
    assert one.info["parity"]["max_unlikeness_difference"] < 1e-4
    return one.path


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A face upright, inverted and turned, noise, and a file that is cut short."""
    folder = tmp_path_factory.mktemp("films")
    upright = faces(1, 9)[0]
    made = {"upright": upright, **{name.replace(" ", "_"): make(upright) for name, make in CAUSES.items()}}
    made["noise"] = np.random.default_rng(1).integers(0, 256, upright.shape).astype(np.uint8)
    for name, pixels in made.items():
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{name}.png")
    whole = (folder / "upright.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture
def predictor(model: Path) -> Predictor:
    return Predictor(model, device="cpu", threads=1)


def table(path: Path) -> dict[str, dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return {Path(row["path"]).stem: row for row in csv.DictReader(file)}


def predict(*words: object) -> int:
    return CliRunner().invoke(main, ["predict", *map(str, words), "--device", "cpu", "--threads", "1"]).exit_code


def test_a_result_has_it_and_a_file_without_gives_none(
    predictor: Predictor, toy_model: Path, films: Path, toy_run: Path, model: Path
) -> None:
    names = sorted(films.glob("*.png"))
    found = {Path(result.path).stem: result for result in predictor.stream(names)}
    assert found["cut"].unlikeness is None
    assert found["upright"].unlikeness is not None
    assert found["upright"].unlikeness < 1
    assert all(found[name].unlikeness > 1 for name in ("inverted", "noise", "turned_by_180_degrees"))  # type: ignore[operator]
    kept = read_run(model.parent).unlikeness
    assert kept is not None
    pixels = np.stack([load(name, predictor.spec).pixels for name in names if name.stem != "cut"])
    np.testing.assert_array_equal(
        predictor.run(pixels, output="unlikeness"),
        np.array([found[name.stem].unlikeness for name in names if name.stem != "cut"], np.float32),
    )
    old = list(Predictor(toy_model, device="cpu", threads=1).stream(names))
    assert {result.unlikeness for result in old} == {None}
    assert read_run(toy_run).unlikeness is None


def test_a_refused_film_says_what_would_mend_it(predictor: Predictor, films: Path) -> None:
    predictor.refuse_unlike = 1.0
    found = {Path(result.path).stem: result for result in predictor.stream(sorted(films.glob("*.png")))}
    assert found["upright"].ok
    assert not found["noise"].ok
    assert {name for name, result in found.items() if result.reason == "unlike"} == found.keys() - {"upright", "cut"}
    assert found["cut"].reason == "truncated"
    for name, mend in {
        "inverted": "inverted",
        "turned_left_by_90_degrees": "turned right by 90 degrees",
        "turned_right_by_90_degrees": "turned left by 90 degrees",
        "turned_by_180_degrees": "turned by 180 degrees",
    }.items():
        own = f"unlikeness {found[name].unlikeness:.2f} is over 1"
        mended = f"{mend} it would have {found['upright'].unlikeness:.2f}"
        assert found[name].message == f"{films / name}.png: {own}; {mended}"
        assert found[name].sha256
        assert found[name].probabilities is None
    assert found["noise"].message.endswith("inverted or turned it would be over it too")


def test_the_limit_may_be_another(predictor: Predictor, films: Path) -> None:
    predictor.refuse_unlike = 1e6
    assert all(result.ok for result in predictor.stream(films / name for name in ("noise.png", "inverted.png")))
    predictor.refuse_unlike = 0.0
    assert next(predictor.stream(films / "upright.png")).reason == "unlike"
    predictor.refuse_unlike = None
    assert next(predictor.stream(films / "noise.png")).ok
    assert describe_unlike(2.0, 1.5, {"inverted": 1.5}) == ("unlikeness 2.00 is over 1.5; inverted it would have 1.50")


def test_a_predictor_that_travels_keeps_the_limit(predictor: Predictor, films: Path) -> None:
    predictor.refuse_unlike = 1.0
    again = pickle.loads(pickle.dumps(predictor))
    assert again.refuse_unlike == 1.0
    assert next(again.stream(films / "noise.png")).reason == "unlike"


def test_a_file_without_it_refuses_the_limit(toy_model: Path, films: Path, tmp_path: Path) -> None:
    predictor = Predictor(toy_model, device="cpu", threads=1)
    with pytest.raises(InputError, match="has no unlikeness"):
        predictor.refuse_unlike = 1.0
    words = ["predict", str(toy_model), str(films), "--out", str(tmp_path / "p.csv"), "--refuse-unlike"]
    found = CliRunner().invoke(main, words)
    assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
    found = CliRunner().invoke(main, ["predict", "--refuse-unlike", *words[1:-1]])
    assert found.exit_code == 2
    assert "put the flag last, or give it a limit: --refuse-unlike 1." in found.stderr


def test_the_table_follows_the_limit(model: Path, films: Path, tmp_path: Path) -> None:
    """A limit fails what it refuses and keeps the rest; without it the failed ones are answered again."""
    out = tmp_path / "p.csv"
    assert predict(model, films, "--out", out) == 1  # one film is cut short
    first = table(out)
    assert first["noise"]["status"] == "ok"
    assert float(first["noise"]["unlikeness"]) > 1
    assert first["cut"]["unlikeness"] == ""
    assert predict(model, films, "--out", out, "--refuse-unlike") == 1
    second, run = table(out), json.loads((tmp_path / "p.run.json").read_text())
    assert (run["reused"], run["refuse_unlike"], run["failed_by"]) == (1, 1.0, {"unlike": 5, "truncated": 1})
    assert second["upright"] == first["upright"]
    assert second["noise"]["status"] == "failed"
    assert second["noise"]["reason"].startswith("unlike: ")
    assert second["noise"]["unlikeness"] == first["noise"]["unlikeness"]
    assert set(list(second["noise"].values())[5:]) == {""}
    assert predict(model, films, "--out", out) == 1
    assert table(out) == first


def test_lines_of_json_and_parquet_have_it_as_a_number(model: Path, films: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    predict(model, films, "--out", tmp_path / "p.csv")
    cells = [row["unlikeness"] for row in table(tmp_path / "p.csv").values()]
    predict(model, films, "--out", tmp_path / "p.jsonl")
    predict(model, films, "--out", tmp_path / "p.parquet")
    lines = [json.loads(line)["unlikeness"] for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert ["" if value is None else str(value) for value in lines] == cells
    found = parquet.read_table(tmp_path / "p.parquet")["unlikeness"]
    assert str(found.type) == "float"
    assert [value is None for value in found.to_pylist()] == [cell == "" for cell in cells]


def test_answers_of_a_version_before_it_are_taken_over(films: Path, tmp_path: Path) -> None:
    out, film = tmp_path / "p.csv", str(films / "upright.png")
    (damaged := films / "noise.png").touch()
    status = os.stat(film)
    db = sqlite3.connect(checkpoint.beside(out))
    for statement in checkpoint.EARLIER_TABLES:
        db.execute(statement)
    db.executemany("INSERT INTO about VALUES (?, ?)", MODEL.items())
    values = np.array([0.25, 0.5], "<f4").tobytes()
    row = (film.encode(), status.st_size, checkpoint.changed_ns(status), "ab", "", b"a note", values, "CPU")
    db.execute("INSERT INTO answers VALUES (?,?,?,?,?,?,?,?,?)", (*row, checkpoint._crc(row)))
    db.execute("INSERT INTO answers VALUES (?,?,?,?,?,?,?,?,?)", (str(damaged).encode(), *row[1:], 1))
    db.commit()
    db.close()
    out.touch()
    for _ in range(2):
        with Checkpoint(out, MODEL) as kept:
            found, by = kept.row(film)
            assert (found.probabilities.tolist(), found.note, by) == ([0.25, 0.5], "a note", "CPU")  # type: ignore[union-attr]
            assert found.unlikeness is None
            assert kept.holds(film)
            with pytest.raises(KeyError):
                kept.row(str(damaged))
    with Checkpoint(out, MODEL, Asked(limit=1.0)) as kept:
        assert not kept.holds(film), "its unlikeness is unknown"


def differs(path: Path) -> dict[str, str]:
    report = verify.verify(path, device="cpu", threads=1)
    return {check.name: check.detail for check in report.checks if not check.ok}


def test_verify_checks_it(model: Path, tmp_path: Path) -> None:
    report = verify.verify(model, device="cpu", threads=1)
    assert report.ok, verify.describe(report)
    assert "for the golden input" in next(check.detail for check in report.checks if check.name == "unlikeness")
    golden = json.loads(next(p.value for p in _props(model) if p.key == "cxr.golden"))
    moved = golden | {"expected_unlikeness": golden["expected_unlikeness"] * 1.05}
    assert set(differs(changed(model, tmp_path / "a.onnx", put("golden", json.dumps(moved))))) == {"unlikeness"}
    lacking = {key: value for key, value in golden.items() if key != "unlikeness"}
    found = differs(changed(model, tmp_path / "b.onnx", put("golden", json.dumps(lacking))))
    assert found == {"unlikeness": "the golden pair has no unlikeness"}
    silent = changed(model, tmp_path / "c.onnx", put("unlikeness", None))
    assert differs(silent)["graph"] == "unknown output unlikeness"


def test_a_file_that_only_says_that_it_has_it_is_refused(toy_model: Path, tmp_path: Path) -> None:
    entry = {"quantiles": list(range(101)), "films": 200, "groups": 100}
    lying = changed(toy_model, tmp_path / "m.onnx", put("unlikeness", json.dumps(entry)))
    with pytest.raises(InputError, match="damaged graph"):
        Predictor(lying, device="cpu", threads=1)


def test_an_unlikeness_that_is_no_number_fails_the_film(model: Path, films: Path, tmp_path: Path) -> None:
    def spoil(proto: onnx.ModelProto) -> None:
        tensor = weights(proto)["unlike.mean"]
        tensor.raw_data = np.full(len(tensor.raw_data) // 4, np.nan, np.float32).tobytes()

    broken = changed(model, tmp_path / "m.onnx", spoil)
    found = list(Predictor(broken, device="cpu", threads=1).stream([films / "upright.png"]))
    assert [(result.ok, result.reason, result.unlikeness) for result in found] == [(False, "not_finite", None)]
    assert "unlikeness" in differs(broken)


@pytest.mark.parametrize("value", ["null", "[]", '"x"', "1", "{}", '{"quantiles": null, "films": []}'])
@pytest.mark.parametrize("golden", ["null", '"x"', "[1]", "-1", "1e999"])
def test_odd_entries_are_refused_or_answered(model: Path, films: Path, tmp_path: Path, value: str, golden: str) -> None:
    pair = next(p.value for p in _props(model) if p.key == "cxr.golden")
    odd = json.loads(pair) | {"expected_unlikeness": json.loads(golden)}
    path = changed(model, tmp_path / "m.onnx", put("unlikeness", value), put("golden", json.dumps(odd)))
    if value.startswith("{"):  # the quantiles, which daily films are compared with, are missing
        with pytest.raises(InputError, match="damaged metadata"):
            Predictor(path, device="cpu", threads=1)
        return
    (result,) = Predictor(path, device="cpu", threads=1).stream([films / "upright.png"])
    assert result.ok
    assert result.unlikeness is None
    assert not verify.verify(path, device="cpu", threads=1).ok


def _props(model: Path) -> Any:
    return list(onnx.load(model).metadata_props)
