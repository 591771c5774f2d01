"""The tails of K folds at once: `Tail`'s layers on weights with a leading axis of folds.

Folds lie beside samples in attention and are the batch of one `bmm` in linear layers. Samples not `valid` fill a short
step up; batch norm leaves them out and the loss has no label for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .tail import HEAD_WIDTHS, Dropout
from .tail import attention_pool as shared_attention_pool

# Names as in one fold's module, tensors (K, ...).
Weights = Mapping[str, torch.Tensor]


def part(weights: Weights, prefix: str) -> dict[str, torch.Tensor]:
    """The weights of one module, by their names inside it."""
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


class StackedLinear(torch.autograd.Function):
    """x (K, M, D), weight (K, D', D), bias (K, D') or None, of one dtype, to (K, M, D').

    Autograd's own gradient of a transposed matrix lies transposed in memory, and fused AdamW goes by memory alone.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """Gradients of x, weight and bias from g (K, M, D'), each contiguous."""
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return torch.bmm(g, weight) if wanted[0] else None, torch.bmm(g.mT, x), g.sum(1) if wanted[2] else None


def linear(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    """A linear layer of each fold, in its weight's precision: (K, ..., D) to (K, ..., D')."""
    weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
    flat = x.reshape(len(x), -1, x.shape[-1]).to(weight.dtype)
    out: torch.Tensor = StackedLinear.apply(flat, weight, None if bias is None else bias.to(weight.dtype))
    return out.view(*x.shape[:-1], out.shape[-1])


def layer_norm(module: Any, x: torch.Tensor, w: Weights) -> torch.Tensor:
    """A layer norm of each fold, (K, B, ..., D); as `module` is, where it is not trained."""
    if not w:
        return module(x)
    shape = (len(x), *(1,) * (x.ndim - 2), -1)
    y = F.layer_norm(x, x.shape[-1:], eps=module.eps)
    return torch.addcmul(w["bias"].view(shape), y, w["weight"].view(shape))


def embedding(tail: Any, leaves: Weights, x: torch.Tensor) -> torch.Tensor:
    """`Tail.embedding` of each fold before its normalisation: (K, B, T, D) to (K, B, E)."""
    if not len(tail.blocks):
        return x
    for i, module in enumerate(tail.blocks):
        alone = tail.pool == "token" and i == len(tail.blocks) - 1
        x = block(module, part(leaves, f"blocks.{i}."), x, alone=alone)
    x = layer_norm(tail.norm, x, part(leaves, "norm."))
    if tail.pool == "token":
        x = x[:, :, 0]
    else:
        x = x[:, :, tail.prefix_tokens :]
        x = attention_pool(tail.attn_pool, part(leaves, "attn_pool."), x) if tail.pool == "map" else x.mean(dim=2)
    x = layer_norm(tail.fc_norm, x, part(leaves, "fc_norm."))
    projection = part(leaves, "projection.")
    return linear(x, projection, "proj") if projection else tail.projection(x)


def block(module: Any, w: Weights, x: torch.Tensor, *, alone: bool) -> torch.Tensor:
    """A timm `Block` of each fold: (K, B, T, D) to the same, or `alone` for the class token, (K, B, 1, D)."""
    own, norm = part(w, "attn."), part(w, "norm1.")
    if torch.is_grad_enabled() and not (x.requires_grad or alone):
        # The first trained block: see `tail._qkv`. Scale and shift in the matrix, and no gradient for the tokens.
        own = folded(own, norm)
        y = F.layer_norm(x, x.shape[-1:], eps=module.norm1.eps)
    else:
        y = layer_norm(module.norm1, x, norm)
    z = attention(module.attn, own, y, alone=alone)
    z = (x[:, :, :1] if alone else x) + scaled(z, w.get("ls1.gamma"))
    y = layer_norm(module.norm2, z, part(w, "norm2."))
    y = linear(module.mlp.act(linear(y, w, "mlp.fc1")), w, "mlp.fc2")
    return z + scaled(y, w.get("ls2.gamma"))


def folded(w: Weights, norm: Weights) -> dict[str, torch.Tensor]:
    """An attention's weights with the scale and shift (K, D) of the norm before it in its first matrix."""
    weight = w["qkv.weight"]
    shift = (weight @ norm["bias"][..., None].to(weight.dtype)).squeeze(-1)
    bias = shift if "qkv.bias" not in w else w["qkv.bias"] + shift
    return {**w, "qkv.weight": (weight * norm["weight"][:, None]).to(weight.dtype), "qkv.bias": bias}


def scaled(x: torch.Tensor, gamma: torch.Tensor | None) -> torch.Tensor:
    """Layer scale (K, D), where a block has it."""
    return x if gamma is None else x * gamma[:, None, None]


def attention(module: Any, w: Weights, y: torch.Tensor, *, alone: bool) -> torch.Tensor:
    """Self-attention, folds beside samples: (K, B, T, D) to the same, or (K, B, 1, D) `alone`."""
    k, b, t, _ = y.shape
    heads, width = module.num_heads, module.head_dim
    if alone:
        z = class_token(module, w, y)
    else:
        qkv = linear(y, w, "qkv").reshape(k * b, t, 3, heads, width).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = head_norm(module.q_norm, w, "q_norm.", query), head_norm(module.k_norm, w, "k_norm.", key)
        z = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    return linear(z.reshape(k, b, -1, heads * width), w, "proj")


def head_norm(module: Any, w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """The norm of each head's queries or keys, (K B, ..., width), where a block has it; in the precision of x."""
    own = part(w, name)
    if not own:
        return x
    k = len(own["weight"])
    return layer_norm(module, x.view(k, len(x) // k, *x.shape[1:]), own).flatten(0, 1).to(x.dtype)


def class_token(module: Any, w: Weights, y: torch.Tensor) -> torch.Tensor:
    """The class token's attention before projection, (K, B, T, D) to (K, B, 1, D): see `tail.class_token_block`."""
    k, b, t, d = y.shape
    heads, width = module.num_heads, module.head_dim
    # Unbound, not sliced: the gradient of a slice is a whole matrix of zeros around it.
    to_q, to_k, to_v = w["qkv.weight"].view(k, 3, heads * width, d).unbind(1)
    bias = w.get("qkv.bias")
    q_bias, k_bias, v_bias = (None,) * 3 if bias is None else bias.view(k, 3, -1).unbind(1)
    q = linear(y[:, :, 0], _linear(to_q, q_bias), "one")
    q = head_norm(module.q_norm, w, "q_norm.", q.view(k * b, heads, width)).view_as(q) * module.scale
    y = y.to(q.dtype)
    if isinstance(module.k_norm, nn.Identity):
        scores = one_query(q, to_k, y, heads)
    else:
        keys = linear(y, _linear(to_k, k_bias), "one").view(k * b, t, heads, width)
        keys = head_norm(module.k_norm, w, "k_norm.", keys).permute(0, 2, 1, 3)
        scores = (keys @ q.view(k * b, heads, width, 1)).squeeze(-1)
    return one_value(scores, to_v, v_bias, y)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {"one.weight": weight} if bias is None else {"one.weight": weight, "one.bias": bias}


def one_query(q: torch.Tensor, to_k: torch.Tensor, y: torch.Tensor, heads: int) -> torch.Tensor:
    """Scores (K B, heads, T) of one query a sample (K, B, heads * width) over tokens y (K, B, T, D)."""
    k, b, t, d = y.shape
    each = q.view(k, b, heads, -1).transpose(1, 2).reshape(k * heads, b, -1)
    return _by_sample(each @ to_k.reshape(k * heads, -1, d), k, heads) @ y.view(k * b, t, d).mT


def one_value(scores: torch.Tensor, to_v: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    """What one query finds, (K, B, 1, heads * width), from scores (K B, heads, T): see `tail.one_value`."""
    k, b, t, d = y.shape
    heads = scores.shape[1]
    mean = torch.softmax(scores, dim=-1).to(y.dtype) @ y.view(k * b, t, d)
    each = mean.view(k, b, heads, d).transpose(1, 2).reshape(k * heads, b, d)
    z = _by_sample(each @ to_v.reshape(k * heads, -1, d).mT, k, heads).reshape(k, b, 1, -1)
    return z if bias is None else z + bias[:, None, None]


def _by_sample(x: torch.Tensor, k: int, heads: int) -> torch.Tensor:
    """(K heads, B, ...) to (K B, heads, ...)."""
    return x.reshape(k, heads, x.shape[1], -1).transpose(1, 2).reshape(k * x.shape[1], heads, -1)


def attention_pool(module: Any, w: Weights, y: torch.Tensor) -> torch.Tensor:
    """Attention pooling of each fold, (K, B, T, D) to (K, B, D): `tail.attention_pool` of all, where not trained."""
    k, b, _, d = y.shape
    if not w:
        return shared_attention_pool(module, y.flatten(0, 1)).view(k, b, -1)
    heads, width = module.num_heads, module.head_dim
    to_k, to_v = w["kv.weight"].view(k, 2, heads * width, d).unbind(1)
    v_bias = w["kv.bias"].view(k, 2, -1).unbind(1)[1] if "kv.bias" in w else None
    q = linear(w["latent"].view(k, 1, -1), w, "q")
    q = head_norm(module.q_norm, w, "q_norm.", q.view(k, heads, width)).view_as(q) * module.scale
    y = y.to(q.dtype)
    scores = one_query(q.expand(k, b, -1), to_k, y, heads)
    z = linear(one_value(scores, to_v, v_bias, y), w, "proj").squeeze(2)
    x = layer_norm(module.norm, z, part(w, "norm."))
    return z + linear(module.mlp.act(linear(x, w, "mlp.fc1")), w, "mlp.fc2")


def head(
    module: Any, w: Weights, z: torch.Tensor, valid: torch.Tensor, masks: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """The MLP head of each fold: logits (K, B, C), and each batch norm's mean and variance (K, F)."""
    kept, means, variances = iter(masks.split(HEAD_WIDTHS, dim=-1)), list[torch.Tensor](), list[torch.Tensor]()
    for i, layer in enumerate(module):
        if isinstance(layer, nn.Linear):
            z = linear(z, w, str(i))
        elif isinstance(layer, nn.BatchNorm1d):
            z, mean, variance = batch_norm(z, valid, w[f"{i}.weight"], w[f"{i}.bias"], layer.eps)
            means.append(mean)
            variances.append(variance)
        elif isinstance(layer, Dropout):
            z = z * (next(kept).to(z.dtype) / (1 - layer.p))
        else:
            z = layer(z)
    return z, means, variances


def batch_norm(
    z: torch.Tensor, valid: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Batch norm of (K, B, F) over the `valid` (K, B) samples alone, with the mean and biased variance (K, F)."""
    real = valid[..., None].float()
    count, x = real.sum(1).clamp(min=1), z.float()
    mean = (x * real).sum(1) / count
    centred = x - mean[:, None]
    variance = (centred * centred * real).sum(1) / count
    y = torch.addcmul(bias[:, None], centred * torch.rsqrt(variance + eps)[:, None], weight[:, None])
    return y.to(z.dtype), mean.detach(), variance.detach()
