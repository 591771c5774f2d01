"""Student's t: its quantiles, with SciPy or without, and the share of resamples beyond an end that they ask for."""

from __future__ import annotations

import functools
import math

import numpy as np

from .arrays import where


def widened_tail(groups: np.ndarray, level: float) -> np.ndarray:
    """Return the share of resamples of so many groups beyond each end of an interval of `level`; NaN below 2 groups.

    Source: Hesterberg 2015, the expanded percentile interval.
    """
    n, share = np.maximum(groups, 2).astype(np.float64), (1 - level) / 2
    try:
        from scipy.special import ndtr, stdtrit
    except ModuleNotFoundError:  # installed to predict alone: the same but for the last digits
        each = [plain_tail(int(k), share) for k in np.ravel(n)]
        return where(groups >= 2, np.reshape(each, n.shape))
    return where(groups >= 2, ndtr(np.sqrt(n / (n - 1)) * stdtrit(n - 1, share)))


def plain_tail(groups: int, share: float) -> float:
    """Return the widened tail of `share` for a number of groups, at least 2, without SciPy."""
    widened = math.sqrt(groups / (groups - 1)) * student_quantile(groups - 1, share)
    return math.erfc(widened / math.sqrt(2)) / 2


@functools.lru_cache(maxsize=4096)
def student_quantile(freedom: float, tail: float) -> float:
    """Return the value that Student's t with `freedom` degrees exceeds with probability `tail`, below one half.

    With t = sqrt(freedom) tan(a) its density is a power of cos(a), which Gauss and Legendre's rule integrates to the
    last digits; halving finds the end. As scipy.special.stdtrit, without 140 MB of SciPy where a model only predicts.
    """
    nodes, weights = _legendre()
    last = min(math.pi / 2, 40 / math.sqrt(freedom))

    def area(end: float) -> float:
        sines = np.sin(end * (nodes + 1) / 2)
        return float(end / 2 * (weights * np.exp((freedom - 1) / 2 * np.log1p(-(sines**2)))).sum())

    wanted, low, high = (1 - 2 * tail) * area(last), 0.0, last
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if area(middle) < wanted else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


@functools.cache
def _legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(100)
