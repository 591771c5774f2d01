"""The nodes of a model file that put out `unlikeness`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from .distance import Distance
from .features import EPSILON
from .record import RunUnlikeness

OUTPUT = "unlikeness"
FLOAT = 1  # onnx.TensorProto.FLOAT


class NodeWriter(Protocol):
    """What adds operations to a graph, as `export.nodes.Graph` does."""

    def add(self, op: str, *inputs: str, name: str, domain: str = "", **attributes: Any) -> str:
        """Append a node whose only output is called `name`; return the name."""
        ...

    def weight(self, name: str, value: Any) -> str:
        """Store a constant; return its name."""
        ...

    def cast(self, x: str, to: int, name: str) -> str:
        """Cast x where the graph computes in float16."""
        ...

    def blocks(self, inside: bool = True) -> AbstractContextManager[None]:
        """What is added meanwhile follows the variant as the transformer blocks do, or does not."""
        ...


def turn(distance: Distance, back: np.ndarray | None) -> Distance:
    """Return the distance for features that a rotation has turned; `back` (F, F) turns them back, None where none has.

    The layer norm commutes with the rotation, which keeps the mean.
    """
    if back is None:
        return distance
    to = back.astype(np.float64).T
    mean, whitening = distance.mean.astype(np.float64) @ to, to.T @ distance.whitening.astype(np.float64)
    return Distance(mean=mean.astype(np.float32), whitening=whitening.astype(np.float32))


def add_unlikeness(
    graph: NodeWriter, x: str, block: int | None, kept: RunUnlikeness | None, visual: Any, *, both_views: bool
) -> None:
    """Add OUTPUT (N,) float32 where `x` is what it is measured on: the tokens (N, T, D) before block `block`, or the
    embedding (N, E) where that is None. Nothing is added elsewhere, nor where `kept` is None.

    In float32 in all variants: one matrix product of a row a film. With `both_views` x has the mirrored films behind
    the plain ones, (2 N, ...), and only the latter count.
    """
    if kept is None or kept.source.block != block:
        return
    back = None if block is None else getattr(visual.trunk.norm, "back", None)
    distance = turn(kept.distance, None if back is None else back.cpu().numpy())
    with graph.blocks(False):
        found = _add_distance(graph, x, kept, distance, f"{OUTPUT}.both" if both_views else OUTPUT)
        if both_views:
            shape = graph.weight("unlike.views.shape", np.array([2, -1]))
            found = graph.add("Reshape", found, shape, name="unlike.views")
            found = _first(graph, found, 0, "unlike.plain")
            graph.add("Squeeze", found, graph.weight("unlike.axis0", np.array([0])), name=OUTPUT)


def _add_distance(graph: NodeWriter, x: str, kept: RunUnlikeness, distance: Distance, name: str) -> str:
    one, last = graph.weight("unlike.axis1", np.array([1])), graph.weight("unlike.axis", np.array([-1]))
    if kept.source.block is not None:
        x = _first(graph, x, 1, "unlike.first") if kept.source.class_token else x
        x = graph.cast(x, FLOAT, "unlike.float")
        if kept.source.class_token:
            x = graph.add("Squeeze", x, one, name="unlike.token")
        else:
            x = graph.add("ReduceMean", x, one, name="unlike.token", keepdims=0)
    weights = [graph.weight(f"unlike.norm.{k}", np.full(len(distance.mean), v)) for k, v in (("a", 1.0), ("b", 0.0))]
    x = graph.add("LayerNormalization", x, *weights, name="unlike.norm", axis=-1, epsilon=EPSILON)
    x = graph.add("Sub", x, graph.weight("unlike.mean", distance.mean), name="unlike.apart")
    x = graph.add("MatMul", x, graph.weight("unlike.whitening", distance.whitening), name="unlike.whitened")
    return graph.add("ReduceL2", x, last, name=name, keepdims=0)


def _first(graph: NodeWriter, x: str, axis: int, name: str) -> str:
    """The first of an axis, which is kept."""
    ends = [graph.weight(f"{name}.{k}", np.array([v])) for k, v in (("start", 0), ("end", 1), ("axis", axis))]
    return graph.add("Slice", x, *ends, name=name)
