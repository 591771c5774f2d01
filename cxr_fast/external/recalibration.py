"""Thresholds and calibration found on labelled films, and what they are worth on films that had no part in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import parse_target
from ..data.splits.assign import SplitSpec, split
from ..errors import InputError
from ..metrics import calibration
from ..metrics.intervals import FEW
from ..system.text import counted
from ..training.operating_points import MIN_POSITIVES, choose_thresholds, describe_target, read_target

FOLDS = 5
NEEDED = f"{MIN_POSITIVES} positives and {MIN_POSITIVES} negatives, each in {FEW} groups or more"
KEEP = "none"


@dataclass(frozen=True, kw_only=True)
class PointSpec:
    """What is asked for: a threshold target as a sweep takes it, and a calibration (`platt`, `isotonic`, `none` keeps
    the file's, None takes the kind that the file has, else platt)."""

    target: str = "f1"
    calibration: str | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class OldPoint:
    """What a model file does today, of all its C classes: names, thresholds (C,), calibration."""

    classes: tuple[str, ...]
    limits: np.ndarray
    calibration: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class NewPoint:
    """Thresholds (C,) and calibration of all classes of the file, found on all films.

    `fitted` are the classes that were found anew, `refused` why each other class keeps what it had. `probs` and
    `limits` (n, C) are of the films, each found on the films of other groups: out of sample; `groups` (n,) whose they
    are.
    """

    thresholds: np.ndarray
    calibration: dict[str, Any] | None
    fitted: tuple[str, ...]
    refused: dict[str, str]
    target: str
    kind: str
    folds: int
    probs: np.ndarray
    limits: np.ndarray
    groups: np.ndarray


def require_library(spec: PointSpec) -> None:
    """Raise ModuleNotFoundError where a calibration is to be fitted and scikit-learn is not installed."""
    if spec.calibration != KEEP:
        import sklearn  # noqa: F401


def check_target(spec: PointSpec, classes: Sequence[str]) -> str:
    """The threshold target as a sweep holds it. Raises InputError where it is none, or names an unknown class."""
    target = read_target(spec.target)
    for name in parse_target(target) or {}:
        if name and name not in classes:
            raise InputError(
                f"--threshold-target: {name!r} is not a class of this model; its classes: {', '.join(classes)}."
            )
    return target


def refuse_classes(labels: np.ndarray, groups: np.ndarray, names: Sequence[str]) -> dict[str, str]:
    """Why each class with too few positives or negatives cannot be set here; labels (n, C), groups (n,).

    MIN_POSITIVES of either in FEW groups are needed: a calibration of fewer follows chance.
    """
    out = {}
    for c, name in enumerate(names):
        for sign, word in ((1, "positive"), (0, "negative")):
            rows = labels[:, c] == sign
            films, of = int(rows.sum()), len(set(groups[rows].tolist()))
            if name not in out and (films < MIN_POSITIVES or of < FEW):
                out[name] = f"{counted(films, word)} in {counted(of, 'group')}"
    return out


def refuse_all(refused: dict[str, str], count: int) -> None:
    """Raise InputError where no class can be set."""
    if len(refused) == count:
        first = [f"{name} has {why}" for name, why in list(refused.items())[:3]]
        said = ", ".join(first)
        raise InputError(f"--recalibrate: no class has {NEEDED} ({said}); give more labelled films.")


def find_point(labels: np.ndarray, raw: np.ndarray, groups: np.ndarray, old: OldPoint, spec: PointSpec) -> NewPoint:
    """Find thresholds and calibration on films, and score each film by those found on the films of other groups.

    labels (n, C) with -1 for unknown (also all of a class that the films do not have), raw (n, C) probabilities before
    any calibration, groups (n,). Raises InputError where no class has enough positives and negatives, where fewer than
    two groups are left, or where a class that keeps its calibration has one of another kind.
    """
    target = check_target(spec, old.classes)
    absent = {name: "not in this data" for c, name in enumerate(old.classes) if (labels[:, c] < 0).all()}
    present = [name for name in old.classes if name not in absent]
    places = [old.classes.index(name) for name in present]
    refused = refuse_classes(labels[:, places], groups, present)
    refuse_all(refused, len(present))
    folds = min(FOLDS, len(set(groups.tolist())))
    part = split(labels[:, places], groups.tolist(), SplitSpec(folds=folds, holdout=0.0, seed=spec.seed))
    for name in present:
        y = labels[:, old.classes.index(name)]
        if name not in refused and not all((y[part != k] == sign).any() for k in range(folds) for sign in (0, 1)):
            refused[name] = "all of its positives, or negatives, are of one fold of groups"
    refuse_all(refused, len(present))
    kept = np.array([old.classes.index(name) for name in present if name not in refused])
    kind = _kind(old, spec, keeps=len(kept) < len(old.classes))
    probs, limits = calibration.apply(old.calibration, raw).astype(np.float32), np.tile(old.limits, (len(raw), 1))
    for k in range(folds):
        others, own = part != k, part == k
        fitted, found = _fit(labels[others], raw[others], old, (kept, kind, target))
        probs[own] = calibration.apply(fitted, raw[own])
        limits[own] = found
    fitted, found = _fit(labels, raw, old, (kept, kind, target))
    return NewPoint(
        thresholds=found,
        calibration=fitted,
        fitted=tuple(old.classes[c] for c in kept),
        refused=absent | refused,
        target=describe_target(target),
        kind=kind,
        folds=folds,
        probs=probs,
        limits=limits,
        groups=groups,
    )


def _kind(old: OldPoint, spec: PointSpec, *, keeps: bool) -> str:
    """The kind of calibration to fit; `keeps` says that some classes keep the map they have."""
    own = old.calibration["kind"] if old.calibration else None
    kind = spec.calibration or own or "platt"
    if own and keeps and kind not in (own, KEEP):  # one graph holds one kind
        raise InputError(
            f"--calibration {kind}: this file is calibrated by {own}, and classes that cannot be set here keep that; "
            f"pass --calibration {own}, or none to keep all of it."
        )
    return kind


def _fit(
    labels: np.ndarray, raw: np.ndarray, old: OldPoint, asked: tuple[np.ndarray, str, str]
) -> tuple[dict[str, Any] | None, np.ndarray]:
    """Calibration of all classes and thresholds (C,), those of the classes `kept` found on these films."""
    kept, kind, target = asked
    fitted = old.calibration
    if kind != KEEP:
        new = calibration.fit(labels[:, kept], raw[:, kept], kind)
        assert new is not None
        fitted = _merge(old.calibration, new, kept, len(old.classes))
    probs = calibration.apply(fitted, raw)[:, kept]
    names = [old.classes[c] for c in kept]
    limits = np.array(old.limits, float)
    limits[kept] = choose_thresholds(labels[:, kept], probs, _for_classes(target, names), names)[0]
    return fitted, limits


def _for_classes(target: str, names: Sequence[str]) -> str:
    """The target without the classes that keep their thresholds."""
    if not target.startswith("{"):
        return target
    return json.dumps({name: each for name, each in json.loads(target).items() if name in names})


def _merge(old: dict[str, Any] | None, new: dict[str, Any], kept: np.ndarray, count: int) -> dict[str, Any]:
    """The new maps of the classes `kept`, and for all others the old ones, or none."""
    keys = ("a", "b") if new["kind"] == "platt" else ("x", "y")
    identity: tuple[Any, Any] = (1.0, 0.0) if new["kind"] == "platt" else ([0.0, 1.0], [0.0, 1.0])
    same = old is not None and old["kind"] == new["kind"]
    maps = [list(old[key]) if old and same else [plain] * count for key, plain in zip(keys, identity, strict=True)]
    for key, values in zip(keys, maps, strict=True):
        for place, value in zip(kept.tolist(), new[key], strict=True):
            values[place] = value
    fitted = sum(pair != identity for pair in zip(*maps, strict=True))
    return {"kind": new["kind"], "fitted": fitted, **dict(zip(keys, maps, strict=True))}
