"""What every benchmark result records, so that its figures can be believed or refused; written and read checked."""

from __future__ import annotations

import datetime
import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import InputError, SchemaError
from ..inference.predictor import Predictor
from ..system import hardware
from ..system.files import file_sha256
from . import measure

LATENCY, THROUGHPUT = "cxr-fast latency", "cxr-fast throughput"
COMPARISON, CACHE, TRAINING = "cxr-fast comparison", "cxr-fast cache benchmark", "cxr-fast training benchmark"
SCHEMAS = {LATENCY: 2, THROUGHPUT: 1, COMPARISON: 1, CACHE: 1, TRAINING: 1}
# Where a result of turns keeps n, median, minimum and maximum of its samples.
SPREADS = {COMPARISON: "seconds", CACHE: "seconds_per_image", TRAINING: "seconds_per_sample"}
EXIT = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}
SCENARIOS = ("offline", "single-stream", "server")
WINDOWS = 3
# Two cores count 100 ticks in half a second, so a share is known to two percent; a tenth of that would say nothing.
STRETCH = 0.5
# Medians of the three windows further apart than this are said: the machine changed while it was measured.
UNSTEADY = 0.10
DISTRIBUTIONS = (
    *("onnxruntime-gpu", "onnxruntime", "numpy", "pillow", "pydicom", "pylibjpeg"),
    *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cublas-cu12", "nvidia-cublas"),
)
PACKAGE = Path(__file__).parents[1]


# The machine while it is measured.


class Watch:
    """The rest of the machine during a run, stretch by stretch, so that a noisy one is flagged and not averaged away.

    with Watch() as watch: for each sample: ...; watch.tick()

    A stretch ends with the first sample after half a second, or where `close` says so.
    """

    def __init__(
        self,
        stretch: float = STRETCH,
        *,
        other: Callable[[], hardware.OtherCpu] = hardware.OtherCpu,
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
        """One more sample; ends the stretch where it is long enough."""
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

    def noise(self) -> dict[str, Any]:
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


def commit(package: Path = PACKAGE) -> dict[str, Any] | None:
    """Revision of the checkout the package runs from, and whether the package differs from it; None without one."""
    # A virtual environment inside somebody's checkout is not that checkout: the file itself must be tracked.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    revision, changed = _git(package, "rev-parse", "HEAD"), _git(package, "status", "--porcelain", "--", ".")
    return None if revision is None else {"revision": revision, "dirty": changed is None or bool(changed)}


def _git(folder: Path, *words: str) -> str | None:
    """What git says, None where it fails or is not there. Its variables, set inside a hook, name another checkout."""
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


# What is written.


def head(kind: str) -> dict[str, Any]:
    """Kind, schema, writer, date (UTC), commit, versions and machine: what every result begins with."""
    return {
        "kind": kind,
        "schema": SCHEMAS[kind],
        "written_by": f"cxr-fast {__version__}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "machine": hardware.machine(),
    }


def about(predictor: Predictor, device: str) -> dict[str, Any]:
    """The model and what really ran it."""
    return {
        "model": predictor.path.name,
        "model_sha256": file_sha256(predictor.path),
        "variant": predictor.info["variant"],
        "provenance": predictor.warning,
        "device": device,
        "provider": predictor.provider,
        "where": predictor.where,
        "why": predictor.why,
        "threads": predictor.threads,
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Percentiles that n supports, each with its one-sided 99 % bound, and the medians of three windows."""
    held = measure.supported(len(values))
    return {
        "n": len(values),
        "percentiles": {str(q): measure.percentile(values, q) for q in measure.PERCENTILES if q == 50 or q in held},
        "bounds": {str(q): measure.bound(values, q) for q in measure.PERCENTILES if q in held},
        "window_medians": window_medians(values),
    }


def turns(kind: str, samples: dict[str, list[float]], watch: Watch, before: list[dict[str, Any]]) -> dict[str, Any]:
    """Head, samples, their spread and windows, noise, and the GPUs before and after, of arms that took turns."""
    return {
        **head(kind),
        "samples": samples,
        SPREADS[kind]: {name: measure.spread(values) for name, values in samples.items()},
        "window_medians": {name: window_medians(values) for name, values in samples.items()},
        "noise": watch.noise(),
        "gpus": {"before": before, "after": hardware.gpu_states()},
    }


def window_medians(values: Sequence[float]) -> list[float]:
    """The median of each window."""
    return [measure.percentile(part, 50) for part in windows(values)]


def windows(values: Sequence[float]) -> list[Sequence[float]]:
    """The samples in three parts, in the order they were taken, as equal as they can be; fewer for fewer than three."""
    count = min(WINDOWS, len(values))
    size, extra = divmod(len(values), count)
    ends = [size * (k + 1) + min(k + 1, extra) for k in range(count)]
    return [values[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def spread(values: Sequence[float]) -> float:
    """Largest less smallest, as a share of the median."""
    return (max(values) - min(values)) / measure.median(values)


def budget(seconds: float, percentile: int) -> dict[str, Any]:
    """What a verdict is held against."""
    return {"seconds": seconds, "percentile": percentile}


def verdict(values: Sequence[float], limit: dict[str, Any]) -> dict[str, Any]:
    """The verdict of `timing.verdict`, JSON-ready."""
    return asdict(measure.verdict(values, limit["seconds"], limit["percentile"]))


def writable(out: Path | None, flag: str, suffix: str = "") -> None:
    """InputError where `out` cannot be written: said before minutes are measured, not after."""
    if out is None:
        return
    if suffix and out.suffix.lower() != suffix:
        raise InputError(f"{flag}: {out} is to end in {suffix}.")
    if out.is_dir() or not out.parent.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise InputError(f"{flag}: cannot write {out}.")


def write(result: dict[str, Any], out: Path) -> None:
    """The result as JSON, checked as `read` checks it; InputError where it cannot be written."""
    check(result, "the result")
    write_bytes((json.dumps(result, indent=1, allow_nan=False) + "\n").encode(), out, "--json")


def write_bytes(data: bytes, out: Path, flag: str = "--plot") -> None:
    """A file; InputError, which names the flag, where it cannot be written."""
    try:
        out.write_bytes(data)
    except OSError as error:
        raise InputError(f"{flag}: cannot write {out}: {error.strerror}.") from error


# What is read.


def read(path: Path) -> dict[str, Any]:
    """A result of ours. Raises InputError for what is none or is damaged, SchemaError for one of another schema."""
    try:
        result = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON, so not a benchmark result.") from error
    check(result, str(path))
    return dict(result)


HEAD: dict[str, Any] = {
    **dict.fromkeys(("kind", "written_by", "date"), str),
    **dict.fromkeys(("versions", "machine", "noise", "gpus"), dict),
    "schema": int,
    "commit": (dict, type(None)),
}
MODEL: dict[str, Any] = {
    **dict.fromkeys(("model", "model_sha256", "variant", "provenance", "device", "provider", "where", "why"), str),
    "threads": int,
    "images": dict,
}
MACHINE = ("cpu", "cpu_flags", "cores", "cores_affinity", "cores_quota", "governor", "memory_gib", "os", "python")
TURNS: dict[str, Any] = {"samples": dict, "window_medians": dict}
TIMED: dict[str, Any] = {**dict.fromkeys(("samples", "summary", "budget", "verdict"), dict), "n": int}
FIELDS: dict[str, dict[str, Any]] = {
    LATENCY: HEAD | MODEL | TIMED | {"cold": dict},
    THROUGHPUT: HEAD | MODEL | {"scenario": str, "seconds": (int, float), "workers": int},
    COMPARISON: HEAD | TURNS | {"models": dict, "images": dict, "ratio": dict, "difference": dict},
    CACHE: HEAD | TURNS | {"images": int, "weights": str, "ratios": dict},
    TRAINING: HEAD | TURNS | {"images": int, "weights": str, "ratios": dict},
}
OF_SCENARIO: dict[str, dict[str, Any]] = {
    "offline": {"points": list, "knee": dict, "best": dict},
    "single-stream": TIMED | {"rate": float},
    "server": {
        "service": list,
        "simulated": dict,
        "trials": list,
        "capacity": float,
        "rate": (float, type(None)),
        "budget": dict,
        "verdict": dict,
    },
}


def check(result: Any, name: str) -> None:
    """That `result` is of a kind and schema of ours, has every field, and that its figures follow from its samples.

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
    _need(result, FIELDS[kind], name)
    _need(result["machine"], dict.fromkeys(MACHINE, object), f"{name}: machine")
    _need(result["noise"], {"share": (float, int, type(None)), "noisy": bool, "stretches": list}, f"{name}: noise")
    if kind == THROUGHPUT:
        if result["scenario"] not in OF_SCENARIO:
            raise InputError(f"{name}: damaged, no scenario {result['scenario']!r:.40}.")
        _need(result, OF_SCENARIO[result["scenario"]], name)
    if kind in SPREADS:
        _check_turns(result, name)
    elif "samples" in result:
        _check_samples(result, name)
    for point in result.get("points", ()):
        _check_point(point, name)
    for trial in result.get("trials", ()):
        _check_trial(trial, result["budget"], name)
    if result.get("scenario") == "server":
        _check_rate(result, name)


def _need(values: Any, fields: dict[str, Any], name: str) -> None:
    if not isinstance(values, dict):
        raise InputError(f"{name}: damaged, not an object.")
    for field, kinds in fields.items():
        # bool is an int to Python and to nobody else.
        boolean = isinstance(values.get(field), bool) and kinds not in (bool, object)
        if field not in values or boolean or not isinstance(values[field], kinds):
            raise InputError(f"{name}: damaged, {field} is missing or of the wrong kind.")


def _seconds(values: Any, name: str) -> list[float]:
    def sound(x: Any) -> bool:
        return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) and x >= 0

    if not isinstance(values, list) or not values or not all(map(sound, values)):
        raise InputError(f"{name}: damaged, samples are not times.")
    return values


def _check_samples(result: dict[str, Any], name: str) -> None:
    for stage, values in result["samples"].items():
        if len(_seconds(values, name)) != result["n"]:
            raise InputError(f"{name}: damaged, n is {result['n']} and {stage} has {len(values)} samples.")
        if result["summary"].get(stage) != summary(values):
            raise InputError(f"{name}: damaged, the summary of {stage} is not that of its samples.")
    _check_verdict(result, result["samples"].get("file to probabilities"), name)


def _check_turns(result: dict[str, Any], name: str) -> None:
    told = result.get(SPREADS[result["kind"]])
    for arm, values in result["samples"].items():
        seconds = _seconds(values, name)
        sound = isinstance(told, dict) and told.get(arm) == measure.spread(seconds)
        if not sound or result["window_medians"].get(arm) != window_medians(seconds):
            raise InputError(f"{name}: damaged, the figures of {arm} are not those of its samples.")


def _check_verdict(values: dict[str, Any], samples: Any, name: str) -> None:
    _need(values["budget"], {"seconds": (int, float), "percentile": int}, f"{name}: budget")
    found = verdict(_seconds(samples, name), values["budget"])
    if {key: values["verdict"].get(key) for key in found} != found:
        raise InputError(f"{name}: damaged, the verdict is not that of the samples.")


def _check_point(point: Any, name: str) -> None:
    _need(point, {"batch": int, "peak_rss": (int, type(None)), "model only": dict, "from files": dict}, name)
    for arm in ("model only", "from files"):
        rates = point[arm].get("rates")
        if not isinstance(rates, list) or len(rates) != WINDOWS or min(_seconds(rates, name)) <= 0:
            raise InputError(f"{name}: damaged, batch {point['batch']} {arm} has no {WINDOWS} rates.")
        if point[arm].get("rate") != measure.median(rates):
            raise InputError(f"{name}: damaged, batch {point['batch']} {arm} is not the median of its rates.")


def _check_trial(trial: Any, limit: dict[str, Any], name: str) -> None:
    _need(trial, {"rate": float, "n": int, "served": int, "samples": list, "verdict": dict}, f"{name}: trial")
    if len(trial["samples"]) != trial["served"] or trial["served"] > trial["n"]:
        raise InputError(f"{name}: damaged, a trial's samples are not as many as it says.")
    _check_verdict(trial | {"budget": limit}, trial["samples"], f"{name}: trial")


def _check_rate(result: dict[str, Any], name: str) -> None:
    """A rate stands on the last trial, which passed; without one nothing passed."""
    rate, trials, said = result["rate"], result["trials"], result["verdict"].get("result")
    confirmed = bool(trials) and trials[-1]["rate"] == rate and trials[-1]["verdict"]["result"] == "PASS"
    if (rate is not None) != confirmed or (said == "PASS") != confirmed:
        raise InputError(f"{name}: damaged, its last trial does not confirm the rate.")
