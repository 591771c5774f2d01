"""Fewer blocks than a cache leaves: the same run as from a cache cut there, in grids, files and refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cxr_fast.activations import build
from cxr_fast.activations.cache import open_cache
from cxr_fast.activations.encoder import with_size
from cxr_fast.activations.job import CacheJob
from cxr_fast.cli.main import main
from cxr_fast.config import CacheSpec, SweepOptions, SweepSpec, TrainSpec
from cxr_fast.data.manifest import read_dataset
from cxr_fast.errors import InputError
from cxr_fast.export.entries.settings import ExportSpec
from cxr_fast.export.variants import export_run
from cxr_fast.models import backbone
from cxr_fast.training.run_folder import read_run
from cxr_fast.training.sweep import SweepJob
from tests.helpers.runs import arrays

# Float32 is told, for a CPU that would train blocks in bfloat16: paths are compared to its rounding.
FAST = TrainSpec(lr=1e-3, batch_size=4, precision="float32")
# ROUNDING was found on the folds of this method.
SPEC = SweepSpec(epochs=(1, 2), folds=2, split_method="iterative", train=FAST)
ON_CPU = SweepOptions(device="cpu")
# The rest of the blocks in other shapes of batch: float32 rounding, through a block and six steps of AdamW.
ROUNDING = 1e-3


@pytest.fixture(scope="module")
def cuts(phantoms: Path, lively_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Float32 caches of the phantoms that leave 0, 1 and 2 blocks."""
    folder, tower = tmp_path_factory.mktemp("cuts"), backbone.load(str(lively_weights))
    manifest, found = read_dataset(phantoms), {}
    for blocks in (0, 1, 2):
        spec = with_size(CacheSpec(weights=str(lively_weights), unfreeze_blocks=blocks, dtype="float32"), tower)
        found[blocks] = folder / f"cut{blocks}.h5"
        job = CacheJob(manifest=manifest, backbone=tower, spec=spec, out=found[blocks], device="cpu", workers=1)
        build.run(job)
    return found


def change(**fields: Any) -> SweepSpec:
    return dataclasses.replace(SPEC, train=dataclasses.replace(FAST, **fields))


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_shallower_run_is_that_of_a_cache_cut_there(blocks: int, cuts: dict[int, Path], tmp_path: Path) -> None:
    job = SweepJob(cuts[2], tmp_path / "deep", change(train_blocks=blocks), ON_CPU)
    rows = job.data.rows
    inner = job.search.inputs(job.spec.train).array
    stored = open_cache(cuts[blocks]).activations
    assert inner.shape == stored.shape
    scale = float(np.abs(stored).max())
    np.testing.assert_allclose(np.asarray(inner)[rows], np.asarray(stored)[rows], atol=2e-5 * scale)
    deep = job.run()
    other = SweepJob(cuts[blocks], tmp_path / "cut", SPEC, ON_CPU).run()
    assert deep["trainable"] == other["trainable"]
    assert deep["unfreeze_blocks"] == blocks
    assert deep["precision"] == other["precision"]
    assert deep["chosen"] == other["chosen"]
    for key in ("out_of_fold", "final", "probe", "holdout_ensemble"):
        np.testing.assert_allclose(arrays(tmp_path / "deep")[key], arrays(tmp_path / "cut")[key], atol=ROUNDING)
    for a, b in zip(deep["folds"], other["folds"], strict=True):
        assert a["auc_2"] == pytest.approx(b["auc_2"], abs=0.02)  # a tie that falls the other way
    for spec in (ExportSpec(), ExportSpec(final="refit"), ExportSpec(final="ensemble")):
        assert export_run(tmp_path / "deep", spec)[0].kept  # against the whole tower, on real films


def test_all_the_blocks_by_name_are_the_default(cuts: dict[int, Path], tmp_path: Path) -> None:
    for name, spec in (("named", change(train_blocks=2)), ("default", SPEC)):
        SweepJob(cuts[2], tmp_path / name, dataclasses.replace(spec, epochs=(1,)), ON_CPU).run()
    one, two = arrays(tmp_path / "named"), arrays(tmp_path / "default")
    for key in ("out_of_fold", "final", "probe"):
        np.testing.assert_array_equal(one[key], two[key])


def test_a_grid_over_depths_is_each_depth_alone(toy_cache: Path, tmp_path: Path) -> None:
    options = SweepOptions(device="cpu", grid=("train_blocks=0,1,2",))
    run = SweepJob(toy_cache, tmp_path / "grid", dataclasses.replace(SPEC, epochs=(1,)), options).run()
    with np.load(tmp_path / "grid" / "grid.npz") as file:
        kept = file["out_of_fold"]
    for blocks in (0, 1, 2):
        spec = dataclasses.replace(change(train_blocks=blocks), epochs=(1,))
        alone = SweepJob(toy_cache, tmp_path / str(blocks), spec, ON_CPU).run()
        np.testing.assert_array_equal(kept[blocks], arrays(tmp_path / str(blocks))["out_of_fold"][0])
        row = next(r for r in run["grid"] if r["train_blocks"] == blocks)
        assert row["mean_auc"] == max(b["mean_auc"] for b in alone["budgets"])
        if row["chosen"]:
            assert run["model_sha256"] == alone["model_sha256"]
            assert (run["unfreeze_blocks"], run["trainable"]) == (blocks, alone["trainable"])


def test_a_shallow_run_is_read_again(toy_cache: Path, tmp_path: Path) -> None:
    """Its blocks stand in the tower from the depth that was trained, and not from the cache's cut."""
    SweepJob(toy_cache, tmp_path / "run", dataclasses.replace(change(train_blocks=1), epochs=(1,)), ON_CPU).run()
    run = read_run(tmp_path / "run")
    tower = backbone.load(str(run.info["cache"]["weights"])).visual.trunk.blocks
    moved = [
        any(not a.equal(b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
        for mine, theirs in zip(run.visual.trunk.blocks, tower, strict=True)
    ]
    assert moved == [False] * (len(tower) - 1) + [True]


@pytest.mark.parametrize(
    ("cut", "fields", "said"),
    [
        (2, {"train_blocks": 3}, "--train-blocks: 3 is more than the 2"),
        (0, {"train_blocks": 1}, "--unfreeze-blocks 1"),
        (0, {"head_first": 2}, "--head-first"),
        (0, {"layer_decay": 0.5}, "--layer-decay"),
    ],
)
def test_what_the_cache_does_not_hold_is_refused(
    cut: int, fields: dict[str, Any], said: str, cuts: dict[int, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        SweepJob(cuts[cut], tmp_path / "run", change(**fields), ON_CPU)
    (name, value) = next(iter(fields.items()))
    asked = SweepOptions(device="cpu", grid=(f"{name}={value}",))
    with pytest.raises(InputError, match=said):
        SweepJob(cuts[cut], tmp_path / "run", SPEC, asked)
    assert not list(tmp_path.iterdir())


def test_both_views_need_both_in_the_cache(phantoms: Path, lively_weights: Path, tmp_path: Path) -> None:
    tower = backbone.load(str(lively_weights))
    spec = with_size(CacheSpec(weights=str(lively_weights), unfreeze_blocks=0, views=("plain",)), tower)
    out = tmp_path / "plain.h5"
    build.run(CacheJob(manifest=read_dataset(phantoms), backbone=tower, spec=spec, out=out, device="cpu", workers=1))
    with pytest.raises(InputError, match="--tta flip: this cache has no flipped view"):
        SweepJob(out, tmp_path / "run", change(tta="flip"), ON_CPU)
    assert SweepJob(out, tmp_path / "run", SPEC, ON_CPU).run()["train"]["tta"] == "none"


def test_the_flag_reaches_the_run(cuts: dict[int, Path], tmp_path: Path) -> None:
    flags = ["--epochs", "1", "--folds", "2", "--lr", "1e-3", "--batch-size", "4", "--threads", "1", "--device", "cpu"]
    asked = ["sweep", str(cuts[2]), "--out", str(tmp_path / "run"), "--train-blocks", "0", *flags]
    found = CliRunner().invoke(main, asked)
    assert found.exit_code == 0, found.output
    run = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert (run["train"]["train_blocks"], run["trainable"]["blocks"]) == (0, 0)
    assert found.output.index("running the blocks that stay frozen once over all images") < found.output.index(
        "epochs 1 "
    )
