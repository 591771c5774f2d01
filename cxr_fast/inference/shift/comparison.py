"""Compare a table's answers with those for the hold-out: a record for NAME.run.json, and a line that sums it up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import chance
from .counts import AnswerCounts
from .reference import PLAIN, read_holdout, read_training_unlikeness

if TYPE_CHECKING:
    from ..predictor import Result

LEVEL = 0.01
FEW = 30  # independent films, of either side, below which nothing is compared
NAMED = 3  # classes that the line names
OVER = 0.01  # the share of the training films whose unlikeness is over 1, by its definition
TEST = (
    "shares of positive films: Fisher's exact test; histograms: Kolmogorov-Smirnov on the bins; all of them together "
    f"at level {LEVEL:g} by Holm's method; films of one group count as if all had the same answer"
)


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """One column of the table (first) and of the reference (second): films, independent films, films at or over the
    threshold, counts in bins (b,)."""

    films: tuple[float, float]
    effective: tuple[float, float]
    positives: tuple[float, float]
    counts: tuple[np.ndarray, np.ndarray]

    def test(self) -> tuple[float, float]:
        """Return p of the shares of positives, and p of the histograms."""
        share = chance.compare_proportions(self.positives, self.films, self.effective)
        return share, chance.compare_distributions(*self.counts, self.effective)[0]

    def describe(self, edges: np.ndarray, by_share: bool, of: str, positive: str) -> str:
        """`positive in 31 % (hold-out 12 %)`, or the shares of films above the edge where most differs."""
        place = chance.compare_distributions(*self.counts, self.effective)[1]
        if by_share or not place:
            here, there = (count / films for count, films in zip(self.positives, self.films, strict=True))
            return f"{positive} in {here:.1%} ({of} {there:.1%})"
        here, there = (counts[place:].sum() / counts.sum() for counts in self.counts)
        return f"at {edges[place - 1]:g} or more in {here:.1%} ({of} {there:.1%})"


class ShiftWatch:
    """Counts the answers of a table, and compares them with those for a model file's hold-out.

    Where the file puts out unlikeness, it is compared with that of the training films. `info` is the metadata of the
    file at `path`. Memory does not grow with the rows. Raises InputError where what it keeps of either is damaged.
    """

    def __init__(self, info: dict[str, Any], path: Path) -> None:
        self._labels: Sequence[str] = info["labels"]
        self._holdout, self._training = read_holdout(info, path), read_training_unlikeness(info, path)
        self._edges = [row.edges for row in self._holdout.classes] if self._holdout else [PLAIN] * len(self._labels)
        self._answers = AnswerCounts(np.array(info["thresholds"], np.float64), self._edges)
        above = np.nextafter(1.0, 2)  # over 1, not at it
        self._unlike = AnswerCounts(np.array([above]), [self._training.edges if self._training else PLAIN])

    def count(self, results: Iterable[Result]) -> Iterator[Result]:
        """Hand on each result of the table, and count it; one that was refused for its unlikeness has no answers."""
        for result in results:
            if result.probabilities is not None:
                self._answers.add(result.probabilities)
            if result.unlikeness is not None:
                self._unlike.add(np.array([result.unlikeness]))
            yield result

    def compare(self, groups: Iterable[str]) -> dict[str, Any]:
        """Return the record of all that was counted; `groups` names the group, else the study, of each film, "" where
        it is not known."""
        worth = self._worth(groups)
        few = self._too_few(worth)
        pairs = [] if few else self._class_pairs(worth)
        unlike = self._unlike_pair(worth)
        tests = [pair.test() for pair in [*pairs, *([unlike] if unlike else [])]]
        adjusted = chance.adjust_by_holm([p for test in tests for p in test])
        verdicts = [
            {"p_share": a, "p_histogram": b, "differs": min(a, b) < LEVEL}
            for a, b in zip(adjusted[::2], adjusted[1::2], strict=True)
        ]
        films = self._answers.films
        record: dict[str, Any] = {"line": few, "films": films, "effective_films": round(films * worth, 1)}
        if self._holdout is not None:
            own = {"films": self._holdout.films, "groups": self._holdout.groups}
            record["holdout"] = own | {"effective_films": round(self._holdout.effective, 1)}
        record |= {"test": TEST, "level": LEVEL} if tests else {}
        if pairs:
            record["line"] = self._line(pairs, verdicts)
        record["classes"] = self._rows(verdicts if pairs else [])
        if self._training is not None:
            record["unlikeness"] = self._unlike_row() | (verdicts[-1] if unlike else {})
        if unlike and verdicts[-1]["differs"]:
            by_share = verdicts[-1]["p_share"] <= verdicts[-1]["p_histogram"]
            edges = self._training.edges if self._training else PLAIN
            record["line"] += f"; unlikeness {unlike.describe(edges, by_share, 'training films', 'over 1')}"
        return record

    def _worth(self, groups: Iterable[str]) -> float:
        """How many independent films one film is worth, by the films a group of the manifest or of the hold-out has,
        whichever are more."""
        sizes = Counter(filter(None, groups)).values()
        worth = [chance.effective_number(sizes) / sum(sizes)] if sizes else []
        if self._holdout is not None and self._holdout.films:
            worth.append(self._holdout.effective / self._holdout.films)
        return min(worth, default=1.0)

    def _too_few(self, worth: float) -> str:
        """Say why answers are not compared; empty where they are."""
        if self._holdout is None:
            return "not compared with the hold-out: the model file keeps no summary of one for its thresholds"
        films = self._answers.films
        for start, count, number in (
            ("the hold-out has too few films to compare with", self._holdout.films, self._holdout.effective),
            ("too few films to compare with the hold-out", films, films * worth),
        ):
            if number < FEW:
                return f"{start}: {FEW} of different patients are needed; {_count_as(count, number)}"
        return ""

    def _class_pairs(self, worth: float) -> list[_Pair]:
        films, held = self._answers.films, self._holdout
        assert held is not None
        return [
            _Pair(
                films=(films, held.films),
                effective=(films * worth, held.effective),
                positives=(int(positives), row.positives),
                counts=(counts, row.counts),
            )
            for positives, counts, row in zip(self._answers.positives, self._answers.bins, held.classes, strict=True)
        ]

    def _unlike_pair(self, worth: float) -> _Pair | None:
        """The table's unlikeness and that of the training films; None where one is too few, or is not known."""
        films, own = self._unlike.films, self._training
        if own is None or films * worth < FEW or (effective := min(own.groups, own.films * worth)) < FEW:
            return None
        return _Pair(
            films=(films, own.films),
            effective=(films * worth, effective),
            positives=(int(self._unlike.positives[0]), OVER * own.films),
            counts=(self._unlike.bins[0], own.shares * own.films),
        )

    def _rows(self, verdicts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The record of each class: of the table, beside it of the hold-out, and the verdict where there is one."""
        films, rows = self._answers.films, []
        for c, name in enumerate(self._labels):
            positives = int(self._answers.positives[c])
            row: dict[str, Any] = {"class": name, "positives": positives, "share": _share(positives, films)}
            row |= {"edges": self._edges[c].tolist(), "counts": self._answers.bins[c].tolist()}
            if self._holdout is not None:
                own = self._holdout.classes[c]
                row["holdout_share"] = _share(own.positives, self._holdout.films)
                row["holdout_counts"] = own.counts.tolist()
            rows.append(row | (verdicts[c] if verdicts else {}))
        return rows

    def _unlike_row(self) -> dict[str, Any]:
        """The record of unlikeness: of the table, beside it of the training films."""
        assert self._training is not None
        films, over = self._unlike.films, int(self._unlike.positives[0])
        row: dict[str, Any] = {"films": films, "over_1": over, "share": _share(over, films), "training_share": OVER}
        row |= {"edges": self._training.edges.tolist(), "counts": self._unlike.bins[0].tolist()}
        return row | {"training_shares": [round(float(share), 2) for share in self._training.shares]}

    def _line(self, pairs: Sequence[_Pair], verdicts: Sequence[dict[str, Any]]) -> str:
        count = len(self._labels)
        differing = [c for c in range(count) if verdicts[c]["differs"]]
        here, there = pairs[0].films
        films = f"{here:,} films against {there:,}"
        if not differing:
            return f"no class differs from the hold-out by more than chance ({films})"
        differing.sort(key=lambda c: min(verdicts[c]["p_share"], verdicts[c]["p_histogram"]))
        named = []
        for c in differing[:NAMED]:
            by_share = verdicts[c]["p_share"] <= verdicts[c]["p_histogram"]
            named.append(f"{self._labels[c]} {pairs[c].describe(self._edges[c], by_share, 'hold-out', 'positive')}")
        more = len(differing) - NAMED
        shown = "; ".join(named) + (f"; and {more} more" if more > 0 else "")
        verb = "differs" if len(differing) == 1 else "differ"
        return f"{len(differing)} of {count} classes {verb} from the hold-out by more than chance ({films}): {shown}"


def _count_as(films: int, number: float) -> str:
    """How many films there are and, where several may be of one patient, as how many they count."""
    there, counted = "there is" if films == 1 else "there are", f"{number:,.0f}"
    less = "" if counted == f"{films:,}" else f", which count as {counted} because several may be of one patient"
    return f"{there} {films:,}{less}"


def _share(count: int, films: int) -> float | None:
    return count / films if films else None
