"""Another calibration in a graph, byte by byte: its answers are those of the formula, and no weight changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from cxr_fast.export.entries.settings import ExportSpec
from cxr_fast.export.nodes import all_nodes
from cxr_fast.export.variants import export_run
from cxr_fast.external.graph_edit import recalibrate_graph, varint_bytes
from cxr_fast.inference.predictor import golden_pixels
from cxr_fast.metrics import calibration
from tests.helpers.model_edits import weights

OUTPUTS = ["logits", "raw_probabilities", "probabilities"]


def map_of(kind: str, classes: int, seed: int = 0) -> dict[str, Any]:
    """A calibration drawn at random."""
    random = np.random.default_rng(seed)
    if kind == "platt":
        a, b = random.uniform(0.3, 3, classes).tolist(), random.normal(0, 1, classes).tolist()
        return {"kind": "platt", "fitted": classes, "a": a, "b": b}
    x = [np.sort(random.random(2 + c % 4)).astype(np.float32).tolist() for c in range(classes)]
    y = [np.sort(random.random(len(each))).tolist() for each in x]
    return {"kind": "isotonic", "fitted": classes, "x": x, "y": y}


@pytest.fixture(scope="module")
def exported(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of one run: as it is, calibrated, and in int8 with and without a calibration."""
    folder, found = tmp_path_factory.mktemp("exported"), {}
    for name, variant, kind in (
        *(("fp32", "fp32", "none"), ("fp32-isotonic", "fp32", "isotonic")),
        *(("int8", "int8", "none"), ("int8-platt", "int8", "platt")),
    ):
        spec = ExportSpec(out=folder / f"{name}.onnx", variants=(variant,), calibration=kind, count=8, allow_drift=True)
        found[name] = export_run(toy_run, spec)[0].path
    ensemble = ExportSpec(out=folder / "ensemble.onnx", final="ensemble", count=8)
    return {**found, "ensemble": export_run(toy_run, ensemble)[0].path}


def answers(serialised: bytes, pixels: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(serialised, providers=["CPUExecutionProvider"])
    return session.run(OUTPUTS, {"pixels": pixels})


@pytest.mark.parametrize("name", ["fp32", "fp32-isotonic", "int8", "int8-platt", "ensemble"])
def test_probabilities_are_the_raw_ones_through_the_calibration(exported: dict[str, Path], name: str) -> None:
    data = exported[name].read_bytes()
    before = onnx.load(exported[name])
    size = before.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    pixels = np.concatenate([golden_pixels(size), golden_pixels(size)[:, ::-1]])
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    calibrated = "raw_probabilities" in [output.name for output in session.get_outputs()]
    raw = session.run(["raw_probabilities" if calibrated else "probabilities"], {"pixels": pixels})[0]
    (logits,) = session.run(["logits"], {"pixels": pixels})
    for seed, kind in enumerate(("platt", "isotonic", "platt")):  # again and again, on the last result
        fitted = map_of(kind, raw.shape[1], seed)
        data, added = recalibrate_graph(data, fitted)
        found = answers(data, pixels)
        np.testing.assert_array_equal(found[0], logits)
        np.testing.assert_array_equal(found[1], raw)
        np.testing.assert_allclose(found[2], calibration.apply(fitted, raw), atol=2e-6)
        after = onnx.load_from_string(data)
        onnx.checker.check_model(after, full_check=False)
        assert [output.name for output in after.graph.output].count("probabilities") == 1
        counts = [Counter(node.op_type for node in all_nodes(each.graph)) for each in (before, after)]
        counts[0].update(added)
        assert +counts[0] == +counts[1]
        own = {k: v for k, v in weights(before).items() if not k.startswith(("platt.", "isotonic.", "recalibrated."))}
        kept = weights(after)
        assert all(kept[k].SerializeToString() == v.SerializeToString() for k, v in own.items())
        assert all(k in own or k.startswith("recalibrated.") for k in kept)
        before = after


def test_numbers_as_bytes() -> None:
    assert varint_bytes(0) == b"\0"
    assert varint_bytes(300) == b"\xac\x02"
