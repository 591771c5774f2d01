"""Known answers, simulated coverage, the edges of a verdict, and a noise detector that can be shown noise."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import pytest

from cxr_fast.errors import InputError
from cxr_fast.system import hardware
from tests.helpers import states
from tests.helpers.clocks import Clock


def test_measure_warms_up_repeats_and_synchronises() -> None:
    calls: list[str] = []
    times = hardware.measure(lambda: calls.append("f"), warmup=2, repeats=3, sync=lambda: calls.append("s"))
    assert calls == ["f", "f", *["s", "f", "s"] * 3]
    assert len(times) == 3
    assert all(0 <= t < 1 for t in times)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What `timing` measures with."""
    made = Clock()
    monkeypatch.setattr(hardware, "time", SimpleNamespace(perf_counter_ns=made.ns))
    return made


def test_measure_is_in_seconds_and_covers_the_device(clock: Clock) -> None:
    times = hardware.measure(lambda: clock.pass_by(0.01), warmup=0, repeats=3)
    assert all(0.01 <= t < 1 for t in times)
    # Work that only the synchronisation waits for belongs to the call that queued it.
    queued: list[int] = []

    def wait() -> None:
        clock.pass_by(0.02 * len(queued))
        queued.clear()

    assert hardware.measure(lambda: queued.append(1), warmup=0, repeats=1, sync=wait)[0] >= 0.02


def test_measure_fills_the_time_asked_for(clock: Clock) -> None:
    times = hardware.measure(lambda: clock.pass_by(0.002), warmup=0, repeats=2, min_seconds=0.03)
    assert len(times) > 2
    assert sum(times) >= 0.03 > sum(times[:-1])


def test_interleave_takes_turns() -> None:
    calls: list[str] = []
    arms = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = hardware.interleave(arms, rounds=3, warmup=1)
    assert "".join(calls) == "ab" + "ababab"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_percentile_is_the_nearest_rank() -> None:
    samples = [15.0, 20.0, 35.0, 40.0, 50.0][::-1]
    assert [hardware.percentile(samples, q) for q in (5, 30, 40, 50, 100)] == [15, 20, 20, 35, 50]
    assert hardware.percentile(range(1, 101), 7) == 7
    assert hardware.percentile(range(1, 101), 99) == 99
    assert hardware.median([3.0, 1.0, 2.0, 10.0]) == 2.5
    for samples, q in (([], 50), ([1.0], 0), ([1.0], 101)):
        with pytest.raises(InputError):
            hardware.percentile(samples, q)


def binomial_cdf(k: int, n: int, p: float) -> float:
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


@pytest.mark.parametrize(("q", "least", "exists"), [(50, 11, 7), (90, 64, 44), (95, 130, 90), (99, 662, 459)])
def test_sample_sizes_are_mlperfs(q: int, least: int, exists: int) -> None:
    """`supported` is the published table; `bound` exists earlier, as the maximum, until one sample may be spared."""
    assert q in hardware.supported(least)
    assert q not in hardware.supported(least - 1)
    assert hardware.bound(range(exists - 1), q) is None
    assert hardware.bound(range(exists), q) == exists - 1
    assert hardware.bound(range(least - 1), q) == least - 2
    assert hardware.bound(range(least), q) == least - 2
    # The rule itself, by the plain sum: one sample over the budget leaves 99 % confidence, one sample fewer does not.
    assert binomial_cdf(1, least, (100 - q) / 100) <= 0.01 < binomial_cdf(1, least - 1, (100 - q) / 100)


@pytest.mark.parametrize("q", [10, 50, 90, 95, 99])
@pytest.mark.parametrize("n", [1, 7, 100, 459, 700])
def test_bounds_are_the_exact_order_statistics(n: int, q: int) -> None:
    ranks, share = range(1, n + 1), Fraction(q, 100)
    chances = [math.comb(n, i) * share**i * (1 - share) ** (n - i) for i in range(n + 1)]
    below = list(itertools.accumulate(chances))
    upper = [k for k in ranks if below[k - 1] >= Fraction(99, 100)]
    assert hardware.bound(ranks, q) == (min(upper) if upper else None)
    lower = [j for j in ranks if 1 - below[j - 1] >= Fraction(99, 100)]
    assert hardware.lower_bound(ranks, q) == (max(lower) if lower else None)


def test_bounds_of_many_samples_are_near_the_normal_ones() -> None:
    samples, reach = range(1, 10**6 + 1), NormalDist().inv_cdf(0.99)
    for q in (50, 99):
        middle, spread = 10**4 * q, math.sqrt(10**6 * q / 100 * (1 - q / 100))
        assert hardware.bound(samples, q) == pytest.approx(middle + reach * spread, abs=3)
        assert hardware.lower_bound(samples, q) == pytest.approx(middle - reach * spread, abs=3)


def test_coverage_is_at_least_what_is_promised() -> None:
    """4,000 runs of 200 skewed latencies: the true p90 is under the bound in 99 % of them, and not in all."""
    dice = random.Random(7)
    true = math.exp(1.2815515655446004)
    kept_above = kept_below = 0
    for _ in range(4000):
        samples = sorted(math.exp(dice.gauss(0, 1)) for _ in range(200))
        upper, lower = hardware.bound(samples, 90), hardware.lower_bound(samples, 90)
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
        upper, far = hardware.bound(steps, 90), hardware.bound(heavy, 90)
        assert upper is not None
        assert far is not None
        kept += upper >= 2.0
        tail += far >= true
    assert kept == 2000
    assert tail / 2000 > 0.983


def test_a_loose_confidence_gives_a_closer_bound() -> None:
    samples = list(range(1000))
    half, most = hardware.bound(samples, 90, 0.5), hardware.bound(samples, 90, 0.99)
    assert half is not None
    assert most is not None
    assert 895 <= half <= 905 < most < 940


def at(n: int, over: int, q: float = 99) -> hardware.Verdict:
    return hardware.verdict([1.0] * (n - over) + [3.0] * over, 2.0, q)


def test_verdict_at_the_edges() -> None:
    assert (at(661, 0).result, at(661, 0).more) == ("INCONCLUSIVE", 1)
    assert (at(662, 0).result, at(662, 1).result, at(662, 2).result) == ("PASS", "PASS", "INCONCLUSIVE")
    assert (at(100, 0).result, at(100, 0).more) == ("INCONCLUSIVE", 562)
    assert at(64, 1, 90).result == "PASS"
    assert at(63, 0, 90).result == "INCONCLUSIVE"
    assert hardware.verdict([2.0] * 64, 2.0, 90).result == "PASS"
    # Failing needs no minimum: were p99 within the budget, one of one would be over it in 1 % of cases.
    assert at(1, 1).result == "FAIL"
    assert at(2, 1).result == "INCONCLUSIVE"
    assert (at(10, 5).result, at(10, 5).more) == ("FAIL", 0)


@pytest.mark.parametrize("n", [5, 64, 200, 662, 1500])
@pytest.mark.parametrize("q", [50, 90, 99])
def test_verdict_is_what_its_bounds_say(n: int, q: int) -> None:
    for over in range(0, n + 1, max(1, n // 40)):
        got = at(n, over, q)
        passes = got.bound is not None and got.bound <= 2 and q in hardware.supported(n)
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
        hardware.verdict([], 1.0, 99)
    with pytest.raises(InputError, match="100 has no confidence bound"):
        hardware.verdict([1.0], 1.0, 100)


def test_ratio_of_pairs() -> None:
    got = hardware.ratio_interval([2.0, 4.0, 6.0, 9.0, 2.0, 2.2], [1.0, 2.0, 3.0, 3.0, 1.0, 1.0])
    assert (got.median, got.low, got.high, got.n) == (2.0, 2.0, 3.0, 6)
    assert hardware.ratio_interval([2.0] * 5, [1.0] * 5) == hardware.Ratio(median=2.0, low=None, high=None, n=5)
    with pytest.raises(InputError, match="2 and 1 samples"):
        hardware.ratio_interval([1.0, 2.0], [1.0])


def test_ratio_interval_covers_the_truth_on_a_drifting_machine() -> None:
    dice, hits = random.Random(3), 0
    for _ in range(1000):
        drift = [1 + 0.5 * math.sin(i / 5) for i in range(30)]
        a = [3 * d * math.exp(dice.gauss(0, 0.1)) for d in drift]
        b = [1 * d * math.exp(dice.gauss(0, 0.1)) for d in drift]
        got = hardware.ratio_interval(a, b)
        assert got.low is not None
        assert got.high is not None
        hits += got.low <= 3 <= got.high
        assert got.high - got.low < 1
    assert 0.935 < hits / 1000 < 0.995


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "max 1",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/job\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/m/cpu.max": "1000 100000",
            },
            3,
        ),
        ({"sys/fs/cgroup/cpu.max": "garbage\n", "proc/self/cgroup": "also garbage\n"}, None),
    ],
)
def test_container_quotas(tmp_path: Path, files: dict[str, str], cores: float | None) -> None:
    root = put(tmp_path, files)
    assert hardware.cgroup_cores(root) == cores
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert hardware.cpu_count(root) == max(1, min(usable, math.ceil(cores if cores is not None else usable)))


def test_cpu_count_is_that_of_this_process() -> None:
    assert 1 <= hardware.cpu_count() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_cpu_count_follows_affinity() -> None:
    code = (
        "import os, cxr_fast.system.hardware as t\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(t.cpu_count())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "1"


def stat(user: int, idle: int, steal: int = 0) -> str:
    return f"cpu  {user} 0 0 {idle} 0 0 0 {steal} 0 0\ncpu0 1 1 1 1\n"


@pytest.mark.parametrize(
    ("after", "share", "noisy"),
    [((0, 10**6, 0), 0.0, False), ((5 * 10**5, 5 * 10**5, 0), 0.5, True), ((0, 5 * 10**5, 5 * 10**5), 0.5, True)],
)
def test_share_of_others_from_known_ticks(
    tmp_path: Path, after: tuple[int, int, int], share: float, noisy: bool
) -> None:
    put(tmp_path, {"stat": stat(0, 0)})
    with hardware.OtherCpu(proc=tmp_path) as watch:
        put(tmp_path, {"stat": stat(*after)})
    assert watch.share == pytest.approx(share, abs=0.001)
    assert watch.noisy is noisy


@pytest.mark.parametrize("files", [{}, {"stat": ""}, {"stat": "intr 1 2 3\n"}])
def test_no_proc_is_no_answer(tmp_path: Path, files: dict[str, str]) -> None:
    with hardware.OtherCpu(proc=put(tmp_path, files)) as watch:
        pass
    assert watch.share is None
    assert not watch.noisy


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat on this system")
def test_too_short_a_time_is_no_answer() -> None:
    with hardware.other_cpu_share() as watch:
        pass
    assert watch.share is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat on this system")
def test_a_neighbour_is_seen_and_own_work_is_not() -> None:
    with states.busy_core() as burner:
        used = states.cpu_seconds(burner)
        with hardware.other_cpu_share(threshold=0.01) as neighbour:
            states.wait_until(lambda: states.cpu_seconds(burner) > used + 0.5, "half a second of the neighbour's")
        used = states.cpu_seconds(burner) - used
    # At least what the neighbour really got, whatever else the machine was doing.
    assert neighbour.share is not None
    assert neighbour.share >= 0.7 * used / (os.cpu_count() or 1)
    assert neighbour.noisy
    with hardware.other_cpu_share() as own:
        began = time.process_time()
        total = time.perf_counter()
        while time.process_time() - began < 1:
            pass
        total = time.perf_counter() - total
    # Our own second is not counted: were it, others and we could not fit into the machine.
    assert own.share is not None
    assert own.share <= 1 - 0.8 / (total * (os.cpu_count() or 1))


def test_machine_is_json_and_never_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = hardware.machine()
    assert json.loads(json.dumps(here)) == here
    assert here["cores"] == hardware.cpu_count()
    assert here["python"].startswith("3.")
    root = put(
        tmp_path,
        {
            "proc/cpuinfo": "model name\t: Test CPU\nflags\t: sse avx2 amx_int8\n\nmodel name\t: Other\n",
            "proc/meminfo": "MemTotal:       16777216 kB\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
        },
    )
    known = hardware.machine(root)
    assert (known["cpu"], known["cpu_flags"]) == ("Test CPU", ["avx2", "amx_int8"])
    assert (known["memory_gib"], known["governor"]) == (16.0, "powersave")
    nothing = hardware.machine(tmp_path / "absent")
    assert nothing.keys() == here.keys()
    assert nothing["memory_gib"] is nothing["governor"] is None


@pytest.mark.parametrize(
    ("lines", "cpu"),
    [
        ("cpu family\t: 26\nmodel\t: 2\nmodel name\t: AMD EPYC\n", "AMD EPYC (family 26 model 2)"),
        (
            "cpu family\t: 25\nmodel\t: 17\nmodel name\t: AMD EPYC 9554 64-Core Processor\n",
            "AMD EPYC 9554 64-Core Processor",
        ),
        ("model name\t: AMD EPYC\n", "AMD EPYC"),
    ],
)
def test_a_cpu_whose_name_hides_its_generation_is_named_by_family_and_model(
    tmp_path: Path, lines: str, cpu: str
) -> None:
    """Two machines of one name, twice apart in float32, must not be taken for each other."""
    assert hardware.machine(put(tmp_path, {"proc/cpuinfo": lines}))["cpu"] == cpu


@pytest.mark.parametrize(
    ("script", "gpus"),
    [("echo ' Some GPU, 1.2, 3 MiB'", ["Some GPU, 1.2, 3 MiB"]), ("echo no driver; exit 9", []), (None, [])],
)
def test_gpus_from_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, gpus: list[str]
) -> None:
    if script is not None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.machine()["gpus"] == gpus


def test_the_module_needs_only_the_standard_library() -> None:
    code = "import sys, cxr_fast.system.hardware; print(sorted({'numpy', 'torch', 'pandas'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
