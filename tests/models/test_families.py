"""Every kind of tower that is taken: prefix and tail against timm's own forward, the stacked tail against one tail
after the other, in value and gradient; every kind that is not taken is refused with its reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import SwiGLU
from torch import nn

from cxr_fast.cluster.search import lean
from cxr_fast.models import backbone, stacked_tail
from cxr_fast.models.tail import Tail, attention_pool, class_token_block, count_trainable
from cxr_fast.training.run_folder import in_tower
from tests.helpers.towers import KINDS, MAPPED, TOKEN, scramble, source, tower
from tests.helpers.weights import refused


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor | None, want: torch.Tensor | None) -> None:
    """Equal in float64, in which what softmax does not see has a gradient of 1e-16 on both sides."""
    assert found is not None
    assert want is not None
    assert found.dtype == want.dtype == torch.float64
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-11)


def with_projection(kind: str, projection: bool) -> Any:
    visual = tower(kind).visual
    if not projection:
        visual.head = nn.Sequential()  # as open_clip leaves it with timm_proj "none"
    return visual


@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_prefix_and_tail_are_the_whole_tower_in_value_and_gradient(kind: str, projection: bool) -> None:
    visual = with_projection(kind, projection)
    depth, x, direction = len(visual.trunk.blocks), drawn(3, 3, 40, 40), drawn(3, 512 if projection else 64, seed=1)
    with torch.inference_mode():
        want = F.normalize(visual(x), dim=-1)
        for k in range(depth + 1):
            tail = Tail(visual, unfreeze_blocks=k, classes=2).eval()
            found = tail.embedding(backbone.prefix(visual, x, k))
            torch.testing.assert_close(found, want, rtol=0, atol=2e-6)
    assert float((want[0] - want[1]).abs().max()) > 1e-2, "two images look alike: the comparison shows little"
    visual, x, direction = visual.double(), x.double(), direction.double()
    for k in range(1, depth + 1):
        tail = Tail(visual, unfreeze_blocks=k, classes=2, train_norm=True).eval()
        fast = tail.pooled(backbone.prefix(visual, x, k))
        whole = copy.deepcopy(visual)
        blocks = whole.trunk.blocks[depth - k :]
        for module in (blocks, whole.trunk.norm, whole.trunk.attn_pool, whole.trunk.fc_norm, whole.head):
            if module is not None:
                module.requires_grad_(True)
        slow = whole(x)
        close(fast, slow)
        (fast * direction).sum().backward()
        (slow * direction).sum().backward()
        own = dict(whole.named_parameters())
        tensors = {name: p for name, p in tail.named_parameters() if not name.startswith("head.")}
        names = in_tower({name: name for name in tensors}, k, dict.fromkeys(own))
        assert len(names) == len(tensors) == sum(p.requires_grad for p in own.values())
        for place, name in names.items():
            close(tensors[name].grad, own[place].grad)


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_the_blocks_is_frozen_unless_asked(kind: str) -> None:
    visual = tower(kind).visual
    frozen, trained = (Tail(visual, unfreeze_blocks=1, classes=2, train_norm=asked) for asked in (False, True))
    assert {name.split(".")[0] for name, p in frozen.named_parameters() if p.requires_grad} == {"blocks", "head"}
    after = [visual.trunk.norm, visual.trunk.attn_pool, visual.trunk.fc_norm, visual.head]
    count = sum(p.numel() for module in after if module is not None for p in module.parameters())
    assert count_trainable(trained)["norm"] == count
    alone = Tail(visual, unfreeze_blocks=0, classes=2, train_norm=True)
    assert {name.split(".")[0] for name, _ in alone.named_parameters()} == {"head"}


@pytest.mark.parametrize("kind", TOKEN)
def test_the_last_block_answers_for_the_class_token_alone(kind: str) -> None:
    block = tower(kind).visual.trunk.blocks[-1]
    x = drawn(2, 29, 64)
    torch.testing.assert_close(class_token_block(block, x), block(x)[:, :1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 7, 200])
@pytest.mark.parametrize("kind", MAPPED)
def test_attention_pooling_with_one_query_is_timms(kind: str, tokens: int) -> None:
    pool = tower(kind).visual.trunk.attn_pool
    x = drawn(3, tokens, 64)
    torch.testing.assert_close(attention_pool(pool, x), pool(x), rtol=1e-5, atol=1e-5)


def test_the_frozen_pooling_is_in_the_embedding_cut() -> None:
    """A cache of `--train-blocks 0` holds what the pooling and the projection give."""
    found = tower("attention_pool")
    x = drawn(2, 3, 40, 40)
    trunk = found.visual.trunk
    want = found.visual.head(trunk.attn_pool(trunk.forward_features(x)))
    torch.testing.assert_close(backbone.prefix(found.visual, x, 0), want, rtol=0, atol=1e-6)
    before, names = backbone.prefix_sha256(found.visual, 0), backbone.prefix_names(found.visual, 1)
    assert not any(name.startswith("trunk.attn_pool") for name in names)
    with torch.no_grad():
        trunk.attn_pool.latent.add_(1)
    assert backbone.prefix_sha256(found.visual, 0) != before


@pytest.mark.parametrize("kind", ["registers", "quick_gelu", "attention_pool_over_registers", "normed_heads_no_bias"])
@torch.inference_mode()
def test_the_prefix_hash_changes_with_exactly_the_weights_that_change_the_activations(kind: str) -> None:
    visual, x = tower(kind).visual, drawn(1, 3, 40, 40)
    rows = {k: backbone.prefix(visual, x, k) for k in (0, 1, 3)}
    hashes = {k: backbone.prefix_sha256(visual, k) for k in rows}
    for name, tensor in visual.state_dict().items():
        if name.endswith("k_norm.bias"):
            continue  # moves every score alike
        kept = tensor.clone()
        tensor += drawn(*tensor.shape, seed=1)
        for k, before in rows.items():
            moved = not torch.equal(backbone.prefix(visual, x, k), before)
            assert (backbone.prefix_sha256(visual, k) != hashes[k]) == moved, (name, k)
        tensor.copy_(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_cluster_sends_of_a_tower_makes_the_same_tail(kind: str) -> None:
    found = tower(kind)
    rows = backbone.prefix(found.visual, drawn(2, 3, 40, 40), 1)
    whole, part = (Tail(each.visual, unfreeze_blocks=1, classes=2).eval() for each in (found, lean(found, 1)))
    assert torch.equal(whole.embedding(rows), part.embedding(rows))


# ------------------------------------------------------------------------------------------------ folds together


def stacked(tails: list[Tail]) -> dict[str, torch.Tensor]:
    """What is trained of several tails, as leaves (K, ...)."""
    names = [name for name, p in tails[0].named_parameters() if p.requires_grad and not name.startswith("head.")]
    each = [dict(tail.named_parameters()) for tail in tails]
    return {name: torch.stack([own[name].detach() for own in each]).requires_grad_() for name in names}


@pytest.mark.parametrize("train_norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_folds_together_are_one_tail_after_the_other(kind: str, train_norm: bool) -> None:
    visual = tower(kind).visual.double()
    for k in (1, 2):
        tails = [Tail(visual, unfreeze_blocks=k, classes=2, train_norm=train_norm).eval() for _ in range(3)]
        for i, tail in enumerate(tails):
            scramble(tail.blocks, 10 + i)
            if train_norm:
                for module in (tail.norm, tail.attn_pool, tail.fc_norm, tail.projection):
                    scramble(module, 20 + i)
        x, direction = drawn(3, 4, 28, 64).double(), drawn(3, 4, 512, seed=2).double()
        leaves = stacked(tails)
        found = stacked_tail.embedding(tails[0], leaves, x)
        want = torch.stack([tail.pooled(rows) for tail, rows in zip(tails, x, strict=True)])
        close(found, want)
        grads = dict(zip(leaves, torch.autograd.grad((found * direction).sum(), list(leaves.values())), strict=True))
        (want * direction).sum().backward()
        for name, grad in grads.items():
            own = torch.stack([g for tail in tails if (g := tail.get_parameter(name).grad) is not None])
            assert grad.is_contiguous(), f"{name}: fused AdamW goes by memory"
            close(grad, own)


# --------------------------------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("test_vit4", "norm of class RmsNorm"),
        ("test_resnet", "the class"),
        ("eva02_tiny_patch14_224", "rotary positions"),
        ("vit_pwee_patch16_reg1_gap_256", "blocks of class ParallelScalingBlock"),
        ("vit_dwee_patch16_reg1_gap_256", "attention of class DiffAttention"),
        ("deit_tiny_distilled_patch16_224", "the class VisionTransformerDistilled"),
    ],
)
def test_what_is_not_reproduced_is_refused_with_the_reason(arch: str, reason: str) -> None:
    assert reason in refused(f"random:0:{arch}")


def test_every_other_part_that_is_not_reproduced_is_named() -> None:
    from cxr_fast.errors import InputError
    from cxr_fast.models.supported import require_plain_vit

    changes: dict[str, Any] = {
        "an MLP of class SwiGLU": lambda v: setattr(v.trunk.blocks[1], "mlp", SwiGLU(64)),
        "norms inside attention": lambda v: setattr(v.trunk.blocks[1].attn, "norm", nn.LayerNorm(64)),
        "gated attention": lambda v: setattr(v.trunk.blocks[1].attn, "gate", nn.Linear(64, 64)),
        "the activation SiLU": lambda v: setattr(v.trunk.blocks[1].mlp, "act", nn.SiLU()),
        "normed queries": lambda v: setattr(v.trunk.blocks[1].attn, "q_norm", nn.LayerNorm(16)),
        "stochastic depth": lambda v: setattr(v.trunk.blocks[1], "drop_path1", nn.Dropout()),
        "max pooling": lambda v: setattr(v.trunk, "global_pool", "max"),
        "no pooling": lambda v: setattr(v.trunk, "global_pool", ""),
        "a classifier": lambda v: setattr(v.trunk, "head", nn.Linear(64, 3)),
        "patches dropped": lambda v: setattr(v.trunk, "patch_drop", nn.Dropout()),
        "without weight or bias": lambda v: setattr(v.trunk, "norm", nn.LayerNorm(64, bias=False)),
        "not one matrix (mlp)": lambda v: setattr(v, "head", nn.Sequential()) or v.head.add_module("mlp", nn.ReLU()),
        "pooling of class": lambda v: setattr(v.trunk, "global_pool", "map"),
    }
    require_plain_vit(tower("plain").visual, "x")
    for reason, change in changes.items():
        visual = tower("plain").visual
        change(visual)
        with pytest.raises(InputError) as caught:
            require_plain_vit(visual, "x")
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)
    for reason, change in {
        "several queries": lambda p: setattr(p, "latent_len", 2),
        "normed keys": lambda p: setattr(p, "k_norm", nn.LayerNorm(16)),
        "pooling norm of class": lambda p: setattr(p, "norm", nn.BatchNorm1d(64)),
    }.items():
        visual = tower("attention_pool").visual
        change(visual.trunk.attn_pool)
        with pytest.raises(InputError, match=reason):
            require_plain_vit(visual, "x")


@pytest.mark.parametrize(
    "arch",
    [
        "vit_base_patch16_siglip_224",
        "vit_so400m_patch16_siglip_256",
        "vit_base_patch16_clip_quickgelu_224",
        "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
        "eva_large_patch14_196",
        "deit3_small_patch16_224",
        "test_vit3",
    ],
)
def test_registered_names_of_known_encoders_are_taken(arch: str) -> None:
    vision = {"timm_model_name": arch, "image_size": None, "timm_pool": "", "timm_proj": "linear"}
    import timm

    with torch.device("meta"):
        vision["image_size"] = timm.create_model(arch).patch_embed.img_size[0]
    backbone.build_visual({"embed_dim": 512, "vision_cfg": vision}, device="meta")


def test_a_random_tower_with_layer_scale_lets_its_blocks_count() -> None:
    """At timm's 1e-5 the class token of every image is the same."""
    visual = backbone.load(source("registers")).visual
    x = drawn(2, 3, 40, 40)
    found = F.normalize(visual(x), dim=-1)
    assert float((found[0] - found[1]).abs().max()) > 1e-4
