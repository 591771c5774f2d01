"""Warm-up, synchronise, repeat; percentiles with confidence; how noisy the machine was."""

from __future__ import annotations

import functools
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError

PERCENTILES = (50, 90, 95, 99)
CONFIDENCE = 0.99
# More samples than this are not a plan but a sign that the truth sits on the budget.
MANY = 1_000_000
NOISY = 0.10
CPU_FLAGS = (
    *("fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16", "sve"),
)
QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")


# Measuring.


def measure(
    fn: Callable[[], Any],
    *,
    warmup: int,
    repeats: int,
    min_seconds: float = 0,
    sync: Callable[[], None] | None = None,
) -> list[float]:
    """Seconds of each call after `warmup` unmeasured ones: at least `repeats`, and until `min_seconds` are full.

    `sync` waits for the device (torch.cuda.synchronize); it is called before the clock starts and before it
    stops, so that no work of an earlier call is counted and none of this one is missed.
    """
    for _ in range(warmup):
        fn()
    times: list[float] = []
    while len(times) < repeats or sum(times) < min_seconds:
        times.append(_once(fn, sync))
    return times


def interleave(
    arms: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int,
    sync: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each arm in turn, A B A B ..., so that a machine that drifts drifts for all of them."""
    for fn in arms.values():
        for _ in range(warmup):
            fn()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, fn in arms.items():
            times[name].append(_once(fn, sync))
    return times


def _once(fn: Callable[[], Any], sync: Callable[[], None] | None) -> float:
    if sync:
        sync()
    began = time.perf_counter_ns()
    fn()
    if sync:
        sync()
    return (time.perf_counter_ns() - began) / 1e9


# Percentiles with confidence.


def median(samples: Sequence[float]) -> float:
    """The middle value, the mean of the two middle ones for an even number."""
    return statistics.median(samples)


def spread(samples: Sequence[float]) -> dict[str, float | int]:
    """n, median, minimum and maximum."""
    return {"n": len(samples), "median": median(samples), "min": min(samples), "max": max(samples)}


def percentile(samples: Sequence[float], q: float) -> float:
    """The q percentile by nearest rank: the smallest sample that q % of them do not exceed; 0 < q <= 100."""
    if not samples or not 0 < q <= 100:
        raise InputError(f"percentile {q} of {len(samples)} samples: needs samples and 0 < q <= 100.")
    # 1e-9: 0.07 * 100 is 7.000000000000001 and means the seventh.
    return sorted(samples)[max(math.ceil(q * len(samples) / 100 - 1e-9), 1) - 1]


def supported(n: int) -> tuple[int, ...]:
    """Which of the 50, 90, 95 and 99 percentiles n samples can speak of.

    Source: MLPerf inference's early-stopping rule, one-sided 99 %: one sample over the budget must still leave
    a pass possible, which needs 11, 64, 130 and 662 samples.
    """
    return tuple(q for q in PERCENTILES if n >= _minimum(q, CONFIDENCE))


def least(q: float) -> int:
    """The fewest samples with which the q percentile can be said to hold: `supported`, for one q."""
    return _minimum(q, CONFIDENCE)


def spare(n: int, q: float) -> int:
    """How many of n samples may be over the budget in a PASS; n at least `least(q)`."""
    return _allowed(n, 1 - _share(q), 1 - CONFIDENCE)


def bound(samples: Sequence[float], q: float, confidence: float = CONFIDENCE) -> float | None:
    """Upper confidence bound of the q percentile, 0 < q < 100, whatever the distribution; None if n is too small.

    The smallest k-th of the sorted samples with P(Binomial(n, q) < k) >= confidence. It exists from 44, 90 and 459
    samples for p90, p95 and p99, as their maximum; `supported` asks for the 64, 130 and 662 from which one
    outlier no longer decides. Source: David and Nagaraja, Order Statistics, 2003, section 7.1.
    """
    spare = _allowed(len(samples), 1 - _share(q), 1 - confidence)
    return None if spare < 0 else sorted(samples)[len(samples) - spare - 1]


def lower_bound(samples: Sequence[float], q: float, confidence: float = CONFIDENCE) -> float | None:
    """Lower confidence bound of the q percentile: the largest j-th sample with P(Binomial(n, q) >= j) >= confidence."""
    j = _allowed(len(samples), _share(q), 1 - confidence) + 1
    return None if j < 1 else sorted(samples)[j - 1]


def _share(q: float) -> float:
    if not 0 < q < 100:
        raise InputError(f"percentile {q} has no confidence bound: needs 0 < q < 100.")
    return q / 100


@functools.lru_cache(maxsize=4096)
def _allowed(n: int, p: float, alpha: float) -> int:
    """The largest t with P(Binomial(n, p) <= t) <= alpha, or -1."""
    log_p, log_rest, log_n = math.log(p), math.log1p(-p), math.lgamma(n + 1)
    total = 0.0
    # Forty standard deviations below the mean: what lies further down is less than a double can hold.
    start = max(0, math.floor(n * p - 40 * math.sqrt(n * p * (1 - p))) - 40)
    for t in range(start, n + 1):
        ways = log_n - math.lgamma(t + 1) - math.lgamma(n - t + 1)
        total += math.exp(ways + t * log_p + (n - t) * log_rest)
        # A hair of room: p99 of one sample is a tie, 0.01 <= 0.01, that rounding must not decide.
        if total > alpha * (1 + 1e-9):
            return t - 1
    return n


@functools.lru_cache(maxsize=64)
def _minimum(q: float, confidence: float) -> int:
    """The fewest samples with which one may exceed the budget and the q percentile still be said to hold."""
    n = 2
    while _allowed(n, 1 - _share(q), 1 - confidence) < 1:
        n += 1
    return n


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the q percentile keeps a budget, with confidence.

    result: PASS, the upper bound is within the budget; FAIL, the lower bound is over it; else INCONCLUSIVE.
    estimate: the percentile itself. low, bound: its confidence bounds, None where n is too small for one.
    over: samples over the budget. more: further samples that would settle it if the same share of them is over,
    0 when settled, None when that share sits on the limit and no reasonable number would.
    """

    result: str
    q: float
    budget: float
    n: int
    over: int
    estimate: float
    low: float | None
    bound: float | None
    more: int | None


def verdict(samples: Sequence[float], budget: float, q: float, confidence: float = CONFIDENCE) -> Verdict:
    """PASS, FAIL or INCONCLUSIVE for "the q percentile is at most `budget`"; samples and budget in one unit.

    A sample equal to the budget keeps it. No PASS from fewer samples than `supported` asks for, so that "p99 of
    100 runs" is INCONCLUSIVE however fast they were. Source: MLPerf inference rules, early stopping.
    """
    over = sum(sample > budget for sample in samples)
    result = _decide(len(samples), over, q, confidence)
    return Verdict(
        result=result,
        q=q,
        budget=budget,
        n=len(samples),
        over=over,
        estimate=percentile(samples, q),
        low=lower_bound(samples, q, confidence),
        bound=bound(samples, q, confidence),
        more=0 if result != "INCONCLUSIVE" else _more(len(samples), over, q, confidence),
    )


def _decide(n: int, over: int, q: float, confidence: float) -> str:
    """The verdict from counts alone: the bounds are samples, so only their place beside the budget matters."""
    if n >= _minimum(q, confidence) and over <= _allowed(n, 1 - _share(q), 1 - confidence):
        return "PASS"
    if n - over <= _allowed(n, _share(q), 1 - confidence):
        return "FAIL"
    return "INCONCLUSIVE"


def _more(n: int, over: int, q: float, confidence: float) -> int | None:
    share = over / n

    def settled(total: int) -> bool:
        return _decide(total, round(share * total), q, confidence) != "INCONCLUSIVE"

    high = max(n, _minimum(q, confidence))
    while not settled(high):
        if high >= MANY:
            return None
        high *= 2
    low = n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if settled(middle) else (middle, high)
    return high - n


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as long a takes as b: median of the paired ratios and its interval, None below 6 pairs."""

    median: float
    low: float | None
    high: float | None
    n: int


def ratio_interval(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Ratio:
    """Median of a[i] / b[i] over rounds run side by side, with the sign test's interval: exact, no distribution.

    Raises InputError unless both have the same number of samples, at least one. Source: Hollander, Wolfe, Chicken,
    Nonparametric Statistical Methods, 2014, section 3.6.
    """
    if len(a) != len(b) or not a:
        raise InputError(f"{len(a)} and {len(b)} samples are not pairs of rounds.")
    ratios = sorted(x / y for x, y in zip(a, b, strict=True))
    cut = _allowed(len(ratios), 0.5, (1 - level) / 2)
    ends = (None, None) if cut < 0 else (ratios[cut], ratios[-1 - cut])
    return Ratio(median=median(ratios), low=ends[0], high=ends[1], n=len(ratios))


# The machine.


def cpu_count(root: Path = Path("/")) -> int:
    """Cores this process may use: its affinity, cut to the container's quota (rounded up), at least 1.

    os.cpu_count() names the host's cores; a library that sizes its threads by it runs 64 threads on 2 cores.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_cores(root)
    return max(1, affinity if quota is None else min(affinity, math.ceil(quota)))


def cgroup_cores(root: Path = Path("/")) -> float | None:
    """The tightest CPU quota of this process's control groups, version 1 or 2, in cores; None without one."""
    quotas = [_quota(folder) for folder in _cgroup_folders(root)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _cgroup_folders(root: Path) -> list[Path]:
    """Every folder whose limits apply: the process's own and all above it. Inside a container the own path is
    often not mounted, and the top of the mount is the container's."""
    base = root / "sys/fs/cgroup"
    folders = [base, base / "cpu", base / "cpu,cpuacct"]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2) if line.count(":") >= 2 else ("", "-", "")
        if names == "" or "cpu" in names.split(","):
            parts = Path(path.lstrip("/"))
            folders += [base / names / p for p in (parts, *parts.parents)]
    return folders


def _quota(folder: Path) -> float | None:
    both = _read(folder / "cpu.max").split()
    if not both:
        both = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    quota, period = (_number(text) for text in [*both, "", ""][:2])
    return quota / period if quota and period and quota > 0 else None


class OtherCpu:
    """What share of the machine other processes took, and the hypervisor, while this was open.

    with OtherCpu() as others: measure(...)
    if others.noisy: ...

    share: 0..1 of all cores, None where /proc is absent or the time was under a tenth of a second. noisy: the share
    is over the threshold. Child processes count as our own once they were waited for.
    """

    def __init__(self, threshold: float = NOISY, proc: Path = Path("/proc")) -> None:
        self.threshold, self._proc = threshold, proc
        self.share: float | None = None
        self._began: tuple[float, float, float] | None = None

    @property
    def noisy(self) -> bool:
        """Whether others took more than the threshold."""
        return self.share is not None and self.share > self.threshold

    def start(self) -> OtherCpu:
        """Begin to watch."""
        self.share, self._began = None, self._read()
        return self

    def stop(self) -> float | None:
        """The share since `start`."""
        before, after = self._began, self._read()
        if before is not None and after is not None:
            total, busy, own = (b - a for a, b in zip(before, after, strict=True))
            # The kernel counts in ticks of 1/100 s: ten of them are the least that means anything.
            if total >= 0.1 * (os.cpu_count() or 1):
                self.share = min(max((busy - own) / total, 0.0), 1.0)
        return self.share

    def __enter__(self) -> OtherCpu:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _read(self) -> tuple[float, float, float] | None:
        """Seconds over all cores since boot: passed, busy, and our own."""
        first = _read(self._proc / "stat").partition("\n")[0].split()
        if len(first) < 6 or first[0] != "cpu":
            return None
        # user nice system idle iowait irq softirq steal; guest time that follows is already in user.
        ticks = [int(x) for x in first[1:9]]
        second = os.sysconf("SC_CLK_TCK")
        total, idle = sum(ticks) / second, (ticks[3] + ticks[4]) / second
        times = os.times()
        own = time.process_time() + times.children_user + times.children_system
        return total, total - idle, own


def other_cpu_share(threshold: float = NOISY) -> OtherCpu:
    """A watch on the rest of the machine, for `with`."""
    return OtherCpu(threshold)


def machine(root: Path = Path("/")) -> dict[str, Any]:
    """What a figure was measured on, JSON-ready, None where it cannot be told; it never fails.

    cpu, cpu_flags, cores (usable), cores_host, cores_affinity, cores_quota, governor, memory_gib, os, python, gpus.
    """
    info = cpu_info(root)
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "cpu": _cpu_name(info) or platform.processor() or platform.machine() or None,
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        "cores": cpu_count(root),
        "cores_host": os.cpu_count(),
        "cores_affinity": affinity,
        "cores_quota": cgroup_cores(root),
        "governor": _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        "memory_gib": _memory_gib(root),
        "os": platform.platform(),
        "python": sys.version.split()[0],
        "gpus": _gpus(),
    }


def cpu_info(root: Path) -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    first = _read(root / "proc/cpuinfo").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cpu_name(info: dict[str, str]) -> str:
    """The model's name; a rented machine's often hides which ("AMD EPYC"), and then its family and model number too."""
    name, numbers = info.get("model name", ""), [info.get("cpu family"), info.get("model")]
    if not name or any(letter.isdigit() for letter in name) or None in numbers:
        return name
    return f"{name} (family {numbers[0]} model {numbers[1]})"


def _memory_gib(root: Path) -> float | None:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            kib = _number(line.split()[1])
            return round(kib / 2**20, 1) if kib else None
    return None


def _gpus() -> list[str]:
    """Name, driver and memory of each GPU as nvidia-smi tells them; a hung driver costs ten seconds, no more."""
    if not shutil.which(QUERY[0]):
        return []
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _read(path: Path) -> str:
    """A small text file, empty where it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
