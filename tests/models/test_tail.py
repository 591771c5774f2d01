"""The trainable part: exact class-token block, counted parameters, and draws from generators of its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import Block
from torch import nn

from cxr_fast.config import OPENAI_MEAN, OPENAI_STD
from cxr_fast.models import backbone
from cxr_fast.models.tail import (
    Dropout,
    Head,
    Tail,
    class_token_block,
    count_trainable,
    head_parameters,
)
from tests.conftest import TOY, TOY_AVERAGE


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Toy tensors gain nothing from a second thread, and lose a lot to it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def full_size() -> Any:
    """BiomedCLIP's ViT-B/16 without memory for its weights."""
    vision = {"timm_model_name": "vit_base_patch16_224", "timm_pool": "", "timm_proj": "linear"}
    config = {"embed_dim": 512, "vision_cfg": vision, "mean": OPENAI_MEAN, "std": OPENAI_STD}
    return backbone.build_visual(config, device="meta")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scrambled(module: nn.Module, seed: int) -> nn.Module:
    """Every weight and bias random, so that a forgotten term shows."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(seed)) / math.sqrt(p.shape[-1]))
    return module


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 4),
    width=st.sampled_from([4, 8, 16]),
    tokens=st.integers(1, 40),
    batch=st.integers(1, 5),
    qkv_bias=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 2**31),
)
def test_the_class_token_block_equals_the_whole_block_s_first_token(
    heads: int, width: int, tokens: int, batch: int, qkv_bias: bool, scale: float | None, seed: int
) -> None:
    block = Block(heads * width, heads, qkv_bias=qkv_bias, init_values=scale)
    scrambled(block, seed).eval()
    x = torch.randn(batch, tokens, heads * width, generator=generator(seed + 1), requires_grad=True)
    fast, slow = class_token_block(block, x), block(x)[:, :1]
    assert fast.shape == (batch, 1, heads * width)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    wanted = [x, *block.parameters()]
    given_by = torch.autograd.grad(fast.square().sum(), wanted)
    for a, b in zip(given_by, torch.autograd.grad(slow.square().sum(), wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_class_token_block_equals_the_whole_block_at_full_width() -> None:
    block = scrambled(Block(768, 12, qkv_bias=True), 0).eval()
    x = torch.randn(2, 197, 768, generator=generator(1))
    with torch.inference_mode():
        torch.testing.assert_close(class_token_block(block, x), block(x)[:, :1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", [TOY, TOY_AVERAGE])
def test_the_embedding_equals_the_tower_s_in_value_and_gradient(source: str) -> None:
    loaded = backbone.load(source)
    scrambled(loaded.visual, 4)
    x = torch.randn(3, 3, 160, 160, generator=generator(0))
    direction = torch.randn(3, 512, generator=generator(1))
    for k in (0, 1, 3, loaded.depth):
        tail = Tail(loaded.visual, unfreeze_blocks=k, classes=2).eval()
        with torch.no_grad():
            rows = backbone.prefix(loaded.visual, x, k)
        fast = tail.embedding(rows)
        tower = copy.deepcopy(loaded.visual)
        blocks = tower.trunk.blocks[loaded.depth - k :].requires_grad_(True)
        slow = F.normalize(tower(x), dim=-1)
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)
        torch.testing.assert_close(fast.norm(dim=1), torch.ones(3))
        if k:
            (fast * direction).sum().backward()
            (slow * direction).sum().backward()
            for a, b in zip(tail.blocks.parameters(), blocks.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


def test_average_pooling_leaves_out_the_prefix_tokens() -> None:
    loaded = backbone.load(TOY_AVERAGE)
    tail = Tail(loaded.visual, unfreeze_blocks=1, classes=2).eval()
    assert (tail.pool, tail.prefix_tokens) == ("avg", 1)
    rows = torch.randn(2, 101, 64, generator=generator(0))
    with torch.inference_mode():
        tokens = tail.norm(tail.blocks[0](rows))[:, 1:]
        want = F.normalize(tail.projection(tail.fc_norm(tokens.mean(dim=1))), dim=-1)
        torch.testing.assert_close(tail.embedding(rows), want, rtol=0, atol=1e-6)


# What is trained.


@pytest.mark.parametrize(
    ("blocks", "classes", "total"), [(2, 35, 14_580_259), (0, 35, 404_515), (1, 35, 7_492_387), (12, 35, 85_458_979)]
)
def test_trainable_parameters_of_the_published_model(full_size: Any, blocks: int, classes: int, total: int) -> None:
    tail = Tail(full_size, unfreeze_blocks=blocks, classes=classes)
    counted = count_trainable(tail)
    assert counted == {"blocks": 7_087_872 * blocks, "head": 404_515, "total": total}
    assert sum(p.numel() for p in tail.trainable()) == total
    assert head_parameters(512, 35) == 404_515


@settings(max_examples=20, deadline=None)
@given(embed=st.integers(1, 64), classes=st.integers(1, 50))
def test_the_head_s_count_is_a_formula(embed: int, classes: int) -> None:
    assert head_parameters(embed, classes) == sum(p.numel() for p in Head(embed, classes, dropout=0.1).parameters())


def test_a_frozen_block_or_head_fails_the_count() -> None:
    visual = backbone.load(TOY).visual
    for part, message in (("blocks", "a block is frozen"), ("head", "the head is not")):
        tail = Tail(visual, unfreeze_blocks=2, classes=3)
        next(getattr(tail, part).parameters()).requires_grad_(False)
        with pytest.raises(AssertionError, match=message):
            count_trainable(tail)


@pytest.mark.parametrize("train_norm", [False, True])
def test_norm_and_projection_are_frozen_unless_asked(train_norm: bool) -> None:
    tail = Tail(backbone.load(TOY).visual, unfreeze_blocks=2, classes=3, train_norm=train_norm)
    wanted = {name for name, p in tail.named_parameters() if p.requires_grad}
    others = {"norm.weight", "norm.bias", "projection.proj.weight"}
    assert {name.split(".")[0] for name in wanted - others} == {"blocks", "head"}
    assert wanted & others == (others if train_norm else set())


def test_the_tower_is_copied_not_shared() -> None:
    visual = backbone.load(TOY).visual
    before = backbone.tower_sha256(visual)
    tail = Tail(visual, unfreeze_blocks=2, classes=3)
    with torch.no_grad():
        for p in tail.parameters():
            p.add_(1.0)
    assert backbone.tower_sha256(visual) == before
    assert not any(p.requires_grad for p in visual.parameters())


def test_training_mode_reaches_blocks_and_head_but_not_the_projection() -> None:
    tail = Tail(backbone.load(TOY).visual, unfreeze_blocks=2, classes=3).train()
    assert tail.head.training
    assert tail.blocks.training
    assert not any(module.training for module in tail.projection.modules())
    tail.eval()
    assert not any(module.training for module in tail.modules())


# The head and its draws.


def test_reset_draws_the_head_from_its_generator_alone() -> None:
    torch.manual_seed(0)
    head = Head(64, 5, dropout=0.5)
    fresh = [m for m in head if isinstance(m, nn.BatchNorm1d)]
    head.set_masks(torch.ones(8, 768, dtype=torch.bool))
    head.train()(torch.randn(8, 64))
    assert fresh[0].running_mean is not None
    assert fresh[0].running_mean.abs().sum() > 0
    state = torch.get_rng_state()
    head.reset(generator(3))
    first = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    other = Head(64, 5, dropout=0.5)
    torch.manual_seed(1)
    other.reset(generator(3))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in first.items())
    torch.set_rng_state(state)
    head.reset(generator(3))
    assert torch.equal(torch.get_rng_state(), state)
    head.reset(generator(4))
    matrices = [name for name, tensor in first.items() if tensor.ndim == 2]
    assert len(matrices) == 3
    assert not any(torch.equal(first[name], head.state_dict()[name]) for name in matrices)
    assert fresh[0].running_mean.abs().sum() == 0
    assert fresh[0].running_var is not None
    assert torch.equal(fresh[0].running_var, torch.ones(512))
    assert int(fresh[0].num_batches_tracked or 0) == 0


def test_reset_has_the_distribution_of_torch_s_own_layers() -> None:
    head = Head(512, 35, dropout=0.5)
    head.reset(generator(0))
    for layer in head:
        if isinstance(layer, nn.Linear):
            own = nn.Linear(layer.in_features, layer.out_features)
            bound = 1 / math.sqrt(layer.in_features)
            for ours, theirs in ((layer.weight, own.weight), (layer.bias, own.bias)):
                assert ours.abs().max() <= bound
                assert theirs.abs().max() <= bound + 1e-7
                assert ours.abs().max() > 0.85 * bound
            assert float(layer.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_the_head_is_the_published_chain() -> None:
    kinds = [type(layer) for layer in Head(512, 35, dropout=0.5)]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, Dropout] * 2 + [nn.Linear]
    widths = [(m.in_features, m.out_features) for m in Head(512, 35, dropout=0.5) if isinstance(m, nn.Linear)]
    assert widths == [(512, 512), (512, 256), (256, 35)]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_what_its_mask_says_and_the_mean(p: float) -> None:
    layer, x = Dropout(p).train(), torch.randn(64, 40, generator=generator(0))
    layer.mask = torch.rand(64, 40, generator=generator(1)) >= p
    y = layer(x)
    assert torch.equal(y == 0, ~layer.mask)
    torch.testing.assert_close(y[layer.mask], x[layer.mask] / (1 - p))
    assert layer.eval()(x) is x
    with pytest.raises(AssertionError, match="set a mask"):
        Dropout(p).train()(x)
    assert Dropout(0).train()(x) is x


def test_the_head_gives_each_layer_its_part_of_the_masks() -> None:
    head = Head(64, 5, dropout=0.5)
    masks = torch.rand(8, 768, generator=generator(0)) >= 0.5
    head.set_masks(masks)
    first, second = (layer.mask for layer in head if isinstance(layer, Dropout))
    assert torch.equal(first, masks[:, :512])
    assert torch.equal(second, masks[:, 512:])
