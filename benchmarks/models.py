"""A full-size model to time: a real run on a few phantoms with random weights, exported as every model is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cxr_fast.activations import encoder
from cxr_fast.config import CacheSpec, SweepSpec, TrainSpec
from cxr_fast.data import manifest as datasets
from cxr_fast.data.phantom.dataset import write_dataset
from cxr_fast.export.variants import Exported, export
from cxr_fast.models import backbone
from cxr_fast.training.sweep import Sweep


def exported(folder: Path, weights: str, variants: tuple[str, ...]) -> list[Exported]:
    """Variants of a model of these weights, trained for one epoch, in `folder`; int8's drift is no matter here.

    One epoch on 16 phantoms says nothing, so neither do its thresholds: decisions near them flip at a touch.
    """
    write_dataset(folder / "data", studies=8, size=128, seed=0)
    tower, manifest = backbone.load(weights), datasets.read(folder / "data")
    spec = encoder.with_size(CacheSpec(weights=weights), tower)
    encoder.run(tower, manifest, spec, folder / "c.h5", device="cpu")
    short = SweepSpec(epochs=(1,), folds=2, holdout=0.0, train=TrainSpec(lr=1e-4, precision="float32"))
    Sweep(folder / "c.h5", folder / "run", short, device="cpu").run()
    return export(folder / "run", variants=variants, allow_drift=True, count=8)


def torch_road(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The same model as eager torch: open_clip's tower and the head, uint8 pixels (N, S, S) to probabilities."""
    from cxr_fast.activations.encoder import normalise
    from cxr_fast.training.run_folder import read_run

    run = read_run(folder / "run")
    mean, std = (torch.tensor(run.info[k]).reshape(1, 3, 1, 1) for k in ("mean", "std"))
    return lambda pixels: run.raw_probabilities(normalise(torch.from_numpy(pixels), mean, std))


def films(folder: Path, images: Path | None, count: int) -> list[str]:
    """`count` full-size files: copies of those in `images` in turn, or of phantoms at acquisition size."""
    from cxr_fast.bench.latency import films as drawn
    from cxr_fast.data.paths import expand

    sources = expand([str(images)]) if images else drawn(folder)
    out = folder / "films"
    out.mkdir()
    paths = []
    for i in range(count):
        source = Path(sources[i % len(sources)])
        paths.append(str(shutil.copy(source, out / f"{i}{source.suffix}")))
    return paths
