"""Write a run as one ONNX graph, node by node, in float32, float16 or int8.

Normalisation and channel replication fold into the patch embedding, batch norm into the head's matrices, and the last
block answers for the class token alone. Written and not traced, so that no version of an exporter changes it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from torch import nn

from .. import __version__
from ..config import VIEWS
from ..metrics.calibration import EDGE, isotonic_pieces
from ..models.heads import leaves
from ..models.tail import Dropout, embedding_width
from ..training.run_folder import Member, Run
from ..unlikeness.nodes import OUTPUT as UNLIKENESS
from ..unlikeness.nodes import add_unlikeness
from .attention import gelu, has_norms, normed_parts, normed_scores, one_value, pool
from .int8 import KINDS, Matrix, Plan, answers_first_only, member_prefix, plain, round_plainly
from .nodes import Graph, to_array, to_array_or_none
from .rotate import Turned

OPSET = 20
IR_VERSION = 10
RAW = "raw_probabilities"
VARIANTS = ("fp32", "fp16", "int8")
END_NAMES = ("start", "end", "axis", "step")


def build(
    run: Run,
    variant: str = "fp32",
    *,
    embedding: bool = False,
    exclude: frozenset[str] = frozenset(),
    plan: Plan | None = None,
) -> onnx.ModelProto:
    """The graph: `pixels` uint8 (N, S, S) to `logits` and `probabilities` (N, C), optionally `embedding` (N, E).

    An ensemble passes the frozen part once and each tail from there; its probabilities are the mean, its logits those
    of the mean. So are those of a run scored on both views (`tta`), each image and its mirrored twin. Where the run is
    calibrated `probabilities` are, `logits` are not, and `raw_probabilities` is a third output. An int8 graph takes its
    images one by one inside (Scan): quantisation follows the range of what it sees, and an image's answer must not hang
    on its neighbours in the batch. `plan` is `int8.choose`'s, by default plain rounding; its shifts and scales are in
    the float graph too, where a float32 graph is given one.
    """
    if variant == "int8" and plan is None:
        plan = round_plainly(run)
    graph = Graph(variant, exclude, plan)
    _image(graph, run)
    size, classes = run.info["preprocess"]["size"], len(run.info["classes"])
    outputs = [("logits", classes), ("probabilities", classes)]
    outputs += [(RAW, classes)] if run.info["calibration"] is not None else []
    outputs += [("embedding", embedding_width(run.visual))] if embedding else []
    each = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", n]) for name, n in outputs]
    each += [helper.make_tensor_value_info(UNLIKENESS, TensorProto.FLOAT, ["N"])] if run.unlikeness else []
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", size, size])
    if variant == "int8":
        proto = _one_by_one(graph, pixels, each)
    else:
        proto = helper.make_graph(graph.nodes, "cxr-fast", [pixels], each, graph.weights)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION, producer_name="cxr-fast")
    model.producer_version = __version__
    return model


def _one_by_one(graph: Graph, pixels: Any, outputs: list[Any]) -> onnx.GraphProto:
    """The nodes as the body of a Scan over images, each a batch of one.

    A body may not make a name of the graph around it again, so inside those of inputs and outputs are lengthened.
    """
    dims = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim[1:]] for value in outputs}
    for node in graph.nodes:
        for names in (node.input, node.output):
            names[:] = [f"batch.{name}" if name in dims or name == "pixels" else name for name in names]
    axis = graph.weight("image.axis", np.array([0]))
    first = helper.make_node("Unsqueeze", ["image.pixels", axis], ["batch.pixels"], name="image.pixels")
    last = [helper.make_node("Squeeze", [f"batch.{k}", axis], [f"image.{k}"], name=f"image.{k}") for k in dims]
    size = pixels.type.tensor_type.shape.dim[1].dim_value
    body = helper.make_graph(
        [first, *graph.nodes, *last],
        "image",
        [helper.make_tensor_value_info("image.pixels", TensorProto.UINT8, [size, size])],
        [helper.make_tensor_value_info(f"image.{name}", TensorProto.FLOAT, n) for name, n in dims.items()],
        graph.weights,
    )
    scan = helper.make_node("Scan", ["pixels"], list(dims), name="images", body=body, num_scan_inputs=1)
    return helper.make_graph([scan], "cxr-fast", [pixels], outputs)


def matrices(run: Run) -> list[str]:
    """The block matrices that int8 may leave out, such as `10.fc2`, as `build` takes them in `exclude`."""
    return [f"{i}.{name}" for i in range(len(run.visual.trunk.blocks)) for name in KINDS]


def _image(graph: Graph, run: Run) -> None:
    """From `pixels` to the outputs."""
    trunk = run.visual.trunk
    both_views = run.info["train"].get("tta") == "flip"
    x = _patches(graph, run, _with_mirrored(graph) if both_views else "pixels")
    x = graph.layer_norm(x, trunk.norm_pre, "norm_pre")
    cut = len(trunk.blocks) - run.info["unfreeze_blocks"]
    unlike = partial(add_unlikeness, graph, kept=run.unlikeness, visual=run.visual, both_views=both_views)
    x = graph.cast(x, TensorProto.FLOAT16, "tokens.half")
    with graph.blocks():
        for i, block in enumerate(trunk.blocks[:cut]):
            unlike(x, i)
            x = _block(graph, x, block, i, "", first_only=answers_first_only(trunk, i))
    unlike(x, cut)
    several = len(run.members) > 1 or both_views
    each = [_tail(graph, x, member, cut, member_prefix(run, k)) for k, member in enumerate(run.members)]
    unlike(f"{member_prefix(run, 0)}embedding", None)
    if both_views:
        each = [half for logits in each for half in _halves(graph, logits)]
    raw = "probabilities" if run.info["calibration"] is None else RAW
    _mean(graph, each, raw) if several else graph.add("Sigmoid", each[0], name=raw)
    _calibrate(graph, raw, run.info["calibration"])


def _with_mirrored(graph: Graph) -> str:
    """`pixels`, and behind them the same images mirrored: (2 N, S, S)."""
    lowest = np.iinfo(np.int64).min
    ends = [graph.weight(f"mirrored.{k}", np.array([v])) for k, v in zip(END_NAMES, (-1, lowest, 2, -1), strict=True)]
    mirrored = graph.add("Slice", "pixels", *ends, name="mirrored")
    return graph.add("Concat", "pixels", mirrored, name="both_views", axis=0)


def _halves(graph: Graph, x: str) -> list[str]:
    """The first and the second half of the rows of (2 N, C)."""
    names = [f"{x}.{view}" for view in VIEWS]
    graph.nodes.append(helper.make_node("Split", [x], names, name=f"{x}.views", axis=0, num_outputs=2))
    return names


def _tail(graph: Graph, x: str, member: Member, cut: int, name: str) -> str:
    """Blocks from the cut on, norm, pooling, projection, L2 norm and head of one member; its logits."""
    trunk = member.visual.trunk
    with graph.blocks():
        for i, block in enumerate(trunk.blocks[cut:], cut):
            x = _block(graph, x, block, i, name, first_only=answers_first_only(trunk, i))
    x = graph.cast(x, TensorProto.FLOAT, f"{name}tokens.float")
    norm = trunk.norm
    if isinstance(norm, Turned):
        x = graph.add("MatMul", x, graph.weight(f"{name}turn.back", to_array(norm.back)), name=f"{name}turned")
        norm = norm.norm
    x = graph.layer_norm(x, norm, f"{name}norm")
    x = pool(graph, x, trunk, name)
    x = graph.layer_norm(x, trunk.fc_norm, f"{name}fc_norm")
    if "proj" in member.visual.head._modules:
        projection = member.visual.head.proj
        x = graph.linear(x, to_array(projection.weight), to_array_or_none(projection.bias), f"{name}projection")
    return _head(graph, _l2(graph, x, name), member.head, name)


def _mean(graph: Graph, logits: list[str], name: str) -> None:
    """Mean of the members' probabilities; adds `logits`, those of the mean, kept EDGE away from the ends.

    As a sum: ONNX Runtime has no Mean on CUDA, and would take it to the CPU and back.
    """
    each = [graph.add("Sigmoid", x, name=f"{x}.probabilities") for x in logits]
    total = graph.add("Sum", *each, name=f"{name}.sum")
    count = graph.weight(f"{name}.members", np.array(float(len(each))))
    _logit(graph, graph.add("Div", total, count, name=name), "logits")


def _logit(graph: Graph, p: str, name: str) -> str:
    edges = [graph.weight(f"{name}.{k}", np.array(v)) for k, v in (("low", EDGE), ("high", 1 - EDGE), ("one", 1.0))]
    p = graph.add("Clip", p, *edges[:2], name=f"{name}.clipped")
    rest = graph.add("Sub", edges[2], p, name=f"{name}.rest")
    return graph.add("Log", graph.add("Div", p, rest, name=f"{name}.odds"), name=name)


def _calibrate(graph: Graph, raw: str, calibration: dict[str, Any] | None) -> None:
    """Add `probabilities`, the raw ones through the calibration, where there is one."""
    if calibration is None:
        return
    if calibration["kind"] == "platt":
        a, b = (graph.weight(f"platt.{k}", np.array(calibration[k], np.float64)) for k in "ab")
        x = graph.add("Mul", _logit(graph, raw, "platt.logit"), a, name="platt.scaled")
        graph.add("Sigmoid", graph.add("Add", x, b, name="platt"), name="probabilities")
    else:
        _piecewise(graph, raw, calibration["x"], calibration["y"])


def _piecewise(graph: Graph, raw: str, xs: list[list[float]], ys: list[list[float]]) -> None:
    """y_0 + sum over pieces of slope (clip(p, start, end) - start): linear between knots, constant beyond them.

    Classes have different numbers of pieces; the rest are empty (start = end, slope 0).
    """
    start, end, slope = isotonic_pieces(xs, ys)
    low, high, rise = (graph.weight(f"isotonic.{k}", v) for k, v in (("start", start), ("end", end), ("slope", slope)))
    axis = graph.weight("isotonic.axis", np.array([-1]))
    p = graph.add("Unsqueeze", raw, axis, name="isotonic.p")
    p = graph.add("Min", graph.add("Max", p, low, name="isotonic.max"), high, name="isotonic.min")
    p = graph.add("Mul", graph.add("Sub", p, low, name="isotonic.into"), rise, name="isotonic.rise")
    p = graph.add("ReduceSum", p, axis, name="isotonic.sum", keepdims=0)
    first = graph.weight("isotonic.first", np.array([y[0] for y in ys], np.float64))
    graph.add("Add", p, first, name="probabilities")


def _patches(graph: Graph, run: Run, pixels: str) -> str:
    """uint8 grey pixels to tokens (N, T, D), class token and positions included.

    Grey g becomes channels (g/255 - mean_c) / std_c. The patch embedding has no padding, so the affine map folds
    into its kernel and bias exactly: one input channel instead of three.
    """
    trunk = run.visual.trunk
    conv = trunk.patch_embed.proj
    kernel = to_array(conv.weight).astype(np.float64)
    mean, std = (np.array(run.info[k], np.float64).reshape(1, 3, 1, 1) for k in ("mean", "std"))
    bias = -(kernel * mean / std).sum(axis=(1, 2, 3))
    if conv.bias is not None:
        bias = bias + to_array(conv.bias)
    kernel = (kernel / std / 255).sum(axis=1, keepdims=True)
    x = graph.add("Cast", pixels, name="grey", to=TensorProto.FLOAT)
    x = graph.add("Unsqueeze", x, graph.weight("axis1", np.array([1])), name="channel")
    weights = (graph.weight("patch.weight", kernel), graph.weight("patch.bias", bias))
    stride = list(conv.stride)
    x = graph.add("Conv", x, *weights, name="patch", strides=stride, kernel_shape=list(conv.kernel_size))
    x = graph.add("Reshape", x, graph.weight("patch.shape", np.array([0, trunk.embed_dim, -1])), name="patch.flat")
    x = graph.add("Transpose", x, name="patch.tokens", perm=[0, 2, 1])
    x = graph.layer_norm(x, trunk.patch_embed.norm, "patch.norm")
    extra = trunk.num_prefix_tokens
    table = _positions(trunk)
    if extra:
        pads = graph.weight("prefix.pads", np.array([0, extra, 0, 0, 0, 0]))
        x = graph.add("Pad", x, pads, name="prefix")
    return graph.add("Add", x, graph.weight("positions", table), name="tokens")


def _positions(trunk: Any) -> np.ndarray:
    """(1, T, D) added to the padded patch tokens: class and register tokens with their positions, then positions."""
    prefix = [to_array(t)[0] for t in (trunk.cls_token, trunk.reg_token) if t is not None]
    table = np.zeros((trunk.num_prefix_tokens + trunk.patch_embed.num_patches, trunk.embed_dim), np.float32)
    if prefix:
        table[: trunk.num_prefix_tokens] = np.concatenate(prefix)
    if trunk.pos_embed is not None:
        positions = to_array(trunk.pos_embed)[0]
        table[len(table) - len(positions) :] += positions
    return table[None]


def _block(graph: Graph, x: str, block: Any, number: int, prefix: str, *, first_only: bool) -> str:
    """One transformer block; with `first_only` everything but the keys and values is for the first token alone."""
    name = f"{prefix}blocks.{number}"
    qkv, proj, fc1, fc2 = (graph.plan.get(f"{name}.{kind}") or plain(block, kind) for kind in KINDS)
    y = graph.layer_norm(x, block.norm1, f"{name}.norm1", qkv)
    if first_only:
        x = _first_token(graph, x, f"{name}.kept")
        y = graph.cast(y, TensorProto.FLOAT, f"{name}.norm1.float")
        with graph.blocks(False):
            y = _one_query(graph, y, block.attn, _for_projection(qkv, proj), name)
        y = graph.cast(y, TensorProto.FLOAT16, f"{name}.attention.half")
    else:
        y = _attention(graph, y, block.attn, _for_projection(qkv, proj), number, name)
    y = graph.product(y, proj, f"{name}.proj", f"{number}.proj")
    x = graph.add("Add", x, y, name=f"{name}.residual1")
    y = graph.layer_norm(x, block.norm2, f"{name}.norm2", fc1)
    parts = _mlp(graph, y, block, (fc1, fc2), number, name)
    return graph.add("Add" if len(parts) == 1 else "Sum", x, *parts, name=f"{name}.residual2")


def _for_projection(qkv: Matrix, proj: Matrix) -> Matrix:
    """`qkv` whose values are shifted and scaled as `proj` wants its inputs: attention is a mean of values."""
    rest = np.zeros(len(qkv.weight) - len(proj.scale), np.float32)
    factor, shift = np.concatenate([rest + 1, proj.scale]), np.concatenate([rest, proj.shift])
    bias = qkv.bias
    if bias is not None or shift.any():
        bias = ((0.0 if bias is None else bias) - shift) * factor
    return replace(qkv, weight=qkv.weight * factor[:, None], bias=bias, steps=qkv.steps * factor)


def _mlp(graph: Graph, y: str, block: Any, matrices: tuple[Matrix, Matrix], number: int, name: str) -> list[str]:
    """The summands of an MLP: one for each group of hidden units that shares a range."""
    fc1, fc2 = matrices
    groups = (
        (np.arange(len(fc1.weight)),) if graph.variant != "int8" or f"{number}.fc2" in graph.exclude else fc2.groups
    )
    out = []
    for k, group in enumerate(groups):
        each = f".{k}" if len(groups) > 1 else ""
        h = graph.product(y, fc1 if not each else fc1.rows(group), f"{name}.fc1{each}", f"{number}.fc1")
        h = gelu(graph, h, block.mlp.act, f"{name}.gelu{each}")
        second = fc2.columns(k) if each else fc2
        out.append(graph.product(h, second, f"{name}.fc2{each}", f"{number}.fc2", bias=k == 0))
    return out


def _attention(graph: Graph, y: str, attn: Any, qkv: Matrix, number: int, name: str) -> str:
    """Attention of all tokens (N, T, D) before its projection, in ONNX Runtime's fused form."""
    if has_norms(attn):
        parts = normed_parts(graph, y, attn, qkv, number, name)
    else:
        each = zip("qkv", np.split(np.arange(len(qkv.weight)), 3), strict=True)
        parts = [graph.product(y, qkv.rows(r), f"{name}.{p}", f"{number}.qkv", bias=False) for p, r in each]
        if qkv.bias is not None:
            parts.append(graph.weight(f"{name}.qkv.bias", qkv.bias))
    heads = {"num_heads": attn.num_heads, "scale": float(attn.scale)}
    return graph.add("MultiHeadAttention", *parts, name=f"{name}.attention", domain="com.microsoft", **heads)


def _one_query(graph: Graph, y: str, attn: Any, qkv: Matrix, name: str) -> str:
    """Attention of the first token alone, (N, T, D) to (N, 1, D), without any token's value, nor key unless normed.

    q . (K y) = (K' q) . y and the mean of V y is V times the mean of y: a hundredth of the work. A bias of the keys
    moves every score alike, and softmax does not see it.
    """
    heads, width = attn.num_heads, attn.head_dim
    to_q, to_k, to_v = (part.reshape(heads, width, -1) for part in np.split(qkv.weight, 3))
    q_bias, _, v_bias = (None,) * 3 if qkv.bias is None else np.split(qkv.bias, 3)
    one = _first_token(graph, y, f"{name}.query")
    if has_norms(attn):
        return one_value(graph, normed_scores(graph, y, one, attn, qkv, name), y, to_v, v_bias, name)
    scale = float(attn.scale)
    q = graph.linear(
        one, to_q.reshape(heads * width, -1) * scale, None if q_bias is None else q_bias * scale, f"{name}.q"
    )
    shapes = {"heads": [0, heads, 1, width], "scores": [0, heads, -1]}
    shape = {k: graph.weight(f"{name}.{k}.shape", np.array(v)) for k, v in shapes.items()}
    q = graph.add("Reshape", q, shape["heads"], name=f"{name}.q.heads")
    keys = graph.add("MatMul", q, graph.weight(f"{name}.k.weight", to_k), name=f"{name}.keys")  # (N, heads, 1, D)
    keys = graph.add("Reshape", keys, shape["scores"], name=f"{name}.keys.flat")
    other = graph.add("Transpose", y, name=f"{name}.tokens", perm=[0, 2, 1])
    scores = graph.add("MatMul", keys, other, name=f"{name}.scores")  # (N, heads, T)
    return one_value(graph, scores, y, to_v, v_bias, name)


def _first_token(graph: Graph, x: str, name: str) -> str:
    """(N, T, D) to (N, 1, D)."""
    ends = [graph.weight(f"{name}.{k}", np.array([v])) for k, v in (("start", 0), ("end", 1), ("axis", 1))]
    return graph.add("Slice", x, *ends, name=name)


def _l2(graph: Graph, x: str, name: str) -> str:
    """x / max(|x|, 1e-12), as torch's normalize does."""
    axis = graph.weight(f"{name}l2.axis", np.array([-1]))
    length = graph.add("ReduceL2", x, axis, name=f"{name}l2.length", keepdims=1)
    length = graph.add("Max", length, graph.weight(f"{name}l2.least", np.array(1e-12)), name=f"{name}l2.safe")
    return graph.add("Div", x, length, name=f"{name}embedding")


def _head(graph: Graph, x: str, head: nn.Module, prefix: str) -> str:
    """The head; each batch norm behind a matrix is folded into it (exact in evaluation mode)."""
    layers = [layer for layer in leaves(head) if not isinstance(layer, (nn.Dropout, Dropout, nn.Identity))]
    for i, layer in enumerate(layers):
        name = f"{prefix}logits" if i == len(layers) - 1 else f"{prefix}head.{i}"
        following = layers[i + 1] if i + 1 < len(layers) else None
        if isinstance(layer, nn.Linear):
            weight = to_array(layer.weight).astype(np.float64)
            bias = np.zeros(len(weight)) if layer.bias is None else to_array(layer.bias).astype(np.float64)
            if isinstance(following, nn.BatchNorm1d):
                factor, mean, shift = _batch_norm(following)
                weight, bias = weight * factor[:, None], (bias - mean) * factor + shift
                name = f"{prefix}logits" if i == len(layers) - 2 else name
            x = graph.linear(x, weight, bias, name)
        elif isinstance(layer, nn.BatchNorm1d):
            if i and isinstance(layers[i - 1], nn.Linear):
                continue
            factor, mean, shift = _batch_norm(layer)
            x = graph.add("Mul", x, graph.weight(f"{name}.a", factor), name=f"{name}.scaled")
            x = graph.add("Add", x, graph.weight(f"{name}.b", shift - mean * factor), name=name)
        elif isinstance(layer, nn.LayerNorm):
            x = graph.layer_norm(x, layer, name)
        else:
            x = _activation(graph, x, layer, name)
    return x


def _batch_norm(norm: nn.BatchNorm1d) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factor, mean and shift (F,) of a batch norm in evaluation mode: (x - mean) factor + shift."""
    assert norm.running_var is not None
    assert norm.running_mean is not None
    factor = to_array(norm.weight) / np.sqrt(to_array(norm.running_var).astype(np.float64) + norm.eps)
    return factor, to_array(norm.running_mean), to_array(norm.bias)


def _activation(graph: Graph, x: str, layer: nn.Module, name: str) -> str:
    if isinstance(layer, nn.SiLU):
        return graph.add("Mul", x, graph.add("Sigmoid", x, name=f"{name}.gate"), name=name)
    if isinstance(layer, nn.GELU):
        return graph.add("Gelu", x, name=name, approximate=layer.approximate)
    return graph.add({nn.ReLU: "Relu", nn.Tanh: "Tanh"}[type(layer)], x, name=name)
