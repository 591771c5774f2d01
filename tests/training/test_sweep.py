"""Who trains on what, who chooses by what, and whether the run folder says what happened."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from cxr_fast.activations import file as store
from cxr_fast.activations.encoder import normalise, with_size
from cxr_fast.activations.file import ActivationFile
from cxr_fast.activations.loader import Activations
from cxr_fast.config import CacheSpec, PreprocessSpec, SweepOptions, SweepSpec, TrainSpec, from_dict
from cxr_fast.data.images import load
from cxr_fast.errors import InputError, SchemaError
from cxr_fast.metrics import calibration
from cxr_fast.models import backbone
from cxr_fast.models.tail import Tail, head_parameters
from cxr_fast.training import dataset, finish, operating_points, sweep
from cxr_fast.training.checkpoints import Journal
from cxr_fast.training.final_models import choose
from cxr_fast.training.folds.fold import Epoch, Fold, Snapshot
from cxr_fast.training.run_folder import clean, read_run
from cxr_fast.training.run_record import provenance
from cxr_fast.training.sweep import SweepJob, _put_in_place
from tests.helpers import children
from tests.helpers.runs import arrays

FAST = TrainSpec(lr=1e-3, batch_size=8)
ON_CPU = SweepOptions(device="cpu")
TOY = TrainSpec(lr=1e-3, batch_size=4)
SPEC = SweepSpec(epochs=(4, 5, 6), folds=3, train=TOY)  # what `toy_run` was made with
SMALL = SweepSpec(epochs=(1,), folds=2, train=FAST)
# Activations are stored as float16 (2**-11 of a value) and pass two blocks and a head of batch norm.
FLOAT16 = 2e-3


def info(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def table(run: Path, name: str) -> list[dict[str, str]]:
    with open(run / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def own_cache(toy_cache: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copy(toy_cache, tmp_path / "own.h5")


# ------------------------------------------------------------------------------------ who sees which image


def test_no_group_is_in_two_parts(toy_run: Path) -> None:
    saved = arrays(toy_run)
    parts: dict[str, set[int]] = {}
    for group, fold in zip(saved["group"], saved["fold"], strict=True):
        parts.setdefault(str(group), set()).add(int(fold))
    assert all(len(places) == 1 for places in parts.values())
    assert set.union(*parts.values()) == {-1, 0, 1, 2}
    assert len(parts) < len(saved["group"]), "no patient has two images: this test shows nothing"


def test_the_same_groups_do_meet_when_images_are_split(toy_cache: Path, tmp_path: Path) -> None:
    """Shows that the test above can fail."""
    by_image = dataset.read(toy_cache, dataclasses.replace(SPEC, split_by="image"))
    groups = np.array(by_image.file.header.groups)[by_image.rows]
    assert any(len(set(by_image.assignment[groups == g])) > 1 for g in groups)


def test_a_failed_image_is_neither_trained_on_nor_scored(
    own_cache: Path, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ActivationFile(own_cache)
    failed = np.flatnonzero(~file.ok)
    assert len(failed) == 1
    name = file.header.images[failed[0]]
    assert name not in set(arrays(toy_run)["image"])
    assert info(toy_run)["images"] == {
        "in": len(file.ok),
        "failed": 1,
        "used": len(file.ok) - 1,
        "holdout": int((arrays(toy_run)["fold"] == -1).sum()),
        "groups": len({g for g, ok in zip(file.header.groups, file.ok, strict=True) if ok}),
    }
    # Its row and its labels may hold anything: poison both.
    with h5py.File(own_cache, "r+") as h5:
        h5["activations"][failed[0]] = np.nan
        h5["labels"][failed[0]] = 1
    seen: set[int] = set()
    gather = Activations.gather

    def spy(self: Activations, rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        seen.update(rows.tolist())
        return gather(self, rows, views)

    monkeypatch.setattr(Activations, "gather", spy)
    SweepJob(own_cache, tmp_path / "again", SPEC, ON_CPU).run()
    assert seen == set(np.flatnonzero(file.ok).tolist())
    same_numbers(tmp_path / "again", toy_run)


def same_numbers(a: Path, b: Path) -> None:
    """Two runs bit for bit: every array, the weights, and what was chosen."""
    one, two = arrays(a), arrays(b)
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].dtype == two[key].dtype
        assert one[key].tobytes() == two[key].tobytes(), key
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    for key in ("chosen", "thresholds", "metrics", "folds", "budgets", "model_sha256"):
        assert info(a)[key] == info(b)[key], key


def test_another_seed_gives_another_run(toy_cache: Path, tmp_path: Path) -> None:
    """Shows that `same_numbers` can fail; the same seed is compared with `toy_run` above."""
    for seed in (0, 1):
        SweepJob(toy_cache, tmp_path / str(seed), dataclasses.replace(SMALL, seed=seed), ON_CPU).run()
    with pytest.raises(AssertionError):
        same_numbers(tmp_path / "0", tmp_path / "1")


def test_each_fold_trains_on_the_other_folds_and_nothing_else(toy_cache: Path) -> None:
    data = dataset.read(toy_cache, SPEC)
    held = set(data.valid(-1).tolist())
    for k in range(SPEC.folds):
        train, valid = set(data.train(k).tolist()), set(data.valid(k).tolist())
        assert not train & valid
        assert not (train | valid) & held
        assert train | valid | held == set(data.rows.tolist())


# --------------------------------------------------------------------- one search is several, bit for bit


@pytest.mark.parametrize("patience", [None, 2])
def test_a_search_over_three_budgets_is_three_searches(patience: int | None, toy_cache: Path, tmp_path: Path) -> None:
    """Checkpoints and validation figures, with the scheduler at work and, once, with early stopping."""
    train = dataclasses.replace(FAST, patience=patience, plateau_patience=0)
    spec, kept = dataclasses.replace(SPEC, epochs=(2, 4, 6), folds=2, train=train), {}
    save = Journal.save_snapshot

    def spy(self: Journal, key: str, snapshot: Snapshot) -> None:
        kept[self.folder.name, key, snapshot.budget] = snapshot
        save(self, key, snapshot)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "save_snapshot", spy)
        SweepJob(toy_cache, tmp_path / "all", spec, ON_CPU).run()
        for budget in spec.epochs:
            one = dataclasses.replace(spec, epochs=(budget,))
            SweepJob(toy_cache, tmp_path / str(budget), one, ON_CPU).run()
    whole = arrays(tmp_path / "all")["out_of_fold"]
    stopped = set()
    for i, budget in enumerate(spec.epochs):
        np.testing.assert_array_equal(arrays(tmp_path / str(budget))["out_of_fold"][0], whole[i])
        rows = zip(info(tmp_path / "all")["folds"], info(tmp_path / str(budget))["folds"], strict=True)
        assert all(a[f"auc_{budget}"] == b[f"auc_{budget}"] for a, b in rows)
        for k in range(spec.folds):
            long, short = (kept[f"{name}.partial", f"config0.fold{k}", budget] for name in ("all", str(budget)))
            assert long.epoch == short.epoch
            assert all(torch.equal(tensor, short.state[name]) for name, tensor in long.state.items())
            stopped.add(long.epoch)
    assert len({row["lr"] for row in table(tmp_path / "all", "history.csv")}) > 1, "the scheduler never acted"
    assert (stopped == {2, 4, 6}) == (patience is None), "early stopping never acted, or did uncalled"


def test_the_three_residencies_give_the_same_run(toy_cache: Path, toy_run: Path, tmp_path: Path) -> None:
    """After a plan, which `toy_run` had none of: planning changes no result."""
    for residency in ("device", "stream"):
        job = SweepJob(toy_cache, tmp_path / residency, SPEC, SweepOptions(device="cpu", residency=residency))
        assert job.plan().where in ("copied to cpu", "read ahead from the file")
        job.run()
        same_numbers(tmp_path / residency, toy_run)


# ---------------------------------------------------------------------------------------- configurations


def test_a_grid_tries_every_configuration_and_keeps_the_best(toy_cache: Path, tmp_path: Path) -> None:
    spec = dataclasses.replace(SMALL, epochs=(1, 2))
    flags = ["lr=1e-3,1e-5", "focal_gamma=1,2"]
    run = SweepJob(toy_cache, tmp_path / "grid", spec, SweepOptions(grid=flags, device="cpu")).run()
    alone = []
    for lr, gamma in [(1e-3, 1.0), (1e-3, 2.0), (1e-5, 1.0), (1e-5, 2.0)]:
        train = dataclasses.replace(FAST, lr=lr, focal_gamma=gamma)
        out = tmp_path / f"{lr}-{gamma}"
        one = SweepJob(toy_cache, out, dataclasses.replace(spec, train=train), ON_CPU).run()
        best = max(one["budgets"], key=lambda b: b["mean_auc"])
        alone.append((lr, gamma, best["epochs"], best["mean_auc"], best["std_auc"]))
    rows = [(r["lr"], r["focal_gamma"], r["epochs"], r["mean_auc"], r["std_auc"]) for r in run["grid"]]
    assert rows == sorted(alone, key=lambda row: -row[3]), "best first, each as if it had been run alone"
    assert [r["chosen"] for r in run["grid"]] == [True, False, False, False]
    assert all(r["seconds"] > 0 for r in run["grid"])
    assert (run["train"]["lr"], run["train"]["focal_gamma"]) == rows[0][:2]
    winner = f"{rows[0][0]}-{rows[0][1]}"
    np.testing.assert_array_equal(arrays(tmp_path / "grid")["out_of_fold"], arrays(tmp_path / winner)["out_of_fold"])
    assert info(tmp_path / "grid")["model_sha256"] == info(tmp_path / winner)["model_sha256"]
    assert [row["config"] for row in table(tmp_path / "grid", "grid.csv")] == [str(r["config"]) for r in run["grid"]]


def test_a_grid_goes_on_where_it_stopped(toy_cache: Path, tmp_path: Path) -> None:
    flags, spec = ["lr=1e-3,1e-4"], dataclasses.replace(SMALL, epochs=(1, 2))
    SweepJob(toy_cache, tmp_path / "straight", spec, SweepOptions(grid=flags, device="cpu")).run()

    class Stop(Exception):
        pass

    def stop(config: int, fold: int, epoch: Epoch) -> None:
        if (config, fold, epoch.epoch) == (1, 1, 1):
            raise Stop

    with pytest.raises(Stop):
        SweepJob(toy_cache, tmp_path / "run", spec, SweepOptions(grid=flags, device="cpu")).run(stop)
    told: list[tuple[int, int, int]] = []
    job = SweepJob(toy_cache, tmp_path / "run", spec, SweepOptions(grid=flags, device="cpu"))
    job.run(lambda config, fold, epoch: told.append((config, fold, epoch.epoch)))
    assert told[0] == (1, 1, 2)
    same_numbers(tmp_path / "run", tmp_path / "straight")


# ------------------------------------------------------------------------------------------ the final model


def test_the_three_finals_are_what_they_say(toy_cache: Path, toy_run: Path, tmp_path: Path) -> None:
    """The same search whichever is asked for; the hold-out figures of all three in each; the model is the one asked."""
    base, runs = info(toy_run), {}
    for kind in ("refit", "ensemble"):
        SweepJob(toy_cache, tmp_path / kind, dataclasses.replace(SPEC, final=kind), ON_CPU).run()
        runs[kind] = info(tmp_path / kind)
        for key in ("folds", "budgets", "chosen", "thresholds", "finals"):
            assert runs[kind][key] == base[key], (kind, key)
        assert runs[kind]["metrics"]["holdout"] == base["finals"][kind]
    assert base["metrics"]["holdout"] == base["finals"]["best-fold"]
    assert list(base["finals"]) == ["best-fold", "refit", "ensemble"]
    assert len({json.dumps(found) for found in base["finals"].values()}) == 3
    assert runs["ensemble"]["final"]["members"] == ["fold0", "fold1", "fold2"]
    saved, held = arrays(tmp_path / "ensemble"), arrays(toy_run)["fold"] == -1
    np.testing.assert_array_equal(saved["final"][held], saved["holdout_ensemble"])
    np.testing.assert_array_equal(arrays(toy_run)["holdout_ensemble"], saved["holdout_ensemble"])
    members = [[member] for member in read_run(tmp_path / "ensemble").members]
    assert len(members) == 3


def test_the_refit_trains_on_all_folds_at_their_median_rates(toy_cache: Path, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    run_epoch = Fold.run_epoch

    def spy(self: Fold, *arguments: Any) -> Epoch:
        epoch = run_epoch(self, *arguments)
        if self.rates is not None:
            seen.setdefault("rates", []).append(epoch.lr)
            seen["rows"] = sorted(self.train_rows.tolist())
        return epoch

    train = dataclasses.replace(FAST, plateau_patience=0)
    spec = dataclasses.replace(SPEC, epochs=(5,), train=train)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fold, "run_epoch", spy)
        SweepJob(toy_cache, tmp_path / "run", spec, ON_CPU).run()
    history = table(tmp_path / "run", "history.csv")
    rates = [float(np.median([float(r["lr"]) for r in history if r["epoch"] == str(e)])) for e in range(1, 6)]
    assert seen["rates"] == pytest.approx(rates, rel=1e-12)
    data = dataset.read(toy_cache, spec)
    assert seen["rows"] == data.rows[data.assignment >= 0].tolist()


@pytest.mark.parametrize("target", ["sensitivity=0.9", "specificity=0.8"])
def test_thresholds_reach_their_target_out_of_fold(target: str, toy_cache: Path, tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, epochs=(1, 2), train=FAST, threshold_target=target, calibration="platt")
    SweepJob(toy_cache, tmp_path / "run", spec, ON_CPU).run()
    run, saved = info(tmp_path / "run"), arrays(tmp_path / "run")
    dev = saved["fold"] >= 0
    raw = saved["out_of_fold"][spec.epochs.index(run["chosen"]["epochs"])][dev]
    probs, labels = calibration.apply(run["calibration"], raw), saved["labels"][dev]
    name, value = target.split("=")
    reached = 0
    for c, limit in enumerate(run["thresholds"]):
        own = labels[:, c] == (1 if name == "sensitivity" else 0)
        if own.any():
            right = (probs[own, c] >= limit) == (name == "sensitivity")
            assert right.mean() >= float(value) - 1e-9
            reached += 1
        else:
            assert limit == 0.5
    assert reached > 5
    assert run["calibration"]["kind"] == "platt"
    held = saved["fold"] == -1
    found = operating_points.compute_figures(
        saved["labels"][held],
        calibration.apply(run["calibration"], saved["final"][held]),
        np.array(run["thresholds"]),
        saved["labels"][~held],
    )
    assert clean(found) == run["metrics"]["holdout"]


def test_norm_and_projection_are_trained_counted_and_kept(
    toy_cache: Path, lively_weights: Path, tmp_path: Path
) -> None:
    train = dataclasses.replace(FAST, train_norm=True)
    run = SweepJob(toy_cache, tmp_path / "run", dataclasses.replace(SMALL, train=train), ON_CPU).run()
    assert run["trainable"]["norm"] == 2 * 64 + 64 * 512
    assert run["trainable"]["total"] == sum(run["trainable"][part] for part in ("blocks", "head", "norm"))
    tower = backbone.load(str(lively_weights)).visual.state_dict()
    trained = read_run(tmp_path / "run").visual.state_dict()
    moved = {name.rpartition(".")[0] for name in tower if not torch.equal(tower[name], trained[name])}
    assert {"trunk.norm", "head.proj"} <= moved
    assert not any(name.startswith(("trunk.patch_embed", "trunk.blocks.0.")) for name in moved)


# --------------------------------------------------------------------------------------- what is chosen


def test_budget_by_mean_over_folds_then_the_best_fold_there() -> None:
    nan = np.nan
    assert choose(np.array([[0.9, 0.5], [0.75, 0.8]])) == (1, 1)  # fold 0 of budget 0 is the best cell, and loses
    assert choose(np.array([[0.5, 0.7], [0.7, 0.5]])) == (0, 1)  # a tie goes to the smaller budget
    assert choose(np.array([[0.5, 0.5], [0.4, 0.4]])) == (0, 0)
    assert choose(np.array([[nan, 0.6], [0.5, 0.6]])) == (0, 1)


def test_the_choice_follows_from_the_saved_validation_predictions(toy_run: Path) -> None:
    run, saved = info(toy_run), arrays(toy_run)
    scores = np.array(
        [
            [macro_auc(saved["labels"][saved["fold"] == k], saved["out_of_fold"][b][saved["fold"] == k])[0]]
            for b in range(3)
            for k in range(3)
        ]
    ).reshape(3, 3)
    means = scores.mean(axis=1)
    budget = int(means.argmax())
    assert run["chosen"]["epochs"] == SPEC.epochs[budget]
    assert run["chosen"]["fold"] == int(scores[budget].argmax())
    for b, row in enumerate(run["budgets"]):
        assert row["epochs"] == SPEC.epochs[b]
        assert row["mean_auc"] == pytest.approx(means[b], abs=1e-12)
        assert row["std_auc"] == pytest.approx(scores[b].std(), abs=1e-12)
        assert row["chosen"] is (b == budget)
    for k, row in enumerate(run["folds"]):
        assert [row[f"auc_{e}"] for e in SPEC.epochs] == pytest.approx(scores[:, k].tolist(), abs=1e-12)
        assert row["best"] is (k == run["chosen"]["fold"])
        assert row["images"] == int((saved["fold"] == k).sum())


def test_the_hold_out_labels_change_nothing_but_the_hold_out_figures(
    own_cache: Path, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, file = arrays(toy_run), ActivationFile(own_cache)
    held = np.flatnonzero(file.ok)[saved["fold"] == -1]
    with h5py.File(own_cache, "r+") as h5:
        labels = h5["labels"][:]
        labels[held] = np.where(labels[held] < 0, labels[held], 1 - labels[held])
        h5["labels"][:] = labels
    # The split itself looks at the labels (it spreads them), so it is held where it was.
    monkeypatch.setattr(dataset, "split", lambda *_, **__: saved["fold"])
    SweepJob(own_cache, tmp_path / "run", SPEC, ON_CPU).run()
    before, after = info(toy_run), info(tmp_path / "run")
    for key in ("chosen", "thresholds", "model_sha256", "budgets", "folds"):
        assert after[key] == before[key], key
    assert after["metrics"]["out_of_fold"] == before["metrics"]["out_of_fold"]
    np.testing.assert_array_equal(arrays(tmp_path / "run")["final"], saved["final"])
    assert after["metrics"]["holdout"] != before["metrics"]["holdout"]


def test_thresholds_are_the_best_f1_on_out_of_fold_predictions(toy_run: Path) -> None:
    run, saved = info(toy_run), arrays(toy_run)
    dev = saved["fold"] >= 0
    probs = saved["out_of_fold"][SPEC.epochs.index(run["chosen"]["epochs"])][dev].astype(np.float64)
    compared = 0
    for c, limit in enumerate(run["thresholds"]):
        known = saved["labels"][dev, c] >= 0
        truth, p = saved["labels"][dev, c][known] == 1, probs[known, c]
        if truth.all() or not truth.any():
            assert limit == 0.5
            continue
        compared += 1
        best = max(f1(truth, p >= t) for t in p)
        assert f1(truth, p >= limit) == pytest.approx(best, abs=1e-12)
    assert compared > 5


# --------------------------------------------------------------------- what was predicted, by a slower road


def test_out_of_fold_probabilities_are_those_of_each_folds_snapshot(
    toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every image's prediction comes from the fold that did not train on it; recomputed one image at a time, with
    whole blocks instead of the class token alone."""
    kept: dict[tuple[str, int], Snapshot] = {}
    save = Journal.save_snapshot

    def spy(self: Journal, key: str, snapshot: Snapshot) -> None:
        kept[key, snapshot.budget] = snapshot
        save(self, key, snapshot)

    monkeypatch.setattr(Journal, "save_snapshot", spy)
    spec = dataclasses.replace(SPEC, epochs=(3, 4))
    job = SweepJob(toy_cache, tmp_path / "run", spec, ON_CPU)
    job.run()
    saved, file = arrays(tmp_path / "run"), ActivationFile(toy_cache)
    rows = np.flatnonzero(file.ok)
    assert np.isnan(saved["out_of_fold"][:, saved["fold"] == -1]).all(), "the hold-out has no out-of-fold prediction"
    assert len(kept) == 3 * 2 + 1, "three folds, two budgets, and the refit"
    for (key, budget), snapshot in kept.items():
        if key == "config0.refit":
            continue
        k = int(key.removeprefix("config0.fold"))
        tail = Tail(job.backbone.visual, unfreeze_blocks=2, classes=35)
        tail.load_state_dict(snapshot.state)
        tail.eval()
        for place in np.flatnonzero(saved["fold"] == k)[::3]:
            expected = one_by_one(tail, file.activations[rows[place], 0])
            found = saved["out_of_fold"][spec.epochs.index(budget), place]
            np.testing.assert_allclose(found, expected, atol=1e-5)


def one_by_one(tail: Tail, row: np.ndarray) -> np.ndarray:
    """Probabilities (C,) of one image's stored tokens (T, D), by torch's own modules."""
    with torch.inference_mode():
        x = torch.from_numpy(row.astype(np.float32))[None]
        for block in tail.blocks:
            x = block(x)
        x = tail.projection(tail.fc_norm(tail.norm(x)[:, 0]))
        return torch.sigmoid(tail.head(x / x.norm(dim=-1, keepdim=True)))[0].numpy()


def test_final_probabilities_are_the_whole_towers_on_the_pixels(toy_run: Path, toy_data: Path) -> None:
    """From the file and open_clip's own tower, as somebody would who knows nothing of caches."""
    run, saved = read_run(toy_run), arrays(toy_run)
    assert saved["final"].shape == (len(saved["image"]), 35)
    spec = from_dict(PreprocessSpec, run.info["preprocess"])
    assert spec.size == 160
    pixels = [load(toy_data / "images" / Path(str(image)).name, spec) for image in saved["image"]]
    assert [found.sha256 for found in pixels] == saved["sha256"].tolist()
    mean, std = (torch.tensor(run.info[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    x = normalise(torch.from_numpy(np.stack([found.pixels for found in pixels])), mean, std)
    slow = np.concatenate([run.raw_probabilities(part) for part in x.split(16)])
    difference = np.abs(slow - saved["final"]).max()
    assert 0 < difference < FLOAT16
    # The tolerance would show another fold's weights or a flipped image: classes differ by far more.
    assert saved["final"].std(axis=0).max() > 5 * FLOAT16


def test_the_final_model_is_the_chosen_folds(toy_run: Path) -> None:
    """On its own validation images the final model says what the chosen fold said; on another fold's it does not."""
    run, saved = info(toy_run), arrays(toy_run)
    budget, fold = SPEC.epochs.index(run["chosen"]["epochs"]), run["chosen"]["fold"]
    own, other = saved["fold"] == fold, saved["fold"] == (fold + 1) % 3
    np.testing.assert_allclose(saved["final"][own], saved["out_of_fold"][budget][own], atol=1e-6)
    assert np.abs(saved["final"][other] - saved["out_of_fold"][budget][other]).max() > 1e-3


def test_the_run_is_the_same_from_a_cache_of_embeddings(toy_data: Path, tmp_path: Path) -> None:
    """Nothing unfrozen: the head alone trains, and the folder holds the tower as it was."""
    from cxr_fast.activations import build
    from cxr_fast.activations.job import CacheJob
    from cxr_fast.data import manifest

    tower = backbone.load("random:0:test_vit")
    spec = with_size(CacheSpec(weights="random:0:test_vit", unfreeze_blocks=0), tower)
    images, out = manifest.read_dataset(toy_data), tmp_path / "e.h5"
    build.run(CacheJob(manifest=images, backbone=tower, spec=spec, out=out, device="cpu", workers=1))
    run = SweepJob(out, tmp_path / "run", SMALL, ON_CPU).run()
    assert run["trainable"] == {"blocks": 0, "head": 404_515, "total": 404_515}
    assert backbone.tower_sha256(read_run(tmp_path / "run").visual) == run["cache"]["tower_sha256"]


# ------------------------------------------------------------------------------------------- the figures


def f1(truth: np.ndarray, called: np.ndarray) -> float:
    both = int((truth & called).sum())
    return 2 * both / (2 * both + int((truth & ~called).sum()) + int((~truth & called).sum()))


def macro_auc(labels: np.ndarray, probs: np.ndarray) -> tuple[float, int]:
    """scikit-learn's, class by class, where a class has both kinds."""
    found = []
    for truth, p in zip(labels.T, probs.T, strict=True):
        if {0, 1} <= set(truth[truth >= 0].tolist()):
            found.append(roc_auc_score(truth[truth >= 0], p[truth >= 0]))
    return float(np.mean(found)), len(found)


def published(labels: np.ndarray, probs: np.ndarray, limits: np.ndarray) -> dict[str, float]:
    """The six figures by scikit-learn and plain loops, unknown labels left out one by one."""
    right = total = 0
    jaccards, f1s, precisions, samples = [], [], [], []
    for c in range(labels.shape[1]):
        known = labels[:, c] >= 0
        truth, p = labels[known, c] == 1, probs[known, c]
        called = p >= limits[c]
        right += int((truth == called).sum())
        total += len(truth)
        if truth.any():
            jaccards.append((truth & called).sum() / (truth | called).sum())
            f1s.append(f1(truth, called))
        if truth.any() and not truth.all():
            precisions.append(average_precision_score(truth, p))
    for truth, p in zip(labels, probs, strict=True):
        yes = {c for c in range(len(truth)) if truth[c] == 1}
        called = {c for c in range(len(truth)) if truth[c] >= 0 and p[c] >= limits[c]}
        if (truth >= 0).any():
            samples.append(len(yes & called) / len(yes | called) if yes | called else 1.0)
    return {
        "label_accuracy": right / total,
        "macro_auc": macro_auc(labels, probs)[0],
        "sample_jaccard": float(np.mean(samples)),
        "class_jaccard": float(np.mean(jaccards)),
        "macro_f1": float(np.mean(f1s)),
        "map": float(np.mean(precisions)),
    }


@pytest.mark.parametrize("part", ["out_of_fold", "holdout"])
def test_the_six_published_figures_are_scikit_learns(toy_run: Path, part: str) -> None:
    run, saved = info(toy_run), arrays(toy_run)
    held = saved["fold"] == -1
    budget = SPEC.epochs.index(run["chosen"]["epochs"])
    rows, probs = (held, saved["final"]) if part == "holdout" else (~held, saved["out_of_fold"][budget])
    labels, probs, limits = saved["labels"][rows], probs[rows].astype(np.float64), np.array(run["thresholds"])
    assert (labels == -1).any()
    found = run["metrics"][part]
    expected = published(labels, probs, limits)
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-9)
    half = published(labels, probs, np.full(35, 0.5))
    assert {key: found["at_0.5"][key] for key in half} == pytest.approx(half, abs=1e-9)
    assert (found["n"], found["classes_total"]) == (int(rows.sum()), 35)
    assert found["classes_defined"] == macro_auc(labels, probs)[1] < 35


def test_run_json_is_json(toy_run: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    text = (toy_run / "run.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=refuse)  # NaN, Infinity, -Infinity
    assert "null" in text


def test_classes_without_a_positive_have_no_auc_and_are_counted(toy_run: Path) -> None:
    run, saved = info(toy_run), arrays(toy_run)
    held = saved["labels"][saved["fold"] == -1]
    assert [row["class"] for row in run["per_class"]] == run["classes"]
    for c, row in enumerate(run["per_class"]):
        positives, negatives = int((held[:, c] == 1).sum()), int((held[:, c] == 0).sum())
        assert (row["positives"], row["negatives"]) == (positives, negatives)
        assert (row["auc"] is None) == (row["ap"] is None) == (not positives or not negatives)
        if not positives:
            assert (row["f1"], row["jaccard"], row["tier"]) == (None, None, "insufficient data")
    undefined = sum(row["auc"] is None for row in run["per_class"])
    assert 0 < undefined == 35 - run["metrics"]["holdout"]["classes_defined"]


def test_the_tables_repeat_run_json(toy_run: Path) -> None:
    run, saved = info(toy_run), arrays(toy_run)
    assert [int(row["fold"]) for row in table(toy_run, "folds.csv")] == [0, 1, 2]
    assert [row["class"] for row in table(toy_run, "per_class.csv")] == run["classes"]
    history = table(toy_run, "history.csv")
    lines = [(int(row["fold"]), int(row["epoch"])) for row in history]
    assert lines == [(k, epoch) for k in range(3) for epoch in range(1, 7)]
    split = {row["class"]: row for row in table(toy_run, "split.csv")}
    for c, name in enumerate(run["classes"]):
        for k, column in [(0, "fold_0"), (1, "fold_1"), (2, "fold_2"), (-1, "holdout")]:
            assert int(split[name][column]) == int((saved["labels"][saved["fold"] == k, c] == 1).sum())
    assert int(split["(images)"]["total"]) == len(saved["image"])


def test_what_is_trained_is_counted_and_stored(toy_run: Path, lively_weights: Path) -> None:
    """Two blocks of width 64 and the head; and those, and no others, differ from the tower they came from."""
    run = read_run(toy_run)
    # A plain ViT block: qkv and projection, two layer norms, an MLP of 192, all with biases.
    block = (4 * 64 * 64 + 4 * 64) + 4 * 64 + (2 * 64 * 192 + 64 + 192)
    blocks, head = 2 * block, head_parameters(512, 35)
    counts, own = run.info["trainable"], ("trunk.blocks.4.", "trunk.blocks.5.")
    tower, trained = backbone.load(str(lively_weights)).visual.state_dict(), run.visual.state_dict()
    assert {n for n in tower if not torch.equal(tower[n], trained[n])} == {n for n in tower if n.startswith(own)}
    assert counts["blocks"] == sum(tower[n].numel() for n in tower if n.startswith(own))
    assert counts["head"] == sum(p.numel() for p in run.head.parameters())
    assert counts == {"blocks": blocks, "head": head, "total": blocks + head}


def test_the_plan_says_what_happens(toy_cache: Path, toy_run: Path, tmp_path: Path) -> None:
    plan, run = SweepJob(toy_cache, tmp_path / "run", SPEC, ON_CPU).plan(), info(toy_run)
    assert (plan.images, plan.failed, plan.groups) == tuple(run["images"][k] for k in ("used", "failed", "groups"))
    assert (plan.holdout_images, plan.trainable) == (run["images"]["holdout"], run["trainable"])
    assert (plan.precision, plan.seconds > 0) == (run["precision"], True)
    assert not (tmp_path / "run").exists()


def test_random_weights_and_drawn_images_are_said(toy_run: Path) -> None:
    run = info(toy_run)
    assert (run["random_weights"], run["provenance"]) == (False, "phantom images")
    real = {"random_weights": False, "dataset": {"name": "iu", "synthetic": False}}
    drawn = {"name": "phantom", "synthetic": True}
    assert provenance(real) == ""
    assert provenance({**real, "random_weights": True}) == "random backbone"
    assert provenance({"random_weights": True, "dataset": drawn}) == "random backbone, phantom images"


def test_without_a_hold_out(toy_cache: Path, tmp_path: Path) -> None:
    SweepJob(toy_cache, tmp_path / "run", dataclasses.replace(SMALL, holdout=0.0), ON_CPU).run()
    run, saved = info(tmp_path / "run"), arrays(tmp_path / "run")
    assert set(saved["fold"]) == {0, 1}
    assert (run["images"]["holdout"], run["metrics"]["holdout"], run["per_class"]) == (0, None, [])
    assert run["metrics"]["out_of_fold"]["n"] == len(saved["fold"])
    assert not np.isnan(saved["out_of_fold"]).any()


# ------------------------------------------------------------------------------------------- the folder


def test_a_full_disk_is_one_line_and_costs_no_epoch(
    toy_cache: Path, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(finish, "save_model", fails)
        with pytest.raises(InputError, match=r"No space left on device.*same command"):
            SweepJob(toy_cache, tmp_path / "run", SPEC, ON_CPU).run()
    assert [path.name for path in tmp_path.iterdir()] == ["run.partial"]
    monkeypatch.setattr(Fold, "run_epoch", lambda *_: 1 / 0)
    SweepJob(toy_cache, tmp_path / "run", SPEC, ON_CPU).run()
    same_numbers(tmp_path / "run", toy_run)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.fixture(scope="module")
def attempt() -> Callable[..., tuple[int, list[Any]]]:
    """Run `children.sweep` as `toy_run` was made, in a process of its own; its exit code and what it told."""
    context = children.server()

    def run(cache: Path, out: Path, number: int, after: int) -> tuple[int, list[Any]]:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=children.sweep, args=(str(cache), str(out), SPEC, number, after, sender))
        process.start()
        sender.close()
        told = []
        with contextlib.suppress(EOFError):
            while True:
                told.append(receiver.recv())
        process.join()
        assert process.exitcode is not None
        return process.exitcode, told

    return run


@pytest.mark.kill
def test_killed_again_and_again_a_sweep_ends_in_the_same_bits(
    attempt: Any, toy_cache: Path, toy_run: Path, tmp_path: Path
) -> None:
    """SIGKILL itself, right after an epoch: the state of that epoch may be lost, one before it may not."""
    out, done, kills, moments = tmp_path / "run", 0, 0, random.Random(0)
    while True:
        code, told = attempt(toy_cache, out, signal.SIGKILL, moments.choice([2, 3, 4, 6]))
        epochs = [6 * fold + epoch for fold, epoch in told]
        assert not epochs or epochs[0] >= done, "an epoch before the last was lost"
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert not out.exists()
        done, kills = epochs[-1], kills + 1
    assert kills >= 4
    same_numbers(out, toy_run)
    assert table(out, "folds.csv") == table(toy_run, "folds.csv")
    lines = [
        [(r["fold"], r["epoch"], r["valid_auc"], r["lr"]) for r in table(run, "history.csv")] for run in (out, toy_run)
    ]
    assert lines[0] == lines[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.kill
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_says_how_to_go_on_and_does(
    attempt: Any, number: int, toy_cache: Path, toy_run: Path, tmp_path: Path
) -> None:
    code, told = attempt(toy_cache, tmp_path / "run", number, 8)
    assert code == 130
    assert told[-1].endswith("run.partial. Run the same command again to go on.")
    assert not (tmp_path / "run").exists()
    code, told = attempt(toy_cache, tmp_path / "run", number, -1)
    assert (code, told[0]) == (0, (1, 3)), "eight epochs of twenty-four were done"
    same_numbers(tmp_path / "run", toy_run)


@pytest.mark.kill
def test_an_unfinished_run_of_another_request_is_named_and_kept(attempt: Any, toy_cache: Path, tmp_path: Path) -> None:
    attempt(toy_cache, tmp_path / "run", signal.SIGKILL, 3)
    before = sorted((tmp_path / "run.partial").rglob("*"))
    other = dataclasses.replace(SPEC, train=dataclasses.replace(TOY, lr=2e-3))
    with pytest.raises(InputError, match=r"unfinished run with lr 0\.001 where this has 0\.002.*--overwrite"):
        SweepJob(toy_cache, tmp_path / "run", other, ON_CPU).run()
    assert sorted((tmp_path / "run.partial").rglob("*")) == before
    SweepJob(toy_cache, tmp_path / "run", SMALL, SweepOptions(device="cpu", overwrite=True)).run()
    assert not (tmp_path / "run.partial").exists()


def test_the_default_name_is_the_first_free_one(
    toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert SweepJob(toy_cache, None, SMALL, ON_CPU).out == Path("exports/toy")
    Path("exports/toy").mkdir(parents=True)
    assert SweepJob(toy_cache, None, SMALL, ON_CPU).out == Path("exports/toy-2")
    Path("exports/toy-2.partial").mkdir()
    Path("exports/toy-2.partial/plan.json").write_text('{"spec": {"folds": 9}}')
    assert SweepJob(toy_cache, None, SMALL, ON_CPU).out == Path("exports/toy-3"), "another request's unfinished run"
    job = SweepJob(toy_cache, None, SMALL, ON_CPU)
    Path("exports/toy-2.partial/plan.json").write_text(json.dumps(job.request()))
    again = SweepJob(toy_cache, None, SMALL, ON_CPU)
    assert again.out == Path("exports/toy-2"), "this request's unfinished run is gone on with"
    assert again.plan().resumed


def test_two_sweeps_to_one_folder_are_refused(toy_cache: Path, tmp_path: Path) -> None:
    second = SweepJob(toy_cache, tmp_path / "run", SMALL, ON_CPU)

    def start_another(*_: Any) -> None:
        with pytest.raises(InputError, match=f"being written by process {os.getpid()}"):
            second.run()

    SweepJob(toy_cache, tmp_path / "run", SMALL, ON_CPU).run(start_another)


def test_an_existing_folder_is_refused_before_anything_is_read(toy_cache: Path, toy_run: Path, tmp_path: Path) -> None:
    for out in (toy_run, tmp_path):
        with pytest.raises(InputError, match=r"--out: .* exists.*--overwrite"):
            SweepJob(toy_cache, out, SMALL, ON_CPU)


def test_overwrite_replaces_a_run_when_the_new_one_is_complete(
    toy_cache: Path, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(toy_run, out)
    (out / "report.html").write_text("of the old run")
    job = SweepJob(toy_cache, out, SMALL, SweepOptions(device="cpu", overwrite=True))
    with monkeypatch.context() as patch:
        patch.setattr(sweep.run_record, "write_run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            job.run()
    same_numbers(out, toy_run)
    job.run()
    assert info(out)["spec"]["epochs"] == [1]
    assert not (out / "report.html").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_overwrite_removes_runs_and_nothing_else(toy_cache: Path, tmp_path: Path) -> None:
    """`--out ~/data --overwrite` must not cost the data."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dear.png").write_bytes(b"!")
    (tmp_path / "notes").write_text("!")
    for out in (tmp_path / "photos", tmp_path / "notes"):
        with pytest.raises(InputError, match="not a run folder"):
            SweepJob(toy_cache, out, SMALL, SweepOptions(device="cpu", overwrite=True))
    (tmp_path / "empty").mkdir()
    SweepJob(toy_cache, tmp_path / "empty", SMALL, SweepOptions(device="cpu", overwrite=True)).run()
    assert (tmp_path / "empty" / "run.json").is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_named(toy_cache: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="--out: cannot write"):
        SweepJob(toy_cache, tmp_path / "run", SMALL, ON_CPU).run()


def test_a_path_below_a_file_is_named(toy_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--out: cannot write"):
        SweepJob(toy_cache, tmp_path / "file" / "run", SMALL, ON_CPU).run()


# ----------------------------------------------------------------------------------------- what is refused


def test_other_weights_than_the_caches_are_refused(toy_cache: Path, tmp_path: Path) -> None:
    for other in ("random:1:test_vit", "random:0:test_vit2"):
        with pytest.raises(InputError, match=rf"--weights {other}: not the weights"):
            SweepJob(toy_cache, tmp_path / "run", SMALL, SweepOptions(device="cpu", weights=other))


def test_fewer_groups_than_folds_are_refused(toy_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--folds") as caught:
        SweepJob(toy_cache, tmp_path / "run", dataclasses.replace(SMALL, folds=40), ON_CPU)
    assert caught.value.exit_code == 2


def test_a_fold_with_nothing_to_score_is_refused_by_name(own_cache: Path, tmp_path: Path) -> None:
    with h5py.File(own_cache, "r+") as h5:
        labels = np.zeros(h5["labels"].shape, np.int8)
        labels[0, 0] = 1  # in one fold alone
        h5["labels"][:] = labels
    spec = dataclasses.replace(SMALL, holdout=0)
    with pytest.raises(InputError, match=r"fold [12]: none of the 35 classes has both"):
        SweepJob(own_cache, tmp_path / "run", spec, ON_CPU).run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(InputError, match="--seed"):
        SweepSpec(seed=seed)


def test_an_unfinished_cache_is_refused(own_cache: Path, tmp_path: Path) -> None:
    with h5py.File(own_cache, "r+") as h5:
        h5["done"][5:9] = store.PENDING
    with pytest.raises(InputError, match=r"4 of \d+ rows are not encoded yet"):
        SweepJob(own_cache, tmp_path / "run", SMALL, ON_CPU)


@pytest.mark.parametrize("damage", ["a weight", "cut short", "empty", "gone", "another run's"])
def test_a_model_that_is_not_the_runs_is_refused(
    toy_run: Path, toy_run_average: Path, tmp_path: Path, damage: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(toy_run, run)
    path = run / "model.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "a weight":  # of the model: the tails that the final model does not consist of are not read
        size = int.from_bytes(data[:8], "little")
        tensors = json.loads(data[8 : 8 + size])
        (member,) = info(run)["final"]["members"]
        data[8 + size + tensors[f"tails.{member}.head.0.weight"]["data_offsets"][0] + 2] ^= 1
        path.write_bytes(data)
    elif damage == "another run's":
        shutil.copy(toy_run_average / "model.safetensors", path)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2 if damage == "cut short" else 0])
    with pytest.raises(InputError, match=r"model\.safetensors: (not the weights|cannot read)") as caught:
        read_run(run)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ('{"kind": "cxr-fast run", "schema": 99, "written_by": "cxr-fast 9.9"}', SchemaError, "99.*cxr-fast 9.9"),
        ('{"kind": "cxr-fast run"}', SchemaError, "schema None"),
        ('{"kind": "other"}', InputError, "not written by"),
        ("[1, 2]", InputError, "not written by"),
        ("{", InputError, "not JSON"),
        ("", InputError, "not JSON"),
        (None, InputError, "no run.json"),
    ],
)
def test_a_run_json_of_another_kind_is_refused(
    tmp_path: Path, text: str | None, error: type[Exception], match: str
) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(error, match=match) as caught:
        read_run(tmp_path)
    assert type(caught.value) is error


def test_a_run_set_aside_by_a_killed_sweep_goes_when_the_next_is_in_place(tmp_path: Path) -> None:
    for name, text in (("new", "new"), ("run", "old"), ("run.old.12", "older"), ("run2.old.12", "of another")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    _put_in_place(tmp_path / "new", tmp_path / "run")
    found = {path.name: (path / "run.json").read_text() for path in tmp_path.iterdir()}
    assert found == {"run": "new", "run2.old.12": "of another"}


def test_a_folder_that_a_user_called_old_stays_beside_a_new_run(tmp_path: Path) -> None:
    kept = {"run", "run.old.backup", "run.old.v2", "run.old.12.keep", "run.old.may.12"}
    for name in ("new", *kept):
        (tmp_path / name).mkdir()
    _put_in_place(tmp_path / "new", tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} == kept
