"""How far an unfinished sweep is, from its folder `NAME.partial` alone."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..config import FORMER, SweepSpec, from_dict
from ..errors import InputError
from ..training.run_folder import ABOUT

_SNAPSHOT = re.compile(r"config(\d+)\.(.+)\.epochs(\d+)\.safetensors")
_STATE = re.compile(r"config(\d+)\.(.+)\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What an unfinished sweep will train, and how many of its epochs over folds and configurations are saved.

    `data` and `weights` are empty for one that an earlier version began.
    """

    spec: SweepSpec
    configurations: int
    epochs_done: int
    epochs_in_all: int
    data: str
    weights: str

    @property
    def share(self) -> float:
        """The share of the epochs that is saved, between 0 and 1."""
        return min(self.epochs_done / self.epochs_in_all, 1.0)


def read_progress(folder: Path) -> Progress:
    """Read `NAME.partial`. Raises InputError where it is none of ours or cannot be read.

    Budgets and states count; so does every configuration before the newest, whose files are removed once it lost. A
    refit is not counted: it begins when all epochs counted here are done.
    """
    plan_file = folder / "plan.json"
    try:
        plan = json.loads(plan_file.read_text(encoding="utf-8"))
        spec, configurations = from_dict(SweepSpec, FORMER | plan["spec"]), len(plan["grid"])
    except OSError:
        raise InputError(f"{folder}: not an unfinished run (no plan.json).") from None
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{plan_file}: cannot be read ({error}).") from error
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        about = about if isinstance(about, dict) else {}
    except (OSError, ValueError):
        about = {}
    last, folds = spec.epochs[-1], [f"fold{k}" for k in range(spec.folds)]
    saved = _epochs(folder)
    newest = max((config for config, _ in saved), default=0)
    done = newest * len(folds) * last
    done += sum(min(saved.get((newest, fold), 0), last) for fold in folds)
    return Progress(
        spec=spec,
        configurations=configurations,
        epochs_done=done,
        epochs_in_all=configurations * len(folds) * last,
        data=str(about.get("data", "")),
        weights=str(about.get("weights", "")),
    )


def _epochs(folder: Path) -> dict[tuple[int, str], int]:
    """The newest saved epoch of each (configuration, fold)."""
    found: dict[tuple[int, str], int] = {}
    for path in (folder / "snapshots").glob("*.safetensors"):
        if match := _SNAPSHOT.fullmatch(path.name):
            at = int(match[1]), match[2]
            found[at] = max(found.get(at, 0), int(match[3]))
    for path in (folder / "states").glob("*.safetensors"):
        if (match := _STATE.fullmatch(path.name)) and (epoch := _saved_epoch(path)):
            at = int(match[1]), match[2]
            found[at] = max(found.get(at, 0), epoch)
    return found


def _saved_epoch(path: Path) -> int:
    """The epoch of a fold's saved state, from the header of its file; 0 where that cannot be read."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, 1 << 26)))
        return int(json.loads(header["__metadata__"]["values"])["epoch"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
