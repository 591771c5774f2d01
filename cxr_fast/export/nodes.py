"""Add ONNX operations to a graph, in float32, float16 or int8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch import Tensor, nn

from .int8 import LEAST, Matrix, Plan


class Graph:
    """Nodes and weights under construction; each method adds one operation and returns its output's name.

    `variant` decides how the blocks compute: float32; float16 (layer norm and softmax keep float32 statistics inside
    ONNX Runtime's CUDA kernels); or int8 products of float32 values, as `plan` gives each block matrix by its name.
    `exclude` names block matrices left in float32, such as `10.fc2`.
    """

    def __init__(self, variant: str = "fp32", exclude: frozenset[str] = frozenset(), plan: Plan | None = None) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.variant, self.exclude, self.plan = variant, exclude, plan or {}
        self.in_blocks = False
        self.quantised: set[str] = set()

    @contextmanager
    def blocks(self, inside: bool = True) -> Iterator[None]:
        """What is added meanwhile belongs to the transformer blocks and follows the variant, or does not."""
        self.in_blocks, before = inside, self.in_blocks
        yield
        self.in_blocks = before

    def weight(self, name: str, value: Any) -> str:
        """Store an initializer; floats become float32, or float16 in the blocks of that variant."""
        array = np.asarray(value)
        if array.dtype.kind == "f":
            array = array.astype(np.float16 if self.in_blocks and self.variant == "fp16" else np.float32)
        return self._store(name, array)

    def _store(self, name: str, array: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(self, op: str, *inputs: str, name: str, domain: str = "", **attributes: Any) -> str:
        """Append a node whose only output is called `name`."""
        node = helper.make_node(op, list(inputs), [name], name=name, domain=domain, **attributes)
        self.nodes.append(node)
        return name

    def cast(self, x: str, to: int, name: str) -> str:
        """x in another type; only float16 graphs need it."""
        return self.add("Cast", x, name=name, to=to) if self.variant == "fp16" else x

    def linear(self, x: str, weight: np.ndarray, bias: np.ndarray | None, name: str) -> str:
        """x @ weight.T + bias for x (..., I) and weight (O, I), in float."""
        y = self.add("MatMul", x, self.weight(f"{name}.weight", weight.T), name=f"{name}.product")
        return y if bias is None else self.add("Add", y, self.weight(f"{name}.bias", bias), name=name)

    def product(self, x: str, matrix: Matrix, name: str, group: str, *, bias: bool = True) -> str:
        """The product with a block matrix whose inputs share one range; in float where `exclude` has its `group`.

        In integers: x to uint8 by its own range as it comes. ONNX Runtime's x86 kernels want unsigned times signed: 2.4
        times as fast as unsigned times unsigned (LOG).
        """
        if self.variant != "int8" or group in self.exclude:
            return self.linear(x, matrix.weight, matrix.bias if bias else None, name)
        if matrix.by_token:
            return self._by_token(x, matrix, name, group, bias=bias)
        parts = [f"{x}.{part}" for part in ("uint8", "scale", "zero")]
        if x not in self.quantised:
            self.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], parts, name=f"{x}.quantised"))
            self.quantised.add(x)
        whole, steps = self._store(f"{name}.weight", matrix.whole.T), self.weight(f"{name}.scale", matrix.steps[0])
        inputs = [parts[0], whole, parts[1], steps, parts[2]]
        inputs += ["", self.weight(f"{name}.bias", matrix.bias)] if bias and matrix.bias is not None else []
        return self.add("MatMulIntegerToFloat", *inputs, name=name, domain="com.microsoft")

    def _by_token(self, x: str, matrix: Matrix, name: str, group: str, *, bias: bool) -> str:
        """`product` of inputs divided by each token's largest, which the product is multiplied by."""
        axis, least = self.weight(f"{x}.axis", np.array([-1])), self.weight(f"{x}.least", np.array(LEAST))
        largest = self.add("ReduceMax", x, axis, name=f"{x}.max", keepdims=1)
        largest = self.add("Clip", largest, least, name=f"{x}.largest")
        divided = self.add("Div", x, largest, name=f"{x}.divided")
        y = self.product(divided, replace(matrix, by_token=False), f"{name}.divided", group, bias=False)
        if not bias or matrix.bias is None:
            return self.add("Mul", y, largest, name=name)
        y = self.add("Mul", y, largest, name=f"{name}.product")
        return self.add("Add", y, self.weight(f"{name}.bias", matrix.bias), name=name)

    def layer_norm(self, x: str, norm: nn.Module, name: str, following: Matrix | None = None) -> str:
        """Layer norm over the last axis, shifted and scaled as the `following` matrix wants it; an Identity adds
        nothing."""
        if isinstance(norm, nn.Identity):
            return x
        assert isinstance(norm, nn.LayerNorm)
        scale, bias = to_array(norm.weight), to_array(norm.bias)
        if following is not None:
            scale, bias = scale * following.scale, (bias - following.shift) * following.scale
        weights = self.weight(f"{name}.weight", scale), self.weight(f"{name}.bias", bias)
        return self.add("LayerNormalization", x, *weights, name=name, axis=-1, epsilon=norm.eps)


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the graphs inside its nodes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_nodes(attribute.g)


def to_array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as a float32 array."""
    return tensor.detach().cpu().float().numpy()


def to_array_or_none(tensor: Tensor | None) -> np.ndarray | None:
    """`to_array` of what a layer may lack, such as a bias."""
    return None if tensor is None else to_array(tensor)
