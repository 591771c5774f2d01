"""Benchmark results: what all of them record, their files checked, and the lines that describe them."""

from __future__ import annotations

import datetime
import json
import math
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from .. import __version__
from ..errors import InputError, SchemaError
from ..inference.hub import is_address
from ..inference.predictor import Predictor
from ..system import files, hardware
from . import measure
from .records import (
    ARMS,
    CACHE,
    COMPARISON,
    FROM_FILES,
    KINDS,
    MODEL_ONLY,
    SCENARIOS,
    SCHEMAS,
    SPREADS,
    THROUGHPUT,
    TRAINING,
    WHOLE,
    BenchResult,
    Budget,
    Commit,
    ModelFields,
    RatioFields,
    ResultHead,
    SampleSummary,
    TurnsResult,
)

EXIT = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}
# Medians of the three windows further apart than this are said: the machine changed while it was measured.
UNSTEADY = 0.10
# Said under a table of medians.
RATIOS = "a ratio is the median of the rounds' own ratios; the medians of the table divide to another figure"
DISTRIBUTIONS = (
    *("onnxruntime-gpu", "onnxruntime", "numpy", "pillow", "pydicom", "pylibjpeg"),
    *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cublas-cu12", "nvidia-cublas"),
)
PACKAGE = Path(__file__).parents[1]


# What is recorded.


def head(kind: str) -> ResultHead:
    """Kind, schema, writer, date (UTC), commit, versions and machine: what every result begins with."""
    return {
        "kind": kind,
        "schema": SCHEMAS[kind],
        "written_by": f"cxr-fast {__version__}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "machine": hardware.machine(),  # type: ignore[typeddict-item]
    }


def about(predictor: Predictor, device: str) -> ModelFields:
    """The model and what really ran it."""
    return {
        "model": predictor.source if is_address(predictor.source) else predictor.path.name,
        "model_sha256": files.file_sha256(predictor.path),
        "variant": predictor.info["variant"],
        "provenance": predictor.warning,
        "device": device,
        "provider": predictor.provider,
        "where": predictor.where,
        "why": predictor.why,
        "threads": predictor.threads,
    }


def turns(
    kind: str, samples: dict[str, list[float]], watch: measure.Watch, before: list[dict[str, Any]]
) -> TurnsResult:
    """Head, samples and their windows, noise, and the GPUs before and after, of arms that took turns."""
    return {
        **head(kind),
        "samples": samples,
        "window_medians": {name: measure.window_medians(values) for name, values in samples.items()},
        "noise": watch.noise(),
        "gpus": {"before": before, "after": hardware.gpu_states()},
    }


def commit(package: Path = PACKAGE) -> Commit | None:
    """Revision of the checkout the package runs from, and whether the package differs from it; None without one."""
    # A virtual environment inside somebody's checkout is not that checkout: the file itself must be tracked.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    revision, changed = _git(package, "rev-parse", "HEAD"), _git(package, "status", "--porcelain", "--", ".")
    return None if revision is None else {"revision": revision, "dirty": changed is None or bool(changed)}


def _git(folder: Path, *words: str) -> str | None:
    """What git says, None where it fails or is missing. Its variables, set inside a hook, name another checkout."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False, env=clean
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Installed versions of what a figure may depend on, by distribution."""
    found = {"cxr-fast": __version__}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def verdict(values: Sequence[float], limit: Budget) -> dict[str, Any]:
    """The fields of `measure.verdict`."""
    return asdict(measure.verdict(values, limit["seconds"], limit["percentile"]))


# Files.


def writable(out: Path | None, flag: str, suffix: str = "") -> None:
    """Raise InputError where `out` cannot be written: before minutes are measured, not after."""
    if out is None:
        return
    if suffix and out.suffix.lower() != suffix:
        raise InputError(f"{flag}: {out} must end in {suffix}.")
    if out.is_dir() or not out.parent.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise InputError(f"{flag}: cannot write {out}; give the name of a file in a folder that may be written.")


def write(result: Any, out: Path) -> None:
    """Write a result as JSON, checked as `read` checks it."""
    check(result, "the result")
    files.write_json(out, result, "--json")


def read(path: Path) -> dict[str, Any]:
    """Read a result. Raises InputError for what is none or is damaged, SchemaError for one of another schema."""
    try:
        result = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON, so not a benchmark result.") from error
    check(result, str(path))
    return dict(result)


def check(result: Any, name: str) -> None:
    """Check that `result` is of a kind and schema of ours, has every field, and that its figures are of its samples.

    Raises SchemaError for another schema, InputError otherwise; both say which result and what is wrong.
    """
    kind = result.get("kind") if isinstance(result, dict) else None
    if not isinstance(kind, str) or kind not in SCHEMAS:
        raise InputError(f"{name}: not a benchmark result ({', '.join(SCHEMAS)}).")
    if result.get("schema") != SCHEMAS[kind]:
        by = str(result.get("written_by", "an unknown version"))[:60]
        raise SchemaError(
            f"{name}: {kind} schema {result.get('schema')}, written by {by}; this version reads {SCHEMAS[kind]}: "
            "measure again."
        )
    if kind == THROUGHPUT and str(result.get("scenario")) not in SCENARIOS:
        raise InputError(f"{name}: damaged, no scenario {result.get('scenario')!r:.40}.")
    try:
        msgspec.convert(result, SCENARIOS[result["scenario"]] if kind == THROUGHPUT else KINDS[kind])
        for what, found, expected in _figures(result):
            if found != expected:
                raise InputError(f"{name}: damaged, the {what} is not that of its samples.")
    except (msgspec.ValidationError, ValueError) as error:
        raise InputError(f"{name}: damaged, {error}.") from error


def _figures(result: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Each figure that follows from samples: its name, what the result has, and what the samples give."""
    kind, limit = result["kind"], result.get("budget")
    for arm, values in result.get("samples", {}).items():
        _require_numbers(values, arm)
        if kind in SPREADS:
            yield f"spread of {arm}", result[SPREADS[kind]].get(arm), measure.spread(values)
            yield f"window medians of {arm}", result["window_medians"].get(arm), measure.window_medians(values)
        else:
            yield f"n of {arm}", result["n"], len(values)
            yield f"summary of {arm}", result["summary"].get(arm), measure.summary(values)
    if kind not in SPREADS and "samples" in result:
        yield "presence of a verdict", "verdict" in result, limit is not None
    if kind not in SPREADS and "samples" in result and limit is not None:
        yield "verdict", *_verdicts(result["verdict"], result["samples"].get(WHOLE, []), limit)
    for point in result.get("points", ()):
        for arm in ARMS:
            rates, name = point[arm].get("rates"), f"batch {point['batch']} {arm}"
            if not isinstance(rates, list) or len(rates) != measure.WINDOWS:
                raise ValueError(f"{name} has no {measure.WINDOWS} rates")
            _require_numbers(rates, name, above_zero=True)
            yield f"rate of {name}", point[arm].get("rate"), measure.median(rates)
    for trial in result.get("trials", ()):
        yield "number of requests served", trial["served"], len(trial["samples"])
        yield "number of requests", max(trial["n"], trial["served"]), trial["n"]
        yield "verdict of a trial", *_verdicts(trial["verdict"], trial["samples"], limit)
    if "trials" in result:
        # A rate stands on the last trial, which passed; without one nothing passed.
        last, rate = (result["trials"] or [None])[-1], result["rate"]
        passed = last is not None and last["verdict"]["result"] == "PASS" and last["rate"] == rate
        if (rate is not None) != passed or (result["verdict"].get("result") == "PASS") != passed:
            raise ValueError("its last trial does not confirm the rate")


def _require_numbers(values: list[Any], name: str, above_zero: bool = False) -> None:
    """Raise ValueError unless these are times, 0 or longer, or rates, above 0."""
    finite = all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in values)
    if not values or not finite or min(values) < 0 or (above_zero and not min(values)):
        raise ValueError(f"the samples of {name} are not {'rates above 0' if above_zero else 'times'}")


def _verdicts(stored: dict[str, Any], samples: list[float], limit: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    _require_numbers(samples, WHOLE)
    expected = verdict(samples, limit)
    return {name: stored.get(name) for name in expected}, expected


# Lines that describe a result.


def describe_setup(result: Any) -> list[str]:
    """What ran the model, on what, from which commit."""
    machine, code = result["machine"], result["commit"]
    revision = _revision(code) if code else result["written_by"]
    lines = [
        f"{result['provider']}, {result['threads']} thread(s) on {machine['cores']} core(s), {machine['cpu']}",
        f"{revision}, {result['date']}",
        f"device: {result['why']}",
    ]
    if result["provenance"]:
        lines.append(f"note: {result['provenance'].upper()}; the weights do not change the time")
    return lines


def _revision(code: Commit) -> str:
    return f"commit {code['revision'][:10]}{', dirty' if code['dirty'] else ''}"


def describe_noise(result: BenchResult) -> list[str]:
    """What other processes took, where it was too much to believe the figures; a line where nobody can know."""
    noise = result["noise"]
    if noise["share"] is None:
        return ["how much other processes used the machine is unknown on this system"]
    if not noise["noisy"]:
        return []
    # The share counts the whole run, the worst stretch only what was timed: it may be the smaller one.
    worst = f", up to {noise['worst']:.0%}" if (noise["worst"] or 0.0) > noise["share"] else ""
    over = f"over {noise['threshold']:.0%}"
    if noise["noisy_samples"]:  # none where only the whole run was watched
        over += f" while {noise['noisy_samples']} of {noise['samples']} samples were taken"
    return [
        f"NOISY: other processes took {noise['share']:.0%} of the machine during the run{worst}; {over}: run it again "
        "on a quiet machine"
    ]


def describe_unsteady(parts: dict[str, list[float]]) -> list[str]:
    """A line for each figure whose three windows lie too far apart."""
    return [
        f"UNSTEADY: the medians of {name} in {len(values)} windows differ by {measure.relative_range(values):.0%}"
        for name, values in parts.items()
        if measure.relative_range(values) > UNSTEADY
    ]


def describe_verdict(result: Any, advice: str = "--repeats {total}") -> str:
    """PASS, FAIL or INCONCLUSIVE, of what, and how many more samples would settle it."""
    budget, found = result["budget"], result["verdict"]
    text = f"{found['result']}: p{budget['percentile']} under {1000 * budget['seconds']:g} ms, {WHOLE}"
    if found["bound"] is not None:
        text += f"; 99 % bound {milliseconds(found['bound'])} ms, MLPerf-style, not MLPerf"
    if found["result"] != "INCONCLUSIVE":
        return text
    if not found["more"]:
        return f"{text}; too close to the budget for any number of samples"
    total = advice.format(total=found["n"] + found["more"])
    return f"{text}; {found['more']:,} more samples needed: {total}"


def describe_ratio(ratio: RatioFields) -> str:
    """`13.65 [13.21, 13.82]`; without the interval where there are too few rounds for one."""
    if ratio["low"] is None:
        return f"{ratio['median']:.2f} [an interval needs 6 rounds]"
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def milliseconds(seconds: float) -> str:
    """Three digits where a stage is short: 0.0 would say that it takes no time."""
    return f"{1000 * seconds:.1f}" if seconds >= 0.001 else f"{1000 * seconds:.3f}"


# A file of a result in a few lines.


def describe(path: Path) -> dict[str, str]:
    """Names and one-line values of a result's file: what was measured, on what, the figures, the verdict."""
    result = read(path)
    kind = result["kind"].removeprefix("cxr-fast ") + (f", {result['scenario']}" if "scenario" in result else "")
    code, machine = result["commit"], result["machine"]
    memory = "" if machine["memory_gib"] is None else f", {machine['memory_gib']:.0f} GiB"
    quiet = f"other processes took {result['noise']['share'] or 0:.1%} of the machine"
    return {
        "benchmark": f"{path}, {kind}, schema {result['schema']}, {result['written_by']}"
        + (f", {_revision(code)}" if code else ""),
        "date": result["date"],
        "machine": f"{machine['cpu']}, {machine['cores']} core(s){memory}, {machine['os']}, Python {machine['python']}",
        "GPUs": ", ".join(str(gpu.get("name")) for gpu in result["gpus"].get("before", ())),
        **_subject(result),
        **(_turn_figures(result) if result["kind"] in SPREADS else _figures_of_model(result)),
        "noise": "; ".join(describe_noise(result)) or quiet,  # type: ignore[arg-type]
        "verdict": _shown_verdict(result),
    }


def _subject(result: dict[str, Any]) -> dict[str, str]:
    """The models or weights that were measured, and what ran them."""
    if result["kind"] == COMPARISON:
        keys = ("name", "variant", "where")
        return {
            f"model {name.upper()}": ", ".join(str(model.get(k)) for k in keys)
            for name, model in result["models"].items()
        }
    if "weights" in result:
        weights = result["weights"]
        return {"weights": weights + (" (RANDOM, not BiomedCLIP)" if weights.startswith("random:") else "")}
    return {
        "model": f"{result['model']}, variant {result['variant']}, sha256 {result['model_sha256'][:16]}",
        "note": result["provenance"].upper(),
        "ran on": f"{result['provider']}, {result['threads']} thread(s): {result['why']}",
    }


def _figures_of_model(result: dict[str, Any]) -> dict[str, str]:
    if "points" in result:
        best = max(result["points"], key=lambda point: point[FROM_FILES]["rate"])
        rates = ", ".join(f"{best[arm]['rate']:.2f} images/s {arm}" for arm in (FROM_FILES, MODEL_ONLY))
        return {"best": f"batch {best['batch']}: {rates}"}
    if "trials" in result:
        proved = "none proved" if result["rate"] is None else f"{result['rate']:.2f} requests/s proved"
        return {"rate": f"{proved}, {len(result['trials'])} trial(s); without a pause {result['capacity']:.2f}/s"}
    shown = {name: result["summary"][name] for name in (WHOLE, MODEL_ONLY) if name in result["summary"]}
    rate = {"rate": f"{result['rate']:.2f} images/s"} if "rate" in result else {}
    return {name: _percentiles(found) for name, found in shown.items()} | rate


def _percentiles(found: SampleSummary) -> str:
    bounds = {q: f" (99 % bound {_short(bound)})" for q, bound in found["bounds"].items() if bound is not None}
    texts = [f"p{q} {_short(value)}{bounds.get(q, '')}" for q, value in found["percentiles"].items()]
    return f"{', '.join(texts)}; n {found['n']:,}"


def _turn_figures(result: dict[str, Any]) -> dict[str, str]:
    """Each arm's median, smallest and largest, and the ratios."""
    per = {CACHE: " an image", TRAINING: " a sample"}.get(result["kind"], "")
    ratios = result["ratios"] if "ratios" in result else {"B over A": result["ratio"]}
    return {
        arm: f"{_short(s['median'])}{per} [{1000 * s['min']:.4g}, {1000 * s['max']:.4g}], n {s['n']}"
        for arm, s in result[SPREADS[result["kind"]]].items()
    } | {f"ratio, {name}": describe_ratio(ratio) for name, ratio in ratios.items()}


def _shown_verdict(result: dict[str, Any]) -> str:
    """Of what has a budget; a server's is of its rate, and not of one image."""
    if "verdict" not in result:
        return "none: nothing was held against a budget"
    if "trials" in result:
        budget = result["budget"]
        return f"{result['verdict']['result']}: p{budget['percentile']} under {1000 * budget['seconds']:g} ms"
    return describe_verdict(result)


def _short(seconds: float) -> str:
    return f"{1000 * seconds:.4g} ms"
