"""Refuse operations in a model file that `cxrfast export` never writes, and weights outside the file.

Read without ONNX Runtime, which runs whatever it is given: a loop without end, or an image padded to a million. Source:
onnx.proto (ModelProto: graph 7, training_info 20, functions 25; GraphProto: node 1, initializer 5,
sparse_initializer 15; NodeProto: input 1, op_type 4, attribute 5; AttributeProto: name 1, g 6; TensorProto: name 8,
raw_data 9, data_location 14).
"""

from __future__ import annotations

import dataclasses
import io
import struct
from typing import IO

from .protobuf import BYTES, NUMBER, NotOnnx, Record, records, varint

# Records in the file, in a graph, in a node or a weight; real ones have some 50, 2,000 and 12. A hostile file of
# two-byte records would be read for minutes.
MOST_RECORDS, MOST_NODES, MOST_FIELDS = 10_000, 20_000, 128
MOST_DEEP = 2  # an int8 graph is the body of a Scan

# Each with the attributes that it is written with.
ATTRIBUTES: dict[str, frozenset[str]] = {
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Sum", "Clip", "Log", "Relu", "Sigmoid", "Tanh"), frozenset()
    ),
    **dict.fromkeys(("MatMul", "Unsqueeze", "Squeeze", "Reshape", "Slice", "Pad"), frozenset()),
    **dict.fromkeys(("DynamicQuantizeLinear", "MatMulIntegerToFloat"), frozenset()),
    **dict.fromkeys(("ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum"), frozenset({"keepdims"})),
    "Cast": frozenset({"to"}),
    "Concat": frozenset({"axis"}),
    "Conv": frozenset({"kernel_shape", "strides"}),
    "Gelu": frozenset({"approximate"}),
    "LayerNormalization": frozenset({"axis", "epsilon"}),
    "MultiHeadAttention": frozenset({"num_heads", "scale"}),
    "Scan": frozenset({"body", "num_scan_inputs"}),
    "Softmax": frozenset({"axis"}),
    "Split": frozenset({"axis", "num_outputs"}),
    "Transpose": frozenset({"perm"}),
}
MOST_PADDED = 64  # class and register tokens in front of the patches
MOST_JOINED = 2  # an image and its mirrored twin, joined once; twenty doublings in a row are a million images

Weights = dict[str, list[Record | None]]  # where the values of each name lie; None where they are not raw bytes

_GRAPH, _FOREIGN = 7, (20, 25)
_NODE, _INITIALIZER, _SPARSE = 1, 5, 15
_INPUT, _OP_TYPE, _ATTRIBUTE = 1, 4, 5
_ATTRIBUTE_NAME, _SUBGRAPH = 1, 6
_NAME, _RAW_DATA, _DATA_LOCATION = 8, 9, 14


@dataclasses.dataclass
class _Found:
    """Names of padding amounts, where each weight's values lie, and how many inputs are joined."""

    pads: set[str] = dataclasses.field(default_factory=set)
    weights: Weights = dataclasses.field(default_factory=dict)
    joined: int = 0


def check(file: IO[bytes]) -> None:
    """Raise NotOnnx where a file holds what no export writes."""
    for record in records(file, 0, file.seek(0, io.SEEK_END), MOST_RECORDS):
        if record.field in _FOREIGN:
            raise NotOnnx("functions or training inside, which `cxrfast export` never writes")
        if record.field == _GRAPH and record.wire == BYTES:
            found = _Found()
            _graph(file, record, found, 0)
            for name in found.pads:
                for values in found.weights.get(name, [None]):
                    _padding(file, values)
            if found.joined > MOST_JOINED:
                raise NotOnnx("more joined than an image and its mirrored twin, which `cxrfast export` never does")


def _graph(file: IO[bytes], graph: Record, found: _Found, deep: int) -> None:
    """Collect what a graph holds in `found`."""
    if deep == MOST_DEEP:
        raise NotOnnx("graphs within graphs, which `cxrfast export` never writes")
    for record in records(file, graph.body, graph.end, MOST_NODES):
        if record.field == _NODE:
            _node(file, record, found, deep)
        elif record.field == _INITIALIZER:
            _weight(file, record, found.weights)
        elif record.field == _SPARSE:
            raise NotOnnx("sparse weights, which `cxrfast export` never writes")


def _node(file: IO[bytes], node: Record, found: _Found, deep: int) -> None:
    parts = list(records(file, node.body, node.end, MOST_FIELDS))
    inputs, kinds = ([_text(file, part) for part in parts if part.field == k] for k in (_INPUT, _OP_TYPE))
    kind = kinds[0] if len(kinds) == 1 else ""
    if kind not in ATTRIBUTES:
        raise NotOnnx(f"an operation that `cxrfast export` never writes: {kind[:40]!r}")
    if kind == "Pad":
        found.pads.update(inputs[1:])
    if kind == "Concat":
        found.joined += len(inputs)
    for part in parts:
        if part.field != _ATTRIBUTE:
            continue
        fields = list(records(file, part.body, part.end, MOST_FIELDS))
        name = "".join(_text(file, field) for field in fields if field.field == _ATTRIBUTE_NAME)
        if name not in ATTRIBUTES[kind]:
            raise NotOnnx(f"{kind} with {name[:40]!r}, which `cxrfast export` never writes")
        for field in fields:
            if field.field == _SUBGRAPH:
                _graph(file, field, found, deep + 1)


def _weight(file: IO[bytes], weight: Record, weights: Weights) -> None:
    """Refuse a weight that lies in another file: `content_sha256` does not cover it, and the file could be any."""
    fields = {field.field: field for field in records(file, weight.body, weight.end, MOST_FIELDS)}
    location = fields.get(_DATA_LOCATION)
    if location is not None:
        file.seek(location.body)
        if location.wire != NUMBER or varint(file):
            raise NotOnnx("its weights lie in another file, which `cxrfast export` never does")
    if _NAME in fields:
        weights.setdefault(_text(file, fields[_NAME]), []).append(fields.get(_RAW_DATA))


def _padding(file: IO[bytes], values: Record | None) -> None:
    """Refuse padding but of a few tokens in front of the patches, (N, T, D): none of the batch, none of the width."""
    size = 6 * 8
    if values is None or values.end - values.body != size:
        raise NotOnnx("padding other than `cxrfast export` writes")
    file.seek(values.body)
    batch, tokens, *rest = struct.unpack("<6q", file.read(size))
    if batch or any(rest) or not 0 <= tokens <= MOST_PADDED:
        raise NotOnnx("padding other than `cxrfast export` writes")


def _text(file: IO[bytes], record: Record) -> str:
    file.seek(record.body)
    return file.read(min(record.end - record.body, 1 << 16)).decode("utf-8", "replace")
