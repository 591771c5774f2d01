"""A queue with known answers, and a rate that is claimed only where it is proved."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxr_fast.bench import measure, records, results
from cxr_fast.bench import server as serving
from cxr_fast.inference.predictor import Predictor
from tests.helpers.clocks import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(serving, "now", made)
    monkeypatch.setattr(serving, "sleep", made.pass_by)
    return made


# ------------------------------------------------------------------------------------------------ single-stream


def responder(clock: Clock, service: Iterable[float]) -> serving.Responder:
    """A worker that takes the times told, again and again."""
    times = itertools.cycle(service)

    def answer(paths: list[str]) -> None:
        clock.pass_by(next(times))

    with measure.Watch() as watch:
        made: Any = serving.Responder(answer, ["a"], watch)  # type: ignore[arg-type]
    return made  # type: ignore[no-any-return]


def test_single_stream_counts_every_image(clock: Clock) -> None:
    limit = {"seconds": 0.06, "percentile": 90}
    found = serving.single_stream(responder(clock, [0.05]), 5.0, limit, 0, lambda *_: None)
    assert (found["n"], found["verdict"]["result"]) == (100, "PASS")
    assert found["rate"] == pytest.approx(20)
    late = serving.single_stream(responder(clock, [0.07]), 5.0, limit, 0, lambda *_: None)
    assert late["verdict"]["result"] == "FAIL"
    short = serving.single_stream(responder(clock, [0.05]), 1.0, limit, 0, lambda *_: None)
    assert (short["n"], short["verdict"]["result"]) == (20, "INCONCLUSIVE")


# ------------------------------------------------------------------------------------------------------- server


def test_arrivals_are_a_poisson_process_and_the_same_again() -> None:
    due = serving.arrivals(4.0, 20_000, (1, 2))
    gaps = np.diff(due)
    assert due == serving.arrivals(4.0, 20_000, (1, 2))
    assert due != serving.arrivals(4.0, 20_000, (1, 3))
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.03)
    # Memoryless: a quarter second more after a quarter second is as likely as at first.
    assert (gaps > 0.5).sum() / (gaps > 0.25).sum() == pytest.approx((gaps > 0.25).mean(), abs=0.02)


def test_serving_is_one_at_a_time_in_order(clock: Clock) -> None:
    served: list[int] = []

    def answer(i: int) -> None:
        served.append(i)
        clock.pass_by(2.0)

    assert serving.serve(answer, [1.0, 2.0, 2.5, 9.0]) == pytest.approx([2.0, 3.0, 4.5, 2.0])
    assert served == [0, 1, 2, 3]
    assert clock.time == pytest.approx(100 + 11)
    assert serving.serve(answer, [1.0, 2.0, 2.5], lambda latencies: len(latencies) == 2) == pytest.approx([2.0, 3.0])


@pytest.mark.parametrize("seed", range(5))
def test_the_simulated_queue_is_the_one_that_is_served(clock: Clock, seed: int) -> None:
    dice = np.random.default_rng(seed)
    service, gaps = dice.exponential(0.8, 300), dice.exponential(1.0, 300)
    found = serving.serve(lambda i: clock.pass_by(service[i]), np.cumsum(gaps).tolist())
    np.testing.assert_allclose(serving.queue(service, gaps), found, rtol=1e-9)
    np.testing.assert_allclose(serving.queue(service[None], gaps[None])[0], found, rtol=1e-9)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_the_queue_has_the_known_means(load: float) -> None:
    """Pollaczek and Khinchine: wait = load / (2 (1 - load)) (1 + variance) for a mean service of one."""
    dice, n = np.random.default_rng(5), 400_000
    gaps = dice.exponential(1 / load, n)
    constant = serving.queue(np.ones(n), gaps).mean()
    assert constant == pytest.approx(1 + load / (2 * (1 - load)), rel=0.03)
    random = serving.queue(dice.exponential(1.0, n), gaps).mean()
    assert random == pytest.approx(1 / (1 - load), rel=0.05)


def test_the_long_run_limit_is_that_of_theory() -> None:
    """M/M/1: p99 of the latency is log(100) / (1 - rate); within 20 it is so up to a rate of 0.77."""
    service = np.random.default_rng(0).exponential(1.0, 20_000).tolist()
    model = serving.Simulated(service, {"seconds": 20.0, "percentile": 99}, 2000, 0)
    limit = serving.largest(model.holds, 1.0, 0.005)
    assert limit == pytest.approx(1 - math.log(100) / 20, abs=0.03)
    # What nine of ten runs pass lies below, and all that is slower passes too.
    chosen = serving.largest(lambda rate: model.passing(rate) >= serving.SURE, 1.0)
    assert 0 < chosen < limit
    shares = [model.passing(rate) for rate in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert shares == sorted(shares, reverse=True)


def test_bisection_finds_the_edge() -> None:
    assert serving.largest(lambda rate: rate <= 3.3, 10.0, 0.001) == pytest.approx(3.3, abs=0.01)
    assert serving.largest(lambda rate: False, 10.0) == 0
    assert serving.largest(lambda rate: True, 10.0) == pytest.approx(10, rel=0.03)


def server(clock: Clock, service: Iterable[float], seconds: float, budget: float, q: int = 99) -> dict[str, Any]:
    return serving.server(responder(clock, service), seconds, {"seconds": budget, "percentile": q}, 0, lambda *_: None)


def check(found: dict[str, Any]) -> None:
    for what, stored, expected in results._figures({"kind": records.THROUGHPUT, **found}):
        assert stored == expected, what


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
    assert "PASS: p99 under 500 ms at " in serving.describe_server(found)[1][-1]


def test_the_same_seed_finds_the_same(clock: Clock) -> None:
    first, second = (server(clock, [0.1, 0.12], 800, 0.5) for _ in range(2))
    assert first["trials"][0]["rate"] == pytest.approx(second["trials"][0]["rate"])
    assert first["trials"][0]["samples"] == pytest.approx(second["trials"][0]["samples"])


def test_one_image_alone_too_slow_is_a_fail_without_any_queue(clock: Clock) -> None:
    found = server(clock, [0.1], 100, 0.09)
    check(found)
    assert (found["verdict"]["result"], found["trials"], found["rate"]) == ("FAIL", [], None)
    assert serving.describe_server(found)[1][-1] == "FAIL: p99 under 90 ms: one image alone takes too long"


def test_too_little_time_settles_nothing_and_says_how_much_would(clock: Clock) -> None:
    began = clock.time
    found = server(clock, [0.1], 60, 0.5)
    check(found)
    assert clock.time - began < 80
    assert (found["verdict"]["result"], found["rate"], len(found["trials"])) == ("INCONCLUSIVE", None, 1)
    needed = serving.needed_seconds(found)
    assert f"give about --seconds {needed}" in serving.describe_server(found)[1][-1]
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
    limit = {"seconds": 0.5, "percentile": 90}
    lost = serving._trial(responder(clock, [0.1]), 20.0, 300, limit, (0, 0))
    assert lost["verdict"]["result"] == "FAIL"
    padded = lost["samples"] + [0.0] * (lost["n"] - lost["served"])
    assert measure.verdict(padded, 0.5, 90).result == "FAIL"
    assert measure.verdict([*lost["samples"][:-1], *[0.0] * (lost["n"] - lost["served"] + 1)], 0.5, 90).result != "FAIL"


def test_latencies_behind_a_queue_are_not_independent() -> None:
    """Why PASS asks the simulation too: at seven tenths of the capacity the bound misses the true p99 far too often."""
    dice = np.random.default_rng(1)
    true = np.quantile(serving.queue(np.ones(400_000), dice.exponential(1 / 0.7, 400_000)), 0.99)
    runs = serving.queue(np.ones((300, 728)), dice.exponential(1 / 0.7, (300, 728)))[:, -662:]
    bounds = [measure.bound(run.tolist(), 99) or 0 for run in runs]
    assert np.mean(np.array(bounds) >= true) < 0.9


def test_the_real_worker_answers_each_film_in_turn(toy_model: Path, toy_data: Path) -> None:
    seen: list[str] = []

    class Spy(Predictor):
        def __call__(self, images: Any) -> list[dict[str, float]]:
            seen.extend(Path(image).name for image in images)
            return super().__call__(images)

    paths = [str(path) for path in sorted((toy_data / "images").iterdir())[:3]]
    with measure.Watch() as watch:
        made = serving.Responder(Spy(toy_model, device="cpu", threads=1), paths, watch)
    for k in range(4):
        made(k)
    assert seen == [Path(paths[k]).name for k in (0, 1, 2, 0)]
