"""Count what the section shows, JSON-ready: strips of probabilities, operating points, findings called instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...metrics import curves
from ..summary import Record

DOTS = 100  # films of one class and label in a strip, evenly spread over their ranks
POINTS = 100  # operating points of one class


def glance_records(
    labels: np.ndarray, probs: np.ndarray, limits: np.ndarray, classes: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return `strips`, `operating_points` and `mistaken` of n films: labels (n, C) 1, 0, -1, probabilities (n, C),
    thresholds (C,), or (n, C) where each film has its own."""
    own = [float(limit) for limit in limits] if limits.ndim == 1 else [None] * len(classes)
    return {
        "strips": {name: strip(labels[:, c], probs[:, c]) for c, name in enumerate(classes)},
        "operating_points": {
            name: operating_points(labels[:, c], probs[:, c], own[c]) for c, name in enumerate(classes)
        },
        "mistaken": mistaken(labels, probs >= limits, classes),
    }


def strip(labels: np.ndarray, probs: np.ndarray) -> dict[str, list[float]]:
    """Return rising probabilities of up to DOTS films with the finding (`positive`) and without (`negative`), (n,)."""
    out = {}
    for name, side in (("positive", 1), ("negative", 0)):
        values = np.sort(probs[labels == side].astype(np.float64))
        if len(values) > DOTS:
            values = values[np.linspace(0, len(values) - 1, DOTS).round().astype(int)]
        out[name] = [round(float(value), 4) for value in values]
    return out


def operating_points(labels: np.ndarray, probs: np.ndarray, limit: float | None) -> dict[str, Any]:
    """Return the counts behind the ROC curve: `positives`, `negatives`, the `chosen` point's place in `points`, None
    where the class has no one threshold.

    A point is [threshold, true positives, false positives], by rising threshold; at most POINTS, among them the class's
    own threshold, the lowest score, and one above all scores (None). A film is called at or over a threshold.
    """
    known = labels >= 0
    true, called = curves.count_steps(labels, probs)
    scores = np.unique(probs[known].astype(np.float64))[::-1]  # the k-th step calls the films of the k highest scores
    chosen = 0 if limit is None else int(np.count_nonzero(scores >= limit))
    kept = np.unique([0, chosen, len(scores), *np.linspace(0, len(scores), POINTS - 1).round().astype(int)])[::-1]
    limits = [limit if k == chosen and limit is not None else None if not k else float(scores[k - 1]) for k in kept]
    points = [[x, int(true[k]), int(called[k] - true[k])] for x, k in zip(limits, kept, strict=True)]
    return {
        "positives": int(true[-1]),
        "negatives": int(called[-1] - true[-1]),
        "chosen": None if limit is None else int(np.flatnonzero(kept == chosen)[0]),
        "points": points,
    }


def mistaken(labels: np.ndarray, called: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Count, of the films in which finding A (row) was missed, those in which B (column) was called and is not there.

    `counts` (C, C) and `known` (C, C), those of them in which the label of B is known; `wrong` (C,) and `all` (C,): B
    called and not there among all films whose label of B is known. Labels and calls are (n, C).
    """
    missed, wrong = ((labels == 1) & ~called).astype(np.int64), ((labels == 0) & called).astype(np.int64)
    known = (labels >= 0).astype(np.int64)
    return {
        "classes": list(classes),
        "counts": (missed.T @ wrong).tolist(),
        "known": (missed.T @ known).tolist(),
        "wrong": wrong.sum(axis=0).tolist(),
        "all": known.sum(axis=0).tolist(),
    }


def point_records(evaluation: Record) -> Iterator[Record]:
    """One record for each operating point of each class, for CSV."""
    for name, found in (evaluation.get("operating_points") or {}).items():
        for limit, true, false in found["points"]:
            cells = {"true_positives": true, "false_positives": false}
            cells |= {"false_negatives": found["positives"] - true, "true_negatives": found["negatives"] - false}
            yield {"class": name, "threshold": limit, **cells}


def mistaken_records(evaluation: Record) -> Iterator[Record]:
    """One record for each pair of findings of which one was called where the other was missed, for CSV."""
    found: Mapping[str, Any] = evaluation.get("mistaken") or {"classes": []}
    names = found["classes"]
    for a, missed in enumerate(names):
        for b, called in enumerate(names):
            if found["counts"][a][b]:
                row = {"missed": missed, "called": called, "films": found["counts"][a][b]}
                yield row | {"of": found["known"][a][b], "called_wrongly": found["wrong"][b], "of_all": found["all"][b]}
