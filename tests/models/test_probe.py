"""The linear probe against scikit-learn's logistic regression, a class at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from cxr_fast.models import probe


def drawn(images: int, width: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of any length, and labels that follow them with noise; one in eight unknown, class 0 rare."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((images, width)) + 2  # a common part, as embeddings have
    scores = (x - 2) @ random.standard_normal((width, classes)) / width**0.5 + random.standard_normal((images, classes))
    labels = (scores > np.linspace(1.5, -0.5, classes)).astype(np.int8)
    labels[random.random(labels.shape) < 1 / 8] = -1
    return torch.from_numpy(7 * x).float(), torch.from_numpy(labels)


def twin(x: torch.Tensor, labels: torch.Tensor, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (C, E) and biases (C,) of one LogisticRegression a class on its known labels."""
    prepared = x.double() / x.double().norm(dim=1, keepdim=True) * x.shape[1] ** 0.5
    weights, biases = np.zeros((labels.shape[1], x.shape[1])), np.zeros(labels.shape[1])
    for c, y in enumerate(labels.numpy().T):
        if (y == 1).any() and (y == 0).any():
            model = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)
            model.fit(prepared.numpy()[y >= 0], y[y >= 0])
            weights[c], biases[c] = model.coef_[0], model.intercept_[0]
    return weights, biases


@given(
    images=st.integers(8, 60),
    width=st.integers(2, 12),
    classes=st.integers(1, 5),
    strength=st.sampled_from([0.001, probe.STRENGTH, 0.1, 1.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
def test_each_class_is_a_logistic_regression(images: int, width: int, classes: int, strength: float, seed: int) -> None:
    x, labels = drawn(images, width, classes, seed)
    layer = probe.fit(x, labels, strength=strength)
    weights, biases = twin(x, labels, strength)
    np.testing.assert_allclose(layer.weight.numpy(), weights, atol=1e-4)
    np.testing.assert_allclose(layer.bias.numpy(), biases, atol=1e-3)


def test_it_has_converged_at_the_size_of_a_real_run() -> None:
    """Wide embeddings, classes of very different prevalence, in the steps that it is given."""
    x, labels = drawn(600, 384, 8, 0)
    found = probe.scores(probe.fit(x, labels), x).sigmoid().numpy()
    weights, biases = twin(x, labels, probe.STRENGTH)
    logits = probe.prepare(x).double().numpy() @ weights.T + biases
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits)), atol=2e-4)


def test_unknown_labels_change_nothing_of_their_class_and_of_no_other() -> None:
    x, labels = drawn(40, 6, 3, 1)
    known = labels[:, 1] >= 0
    whole, part = probe.fit(x, labels), probe.fit(x[known], labels[known][:, 1:2])
    torch.testing.assert_close(whole.weight[1:2], part.weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.bias[1:2], part.bias, atol=1e-5, rtol=0)
    for other in (0, 1):  # what stands where a label is unknown does not matter
        bent = x.clone()
        bent[(labels < 0).all(1)] = other
        torch.testing.assert_close(probe.fit(bent, labels).weight, whole.weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("value", [1, 0, -1])
def test_a_class_of_one_sign_or_unknown_stays_at_zero(value: int) -> None:
    x, labels = drawn(30, 5, 3, 2)
    labels[:, 1] = value
    labels[::2, 1] = -1
    layer = probe.fit(x, labels)
    assert not layer.weight[1].any()
    assert layer.bias[1] == 0
    assert layer.weight[[0, 2]].any(1).all()
    assert (probe.scores(layer, x)[:, 1] == 0).all()
    labels[:] = value
    assert not probe.fit(x, labels).weight.any(), "no class to fit is no error"


def test_the_length_of_an_embedding_does_not_matter() -> None:
    x, labels = drawn(30, 5, 2, 3)
    a, b = probe.fit(x, labels), probe.fit(x * torch.linspace(0.1, 10, 30)[:, None], labels)
    torch.testing.assert_close(a.weight, b.weight, atol=1e-5, rtol=0)
    assert probe.prepare(x).norm(dim=1).numpy() == pytest.approx(5**0.5)
    assert not a.weight.requires_grad
    assert probe.scores(a, x).dtype == torch.float64
