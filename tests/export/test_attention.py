"""The graph of every kind of tower against torch, in every variant; a plain tower's graph stays as it is."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from cxr_fast.export import int8, parity
from cxr_fast.export.graph import VARIANTS, build, matrices
from cxr_fast.export.nodes import all_nodes
from cxr_fast.export.rotate import Turned, rotated
from cxr_fast.inference import operations
from cxr_fast.models import backbone
from cxr_fast.training.run_folder import Run
from tests.conftest import TOY, TOY_AVERAGE
from tests.export.test_graph import ON_CUDA
from tests.helpers.towers import KINDS, SIZE, run_of, scramble, tower


def noise(count: int, size: int = SIZE) -> np.ndarray:
    """Images that differ in brightness as well as in noise."""
    random = np.random.default_rng(0)
    top = np.linspace(20, 256, count).astype(int)[:, None, None]
    return (random.random((count, size, size)) * top).astype(np.uint8)


def answer(model: onnx.ModelProto, pixels: np.ndarray, output: str = "probabilities") -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    out: np.ndarray = session.run([output], {"pixels": pixels})[0]
    return out


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest) -> Run:
    return run_of(tower(request.param))


@pytest.mark.parametrize(("variant", "limit"), [("fp32", 1e-5), ("fp16", 2e-3), ("int8", 5e-2)])
def test_every_kind_in_every_variant_is_near_torch(run: Run, variant: str, limit: float) -> None:
    pixels = noise(4)
    want = parity.torch_probabilities(run, pixels)
    model = build(run, variant)
    apart = np.abs(answer(model, pixels) - want).max()
    assert apart < limit
    assert (apart > 1e-5) == (variant == "int8") or variant == "fp16"
    assert np.ptp(want, axis=0).max() > 0.1, "all images look alike: the comparison shows little"
    onnx.checker.check_model(model, full_check=False)
    operations.check(io.BytesIO(model.SerializeToString()))
    if variant != "int8":
        assert {node.op_type for node in model.graph.node} <= ON_CUDA


@pytest.mark.parametrize("blocks", [0, 3])
def test_the_cut_changes_no_answer(run: Run, blocks: int) -> None:
    """With 0 everything is the frozen part, pooling and projection included; with 3 every block is the tail's."""
    other = dataclasses.replace(run, info={**run.info, "unfreeze_blocks": blocks})
    for variant in VARIANTS:
        np.testing.assert_array_equal(answer(build(other, variant), noise(2)), answer(build(run, variant), noise(2)))


def test_a_turned_tower_with_chosen_weights_is_the_same_in_float(run: Run) -> None:
    pixels, turned = noise(4), rotated(run)
    want = parity.torch_probabilities(run, pixels)
    before = (run.visual.trunk.norm_pre, run.visual.trunk.patch_embed.norm)
    assert isinstance(turned.visual.trunk.norm, Turned) == all(isinstance(n, torch.nn.Identity) for n in before)
    np.testing.assert_allclose(parity.torch_probabilities(turned, pixels), want, atol=1e-5, rtol=0)
    plan = int8.choose(turned, pixels, lambda *_: None)
    np.testing.assert_allclose(answer(build(turned, "fp32", plan=plan), pixels), want, atol=1e-5, rtol=0)
    model = build(turned, "int8", plan=plan, exclude=frozenset(matrices(run)))
    np.testing.assert_allclose(answer(model, pixels), want, atol=1e-5, rtol=0)
    assert np.abs(answer(build(turned, "int8", plan=plan), pixels) - want).max() < 5e-2
    assert set(int8.order(turned, plan, pixels)) <= set(matrices(run))


def test_embeddings_of_every_kind_come_out_at_length_one(run: Run) -> None:
    pixels = noise(3)
    mean, std = (torch.tensor(run.info[k]).reshape(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        want = run.visual(parity.normalise(torch.from_numpy(pixels), mean, std))
    found = answer(build(run, embedding=True), pixels, "embedding")
    np.testing.assert_allclose(found, torch.nn.functional.normalize(want, dim=-1).numpy(), atol=1e-5, rtol=0)


def test_a_tower_without_projection_is_written() -> None:
    """SigLIP's in open_clip: `timm_proj` is "none", and what is pooled is the embedding."""
    found = tower("attention_pool")
    found.visual.head = torch.nn.Sequential()
    own = backbone.Backbone(visual=found.visual, config={**found.config, "embed_dim": 64}, source="", image_size=SIZE)
    run, pixels = run_of(own), noise(3)
    want = parity.torch_probabilities(run, pixels)
    for variant, limit in (("fp32", 1e-5), ("fp16", 2e-3), ("int8", 5e-2)):
        assert np.abs(answer(build(run, variant), pixels) - want).max() < limit


def test_quick_gelu_is_one_operation_once_loaded(tmp_path: Any) -> None:
    """As separate operations it would read and write the widest tensor of a block three times."""
    model = build(run_of(tower("quick_gelu")), "fp32")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    count = Counter(node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node)
    assert count["QuickGelu"] == 3
    assert count["Sigmoid"] == 1  # the probabilities


# Nodes of the toy towers' graphs by operation, written before other kinds of tower were taken.
PLAIN = {
    (TOY, "fp32"): 123,
    (TOY, "fp16"): 127,
    (TOY, "int8"): 132,
    (TOY_AVERAGE, "fp32"): 143,
    (TOY_AVERAGE, "fp16"): 145,
    (TOY_AVERAGE, "int8"): 155,
}


@pytest.mark.parametrize(("source", "variant"), PLAIN)
def test_a_plain_tower_pays_for_no_other_kind(source: str, variant: str) -> None:
    found = backbone.load(source)
    scramble(found.visual)
    nodes = list(all_nodes(build(run_of(found, unfreeze_blocks=2, classes=3), variant).graph))
    assert len(nodes) == PLAIN[source, variant]
    names = " ".join(node.name for node in nodes)
    assert "_norm" not in names.replace("fc_norm", "")
    assert "gate" not in names
