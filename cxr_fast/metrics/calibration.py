"""Fit and apply the calibration of each class's probabilities, as JSON beside the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import checked

# Nearer to 0 or 1 than this a float32 probability rounds to it, and has no finite logit.
EDGE = 1e-7


def fit(labels: np.ndarray, probs: np.ndarray, kind: str) -> dict[str, Any] | None:
    """Fit a calibration of `kind` (`none`, `platt`, `isotonic`) to labels and probabilities (N, C); JSON-ready.

    Platt: sigmoid(a logit(p) + b), on his smoothed targets (Platt 1999), so that a separable class stays finite.
    Isotonic: the pooled blocks of isotonic regression (Zadrozny and Elkan 2002), joined by lines between their centres
    (Oron and Flournoy 2017), so that no jump lies between two neighbouring probabilities. A class without a known
    positive or negative, or which Platt's fit would turn upside down, is left as it is; `fitted` counts the others.
    None for `none`.
    """
    if kind == "none":
        return None
    known = [(y[y >= 0], p[y >= 0].astype(np.float64)) for y, p in zip(labels.T, probs.T, strict=True)]
    both = [bool((y == 1).any() and (y == 0).any()) for y, _ in known]
    each = _platt if kind == "platt" else _isotonic
    maps = [each(y, p) if ok else None for (y, p), ok in zip(known, both, strict=True)]
    identity = (1.0, 0.0) if kind == "platt" else ([0.0, 1.0], [0.0, 1.0])
    first, second = zip(*(m or identity for m in maps), strict=True)
    names = ("a", "b") if kind == "platt" else ("x", "y")
    fitted = sum(m is not None for m in maps)
    return {"kind": kind, "fitted": fitted, names[0]: list(first), names[1]: list(second)}


def prior_log_odds(labels: np.ndarray) -> np.ndarray:
    """Log odds of the share of positives among the known labels of each class, (C,) float64 from labels (N, C).

    A class without a positive counts as having one, and one without a negative likewise.
    """
    positives, known = (labels == 1).sum(axis=0), np.maximum((labels >= 0).sum(axis=0), 2)
    positives = np.clip(positives, 1, known - 1)
    return np.asarray(np.log(positives / (known - positives)))


def adjust(labels: np.ndarray, strength: float) -> dict[str, Any]:
    """Post-hoc logit adjustment as a calibration: `strength` times each class's log odds in training labels (N, C) is
    taken from its logit. Source: Menon et al., Long-tail learning via logit adjustment, 2021, eq. 9."""
    shift = -strength * prior_log_odds(labels)
    values = {"a": [1.0] * len(shift), "b": [float(b) for b in shift]}
    return {"kind": "platt", "fitted": len(shift), "adjusted": strength, **values}


def apply(calibration: dict[str, Any] | None, probs: np.ndarray) -> np.ndarray:
    """Calibrate raw probabilities (N, C) to float32; None returns the same array."""
    if calibration is None:
        return probs
    return _exact(calibration, probs).astype(np.float32)


def move_thresholds(calibration: dict[str, Any], limits: np.ndarray) -> np.ndarray:
    """Thresholds (C,) float64 that call the same calibrated probabilities positive as `limits` (C,) call raw ones.

    No decision on a float32 probability changes, unless two of them on both sides of a limit become equal: those nearer
    than EDGE to 0 or 1, and neighbours where the map is flat. A limit above 1, which calls nothing positive, stays.
    """
    upper = limits.astype(np.float32)
    upper = np.where(upper < limits, np.nextafter(upper, np.float32(np.inf)), upper)  # the least positive
    lower = np.nextafter(upper, np.float32(-np.inf))  # the greatest negative
    sides = apply(calibration, np.stack([lower, upper]).clip(0, 1)).astype(np.float64)
    inside = np.clip(_exact(calibration, limits.clip(0, 1)[None])[0], np.nextafter(sides[0], np.inf), sides[1])
    return np.where(limits > 1, limits, inside)


def _exact(calibration: dict[str, Any], probs: np.ndarray) -> np.ndarray:
    """Calibrated probabilities (N, C) in float64."""
    p = probs.astype(np.float64)
    if calibration["kind"] == "platt":
        scaled = np.asarray(calibration["a"]) * logit(p) + np.asarray(calibration["b"])
        scaled = np.clip(scaled, -700, 700)  # a steep map overflows exp, where float32 has 0 and 1 long before
        return np.asarray(1 / (1 + np.exp(-scaled)))
    columns = zip(p.T, calibration["x"], calibration["y"], strict=True)
    return np.stack([np.interp(column, x, y) for column, x, y in columns], axis=1)


def describe(calibration: dict[str, Any], classes: int) -> str:
    """Say in words what was fitted, and how many of the classes were not."""
    if "adjusted" in calibration:
        return f"logits adjusted by {calibration['adjusted']:g} times each class's log odds in training"
    said = f"{calibration['kind']} per class, fitted out of fold"
    left = classes - calibration["fitted"]
    return said + (f"; {left} of {classes} classes could not be fitted and are not calibrated" if left else "")


def logit(p: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p)) with p kept EDGE away from 0 and 1."""
    p = np.clip(p, EDGE, 1 - EDGE)
    return np.asarray(np.log(p / (1 - p)))


def _platt(labels: np.ndarray, probs: np.ndarray) -> tuple[float, float] | None:
    """Fit (a, b) by logistic regression on the logit, each sample counted as both outcomes with Platt's weights;
    return None where a would not be positive."""
    from sklearn.linear_model import LogisticRegression

    positives, negatives = int((labels == 1).sum()), int((labels == 0).sum())
    target = np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    x = logit(probs)[:, None]
    model = LogisticRegression(C=np.inf, solver="lbfgs", max_iter=1000)
    outcome = np.repeat([1, 0], len(x))
    model.fit(np.concatenate([x, x]), outcome, sample_weight=np.concatenate([target, 1 - target]))
    a, b = float(model.coef_[0, 0]), float(model.intercept_[0])
    return (a, b) if a > 0 else None


def _isotonic(labels: np.ndarray, probs: np.ndarray) -> tuple[list[float], list[float]]:
    """Fit knots x and values y, both rising; constant beyond the ends. Knots are float32, as in the ONNX graph."""
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression(y_min=0, y_max=1).fit_transform(probs, labels == 1)
    values, block = np.unique(fitted, return_inverse=True)
    centres = (np.bincount(block, probs) / np.bincount(block)).astype(np.float32)
    kept = np.concatenate([[True], np.diff(centres) > 0])
    return [float(x) for x in centres[kept]], [float(y) for y in values[kept]]


@dataclass(frozen=True)
class Recalibration:
    """How logistic regression would correct probabilities, (C,) each: log odds of truth = intercept + slope logit(p).

    A slope below 1 says that probabilities are too extreme. `in_the_large` is the intercept where the slope is held at
    1: below 0 they are too high on the whole. `errors` (C, 3) are the standard errors of slope, intercept and
    `in_the_large`. NaN where a class lacks a positive or a negative, or where these do not overlap.
    """

    slope: np.ndarray
    intercept: np.ndarray
    in_the_large: np.ndarray
    errors: np.ndarray


def recalibrate(labels: np.ndarray, probs: np.ndarray, groups: np.ndarray) -> Recalibration:
    """Fit slope and intercept of each class by maximum likelihood; labels and probs (N, C), group numbers (N,).

    The errors count groups, not images. Raises InputError as `figures.headline` does. Source: Cox 1958; Van Calster et
    al. 2019, Calibration: the Achilles heel of predictive analytics; errors as in Liang and Zeger 1986.
    """
    labels, probs = checked(labels, probs, probabilities=True)
    out = np.full((labels.shape[1], 6), np.nan)
    for c in range(labels.shape[1]):
        known = labels[:, c] >= 0
        y, x, of = labels[known, c].astype(np.float64), logit(probs[known, c].astype(np.float64)), groups[known]
        if 0 < y.sum() < len(y):
            (out[c, 2],), (out[c, 5],) = _newton(y, np.ones((len(y), 1)), x, of)
            # Where one threshold divides positives from negatives, no slope is steep enough.
            if x[y == 1].min() < x[y == 0].max() and x[y == 0].min() < x[y == 1].max():
                design = np.stack([x, np.ones(len(y))], axis=1)
                out[c, :2], out[c, 3:5] = _newton(y, design, np.zeros(len(y)), of)
    return Recalibration(out[:, 0], out[:, 1], out[:, 2], out[:, 3:])


def _newton(y: np.ndarray, x: np.ndarray, offset: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (k,) of a logistic regression of y (n,) on x (n, k) and their errors over groups; NaN where Newton
    does not arrive."""
    weights, lacking = np.zeros(x.shape[1]), np.full(x.shape[1], np.nan)

    def loss(at: np.ndarray) -> float:
        scores = x @ at + offset
        return float((np.logaddexp(0, scores) - y * scores).sum())

    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(x @ weights + offset, -700, 700)))
        bend = (x * (p * (1 - p))[:, None]).T @ x
        if not np.linalg.cond(bend) < 1e14:
            return lacking, lacking
        step, size = np.linalg.solve(bend, x.T @ (y - p)), 1.0
        while loss(weights + size * step) > loss(weights) + 1e-12 and size > 1e-8:
            size /= 2
        weights = weights + size * step
        if np.abs(size * step).max() < 1e-10 * (1 + np.abs(weights).max()):
            break
    else:
        return lacking, lacking
    by_group = np.stack([np.bincount(groups, (y - p) * column) for column in x.T])
    count, inverse = len(np.unique(groups)), np.linalg.inv(bend)
    spread = inverse @ (by_group @ by_group.T) @ inverse * count / max(count - 1, 1)
    return weights, np.sqrt(np.diag(spread))


def isotonic_pieces(
    xs: Sequence[Sequence[float]], ys: Sequence[Sequence[float]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return start, end and slope (C, pieces) of the pieces between the knots of C classes, for a graph.

    Classes have different numbers of pieces; the rest are empty (start = end, slope 0).
    """
    pieces = max(max(map(len, xs)) - 1, 1)
    start, end, slope = (np.zeros((len(xs), pieces)) for _ in range(3))
    for c, (x, y) in enumerate(zip(xs, ys, strict=True)):
        n = len(x) - 1
        start[c, :n], end[c, :n] = x[:-1], x[1:]
        slope[c, :n] = np.diff(y) / np.diff(x)
    return start, end, slope
