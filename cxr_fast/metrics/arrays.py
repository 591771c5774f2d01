"""Check labels and scores, and divide and average with NaN where nothing is defined."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import InputError


def checked(labels: np.ndarray, scores: np.ndarray, *, probabilities: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return both as arrays (N, C), labels int8. Raises InputError on other shapes, other labels, NaN, and with
    `probabilities` on scores outside 0..1."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.ndim != 2 or labels.shape != scores.shape or not len(labels):
        raise InputError(f"labels {labels.shape} and scores {scores.shape} must share one (images, classes) shape.")
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype(np.float64)
    small = labels.astype(np.int8)
    if wrong := int(((small != labels) | (small < -1) | (small > 1)).sum()):
        raise InputError(f"{wrong} of {labels.size} labels are not 1, 0 or -1 (unknown).")
    if missing := int(np.isnan(scores).sum()):
        raise InputError(f"{missing} of {scores.size} scores are NaN: the model diverged or the input is damaged.")
    if probabilities and (outside := int(((scores < 0) | (scores > 1)).sum())):
        raise InputError(f"{outside} of {scores.size} probabilities are outside 0..1: logits were passed?")
    return small, scores


def number_groups(groups: Sequence[str], images: int) -> np.ndarray:
    """Number the groups of N images from 0, (N,). Raises InputError unless there are `images` names."""
    if len(groups) != images:
        raise InputError(f"{len(groups)} group names for {images} images.")
    return np.unique(np.asarray(list(groups), dtype=str), return_inverse=True)[1].reshape(-1)


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide part by whole, NaN where whole is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64))
    out = np.full(part.shape, np.nan)
    np.divide(part, whole, out=out, where=whole != 0)
    return out


def where(defined: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Keep the values that are defined, NaN instead of the others."""
    return np.where(defined, values, np.nan)
