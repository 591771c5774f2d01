"""What a sweep expects of its epochs, and how much of it is done, whichever way the folds train."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.activations import build
from cxr_fast.activations.encoder import with_size
from cxr_fast.activations.job import CacheJob
from cxr_fast.config import CacheSpec, SweepOptions, SweepSpec, TrainSpec
from cxr_fast.data.manifest import read_dataset
from cxr_fast.errors import InputError
from cxr_fast.models.backbone import load
from cxr_fast.system.time_left import TimeLeft
from cxr_fast.training import expected_time
from cxr_fast.training.expected_time import (
    EpochTimes,
    MadeUpSearch,
    Pace,
    expect_before_cache,
    expect_holdout,
    unknown_times,
)
from cxr_fast.training.search import Search
from cxr_fast.training.sweep import SweepJob

SPEC = SweepSpec(epochs=(4,), folds=2, train=TrainSpec(batch_size=8))


def times(*, in_turn: bool, epochs: int = 6, folds: int = 3, retrained: bool = True) -> EpochTimes:
    """Two configurations, the second ten times slower, whose first two epochs are short."""
    one = np.where(np.arange(epochs) < 2, 0.1, 1.0)
    return EpochTimes(
        each=np.stack([one, 10 * one]), refit=1.5 * one, retrained=0.2 * one * retrained, folds=folds, in_turn=in_turn
    )


def order(plan: EpochTimes, stops: int | None = None) -> list[tuple[int, int, int]]:
    """Every report of a run as (configuration, fold, epoch), each fold ending after `stops` epochs."""
    configs, epochs = plan.each.shape
    last = min(epochs, stops or epochs)
    out = []
    for c in range(configs):
        parts = (range(plan.folds), range(1, last + 1))
        pairs = itertools.product(*parts) if plan.in_turn else ((k, e) for e in parts[1] for k in parts[0])
        out += [(c, k, e) for k, e in pairs]
    out += [(0, plan.folds, e) for e in range(1, epochs + 1)]
    return out + [(0, plan.folds + 1 + k, e) for e in range(1, epochs + 1) for k in range(plan.folds)]


def followed(plan: EpochTimes, reports: list[tuple[int, int, int]]) -> list[float]:
    """What is done after each report, as the progress line of a sweep counts it."""
    latest: dict[tuple[int, int], int] = {}
    found: dict[tuple[int, bool], int] = {}
    out = []
    for config, fold, epoch in reports:
        others = found.setdefault((config, fold > plan.folds), epoch - 1)
        latest[config, fold] = epoch
        out.append(plan.done(latest, (config, fold), others))
    return out


@pytest.mark.parametrize("in_turn", [True, False])
def test_every_epoch_counts_by_its_time(in_turn: bool) -> None:
    plan = times(in_turn=in_turn)
    reports = order(plan)
    each = [plan.of(config, fold)[epoch - 1] for config, fold, epoch in reports]
    assert followed(plan, reports) == pytest.approx(np.cumsum(each))
    assert plan.total == pytest.approx(sum(each))


@given(in_turn=st.booleans(), skipped=st.integers(0, 60))
def test_a_resumed_run_counts_what_it_finds(in_turn: bool, skipped: int) -> None:
    plan = times(in_turn=in_turn)
    reports = order(plan)
    if not in_turn or reports[min(skipped, len(reports) - 1)][1] > plan.folds:
        skipped -= skipped % plan.folds  # folds that train at once are equally far
    assert followed(plan, reports[skipped:]) == pytest.approx(followed(plan, reports)[skipped:])


def test_a_fold_that_stopped_early_is_done() -> None:
    plan = times(in_turn=True, retrained=False)
    found = followed(plan, order(plan, stops=3))
    assert found == sorted(found)
    assert found[3] == pytest.approx(plan.each[0].sum() + 0.1), "the first epoch of the second fold"
    assert found[-1] == pytest.approx(plan.total)


@given(in_turn=st.booleans(), first=st.floats(0.01, 20), scale=st.floats(0.1, 10))
def test_the_time_left_of_a_grid_is_within_a_factor_of_two(in_turn: bool, first: float, scale: float) -> None:
    """Configurations that differ tenfold, epochs that train the head alone, and a first epoch that also compiles."""
    plan = times(in_turn=in_turn, epochs=20)
    reports = order(plan)
    took = [scale * plan.of(config, fold)[epoch - 1] for config, fold, epoch in reports]
    took[0] *= first
    pace, ends = TimeLeft(0.0, 0), np.cumsum(took)
    for done, now in zip(followed(plan, reports), ends, strict=True):
        pace.report(float(now), done, plan.total)
        said, real = pace.seconds(plan.total), ends[-1] - now
        assert said is not None
        if done >= plan.total / 10:
            assert real / 2 - 1e-6 <= said <= 2 * real + 1e-6


def test_the_times_follow_from_a_few_steps(toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def measure(search: Search, train: TrainSpec) -> Pace:
        timed.append(search.depth(train))
        assert train.head_first == 0
        return Pace(trained=1.0 + search.depth(train), scored=0.5)

    monkeypatch.setattr(expected_time, "_measure", measure)
    options = SweepOptions(device="cpu", grid=("head_first=0,3",))
    job = SweepJob(toy_cache, tmp_path / "run", SPEC, options)
    plan, data, depth = job.plan(), job.data, job.unfreeze_blocks
    trained, scored = (np.mean([len(part(k)) for k in range(2)]) for part in (data.train, data.valid))
    assert depth > 0
    assert sorted(timed) == [0, depth], "one measurement for each number of trained blocks"
    whole, head = (1 + depth) * trained + 0.5 * scored, trained + 0.5 * scored
    assert plan.times.each == pytest.approx(np.array([[whole] * 4, [head] * 3 + [whole]]))
    assert plan.times.refit == pytest.approx((1 + depth) * (data.assignment >= 0).sum() * np.ones(4))
    assert plan.seconds == pytest.approx(plan.times.total)
    assert plan.times.in_turn
    assert not plan.times.retrained.any()
    again = SweepJob(toy_cache, tmp_path / "again", replace(SPEC, retrain_head="balanced"), SweepOptions(device="cpu"))
    assert again.plan().times.retrained.sum() == pytest.approx(0.5 * len(data.rows) * again.activations.views)
    heads = SweepJob(
        toy_cache, tmp_path / "head", replace(SPEC, train=TrainSpec(train_blocks=0)), SweepOptions(device="cpu")
    )
    assert not heads.plan().times.in_turn, "heads train side by side"


def job_of(films: Path, **spec: Any) -> CacheJob:
    tower = load("random:0:test_vit")
    made = with_size(CacheSpec(weights=tower.source, **spec), tower)
    return CacheJob(manifest=read_dataset(films), backbone=tower, spec=made, out=Path("unused.h5"), device="cpu")


def test_a_sweep_is_expected_before_its_cache_is_made(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same steps are counted as once the cache is there, but for how groups fall into parts."""
    job = job_of(phantoms)
    build.run(replace(job, out=tmp_path / "c.h5"))
    monkeypatch.setattr(expected_time, "_measure", lambda search, train: Pace(trained=1.0, scored=0.5))
    for spec in (SPEC, replace(SPEC, folds=5, holdout=0.0), replace(SPEC, final="refit", retrain_head="balanced")):
        known = SweepJob(tmp_path / "c.h5", tmp_path / "run", spec, SweepOptions(device="cpu")).plan().seconds
        expected = expect_before_cache(job, spec, [spec.train], torch.device("cpu"))
        assert expected == pytest.approx(known, rel=0.1)


@pytest.mark.parametrize("fields", [{}, {"train_blocks": 0}, {"train_blocks": 1}, {"head_first": 1}])
@pytest.mark.parametrize("cut", [0, 2])
def test_steps_are_timed_on_made_up_activations(phantoms: Path, fields: dict[str, int], cut: int) -> None:
    train = TrainSpec(batch_size=8, precision="float32", **fields)
    job, spec = job_of(phantoms, unfreeze_blocks=cut), replace(SPEC, train=train)
    if cut == 0 and (fields.get("train_blocks") or fields.get("head_first")):
        with pytest.raises(InputError, match=r"--train-blocks|--head-first"):
            expect_before_cache(job, spec, [train], torch.device("cpu"))
        return
    search = MadeUpSearch(job, spec, [train], torch.device("cpu"))
    held = search.activations.array
    assert held.shape[1:] == job.shape[1:]
    assert held.strides[0] == 0, "one row in memory"
    assert search.inputs(train).array.shape == (search.count, *job.shape[1:]) or search.depth(train) == 0
    frozen = search.frozen_seconds(train)
    assert (frozen > 0) == (search.depth(train) < cut or bool(train.head_first))
    assert np.isfinite(expect_before_cache(job, spec, [train], torch.device("cpu")))


def test_the_column_split_says_how_many_are_held_out(phantoms: Path) -> None:
    films = read_dataset(phantoms, limit=10)
    assert expect_holdout(films, SPEC) == pytest.approx(0.2 * len(films))
    words = ("holdout",) * 3 + ("train",) * 5 + ("",) * (len(films) - 8)
    assert expect_holdout(replace(films, splits=words), SPEC) == 3
    assert expect_holdout(replace(films, splits=words), replace(SPEC, split="drawn")) == pytest.approx(0.2 * len(films))
    free = ("train",) * 5 + ("",) * (len(films) - 5)
    assert expect_holdout(replace(films, splits=free), SPEC) == pytest.approx(0.2 * (len(films) - 5))


def test_a_device_that_is_not_here_has_epochs_of_one_length() -> None:
    plan = unknown_times(2, 5, 3, refit=True, retrained=False)
    assert plan.total == 2 * 3 * 5 + 5
