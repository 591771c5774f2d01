"""A model file changed by hand, with its `content_sha256` made again or left as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from cxr_fast.inference.model_file import PREFIX, SEAL, write

Edit = Callable[[onnx.ModelProto], Any]


def changed(model: Path, out: Path, *edits: Edit, seal: bool = True) -> Path:
    """A copy of a model file with some edits; `seal` as its exporter would have sealed it, else as damage comes."""
    proto = onnx.load(model, load_external_data=False)
    for edit in edits:
        edit(proto)
    if seal:
        put(SEAL, None)(proto)
        write(out, proto.SerializeToString())
    else:
        out.write_bytes(proto.SerializeToString())
    return out


def put(name: str, value: str | None) -> Edit:
    """Set one `cxr.` entry of the metadata to a text, or take it away."""

    def edit(proto: onnx.ModelProto) -> None:
        kept = [(p.key, p.value) for p in proto.metadata_props if p.key != PREFIX + name]
        del proto.metadata_props[:]
        for k, v in [*kept, *([(PREFIX + name, value)] if value is not None else [])]:
            proto.metadata_props.add(key=k, value=v)

    return edit


def weights(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The initializers by name."""
    return {tensor.name: tensor for tensor in proto.graph.initializer}
