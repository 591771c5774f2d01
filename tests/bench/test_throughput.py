"""Images a second that are those of the real calls, a queue with known answers, and a rate that is proved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cxr_fast.bench import charts, measure, results, throughput
from cxr_fast.errors import ImageError, InputError
from cxr_fast.inference.predictor import Result
from cxr_fast.system import hardware
from tests.helpers.clocks import Clock

WHOLE = "file to probabilities"


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    for k in range(3):
        image = np.random.default_rng(k).integers(0, 256, (60, 80), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{k}.png")
    return folder


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(throughput, "now", made)
    return made


class Fake:
    """A predictor whose calls take 10 ms and 1 ms an image, and from files 2 ms an image more."""

    provider = "CPUExecutionProvider"

    def __init__(self, clock: Clock, largest: int = 999) -> None:
        self.clock, self.largest, self.calls = clock, largest, 0

    def pixels(self, path: str) -> np.ndarray:
        return np.zeros((4, 4), np.uint8)

    def run(self, pixels: np.ndarray) -> None:
        self.clock.pass_by(0.01 + 0.001 * len(pixels))

    def stream_batches(self, batches: Any, *, workers: int, seconds: dict[str, float]) -> Iterator[list[Result]]:
        for batch in batches:
            if len(batch) > self.largest:
                raise InputError("the model does not run on so many")
            self.clock.pass_by(0.01 + 0.003 * len(batch))
            seconds["decode"] = seconds.get("decode", 0) + 0.002 * len(batch)
            seconds["model"] = seconds.get("model", 0) + 0.01 + 0.001 * len(batch)
            yield [Result(path=path, probabilities=np.zeros(2)) for path in batch]


def sweep(clock: Clock, watch: measure.Watch, paths: list[str], largest: int = 999) -> throughput.BatchSweep:
    fake: Any = Fake(clock, largest)
    return throughput.BatchSweep(predictor=fake, paths=paths, workers=2, watch=watch, before=[])


def offline(clock: Clock, batches: list[int], largest: int = 999) -> dict[str, Any]:
    with measure.Watch() as watch:
        return sweep(clock, watch, ["a", "b"], largest).run(batches, 6.0, lambda *_: None)


# ----------------------------------------------------------------------------------------------------- offline


def test_rates_are_images_over_seconds(clock: Clock) -> None:
    found = offline(clock, [1, 2, 4, 8, 16, 32])
    for point in found["points"]:
        batch = point["batch"]
        assert point["model only"]["rate"] == pytest.approx(batch / (0.01 + 0.001 * batch))
        assert point["from files"]["rate"] == pytest.approx(batch / (0.01 + 0.003 * batch))
        assert len(point["from files"]["rates"]) == len(point["model only"]["rates"]) == 3
        waited = point["from files"]["waited"]
        assert waited["decode"] / sum(waited.values()) == pytest.approx(0.002 * batch / (0.01 + 0.003 * batch))
    assert found["best"]["batch"] == 32
    # From files 302/s at 32, 276/s at 16, 235/s at 8; the model alone 762/s at 32 and 615/s at 16.
    assert found["knee"] == {"model only": 32, "from files": 32}
    assert found["stopped"] is None


def test_it_lasts_about_as_long_as_asked_and_three_calls_at_least(clock: Clock) -> None:
    began = clock.time
    offline(clock, [1, 2, 4, 8])
    assert 6.0 <= clock.time - began < 8.0
    with measure.Watch() as watch:
        found = sweep(clock, watch, ["a"]).run([4], 1e-9, lambda *_: None)
    assert (found["points"][0]["model only"]["images"], found["points"][0]["from files"]["images"]) == (12, 12)
    assert len(watch.stretches) == 3


def test_a_batch_that_does_not_run_ends_the_row_and_is_said(clock: Clock) -> None:
    found = offline(clock, [1, 2, 4, 8], largest=2)
    assert [point["batch"] for point in found["points"]] == [1, 2]
    assert found["stopped"] == {"batch": 4, "why": "the model does not run on so many"}
    with pytest.raises(InputError, match="does not run on so many"):
        offline(clock, [1, 2], largest=0)


@pytest.mark.parametrize(
    ("rates", "at"), [({1: 10, 2: 19, 4: 20}, 2), ({1: 10, 2: 18.9, 4: 20}, 4), ({1: 5, 2: 4}, 1), ({8: 1}, 8)]
)
def test_the_knee_is_the_smallest_within_five_percent(rates: dict[int, float], at: int) -> None:
    assert throughput.knee(rates) == at


def test_batch_sizes_are_powers_of_two() -> None:
    assert [throughput.powers(n) for n in (1, 2, 3, 8, 100)] == [
        [1],
        [1, 2],
        [1, 2],
        [1, 2, 4, 8],
        [1, 2, 4, 8, 16, 32, 64],
    ]


def test_a_real_model_from_real_files(toy_model: Path, films: Path, tmp_path: Path) -> None:
    shown: list[str] = []
    spec = throughput.ThroughputSpec(images=films, max_batch=4, seconds=0.1, device="cpu", threads=1, workers=1)
    found = throughput.throughput(toy_model, spec, lambda done, total, text: shown.append(text))
    results.write(found, tmp_path / "t.json")
    assert [point["batch"] for point in found["points"]] == [1, 2, 4]
    assert found["images"] == {"given": True, "files": 3}
    assert shown == [f"batch {batch}" for batch in (1, 2, 4)] * 3
    text = throughput.describe(found)
    assert "knee (smallest within 5% of the best): batch " in text
    assert f"best: --batch-size {found['best']['batch']}, " in text
    assert "note: PHANTOM IMAGES" in text
    assert charts.draw(found).startswith(b"\x89PNG")


def test_an_image_that_cannot_be_read_is_no_throughput(toy_model: Path, films: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((films / "0.png").read_bytes())
    (tmp_path / "b.png").write_bytes((films / "0.png").read_bytes()[:90])
    for scenario in ("offline", "single-stream", "server"):
        with pytest.raises(ImageError, match=r"b\.png"):
            throughput.throughput(
                toy_model,
                throughput.ThroughputSpec(images=tmp_path, scenario=scenario, seconds=0.1, device="cpu", threads=1),
            )


def test_gpu_memory_is_what_was_taken_since_before(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [{"index": 0.0, "memory.used": 500.0}, {"index": 1.0, "memory.used": 9000.0}]
    monkeypatch.setattr(hardware, "gpu_states", lambda: cards)
    before = [{"index": 0.0, "memory.used": 500.0}, {"index": 1.0, "memory.used": 1000.0}]
    there: Any = type("P", (), {"provider": "CUDAExecutionProvider"})
    made = throughput.BatchSweep(predictor=there, paths=[], workers=1, watch=measure.Watch(), before=before)
    assert made._gpu_mib() == 8000
    there.provider = "CPUExecutionProvider"
    assert made._gpu_mib() is None


@pytest.mark.parametrize("scenario", ["single-stream", "server"])
def test_real_queries_end_in_a_checked_result(toy_model: Path, films: Path, tmp_path: Path, scenario: str) -> None:
    spec = throughput.ThroughputSpec(
        images=films, scenario=scenario, seconds=1.0, budget_ms=5000, percentile=50, device="cpu", threads=1
    )
    found = throughput.throughput(toy_model, spec)
    results.write(found, tmp_path / "r.json")
    assert results.read(tmp_path / "r.json")["scenario"] == scenario
    assert found["noise"]["samples"] > 0
    assert "p50 under 5000 ms" in throughput.describe(found)
    assert charts.draw(found).startswith(b"\x89PNG")
