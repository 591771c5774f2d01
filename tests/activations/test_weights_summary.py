"""What is said of a set of weights before anything is encoded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cxr_fast.activations.file import ActivationFile
from cxr_fast.activations.weights_summary import count_operations, summarise
from cxr_fast.config import CacheSpec
from cxr_fast.errors import InputError
from cxr_fast.models import backbone
from tests.conftest import TOY, TOY_AVERAGE
from tests.helpers.encoders import DINOV2, PROCESSOR, dinov2_tensors, write_plain
from tests.helpers.weights import biomedclip_config, toy_tensors, write_folder


def test_a_folder_of_transformers_is_described(tmp_path: Path) -> None:
    asked = {"do_center_crop": True, "crop_size": {"height": 14, "width": 14}, "size": {"shortest_edge": 16}}
    folder = write_plain(tmp_path, DINOV2, dinov2_tensors(), {**PROCESSOR, **asked, "resample": 2})
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    found = summarise(str(folder))
    assert found.family == "transformers, dinov2"
    assert (found.tokens, found.width, found.depth, found.heads) == ((1, 0, 4), 32, 3, 2)
    assert (found.patch, found.image_size, found.pooling, found.embedding) == (14, 28, "token", 32)
    assert (found.mean, found.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert found.asked == {"resize": "crop", "interpolation": "bilinear", "size": "14 pixels"}
    assert (found.left_out, found.licence, found.random) == (("mask_token",), "mit", False)
    assert found.parameters == sum(t.numel() for name, t in dinov2_tensors().items() if "mask" not in name)
    assert found.seconds > 0


def test_the_bytes_are_those_of_a_row_of_a_cache(toy_cache: Path) -> None:
    shape = ActivationFile(toy_cache).header.shape  # by the toy's architecture
    found = summarise(TOY)
    assert found.row_bytes == 2 * math.prod(shape[1:])
    assert (found.random, found.licence, found.left, found.views) == (True, "", 2, 2)
    assert summarise(TOY, CacheSpec(unfreeze_blocks=0, views=("plain",), dtype="float32")).row_bytes == 4 * 512


@pytest.mark.parametrize("source", [TOY, TOY_AVERAGE])
@torch.inference_mode()
def test_the_operations_are_those_that_torch_counts(source: str) -> None:
    tower = backbone.load(source)
    x = torch.zeros(1, 3, tower.image_size, tower.image_size)
    for blocks in (0, 2):
        with FlopCounterMode(display=False) as counter:
            backbone.prefix(tower.visual, x, tower.depth - blocks)
        assert count_operations(tower.visual.trunk, blocks) == counter.get_total_flops()


def test_the_resize_of_an_open_clip_config_is_said(tmp_path: Path) -> None:
    config = biomedclip_config("test_vit")
    assert summarise(write_folder(tmp_path / "a", toy_tensors(), config)).asked == {}
    config["preprocess_cfg"] |= {"interpolation": "bilinear", "resize_mode": "shortest"}
    found = summarise(write_folder(tmp_path / "b", toy_tensors(), config))
    assert found.asked == {"resize": "crop", "interpolation": "bilinear"}
    assert (found.family, found.projection, found.embedding) == ("open_clip, test_vit", True, 512)


def test_weights_that_cannot_be_loaded_are_refused_as_they_would_be(tmp_path: Path) -> None:
    folder = write_plain(tmp_path, {**DINOV2, "use_swiglu_ffn": True}, dinov2_tensors())
    with pytest.raises(InputError, match="SwiGLU"):
        summarise(str(folder))
