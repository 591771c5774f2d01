"""The tower is open_clip's own, cut without a difference; checkpoints in BiomedCLIP's names; refusals in two lines."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cxr_fast.config import IMAGENET_MEAN, IMAGENET_STD
from cxr_fast.errors import InputError
from cxr_fast.models import backbone
from cxr_fast.models.tail import Tail
from cxr_fast.system import extras
from tests.conftest import TOY, TOY_AVERAGE
from tests.helpers.weights import (
    BIN,
    MEAN,
    SAFE,
    STD,
    biomedclip_config,
    biomedclip_tensors,
    refused,
    toy_tensors,
    write_folder,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Toy tensors gain nothing from a second thread, and lose a lot to it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def open_clip_visual(arch: str, tensors: dict[str, torch.Tensor]) -> Any:
    """open_clip's own tower with the checkpoint's weights, without any code of ours."""
    from open_clip.timm_model import TimmModel

    with torch.device("meta"):
        visual = TimmModel(arch, 512, image_size=224, pool="", proj="linear")
    own = {name.removeprefix("visual."): tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    visual.load_state_dict(own, strict=True, assign=True)
    return visual.eval()


def pixels(size: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def joined(visual: Any, x: torch.Tensor, k: int) -> torch.Tensor:
    tail = Tail(visual, unfreeze_blocks=k, classes=3).eval()
    return tail.embedding(backbone.prefix(visual, x, k))


@pytest.mark.parametrize("source", [TOY, TOY_AVERAGE])
@torch.inference_mode()
def test_prefix_and_tail_equal_the_whole_tower_at_every_cut(source: str) -> None:
    loaded = backbone.load(source)
    x = pixels(loaded.image_size)
    want = F.normalize(loaded.visual(x), dim=-1)
    assert want.std() > 1e-3
    for k in range(loaded.depth + 1):
        close(joined(loaded.visual, x, k), want)
        rows = backbone.prefix(loaded.visual, x, k)
        assert tuple(rows.shape[1:]) == ((loaded.shape[2],) if k == 0 else loaded.shape[:2])


@torch.inference_mode()
def test_the_full_size_checkpoint_reads_back_and_cuts_exactly(tmp_path: Path) -> None:
    tensors = biomedclip_tensors(3, width=768, depth=12, tokens=197, hidden=3072)
    loaded = backbone.load(write_folder(tmp_path / "b", tensors, biomedclip_config()))
    assert (loaded.shape, loaded.depth, loaded.image_size) == ((197, 768, 512), 12, 224)
    assert sum(p.numel() for p in loaded.visual.parameters()) == 85_798_656 + 768 * 512
    x = pixels(224, batch=1)
    want = F.normalize(open_clip_visual("vit_base_patch16_224", tensors)(x), dim=-1)
    for k in (0, 1, 2, 12):
        close(joined(loaded.visual, x, k), want)


@torch.inference_mode()
def test_a_biomedclip_checkpoint_reads_back_from_both_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip.hf_model
    import open_clip.model
    import open_clip.transformer

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the text tower was built")

    tensors = toy_tensors()
    reference = open_clip_visual("test_vit", tensors)
    for cls in (
        open_clip.model.CLIP,
        open_clip.model.CustomTextCLIP,
        open_clip.hf_model.HFTextEncoder,
        open_clip.transformer.TextTransformer,
    ):
        monkeypatch.setattr(cls, "__init__", never)
    folders = [write_folder(tmp_path / name, tensors, biomedclip_config("test_vit"), name) for name in (SAFE, BIN)]
    folders.append(write_folder(tmp_path / "nested", {"state_dict": tensors}, biomedclip_config("test_vit")))
    x = pixels(160)
    for folder in folders:
        loaded = backbone.load(folder)
        assert torch.equal(loaded.visual(x), reference(x))
        state = loaded.visual.state_dict()
        assert {f"visual.{name}" for name in state} == {name for name in tensors if name.startswith("visual.")}
        assert all(torch.equal(tensor, tensors[f"visual.{name}"]) for name, tensor in state.items())
        assert (loaded.random, loaded.source) == (False, folder)
        assert loaded.statistics("model") == (tuple(MEAN), tuple(STD))
        assert loaded.statistics("imagenet") == (IMAGENET_MEAN, IMAGENET_STD)
        assert not loaded.visual.training
        assert not any(p.requires_grad for p in loaded.visual.parameters())


def test_the_checkpoint_s_own_statistics_are_used(tmp_path: Path) -> None:
    config = biomedclip_config("test_vit")
    config["preprocess_cfg"] = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    loaded = backbone.load(write_folder(tmp_path, toy_tensors(), config))
    assert loaded.statistics("model") == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_half_precision_weights_are_read_as_float32(tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in toy_tensors().items()}
    state = backbone.load(write_folder(tmp_path, half, biomedclip_config("test_vit"))).visual.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert torch.equal(state["head.proj.weight"], half["visual.head.proj.weight"].float())


# What is refused.


@pytest.mark.parametrize("arch", ["test_vit4", "test_resnet", "eva02_tiny_patch14_224", "no_such", "", "test_vit:0"])
def test_an_architecture_that_is_no_plain_vit_is_refused(arch: str) -> None:
    refused(f"random:0:{arch}")


@pytest.mark.parametrize(
    "source", ["random:", "random:x", "random:-1", "random:1.5", "random:\N{SUPERSCRIPT TWO}", "random:" + "9" * 30]
)
def test_a_seed_that_is_no_whole_number_is_refused(source: str) -> None:
    assert "random:SEED" in refused(source)


# Random towers.


def test_a_random_tower_is_decided_by_its_seed_alone() -> None:
    first = backbone.load(TOY)
    torch.manual_seed(99)
    torch.randn(7)
    again, other = backbone.load(TOY), backbone.load("random:1:test_vit")
    assert backbone.tower_sha256(first.visual) == backbone.tower_sha256(again.visual)
    assert backbone.tower_sha256(first.visual) != backbone.tower_sha256(other.visual)
    assert (first.random, first.source, first.image_size) == (True, TOY, 160)


def test_a_random_tower_leaves_every_global_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    seeded.clear()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    backbone.load(TOY)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    assert seeded == [], "the GPU generators were seeded"


# Identity.


@pytest.mark.parametrize("source", [TOY, TOY_AVERAGE])
@torch.inference_mode()
def test_the_prefix_hash_changes_with_exactly_the_weights_that_change_the_activations(source: str) -> None:
    visual = backbone.load(source).visual
    x = pixels(160, batch=1)
    depth = len(visual.trunk.blocks)
    cuts = (0, 2, depth)
    rows = {k: backbone.prefix(visual, x, k) for k in cuts}
    hashes = {k: backbone.prefix_sha256(visual, k) for k in cuts}
    assert len(set(hashes.values())) == len(cuts)
    tower, changed = backbone.tower_sha256(visual), dict.fromkeys(cuts, 0)
    assert hashes[0] == tower
    middle = tuple(f"trunk.blocks.{i}." for i in range(1, depth - 3))
    tensors = [tensor for name, tensor in visual.state_dict().items() if not name.startswith(middle)]
    for tensor in tensors:
        kept = tensor.clone()
        tensor += torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        assert backbone.tower_sha256(visual) != tower
        for k in cuts:
            moved = not torch.equal(backbone.prefix(visual, x, k), rows[k])
            assert (backbone.prefix_sha256(visual, k) != hashes[k]) == moved
            changed[k] += moved
        tensor.copy_(kept)
    assert changed[0] == len(tensors)
    assert changed[0] > changed[2] > changed[depth] > 0
    assert {k: backbone.prefix_sha256(visual, k) for k in cuts} == hashes


def test_one_bit_of_one_weight_changes_the_hash() -> None:
    visual = backbone.load(TOY).visual
    before = backbone.prefix_sha256(visual, 2)
    weight = visual.trunk.blocks[0].attn.qkv.weight
    with torch.no_grad():
        weight[0, 0] = math.nextafter(float(weight[0, 0]), 1.0)
        assert backbone.prefix_sha256(visual, 2) == before, "not a float32 step"
        weight[0, 0] = float(np.nextafter(np.float32(weight[0, 0]), np.float32(1)))
    assert backbone.prefix_sha256(visual, 2) != before


def test_a_cut_is_named_after_the_block_it_lies_before() -> None:
    assert [backbone.cut_name(12, k) for k in (0, 1, 2, 12)] == ["embedding", "blocks.11", "blocks.10", "blocks.0"]
    with pytest.raises(InputError, match=r"--unfreeze-blocks: 13 is more than the 12 blocks"):
        backbone.cut_name(12, 13)
    visual = backbone.load(TOY).visual
    identity = backbone.identity(visual, 2)
    assert identity["cut"] == "blocks.4"
    assert identity["prefix_sha256"] == backbone.prefix_sha256(visual, 2)


def test_without_timm_the_error_names_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line makes the line with the extra of it; open_clip's own error is a RuntimeError that names none."""
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        backbone.build_visual({"embed_dim": 8, "vision_cfg": {"timm_model_name": "x"}})
    assert extras.missing(caught.value) == "timm"
