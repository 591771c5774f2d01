"""A head and a loss of one's own: trained, resumed, reported, exported, and refused where they cannot be."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

from cxr_fast.cli.main import main
from cxr_fast.config import SweepOptions, SweepSpec, TrainSpec
from cxr_fast.errors import InputError
from cxr_fast.export.entries.settings import ExportSpec
from cxr_fast.export.graph import build
from cxr_fast.export.parity import check_images, torch_probabilities
from cxr_fast.export.variants import export_run
from cxr_fast.inference.predictor import Predictor
from cxr_fast.models import heads
from cxr_fast.report.writer import write_report
from cxr_fast.training.folds.fold import Epoch
from cxr_fast.training.run_folder import read_info, read_run
from cxr_fast.training.sweep import SweepJob
from tests.helpers.runs import arrays, same_numbers

pytestmark = pytest.mark.usefixtures("sketched")
# The limits below were found on the folds of this method.
SPEC = SweepSpec(epochs=(1, 2), folds=2, split_method="iterative", train=TrainSpec(lr=1e-3, batch_size=4))
ON_CPU = SweepOptions(device="cpu")


def chain(embed_dim: int, classes: int) -> nn.Module:
    """The documented example."""
    return nn.Sequential(nn.Linear(embed_dim, 48), nn.LayerNorm(48), nn.GELU(), nn.Dropout(0.3), nn.Linear(48, classes))


def norm_first(embed_dim: int, classes: int) -> nn.Module:
    """Batch norms in front of a matrix, behind one, behind another norm, and at the end; nested, with other bends."""
    inner = nn.Sequential(nn.Linear(embed_dim, 24, bias=False), nn.BatchNorm1d(24), nn.SiLU(), nn.BatchNorm1d(24))
    return nn.Sequential(
        nn.BatchNorm1d(embed_dim),
        inner,
        nn.BatchNorm1d(24, eps=1e-3),
        nn.Identity(),
        nn.Tanh(),
        nn.Linear(24, 16),
        nn.Dropout(0.1),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, classes),
        nn.BatchNorm1d(classes),
    )


def one_matrix(embed_dim: int, classes: int) -> nn.Module:
    return nn.Linear(embed_dim, classes)


def bend_last(embed_dim: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(embed_dim, classes), nn.GELU(approximate="tanh"), nn.Dropout(0.1))


class Foreign(nn.Module):
    """A layer that no file can name, with a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def foreign(embed_dim: int, classes: int) -> nn.Module:
    return nn.Sequential(Foreign(embed_dim), nn.Linear(embed_dim, classes))


def own_bce(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy over known labels."""
    known = labels >= 0
    each = F.binary_cross_entropy_with_logits(logits, (labels > 0).float(), reduction="none")
    return (each * known).sum() / known.sum().clamp(min=1)


@pytest.fixture(scope="module")
def own(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the documented head."""
    out = tmp_path_factory.mktemp("heads") / "run"
    SweepJob(toy_cache, out, SPEC, ON_CPU, head=chain).run()
    return out


def test_the_documented_example(own: Path, tmp_path: Path) -> None:
    """Thresholds, report and file of a run with a head of its own, as of any other."""
    info = read_info(own)
    classes = len(info["classes"])
    assert info["custom"] == {"head": f"{__name__}.chain", "loss": None, "layers": heads.describe(chain(512, classes))}
    assert info["trainable"]["head"] == 512 * 48 + 48 + 2 * 48 + 48 * classes + classes
    assert len(set(info["thresholds"])) > 2
    written = write_report(own, resamples=0)
    assert written.whole, written.missing
    for name in ("report.html", "MODEL_CARD.md"):
        assert "test_heads.chain" in (own / name).read_text(encoding="utf-8"), name
    for final in ("best-fold", "refit", "ensemble"):
        (found,) = export_run(own, ExportSpec(final=final, out=tmp_path / f"{final}.onnx", count=16))
        pixels = check_images(read_run(own), None, most=16)[0]
        torch_says = torch_probabilities(read_run(own, final), pixels)
        np.testing.assert_allclose(Predictor(found.path, device="cpu").probabilities(pixels), torch_says, atol=1e-5)
    many = ExportSpec(variants=("fp16", "int8"), out=tmp_path, count=16, allow_drift=True)
    assert all(found.kept for found in export_run(own, many))


@pytest.mark.parametrize("make", [norm_first, one_matrix, bend_last])
def test_heads_of_known_layers_are_exported(make: heads.MakeHead, toy_cache: Path, tmp_path: Path) -> None:
    """From a trained run, so that every batch norm has statistics; the export itself is checked against torch."""
    train = dataclasses.replace(SPEC.train, train_blocks=0, ema=0.5)
    SweepJob(toy_cache, tmp_path / "run", dataclasses.replace(SPEC, train=train), ON_CPU, head=make).run()
    for final in ("best-fold", "ensemble"):
        (found,) = export_run(tmp_path / "run", ExportSpec(final=final, count=16))
        assert found.kept
    built = build(read_run(tmp_path / "run"), "fp32")
    assert [out.name for out in built.graph.output] == ["logits", "probabilities"]


def test_a_described_head_is_built_again() -> None:
    for make in (chain, norm_first, one_matrix, bend_last):
        head = make(64, 7).eval()
        for layer in head.modules():
            if isinstance(layer, nn.BatchNorm1d):
                layer.running_mean.uniform_()
                layer.running_var.uniform_(0.5, 2)
        described = heads.describe(head)
        assert described is not None
        assert heads.unknown_layer(head) == ""
        again = heads.build(json.loads(json.dumps(described))).eval()
        again.load_state_dict(head.state_dict())
        x = torch.randn(5, 64)
        assert torch.equal(head(x), again(x))
    for unknown in (
        Foreign(3),
        nn.Sequential(nn.Linear(3, 3), Foreign(3)),
        nn.LayerNorm(3, elementwise_affine=False),
        nn.BatchNorm1d(3, affine=False),
        nn.BatchNorm1d(3, track_running_stats=False),
        nn.Softplus(),
    ):
        assert heads.describe(unknown) is None
        assert heads.unknown_layer(unknown) in ("Foreign", "LayerNorm", "BatchNorm1d", "Softplus")


def test_a_stop_in_the_middle_changes_no_bit(own: Path, toy_cache: Path, tmp_path: Path) -> None:
    """The head draws its dropout from torch's own generator, which follows the epoch's draws."""

    class Stop(Exception):
        pass

    left = [(0, 1), (1, 1), (2, 1)]  # two folds and the refit

    def stop(config: int, fold: int, epoch: Epoch) -> None:
        torch.manual_seed(fold)  # whatever else drew random numbers meanwhile
        if left and (fold, epoch.epoch) == left[0]:
            left.pop(0)
            raise Stop

    with torch.random.fork_rng(devices=[]):
        for _ in range(len(left)):
            with pytest.raises(Stop):
                SweepJob(toy_cache, tmp_path / "run", SPEC, ON_CPU, head=chain).run(stop)
        SweepJob(toy_cache, tmp_path / "run", SPEC, ON_CPU, head=chain).run(stop)
    assert not left
    same_numbers(tmp_path / "run", own)


def test_dropout_of_the_head_is_drawn(own: Path, toy_cache: Path, tmp_path: Path) -> None:
    """Shows that the test above can fail: without dropout the run is another."""

    def dry(embed_dim: int, classes: int) -> nn.Module:
        head = chain(embed_dim, classes)
        head[3] = nn.Dropout(0.0)
        return head

    SweepJob(toy_cache, tmp_path / "run", SPEC, ON_CPU, head=dry).run()
    assert np.abs(arrays(tmp_path / "run")["out_of_fold"] - arrays(own)["out_of_fold"])[0, :3].max() != 0


def test_an_interrupted_run_of_another_head_is_not_continued(toy_cache: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(config: int, fold: int, epoch: Epoch) -> None:
        raise Stop

    with pytest.raises(Stop):
        SweepJob(toy_cache, tmp_path / "run", SPEC, ON_CPU, head=chain).run(stop)
    for other in ({"head": one_matrix}, {"head": chain, "loss": own_bce}, {}):
        with pytest.raises(InputError, match=r"unfinished run with (head|loss)"):
            SweepJob(toy_cache, tmp_path / "run", SPEC, ON_CPU, **other).run()


def test_a_layer_that_no_file_names_is_trained_and_not_exported(toy_cache: Path, tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, epochs=(1,))
    run = SweepJob(toy_cache, tmp_path / "run", spec, ON_CPU, head=foreign).run()
    assert (run["custom"]["layers"], run["custom"]["unknown"]) == (None, "Foreign")
    assert write_report(tmp_path / "run", resamples=0).whole
    asked = ["export", str(tmp_path / "run"), "--variants", "fp32"]
    found = CliRunner().invoke(main, asked)
    assert found.exit_code == 2
    assert found.output.startswith("error: ")
    assert found.output.count("\n") == 1
    assert "foreign, holds a Foreign, which" in found.output
    assert "Linear" in found.output
    assert not list((tmp_path / "run").glob("*.onnx"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda e, c: nn.Linear(e, c + 1), r"from \(2, 512\) it makes \(2, 36\), and not logits \(2, 35\)"),
        (lambda e, c: nn.Linear(e + 1, c), r"cannot take embeddings \(2, 512\)"),
        (lambda e, c: nn.Sequential(nn.Linear(e, c), nn.Flatten(0)), r"it makes \(70,\)"),
        (lambda e, c: nn.GRU(e, c), "head: "),
        (lambda e, c: nn.BatchNorm2d(e), "head: "),
        (lambda e, c: torch.zeros(2, c), "it made a Tensor, and not a torch.nn.Module"),
        (lambda e: nn.Linear(e, 35), "head: "),
    ],
)
def test_a_head_that_does_not_fit_is_refused(
    make: Callable[..., Any], said: str, toy_cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        SweepJob(toy_cache, tmp_path / "run", SPEC, ON_CPU, head=make)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda logits, labels: (logits - labels) ** 2, r"loss: .* \(2, 35\), and not a single number"),
        (lambda logits, labels: 1.0, "loss: it gave a float"),
        (lambda logits: logits.sum(), "loss: "),
        (lambda logits, labels: logits.detach().sum(), "loss: .* no gradient"),
    ],
)
def test_a_loss_that_cannot_be_trained_on_is_refused(
    loss: Callable[..., Any], said: str, toy_cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        SweepJob(toy_cache, tmp_path / "run", SPEC, ON_CPU, loss=loss)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("blocks", [2, 0])
def test_a_loss_of_one_s_own_is_the_loss(blocks: int, toy_cache: Path, tmp_path: Path) -> None:
    """Cross entropy given in Python is `--loss bce`, whatever loss the spec names; every other field is as it was."""
    train = dataclasses.replace(SPEC.train, train_blocks=blocks)
    run = SweepJob(toy_cache, tmp_path / "own", dataclasses.replace(SPEC, train=train), ON_CPU, loss=own_bce).run()
    named = dataclasses.replace(SPEC, train=dataclasses.replace(train, loss="bce"))
    SweepJob(toy_cache, tmp_path / "bce", named, ON_CPU).run()
    SweepJob(toy_cache, tmp_path / "focal", dataclasses.replace(SPEC, train=train), ON_CPU).run()
    one, two, focal = (arrays(tmp_path / name)["out_of_fold"] for name in ("own", "bce", "focal"))
    if blocks:
        np.testing.assert_array_equal(one, two)
    else:  # ours has a step written out by hand; AdamW makes whole steps of what rounds to either side of 0
        np.testing.assert_allclose(one, two, atol=3e-3)
    assert np.nanmax(np.abs(one - focal)) > 0.01
    assert run["custom"] == {"head": None, "loss": f"{__name__}.own_bce", "layers": None}
    assert export_run(tmp_path / "own", ExportSpec(count=8))[0].kept, "the head is ours"
    write_report(tmp_path / "own", resamples=0)
    assert "own_bce" in (tmp_path / "own" / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_both_with_a_grid_and_retrained_heads(toy_cache: Path, tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, epochs=(1,), retrain_head="balanced", final="retrained")
    options = SweepOptions(device="cpu", grid=("train_blocks=0,1", "lr=1e-3"))
    run = SweepJob(toy_cache, tmp_path / "run", spec, options, head=chain, loss=own_bce).run()
    assert [row["train_blocks"] for row in sorted(run["grid"], key=lambda r: r["config"])] == [0, 1]
    assert export_run(tmp_path / "run", ExportSpec(count=16))[0].kept
