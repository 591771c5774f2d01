"""Retrained heads as a fourth final model: what they are, when they stop, what a run folder says of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cxr_fast.activations.forward import probabilities, run_blocks
from cxr_fast.cli.main import main
from cxr_fast.config import SweepOptions, SweepSpec, TrainSpec
from cxr_fast.errors import InputError
from cxr_fast.export.entries.settings import ExportSpec
from cxr_fast.export.variants import export_run
from cxr_fast.metrics import figures
from cxr_fast.report.evaluation import evaluate
from cxr_fast.report.writer import write_report
from cxr_fast.training import predictions
from cxr_fast.training.checkpoints import Journal
from cxr_fast.training.final_models import retrained_spec
from cxr_fast.training.folds.fold import Epoch, Fold, FoldData, Snapshot
from cxr_fast.training.folds.head_fold import HeadFold
from cxr_fast.training.folds.loop import Recorder, fit
from cxr_fast.training.run_folder import read_info, read_run, read_run_info
from cxr_fast.training.sweep import SweepJob
from tests.helpers.runs import arrays, same_numbers
from tests.helpers.toys import keep

# Paths are compared to rounding of float32, which a CPU that trains blocks in bfloat16 must be told.
FAST = TrainSpec(lr=1e-4, head_lr=1e-3, batch_size=4, precision="float32")
SPEC = SweepSpec(epochs=(2, 3), folds=2, train=FAST, retrain_head="balanced", final="retrained")
ON_CPU = SweepOptions(device="cpu")
# AdamW makes whole steps of a gradient that rounds to either side of 0: about one step of 1e-3 in a few weights.
ROUNDING = 2e-3


class Kept:
    """A sweep as it ended, with what its folds had learned."""

    def __init__(self, cache: Path, out: Path, spec: SweepSpec) -> None:
        self.out, self.spec = out, spec
        self.snapshots: dict[tuple[str, int], Snapshot] = {}
        save = Journal.save_snapshot

        def spy(journal: Journal, key: str, snapshot: Snapshot) -> None:
            self.snapshots[key, snapshot.budget] = snapshot
            save(journal, key, snapshot)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "save_snapshot", spy)
            self.job = SweepJob(cache, out, spec, ON_CPU)
            self.info = self.job.run()


@pytest.fixture(scope="module")
def kept(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return Kept(toy_cache, tmp_path_factory.mktemp("final") / "run", SPEC)


def head_alone(kind: type[Fold], visual: Any, data: FoldData, epochs: int) -> Snapshot:
    """A head alone, films drawn evenly over findings, trained in one go."""
    train = TrainSpec(lr=1e-3, batch_size=4, sampling="balanced", precision="float32")
    snapshots: list[Snapshot] = []
    fit(kind(visual, data, train, unfreeze_blocks=0, seed=SPEC.seed), (epochs,), keep(snapshots))
    return snapshots[0]


def test_a_retrained_head_is_a_head_trained_on_its_fold_s_embeddings(kept: Kept) -> None:
    """The slow twin: a `Fold` without blocks, on embeddings that the fold's own tail makes."""
    job, epochs = kept.job, kept.info["chosen"]["epochs"]
    data, search = job.data, job.search
    out = np.full(data.labels.shape, np.nan, np.float32)
    for k in range(SPEC.folds):
        tail = search.tail(FAST)
        tail.load_state_dict(dict(kept.snapshots[f"config0.fold{k}", epochs].state))
        mine, made = (
            kept.snapshots[f"config0.retrained{k}", epochs],
            FoldData(
                activations=run_blocks(tail, search.activations, 0, data.rows, views=2),
                labels=data.header.labels,
                train_rows=data.train(k),
                valid_rows=data.valid(k),
                number=k,
            ),
        )
        by_hand, by_autograd = (head_alone(kind, search.backbone.visual, made, epochs) for kind in (HeadFold, Fold))
        for name, tensor in by_hand.state.items():
            assert torch.equal(mine.state[name], tensor), name
        np.testing.assert_allclose(mine.probabilities, by_autograd.probabilities, atol=ROUNDING)
        # The model: the fold's blocks and norms, and the new head, on the cached tokens.
        state = tail.state_dict() | {n: t for n, t in mine.state.items() if n.startswith("head.")}
        tail.load_state_dict(state)
        out[data.assignment == k] = probabilities(tail, search.activations, data.valid(k))
    np.testing.assert_array_equal(arrays(kept.out)["out_of_fold_retrained"], out)


def test_the_search_itself_is_as_without(kept: Kept, toy_cache: Path, tmp_path: Path) -> None:
    plain = dataclasses.replace(SPEC, retrain_head="none", final="ensemble")
    run = SweepJob(toy_cache, tmp_path / "plain", plain, ON_CPU).run()
    for key in ("folds", "budgets", "chosen"):
        assert run[key] == kept.info[key], key
    one, two = arrays(tmp_path / "plain"), arrays(kept.out)
    assert set(two) - set(one) == {"out_of_fold_retrained", "holdout_retrained"}
    for name in ("out_of_fold", "holdout_best_fold", "holdout_refit", "holdout_ensemble", "probe"):
        np.testing.assert_array_equal(one[name], two[name])
    assert set(kept.info["finals"]) == {"best-fold", "refit", "ensemble", "retrained"}
    assert {k: v for k, v in kept.info["finals"].items() if k != "retrained"} == run["finals"]
    assert {k: v for k, v in kept.info["decisions"].items() if k != "retrained"} == run["decisions"]


def test_thresholds_and_figures_are_those_of_the_retrained_heads(kept: Kept) -> None:
    run, saved = kept.info, arrays(kept.out)
    dev, held = saved["fold"] >= 0, saved["fold"] < 0
    own, folds = run["decisions"]["retrained"], run["decisions"]["folds"]
    assert own["thresholds"] != folds["thresholds"]
    assert (run["thresholds"], run["threshold_source"]) == (own["thresholds"], own["threshold_source"])
    found = figures.macro(figures.auc(saved["labels"][dev], saved["out_of_fold_retrained"][dev]))[0]
    assert run["metrics"]["out_of_fold"]["macro_auc"] == pytest.approx(found)
    assert folds["out_of_fold"]["macro_auc"] != pytest.approx(found)
    assert run["final"]["members"] == ["retrained0", "retrained1"]
    np.testing.assert_array_equal(saved["final"][held], saved["holdout_retrained"])
    assert run["metrics"]["holdout"] == run["finals"]["retrained"]
    labels, limits = saved["labels"][held], np.array(own["thresholds"])
    right = (saved["holdout_retrained"] >= limits) == (labels == 1)
    assert run["finals"]["retrained"]["label_accuracy"] == pytest.approx(right[labels >= 0].mean())


def test_report_takes_their_out_of_fold_predictions(kept: Kept) -> None:
    saved = arrays(kept.out)
    part = predictions.read(kept.out, read_info(kept.out)).part("out_of_fold")
    np.testing.assert_array_equal(part.probs, saved["out_of_fold_retrained"][saved["fold"] >= 0])
    found = evaluate(kept.out, resamples=0)["parts"]["out_of_fold"]["figures"]["macro_auc"]["value"]
    assert found == pytest.approx(kept.info["metrics"]["out_of_fold"]["macro_auc"])
    other = predictions.read(kept.out, read_run_info(kept.out, "ensemble")).part("out_of_fold")
    budget = next(i for i, b in enumerate(kept.info["budgets"]) if b["chosen"])
    np.testing.assert_array_equal(other.probs, saved["out_of_fold"][budget][saved["fold"] >= 0])
    written = write_report(kept.out, resamples=0)
    assert written.whole, written.missing


@pytest.mark.parametrize("kind", ["best-fold", "refit", "ensemble", "retrained"])
def test_export_takes_thresholds_and_figures_of_the_kind(kind: str, kept: Kept, tmp_path: Path) -> None:
    (found,) = export_run(kept.out, ExportSpec(final=kind, out=tmp_path / "model.onnx", count=16))
    decision = kept.info["decisions"]["retrained" if kind == "retrained" else "folds"]
    assert found.info["thresholds"] == decision["thresholds"]
    assert found.info["data"]["metrics"]["holdout"] == kept.info["finals"][kind]
    assert found.info["data"]["metrics"]["out_of_fold"] == decision["out_of_fold"]
    assert read_run(kept.out, kind).info["final"]["kind"] == kind


def test_another_final_model_takes_the_retrained_heads_too(kept: Kept, toy_cache: Path, tmp_path: Path) -> None:
    """The sweep chose the ensemble; what `--final retrained` takes is as if it had been chosen."""
    SweepJob(toy_cache, tmp_path / "run", dataclasses.replace(SPEC, final="ensemble"), ON_CPU).run()
    info = read_run_info(tmp_path / "run", "retrained")
    for key in ("thresholds", "threshold_source", "calibration", "metrics", "model_sha256"):
        assert info[key] == json.loads(json.dumps(read_info(kept.out)[key])), key
    assert read_info(tmp_path / "run")["thresholds"] == kept.info["decisions"]["folds"]["thresholds"]


@pytest.mark.parametrize("at", [("retrained0", 1), ("retrained1", 1), ("retrained1", 2)])
def test_a_stop_while_heads_are_retrained_changes_no_bit(
    at: tuple[str, int], kept: Kept, toy_cache: Path, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    told: list[tuple[str, int]] = []

    def watch(stop: bool) -> Any:
        recorder = Journal.recorder

        def spy(journal: Journal, *given: Any) -> Recorder:
            inner = recorder(journal, *given)

            def epoch(fold: Fold, line: Epoch) -> None:
                inner.epoch(fold, line)
                told.append((fold.name, line.epoch))
                if stop and told[-1] == at:
                    journal.flush()
                    raise Stop

            return dataclasses.replace(inner, epoch=epoch)

        return spy

    for stop in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "recorder", watch(stop))
            job = SweepJob(toy_cache, tmp_path / "run", SPEC, ON_CPU)
            if stop:
                with pytest.raises(Stop):
                    job.run()
                before = list(told)
            else:
                job.run()
    assert at in before
    assert len(told) == len(set(told)), "an epoch was trained twice"
    same_numbers(tmp_path / "run", kept.out)


def test_a_head_alone_and_both_views_are_retrained_too(toy_cache: Path, tmp_path: Path) -> None:
    """Without blocks the embeddings are the cache's; averaged weights and both views stay as they were asked for."""
    train = dataclasses.replace(FAST, train_blocks=0, ema=0.5, tta="flip")
    spec = dataclasses.replace(SPEC, epochs=(1,), train=train, retrain_head="sqrt")
    run = SweepJob(toy_cache, tmp_path / "run", spec, ON_CPU).run()
    assert run["final"]["members"] == ["retrained0", "retrained1"]
    assert export_run(tmp_path / "run", ExportSpec(count=16))[0].kept
    assert retrained_spec(train, "sqrt") == dataclasses.replace(train, lr=1e-3, head_lr=None, sampling="sqrt")


def test_the_spec_of_a_head_drops_what_blocks_need() -> None:
    train = TrainSpec(lr=1e-4, layer_decay=0.5, head_first=2, train_norm=True, shuffle="block", loss="asl", ema=0.9)
    assert retrained_spec(train, "balanced") == TrainSpec(
        lr=1e-4, train_blocks=0, sampling="balanced", loss="asl", ema=0.9
    )


def test_without_retraining_there_is_no_such_model(toy_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--final retrained: no head is trained again; add --retrain-head"):
        SweepSpec(final="retrained")
    with pytest.raises(InputError, match=r"--final retrained: the run kept no retrained0; .* --retrain-head balanced"):
        read_run(toy_run, "retrained")
    found = CliRunner().invoke(main, ["sweep", "x.h5", "--final", "retrained", "--out", str(tmp_path / "run")])
    assert found.exit_code == 2
    assert "--retrain-head" in found.output


def test_a_run_without_its_predictions_of_retrained_heads_says_so(kept: Kept) -> None:
    saved = arrays(kept.out)
    lacking = {name: values for name, values in saved.items() if name != "out_of_fold_retrained"}
    folder = kept.out.parent / "damaged"
    folder.mkdir()
    np.savez(folder / "predictions.npz", **lacking)
    with pytest.raises(InputError, match="out_of_fold_retrained"):
        predictions.read(folder, kept.info).part("out_of_fold")
    np.savez(folder / "predictions.npz", **{**saved, "out_of_fold_retrained": saved["final"][:3]})
    with pytest.raises(InputError, match="out_of_fold_retrained"):
        predictions.read(folder, kept.info)


def test_the_bar_names_the_retrained_heads(toy_cache: Path, tmp_path: Path) -> None:
    """Whoever is told of each epoch can tell a fold, the refit and a retrained head apart."""
    told: list[tuple[int, int]] = []
    spec = dataclasses.replace(SPEC, epochs=(1,))
    SweepJob(toy_cache, tmp_path / "run", spec, ON_CPU).run(lambda config, fold, epoch: told.append((config, fold)))
    assert told == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)]
