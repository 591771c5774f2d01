"""A run scored on both views: its figures, its model files, and what stands in the way."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper

from cxr_fast.activations.forward import predict, probabilities, sigmoid
from cxr_fast.cli.main import main
from cxr_fast.config import SweepOptions, SweepSpec, TrainSpec
from cxr_fast.errors import InputError
from cxr_fast.export.entries.settings import ExportSpec
from cxr_fast.export.graph import build
from cxr_fast.export.parity import check_images, torch_probabilities
from cxr_fast.export.variants import export_run
from cxr_fast.inference import operations
from cxr_fast.inference.predictor import Predictor
from cxr_fast.inference.protobuf import NotOnnx
from cxr_fast.metrics import figures
from cxr_fast.report.writer import write_report
from cxr_fast.training.checkpoints import Journal
from cxr_fast.training.folds.fold import Snapshot
from cxr_fast.training.run_folder import read_info, read_run
from cxr_fast.training.sweep import SweepJob
from tests.helpers.runs import arrays

SPEC = SweepSpec(epochs=(1, 2), folds=2, train=TrainSpec(lr=1e-3, batch_size=4, tta="flip"))
ON_CPU = SweepOptions(device="cpu")
COUNT = 24


@pytest.fixture(scope="module")
def both(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepJob, Path, dict[str, Snapshot]]:
    """A finished run, and what its folds had learned at each budget."""
    kept: dict[str, Snapshot] = {}
    save = Journal.save_snapshot

    def spy(journal: Journal, key: str, snapshot: Snapshot) -> None:
        kept[f"{key}.{snapshot.budget}"] = snapshot
        save(journal, key, snapshot)

    out = tmp_path_factory.mktemp("views") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "save_snapshot", spy)
        job = SweepJob(toy_cache, out, SPEC, ON_CPU)
        job.run()
    return job, out, kept


def pixels_of(run: Path) -> np.ndarray:
    return check_images(read_run(run), None, most=COUNT)[0]


def test_every_score_is_the_mean_of_both_views(both: tuple[SweepJob, Path, dict[str, Snapshot]]) -> None:
    """A plain twin: each fold's tail over the cached plain view, over the cached flipped one, and their mean."""
    job, out, kept = both
    data, saved = job.data, arrays(out)
    apart = 0.0
    for i, budget in enumerate(SPEC.epochs):
        for k in range(SPEC.folds):
            tail = job.search.tail(SPEC.train)
            tail.load_state_dict(dict(kept[f"config0.fold{k}.{budget}"].state))
            views = [sigmoid(predict(tail, job.activations, data.valid(k), view=view)) for view in (0, 1)]
            mean = ((views[0].astype(np.float64) + views[1]) / 2).astype(np.float32)
            place = data.assignment == k
            np.testing.assert_array_equal(saved["out_of_fold"][i][place], mean)
            found = figures.macro(figures.auc(data.labels[place], mean))[0]
            assert read_info(out)["folds"][k][f"auc_{budget}"] == pytest.approx(found, abs=1e-12)
            apart = max(apart, float(np.abs(views[0] - views[1]).max()))
            np.testing.assert_array_equal(probabilities(tail, job.activations, data.valid(k)), views[0])
    assert apart > 1e-3, "both views give one answer: this test shows nothing"


def test_the_history_ranks_by_both_views_too(both: tuple[SweepJob, Path, dict[str, Snapshot]]) -> None:
    """The last epoch's line is the snapshot's own figure, whatever the training computes in."""
    out = both[1]
    lines = (out / "history.csv").read_text(encoding="utf-8").splitlines()
    head = lines[0].split(",")
    last = {row["fold"]: row for row in (dict(zip(head, line.split(","), strict=True)) for line in lines[1:])}
    for fold in read_info(out)["folds"]:
        assert float(last[str(fold["fold"])]["valid_auc"]) == fold["auc_2"]


@pytest.mark.parametrize("variant", ["fp32", "int8"])
@pytest.mark.parametrize("final", ["best-fold", "ensemble"])
def test_a_file_answers_with_the_mean_of_plain_and_mirrored(
    variant: str, final: str, both: tuple[SweepJob, Path, dict[str, Snapshot]], tmp_path: Path
) -> None:
    """Its own answer, one film at a time and together, is that of the plain file asked twice."""
    out = both[1]
    spec = ExportSpec(variants=(variant,), final=final, count=COUNT, allow_drift=True)
    (found,) = export_run(out, dataclasses.replace(spec, out=tmp_path / "both.onnx"))
    (plain,) = export_run(out, dataclasses.replace(spec, out=tmp_path / "plain.onnx", tta="none"))
    assert (found.info["views"], plain.info["views"]) == (["plain", "flip"], ["plain"])
    assert found.parity.cached is not None or final == "ensemble"
    assert plain.parity.cached is None, "the sweep kept the answers of both views only"
    pixels = pixels_of(out)
    two, one = (Predictor(path, device="cpu") for path in (found.path, plain.path))
    mine = np.stack([two.probabilities(pixels[i : i + 1])[0] for i in range(8)])
    together = two.probabilities(pixels[:8])
    flipped = np.ascontiguousarray(pixels[:8, :, ::-1])
    each = [one.probabilities(part) for part in (pixels[:8], flipped)]
    # The range of an int8 matrix's input is that of both views together.
    atol = 1e-5 if variant == "fp32" else 0.02
    np.testing.assert_allclose(mine, np.mean(each, axis=0), atol=atol)
    np.testing.assert_allclose(together, mine, atol=1e-5)
    assert np.abs(each[0] - each[1]).max() > 1e-3
    mirrored = two.probabilities(flipped)
    np.testing.assert_allclose(mirrored, mine, atol=atol if variant == "fp32" else 0.05)


def test_torch_answers_with_both_views_as_well(both: tuple[SweepJob, Path, dict[str, Snapshot]]) -> None:
    out = both[1]
    pixels = pixels_of(out)[:4]
    found = torch_probabilities(read_run(out), pixels)
    plain = read_run(out, tta="none")
    views = [torch_probabilities(plain, np.ascontiguousarray(part)) for part in (pixels, pixels[:, :, ::-1])]
    np.testing.assert_allclose(found, np.mean(views, axis=0), atol=1e-6)


def test_other_views_than_the_run_s_say_so(both: tuple[SweepJob, Path, dict[str, Snapshot]], tmp_path: Path) -> None:
    out = both[1]
    asked = [
        "export",
        str(out),
        "--tta",
        "none",
        "--out",
        str(tmp_path / "m.onnx"),
        "--check",
        "8",
        "--variants",
        "fp32",
    ]
    found = CliRunner().invoke(main, asked)
    assert found.exit_code == 0, found.output
    assert "found on both views, used on the plain view" in found.output
    info = read_run(out, tta="none").info
    assert info["metrics"] == {"out_of_fold": None, "holdout": None}
    assert info["thresholds"] == read_info(out)["thresholds"]
    own = CliRunner().invoke(
        main, [*asked[:2], "--out", str(tmp_path / "own.onnx"), "--check", "8", "--variants", "fp32"]
    )
    assert own.exit_code == 0, own.output
    assert "used on" not in own.output
    assert "both views" in own.output


def test_a_run_of_the_plain_view_can_be_exported_for_both(toy_run: Path, tmp_path: Path) -> None:
    (found,) = export_run(toy_run, ExportSpec(tta="flip", out=tmp_path / "m.onnx", count=8))
    assert "found on the plain view, used on both views" in found.info["threshold_source"]
    assert read_run(toy_run, tta="none").info == read_run(toy_run).info


def test_an_embedding_of_two_views_is_refused(both: tuple[SweepJob, Path, dict[str, Snapshot]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--embedding: a model of both views has two embeddings.*--tta none"):
        export_run(both[1], ExportSpec(embedding=True, out=tmp_path / "m.onnx"))
    spec = ExportSpec(embedding=True, tta="none", out=tmp_path / "m.onnx", count=8)
    assert export_run(both[1], spec)[0].kept


def test_the_report_says_what_was_scored(both: tuple[SweepJob, Path, dict[str, Snapshot]]) -> None:
    out = both[1]
    written = write_report(out, resamples=0)
    assert written.whole, written.missing
    assert "both views" in (out / "report.html").read_text(encoding="utf-8")
    card = (out / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "both views" in card


def edited(model: onnx.ModelProto, *, inputs: int = 2, times: int = 1) -> bytes:
    other = onnx.ModelProto.FromString(model.SerializeToString())
    for k in range(times):
        other.graph.node.append(helper.make_node("Concat", ["pixels"] * inputs, [f"bomb{k}"], axis=0))
    return bytes(other.SerializeToString())


def test_a_file_joins_two_views_and_nothing_more(
    both: tuple[SweepJob, Path, dict[str, Snapshot]], toy_run: Path
) -> None:
    """A chain of doublings would make a million images of one."""
    for variant in ("fp32", "fp16", "int8"):
        operations.check(io.BytesIO(build(read_run(both[1], "ensemble"), variant).SerializeToString()))
    plain = build(read_run(toy_run), "fp32")
    operations.check(io.BytesIO(edited(plain)))
    for bad in (edited(plain, inputs=3), edited(plain, times=2), edited(build(read_run(both[1]), "fp32"))):
        with pytest.raises(NotOnnx, match="joined"):
            operations.check(io.BytesIO(bad))
