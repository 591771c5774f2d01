"""Cached training is uncached training; one long fit is every short one; losses and draws are what they say."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cxr_fast.activations.forward import precision, predict, probabilities, sigmoid
from cxr_fast.activations.loader import Activations
from cxr_fast.config import OPENAI_MEAN, OPENAI_STD, TrainSpec
from cxr_fast.errors import InputError
from cxr_fast.metrics.figures import auc, macro
from cxr_fast.models import backbone
from cxr_fast.training.folds.fold import Draws, Epoch, Fold, Snapshot, draw
from cxr_fast.training.folds.loop import fit
from cxr_fast.training.folds.losses import losses
from tests.conftest import TOY, TOY_AVERAGE
from tests.helpers.toys import build, keep

CPU = torch.device("cpu")
SPEC = TrainSpec(batch_size=8, precision="float32")
IMAGES, CLASSES = 40, 4
TRAIN, VALID = np.arange(28), np.arange(28, IMAGES)


@cache
def tower(source: str = TOY) -> Any:
    """A toy tower whose embeddings differ between images; freshly initialised ones are alike to 1e-4, and rounding
    would then decide what batch norm makes of them."""
    visual = backbone.load(source).visual
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in visual.parameters():
            if p.ndim >= 2:
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p[0].numel()))
    return visual


@cache
def films() -> torch.Tensor:
    """Normalised images (N, 3, 160, 160)."""
    grey = torch.randint(0, 256, (IMAGES, 1, 20, 20), generator=torch.Generator().manual_seed(0)).float()
    grey = F.interpolate(grey, size=160, mode="bilinear") / 255
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (OPENAI_MEAN, OPENAI_STD))
    return (grey.expand(-1, 3, -1, -1) - mean) / std


@cache
def rows(k: int = 2, dtype: str = "float32", source: str = TOY) -> np.ndarray:
    """Activations (N, 2, ...): plain and flipped."""
    with torch.inference_mode():
        views = [backbone.prefix(tower(source), x, k).numpy() for x in (films(), films().flip(-1))]
    return np.stack(views, axis=1).astype(dtype)


@cache
def labels() -> np.ndarray:
    """(N, C) with 1, 0 and some unknown; every class has both signs on both sides."""
    random = np.random.default_rng(0)
    out = random.integers(0, 2, (IMAGES, CLASSES)).astype(np.int8)
    out[random.random(out.shape) < 0.2] = -1
    for part in (TRAIN, VALID):
        out[part[0]], out[part[1]] = 1, 0
    return out


def make(spec: TrainSpec = SPEC, *, k: int = 2, array: np.ndarray | None = None, **changes: Any) -> Fold:
    arguments: dict[str, Any] = {"labels": labels(), "train_rows": TRAIN, "valid_rows": VALID, "seed": 0, **changes}
    source = arguments.pop("source", TOY)
    activations = Activations(rows(k, source=source) if array is None else array, CPU)
    return build(Fold, tower(source), activations, spec=spec, unfreeze_blocks=k, **arguments)


def run(fold: Fold, budgets: Sequence[int]) -> tuple[list[Epoch], list[Snapshot]]:
    snapshots: list[Snapshot] = []
    return fit(fold, budgets, keep(snapshots)), snapshots


def same(one: Snapshot, other: Snapshot) -> bool:
    assert list(one.state) == list(other.state)
    return np.array_equal(one.probabilities, other.probabilities) and all(
        torch.equal(tensor, other.state[name]) for name, tensor in one.state.items()
    )


# Cached against uncached.


class Drawn(nn.Module):
    """Dropout with nn.Dropout's arithmetic and given masks."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.kept = torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(self.kept, x / (1 - self.p), torch.zeros(())) if self.training else x


class Reference(nn.Module):
    """The published way: open_clip's whole tower from pixels every step, then the head, in plain modules."""

    def __init__(self, fold: Fold, source: str, k: int) -> None:
        super().__init__()
        self.tower = copy.deepcopy(tower(source))
        self.tower.trunk.blocks[len(self.tower.trunk.blocks) - k :].requires_grad_(k > 0)
        p = fold.spec.dropout
        self.head = nn.Sequential(
            *(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), Drawn(p)),
            *(nn.Linear(512, 256), nn.BatchNorm1d(256), nn.ReLU(), Drawn(p)),
            nn.Linear(256, CLASSES),
        )
        self.head.load_state_dict(fold.tail.head.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.normalize(self.tower(x), dim=-1))


def plain_loss(logits: torch.Tensor, target: torch.Tensor, spec: TrainSpec) -> torch.Tensor:
    """Focal loss over the known labels, one at a time (Lin et al. 2017, eq. 5)."""
    terms = []
    for z, y in zip(logits.flatten(), target.flatten().tolist(), strict=True):
        if y >= 0:
            p = torch.sigmoid(z if y == 1 else -z)
            alpha = spec.focal_alpha if y == 1 else 1 - spec.focal_alpha
            terms.append(-alpha * (1 - p) ** spec.focal_gamma * torch.log(p))
    return torch.stack(terms).mean()


def uncached(fold: Fold, source: str, k: int, steps: int) -> tuple[Reference, list[float]]:
    """`steps` steps of the reference with the draws of `fold`, which is used up."""
    spec, model = fold.spec, Reference(fold, source, k)
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=spec.lr, weight_decay=spec.weight_decay, foreach=False, fused=False)
    target, out = torch.from_numpy(labels()), []
    model.train()
    while len(out) < steps:
        for chosen, views, masks in batches(fold.draw()):
            model.head[3].kept, model.head[7].kept = masks[:, :512], masks[:, 512:]
            x = torch.stack([films()[i].flip(-1) if v else films()[i] for i, v in zip(chosen, views, strict=True)])
            loss = plain_loss(model(x), target[chosen], spec)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(wanted, spec.clip_norm)
            optimizer.step()
            out.append(loss.item())
    return model.eval(), out[:steps]


def batches(draws: Draws) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    return [(draws.rows[a:b], draws.views[a:b], draws.masks[a:b]) for a, b in draws.steps]


def steered(fold: Fold, name: str, tensor: torch.Tensor, steps: int) -> torch.Tensor:
    """Entries with a gradient; elsewhere AdamW divides rounding by its own size.

    Key biases have none (softmax does not see them), nor biases before a batch norm (which subtracts them).
    """
    if name in ("head.0.bias", "head.4.bias", "head.1.running_mean", "head.5.running_mean"):
        return torch.zeros_like(tensor, dtype=torch.bool)
    p = dict(fold.tail.named_parameters()).get(name)
    if p is None:
        return torch.ones_like(tensor, dtype=torch.bool)
    out = (fold.optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**steps)).sqrt() > 1e-8
    if name.endswith("attn.qkv.bias"):
        out[len(out) // 3 : 2 * len(out) // 3] = False
    return out


def cached(fold: Fold, steps: int) -> list[float]:
    fold.tail.train()
    out: list[float] = []
    while len(out) < steps:
        out += [float(fold.step(fold.activations.gather(r, v), r, m)) for r, v, m in batches(fold.draw())]
    return out[:steps]


@pytest.mark.parametrize(
    ("source", "k", "spec"),
    [
        (TOY, 2, SPEC),
        (TOY, 0, SPEC),
        (TOY, 1, dataclasses.replace(SPEC, dropout=0.0, flip=False)),
        (TOY_AVERAGE, 2, SPEC),
    ],
)
def test_cached_training_equals_training_the_whole_tower_from_pixels(source: str, k: int, spec: TrainSpec) -> None:
    steps = 20
    assert steps % len(make(spec, k=k, source=source).draw().steps) == 0
    model, want = uncached(make(spec, k=k, source=source), source, k, steps)
    fold = make(spec, k=k, source=source)
    np.testing.assert_allclose(cached(fold, steps), want, rtol=0, atol=1e-5)
    first = len(model.tower.trunk.blocks) - k
    reference = {f"head.{name}": tensor for name, tensor in model.head.state_dict().items()}
    for i, block in enumerate(model.tower.trunk.blocks[first:]):
        reference |= {f"blocks.{i}.{name}": tensor for name, tensor in block.state_dict().items()}
    compared = 0
    for name, tensor in fold.tail.state_dict().items():
        if name.split(".")[0] in ("blocks", "head"):
            counts = steered(fold, name, tensor, steps)
            torch.testing.assert_close(tensor[counts], reference[name][counts], rtol=0, atol=1e-5)
            compared += int(counts.sum())
    assert compared > 0.99 * sum(tensor.numel() for tensor in reference.values())
    with torch.inference_mode():
        answers = model(films()[VALID])
    np.testing.assert_allclose(predict(fold.tail, fold.activations, VALID), answers.numpy(), rtol=0, atol=1e-4)


def test_float16_activations_train_to_nearly_the_same_model() -> None:
    exact, rounded = make(), make(array=rows(dtype="float16"))
    want, got = cached(exact, 20), cached(rounded, 20)
    assert want != got
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-4)
    answers = [sigmoid(predict(fold.tail, fold.activations, VALID)) for fold in (exact, rounded)]
    np.testing.assert_allclose(answers[0], answers[1], rtol=0, atol=1e-3)


# One long run is every short one.


def test_one_fit_over_three_budgets_is_three_fits_bit_for_bit() -> None:
    history, snapshots = run(make(), (1, 2, 3))
    assert [(s.budget, s.epoch) for s in snapshots] == [(1, 1), (2, 2), (3, 3)]
    assert [epoch.epoch for epoch in history] == [1, 2, 3]
    for snapshot in snapshots:
        short, (alone,) = run(make(), (snapshot.budget,))
        assert same(alone, snapshot)
        assert [e.train_loss for e in short] == [e.train_loss for e in history[: len(short)]]
    assert not same(snapshots[0], snapshots[1])


STOPPING = dataclasses.replace(SPEC, patience=2, plateau_patience=0, lr=1e-3)


def test_scheduler_and_early_stopping_do_not_tell_budgets_apart() -> None:
    fold = make(STOPPING)
    budgets = (1, 2, 3, 4, 6, 9, 40)
    history, snapshots = run(fold, budgets)
    assert [s.budget for s in snapshots] == list(budgets)
    assert fold.stopped
    assert len(history) < 40
    assert snapshots[-1].epoch == len(history)
    assert len({epoch.lr for epoch in history}) > 1, "the scheduler never acted"
    for snapshot in snapshots:
        _, (alone,) = run(make(STOPPING), (snapshot.budget,))
        assert alone.epoch == snapshot.epoch
        assert same(alone, snapshot)


def test_early_stopping_waits_for_so_many_epochs_without_a_better_auc() -> None:
    for patience in (1, 2, 4):
        spec = dataclasses.replace(STOPPING, patience=patience)
        history, _ = run(make(spec), (25,))
        stale, best, stop = 0, -1.0, 25
        for epoch in history:
            stale, best = (0, epoch.valid_auc) if epoch.valid_auc > best else (stale + 1, best)
            if stale >= patience:
                stop = epoch.epoch
                break
        assert len(history) == stop
    assert len(run(make(dataclasses.replace(STOPPING, patience=None)), (6,))[0]) == 6


def test_the_learning_rate_halves_when_the_auc_stands_still() -> None:
    history, _ = run(make(dataclasses.replace(STOPPING, patience=None)), (8,))
    lr, best = STOPPING.lr, -math.inf
    for epoch in history:
        assert epoch.lr == pytest.approx(lr, rel=1e-12)
        if epoch.valid_auc > best * (1 + 1e-4 * (1 if best > 0 else 0)):
            best = epoch.valid_auc
        else:
            lr *= 0.5
    assert lr < STOPPING.lr
    constant, _ = run(make(dataclasses.replace(STOPPING, patience=None, scheduler="none")), (8,))
    assert {epoch.lr for epoch in constant} == {STOPPING.lr}


def test_the_same_seed_gives_the_same_bits_whatever_else_draws() -> None:
    _, (first,) = run(make(), (2,))
    torch.manual_seed(1234)
    np.random.seed(1234)
    _, (again,) = run(make(), (2,))
    assert same(first, again)
    for changes in ({"seed": 1}, {"fold": 1}):
        _, (other,) = run(make(**changes), (2,))
        assert not same(first, other)
        assert not torch.equal(first.state["head.0.weight"], other.state["head.0.weight"])


def test_seeds_and_folds_do_not_share_draws() -> None:
    states = {
        (seed, fold): make(seed=seed, fold=fold).tail.head.state_dict()["8.weight"].numpy().tobytes()
        for seed in range(3)
        for fold in range(3)
    }
    assert len(set(states.values())) == 9


def test_a_snapshot_is_a_copy_and_its_probabilities_come_from_its_weights() -> None:
    fold = make()
    _, (first, second) = run(fold, (1, 2))
    assert not torch.equal(first.state["blocks.0.attn.qkv.weight"], second.state["blocks.0.attn.qkv.weight"])
    fold.tail.load_state_dict(first.state)
    again = sigmoid(predict(fold.tail, fold.activations, VALID))
    np.testing.assert_array_equal(again, first.probabilities)
    assert first.probabilities.shape == (len(VALID), CLASSES)
    assert first.probabilities.dtype == np.float32


def test_history_says_what_the_model_scored() -> None:
    fold = make()
    history, (snapshot,) = run(fold, (2,))
    want, classes = macro(auc(labels()[VALID], snapshot.probabilities))
    assert history[-1].valid_auc == pytest.approx(want, abs=1e-12)
    assert history[-1].classes == classes == CLASSES
    logits = torch.from_numpy(predict(fold.tail, fold.activations, VALID))
    loss = plain_loss(logits, torch.from_numpy(labels()[VALID]), SPEC)
    assert history[-1].valid_loss == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"tta": "flip"}, {"ema": 0.9}], ids=str)
def test_what_chooses_is_float32_where_training_is_bfloat16(changes: dict[str, Any]) -> None:
    """The history holds the AUC of the snapshot's own probabilities, and these are a float32 pass of its weights."""
    fold = make(dataclasses.replace(SPEC, precision="bfloat16", **changes))
    history, snapshots = run(fold, (1, 3))
    for snapshot, epoch in zip(snapshots, (1, 3), strict=True):
        assert history[epoch - 1].valid_auc == macro(auc(labels()[VALID], snapshot.probabilities))[0]
        fold.tail.load_state_dict(snapshot.state)
        again = probabilities(fold.tail, fold.activations, VALID, tta=fold.spec.tta)
        np.testing.assert_array_equal(again, snapshot.probabilities)
    x = fold.activations.gather(torch.from_numpy(VALID), torch.zeros(len(VALID), dtype=torch.long))
    with torch.autocast("cpu", torch.bfloat16):
        low = fold.tail(x).float().detach().numpy()
    assert np.abs(sigmoid(low) - sigmoid(predict(fold.tail, fold.activations, VALID))).max() > 1e-4, "shows nothing"


def test_bfloat16_training_stays_near_float32() -> None:
    spec = dataclasses.replace(SPEC, precision="bfloat16")
    (exact, _), (coarse, (snapshot,)) = run(make(), (3,)), run(make(spec), (3,))
    np.testing.assert_allclose([e.train_loss for e in coarse], [e.train_loss for e in exact], rtol=0.02, atol=0)
    assert [e.train_loss for e in coarse] != [e.train_loss for e in exact]
    assert {tensor.dtype for tensor in snapshot.state.values()} == {torch.float32, torch.int64}
    assert precision(spec, CPU, 2) == precision(spec, CPU, 0) == "bfloat16"
    assert precision(SPEC, CPU, 2) == "float32"
    assert precision(TrainSpec(), CPU, 2) in ("float32", "bfloat16")
    assert precision(TrainSpec(), CPU, 0) == "float32"


# Draws.


def drawn(n: int, size: int = 16, seed: int = 0, *, views: int = 2, flip: bool = True, dropout: float = 0.5) -> Draws:
    spec = dataclasses.replace(SPEC, batch_size=size, flip=flip, dropout=dropout)
    return draw(torch.Generator().manual_seed(seed), torch.arange(100, 100 + n), spec, views=views)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 60), size=st.integers(2, 17), seed=st.integers(0, 99))
def test_an_epoch_visits_every_row_once_and_never_alone(n: int, size: int, seed: int) -> None:
    draws = drawn(n, size, seed)
    assert sorted(draws.rows.tolist()) == list(range(100, 100 + n))
    assert [a for a, _ in draws.steps] == [0, *(b for _, b in draws.steps[:-1])]
    assert draws.steps[-1][1] == n == len(draws.views) == len(draws.masks)
    sizes = [b - a for a, b in draws.steps]
    assert all(count == size for count in sizes[:-1])
    assert 2 <= sizes[-1] <= size + 1
    if n % size == 1 and n > size:
        assert sizes[-1] == size + 1


def test_each_epoch_draws_anew() -> None:
    fold = make()
    first, second = fold.draw(), fold.draw()
    for name in ("rows", "views", "masks"):
        assert not torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 0.9])
def test_masks_drop_their_share_of_every_bit_position(p: float) -> None:
    """Four values come from one 64-bit draw: each of the four must have the right share."""
    masks = drawn(2000, dropout=p).masks
    assert masks.shape == (2000, 768)
    for lane in range(4):
        kept = float(masks.flatten()[lane::4].float().mean())
        assert kept == pytest.approx(1 - p, abs=4 * (p * (1 - p) / 384_000) ** 0.5 + 1e-9)


def test_a_last_batch_of_one_trains() -> None:
    train = TRAIN[:17]
    fold = make(train_rows=train)
    assert fold.draw().steps == [(0, 8), (8, 17)]
    history, _ = run(make(train_rows=train), (1,))
    assert math.isfinite(history[0].train_loss)


@pytest.mark.parametrize(
    ("views", "flip", "seen"), [(2, True, {0, 1}), (2, False, {0}), (1, True, {0}), (1, False, {0})]
)
def test_the_flipped_view_is_drawn_only_where_cached_and_asked(views: int, flip: bool, seen: set[int]) -> None:
    found = drawn(400, views=views, flip=flip).views
    assert set(found.tolist()) == seen
    if seen == {0, 1}:
        assert 140 < int(found.sum()) < 260


def test_a_cache_without_flips_trains() -> None:
    history, _ = run(make(array=rows()[:, :1]), (1,))
    assert math.isfinite(history[0].train_loss)


def test_scores_come_from_the_plain_view_alone() -> None:
    changed = rows().copy()
    changed[:, 1] = 7
    fold = make()
    other = Activations(changed, CPU)
    np.testing.assert_array_equal(predict(fold.tail, fold.activations, VALID), predict(fold.tail, other, VALID))


def test_gather_takes_the_row_and_view_asked_for() -> None:
    for dtype in ("float16", "float32"):
        activations = Activations(rows(dtype=dtype), CPU)
        got = activations.gather(torch.tensor([3, 0, 3]), torch.tensor([1, 0, 0]))
        assert got.dtype == torch.float32
        for i, (row, view) in enumerate([(3, 1), (0, 0), (3, 0)]):
            np.testing.assert_array_equal(got[i].numpy(), rows(dtype=dtype)[row, view].astype(np.float32))


# Losses.


def scalar_focal(z: float, y: int, alpha: float, gamma: float) -> float:
    p = 1 / (1 + math.exp(-z)) if y else 1 / (1 + math.exp(z))
    miss = 1 / (1 + math.exp(z)) if y else 1 / (1 + math.exp(-z))
    return -(alpha if y else 1 - alpha) * miss**gamma * math.log(p)


@settings(max_examples=200, deadline=None)
@given(
    entries=st.lists(st.tuples(st.floats(-12, 12), st.sampled_from([-1, 0, 1])), min_size=1, max_size=24),
    alpha=st.floats(0, 1),
    gamma=st.floats(0, 5),
)
def test_focal_loss_is_that_of_lin_et_al(entries: list[tuple[float, int]], alpha: float, gamma: float) -> None:
    spec = TrainSpec(focal_alpha=alpha, focal_gamma=gamma)
    logits = torch.tensor([[z for z, _ in entries]])
    known = [scalar_focal(z, y, alpha, gamma) for z, y in entries if y >= 0]
    want = sum(known) / max(len(known), 1)
    got = losses(logits, torch.tensor([[y for _, y in entries]], dtype=torch.int8), spec)
    assert got.item() == pytest.approx(want, rel=1e-4, abs=5e-7)


def test_focal_loss_at_gamma_0_and_alpha_half_is_half_of_cross_entropy() -> None:
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)) * 4
    target = torch.from_numpy(np.random.default_rng(0).integers(-1, 2, (9, 5)).astype(np.int8))
    focal = losses(logits, target, TrainSpec(focal_alpha=0.5, focal_gamma=0))
    bce = losses(logits, target, TrainSpec(loss="bce"))
    known = target >= 0
    want = F.binary_cross_entropy_with_logits(logits[known], target[known].float())
    torch.testing.assert_close(bce, want)
    torch.testing.assert_close(focal * 2, bce)


@pytest.mark.parametrize("loss", ["focal", "bce"])
def test_unknown_labels_add_nothing_to_loss_or_gradient(loss: str) -> None:
    spec = dataclasses.replace(SPEC, loss=loss)
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target = torch.tensor([[1, 0, -1, -1]] * 6, dtype=torch.int8)
    value = losses(logits, target, spec)
    (gradient,) = torch.autograd.grad(value, logits)
    assert torch.equal(gradient[:, 2:], torch.zeros(6, 2))
    assert (gradient[:, :2] != 0).all()
    torch.testing.assert_close(value, losses(logits[:, :2], target[:, :2], spec))
    nothing = losses(logits, torch.full_like(target, -1), spec)
    assert nothing.item() == 0
    assert torch.equal(torch.autograd.grad(nothing, logits)[0], torch.zeros(6, 4))


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [10.0, 20.0, 80.0, 120.0, 1e4])
def test_a_confident_logit_has_a_finite_gradient(gamma: float, size: float) -> None:
    logits = torch.tensor([[size, -size, size, -size]], requires_grad=True)
    target = torch.tensor([[1, 0, 0, 1]], dtype=torch.int8)
    value = losses(logits, target, TrainSpec(focal_gamma=gamma))
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.isfinite().all()
    assert value.isfinite()
    assert gradient[0, 2] > 0 > gradient[0, 3], "what is wrong must be pushed back"


# What must be refused, and what must move.


def test_a_diverging_run_ends_with_its_epoch_and_flag() -> None:
    with pytest.raises(InputError, match=r"^training diverged in epoch 1 \(loss nan\); use a smaller --lr\.$"):
        run(make(dataclasses.replace(SPEC, lr=1e36)), (1,))


def test_weights_that_break_in_the_last_step_are_noticed_in_that_epoch() -> None:
    spec = dataclasses.replace(SPEC, batch_size=64, lr=1e36)
    assert len(make(spec).draw().steps) == 1
    with pytest.raises(InputError, match=r"^training diverged in epoch 1 \(logits not finite\); use a smaller --lr\.$"):
        run(make(spec), (1,))


def test_a_fold_that_nothing_can_be_chosen_on_is_refused() -> None:
    for value in (0, 1, -1):
        poor = labels().copy()
        poor[VALID] = value
        with pytest.raises(InputError, match=r"^fold 4: none of the 4 classes has both .* 12 validation .*--folds"):
            make(labels=poor, fold=3)
    poor = labels().copy()
    poor[VALID] = 0
    poor[VALID[0], 2] = 1
    history, _ = run(make(labels=poor), (1,))
    assert history[0].classes == 1


def test_a_fold_without_training_or_validation_images_is_refused() -> None:
    with pytest.raises(InputError, match="fold 1 would train on 1 image"):
        make(train_rows=TRAIN[:1])
    with pytest.raises(InputError, match=r"fold 1: .* 0 validation images"):
        make(valid_rows=VALID[:0])


@pytest.mark.parametrize(("k", "source"), [(0, TOY), (2, TOY), (6, TOY), (3, TOY_AVERAGE)])
def test_every_trained_matrix_moves_and_nothing_frozen_does(k: int, source: str) -> None:
    fold = make(k=k, source=source)
    before = {name: p.detach().clone() for name, p in fold.tail.named_parameters()}
    tower_before = backbone.tower_sha256(tower(source))
    run(fold, (1,))
    matrices = 0
    for name, p in fold.tail.named_parameters():
        if name.split(".")[0] not in ("blocks", "head"):
            assert torch.equal(p, before[name]), f"{name} is frozen and moved"
        elif p.ndim >= 2:
            assert not torch.equal(p, before[name]), f"{name} is trained and did not move"
            matrices += 1
    assert matrices == 4 * k + 3
    assert backbone.tower_sha256(tower(source)) == tower_before


def test_a_matrix_that_stands_still_is_an_error() -> None:
    with pytest.raises(InputError, match=r"11 of 11 weight matrices did not change in the first epoch .*--lr"):
        run(make(dataclasses.replace(SPEC, lr=1e-30)), (1,))


def test_a_disconnected_block_is_an_error() -> None:
    fold = make()
    parameters = list(fold.tail.blocks[0].parameters())
    fold.optimizer.param_groups[0]["params"] = [
        p for p in fold.optimizer.param_groups[0]["params"] if not any(p is q for q in parameters)
    ]
    with pytest.raises(InputError, match=r"4 of 11 weight matrices did not change .*blocks\.0"):
        run(fold, (1,))
