"""Images a second of a model file on this machine, by batch size; and every scenario as one result."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.paths import expand
from ..errors import ImageError, InputError
from ..inference.predictor import Predictor, Result
from ..system import hardware
from ..system.text import table
from . import measure
from . import results as record
from .latency import MODEL_ONLY, describe_noise, describe_setup, films, unsteady
from .server import (
    PERCENTILE,
    Say,
    Worker,
    server,
    server_lines,
    single_lines,
    single_stream,
)

FROM_FILES = "from files"
# The knee: no batch size needs to be larger than the smallest that comes this close to the best.
KNEE = 0.05

now = time.perf_counter


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
    before = hardware.gpu_states()
    predictor = Predictor(model, device=device, threads=threads)
    with tempfile.TemporaryDirectory() as scratch, record.Watch() as watch:
        paths = expand([str(images)]) if images is not None else films(Path(scratch))
        watch.restart()
        if scenario == "offline":
            workers = workers or hardware.cpu_count()
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
        "gpus": {"before": before, "after": hardware.gpu_states()},
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
            point[arm]["rate"] = measure.median(point[arm]["rates"])
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
        own = hardware.reset_peak()
        try:
            _from_files(predictor, paths, batch, 0, workers, {})
        except InputError as error:  # ImageError is no InputError: a broken file is not a batch too large
            if not points:
                raise
            return points, {"batch": batch, "why": str(error)}
        arms = {arm: {"rates": [], "images": 0} for arm in (MODEL_ONLY, FROM_FILES)}
        arms[FROM_FILES]["waited"] = {}
        memory = {"peak_rss": hardware.peak_rss(), "peak_rss_own": own, "gpu_mib": _gpu_mib(predictor, before)}
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


def _gpu_mib(predictor: Predictor, before: Sequence[dict[str, Any]]) -> float | None:
    """Memory taken on the fullest card since before the model was loaded. ONNX Runtime keeps what it once took."""
    if predictor.provider == "CPUExecutionProvider":
        return None
    then = {gpu["index"]: gpu["memory.used"] for gpu in before}
    now_used = {gpu["index"]: gpu["memory.used"] for gpu in hardware.gpu_states()}
    taken = [used - (then.get(index) or 0) for index, used in now_used.items() if used is not None]
    return max(taken, default=None)


# The text.


def describe(result: dict[str, Any]) -> str:
    """The result as a person reads it."""
    files = result["images"]
    source = f"{files['files']:,} file(s)" if files["given"] else f"{files['files']} phantoms at acquisition size"
    told = {"offline": _offline_lines, "single-stream": single_lines, "server": server_lines}[result["scenario"]]
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
