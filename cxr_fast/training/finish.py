"""The end of a search: score its final models and a linear probe, choose thresholds, write model and predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from ..config import to_dict
from ..metrics import calibration, figures, shortcuts, subgroups
from ..metrics.intervals import Resampling
from ..metrics.rarity import group_maps
from ..models import heads, probe
from ..unlikeness.record import write_unlikeness
from . import operating_points, run_record
from .configurations.choose import Chosen
from .configurations.tables import grid_table, seed_table
from .dataset import Data
from .final_models import RETRAINED, FinalModels
from .operating_points import Decisions
from .run_folder import model_sha256, save_model
from .search import Search, Trained

# Images that a probe of the shortcut audit is fitted to.
MOST = 5000


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the record says of how the folds were trained, beside the search itself."""

    labels_from: str
    precision: str
    device: str
    trainable: dict[str, int]
    with_refit: bool
    grid: tuple[str, ...] = ()
    trials: int | None = None


def decide(finals: FinalModels, kind: str) -> Decisions:
    """Fit calibration and thresholds of a kind of final model on out-of-fold predictions."""
    data, spec = finals.search.data, finals.search.spec
    dev, everywhere = data.assignment >= 0, finals.out_of_fold(kind)
    fitted = calibration.fit(data.labels[dev], everywhere[dev], spec.calibration)
    return operating_points.decide(
        data.labels, data.assignment, everywhere, data.header.classes, spec.threshold_target, fitted
    )


def finish(
    folder: Path, configurations: list[Trained], chosen: Chosen, finals: FinalModels, setup: Setup
) -> run_record.RunRecord:
    """Write the model and the predictions; the record, its seconds and cluster aside."""
    search, trained = finals.search, finals.trained
    data, spec = search.data, search.spec
    held, own = data.assignment == -1, RETRAINED if spec.final == RETRAINED else "folds"
    decisions = {name: decide(finals, name) for name in ("folds", *finals.extra)}
    # The hold-out by itself for each, so that its figures do not hang on which model was asked for.
    raw = {kind: finals.probabilities(kind, data.rows[held]) for kind in finals.kinds if held.any()}
    scored, limits = _score(raw, data, decisions), decisions[own].thresholds
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
        out_of_fold=trained.probabilities,
        final=everywhere,
        probe=probed,
        **{f"out_of_fold_{kind}": decisions[kind].out_of_fold for kind in finals.extra},
        **{f"holdout_{kind.replace('-', '_')}": p for kind, p in raw.items()},
    )
    shown = calibration.apply(decisions[own].calibration, everywhere[held])
    members = finals.members(spec.final)
    return run_record.RunRecord(
        **run_record.describe_origin(data, spec, setup.labels_from),
        unfreeze_blocks=search.depth(trained.train),
        precision=setup.precision,
        device=setup.device,
        threads=torch.get_num_threads(),
        residency=search.activations.residency,
        trainable=setup.trainable,
        config=trained.number,
        grid=grid_table(configurations, trained, data, spec),
        search={"grid": list(setup.grid), "trials": setup.trials, "seed": trained.point.seed},
        seeds=seed_table(configurations, chosen, data, spec) or msgspec.UNSET,
        train=to_dict(trained.train),
        custom=custom_record(search),
        thresholds=limits.tolist(),
        threshold_source=decisions[own].source,
        calibration=decisions[own].calibration,
        decisions={name: decision.to_record() for name, decision in decisions.items()},
        probe=describe_probe(search, probed),
        shortcuts=find_shortcuts(data, read_embeddings(search), spec.seed),
        out_of_fold_auc=decisions[own].two_means(),
        unlikeness=_fit_unlikeness(folder, search),
        validated_in="float32",
        **run_record.search_tables(trained, data, spec, finals.budget, finals.best),
        final=run_record.FinalChoice(kind=spec.final, members=members, rule=run_record.FINAL_RULES[spec.final]),
        finals=scored,
        metrics={"out_of_fold": decisions[own].figures, "holdout": scored.get(spec.final)},
        per_class=figures.per_class(data.labels[held], shown, limits, data.header.classes) if held.any() else [],
        weights_sha256=weights,
        model_sha256=model_sha256(weights, members),
    )


def _fit_unlikeness(folder: Path, search: Search) -> dict[str, Any]:
    """Fit the distance to the training films; return `unlikeness` of run.json."""
    data = search.data
    rows = data.rows[data.assignment >= 0]
    groups = [data.header.groups[row] for row in rows]
    return write_unlikeness(folder, data.file, search.backbone.visual, rows, groups)


def _score(raw: dict[str, np.ndarray], data: Data, decisions: dict[str, Decisions]) -> dict[str, Any]:
    """Figures of each kind of final model on the hold-out, from its raw probabilities (n, C)."""
    scored, labels, dev = {}, data.labels[data.assignment == -1], data.labels[data.assignment >= 0]
    for kind, values in raw.items():
        decision = decisions[RETRAINED if kind == RETRAINED else "folds"]
        found = calibration.apply(decision.calibration, values)
        scored[kind] = operating_points.compute_figures(labels, found, decision.thresholds, dev)
    return scored


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


def read_embeddings(search: Search) -> torch.Tensor:
    """Embeddings (N, E) of the plain views before training, on the device."""
    rows = torch.from_numpy(search.data.rows)
    return search.behind(0, 1).gather(rows, torch.zeros_like(rows))


def find_shortcuts(data: Data, embeddings: torch.Tensor, seed: int) -> list[dict[str, Any]]:
    """How well each column that may be shown is read from embeddings (N, E), and how far each label follows it: rows
    as `run.json` has them, the strongest first.

    Read by logistic regression, each image by the one that saw none of its group, hold-out or not: nothing is chosen
    by this.
    """
    header = data.header
    columns = {"view": header.views} | {f"meta:{name}": v for name, v in data.file.meta.get("subgroups", {}).items()}
    groups = [header.groups[i] for i in data.rows]
    shown = subgroups.choose({name: [values[i] for i in data.rows] for name, values in columns.items()}, groups)
    traits = shortcuts.find_traits(shown.columns, groups)
    if not traits:
        return []
    folds, present = shortcuts.deal_folds(traits, groups, seed), np.stack([each.present for each in traits], axis=1)
    target, scores = torch.from_numpy(present).to(embeddings.device), np.zeros(present.shape)
    for k in range(shortcuts.FOLDS):
        valid = torch.from_numpy(folds == k).to(embeddings.device)
        train = _some_rows(np.flatnonzero(folds != k), seed)
        fitted = probe.fit(embeddings[train], target[train])
        scores[folds == k] = probe.scores(fitted, embeddings[valid]).cpu().numpy()
    how = Resampling(resamples=shortcuts.RESAMPLES, seed=seed)
    found = shortcuts.read_aucs(traits, scores, folds, groups, how)
    rows = [
        shortcuts.describe(trait, area, groups, shortcuts.follow(trait, data.labels, groups, header.classes))
        for trait, area in zip(traits, found, strict=True)
    ]
    return sorted(rows, key=lambda row: (-shortcuts.strength(row), -row["auc"]))


def _some_rows(rows: np.ndarray, seed: int) -> torch.Tensor:
    """At most MOST of the rows, drawn at random, in order: more read a column hardly better."""
    if len(rows) > MOST:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MOST, replace=False))
    return torch.from_numpy(rows)


def linear_probe(search: Search) -> np.ndarray:
    """Probabilities (N, C) float32 of logistic regression on the embeddings before training: an image of a fold by the
    probe of the other folds, a held-out one by the mean of all of them."""
    data, embeddings = search.data, read_embeddings(search)
    labels = torch.from_numpy(data.labels).to(embeddings.device)
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
    each = operating_points.fold_aucs(data.labels, data.assignment, probabilities)

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
