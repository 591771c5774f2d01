"""float32 layers by oneDNN are torch's own, and are taken where they are said to be and nowhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cxr_fast.activations.encoder import Encoder
from cxr_fast.activations.loader import Activations
from cxr_fast.config import CacheSpec, TrainSpec
from cxr_fast.models import onednn
from cxr_fast.models.backbone import Backbone, load
from cxr_fast.training.folds.fold import Fold
from tests.helpers.toys import build

CPU = torch.device("cpu")
HAS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
pytestmark = pytest.mark.skipif(not HAS, reason="this torch has no oneDNN")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN on whatever CPU this is; the shapes of the weights it was given."""
    shapes: list[tuple[int, ...]] = []
    product = onednn.product

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        shapes.append(tuple(weight.shape))
        return product(x, weight, bias)

    monkeypatch.setattr(onednn, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(onednn, "product", counted)
    return shapes


@pytest.fixture(scope="module")
def tower() -> Backbone:
    """192 wide, so that its layers are large enough, and two blocks deep."""
    backbone = load("random:0:vit_tiny_patch16_224")
    backbone.visual.trunk.blocks = backbone.visual.trunk.blocks[-2:]
    return backbone


@settings(max_examples=40, deadline=None)
@given(
    lead=st.sampled_from([(64,), (2, 40), (3, 5, 7), (1, 64)]),
    inside=st.sampled_from([192, 256, 300]),
    outside=st.sampled_from([384, 513]),
    bias=st.booleans(),
    strided=st.booleans(),
    frozen=st.sampled_from(["", "x", "weight"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_layer_and_its_gradients_are_torchs(
    lead: tuple[int, ...], inside: int, outside: int, bias: bool, strided: bool, frozen: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, weight, shift = draw(*lead, inside), draw(outside, inside), draw(outside) if bias else None
    x = x.transpose(0, -1).contiguous().transpose(0, -1) if strided else x
    toward, found = draw(*lead, outside), []
    for context in (onednn.OneDnn(), torch.enable_grad()):
        parts = {"x": x.clone(memory_format=torch.preserve_format), "weight": weight.clone()}
        parts |= {"bias": shift.clone()} if shift is not None else {}
        leaves = [t.requires_grad_() for name, t in parts.items() if name != frozen]
        with context:
            y = F.linear(parts["x"], parts["weight"], parts.get("bias"))
            assert ("Linear" in type(y.grad_fn).__name__) == isinstance(context, onednn.OneDnn)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, toward)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape
        assert ours.is_contiguous()  # fused AdamW goes by memory alone
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    "layer",
    [
        (torch.zeros(63, 256), torch.zeros(256, 256)),
        (torch.zeros(64, 255), torch.zeros(256, 255)),
        (torch.zeros(0, 256), torch.zeros(256, 256)),
        (torch.zeros(64, 256).bfloat16(), torch.zeros(256, 256).bfloat16()),
        (torch.zeros(64, 256, device="meta"), torch.zeros(256, 256, device="meta")),
    ],
    ids=["few rows", "small weight", "no row", "bfloat16", "elsewhere"],
)
def test_other_layers_are_left_to_torch(layer: tuple[torch.Tensor, torch.Tensor], taken: list[tuple[int, ...]]) -> None:
    with onednn.float32(CPU):
        assert F.linear(*layer).shape == (len(layer[0]), 256)
        F.linear(torch.zeros(64, 256), torch.zeros(256, 256))
        nn.Linear(256, 256)(torch.zeros(64, 256))
    F.linear(torch.zeros(64, 256), torch.zeros(256, 256))
    assert taken == [(256, 256)] * 2, "those of the context alone"


def test_training_is_that_without(
    taken: list[tuple[int, ...]], tower: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    array, rows = rng.standard_normal((24, 1, 197, 192)).astype(np.float32), np.arange(24)
    labels = rng.integers(0, 2, (24, 3)).astype(np.int8)
    folds = [
        build(
            *(Fold, tower.visual, Activations(array, CPU)),
            labels=labels,
            train_rows=rows[:16],
            valid_rows=rows[16:],
            spec=TrainSpec(precision="float32", batch_size=8, dropout=0.0),
            unfreeze_blocks=2,
            seed=0,
        )
        for _ in range(2)
    ]
    ours = folds[0].run_epoch()
    assert {(576, 192), (768, 192), (192, 768)} <= set(taken)
    monkeypatch.setattr(onednn, "onednn_is_faster", lambda: False)
    taken.clear()
    theirs = folds[1].run_epoch()
    assert not taken
    assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-5)
    assert ours.valid_loss == pytest.approx(theirs.valid_loss, rel=1e-4)


def test_a_cached_row_is_torchs_and_does_not_hang_on_its_neighbours(
    taken: list[tuple[int, ...]], tower: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 224, 224)).astype(np.uint8)
    encoder = Encoder(tower, CacheSpec(unfreeze_blocks=1, dtype="float32"), CPU, block=4)
    together = encoder(pixels)
    assert taken
    for place in range(4):
        alone = np.zeros_like(pixels)
        alone[place] = pixels[place]
        assert np.array_equal(encoder(alone)[place], together[place])
    monkeypatch.setattr(onednn, "onednn_is_faster", lambda: False)
    np.testing.assert_allclose(encoder(pixels), together, rtol=0, atol=1e-5 * float(np.abs(together).max()))


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "expected"),
    [
        ("AuthenticAMD", "26", "fma avx512f", True),
        ("AuthenticAMD", "25", "fma avx512f", False),
        ("AuthenticAMD", "26", "fma avx2", False),
        ("GenuineIntel", "26", "fma avx512f", False),
        (None, None, None, False),
    ],
)
def test_which_cpus(tmp_path: Path, vendor: str | None, family: str | None, flags: str | None, expected: bool) -> None:
    if vendor:
        (tmp_path / "proc").mkdir()
        text = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: {flags}\n\n"
        (tmp_path / "proc" / "cpuinfo").write_text(text)
    assert onednn.onednn_is_faster(tmp_path) is expected


def test_a_gpu_keeps_its_own() -> None:
    assert not isinstance(onednn.float32(torch.device("cuda")), onednn.OneDnn)
