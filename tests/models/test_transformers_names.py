"""Towers read from transformers' files equal transformers' own forward, each kind; refusals are one line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import cxr_fast
from cxr_fast.activations.encoder import normalise
from cxr_fast.config import IMAGENET_MEAN, IMAGENET_STD, PreprocessSpec
from cxr_fast.data.images import load as load_image
from cxr_fast.models import backbone, timm_towers, transformers_names, weights
from cxr_fast.models.tail import Tail
from tests.helpers.encoders import DINOV2, PROCESSOR, dinov2_tensors, draw, write_plain
from tests.helpers.weights import refused


def read_tower(folder: Path) -> Any:
    """The tower of a folder, before any check of what the tail and the export can do."""
    config, tensors = weights.read(str(folder))
    tower = timm_towers.build(json.loads(json.dumps(config)))  # as a run rebuilds it
    tower.load_state_dict(tensors, strict=True)
    return tower.eval()


def pixels(size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert b.std() > 1e-2, "the case says nothing"
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# Every kind beside transformers' own forward.

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
HIDDEN = {"intermediate_size": 70}
TEXT = {**HIDDEN, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 10}
TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def class_token(found: Any) -> torch.Tensor:
    return found.last_hidden_state[:, 0]


def pooled(found: Any) -> torch.Tensor:
    return found.pooler_output


def projected(found: Any) -> torch.Tensor:
    return found.image_embeds


def vision(kind: str, config: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"vision_config": {**config, "model_type": kind}, "text_config": TEXT, **more}


CASES: list[tuple[str, str, dict[str, Any], Callable[[Any], torch.Tensor], list[str]]] = [
    ("Dinov2Model", "Dinov2Config", SMALL, pooled, ["mask_token"]),
    (
        "Dinov2Model",
        "Dinov2Config",
        {**SMALL, "qkv_bias": False, "image_size": 33, "mlp_ratio": 3},
        pooled,
        ["mask_token"],
    ),
    ("Dinov2ForImageClassification", "Dinov2Config", SMALL, class_token, ["classifier", "mask_token"]),
    ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", SMALL, pooled, ["mask_token"]),
    ("SiglipVisionModel", "SiglipVisionConfig", {**SMALL, **HIDDEN}, pooled, []),
    (
        *("SiglipModel", "SiglipConfig", vision("siglip_vision_model", {**SMALL, **HIDDEN}), pooled),
        ["logit_bias", "logit_scale", "text_model"],
    ),
    ("CLIPVisionModel", "CLIPVisionConfig", {**SMALL, **HIDDEN}, pooled, []),
    ("CLIPVisionModel", "CLIPVisionConfig", {**SMALL, **HIDDEN, "hidden_act": "gelu"}, pooled, []),
    ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**SMALL, **HIDDEN, "projection_dim": 24}, projected, []),
    (
        *("CLIPModel", "CLIPConfig", vision("clip_vision_model", {**SMALL, **HIDDEN}, projection_dim=24), projected),
        ["logit_scale", "text_model", "text_projection"],
    ),
    ("ViTModel", "ViTConfig", {**SMALL, **HIDDEN}, class_token, ["pooler"]),
    ("ViTModel", "ViTConfig", {**SMALL, **HIDDEN, "qkv_bias": False, "image_size": 42}, class_token, ["pooler"]),
    ("ViTForImageClassification", "ViTConfig", {**SMALL, **HIDDEN}, class_token, ["classifier"]),
]


@pytest.fixture(scope="module")
def library() -> Any:
    found = pytest.importorskip("transformers")
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    return found


@pytest.mark.parametrize(("kind", "config_kind", "values", "embedding", "left_out"), CASES)
@torch.inference_mode()
def test_a_tower_equals_the_forward_of_transformers(
    library: Any,
    tmp_path: Path,
    kind: str,
    config_kind: str,
    values: dict[str, Any],
    embedding: Callable[[Any], torch.Tensor],
    left_out: list[str],
) -> None:
    model = draw(getattr(library, kind)(getattr(library, config_kind)(**values)))
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    tower, config = read_tower(tmp_path), weights.read(str(tmp_path))[0]
    x = pixels(values.get("vision_config", values)["image_size"])
    if kind in ("SiglipModel", "CLIPModel"):
        want = model.get_image_features(pixel_values=x)
        want = want if isinstance(want, torch.Tensor) else want.pooler_output
    else:
        base = model.base_model if kind.endswith("Classification") else model
        want = embedding(base(pixel_values=x))
        if kind != "CLIPVisionModelWithProjection":
            tokens = base(pixel_values=x).last_hidden_state
            tokens = base.post_layernorm(tokens) if kind == "CLIPVisionModel" else tokens
            close(tower.trunk.forward_features(x), tokens)
    close(tower(x), want)
    assert config.get("left_out", []) == left_out
    assert config["embed_dim"] == want.shape[1]


@torch.inference_mode()
def test_layers_named_as_in_the_modules_of_transformers_are_read_too(library: Any, tmp_path: Path) -> None:
    model = draw(library.ViTModel(library.ViTConfig(**SMALL, **HIDDEN), add_pooling_layer=False))
    folder = write_plain(tmp_path, {**model.config.to_dict(), "model_type": "vit"}, model.state_dict())
    x = pixels(28)
    close(read_tower(folder)(x), model(pixel_values=x).last_hidden_state[:, 0])


@torch.inference_mode()
def test_a_config_that_holds_only_differences_from_the_defaults_of_its_class_is_read(
    library: Any, tmp_path: Path
) -> None:
    """As google/siglip-base-patch16-224 has it: `vision_config` holds its model type and nothing more."""
    for kind, config in (
        ("siglip_vision_model", library.SiglipVisionConfig()),
        ("clip_vision_model", library.CLIPVisionConfig()),
        ("dinov2", library.Dinov2Config()),
        ("dinov2_with_registers", library.Dinov2WithRegistersConfig()),
        ("vit", library.ViTConfig()),
    ):
        given = config.to_dict()
        assert transformers_names.DEFAULTS[transformers_names.FAMILIES[kind]].items() <= given.items()
        few = transformers_names.read_config({"model_type": kind}, PROCESSOR, [], "here")
        assert few == transformers_names.read_config(given, PROCESSOR, [], "here")


# The encoder of the issue: real weights, real films.


@torch.inference_mode()
def test_dinov2_on_real_films_gives_what_transformers_gave(real_data: Path) -> None:
    root = real_data
    loaded = backbone.load(str(root / "weights" / "dinov2_small_hf"))
    assert loaded.shape == (257, 384, 384)
    assert (loaded.config["family"], loaded.image_size) == ("dinov2", 224)
    assert loaded.statistics("model") == (IMAGENET_MEAN, IMAGENET_STD)
    expected = np.load(root / "weights" / "dinov2_small_hf" / "expected.npz")
    films = [next((root / "nih_512").rglob(str(name))) for name in expected["image"]]
    grey = np.stack([load_image(path, PreprocessSpec(size=224)).pixels for path in films])
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in loaded.statistics("model"))
    tokens = loaded.visual.trunk.forward_features(normalise(torch.from_numpy(grey), mean, std))
    assert np.abs(tokens[:, 0].numpy() - expected["class_token"]).max() < 1e-4
    assert np.abs(tokens[:, 1:].mean(dim=1).numpy() - expected["patch_mean"]).max() < 1e-4


# Without transformers: names, cuts, several files.


@torch.inference_mode()
def test_prefix_and_tail_equal_the_whole_tower_at_every_cut(tmp_path: Path) -> None:
    loaded = backbone.load(str(write_plain(tmp_path, DINOV2, dinov2_tensors())))
    x = pixels(28)
    want = torch.nn.functional.normalize(loaded.visual(x), dim=-1)
    for blocks in range(loaded.depth + 1):
        tail = Tail(loaded.visual, unfreeze_blocks=blocks, classes=3).eval()
        close(tail.embedding(backbone.prefix(loaded.visual, x, blocks)), want)
    again = backbone.assemble(json.loads(json.dumps(loaded.config)), loaded.visual.state_dict())
    assert torch.equal(again(x), loaded.visual(x))


def test_float16_on_disk_is_float32_here(tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in dinov2_tensors().items()}
    loaded = backbone.load(str(write_plain(tmp_path, DINOV2, half)))
    assert {tensor.dtype for tensor in loaded.visual.state_dict().values()} == {torch.float32}
    query = half["encoder.layer.1.attention.attention.query.weight"].float()
    assert torch.equal(loaded.visual.trunk.blocks[1].attn.qkv.weight[:32], query)


def split(folder: Path) -> dict[str, str]:
    """Cut `model.safetensors` in two, with an index, as transformers does for large models."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return files


def test_a_model_in_several_files_is_the_same(tmp_path: Path) -> None:
    whole = backbone.load(str(write_plain(tmp_path / "a", DINOV2, dinov2_tensors())))
    split(write_plain(tmp_path / "b", DINOV2, dinov2_tensors()))
    parts = backbone.load(str(tmp_path / "b"))
    assert backbone.tower_sha256(parts.visual) == backbone.tower_sha256(whole.visual)


@pytest.mark.parametrize("name", ["model-00003-of-00003.safetensors", "../x.safetensors", "model.bin"])
def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    files = split(write_plain(tmp_path, DINOV2, dinov2_tensors()))
    (tmp_path / "x.safetensors").write_bytes(b"")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {**files, "layernorm.bias": name}})
    )
    assert f"names {name}, which does not exist beside it" in refused(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "names no files" in refused(tmp_path)


# What is refused, and why.


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"use_swiglu_ffn": True}, ["SwiGLU"]),
        ({"model_type": "dinov3_vit"}, ["'dinov3_vit' (rotary positions)"]),
        ({"model_type": "dinov3_convnext"}, ["(convolutions)"]),
        ({"model_type": "swinv2"}, ["(attention in windows)"]),
        ({"model_type": "convnextv2"}, ["(convolutions)"]),
        ({"model_type": "resnet"}, ["(convolutions)"]),
        ({"model_type": "bit"}, ["(convolutions)"]),
        ({"model_type": "bert"}, ["'bert'; supported are dinov2"]),
        ({"hidden_act": "relu"}, ["hidden_act 'relu'"]),
        ({"num_channels": 1}, ["1 channels"]),
        ({"image_size": [28, 42]}, ["for images of [28, 42] pixels; only squares"]),
        ({"image_size": -28}, ["for images of -28 pixels"]),
        ({"patch_size": 0}, ["for patches of 0 pixels"]),
        ({"num_hidden_layers": 10**9}, ["1000000000 blocks; from 1 to 1,000"]),
        ({"layer_norm_eps": -1}, ["layer_norm_eps -1.0"]),
        ({"layer_norm_eps": math.nan}, ["layer_norm_eps nan"]),
        ({"num_attention_heads": -2}, ["not a plain ViT", "-2 heads"]),
        ({"num_attention_heads": 3}, ["heads of another width"]),
        ({"num_attention_heads": 0}, ["describes no vision transformer"]),
        ({"hidden_size": "wide"}, ["describes no vision transformer"]),
        ({"hidden_size": 64}, ["and (1, 1, 64) by the config"]),
        ({"num_hidden_layers": 4}, ["14 missing: trunk.blocks.3."]),
        ({"num_hidden_layers": 2}, ["unknown", "trunk.blocks.2."]),
        ({"image_size": 42}, ["trunk.pos_embed has the shape (1, 5, 32) in the file, and (1, 10, 32) by"]),
        ({"patch_size": 7}, ["trunk.pos_embed has the shape (1, 5, 32) in the file, and (1, 17, 32) by"]),
        ({"model_type": "dinov2_with_registers"}, ["trunk.reg_token"]),
        ({"model_type": "vit"}, ["unknown", "ls1.gamma"]),
        ({"model_type": "siglip_vision_model", "vision_use_head": False}, ["no pooling"]),
    ],
)
def test_another_model_is_refused_with_the_reason(tmp_path: Path, change: dict[str, Any], parts: list[str]) -> None:
    message = refused(write_plain(tmp_path, {**DINOV2, **change}, dinov2_tensors()))
    assert all(part in message for part in parts), message
    assert "\n" not in message


def without(*gone: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in dinov2_tensors().items() if not name.endswith(gone)}


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        (without("position_embeddings"), ["(dinov2, 3 blocks of width 32): 1 missing: trunk.pos_embed."]),
        (
            {**dinov2_tensors(), "embeddings.cls_token": torch.ones(1, 1, 64)},
            ["trunk.cls_token has the shape (1, 1, 64) in the file, and (1, 1, 32) by the config (dinov2, 3 blocks"],
        ),
        (without("layer.1.attention.attention.key.weight"), ["no keys for trunk.blocks.1.attn.qkv.weight"]),
        (without("projection.weight"), ["no patch embedding of a dinov2 model; take its own"]),
        ({**dinov2_tensors(), "lora.weight": torch.ones(1)}, ["1 unknown: trunk.lora.weight."]),
        (
            {"a.embeddings.patch_embeddings.projection.weight": torch.ones(1), **dinov2_tensors()},
            ["2 patch embeddings"],
        ),
        ({"weight": torch.ones(1)}, ["no patch embedding"]),
        (
            {**dinov2_tensors(), "layernorm.weight": torch.ones(32, dtype=torch.int8)},
            ["holds layernorm.weight as torch.int8; quantised"],
        ),
        *(
            (
                {**dinov2_tensors(), "layernorm.weight": torch.full((32,), value, dtype=torch.float16)},
                ["trunk.norm.weight holds numbers that are not finite"],
            )
            for value in (math.nan, math.inf)
        ),
    ],
)
def test_tensors_of_another_model_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], parts: list[str]
) -> None:
    message = refused(write_plain(tmp_path, DINOV2, tensors))
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_a_pickled_checkpoint_is_refused_unread(tmp_path: Path) -> None:
    write_plain(tmp_path, DINOV2, None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    message = refused(tmp_path)
    assert "holds no model.safetensors; a pickled file, such as pytorch_model.bin, is not read" in message


def test_files_that_are_damaged_are_refused(tmp_path: Path) -> None:
    write_plain(tmp_path, DINOV2, dinov2_tensors())
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors")
    assert "cannot read" in refused(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "a Git LFS pointer" in refused(tmp_path)
    for text, part in (("{", "is not JSON"), ("[]", "no JSON object"), ("{}", "names no architecture")):
        write_plain(tmp_path, text, dinov2_tensors())
        assert part in refused(tmp_path)


# Statistics.


def test_statistics_are_the_files_own_or_the_model_is_refused(tmp_path: Path) -> None:
    folder = write_plain(tmp_path / "a", DINOV2, dinov2_tensors())
    assert backbone.load(str(folder)).statistics("model") == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    folder = write_plain(tmp_path / "b", DINOV2, dinov2_tensors(), processor=None)
    assert "holds no preprocessor_config.json with image_mean" in refused(folder)
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": PROCESSOR}))
    assert backbone.load(str(folder)).statistics("model") == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    for wrong in (
        {"image_mean": [0.5], "image_std": [0.5]},
        {"image_mean": [0.5] * 3, "image_std": [0, 1, 1]},
        {"image_mean": [0.5, math.nan, 0.5], "image_std": [1, 1, 1]},
        {"image_mean": [0.5] * 3, "image_std": [1, math.nan, 1]},
    ):
        write_plain(folder, DINOV2, None, {**PROCESSOR, **wrong})
        assert "three numbers" in refused(folder)


@given(st.floats(1e-3, 2), st.booleans(), st.booleans(), st.floats(0, 1), st.floats(0.1, 2))
def test_statistics_equal_what_the_image_processor_does(
    factor: float, rescale: bool, normalize: bool, mean: float, std: float
) -> None:
    processor = {"do_rescale": rescale, "rescale_factor": factor, "do_normalize": normalize}
    found = transformers_names.read_statistics({**processor, "image_mean": [mean] * 3, "image_std": std})
    grey = np.arange(256.0)
    want = grey * factor if rescale else grey
    want = (want - mean) / std if normalize else want
    np.testing.assert_allclose((grey / 255 - found[0][0]) / found[1][0], want, rtol=1e-9, atol=1e-9)


@given(st.integers(1, 4096), st.integers(1, 20_000))
def test_the_ratio_gives_the_hidden_width_back(width: int, hidden: int) -> None:
    """timm takes a ratio where transformers takes a width; 4304 / 1152 is one that rounding loses."""
    values = {**transformers_names.DEFAULTS["vit"], "hidden_size": width, "num_attention_heads": 1}
    vit = transformers_names._arguments("vit", {**values, "intermediate_size": hidden}, {}, "here")
    assert int(width * vit["mlp_ratio"]) == hidden


def test_no_module_imports_transformers() -> None:
    package = Path(cxr_fast.__file__).parent
    imports = re.compile(r"^\s*(?:import|from)\s+transformers\b", re.MULTILINE)
    assert not [path for path in package.rglob("*.py") if imports.search(path.read_text(encoding="utf-8"))]
    assert imports.search("    from transformers import AutoModel")
