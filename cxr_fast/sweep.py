"""Hold-out, folds, epoch search, the final model: from an activation file to a run folder."""

from __future__ import annotations

import csv
import datetime
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from . import __version__, metrics, splits, timing
from .backbone import Backbone, load, tower_sha256, weights_sha256
from .config import SweepSpec, to_dict
from .datasets import Manifest
from .encode import pick_device
from .errors import InputError
from .runs import KIND, SCHEMA, save_model
from .selection import read
from .store import ActivationFile
from .tail import Tail, count_trainable
from .train import Activations, Epoch, Fold, Snapshot, fit, precision, predict, sigmoid

MIN_POSITIVES = 10


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a sweep will do, known before it starts; `seconds` is estimated from two timed training steps."""

    cache: Path
    out: Path
    images: int
    failed: int
    groups: int
    classes: int
    folds: int
    holdout_images: int
    epochs: tuple[int, ...]
    trainable: dict[str, int]
    activation_bytes: int
    where: str
    device: str
    precision: str
    seconds: float


def backbone_for(file: ActivationFile, weights: str | None = None) -> Backbone:
    """The tower the cache was made with, its hash checked against the file's."""
    source = weights or file.meta["weights"]
    backbone = load(source)
    if tower_sha256(backbone.visual) != file.meta["tower_sha256"]:
        raise InputError(f"--weights {source}: not the weights {file.path} was made with; pass those, or cache again.")
    return backbone


def provenance(meta: Mapping[str, Any]) -> str:
    """What must be said beside every figure: `random backbone, phantom images`; empty for real ones."""
    parts = []
    if meta["random_weights"]:
        parts.append("random backbone")
    if meta["dataset"].get("synthetic"):
        parts.append(f"{meta['dataset']['name']} images")
    return ", ".join(parts)


class Sweep:
    """One search over one cache. `plan` says what will happen; `run` does it and writes the run folder."""

    def __init__(
        self,
        cache: Path,
        out: Path,
        spec: SweepSpec,
        *,
        device: str = "auto",
        weights: str | None = None,
        manifest: Manifest | None = None,
        overwrite: bool = False,
    ) -> None:
        if out.exists() and not overwrite:
            raise InputError(f"--out: {out} exists; give another --out, or pass --overwrite.")
        if out.exists():
            _require_replaceable(out)
        self.out, self.spec = out, spec
        self.data = read(cache, spec, manifest)
        self.labels_from = "the cache" if manifest is None else manifest.name
        self.meta = self.data.file.meta
        self.unfreeze_blocks = int(self.meta["spec"]["unfreeze_blocks"])
        self.device = pick_device(device)
        self.backbone = backbone_for(self.data.file, weights)
        self.activations = Activations(self.data.file.activations, self.device)
        self.trainable = count_trainable(self._tail())

    def _tail(self) -> Tail:
        classes = len(self.data.header.classes)
        return Tail(
            self.backbone.visual,
            unfreeze_blocks=self.unfreeze_blocks,
            classes=classes,
            dropout=self.spec.train.dropout,
        )

    def fold(self, number: int) -> Fold:
        """Fold `number`, ready to train."""
        return Fold(
            self.backbone.visual,
            self.activations,
            self.data.header.labels,
            self.data.train(number),
            self.data.valid(number),
            self.spec.train,
            unfreeze_blocks=self.unfreeze_blocks,
            seed=self.spec.seed,
            fold=number,
        )

    def plan(self) -> Plan:
        """Counts, memory and expected time."""
        data, header = self.data, self.data.header
        return Plan(
            cache=data.file.path,
            out=self.out,
            images=len(data.rows),
            failed=int((~data.file.ok).sum()),
            groups=len({header.groups[i] for i in data.rows}),
            classes=len(header.classes),
            folds=self.spec.folds,
            holdout_images=int((data.assignment == -1).sum()),
            epochs=self.spec.epochs,
            trainable=self.trainable,
            activation_bytes=data.file.activations.nbytes,
            where=self.activations.where,
            device=str(self.device),
            precision=precision(self.spec.train, self.device),
            seconds=self._expected_seconds(),
        )

    def _expected_seconds(self) -> float:
        """From the median of a few timed steps on a throw-away fold, two seconds of them at most."""
        fold = self.fold(0)
        fold.tail.train()
        batches = fold.batches()[:12]
        began, steps = time.perf_counter(), []
        for rows, views in batches:
            mark = time.perf_counter()
            float(fold.step(rows, views))  # float waits for the device
            steps.append((time.perf_counter() - mark) / len(rows))
            if len(steps) > 2 and time.perf_counter() - began > 2:
                break
        some = fold.valid_rows[:64]
        score = min(
            timing.measure(lambda: predict(fold.tail, self.activations, some, kind=fold.kind), warmup=1, repeats=1)
        )
        step = timing.median(steps[1:] or steps)
        an_epoch = sum(
            step * len(self.data.train(k)) + score / len(some) * len(self.data.valid(k)) for k in range(self.spec.folds)
        )
        return an_epoch * self.spec.epochs[-1]

    def run(self, on_epoch: Callable[[int, Epoch], None] | None = None) -> dict[str, Any]:
        """Train every fold, choose budget and fold on validation alone, score the hold-out once; the run as a dict.

        The folder appears under its final name only when it is complete.
        """
        began = time.perf_counter()
        scratch = self.out.with_name(self.out.name + f".partial.{os.getpid()}")
        try:
            scratch.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"--out: cannot write {self.out}: {error.strerror}.") from error
        try:
            run = self._run(scratch, on_epoch, began)
            _put_in_place(scratch, self.out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return run

    def _run(self, folder: Path, on_epoch: Callable[[int, Epoch], None] | None, began: float) -> dict[str, Any]:
        budgets, data = self.spec.epochs, self.data
        probabilities = np.full((len(budgets), *data.labels.shape), np.nan, np.float32)
        history: list[tuple[int, Epoch]] = []
        stopped_at = np.zeros((self.spec.folds, len(budgets)), int)
        for number in range(self.spec.folds):
            place = np.flatnonzero(data.assignment == number)

            def keep(snapshot: Snapshot, number: int = number, place: np.ndarray = place) -> None:
                which = budgets.index(snapshot.budget)
                probabilities[which, place] = snapshot.probabilities
                stopped_at[number, which] = snapshot.epoch
                save_file(dict(snapshot.state), _snapshot_path(folder, number, snapshot.budget))

            def tell(epoch: Epoch, number: int = number) -> None:
                history.append((number, epoch))
                if on_epoch is not None:
                    on_epoch(number, epoch)

            fit(self.fold(number), budgets, on_epoch=tell, on_snapshot=keep)
        scores, defined = self._scores(probabilities)
        budget, best = choose(scores)
        final = self._tail()
        final.load_state_dict(load_file(_snapshot_path(folder, best, budgets[budget])))
        final.to(self.device)
        everywhere = sigmoid(predict(final, self.activations, data.rows))
        save_model(folder / "model.safetensors", self.backbone, final)
        shutil.rmtree(folder / "snapshots")
        run = self._describe(probabilities, scores, defined, stopped_at, budget, best, everywhere, folder)
        run["seconds"] = time.perf_counter() - began
        _write(folder, run, history)
        self._save_predictions(folder, probabilities, everywhere)
        return run

    def _scores(self, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Validation macro AUC (budgets, folds) of the float32 snapshots, and how many classes each is a mean of."""
        shape = (len(self.spec.epochs), self.spec.folds)
        scores, defined = np.zeros(shape), np.zeros(shape, int)
        for b, k in np.ndindex(shape):
            place = self.data.assignment == k
            scores[b, k], defined[b, k] = metrics.macro(metrics.auc(self.data.labels[place], probabilities[b, place]))
        return scores, defined

    def _describe(
        self,
        probabilities: np.ndarray,
        scores: np.ndarray,
        defined: np.ndarray,
        stopped_at: np.ndarray,
        budget: int,
        best: int,
        everywhere: np.ndarray,
        folder: Path,
    ) -> dict[str, Any]:
        """`run.json`: where everything came from, what was chosen and why, and every figure."""
        data, classes = self.data, self.data.header.classes
        dev, held = data.assignment >= 0, data.assignment == -1
        out_of_fold, labels = probabilities[budget][dev], data.labels[dev]
        found = metrics.best_f1_thresholds(labels, out_of_fold)
        thresholds = np.where(np.isnan(found), 0.5, found)
        on_holdout = (data.labels[held], everywhere[held], thresholds)
        described = {
            **self._origin(),
            "classes": list(classes),
            "thresholds": thresholds.tolist(),
            "threshold_source": "F1 on out-of-fold predictions; 0.5 where a class had no positive or no negative",
            **self._search(scores, defined, stopped_at, budget, best),
            "metrics": {
                "out_of_fold": _figures(labels, out_of_fold, thresholds),
                "holdout": _figures(*on_holdout) if held.any() else None,
            },
            "per_class": metrics.per_class(*on_holdout, classes) if held.any() else [],
            "model_sha256": weights_sha256(tensors := load_file(folder / "model.safetensors"), tensors),
        }
        return cast(dict[str, Any], _clean(described))

    def _origin(self) -> dict[str, Any]:
        """What made the run: program, recipe, cache, backbone, data, machine."""
        data, header = self.data, self.data.header
        groups = [header.groups[i] for i in data.rows]
        keys = ("spec", "fingerprint", "fingerprint_parts", "weights", "tower_sha256", "dataset")
        cache = {key: self.meta[key] for key in keys}
        return {
            "kind": KIND,
            "schema": SCHEMA,
            "written_by": f"cxr-fast {__version__}",
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "provenance": provenance(self.meta),
            "random_weights": self.meta["random_weights"],
            "spec": to_dict(self.spec),
            "precision": precision(self.spec.train, self.device),
            "cache": {"path": str(data.file.path), "labels_from": self.labels_from, **cache},
            "backbone": self.meta["backbone"],
            "mean": self.meta["mean"],
            "std": self.meta["std"],
            "preprocess": self.meta["spec"]["preprocess"],
            "unfreeze_blocks": self.unfreeze_blocks,
            "trainable": self.trainable,
            "images": {
                "in": len(header.images),
                "failed": int((~data.file.ok).sum()),
                "used": len(data.rows),
                "holdout": int((data.assignment == -1).sum()),
                "groups": len(set(groups)),
            },
            "split_table": splits.fold_table(data.labels, data.assignment, header.classes, groups),
            "machine": timing.machine(),
            "device": device_name(self.device),
            "toolchain": {"cxr-fast": __version__, "torch": torch.__version__, "numpy": np.__version__},
        }

    def _search(
        self, scores: np.ndarray, defined: np.ndarray, stopped_at: np.ndarray, budget: int, best: int
    ) -> dict[str, Any]:
        """The fold table, the budget table and the choice, from validation scores (budgets, folds) alone."""
        epochs, assignment = self.spec.epochs, self.data.assignment
        folds = [
            {
                "fold": k,
                "images": int((assignment == k).sum()),
                "classes_defined": int(defined[budget, k]),
                "best": k == best,
                **{f"auc_{b}": scores[i, k] for i, b in enumerate(epochs)},
                **{f"stopped_{b}": int(stopped_at[k, i]) for i, b in enumerate(epochs)},
            }
            for k in range(self.spec.folds)
        ]
        budgets = [
            {"epochs": b, "mean_auc": np.nanmean(scores[i]), "std_auc": np.nanstd(scores[i]), "chosen": i == budget}
            for i, b in enumerate(epochs)
        ]
        rule = "mean validation macro AUC, best fold"
        return {"folds": folds, "budgets": budgets, "chosen": {"epochs": epochs[budget], "fold": best, "rule": rule}}

    def _save_predictions(self, folder: Path, probabilities: np.ndarray, everywhere: np.ndarray) -> None:
        header, rows = self.data.header, self.data.rows
        np.savez_compressed(
            folder / "predictions.npz",
            labels=self.data.labels,
            fold=self.data.assignment,
            out_of_fold=probabilities,
            final=everywhere,
            image=np.array([header.images[i] for i in rows]),
            group=np.array([header.groups[i] for i in rows]),
            study=np.array([header.studies[i] for i in rows]),
            view=np.array([header.views[i] for i in rows]),
            sha256=np.array([self.data.file.sha256[i] for i in rows]),
        )


def _put_in_place(folder: Path, out: Path) -> None:
    """Give a finished folder its name; one of that name is set aside first and removed last."""
    old = out.with_name(out.name + f".old.{os.getpid()}")
    if out.exists():
        os.replace(out, old)
    os.replace(folder, out)
    shutil.rmtree(old, ignore_errors=True)


def choose(scores: np.ndarray) -> tuple[int, int]:
    """Budget of the highest mean validation AUC over folds, then the best fold there; (budgets, folds) -> indices.

    Ties go to the smaller budget and the lower fold.
    """
    budget = int(np.nanargmax(np.nanmean(scores, axis=1)))
    return budget, int(np.nanargmax(scores[budget]))


def _require_replaceable(out: Path) -> None:
    """Only a run, or an empty folder, may be replaced: `--out DATA --overwrite` must not cost the data."""
    if not out.is_dir() or (any(out.iterdir()) and not (out / "run.json").is_file()):
        raise InputError(f"--overwrite: {out} is not a run folder and is left alone; give another --out.")


def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _figures(labels: np.ndarray, probabilities: np.ndarray, thresholds: np.ndarray) -> dict[str, Any]:
    """The published six at the thresholds, the same at 0.5, and the AUC of classes with enough positives."""
    aucs = metrics.auc(labels, probabilities)
    enough = (labels == 1).sum(axis=0) >= MIN_POSITIVES
    frequent, count = metrics.macro(aucs[enough]) if enough.any() else (float("nan"), 0)
    figures = metrics.headline(labels, probabilities, thresholds)
    half = metrics.headline(labels, probabilities, np.full(len(thresholds), 0.5))
    return {
        **figures,
        "at_0.5": half,
        "frequent_auc": frequent,
        "frequent_classes": count,
        "frequent_min_positives": MIN_POSITIVES,
    }


def _clean(value: Any) -> Any:
    """JSON-ready: numpy numbers become Python's, NaN becomes null."""
    if isinstance(value, Mapping):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and np.isnan(value) else value


def _snapshot_path(folder: Path, fold: int, budget: int) -> Path:
    path = folder / "snapshots" / f"fold{fold}_epochs{budget}.safetensors"
    path.parent.mkdir(exist_ok=True)
    return path


def _write(folder: Path, run: dict[str, Any], history: list[tuple[int, Epoch]]) -> None:
    (folder / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    _csv(folder / "folds.csv", run["folds"])
    _csv(folder / "split.csv", run["split_table"])
    _csv(folder / "history.csv", [{"fold": k, **vars(epoch)} for k, epoch in history])
    _csv(folder / "per_class.csv", run["per_class"])


def _csv(path: Path, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
