"""Images a second of a model file on this machine: by batch size, one after the other, or as they arrive."""

from __future__ import annotations

import contextlib
import itertools
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import benchmark_record as record
from . import timing
from .bench import MODEL_ONLY, WHOLE, describe_noise, describe_setup, films, unsteady, verdict_line
from .errors import ImageError, InputError
from .inputs import expand
from .predict import Predictor, Result
from .shell import table

FROM_FILES = "from files"
PERCENTILE = {"single-stream": 90, "server": 99}  # MLPerf's own
# The knee: no batch size needs to be larger than the smallest that comes this close to the best.
KNEE = 0.05
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


def throughput(
    model: Path,
    *,
    images: Path | None = None,
    scenario: str = "offline",
    max_batch: int = 32,
    seconds: float = 60.0,
    budget_ms: float = 100.0,
    percentile: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    workers: int | None = None,
    seed: int = 0,
    say: Say = lambda done, total, text: None,
) -> dict[str, Any]:
    """Measure for about `seconds`; JSON-ready. `images` are cycled, without them phantoms are drawn.

    offline: images/s by batch size, 1, 2, 4 to `max_batch`, of the model alone and from files, memory, and the knee.
    single-stream: one image after the other, its percentile against the budget. server: the largest rate of random
    arrivals whose percentile keeps the budget. Each point of `offline` has at least one call in each of three
    windows, so that a slow model takes longer than asked. Raises ImageError for an image that cannot be read.
    """
    before = record.gpus()
    predictor = Predictor(model, device=device, threads=threads)
    with tempfile.TemporaryDirectory() as scratch, record.Watch() as watch:
        paths = expand([str(images)]) if images is not None else films(Path(scratch))
        watch.restart()
        if scenario == "offline":
            workers = workers or timing.cpu_count()
            found = offline(predictor, paths, powers(max_batch), seconds, workers, watch, before, say)
        else:
            workers = 1
            limit = record.budget(budget_ms / 1000, percentile or PERCENTILE[scenario])
            run = single_stream if scenario == "single-stream" else server
            found = run(Worker(predictor, paths, watch), seconds, limit, seed, say)
    return {
        **record.head(record.THROUGHPUT),
        **record.about(predictor, device),
        "scenario": scenario,
        "seconds": seconds,
        "workers": workers,
        "images": {"given": images is not None, "files": len(paths)},
        **found,
        "noise": watch.noise(),
        "gpus": {"before": before, "after": record.gpus()},
    }


# Offline: images a second by batch size.


def powers(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [2**k for k in range(most.bit_length()) if 2**k <= most]


def offline(
    predictor: Predictor,
    paths: Sequence[str],
    batches: Sequence[int],
    seconds: float,
    workers: int,
    watch: record.Watch,
    before: Sequence[dict[str, Any]],
    say: Say,
) -> dict[str, Any]:
    """Three rounds over all batch sizes, so that a machine that drifts drifts for all of them alike."""
    points, stopped = _warm(predictor, paths, batches, workers, before)
    watch.restart()
    share = seconds / (2 * record.WINDOWS * len(points))
    pixels = np.stack(
        [predictor.pixels(path) for path in itertools.islice(itertools.cycle(paths), points[-1]["batch"])]
    )
    for window, point in itertools.product(range(record.WINDOWS), points):
        batch = point["batch"]
        say(window * len(points) + points.index(point), record.WINDOWS * len(points), f"batch {batch}")
        for arm, (count, took) in {
            MODEL_ONLY: _model_only(predictor, pixels[:batch], share),
            FROM_FILES: _from_files(predictor, paths, batch, share, workers, point[FROM_FILES]["waited"]),
        }.items():
            point[arm]["rates"].append(count / took)
            point[arm]["images"] += count
        noisy = watch.close(f"batch {batch}, window {window + 1}", 1)
        point["noisy_windows"] += noisy
    for point in points:
        for arm in (MODEL_ONLY, FROM_FILES):
            point[arm]["rate"] = timing.median(point[arm]["rates"])
            point[arm]["spread"] = record.spread(point[arm]["rates"])
    best = max(points, key=lambda point: point[FROM_FILES]["rate"])
    return {
        "points": points,
        "stopped": stopped,
        "knee": {arm: knee({p["batch"]: p[arm]["rate"] for p in points}) for arm in (MODEL_ONLY, FROM_FILES)},
        "best": {"batch": best["batch"], "rate": best[FROM_FILES]["rate"]},
    }


def knee(rates: dict[int, float], within: float = KNEE) -> int:
    """The smallest batch size whose rate is within 5 % of the best."""
    return min(batch for batch, rate in rates.items() if rate >= (1 - within) * max(rates.values()))


def _warm(
    predictor: Predictor, paths: Sequence[str], batches: Sequence[int], workers: int, before: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Each batch size once, the smallest first, with the memory it took; and the one that did not run, with why."""
    points: list[dict[str, Any]] = []
    for batch in batches:
        own = reset_peak()
        try:
            _from_files(predictor, paths, batch, 0, workers, {})
        except InputError as error:  # ImageError is no InputError: a broken file is not a batch too large
            if not points:
                raise
            return points, {"batch": batch, "why": str(error)}
        arms = {arm: {"rates": [], "images": 0} for arm in (MODEL_ONLY, FROM_FILES)}
        arms[FROM_FILES]["waited"] = {}
        memory = {"peak_rss": peak_rss(), "peak_rss_own": own, "gpu_mib": _gpu_mib(predictor, before)}
        points.append({"batch": batch, **memory, "noisy_windows": 0, **arms})
    return points, None


def _model_only(predictor: Predictor, pixels: np.ndarray, least: float) -> tuple[int, float]:
    """Images and seconds of whole calls, until `least` seconds are full."""
    began, count = now(), 0
    while count == 0 or now() - began < least:
        predictor.run(pixels)
        count += len(pixels)
    return count, now() - began


def _from_files(
    predictor: Predictor, paths: Sequence[str], batch: int, least: float, workers: int, waited: dict[str, float]
) -> tuple[int, float]:
    """As `_model_only`, through `stream_batches`; its first batch, which waits for all its files, is not counted."""
    upcoming, spent = itertools.cycle(paths), dict[str, float]()
    batches = iter(lambda: list(itertools.islice(upcoming, batch)), [])
    with contextlib.closing(predictor.stream_batches(batches, workers=workers, seconds=spent)) as answers:
        _require(next(answers))
        spent.clear()
        began, count = now(), 0
        while count == 0 or now() - began < least:
            count += _require(next(answers))
        took = now() - began
    for what, value in spent.items():
        waited[what] = waited.get(what, 0.0) + value
    return count, took


def _require(results: Sequence[Result]) -> int:
    """How many there are. ImageError for one that failed: what takes no model call is no throughput."""
    for result in results:
        if not result.ok:
            raise ImageError(result.reason, result.message)
    return len(results)


# Memory.


def reset_peak(proc: Path = Path("/proc/self")) -> bool:
    """Begin a new peak of resident memory; False where the system cannot, and the peak is that of the process."""
    try:
        (proc / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss(proc: Path = Path("/proc/self")) -> int | None:
    """Bytes of the largest resident memory since `reset_peak`; None where it is not known."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB", (proc / "status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return None


def _gpu_mib(predictor: Predictor, before: Sequence[dict[str, Any]]) -> float | None:
    """Memory taken on the fullest card since before the model was loaded. ONNX Runtime keeps what it once took."""
    if predictor.provider == "CPUExecutionProvider":
        return None
    then = {gpu["index"]: gpu["memory.used"] for gpu in before}
    taken = [
        gpu["memory.used"] - (then.get(gpu["index"]) or 0) for gpu in record.gpus() if gpu["memory.used"] is not None
    ]
    return max(taken, default=None)


# One image at a time.


class Worker:
    """One image from file to probabilities, then the next: what serves single-stream and server."""

    def __init__(self, predictor: Predictor, paths: Sequence[str], watch: record.Watch) -> None:
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


def single_stream(worker: Worker, seconds: float, limit: dict[str, Any], seed: int, say: Say) -> dict[str, Any]:
    """One image after the other. How many is fixed beforehand: stopping when it looks good would spoil the bound."""
    few = worker.warm()
    n = min(max(1, round(seconds * len(few) / sum(few))), MOST)
    began = now()
    samples = _one_by_one(worker, n, say)
    return {
        "n": n,
        "rate": n / (now() - began),
        "samples": {WHOLE: samples},
        "summary": {WHOLE: record.summary(samples)},
        "budget": limit,
        "verdict": record.verdict(samples, limit),
    }


def _one_by_one(worker: Worker, n: int, say: Say) -> list[float]:
    samples = []
    for i in range(n):
        began = now()
        worker(i)
        samples.append(now() - began)
        worker.watch.tick()
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

    def __init__(self, service: Sequence[float], limit: dict[str, Any], n: int, seed: int) -> None:
        dice, self.n, self.limit = np.random.default_rng([seed, 2**31]), n, limit
        shape = (RUNS, int(FILL * n) + n)
        self.service = dice.choice(np.asarray(service), shape)
        self.gaps = dice.exponential(1.0, shape)

    def passing(self, rate: float) -> float:
        """Share of runs of n requests that end in PASS."""
        late = queue(self.service, self.gaps / rate)[:, -self.n :] > self.limit["seconds"]
        return float((late.sum(axis=1) <= timing.spare(self.n, self.limit["percentile"])).mean())

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


def server(worker: Worker, seconds: float, limit: dict[str, Any], seed: int, say: Say) -> dict[str, Any]:
    """The largest rate whose percentile keeps the budget: looked for in a simulated queue, proved in a real one.

    A fifth of the time measures service times. The simulation on them finds the rate at which nine of ten runs pass;
    a run in real time at that rate is what the verdict is of, and a slower one where it does not pass. PASS asks both,
    because the rule takes samples to be independent, which latencies behind a queue are not: in simulated queues
    its 99 % was 84 % at half of the capacity and 54 % at seven tenths.
    """
    began = now()
    service = _service(worker, SERVICE * seconds, say)
    capacity, least = len(service) / sum(service), timing.least(limit["percentile"])
    out: dict[str, Any] = {"service": service, "capacity": capacity, "budget": limit, "trials": [], "rate": None}
    alone = record.verdict(service, limit)
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
        out["trials"].append(_trial(worker, rate, n, limit, (seed, len(out["trials"]))))
        if out["trials"][-1]["verdict"]["result"] == "PASS":
            return out | {"rate": rate, "verdict": out["trials"][-1]["verdict"], "reason": ""}
        rate *= SLOWER
    if out["trials"]:
        reason = "no rate tried in real time passed"
    else:
        # Settles nothing, but shows where it stands.
        out["trials"].append(_trial(worker, rate, max(1, int(left * rate / (1 + FILL))), limit, (seed, 0)))
        reason = f"{n:,} requests at {rate:.2g}/s take longer than there was time for"
    return out | {"verdict": out["trials"][-1]["verdict"] | {"result": "INCONCLUSIVE"}, "reason": reason}


def _service(worker: Worker, seconds: float, say: Say) -> list[float]:
    """Seconds of one image after another, for about `seconds`, at least twenty."""
    few = worker.warm()
    n = min(max(WARM, round(seconds * len(few) / sum(few))), MOST)
    return _one_by_one(worker, n, say)


def _trial(worker: Worker, rate: float, n: int, limit: dict[str, Any], seed: Sequence[int]) -> dict[str, Any]:
    """n requests at a rate, after those that fill the queue; ends early once nothing that follows could save it."""
    fill = int(FILL * n)

    def lost(latencies: list[float]) -> bool:
        worker.watch.tick()
        counted = latencies[fill:]
        if not counted or counted[-1] <= limit["seconds"]:
            return False
        rest = [0.0] * (n - len(counted))
        return timing.verdict(counted + rest, limit["seconds"], limit["percentile"]).result == "FAIL"

    samples = serve(worker, arrivals(rate, fill + n, seed), lost)[fill:]
    return {
        "rate": rate,
        "n": n,
        "served": len(samples),
        "samples": samples,
        "summary": record.summary(samples),
        "verdict": record.verdict(samples, limit),
    }


def needed_seconds(result: dict[str, Any]) -> int:
    """About how long it takes to settle: service times, and two runs at the rate to be tried or at half of capacity."""
    rate = result["trials"][-1]["rate"] if result["trials"] else result["capacity"] / 2
    return round(2 * cost(rate, timing.least(result["budget"]["percentile"])) / (1 - SERVICE)) + 1


# The text.


def describe(result: dict[str, Any]) -> str:
    """The result as a person reads it."""
    files = result["images"]
    source = f"{files['files']:,} file(s)" if files["given"] else f"{files['files']} phantoms at acquisition size"
    told = {"offline": _offline_lines, "single-stream": _single_lines, "server": _server_lines}[result["scenario"]]
    table_lines, last = told(result)
    setup = f"{result['scenario']}, {source}, read from the page cache, variant {result['variant']}"
    return "\n".join([*table_lines, "", setup, *describe_setup(result), *describe_noise(result), *last])


def _offline_lines(result: dict[str, Any]) -> tuple[list[str], list[str]]:
    points, knees, best = result["points"], result["knee"], result["best"]
    head = [
        "batch",
        MODEL_ONLY,
        "+-",
        FROM_FILES,
        "+-",
        "waits for files",
        "peak memory",
        "GPU memory",
        "noisy windows",
    ]
    rows = []
    for point in points:
        waited = point[FROM_FILES]["waited"]
        rates = [text for arm in (MODEL_ONLY, FROM_FILES)
                 for text in (f"{point[arm]['rate']:.2f}/s", f"{point[arm]['spread'] / 2:.0%}")]  # fmt: skip
        rows.append([
            str(point["batch"]),
            *rates,
            f"{waited['decode'] / sum(waited.values()):.0%}",
            "-" if point["peak_rss"] is None else f"{point['peak_rss'] / 2**20:,.0f} MiB",
            "-" if point["gpu_mib"] is None else f"{point['gpu_mib']:,.0f} MiB",
            f"{point['noisy_windows']} of {record.WINDOWS}",
        ])  # fmt: skip
    last = unsteady({f"batch {p['batch']} {arm}": p[arm]["rates"] for p in points for arm in (MODEL_ONLY, FROM_FILES)})
    if result["stopped"]:
        last.append(f"batch {result['stopped']['batch']} did not run: {result['stopped']['why']}")
    if not all(point["peak_rss_own"] for point in points):
        last.append("peak memory is since the process began: this system does not let it be reset")
    last.append(f"knee (smallest within {KNEE:.0%} of the best): batch {knees[MODEL_ONLY]} {MODEL_ONLY}, "
                f"{knees[FROM_FILES]} {FROM_FILES}")  # fmt: skip
    last.append(
        f"best: --batch-size {best['batch']}, {best['rate']:.2f} images/s from files, {result['workers']} workers"
    )
    return [table(head, rows)], last


def _single_lines(result: dict[str, Any]) -> tuple[list[str], list[str]]:
    found = result["summary"][WHOLE]
    rows = [[f"p{q}", f"{1000 * value:.1f}", f"{1000 * found['bounds'][q]:.1f}" if q in found["bounds"] else "-"]
            for q, value in found["percentiles"].items()]  # fmt: skip
    last = [f"n {result['n']:,}, {result['rate']:.2f} images/s", *unsteady({WHOLE: found["window_medians"]})]
    rate = result["rate"]
    total = result["verdict"]["n"] + (result["verdict"]["more"] or 0)
    return [table(["ms", "", "99 % bound"], rows)], [
        *last,
        verdict_line(result, f"--seconds {1 + round(1.1 * total / rate)}"),
    ]


def _server_lines(result: dict[str, Any]) -> tuple[list[str], list[str]]:
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
    return [table(["rate", "requests", f"p{q} ms", "99 % bound", "over", "trial"], rows)] if rows else [], last
