"""One row of the list of runs: what a run folder, or an unfinished run, says of itself."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..config import PARTIAL, CacheSpec, SweepSpec, from_dict, to_dict
from ..errors import CxrFastError
from ..recipes import RECIPES, sweep_spec
from ..system.locks import holder
from ..training.run_folder import read_info
from .note import read_note
from .progress import Progress, read_progress
from .request import read_points

# Columns of their own, or not a choice of the user.
SHOWN = frozenset({"weights", "folds", "train", "preprocess"})
DONE, STOPPED, RUNNING, UNREADABLE = "done", "stopped", "running", "unreadable"


class RunEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A run. Figures are macro AUC (`valid_auc` the mean over folds, `valid_std` their spread) and mean average
    precision; None where they are not defined or not known yet. `size` is in bytes, `seconds` the time of the sweep.

    `state` is `done`, `running`, `stopped` or `unreadable`, `done` the share that is trained (1 for a finished run).
    `settings` names what differs from the defaults, `problem` why a folder cannot be read.
    """

    name: str
    path: str
    state: str
    done: float
    created: str
    data: str = ""
    encoder: str = ""
    random: bool = False
    settings: str = ""
    folds: int | None = None
    epochs: int | None = None
    valid_auc: float | None = None
    valid_std: float | None = None
    holdout_auc: float | None = None
    holdout_map: float | None = None
    files: tuple[str, ...] = ()
    size: int = 0
    seconds: float | None = None
    note: str = ""
    problem: str = ""


def read_entry(folder: Path) -> RunEntry:
    """Read the row of a run folder, or of `NAME.partial`, an unfinished run; one that cannot be read says why."""
    partial = folder.name.endswith(PARTIAL)
    common: dict[str, Any] = {
        "name": folder.name.removesuffix(PARTIAL),
        "path": str(folder),
        "size": folder_size(folder),
        "note": read_note(folder),
        "created": _time(folder),
    }
    try:
        found = _unfinished(folder) if partial else _finished(folder)
    except CxrFastError as error:
        found = {"problem": str(error)}
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        found = {"problem": f"{folder}: a field is missing or of another kind ({type(error).__name__}: {error})."}
    state = {"state": UNREADABLE, "done": 0.0} if "problem" in found else {}
    return RunEntry(**{**common, **state, **found})


def _finished(folder: Path) -> dict[str, Any]:
    run = read_info(folder)
    spec, chosen = from_dict(SweepSpec, run["spec"]), run["chosen"]["epochs"]
    budget: dict[str, Any] = next((row for row in run["budgets"] if row["epochs"] == chosen), {})
    held = run["metrics"].get("holdout") or {}
    return {
        "state": DONE,
        "done": 1.0,
        "created": run["created"],
        "data": run["cache"]["dataset"]["name"],
        "encoder": encoder_name(run["cache"]["weights"]),
        "random": bool(run["random_weights"]),
        "settings": _join(describe_settings(spec, run["cache"]["spec"]), _describe_grid(run)),
        "folds": spec.folds,
        "epochs": chosen,
        "valid_auc": budget.get("mean_auc"),
        "valid_std": budget.get("std_auc"),
        "holdout_auc": held.get("macro_auc"),
        "holdout_map": held.get("map"),
        "files": tuple(path.name.split(".")[-2] for path in sorted(folder.glob("model.*.onnx"))),
        "seconds": run.get("seconds"),
    }


def _unfinished(folder: Path) -> dict[str, Any]:
    progress: Progress = read_progress(folder)
    running = holder(folder.with_name(folder.name.removesuffix(PARTIAL)))
    return {
        "state": RUNNING if running else STOPPED,
        "done": progress.share,
        "data": progress.data,
        "encoder": encoder_name(progress.weights),
        "settings": _join(describe_settings(progress.spec, {}), _count(progress.configurations)),
        "folds": progress.spec.folds,
    }


def _describe_grid(run: Mapping[str, Any]) -> str:
    """Name what the chosen configuration of a grid changed; empty for a run of one."""
    points = read_points(run["grid"])
    place = sorted(row["config"] for row in run["grid"]).index(run["config"])
    changes = ", ".join(f"{name} {_short(value)}" for name, value in points[place].items())
    return f"best of {_count(len(points))}: {changes}" if len(points) > 1 else ""


def _count(configurations: int) -> str:
    return f"{configurations:,} configurations" if configurations > 1 else ""


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def encoder_name(weights: str) -> str:
    """Name the weights in a few letters: the end of a hub id or folder."""
    return weights if weights.startswith("random:") else weights.rstrip("/").rpartition("/")[2]


def describe_settings(spec: SweepSpec, cache: Mapping[str, Any]) -> str:
    """Name the fields in which a sweep and its cache differ from the recipe that is nearest, and that recipe.

    >>> describe_settings(SweepSpec(seed=3), {})
    'seed 3'
    """
    nearest = min(RECIPES, key=lambda name: len(_differences(spec, sweep_spec(name))))
    parts = [] if nearest == "default" else [nearest]
    parts += [f"{name} {shown}" for name, shown in _differences(spec, sweep_spec(nearest)).items()]
    usual = to_dict(CacheSpec())
    given = {name: value for name, value in cache.items() if name in usual and name not in SHOWN}
    parts += [f"cache {name} {_short(value)}" for name, value in given.items() if value != usual[name]]
    return ", ".join(parts)


def _differences(spec: SweepSpec, other: SweepSpec) -> dict[str, str]:
    one, two = (to_dict(each) | to_dict(each.train) for each in (spec, other))
    return {name: _short(one[name]) for name in one if name not in SHOWN and one[name] != two[name]}


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    text = str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def folder_size(folder: Path) -> int:
    """Add up the bytes of all files in a folder; a file that vanishes meanwhile counts nothing."""
    size = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.lstat(os.path.join(path, name)).st_size
            except OSError:
                continue
    return size


def _time(folder: Path) -> str:
    """When a folder was last written, as run.json writes times."""
    try:
        seconds = max(folder.stat().st_mtime, *(path.stat().st_mtime for path in folder.glob("states")), 0.0)
    except OSError:
        seconds = 0.0
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
