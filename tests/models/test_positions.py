"""Towers at other image sizes: the tables of each library to the bit, and everything behind them as at the own size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from cxr_fast.activations import build
from cxr_fast.activations.cache import open_cache
from cxr_fast.activations.encoder import with_size
from cxr_fast.activations.job import CacheJob
from cxr_fast.activations.verify import ReencodeSpec, check_cache
from cxr_fast.cli.main import main
from cxr_fast.config import CacheSpec, SweepOptions, SweepSpec, TrainSpec
from cxr_fast.data.manifest import read_dataset
from cxr_fast.errors import InputError
from cxr_fast.export import graph, heatmaps, parity
from cxr_fast.export.entries.settings import ExportSpec
from cxr_fast.export.variants import export_run
from cxr_fast.inference import model_file, verify
from cxr_fast.models import backbone, positions
from cxr_fast.models.tail import Tail
from cxr_fast.report import settings
from cxr_fast.training.run_folder import read_run
from cxr_fast.training.sweep import SweepJob, backbone_for
from tests.conftest import TOY, TOY_AVERAGE

SIDES = st.integers(1, 9)
SIZE = 96  # of a toy tower made for 160 pixels: 6 x 6 patches in place of 10 x 10


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tables(prefix_tokens: int, rows: int, columns: int) -> torch.Tensor:
    return drawn(1, prefix_tokens + rows * columns, 5)


# One table, as each library makes it.


@given(st.integers(0, 5), SIDES, SIDES, SIDES, SIDES)
def test_a_table_is_timms(prefix: int, rows: int, columns: int, new_rows: int, new_columns: int) -> None:
    table, old, new = tables(prefix, rows, columns), (rows, columns), (new_rows, new_columns)
    got = positions.interpolate(table, prefix_tokens=prefix, old_grid=old, new_grid=new)
    want = resample_abs_pos_embed(table, new_size=list(new), old_size=list(old), num_prefix_tokens=prefix)
    assert torch.equal(got, want)
    assert torch.equal(got[:, :prefix], table[:, :prefix])
    assert got.dtype == table.dtype


@pytest.mark.parametrize("new_side", [3, 9])
@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers", "siglip", "clip", "vit"])
def test_a_table_is_that_of_transformers(family: str, new_side: int) -> None:
    """Each model's own `interpolate_pos_encoding`, on a tower of 6 x 6 patches of 14 pixels."""
    transformers = pytest.importorskip("transformers")
    prefix = 0 if family == "siglip" else 1
    table = tables(prefix, 6, 6)[..., :4]
    sizes = {"hidden_size": 4, "num_attention_heads": 1, "image_size": 84, "patch_size": 14, "num_channels": 3}
    config, module, holder = {
        "dinov2": ("Dinov2Config", "dinov2", "Dinov2Embeddings"),
        "dinov2_with_registers": (
            "Dinov2WithRegistersConfig", "dinov2_with_registers", "Dinov2WithRegistersEmbeddings",
        ),
        "siglip": ("SiglipVisionConfig", "siglip", "SiglipVisionEmbeddings"),
        "clip": ("CLIPVisionConfig", "clip", "CLIPVisionEmbeddings"),
        "vit": ("ViTConfig", "vit", "ViTEmbeddings"),
    }[family]  # fmt: skip
    found = __import__(f"transformers.models.{module}.modeling_{module}", fromlist=[holder])
    embeddings = getattr(found, holder)(getattr(transformers, config)(**sizes))
    with torch.no_grad():
        if family in ("siglip", "clip"):
            embeddings.position_embedding.weight.copy_(table[0])
        else:
            embeddings.position_embeddings.copy_(table)
    side = 14 * new_side
    want = embeddings.interpolate_pos_encoding(torch.zeros(1, prefix + new_side**2, 4), side, side)
    got = positions.interpolate(
        table, prefix_tokens=prefix, old_grid=(6, 6), new_grid=(new_side, new_side), family=family
    )
    assert torch.equal(got, want.detach())
    smoothed = resample_abs_pos_embed(table, new_size=[new_side] * 2, old_size=[6, 6], num_prefix_tokens=prefix)
    assert torch.equal(got, smoothed) == positions.ANTIALIAS[family], "the families differ, and by more than rounding"


def test_equal_grids_keep_the_table_in_every_family() -> None:
    table = tables(1, 4, 4)
    for family in positions.ANTIALIAS:
        got = positions.interpolate(table, prefix_tokens=1, old_grid=(4, 4), new_grid=(4, 4), family=family)
        assert got is table


def test_half_precision_is_interpolated_in_float32() -> None:
    table = tables(1, 4, 4)
    grids: dict[str, Any] = {"prefix_tokens": 1, "old_grid": (4, 4), "new_grid": (6, 6)}
    got = positions.interpolate(table.half(), **grids)
    assert got.dtype == torch.float16
    assert torch.equal(got, positions.interpolate(table.half().float(), **grids).half())


def test_a_table_of_another_length_and_an_unknown_family_are_refused() -> None:
    grids: dict[str, Any] = {"old_grid": (4, 4), "new_grid": (6, 6)}
    with pytest.raises(InputError, match=r"has 17 rows; 4 x 4 patches and 0 other token\(s\) need 16"):
        positions.interpolate(tables(1, 4, 4), prefix_tokens=0, **grids)
    with pytest.raises(InputError, match=r"positions of 'rope' are interpolated is not known"):
        positions.interpolate(tables(1, 4, 4), prefix_tokens=1, family="rope", **grids)


# Whole towers.

TOWERS = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers behind the class token": {"reg_tokens": 3},
    "positions for patches alone": {"reg_tokens": 3, "no_embed_class": True},
    "no positions": {"pos_embed": "none"},
}


def tower(**named: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 0}
    trunk = VisionTransformer(**(sizes | named)).eval()
    if trunk.pos_embed is not None:
        nn.init.normal_(trunk.pos_embed)
    return trunk


@pytest.mark.parametrize("size", [24, 40, 72])
@pytest.mark.parametrize("kind", TOWERS)
@torch.inference_mode()
def test_a_tower_at_another_size_is_timms_own(kind: str, size: int) -> None:
    """timm's `set_input_size` is the slow road here; its tower then answers the same film."""
    ours, theirs = tower(**TOWERS[kind]), tower(**TOWERS[kind])
    theirs.set_input_size((size, size))
    positions.set_image_size(SimpleNamespace(trunk=ours), size)
    x = drawn(2, 3, size, size)
    assert torch.equal(ours(x), theirs(x))
    for name in ("img_size", "grid_size", "num_patches"):
        assert getattr(ours.patch_embed, name) == getattr(theirs.patch_embed, name)
    before = tower(**TOWERS[kind]).state_dict()
    after = ours.state_dict()
    assert list(after) == list(before)
    changed = [name for name in after if name != "pos_embed" and not torch.equal(after[name], before[name])]
    assert not changed, "more than positions changed"


@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_without_values_gets_the_same_shapes(kind: str) -> None:
    with torch.device("meta"):
        empty = VisionTransformer(img_size=48, patch_size=8, embed_dim=12, depth=1, num_heads=2, **TOWERS[kind])
    full = tower(**TOWERS[kind])
    for trunk in (empty, full):
        positions.set_image_size(SimpleNamespace(trunk=trunk), 72)
    if full.pos_embed is not None:
        assert empty.pos_embed.shape == full.pos_embed.shape
        assert empty.pos_embed.is_meta
    assert empty.patch_embed.grid_size == (9, 9)


@pytest.mark.parametrize(("size", "nearest"), [(100, "96 or 104"), (7, "8 or 16"), (47, "40 or 48"), (1, "8 or 16")])
def test_a_size_between_patches_names_the_nearest_two(size: int, nearest: str) -> None:
    trunk = tower()
    with pytest.raises(positions.SizeError) as error:
        positions.set_image_size(SimpleNamespace(trunk=trunk), size)
    said = f"--image-size: {size} is no multiple of the model's patches of 8 pixels; take {nearest}."
    assert str(error.value) == said
    assert trunk.patch_embed.img_size == (48, 48)


def test_a_tower_whose_own_size_is_between_patches_keeps_it() -> None:
    """As timm's vit_so400m_patch14_siglip_384: 27 patches of 14 pixels, the last 6 pixels unseen."""
    trunk = tower(img_size=52)
    positions.set_image_size(SimpleNamespace(trunk=trunk), 52)
    assert trunk.patch_embed.grid_size == (6, 6)


@pytest.mark.parametrize("source", [TOY, TOY_AVERAGE])
@torch.inference_mode()
def test_prefix_and_tail_equal_the_whole_tower_at_another_size(source: str) -> None:
    own, loaded = backbone.load(source), backbone.load(source, SIZE)
    assert (own.image_size, loaded.image_size) == (160, SIZE)
    assert loaded.config["own_image_size"] == 160
    assert loaded.config["vision_cfg"]["image_size"] == SIZE
    assert loaded.shape[0] == own.shape[0] - 100 + 36
    x = drawn(2, 3, SIZE, SIZE)
    want = F.normalize(loaded.visual(x), dim=-1)
    assert want.std() > 1e-3
    for k in range(loaded.depth + 1):
        tail = Tail(loaded.visual, unfreeze_blocks=k, classes=3).eval()
        got = tail.embedding(backbone.prefix(loaded.visual, x, k))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_the_own_size_changes_nothing_and_leaves_no_mark() -> None:
    plain, asked = backbone.load(TOY), backbone.load(TOY, 160)
    assert plain.config == asked.config
    assert backbone.tower_sha256(plain.visual) == backbone.tower_sha256(asked.visual)


@pytest.mark.parametrize("source", [TOY, TOY_AVERAGE])
@torch.inference_mode()
def test_a_resized_tower_is_built_again_from_its_config_and_tensors(source: str) -> None:
    loaded = backbone.load(source, SIZE)
    again = backbone.assemble(json.loads(json.dumps(loaded.config)), loaded.visual.state_dict())
    x = drawn(1, 3, SIZE, SIZE)
    assert torch.equal(again(x), loaded.visual(x))


# A cache, and all that follows from it.


@pytest.fixture(scope="module")
def cache(toy_data: Path, lively_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy data at 96 pixels; a cut that leaves two blocks."""
    out = tmp_path_factory.mktemp("sizes") / "small.h5"
    build.build_cache(
        read_dataset(toy_data), out, CacheSpec(weights=str(lively_weights), image_size=SIZE), device="cpu"
    )
    return out


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sizes") / "run"
    spec = SweepSpec(epochs=(2,), folds=2, train=TrainSpec(lr=1e-3, batch_size=8))
    SweepJob(cache, out, spec, SweepOptions(device="cpu")).run()
    return out


def test_the_size_is_in_the_cache_and_verify_encodes_again_at_it(cache: Path) -> None:
    header = open_cache(cache).header
    assert header.shape[2] == 37
    assert header.meta["fingerprint_parts"]["size"] == header.meta["spec"]["preprocess"]["size"] == SIZE
    assert "image_size" not in header.meta["spec"], "a cache at the own size is the same whether that was asked or not"
    found = check_cache(cache, ReencodeSpec(count=3, device="cpu"))
    assert (found.reencoded, found.bad) == (3, ())
    assert backbone_for(open_cache(cache)).image_size == SIZE


def test_the_same_file_at_another_size_is_refused_by_the_size(
    cache: Path, toy_data: Path, lively_weights: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "small.h5"
    shutil.copy(cache, copy)
    for size, said in ((None, 160), (112, 112)):
        with pytest.raises(InputError) as error:
            build.build_cache(
                read_dataset(toy_data), copy, CacheSpec(weights=str(lively_weights), image_size=size), device="cpu"
            )
        assert str(error.value).startswith(f"--out: {copy} was made with image size {SIZE}, this run has {said}; give")


def test_weights_whose_patches_do_not_fit_the_cache_are_refused(cache: Path) -> None:
    file = open_cache(cache)
    with pytest.raises(InputError, match=r"not the weights of this cache, whose films have 96 pixels a side"):
        backbone_for(file, "random:0:vit_small_patch14_dinov2")


def test_the_plan_counts_the_tokens_of_the_size(toy_data: Path) -> None:
    manifest = read_dataset(toy_data, limit=9)
    plans = []
    for size in (160, 320):
        loaded = backbone.load(TOY, size)
        spec = with_size(CacheSpec(weights=TOY), loaded)
        job = CacheJob(manifest=manifest, backbone=loaded, spec=spec, out=Path("nowhere.h5"), device="cpu", workers=1)
        plans.append(build.plan(job))
    small, large = plans
    assert (small.size, large.size) == (160, 320)
    assert large.bytes_needed / small.bytes_needed == 401 / 101
    assert large.seconds > 0


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_an_exported_graph_answers_at_the_size(run: Path, variant: str) -> None:
    found = read_run(run)
    assert found.info["preprocess"]["size"] == SIZE
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE), dtype=np.uint8)
    session = onnxruntime.InferenceSession(
        graph.build(found, variant).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    assert session.get_inputs()[0].shape == ["N", SIZE, SIZE]
    got = session.run(["probabilities"], {"pixels": pixels})[0]
    want = parity.torch_probabilities(found, pixels)
    assert np.abs(got - want).max() < (1e-5 if variant == "fp32" else 5e-2)


def test_a_model_file_says_its_size_and_verifies_and_predicts(run: Path, toy_data: Path, tmp_path: Path) -> None:
    path = export_run(run, ExportSpec(out=tmp_path / "small.onnx"))[0].path
    info = model_file.read(path)
    assert info["preprocess"]["size"] == SIZE
    assert info["backbone"]["own_image_size"] == 160
    checked = verify.verify_all([path], device="cpu")
    assert verify.exit_code(checked) == 0
    assert f"size {SIZE}" in verify.describe(checked[0])
    said = CliRunner().invoke(main, ["info", str(path)]).output
    assert f'"size": {SIZE}' in said
    assert "(positions interpolated from those for 160)" in said


def test_pages_and_info_say_the_size(run: Path, cache: Path) -> None:
    facts = dict(settings.fact_table(read_run(run).info).rows)
    assert facts["image size"] == f"{SIZE} x {SIZE} pixels (positions interpolated from those for 160)"
    choices = {row[0]: row[1:3] for row in settings.choice_table(read_run(run).info).rows}
    assert choices["size"] == [str(SIZE), "224"]
    for path in (run, cache):
        output = CliRunner().invoke(main, ["info", str(path)]).output
        assert f"size {SIZE}" in output
        assert "(positions interpolated from those for 160)" in output


def test_a_heat_map_has_the_grid_of_the_size(run: Path) -> None:
    found = read_run(run)
    maps = heatmaps.relevance(found.members[0], drawn(1, 3, SIZE, SIZE), [0, 1])
    assert maps.shape == (2, 6, 6)
    assert maps.max() > 0


# The command line.


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("100", "take 96 or 112"),
        ("0", "--image-size: 0 must be between 8 and 2048."),
        ("-16", "--image-size: -16 must be between 8 and 2048."),
        ("4096", "--image-size: 4096 must be between 8 and 2048."),
        ("large", "'large' is not a valid integer"),
    ],
)
def test_a_bad_size_is_one_line(phantoms: Path, tmp_path: Path, size: str, said: str) -> None:
    for command in (("cache",), ("bench", "cache")):
        found = CliRunner().invoke(
            main, [*command, str(phantoms), "--weights", TOY, "--image-size", size, "--device", "cpu"]
        )
        assert found.exit_code == 2
        assert said in found.output
        assert "Traceback" not in found.output
    assert not list(tmp_path.iterdir())
