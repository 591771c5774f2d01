"""Small towers of every supported kind, registered with timm, so that `random:0:NAME` builds them like any other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from cxr_fast.models import backbone
from cxr_fast.models.tail import Head
from cxr_fast.training.run_folder import Member, Run

SIZE = 40  # pixels, in 25 patches
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer_scale": {"init_values": 0.1},
    "registers": {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.1},
    "placed_registers": {"reg_tokens": 3},
    "normed_heads": {"qk_norm": True},
    "normed_heads_no_bias": {"qk_norm": True, "qkv_bias": False, "init_values": 0.1},
    "quick_gelu": {"act_layer": "quick_gelu", "pre_norm": True},
    "tanh_gelu": {"act_layer": "gelu_tanh", "norm_layer": "layernorm"},
    "attention_pool": {"global_pool": "map", "class_token": False},
    "attention_pool_tanh": {"global_pool": "map", "class_token": False, "act_layer": "gelu_tanh", "qk_norm": True},
    "attention_pool_past_tokens": {"global_pool": "map", "reg_tokens": 1, "qkv_bias": False},
    "attention_pool_over_registers": {
        "global_pool": "map", "class_token": False, "reg_tokens": 1, "pool_include_prefix": True,
        "act_layer": "quick_gelu", "fc_norm": True,
    },
    "average": {"global_pool": "avg", "class_token": False},
    "average_normed": {"global_pool": "avg", "fc_norm": False, "qk_norm": True, "reg_tokens": 1, "init_values": 0.1},
    "average_of_all": {"global_pool": "avg", "pool_include_prefix": True},
    "no_last_norm": {"final_norm": False},
    "norm_after_pooling": {"fc_norm": True, "pre_norm": True},
    "no_positions": {"pos_embed": "none"},
    "embedding_norm": {"embed_norm_layer": "layernorm"},
}  # fmt: skip
TOKEN = [kind for kind, named in KINDS.items() if named.get("global_pool", "token") == "token"]
MAPPED = [kind for kind, named in KINDS.items() if named.get("global_pool") == "map"]


def _register(kind: str) -> None:
    def make(pretrained: bool = False, **named: Any) -> VisionTransformer:
        sizes = {"img_size": SIZE, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2}
        known = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
        given = {key: value for key, value in named.items() if key not in known and value is not None}
        model = VisionTransformer(**{**sizes, **KINDS[kind], **given})
        model.default_cfg = model.pretrained_cfg = {"pool_size": None}
        return model

    make.__name__, make.__module__ = f"cxr_{kind}", __name__
    register_model(make)


for _kind in KINDS:
    _register(_kind)


def source(kind: str) -> str:
    """What `--weights` takes for a tower of a kind."""
    return f"random:0:cxr_{kind}"


def scramble(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight, bias and scale random, so that a forgotten term shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(0.3 * noise + (1.0 if name.endswith(("weight", "gamma")) else 0.0))
            else:
                inputs = p[0].numel() if p.ndim in (2, 4) else 1
                p.copy_(noise * (1.5 * math.sqrt(1 / inputs)))
    return module


def tower(kind: str, seed: int = 0) -> backbone.Backbone:
    """A tower of a kind, scrambled."""
    found = backbone.load(source(kind))
    scramble(found.visual, seed)
    return found


def run_of(found: backbone.Backbone, *, unfreeze_blocks: int = 1, classes: int = 5) -> Run:
    """A run of a tower as it is, with a head drawn at random: nothing was trained."""
    head = Head(found.shape[2], classes, dropout=0.0).eval().requires_grad_(False)
    head.reset(torch.Generator().manual_seed(1))
    for layer in head:
        if isinstance(layer, nn.Linear):
            layer.weight.mul_(20 if layer is head[0] else 3)  # images get different answers
    info = {
        "preprocess": {"size": found.image_size},
        "classes": [f"class{c}" for c in range(classes)],
        "calibration": None,
        "train": {},
        "unfreeze_blocks": unfreeze_blocks,
        "mean": found.config["mean"],
        "std": found.config["std"],
    }
    member = Member(visual=found.visual, head=head)
    return Run(folder=Path(), info=info, members=(member,), chosen="best-fold", tta=None)
