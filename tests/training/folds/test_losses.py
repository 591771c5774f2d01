"""Losses against plain loops over numbers, one by one and stacked; their gradients against finite differences."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.config import TrainSpec
from cxr_fast.data.labels import SOFT
from cxr_fast.training.folds.losses import (
    JACCARD_SHARE,
    ClassTerms,
    class_margins,
    class_priors,
    class_terms,
    class_weights,
    losses,
    soft_jaccard,
)

KINDS = ("focal", "bce", "focal+jaccard", "asl", "ldam")
Table = list[list[int]]


def plain_jaccard(logits: list[list[float]], labels: Table) -> float:
    images = []
    for zs, ys in zip(logits, labels, strict=True):
        known = [(1 / (1 + math.exp(-z)), y) for z, y in zip(zs, ys, strict=True) if y >= 0]
        both = sum(p * y for p, y in known)
        union = sum(p for p, _ in known) + sum(y for _, y in known) - both
        if known:
            images.append(1 - (both + 1) / (union + 1))
    return sum(images) / max(len(images), 1)


def plain_entry(z: float, positive: bool, spec: TrainSpec, margin: float = 0.0) -> float:
    """The loss of one entry in Python's double precision."""
    if spec.loss == "ldam" and positive:
        z -= margin
    u = z if positive else -z
    log_p = -math.log1p(math.exp(-u))
    if spec.loss == "asl":
        if positive:
            return -((1 / (1 + math.exp(z))) ** spec.asl_gamma_pos) * log_p
        missed = max(1 / (1 + math.exp(-z)) - spec.asl_clip, 0.0)
        return -(missed**spec.asl_gamma_neg) * math.log1p(-missed)
    factor = 1.0
    if spec.loss in ("focal", "focal+jaccard"):
        miss = 1 / (1 + math.exp(u))
        factor = (spec.focal_alpha if positive else 1 - spec.focal_alpha) * miss**spec.focal_gamma
    return -factor * log_p


def plain(logits: list[list[float]], labels: Table, spec: TrainSpec, terms: dict[str, list[float]]) -> float:
    """The loss, an entry at a time."""
    total, known, smooth = 0.0, 0, spec.label_smoothing / 2
    shifted = [[z + terms.get("prior", [0.0] * len(zs))[c] for c, z in enumerate(zs)] for zs in logits]
    for zs, ys in zip(shifted, labels, strict=True):
        for c, (z, y) in enumerate(zip(zs, ys, strict=True)):
            if y == -1:
                continue
            margin = terms.get("margin", [0.0] * len(zs))[c]
            target = {1: 1.0, 0: 0.0, -2: 0.7}[y] * (1 - 2 * smooth) + smooth
            cost = target * plain_entry(z, True, spec, margin) + (1 - target) * plain_entry(z, False, spec, margin)
            total += cost * terms.get("weights", [1.0] * len(zs))[c]
            known += 1
    mean = total / max(known, 1)
    if spec.loss != "focal+jaccard":
        return mean
    return 0.7 * mean + 0.3 * plain_jaccard(shifted, labels)


@st.composite
def stacks(draw: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits (K, B, C) in -12..12 and labels of the same shape, with and without uncertain ones (-2)."""
    shape = tuple(draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shares = draw(st.sampled_from([(0.2, 0.4, 0.4, 0.0), (0.9, 0.05, 0.05, 0.0), (0.2, 0.2, 0.2, 0.4)]))
    labels = random.choice([-1, 0, 1, -2], size=shape, p=shares)
    return random.uniform(-12, 12, shape).astype(np.float32), labels.astype(np.int8)


@pytest.mark.parametrize("with_terms", [False, True])
@pytest.mark.parametrize("loss", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=stacks(), alpha=st.floats(0, 1), gamma=st.floats(0, 5), smoothing=st.sampled_from([0.0, 0.1]))
def test_a_loss_is_the_plain_loop_over_its_known_entries_one_by_one_and_stacked(
    loss: Any, with_terms: bool, data: tuple[np.ndarray, np.ndarray], alpha: float, gamma: float, smoothing: float
) -> None:
    logits, labels = data
    smoothing = 0.0 if loss == "focal+jaccard" else smoothing
    spec = TrainSpec(loss=loss, focal_alpha=alpha, focal_gamma=gamma, label_smoothing=smoothing)
    classes, own = logits.shape[2], dict[str, list[float]]()
    if with_terms or loss == "ldam":
        own["margin"] = np.linspace(1.0, 0.2, classes).tolist()
    if with_terms:
        own |= {"weights": np.linspace(0.5, 1.5, classes).tolist(), "prior": np.linspace(-2, 1, classes).tolist()}
    terms = ClassTerms(**{name: torch.tensor(values) for name, values in own.items()})
    if loss != "ldam":
        own.pop("margin", None)
        terms = ClassTerms(weights=terms.weights, prior=terms.prior)
    terms = dataclasses.replace(terms, soft=bool((labels == -2).any()))
    stacked = losses(torch.from_numpy(logits), torch.from_numpy(labels), spec, terms)
    assert stacked.shape == (len(logits),)
    for k in range(len(logits)):
        alone = losses(torch.from_numpy(logits[k]), torch.from_numpy(labels[k]), spec, terms)
        assert alone.shape == ()
        want = plain(logits[k].tolist(), labels[k].tolist(), spec, own)
        assert alone.item() == pytest.approx(want, rel=1e-4, abs=1e-6)
        assert stacked[k].item() == pytest.approx(alone.item(), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("gammas", [(4.0, 1.0), (2.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("clip", [0.0, 0.05, 0.3])
def test_the_asymmetric_loss_is_timms_per_known_entry(gammas: tuple[float, float], clip: float) -> None:
    from timm.loss import AsymmetricLossMultiLabel

    negative, positive = gammas
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(64, 13, generator=draw) * 2  # timm rounds 1 - p, and stops at 1e-8
    labels = (torch.rand(64, 13, generator=draw) < 0.2).to(torch.int8)
    spec = TrainSpec(loss="asl", asl_gamma_neg=negative, asl_gamma_pos=positive, asl_clip=clip)
    how = {"reduction": "sum"} if "reduction" in inspect.signature(AsymmetricLossMultiLabel).parameters else {}
    theirs = AsymmetricLossMultiLabel(gamma_neg=negative, gamma_pos=positive, clip=clip, **how)(logits, labels.float())
    assert losses(logits, labels, spec).item() == pytest.approx(theirs.item() / labels.numel(), abs=1e-6)


def test_smoothing_cross_entropy_is_cross_entropy_with_a_smooth_target() -> None:
    logits, labels = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[1, 0, 0]], dtype=torch.int8)
    want = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels * 0.8 + 0.1)
    torch.testing.assert_close(losses(logits, labels, TrainSpec(loss="bce", label_smoothing=0.2)), want)


def test_the_cross_entropy_of_an_uncertain_label_is_that_of_its_soft_target() -> None:
    logits, labels = torch.tensor([[2.0, -1.0, 0.5, 3.0]]), torch.tensor([[1, -2, 0, -1]], dtype=torch.int8)
    target = torch.tensor([1.0, SOFT, 0.0])
    want = torch.nn.functional.binary_cross_entropy_with_logits(logits[0, :3], target)
    terms = class_terms(labels.numpy(), TrainSpec(loss="bce"))
    assert terms.soft
    torch.testing.assert_close(losses(logits, labels, TrainSpec(loss="bce"), terms), want)
    # The mean over targets drawn from the published range is the same: a loss is linear in its target.
    drawn = torch.linspace(0.55, 0.85, 1001)
    each = torch.nn.functional.binary_cross_entropy_with_logits(torch.full((1001,), -1.0), drawn)
    torch.testing.assert_close(
        each, torch.nn.functional.binary_cross_entropy_with_logits(logits[0, 1:2], torch.tensor([SOFT]))
    )


def test_weights_priors_and_margins_count_an_uncertain_label_as_neither() -> None:
    known = np.array([[1], [0], [0], [1], [0]], np.int8)
    mixed = np.concatenate([known, np.full((7, 1), -2, np.int8)])
    for spec in (TrainSpec(class_weights="sqrt", logit_adjustment=1.0), TrainSpec(loss="ldam")):
        for found in (class_weights, class_priors, class_margins):
            np.testing.assert_array_equal(found(known, spec), found(mixed, spec))


@settings(max_examples=100, deadline=None)
@given(data=stacks())
def test_the_soft_jaccard_is_the_plain_loop_and_lies_between_0_and_1(data: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = (torch.from_numpy(part) for part in data)
    stacked = soft_jaccard(logits, labels)
    for k, value in enumerate(stacked):
        assert value.item() == pytest.approx(plain_jaccard(logits[k].tolist(), labels[k].tolist()), rel=1e-5, abs=1e-6)
        assert soft_jaccard(logits[k], labels[k]).item() == pytest.approx(value.item(), rel=1e-6, abs=1e-7)
        assert 0 <= value.item() < 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from([-1, 0, 1])), min_size=1, max_size=9))
def test_with_probabilities_of_0_and_1_it_is_the_jaccard_of_sets_smoothed_by_one(entries: list[Any]) -> None:
    called = {c for c, (yes, y) in enumerate(entries) if yes and y >= 0}
    true = {c for c, (_, y) in enumerate(entries) if y == 1}
    logits = torch.tensor([[200.0 if yes else -200.0 for yes, _ in entries]])
    got = soft_jaccard(logits, torch.tensor([[y for _, y in entries]], dtype=torch.int8)).item()
    assert got == pytest.approx(1 - (len(called & true) + 1) / (len(called | true) + 1), abs=1e-6)


def test_an_image_without_a_known_label_is_not_in_the_mean_of_the_jaccard() -> None:
    logits = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    labels = torch.tensor([[1, 0], [-1, -1]], dtype=torch.int8)
    torch.testing.assert_close(soft_jaccard(logits, labels), soft_jaccard(logits[:1], labels[:1]))


def test_class_weights_multiply_the_entries_of_their_class_but_not_the_jaccard() -> None:
    logits, labels = torch.tensor([[1.0, -2.0]]), torch.tensor([[1, 0]], dtype=torch.int8)
    weights = ClassTerms(weights=torch.tensor([2.0, 0.0]))
    first = losses(logits[:, :1], labels[:, :1], TrainSpec())
    torch.testing.assert_close(losses(logits, labels, TrainSpec(), weights), first)
    both = losses(logits, labels, TrainSpec(loss="focal+jaccard"), weights)
    torch.testing.assert_close(both, (1 - JACCARD_SHARE) * first + JACCARD_SHARE * soft_jaccard(logits, labels))


@pytest.mark.parametrize("loss", KINDS)
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_a_batch_of_unknown_labels_costs_nothing_and_pushes_nowhere(loss: Any, shape: tuple[int, ...]) -> None:
    logits = torch.full(shape, 30.0, requires_grad=True)
    nothing = losses(
        logits, torch.full(shape, -1, dtype=torch.int8), TrainSpec(loss=loss), ClassTerms(weights=torch.ones(4))
    )
    assert torch.equal(nothing, torch.zeros(shape[:-2]))
    (gradient,) = torch.autograd.grad(nothing.sum(), logits)
    assert torch.equal(gradient, torch.zeros(shape))


@pytest.mark.parametrize("loss", KINDS)
def test_an_unknown_entry_has_no_gradient_and_a_known_one_has(loss: Any) -> None:
    logits = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[1, 0, -1, -1]] * 6, dtype=torch.int8).expand(2, 6, 4)
    (gradient,) = torch.autograd.grad(losses(logits, labels, TrainSpec(loss=loss)).sum(), logits)
    assert torch.equal(gradient[..., 2:], torch.zeros(2, 6, 2))
    # The asymmetric loss clips negatives below 0.05 on purpose.
    assert (gradient[..., : 1 if loss == "asl" else 2] != 0).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("loss", KINDS)
def test_gradients_are_those_of_finite_differences(loss: Any, gamma: float, weighted: bool) -> None:
    spec, draw = TrainSpec(loss=loss, focal_gamma=gamma), torch.Generator().manual_seed(1)
    # Up to logit 6: with gamma below 1 the curvature there is still small beside gradcheck's step of 1e-6.
    logits = (torch.rand(2, 3, 4, generator=draw, dtype=torch.float64) * 12 - 6).requires_grad_()
    labels = torch.randint(-1, 2, (2, 3, 4), generator=draw, dtype=torch.int8)
    weights = torch.tensor([0.5, 1.0, 2.0, 0.5], dtype=torch.float64)
    terms = ClassTerms(weights=weights if weighted else None, margin=weights if loss == "ldam" else None)
    assert torch.autograd.gradcheck(lambda z: losses(z, labels, spec, terms), logits)


@pytest.mark.parametrize("loss", KINDS)
@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [10.0, 17.0, 20.0, 90.0, 120.0, 1e4])
def test_a_saturated_logit_has_a_finite_gradient_that_pushes_back_what_is_wrong(
    loss: Any, gamma: float, size: float
) -> None:
    logits = torch.tensor([[size, -size, size, -size]], requires_grad=True)
    labels = torch.tensor([[1, 0, 0, 1]], dtype=torch.int8)
    value = losses(logits, labels, TrainSpec(loss=loss, focal_gamma=gamma))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert gradient[0, 3] < 0
    # With its clip the asymmetric loss of a negative is bounded, so that a hopeless one is given up.
    assert gradient[0, 2] > 0 or (loss == "asl" and gradient[0, 2] == 0)


# Class weights.


def test_equal_weights_are_none() -> None:
    assert class_weights(np.ones((3, 2), np.int8), TrainSpec()) is None


@pytest.mark.parametrize("kind", ["inverse", "sqrt"])
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 40), c=st.integers(1, 8))
def test_class_weights_are_one_over_the_share_of_known_positives_with_mean_1(
    kind: Any, seed: int, n: int, c: int
) -> None:
    labels = np.random.default_rng(seed).choice([-1, 0, 1], size=(n, c), p=[0.2, 0.6, 0.2]).astype(np.int8)
    got = class_weights(labels, TrainSpec(class_weights=kind))
    assert got is not None
    assert got.dtype == np.float32
    assert got.mean() == pytest.approx(1, rel=1e-5)
    share = [max(sum(y == 1 for y in ys), 1) / max(sum(y >= 0 for y in ys), 1) for ys in labels.T.tolist()]
    raw = [1 / s if kind == "inverse" else 1 / math.sqrt(s) for s in share]
    np.testing.assert_allclose(got, np.array(raw) / np.mean(raw), rtol=1e-5)
    rarest_first = sorted(range(c), key=lambda i: share[i])
    assert all(got[a] >= got[b] for a, b in itertools.pairwise(rarest_first))


def test_a_class_without_a_positive_weighs_as_if_it_had_one() -> None:
    labels = np.array([[0, 1, 1], [0, 0, 1], [0, 0, 1], [0, 0, -1]], np.int8)
    got = class_weights(labels, TrainSpec(class_weights="inverse"))
    assert got is not None
    assert got.tolist() == pytest.approx([4 / 3, 4 / 3, 1 / 3])
    root = class_weights(labels, TrainSpec(class_weights="sqrt"))
    assert root is not None
    assert root.tolist() == pytest.approx([1.2, 1.2, 0.6])


# What the labels give the loss.


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.floats(0.1, 3))
def test_margins_fall_with_the_fourth_root_of_the_positives(positives: list[int], margin: float) -> None:
    labels = np.zeros((60, len(positives)), np.int8)
    for c, n in enumerate(positives):
        labels[:n, c] = 1
    got = class_margins(labels, TrainSpec(loss="ldam", ldam_margin=margin))
    assert got is not None
    rarest = max(min(positives), 1)
    for n, value in zip(positives, got, strict=True):
        assert value == pytest.approx(margin * (rarest / max(n, 1)) ** 0.25, rel=1e-5)
    assert class_margins(labels, TrainSpec()) is None


def test_the_prior_is_the_log_odds_of_the_known_share_and_finite_for_one_sided_classes() -> None:
    labels = np.array([[1, 0, 1, -1], [0, 0, 1, -1], [0, 0, 1, -1], [-1, 0, 1, -1]], np.int8)
    want = [math.log(1 / 2), math.log(1 / 3), math.log(3 / 1), math.log(1 / 1)]
    assert class_priors(labels, TrainSpec(logit_adjustment=2.0)) == pytest.approx(np.multiply(2, want), rel=1e-6)
    assert class_priors(labels, TrainSpec()) is None
