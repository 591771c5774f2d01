"""The trainable part: last transformer blocks, pooling and projection, L2 normalisation, MLP head.

Where the backbone pools the class token, the last block answers for one token: exact, and about a hundredth of that
block's work (see `class_token_block`).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

HEAD_WIDTHS = (512, 256)


class Dropout(nn.Module):
    """Dropout with a mask drawn elsewhere: `mask` (B, width), true where a value is kept, set before each step.

    All draws of an epoch are made at its start from one generator on the CPU, so they do not depend on the device,
    and a run can be stopped, resumed and repeated exactly.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.mask: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        assert self.mask is not None, "set a mask before each training step"
        return x * (self.mask.to(x.dtype) / (1 - self.p))


class Head(nn.Sequential):
    """E-512-256-C with batch norm, ReLU and dropout; (B, E) to logits (B, C)."""

    def __init__(self, embed_dim: int, classes: int, *, dropout: float) -> None:
        layers: list[nn.Module] = []
        width = embed_dim
        for hidden in HEAD_WIDTHS:
            layers += [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), Dropout(dropout)]
            width = hidden
        super().__init__(*layers, nn.Linear(width, classes))

    def set_masks(self, masks: torch.Tensor) -> None:
        """Dropout masks of the next training step, (B, sum of the hidden widths), true where a value is kept."""
        dropouts = [layer for layer in self if isinstance(layer, Dropout)]
        for layer, mask in zip(dropouts, masks.split(HEAD_WIDTHS, dim=-1), strict=True):
            layer.mask = mask

    def reset(self, generator: torch.Generator) -> None:
        """Torch's default initialisation of linear layers (Kaiming uniform), from `generator`."""
        for layer in self:
            if isinstance(layer, nn.Linear):
                bound = 1 / math.sqrt(layer.in_features)
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
            elif isinstance(layer, nn.BatchNorm1d):
                layer.reset_parameters()  # running statistics too


class Tail(nn.Module):
    """What is trained, from activations (B, T, D) at the cut, or (B, E) when no block is unfrozen, to logits (B, C).

    `visual` is a tower of `backbone.load`; its blocks, norms, pooling and projection are copied, so one tower serves
    every fold. What follows the blocks stays frozen unless `train_norm`. `head` replaces the MLP head by one of the
    user's.
    """

    head: Any

    def __init__(
        self,
        visual: Any,
        *,
        unfreeze_blocks: int,
        classes: int,
        dropout: float = 0.5,
        train_norm: bool = False,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        trunk = visual.trunk
        kept = len(trunk.blocks) - unfreeze_blocks
        self.blocks = nn.ModuleList(copy.deepcopy(block) for block in trunk.blocks[kept:])
        self.pool = trunk.global_pool
        self.prefix_tokens = not_pooled(trunk)
        attn_pool = getattr(trunk, "attn_pool", None) or nn.Identity()
        after = (trunk.norm, attn_pool, trunk.fc_norm, visual.head) if unfreeze_blocks else (nn.Identity(),) * 4
        self.norm, self.attn_pool, self.fc_norm, self.projection = (copy.deepcopy(module) for module in after)
        self.embed_dim = embed_dim = embedding_width(visual)
        self.head = Head(embed_dim, classes, dropout=dropout) if head is None else head
        self.requires_grad_(False)
        self.blocks.requires_grad_(True)
        self.head.requires_grad_(True)
        if train_norm:
            for module in (self.norm, self.attn_pool, self.fc_norm, self.projection):
                module.requires_grad_(True)

    def train(self, mode: bool = True) -> Tail:
        """Training mode for blocks and head; the frozen projection keeps its evaluation mode (it may hold dropout)."""
        super().train(mode)
        self.projection.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embedding(x))
        return logits

    def embedding(self, x: torch.Tensor) -> torch.Tensor:
        """L2-normalised embedding (B, E) of activations at the cut, or of embeddings (B, E), which skip the blocks."""
        return F.normalize((x if x.ndim == 2 else self.pooled(x)).float(), dim=-1)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """Embedding (B, E) before its length is taken out, from activations at the cut."""
        if len(self.blocks):
            x = self.norm(self.tokens(x, len(self.blocks)))
            if self.pool == "token":
                x = x[:, 0]
            else:
                x = x[:, self.prefix_tokens :]
                x = attention_pool(self.attn_pool, x) if self.pool == "map" else x.mean(dim=1)
            x = self.projection(self.fc_norm(x))
        return x

    def tokens(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """(B, T, D) after the first `count` blocks; (B, 1, D) after the last one, where the class token is pooled."""
        for i, block in enumerate(self.blocks[:count]):
            alone = self.pool == "token" and i == len(self.blocks) - 1
            x = class_token_block(block, x) if alone else full_block(block, x)
        return x

    def trainable(self) -> list[nn.Parameter]:
        """The parameters an optimiser may change."""
        return [p for p in self.parameters() if p.requires_grad]


def embedding_width(visual: Any) -> int:
    """E, the width of a tower's embedding."""
    return int(visual.head.proj.out_features if "proj" in visual.head._modules else visual.trunk.embed_dim)


def not_pooled(trunk: Any) -> int:
    """Number of class and register tokens that average or attention pooling leaves out, first in line."""
    return 0 if getattr(trunk, "pool_include_prefix", False) else int(trunk.num_prefix_tokens)


def full_block(block: Any, x: torch.Tensor) -> torch.Tensor:
    """What a timm `Block` gives, (B, T, D) to the same.

    On a CPU attention is written out: torch's fused one takes 115 ms forward and backward in bfloat16 where two batched
    products and a softmax take 37 (batch 16, 197 tokens, 12 heads, 2 cores).
    """
    if x.device.type != "cpu":
        out: torch.Tensor = block(x)
        return out
    attn = block.attn
    b, t, _ = x.shape
    qkv = _qkv(block, x).reshape(b, t, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k, v = (part.contiguous() for part in (attn.q_norm(q), attn.k_norm(k), v))
    z = torch.softmax((q * attn.scale) @ k.mT, dim=-1) @ v
    return _after_attention(block, x, z.transpose(1, 2).reshape(b, t, -1))


def _qkv(block: Any, x: torch.Tensor) -> torch.Tensor:
    """Queries, keys and values side by side, (B, T, D) to (B, T, 3 D).

    The first trained block's input has no gradient. With its norm's scale and shift folded into the matrix, theirs come
    from the matrix's, and the product that would bring a gradient to every token is not made: a twelfth of a step.
    """
    norm, linear = block.norm1, block.attn.qkv
    if x.requires_grad or not torch.is_grad_enabled():
        out: torch.Tensor = linear(norm(x))
        return out
    shift = linear.weight @ norm.bias
    bias = shift if linear.bias is None else linear.bias + shift
    return F.linear(F.layer_norm(x, x.shape[-1:], eps=norm.eps), linear.weight * norm.weight, bias)


def class_token_block(block: Any, x: torch.Tensor) -> torch.Tensor:
    """What a timm `Block` gives for the class token alone: (B, T, D) to (B, 1, D), equal to `block(x)[:, :1]`."""
    attn = block.attn
    heads, width = attn.num_heads, attn.head_dim
    y = block.norm1(x)
    to_q, to_k, to_v = attn.qkv.weight.view(3, heads * width, -1).unbind(0)  # not slices: their gradients are whole
    q_bias, k_bias, v_bias = (None,) * 3 if attn.qkv.bias is None else attn.qkv.bias.view(3, -1).unbind(0)
    q = attn.q_norm(F.linear(y[:, 0], to_q, q_bias).view(-1, heads, width)) * attn.scale
    y = y.to(q.dtype)
    if isinstance(attn.k_norm, nn.Identity):
        scores = one_query(q, to_k, y)
    else:
        k = attn.k_norm(F.linear(y, to_k, k_bias).view(*y.shape[:2], heads, width))
        scores = (k.permute(0, 2, 1, 3) @ q[..., None]).squeeze(-1)
    return _after_attention(block, x[:, :1], one_value(scores, to_v, v_bias, y))


def one_query(q: torch.Tensor, to_k: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Attention scores (B, heads, T) of one query (B or 1, heads, width) over tokens y (B, T, D).

    It needs no token's key: q . (K y) is (K' q) . y. With `one_value` that leaves a hundredth of a block's work. A bias
    of the keys moves every score alike, and softmax does not see it.
    """
    keys = (q.transpose(0, 1) @ to_k.view(*q.shape[1:], -1)).transpose(0, 1)  # (B, heads, D)
    return keys @ y.mT


def one_value(scores: torch.Tensor, to_v: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    """What one query finds, its heads side by side (B, 1, heads * width): the mean of V y is V times the mean of y."""
    mean = torch.softmax(scores, dim=-1) @ y  # (B, heads, D)
    matrices = to_v.view(mean.shape[1], -1, y.shape[-1]).mT
    z = (mean.transpose(0, 1) @ matrices).transpose(0, 1).reshape(len(y), 1, -1)
    return z if bias is None else z + bias


def attention_pool(pool: Any, y: torch.Tensor) -> torch.Tensor:
    """What timm's `AttentionPoolLatent` with one query gives, (B, T, D) to (B, D), without any token's key or value."""
    heads, width = pool.num_heads, pool.head_dim
    to_k, to_v = pool.kv.weight.view(2, heads * width, -1).unbind(0)
    v_bias = None if pool.kv.bias is None else pool.kv.bias.view(2, -1).unbind(0)[1]
    q = pool.q_norm(pool.q(pool.latent[0]).view(1, heads, width)) * pool.scale
    y = y.to(q.dtype)
    z = pool.proj(one_value(one_query(q, to_k, y), to_v, v_bias, y))[:, 0]
    out: torch.Tensor = z + pool.mlp(pool.norm(z))
    return out


def _after_attention(block: Any, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The rest of a block from its attention's heads z (B, T, D), before their projection."""
    x = x + block.ls1(block.attn.proj(z))
    out: torch.Tensor = x + block.ls2(block.mlp(block.norm2(x)))
    return out


def head_parameters(embed_dim: int, classes: int) -> int:
    """Parameters of the MLP head; 404,515 for 512 dimensions and 35 classes."""
    total, width = 0, embed_dim
    for hidden in HEAD_WIDTHS:
        total += width * hidden + hidden + 2 * hidden
        width = hidden
    return total + width * classes + classes


def count_trainable(tail: Tail) -> dict[str, int]:
    """Trainable parameters: of the blocks, of the head, of norm and projection where trained, and together.

    The published code looked for the blocks under a name that does not exist and trained the head alone; so
    the count is asserted here against the architecture, whatever `requires_grad` says.
    """
    blocks = sum(p.numel() for p in tail.blocks.parameters() if p.requires_grad)
    head = sum(p.numel() for p in tail.head.parameters() if p.requires_grad)
    assert blocks == sum(p.numel() for block in tail.blocks for p in block.parameters()), "a block is frozen"
    if isinstance(tail.head, Head):
        expected = head_parameters(tail.head[0].in_features, tail.head[-1].out_features)
        assert head == expected, "the head is not what it should be"
    total = sum(p.numel() for p in tail.trainable())
    counts = {"blocks": blocks, "head": head, "total": total}
    return counts if total == blocks + head else {**counts, "norm": total - blocks - head}
