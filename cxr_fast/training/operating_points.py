"""Thresholds and calibration from out-of-fold predictions, by a sweep, or later from what it saved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import parse_target
from ..errors import InputError
from ..metrics import calibration, figures
from ..metrics.rarity import class_groups, group_means
from ..metrics.thresholds import best_f1_thresholds, thresholds_for
from ..system import tables
from .predictions import Saved

Values = dict[str, Any]

MIN_POSITIVES = 10
TARGETS = "f1, sensitivity=X or specificity=X with X in (0, 1]"
CALIBRATIONS = ("none", "platt", "isotonic")
AFTER = "chosen after the sweep"
# Pooled and mean of folds agree within 0.005 where folds are alike; folds of other prevalences brought it to 0.26.
APART = 0.03


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """What is asked for after a sweep; None keeps what the sweep chose.

    `threshold_target` is f1, sensitivity=X, specificity=X or a CSV file of class,target; `calibration` none, platt or
    isotonic; `prevalence` a share, or a CSV file of class,prevalence, at which a report states PPV and NPV.

        >>> OperatingPoint(threshold_target="sensitivity=0.9").changes
        True
    """

    threshold_target: str | None = None
    calibration: str | None = None
    prevalence: str | None = None

    def __post_init__(self) -> None:
        if self.calibration not in (None, *CALIBRATIONS):
            raise InputError(f"--calibration: {self.calibration!r} is not {', '.join(CALIBRATIONS)}.")

    @property
    def changes(self) -> bool:
        """Whether it asks for other thresholds or another calibration."""
        return self.threshold_target is not None or self.calibration is not None


AS_CHOSEN = OperatingPoint()


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """Calibration and thresholds (C,) of a kind of final model; the raw out-of-fold probabilities (N, C) that they were
    found on, NaN for the hold-out; the figures; the mean over folds of the macro AUC."""

    mean_auc: float
    calibration: Values | None
    thresholds: np.ndarray
    source: str
    out_of_fold: np.ndarray
    figures: Values

    def two_means(self) -> Values:
        """Macro AUC pooled and as the mean of folds, as `run.json` has them."""
        return two_means(self.figures["macro_auc"], self.mean_auc)

    def to_record(self) -> Values:
        """As `run.json` holds it for another final model than its own."""
        return {
            "thresholds": self.thresholds.tolist(),
            "threshold_source": self.source,
            "calibration": self.calibration,
            "mean_auc": self.mean_auc,
            "out_of_fold": self.figures,
        }


# ------------------------------------------------------------------------------------------------------ targets


def read_target(text: str) -> str:
    """A target as `SweepSpec` holds it: the text itself, or of a CSV file of class,target its rows as JSON.

    Raises InputError for any other text, and for a file with a target that is none.
    """
    if Path(text).suffix == ".csv":
        rows = _read_by_class(text, "target", "--threshold-target")
        for name, target in rows.items():
            if target.startswith("{") or parse_target(target) is None:
                raise InputError(f"--threshold-target: {text}, class {name!r}: {target!r} is not {TARGETS}.")
        return json.dumps(rows, ensure_ascii=False)
    if parse_target(text) is None:
        raise InputError(f"--threshold-target: {text!r} is not {TARGETS}, and no CSV file of class,target.")
    return text


def read_prevalence(text: str, classes: Sequence[str]) -> np.ndarray:
    """The stated prevalence of each class, (C,), NaN where a CSV file of class,prevalence names none."""
    rows = {"": text}
    if Path(text).suffix == ".csv":
        rows = _read_by_class(text, "prevalence", "--prevalence")
        _require_known(rows, classes, f"--prevalence: {text}")
    shares = {}
    for name, each in rows.items():
        try:
            shares[name] = float(each)
        except ValueError:
            shares[name] = -1.0
        if not 0 < shares[name] < 1:
            where = f"{text}, class {name!r}: " if name else ""
            raise InputError(f"--prevalence: {where}{each!r} is not a share between 0 and 1, such as 0.02.")
    return np.array([shares.get(name, shares.get("", np.nan)) for name in classes])


def _read_by_class(text: str, column: str, flag: str) -> dict[str, str]:
    try:
        cells = tables.read_csv(Path(text))
        tables.need(cells, ("class", column), Path(text))
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error
    names = cells["class"]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{flag}: {text} names class {twice!r} twice.")
    return dict(zip(names, cells[column], strict=True))


def _require_known(rows: Mapping[str, Any], classes: Sequence[str], where: str) -> None:
    if unknown := [name for name in rows if name not in classes]:
        raise InputError(f"{where}: {unknown[0]!r} is not a class of this run; its classes: {', '.join(classes)}.")


def require_reachable(labels: np.ndarray, target: str, classes: Sequence[str]) -> list[tuple[str, float]]:
    """The goal of each class, as `parse_target` has it, from the labels (n, C) of the images out of fold.

    Raises InputError where a target names an unknown class, or one for which no threshold reaches it: a sensitivity
    needs a positive, a specificity a negative, F1 both. Without a name, some class must reach it.
    """
    goals = parse_target(target) or {}
    named = {name: goal for name, goal in goals.items() if name}
    _require_known(named, classes, "--threshold-target")
    each = [goals.get(name, goals[""]) for name in classes]
    lacking = [_lacking(goal, labels[:, c]) for c, (goal, _) in enumerate(each)]
    for name, (goal, value) in named.items():
        if what := lacking[list(classes).index(name)]:
            raise InputError(
                f"--threshold-target: class {name!r} has no {what} out of fold, so no threshold reaches "
                f"{_spell(goal, value)}; leave the class out."
            )
    if all(lacking):
        raise InputError(
            f"--threshold-target: no class has a {lacking[0]} out of fold: no threshold reaches {_spell(*goals[''])}."
        )
    return each


def _lacking(goal: str, labels: np.ndarray) -> str:
    """`positive` or `negative`, where a goal needs one and the labels (n,) of a class hold none."""
    needed = {"sensitivity": {"positive": 1}, "specificity": {"negative": 0}}.get(goal, {"positive": 1, "negative": 0})
    return next((word for word, label in needed.items() if not (labels == label).any()), "")


def _spell(goal: str, value: float) -> str:
    return "F1" if goal == "f1" else f"{goal} {value:g}"


def describe_target(target: str) -> str:
    """A target in words: `F1`, `sensitivity 0.9`, or `sensitivity 0.9 for Mass, Nodule; F1 for all others`."""
    goals = dict(parse_target(target) or {})
    others = _spell(*goals.pop(""))
    by_goal: dict[str, list[str]] = {}
    for name, goal in goals.items():
        if _spell(*goal) != others:
            by_goal.setdefault(_spell(*goal), []).append(name)
    if not by_goal:
        return others
    return "; ".join(
        [*(f"{goal} for {', '.join(names)}" for goal, names in by_goal.items()), f"{others} for all others"]
    )


# ----------------------------------------------------------------------------------------------------- decisions


def choose_thresholds(
    labels: np.ndarray, probs: np.ndarray, target: str, classes: Sequence[str]
) -> tuple[np.ndarray, str]:
    """Thresholds (C,) from out-of-fold predictions (n, C), 0.5 where they decide none; and a sentence about them."""
    each = require_reachable(labels, target, classes)
    found = np.full(len(each), np.nan)
    for goal in dict.fromkeys(each):
        own = [c for c, other in enumerate(each) if other == goal]
        y, p = labels[:, own], probs[:, own]
        if goal[0] == "f1":
            found[own] = best_f1_thresholds(y, p)
        else:
            found[own] = thresholds_for(y, p, "sensitivity" if goal[0] == "sensitivity" else "specificity", goal[1])
    kinds = {goal for goal, _ in each}
    alone = kinds.pop() if len(kinds) == 1 else ""
    lacking = {"sensitivity": "no positive", "specificity": "no negative"}.get(alone, "no positive or no negative")
    text = f"{describe_target(target)} on out-of-fold predictions; 0.5 where a class had {lacking}"
    return np.where(np.isnan(found), 0.5, found), text


def compute_figures(labels: np.ndarray, probabilities: np.ndarray, limits: np.ndarray, dev: np.ndarray) -> Values:
    """The published six at the thresholds, the same at 0.5, the AUC of classes with enough positives, and means over
    head, medium and tail classes, which the labels of the folds' images, `dev` (n, C), divide."""
    aucs = figures.auc(labels, probabilities)
    enough = (labels == 1).sum(axis=0) >= MIN_POSITIVES
    frequent, count = figures.macro(aucs[enough]) if enough.any() else (float("nan"), 0)
    found = figures.headline(labels, probabilities, limits)
    half = figures.headline(labels, probabilities, np.full(len(limits), 0.5))
    return {
        **found,
        "at_0.5": half,
        "frequent_auc": frequent,
        "frequent_classes": count,
        "frequent_min_positives": MIN_POSITIVES,
        "rarity": group_means(labels, probabilities, class_groups(dev)),
    }


def fold_aucs(labels: np.ndarray, fold: np.ndarray, probabilities: np.ndarray) -> list[float]:
    """Macro AUC of each fold that has images, from labels, fold numbers (N,) and probabilities (N, C) of all."""
    places = (fold == k for k in range(int(fold.max()) + 1))
    return [figures.macro(figures.auc(labels[place], probabilities[place]))[0] for place in places if place.any()]


def two_means(pooled: float, mean_of_folds: float) -> Values:
    """Macro AUC out of fold both ways, JSON-ready; `differ` where they are more than APART apart."""
    return {
        "pooled": pooled,
        "mean_of_folds": mean_of_folds,
        "differ": bool(abs(pooled - mean_of_folds) > APART),
    }


def describe_two_means(found: Mapping[str, Any]) -> str:
    """`two_means` as a sentence, with a warning where they differ."""
    values = [found[key] for key in ("pooled", "mean_of_folds")]
    pooled, mean = ("undefined" if value is None else f"{value:.3f}" for value in values)
    text = f"macro AUC out of fold: {pooled} pooled over all folds, {mean} as the mean of the folds"
    if not found["differ"]:
        return text
    return (
        f"{text}. WARNING: they differ by more than {APART:g}. The scores of the folds' models are not on one scale, "
        "or the folds differ in their classes. Thresholds are found on the pooled scores: check them on the hold-out"
    )


def mean_of_folds(labels: np.ndarray, fold: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean of the defined ones of `fold_aucs`."""
    return figures.macro(np.array(fold_aucs(labels, fold, probabilities)))[0]


def decide(
    labels: np.ndarray,
    fold: np.ndarray,
    raw: np.ndarray,
    classes: Sequence[str],
    target: str,
    fitted: Values | None,
) -> Decisions:
    """Choose thresholds on out-of-fold probabilities `raw` (N, C) behind a fitted calibration; labels and fold (N,) of
    all images, fold -1 the hold-out's."""
    dev = fold >= 0
    found = calibration.apply(fitted, raw[dev])
    limits, source = choose_thresholds(labels[dev], found, target, classes)
    return Decisions(
        mean_auc=mean_of_folds(labels, fold, raw),
        calibration=fitted,
        thresholds=limits,
        source=source,
        out_of_fold=raw,
        figures=compute_figures(labels[dev], found, limits, labels[dev]),
    )


def choose_again(saved: Saved, point: OperatingPoint) -> Values:
    """What `run.json` would hold had the sweep been asked for this operating point: thresholds and their source,
    calibration, decisions, and the figures that follow from them. InputError where the target cannot be had."""
    run, arrays = saved.run, saved.arrays
    labels, fold, classes = arrays["labels"], arrays["fold"], run["classes"]
    dev, held = fold >= 0, fold == -1
    asked = point.threshold_target
    target = read_target(run["spec"]["threshold_target"] if asked is None else asked)
    decisions = {}
    for name, raw in saved.out_of_fold().items():
        fitted = run.get("decisions", {}).get(name, run)["calibration"]
        if point.calibration is not None:
            fitted = calibration.fit(labels[dev], raw[dev], point.calibration)
        decisions[name] = decide(labels, fold, raw, classes, target, fitted)

    def of(kind: str) -> Decisions:
        return decisions["retrained" if kind == "retrained" else "folds"]

    def on_holdout(kind: str) -> np.ndarray:
        return calibration.apply(of(kind).calibration, arrays[f"holdout_{kind.replace('-', '_')}"])

    kind = run["final"]["kind"]
    scored = {
        each: compute_figures(labels[held], on_holdout(each), of(each).thresholds, labels[dev])
        for each in run["finals"] or {}
    }
    rows = figures.per_class(labels[held], on_holdout(kind), of(kind).thresholds, classes) if scored else []
    out = {
        name: {**each.to_record(), "threshold_source": f"{each.source}; {AFTER}"} for name, each in decisions.items()
    }
    return {
        "thresholds": of(kind).thresholds.tolist(),
        "threshold_source": f"{of(kind).source}; {AFTER}",
        "calibration": of(kind).calibration,
        "decisions": out,
        "finals": scored,
        "metrics": {"out_of_fold": of(kind).figures, "holdout": scored.get(kind)},
        "per_class": rows,
    }
