"""The training losses over known labels, and what they take from the training labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ...config import TrainSpec
from ...data.labels import SOFT, UNCERTAIN, UNKNOWN
from ...metrics.calibration import prior_log_odds

# Of `focal+jaccard`: 0.7 focal, 0.3 soft Jaccard.
JACCARD_SHARE = 0.3
# Added above and below in the soft Jaccard, so that an image without a finding pushes its probabilities down too.
SMOOTH = 1.0


@dataclass(frozen=True, kw_only=True)
class ClassTerms:
    """What a loss takes from the training labels: a tensor (C,) each, or (K, 1, C) of K folds; None where unused.

    `weights` multiply a class's entries. `prior` is added to its logits. `margin` is taken from the logit of a
    positive. `soft` says whether any label is uncertain, so that its loss is a mixture.
    """

    weights: torch.Tensor | None = None
    prior: torch.Tensor | None = None
    margin: torch.Tensor | None = None
    soft: bool = False

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> ClassTerms:
        """The same terms with each tensor changed."""
        each = (self.weights, self.prior, self.margin)
        weights, prior, margin = (None if t is None else change(t) for t in each)
        return ClassTerms(weights=weights, prior=prior, margin=margin, soft=self.soft)

    @staticmethod
    def stack(terms: Sequence[ClassTerms]) -> ClassTerms:
        """The terms of K folds of one spec, (K, 1, C) each."""

        def joined(name: str) -> torch.Tensor | None:
            own = [getattr(each, name) for each in terms]
            return None if own[0] is None else torch.stack(own)[:, None]

        soft = any(each.soft for each in terms)
        return ClassTerms(weights=joined("weights"), prior=joined("prior"), margin=joined("margin"), soft=soft)


NO_TERMS = ClassTerms()


def class_terms(labels: np.ndarray, spec: TrainSpec) -> ClassTerms:
    """What the spec's loss takes from training labels (N, C), on the CPU."""
    found = (class_weights(labels, spec), class_priors(labels, spec), class_margins(labels, spec))
    weights, prior, margin = (None if values is None else torch.from_numpy(values) for values in found)
    soft = bool((labels == UNCERTAIN).any())
    return ClassTerms(weights=weights, prior=prior, margin=margin, soft=soft)


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


def class_priors(labels: np.ndarray, spec: TrainSpec) -> np.ndarray | None:
    """What `logit_adjustment` adds to the logits in the loss, (C,) float32 from training labels (N, C), or None.

    Source: Menon et al., Long-tail learning via logit adjustment, 2021, eq. 10, with the odds of each class by itself.
    """
    if not spec.logit_adjustment:
        return None
    return np.asarray(spec.logit_adjustment * prior_log_odds(labels), np.float32)


def class_margins(labels: np.ndarray, spec: TrainSpec) -> np.ndarray | None:
    """Margin of each class in logits, (C,) float32 from training labels (N, C): `ldam_margin` for the rarest, less by
    the fourth root of how many more positives another has. None for other losses.

    Source: Cao et al., Learning imbalanced datasets with label-distribution-aware margin loss, 2019, eq. 11.
    """
    if spec.loss != "ldam":
        return None
    positives = np.maximum((labels == 1).sum(axis=0), 1)
    return np.asarray(spec.ldam_margin * (positives.min() / positives) ** 0.25, np.float32)


def losses(logits: torch.Tensor, labels: torch.Tensor, spec: TrainSpec, terms: ClassTerms = NO_TERMS) -> torch.Tensor:
    """Loss over known labels, () for `logits` (B, C) or (K,) for (K, B, C); `labels` with 1, 0,
    UNKNOWN and, where `terms.soft` says so, UNCERTAIN.

    The mean over known entries of `entry_losses`, weighted by class. With label smoothing s an entry costs 1 - s / 2
    of its own label's loss and s / 2 of the other's, which for cross entropy is smoothing of its target. An uncertain
    entry costs SOFT of a positive's loss and the rest of a negative's; the soft Jaccard leaves it out. An all-unknown
    batch costs 0.
    """
    known, positive = labels != UNKNOWN, labels > 0
    if terms.prior is not None:
        logits = logits + terms.prior
    if terms.soft:
        positive = positive | (labels == UNCERTAIN)
    each = entry_losses(logits, positive, spec, terms.margin)
    if terms.soft or spec.label_smoothing:
        other = entry_losses(logits, ~positive, spec, terms.margin)
        each = torch.lerp(each, other, other_share(labels, spec, terms))
    if terms.weights is not None:
        each = each * terms.weights
    loss = (each * known).sum((-2, -1)) / known.sum((-2, -1)).clamp(min=1)
    if spec.loss == "focal+jaccard":
        loss = (1 - JACCARD_SHARE) * loss + JACCARD_SHARE * soft_jaccard(logits, labels)
    return loss


def other_share(labels: torch.Tensor, spec: TrainSpec, terms: ClassTerms) -> torch.Tensor | float:
    """The share of the opposite label's loss in an entry's: s / 2 with label smoothing s, and of an uncertain label,
    which counts as positive otherwise, 1 - SOFT smoothed alike."""
    half = spec.label_smoothing / 2
    if not terms.soft:
        return half
    soft = (1 - SOFT) * (1 - spec.label_smoothing) + half
    return torch.where(labels == UNCERTAIN, soft, half)


def entry_losses(
    logits: torch.Tensor, positive: torch.Tensor, spec: TrainSpec, margin: torch.Tensor | None = None
) -> torch.Tensor:
    """The loss of each entry, in the shape of `logits`; `positive` is bool of that shape, `margin` (C,) is LDAM's.

    Focal loss of Lin et al. 2017, eq. 5: alpha_t (1 - p_t)^gamma times cross entropy, alpha for positives. Asymmetric
    loss: see `asymmetric`. LDAM: cross entropy of a logit that is smaller by the margin where the label is positive.
    """
    if spec.loss == "asl":
        return asymmetric(logits, positive, spec)
    target = positive.to(logits.dtype)
    if margin is not None:
        logits = logits - target * margin
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if spec.loss in ("focal", "focal+jaccard"):
        # log(1 - p_t) straight from the logit: 1 - p_t rounds to 0 above logit 17, and 0 ** 0.5 has no gradient.
        log_miss = F.logsigmoid(torch.where(positive, -logits, logits))
        alpha = spec.focal_alpha * target + (1 - spec.focal_alpha) * (1 - target)
        each = alpha * torch.exp(spec.focal_gamma * log_miss) * each
    return each


def asymmetric(logits: torch.Tensor, positive: torch.Tensor, spec: TrainSpec) -> torch.Tensor:
    """Asymmetric loss of each entry. A positive: -(1 - p)^gamma+ log p. A negative, with m = max(p - clip, 0):
    -m^gamma- log(1 - m).

    Source: Ridnik et al., Asymmetric loss for multi-label classification, 2021, eq. 4 to 7.
    """
    yes = torch.exp(spec.asl_gamma_pos * F.logsigmoid(-logits)) * -F.logsigmoid(logits)
    if spec.asl_clip:
        missed = (torch.sigmoid(logits) - spec.asl_clip).clamp(min=0)
        no = missed**spec.asl_gamma_neg * -torch.log1p(-missed)
    else:
        no = torch.exp(spec.asl_gamma_neg * F.logsigmoid(logits)) * -F.logsigmoid(-logits)
    return torch.where(positive, yes, no)


def soft_jaccard(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """1 - (sum p y + 1) / (sum p + sum y - sum p y + 1) over an image's known classes, mean over images that have
    any; () for (B, C), (K,) for (K, B, C). Source: the Jaccard index with probabilities for memberships."""
    known = labels >= 0
    p, y = torch.sigmoid(logits) * known, (labels > 0).to(logits.dtype)
    both = (p * y).sum(-1)
    ratio = (both + SMOOTH) / (p.sum(-1) + y.sum(-1) - both + SMOOTH)
    has_label = known.any(-1)
    return ((1 - ratio) * has_label).sum(-1) / has_label.sum(-1).clamp(min=1)
