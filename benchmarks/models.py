"""What the drivers measure on: a full-size model from a short real run, and films at acquisition size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from cxr_fast.activations import build
from cxr_fast.activations.encoder import with_size
from cxr_fast.activations.job import CacheJob
from cxr_fast.activations.loader import Activations
from cxr_fast.bench.comparison import Arm
from cxr_fast.bench.films import copy_films
from cxr_fast.bench.training import random_labels
from cxr_fast.config import CacheSpec, SweepOptions, SweepSpec, TrainSpec
from cxr_fast.data.manifest import read_dataset
from cxr_fast.data.phantom.dataset import write_dataset
from cxr_fast.export.variants import Exported, ExportSpec, export_run
from cxr_fast.models import backbone
from cxr_fast.training.folds.fold import Fold, FoldData
from cxr_fast.training.sweep import SweepJob


def exported(folder: Path, weights: str, variants: tuple[str, ...]) -> list[Exported]:
    """Variants of a model of these weights, trained for one epoch, in `folder`/run; int8's drift is no matter here.

    One epoch on 16 phantoms says nothing, so neither do its thresholds: decisions near them flip at a touch.
    """
    write_dataset(folder / "data", studies=8, size=128, seed=0)
    tower, manifest = backbone.load(weights), read_dataset(folder / "data")
    spec = with_size(CacheSpec(weights=weights), tower)
    build.run(CacheJob(manifest=manifest, backbone=tower, spec=spec, out=folder / "c.h5", device="cpu"))
    short = SweepSpec(epochs=(1,), folds=2, holdout=0.0, train=TrainSpec(lr=1e-4, precision="float32"))
    SweepJob(folder / "c.h5", folder / "run", short, SweepOptions(device="cpu")).run()
    return export_run(folder / "run", ExportSpec(variants=variants, allow_drift=True, count=8))


def fold(tower: backbone.Backbone, spec: TrainSpec) -> Fold:
    """A fold that trains the last two blocks on 64 random images, plain view, on the CPU."""
    tokens, width, _ = tower.shape
    array = np.random.default_rng(0).standard_normal((64, 1, tokens, width), np.float32).astype(np.float16)
    rows, activations = np.arange(len(array)), Activations(array, torch.device("cpu"))
    data = FoldData(activations=activations, labels=random_labels(len(array)), train_rows=rows, valid_rows=rows)
    return Fold(tower.visual, data, spec, unfreeze_blocks=2, seed=0)


def arm(run: Path, form: str) -> Arm:
    """A form of the model of a run for a process of its own: torch, or a variant of its ONNX file."""
    path = run if form == "torch" else run / f"model.{form}.onnx"
    return Arm(path=path, torch=form == "torch", device="cpu")


def films(folder: Path, images: Path | None, count: int) -> list[str]:
    """`count` full-size files: copies of those in `images` in turn, or of phantoms at acquisition size."""
    (folder / "films").mkdir()
    manifest = copy_films(folder / "films", images, count)
    return [str(manifest.path(row)) for row in range(len(manifest))]
