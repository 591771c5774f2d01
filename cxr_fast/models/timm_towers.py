"""Vision towers that timm builds: of an architecture that timm names, or of its VisionTransformer's own arguments."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import InputError

# Arguments of timm's VisionTransformer that a config may set. The others change no weight and no activation (dropout,
# flexible sizes), or make another network.
ARGUMENTS = (
    "patch_size embed_dim depth num_heads mlp_ratio qkv_bias qk_norm scale_attn_norm scale_mlp_norm proj_bias "
    "init_values class_token pos_embed no_embed_class reg_tokens pre_norm final_norm fc_norm pool_include_prefix "
    "global_pool act_layer norm_layer"
)
IGNORED = (
    "img_size num_classes in_chans dynamic_img_size dynamic_img_pad strict_img_size drop_rate pos_drop_rate "
    "patch_drop_rate proj_drop_rate attn_drop_rate drop_path_rate weight_init fix_init"
)
MOST_BLOCKS = 1000  # a config that asks for more is wrong, and building it would take minutes
VIT = ("vision_transformer", "deit")  # the modules of timm with its plain vision transformers
# Why the networks of a module of timm are refused; the first start of its name that fits.
REASONS = {
    "eva": "rotary positions or SwiGLU (timm's Eva, so EVA-02 and DINOv3)",
    "beit": "relative position biases",
    "vision_transformer_relpos": "relative position biases",
    "vision_transformer_sam": "attention in windows",
    "vision_transformer_hybrid": "convolutions",
    "swin": "attention in windows",
    "maxxvit": "attention in windows",
    "hiera": "attention in windows",
    "convnext": "convolutions",
    "res": "convolutions",
    "densenet": "convolutions",
    "efficientnet": "convolutions",
    "regnet": "convolutions",
}


class Tower(nn.Module):
    """A trunk (timm's VisionTransformer) and a head that holds its projection `proj`, or nothing."""

    def __init__(self, trunk: nn.Module, projection: nn.Module | None) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Sequential(OrderedDict({} if projection is None else {"proj": projection}))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised image (B, 3, H, W) to the embedding (B, E)."""
        embedding: torch.Tensor = self.head(self.trunk(x))
        return embedding


def is_described(vision: Mapping[str, Any]) -> bool:
    """Whether a `vision_cfg` holds arguments for `build`; one of open_clip holds none."""
    return "vit" in vision or "timm_model_args" in vision


def name_of(config: Mapping[str, Any]) -> str:
    """What messages call a tower: its architecture's name in timm, or its family and size."""
    vision = config["vision_cfg"]
    if vision.get("timm_model_name"):
        return str(vision["timm_model_name"])
    vit = vision.get("vit") or {}
    return f"{config.get('family', 'vit')}, {vit.get('depth')} blocks of width {vit.get('embed_dim')}"


def build(config: Mapping[str, Any]) -> Tower:
    """A tower without weights for a config that `read_config`, or that of transformers, made.

    Raises what timm raises where the arguments fit no network.
    """
    from timm.layers import get_act_layer
    from timm.models.vision_transformer import LayerNorm, VisionTransformer

    vision = config["vision_cfg"]
    if "vit" not in vision:
        return Tower(_create(vision["timm_model_name"], vision["image_size"], vision["timm_model_args"]), None)
    values = dict(vision["vit"])
    act = nn.GELU if (name := values.pop("act_layer")) == "gelu" else get_act_layer(name)
    norm = partial(LayerNorm, eps=values.pop("norm_eps"))
    trunk = VisionTransformer(
        img_size=vision["image_size"], num_classes=0, act_layer=act, norm_layer=norm, weight_init="skip", **values
    )
    if trunk.attn_pool is not None:  # its MLP has the activation of the blocks, whatever this timm passes on
        trunk.attn_pool.mlp.act = act()
    projection = nn.Linear(trunk.embed_dim, config["embed_dim"], bias=False) if vision["projection"] else None
    return Tower(trunk, projection)


def _create(name: str, size: int, arguments: Mapping[str, Any]) -> Any:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=0, img_size=size, **arguments)


def read_config(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config of a tower from timm's `config.json`. Raises InputError for one that is no plain vision transformer.

    Statistics, size and pooling come from it: an older file holds them without `pretrained_cfg` around them.
    """
    name, pretrained = str(raw["architecture"]).split(".")[0], raw.get("pretrained_cfg") or raw
    _require_vit(name, where)
    saved = dict(raw.get("model_args") or {})
    if unknown := sorted(set(saved) - {*ARGUMENTS.split(), *IGNORED.split()}):
        raise InputError(f"--weights: {where} sets {', '.join(unknown)}, and such a network is not supported.")
    arguments = {key: value for key, value in saved.items() if key in ARGUMENTS.split()}
    # The pooling that the saved network had; else, as timm does, its arguments before what the weights came with.
    if pool := raw.get("global_pool") or arguments.get("global_pool") or pretrained.get("global_pool"):
        arguments["global_pool"] = pool
    if "depth" in arguments:
        require_depth(arguments["depth"], where)
    size = read_side(saved.get("img_size") or list(pretrained["input_size"])[1:], "images", where)
    with torch.device("meta"):
        trunk = _create(name, size, arguments)
    if type(trunk).__name__ != "VisionTransformer":
        raise InputError(f"--weights: {where} describes {name}, timm's {type(trunk).__name__}; that is not supported.")
    if any("glu" in type(getattr(block, "mlp", None)).__name__.lower() for block in trunk.blocks):
        raise InputError(f"--weights: {where} describes {name}, which has SwiGLU; that is not supported.")
    return {
        "family": "timm",
        "embed_dim": int(trunk.embed_dim),
        "vision_cfg": {"timm_model_name": name, "image_size": size, "timm_model_args": arguments},
        "mean": tuple(float(value) for value in pretrained["mean"]),
        "std": tuple(float(value) for value in pretrained["std"]),
        "preprocess": _asked_resize(pretrained),
        **({"licence": str(pretrained["license"])} if pretrained.get("license") else {}),
    }


def _asked_resize(pretrained: Mapping[str, Any]) -> dict[str, str]:
    mode = {"squash": "squash", "border": "pad"}.get(str(pretrained.get("crop_mode")), "crop")
    return {"resize": mode, "interpolation": str(pretrained.get("interpolation") or "bicubic")}


def read_side(size: Any, what: str, where: str) -> int:
    """The pixels a side of images or patches, from a number or a list of equal ones. Raises InputError."""
    sides = {int(side) for side in (size if isinstance(size, list | tuple) else [size])}
    if len(sides) != 1 or min(sides) < 1:
        raise InputError(f"--weights: {where} is for {what} of {size} pixels; only squares are supported.")
    return sides.pop()


def require_depth(depth: Any, where: str) -> None:
    """Refuse a number of blocks that no vision transformer has, before any is built. Raises InputError."""
    if not 1 <= int(depth) <= MOST_BLOCKS:
        raise InputError(f"--weights: {where} is for {depth} blocks; from 1 to {MOST_BLOCKS:,} are supported.")


def _require_vit(name: str, where: str) -> None:
    """Refuse an architecture that timm does not know, or whose networks are of another kind, with the reason."""
    import timm

    if not timm.is_model(name):
        raise InputError(f"--weights: {where} names the architecture {name!r}, which timm {timm.__version__} lacks.")
    module = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    if module in VIT:
        return
    why = next((reason for start, reason in REASONS.items() if module.startswith(start)), f"timm's {module}")
    raise InputError(f"--weights: {where} describes {name}, no plain vision transformer ({why}); not supported.")


def select(names: list[str]) -> tuple[dict[str, str], list[str]]:
    """The tensors of a timm checkpoint by their names under `visual.`, and what is left out: classifier, mask token.

    Returns ({name in the file: name here}, parts).
    """
    left_out = {name: name.partition(".")[0] for name in names if name == "mask_token" or name.startswith("head.")}
    return {name: f"trunk.{name}" for name in names if name not in left_out}, sorted(set(left_out.values()))
