"""Epochs as a Weights & Biases run, offline unless WANDB_MODE says otherwise."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .base import EpochValues, SweepFacts, epoch_figures, run_figures, shared_files


class WandbLogger:
    """A run of the project `where` (default: `cxr-fast`). Of the run folder it gets what may be shared.

    The name of the run follows from its folder, so that a sweep that goes on continues it.
    """

    def __init__(self, facts: SweepFacts, where: str) -> None:
        import wandb

        self.facts, self.wandb = facts, wandb
        self.run = wandb.init(
            project=where or "cxr-fast",
            name=facts.out.name,
            id=hashlib.sha256(str(facts.out.absolute()).encode()).hexdigest()[:16],
            resume="allow",
            config=dict(facts.settings),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(silent=True, disable_git=True, console="off"),
        )
        self.run.define_metric("*", step_metric="epoch")

    def log_epoch(self, config: int, fold: int, epoch: EpochValues) -> None:
        """Log the figures of an epoch."""
        series = self.facts.series(config, fold)
        figures = {f"{series}/{name}": value for name, value in epoch_figures(epoch).items()}
        self.run.log({"epoch": epoch.epoch, **figures})

    def log_run(self, run: Mapping[str, Any], folder: Path) -> None:
        """Log the figures of the run, and its files as an artefact."""
        self.run.summary.update(run_figures(run))
        artifact = self.wandb.Artifact(f"run-{self.run.id}", type="run")
        for path in shared_files(folder):
            artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()
