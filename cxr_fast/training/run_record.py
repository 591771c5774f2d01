"""What a finished search records of itself: `run.json`, its tables and its predictions. Loads without torch."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from .. import __version__
from ..config import CacheSpec, SweepSpec, from_dict, to_dict
from ..data.splits.table import fold_table
from ..errors import InputError
from ..recipes import NOT_RESTORED, recipe_differences
from ..system import hardware
from ..system.files import AnyPath, write_json
from .configurations.tables import write_grid, write_table
from .run_folder import KIND, SCHEMA, clean, read_info

if TYPE_CHECKING:
    from .dataset import Data
    from .search import Trained

Values = dict[str, Any]

FINAL_RULES = {
    "best-fold": "the fold with the best validation macro AUC at the chosen budget",
    "refit": "all folds' data for the chosen budget, learning rates the folds' medians",
    "ensemble": "mean of the folds' probabilities at the chosen budget",
    "retrained": "mean of the folds' probabilities, each fold's head trained again on its frozen blocks",
}


class ImageCounts(msgspec.Struct, frozen=True, kw_only=True):
    """How many images the cache holds (`in`), and what became of them; how many groups the used ones come from."""

    in_cache: int = msgspec.field(name="in")
    failed: int
    used: int
    holdout: int
    groups: int


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The chosen budget in epochs, the best fold there, and the rule by which both were chosen."""

    epochs: int
    fold: int
    rule: str


class FinalChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The final model: its kind by `--final`, the tails it consists of, and a sentence about it."""

    kind: str
    members: list[str]
    rule: str


class RunRecord(msgspec.Struct, kw_only=True):
    """`run.json`, in its order. `Values` are JSON objects; a figure that is not defined is None.

    `folds`, `budgets`, `grid`, `split_table` and `per_class` are tables, a row an object; `finals` and `metrics` hold
    the figures of `compute_figures`; `weights_sha256` has the tower and each tail; `cluster` only exists for a run
    trained on one. `probe` are the figures of a linear probe, `decisions` the thresholds of each kind of final model,
    `out_of_fold_auc` the macro AUC pooled and as the mean of folds, `validated_in` the arithmetic of history.csv,
    `shortcuts` the rows of `metrics.shortcuts.describe`, the strongest first; `split` says by which method groups were
    drawn, and how many images were given their part by what; `unlikeness` is what `unlikeness.record` writes,
    `corrections` how many labels a list of marks changed, with the hash of the list; `request_sha256` is the hash of
    all that decides the result but versions; `search` has the flags of the grid, the number of trials and the seed of
    the chosen configuration, `seeds` the table over seeds where there are several, `lost`
    the configurations that diverged. Runs of earlier versions have none
    of these. `custom` names a head or loss that was given in Python.

        >>> record: RunRecord = read_record("exports/indiana")
        >>> record.chosen.fold in range(record.spec["folds"])
        True
    """

    kind: str = KIND
    schema: int = SCHEMA
    written_by: str
    created: str
    provenance: str
    random_weights: bool
    spec: Values
    recipe: Values
    cache: Values
    classes: list[str]
    backbone: Values
    mean: list[float]
    std: list[float]
    preprocess: Values
    unfreeze_blocks: int
    images: ImageCounts
    split_table: list[Values]
    machine: Values
    toolchain: dict[str, str]
    precision: str
    device: str
    threads: int
    residency: str
    trainable: dict[str, int]
    config: int
    grid: list[Values]
    train: Values
    thresholds: list[float]
    threshold_source: str
    calibration: Values | None
    folds: list[Values]
    budgets: list[Values]
    chosen: Choice
    final: FinalChoice
    finals: dict[str, Values]
    metrics: dict[str, Values | None]
    per_class: list[Values]
    weights_sha256: dict[str, str]
    model_sha256: str
    cluster: Values | msgspec.UnsetType = msgspec.UNSET
    decisions: dict[str, Values] | msgspec.UnsetType = msgspec.UNSET
    probe: Values | msgspec.UnsetType = msgspec.UNSET
    custom: Values | msgspec.UnsetType = msgspec.UNSET
    split: Values | msgspec.UnsetType = msgspec.UNSET
    corrections: Values | msgspec.UnsetType = msgspec.UNSET
    shortcuts: list[Values] | msgspec.UnsetType = msgspec.UNSET
    out_of_fold_auc: Values | msgspec.UnsetType = msgspec.UNSET
    unlikeness: Values | msgspec.UnsetType = msgspec.UNSET
    validated_in: str | msgspec.UnsetType = msgspec.UNSET
    request_sha256: str | msgspec.UnsetType = msgspec.UNSET
    search: Values | msgspec.UnsetType = msgspec.UNSET
    seeds: list[Values] | msgspec.UnsetType = msgspec.UNSET
    lost: list[Values] | msgspec.UnsetType = msgspec.UNSET
    seconds: float = 0.0

    def to_dict(self) -> Values:
        """JSON-ready values: numbers of numpy become Python's, NaN becomes None."""
        values: Values = clean(msgspec.to_builtins(self, enc_hook=lambda number: number.item()))
        return values


def read_record(folder: AnyPath) -> RunRecord:
    """Read `run.json` of a run folder. InputError or SchemaError with one line where it is not one.

    >>> read_record("exports/indiana").final.kind
    'best-fold'
    """
    folder = Path(folder)
    try:
        return msgspec.convert(read_info(folder), RunRecord)
    except msgspec.ValidationError as error:
        raise InputError(f"{folder / 'run.json'}: {error}; run the sweep again.") from error


def provenance(meta: Mapping[str, Any]) -> str:
    """What every figure of the run must carry: `random backbone, phantom images`; empty for real ones."""
    parts = []
    if meta["random_weights"]:
        parts.append("random backbone")
    if meta["dataset"].get("synthetic"):
        parts.append(f"{meta['dataset']['name']} images")
    return ", ".join(parts)


def describe_origin(data: Data, spec: SweepSpec, labels_from: str) -> Values:
    """What made the run, as fields of `RunRecord`: program, recipe, cache, backbone, data, machine."""
    import torch

    header, meta = data.header, data.file.meta
    groups = [header.groups[i] for i in data.rows]
    keys = ("spec", "fingerprint", "fingerprint_parts", "weights", "tower_sha256", "dataset")
    cache = {key: meta[key] for key in keys} | {"dataset": header.meta["dataset"]}
    return {
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
        "images": ImageCounts(
            in_cache=len(header.images),
            failed=int((~data.file.ok).sum()),
            used=len(data.rows),
            holdout=int((data.assignment == -1).sum()),
            groups=len(set(groups)),
        ),
        "split": data.split,
        "corrections": msgspec.UNSET if data.corrections is None else data.corrections,
        "split_table": fold_table(data.labels, data.assignment, header.classes, groups),
        "machine": hardware.machine(),
        "toolchain": {"cxr-fast": __version__, "torch": str(torch.__version__), "numpy": np.__version__},
    }


def search_tables(trained: Trained, data: Data, spec: SweepSpec, budget: int, best: int) -> Values:
    """The fold table, the budget table and the choice, as fields of `RunRecord`; from validation scores alone."""
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
    return {"folds": folds, "budgets": budgets, "chosen": Choice(epochs=epochs[budget], fold=best, rule=rule)}


def write_run(
    folder: Path, run: Values, configurations: Sequence[Trained], assignments: Mapping[int, np.ndarray]
) -> None:
    """Write `run.json` and its tables into the folder; `assignments` are the folds (N,) of each seed."""
    write_json(folder / "run.json", run)
    chosen = next(trained for trained in configurations if trained.number == run["config"])
    write_table(folder / "folds.csv", run["folds"])
    write_table(folder / "split.csv", run["split_table"])
    lines = [{"fold": k, **asdict(epoch)} for k, history in enumerate(chosen.histories) for epoch in history]
    write_table(folder / "history.csv", lines)
    write_table(folder / "per_class.csv", run["per_class"])
    if len(configurations) > 1:
        write_grid(folder, configurations, run, np.stack([assignments[each.point.seed] for each in configurations]))


def write_predictions(folder: Path, data: Data, **arrays: np.ndarray) -> None:
    """Write `predictions.npz`: class names, labels, folds, image columns, `meta:` columns, and the given probabilities
    (raw)."""
    header, rows = data.header, data.rows
    columns = {"image": header.images, "group": header.groups, "study": header.studies, "view": header.views}
    arrays |= {name: np.array([values[i] for i in rows]) for name, values in columns.items()}
    arrays |= {"classes": np.array(header.classes), "labels": data.labels, "fold": data.assignment}
    arrays["sha256"] = np.array([data.file.sha256[i] for i in rows])
    for name, values in data.file.meta.get("subgroups", {}).items():
        arrays[f"meta:{name}"] = np.array([values[i] for i in rows])
    np.savez_compressed(folder / "predictions.npz", **arrays)  # type: ignore[arg-type]
