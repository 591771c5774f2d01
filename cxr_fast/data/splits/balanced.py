"""A fair draw: the share of every class in a part, in images and in groups, is near the share of that part.

Groups are placed one by one, the large and rare ones first, where the part is furthest from its share. Then single
groups move, and pairs change places, while that lowers the cost: the squared deviation of every share from what was
asked, over the share asked. A class of two or more groups that lies in one part alone costs more than any deviation.
Of several starts the best is kept. Values are compared rounded, so that the order of sums changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .given import FREE, HOLDOUT

# Weights of a class's images, of its groups, and of the sizes of parts beside all classes. On 550 films of 129 patients
# and 20 seeds (LOG, 2026-11-29) films are 0.045 from their share, groups 0.058. With SIZES at 1, classes of one group
# each all went to the folds: a hold-out of 1 unit in 30.
IMAGES, GROUPS, SIZES = 1.0, 0.5, 5.0
ALONE = 10.0  # cost of a class that lies in one part, although it has more groups
STARTS, UNITS_A_START = 6, 8000  # at most so many starts; one more for each time that the units go into this
CANDIDATES = 48  # groups of either part whose exchange is tried
DIGITS, BETTER = 10, 1e-9


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitCounts:
    """What is shared out: a row per unit (G, 2C + 2): positive images per class, whether there are any, images, 1."""

    values: np.ndarray
    classes: int

    def select_rows(self, rows: np.ndarray) -> UnitCounts:
        """The given units."""
        return UnitCounts(values=self.values[rows], classes=self.classes)


def count(labels: np.ndarray, unit: np.ndarray) -> UnitCounts:
    """Count the positive images per class of each unit; labels (N, C), unit (N,) the number of each image's unit."""
    units = int(unit.max()) + 1
    positive = np.zeros((units, labels.shape[1]))
    np.add.at(positive, unit, labels == 1)
    images = np.bincount(unit, minlength=units)[:, None]
    return UnitCounts(values=np.hstack([positive, positive > 0, images, np.ones((units, 1))]), classes=labels.shape[1])


def assign(counts: UnitCounts, given: np.ndarray, folds: int, holdout: float, seed: int) -> np.ndarray:
    """The part of each unit (G,): -1 for the hold-out, else 0..K-1; the hold-out is drawn first, then the folds.

    `given` (G,) holds what is decided: -1, a fold, -2 any fold, -3 nothing. Nothing is drawn into a hold-out that has
    `holdout` of the units already.
    """
    units = len(given)
    place = np.where(given == HOLDOUT, HOLDOUT, 0)
    held = int((given == HOLDOUT).sum())
    if holdout and held < max(1, round(holdout * units)):
        fixed = np.where(given == HOLDOUT, 0, np.where(given == FREE, -1, 1))
        in_folds = given[given >= 0]
        least = np.array([1, len(in_folds) + folds - len(np.unique(in_folds))])  # each fold will want a unit
        draw = _draw(counts, fixed, np.array([holdout, 1 - holdout]), least, seed)
        place = np.where(draw == 0, HOLDOUT, 0)
    rest = np.flatnonzero(place != HOLDOUT)
    fixed = np.where(given[rest] >= 0, given[rest], -1)
    place[rest] = _draw(counts.select_rows(rest), fixed, np.full(folds, 1 / folds), np.ones(folds, int), seed)
    return place


def _draw(counts: UnitCounts, fixed: np.ndarray, shares: np.ndarray, least: np.ndarray, seed: int) -> np.ndarray:
    """Parts (G,) numbered as `shares` (P,) and of at least `least` (P,) units; `fixed` (G,) has the part of a unit that
    stays, or -1."""
    best, lowest = fixed, float("inf")
    if len(shares) == 1 or (fixed >= 0).all():
        return np.maximum(fixed, 0)
    for start in range(int(np.clip(UNITS_A_START // len(fixed), 1, STARTS))):
        draw = Draw(counts, fixed, shares, least)
        draw.place_greedily(np.random.RandomState([seed, start]))
        draw.fill()
        draw.descend()
        if draw.cost(draw.sums) < lowest - BETTER:
            best, lowest = draw.place, draw.cost(draw.sums)
    return best


class Draw:
    """One start: `place` (G,) the part of each unit, `sums` (P, 2C + 2) what each part has."""

    def __init__(self, counts: UnitCounts, fixed: np.ndarray, shares: np.ndarray, least: np.ndarray) -> None:
        self.values, self.shares, self.least = counts.values, shares[:, None], least
        self.free, self.place = fixed < 0, fixed.copy()
        total, classes = self.values.sum(axis=0), counts.classes
        self.groups = slice(classes, 2 * classes)
        kind = np.repeat([IMAGES, GROUPS, SIZES * max(classes, 1)], [classes, classes, 2])
        self.weights = np.where(total > 0, kind / np.maximum(total, 1) ** 2, 0.0)
        self.wanted = self.shares * total
        self.own = self.values**2 @ self.weights
        self.several = total[self.groups] > 1
        self.sums = np.stack([self.values[fixed == part].sum(axis=0) for part in range(len(shares))])

    def place_greedily(self, random: np.random.RandomState) -> None:
        """Place the free units, the large and rare ones first, each where its part lacks most of what it has."""
        rows = np.flatnonzero(self.free)
        order = rows[np.argsort(-self.own[rows] * (0.5 + random.random_sample(len(rows))), kind="stable")]
        lack, shares = self.sums - self.wanted, self.shares[:, 0]
        for row in order.tolist():
            value = self.values[row]
            costs = (2 * (lack @ (value * self.weights)) + self.own[row]) / shares
            part = int(np.argmin(np.round(costs, DIGITS)))
            self.place[row] = part
            lack[part] += value
        self.sums = lack + self.wanted
        self.sums = np.round(self.sums)

    def fill(self) -> None:
        """Give each part that has too few units those of the part that has most to spare."""
        while (spare := self.sums[:, -1] - self.least).min() < 0:
            rows = np.flatnonzero(self.free & (spare[self.place] > 0))
            self.move(int(rows[np.argmax(spare[self.place[rows]])]), int(np.argmin(spare)))

    def cost(self, sums: np.ndarray) -> float:
        """The weighted squared deviations over the shares asked, and ALONE for each class in one part only."""
        alone = self.several & ((sums[:, self.groups] > 0).sum(axis=0) == 1)
        deviation = (sums - self.wanted) ** 2 * self.weights / self.shares
        return float(deviation.sum() + ALONE * alone.sum())

    def move(self, row: int, part: int) -> None:
        """Move a unit to another part."""
        self.sums[self.place[row]] -= self.values[row]
        self.sums[part] += self.values[row]
        self.place[row] = part

    def descend(self) -> None:
        """Move single units, else exchange two, while that lowers the cost."""
        while True:
            changes = self.changes()
            row, part = divmod(int(np.argmin(changes)), len(self.shares))
            if changes[row, part] < -BETTER:
                self.move(row, part)
            elif not self._exchange(changes):
                return

    def changes(self) -> np.ndarray:
        """What the cost changes by where a unit moves to a part, (G, P); infinite for what may not move there."""
        rows, here = np.arange(len(self.place)), self.place
        pull = self.values @ (self.weights * (self.sums - self.wanted) / self.shares).T
        weight = 1 / self.shares[:, 0]
        out = 2 * (pull - pull[rows, here][:, None]) + self.own[:, None] * (weight + weight[here][:, None])
        groups = self.sums[:, self.groups]
        parts = (groups > 0).sum(axis=0)
        after = parts - (groups == 1)[:, None, :] + (groups == 0)[None]  # from a part, to a part, for a class
        alone = ALONE * ((after == 1) * 1.0 - (parts == 1)) * self.several
        if len(changed := np.flatnonzero(alone.any(axis=(0, 1)))):
            has = self.values[:, self.groups][:, changed]
            out += np.einsum("gc,gqc->gq", has, alone[here][:, :, changed])
        out[rows, here] = np.inf
        out[~self.free | (self.sums[here, -1] <= self.least[here])] = np.inf
        return np.asarray(np.round(out, DIGITS))

    def _exchange(self, changes: np.ndarray) -> bool:
        """Exchange the two units of different parts that lower the cost most; False where none do."""
        lowest, best = self.cost(self.sums) - BETTER, None
        for one in range(len(self.shares)):
            for other in range(one + 1, len(self.shares)):
                for row, partner in self._pairs(changes, one, other):
                    sums = self.sums.copy()
                    difference = self.values[row] - self.values[partner]
                    sums[one] -= difference
                    sums[other] += difference
                    if (cost := self.cost(sums)) < lowest:
                        lowest, best = cost - BETTER, (row, other, partner, one)
        if best is None:
            return False
        row, other, partner, one = best
        self.move(row, other)
        self.move(partner, one)
        return True

    def _pairs(self, changes: np.ndarray, one: int, other: int) -> list[tuple[int, int]]:
        """The three exchanges between two parts that promise most."""
        rows, partners = (
            found[np.argsort(changes[found, to], kind="stable")[:CANDIDATES]]
            for found, to in (
                (np.flatnonzero((self.place == here) & np.isfinite(changes[:, to])), to)
                for here, to in ((one, other), (other, one))
            )
        )
        if not len(rows) or not len(partners):
            return []
        alike = (self.values[rows] * self.weights) @ self.values[partners].T
        weight = 1 / self.shares[one, 0] + 1 / self.shares[other, 0]
        found = np.round(changes[rows, other][:, None] + changes[partners, one] - 2 * weight * alike, DIGITS)
        order = np.argsort(found, axis=None, kind="stable")[:3]
        pairs = zip(*np.unravel_index(order, found.shape), strict=True)
        return [(int(rows[a]), int(partners[b])) for a, b in pairs if found[a, b] < -BETTER]
