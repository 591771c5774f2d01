"""Run folders written by hand: run.json and predictions.npz without a model, in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cxr_fast.training.run_folder import KIND, SCHEMA

FOLDS, BUDGETS = 3, (4, 8)


def arrays(
    images: int = 120, classes: int = 4, *, seed: int = 0, skill: float = 1.5, views: int = 2, holdout: bool = True
) -> dict[str, np.ndarray]:
    """Predictions of `skill` standard deviations between positives and negatives; `views` images a study and group."""
    random = np.random.default_rng(seed)
    group = np.arange(images) // views
    fold = random.permutation(np.arange(group[-1] + 1) % (FOLDS + holdout))[group] - holdout
    shares = np.linspace(0.3, 0.5, classes)
    labels = (random.random((group[-1] + 1, classes)) < shares).astype(np.int8)[group]
    labels[random.random(labels.shape) < 0.05] = -1

    def scores() -> np.ndarray:
        return (1 / (1 + np.exp(-random.normal((labels == 1) * skill - 1, 1)))).astype(np.float32)

    out_of_fold = np.stack([scores() for _ in BUDGETS])
    out_of_fold[:, fold < 0] = np.nan
    return {
        "labels": labels,
        "fold": fold,
        "out_of_fold": out_of_fold,
        "final": scores(),
        "image": np.array([f"{i}.png" for i in range(images)]),
        "sha256": np.array([f"{i:064x}" for i in range(images)]),
        "group": np.array([f"p{g}" for g in group]),
        "study": np.array([f"s{g}" for g in group]),
        "view": np.array(["Frontal", "Lateral"])[np.arange(images) % 2],
    }


def description(count: int, **changes: Any) -> dict[str, Any]:
    """The parts of run.json that the saved predictions are read with."""
    run = {
        "kind": KIND,
        "schema": SCHEMA,
        "written_by": "cxr-fast test",
        "provenance": "",
        "classes": [f"class {c}" for c in range(count)],
        "thresholds": np.linspace(0.3, 0.6, count).tolist(),
        "calibration": None,
        "spec": {"split_by": "group"},
        "budgets": [{"epochs": b, "chosen": b == BUDGETS[1]} for b in BUDGETS],
        "chosen": {"epochs": BUDGETS[1], "fold": 1},
        "final": {"kind": "best-fold", "members": ["fold1"]},
    }
    return run | changes


def write(folder: Path, found: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
    """A run folder of these arrays; `changes` to run.json."""
    found = arrays() if found is None else found
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "predictions.npz", **found)  # type: ignore[arg-type]
    run = description(found["labels"].shape[1], **changes)
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return folder
