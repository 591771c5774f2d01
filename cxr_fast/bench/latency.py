"""Latency of a model file on this machine, one image at a time, with a verdict that can be no."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.images import decode_grey, read_bytes, resize
from ..data.paths import expand
from ..inference.predictor import Predictor
from ..system import hardware
from ..system.text import table
from . import measure, results

STAGES = ("read", "decode", "resize", "model", "post")
WHOLE, MODEL_ONLY = "file to probabilities", "model only"
# A study at acquisition size, as the full-size films of public sets are: about 2,400 x 2,000.
FILM = (2400, 2000)


def latency(
    model: Path,
    *,
    images: Path | None = None,
    repeats: int = 100,
    warmup: int = 5,
    budget_ms: float = 100.0,
    percentile: int = 90,
    device: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """Time file to probabilities, model only, and each stage, in turn on the same image; seconds, JSON-ready.

    Images are cycled. Without `images` phantoms are drawn at acquisition size. The verdict holds the one-sided 99 %
    bound of the percentile against the budget: MLPerf-style early stopping, not MLPerf.
    """
    before, began = hardware.gpu_states(), time.perf_counter()
    predictor = Predictor(model, device=device, threads=threads)
    load = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as scratch:
        paths = expand([str(images)]) if images is not None else films(Path(scratch))
        paths = paths[: warmup + repeats]
        fixed = predictor.pixels(paths[0])[None]
        began = time.perf_counter()
        predictor.run(fixed)
        first = time.perf_counter() - began
        with results.Watch() as watch:
            samples, sizes = _rounds(predictor, paths, repeats, warmup, watch)
    limit = results.budget(budget_ms / 1000, percentile)
    return {
        **results.head(results.LATENCY),
        **results.about(predictor, device),
        "images": {"given": images is not None, "files": len(paths), "height_width": sizes},
        "n": repeats,
        "cold": {"load": load, "first_run": first},
        "summary": {name: results.summary(values) for name, values in samples.items()},
        "samples": samples,
        "budget": limit,
        "verdict": {**results.verdict(samples[WHOLE], limit), "slowest_stage": slowest(samples)},
        "noise": watch.noise(),
        "quiet": _quiet(samples[WHOLE], watch),
        "gpus": {"before": before, "after": hardware.gpu_states()},
    }


def slowest(samples: dict[str, list[float]]) -> str:
    """The stage with the largest median: what to attack first."""
    return max(STAGES, key=lambda stage: measure.percentile(samples[stage], 50))


def _quiet(values: list[float], watch: results.Watch) -> dict[str, Any] | None:
    """The summary without the samples of noisy stretches, to be read beside the whole; None where none was noisy."""
    noisy = {i for s in watch.stretches if s["noisy"] for i in range(s["first"], s["first"] + s["samples"])}
    left = [value for i, value in enumerate(values) if i not in noisy]
    return results.summary(left) if noisy and left else None


def _rounds(
    predictor: Predictor, paths: Sequence[str], repeats: int, warmup: int, watch: results.Watch
) -> tuple[dict[str, list[float]], list[list[int]]]:
    """One round an image: the stages one by one, the real call, the model alone. Also the (H, W) of what was timed.

    The stages come first, so that every file is in the page cache when the real call reads it.
    """
    samples: dict[str, list[float]] = {name: [] for name in (WHOLE, MODEL_ONLY, *STAGES)}
    sizes: dict[str, list[int]] = {}
    for i in range(warmup + repeats):
        path = paths[i % len(paths)]
        found, pixels, shape = _stages(predictor, path)
        found[WHOLE] = _timed(partial(predictor, [path]))[0]
        found[MODEL_ONLY] = _timed(partial(predictor.run, pixels))[0]
        if i < warmup:
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


def describe_latency(result: dict[str, Any]) -> str:
    """The result as a table a person reads; beside each percentile the bound that it keeps with 99 % confidence."""
    shown = [q for q in measure.PERCENTILES if str(q) in result["summary"][WHOLE]["percentiles"]]
    columns = [name for q in shown for name in (f"p{q}", "99 % bound")]
    rows = [[f"  {name}" if name in STAGES else name, *_cells(result["summary"][name], shown)]
            for name in (WHOLE, MODEL_ONLY, *STAGES)]  # fmt: skip
    cold, files = result["cold"], result["images"]
    source = f"{files['files']} file(s)" if files["given"] else f"{files['files']} phantoms at acquisition size"
    lines = [
        table(["ms", *columns, "p50 by thirds"], rows),
        "",
        f"n {result['n']}, {source} ({_sizes(files['height_width'])}), read from the page cache, "
        f"variant {result['variant']}",
        *describe_setup(result),
        f"cold start: load {1000 * cold['load']:.0f} ms, first run {1000 * cold['first_run']:.0f} ms",
    ]
    if missing := [f"p{q}" for q in measure.PERCENTILES if q not in shown]:
        lines.append(f"not shown, n is too small: {', '.join(missing)}")
    lines += describe_noise(result)
    if quiet := result["quiet"]:
        held = ", ".join(f"p{q} {1000 * value:.1f} ms" for q, value in quiet["percentiles"].items())
        lines.append(f"without the noisy stretches: {held} (n {quiet['n']}); the verdict counts all")
    lines += unsteady({WHOLE: result["summary"][WHOLE]["window_medians"]})
    whole = sum(result["summary"][stage]["percentiles"]["50"] for stage in STAGES)
    worst = result["verdict"]["slowest_stage"]
    part = result["summary"][worst]["percentiles"]["50"] / whole
    return "\n".join([*lines, f"attack first: {worst}, {part:.0%} of the stages' medians", verdict_line(result)])


def _cells(found: dict[str, Any], shown: Sequence[int]) -> list[str]:
    figures = [found[part].get(str(q)) for q in shown for part in ("percentiles", "bounds")]
    thirds = "/".join(_ms(value) for value in found["window_medians"])
    return [*("-" if value is None else _ms(value) for value in figures), thirds]


def _ms(seconds: float) -> str:
    """Three digits where a stage is short: 0.0 would say that it takes no time."""
    return f"{1000 * seconds:.1f}" if seconds >= 0.001 else f"{1000 * seconds:.3f}"


def _sizes(sizes: list[list[int]]) -> str:
    low, high = min(sizes, key=lambda s: s[0] * s[1]), max(sizes, key=lambda s: s[0] * s[1])
    text = f"{low[0]:,} x {low[1]:,}"
    return text if low == high else f"{text} to {high[0]:,} x {high[1]:,} pixels"


def describe_setup(result: dict[str, Any]) -> list[str]:
    """What ran it, on what, from which commit."""
    machine, code = result["machine"], result["commit"]
    revision = f"commit {code['revision'][:10]}{', dirty' if code['dirty'] else ''}" if code else result["written_by"]
    lines = [
        f"{result['provider']}, {result['threads']} thread(s) on {machine['cores']} core(s), {machine['cpu']}",
        f"{revision}, {result['date']}",
        f"device: {result['why']}",
    ]
    if result["provenance"]:
        lines.append(f"note: {result['provenance'].upper()}; the weights do not change the time")
    return lines


def describe_noise(result: dict[str, Any]) -> list[str]:
    """What other processes took, where it was too much to believe the figures; a line where nobody can know."""
    noise = result["noise"]
    if noise["share"] is None:
        return ["how busy other processes were is not known here"]
    if not noise["noisy"]:
        return []
    return [
        f"NOISY: other processes took {noise['share']:.0%} of the machine during the run, up to {noise['worst']:.0%}; "
        f"over {noise['threshold']:.0%} while {noise['noisy_samples']} of {noise['samples']} samples were taken: run "
        "it again on a quiet machine"
    ]


def unsteady(parts: dict[str, Sequence[float]]) -> list[str]:
    """A line for each figure whose three windows lie too far apart."""
    return [
        f"UNSTEADY: the medians of {name} in {len(values)} windows differ by {results.spread(values):.0%}"
        for name, values in parts.items()
        if results.spread(values) > results.UNSTEADY
    ]


def verdict_line(result: dict[str, Any], advice: str = "--repeats {total}") -> str:
    """PASS, FAIL or INCONCLUSIVE, of what, and how many more samples would settle it."""
    budget, verdict = result["budget"], result["verdict"]
    text = f"{verdict['result']}: p{budget['percentile']} under {1000 * budget['seconds']:g} ms, {WHOLE}"
    if verdict["bound"] is not None:
        text += f"; 99 % bound {_ms(verdict['bound'])} ms, MLPerf-style, not MLPerf"
    if verdict["result"] != "INCONCLUSIVE":
        return text
    if not verdict["more"]:
        return f"{text}; too close to the budget for any number of samples"
    total = advice.format(total=verdict["n"] + verdict["more"])
    return f"{text}; {verdict['more']:,} more samples needed: {total}"


def ratio_text(ratio: dict[str, Any]) -> str:
    """`13.65 [13.21, 13.82]`; without the interval where there are too few rounds for one."""
    if ratio["low"] is None:
        return f"{ratio['median']:.2f} [an interval needs 6 rounds]"
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


# Said under a table of medians.
RATIOS = "a ratio is the median of the rounds' own ratios; the medians of the table divide to another figure"


def write_json(result: dict[str, Any], out: Path) -> None:
    """Any result of a command as JSON; InputError where it cannot be written."""
    results.write_bytes((json.dumps(result, indent=1) + "\n").encode(), out, "--json")


def films(folder: Path, count: int = 6) -> list[str]:
    """Draw phantoms at acquisition size into `folder`; their paths."""
    from PIL import Image

    from ..data.phantom.dataset import draw

    rng, paths = np.random.default_rng(0), []
    for i in range(count):
        path = folder / f"film{i}.png"
        Image.fromarray(draw(rng, view=("Frontal", "Lateral")[i % 2], size=FILM)).save(path)
        paths.append(str(path))
    return paths
