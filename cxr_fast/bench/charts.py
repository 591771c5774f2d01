"""A benchmark result as one picture: latencies against their budget, images a second against the batch size."""

from __future__ import annotations

from typing import Any

from ..report import charts
from ..report.charts import ACCENT, COLOURS, GREY, INK
from .records import (
    ARMS,
    MODEL_ONLY,
    WHOLE,
    Budget,
    LatencyResult,
    OfflineResult,
    ServerResult,
    SingleStreamResult,
    ThroughputResult,
)

WIDTH, HEIGHT = 6.4, 3.6


def draw(result: Any) -> bytes:
    """The picture of a result, PNG."""
    if "points" in result:
        return by_batch(result)
    return by_rate(result) if "trials" in result else latencies(result)


def latencies(result: LatencyResult | SingleStreamResult) -> bytes:
    """The share of samples at most so long; budget, percentile and its bound marked."""
    made, axes = charts.figure(WIDTH, HEIGHT)
    for name, colour in ((WHOLE, INK), (MODEL_ONLY, GREY)):
        if name in result["samples"]:
            axes.ecdf([1000 * x for x in result["samples"][name]], color=colour, lw=1.6, label=name)
    title = f"n {len(result['samples'][WHOLE]):,}"
    if budget := result["budget"]:
        title = f"{result['verdict']['result']}, {title}"
        _mark(axes, budget, result["verdict"], 1000 * max(max(values) for values in result["samples"].values()))
    axes.set(xlabel="milliseconds", ylabel="share of samples", ylim=(0, 1.02))
    axes.set_title(_title(result, title), fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="best")
    return charts.png(made)


def _mark(axes: Any, budget: Budget, verdict: dict[str, Any], longest: float) -> None:
    """Mark the budget, the percentile that must keep it and its bound; `longest` is the longest sample in ms."""
    limit, q = 1000 * budget["seconds"], budget["percentile"]
    axes.axhline(q / 100, color=GREY, lw=0.8, ls=":")
    axes.plot(1000 * verdict["estimate"], q / 100, "o", color=ACCENT, ms=6, label=f"p{q}")
    if verdict["bound"] is not None:
        axes.plot(1000 * verdict["bound"], q / 100, ">", color=COLOURS[1], ms=6, label="its 99 % bound")
    axes.axvline(limit, color=COLOURS[1], lw=1.2, ls="--", label=f"budget {limit:g} ms")
    # A budget a thousand times as long as what was measured would leave of the curve a line at the edge.
    if limit > 5 * longest:
        axes.set_xscale("log")


def by_batch(result: OfflineResult) -> bytes:
    """Images a second by batch size, median and range of three windows, the knee marked."""
    made, axes = charts.figure(WIDTH, HEIGHT)
    points = result["points"]
    batches = [point["batch"] for point in points]
    for arm, colour in zip(ARMS, (GREY, INK), strict=True):
        rates = [point[arm]["rate"] for point in points]
        below = [point[arm]["rate"] - min(point[arm]["rates"]) for point in points]
        above = [max(point[arm]["rates"]) - point[arm]["rate"] for point in points]
        axes.errorbar(batches, rates, [below, above], color=colour, marker="o", ms=4, capsize=3, lw=1.6, label=arm)
        knee = result["knee"][arm]
        ring = {"ms": 12, "mfc": "none", "mec": COLOURS[1], "mew": 1.6, "clip_on": False}
        axes.plot(knee, rates[batches.index(knee)], "o", **ring)
    axes.plot([], [], "o", ms=9, mfc="none", mec=COLOURS[1], mew=1.6, label="knee")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set(xlabel="batch size", ylabel="images a second")
    every = [rate for point in points for arm in ARMS for rate in point[arm]["rates"]]
    # Where decoding is the limit, the model alone is a hundred times as fast and would press the rest to the floor.
    if max(every) > 10 * min(every):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_title(_title(result, "median and range of three windows"), fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="best")
    return charts.png(made)


def by_rate(result: ServerResult) -> bytes:
    """The percentile of each trial by its rate, and the budget."""
    made, axes = charts.figure(WIDTH, HEIGHT)
    q, limit = result["budget"]["percentile"], 1000 * result["budget"]["seconds"]
    colours = {"PASS": COLOURS[2], "FAIL": COLOURS[1], "INCONCLUSIVE": GREY}
    for said, colour in colours.items():
        trials = [trial for trial in result["trials"] if trial["verdict"]["result"] == said]
        estimates = [1000 * trial["verdict"]["estimate"] for trial in trials]
        axes.plot([trial["rate"] for trial in trials], estimates, "o", color=colour, label=said if trials else None)
    axes.axhline(limit, color=COLOURS[1], lw=1.2, ls="--", label=f"budget {limit:g} ms")
    axes.axvline(result["capacity"], color=GREY, lw=0.8, ls=":", label="capacity of the worker")
    axes.set(xlabel="requests a second", ylabel=f"p{q}, milliseconds, arrival to answer", xlim=(0, None))
    axes.set_ylim(bottom=0)
    axes.set_title(_title(result, result["verdict"]["result"]), fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="best")
    return charts.png(made)


def _title(result: ThroughputResult | LatencyResult, text: str) -> str:
    noisy = ", NOISY" if result["noise"]["noisy"] else ""
    cpu = result["machine"]["cpu"] if result["provider"] == "CPUExecutionProvider" else result["provider"]
    return charts.label(f"{result['model']}, {cpu}: {text}{noisy}", 100)
