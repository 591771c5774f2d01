"""Images a second of a model file on this machine, by batch size; and every scenario as one result."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ImageError, InputError
from ..inference.predictor import Predictor, Result
from ..system import hardware
from ..system.text import Table, to_plain
from . import measure, results
from .films import sample_images
from .records import ARMS, FROM_FILES, MODEL_ONLY, THROUGHPUT, Budget, OfflineResult, Point
from .server import PERCENTILE, Responder, Say, describe_server, describe_single_stream, server, single_stream

# The knee: no batch size needs to be larger than the smallest that comes this close to the best.
KNEE = 0.05

now = time.perf_counter


@dataclass(frozen=True, kw_only=True)
class ThroughputSpec:
    """`images` are cycled, six phantoms where it is None; `seconds` is about how long to measure.

    offline uses `max_batch` and `workers`; single-stream and server the budget, its percentile (90 and 99 where it is
    None) and, for the arrivals, `seed`.
    """

    images: Path | None = None
    scenario: str = "offline"
    max_batch: int = 32
    seconds: float = 60.0
    budget_ms: float = 100.0
    percentile: int | None = None
    device: str = "auto"
    threads: int | None = None
    workers: int | None = None
    seed: int = 0


def throughput(model: Path, spec: ThroughputSpec, say: Say = lambda done, total, text: None) -> dict[str, Any]:
    """Measure a scenario; JSON-ready, one of `records.SCENARIOS`.

    offline: images/s by batch size, 1, 2, 4 to `max_batch`, of the model alone and from files, memory, and the knee.
    single-stream: one image after the other, its percentile against the budget. server: the largest rate of random
    arrivals whose percentile keeps the budget. Each point of `offline` has at least one call in each of three
    windows, so that a slow model takes longer than asked. Raises ImageError for an image that cannot be read.
    """
    before = hardware.gpu_states()
    # Many images as `predict` takes them, without threads that spin; a scenario as one image at a time is answered.
    predictor = Predictor(model, device=spec.device, threads=spec.threads, spin=spec.scenario != "offline")
    with sample_images(spec.images) as paths, measure.Watch() as watch:
        watch.restart()
        workers = (spec.workers or hardware.cpu_count()) if spec.scenario == "offline" else 1
        if spec.scenario == "offline":
            sweep = BatchSweep(predictor=predictor, paths=paths, workers=workers, watch=watch, before=before)
            found = sweep.run(powers(spec.max_batch), spec.seconds, say)
        else:
            percentile = spec.percentile or PERCENTILE[spec.scenario]
            limit: Budget = {"seconds": spec.budget_ms / 1000, "percentile": percentile}
            run = single_stream if spec.scenario == "single-stream" else server
            found = run(Responder(predictor, paths, watch), spec.seconds, limit, spec.seed, say)
    return {
        **results.head(THROUGHPUT),
        **results.about(predictor, spec.device),
        "scenario": spec.scenario,
        "seconds": spec.seconds,
        "workers": workers,
        "images": {"given": spec.images is not None, "files": len(paths)},
        **found,
        "noise": watch.noise(),
        "gpus": {"before": before, "after": hardware.gpu_states()},
    }


# Offline: images a second by batch size.


def powers(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [2**k for k in range(most.bit_length()) if 2**k <= most]


def knee(rates: dict[int, float], within: float = KNEE) -> int:
    """The smallest batch size whose rate is within 5 % of the best."""
    return min(batch for batch, rate in rates.items() if rate >= (1 - within) * max(rates.values()))


@dataclass(frozen=True, kw_only=True)
class BatchSweep:
    """Batch sizes side by side on the same files; `before` is what the GPUs said before the model was loaded."""

    predictor: Predictor
    paths: Sequence[str]
    workers: int
    watch: measure.Watch
    before: Sequence[dict[str, Any]]

    def run(self, batches: Sequence[int], seconds: float, say: Say) -> dict[str, Any]:
        """Three rounds over all batch sizes, so that a machine that drifts drifts for all of them alike."""
        points, each, stopped = self._warm(batches)
        self.watch.restart()
        share = seconds / (2 * measure.WINDOWS * len(points))
        most = points[-1]["batch"]
        pixels = np.stack([self.predictor.pixels(path) for path in itertools.islice(itertools.cycle(self.paths), most)])
        # Each arm takes its share or one call, the one from files a call more.
        expected = measure.WINDOWS * [2 * max(share, one) + one for one in each]
        for number, (_, point) in enumerate(itertools.product(range(measure.WINDOWS), points)):
            batch, window = point["batch"], number // len(points)
            say(sum(expected[:number]), sum(expected), f"batch {batch}")
            for arm, (count, took) in {
                MODEL_ONLY: self._model_only(pixels[:batch], share),
                FROM_FILES: self._from_files(batch, share, point[FROM_FILES]["waited"]),
            }.items():
                point[arm]["rates"].append(count / took)
                point[arm]["images"] += count
            point["noisy_windows"] += self.watch.close(f"batch {batch}, window {window + 1}", 1)
        for point, arm in itertools.product(points, ARMS):
            point[arm]["rate"] = measure.median(point[arm]["rates"])
            point[arm]["spread"] = measure.relative_range(point[arm]["rates"])
        best = max(points, key=lambda point: float(point[FROM_FILES]["rate"]))
        return {
            "points": points,
            "stopped": stopped,
            "knee": {arm: knee({p["batch"]: p[arm]["rate"] for p in points}) for arm in ARMS},
            "best": {"batch": best["batch"], "rate": best[FROM_FILES]["rate"]},
        }

    def _warm(self, batches: Sequence[int]) -> tuple[list[Any], list[float], dict[str, Any] | None]:
        """Each batch size once, the smallest first, with its memory; the seconds of each; the one that did not run."""
        points: list[Point] = []
        seconds: list[float] = []
        for batch in batches:
            own, began = hardware.reset_peak(), now()
            try:
                self._from_files(batch, 0, {})
            except InputError as error:  # ImageError is no InputError: a broken file is not a batch too large
                if not points:
                    raise
                return points, seconds, {"batch": batch, "why": str(error)}
            seconds.append((now() - began) / 2)  # a batch that is not counted, and one that is
            points.append({
                "batch": batch,
                "peak_rss": hardware.peak_rss(),
                "peak_rss_own": own,
                "gpu_mib": self._gpu_mib(),
                "noisy_windows": 0,
                "model only": {"rates": [], "images": 0},
                "from files": {"rates": [], "images": 0, "waited": {}},
            })  # fmt: skip
        return points, seconds, None

    def _model_only(self, pixels: np.ndarray, least: float) -> tuple[int, float]:
        """Images and seconds of whole calls, until `least` seconds are full."""
        began, count = now(), 0
        while count == 0 or now() - began < least:
            self.predictor.run(pixels)
            count += len(pixels)
        return count, now() - began

    def _from_files(self, batch: int, least: float, waited: dict[str, float]) -> tuple[int, float]:
        """As `_model_only`, through `stream_batches`; its first batch, which waits for its files, is not counted."""
        upcoming, spent = itertools.cycle(self.paths), dict[str, float]()
        batches = iter(lambda: list(itertools.islice(upcoming, batch)), [])
        stream = self.predictor.stream_batches(batches, workers=self.workers, seconds=spent)
        with contextlib.closing(stream) as answers:
            _require(next(answers))
            spent.clear()
            began, count = now(), 0
            while count == 0 or now() - began < least:
                count += _require(next(answers))
            took = now() - began
        for what, value in spent.items():
            waited[what] = waited.get(what, 0.0) + value
        return count, took

    def _gpu_mib(self) -> float | None:
        """Memory taken on the fullest card since the model was loaded. ONNX Runtime keeps what it once took."""
        if self.predictor.provider == "CPUExecutionProvider":
            return None
        then = {gpu["index"]: gpu["memory.used"] for gpu in self.before}
        now_used = {gpu["index"]: gpu["memory.used"] for gpu in hardware.gpu_states()}
        return max((used - (then.get(i) or 0) for i, used in now_used.items() if used is not None), default=None)


def _require(answers: Sequence[Result]) -> int:
    """How many there are. ImageError for one that failed: what takes no model call is no throughput."""
    for answer in answers:
        if not answer.ok:
            raise ImageError(answer.reason, answer.message)
    return len(answers)


# The text.


def describe(result: Any) -> str:
    """The result as a person reads it."""
    files = result["images"]
    source = f"{files['files']:,} file(s)" if files["given"] else f"{files['files']} phantoms at acquisition size"
    lines: dict[str, Callable[[Any], tuple[Table, list[str]]]]
    lines = {"offline": describe_offline, "single-stream": describe_single_stream, "server": describe_server}
    table, last = lines[result["scenario"]](result)
    setup = f"{result['scenario']}, {source}, read from the page cache, variant {result['variant']}"
    head = [to_plain(table), ""] if table.rows else [""]
    return "\n".join([*head, setup, *results.describe_setup(result), *results.describe_noise(result), *last])


def describe_offline(result: OfflineResult) -> tuple[Table, list[str]]:
    """Table and closing lines of offline."""
    points, knees, best = result["points"], result["knee"], result["best"]
    columns = ["batch", MODEL_ONLY, "+-", FROM_FILES, "+-"]
    columns += ["waits for files", "peak memory", "GPU memory", "noisy windows"]
    rows = []
    for point in points:
        waited, gpu = point["from files"]["waited"], point["gpu_mib"]
        rates = [
            text
            for arm in (point["model only"], point["from files"])
            for text in (f"{arm['rate']:.2f}/s", f"{arm['spread'] / 2:.0%}")
        ]
        memory = "-" if point["peak_rss"] is None else f"{point['peak_rss'] / 2**20:,.0f} MiB"
        rows.append([
            str(point["batch"]),
            *rates,
            f"{waited['decode'] / sum(waited.values()):.0%}",
            memory,
            "-" if gpu is None else f"{gpu:,.0f} MiB",
            f"{point['noisy_windows']} of {measure.WINDOWS}",
        ])  # fmt: skip
    arms = {f"batch {p['batch']} {arm}": p[arm]["rates"] for p in points for arm in ARMS}
    last = results.describe_unsteady(arms)
    if stopped := result["stopped"]:
        last.append(f"batch {stopped['batch']} did not run: {stopped['why']}")
    if not all(point["peak_rss_own"] for point in points):
        last.append("peak memory is since the process began: this system does not let it be reset")
    last += [
        f"knee (smallest within {KNEE:.0%} of the best): batch {knees[MODEL_ONLY]} {MODEL_ONLY}, "
        f"{knees[FROM_FILES]} {FROM_FILES}",
        f"best: --batch-size {best['batch']}, {best['rate']:.2f} images/s from files, {result['workers']} workers",
    ]
    return Table(columns=columns, rows=rows), last
