"""Configs and tensors of transformers' vision models, as timm's vision transformer has them. It is never imported."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..errors import InputError
from .timm_towers import read_side, require_depth

# What a config leaves out is the default of its class in transformers: a nested config is saved as its differences.
_VIT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3, "image_size": 224}
_DINO = {**_VIT, "mlp_ratio": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True, "patch_size": 14}
DEFAULTS: dict[str, dict[str, Any]] = {
    "dinov2": {**_DINO, "use_swiglu_ffn": False},
    "dinov2_with_registers": {**_DINO, "use_swiglu_ffn": False, "patch_size": 16, "num_register_tokens": 4},
    "siglip": {
        **_VIT,
        "intermediate_size": 3072,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "patch_size": 16,
        "vision_use_head": True,
    },
    "clip": {
        **_VIT,
        "intermediate_size": 3072,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "patch_size": 32,
        "projection_dim": 512,
    },
    "vit": {
        **_VIT,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "patch_size": 16,
        "qkv_bias": True,
    },
}
FAMILIES = {**{name: name for name in DEFAULTS}, "siglip_vision_model": "siglip", "clip_vision_model": "clip"}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
# Why a model type is refused; the first start of its name that fits.
REASONS = {
    "dinov3_convnext": "convolutions",
    "dinov3": "rotary positions",
    "eva": "rotary positions",
    "pixtral": "rotary positions",
    "swin": "attention in windows",
    "hiera": "attention in windows",
    "convnext": "convolutions",
    "resnet": "convolutions",
    "bit": "convolutions",
    "regnet": "convolutions",
    "efficientnet": "convolutions",
    "beit": "relative position biases",
    "data2vec": "relative position biases",
    "deit": "a distillation token",
    "siglip2": "patches of any number, each with a size of its own",
}
BLOCK = re.compile(r"(?:encoder\.)?layers?\.(\d+)\.(.+)\.(weight|bias|lambda1)")
QKV = {
    f"{start}.{name}": place
    for start, names in (
        ("attention.attention", ("query", "key", "value")),
        ("attention", ("q_proj", "k_proj", "v_proj")),
        ("self_attn", ("q_proj", "k_proj", "v_proj")),
    )
    for place, name in enumerate(names)
}
IN_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "self_attn.out_proj": "attn.proj",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.class_embedding": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.position_embedding.weight": "pos_embed",
    **{
        f"{there}.{kind}": f"{here}.{kind}"
        for there, here in (
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.patch_embedding", "patch_embed.proj"),
            ("pre_layrnorm", "norm_pre"),
            ("layernorm", "norm"),
            ("post_layernorm", "norm"),
            ("head.attention.out_proj", "attn_pool.proj"),
            ("head.layernorm", "attn_pool.norm"),
            ("head.mlp.fc1", "attn_pool.mlp.fc1"),
            ("head.mlp.fc2", "attn_pool.mlp.fc2"),
        )
        for kind in ("weight", "bias")
    },
    "head.probe": "attn_pool.latent",
}
POOL_QKV = "head.attention.in_proj_"  # queries, keys and values in one tensor
ANCHOR = re.compile(r"(.*?)embeddings\.patch_embeddings?\.(?:projection\.)?weight")
PROJECTION = "visual_projection.weight"
# Tensors of a tower that no embedding depends on.
UNUSED = ("embeddings.mask_token", "embeddings.position_ids", "pooler.")


def read_config(
    raw: Mapping[str, Any], processor: Mapping[str, Any], names: Iterable[str], where: str
) -> dict[str, Any]:
    """The config of a tower from `config.json`, the image processor's JSON and the names of the tensors.

    Raises InputError for a model type that is not supported, with the reason.
    """
    kind = str(raw["model_type"])
    if kind not in FAMILIES:
        why = next((f" ({reason})" for start, reason in REASONS.items() if kind.startswith(start)), "")
        known = ", ".join(FAMILIES)
        raise InputError(f"--weights: {where} is of the model type {kind!r}{why}; supported are {known}.")
    family = FAMILIES[kind]
    whole = kind in ("clip", "siglip")  # with a text part
    found = {**(raw.get("vision_config") or {}), **(raw.get("vision_config_dict") or {})} if whole else raw
    values = {key: default if found.get(key) is None else found[key] for key, default in DEFAULTS[family].items()}
    projection = kind == "clip" or (family == "clip" and any(name.endswith(PROJECTION) for name in names))
    if kind == "clip":
        values["projection_dim"] = raw.get("projection_dim") or 512
    vit = _arguments(family, values, found, where)
    mean, std = read_statistics(processor)
    return {
        "family": family,
        "embed_dim": int(values["projection_dim"]) if projection else vit["embed_dim"],
        "vision_cfg": {
            "image_size": read_side(values["image_size"], "images", where),
            "vit": vit,
            "projection": projection,
        },
        "mean": mean,
        "std": std,
        "preprocess": _asked_resize(processor),
    }


def _arguments(family: str, values: Mapping[str, Any], found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer; `act_layer` and `norm_eps` by name and number. Raises InputError."""

    def refuse(what: str) -> InputError:
        return InputError(f"--weights: {where} has {what}; that is not supported.")

    width, heads, eps = (values[name] for name in ("hidden_size", "num_attention_heads", "layer_norm_eps"))
    width, heads, eps = int(width), int(heads), float(eps)
    require_depth(values["num_hidden_layers"], where)
    if values.get("use_swiglu_ffn"):
        raise refuse("SwiGLU (use_swiglu_ffn)")
    if values["hidden_act"] not in ACTIVATIONS:
        raise refuse(f"hidden_act {values['hidden_act']!r}")
    if values["num_channels"] != 3:
        raise refuse(f"{values['num_channels']} channels instead of 3")
    if values.get("vision_use_head") is False:
        raise refuse("no pooling (vision_use_head is false)")
    if not 0 <= eps < math.inf:
        raise refuse(f"layer_norm_eps {eps}")
    if width % heads or found.get("head_dim") not in (None, width // heads):
        raise refuse(f"heads of another width than {width} / {heads}")
    hidden = int(values["intermediate_size"] if "intermediate_size" in values else width * values["mlp_ratio"])
    ratio = hidden / width
    dino = family.startswith("dinov2")
    return {
        "patch_size": read_side(values["patch_size"], "patches", where),
        "embed_dim": width,
        "depth": int(values["num_hidden_layers"]),
        "num_heads": heads,
        "mlp_ratio": ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
        "qkv_bias": bool(values.get("qkv_bias", True)),
        "init_values": 1.0 if dino else None,
        "class_token": family != "siglip",
        "reg_tokens": int(values.get("num_register_tokens", 0)),
        "no_embed_class": family == "dinov2_with_registers",
        "pre_norm": family == "clip",
        "global_pool": "map" if family == "siglip" else "token",
        "act_layer": ACTIVATIONS[values["hidden_act"]],
        "norm_eps": eps,
    }


def read_statistics(processor: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of three channels of grey levels in 0 to 1, from an image processor's JSON.

    Another factor than 1/255 before the normalisation is folded into them. Raises KeyError, TypeError or ValueError.
    """
    scale = 255 * float(processor.get("rescale_factor") or 1 / 255) if processor.get("do_rescale", True) else 255.0
    mean, std = (
        tuple(map(float, value)) if isinstance(value, list) else (float(value),) * 3
        for value in (
            (processor["image_mean"], processor["image_std"]) if processor.get("do_normalize", True) else (0, 1)
        )
    )
    if math.isclose(scale, 1, rel_tol=1e-6):
        return mean, std
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)


def _asked_resize(processor: Mapping[str, Any]) -> dict[str, str]:
    names = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
    resample = processor.get("resample", 3)
    size = processor.get("size")
    cropped = processor.get("do_center_crop") or (isinstance(size, dict) and "shortest_edge" in size)
    shown = processor.get("crop_size", size) if processor.get("do_center_crop") else size
    side = next(iter(shown.values()), None) if isinstance(shown, dict) else shown
    return {
        "resize": "pad" if processor.get("do_pad") else "crop" if cropped else "squash",
        "interpolation": names.get(resample, str(resample)),
        **({"size": f"{side} pixels"} if isinstance(side, int) else {}),
    }


def select(names: list[str], config: Mapping[str, Any], where: str) -> tuple[dict[str, str], list[str]]:
    """The tower's tensors among those of a file, and the parts that are left out: text, classifier, pooler.

    Names inside the tower are without its prefix (`vit.`, `vision_model.`). Returns ({name in the file: name inside},
    parts). Raises InputError where there is no tower, or more than one.
    """
    starts = [found[1] for name in names if (found := ANCHOR.fullmatch(name))]
    if len(starts) != 1:
        count = f"{len(starts)} patch embeddings" if starts else "no patch embedding"
        raise InputError(f"--weights: the weights in {where} hold {count} of a {config['family']} model; take its own.")
    start, kept, left_out = starts[0], {}, set()
    for name in names:
        inside = name.removeprefix(start)
        if config["vision_cfg"]["projection"] and name == start.removesuffix("vision_model.") + PROJECTION:
            kept[name] = PROJECTION
        elif not name.startswith(start) or inside.startswith(UNUSED):
            part = inside if name.startswith(start) else name
            left_out.add(part.removeprefix("embeddings.").partition(".")[0])
        else:
            kept[name] = inside
    return kept, sorted(left_out - {"position_ids"})


def rename(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], where: str) -> dict[str, torch.Tensor]:
    """Tensors by their names inside the tower, under timm's names in float32; queries, keys and values as one.

    Positions of the class token, which timm keeps without a place where there are registers, are added to it. A name
    that means nothing keeps its own. Raises InputError where one of queries, keys and values is missing.
    """
    out: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        tensor, block = tensor.float(), BLOCK.fullmatch(name)
        if name == PROJECTION:
            out["head.proj.weight"] = tensor
        elif name.startswith(POOL_QKV):
            kind, width = name.removeprefix(POOL_QKV), len(tensor) // 3
            out[f"trunk.attn_pool.q.{kind}"], out[f"trunk.attn_pool.kv.{kind}"] = tensor[:width], tensor[width:]
        elif block and block[2] in QKV:
            parts.setdefault(f"trunk.blocks.{block[1]}.attn.qkv.{block[3]}", {})[QKV[block[2]]] = tensor
        elif block:
            kind = "gamma" if block[3] == "lambda1" else block[3]
            out[f"trunk.blocks.{block[1]}.{IN_BLOCK.get(block[2], block[2])}.{kind}"] = tensor
        else:
            out[f"trunk.{OUTSIDE.get(name, name)}"] = tensor
    for name, found in parts.items():
        if len(found) < 3:
            lost = ", ".join(word for i, word in enumerate(("queries", "keys", "values")) if i not in found)
            raise InputError(f"--weights: {where} holds no {lost} for {name}.")
        out[name] = torch.cat([found[i] for i in range(3)])
    return _as_timm(out, config)


def _as_timm(out: dict[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Class token (1, 1, D) and positions (1, T, D) in timm's shapes."""
    classes, positions = out.get("trunk.cls_token"), out.get("trunk.pos_embed")
    if classes is not None:
        classes = out["trunk.cls_token"] = classes.reshape(1, 1, -1)
    if positions is not None and positions.ndim == 2:
        positions = out["trunk.pos_embed"] = positions[None]
    if config["vision_cfg"]["vit"]["no_embed_class"] and classes is not None and positions is not None:
        if classes.shape[-1] == positions.shape[-1]:
            out["trunk.cls_token"] = classes + positions[:, :1]
        out["trunk.pos_embed"] = positions[:, 1:]
    return out
