"""Images a second that are those of the real calls, a queue with known answers, and a rate that is proved."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cxr_fast import bench_plots, throughput, timing
from cxr_fast import benchmark_record as record
from cxr_fast.errors import ImageError, InputError
from cxr_fast.predict import Predictor, Result

WHOLE = "file to probabilities"


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    for k in range(3):
        image = np.random.default_rng(k).integers(0, 256, (60, 80), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{k}.png")
    return folder


class Clock:
    """Time that passes only when somebody waits or works."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time

    def pass_by(self, seconds: float) -> None:
        assert seconds >= 0
        self.time += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(throughput, "now", made)
    monkeypatch.setattr(throughput, "sleep", made.pass_by)
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


def offline(clock: Clock, batches: list[int], largest: int = 999) -> dict[str, Any]:
    with record.Watch() as watch:
        fake: Any = Fake(clock, largest)
        return throughput.offline(fake, ["a", "b"], batches, 6.0, 2, watch, [], lambda *_: None)


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
    with record.Watch() as watch:
        fake: Any = Fake(clock)
        found = throughput.offline(fake, ["a"], [4], 1e-9, 2, watch, [], lambda *_: None)
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
    found = throughput.throughput(
        toy_model, images=films, max_batch=4, seconds=0.1, device="cpu", threads=1, workers=1,
        say=lambda done, total, text: shown.append(text),
    )  # fmt: skip
    record.write(found, tmp_path / "t.json")
    assert [point["batch"] for point in found["points"]] == [1, 2, 4]
    assert found["images"] == {"given": True, "files": 3}
    assert shown == [f"batch {batch}" for batch in (1, 2, 4)] * 3
    text = throughput.describe(found)
    assert "knee (smallest within 5% of the best): batch " in text
    assert f"best: --batch-size {found['best']['batch']}, " in text
    assert "note: PHANTOM IMAGES" in text
    assert bench_plots.draw(found).startswith(b"\x89PNG")


def test_an_image_that_cannot_be_read_is_no_throughput(toy_model: Path, films: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((films / "0.png").read_bytes())
    (tmp_path / "b.png").write_bytes((films / "0.png").read_bytes()[:90])
    for scenario in ("offline", "single-stream", "server"):
        with pytest.raises(ImageError, match=r"b\.png"):
            throughput.throughput(toy_model, images=tmp_path, scenario=scenario, seconds=0.1, device="cpu", threads=1)


def test_peak_memory_is_that_since_the_reset(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t   2048 kB\n")
    assert throughput.peak_rss(tmp_path) == 2 * 2**20
    assert throughput.peak_rss(tmp_path / "gone") is None
    assert throughput.reset_peak(tmp_path / "gone") is False
    if not throughput.reset_peak():
        pytest.skip("this system does not reset the peak")
    low = throughput.peak_rss()
    block = np.ones(2**26, np.uint8)
    high = throughput.peak_rss()
    assert low is not None
    assert high is not None
    assert high - low > 0.8 * block.nbytes
    del block
    throughput.reset_peak()
    again = throughput.peak_rss()
    assert again is not None
    assert again < high - 2**25


def test_gpu_memory_is_what_was_taken_since_before(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [{"index": 0.0, "memory.used": 500.0}, {"index": 1.0, "memory.used": 9000.0}]
    monkeypatch.setattr(record, "gpus", lambda: cards)
    before = [{"index": 0.0, "memory.used": 500.0}, {"index": 1.0, "memory.used": 1000.0}]
    there: Any = type("P", (), {"provider": "CUDAExecutionProvider"})
    assert throughput._gpu_mib(there, before) == 8000
    there.provider = "CPUExecutionProvider"
    assert throughput._gpu_mib(there, before) is None


# ------------------------------------------------------------------------------------------------ single-stream


def worker(clock: Clock, service: Iterable[float]) -> throughput.Worker:
    """A worker that takes the times told, again and again."""
    times = itertools.cycle(service)

    def answer(paths: list[str]) -> None:
        clock.pass_by(next(times))

    with record.Watch() as watch:
        made: Any = throughput.Worker(answer, ["a"], watch)  # type: ignore[arg-type]
    return made  # type: ignore[no-any-return]


def test_single_stream_counts_every_image(clock: Clock) -> None:
    limit = record.budget(0.06, 90)
    found = throughput.single_stream(worker(clock, [0.05]), 5.0, limit, 0, lambda *_: None)
    assert (found["n"], found["verdict"]["result"]) == (100, "PASS")
    assert found["rate"] == pytest.approx(20)
    late = throughput.single_stream(worker(clock, [0.07]), 5.0, limit, 0, lambda *_: None)
    assert late["verdict"]["result"] == "FAIL"
    short = throughput.single_stream(worker(clock, [0.05]), 1.0, limit, 0, lambda *_: None)
    assert (short["n"], short["verdict"]["result"]) == (20, "INCONCLUSIVE")


# ------------------------------------------------------------------------------------------------------- server


def test_arrivals_are_a_poisson_process_and_the_same_again() -> None:
    due = throughput.arrivals(4.0, 20_000, (1, 2))
    gaps = np.diff(due)
    assert due == throughput.arrivals(4.0, 20_000, (1, 2))
    assert due != throughput.arrivals(4.0, 20_000, (1, 3))
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.03)
    # Memoryless: a quarter second more after a quarter second is as likely as at first.
    assert (gaps > 0.5).sum() / (gaps > 0.25).sum() == pytest.approx((gaps > 0.25).mean(), abs=0.02)


def test_serving_is_one_at_a_time_in_order(clock: Clock) -> None:
    served: list[int] = []

    def answer(i: int) -> None:
        served.append(i)
        clock.pass_by(2.0)

    assert throughput.serve(answer, [1.0, 2.0, 2.5, 9.0]) == pytest.approx([2.0, 3.0, 4.5, 2.0])
    assert served == [0, 1, 2, 3]
    assert clock.time == pytest.approx(100 + 11)
    assert throughput.serve(answer, [1.0, 2.0, 2.5], lambda latencies: len(latencies) == 2) == pytest.approx([2.0, 3.0])


@pytest.mark.parametrize("seed", range(5))
def test_the_simulated_queue_is_the_one_that_is_served(clock: Clock, seed: int) -> None:
    dice = np.random.default_rng(seed)
    service, gaps = dice.exponential(0.8, 300), dice.exponential(1.0, 300)
    found = throughput.serve(lambda i: clock.pass_by(service[i]), np.cumsum(gaps).tolist())
    np.testing.assert_allclose(throughput.queue(service, gaps), found, rtol=1e-9)
    np.testing.assert_allclose(throughput.queue(service[None], gaps[None])[0], found, rtol=1e-9)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_the_queue_has_the_known_means(load: float) -> None:
    """Pollaczek and Khinchine: wait = load / (2 (1 - load)) (1 + variance) for a mean service of one."""
    dice, n = np.random.default_rng(5), 400_000
    gaps = dice.exponential(1 / load, n)
    constant = throughput.queue(np.ones(n), gaps).mean()
    assert constant == pytest.approx(1 + load / (2 * (1 - load)), rel=0.03)
    random = throughput.queue(dice.exponential(1.0, n), gaps).mean()
    assert random == pytest.approx(1 / (1 - load), rel=0.05)


def test_the_long_run_limit_is_that_of_theory() -> None:
    """M/M/1: p99 of the latency is log(100) / (1 - rate); within 20 it is so up to a rate of 0.77."""
    service = np.random.default_rng(0).exponential(1.0, 20_000).tolist()
    model = throughput.Simulated(service, record.budget(20.0, 99), 2000, 0)
    limit = throughput.largest(model.holds, 1.0, 0.005)
    assert limit == pytest.approx(1 - math.log(100) / 20, abs=0.03)
    # What nine of ten runs pass lies below, and all that is slower passes too.
    chosen = throughput.largest(lambda rate: model.passing(rate) >= throughput.SURE, 1.0)
    assert 0 < chosen < limit
    shares = [model.passing(rate) for rate in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert shares == sorted(shares, reverse=True)


def test_bisection_finds_the_edge() -> None:
    assert throughput.largest(lambda rate: rate <= 3.3, 10.0, 0.001) == pytest.approx(3.3, abs=0.01)
    assert throughput.largest(lambda rate: False, 10.0) == 0
    assert throughput.largest(lambda rate: True, 10.0) == pytest.approx(10, rel=0.03)


def server(clock: Clock, service: Iterable[float], seconds: float, budget: float, q: int = 99) -> dict[str, Any]:
    return throughput.server(worker(clock, service), seconds, record.budget(budget, q), 0, lambda *_: None)


def check(found: dict[str, Any]) -> None:
    record._check_rate(found, "r")
    for trial in found["trials"]:
        record._check_trial(trial, found["budget"], "r")


def test_a_rate_that_holds_is_found_and_proved(clock: Clock) -> None:
    began = clock.time
    found = server(clock, [0.1], 1000, 0.5)
    check(found)
    assert found["verdict"]["result"] == "PASS"
    assert found["capacity"] == pytest.approx(10)
    assert found["verdict"]["n"] >= 662
    assert found["trials"][-1]["rate"] == found["rate"] <= found["simulated"]["limit"] < 10
    # M/D/1, a plain loop over 600,000 requests: p99 is 5 service times at a load of 0.56.
    assert found["simulated"]["limit"] == pytest.approx(5.6, abs=0.3)
    assert 3 < found["rate"] < found["simulated"]["limit"]
    assert clock.time - began < 1020
    assert "PASS: p99 under 500 ms at " in throughput._server_lines(found)[1][-1]


def test_the_same_seed_finds_the_same(clock: Clock) -> None:
    first, second = (server(clock, [0.1, 0.12], 800, 0.5) for _ in range(2))
    assert first["trials"][0]["rate"] == pytest.approx(second["trials"][0]["rate"])
    assert first["trials"][0]["samples"] == pytest.approx(second["trials"][0]["samples"])


def test_one_image_alone_too_slow_is_a_fail_without_any_queue(clock: Clock) -> None:
    found = server(clock, [0.1], 100, 0.09)
    check(found)
    assert (found["verdict"]["result"], found["trials"], found["rate"]) == ("FAIL", [], None)
    assert throughput._server_lines(found)[1][-1] == "FAIL: p99 under 90 ms: one image alone takes too long"


def test_too_little_time_settles_nothing_and_says_how_much_would(clock: Clock) -> None:
    began = clock.time
    found = server(clock, [0.1], 60, 0.5)
    check(found)
    assert clock.time - began < 80
    assert (found["verdict"]["result"], found["rate"], len(found["trials"])) == ("INCONCLUSIVE", None, 1)
    needed = throughput.needed_seconds(found)
    assert f"give about --seconds {needed}" in throughput._server_lines(found)[1][-1]
    enough = server(clock, [0.1], needed, 0.5)
    assert enough["verdict"]["result"] == "PASS"


def test_a_machine_that_slows_down_proves_nothing(clock: Clock) -> None:
    """Measured at 100 ms, served at 300: the simulated rate does not hold in real time, and nothing is claimed."""
    found = server(clock, itertools.chain([0.1] * 2030, [0.3] * 40_000), 1000, 0.5)
    check(found)
    assert found["rate"] is None
    assert found["verdict"]["result"] == "INCONCLUSIVE"
    assert {trial["verdict"]["result"] for trial in found["trials"]} == {"FAIL"}
    assert all(trial["served"] < trial["n"] for trial in found["trials"]), "what is lost ends early"
    rates = [trial["rate"] for trial in found["trials"]]
    assert len(rates) > 1
    assert rates == sorted(rates, reverse=True)


def test_a_trial_that_ends_early_would_have_failed_whole(clock: Clock) -> None:
    limit = record.budget(0.5, 90)
    lost = throughput._trial(worker(clock, [0.1]), 20.0, 300, limit, (0, 0))
    assert lost["verdict"]["result"] == "FAIL"
    padded = lost["samples"] + [0.0] * (lost["n"] - lost["served"])
    assert timing.verdict(padded, 0.5, 90).result == "FAIL"
    assert timing.verdict([*lost["samples"][:-1], *[0.0] * (lost["n"] - lost["served"] + 1)], 0.5, 90).result != "FAIL"


def test_latencies_behind_a_queue_are_not_independent() -> None:
    """Why PASS asks the simulation too: at seven tenths of the capacity the bound misses the true p99 far too often."""
    dice = np.random.default_rng(1)
    true = np.quantile(throughput.queue(np.ones(400_000), dice.exponential(1 / 0.7, 400_000)), 0.99)
    runs = throughput.queue(np.ones((300, 728)), dice.exponential(1 / 0.7, (300, 728)))[:, -662:]
    bounds = [timing.bound(run.tolist(), 99) or 0 for run in runs]
    assert np.mean(np.array(bounds) >= true) < 0.9


@pytest.mark.parametrize("scenario", ["single-stream", "server"])
def test_real_queries_end_in_a_checked_result(toy_model: Path, films: Path, tmp_path: Path, scenario: str) -> None:
    found = throughput.throughput(
        toy_model, images=films, scenario=scenario, seconds=1.0, budget_ms=5000, percentile=50, device="cpu", threads=1
    )
    record.write(found, tmp_path / "r.json")
    assert record.read(tmp_path / "r.json")["scenario"] == scenario
    assert found["noise"]["samples"] > 0
    assert "p50 under 5000 ms" in throughput.describe(found)
    assert bench_plots.draw(found).startswith(b"\x89PNG")


def test_the_real_worker_answers_each_film_in_turn(toy_model: Path, films: Path) -> None:
    seen: list[str] = []

    class Spy(Predictor):
        def __call__(self, images: Any) -> list[dict[str, float]]:
            seen.extend(Path(image).name for image in images)
            return super().__call__(images)

    paths = [str(films / f"{k}.png") for k in range(3)]
    with record.Watch() as watch:
        made = throughput.Worker(Spy(toy_model, device="cpu", threads=1), paths, watch)
    for k in range(4):
        made(k)
    assert seen == ["0.png", "1.png", "2.png", "0.png"]
