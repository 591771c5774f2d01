"""Time calls, and say how sure the figures are: percentiles with bounds, verdicts, ratios."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError

PERCENTILES = (50, 90, 95, 99)
CONFIDENCE = 0.99
# More samples than this are not a plan but a sign that the truth sits on the budget.
MANY = 1_000_000


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
class BudgetVerdict:
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


def verdict(samples: Sequence[float], budget: float, q: float, confidence: float = CONFIDENCE) -> BudgetVerdict:
    """PASS, FAIL or INCONCLUSIVE for "the q percentile is at most `budget`"; samples and budget in one unit.

    A sample equal to the budget keeps it. No PASS from fewer samples than `supported` asks for, so that "p99 of
    100 runs" is INCONCLUSIVE however fast they were. Source: MLPerf inference rules, early stopping.
    """
    over = sum(sample > budget for sample in samples)
    result = _decide(len(samples), over, q, confidence)
    return BudgetVerdict(
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
