"""Time calls, watch the machine meanwhile, and bound what the samples say: percentiles, verdicts, ratios."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..system.hardware import OtherCpu
from .records import Noise, RatioFields, SampleSpread, SampleSummary

PERCENTILES = (50, 90, 95, 99)
CONFIDENCE = 0.99
# More samples than this are not a plan but a sign that the truth sits on the budget.
MANY = 1_000_000
WINDOWS = 3
# Two cores count 100 ticks in half a second, so a share is known to two percent; a tenth of that would say nothing.
STRETCH = 0.5


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


def run_rounds(
    one_round: Callable[[], Mapping[str, float]], rounds: int, on_round: Callable[[int], None] | None = None
) -> tuple[dict[str, list[float]], Watch]:
    """The figures of each round by name, each round a stretch of the watch; `on_round` gets the rounds done so far."""
    samples: dict[str, list[float]] = {}
    with Watch() as watch:
        if on_round is not None:
            on_round(0)
        for done in range(rounds):
            for name, value in one_round().items():
                samples.setdefault(name, []).append(value)
            watch.close(f"round {done + 1}", 1)
            if on_round is not None:
                on_round(done + 1)
    return samples, watch


class Watch:
    """The rest of the machine during a run, stretch by stretch, so that a noisy one is flagged and not averaged away.

    with Watch() as watch: for each sample: ...; watch.tick()

    A stretch ends with the first sample after half a second, or where `close` says so.
    """

    def __init__(
        self,
        stretch: float = STRETCH,
        *,
        other: Callable[[], OtherCpu] = OtherCpu,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._least, self._other, self._clock = stretch, other, clock
        self.stretches: list[dict[str, Any]] = []
        self._whole = other()
        self._samples = 0

    def __enter__(self) -> Watch:
        self._whole.start()
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        if self._samples:
            self.close()
        self._whole.stop()

    def _open(self) -> None:
        self._samples, self._began, self._current = 0, self._clock(), self._other().start()

    def restart(self) -> None:
        """Forget what was seen: the warm-up is over."""
        self._whole.start()
        self._open()

    def tick(self) -> None:
        """Count one more sample; ends the stretch where it is long enough."""
        self._samples += 1
        if self._clock() - self._began >= self._least:
            self.close()

    def close(self, name: str = "", samples: int | None = None) -> bool:
        """End the stretch here and begin the next; whether it was noisy."""
        share = self._current.stop()
        first = sum(s["samples"] for s in self.stretches)
        count = self._samples if samples is None else samples
        noisy = self._current.noisy
        self.stretches.append({"name": name, "first": first, "samples": count, "share": share, "noisy": noisy})
        self._open()
        return noisy

    def noise(self) -> Noise:
        """Share of the machine that others took: of the whole run, of the worst stretch, and of each, JSON-ready."""
        shares = [s["share"] for s in self.stretches if s["share"] is not None]
        noisy = [s for s in self.stretches if s["noisy"]]
        return {
            "share": self._whole.share,
            "worst": max(shares, default=self._whole.share),
            "threshold": self._whole.threshold,
            "noisy": bool(noisy) or self._whole.noisy,
            "samples": sum(s["samples"] for s in self.stretches),
            "noisy_samples": sum(s["samples"] for s in noisy),
            "stretches": self.stretches,
        }


# Percentiles with confidence.


def median(samples: Sequence[float]) -> float:
    """The middle value, the mean of the two middle ones for an even number."""
    return statistics.median(samples)


def spread(samples: Sequence[float]) -> SampleSpread:
    """n, median, minimum and maximum."""
    return {"n": len(samples), "median": median(samples), "min": min(samples), "max": max(samples)}


def windows(samples: Sequence[float]) -> list[Sequence[float]]:
    """The samples in three parts, in the order they were taken, as equal as they can be; fewer for fewer than three."""
    count = min(WINDOWS, len(samples))
    size, extra = divmod(len(samples), count)
    ends = [size * (k + 1) + min(k + 1, extra) for k in range(count)]
    return [samples[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def window_medians(samples: Sequence[float]) -> list[float]:
    """The median of each window."""
    return [percentile(part, 50) for part in windows(samples)]


def relative_range(samples: Sequence[float]) -> float:
    """Largest less smallest, as a share of the median."""
    return (max(samples) - min(samples)) / median(samples)


def spreads(samples: Mapping[str, Sequence[float]]) -> dict[str, SampleSpread]:
    """The spread of each arm's samples."""
    return {name: spread(values) for name, values in samples.items()}


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


def summary(values: Sequence[float]) -> SampleSummary:
    """Percentiles that n supports, each with its one-sided 99 % bound, and the medians of three windows."""
    held = supported(len(values))
    return {
        "n": len(values),
        "percentiles": {str(q): percentile(values, q) for q in PERCENTILES if q == 50 or q in held},
        "bounds": {str(q): bound(values, q) for q in PERCENTILES if q in held},
        "window_medians": window_medians(values),
    }


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


def ratio_fields(a: Sequence[float], b: Sequence[float]) -> RatioFields:
    """`ratio_interval` as a result records it."""
    found = ratio_interval(a, b)
    return {"median": found.median, "low": found.low, "high": found.high, "n": found.n}
