"""Put another calibration into a model file's graph, byte by byte: no onnx package, and no weight is touched.

Source: onnx.proto (ModelProto: graph 7; GraphProto: node 1, initializer 5, output 12; NodeProto: input 1, output 2,
name 3, op_type 4, attribute 5; TensorProto: dims 1, data_type 2, name 8, raw_data 9; ValueInfoProto: name 1;
AttributeProto: name 1, i 3, type 20, g 6).
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import InputError
from ..inference.operations import MOST_FIELDS, MOST_NODES, MOST_RECORDS
from ..inference.protobuf import BYTES, NUMBER, records
from ..metrics.calibration import EDGE, isotonic_pieces

PROBABILITIES, RAW, EARLIER = "probabilities", "raw_probabilities", "earlier_probabilities"
PREFIX = "recalibrated"

_GRAPH, _NODE, _INITIALIZER, _OUTPUT = 7, 1, 5, 12
_IN, _OUT, _NAME, _OP, _ATTRIBUTE = 1, 2, 3, 4, 5
_FLOAT, _INT64, _INT = 1, 7, 2  # of TensorProto, and of AttributeProto

Part = tuple[int, bytes]  # a field of a graph and its payload


@dataclass(frozen=True, kw_only=True)
class _Node:
    """A node of a graph: what goes in and out, its operation, and every field as it stands."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kind: str
    fields: tuple[Part, ...]

    def renamed(self, names: dict[str, str]) -> _Node:
        """With other names of what goes in and out, and of the node, which is called as what it gives."""
        own = (_IN, _OUT, _NAME)
        fields = tuple((n, _rename(v, names) if n in own else v) for n, v in self.fields)
        inputs, outputs = (tuple(names.get(name, name) for name in each) for each in (self.inputs, self.outputs))
        return replace(self, inputs=inputs, outputs=outputs, fields=fields)

    def payload(self) -> bytes:
        """As bytes."""
        return b"".join(_field(number, value) for number, value in self.fields)


def recalibrate_graph(serialised: bytes, calibration: dict[str, Any]) -> tuple[bytes, Counter[str]]:
    """Return a serialised model whose `probabilities` are its raw ones through `calibration`, and the operations added.

    A model without a calibration also gets the output `raw_probabilities`; one that has a calibration loses it, by a
    negative count. Raises InputError where the graph has no output `probabilities`.
    """
    out, change = [], Counter[str]()
    for number, payload in _split(serialised, MOST_RECORDS):
        if number == _GRAPH and isinstance(payload, bytes):
            graph, change = _graph(payload, calibration)
            out.append(_field(_GRAPH, graph))
        else:
            out.append(_field(number, payload))
    return b"".join(out), change


def _graph(payload: bytes, calibration: dict[str, Any]) -> tuple[bytes, Counter[str]]:
    parts = _split(payload, MOST_NODES)
    nodes = [_node(value) for number, value in parts if number == _NODE]
    outputs = {_first(value, 1): value for number, value in parts if number == _OUTPUT}
    if PROBABILITIES not in outputs:
        raise InputError("the graph has no output `probabilities`; export the run again.")
    before = Counter(node.kind for node in nodes)
    if RAW in outputs:
        nodes = _without_calibration(nodes, set(outputs) - {PROBABILITIES})
    else:
        nodes = [node.renamed({PROBABILITIES: RAW}) for node in nodes]
    made, weights = _calibration(calibration)
    nodes += made
    used = {name for node in nodes for name in node.inputs}
    bodies = any(node.kind == "Scan" for node in nodes)
    kept: list[bytes] = []
    for number, value in parts:
        name = _first(value, 8) if number == _INITIALIZER else ""
        old = name.startswith(f"{PREFIX}.") or (name not in used and not bodies)  # a body uses weights unseen
        if number == _NODE or (number == _INITIALIZER and old):
            continue
        kept.append(_field(number, value))
    kept += [_field(_NODE, node.payload()) for node in nodes]
    kept += [_field(_INITIALIZER, weight) for weight in weights]
    if RAW not in outputs:
        info = [(n, RAW.encode() if n == 1 else v) for n, v in _split(outputs[PROBABILITIES], MOST_FIELDS)]
        kept.append(_field(_OUTPUT, b"".join(_field(n, v) for n, v in info)))
    change = Counter(node.kind for node in nodes)
    change.subtract(before)
    return b"".join(kept), change


def _without_calibration(nodes: Sequence[_Node], wanted: set[str]) -> list[_Node]:
    """The nodes that something still needs. A Scan keeps its calibration inside, under a name that nobody reads."""
    kept: list[_Node] = []
    for node in reversed(nodes):
        if wanted.isdisjoint(node.outputs):
            continue
        wanted |= set(node.inputs)
        kept.append(node.renamed({PROBABILITIES: EARLIER}))
    return kept[::-1]


# The calibration's nodes, as `export.graph` writes them.


def _calibration(calibration: dict[str, Any]) -> tuple[list[_Node], list[bytes]]:
    return _platt(calibration) if calibration["kind"] == "platt" else _isotonic(calibration)


def _platt(calibration: dict[str, Any]) -> tuple[list[_Node], list[bytes]]:
    values = {"low": np.array(EDGE), "high": np.array(1 - EDGE), "one": np.array(1.0)}
    values |= {key: np.array(calibration[key], np.float64) for key in "ab"}
    steps = [
        ("Clip", (RAW, "low", "high"), "clipped"),
        ("Sub", ("one", "clipped"), "rest"),
        ("Div", ("clipped", "rest"), "odds"),
        ("Log", ("odds",), "logit"),
        ("Mul", ("logit", "a"), "scaled"),
        ("Add", ("scaled", "b"), "platt"),
        ("Sigmoid", ("platt",), PROBABILITIES),
    ]
    return [_made(*step) for step in steps], [_weight(name, value) for name, value in values.items()]


def _isotonic(calibration: dict[str, Any]) -> tuple[list[_Node], list[bytes]]:
    """y_0 + sum over pieces of slope (clip(p, start, end) - start): linear between knots, constant beyond them."""
    xs, ys = calibration["x"], calibration["y"]
    start, end, slope = isotonic_pieces(xs, ys)
    values = {"start": start, "end": end, "slope": slope, "first": np.array([y[0] for y in ys], np.float64)}
    values["axis"] = np.array([-1], np.int64)
    steps = [
        ("Unsqueeze", (RAW, "axis"), "p"),
        ("Max", ("p", "start"), "above"),
        ("Min", ("above", "end"), "inside"),
        ("Sub", ("inside", "start"), "into"),
        ("Mul", ("into", "slope"), "rise"),
        ("ReduceSum", ("rise", "axis"), "sum"),
        ("Add", ("sum", "first"), PROBABILITIES),
    ]
    return [_made(*step) for step in steps], [_weight(name, value) for name, value in values.items()]


def _made(kind: str, inputs: tuple[str, ...], output: str) -> _Node:
    """A node; names but those of the graph's outputs get PREFIX."""
    own = tuple(map(_full, inputs))
    out = _full(output)
    fields = [
        *((_IN, name.encode()) for name in own),
        (_OUT, out.encode()),
        (_NAME, out.encode()),
        (_OP, kind.encode()),
    ]
    if kind == "ReduceSum":
        fields.append((_ATTRIBUTE, _field(1, b"keepdims") + _number(3, 0) + _number(20, _INT)))
    return _Node(inputs=own, outputs=(out,), kind=kind, fields=tuple(fields))


def _full(name: str) -> str:
    return name if name in (RAW, PROBABILITIES) else f"{PREFIX}.{name}"


def _weight(name: str, value: np.ndarray) -> bytes:
    """A TensorProto: float32, or int64 for an axis."""
    array = value.astype("<f4") if value.dtype.kind == "f" else value.astype("<i8")
    dims = b"".join(_number(1, size) for size in array.shape)
    kind = _number(2, _FLOAT if array.dtype.kind == "f" else _INT64)
    return dims + kind + _field(8, _full(name).encode()) + _field(9, array.tobytes())


# The bytes.


def _split(message: bytes, most: int) -> list[tuple[int, Any]]:
    """The fields of a message: payloads as bytes, numbers as int."""
    file = io.BytesIO(message)
    out: list[tuple[int, Any]] = []
    for record in records(file, 0, len(message), most):
        body = message[record.body : record.end]
        if record.wire == NUMBER:
            out.append((record.field, sum((byte & 127) << 7 * i for i, byte in enumerate(body))))
        elif record.wire == BYTES:
            out.append((record.field, body))
        else:
            out.append((record.field, _Raw(message[record.start : record.end])))
    return out


class _Raw(bytes):
    """A field of fixed size with its tag, copied as it stands."""


def _node(payload: bytes) -> _Node:
    fields = _split(payload, MOST_FIELDS)

    def texts(number: int) -> tuple[str, ...]:
        return tuple(value.decode() for n, value in fields if n == number)

    return _Node(inputs=texts(_IN), outputs=texts(_OUT), kind="".join(texts(_OP)), fields=tuple(fields))


def _first(payload: bytes, number: int) -> str:
    """The text of a field of a message; empty where there is none."""
    return next((value.decode() for n, value in _split(payload, MOST_NODES) if n == number), "")


def _rename(value: bytes, names: dict[str, str]) -> bytes:
    return names.get(value.decode(), value.decode()).encode()


def _field(number: int, value: Any) -> bytes:
    """A field with its tag: a number, a payload, or one copied as it stands."""
    if isinstance(value, _Raw):
        return bytes(value)
    if isinstance(value, int):
        return _number(number, value)
    return varint_bytes(number << 3 | BYTES) + varint_bytes(len(value)) + value


def _number(number: int, value: int) -> bytes:
    return varint_bytes(number << 3 | NUMBER) + varint_bytes(value)


def varint_bytes(value: int) -> bytes:
    """Write a number of 7 bits per byte, lowest first."""
    out = bytearray()
    while True:
        value, low = value >> 7, value & 127
        out.append(low | (128 if value else 0))
        if not value:
            return bytes(out)


def replace_entries(serialised: bytes, entries: Iterable[tuple[str, str]]) -> bytes:
    """Return a serialised model whose metadata entries (field 14: key 1, value 2) are these and no others."""
    kept = [_field(number, value) for number, value in _split(serialised, MOST_RECORDS) if number != 14]
    made = [_field(14, _field(1, key.encode()) + _field(2, value.encode())) for key, value in entries]
    return b"".join([*kept, *made])
