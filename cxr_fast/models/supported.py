"""Which vision towers the tail, the exported graph and the heat maps reproduce exactly, and why others are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import InputError


def require_plain_vit(visual: Any, name: str) -> None:
    """Refuse at load, not after hours of training, what the tail and the export do not reproduce exactly.

    `visual` is a tower of `backbone.build_visual`. Raises InputError with the first reason.
    """
    reason = next(_reasons(visual), None)
    if reason is not None:
        raise InputError(f"--weights: {name!r} is not a plain ViT that can be reproduced exactly: it has {reason}.")


def _reasons(visual: Any) -> Iterator[str]:
    """What a tower has that is not reproduced; nothing for one that is."""
    from timm.models.vision_transformer import VisionTransformer

    trunk = visual.trunk
    if getattr(trunk, "rope", None) is not None:
        yield f"rotary positions (class {type(trunk).__name__})"
    if type(trunk) is not VisionTransformer:
        yield f"the class {type(trunk).__name__}, not VisionTransformer"
        return
    yield from _embedding_reasons(trunk)
    for block in trunk.blocks:
        yield from _block_reasons(block)
    yield from _pooling_reasons(trunk)
    if not isinstance(trunk.head, nn.Identity):
        yield "a classifier inside the trunk"
    if others := set(visual.head._modules) - {"drop", "proj"}:
        yield f"a projection that is not one matrix ({', '.join(sorted(others))})"


def _embedding_reasons(trunk: Any) -> Iterator[str]:
    from timm.layers import PatchEmbed

    if type(trunk.patch_embed) is not PatchEmbed or not isinstance(trunk.patch_embed.proj, nn.Conv2d):
        yield f"patches embedded by {type(trunk.patch_embed).__name__}"
        return
    if trunk.patch_embed.proj.in_channels != 3:
        yield f"{trunk.patch_embed.proj.in_channels} input channels"
    if not isinstance(trunk.patch_drop, nn.Identity):
        yield "patches dropped in training"
    yield from _norm_reasons("patch", trunk.patch_embed.norm, trunk.norm_pre)


def _block_reasons(block: Any) -> Iterator[str]:
    from timm.layers import Attention, Mlp
    from timm.models.vision_transformer import Block

    if type(block) is not Block:
        yield f"blocks of class {type(block).__name__}"
        return
    attn, mlp = block.attn, block.mlp
    if type(attn) is not Attention:
        yield f"attention of class {type(attn).__name__}"
        return
    if type(mlp) is not Mlp:
        yield f"an MLP of class {type(mlp).__name__} (gated, as SwiGLU is)"
        return
    if attn.num_heads < 1:
        yield f"{attn.num_heads} heads"
    if getattr(attn, "gate", None) is not None:
        yield "gated attention"
    if not (isinstance(attn.norm, nn.Identity) and isinstance(mlp.norm, nn.Identity)):
        yield "norms inside attention or MLP"
    if not (isinstance(block.drop_path1, nn.Identity) and isinstance(block.drop_path2, nn.Identity)):
        yield "blocks skipped in training (stochastic depth)"
    yield from _norm_reasons("block", block.norm1, block.norm2)
    if isinstance(attn.q_norm, nn.Identity) != isinstance(attn.k_norm, nn.Identity):
        yield "normed queries and plain keys, or the reverse"
    yield from _norm_reasons("query or key", attn.q_norm, attn.k_norm)
    yield from _activation_reasons(mlp.act)


def _pooling_reasons(trunk: Any) -> Iterator[str]:
    """Class token, average, or attention pooling with one query, as timm's ViT makes it."""
    from timm.layers import AttentionPoolLatent, Mlp

    pool = trunk.attn_pool
    if trunk.global_pool not in ("token", "avg", "map"):
        yield f"{trunk.global_pool or 'no'} pooling (class token, average and attention pooling are known)"
    elif (trunk.global_pool == "map") != (type(pool) is AttentionPoolLatent):
        yield f"pooling of class {type(pool).__name__}"
    elif pool is not None:
        if pool.latent_len != 1 or pool.pos_embed is not None or pool.pool != "token" or type(pool.mlp) is not Mlp:
            yield "attention pooling with several queries, with positions or without MLP"
            return
        if not (isinstance(pool.q, nn.Linear) and isinstance(pool.k_norm, nn.Identity)):
            yield "attention pooling without a query matrix or with normed keys"
        if not isinstance(pool.mlp.norm, nn.Identity):
            yield "a norm inside the pooling's MLP"
        yield from _norm_reasons("pooling", pool.norm)
        yield from _activation_reasons(pool.mlp.act)
    yield from _norm_reasons("last", trunk.norm, trunk.fc_norm)


def _norm_reasons(which: str, *norms: Any) -> Iterator[str]:
    """Layer norms with weight and bias, or none."""
    for norm in norms:
        if isinstance(norm, nn.Identity):
            continue
        if not isinstance(norm, nn.LayerNorm):
            yield f"a {which} norm of class {type(norm).__name__}"
        elif norm.weight is None or norm.bias is None:
            yield f"a {which} norm without weight or bias"


def _activation_reasons(act: Any) -> Iterator[str]:
    from timm.layers import GELUTanh, QuickGELU

    if type(act) not in (nn.GELU, GELUTanh, QuickGELU):
        yield f"the activation {type(act).__name__} (GELU, its tanh form and quick GELU are known)"
