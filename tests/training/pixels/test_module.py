"""The module of a run equals its exported file and the slow path, and trains like any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from cxr_fast.metrics.calibration import logit
from cxr_fast.training.pixels.module import PixelModel
from cxr_fast.training.run_folder import read_run


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 160, 160), np.uint8)


def test_it_equals_the_onnx_file(toy_run: Path, toy_model: Path, pixels: np.ndarray) -> None:
    model = read_run(toy_run).module()
    session = onnxruntime.InferenceSession(toy_model, providers=["CPUExecutionProvider"])
    (wanted,) = session.run(["logits"], {"pixels": pixels})
    with torch.inference_mode():
        found = model(torch.from_numpy(pixels))
    assert found.shape == (3, len(model.classes)) == wanted.shape
    np.testing.assert_allclose(found.numpy(), wanted, atol=2e-5)


@pytest.mark.parametrize(("final", "tta"), [("ensemble", "none"), ("best-fold", "flip"), ("ensemble", "flip")])
def test_a_mean_equals_the_slow_path(final: str, tta: str, toy_run: Path, pixels: np.ndarray) -> None:
    run = read_run(toy_run, final, tta=tta)
    model = run.module()
    x = (torch.from_numpy(pixels)[:, None].float() / 255 - model.get_buffer("mean")) / model.get_buffer("std")
    wanted = logit(run.raw_probabilities(x).astype(np.float64))
    with torch.inference_mode():
        np.testing.assert_allclose(model(torch.from_numpy(pixels)).numpy(), wanted, atol=1e-4)


def test_it_trains_and_draws_its_own_dropout(toy_run: Path, pixels: np.ndarray) -> None:
    run = read_run(toy_run)
    model, x = run.module(), torch.from_numpy(pixels)
    assert not model.training
    assert torch.equal(model(x), model(x))
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(x), model(x))
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = [parameter.detach().clone() for parameter in model.heads.parameters()]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x), torch.ones(3, len(model.classes)))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.heads.parameters())
    assert any(parameter.grad is not None for parameter in model.towers.parameters())
    optimiser.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.heads.parameters(), strict=True))
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("heads.0.")}
    assert set(own) == {f"heads.0.{name}" for name in run.head.state_dict()}
    assert isinstance(model, PixelModel)
