"""Draw the section's pictures: probabilities as strips of dots, and findings called instead of missed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import charts
from ..summary import Record

FEW = 5
TICKS = (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)


def drawings(evaluation: Record | None) -> dict[str, Callable[[], Any]]:
    """Return the functions that draw what an evaluation has, by the name of the picture."""
    plots: dict[str, Callable[[], Any]] = {}
    known = evaluation or {}
    if any(side for found in known.get("strips", {}).values() for side in found.values()):
        plots["strip_plot"] = lambda: strips(known)
    if np.max(known.get("mistaken", {}).get("known") or 0, initial=0) >= FEW:
        plots["mistaken_plot"] = lambda: mistaken(known["mistaken"])
    return plots


def strips(evaluation: Record) -> Any:
    """Draw a dot a film: per class, best AUC above, those with the finding over those without, and the threshold.

    The axis is the square root of the probability: most probabilities of a rare finding are near 0.
    """
    rows = sorted(evaluation["per_class"], key=lambda row: (row["auc"]["value"] is not None, row["auc"]["value"] or 0))
    made, axes = charts.figure(charts.NARROW, 1.3 + 0.3 * max(len(rows), 2))
    for place, row in enumerate(rows):
        found = evaluation["strips"][row["class"]]
        for name, side, colour in (("positive", 0.21, charts.COLOURS[1]), ("negative", -0.21, charts.ACCENT)):
            values = np.array(found[name], float)
            spread = (np.arange(len(values)) * 0.618034 % 1 - 0.5) * 0.26  # apart from each other, and the same again
            axes.plot(values, place + side + spread, "o", ms=2.2, mew=0, alpha=0.55, color=colour, rasterized=True)
            if len(values):
                middle = [float(np.median(values))] * 2
                axes.plot(middle, [place + side - 0.17, place + side + 0.17], color=colour, lw=1.8)
        if row["threshold"] is not None:
            axes.plot([row["threshold"]] * 2, [place - 0.42, place + 0.42], color=charts.INK, lw=0.9)
    axes.plot([], [], "o", ms=4, mew=0, color=charts.COLOURS[1], label="with the finding")
    axes.plot([], [], "o", ms=4, mew=0, color=charts.ACCENT, label="without")
    axes.plot([], [], color=charts.INK, lw=0.9, label="threshold")
    made.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8, handletextpad=0.3, columnspacing=1.2)
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.set_yticks(range(len(rows)), [f"{charts.label(row['class'])} ({row['positives']:,})" for row in rows])
    axes.set(xlabel="probability", xlim=(0, 1), ylim=(-0.6, len(rows) - 0.4))
    axes.grid(axis="x", color=charts.FAINT, lw=0.5)
    axes.set_axisbelow(True)
    return made


def mistaken(found: Record) -> Any:
    """Draw the share of the films with a missed finding (row) in which another (column) was called and is not there.

    Less the share of such calls among all films, and at least 0; none of fewer than FEW films.
    """
    counts, known, wrong, every = (np.array(found[key], float) for key in ("counts", "known", "wrong", "all"))
    more = np.maximum(counts - known * wrong / np.maximum(every, 1), 0)
    titles = ("of the films in which this finding was missed …", "… more often this one was called wrongly")
    return charts.finding_squares(found["classes"], more, np.where(known >= FEW, known, 0), titles)
