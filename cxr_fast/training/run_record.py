"""What a finished search says of itself: `run.json`, its tables and its predictions, from arrays and specs."""

from __future__ import annotations

import csv
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..config import (
    NOT_RESTORED,
    CacheSpec,
    SweepSpec,
    from_dict,
    recipe_differences,
    to_dict,
)
from ..data import splits
from ..metrics import figures as metrics
from ..metrics.thresholds import best_f1_thresholds, thresholds_for
from ..system import hardware
from .dataset import Data
from .run_folder import KIND, SCHEMA
from .search import Trained

MIN_POSITIVES = 10


def provenance(meta: Mapping[str, Any]) -> str:
    """What must be said beside every figure: `random backbone, phantom images`; empty for real ones."""
    parts = []
    if meta["random_weights"]:
        parts.append("random backbone")
    if meta["dataset"].get("synthetic"):
        parts.append(f"{meta['dataset']['name']} images")
    return ", ".join(parts)


def origin(data: Data, spec: SweepSpec, labels_from: str) -> dict[str, Any]:
    """What made the run: program, recipe, cache, backbone, data, machine."""
    header, meta = data.header, data.file.meta
    groups = [header.groups[i] for i in data.rows]
    keys = ("spec", "fingerprint", "fingerprint_parts", "weights", "tower_sha256", "dataset")
    cache = {key: meta[key] for key in keys}
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "written_by": f"cxr-fast {__version__}",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "provenance": provenance(meta),
        "random_weights": meta["random_weights"],
        "spec": to_dict(spec),
        "recipe": {
            "differences": recipe_differences(from_dict(CacheSpec, meta["spec"]), spec),
            "not_restored": list(NOT_RESTORED),
        },
        "cache": {"path": str(data.file.path), "labels_from": labels_from, **cache},
        "classes": list(header.classes),
        "backbone": meta["backbone"],
        "mean": meta["mean"],
        "std": meta["std"],
        "preprocess": meta["spec"]["preprocess"],
        "unfreeze_blocks": int(meta["spec"]["unfreeze_blocks"]),
        "images": {
            "in": len(header.images),
            "failed": int((~data.file.ok).sum()),
            "used": len(data.rows),
            "holdout": int((data.assignment == -1).sum()),
            "groups": len(set(groups)),
        },
        "split_table": splits.fold_table(data.labels, data.assignment, header.classes, groups),
        "machine": hardware.machine(),
        "toolchain": {"cxr-fast": __version__, "torch": torch.__version__, "numpy": np.__version__},
    }


def search_tables(trained: Trained, data: Data, spec: SweepSpec, budget: int, best: int) -> dict[str, Any]:
    """The fold table, the budget table and the choice, from validation scores (budgets, folds) alone."""
    epochs, scores = spec.epochs, trained.scores
    folds = [
        {
            "fold": k,
            "images": int((data.assignment == k).sum()),
            "classes_defined": int(trained.defined[budget, k]),
            "best": k == best,
            **{f"auc_{b}": scores[i, k] for i, b in enumerate(epochs)},
            **{f"stopped_{b}": int(trained.stopped_at[k, i]) for i, b in enumerate(epochs)},
        }
        for k in range(spec.folds)
    ]
    budgets = [
        {"epochs": b, "mean_auc": np.nanmean(scores[i]), "std_auc": np.nanstd(scores[i]), "chosen": i == budget}
        for i, b in enumerate(epochs)
    ]
    rule = "mean validation macro AUC, best fold"
    return {"folds": folds, "budgets": budgets, "chosen": {"epochs": epochs[budget], "fold": best, "rule": rule}}


def grid_table(configurations: Sequence[Trained], chosen: Trained, spec: SweepSpec) -> list[dict[str, Any]]:
    """One row a configuration, best first: what differs, its best budget, mean and spread over folds, seconds."""
    rows = []
    for trained in configurations:
        budget = int(np.nanargmax(np.nanmean(trained.scores, axis=1)))
        rows.append(
            {
                "config": trained.number,
                **trained.changes,
                "epochs": spec.epochs[budget],
                "mean_auc": np.nanmean(trained.scores[budget]),
                "std_auc": np.nanstd(trained.scores[budget]),
                "seconds": trained.seconds,
                "chosen": trained is chosen,
            }
        )
    return sorted(rows, key=lambda row: (-row["mean_auc"], row["config"]))


def thresholds(labels: np.ndarray, probs: np.ndarray, spec: SweepSpec) -> tuple[np.ndarray, str]:
    """A threshold a class from out-of-fold predictions (n, C), 0.5 where they decide none, and a sentence about it."""
    assert spec.threshold_goal is not None
    goal, value = spec.threshold_goal
    if goal == "f1":
        found = best_f1_thresholds(labels, probs)
        return np.where(np.isnan(found), 0.5, found), (
            "F1 on out-of-fold predictions; 0.5 where a class had no positive or no negative"
        )
    found = thresholds_for(labels, probs, "sensitivity" if goal == "sensitivity" else "specificity", value)
    lacking = "positive" if goal == "sensitivity" else "negative"
    text = f"{goal} {value:g} on out-of-fold predictions; 0.5 where a class had no {lacking}"
    return np.where(np.isnan(found), 0.5, found), text


def figures(labels: np.ndarray, probabilities: np.ndarray, limits: np.ndarray) -> dict[str, Any]:
    """The published six at the thresholds, the same at 0.5, and the AUC of classes with enough positives."""
    aucs = metrics.auc(labels, probabilities)
    enough = (labels == 1).sum(axis=0) >= MIN_POSITIVES
    frequent, count = metrics.macro(aucs[enough]) if enough.any() else (float("nan"), 0)
    found = metrics.headline(labels, probabilities, limits)
    half = metrics.headline(labels, probabilities, np.full(len(limits), 0.5))
    return {
        **found,
        "at_0.5": half,
        "frequent_auc": frequent,
        "frequent_classes": count,
        "frequent_min_positives": MIN_POSITIVES,
    }


def write(folder: Path, run: dict[str, Any], configurations: Sequence[Trained]) -> None:
    """`run.json` and its tables, into the folder."""
    (folder / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    chosen = next(trained for trained in configurations if trained.number == run["config"])
    _csv(folder / "folds.csv", run["folds"])
    _csv(folder / "split.csv", run["split_table"])
    lines = [{"fold": k, **asdict(epoch)} for k, history in enumerate(chosen.histories) for epoch in history]
    _csv(folder / "history.csv", lines)
    _csv(folder / "per_class.csv", run["per_class"])
    if len(configurations) > 1:
        _csv(folder / "grid.csv", run["grid"])


def predictions(folder: Path, data: Data, **arrays: np.ndarray) -> None:
    """`predictions.npz`: labels, parts, who is who and the `meta:` columns, beside the given probabilities (raw)."""
    header, rows = data.header, data.rows
    columns = {"image": header.images, "group": header.groups, "study": header.studies, "view": header.views}
    arrays |= {name: np.array([values[i] for i in rows]) for name, values in columns.items()}
    arrays |= {"labels": data.labels, "fold": data.assignment}
    arrays["sha256"] = np.array([data.file.sha256[i] for i in rows])
    for name, values in data.file.meta.get("subgroups", {}).items():
        arrays[f"meta:{name}"] = np.array([values[i] for i in rows])
    np.savez_compressed(folder / "predictions.npz", **arrays)  # type: ignore[arg-type]


def _csv(path: Path, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
