"""Toy data and models shared by the tests: a 64-wide ViT, small phantoms, no network."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings

# On a busy machine an example takes any time: no deadline for one is a test of what the code does.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
# Nothing in the suite may reach a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor the maker of ONNX Runtime, which some tests import before cxr_fast.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

WEIGHTS = "open_clip_model.safetensors"
TOY = "random:0:test_vit"  # 6 blocks, width 64, 160 x 160 pixels, class token
TOY_AVERAGE = "random:0:test_vit2"  # 8 blocks, no class token, one register, average pooling, layer scale


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """One torch thread for every test and its fixtures, whatever a command before it left: toy tensors gain nothing
    from a second one, and two that wait for each other by spinning took ten times the CPU in tests/models."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real radiographs and labels, or a skip that says how to get the test to run."""
    folder = os.environ.get("CXR_FAST_REAL_DATA")
    if not folder:
        pytest.skip("set CXR_FAST_REAL_DATA to a folder of real radiographs to run this")
    return Path(folder)


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports make their figures and do not draw them: drawing takes half of a toy sweep, and tests/report draws."""
    from PIL import Image

    from cxr_fast.report import charts

    empty = io.BytesIO()
    Image.new("L", (160, 160)).save(empty, "png")
    monkeypatch.setattr(charts, "render", lambda _: dict.fromkeys(charts.FORMATS, empty.getvalue()))


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 studies of 64 x 64 phantoms in the Indiana layout; read it, do not write into it."""
    from cxr_fast.data.phantom.dataset import write_dataset

    out = tmp_path_factory.mktemp("phantoms") / "data"
    write_dataset(out, studies=40, size=64, seed=1)
    return out


@pytest.fixture(scope="session")
def toy_data(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantoms with one image cut short, `broken` in name order the fourth; read it, do not write into it."""
    out = tmp_path_factory.mktemp("toy") / "data"
    shutil.copytree(phantoms, out)
    broken = sorted((out / "images").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:700])
    return out


@pytest.fixture(scope="session")
def lively_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 64-wide ViT as a folder for `--weights`, see `_lively`; do not write into it."""
    return _lively(tmp_path_factory.mktemp("toy") / "weights", TOY)


def _lively(out: Path, source: str) -> Path:
    """An architecture with weights under which every part counts, as a folder of the hub's layout.

    As initialised, biases are zero, norms one, and two images come out equal to 1e-5: no test of a number can fail.
    """
    import torch
    from safetensors.torch import save_file

    from cxr_fast.models import backbone

    tower, draw = backbone.load(source), torch.Generator().manual_seed(5)
    tensors = {}
    for name, old in tower.visual.state_dict().items():
        noise = torch.randn(old.shape, generator=draw)
        if old.ndim == 1:
            tensors[name] = 0.3 * noise + (1.0 if name.endswith(("weight", "gamma")) else 0.0)
        else:
            inputs = old[0].numel() if old.ndim in (2, 4) else 1
            tensors[name] = noise * (1.5 * inputs**-0.5)
    out.mkdir()
    save_file({f"visual.{name}": tensor.contiguous() for name, tensor in tensors.items()}, out / WEIGHTS)
    statistics = {"mean": [0.4, 0.45, 0.5], "std": [0.2, 0.25, 0.3]}
    model = {"embed_dim": tower.config["embed_dim"], "vision_cfg": tower.config["vision_cfg"]}
    (out / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": statistics}))
    return out


@pytest.fixture(scope="session")
def toy_cache(toy_data: Path, lively_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`toy_data` through the 64-wide ViT: one failed row, and one label in eight unknown; do not write into it."""
    return _cache(toy_data, tmp_path_factory.mktemp("toy") / "toy.h5", str(lively_weights))


@pytest.fixture(scope="session")
def toy_cache_average(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `toy_cache`, through the ViT that pools by averaging; do not write into it."""
    folder = tmp_path_factory.mktemp("toy")
    return _cache(toy_data, folder / "average.h5", str(_lively(folder / "weights", TOY_AVERAGE)))


def _cache(data: Path, out: Path, weights: str) -> Path:
    import numpy as np
    import torch

    from cxr_fast.activations import build
    from cxr_fast.activations.encoder import with_size
    from cxr_fast.activations.job import CacheJob
    from cxr_fast.config import CacheSpec
    from cxr_fast.data.manifest import read_dataset
    from cxr_fast.models import backbone

    # Two threads that wait for each other by spinning are thirty times slower on a busy machine.
    torch.set_num_threads(1)
    manifest, tower = read_dataset(data), backbone.load(weights)
    labels = manifest.labels.copy()
    labels[np.random.default_rng(0).random(labels.shape) < 1 / 8] = -1
    spec = with_size(CacheSpec(weights=weights), tower)
    build.run(
        CacheJob(manifest=replace(manifest, labels=labels), backbone=tower, spec=spec, out=out, device="cpu", workers=1)
    )
    return out


@pytest.fixture(scope="session")
def toy_run(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on `toy_cache`: 3 folds, budgets 4, 5 and 6; do not write into it."""
    return _run(toy_cache, tmp_path_factory.mktemp("toy") / "run")


@pytest.fixture(scope="session")
def toy_run_average(toy_cache_average: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `toy_run`, on `toy_cache_average`; do not write into it."""
    return _run(toy_cache_average, tmp_path_factory.mktemp("toy") / "run")


def _run(cache: Path, out: Path) -> Path:
    from cxr_fast.config import SweepOptions, SweepSpec, TrainSpec
    from cxr_fast.training.sweep import SweepJob

    spec = SweepSpec(epochs=(4, 5, 6), folds=3, train=TrainSpec(lr=1e-3, batch_size=4))
    SweepJob(cache, out, spec, SweepOptions(device="cpu")).run()
    return out


@pytest.fixture(scope="session")
def toy_model(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`toy_run` as an ONNX file; do not write into it."""
    from cxr_fast.export.entries.settings import ExportSpec
    from cxr_fast.export.variants import export_run

    return export_run(toy_run, ExportSpec(out=tmp_path_factory.mktemp("toy") / "toy.onnx"))[0].path
