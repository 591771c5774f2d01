"""A latency figure that says what it rests on, and a verdict that can be no."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cxr_fast.bench import films as film_files
from cxr_fast.bench import latency, measure, results
from cxr_fast.errors import DeviceError, ImageError, InputError
from tests.helpers.clocks import Clock

ALL = ("file to probabilities", "model only", *latency.STAGES)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of different sizes."""
    folder = tmp_path_factory.mktemp("films")
    for k, size in enumerate([(90, 120), (60, 60), (50, 200)]):
        image = np.random.default_rng(k).integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def result(toy_model: Path, films: Path) -> dict[str, Any]:
    return latency.latency(
        toy_model, latency.LatencySpec(images=films, repeats=64, warmup=2, budget_ms=1e6, device="cpu", threads=1)
    )


def test_every_stage_is_timed_as_often_as_asked(result: dict[str, Any]) -> None:
    assert tuple(sorted(result["samples"])) == tuple(sorted(ALL))
    assert all(len(values) == 64 and min(values) > 0 for values in result["samples"].values())
    assert result["n"] == 64
    assert (result["images"]["given"], result["images"]["files"]) == (True, 3)
    assert sorted(result["images"]["height_width"]) == [[50, 200], [60, 60], [90, 120]]
    assert (result["provider"], result["threads"], result["variant"]) == ("CPUExecutionProvider", 1, "fp32")
    assert result["cold"]["load"] > 0
    assert result["cold"]["first_run"] > 0
    assert result["provenance"] == "phantom images"
    assert result["why"] == "CPU: as asked"
    # What is left without the noisy stretches: nothing new where there are none, nothing at all where all are.
    assert (result["quiet"] is None) == (result["noise"]["noisy_samples"] in (0, 64))
    assert result["noise"]["samples"] == 64


def test_the_summary_is_of_the_samples(result: dict[str, Any]) -> None:
    for name, found in result["summary"].items():
        samples = result["samples"][name]
        assert found["n"] == 64
        assert found["percentiles"] == {str(q): measure.percentile(samples, q) for q in (50, 90)}, "64 speak of no p95"
        assert found["bounds"] == {str(q): measure.bound(samples, q) for q in (50, 90)}
        thirds = (samples[:22], samples[22:43], samples[43:])
        assert found["window_medians"] == [measure.percentile(part, 50) for part in thirds]


def test_the_result_is_json(result: dict[str, Any], tmp_path: Path) -> None:
    results.write(result, tmp_path / "r.json")
    assert results.read(tmp_path / "r.json") == json.loads(json.dumps(result))
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == json.loads(json.dumps(result))
    assert json.loads(text)["machine"]["cores"] >= 1
    for out in (tmp_path, tmp_path / "r.json" / "below.json"):
        with pytest.raises(InputError, match="--json: cannot write"):
            results.write(result, out)


def test_each_stage_is_the_work_it_names(toy_model: Path, films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each slowed in turn by over 20 ms: that stage shows it, the verdict names it, and the others do not."""
    for stage, (owner, name) in {
        "read": (latency, "read_bytes"),
        "decode": (latency, "decode_grey"),
        "resize": (latency, "resize"),
        "model": (latency.Predictor, "run"),
    }.items():
        with monkeypatch.context() as patch:
            clock = Clock()
            patch.setattr(latency, "time", SimpleNamespace(perf_counter=clock))
            patch.setattr(owner, name, slowed(getattr(owner, name), clock))
            found = latency.latency(
                toy_model, latency.LatencySpec(images=films, repeats=4, warmup=0, device="cpu", threads=1)
            )
        assert min(found["samples"][stage]) >= 0.02
        assert latency.slowest(found["samples"]) == stage
        others = [min(found["samples"][other]) for other in latency.STAGES if other != stage]
        assert max(others) < 0.02
        if stage == "model":
            assert min(found["samples"]["model only"]) >= 0.02
            assert min(found["samples"]["file to probabilities"]) >= 0.02
            assert found["cold"]["first_run"] >= 0.02


def slowed(fn: Any, clock: Clock) -> Any:
    def slow(*args: Any, **kwargs: Any) -> Any:
        clock.pass_by(1 / 32)  # no rounding in any sum
        return fn(*args, **kwargs)

    return slow


def test_the_stages_add_up(result: dict[str, Any]) -> None:
    """The real call does nothing that no stage shows; the fastest of 64 each, so that noise is out of it."""
    fastest = {name: min(values) for name, values in result["samples"].items()}
    total = sum(fastest[stage] for stage in latency.STAGES)
    assert total / 5 < fastest["file to probabilities"] < 5 * total
    assert fastest["model only"] < 5 * fastest["model"]


def test_warm_up_is_not_counted_and_images_take_turns(
    toy_model: Path, films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    read = latency.read_bytes
    monkeypatch.setattr(latency, "read_bytes", lambda path: (seen.append(Path(path).name), read(path))[1])
    found = latency.latency(toy_model, latency.LatencySpec(images=films, repeats=4, warmup=3, device="cpu", threads=1))
    assert seen == ["0.png", "1.png", "2.png", "0.png", "1.png", "2.png", "0.png"]
    assert len(found["samples"]["read"]) == 4


# ------------------------------------------------------------------------------------------------- verdict


def test_a_generous_budget_passes(result: dict[str, Any]) -> None:
    assert result["verdict"]["result"] == "PASS"
    assert result["verdict"]["bound"] == measure.bound(result["samples"]["file to probabilities"], 90)
    assert results.EXIT["PASS"] == 0


@pytest.mark.parametrize("percentile", [50, 90])
def test_an_absurd_budget_fails(toy_model: Path, films: Path, percentile: int) -> None:
    found = latency.latency(
        toy_model,
        latency.LatencySpec(
            images=films, repeats=12, warmup=0, budget_ms=1e-6, percentile=percentile, device="cpu", threads=1
        ),
    )
    assert found["verdict"]["result"] == "FAIL"
    assert found["verdict"]["over"] == 12
    assert results.EXIT["FAIL"] == 1
    assert f"FAIL: p{percentile} under 1e-06 ms" in latency.describe(found)
    assert f"slowest stage: {found['verdict']['slowest_stage']}, " in latency.describe(found)


def test_too_few_samples_settle_nothing(toy_model: Path, films: Path) -> None:
    found = latency.latency(
        toy_model, latency.LatencySpec(images=films, repeats=5, warmup=0, budget_ms=1e6, device="cpu", threads=1)
    )
    assert found["verdict"]["result"] == "INCONCLUSIVE"
    assert results.EXIT["INCONCLUSIVE"] == 3
    text = latency.describe(found)
    assert "INCONCLUSIVE: p90 under 1e+06 ms, file to probabilities; 59 more samples needed: --repeats 64" in text
    assert "not shown, n is too small: p90, p95, p99" in text


# -------------------------------------------------------------------------------------------- the text, inputs


def test_the_text_says_what_was_measured(result: dict[str, Any]) -> None:
    text = latency.describe(result)
    lines = text.splitlines()
    whole, ms = result["summary"]["file to probabilities"], results.milliseconds
    assert lines[0].split() == ["ms", "p50", "99", "%", "bound", "p90", "99", "%", "bound", "p50", "by", "thirds"]
    figures = [ms(whole[part][q]) for q in ("50", "90") for part in ("percentiles", "bounds")]
    thirds = "/".join(map(ms, whole["window_medians"]))
    assert lines[2].removeprefix("file to probabilities").split() == [*figures, thirds]
    assert [line.split()[0] for line in lines[4:9]] == list(latency.STAGES)
    assert "n 64, 3 file(s) (60 x 60 to 90 x 120 pixels), read from the page cache, variant fp32" in text
    assert "CPUExecutionProvider, 1 thread(s) on " in text
    assert "device: CPU: as asked" in text
    assert "cold start: load " in text
    assert "not shown, n is too small: p95, p99" in text
    assert "PASS: p90 under 1e+06 ms, file to probabilities; 99 % bound " in lines[-1]
    assert lines[-1].endswith(" ms, MLPerf-style, not MLPerf")
    assert "note: PHANTOM IMAGES" in text


def test_a_short_stage_keeps_its_digits() -> None:
    assert [results.milliseconds(x) for x in (1.25, 0.0123, 0.001, 0.000123)] == ["1250.0", "12.3", "1.0", "0.123"]


def noise(**changed: Any) -> dict[str, Any]:
    known = {"share": 0.01, "worst": 0.02, "threshold": 0.1, "noisy": False, "samples": 64, "noisy_samples": 0}
    return {**known, "stretches": [], **changed}


def test_a_noisy_machine_is_said(result: dict[str, Any]) -> None:
    some = noise(share=0.08, worst=0.5, noisy=True, noisy_samples=7)
    quiet = measure.summary(result["samples"]["file to probabilities"][7:])
    text = latency.describe({**result, "noise": some, "quiet": quiet})
    assert "NOISY: other processes took 8% of the machine during the run, up to 50%; over 10% while 7 of 64 " in text
    assert f"without the noisy stretches: p50 {1000 * quiet['percentiles']['50']:.1f} ms (n 57); the verdict" in text
    # The share also counts the time between the stretches, so the worst of them may lie below it.
    whole = noise(share=0.8, worst=0.79, noisy=True, noisy_samples=64)
    text = latency.describe({**result, "noise": whole, "quiet": None})
    assert "NOISY: other processes took 80% of the machine during the run; over 10% while 64 of 64 " in text
    calm = latency.describe({**result, "noise": noise(), "quiet": None})
    assert "NOISY" not in calm
    assert "without the noisy" not in calm
    unknown = latency.describe({**result, "noise": noise(share=None), "quiet": None})
    assert "how much other processes used the machine is unknown on this system" in unknown


def test_samples_of_noisy_stretches_stay_in_the_figures_and_are_left_out_beside_them() -> None:
    watch = measure.Watch()
    watch.stretches = [
        {"name": "", "first": 0, "samples": 2, "share": 0.0, "noisy": False},
        {"name": "", "first": 2, "samples": 3, "share": 0.5, "noisy": True},
        {"name": "", "first": 5, "samples": 1, "share": None, "noisy": False},
    ]
    assert latency._quiet([1.0, 2.0, 9.0, 9.0, 9.0, 3.0], watch) == measure.summary([1.0, 2.0, 3.0])
    watch.stretches[1]["noisy"] = False
    assert latency._quiet([1.0, 2.0, 9.0, 9.0, 9.0, 3.0], watch) is None


def test_windows_far_apart_are_said() -> None:
    assert results.describe_unsteady({"x": [1.0, 1.05, 1.09]}) == []
    assert results.describe_unsteady({"x": [1.0, 1.0, 1.2]}) == [
        "UNSTEADY: the medians of x in 3 windows differ by 20%"
    ]


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([1.0] * 64, "PASS: p90 under 2000 ms, file to probabilities; 99 % bound 1000.0 ms, MLPerf-style, not MLPerf"),
        ([3.0] * 64, "FAIL: p90 under 2000 ms"),
        ([1.0] * 90 + [3.0] * 10, "; too close to the budget for any number of samples"),
        ([1.0] * 60, "; 4 more samples needed: --repeats 64"),
    ],
)
def test_the_last_line_is_the_verdict(samples: list[float], said: str) -> None:
    limit = {"seconds": 2.0, "percentile": 90}
    assert said in results.describe_verdict({"budget": limit, "verdict": results.verdict(samples, limit)})


def test_without_images_phantoms_are_drawn(toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(film_files, "FILM", (120, 100))
    found = latency.latency(toy_model, latency.LatencySpec(repeats=7, warmup=0, device="cpu", threads=1))
    assert found["images"] == {"given": False, "files": 6, "height_width": [[120, 100]] * 6}
    assert "6 phantoms at acquisition size" in latency.describe(found)


def test_inputs_that_cannot_be_timed_are_refused(toy_model: Path, films: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model"):
        latency.latency(tmp_path / "m.onnx", latency.LatencySpec(images=films))
    with pytest.raises(InputError, match="a folder without images"):
        latency.latency(toy_model, latency.LatencySpec(images=tmp_path, device="cpu"))
    with pytest.raises(DeviceError, match="--device"):
        latency.latency(toy_model, latency.LatencySpec(images=films, device="gpu"))
    with pytest.raises(ImageError, match=r"gone\.png: no such file"):
        latency.latency(toy_model, latency.LatencySpec(images=tmp_path / "gone.png", device="cpu"))
    (tmp_path / "broken.png").write_bytes((films / "0.png").read_bytes()[:100])
    with pytest.raises(ImageError, match=r"broken\.png") as caught:
        latency.latency(toy_model, latency.LatencySpec(images=tmp_path, device="cpu"))
    assert caught.value.exit_code == 2
