"""Test whether two sets of films differ by more than chance: proportions, distributions, many tests at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np


def effective_number(sizes: Iterable[int]) -> float:
    """Return how many independent films groups of these sizes (films of each patient) are worth at least.

    (sum m)^2 / sum m^2, as if all films of a group gave the same answer; 0 without films.
    Source: Kish, Survey Sampling, 1965, with a correlation of 1 inside each group.
    """
    sizes = list(sizes)
    squares = sum(size * size for size in sizes)
    return sum(sizes) ** 2 / squares if squares else 0.0


def compare_proportions(counts: Sequence[float], films: Sequence[float], effective: Sequence[float]) -> float:
    """Return the two-sided p of Fisher's exact test for `counts` of `films` of two sets, as if these were `effective`.

    Fractions of a film are rounded so that the two proportions move towards each other: p is never too small by it.
    """
    sizes = [math.floor(number) for number in effective]
    scaled = [count / max(film, 1) * size for count, film, size in zip(counts, films, sizes, strict=True)]
    low = 0 if scaled[0] * sizes[1] <= scaled[1] * sizes[0] else 1
    tiny = 1e-9  # of a division that should be whole
    whole = [math.ceil(x - tiny) if side == low else math.floor(x + tiny) for side, x in enumerate(scaled)]
    if whole[low] * sizes[1 - low] >= whole[1 - low] * sizes[low]:  # they met, or crossed
        return 1.0
    return fisher_exact((whole[0], sizes[0]), (whole[1], sizes[1]))


def fisher_exact(one: tuple[int, int], other: tuple[int, int]) -> float:
    """Return the two-sided p for (positive, all) of two sets: the sum of all tables no likelier than the one found.

    Equals scipy.stats.fisher_exact, which prediction must do without.
    """
    (k, n), (j, m) = one, other
    if n > m:
        k, n, j, m = j, m, k, n
    total = k + j
    least, most = max(0, total - m), min(total, n)
    x = np.arange(least, most, dtype=np.float64)
    steps = np.log((total - x) * (n - x)) - np.log((x + 1) * (m - total + x + 1))  # log of P(x + 1) / P(x)
    logs = np.concatenate([[0.0], np.cumsum(steps)])
    shares = np.exp(logs - logs.max())
    return float(min(1.0, shares[shares <= shares[k - least] * (1 + 1e-7)].sum() / shares.sum()))


def compare_distributions(one: np.ndarray, other: np.ndarray, effective: Sequence[float]) -> tuple[float, int]:
    """Return the p of the two-sample Kolmogorov-Smirnov test for counts in the same bins, (b,) each, and the bin behind
    whose lower edge the shares differ most (1 to b - 1; 0 where nothing differs).

    Binning can only hide a difference, and the limiting distribution is used as it is: p is too large rather than too
    small. Source: Smirnov 1948; Conover, Practical Nonparametric Statistics, on discrete distributions.
    """
    apart = np.abs(np.cumsum(one) / max(one.sum(), 1) - np.cumsum(other) / max(other.sum(), 1))[:-1]
    if not len(apart) or not apart.max() > 0:
        return 1.0, 0
    place = int(apart.argmax())
    a, b = effective
    return kolmogorov_tail(math.sqrt(a * b / (a + b)) * float(apart[place])), place + 1


def kolmogorov_tail(x: float) -> float:
    """Return P(K > x) of Kolmogorov's distribution: 2 sum (-1)^(j-1) exp(-2 j^2 x^2)."""
    if x < 0.2:  # the sum converges slowly, and differs from 1 by less than 1e-12
        return 1.0
    terms = [(-1) ** (j - 1) * math.exp(-2 * j * j * x * x) for j in range(1, 101)]
    return min(1.0, max(0.0, 2 * math.fsum(terms)))


def adjust_by_holm(values: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number: at most `level` of them wrong by chance, whatever their dependence.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    out = [0.0] * len(values)
    most = 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        most = max(most, min(1.0, (len(values) - rank) * values[place]))
        out[place] = most
    return out
