"""Which recipe makes the better model: the published one, today's default, a linear probe, and what may beat them.

    cxrfast cache FILMS --weights WEIGHTS --out CACHE.h5
    python benchmarks/run_quality.py --cache CACHE.h5 [--seeds 0,1,2] [--folds 5] [--arms "tuned;default"] [--work DIR]
    python benchmarks/run_quality.py --cache indiana.h5 --work indiana-quality   # BiomedCLIP on Indiana

Every arm is a sweep over the same folds by patient, stratified, with a fifth of the patients held out. Figures are of
the folds' validation films, each scored by the one model that did not see it; the hold-out's stand beside them and
choose nothing. Differences against the published recipe, and of `tuned` against the default and the probe, have 95 %
intervals over resampled patients, the same resamples for all arms, means over seeds. A run that is already in --work is
not trained again, so that the benchmark can be stopped and gone on with. --docs writes the table into docs/recipes.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import common
import numpy as np

from cxr_fast.config import SweepOptions, SweepSpec, TrainSpec
from cxr_fast.metrics import figures, intervals
from cxr_fast.metrics.arrays import number_groups
from cxr_fast.metrics.rarity import class_groups, group_maps
from cxr_fast.models import device
from cxr_fast.recipes import sweep_spec
from cxr_fast.training import predictions
from cxr_fast.training.run_folder import read_info
from cxr_fast.training.sweep import SweepJob

PUBLISHED, DEFAULT, PROBE, TUNED = "published as its code trains", "default", "linear probe", "tuned"
KEYS = ("macro_auc", "map", "pooled_brier")


@dataclass(frozen=True)
class Arm:
    """A sweep to compare; `train` and `spec` are fields that differ from the defaults, `of` reads another arm's run."""

    train: Mapping[str, Any] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = "default"
    of: str = ""


HEAD = {"train_blocks": 0, "lr": 1e-3}
TWO = {"lr": 1e-5, "head_lr": 1e-3}
SHORT, ONE = {"epochs": (10,)}, {"epochs": (5,)}
ARMS: dict[str, Arm] = {
    PROBE: Arm(of="head, focal"),
    PUBLISHED: Arm({"train_blocks": 0}, {"epochs": (100,)}),
    DEFAULT: Arm({}, {"epochs": (100,)}),
    "head, focal": Arm(HEAD, SHORT),
    **{f"head, {loss}": Arm(HEAD | {"loss": loss}, SHORT) for loss in ("bce", "asl", "ldam")},
    "head, bce, balanced": Arm(HEAD | {"loss": "bce", "sampling": "balanced"}, SHORT),
    "head, bce, sqrt": Arm(HEAD | {"loss": "bce", "sampling": "sqrt"}, SHORT),
    "head, bce, EMA": Arm(HEAD | {"loss": "bce", "ema": 0.99}, SHORT),
    "head, bce, adjusted": Arm(HEAD | {"loss": "bce", "logit_adjustment": 1.0}, SHORT),
    "head, bce, both views": Arm(HEAD | {"loss": "bce", "tta": "flip"}, SHORT),
    **{f"two blocks, {loss}": Arm(TWO | {"loss": loss}, ONE) for loss in ("focal", "bce", "asl", "ldam")},
    "two blocks, bce, balanced": Arm(TWO | {"loss": "bce", "sampling": "balanced"}, ONE),
    "two blocks, bce, sqrt": Arm(TWO | {"loss": "bce", "sampling": "sqrt"}, ONE),
    "two blocks, bce, EMA": Arm(TWO | {"loss": "bce", "ema": 0.99}, ONE),
    "two blocks, bce, cRT": Arm(TWO | {"loss": "bce"}, ONE | {"retrain_head": "balanced", "final": "retrained"}),
    "one block, bce": Arm(TWO | {"loss": "bce", "train_blocks": 1}, ONE),
    TUNED: Arm(recipe="tuned"),
    "longtail": Arm(recipe="longtail"),
}


def spec_of(arm: Arm, seed: int, folds: int) -> SweepSpec:
    """The sweep of an arm."""
    base = sweep_spec(arm.recipe)
    train: TrainSpec = replace(base.train, **arm.train)
    return replace(base, train=train, seed=seed, folds=folds, holdout=0.2, **arm.spec)


def trained(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """What an arm found with one seed: labels, patients, out-of-fold and held-out predictions, seconds."""
    arm = ARMS[ARMS[name].of or name]
    folder = args.work / f"{(ARMS[name].of or name).replace(', ', '-').replace(' ', '_')}-{seed}"
    if not (folder / "run.json").is_file():
        print(f"{time.strftime('%H:%M')} {name}, seed {seed}", flush=True)
        SweepJob(args.cache, folder, spec_of(arm, seed, args.folds), SweepOptions(device=args.device)).run()
    run = read_info(folder)
    saved = predictions.read(folder, run).arrays
    dev, held = saved["fold"] >= 0, saved["fold"] == -1
    budget = next(i for i, b in enumerate(run["budgets"]) if b["chosen"])
    scored = saved["out_of_fold"][budget]
    if name == PROBE:
        scored = saved["probe"]
    elif run["final"]["kind"] == "retrained":
        scored = saved["out_of_fold_retrained"]
    finals = {kind: saved[f"holdout_{kind.replace('-', '_')}"] for kind in run["finals"]}
    return {
        "labels": saved["labels"][dev],
        "groups": saved["group"][dev].tolist(),
        "fold": saved["fold"][dev],
        "probs": scored[dev].astype(np.float32),
        "holdout_labels": saved["labels"][held],
        "holdout": {"probe": saved["probe"][held]} if name == PROBE else finals,
        "seconds": run["seconds"],
        "epochs": run["chosen"]["epochs"],
    }


def describe(each: list[dict[str, Any]]) -> dict[str, Any]:
    """An arm's figures, means over seeds."""

    def of(one: dict[str, Any]) -> dict[str, float]:
        labels, probs = one["labels"], one["probs"]
        folds = [
            figures.macro(figures.auc(labels[one["fold"] == k], probs[one["fold"] == k]))[0]
            for k in range(int(one["fold"].max()) + 1)
        ]
        groups = group_maps(labels, probs, class_groups(labels))
        precision = figures.macro(figures.average_precision(labels, probs))[0]
        held = {
            f"hold-out AUC, {kind}": figures.macro(figures.auc(one["holdout_labels"], p))[0]
            for kind, p in one["holdout"].items()
        }
        brier = float(np.mean((probs - np.maximum(labels, 0)) ** 2))
        own = {"AUC, mean of folds": float(np.mean(folds)), "mAP": precision, "Brier": brier, "seconds": one["seconds"]}
        return own | {f"{name} mAP": groups[f"{name}_map"] for name in ("head", "medium", "tail")} | held

    found = [of(one) for one in each]
    return {key: figures.macro(np.array([one[key] for one in found]))[0] for key in found[0]} | {
        "epochs": each[0]["epochs"]
    }


def overall(found: figures.Figures, enough: np.ndarray) -> figures.Figures:
    """The figures of KEYS in each resample, (R,), means over the classes (C,) that enough patients are behind."""
    means = {key: np.nanmean(found[figures.MEANS[key]][enough], axis=0) for key in KEYS if key in figures.MEANS}
    return means | {key: found[key] for key in KEYS if key not in figures.MEANS}


def resampled(each: list[dict[str, Any]], resamples: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Figures of pooled out-of-fold predictions, means over seeds: as they are, and in each resample of patients."""
    values: list[dict[str, float]] = []
    drawn: list[dict[str, np.ndarray]] = []
    for seed, one in enumerate(each):
        figures_of = intervals.weighted_figures(one["labels"], one["probs"], 0.5)
        ids = number_groups(one["groups"], len(one["labels"]))
        how = intervals.Resampling(resamples=resamples, seed=seed)
        enough = intervals.support(one["labels"], one["groups"]) >= intervals.FEW
        drawn.append(overall(intervals.resample(figures_of, ids, how), enough))
        whole = overall(figures_of(np.ones((len(ids), 1), np.int32)), enough)
        values.append({key: float(whole[key][0]) for key in KEYS})
    mean = {key: float(np.mean([value[key] for value in values])) for key in KEYS}
    return mean, {key: np.mean([one[key] for one in drawn], axis=0) for key in KEYS}


def difference(a: Any, b: Any) -> dict[str, list[float]]:
    """b minus a and its 95 % interval, by figure; both from `resampled`."""
    (values, drawn), (others, other) = a, b
    return {
        key: [others[key] - values[key], *np.quantile(other[key] - drawn[key], (0.025, 0.975)).tolist()] for key in KEYS
    }


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    args.work = args.work or folder
    device.prepare()
    seeds = [int(text) for text in args.seeds.split(",")]
    names = [name.strip() for name in args.arms.split(";")] if args.arms else list(ARMS)
    each = {name: [trained(args, name, seed) for seed in seeds] for name in names}
    drawn = {name: resampled(found, args.resamples) for name, found in each.items()}
    arms = {name: describe(found) for name, found in each.items()}
    against = {name: difference(drawn[PUBLISHED], drawn[name]) for name in names if PUBLISHED in names}
    versus = {
        other: difference(drawn[other], drawn[TUNED]) for other in (DEFAULT, PROBE) if {other, TUNED} <= set(names)
    }
    text = page(arms, against, versus)
    print(text)
    if args.docs:
        path = common.ROOT / "docs" / "recipes.md"
        path.write_text(common.filled(path.read_text(encoding="utf-8"), "quality", text), encoding="utf-8")
    first = each[names[0]][0]
    return {
        "cache": args.cache.name,
        "films": len(first["labels"]) + len(first["holdout_labels"]),
        "seeds": seeds,
        "folds": args.folds,
        "resamples": args.resamples,
        "arms": arms,
        "against_published": against,
        "tuned_against": versus,
    }


def page(arms: dict[str, Any], against: dict[str, Any], versus: dict[str, Any]) -> str:
    """Two tables in Markdown."""

    def signed(found: list[float]) -> str:
        return f"{found[0]:+.3f} [{found[1]:+.3f}, {found[2]:+.3f}]"

    rows = []
    for name, found in arms.items():
        own = [
            f"{found[key]:.3f}" for key in ("AUC, mean of folds", "mAP", "head mAP", "medium mAP", "tail mAP", "Brier")
        ]
        beside = against.get(name)
        far = [signed(beside[key]) for key in ("macro_auc", "map")] if beside else ["", ""]
        held = [
            f"{found[key]:.3f}" if (key := f"hold-out AUC, {kind}") in found else ""
            for kind in ("best-fold", "refit", "ensemble")
        ]
        rows.append([name, *own, *far, *held, f"{found['epochs']}", f"{found['seconds']:.0f}"])
    head = ["arm", "AUC", "mAP", "frequent", "medium", "rare", "Brier", "AUC - published", "mAP - published"]
    text = common.table([*head, "hold-out best fold", "refit", "ensemble", "epochs", "s"], rows)
    more = [
        [f"tuned - {name}", *(signed(found[key]) for key in ("macro_auc", "map"))] for name, found in versus.items()
    ]
    return f"{text}\n\n{common.table(['', 'AUC', 'mAP'], more)}" if more else text


OPTIONS = {
    "cache": Path,
    "work": Path,
    "seeds": "0,1,2",
    "folds": 5,
    "arms": "",
    "resamples": 1000,
    "device": "cpu",
    "docs": False,
}


if __name__ == "__main__":
    common.run(measure, "quality", __doc__, **OPTIONS)
