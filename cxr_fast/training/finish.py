"""The end of a search: score its final models and a linear probe, choose thresholds, write model and predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from ..config import to_dict
from ..metrics import calibration, figures
from ..metrics.rarity import group_maps
from ..models import heads, probe
from . import run_record
from .dataset import Data
from .final_models import RETRAINED, FinalModels
from .run_folder import model_sha256, save_model
from .search import Search, Trained


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the record says of how the folds were trained, beside the search itself."""

    labels_from: str
    precision: str
    device: str
    trainable: dict[str, int]
    with_refit: bool


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """Calibration and thresholds (C,) of a kind of final model; the raw out-of-fold probabilities (N, C) that they were
    found on, NaN for the hold-out; the figures; the mean over folds of the macro AUC."""

    mean_auc: float
    calibration: dict[str, Any] | None
    thresholds: np.ndarray
    source: str
    out_of_fold: np.ndarray
    figures: dict[str, Any]

    def to_record(self) -> dict[str, Any]:
        """As `run.json` holds it for another final model than its own."""
        return {
            "thresholds": self.thresholds.tolist(),
            "threshold_source": self.source,
            "calibration": self.calibration,
            "mean_auc": self.mean_auc,
            "out_of_fold": self.figures,
        }


def decide(finals: FinalModels, kind: str) -> Decisions:
    """Fit calibration and thresholds of a kind of final model on out-of-fold predictions."""
    data, spec = finals.search.data, finals.search.spec
    dev, everywhere = data.assignment >= 0, finals.out_of_fold(kind)
    labels, found = data.labels[dev], everywhere[dev]
    fitted = calibration.fit(labels, found, spec.calibration)
    found = calibration.apply(fitted, found)
    limits, source = run_record.choose_thresholds(labels, found, spec)
    return Decisions(
        mean_auc=float(np.nanmean(fold_aucs(data, everywhere))),
        calibration=fitted,
        thresholds=limits,
        source=source,
        out_of_fold=everywhere,
        figures=run_record.compute_figures(labels, found, limits, data.labels),
    )


def fold_aucs(data: Data, probabilities: np.ndarray) -> list[float]:
    """Macro AUC of each fold's images, from probabilities (N, C) of all."""
    places = (data.assignment == k for k in range(int(data.assignment.max()) + 1))
    return [figures.macro(figures.auc(data.labels[place], probabilities[place]))[0] for place in places]


def finish(folder: Path, configurations: list[Trained], finals: FinalModels, setup: Setup) -> run_record.RunRecord:
    """Write the model and the predictions; the record, its seconds and cluster aside."""
    search, chosen = finals.search, finals.trained
    data, spec = search.data, search.spec
    held, own = data.assignment == -1, RETRAINED if spec.final == RETRAINED else "folds"
    decisions = {name: decide(finals, name) for name in ("folds", *finals.extra)}
    # The hold-out by itself for each, so that its figures do not hang on which model was asked for.
    raw = {kind: finals.probabilities(kind, data.rows[held]) for kind in finals.kinds if held.any()}
    scored, limits = {}, decisions[own].thresholds
    for kind, values in raw.items():
        decision = decisions[RETRAINED if kind == RETRAINED else "folds"]
        found = calibration.apply(decision.calibration, values)
        scored[kind] = run_record.compute_figures(data.labels[held], found, decision.thresholds, data.labels)
    everywhere = np.empty(data.labels.shape, np.float32)
    everywhere[~held] = finals.probabilities(spec.final, data.rows[~held])
    everywhere[held] = raw.get(spec.final, everywhere[held])
    names = [f"fold{k}" for k in range(spec.folds)] + (["refit"] if setup.with_refit else [])
    names += [member for kind in finals.extra for member in finals.members(kind)]
    weights = save_model(folder / "model.safetensors", search.backbone, {name: finals.state(name) for name in names})
    probed = linear_probe(search)
    run_record.write_predictions(
        folder,
        data,
        out_of_fold=chosen.probabilities,
        final=everywhere,
        probe=probed,
        **{f"out_of_fold_{kind}": decisions[kind].out_of_fold for kind in finals.extra},
        **{f"holdout_{kind.replace('-', '_')}": p for kind, p in raw.items()},
    )
    shown = calibration.apply(decisions[own].calibration, everywhere[held])
    members = finals.members(spec.final)
    return run_record.RunRecord(
        **run_record.describe_origin(data, spec, setup.labels_from),
        unfreeze_blocks=search.depth(chosen.train),
        precision=setup.precision,
        device=setup.device,
        threads=torch.get_num_threads(),
        residency=search.activations.residency,
        trainable=setup.trainable,
        config=chosen.number,
        grid=run_record.grid_table(configurations, chosen, data, spec),
        train=to_dict(chosen.train),
        custom=custom_record(search),
        thresholds=limits.tolist(),
        threshold_source=decisions[own].source,
        calibration=decisions[own].calibration,
        decisions={name: decision.to_record() for name, decision in decisions.items()},
        probe=describe_probe(search, probed),
        **run_record.search_tables(chosen, data, spec, finals.budget, finals.best),
        final=run_record.FinalChoice(kind=spec.final, members=members, rule=run_record.FINAL_RULES[spec.final]),
        finals=scored,
        metrics={
            "out_of_fold": decisions[own].figures,
            "holdout": scored[spec.final] if held.any() else None,
        },
        per_class=figures.per_class(data.labels[held], shown, limits, data.header.classes) if held.any() else [],
        weights_sha256=weights,
        model_sha256=model_sha256(weights, members),
    )


def custom_record(search: Search) -> dict[str, Any] | msgspec.UnsetType:
    """The user's own head and loss by name, and the head's layers where a file can name them all."""
    custom = search.custom
    if not custom:
        return msgspec.UNSET
    given = {"head": custom.head, "loss": custom.loss}
    found: dict[str, Any] = {name: None if each is None else heads.described(each) for name, each in given.items()}
    head = None if custom.head is None else search.tail(search.spec.train).head
    layers, unknown = (None, "") if head is None else (heads.describe(head), heads.unknown_layer(head))
    return found | {"layers": layers} | ({"unknown": unknown} if unknown else {})


def linear_probe(search: Search) -> np.ndarray:
    """Probabilities (N, C) float32 of logistic regression on the embeddings before training: an image of a fold by the
    probe of the other folds, a held-out one by the mean of all of them."""
    data, inputs = search.data, search.behind(0, 1)
    rows = torch.from_numpy(data.rows)
    embeddings = inputs.gather(rows, torch.zeros_like(rows))
    labels = torch.from_numpy(data.labels).to(inputs.device)
    out, held = np.zeros(data.labels.shape), data.assignment == -1
    for k in range(search.spec.folds):
        train, valid = (data.assignment >= 0) & (data.assignment != k), data.assignment == k
        found = probe.scores(probe.fit(embeddings[train], labels[train]), embeddings).sigmoid().cpu().numpy()
        out[valid] = found[valid]
        out[held] += found[held] / search.spec.folds
    return out.astype(np.float32)


def describe_probe(search: Search, probabilities: np.ndarray) -> dict[str, Any]:
    """The probe's figures as `run.json` has them, beside those of the folds and of the hold-out."""
    data, held = search.data, search.data.assignment == -1
    each = fold_aucs(data, probabilities)

    def of(place: np.ndarray) -> dict[str, Any]:
        labels, probs = data.labels[place], probabilities[place]
        auc, classes = figures.macro(figures.auc(labels, probs))
        precision = figures.macro(figures.average_precision(labels, probs))[0]
        return {"macro_auc": auc, "classes_defined": classes, "map": precision, **group_maps(labels, probs)}

    return {
        "what": "logistic regression on the embeddings before training",
        "strength": probe.STRENGTH,
        "mean_auc": float(np.nanmean(each)),
        "std_auc": float(np.nanstd(each)),
        "out_of_fold": of(~held),
        "holdout": of(held) if held.any() else None,
    }
