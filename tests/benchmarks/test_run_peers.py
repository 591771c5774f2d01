"""The driver that compares engines: each in its own process, drift and times of each, a reason where one is missing."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cxr_fast.bench import comparison
from cxr_fast.bench.comparison import About, Arm
from cxr_fast.errors import InputError, ParityError
from cxr_fast.inference.predictor import Predictor
from cxr_fast.metrics import drift

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("peers")


@pytest.fixture
def driver(peers: ModuleType) -> ModuleType:
    return importlib.import_module("run_peers")


@pytest.fixture
def run(toy_run: Path, toy_model: Path, tmp_path: Path) -> Path:
    """The toy run with its float32 file, and no int8 file."""
    shutil.copytree(toy_run, tmp_path / "run")
    shutil.copy(toy_model, tmp_path / "run" / "model.fp32.onnx")
    return tmp_path / "run"


def coarse(arm: Arm, digits: int) -> tuple[About, Any]:
    """An engine that rounds the answers of our float32 file."""
    about, answer = comparison._open_onnx(replace(arm, opener=None, threads=1))
    return about, lambda pixels: answer(pixels).round(digits)


def missing(arm: Arm) -> tuple[About, Any]:
    raise InputError(f"{arm.path.parent}{os.sep}it is not installed")


def dying(arm: Arm) -> tuple[About, Any]:
    os._exit(7)


def options(driver: ModuleType, run: Path | None, **changed: Any) -> argparse.Namespace:
    few = {"run": run, "films": 8, "calibration": 4, "rounds": 6, "calls": 1, "threads": 1}
    defaults = {name: None if isinstance(value, type) else value for name, value in driver.OPTIONS.items()}
    return argparse.Namespace(**(defaults | few | changed))


def test_every_engine_has_its_row_and_is_timed_in_turn(
    driver: ModuleType,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Drift against one made by hand, from the run's own float32 file and its thresholds."""
    whole, paths = driver.engines, list[Path]()

    def engines(folder: Path, run: Any, args: argparse.Namespace, films: Path) -> dict[str, Arm]:
        every = whole(folder, run, args, films)
        assert list(every) == [
            "ours float32", "ours int8", "torch eager float32", "torch compiled float32", "OpenVINO float32",
            "OpenVINO bfloat16", "OpenVINO int8 (NNCF)",
        ]  # fmt: skip
        assert {arm.threads for arm in every.values()} == {1}
        paths.append(films)
        for name, opener in (
            ("torch compiled float32", partial(coarse, digits=2)),
            ("OpenVINO float32", dying),
            ("OpenVINO bfloat16", missing),
            ("OpenVINO int8 (NNCF)", partial(coarse, digits=1)),
        ):
            every[name] = replace(every[name], path=folder / "model.fp32.onnx", opener=opener)
        return every

    monkeypatch.setattr(driver, "engines", engines)
    found = json.loads(json.dumps(driver.measure(options(driver, run), tmp_path)), parse_constant=pytest.fail)
    assert np.load(paths[0]).shape == (4, 160, 160), "what NNCF is given"
    assert list(found["engines"]) == ["ours float32", "torch eager float32", "OpenVINO int8 (NNCF)"]
    why = found["not_measured"]
    assert set(why) == {"ours int8", "torch compiled float32", "OpenVINO float32", "OpenVINO bfloat16"}
    assert why["OpenVINO bfloat16"] == "it is not installed"
    assert "ended with code 7" in why["OpenVINO float32"]
    assert "differs from torch float32 by" in why["torch compiled float32"]
    assert str(run) not in json.dumps(found)
    rough = found["engines"]["OpenVINO int8 (NNCF)"]
    assert rough["drift"]["largest"] == pytest.approx(0.05, abs=0.02)
    assert rough["drift"]["flipped"] > 0
    assert rough["drift"]["margin"]["jpeg"] == found["yardstick"]["jpeg_95"]["flips"]
    for row in found["engines"].values():
        assert (row["seconds"]["n"], len(row["round_medians"]), row["over_ours_float32"]["n"]) == (6, 6, 6)
    assert found["engines"]["ours float32"]["over_ours_float32"]["median"] == 1
    assert found["engines"]["ours float32"]["drift"]["flipped"] == 0
    assert found["at_equal_drift"]["OpenVINO int8 (NNCF)"]["ours"] == "ours float32"
    assert found["films"] == {"checked": 8, "part": found["films"]["part"], "calibration": 4}
    assert found["load_before_and_after"][0] >= 0
    shown = capsys.readouterr().out
    assert "| film: one pixel |" in shown
    assert "| OpenVINO bfloat16 |  |" in shown
    assert "- OpenVINO bfloat16: not measured, it is not installed" in shown


def row(flips: float, *medians: float) -> dict[str, Any]:
    return {"drift": {"flips": flips}, "round_medians": list(medians), "seconds": {"median": float(np.median(medians))}}


def test_a_peer_is_held_against_the_fastest_of_ours_that_drifts_no_more(driver: ModuleType) -> None:
    rows = {
        "ours float32": row(0, 4, 4, 4), "ours int8": row(20, 1, 2, 1), "ours more.onnx": row(60, 0.5, 0.5, 0.5),
        "other int8": row(20, 2, 2, 2), "other float32": row(0, 5, 5, 5), "other wild": row(100, 1, 1, 1),
    }  # fmt: skip
    found = driver.at_equal_drift(rows)
    assert {name: each["ours"] for name, each in found.items()} == {
        "other int8": "ours int8", "other float32": "ours float32", "other wild": "ours more.onnx",
    }  # fmt: skip
    assert [each["ratio"]["median"] for each in found.values()] == [0.5, 0.8, 0.5]


def test_float32_of_ours_that_differs_is_a_fault_and_another_engine_is_left_out(driver: ModuleType) -> None:
    def drifts(largest: float) -> drift.Drift:
        half = np.full((4, 2), 0.4)
        return drift.measure(half, half + largest, np.full((4, 2), -1, np.int8), [0.9, 0.9])

    near, far = drifts(1e-6), drifts(1e-3)
    assert driver.differing({"ours float32": near, "OpenVINO float32": near, "ours int8": far}) == {}
    assert list(driver.differing({"ours float32": near, "OpenVINO float32": far})) == ["OpenVINO float32"]
    with pytest.raises(ParityError, match="ours float32 differs from torch float32 by"):
        driver.differing({"ours float32": far})


def test_what_is_asked_wrongly_ends_in_one_line(driver: ModuleType, run: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--run: give a run folder"):
        driver.measure(options(driver, None), tmp_path)
    with pytest.raises(SystemExit, match="--only: 'ours int4' is not one of ours float32, ours int8, "):
        driver.measure(options(driver, run, only="ours int4"), tmp_path)


def test_a_missing_engine_or_instruction_is_a_reason(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = Arm(path=Path("model.fp32.onnx"), threads=1)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match=r"openvino is not installed: pip install -r benchmarks/requirements-peers"):
        peers.openvino(arm)
    core = SimpleNamespace(get_property=lambda device, name: ["FP32", "INT8"])
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=lambda: core, __version__="0"))
    with pytest.raises(InputError, match="no bfloat16 instructions"):
        peers.openvino(arm, precision=peers.BFLOAT16)
    with pytest.raises(InputError, match=r"^OpenVINO: AttributeError: ") as caught:
        peers.openvino(arm)
    assert "\n" not in str(caught.value)


def test_openvino_answers_as_our_file_does(peers: ModuleType, run: Path) -> None:
    pytest.importorskip("openvino", reason="pip install -r benchmarks/requirements-peers.txt")
    path = run / "model.fp32.onnx"
    about, answer = peers.openvino(Arm(path=path, threads=1))
    ours = Predictor(path, device="cpu", threads=1)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 160, 160), np.uint8)
    np.testing.assert_allclose(answer(pixels), ours.probabilities(pixels), atol=1e-5)
    assert about.labels == ours.labels


def test_the_table_of_the_page_is_that_of_the_results(peers: ModuleType, tmp_path: Path) -> None:
    tables = importlib.import_module("peers_table")
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.common.between(page, "peers") == tables.table(), "run python benchmarks/peers_table.py"
    empty = tables.table(tmp_path)
    assert empty.count("**not measured**; `python benchmarks/run_peers.py --run RUN` measures it.") == 2
    far = {"flips": 12.34, "p99": 0.001, "macro_drop": 0.002, "map_drop": None}
    made = {
        "name": "peers", "date": "2026-01-02", "threads": 3, "rounds": 6, "calls_a_round": 11,
        "machine": {"cpu": "X", "cores": 4, "cpu_flags": ["avx2", "avx512_vnni"]}, "noise": {"share": 0.25},
        "films": {"checked": 5, "calibration": 6}, "not_measured": {"B": "it is not installed"},
        "engines": {"A": {"over_ours_float32": {"median": 0.5, "low": 0.4, "high": 0.6, "n": 6}, "drift": far}},
        "yardstick": {"jpeg_95": far, "one_pixel": far},
    }  # fmt: skip
    (tmp_path / "peers-x.json").write_text(json.dumps(made))
    lines = tables.table(tmp_path).splitlines()
    assert lines[2:4] == [
        "| A |  |  |  |  |  | 0.50 [0.40, 0.60] | 12.3 | 0.0010 | +0.0020 |  |",
        f"| B |{'  |' * 10}",
    ]
    assert "| film: one pixel |  |  |  |  |  |  | 12.3 | 0.0010 | +0.0020 |  |" in lines
    assert any(line.startswith("- with VNNI: X, 4 cores, 3 thread(s)") and "25%" in line for line in lines)
    assert "- with VNNI, B: not measured, it is not installed." in lines
