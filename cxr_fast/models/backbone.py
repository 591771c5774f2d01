"""A vision tower such as BiomedCLIP's: load it, cut it in two, hash each part. The text tower is never built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..config import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD
from ..errors import InputError
from . import positions, timm_towers, weights
from .supported import require_plain_vit
from .tail import embedding_width
from .weights import short_reason, weights_sha256

RANDOM_ARCH = "vit_base_patch16_224"
EMBEDDING_CUT = "embedding"


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A frozen vision tower in evaluation mode, with what is needed to build it again.

    `config` holds `embed_dim`, `vision_cfg`, `mean`, `std`, of timm and transformers `family`, `own_image_size` where
    the tower was made for another size than it has here; `source` is what `--weights` was given.
    """

    visual: Any = field(repr=False)
    config: dict[str, Any]
    source: str
    image_size: int

    @property
    def random(self) -> bool:
        """Whether the weights were drawn, not learned; shown wherever a figure of this model is."""
        return self.source.startswith("random:")

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return len(self.visual.trunk.blocks)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, D, E): tokens, width, embedding."""
        trunk = self.visual.trunk
        tokens = trunk.patch_embed.num_patches + trunk.num_prefix_tokens
        return tokens, trunk.embed_dim, self.config["embed_dim"]

    def statistics(self, normalize: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) of the three channels, the model's own or ImageNet's."""
        if normalize == "imagenet":
            return IMAGENET_MEAN, IMAGENET_STD
        return tuple(self.config["mean"]), tuple(self.config["std"])


def load(source: str, image_size: int | None = None) -> Backbone:
    """The vision tower named by `--weights`, for films of `image_size` pixels a side (None: its own size).

    `source` is `biomedclip`, a hub id (`hf-hub:owner/name` or `owner/name`), a local folder holding the files of
    open_clip, timm or transformers, or `random:SEED[:timm_arch]`. Raises InputError with one line naming the files to
    fetch when the hub cannot be reached, with the reason for a model that is not supported, and for a size that is no
    multiple of the patch size.
    """
    if source.startswith("random:"):
        config, visual = _draw(source)
    else:
        config, tensors = weights.read(source)
        visual = assemble(config, tensors)
    own = visual.trunk.patch_embed.img_size[0]
    if image_size not in (None, own):
        positions.set_image_size(visual, image_size, family=config.get("family", "timm"))
        config = config | {"vision_cfg": config["vision_cfg"] | {"image_size": image_size}, "own_image_size": own}
    return Backbone(visual=visual, config=config, source=source, image_size=image_size or own)


def build_visual(config: Mapping[str, Any], *, device: str = "cpu") -> Any:
    """A tower for `config`, no weights loaded: open_clip's own `TimmModel`, or a `timm_towers.Tower`."""
    name = timm_towers.name_of(config)
    with torch.device(device):
        try:
            described = timm_towers.is_described(config["vision_cfg"])
            visual = timm_towers.build(config) if described else _build_open_clip(config)
        except (RuntimeError, TypeError, AttributeError, ValueError, AssertionError) as error:
            raise InputError(
                f"--weights: timm cannot build {name!r} as a vision tower: {short_reason(error)}"
            ) from error
    require_plain_vit(visual, name)
    if (width := embedding_width(visual)) != config["embed_dim"]:
        raise InputError(f"--weights: {name!r} without projection gives {width} numbers, not {config['embed_dim']}.")
    return visual.eval().requires_grad_(False)


def _build_open_clip(config: Mapping[str, Any]) -> Any:
    """An open_clip `TimmModel`, with open_clip's own pooling and projection."""
    import timm  # noqa: F401  open_clip's own message on its absence names no extra of ours
    from open_clip.timm_model import TimmModel

    vision = config["vision_cfg"]
    name = vision.get("timm_model_name")
    if not name:
        raise InputError(
            "--weights: the open_clip config names no timm_model_name; only timm ViT towers are supported."
        )
    return TimmModel(
        name,
        config["embed_dim"],
        image_size=vision.get("image_size", 224),
        pool=vision.get("timm_pool", "avg"),
        proj=vision.get("timm_proj", "linear"),
        proj_bias=vision.get("timm_proj_bias", False),
    )


def assemble(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """A tower with the given tensors (names as under `visual.`). Raises InputError naming what does not fit."""
    visual = build_visual(config, device="meta")
    if isinstance(size := config["vision_cfg"].get("image_size"), int):  # the library builds at the architecture's own
        positions.set_image_size(visual, size)
    expected = visual.state_dict()
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or extra:
        wrong = ((missing, "missing"), (extra, "unknown"))
        raise InputError(
            f"--weights: the file holds other tensors than the config describes ({timm_towers.name_of(config)}): "
            + "; ".join(f"{len(names)} {what}: {', '.join(names[:3])}" for names, what in wrong if names)
            + ("." if max(len(missing), len(extra)) <= 3 else ", ...")
        )
    for name, want in expected.items():
        if want.shape != tensors[name].shape:
            raise InputError(
                f"--weights: {name} has the shape {tuple(tensors[name].shape)} in the file, and "
                f"{tuple(want.shape)} by the config ({timm_towers.name_of(config)})."
            )
    whole = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    if broken := next((name for name, tensor in whole.items() if not tensor.isfinite().all()), None):
        raise InputError(f"--weights: {broken} holds numbers that are not finite; fetch the weights again.")
    visual.load_state_dict(whole, strict=True, assign=True)
    return visual.eval().requires_grad_(False)


def embed(visual: Any, x: torch.Tensor) -> torch.Tensor:
    """Normalised image (B, 3, H, W) to the tokens before block 0, (B, T, D)."""
    trunk = visual.trunk
    tokens: torch.Tensor = trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(x))))
    return tokens


def prefix(visual: Any, x: torch.Tensor, unfreeze_blocks: int) -> torch.Tensor:
    """The frozen part: (B, 3, H, W) to (B, T, D), or to the projected embedding (B, E) when nothing is unfrozen."""
    if unfreeze_blocks == 0:
        embedding: torch.Tensor = visual(x)
        return embedding
    tokens = embed(visual, x)
    for block in visual.trunk.blocks[: len(visual.trunk.blocks) - unfreeze_blocks]:
        tokens = block(tokens)
    return tokens


def cut_name(depth: int, unfreeze_blocks: int) -> str:
    """Name of the cut: `blocks.10` is the input of block 10; `embedding` lies after the projection."""
    if unfreeze_blocks > depth:
        raise InputError(f"--unfreeze-blocks: {unfreeze_blocks} is more than the {depth} blocks of this backbone.")
    return EMBEDDING_CUT if unfreeze_blocks == 0 else f"blocks.{depth - unfreeze_blocks}"


def prefix_names(visual: Any, unfreeze_blocks: int) -> list[str]:
    """Names of the tensors that decide the activations at the cut."""
    names = list(visual.state_dict())
    if unfreeze_blocks == 0:
        return names
    kept = len(visual.trunk.blocks) - unfreeze_blocks
    before: tuple[str, ...] = (
        "trunk.patch_embed.",
        "trunk.cls_token",
        "trunk.reg_token",
        "trunk.pos_embed",
        "trunk.norm_pre.",
    )
    before += tuple(f"trunk.blocks.{i}." for i in range(kept))
    return [name for name in names if name.startswith(before)]


def prefix_sha256(visual: Any, unfreeze_blocks: int) -> str:
    """Identity of the frozen part actually used."""
    return weights_sha256(visual.state_dict(), prefix_names(visual, unfreeze_blocks))


def tower_sha256(visual: Any) -> str:
    """Identity of the whole vision tower."""
    return weights_sha256(visual.state_dict(), visual.state_dict())


def identity(visual: Any, unfreeze_blocks: int) -> dict[str, str]:
    """What the activation file records of the tower: cut, prefix hash, whole-tower hash."""
    return {
        "cut": cut_name(len(visual.trunk.blocks), unfreeze_blocks),
        "prefix_sha256": prefix_sha256(visual, unfreeze_blocks),
        "tower_sha256": tower_sha256(visual),
    }


def _draw(source: str) -> tuple[dict[str, Any], Any]:
    """Config and tower of `random:SEED[:timm_arch]`."""
    parts = re.fullmatch(r"random:([0-9]{1,18})(?::(.+))?", source)
    if parts is None:
        raise InputError(f"--weights: {source!r} is not random:SEED or random:SEED:TIMM_ARCH.")
    arch = parts[2] or RANDOM_ARCH
    import timm

    if not timm.is_model(arch):
        raise InputError(f"--weights: timm knows no architecture {arch!r}.")
    vision = {"timm_model_name": arch, "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
    config = {"embed_dim": 512, "vision_cfg": vision, "mean": OPENAI_MEAN, "std": OPENAI_STD}
    # The library draws from torch's global generator; fork it so that the caller's stream stays untouched.
    # torch.manual_seed would seed every GPU too.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(parts[1]))
        visual = build_visual(config)
        _spread(visual.trunk)
    vision["image_size"] = visual.trunk.patch_embed.img_size[0]
    return config, visual


def _spread(trunk: Any) -> None:
    """Draw class token and positions with standard deviation 1, from torch's generator; layer scales become 1.

    timm's 0.02 is a fraction of what the patch embedding gives, so that a random tower hardly knows where anything is.
    DINOv2's layer scale of 1e-5 would keep every block from changing its tokens, the class token among them.
    """
    for tensor in (trunk.cls_token, trunk.pos_embed):
        if tensor is not None:
            nn.init.normal_(tensor)
    for block in trunk.blocks:
        for scale in (block.ls1, block.ls2):
            if not isinstance(scale, nn.Identity):
                nn.init.ones_(scale.gamma)
