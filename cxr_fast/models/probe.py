"""A linear probe: one logistic regression a class on frozen embeddings, all classes at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Of sklearn's LogisticRegression: the penalty is |w|^2 / 2 against STRENGTH times the sum of the losses.
# Of 0.01 to 10 the best in macro AUC and mAP on folds of real films, by a little (benchmarks/LOG.md, 2026-11-28).
STRENGTH = 0.3
STEPS = 2000  # a bound; far fewer reach the tolerance


def fit(embeddings: torch.Tensor, labels: torch.Tensor, *, strength: float = STRENGTH) -> torch.nn.Linear:
    """Fit (n, E) embeddings to labels (n, C) with 1, 0, -1 unknown; logits of new embeddings come from `scores`.

    Each class minimises |w|^2 / 2 + strength times its summed cross entropy over known labels, the bias free of
    penalty, on embeddings of length sqrt(E). A class that is not known with both signs stays at 0.
    Computed in float64 by L-BFGS to convergence, on the tensors' device.
    """
    x, both = prepare(embeddings).double(), (labels == 1).any(0) & (labels == 0).any(0)
    known, target = (labels >= 0) & both, (labels > 0).double()
    # What embeddings have in common goes into the bias, which is free: the same answer in a fraction of the steps.
    mean = x.mean(0)
    x = x - mean
    layer = torch.nn.Linear(x.shape[1], labels.shape[1], device=x.device, dtype=torch.float64)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(
        layer.parameters(), max_iter=STEPS, tolerance_grad=1e-6, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        each = F.binary_cross_entropy_with_logits(layer(x), target, reduction="none") * known
        total: torch.Tensor = (layer.weight**2).sum() / 2 + strength * each.sum()
        total.backward()
        return total

    optimizer.step(loss)
    with torch.no_grad():
        layer.bias -= layer.weight @ mean
    return layer.requires_grad_(False)


def scores(layer: torch.nn.Linear, embeddings: torch.Tensor) -> torch.Tensor:
    """Logits (n, C) float64 of embeddings (n, E)."""
    found: torch.Tensor = layer(prepare(embeddings).double())
    return found


def prepare(embeddings: torch.Tensor) -> torch.Tensor:
    """Embeddings (n, E) at length sqrt(E), so that a feature is of the order of one whatever the tower."""
    return F.normalize(embeddings.float(), dim=-1) * embeddings.shape[-1] ** 0.5
