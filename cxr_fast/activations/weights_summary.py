"""What a set of weights is, and what a film costs with it, before anything is encoded."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from ..config import CacheSpec, to_dict
from ..models import onednn
from ..models.backbone import Backbone, embed, load
from ..models.device import pick_device, prepare
from ..models.weights import locate, read_asked_resize, read_licence

# What is timed for the estimate: a pass of this many films through this many blocks, the best of some.
FILMS, BLOCKS, ROUNDS = 4, 2, 3


@dataclass(frozen=True, kw_only=True)
class WeightsSummary:
    """What a set of weights is. `views` and `left` are those of the default cache; `row_bytes` is of one film there.

    `tokens` counts class, register and patch tokens; `asked` is the resize that the model's files name, where they do;
    `operations` are those of one view up to the cut, and `rate` how many a second this machine does.
    """

    source: str
    family: str
    random: bool
    parameters: int
    tokens: tuple[int, int, int]
    width: int
    depth: int
    heads: int
    patch: int
    image_size: int
    pooling: str
    embedding: int
    projection: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    asked: dict[str, str]
    left_out: tuple[str, ...]
    licence: str
    views: int
    left: int
    row_bytes: int
    operations: float
    rate: float
    device: str

    @property
    def seconds(self) -> float:
        """Estimated seconds for a thousand films, all views, without decoding."""
        return 1000 * self.views * self.operations / self.rate


def summarise(source: str, spec: CacheSpec | None = None) -> WeightsSummary:
    """Load the weights named as for `--weights` and describe them. Raises InputError as loading them does."""
    spec, device = spec or CacheSpec(), pick_device("auto")
    prepare()
    tower = load(source)
    trunk, config, files = tower.visual.trunk, tower.config, None if tower.random else locate(source)
    tokens, width, embedding = tower.shape
    left = min(spec.unfreeze_blocks, tower.depth)
    row = tokens * width if left else embedding
    classes = int(trunk.cls_token is not None)
    return WeightsSummary(
        source=source,
        family=_family(tower),
        random=tower.random,
        parameters=sum(p.numel() for p in tower.visual.parameters()),
        tokens=(classes, trunk.num_prefix_tokens - classes, trunk.patch_embed.num_patches),
        width=width,
        depth=tower.depth,
        heads=trunk.blocks[0].attn.num_heads,
        patch=trunk.patch_embed.patch_size[0],
        image_size=tower.image_size,
        pooling=trunk.global_pool,
        embedding=embedding,
        projection="proj" in tower.visual.head._modules,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        asked=config.get("preprocess") or (read_asked_resize(files) if files else {}),
        left_out=tuple(config.get("left_out", ())),
        licence=config.get("licence") or (read_licence(files) if files else ""),
        views=len(spec.views),
        left=left,
        row_bytes=row * len(spec.views) * torch.finfo(getattr(torch, to_dict(spec)["dtype"])).bits // 8,
        operations=count_operations(trunk, tower.depth - left),
        rate=measure_rate(tower.visual, tower.image_size, device),
        device=str(device),
    )


def _family(tower: Backbone) -> str:
    """The library whose files the weights are, and what they are there."""
    family, name = tower.config.get("family", "open_clip"), tower.config["vision_cfg"].get("timm_model_name", "")
    if tower.random:
        return f"random, of the architecture {name}"
    return f"{family}, {name}" if family in ("open_clip", "timm") else f"transformers, {family}"


def count_operations(trunk: Any, blocks: int) -> float:
    """Floating-point operations of one image up to the input of block `blocks`: products and sums of all matrices."""
    tokens = trunk.patch_embed.num_patches + trunk.num_prefix_tokens
    patches = 2 * trunk.patch_embed.num_patches * trunk.patch_embed.proj.weight.numel()
    total = float(patches)
    for block in trunk.blocks[:blocks]:
        matrices = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        total += 2 * tokens * sum(matrix.weight.numel() for matrix in matrices)
        total += 4 * tokens**2 * block.attn.proj.in_features  # queries with keys, and weights with values
    return total


def measure_rate(visual: Any, size: int, device: torch.device) -> float:
    """Operations a second of this machine, from the patches and the first blocks of a few films of noise."""
    trunk = visual.to(device).trunk
    blocks = min(BLOCKS, len(trunk.blocks))
    x = torch.randn(FILMS, 3, size, size, device=device, generator=torch.Generator(device).manual_seed(0))
    seconds = []
    with torch.inference_mode(), onednn.float32(device):
        for _ in range(1 + ROUNDS):
            began = time.perf_counter()
            tokens = embed(visual, x)
            for block in trunk.blocks[:blocks]:
                tokens = block(tokens)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
    return FILMS * count_operations(trunk, blocks) / min(seconds[1:])
