"""Towers read from timm's files equal timm's own; the same weights from transformers' files give the same; refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

from cxr_fast.activations.encoder import normalise
from cxr_fast.models import backbone, timm_towers, weights
from tests.helpers.encoders import draw, write_plain
from tests.helpers.weights import refused

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 48}


def read_tower(folder: Path) -> Any:
    """The tower of a folder, before any check of what the tail and the export can do."""
    config, tensors = weights.read(str(folder))
    tower = timm_towers.build(json.loads(json.dumps(config)))  # as a run rebuilds it
    tower.load_state_dict(tensors, strict=True)
    return tower.eval()


def pixels(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def write_own(folder: Path, model: Any, arguments: dict[str, Any]) -> Path:
    """A folder as timm writes it for the hub."""
    save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    return folder


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("vit_small_patch16_224", {}),
        ("vit_small_patch16_224", {"num_classes": 5, "global_pool": "avg", "drop_rate": 0.1}),
        ("vit_small_patch14_dinov2", {"img_size": 42, "num_classes": 0}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 42}),
        ("vit_base_patch16_siglip_224", {"mlp_ratio": 3}),
        ("vit_base_patch16_clip_quickgelu_224", {}),
        ("vit_base_patch16_224", {"qk_norm": True, "dynamic_img_size": True}),
        ("deit3_small_patch16_224", {}),
    ],
)
@torch.inference_mode()
def test_a_tower_equals_timms_own(tmp_path: Path, architecture: str, more: dict[str, Any]) -> None:
    arguments = {**SMALL, **more}
    model = draw(timm.create_model(architecture, **arguments))
    folder = write_own(tmp_path, model, arguments)
    tower, config, x = read_tower(folder), weights.read(str(folder))[0], pixels(arguments["img_size"])
    want = model.forward_head(model.forward_features(x), pre_logits=True)
    assert want.std() > 1e-2
    torch.testing.assert_close(tower(x), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tower.trunk.forward_features(x), model.forward_features(x), rtol=1e-6, atol=1e-6)
    assert (config["mean"], config["std"]) == (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    assert config.get("left_out", []) == (["head"] if model.num_classes else [])


@torch.inference_mode()
def test_a_folder_of_timm_loads_and_cuts(tmp_path: Path) -> None:
    model = draw(timm.create_model("vit_small_patch14_dinov2", num_classes=0, **{**SMALL, "img_size": 42}))
    loaded = backbone.load(str(write_own(tmp_path, model, {**SMALL, "img_size": 42})))
    assert (loaded.shape, loaded.depth, loaded.image_size) == ((10, 32, 32), 2, 42)
    x = pixels(42)
    torch.testing.assert_close(loaded.visual(x), model(x), rtol=1e-6, atol=1e-6)
    again = backbone.assemble(json.loads(json.dumps(loaded.config)), loaded.visual.state_dict())
    assert torch.equal(again(x), loaded.visual(x))


@torch.inference_mode()
def test_the_same_weights_under_the_names_of_timm_give_the_same_activations(real_data: Path, tmp_path: Path) -> None:
    source = str(real_data / "weights" / "dinov2_small_hf")
    first = backbone.load(source)
    tensors = {name.removeprefix("trunk."): tensor for name, tensor in first.visual.state_dict().items()}
    mean, std = first.statistics("model")
    pretrained = {"input_size": [3, 224, 224], "mean": mean, "std": std, "interpolation": "bicubic", "crop_pct": 1.0}
    config = {"architecture": "vit_small_patch14_dinov2", "global_pool": "token", "num_features": 384}
    second = backbone.load(str(write_plain(tmp_path, {**config, "pretrained_cfg": pretrained}, tensors, None)))
    assert second.statistics("model") == first.statistics("model")
    grey = torch.randint(0, 256, (2, 224, 224), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    x = normalise(grey, torch.tensor(mean).reshape(1, 3, 1, 1), torch.tensor(std).reshape(1, 3, 1, 1))
    for blocks in (0, 2):
        a, b = (backbone.prefix(each.visual, x, blocks) for each in (first, second))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("top", [None, "avg"])
@torch.inference_mode()
def test_the_pooling_of_the_saved_network_comes_before_what_its_weights_came_with(
    tmp_path: Path, top: str | None
) -> None:
    arguments = {"global_pool": "avg" if top is None else "token"}
    model = draw(timm.create_model("test_vit", num_classes=0, global_pool="avg"))
    came_with = {**CONFIG["pretrained_cfg"], "global_pool": "token"}
    config = {**CONFIG, "global_pool": top, "model_args": arguments, "pretrained_cfg": came_with}
    loaded = backbone.load(str(write_plain(tmp_path, config, model.state_dict(), None)))
    x = pixels(160)
    torch.testing.assert_close(loaded.visual(x), model(x), rtol=1e-6, atol=1e-6)


@torch.inference_mode()
def test_an_older_config_without_pretrained_cfg_around_it_is_read(tmp_path: Path) -> None:
    model = draw(timm.create_model("test_vit", num_classes=0))
    config = {"architecture": "test_vit", "input_size": [3, 160, 160], "mean": [0.5] * 3, "std": [0.5] * 3}
    loaded = backbone.load(str(write_plain(tmp_path, config, model.state_dict(), None)))
    x = pixels(160)
    torch.testing.assert_close(loaded.visual(x), model(x), rtol=1e-6, atol=1e-6)


CONFIG = {
    "architecture": "test_vit",
    "global_pool": "token",
    "pretrained_cfg": {"input_size": [3, 160, 160], "mean": [0.5] * 3, "std": [0.5] * 3, "license": "mit"},
}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"architecture": "resnet18"}, ["resnet18", "(convolutions)"]),
        ({"architecture": "convnext_tiny"}, ["(convolutions)"]),
        ({"architecture": "resnetv2_50x1_bit"}, ["(convolutions)"]),
        ({"architecture": "swin_tiny_patch4_window7_224"}, ["(attention in windows)"]),
        ({"architecture": "eva02_tiny_patch14_224"}, ["rotary positions or SwiGLU"]),
        ({"architecture": "vit_small_patch16_dinov3"}, ["rotary positions", "DINOv3"]),
        ({"architecture": "vit_giant_patch14_dinov2", "model_args": {**SMALL, "img_size": 42}}, ["which has SwiGLU"]),
        ({"architecture": "beit_base_patch16_224"}, ["relative position biases"]),
        ({"architecture": "mlp_mixer_of_mine"}, ["which timm", "lacks"]),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, ["sets checkpoint_path"]),
        ({"model_args": {"pretrained": True}}, ["sets pretrained"]),
        ({"model_args": {"num_heads": 7}}, ["describes no vision transformer"]),
        ({"pretrained_cfg": {}}, ["describes no vision transformer ('input_size' is missing)"]),
        ({"pretrained_cfg": {"input_size": [3, 160, 160], "std": [1, 1, 1]}}, ["'mean' is missing"]),
        ({"pretrained_cfg": {**CONFIG["pretrained_cfg"], "std": [0, 0, 0]}}, ["three numbers"]),
        (
            {"pretrained_cfg": {**CONFIG["pretrained_cfg"], "input_size": [3, 160, 320]}},
            ["images of [160, 320] pixels; only squares"],
        ),
        ({"model_args": {"img_size": 176}}, ["trunk.pos_embed has the shape (1, 101, 64) in the file", "(1, 122, 64)"]),
        ({"model_args": {"depth": 7}}, ["12 missing: trunk.blocks.6."]),
        ({"model_args": {"num_heads": -2}}, ["not a plain ViT", "-2 heads"]),
        ({"model_args": {"depth": 10**6}}, ["1000000 blocks; from 1 to 1,000"]),
        ({"architecture": "deit_tiny_distilled_patch16_224"}, ["timm's VisionTransformerDistilled"]),
        ({"global_pool": "max"}, ["not a plain ViT"]),
    ],
)
def test_another_network_is_refused_with_the_reason(tmp_path: Path, change: dict[str, Any], parts: list[str]) -> None:
    model = timm.create_model("test_vit", num_classes=0)
    message = refused(write_plain(tmp_path, {**CONFIG, **change}, model.state_dict(), None))
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_the_licence_is_that_of_the_config_or_of_the_card(tmp_path: Path) -> None:
    folder = write_plain(tmp_path, CONFIG, timm.create_model("test_vit", num_classes=0).state_dict(), None)
    assert backbone.load(str(folder)).config["licence"] == "mit"
    assert weights.read_licence(weights.locate(str(folder))) == ""
    for header, said in (
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# Card\n", "apache-2.0"),
        ("---\ntags: [x]\nlicense: other\nlicense_name: some-terms\n---\n", "other (some-terms)"),
        ("# Card\nlicense: mit\n", ""),
    ):
        (folder / "README.md").write_text(header)
        assert weights.read_licence(weights.locate(str(folder))) == said
