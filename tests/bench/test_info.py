"""A benchmark's JSON told in a few lines, each kind's figures as its samples have them; what is none is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cxr_fast.bench import info as bench_info
from cxr_fast.bench import measure, results
from cxr_fast.cli import info
from cxr_fast.cli.main import main
from cxr_fast.errors import InputError, SchemaError
from tests.bench.test_results import latency, offline, server

SAMPLES = {"a": [0.1, 0.3, 0.2], "b": [0.05, 0.15, 0.1]}
RATIO = asdict(measure.ratio_interval(SAMPLES["b"], SAMPLES["a"]))


def turns(kind: str, **more: Any) -> dict[str, Any]:
    """A sound result of arms that took turns."""
    with results.Watch() as watch:
        watch.close("round 1", 1)
    return results.turns(kind, SAMPLES, watch, []) | more


def comparison() -> dict[str, Any]:
    models = {
        "a": {"name": "x.onnx", "variant": "fp32", "where": "cpu"},
        "b": {"name": "y.onnx", "variant": "int8", "where": "cpu"},
    }
    return turns(results.COMPARISON, models=models, images={}, ratio=RATIO, difference={})


def cache() -> dict[str, Any]:
    return turns(results.CACHE, images=3, weights="random:0", ratios={"bound over whole": RATIO})


def training() -> dict[str, Any]:
    return turns(results.TRAINING, images=3, weights="biomedclip", ratios={"whole": RATIO})


def written(result: dict[str, Any], folder: Path) -> Path:
    """A result as the commands write it."""
    results.write(result, folder / "r.json")
    return folder / "r.json"


@pytest.mark.parametrize("made", [latency, server, offline, comparison, cache, training])
def test_every_kind_says_what_it_is_and_on_what(made: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    result = made()
    path = written(result, tmp_path)
    found, machine = bench_info.facts(path), result["machine"]
    assert found["benchmark"].startswith(f"{path}, {result['kind'].removeprefix('cxr-fast ')}")
    assert f"schema {result['schema']}, {result['written_by']}" in found["benchmark"]
    assert found["date"] == result["date"]
    assert found["machine"].startswith(f"{machine['cpu']}, {machine['cores']} core(s)")
    assert found["noise"]
    assert found["verdict"]
    assert not [value for value in found.values() if "\n" in value]
    assert len(info.describe(path).splitlines()) == len([value for value in found.values() if value])


def test_latency_with_its_verdict(tmp_path: Path) -> None:
    found = bench_info.facts(written(latency(), tmp_path))
    assert found["file to probabilities"] == "p50 350 ms (99 % bound 460 ms), p90 630 ms (99 % bound 690 ms); n 70"
    assert found["verdict"].startswith("PASS: p90 under 1000 ms")
    assert found["model"] == "x, variant x, sha256 x"


def test_throughput_by_scenario(tmp_path: Path) -> None:
    assert bench_info.facts(written(offline(), tmp_path))["best"] == (
        "batch 1: 2.00 images/s from files, 2.00 images/s model only"
    )
    found = bench_info.facts(written(server(), tmp_path))
    assert found["rate"] == "2.00 requests/s proved, 1 trial(s); without a pause 9.00/s"
    assert found["verdict"] == "PASS: p90 under 1000 ms"
    fails = server()
    fails |= {"rate": None, "trials": [], "verdict": fails["verdict"] | {"result": "FAIL"}}
    found = bench_info.facts(written(fails, tmp_path))
    assert found["rate"].startswith("none proved, 0 trial(s)")
    assert found["verdict"].startswith("FAIL")


def test_turns_with_their_ratios(tmp_path: Path) -> None:
    found = bench_info.facts(written(comparison(), tmp_path))
    assert found["a"] == "200 ms [100, 300], n 3"
    assert found["ratio, B over A"].startswith("0.50")
    assert found["model B"] == "y.onnx, int8, cpu"
    assert found["verdict"].startswith("none")
    found = bench_info.facts(written(cache(), tmp_path))
    assert found["b"] == "100 ms an image [50, 150], n 3"
    assert found["weights"] == "random:0 (RANDOM, not BiomedCLIP)"
    found = bench_info.facts(written(training(), tmp_path))
    assert found["a"] == "200 ms a sample [100, 300], n 3"
    assert found["weights"] == "biomedclip"


def test_a_noisy_machine_and_a_gpu_are_said(tmp_path: Path) -> None:
    noise = {
        "share": 0.4,
        "worst": 0.5,
        "threshold": 0.1,
        "noisy": True,
        "samples": 70,
        "noisy_samples": 9,
        "stretches": [],
    }
    gpus = {"before": [{"name": "NVIDIA H100"}], "after": []}
    found = bench_info.facts(written(latency(noise=noise, gpus=gpus), tmp_path))
    assert found["noise"].startswith("NOISY: other processes took 40% of the machine")
    assert found["GPUs"] == "NVIDIA H100"


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    path = written(latency(), tmp_path)
    result = json.loads(path.read_text())
    for changed, error, match in (
        ({"n": 71}, InputError, "damaged"),
        ({"schema": 99}, SchemaError, "schema 99"),
        ({"kind": "other"}, InputError, "not a benchmark result"),
    ):
        path.write_text(json.dumps(result | changed))
        with pytest.raises(error, match=match):
            info.describe(path)
    path.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        info.describe(path)
    results.write(cache() | {"ratios": {"whole": 3}}, path)
    with pytest.raises(InputError, match="its ratio whole is none"):
        info.describe(path)


def test_the_command_prints_it(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["info", str(written(latency(), tmp_path))])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("benchmark")
    assert "PASS: p90 under 1000 ms" in done.output
