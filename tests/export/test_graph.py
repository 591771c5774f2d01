"""The float16 and int8 graphs against the float32 one and torch, and what stays out of them."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from cxr_fast.export import parity
from cxr_fast.export.graph import VARIANTS, build, matrices
from cxr_fast.export.int8 import PAIR
from cxr_fast.export.nodes import all_nodes
from cxr_fast.inference import operations
from cxr_fast.training.run_folder import Run, read_run

SIZE = 160


@pytest.fixture(scope="module", params=["class token", "average"])
def run(request: pytest.FixtureRequest) -> Run:
    """A finished run of each kind of pooling."""
    return read_run(request.getfixturevalue({"class token": "toy_run", "average": "toy_run_average"}[request.param]))


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE), dtype=np.uint8)


def answer(model: onnx.ModelProto, pixels: np.ndarray, output: str = "probabilities") -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    out: np.ndarray = session.run([output], {"pixels": pixels})[0]
    return out


@pytest.mark.parametrize(("variant", "limit"), [("fp32", 1e-5), ("fp16", 3e-3), ("int8", 5e-2)])
def test_every_variant_is_near_torch(run: Run, variant: str, limit: float) -> None:
    """And no nearer than its arithmetic allows: an int8 graph that agrees to 1e-5 would not be one."""
    pixels = noise(5)
    want = parity.torch_probabilities(run, pixels)
    apart = np.abs(answer(build(run, variant), pixels) - want).max()
    assert apart < limit
    assert (apart > 1e-5) == (variant == "int8") or variant == "fp16"
    assert np.abs(want[0] - want[1]).max() > limit / 10, "all images look alike: the comparison shows little"


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_float32_and_batches_free(run: Run, variant: str) -> None:
    model = build(run, variant, embedding=True)
    onnx.checker.check_model(model, full_check=False)
    assert {value.name for value in model.graph.output} == {"logits", "probabilities", "embedding"}
    assert all(value.type.tensor_type.elem_type == TensorProto.FLOAT for value in model.graph.output)
    for count in (1, 2, 7):
        assert answer(model, noise(count)).shape == (count, 35)
    lengths = np.linalg.norm(answer(model, noise(3), "embedding"), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)


def test_an_int8_answer_does_not_hang_on_its_neighbours(run: Run) -> None:
    """To the last bit: quantisation follows the range of one image, not of the batch."""
    model, pixels = build(run, "int8"), noise(6)
    pixels[3] = 255  # a neighbour with another range
    together = answer(model, pixels)
    alone = np.concatenate([answer(model, pixels[i : i + 1]) for i in range(6)])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(answer(model, pixels[::-1].copy()), together[::-1])


def body(model: onnx.ModelProto) -> onnx.GraphProto:
    (scan,) = model.graph.node
    return next(a.g for a in scan.attribute if a.name == "body")


def test_int8_products_are_those_of_the_blocks_alone(toy_run: Path) -> None:
    """Head, patch embedding, attention and the last block's one query stay in float."""
    inside = body(build(read_run(toy_run), "int8"))
    count = Counter(node.op_type for node in inside.node)
    assert count["MatMulIntegerToFloat"] == 5 * 6 + 3  # q, k, v, proj, fc1, fc2; the last has no q, k, v
    assert count["DynamicQuantizeLinear"] == 5 * 4 + 3  # q, k and v share what they read
    assert count["MultiHeadAttention"] == 5
    assert {w.data_type for w in inside.initializer if w.name.startswith(("head", "logits", "patch"))} <= {
        TensorProto.FLOAT,
        TensorProto.INT64,
    }


def test_int8_weights_are_the_float_ones_within_half_a_step(toy_run: Path) -> None:
    run = read_run(toy_run)
    stored = {w.name: numpy_helper.to_array(w) for w in body(build(run, "int8")).initializer}
    for i, block in enumerate(run.visual.trunk.blocks):
        weight = block.mlp.fc1.weight.detach().numpy()
        whole, scale = stored[f"blocks.{i}.fc1.weight"], stored[f"blocks.{i}.fc1.scale"]
        assert whole.dtype == np.int8
        assert np.abs(whole).max() > 60
        pairs = whole[: len(whole) // 2 * 2].reshape(-1, 2, whole.shape[1]).astype(int)
        assert max(pairs.clip(0).sum(1).max(), -pairs.clip(None, 0).sum(1).min()) <= PAIR
        assert (np.abs(whole.T * scale[:, None] - weight) <= 0.5001 * scale[:, None]).all()


def test_excluded_matrices_stay_in_float(run: Run) -> None:
    names = matrices(run)
    assert len(names) == 4 * len(run.visual.trunk.blocks)
    everything = build(run, "int8", exclude=frozenset(names))
    assert not any(node.op_type == "MatMulIntegerToFloat" for node in all_nodes(everything.graph))
    np.testing.assert_allclose(answer(everything, noise(3)), answer(build(run), noise(3)), atol=1e-6)
    some = build(run, "int8", exclude=frozenset({"1.fc2", "0.qkv"}))
    quantised = {node.name for node in all_nodes(some.graph) if node.op_type == "MatMulIntegerToFloat"}
    assert not {"blocks.1.fc2", "blocks.0.q", "blocks.0.k", "blocks.0.v"} & quantised
    assert {"blocks.0.fc2", "blocks.1.q"} <= quantised


def test_float16_keeps_to_the_blocks(run: Run) -> None:
    weights = {w.name: w.data_type for w in build(run, "fp16").graph.initializer}
    half = {name for name, kind in weights.items() if kind == TensorProto.FLOAT16}
    assert half
    assert all(name.startswith("blocks.") for name in half)
    assert weights["patch.weight"] == weights["logits.weight"] == TensorProto.FLOAT


def test_an_ensemble_of_every_variant_is_the_mean_of_its_members(toy_run: Path) -> None:
    """Members with other heads; the frozen part once."""
    run = read_run(toy_run, "ensemble")
    assert len(run.members) == 3
    pixels = noise(4)
    for variant in VARIANTS:
        each = [answer(build(dataclasses.replace(run, members=(m,)), variant), pixels) for m in run.members]
        found = answer(build(run, variant), pixels)
        np.testing.assert_allclose(found, np.mean(each, axis=0), atol=1e-6)
        assert np.abs(each[0] - each[1]).max() > 1e-4
        assert sum(node.op_type == "Conv" for node in all_nodes(build(run, variant).graph)) == 1


# Seen placed on CUDA by ONNX Runtime 1.31.1, in float16 and float32 graphs as built here.
ON_CUDA = {
    *("Add", "Cast", "Clip", "Conv", "Div", "Gelu", "LayerNormalization", "Log", "MatMul", "Max", "Min", "Mul"),
    *("MultiHeadAttention", "Pad", "ReduceL2", "ReduceMean", "ReduceSum", "Relu", "Reshape", "Sigmoid", "Slice"),
    *("Softmax", "Squeeze", "Sub", "Sum", "Transpose", "Unsqueeze"),
}
KNOTS = {"kind": "isotonic", "x": [[0.1, 0.4]] * 40, "y": [[0.2, 0.3]] * 40}


@pytest.mark.parametrize("final", ["best-fold", "ensemble"])
@pytest.mark.parametrize("calibration", [None, {"kind": "platt", "a": 1.0, "b": 0.0}, KNOTS])
def test_every_node_has_a_kernel_on_cuda_and_a_place_in_a_model_file(
    final: str, calibration: dict[str, Any] | None, toy_run: Path, toy_run_average: Path
) -> None:
    """One without would go to the CPU and back, and no session with a CUDA graph would take the file. And every graph
    holds what a model file may hold and nothing else."""
    for folder in (toy_run, toy_run_average):
        run = read_run(folder, final)
        run = dataclasses.replace(run, info={**run.info, "calibration": calibration})
        for variant in VARIANTS:
            model = build(run, variant, embedding=final != "ensemble")
            assert variant == "int8" or {node.op_type for node in model.graph.node} <= ON_CUDA
            operations.check(io.BytesIO(model.SerializeToString()))
