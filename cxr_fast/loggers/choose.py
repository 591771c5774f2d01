"""Open the loggers that `--log KIND[:WHERE]` names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..config import to_dict
from ..errors import InputError
from .base import Guard, RunLogger, SweepFacts
from .mlflow import MLflowLogger
from .tensorboard import TensorBoardLogger
from .wandb import WandbLogger

if TYPE_CHECKING:
    from ..training.sweep import SweepJob

KINDS: dict[str, Callable[[SweepFacts, str], RunLogger]] = {
    "mlflow": MLflowLogger,
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
}


def parse_log(text: str) -> tuple[str, str]:
    """`mlflow:sqlite:///x.db` as ("mlflow", "sqlite:///x.db"). Raises InputError for an unknown kind.

    >>> parse_log("tensorboard")
    ('tensorboard', '')
    """
    kind, _, where = text.partition(":")
    if kind not in KINDS:
        raise InputError(f"--log: {kind!r} is not one of {', '.join(KINDS)}; write KIND or KIND:WHERE.")
    return kind, where


def open_loggers(words: Sequence[str], facts: SweepFacts, warn: Callable[[str], None]) -> Guard:
    """Open each logger; one whose server or disk refuses is left out with a warning.

    Raises InputError on a kind that is unknown or named twice, ModuleNotFoundError where its library is missing.
    """
    kinds = [parse_log(word) for word in words]
    if len({kind for kind, _ in kinds}) < len(kinds):
        raise InputError("--log: name each kind once.")
    guard = Guard((), warn)
    for kind, where in kinds:
        try:
            guard.loggers.append((kind, KINDS[kind](facts, where)))
        except ModuleNotFoundError:
            guard.close()
            raise
        except Exception as error:  # whatever a foreign library raises
            said = " ".join(str(error).split())[:160]
            warn(f"--log {kind} cannot be opened and is left out ({type(error).__name__}: {said})")
    return guard


def describe_sweep(sweep: SweepJob) -> SweepFacts:
    """Describe a sweep for loggers: every setting that is one value, the grid, the cache's fingerprint and weights."""
    given = to_dict(sweep.spec)
    values: dict[str, Any] = {**given, **given.pop("train")}
    values |= {"grid": " ".join(sweep.options.grid), "trials": sweep.options.trials}
    values |= {"data": sweep.data.file.meta["dataset"]["name"]}
    values |= {"cache": sweep.data.file.meta["fingerprint"][:16], "weights": sweep.data.file.meta["weights"]}
    settings = {name: ",".join(map(str, v)) if isinstance(v, list) else v for name, v in values.items()}
    return SweepFacts(
        out=sweep.out,
        folds=sweep.spec.folds,
        configurations=len(sweep.points),
        settings={name: value for name, value in settings.items() if value not in (None, "")},
    )
