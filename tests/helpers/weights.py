"""Checkpoints in open_clip's names and folders, made without any code of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cxr_fast.errors import InputError
from cxr_fast.models import backbone

SAFE, BIN = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def biomedclip_config(arch: str = "vit_base_patch16_224", **vision: Any) -> dict[str, Any]:
    """As in microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224."""
    return {
        "model_cfg": {
            "embed_dim": 512,
            "vision_cfg": {
                "timm_model_name": arch,
                "timm_model_pretrained": False,
                "timm_pool": "",
                "timm_proj": "linear",
                **vision,
            },
            "text_cfg": {
                "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
                "hf_tokenizer_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
                "hf_proj_type": "mlp",
                "hf_pooler_type": "cls_last_hidden_state_pooler",
                "context_length": 256,
            },
        },
        "preprocess_cfg": {"mean": MEAN, "std": STD},
    }


def biomedclip_tensors(seed: int, *, width: int, depth: int, tokens: int, hidden: int) -> dict[str, torch.Tensor]:
    """A whole CLIP checkpoint under the names of BiomedCLIP's file, spelt out here and drawn at random."""
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "visual.trunk.cls_token": (1, 1, width),
        "visual.trunk.pos_embed": (1, tokens, width),
        "visual.trunk.patch_embed.proj.weight": (width, 3, 16, 16),
        "visual.trunk.patch_embed.proj.bias": (width,),
        "visual.trunk.norm.weight": (width,),
        "visual.trunk.norm.bias": (width,),
        "visual.head.proj.weight": (512, width),
        "text.transformer.embeddings.word_embeddings.weight": (50, 16),
        "text.transformer.encoder.layer.0.attention.self.query.weight": (16, 16),
        "text.proj.0.weight": (8, 16),
        "text.proj.2.weight": (512, 8),
    }
    for i in range(depth):
        block = f"visual.trunk.blocks.{i}."
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", hidden, width),
            ("mlp.fc2", width, hidden),
        ):
            shapes |= {f"{block}{name}.weight": (rows, columns), f"{block}{name}.bias": (rows,)}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}


def toy_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    return biomedclip_tensors(seed, width=64, depth=6, tokens=101, hidden=192)


def write_folder(folder: Path, tensors: Any, config: dict[str, Any], name: str = BIN) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if name == SAFE:
        save_file(tensors, folder / name)
    elif isinstance(tensors, bytes):
        (folder / name).write_bytes(tensors)
    else:
        torch.save(tensors, folder / name)
    return str(folder)


def refused(source: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        backbone.load(str(source))
    message = str(caught.value)
    assert message.startswith("--weights: ")
    assert message.count("\n") <= 1
    return message
