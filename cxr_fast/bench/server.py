"""One worker and the images as they come: one after the other, or at random times behind each other in a queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..inference.predictor import Predictor
from ..system.text import Table
from . import measure, results
from .records import WHOLE, Budget, ServerResult, SingleStreamResult

PERCENTILE = {"single-stream": 90, "server": 99}  # MLPerf's own
WARM = 20
MOST = 20_000
# The first tenth of the requests finds an emptier queue than the rest and is not counted.
FILL = 0.1
# A rate is looked for to this share of what one worker could serve without a pause.
NEAR = 0.02
SERVICE = 0.2  # share of the time that goes into service times
RUNS, SURE, SLOWER = 100, 0.9, 0.8

now, sleep = time.perf_counter, time.sleep
Say = Callable[[float, float, str], None]


# One image at a time.


class Responder:
    """One image from file to probabilities, then the next: what serves single-stream and server."""

    def __init__(self, predictor: Predictor, paths: Sequence[str], watch: measure.Watch) -> None:
        self.predictor, self.paths, self.watch = predictor, paths, watch

    def __call__(self, number: int) -> None:
        """Answer request `number`."""
        self.predictor([self.paths[number % len(self.paths)]])

    def warm(self) -> list[float]:
        """Seconds of some calls after the first ones."""
        for number in range(3):
            self(number)
        times = []
        for number in range(WARM):
            began = now()
            self(number)
            times.append(now() - began)
        self.watch.restart()
        return times


def single_stream(responder: Responder, seconds: float, limit: Budget, seed: int, say: Say) -> dict[str, Any]:
    """One image after the other. How many is fixed beforehand: stopping when it looks good would spoil the bound."""
    few = responder.warm()
    n = min(max(1, round(seconds * len(few) / sum(few))), MOST)
    began = now()
    samples = _one_by_one(responder, n, say)
    return {
        "n": n,
        "rate": n / (now() - began),
        "samples": {WHOLE: samples},
        "summary": {WHOLE: measure.summary(samples)},
        "budget": limit,
        "verdict": results.verdict(samples, limit),
    }


def _one_by_one(responder: Responder, n: int, say: Say) -> list[float]:
    samples = []
    for i in range(n):
        began = now()
        responder(i)
        samples.append(now() - began)
        responder.watch.tick()
        say(i + 1, n, f"{i + 1:,} of {n:,} images")
    return samples


# Server: random arrivals.


def arrivals(rate: float, n: int, seed: Sequence[int]) -> list[float]:
    """When each of n requests comes, seconds from the start: a Poisson process, the same for the same seed."""
    gaps = np.random.default_rng(list(seed)).exponential(1 / rate, n)
    return [float(x) for x in np.cumsum(gaps)]


def serve(
    answer: Callable[[int], object],
    due: Sequence[float],
    stop: Callable[[list[float]], bool] = lambda latencies: False,
) -> list[float]:
    """Seconds from each arrival to its answer, in real time: one worker, in order, until `stop`.

    The worker itself sleeps until the next arrival when it is early. In order and one at a time, a thread that fills
    a queue gives the same times, less the hand-over, and takes the interpreter's lock from what is measured.
    """
    began, latencies = now(), list[float]()
    for i, moment in enumerate(due):
        early = began + moment - now()
        if early > 0:
            sleep(early)
        answer(i)
        latencies.append(now() - began - moment)
        if stop(latencies):
            break
    return latencies


def queue(service: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Latencies (..., N) of one worker's queue from service times and the gaps before each arrival, both (..., N).

    Source: Lindley's recursion, 1952, wait = max(0, wait + service - gap), as a walk less its running minimum.
    """
    walk = np.cumsum(service[..., :-1] - gaps[..., 1:], axis=-1)
    walk = np.concatenate([np.zeros_like(service[..., :1]), walk], axis=-1)
    return np.asarray(walk - np.minimum.accumulate(walk, axis=-1) + service)


class Simulated:
    """The same queue, simulated on measured service times: where to look for a rate, and whether it holds for long.

    Every rate sees the same draws, only closer together, so that what holds at one holds at all smaller ones.
    """

    def __init__(self, service: Sequence[float], limit: Budget, n: int, seed: int) -> None:
        dice, self.n, self.limit = np.random.default_rng([seed, 2**31]), n, limit
        shape = (RUNS, int(FILL * n) + n)
        self.service = dice.choice(np.asarray(service), shape)
        self.gaps = dice.exponential(1.0, shape)

    def passing(self, rate: float) -> float:
        """Share of runs of n requests that end in PASS."""
        late = queue(self.service, self.gaps / rate)[:, -self.n :] > self.limit["seconds"]
        return float((late.sum(axis=1) <= measure.spare(self.n, self.limit["percentile"])).mean())

    def holds(self, rate: float) -> bool:
        """Whether the percentile keeps the budget in one run as long as all of them."""
        late = queue(self.service.ravel(), self.gaps.ravel() / rate) > self.limit["seconds"]
        return bool(late.mean() <= 1 - self.limit["percentile"] / 100)


def largest(holds: Callable[[float], bool], capacity: float, near: float = NEAR) -> float:
    """The largest rate below `capacity` for which `holds`, by bisection; 0 where none was found."""
    low, high = 0.0, capacity
    while high - low > near * capacity:
        rate = (low + high) / 2
        low, high = (rate, high) if holds(rate) else (low, rate)
    return low


def cost(rate: float, n: int) -> float:
    """Seconds that n counted requests take to come, and those before them."""
    return (n + int(FILL * n)) / rate


def server(responder: Responder, seconds: float, limit: Budget, seed: int, say: Say) -> dict[str, Any]:
    """The largest rate whose percentile keeps the budget: looked for in a simulated queue, proved in a real one.

    A fifth of the time measures service times. The simulation on them finds the rate at which nine of ten runs pass;
    a run in real time at that rate is what the verdict is of, and a slower one where it does not pass. PASS asks both,
    because the rule takes samples to be independent, which latencies behind a queue are not: in simulated queues
    its 99 % was 84 % at half of the capacity and 54 % at seven tenths.
    """
    began = now()
    service = _service(responder, SERVICE * seconds, say)
    capacity, least = len(service) / sum(service), measure.least(limit["percentile"])
    out: dict[str, Any] = {"service": service, "capacity": capacity, "budget": limit, "trials": [], "rate": None}
    alone = results.verdict(service, limit)
    if alone["result"] == "FAIL":
        nothing = {"limit": 0.0, "chosen": 0.0, "n": 0, "runs": 0}
        return out | {"verdict": alone, "simulated": nothing, "reason": "one image alone takes too long"}
    # Two runs at half of the capacity are to fit into what is left.
    n = min(max(least, int((1 - SERVICE) * seconds * capacity / 4 / (1 + FILL))), MOST)
    model = Simulated(service, limit, n, seed)
    chosen = largest(lambda rate: model.passing(rate) >= SURE, capacity)
    found = {"limit": largest(model.holds, capacity), "chosen": chosen, "n": n, "runs": RUNS}
    out |= {"simulated": found, "verdict": alone | {"result": "INCONCLUSIVE"}}
    rate = min(chosen, found["limit"])
    if not rate:
        return out | {"reason": f"even at {NEAR * capacity:.2g}/s the simulated queue is too slow"}
    while cost(rate, n) <= (left := seconds - (now() - began)):
        say(now() - began, seconds, f"{rate:.2f} requests/s")
        out["trials"].append(_trial(responder, rate, n, limit, (seed, len(out["trials"]))))
        if out["trials"][-1]["verdict"]["result"] == "PASS":
            return out | {"rate": rate, "verdict": out["trials"][-1]["verdict"], "reason": ""}
        rate *= SLOWER
    if out["trials"]:
        reason = "no rate tried in real time passed"
    else:
        # Settles nothing, but shows where it stands.
        out["trials"].append(_trial(responder, rate, max(1, int(left * rate / (1 + FILL))), limit, (seed, 0)))
        reason = f"{n:,} requests at {rate:.2g}/s take longer than there was time for"
    return out | {"verdict": out["trials"][-1]["verdict"] | {"result": "INCONCLUSIVE"}, "reason": reason}


def _service(responder: Responder, seconds: float, say: Say) -> list[float]:
    """Seconds of one image after another, for about `seconds`, at least twenty."""
    few = responder.warm()
    n = min(max(WARM, round(seconds * len(few) / sum(few))), MOST)
    return _one_by_one(responder, n, say)


def _trial(responder: Responder, rate: float, n: int, limit: Budget, seed: Sequence[int]) -> dict[str, Any]:
    """n requests at a rate, after those that fill the queue; ends early once nothing that follows could save it."""
    fill = int(FILL * n)

    def lost(latencies: list[float]) -> bool:
        responder.watch.tick()
        counted = latencies[fill:]
        if not counted or counted[-1] <= limit["seconds"]:
            return False
        rest = [0.0] * (n - len(counted))
        return measure.verdict(counted + rest, limit["seconds"], limit["percentile"]).result == "FAIL"

    samples = serve(responder, arrivals(rate, fill + n, seed), lost)[fill:]
    return {
        "rate": rate,
        "n": n,
        "served": len(samples),
        "samples": samples,
        "summary": measure.summary(samples),
        "verdict": results.verdict(samples, limit),
    }


def needed_seconds(result: ServerResult) -> int:
    """About how long it takes to settle: service times, and two runs at the rate to be tried or at half of capacity."""
    rate = result["trials"][-1]["rate"] if result["trials"] else result["capacity"] / 2
    return round(2 * cost(rate, measure.least(result["budget"]["percentile"])) / (1 - SERVICE)) + 1


# The text.


def describe_single_stream(result: SingleStreamResult) -> tuple[Table, list[str]]:
    """Table and closing lines of single-stream."""
    found = result["summary"][WHOLE]
    rows = []
    for q, value in found["percentiles"].items():
        bound = found["bounds"].get(q)
        rows.append([f"p{q}", f"{1000 * value:.1f}", "-" if bound is None else f"{1000 * bound:.1f}"])
    rate = result["rate"]
    last = [f"n {result['n']:,}, {rate:.2f} images/s"]
    last += results.describe_unsteady({WHOLE: found["window_medians"]})
    total = result["verdict"]["n"] + (result["verdict"]["more"] or 0)
    last.append(results.describe_verdict(result, f"--seconds {1 + round(1.1 * total / rate)}"))
    return Table(columns=["ms", "", "99 % bound"], rows=rows), last


def describe_server(result: ServerResult) -> tuple[Table, list[str]]:
    """Table and closing lines of server."""
    q = str(result["budget"]["percentile"])
    rows = [
        [
            f"{trial['rate']:.2f}/s",
            f"{trial['served']:,} of {trial['n']:,}",
            f"{1000 * trial['verdict']['estimate']:.1f}",
            "-" if trial["verdict"]["bound"] is None else f"{1000 * trial['verdict']['bound']:.1f}",
            str(trial["verdict"]["over"]),
            trial["verdict"]["result"],
        ]
        for trial in result["trials"]
    ]
    simulated = result["simulated"]
    last = [
        "one worker, one image at a time; arrivals drawn, waited for in real time; latency from arrival to answer",
        f"without a pause it could serve {result['capacity']:.2f}/s (n {len(result['service']):,}); simulated on those "
        f"service times, p{q} keeps the budget up to {simulated['limit']:.2f}/s",
    ]
    said = f"{result['verdict']['result']}: p{q} under {1000 * result['budget']['seconds']:g} ms"
    if result["rate"] is not None:
        last.append(f"{said} at {result['rate']:.2f} requests/s, the largest proved; n {result['verdict']['n']:,}, "
                    f"99 % bound {1000 * result['verdict']['bound']:.1f} ms, MLPerf-style, not MLPerf")  # fmt: skip
    else:
        more = "" if result["verdict"]["result"] == "FAIL" else f"; give about --seconds {needed_seconds(result)}"
        last.append(f"{said}: {result['reason']}{more}")
    columns = ["rate", "requests", f"p{q} ms", "99 % bound", "over", "trial"]
    return Table(columns=columns, rows=rows), last
