"""The output of a model file against torch and the distance in NumPy, in each variant, cut and kind of pooling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from cxr_fast.export import parity
from cxr_fast.export.graph import VARIANTS, build
from cxr_fast.export.rotate import rotated
from cxr_fast.inference import model_file
from cxr_fast.training.run_folder import Run, read_run
from cxr_fast.unlikeness.nodes import OUTPUT
from cxr_fast.unlikeness.reference import LIMITS, furthest, measure_seen, watch_features

from ..helpers.unlike import noise, with_distance

CUTS = [("toy_run", 2), ("toy_run", 0), ("toy_run", 3), ("toy_run_average", 2)]


@pytest.fixture(scope="module", params=CUTS, ids=str)
def run(request: pytest.FixtureRequest) -> Run:
    """Cut at the trained blocks, after pooling, or before blocks that the run froze; and without class token."""
    name, unfrozen = request.param
    return with_distance(read_run(request.getfixturevalue(name)), unfrozen)


def answer(model: onnx.ModelProto, pixels: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    out: np.ndarray = session.run([OUTPUT], {"pixels": pixels})[0]
    return out


def torch_says(run: Run, pixels: np.ndarray) -> np.ndarray:
    both = run.info["train"].get("tta") == "flip"
    with watch_features(run.unlikeness, run.visual) as seen:
        parity.torch_probabilities(run, pixels)
    found = measure_seen(run.unlikeness, seen, both_views=both)
    assert found is not None
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("views", ["none", "flip"])
def test_every_variant_gives_what_torch_gives(run: Run, variant: str, views: str) -> None:
    run = replace(run, info=run.info | {"train": run.info["train"] | {"tta": views}})
    model = build(run, variant)
    onnx.checker.check_model(model, full_check=False)
    pixels = np.concatenate([noise(3), noise(2) // 4])
    found = answer(model, pixels)
    assert (found.dtype, found.shape) == (np.float32, (5,))
    want = torch_says(run, pixels)
    assert np.ptp(want) > 0.1, "all pictures look alike: the comparison shows little"
    assert furthest(found, want) <= {"fp32": 1e-4, "fp16": LIMITS["fp16"], "int8": 0.1}[variant]  # toy weights in int8
    np.testing.assert_allclose(answer(model, pixels[:1]), found[:1], rtol=1e-4)


def test_a_turned_tower_gives_the_same(run: Run) -> None:
    turned = rotated(run)
    assert (turned is run) == (not hasattr(turned.visual.trunk.norm, "back"))
    pixels = noise(3)
    assert furthest(answer(build(turned, "fp32"), pixels), torch_says(run, pixels)) < 1e-4


def test_the_mirrored_view_does_not_count(run: Run) -> None:
    both = replace(run, info=run.info | {"train": run.info["train"] | {"tta": "flip"}})
    pixels = noise(3)
    np.testing.assert_allclose(answer(build(both), pixels), answer(build(run), pixels), rtol=1e-4)


def test_without_a_distance_there_is_no_such_output(run: Run) -> None:
    model = build(replace(run, unlikeness=None))
    assert OUTPUT not in {value.name for value in model.graph.output}
    assert not [node.name for node in model.graph.node if node.name.startswith("unlike")]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("views", ["none", "flip"])
def test_its_operations_are_allowed(run: Run, variant: str, views: str, tmp_path: Path) -> None:
    run = replace(run, info=run.info | {"train": run.info["train"] | {"tta": views}})
    path = tmp_path / "m.onnx"
    path.write_bytes(build(run, variant).SerializeToString())
    model_file.check_operations(path)


def test_furthest_sees_a_number_that_is_none() -> None:
    assert furthest(np.array([1.1, 0.5]), np.array([1.0, 0.45])) == pytest.approx(0.1)
    assert furthest(np.array([4.2]), np.array([4.0])) == pytest.approx(0.05)
    assert np.isnan(furthest(np.array([np.nan]), np.array([1.0])))
