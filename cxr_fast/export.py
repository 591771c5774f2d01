"""Prefix and tail joined into one ONNX file, checked against torch before it is kept.

The graph is written node by node, so that normalisation and channel replication fold into the patch embedding,
batch norm into the head's matrices, and the last block computes the class token alone.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from . import __version__, calibrate
from .calibrate import EDGE
from .config import PreprocessSpec, from_dict
from .encode import normalise
from .errors import ImageError, InputError, ParityError
from .predict import PREFIX, SCHEMA, Predictor, golden_pixels, labels_sha256
from .preprocess import load, self_check
from .runs import Member, Run, read_run
from .timing import machine

OPSET = 20
IR_VERSION = 10
LIMIT = 1e-5
BATCHES = (1, 2, 7, 64)
RAW = "raw_probabilities"
NOTICE = "Research use only. Not a medical device; not for diagnosis or treatment."


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far ONNX Runtime and torch are apart on real images: largest probability difference, by batch size.

    `cached` is the largest difference to what the sweep computed from stored activations (their rounding).
    """

    images: int
    largest: float
    by_batch: dict[int, float]
    cached: float | None


class Graph:
    """Nodes and weights under construction; each method adds one operation and returns its output's name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, value: Any) -> str:
        """Store an initializer; float64 becomes float32."""
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(self, op: str, *inputs: str, name: str, domain: str = "", **attributes: Any) -> str:
        """Append a node whose only output is called `name`."""
        node = helper.make_node(op, list(inputs), [name], name=name, domain=domain, **attributes)
        self.nodes.append(node)
        return name

    def linear(self, x: str, weight: np.ndarray, bias: np.ndarray | None, name: str) -> str:
        """x @ weight.T + bias for x (..., I) and weight (O, I)."""
        y = self.add("MatMul", x, self.weight(f"{name}.weight", weight.T), name=f"{name}.product")
        return y if bias is None else self.add("Add", y, self.weight(f"{name}.bias", bias), name=name)

    def layer_norm(self, x: str, norm: nn.Module, name: str) -> str:
        """Layer norm over the last axis; an Identity adds nothing."""
        if isinstance(norm, nn.Identity):
            return x
        assert isinstance(norm, nn.LayerNorm)
        scale = self.weight(f"{name}.weight", _array(norm.weight))
        bias = self.weight(f"{name}.bias", _array(norm.bias))
        return self.add("LayerNormalization", x, scale, bias, name=name, axis=-1, epsilon=norm.eps)


def build(run: Run, *, embedding: bool = False) -> onnx.ModelProto:
    """The graph: `pixels` uint8 (N, S, S) to `logits` and `probabilities` (N, C), optionally `embedding` (N, E).

    An ensemble passes the frozen part once and each tail from there; its probabilities are the mean, its logits those
    of the mean. Where the run is calibrated `probabilities` are, `logits` are not, and `raw_probabilities` is a third
    output.
    """
    graph, trunk = Graph(), run.visual.trunk
    x = _patches(graph, run)
    x = graph.layer_norm(x, trunk.norm_pre, "norm_pre")
    cut = len(trunk.blocks) - run.info["unfreeze_blocks"]
    for i, block in enumerate(trunk.blocks[:cut]):
        x = _block(graph, x, block, f"blocks.{i}", first_only=_first_only(trunk, i))
    several = len(run.members) > 1
    each = [_tail(graph, x, member, cut, f"member{k}." if several else "") for k, member in enumerate(run.members)]
    raw = "probabilities" if run.info["calibration"] is None else RAW
    _mean(graph, each, raw) if several else graph.add("Sigmoid", each[0], name=raw)
    _calibrate(graph, raw, run.info["calibration"])
    size, classes = run.info["preprocess"]["size"], len(run.info["classes"])
    width = run.head[0].in_features
    outputs = [("logits", classes), ("probabilities", classes)]
    outputs += [(RAW, classes)] if raw == RAW else []
    outputs += [("embedding", width)] if embedding else []
    proto = helper.make_graph(
        graph.nodes,
        "cxr-fast",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", size, size])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", n]) for name, n in outputs],
        graph.weights,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION, producer_name="cxr-fast")
    model.producer_version = __version__
    return model


def _first_only(trunk: Any, i: int) -> bool:
    """Whether block i has to answer for the class token alone."""
    return i == len(trunk.blocks) - 1 and trunk.global_pool == "token"


def _tail(graph: Graph, x: str, member: Member, cut: int, name: str) -> str:
    """Blocks from the cut on, norm, pooling, projection, L2 norm and head of one member; its logits."""
    trunk = member.visual.trunk
    for i, block in enumerate(trunk.blocks[cut:], cut):
        x = _block(graph, x, block, f"{name}blocks.{i}", first_only=_first_only(trunk, i))
    x = graph.layer_norm(x, trunk.norm, f"{name}norm")
    x = _pool(graph, x, trunk, name)
    x = graph.layer_norm(x, trunk.fc_norm, f"{name}fc_norm")
    if "proj" in member.visual.head._modules:
        projection = member.visual.head.proj
        x = graph.linear(x, _array(projection.weight), _optional(projection.bias), f"{name}projection")
    return _head(graph, _l2(graph, x, name), member.head, name)


def _mean(graph: Graph, logits: list[str], name: str) -> None:
    """Mean of the members' probabilities; adds `logits`, those of the mean, kept EDGE away from the ends."""
    each = [graph.add("Sigmoid", x, name=f"{x}.probabilities") for x in logits]
    _logit(graph, graph.add("Mean", *each, name=name), "logits")


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
    pieces = max(max(map(len, xs)) - 1, 1)
    start, end, slope = (np.zeros((len(xs), pieces)) for _ in range(3))
    for c, (x, y) in enumerate(zip(xs, ys, strict=True)):
        n = len(x) - 1
        start[c, :n], end[c, :n] = x[:-1], x[1:]
        slope[c, :n] = np.diff(y) / np.diff(x)
    low, high, rise = (graph.weight(f"isotonic.{k}", v) for k, v in (("start", start), ("end", end), ("slope", slope)))
    axis = graph.weight("isotonic.axis", np.array([-1]))
    p = graph.add("Unsqueeze", raw, axis, name="isotonic.p")
    p = graph.add("Min", graph.add("Max", p, low, name="isotonic.max"), high, name="isotonic.min")
    p = graph.add("Mul", graph.add("Sub", p, low, name="isotonic.into"), rise, name="isotonic.rise")
    p = graph.add("ReduceSum", p, axis, name="isotonic.sum", keepdims=0)
    first = graph.weight("isotonic.first", np.array([y[0] for y in ys], np.float64))
    graph.add("Add", p, first, name="probabilities")


def _patches(graph: Graph, run: Run) -> str:
    """uint8 grey pixels to tokens (N, T, D), class token and positions included.

    Grey g becomes channels (g/255 - mean_c) / std_c. The patch embedding has no padding, so the affine map folds
    into its kernel and bias exactly: one input channel instead of three.
    """
    trunk = run.visual.trunk
    conv = trunk.patch_embed.proj
    kernel = _array(conv.weight).astype(np.float64)
    mean, std = (np.array(run.info[k], np.float64).reshape(1, 3, 1, 1) for k in ("mean", "std"))
    bias = -(kernel * mean / std).sum(axis=(1, 2, 3))
    if conv.bias is not None:
        bias = bias + _array(conv.bias)
    kernel = (kernel / std / 255).sum(axis=1, keepdims=True)
    x = graph.add("Cast", "pixels", name="grey", to=TensorProto.FLOAT)
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
    prefix = [_array(t)[0] for t in (trunk.cls_token, trunk.reg_token) if t is not None]
    table = np.zeros((trunk.num_prefix_tokens + trunk.patch_embed.num_patches, trunk.embed_dim), np.float32)
    if prefix:
        table[: trunk.num_prefix_tokens] = np.concatenate(prefix)
    if trunk.pos_embed is not None:
        positions = _array(trunk.pos_embed)[0]
        table[len(table) - len(positions) :] += positions
    return table[None]


def _block(graph: Graph, x: str, block: Any, name: str, *, first_only: bool) -> str:
    """One transformer block; with `first_only` query, projection and MLP are computed for the first token alone."""
    attn = block.attn
    y = graph.layer_norm(x, block.norm1, f"{name}.norm1")
    one, rest = y, x
    if first_only:
        one, rest = _first_token(graph, y, f"{name}.query"), _first_token(graph, x, f"{name}.kept")
    weight, bias = _array(attn.qkv.weight), _optional(attn.qkv.bias)
    inner = attn.num_heads * attn.head_dim
    parts = []
    for i, (part, source) in enumerate(zip("qkv", (one, y, y), strict=True)):
        rows = slice(i * inner, (i + 1) * inner)
        parts.append(graph.linear(source, weight[rows], None, f"{name}.{part}"))
    if bias is not None:
        parts.append(graph.weight(f"{name}.qkv.bias", bias))
    heads = {"num_heads": attn.num_heads, "scale": float(attn.scale)}
    y = graph.add("MultiHeadAttention", *parts, name=f"{name}.attention", domain="com.microsoft", **heads)
    y = graph.linear(y, *_scaled(attn.proj, block.ls1), f"{name}.proj")
    x = graph.add("Add", rest, y, name=f"{name}.residual1")
    y = graph.layer_norm(x, block.norm2, f"{name}.norm2")
    y = graph.linear(y, _array(block.mlp.fc1.weight), _optional(block.mlp.fc1.bias), f"{name}.fc1")
    y = graph.add("Gelu", y, name=f"{name}.gelu", approximate=block.mlp.act.approximate)
    y = graph.linear(y, *_scaled(block.mlp.fc2, block.ls2), f"{name}.fc2")
    return graph.add("Add", x, y, name=f"{name}.residual2")


def _first_token(graph: Graph, x: str, name: str) -> str:
    """(N, T, D) to (N, 1, D)."""
    ends = [graph.weight(f"{name}.{k}", np.array([v])) for k, v in (("start", 0), ("end", 1), ("axis", 1))]
    return graph.add("Slice", x, *ends, name=name)


def _pool(graph: Graph, x: str, trunk: Any, name: str) -> str:
    """(N, T, D) to (N, D): the class token (already alone), or the mean of the patch tokens."""
    axis = graph.weight(f"{name}pool.axis", np.array([1]))
    if trunk.global_pool == "token":
        return graph.add("Squeeze", x, axis, name=f"{name}pool")
    bounds = (trunk.num_prefix_tokens, np.iinfo(np.int64).max)
    ends = [graph.weight(f"{name}pool.{k}", np.array([v])) for k, v in zip(("start", "end"), bounds, strict=True)]
    x = graph.add("Slice", x, *ends, axis, name=f"{name}pool.patches")
    return graph.add("ReduceMean", x, axis, name=f"{name}pool", keepdims=0)


def _l2(graph: Graph, x: str, name: str) -> str:
    """x / max(|x|, 1e-12), as torch's normalize does."""
    axis = graph.weight(f"{name}l2.axis", np.array([-1]))
    length = graph.add("ReduceL2", x, axis, name=f"{name}l2.length", keepdims=1)
    length = graph.add("Max", length, graph.weight(f"{name}l2.least", np.array(1e-12)), name=f"{name}l2.safe")
    return graph.add("Div", x, length, name=f"{name}embedding")


def _head(graph: Graph, x: str, head: nn.Sequential, prefix: str) -> str:
    """The MLP head; each batch norm is folded into the matrix before it (exact in evaluation mode)."""
    layers = [layer for layer in head if isinstance(layer, (nn.Linear, nn.BatchNorm1d, nn.ReLU))]
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Linear):
            weight, bias = (_array(t).astype(np.float64) for t in (layer.weight, layer.bias))
            norm = layers[i + 1] if i + 1 < len(layers) else None
            if isinstance(norm, nn.BatchNorm1d):
                assert norm.running_var is not None
                assert norm.running_mean is not None
                factor = _array(norm.weight) / np.sqrt(_array(norm.running_var).astype(np.float64) + norm.eps)
                weight, bias = weight * factor[:, None], (bias - _array(norm.running_mean)) * factor
                bias = bias + _array(norm.bias)
            name = f"{prefix}logits" if norm is None else f"{prefix}head.{i}"
            x = graph.linear(x, weight, bias, name)
        elif isinstance(layer, nn.ReLU):
            x = graph.add("Relu", x, name=f"{prefix}head.{i}.relu")
    return x


def _scaled(linear: Any, scale: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Weight and bias of a linear layer with the layer scale behind it folded in."""
    weight, bias = _array(linear.weight), _optional(linear.bias)
    gamma = getattr(scale, "gamma", None)
    if gamma is None:
        return weight, bias
    factor = _array(gamma)
    return weight * factor[:, None], None if bias is None else bias * factor


def export(
    run_folder: Path, *, out: Path | None = None, images: Path | None = None
) -> tuple[Path, Parity, dict[str, Any]]:
    """Write RUN/model.fp32.onnx, checked; returns its path, the parity found, and its metadata.

    The check reads up to 64 of the cached images again (hold-out first) under the dataset's folder, or under `images`.
    Raises ParityError, leaving nothing behind, when torch and ONNX Runtime differ by more than 1e-5.
    """
    run = read_run(run_folder)
    path = out or run_folder / "model.fp32.onnx"
    model = build(run)
    pixels, cached = check_images(run, images)
    scratch = path.with_name(path.name + f".partial.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(model, metadata(run, model), scratch)
        parity = check(run, scratch, pixels, cached)
        if not parity.largest <= LIMIT:
            raise ParityError(
                f"{path.name} was not kept: ONNX Runtime and torch differ by {parity.largest:.2e} in probability "
                f"(limit {LIMIT:g}) on {parity.images} images; please report this with the run folder."
            )
        pair = golden(run, Predictor(scratch, device="cpu"))
        info = metadata(run, model) | {"parity": _parity_json(parity), "golden": pair}
        _save(model, info, scratch)
        os.replace(scratch, path)
    except OSError as error:
        raise InputError(f"--out: cannot write {path}: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()
    return path, parity, info


def check_images(run: Run, images: Path | None, *, most: int = max(BATCHES)) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, S, S) of cached images, hold-out first, and what the sweep predicted for them (n, C)."""
    try:
        saved = np.load(run.folder / "predictions.npz")
    except (OSError, ValueError) as error:
        raise InputError(f"{run.folder / 'predictions.npz'}: cannot be read; run the sweep again.") from error
    root = images or Path(run.info["cache"]["dataset"]["root"])
    order = np.argsort(saved["fold"] >= 0, kind="stable")
    spec = from_dict(PreprocessSpec, run.info["preprocess"])
    pixels: list[np.ndarray] = []
    kept: list[int] = []
    changed = 0
    for i in order:
        if len(kept) == most:
            break
        try:
            image, sha256 = load(root / str(saved["image"][i]), spec)
        except ImageError:
            continue
        if sha256 != saved["sha256"][i]:
            changed += 1
            continue
        pixels.append(image)
        kept.append(i)
    if not kept:
        raise InputError(
            f"export checks itself on the cached images, and none of the {len(order):,} is readable under {root} "
            f"({changed} changed since); give their folder with --images DIR."
        )
    return np.stack(pixels), saved["final"][kept]


def check(run: Run, path: Path, pixels: np.ndarray, cached: np.ndarray | None) -> Parity:
    """Compare the file with torch on `pixels`, at batch sizes 1, 2, 7 and 64 (images repeat where there are fewer).

    Of a calibrated model the raw probabilities are compared with torch's, and the calibration in the graph with
    `calibrate.apply` on them: a steep calibration would make any difference large.
    """
    reference = torch_probabilities(run, pixels)
    predictor, calibration = Predictor(path, device="cpu"), run.info["calibration"]
    by_batch = {}
    for batch in BATCHES:
        take = np.arange(batch) % len(pixels)
        found = predictor.run(pixels[take], output="probabilities" if calibration is None else RAW)
        apart = [np.abs(found - reference[take]).max()]
        if calibration is not None:
            apart.append(np.abs(predictor.run(pixels[take]) - calibrate.apply(calibration, found)).max())
        by_batch[batch] = float(np.max(apart))  # numpy's, which does not lose a NaN
    drift = None if cached is None else float(np.abs(reference - cached).max())
    largest = float(np.max(list(by_batch.values())))  # numpy's, which does not lose a NaN
    return Parity(images=len(pixels), largest=largest, by_batch=by_batch, cached=drift)


def torch_probabilities(run: Run, pixels: np.ndarray, *, batch: int = 8) -> np.ndarray:
    """The trusted path: float32 probabilities (n, C), not calibrated, of uint8 pixels (n, S, S), by open_clip."""
    mean, std = (torch.tensor(run.info[k]).reshape(1, 3, 1, 1) for k in ("mean", "std"))
    out = []
    for start in range(0, len(pixels), batch):
        x = normalise(torch.from_numpy(pixels[start : start + batch]), mean, std)
        out.append(run.raw_probabilities(x))
    return np.concatenate(out)


def golden(run: Run, predictor: Predictor) -> dict[str, Any]:
    """Recipe of an input, torch's float32 answer, and this file's own answer here: what another machine must repeat."""
    pixels = golden_pixels(run.info["preprocess"]["size"])
    expected = calibrate.apply(run.info["calibration"], torch_probabilities(run, pixels))[0]
    return {
        "recipe": "pixels[0, i, j] = (7*i + 13*j + i*j//16) % 256",
        "probabilities": [float(p) for p in expected],
        "expected": [float(p) for p in predictor.run(pixels)[0]],
        "tolerance": 1e-4,
        "provider": predictor.provider,
        "cpu": machine()["cpu"],
    }


def metadata(run: Run, model: onnx.ModelProto) -> dict[str, Any]:
    """What the file says of itself; every value is JSON under `cxr.`."""
    info = run.info
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    import onnxruntime

    return {
        "schema": SCHEMA,
        "written_by": f"cxr-fast {__version__}",
        "variant": "fp32",
        "labels": info["classes"],
        "labels_sha256": labels_sha256(info["classes"]),
        "thresholds": info["thresholds"],
        "threshold_source": info["threshold_source"],
        "calibration": info["calibration"],
        "final": info["final"],
        "preprocess": info["preprocess"],
        "pixel_check": self_check(),
        "dicom_policy": info["preprocess"]["dicom_policy"],
        "mean": info["mean"],
        "std": info["std"],
        "weights": "random" if info["random_weights"] else Path(info["cache"]["weights"]).name,
        "provenance": info["provenance"],
        "backbone": info["backbone"],
        "tower_sha256": info["cache"]["tower_sha256"],
        "model_sha256": info["model_sha256"],
        "trainable": info["trainable"],
        "cache_fingerprint": info["cache"]["fingerprint"],
        "data": {"name": info["cache"]["dataset"]["name"], "images": info["images"], "metrics": info["metrics"]},
        "nodes": counts,
        "toolchain": info["toolchain"] | {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
        "intended_use": NOTICE,
    }


def _parity_json(parity: Parity) -> dict[str, Any]:
    return {
        "against": "torch float32, open_clip tower",
        "images": parity.images,
        "max_probability_difference": parity.largest,
        "by_batch": {str(k): v for k, v in parity.by_batch.items()},
        "to_cached_activations": parity.cached,
        "limit": LIMIT,
    }


def _save(model: onnx.ModelProto, info: dict[str, Any], path: Path) -> None:
    del model.metadata_props[:]
    for key, value in info.items():
        model.metadata_props.add(key=PREFIX + key, value=json.dumps(value))
    path.write_bytes(model.SerializeToString())


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().float().numpy()


def _optional(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else _array(tensor)
