"""A toy run whose distance is fitted to noise: the toys have too few films for one of their own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from cxr_fast.export import parity
from cxr_fast.training.run_folder import Run, read_run
from cxr_fast.unlikeness.distance import Distance, fit_distance, quantiles, save_distance
from cxr_fast.unlikeness.features import find_source
from cxr_fast.unlikeness.record import RunUnlikeness
from cxr_fast.unlikeness.reference import watch_features

SIZE = 160


def noise(count: int, seed: int = 0) -> np.ndarray:
    """Pixels (N, S, S)."""
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE), dtype=np.uint8)


def with_distance(run: Run, unfreeze_blocks: int, films: np.ndarray | None = None) -> Run:
    """The run with a distance fitted to films (N, S, S), noise by default, as if its cache had been cut there."""
    films = noise(110, 5) if films is None else films
    source = find_source(run.visual, unfreeze_blocks)
    kept = RunUnlikeness(distance=Distance(mean=np.zeros(1), whitening=np.zeros((1, 1))), source=source, record={})
    with watch_features(kept, run.visual) as seen:
        parity.torch_probabilities(run, films)
    fitted = fit_distance(np.concatenate(seen), [f"p{i}" for i in range(len(films))])
    counts = {"films": len(films), "groups": len(films)}
    record = {"features": source.text, **counts, "quantiles": quantiles(fitted.out_of_fold)}
    return replace(run, unlikeness=replace(kept, distance=fitted.distance, record=record))


def write_run(run: Path, out: Path, films: np.ndarray) -> Path:
    """A copy of a run folder whose distance is fitted to films (N, S, S)."""
    shutil.copytree(run, out)
    info = json.loads((out / "run.json").read_text())
    found = with_distance(read_run(run), int(info["cache"]["spec"]["unfreeze_blocks"]), films).unlikeness
    assert found is not None
    info["unlikeness"] = found.record | {"sha256": save_distance(out, found.distance)}
    (out / "run.json").write_text(json.dumps(info))
    return out
