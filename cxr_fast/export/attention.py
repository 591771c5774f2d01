"""Write attention that ONNX Runtime's fused operation does not cover: one query, normed queries and keys, pooling."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ..models.tail import not_pooled
from .int8 import Matrix
from .nodes import Graph, to_array, to_array_or_none

QUICK = 1.702  # quick GELU is x sigmoid(1.702 x)


def has_norms(attn: Any) -> bool:
    """Say whether a timm `Attention` norms the queries and keys of each head."""
    return not (isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity))


def normed_parts(graph: Graph, y: str, attn: Any, qkv: Matrix, number: int, name: str) -> list[str]:
    """Queries, keys and values (N, T, D) each, for attention whose queries and keys are normed by head."""
    split = graph.weight(f"{name}.heads.shape", np.array([0, 0, attn.num_heads, attn.head_dim]))
    join = graph.weight(f"{name}.joined.shape", np.array([0, 0, attn.num_heads * attn.head_dim]))
    out = []
    rows = np.split(np.arange(len(qkv.weight)), 3)
    for part, index, norm in zip("qkv", rows, (attn.q_norm, attn.k_norm, None), strict=True):
        x = graph.product(y, qkv.rows(index), f"{name}.{part}", f"{number}.qkv")
        if norm is not None:
            x = graph.add("Reshape", x, split, name=f"{name}.{part}.heads")
            x = graph.layer_norm(x, norm, f"{name}.{part}_norm")
            x = graph.add("Reshape", x, join, name=f"{name}.{part}.joined")
        out.append(x)
    return out


def normed_scores(graph: Graph, y: str, one: str, attn: Any, qkv: Matrix, name: str) -> str:
    """Scores (N, heads, T) of the token `one` (N, 1, D) over y (N, T, D), its query and all keys normed by head."""
    heads, width = attn.num_heads, attn.head_dim
    to_q, to_k, _ = np.split(qkv.weight, 3)
    q_bias, k_bias, _ = (None,) * 3 if qkv.bias is None else np.split(qkv.bias, 3)
    q, k = graph.linear(one, to_q, q_bias, f"{name}.q"), graph.linear(y, to_k, k_bias, f"{name}.k")
    shapes = {"q": [0, 0, heads, width], "k": [0, 0, heads, width], "scores": [0, heads, -1]}
    shape = {key: graph.weight(f"{name}.{key}.shape", np.array(value)) for key, value in shapes.items()}
    q = graph.layer_norm(graph.add("Reshape", q, shape["q"], name=f"{name}.q.heads"), attn.q_norm, f"{name}.q_norm")
    k = graph.layer_norm(graph.add("Reshape", k, shape["k"], name=f"{name}.k.heads"), attn.k_norm, f"{name}.k_norm")
    q = graph.add("Mul", q, graph.weight(f"{name}.q.scale", np.array(float(attn.scale))), name=f"{name}.q.scaled")
    q = graph.add("Transpose", q, name=f"{name}.q.each", perm=[0, 2, 1, 3])
    k = graph.add("Transpose", k, name=f"{name}.k.each", perm=[0, 2, 3, 1])
    scores = graph.add("MatMul", q, k, name=f"{name}.scores.each")  # (N, heads, 1, T)
    return graph.add("Reshape", scores, shape["scores"], name=f"{name}.scores")


def one_value(graph: Graph, scores: str, y: str, to_v: np.ndarray, bias: np.ndarray | None, name: str) -> str:
    """What one query finds, its heads side by side (N, 1, heads * width), from scores (N, heads, T) and y (N, T, D).

    `to_v` is (heads, width, D): the mean of V y is V times the mean of y.
    """
    heads, width, _ = to_v.shape
    joined = graph.weight(f"{name}.joined.shape", np.array([0, 1, heads * width]))
    mean = graph.add("MatMul", graph.add("Softmax", scores, name=f"{name}.softmax", axis=-1), y, name=f"{name}.mean")
    axis = graph.weight(f"{name}.mean.axis", np.array([2]))
    mean = graph.add("Unsqueeze", mean, axis, name=f"{name}.mean.one")  # (N, heads, 1, D)
    z = graph.add("MatMul", mean, graph.weight(f"{name}.v.weight", to_v.swapaxes(1, 2)), name=f"{name}.values")
    z = graph.add("Reshape", z, joined, name=f"{name}.joined")
    return z if bias is None else graph.add("Add", z, graph.weight(f"{name}.v.bias", bias), name=f"{name}.attention")


def pool(graph: Graph, x: str, trunk: Any, name: str) -> str:
    """(N, T, D) to (N, D): the class token (already alone), the mean of the patch tokens, or what one query finds."""
    axis = graph.weight(f"{name}pool.axis", np.array([1]))
    if trunk.global_pool == "token":
        return graph.add("Squeeze", x, axis, name=f"{name}pool")
    bounds = (not_pooled(trunk), np.iinfo(np.int64).max)
    if bounds[0] or trunk.global_pool == "avg":
        ends = [graph.weight(f"{name}pool.{k}", np.array([v])) for k, v in zip(("start", "end"), bounds, strict=True)]
        x = graph.add("Slice", x, *ends, axis, name=f"{name}pool.patches")
    if trunk.global_pool == "avg":
        return graph.add("ReduceMean", x, axis, name=f"{name}pool", keepdims=0)
    return graph.add("Squeeze", _latent(graph, x, trunk.attn_pool, f"{name}pool"), axis, name=f"{name}pool")


def _latent(graph: Graph, y: str, latent: Any, name: str) -> str:
    """timm's `AttentionPoolLatent` with one query, (N, T, D) to (N, 1, D).

    The query is the same for all images, so that it and the keys' matrix are one vector a head.
    """
    heads, width = latent.num_heads, latent.head_dim
    to_k, to_v = (part.reshape(heads, width, -1) for part in np.split(to_array(latent.kv.weight), 2))
    with torch.no_grad():
        q = to_array(latent.q_norm(latent.q(latent.latent[0]).view(heads, width)) * latent.scale)
    keys = np.einsum("hw,hwd->dh", q.astype(np.float64), to_k)
    scores = graph.linear(y, keys.T, None, f"{name}.keys")
    scores = graph.add("Transpose", scores, name=f"{name}.scores", perm=[0, 2, 1])
    bias = None if latent.kv.bias is None else np.split(to_array(latent.kv.bias), 2)[1]
    z = one_value(graph, scores, y, to_v, bias, name)
    z = graph.linear(z, to_array(latent.proj.weight), to_array_or_none(latent.proj.bias), f"{name}.proj")
    x = graph.layer_norm(z, latent.norm, f"{name}.norm")
    fc1, fc2 = latent.mlp.fc1, latent.mlp.fc2
    x = graph.linear(x, to_array(fc1.weight), to_array_or_none(fc1.bias), f"{name}.fc1")
    x = gelu(graph, x, latent.mlp.act, f"{name}.gelu")
    x = graph.linear(x, to_array(fc2.weight), to_array_or_none(fc2.bias), f"{name}.fc2")
    return graph.add("Add", z, x, name=f"{name}.residual")


def gelu(graph: Graph, x: str, act: nn.Module, name: str) -> str:
    """GELU, its tanh form, or quick GELU, which ONNX Runtime joins into one operation by itself."""
    from timm.layers import GELUTanh, QuickGELU

    if isinstance(act, QuickGELU):
        scaled = graph.add("Mul", x, graph.weight(f"{name}.factor", np.array(QUICK)), name=f"{name}.scaled")
        return graph.add("Mul", x, graph.add("Sigmoid", scaled, name=f"{name}.gate"), name=name)
    kind = "tanh" if isinstance(act, GELUTanh) else str(getattr(act, "approximate", "none"))
    return graph.add("Gelu", x, name=name, approximate=kind)
