"""Known answers, simulated coverage, the edges of a verdict, and a neighbour that is seen and flagged."""

from __future__ import annotations

import copy
import itertools
import math
import os
import random
import time
from fractions import Fraction
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cxr_fast.bench import measure
from cxr_fast.errors import InputError
from tests.helpers import states
from tests.helpers.clocks import Clock


def test_measure_warms_up_repeats_and_synchronises() -> None:
    calls: list[str] = []
    times = measure.measure(lambda: calls.append("f"), warmup=2, repeats=3, sync=lambda: calls.append("s"))
    assert calls == ["f", "f", *["s", "f", "s"] * 3]
    assert len(times) == 3
    assert all(0 <= t < 1 for t in times)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What `measure` measures with."""
    made = Clock()
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter_ns=made.ns))
    return made


def test_measure_is_in_seconds_and_covers_the_device(clock: Clock) -> None:
    times = measure.measure(lambda: clock.pass_by(0.01), warmup=0, repeats=3)
    assert all(0.01 <= t < 1 for t in times)
    # Work that only the synchronisation waits for belongs to the call that queued it.
    queued: list[int] = []

    def wait() -> None:
        clock.pass_by(0.02 * len(queued))
        queued.clear()

    assert measure.measure(lambda: queued.append(1), warmup=0, repeats=1, sync=wait)[0] >= 0.02


def test_measure_fills_the_time_asked_for(clock: Clock) -> None:
    times = measure.measure(lambda: clock.pass_by(0.002), warmup=0, repeats=2, min_seconds=0.03)
    assert len(times) > 2
    assert sum(times) >= 0.03 > sum(times[:-1])


def test_interleave_takes_turns() -> None:
    calls: list[str] = []
    arms = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = measure.interleave(arms, rounds=3, warmup=1)
    assert "".join(calls) == "ab" + "ababab"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_percentile_is_the_nearest_rank() -> None:
    samples = [15.0, 20.0, 35.0, 40.0, 50.0][::-1]
    assert [measure.percentile(samples, q) for q in (5, 30, 40, 50, 100)] == [15, 20, 20, 35, 50]
    assert measure.percentile(range(1, 101), 7) == 7
    assert measure.percentile(range(1, 101), 99) == 99
    assert measure.median([3.0, 1.0, 2.0, 10.0]) == 2.5
    for samples, q in (([], 50), ([1.0], 0), ([1.0], 101)):
        with pytest.raises(InputError):
            measure.percentile(samples, q)


def binomial_cdf(k: int, n: int, p: float) -> float:
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


@pytest.mark.parametrize(("q", "least", "exists"), [(50, 11, 7), (90, 64, 44), (95, 130, 90), (99, 662, 459)])
def test_sample_sizes_are_mlperfs(q: int, least: int, exists: int) -> None:
    """`supported` is the published table; `bound` exists earlier, as the maximum, until one sample may be spared."""
    assert q in measure.supported(least)
    assert q not in measure.supported(least - 1)
    assert measure.bound(range(exists - 1), q) is None
    assert measure.bound(range(exists), q) == exists - 1
    assert measure.bound(range(least - 1), q) == least - 2
    assert measure.bound(range(least), q) == least - 2
    # The rule itself, by the plain sum: one sample over the budget leaves 99 % confidence, one sample fewer does not.
    assert binomial_cdf(1, least, (100 - q) / 100) <= 0.01 < binomial_cdf(1, least - 1, (100 - q) / 100)


@pytest.mark.parametrize("q", [10, 50, 90, 95, 99])
@pytest.mark.parametrize("n", [1, 7, 100, 459, 700])
def test_bounds_are_the_exact_order_statistics(n: int, q: int) -> None:
    ranks, share = range(1, n + 1), Fraction(q, 100)
    chances = [math.comb(n, i) * share**i * (1 - share) ** (n - i) for i in range(n + 1)]
    below = list(itertools.accumulate(chances))
    upper = [k for k in ranks if below[k - 1] >= Fraction(99, 100)]
    assert measure.bound(ranks, q) == (min(upper) if upper else None)
    lower = [j for j in ranks if 1 - below[j - 1] >= Fraction(99, 100)]
    assert measure.lower_bound(ranks, q) == (max(lower) if lower else None)


def test_bounds_of_many_samples_are_near_the_normal_ones() -> None:
    samples, reach = range(1, 10**6 + 1), NormalDist().inv_cdf(0.99)
    for q in (50, 99):
        middle, spread = 10**4 * q, math.sqrt(10**6 * q / 100 * (1 - q / 100))
        assert measure.bound(samples, q) == pytest.approx(middle + reach * spread, abs=3)
        assert measure.lower_bound(samples, q) == pytest.approx(middle - reach * spread, abs=3)


def test_coverage_is_at_least_what_is_promised() -> None:
    """4,000 runs of 200 skewed latencies: the true p90 is under the bound in 99 % of them, and not in all."""
    dice = random.Random(7)
    true = math.exp(1.2815515655446004)
    kept_above = kept_below = 0
    for _ in range(4000):
        samples = sorted(math.exp(dice.gauss(0, 1)) for _ in range(200))
        upper, lower = measure.bound(samples, 90), measure.lower_bound(samples, 90)
        assert upper is not None
        assert lower is not None
        kept_above += true <= upper
        kept_below += lower <= true
    # Three standard errors of a 1 % share of 4,000 are half a percent.
    assert 0.985 < kept_above / 4000 < 0.9999
    assert 0.985 < kept_below / 4000 < 0.9999


@pytest.mark.parametrize(("q", "n"), [(90, 64), (95, 130), (99, 662), (99, 1500)])
def test_a_false_verdict_is_as_rare_as_promised(q: int, n: int) -> None:
    """3,000 runs each, the true share over the budget a hair more, or less, than allowed: wrong in 1 % at most."""
    dice, allowed = random.Random(n), (100 - q) / 100
    passed = failed = 0
    for _ in range(3000):
        over = sum(dice.random() < allowed for _ in range(n))
        result = at(n, over, q).result
        passed += result == "PASS"
        failed += result == "FAIL"
    # Three standard errors of a 1 % share of 3,000 are 0.55 %.
    assert passed / 3000 < 0.0155
    assert failed / 3000 < 0.0155
    assert passed + failed > 0


def test_ties_and_heavy_tails_do_not_loosen_the_bound() -> None:
    """Latencies of only three values, the true p90 the largest but one; and ones without a mean."""
    dice, kept, tail = random.Random(11), 0, 0
    true = 0.1 ** (-1 / 0.8)
    for _ in range(2000):
        steps = [dice.choices((1.0, 2.0, 9.0), (80, 12, 8))[0] for _ in range(100)]
        heavy = [dice.paretovariate(0.8) for _ in range(100)]
        upper, far = measure.bound(steps, 90), measure.bound(heavy, 90)
        assert upper is not None
        assert far is not None
        kept += upper >= 2.0
        tail += far >= true
    assert kept == 2000
    assert tail / 2000 > 0.983


def test_a_loose_confidence_gives_a_closer_bound() -> None:
    samples = list(range(1000))
    half, most = measure.bound(samples, 90, 0.5), measure.bound(samples, 90, 0.99)
    assert half is not None
    assert most is not None
    assert 895 <= half <= 905 < most < 940


def at(n: int, over: int, q: float = 99) -> measure.BudgetVerdict:
    return measure.verdict([1.0] * (n - over) + [3.0] * over, 2.0, q)


def test_verdict_at_the_edges() -> None:
    assert (at(661, 0).result, at(661, 0).more) == ("INCONCLUSIVE", 1)
    assert (at(662, 0).result, at(662, 1).result, at(662, 2).result) == ("PASS", "PASS", "INCONCLUSIVE")
    assert (at(100, 0).result, at(100, 0).more) == ("INCONCLUSIVE", 562)
    assert at(64, 1, 90).result == "PASS"
    assert at(63, 0, 90).result == "INCONCLUSIVE"
    assert measure.verdict([2.0] * 64, 2.0, 90).result == "PASS"
    # Failing needs no minimum: were p99 within the budget, one of one would be over it in 1 % of cases.
    assert at(1, 1).result == "FAIL"
    assert at(2, 1).result == "INCONCLUSIVE"
    assert (at(10, 5).result, at(10, 5).more) == ("FAIL", 0)


@pytest.mark.parametrize("n", [5, 64, 200, 662, 1500])
@pytest.mark.parametrize("q", [50, 90, 99])
def test_verdict_is_what_its_bounds_say(n: int, q: int) -> None:
    for over in range(0, n + 1, max(1, n // 40)):
        got = at(n, over, q)
        passes = got.bound is not None and got.bound <= 2 and q in measure.supported(n)
        fails = got.low is not None and got.low > 2
        assert got.result == ("PASS" if passes else "FAIL" if fails else "INCONCLUSIVE")
        assert (got.n, got.over, got.q, got.budget) == (n, over, q, 2.0)


def test_verdict_says_how_many_more() -> None:
    short = at(662, 2)
    assert short.more is not None
    total = short.n + short.more
    assert 662 < total < 3000
    assert at(total, round(total * 2 / 662)).result == "PASS"
    failing = at(200, 5)
    assert failing.result == "INCONCLUSIVE"
    assert failing.more is not None
    assert at(200 + failing.more, round((200 + failing.more) * 5 / 200)).result == "FAIL"
    assert at(10_000, 100).more is None


def test_verdict_refuses_what_has_no_answer() -> None:
    with pytest.raises(InputError, match="0 samples"):
        measure.verdict([], 1.0, 99)
    with pytest.raises(InputError, match="100 has no confidence bound"):
        measure.verdict([1.0], 1.0, 100)


def test_ratio_of_pairs() -> None:
    got = measure.ratio_interval([2.0, 4.0, 6.0, 9.0, 2.0, 2.2], [1.0, 2.0, 3.0, 3.0, 1.0, 1.0])
    assert (got.median, got.low, got.high, got.n) == (2.0, 2.0, 3.0, 6)
    assert measure.ratio_interval([2.0] * 5, [1.0] * 5) == measure.Ratio(median=2.0, low=None, high=None, n=5)
    with pytest.raises(InputError, match="2 and 1 samples"):
        measure.ratio_interval([1.0, 2.0], [1.0])


def test_ratio_interval_covers_the_truth_on_a_drifting_machine() -> None:
    dice, hits = random.Random(3), 0
    for _ in range(1000):
        drift = [1 + 0.5 * math.sin(i / 5) for i in range(30)]
        a = [3 * d * math.exp(dice.gauss(0, 0.1)) for d in drift]
        b = [1 * d * math.exp(dice.gauss(0, 0.1)) for d in drift]
        got = measure.ratio_interval(a, b)
        assert got.low is not None
        assert got.high is not None
        hits += got.low <= 3 <= got.high
        assert got.high - got.low < 1
    assert 0.935 < hits / 1000 < 0.995


@pytest.mark.parametrize("n", [1, 2, 3, 4, 10, 64, 100])
def test_windows_are_thirds_in_order(n: int) -> None:
    expected = [part.tolist() for part in np.array_split(np.arange(n), 3) if len(part)]
    assert [list(part) for part in measure.windows(range(n))] == expected


def test_a_summary_shows_only_what_n_supports() -> None:
    for n, held in ((1, []), (11, [50]), (63, [50]), (64, [50, 90]), (130, [50, 90, 95]), (662, [50, 90, 95, 99])):
        samples = [float(k) for k in range(n)]
        found = measure.summary(samples)
        assert found["bounds"] == {str(q): measure.bound(samples, q) for q in held}
        assert list(found["percentiles"]) == [str(q) for q in (held or [50])]


def test_least_and_spare_are_the_verdicts_own() -> None:
    for q in (50, 90, 95, 99):
        n = measure.least(q)
        assert q in measure.supported(n)
        assert q not in measure.supported(n - 1)
        for more in (n, 3 * n):
            spare = measure.spare(more, q)
            assert measure.verdict([1.0] * (more - spare) + [3.0] * spare, 2.0, q).result == "PASS"
            assert measure.verdict([1.0] * (more - spare - 1) + [3.0] * (spare + 1), 2.0, q).result != "PASS"


class Shares:
    """Stands in for `OtherCpu`: the shares that are told, one after the other; the first is the whole run's."""

    threshold = 0.1

    def __init__(self, shares: list[float | None]) -> None:
        self.shares, self.share = shares, None

    def __call__(self) -> Any:
        made = copy.copy(self)
        made.share = self.shares.pop(0)
        return made

    def start(self) -> Any:
        return self

    def stop(self) -> float | None:
        return self.share

    @property
    def noisy(self) -> bool:
        return self.share is not None and self.share > self.threshold


def test_a_noisy_stretch_is_flagged_where_the_mean_hides_it() -> None:
    """Half a second of a busy neighbour in two quiet ones: 8 % of the whole, below the limit, and still said."""
    clock = iter(np.arange(0, 100, 0.1).tolist())
    shares = Shares([0.08, 0.01, 0.3, 0.0, None])
    with measure.Watch(0.45, other=shares, clock=lambda: next(clock)) as watch:
        for _ in range(13):
            watch.tick()
    noise = watch.noise()
    assert (noise["share"], noise["worst"], noise["noisy"]) == (0.08, 0.3, True)
    assert [s["noisy"] for s in noise["stretches"]] == [False, True, False]
    assert [s["first"] for s in noise["stretches"]] == [0, 5, 10]
    assert (noise["samples"], noise["noisy_samples"]) == (13, 5)


def test_nothing_known_is_nothing_flagged() -> None:
    with measure.Watch(other=Shares([None] * 3)) as watch:
        watch.tick()
    assert (watch.noise()["share"], watch.noise()["worst"], watch.noise()["noisy"]) == (None, None, False)


def test_the_warm_up_is_forgotten() -> None:
    with measure.Watch(60, other=Shares([0.0, 0.9, 0.0, 0.0])) as watch:
        watch.tick()
        watch.restart()
        watch.tick()
    assert [(s["samples"], s["share"]) for s in watch.stretches] == [(1, 0.0)]


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat on this system")
@pytest.mark.skipif((os.cpu_count() or 1) not in range(2, 9), reason="one core of many is under the threshold")
def test_a_real_neighbour_makes_a_noisy_stretch() -> None:
    with states.busy_core() as burner, measure.Watch(0.3) as watch:
        while states.cpu_seconds(burner) < 1:
            time.sleep(0.1)
            watch.tick()
    noise = watch.noise()
    # Whatever else ran, that neighbour or what kept it from running took time that was not ours.
    assert noise["noisy"]
    assert noise["noisy_samples"] > 0
    assert noise["worst"] > 0.1
