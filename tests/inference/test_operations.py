"""A model file holds what an export writes, in words and in numbers; each part of that is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cxr_fast.errors import InputError
from cxr_fast.inference.model_file import check_operations, read, write
from cxr_fast.inference.session import open_model
from tests.helpers.model_edits import changed, put, weights


def body(*nodes: onnx.NodeProto, held: tuple[onnx.TensorProto, ...] = ()) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "inside", [], [], list(held))


def node(kind: str, **attributes: Any) -> Callable[[onnx.ModelProto], None]:
    return lambda proto: proto.graph.node.append(helper.make_node(kind, ["pixels"], ["more"], **attributes))


def elsewhere() -> onnx.TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def pads(*values: int) -> Callable[[onnx.ModelProto], None]:
    def edit(proto: onnx.ModelProto) -> None:
        weights(proto)["prefix.pads"].CopyFrom(numpy_helper.from_array(np.array(values, np.int64), "prefix.pads"))

    return edit


NUMBERS = helper.make_tensor("prefix.pads", TensorProto.INT64, [6], [1 << 19, 1, 0, 0, 0, 0])


def pads_as_numbers(proto: onnx.ModelProto) -> None:
    weights(proto)["prefix.pads"].CopyFrom(NUMBERS)


def function(proto: onnx.ModelProto) -> None:
    opset = [helper.make_opsetid("", 20)]
    proto.functions.append(helper.make_function("mine", "F", ["x"], ["y"], [helper.make_node("Relu", "x", "y")], opset))


REFUSED = [
    (node("Loop", body=body()), "operation that .* never writes: 'Loop'"),
    (node("RandomNormalLike"), "operation that .* never writes: 'RandomNormalLike'"),
    (node(""), "operation that .* never writes: ''"),
    (node("Conv", auto_pad="SAME_UPPER"), "Conv with 'auto_pad', which"),
    (node("Scan", body=body(helper.make_node("If", ["x"], ["y"]))), "operation that .* never writes: 'If'"),
    (node("Scan", body=body(held=(elsewhere(),))), "its weights lie in another file"),
    (node("Scan", body=body(helper.make_node("Scan", ["x"], ["y"], body=body()))), "graphs within graphs"),
    (lambda proto: proto.graph.initializer.append(elsewhere()), "its weights lie in another file"),
    (lambda proto: proto.graph.sparse_initializer.add(), "sparse weights"),
    (function, "functions or training inside"),
    (lambda proto: proto.training_info.add(), "functions or training inside"),
    (pads(1 << 19, 1, 0, 0, 0, 0), "padding other than"),  # 524,290 images for two: memory, or hours
    (pads(0, 1 << 19, 0, 0, 0, 0), "padding other than"),
    (pads(0, 1, 0, 0, 0, 1), "padding other than"),
    (pads(0, 1, 0), "padding other than"),
    (pads_as_numbers, "padding other than"),
    (node("Scan", body=body(held=(NUMBERS,))), "padding other than"),  # of the same name, beside those that are right
]


@pytest.mark.parametrize(("edit", "said"), REFUSED)
def test_what_no_export_writes_is_refused_whoever_sealed_it(
    toy_model: Path, tmp_path: Path, edit: Callable[[onnx.ModelProto], Any], said: str
) -> None:
    """Before ONNX Runtime sees it: its own refusal would read otherwise."""
    path = changed(toy_model, tmp_path / "m.onnx", edit)
    read(path)  # sealed
    with pytest.raises(InputError, match=rf"m\.onnx: not an ONNX file of ours \(.*{said}"):
        open_model(path, "cpu", 1)


def test_what_an_export_writes_is_not(toy_model: Path, tmp_path: Path) -> None:
    check_operations(toy_model)
    check_operations(changed(toy_model, tmp_path / "m.onnx", pads(0, 1, 0, 0, 0, 0)))


def test_a_name_of_an_axis_that_is_no_text(toy_model: Path, tmp_path: Path) -> None:
    """ONNX Runtime takes it; asked for it, it raised UnicodeDecodeError through every command."""

    def name(proto: onnx.ModelProto) -> None:
        proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "NAME"

    data = changed(toy_model, tmp_path / "m.onnx", name, put("content_sha256", None), seal=False).read_bytes()
    write(tmp_path / "m.onnx", data.replace(b"\x12\x04NAME", b"\x12\x04N\xce\xce\xce"))
    with pytest.raises(InputError, match="an output has a name that is not UTF-8"):
        open_model(tmp_path / "m.onnx", "cpu", 1)
