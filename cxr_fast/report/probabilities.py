"""What probabilities are worth beyond their ranking: calibration slope and intercept, and decision curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..metrics.arrays import number_groups
from ..metrics.calibration import recalibrate
from ..metrics.curves import STEPS, net_benefit
from ..metrics.intervals import FEW, support
from ..metrics.student import student_quantile
from ..metrics.thresholds import predictive_values
from ..system.text import Figure, Label, Table
from .summary import Record, as_figure

POOLED = "all labels pooled"
# Threshold probabilities of the table; the curves are drawn from 1 to 99 %.
SHOWN = (0.05, 0.1, 0.2, 0.5)
RECALIBRATION = {"slope": "slope", "intercept": "intercept", "in_the_large": "intercept at slope 1"}
SLOPE_NOTE = (
    "Logistic regression of the labels on the log odds of the probabilities. Calibrated probabilities have slope 1 and "
    "intercept 0; a slope below 1 says they are too extreme, an intercept at slope 1 below 0 that they are too high. "
    "Intervals count groups (Liang and Zeger 1986)."
)
BENEFIT_NOTE = (
    "Net benefit an image, TP / n - FP / n × t / (1 - t), of calling a class positive from a probability t on (Vickers "
    "and Elkin 2006); in brackets that of calling every image positive. Calling none has 0. A model is of use where it "
    "is above both. At t = 0.1 a true positive is worth nine false ones."
)


def recalibration(
    labels: np.ndarray, probs: np.ndarray, groups: Sequence[str], classes: Sequence[str], level: float
) -> list[dict[str, Any]]:
    """Slope, intercept, and intercept at slope 1 of all labels pooled and of each class, (n, C), with intervals.

    A class with positives or negatives in fewer than FEW groups has no interval.
    """
    ids, width = number_groups(groups, len(labels)), labels.shape[1]
    pooled = recalibrate(labels.reshape(-1, 1), probs.reshape(-1, 1), np.repeat(ids, width))
    each, behind = recalibrate(labels, probs, ids), support(labels, groups)
    fits = [(POOLED, pooled, 0, _pooled_support(labels, ids))]
    fits += [(name, each, c, int(behind[c])) for c, name in enumerate(classes)]
    rows = []
    for name, fit, c, few in fits:
        reach = student_quantile(few - 1, (1 - level) / 2) if few >= FEW else float("nan")
        row: dict[str, Any] = {"class": name}
        for place, key in enumerate(RECALIBRATION):
            value, error = float(getattr(fit, key)[c]), float(fit.errors[c, place])
            row[key] = {"value": value, "low": value - reach * error, "high": value + reach * error}
        rows.append(row)
    return rows


def _pooled_support(labels: np.ndarray, ids: np.ndarray) -> int:
    return min(len(np.unique(ids[(labels == side).any(axis=1)])) for side in (0, 1))


def decision_curves(labels: np.ndarray, probs: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Net benefit at the thresholds STEPS of all labels pooled, their mean over classes, and of each class with labels.

    Under each name `model` and `everyone`, what calling every image positive has.
    """
    pooled = net_benefit(labels.reshape(-1, 1), probs.reshape(-1, 1))
    each = net_benefit(labels, probs)
    known = ~np.isnan(each.model[:, 0])
    curves = {POOLED: (pooled.model[0], pooled.everyone[0])} if known.any() else {}
    if known.any():
        curves["mean over classes"] = (each.model[known].mean(axis=0), each.everyone[known].mean(axis=0))
    curves |= {name: (each.model[c], each.everyone[c]) for c, name in enumerate(classes) if known[c]}
    lists = {name: {"model": a.tolist(), "everyone": b.tolist()} for name, (a, b) in curves.items()}
    return {"thresholds": STEPS.tolist(), "curves": lists}


def curve_records(decisions: Record | None) -> Iterator[Record]:
    """One record for each threshold of each curve, for CSV."""
    for name, curve in (decisions or {"curves": {}})["curves"].items():
        pairs = zip((decisions or {})["thresholds"], curve["model"], curve["everyone"], strict=True)
        yield from ({"class": name, "threshold": t, "net_benefit": a, "net_benefit_all": b} for t, a, b in pairs)


def recalibration_table(rows: Sequence[Record]) -> Table:
    """Slope and intercepts of all labels pooled and of each class."""
    return Table(
        title="Calibration slope and intercept",
        columns=["class", *RECALIBRATION.values()],
        rows=[[str(row["class"]), *(as_figure(row[key], 2) for key in RECALIBRATION)] for row in rows],
        notes=[SLOPE_NOTE] if rows else [],
        sortable=True,
    )


def benefit_table(decisions: Record) -> Table:
    """Net benefit of each curve at the thresholds SHOWN."""
    places = [int(np.argmin(np.abs(np.array(decisions["thresholds"]) - t))) for t in SHOWN]
    rows = [
        [name, *(Label(text=_pair(curve, place), value=curve["model"][place]) for place in places)]
        for name, curve in decisions["curves"].items()
    ]
    return Table(
        title="Net benefit at four threshold probabilities",
        columns=["class", *(f"t = {t:g}" for t in SHOWN)],
        rows=rows,
        notes=[BENEFIT_NOTE] if rows else [],
        sortable=True,
    )


def _pair(curve: Record, place: int) -> str:
    return f"{curve['model'][place]:.3f} ({curve['everyone'][place]:.3f})".replace("-", "−")


def state_prevalence(rows: Sequence[dict[str, Any]], shares: np.ndarray) -> None:
    """Add to each class's row its stated prevalence, and the PPV and NPV that its sensitivity and specificity give."""
    for row, share in zip(rows, shares.tolist(), strict=True):
        ppv, npv = predictive_values(row["sensitivity"]["value"], row["specificity"]["value"], share)
        row |= {"stated_prevalence": share, "ppv_at_stated_prevalence": ppv, "npv_at_stated_prevalence": npv}


def prevalence_table(rows: Sequence[Record]) -> Table:
    """PPV and NPV of every class at its stated prevalence; no row where none was stated."""
    keys = ("stated_prevalence", "ppv_at_stated_prevalence", "npv_at_stated_prevalence")
    return Table(
        title="PPV and NPV at a stated prevalence",
        columns=["class", "stated prevalence", "PPV at that prevalence", "NPV at that prevalence"],
        rows=[[str(row["class"]), *(Figure(value=row[key]) for key in keys)] for row in rows if keys[0] in row],
        notes=["By Bayes' theorem from sensitivity and specificity above; without an interval."],
        sortable=True,
    )
