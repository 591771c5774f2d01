"""A benchmark's JSON in a few lines: what was measured, on what, the figures, the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError
from . import results
from .latency import MODEL_ONLY, WHOLE, describe_noise, ratio_text, verdict_line

Result = dict[str, Any]


def facts(path: Path) -> dict[str, str]:
    """Names and one-line values of a result that `record.read` finds sound; its errors where it does not."""
    result = results.read(path)
    return _what(path, result) | _figures(result) | _believe(result)


def _what(path: Path, result: Result) -> dict[str, str]:
    kind = result["kind"].removeprefix("cxr-fast ") + (f", {result['scenario']}" if "scenario" in result else "")
    code, machine = result["commit"], result["machine"]
    revision = f", commit {code['revision'][:10]}{', dirty' if code['dirty'] else ''}" if code else ""
    cards = ", ".join(str(gpu.get("name")) for gpu in result["gpus"].get("before", ()))
    memory = "" if machine["memory_gib"] is None else f", {machine['memory_gib']:.0f} GiB"
    return {
        "benchmark": f"{path}, {kind}, schema {result['schema']}, {result['written_by']}{revision}",
        "date": result["date"],
        "machine": f"{machine['cpu']}, {machine['cores']} core(s){memory}, {machine['os']}, Python {machine['python']}",
        "GPUs": cards,
        **_subject(result),
    }


def _subject(result: Result) -> dict[str, str]:
    """The models or weights that were measured, and what ran them."""
    if result["kind"] == results.COMPARISON:
        models = {name: each for name, each in result["models"].items() if isinstance(each, dict)}
        return {
            f"model {name.upper()}": f"{m.get('name')}, {m.get('variant')}, {m.get('where')}"
            for name, m in models.items()
        }
    if "weights" in result:
        weights = result["weights"]
        return {"weights": weights + (" (RANDOM, not BiomedCLIP)" if weights.startswith("random:") else "")}
    return {
        "model": f"{result['model']}, variant {result['variant']}, sha256 {result['model_sha256'][:16]}",
        "note": result["provenance"].upper(),
        "ran on": f"{result['provider']}, {result['threads']} thread(s): {result['why']}",
    }


def _figures(result: Result) -> dict[str, str]:
    if result["kind"] in results.SPREADS:
        return _turns(result)
    if "points" in result:
        best = max(result["points"], key=lambda point: point["from files"]["rate"])
        rates = ", ".join(f"{best[arm]['rate']:.2f} images/s {arm}" for arm in ("from files", MODEL_ONLY))
        return {"best": f"batch {best['batch']}: {rates}"}
    if "trials" in result:
        proved = "none proved" if result["rate"] is None else f"{result['rate']:.2f} requests/s proved"
        return {"rate": f"{proved}, {len(result['trials'])} trial(s); without a pause {result['capacity']:.2f}/s"}
    shown = [name for name in (WHOLE, MODEL_ONLY) if name in result["summary"]]
    rate = {"rate": f"{result['rate']:.2f} images/s"} if "rate" in result else {}
    return {name: _percentiles(result["summary"][name]) for name in shown} | rate


def _percentiles(found: Result) -> str:
    texts = []
    for q, value in found["percentiles"].items():
        bound = found["bounds"].get(q)
        texts.append(f"p{q} {_ms(value)}" + ("" if bound is None else f" (99 % bound {_ms(bound)})"))
    return f"{', '.join(texts)}; n {found['n']:,}"


def _turns(result: Result) -> dict[str, str]:
    """Each arm's median, smallest and largest, and their ratios."""
    told = result[results.SPREADS[result["kind"]]]
    per = {results.CACHE: " an image", results.TRAINING: " a sample"}.get(result["kind"], "")
    out = {
        arm: f"{_ms(s['median'])}{per} [{1000 * s['min']:.4g}, {1000 * s['max']:.4g}], n {s['n']}"
        for arm, s in told.items()
    }
    ratios = result["ratios"] if "ratios" in result else {"B over A": result["ratio"]}
    for name, ratio in ratios.items():
        if not isinstance(ratio, dict) or not {"median", "low", "high"} <= set(ratio):
            raise InputError(f"the result is damaged: its ratio {name} is none.")
        out[f"ratio, {name}"] = ratio_text(ratio)
    return out


def _believe(result: Result) -> dict[str, str]:
    noise = describe_noise(result)
    quiet = [] if noise else [f"other processes took {result['noise']['share']:.1%} of the machine"]
    return {"noise": "; ".join(noise or quiet), "verdict": _verdict(result)}


def _verdict(result: Result) -> str:
    """Of what has a budget; a server's is of its rate, and not of one image."""
    if "verdict" not in result:
        return "none: nothing was held against a budget"
    if "trials" in result:
        budget = result["budget"]
        return f"{result['verdict']['result']}: p{budget['percentile']} under {1000 * budget['seconds']:g} ms"
    return verdict_line(result)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.4g} ms"
