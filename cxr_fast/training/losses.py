"""The training losses over known labels, and the class weights in front of them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from ..config import TrainSpec

# Of `focal+jaccard`: 0.7 focal, 0.3 soft Jaccard.
JACCARD_SHARE = 0.3
# Added above and below in the soft Jaccard, so that an image without a finding pushes its probabilities down too.
SMOOTH = 1.0


def class_weights(labels: np.ndarray, spec: TrainSpec) -> np.ndarray | None:
    """Weight of each class, (C,) float32 with mean 1, from training labels (N, C); None for equal weights.

    One over the share of positives among known labels, or its square root; a class without a positive counts as
    having one.
    """
    if spec.class_weights == "none":
        return None
    share = np.maximum((labels == 1).sum(axis=0), 1) / np.maximum((labels >= 0).sum(axis=0), 1)
    weights = share ** (-1.0 if spec.class_weights == "inverse" else -0.5)
    return np.asarray(weights / weights.mean(), np.float32)


def losses(
    logits: torch.Tensor, labels: torch.Tensor, spec: TrainSpec, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Loss over known labels, () for `logits` (B, C) or (K,) for (K, B, C); `labels` with 1, 0, -1 unknown.

    Focal loss of Lin et al. 2017, eq. 5: alpha_t (1 - p_t)^gamma times cross entropy, alpha for positives; the mean
    over known entries. `weights` (C,) multiply a class's entries. An all-unknown batch costs 0.
    """
    known = labels >= 0
    target = (labels > 0).to(logits.dtype)
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if spec.loss != "bce":
        # log(1 - p_t) straight from the logit: 1 - p_t rounds to 0 above logit 17, and 0 ** 0.5 has no gradient.
        log_miss = F.logsigmoid(torch.where(labels > 0, -logits, logits))
        alpha = spec.focal_alpha * target + (1 - spec.focal_alpha) * (1 - target)
        each = alpha * torch.exp(spec.focal_gamma * log_miss) * each
    if weights is not None:
        each = each * weights
    loss = (each * known).sum((-2, -1)) / known.sum((-2, -1)).clamp(min=1)
    if spec.loss == "focal+jaccard":
        loss = (1 - JACCARD_SHARE) * loss + JACCARD_SHARE * soft_jaccard(logits, labels)
    return loss


def soft_jaccard(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """1 - (sum p y + 1) / (sum p + sum y - sum p y + 1) over an image's known classes, mean over images that have
    any; () for (B, C), (K,) for (K, B, C). Source: the Jaccard index with probabilities for memberships."""
    known = labels >= 0
    p, y = torch.sigmoid(logits) * known, (labels > 0).to(logits.dtype)
    both = (p * y).sum(-1)
    ratio = (both + SMOOTH) / (p.sum(-1) + y.sum(-1) - both + SMOOTH)
    has_label = known.any(-1)
    return ((1 - ratio) * has_label).sum(-1) / has_label.sum(-1).clamp(min=1)
