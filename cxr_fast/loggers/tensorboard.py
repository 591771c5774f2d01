"""Epochs as TensorBoard event files: a folder per fold, so that the curves of folds lie over each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .base import EpochValues, SweepFacts, epoch_figures, run_figures


class TensorBoardLogger:
    """Event files below `where` (default: `tensorboard`), in NAME/SERIES; pictures and settings in NAME."""

    def __init__(self, facts: SweepFacts, where: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.facts, self.folder = facts, Path(where or "tensorboard") / facts.out.name
        self.open = SummaryWriter
        self.writers: dict[str, Any] = {}
        rows = "\n".join(f"| {name} | {value} |" for name, value in facts.settings.items())
        self._writer("").add_text("settings", f"| setting | value |\n|---|---|\n{rows}")

    def _writer(self, series: str) -> Any:
        if series not in self.writers:
            self.writers[series] = self.open(str(self.folder / series))
        return self.writers[series]

    def log_epoch(self, config: int, fold: int, epoch: EpochValues) -> None:
        """Write the figures of an epoch."""
        writer = self._writer(self.facts.series(config, fold))
        for name, value in epoch_figures(epoch).items():
            writer.add_scalar(name, value, epoch.epoch)
        writer.flush()

    def log_run(self, run: Mapping[str, Any], folder: Path) -> None:
        """Write the figures of the run and the report's pictures."""
        import numpy as np
        from PIL import Image

        writer = self._writer("")
        for name, value in run_figures(run).items():
            writer.add_scalar(name, value, run["chosen"]["epochs"])
        for path in sorted(folder.glob("*.png")):
            with Image.open(path) as picture:
                writer.add_image(path.stem, np.asarray(picture.convert("RGB")), dataformats="HWC")

    def close(self) -> None:
        """Close the event files."""
        for writer in self.writers.values():
            writer.close()
