"""Rates, averages, sampling and depth: each against a plain twin, in every trainer, and resumed to the bit."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.activations.forward import probabilities, run_blocks
from cxr_fast.activations.loader import Activations
from cxr_fast.config import TrainSpec
from cxr_fast.errors import InputError
from cxr_fast.metrics.figures import auc, macro
from cxr_fast.models.tail import Tail
from cxr_fast.training.folds.draws import draw, sampling_weights
from cxr_fast.training.folds.fold import Fold
from cxr_fast.training.folds.head_fold import HeadFold
from cxr_fast.training.folds.rates import average_decay, rate_groups
from cxr_fast.training.folds.stacked_folds import Stack, fit_together, run_epoch
from tests.conftest import TOY
from tests.helpers import toys
from tests.helpers.toys import keep, same
from tests.training.folds import test_stacked_folds as stacked

SPEC = stacked.SPEC
TWO_RATES = {"head_lr": 1e-3, "layer_decay": 0.5}


def change(**fields: Any) -> TrainSpec:
    return dataclasses.replace(SPEC, **fields)


def embeddings() -> Activations:
    """Embeddings of the toy tokens, float32, as a search makes them for --head-first."""
    tail = Tail(stacked.tower(), unfreeze_blocks=2, classes=1)
    return run_blocks(tail, stacked.activations(), 0, np.arange(stacked.IMAGES), views=2)


def make(spec: TrainSpec, **named: Any) -> list[Fold]:
    """Folds over the toy tokens, with embeddings where the spec asks for them."""
    folds = stacked.make(spec, **named)
    for fold in folds:
        fold.embeddings = shared()
        if fold.average is not None and named.get("still", True):  # as `stacked.make` holds those of the tail
            for i in (0, 4):
                fold.average.head[i].bias.zero_()
    return folds


_shared: list[Activations] = []


def shared() -> Activations:
    if not _shared:
        _shared.append(embeddings())
    return _shared[0]


# ------------------------------------------------------------------------------------------------ rates


def test_rates_are_the_head_s_and_fall_block_by_block() -> None:
    tail = make(change(lr=1e-4, **TWO_RATES))[0].tail
    base, groups = rate_groups(tail, change(lr=1e-4, **TWO_RATES))
    rate = {id(p): base * share for share, parameters in groups for p in parameters}
    for name, p in tail.named_parameters():
        if p.requires_grad:
            want = 1e-3 if name.startswith("head.") else 1e-4 if name.startswith("blocks.1.") else 0.5e-4
            assert rate[id(p)] == pytest.approx(want), name
    assert groups[0][0] == 1


def test_without_rates_of_its_own_there_is_one_group_in_the_old_order() -> None:
    tail = make(SPEC)[0].tail
    base, groups = rate_groups(tail, SPEC)
    assert base == SPEC.lr
    assert [(share, [id(p) for p in each]) for share, each in groups] == [(1.0, [id(p) for p in tail.trainable()])]


def test_a_step_with_two_rates_is_adamw_with_two_groups() -> None:
    fold, other = (make(change(**TWO_RATES))[0] for _ in range(2))
    rates = {
        name: 1e-3 if name.startswith("head.") else SPEC.lr * (1 if ".1." in name[:9] else 0.5)
        for name in other.named()
    }
    plain = torch.optim.AdamW(
        [{"params": [p], "lr": rates[name]} for name, p in other.named().items()], weight_decay=SPEC.weight_decay
    )
    drawn, again = fold.draw(), other.draw()
    a, b = drawn.steps[0]
    x = fold.activations.gather(drawn.rows[a:b], drawn.views[a:b])
    fold.tail.train()
    other.tail.train()
    fold.step(x, drawn.rows[a:b], drawn.masks[a:b])
    other.optimizer = plain
    other.step(x, again.rows[a:b], again.masks[a:b])
    for name, p in fold.named().items():
        torch.testing.assert_close(p, other.named()[name], rtol=1e-5, atol=1e-7)


def test_the_plateau_lowers_all_rates_alike() -> None:
    fold = make(change(**TWO_RATES, plateau_patience=0))[0]
    before = [group["lr"] for group in fold.optimizer.param_groups]
    fold.scheduler.step(0.9)
    fold.scheduler.step(0.1)
    fold._set_lr(fold.lr)
    after = [group["lr"] for group in fold.optimizer.param_groups]
    assert after == pytest.approx([rate / 2 for rate in before])
    assert fold.lr == pytest.approx(SPEC.lr / 2)


def test_a_head_alone_takes_the_heads_rate() -> None:
    fold = toys.make(HeadFold, dataclasses.replace(toys.SPEC, lr=1e-5, head_lr=1e-2))
    assert fold.lr == 1e-2
    other = toys.make(HeadFold, dataclasses.replace(toys.SPEC, lr=1e-2))
    for each in (fold, other):
        each.run_epoch()
    assert torch.equal(fold.flat, other.flat)


# ------------------------------------------------------------------------------------------------ running average


@given(st.floats(0, 0.9999), st.integers(1, 10**6))
def test_the_average_s_decay_rises_to_its_limit(most: float, step: int) -> None:
    assert average_decay(most, step) == min(most, (1 + step) / (10 + step))


def test_the_average_is_the_plain_loop_over_the_weights_after_each_step() -> None:
    fold = make(change(ema=0.9), still=False)[0]
    kept = {name: t.clone() for name, t in fold.tail.state_dict().items()}
    steps = 0
    for _ in range(2):
        drawn = fold.draw()
        fold.tail.train()
        for a, b in drawn.steps:
            x = fold.activations.gather(drawn.rows[a:b], drawn.views[a:b])
            fold.step(x, drawn.rows[a:b], drawn.masks[a:b])
            steps += 1
            decay = min(0.9, (1 + steps) / (10 + steps))
            now = fold.tail.state_dict()
            for name in fold._averaged:
                kept[name] = decay * kept[name] + (1 - decay) * now[name]
    assert fold.average is not None
    found = fold.average.state_dict()
    assert {"head.1.running_mean", "blocks.0.attn.qkv.weight"} <= set(fold._averaged)
    for name in fold._averaged:
        torch.testing.assert_close(found[name], kept[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(found["head.0.weight"], fold.tail.state_dict()["head.0.weight"])


def test_validation_and_snapshots_are_of_the_average() -> None:
    fold, plain = make(change(ema=0.9))[0], make(SPEC)[0]
    fold.run_epoch()
    plain.run_epoch()
    snapshot = fold.snapshot(1)
    assert fold.average is not None
    for name, tensor in snapshot.state.items():
        source = fold.average if name in fold._averaged else fold.tail
        assert torch.equal(tensor, source.state_dict()[name])
    want = probabilities(fold.average, fold.activations, fold.valid_rows)
    np.testing.assert_array_equal(snapshot.probabilities, want)
    assert fold.history[0].train_loss == plain.history[0].train_loss
    assert fold.history[0].valid_loss != plain.history[0].valid_loss
    for name, p in plain.named().items():
        assert torch.equal(p, fold.named()[name]), "averaging changed the training"


# ------------------------------------------------------------------------------------------------ sampling


@st.composite
def tables(draw: Any) -> np.ndarray:
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 40)), draw(st.integers(1, 6)))
    return random.choice([-1, 0, 1], size=shape, p=[0.1, 0.6, 0.3]).astype(np.int8)


@settings(max_examples=100, deadline=None)
@given(tables(), st.sampled_from(["balanced", "sqrt"]))
def test_films_are_weighted_by_their_rarest_finding(labels: np.ndarray, kind: Any) -> None:
    got = sampling_weights(labels, TrainSpec(sampling=kind))
    assert got is not None
    counts = [int((column == 1).sum()) for column in labels.T]
    groups = []
    for row in labels:
        own = [c for c, y in enumerate(row) if y == 1]
        groups.append(min(own, key=lambda c: (counts[c], c)) if own else -1)
    size = Counter(groups)
    want = np.array([1 / size[g] if kind == "balanced" else size[g] ** -0.5 for g in groups])
    np.testing.assert_allclose(got.numpy(), want / want.sum(), rtol=1e-12)
    if kind == "balanced":
        for g in size:
            share = sum(w for w, own in zip(got.tolist(), groups, strict=True) if own == g)
            assert share == pytest.approx(1 / len(size))


def test_an_epoch_draws_as_many_films_as_there_are_by_their_weights() -> None:
    labels = np.zeros((100, 2), np.int8)
    labels[:5, 0] = 1
    spec = TrainSpec(sampling="balanced", batch_size=16)
    weights, rows = sampling_weights(labels, spec), torch.arange(1000, 1100)
    generator = torch.Generator().manual_seed(0)
    seen = torch.cat([draw(generator, rows, spec, views=2, weights=weights).rows for _ in range(100)])
    assert len(seen) == 100 * 100
    assert set(seen.tolist()) <= set(range(1000, 1100))
    assert float((seen < 1005).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert sampling_weights(labels, TrainSpec()) is None


def test_without_sampling_the_draws_are_what_they_were() -> None:
    rows, spec = torch.arange(50), TrainSpec()
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    drawn = draw(one, rows, spec, views=2)
    assert torch.equal(drawn.rows, rows[torch.randperm(50, generator=other)])
    assert sorted(drawn.rows.tolist()) == rows.tolist()


# ------------------------------------------------------------------------------------------------ head first


def test_the_first_epochs_are_those_of_a_head_alone_on_the_embeddings() -> None:
    """To the bit: same head, same draws, same embeddings; the blocks stand still."""
    spec = change(head_first=2, head_lr=1e-3)
    first, alone = make(spec)[0], stacked.make(change(lr=1e-3), k=0, shared=shared())[0]
    before = {name: p.detach().clone() for name, p in first.named().items() if name.startswith("blocks.")}
    for _ in range(2):
        assert first.head_only
        ours, theirs = first.run_epoch(), alone.run_epoch()
        assert (ours.train_loss, ours.valid_auc) == (theirs.train_loss, theirs.valid_auc)
    for name, tensor in alone.tail.state_dict().items():
        assert torch.equal(first.tail.state_dict()[name], tensor)
    for name, p in before.items():
        assert torch.equal(first.named()[name], p)
        assert first.optimizer.state[first.named()[name]]["step"] == 0
    assert not first.head_only
    first.run_epoch()
    assert all(not torch.equal(first.named()[name], p) for name, p in before.items() if p.ndim >= 2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_snapshot_is_what_its_epoch_was_validated_on(precision: str) -> None:
    """Of the embeddings while the head trains alone, then of the tokens; a restored fold gives the same bits."""
    spec = change(head_first=1, head_lr=1e-3, precision=precision)
    fold = make(spec)[0]
    for inputs in (shared(), fold.activations):
        line = fold.run_epoch()
        found = fold.snapshot(line.epoch).probabilities
        np.testing.assert_array_equal(found, probabilities(fold.tail, inputs, stacked.VALID))
        assert line.valid_auc == macro(auc(stacked.labels()[stacked.VALID], found))[0]
        other = make(spec)[0]
        other.restore(*fold.state())
        np.testing.assert_array_equal(other.snapshot(line.epoch).probabilities, found)


def test_embeddings_are_the_tail_s_own() -> None:
    fold = make(SPEC)[0]
    fold.tail.eval()
    rows = torch.arange(stacked.IMAGES)
    for view in (0, 1):
        x = fold.activations.gather(rows, torch.full_like(rows, view))
        with torch.inference_mode():
            want = fold.tail.embedding(x)
            got = fold.tail.embedding(shared().gather(rows, torch.full_like(rows, view)))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", [TOY, stacked.TOY_AVERAGE])
def test_blocks_run_once_are_the_blocks_of_a_deeper_cut(source: str) -> None:
    visual, rows = stacked.tower(source), np.array([0, 3, 40])
    three = Tail(visual, unfreeze_blocks=3, classes=1)
    one = Tail(visual, unfreeze_blocks=1, classes=1)
    tokens = stacked.activations()
    behind = run_blocks(three, tokens, 1, rows, views=2)
    assert behind.array.shape == tokens.array.shape
    x = tokens.gather(torch.from_numpy(rows), torch.zeros(3, dtype=torch.long))
    with torch.inference_mode():
        want = three.eval().embedding(x)
        got = one.eval().embedding(behind.gather(torch.from_numpy(rows), torch.zeros(3, dtype=torch.long)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not np.asarray(behind.array)[[1, 2, 39]].any()


# ------------------------------------------------------------------------------------------------ all trainers


FIELDS: list[dict[str, Any]] = [
    {"loss": "asl"},
    {"loss": "asl", "asl_clip": 0.0, "asl_gamma_pos": 0.0},
    {"loss": "ldam", "ldam_margin": 2.0},
    {"loss": "bce", "label_smoothing": 0.2},
    {"loss": "focal", "label_smoothing": 0.1, "logit_adjustment": 1.0, "class_weights": "sqrt"},
    {"loss": "focal+jaccard", "logit_adjustment": 0.5},
    {"ema": 0.9},
    {"sampling": "balanced"},
    {"sampling": "sqrt", "loss": "ldam", "label_smoothing": 0.1, "ema": 0.99, "logit_adjustment": 1.0},
]
BLOCKS: list[dict[str, Any]] = [TWO_RATES, {"head_first": 1}, {"head_first": 1, "ema": 0.9, **TWO_RATES}]


def name(fields: Any) -> str:
    return ",".join(f"{key}={value}" for key, value in fields.items())


def averages(fold: Fold) -> dict[str, torch.Tensor]:
    assert fold.average is not None
    return {name: t for name, t in fold.average.state_dict().items() if name in fold._averaged}


def near(one: Fold, other: Fold, lr: float) -> None:
    theirs = averages(other)
    for name, tensor in averages(one).items():
        # Rounding alone moves biases before a batch norm, and those of keys.
        if not name.endswith(("0.bias", "4.bias", "running_mean", "qkv.bias")):
            apart = (tensor - theirs[name]).abs() > 0.1 * lr + 1e-6 * theirs[name].abs()
            assert int(apart.sum()) <= 1 + apart.numel() // 1000, name


@pytest.mark.parametrize("fields", FIELDS, ids=name)
def test_a_head_fold_agrees_with_autograd(fields: dict[str, Any]) -> None:
    spec = dataclasses.replace(toys.SPEC, **fields)
    fast, slow = toys.make(HeadFold, spec), toys.make(Fold, spec)
    for bias in ("head.0.bias", "head.4.bias"):
        slow.named()[bias].register_hook(torch.zeros_like)
    drawn, again = fast.draw(), slow.draw()
    assert torch.equal(drawn.rows, again.rows)
    assert fast.train_epoch(drawn) == pytest.approx(slow.train_epoch(again), rel=1e-5, abs=1e-7)
    for name, moment in slow.named().items():
        for key in ("exp_avg", "exp_avg_sq"):
            want, got = slow.optimizer.state[moment][key], fast.optimizer.state[fast.named()[name]][key]
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()) + 1e-12)
    ours, theirs = fast.run_epoch(), slow.run_epoch()
    assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-4, abs=1e-7)
    assert ours.valid_loss == pytest.approx(theirs.valid_loss, rel=1e-3, abs=1e-6)
    if spec.ema:
        near(fast, slow, spec.lr)


@pytest.mark.parametrize("fields", [*FIELDS, *BLOCKS], ids=name)
def test_folds_together_agree_with_folds_one_by_one(fields: dict[str, Any]) -> None:
    spec = change(**fields)
    together, alone = make(spec), make(spec)
    for _ in range(2):
        list(run_epoch(Stack(together)))
        for fold in alone:
            fold.run_epoch()
    for one, other in zip(together, alone, strict=True):
        for ours, theirs in zip(one.history, other.history, strict=True):
            assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-4, abs=1e-7)
            assert ours.valid_loss == pytest.approx(theirs.valid_loss, rel=1e-3, abs=1e-6)
        assert torch.equal(one.generator.get_state(), other.generator.get_state())
        steps = [[int(f.optimizer.state[p]["step"]) for p in f.named().values()] for f in (one, other)]
        assert steps[0] == steps[1]
        if spec.ema:
            near(one, other, spec.head_lr or spec.lr)


def test_one_stack_lasts_all_epochs_and_the_head_s_own_ends_with_them() -> None:
    spec = change(head_first=1, **TWO_RATES)
    together, alone = make(spec), make(spec)
    fit_together(together, (3,), keep([]))
    for fold in alone:
        for _ in range(3):
            fold.run_epoch()
    for one, other in zip(together, alone, strict=True):
        losses = [[epoch.train_loss for epoch in fold.history] for fold in (one, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("fields", [*FIELDS, *BLOCKS], ids=name)
@pytest.mark.parametrize("kind", ["fold", "head", "stack"])
def test_a_fold_that_is_stopped_goes_on_to_the_same_bits(kind: str, fields: dict[str, Any]) -> None:
    if kind == "head" and fields in BLOCKS:
        pytest.skip("a head alone has one rate")

    def ready() -> Fold:
        if kind == "head":
            return toys.make(HeadFold, dataclasses.replace(toys.SPEC, **fields))
        return make(change(**fields))[0]

    def epoch(fold: Fold) -> None:
        list(run_epoch(Stack([fold]))) if kind == "stack" else fold.run_epoch()

    whole, begun, resumed = ready(), ready(), ready()
    for _ in range(3):
        epoch(whole)
    epoch(begun)
    resumed.restore(*begun.state())
    for _ in range(2):
        epoch(resumed)
    assert same(resumed, whole)
    ours, theirs = resumed.snapshot(3), whole.snapshot(3)
    assert all(torch.equal(t, theirs.state[name]) for name, t in ours.state.items())


# ------------------------------------------------------------------------------------------------ what goes together


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sampling": "sqrt", "shuffle": "block"}, "--sampling does not go with --shuffle block"),
        ({"label_smoothing": 0.1, "loss": "focal+jaccard"}, "--label-smoothing does not go with --loss focal+jaccard"),
        ({"head_first": 1, "train_blocks": 0}, "--head-first does not go with --train-blocks 0"),
        ({"layer_decay": 0.5, "train_blocks": 0}, "--layer-decay does not go with --train-blocks 0"),
        ({"head_lr": 0.0}, "--head-lr: 0.0 must be positive"),
        ({"layer_decay": 1.5}, "--layer-decay: 1.5 must be in (0, 1]"),
        ({"train_blocks": -1}, "--train-blocks: -1 must be 0 or more"),
        ({"asl_gamma_neg": 0.5}, "--asl-gamma-neg: 0.5 must be 0, or at least 1"),
        ({"asl_clip": 1.0}, "--asl-clip: 1.0 must be in [0, 1)"),
        ({"ema": 1.0}, "--ema: 1.0 must be in [0, 1)"),
        ({"label_smoothing": math.nan}, "--label-smoothing: nan must be in [0, 1)"),
        ({"logit_adjustment": -1.0}, "--logit-adjustment: -1.0 must be 0 or more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fields_that_cannot_be_are_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        TrainSpec(**fields)
    assert said in str(caught.value)


def test_classes_of_one_sign_and_batches_without_a_positive_train() -> None:
    labels = toys.labels().copy()
    labels[:, 0], labels[toys.TRAIN, 1], labels[toys.TRAIN, 2] = -1, 1, 0
    for fields in FIELDS:
        fold = toys.make(HeadFold, dataclasses.replace(toys.SPEC, batch_size=2, **fields), labels=labels)
        assert math.isfinite(fold.run_epoch().train_loss), fields
        assert bool(torch.isfinite(fold.flat).all()), fields
