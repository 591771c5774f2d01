"""What a logger is, and the guard under which one that fails never stops a sweep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

# What names no patient, image or path: docs/reference/run_folder.md, "Which files may be shared".
SHARED = (
    "report.html",
    "MODEL_CARD.md",
    "evaluation.json",
    "figures.csv",
    "per_class.csv",
    "confusion.csv",
    *("folds.csv", "history.csv", "grid.csv", "*.png"),
)
FIGURES = ("macro_auc", "map", "macro_f1", "label_accuracy")


class EpochValues(Protocol):
    """What `training.folds.fold.Epoch` holds."""

    epoch: int
    train_loss: float
    valid_loss: float
    valid_auc: float
    lr: float
    seconds: float


class RunLogger(Protocol):
    """Gets every epoch of a sweep, and its figures at the end; one of your own needs these three methods.

    `config` and `fold` count from 0; `fold` is the number of folds for a refit and beyond it for retrained heads.
    """

    def log_epoch(self, config: int, fold: int, epoch: EpochValues) -> None:
        """Take one trained epoch."""
        ...

    def log_run(self, run: Mapping[str, Any], folder: Path) -> None:
        """Take the finished run: `run.json` as a dict, and its folder with the report."""
        ...

    def close(self) -> None:
        """Write what is left; called once, also where the sweep was stopped."""
        ...


@dataclass(frozen=True, kw_only=True)
class SweepFacts:
    """What a logger knows of a sweep before it begins: its folder, number of folds and configurations, settings."""

    out: Path
    folds: int
    configurations: int
    settings: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    def series(self, config: int, fold: int) -> str:
        """Name what an epoch is of: `fold1`, `refit`, `retrained2`, behind `config1.` in a grid."""
        name = f"fold{fold + 1}" if fold < self.folds else "refit"
        name = f"retrained{fold - self.folds}" if fold > self.folds else name
        return f"config{config + 1}.{name}" if self.configurations > 1 else name


def epoch_figures(epoch: EpochValues) -> dict[str, float]:
    """The figures of an epoch that are defined."""
    values = {
        "train_loss": epoch.train_loss,
        "valid_loss": epoch.valid_loss,
        "valid_auc": epoch.valid_auc,
        "lr": epoch.lr,
        "seconds": epoch.seconds,
    }
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def run_figures(run: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a finished run that are defined: `holdout.macro_auc`, `out_of_fold.map`, `valid.mean_auc`, ..."""
    found = {
        f"{part}.{name}": (run["metrics"].get(part) or {}).get(name)
        for part in ("out_of_fold", "holdout")
        for name in FIGURES
    }
    chosen: Mapping[str, Any] = next((row for row in run["budgets"] if row["chosen"]), {})
    found |= {f"valid.{name}": chosen.get(name) for name in ("mean_auc", "std_auc")}
    found["chosen.epochs"] = run["chosen"]["epochs"]
    return {name: float(value) for name, value in found.items() if value is not None}


def shared_files(folder: Path) -> list[Path]:
    """The files of a run folder that may leave this machine, sorted."""
    found = {path for pattern in SHARED for path in folder.glob(pattern)}
    return sorted(path for path in found if path.stem != "strip_plot")  # a dot of it is a film


class Guard:
    """Loggers of which each that fails is left out from then on, after one warning; the sweep goes on."""

    def __init__(self, loggers: Sequence[tuple[str, RunLogger]], warn: Callable[[str], None]) -> None:
        self.loggers, self.warn = list(loggers), warn

    def log_epoch(self, config: int, fold: int, epoch: EpochValues) -> None:
        """Pass an epoch on."""
        self._each(lambda logger: logger.log_epoch(config, fold, epoch))

    def log_run(self, run: Mapping[str, Any], folder: Path) -> None:
        """Pass the finished run on."""
        self._each(lambda logger: logger.log_run(run, folder))

    def close(self) -> None:
        """Close every logger that is left."""
        self._each(lambda logger: logger.close())
        self.loggers.clear()

    def _each(self, call: Callable[[RunLogger], None]) -> None:
        for pair in list(self.loggers):
            name, logger = pair
            try:
                call(logger)
            except Exception as error:  # whatever a foreign library raises
                self.loggers.remove(pair)
                said = " ".join(str(error).split())[:160]
                self.warn(f"--log {name} failed and is left out from here on ({type(error).__name__}: {said})")
