"""What a result records, a neighbour that is seen and flagged, and figures that must follow from their samples."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import cxr_fast
from cxr_fast.bench import measure, records, results
from cxr_fast.cli import info
from cxr_fast.cli.main import main
from cxr_fast.errors import CxrFastError, InputError, SchemaError

WHOLE = "file to probabilities"


def latency(**changed: Any) -> dict[str, Any]:
    """A sound result of kind latency on made-up samples: 0.01 to 0.70 seconds."""
    samples = [k / 100 for k in range(1, 71)]
    limit = {"seconds": 1.0, "percentile": 90}
    model = dict.fromkeys(("model", "model_sha256", "variant", "provenance", "device", "provider", "where", "why"), "x")
    return {
        **results.head(records.LATENCY),
        **model,
        "threads": 1,
        "images": {},
        "cold": {},
        "gpus": {"before": [], "after": []},
        "noise": {"share": 0.0, "noisy": False, "stretches": []},
        "n": 70,
        "samples": {WHOLE: samples},
        "summary": {WHOLE: measure.summary(samples)},
        "budget": limit,
        "verdict": results.verdict(samples, limit) | {"slowest_stage": "model"},
        **changed,
    }


def server(**changed: Any) -> dict[str, Any]:
    limit, samples = {"seconds": 1.0, "percentile": 90}, [0.5] * 64
    trial = {"rate": 2.0, "n": 64, "served": 64, "samples": samples, "verdict": results.verdict(samples, limit)}
    found = {"scenario": "server", "seconds": 9.0, "workers": 1, "service": [0.1], "simulated": {}, "capacity": 9.0}
    base = {k: v for k, v in latency().items() if k not in ("n", "samples", "summary", "cold")}
    head = results.head(records.THROUGHPUT)
    return {
        **base,
        **head,
        **found,
        "trials": [trial],
        "rate": 2.0,
        "budget": limit,
        "verdict": trial["verdict"],
        **changed,
    }


def offline(**changed: Any) -> dict[str, Any]:
    arm = {"rates": [1.0, 3.0, 2.0], "rate": 2.0}
    point = {"batch": 1, "peak_rss": None, "model only": arm, "from files": dict(arm)}
    others = ("trials", "rate", "budget", "verdict", "service", "capacity", "simulated")
    base = {k: v for k, v in server().items() if k not in others}
    return {**base, "scenario": "offline", "points": [point], "knee": {}, "best": {}, **changed}


# ------------------------------------------------------------------------------------------------ read and write


@pytest.mark.parametrize("made", [latency, server, offline])
def test_a_sound_result_comes_back_as_it_was(made: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    result = made()
    results.write(result, tmp_path / "r.json")
    assert results.read(tmp_path / "r.json") == json.loads(json.dumps(result))


def changed(made: Callable[[], dict[str, Any]], path: str, value: Any) -> dict[str, Any]:
    """A result with one entry replaced, or left out where `value` is `...`."""
    result = copy.deepcopy(made())
    *way, last = path.split("/")
    inner: Any = result
    for step in way:
        inner = inner[int(step) if isinstance(inner, list) else step]
    key = int(last) if isinstance(inner, list) else last
    if value is ...:
        del inner[key]
    else:
        inner[key] = value
    return result


@pytest.mark.parametrize(
    ("made", "path", "value", "said"),
    [
        (latency, "kind", "cxr-fast doctor", "not a benchmark result"),
        (latency, "kind", ["x"], "not a benchmark result"),
        (latency, "machine", ..., "missing required field `machine`"),
        (latency, "machine/cores", ..., r"missing required field `cores` - at `\$.machine`"),
        (latency, "noise/noisy", 1, r"Expected `bool`, got `int` - at `\$.noise.noisy`"),
        (latency, "commit", "abc", r"Expected `object \| null`, got `str` - at `\$.commit`"),
        (latency, "n", True, r"Expected `int`, got `bool` - at `\$.n`"),
        (latency, "n", 71, "the n of file to probabilities is not that of its samples"),
        (latency, f"samples/{WHOLE}/3", 0.5, "summary of file to probabilities is not that of its samples"),
        (latency, f"samples/{WHOLE}/3", "fast", "Expected `float`, got `str`"),
        (latency, f"samples/{WHOLE}/3", float("nan"), "samples of file to probabilities are not times"),
        (latency, f"samples/{WHOLE}", [], "samples of file to probabilities are not times"),
        (latency, f"summary/{WHOLE}/percentiles/90", 0.1, "summary of"),
        (latency, f"summary/{WHOLE}/bounds/90", 0.1, "summary of"),
        (latency, "samples", {}, "samples of file to probabilities are not times"),
        (latency, "budget/seconds", 0.5, "is not that of its samples"),
        (latency, "verdict/result", "FAIL", "is not that of its samples"),
        (latency, "budget", None, "is not that of its samples"),
        (server, "scenario", "burst", "no scenario 'burst'"),
        (server, "rate", 3.0, "its last trial does not confirm the rate"),
        (server, "rate", None, "its last trial does not confirm the rate"),
        (server, "trials", [], "its last trial does not confirm the rate"),
        (server, "trials/0/served", 63, "number of requests served is not that of its samples"),
        (server, "trials/0/samples/0", 1.5, "is not that of its samples"),
        (offline, "points/0/from files/rates", [1.0, 2.0], "batch 1 from files has no 3 rates"),
        (offline, "points/0/from files/rates/0", 0, "samples of batch 1 .* are not rates above 0"),
        (offline, "points/0/model only/rate", 3.0, "rate of batch 1 model only is not that of its samples"),
        (offline, "points/0/batch", ..., "missing required field `batch`"),
    ],
)
def test_a_result_that_does_not_follow_from_its_samples_is_refused(
    made: Callable[[], dict[str, Any]], path: str, value: Any, said: str, tmp_path: Path
) -> None:
    (tmp_path / "r.json").write_text(json.dumps(changed(made, path, value)))
    with pytest.raises(InputError, match=said) as caught:
        results.read(tmp_path / "r.json")
    assert str(tmp_path / "r.json") in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("schema", [None, 1, 99, "2"])
def test_another_schema_is_refused_with_who_wrote_it(schema: Any, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(latency(schema=schema, written_by="cxr-fast 9.9")))
    with pytest.raises(SchemaError, match=r"schema .*, written by cxr-fast 9\.9; this version reads 2"):
        results.read(tmp_path / "r.json")


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"kind": 1}'])
def test_what_is_no_result_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(data)
    with pytest.raises(InputError):
        results.read(tmp_path / "r.json")
    with pytest.raises(InputError, match=r"gone\.json: cannot read it"):
        results.read(tmp_path / "gone.json")


def test_no_entry_can_be_missing_and_nothing_crashes(tmp_path: Path) -> None:
    for sound in (latency(), server(), offline()):
        for field in sound:
            for value in (..., None, 0, "x", [], {}, [None]):
                if field == "commit" and value in (None, {}):
                    continue
                try:
                    results.check(changed(lambda: sound, field, value), "r")  # noqa: B023
                except CxrFastError:
                    continue
                assert value is not ..., f"{field} may be left out"


def test_a_result_that_is_wrong_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        results.write(latency(n=3), tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_where_it_cannot_be_written_is_known_beforehand(tmp_path: Path) -> None:
    results.writable(None, "--json")
    results.writable(tmp_path / "r.json", "--json")
    results.writable(tmp_path / "r.PNG", "--plot", ".png")
    for out in (tmp_path, tmp_path / "gone" / "r.json"):
        with pytest.raises(InputError, match="--json: cannot write"):
            results.writable(out, "--json")
        with pytest.raises(InputError, match="--json: cannot write"):
            results.write(latency(), out)
    with pytest.raises(InputError, match=r"--plot: .* must end in \.png"):
        results.writable(tmp_path / "r.pdf", "--plot", ".png")


# ---------------------------------------------------------------------------------------------- what is recorded


def test_every_result_says_where_it_is_from() -> None:
    head = results.head(records.LATENCY)
    assert (head["kind"], head["schema"], head["written_by"]) == (
        records.LATENCY,
        2,
        f"cxr-fast {cxr_fast.__version__}",
    )
    assert head["date"].endswith("+00:00")
    assert head["versions"].keys() >= {"cxr-fast", "numpy", "pillow"}
    assert any(name.startswith("onnxruntime") for name in head["versions"])
    assert json.loads(json.dumps(head)) == head


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_the_packages_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)

    def git(*words: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(package), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert results.commit(package) is None
    git("init", "-q", str(package.parent))
    (package / "__init__.py").write_text("")
    assert results.commit(package) is None, "an installed package inside somebody's checkout"
    git("add", ".")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")
    assert results.commit(package) == {"revision": head, "dirty": False}
    (package.parent / "notes.txt").write_text("beside the package")
    assert results.commit(package) == {"revision": head, "dirty": False}
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    (package / "__init__.py").write_text("x = 1")
    assert results.commit(package) == {"revision": head, "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert results.commit(package) is None, "no git"


# ------------------------------------------------------------------------------------------- a file in a few lines


SAMPLES = {"a": [0.1, 0.3, 0.2], "b": [0.05, 0.15, 0.1]}
RATIO = asdict(measure.ratio_interval(SAMPLES["b"], SAMPLES["a"]))


def turns(kind: str, **more: Any) -> dict[str, Any]:
    """A sound result of arms that took turns."""
    with measure.Watch() as watch:
        watch.close("round 1", 1)
    return {**results.turns(kind, SAMPLES, watch, []), records.SPREADS[kind]: measure.spreads(SAMPLES), **more}


def comparison() -> dict[str, Any]:
    models = {
        "a": {"name": "x.onnx", "variant": "fp32", "where": "cpu"},
        "b": {"name": "y.onnx", "variant": "int8", "where": "cpu"},
    }
    return turns(records.COMPARISON, models=models, images={}, ratio=RATIO, difference={})


def cache() -> dict[str, Any]:
    return turns(records.CACHE, images=3, weights="random:0", ratios={"bound over whole": RATIO})


def training() -> dict[str, Any]:
    return turns(records.TRAINING, images=3, weights="biomedclip", ratios={"whole": RATIO})


def written(result: dict[str, Any], folder: Path) -> Path:
    """A result as the commands write it."""
    results.write(result, folder / "r.json")
    return folder / "r.json"


@pytest.mark.parametrize("made", [latency, server, offline, comparison, cache, training])
def test_every_kind_says_what_it_is_and_on_what(made: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    result = made()
    path = written(result, tmp_path)
    found, machine = results.describe(path), result["machine"]
    assert found["benchmark"].startswith(f"{path}, {result['kind'].removeprefix('cxr-fast ')}")
    assert f"schema {result['schema']}, {result['written_by']}" in found["benchmark"]
    assert found["date"] == result["date"]
    assert found["machine"].startswith(f"{machine['cpu']}, {machine['cores']} core(s)")
    assert found["noise"]
    assert found["verdict"]
    assert not [value for value in found.values() if "\n" in value]
    assert len(info.describe(path).splitlines()) == len([value for value in found.values() if value])


def test_latency_with_its_verdict(tmp_path: Path) -> None:
    found = results.describe(written(latency(), tmp_path))
    assert found["file to probabilities"] == "p50 350 ms (99 % bound 460 ms), p90 630 ms (99 % bound 690 ms); n 70"
    assert found["verdict"].startswith("PASS: p90 under 1000 ms")
    assert found["model"] == "x, variant x, sha256 x"


def test_throughput_by_scenario(tmp_path: Path) -> None:
    assert results.describe(written(offline(), tmp_path))["best"] == (
        "batch 1: 2.00 images/s from files, 2.00 images/s model only"
    )
    found = results.describe(written(server(), tmp_path))
    assert found["rate"] == "2.00 requests/s proved, 1 trial(s); without a pause 9.00/s"
    assert found["verdict"] == "PASS: p90 under 1000 ms"
    fails = server()
    fails |= {"rate": None, "trials": [], "verdict": fails["verdict"] | {"result": "FAIL"}}
    found = results.describe(written(fails, tmp_path))
    assert found["rate"].startswith("none proved, 0 trial(s)")
    assert found["verdict"].startswith("FAIL")


def test_turns_with_their_ratios(tmp_path: Path) -> None:
    found = results.describe(written(comparison(), tmp_path))
    assert found["a"] == "200 ms [100, 300], n 3"
    assert found["ratio, B over A"].startswith("0.50")
    assert found["model B"] == "y.onnx, int8, cpu"
    assert found["verdict"].startswith("none")
    found = results.describe(written(cache(), tmp_path))
    assert found["b"] == "100 ms an image [50, 150], n 3"
    assert found["weights"] == "random:0 (RANDOM, not BiomedCLIP)"
    found = results.describe(written(training(), tmp_path))
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
    found = results.describe(written(latency(noise=noise, gpus=gpus), tmp_path))
    assert found["noise"].startswith("NOISY: other processes took 40% of the machine")
    assert found["GPUs"] == "NVIDIA H100"


def test_info_refuses_what_is_no_result(tmp_path: Path) -> None:
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
    path.write_text(json.dumps(cache() | {"ratios": {"whole": 3}}))
    with pytest.raises(InputError, match="damaged, Expected `object`, got `int`"):
        info.describe(path)


def test_the_command_prints_it(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["info", str(written(latency(), tmp_path))])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("benchmark")
    assert "PASS: p90 under 1000 ms" in done.output


def test_a_run_of_which_no_sample_was_watched_says_so_without_a_fraction() -> None:
    noise = {"share": 0.3, "worst": 0.4, "threshold": 0.1, "noisy": True, "samples": 0, "noisy_samples": 0}
    assert results.describe_noise({"noise": noise}) == [  # type: ignore[typeddict-item]
        "NOISY: other processes took 30% of the machine during the run, up to 40%; over 10%: run it again on a quiet "
        "machine"
    ]
    (line,) = results.describe_noise({"noise": noise | {"samples": 9, "noisy_samples": 4}})  # type: ignore[typeddict-item]
    assert "over 10% while 4 of 9 samples were taken: run it again" in line
