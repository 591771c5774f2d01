"""Epochs as metrics of one MLflow run, which a sweep that goes on finds again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .base import EpochValues, SweepFacts, epoch_figures, run_figures, shared_files

TAG = "cxrfast.out"
EXPERIMENT = "cxr-fast"


class MLflowLogger:
    """A run of the experiment `cxr-fast` at the address `where` (default: `sqlite:///mlflow.db`, a local file).

    A local store gets the whole run folder at the end, a server what may be shared of it.
    """

    def __init__(self, facts: SweepFacts, where: str) -> None:
        from mlflow.tracking import MlflowClient

        self.facts, self.address = facts, where or "sqlite:///mlflow.db"
        self.client = MlflowClient(tracking_uri=self.address)
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        number = experiment.experiment_id if experiment else self.client.create_experiment(EXPERIMENT)
        self.run = self._unfinished(number)
        if self.run is None:
            tags = {TAG: str(facts.out.absolute())}
            self.run = self.client.create_run(number, run_name=facts.out.name, tags=tags)
            for name, value in facts.settings.items():
                self.client.log_param(self.run.info.run_id, name, value)
        self.done = False

    def _unfinished(self, experiment: str) -> Any:
        """The run that an earlier, stopped process began for the same folder; None where there is none."""
        path = str(self.facts.out.absolute()).replace("'", "")
        found = self.client.search_runs([experiment], f"tags.`{TAG}` = '{path}'", max_results=1)
        unfinished = found and found[0].info.status != "FINISHED"
        if unfinished:
            self.client.update_run(found[0].info.run_id, status="RUNNING")
        return found[0] if unfinished else None

    def log_epoch(self, config: int, fold: int, epoch: EpochValues) -> None:
        """Log the figures of an epoch at the step of its number."""
        series = self.facts.series(config, fold)
        for name, value in epoch_figures(epoch).items():
            self.client.log_metric(self.run.info.run_id, f"{series}.{name}", value, step=epoch.epoch)

    def log_run(self, run: Mapping[str, Any], folder: Path) -> None:
        """Log the figures of the run and its files."""
        number = self.run.info.run_id
        for name, value in run_figures(run).items():
            self.client.log_metric(number, name, value)
        if self.address.startswith(("http:", "https:", "databricks")):
            for path in shared_files(folder):
                self.client.log_artifact(number, str(path))
        else:
            self.client.log_artifacts(number, str(folder))
        self.done = True

    def close(self) -> None:
        """Mark the run as finished, or as killed where the sweep was stopped."""
        self.client.set_terminated(self.run.info.run_id, status="FINISHED" if self.done else "KILLED")
