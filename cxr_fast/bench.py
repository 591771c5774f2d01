"""Latency of a model file on this machine, one image at a time, with a verdict that can be no."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, timing
from .errors import InputError
from .inputs import expand
from .predict import Predictor, file_sha256
from .preprocess import decode_grey, read_bytes, resize

SCHEMA = 1
EXIT = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}
STAGES = ("read", "decode", "resize", "model", "post")
PERCENTILES = (50, 90, 95, 99)
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
    began = time.perf_counter()
    predictor = Predictor(model, device=device, threads=threads)
    load = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as scratch:
        paths = expand([str(images)]) if images is not None else films(Path(scratch))
        fixed = predictor.pixels(paths[0])[None]
        began = time.perf_counter()
        predictor.run(fixed)
        first = time.perf_counter() - began
        with timing.other_cpu_share() as noise:
            samples = _rounds(predictor, paths, repeats, warmup)
    verdict = timing.verdict(samples["file to probabilities"], budget_ms / 1000, percentile)
    return {
        "kind": "cxr-fast latency",
        "schema": SCHEMA,
        "written_by": f"cxr-fast {__version__}",
        "model": predictor.path.name,
        "model_sha256": file_sha256(predictor.path),
        "variant": predictor.info["variant"],
        "provenance": predictor.warning,
        "images": {"given": images is not None, "files": len(paths), "first_size": _size(paths[0], images is not None)},
        "device": device,
        "provider": predictor.provider,
        "threads": predictor.threads,
        "n": repeats,
        "cold": {"load": load, "first_run": first},
        "summary": {name: _summary(values) for name, values in samples.items()},
        "samples": samples,
        "budget": {"seconds": budget_ms / 1000, "percentile": percentile},
        "verdict": {**asdict(verdict), "slowest_stage": max(STAGES, key=lambda s: timing.percentile(samples[s], 50))},
        "noise": {"share": noise.share, "noisy": noise.noisy},
        "machine": timing.machine(),
    }


def _rounds(predictor: Predictor, paths: Sequence[str], repeats: int, warmup: int) -> dict[str, list[float]]:
    """One round an image: the real call, the model alone, then the stages one by one."""
    samples: dict[str, list[float]] = {name: [] for name in ("file to probabilities", "model only", *STAGES)}
    for i in range(warmup + repeats):
        path = paths[i % len(paths)]
        found = _stages(predictor, path)
        found["file to probabilities"] = _timed(partial(predictor, [path]))[0]
        found["model only"] = _timed(partial(predictor.run, predictor.pixels(path)[None]))[0]
        if i >= warmup:
            for name, seconds in found.items():
                samples[name].append(seconds)
    return samples


def _stages(predictor: Predictor, path: str) -> dict[str, float]:
    out: dict[str, float] = {}
    out["read"], data = _timed(lambda: read_bytes(path))
    out["decode"], grey = _timed(lambda: decode_grey(data, spec=predictor.spec, name=path))
    out["resize"], pixels = _timed(lambda: resize(grey, predictor.spec))
    out["model"], row = _timed(lambda: predictor.run(pixels[None])[0])
    out["post"], _ = _timed(lambda: dict(zip(predictor.labels, map(float, row), strict=True)))
    return out


def _timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    value = fn()
    return time.perf_counter() - began, value


def _summary(values: list[float]) -> dict[str, Any]:
    """Percentiles that n supports, each with its one-sided 99 % bound, and the spread over three windows."""
    held = timing.supported(len(values))
    windows = [timing.percentile(w.tolist(), 50) for w in np.array_split(np.array(values), 3) if len(w)]
    return {
        "n": len(values),
        "percentiles": {str(q): timing.percentile(values, q) for q in PERCENTILES if q == 50 or q in held},
        "bounds": {str(q): timing.bound(values, q) for q in PERCENTILES if q in held},
        "window_medians": windows,
    }


def describe_latency(result: dict[str, Any]) -> str:
    """The result as a table a person reads."""
    shown = [q for q in PERCENTILES if any(str(q) in s["percentiles"] for s in result["summary"].values())]
    head = ["ms", *(f"p{q}" for q in shown)]
    rows = []
    for name in ("file to probabilities", "model only", *STAGES):
        found = result["summary"][name]["percentiles"]
        label = f"  {name}" if name in STAGES else name
        rows.append([label, *(f"{1000 * found[str(q)]:.1f}" if str(q) in found else "-" for q in shown)])
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
             for row in [head, *rows]]  # fmt: skip
    machine, cold, verdict = result["machine"], result["cold"], result["verdict"]
    files = result["images"]
    source = f"{files['files']} file(s)" if files["given"] else f"{files['files']} phantoms at acquisition size"
    lines += [
        "",
        f"n {result['n']}, {source}, {result['provider']}, {result['threads']} thread(s), variant {result['variant']}, "
        f"{machine['cpu']}",
        f"cold start: load {1000 * cold['load']:.0f} ms, first run {1000 * cold['first_run']:.0f} ms",
    ]
    lines += noise_lines(result)
    if missing := [f"p{q}" for q in PERCENTILES if q not in shown]:
        lines.append(f"not shown, n is too small: {', '.join(missing)}")
    lines.append(_verdict_line(result, verdict))
    if result["provenance"]:
        lines.append(f"note: {result['provenance'].upper()}; the weights do not change the time")
    return "\n".join(lines)


def _verdict_line(result: dict[str, Any], verdict: dict[str, Any]) -> str:
    budget = result["budget"]
    text = f"{verdict['result']}: p{budget['percentile']} under {1000 * budget['seconds']:g} ms, file to probabilities"
    if verdict["bound"] is not None:
        text += f"; 99 % bound {1000 * verdict['bound']:.1f} ms"
    if verdict["result"] == "INCONCLUSIVE":
        text += f"; give --repeats {result['n'] + verdict['more']}" if verdict["more"] else "; too close to the budget"
    if verdict["result"] != "PASS":
        text += f"; slowest stage: {verdict['slowest_stage']}"
    return text


def ratio_text(ratio: dict[str, Any]) -> str:
    """`13.65 [13.21, 13.82]`; without the interval where there are too few rounds for one."""
    if ratio["low"] is None:
        return f"{ratio['median']:.2f} [an interval needs 6 rounds]"
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def noise_lines(result: dict[str, Any]) -> list[str]:
    """A line where other processes took part of the machine, none where they did not."""
    if not result["noise"]["noisy"]:
        return []
    return [f"NOISY: other processes took {result['noise']['share']:.0%} of the machine during the run"]


def write_json(result: dict[str, Any], out: Path) -> None:
    """The result as JSON; InputError where it cannot be written."""
    try:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--json: cannot write {out}: {error.strerror}.") from error


def films(folder: Path, count: int = 6) -> list[str]:
    """Draw phantoms at acquisition size into `folder`; their paths."""
    from PIL import Image

    from .phantom import draw

    rng, paths = np.random.default_rng(0), []
    for i in range(count):
        path = folder / f"film{i}.png"
        Image.fromarray(draw(rng, view=("Frontal", "Lateral")[i % 2], size=FILM)).save(path)
        paths.append(str(path))
    return paths


def _size(path: str, given: bool) -> list[int]:
    if not given:
        return list(FILM)
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return [image.height, image.width]
    except (UnidentifiedImageError, OSError):
        return []
