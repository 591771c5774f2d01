"""Latency of a model file on this machine, one image at a time; against a budget, with a verdict that can be no."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..data.images import decode_grey, read_bytes, resize
from ..inference.predictor import Predictor
from ..system import hardware
from ..system.text import Table, to_plain
from . import measure, results
from .films import sample_images
from .records import LATENCY, MODEL_ONLY, WHOLE, Budget, LatencyResult, SampleSummary
from .results import milliseconds

STAGES = ("read", "decode", "resize", "model", "post")


@dataclass(frozen=True, kw_only=True)
class LatencySpec:
    """`images` are cycled, six phantoms where it is None; the `percentile` must keep `budget_ms` where there is one."""

    images: Path | None = None
    repeats: int = 100
    warmup: int = 5
    budget_ms: float | None = None
    percentile: int = 90
    device: str = "auto"
    threads: int | None = None


def latency(model: Path, spec: LatencySpec) -> LatencyResult:
    """Time file to probabilities, model only, and each stage, in turn on the same image; seconds, JSON-ready.

    The verdict, where there is a budget, holds the one-sided 99 % bound of the percentile against it: MLPerf-style
    early stopping, not MLPerf.
    """
    before, began = hardware.gpu_states(), time.perf_counter()
    predictor = Predictor(model, device=spec.device, threads=spec.threads)
    load = time.perf_counter() - began
    with sample_images(spec.images) as paths:
        paths = paths[: spec.warmup + spec.repeats]
        first = _timed(partial(predictor.run, predictor.pixels(paths[0])[None]))[0]
        with measure.Watch() as watch:
            samples, sizes = _rounds(predictor, paths, spec, watch)
    held: dict[str, Any] = {"budget": None}
    if spec.budget_ms is not None:
        limit: Budget = {"seconds": spec.budget_ms / 1000, "percentile": spec.percentile}
        verdict = {**results.verdict(samples[WHOLE], limit), "slowest_stage": slowest(samples)}
        held = {"budget": limit, "verdict": verdict}
    made = {
        **results.head(LATENCY),
        **results.about(predictor, spec.device),
        "images": {"given": spec.images is not None, "files": len(paths), "height_width": sizes},
        "n": spec.repeats,
        "cold": {"load": load, "first_run": first},
        "summary": {name: measure.summary(values) for name, values in samples.items()},
        "samples": samples,
        **held,
        "noise": watch.noise(),
        "quiet": _quiet(samples[WHOLE], watch),
        "gpus": {"before": before, "after": hardware.gpu_states()},
    }
    return cast(LatencyResult, made)


def slowest(samples: dict[str, list[float]]) -> str:
    """Return the stage with the largest median."""
    return max(STAGES, key=lambda stage: measure.percentile(samples[stage], 50))


def _quiet(values: list[float], watch: measure.Watch) -> SampleSummary | None:
    """The summary without the samples of noisy stretches, to be read beside the whole; None where none was noisy."""
    noisy = {i for s in watch.stretches if s["noisy"] for i in range(s["first"], s["first"] + s["samples"])}
    left = [value for i, value in enumerate(values) if i not in noisy]
    return measure.summary(left) if noisy and left else None


def _rounds(
    predictor: Predictor, paths: Sequence[str], spec: LatencySpec, watch: measure.Watch
) -> tuple[dict[str, list[float]], list[list[int]]]:
    """One round an image: the stages one by one, the real call, the model alone. Also the (H, W) of what was timed.

    The stages come first, so that every file is in the page cache when the real call reads it.
    """
    samples: dict[str, list[float]] = {name: [] for name in (WHOLE, MODEL_ONLY, *STAGES)}
    sizes: dict[str, list[int]] = {}
    for i in range(spec.warmup + spec.repeats):
        path = paths[i % len(paths)]
        found, pixels, shape = _stages(predictor, path)
        found[WHOLE] = _timed(partial(predictor, [path]))[0]
        found[MODEL_ONLY] = _timed(partial(predictor.run, pixels))[0]
        if i < spec.warmup:
            watch.restart()
            continue
        watch.tick()
        sizes[path] = shape
        for name, seconds in found.items():
            samples[name].append(seconds)
    return samples, list(sizes.values())


def _stages(predictor: Predictor, path: str) -> tuple[dict[str, float], np.ndarray, list[int]]:
    """Seconds of each stage, the pixels (1, S, S) for the model, and the film's (H, W)."""
    out: dict[str, float] = {}
    out["read"], data = _timed(lambda: read_bytes(path))
    out["decode"], grey = _timed(lambda: decode_grey(data, spec=predictor.spec, name=path))
    out["resize"], pixels = _timed(lambda: resize(grey, predictor.spec))
    out["model"], row = _timed(lambda: predictor.run(pixels[None])[0])
    out["post"], _ = _timed(lambda: dict(zip(predictor.labels, map(float, row), strict=True)))
    return out, pixels[None], list(grey.shape)


def _timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    value = fn()
    return time.perf_counter() - began, value


def describe(result: LatencyResult) -> str:
    """The result as a table a person reads; beside each percentile the bound that it keeps with 99 % confidence."""
    found = result["summary"]
    shown = [q for q in measure.PERCENTILES if str(q) in found[WHOLE]["percentiles"]]
    columns = [name for q in shown for name in (f"p{q}", "99 % bound")]
    rows = [
        [f"  {name}" if name in STAGES else name, *_cells(found[name], shown)] for name in (WHOLE, MODEL_ONLY, *STAGES)
    ]
    cold, images = result["cold"], result["images"]
    source = f"{images['files']} file(s)" if images["given"] else f"{images['files']} phantoms at acquisition size"
    lines = [
        to_plain(Table(columns=["ms", *columns, "p50 by thirds"], rows=rows)),
        "",
        f"n {result['n']}, {source} ({_sizes(images['height_width'])}), read from the page cache, "
        f"variant {result['variant']}",
        *results.describe_setup(result),
        f"cold start: load {1000 * cold['load']:.0f} ms, first run {1000 * cold['first_run']:.0f} ms",
    ]
    if missing := [f"p{q}" for q in measure.PERCENTILES if q not in shown]:
        lines.append(f"not shown, n is too small: {', '.join(missing)}")
    lines += results.describe_noise(result)
    if quiet := result["quiet"]:
        held = ", ".join(f"p{q} {1000 * value:.1f} ms" for q, value in quiet["percentiles"].items())
        counted = "; the verdict counts all" if "verdict" in result else ""
        lines.append(f"without the noisy stretches: {held} (n {quiet['n']}){counted}")
    lines += results.describe_unsteady({WHOLE: found[WHOLE]["window_medians"]})
    worst, medians = slowest(result["samples"]), {stage: found[stage]["percentiles"]["50"] for stage in STAGES}
    lines.append(f"slowest stage: {worst}, {medians[worst] / sum(medians.values()):.0%} of the medians of all stages")
    return "\n".join([*lines, *([results.describe_verdict(result)] if "verdict" in result else [])])


def _cells(found: SampleSummary, shown: Sequence[int]) -> list[str]:
    figures = [part.get(str(q)) for q in shown for part in (found["percentiles"], found["bounds"])]
    thirds = "/".join(milliseconds(value) for value in found["window_medians"])
    return [*("-" if value is None else milliseconds(value) for value in figures), thirds]


def _sizes(sizes: list[list[int]]) -> str:
    low, high = min(sizes, key=lambda s: s[0] * s[1]), max(sizes, key=lambda s: s[0] * s[1])
    text = f"{low[0]:,} x {low[1]:,}"
    return text if low == high else f"{text} to {high[0]:,} x {high[1]:,} pixels"
