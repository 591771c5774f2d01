"""The trainable part: last transformer blocks, pooling and projection, L2 normalisation, MLP head.

Where the backbone pools the class token, the last block needs keys and values for all tokens but query,
projection and MLP for one; that is exact and about a sixth of that block's work.
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
    """Dropout that draws from a generator of its own, so that a run can be stopped, resumed and repeated exactly."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.generator: torch.Generator | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        keep = torch.empty_like(x).bernoulli_(1 - self.p, generator=self.generator)
        return x * keep.div_(1 - self.p)


class Head(nn.Sequential):
    """E-512-256-C with batch norm, ReLU and dropout; (B, E) to logits (B, C)."""

    def __init__(self, embed_dim: int, classes: int, *, dropout: float) -> None:
        layers: list[nn.Module] = []
        width = embed_dim
        for hidden in HEAD_WIDTHS:
            layers += [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), Dropout(dropout)]
            width = hidden
        super().__init__(*layers, nn.Linear(width, classes))

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

    `visual` is an open_clip `TimmModel`; its blocks, norm and projection are copied, so one tower serves every
    fold. Norm and projection stay frozen unless `train_norm`.
    """

    def __init__(
        self,
        visual: Any,
        *,
        unfreeze_blocks: int,
        classes: int,
        dropout: float = 0.5,
        train_norm: bool = False,
    ) -> None:
        super().__init__()
        trunk = visual.trunk
        kept = len(trunk.blocks) - unfreeze_blocks
        self.blocks = nn.ModuleList(copy.deepcopy(block) for block in trunk.blocks[kept:])
        self.pool = trunk.global_pool
        self.prefix_tokens = trunk.num_prefix_tokens
        after = (trunk.norm, trunk.fc_norm, visual.head) if unfreeze_blocks else (nn.Identity(),) * 3
        self.norm, self.fc_norm, self.projection = (copy.deepcopy(module) for module in after)
        embed_dim = visual.head.proj.out_features if "proj" in visual.head._modules else trunk.embed_dim
        self.head = Head(embed_dim, classes, dropout=dropout)
        self.requires_grad_(False)
        self.blocks.requires_grad_(True)
        self.head.requires_grad_(True)
        if train_norm:
            self.norm.requires_grad_(True)
            self.fc_norm.requires_grad_(True)
            self.projection.requires_grad_(True)

    def train(self, mode: bool = True) -> Tail:
        """Training mode for blocks and head; the frozen projection keeps its evaluation mode (it may hold dropout)."""
        super().train(mode)
        self.projection.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embedding(x))
        return logits

    def embedding(self, x: torch.Tensor) -> torch.Tensor:
        """L2-normalised embedding (B, E)."""
        if len(self.blocks):
            for block in self.blocks[:-1]:
                x = block(x)
            last = self.blocks[-1]
            x = class_token_block(last, x) if self.pool == "token" else last(x)
            x = self.norm(x)
            x = x[:, 0] if self.pool == "token" else x[:, self.prefix_tokens :].mean(dim=1)
            x = self.projection(self.fc_norm(x))
        return F.normalize(x.float(), dim=-1)

    def trainable(self) -> list[nn.Parameter]:
        """The parameters an optimiser may change."""
        return [p for p in self.parameters() if p.requires_grad]


def class_token_block(block: Any, x: torch.Tensor) -> torch.Tensor:
    """What a timm `Block` gives for the class token alone: (B, T, D) to (B, 1, D), equal to `block(x)[:, :1]`."""
    attn = block.attn
    b, t, _ = x.shape
    heads, width = attn.num_heads, attn.head_dim
    y = block.norm1(x)
    weight, bias = attn.qkv.weight, attn.qkv.bias
    inner = heads * width
    q = F.linear(y[:, :1], weight[:inner], None if bias is None else bias[:inner])
    kv = F.linear(y, weight[inner:], None if bias is None else bias[inner:])
    q = q.reshape(b, 1, heads, width).transpose(1, 2)
    k, v = kv.reshape(b, t, 2, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    z = F.scaled_dot_product_attention(q, k, v)
    z = attn.proj(z.transpose(1, 2).reshape(b, 1, inner))
    z = x[:, :1] + block.ls1(z)
    out: torch.Tensor = z + block.ls2(block.mlp(block.norm2(z)))
    return out


def block_parameters(width: int, mlp_width: int) -> int:
    """Parameters of a plain ViT block: qkv, projection, two layer norms, MLP, all with biases."""
    return 4 * width * width + 4 * width + 4 * width + 2 * width * mlp_width + width + mlp_width


def head_parameters(embed_dim: int, classes: int) -> int:
    """Parameters of the MLP head; 404,515 for 512 dimensions and 35 classes."""
    total, width = 0, embed_dim
    for hidden in HEAD_WIDTHS:
        total += width * hidden + hidden + 2 * hidden
        width = hidden
    return total + width * classes + classes


def count_trainable(tail: Tail) -> dict[str, int]:
    """Trainable parameters: of the blocks, of the head, and together.

    The published code looked for the blocks under a name that does not exist and trained the head alone; so
    the count is asserted here against the architecture, whatever `requires_grad` says.
    """
    blocks = sum(p.numel() for p in tail.blocks.parameters() if p.requires_grad)
    head = sum(p.numel() for p in tail.head.parameters() if p.requires_grad)
    assert blocks == sum(p.numel() for block in tail.blocks for p in block.parameters()), "a block is frozen"
    last = tail.head[-1]
    first = tail.head[0]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    assert head == head_parameters(first.in_features, last.out_features), "the head is not what it should be"
    return {"blocks": blocks, "head": head, "total": sum(p.numel() for p in tail.trainable())}
