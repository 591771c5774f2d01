"""Compare a table's answers with those for the hold-out: a record for NAME.run.json, and a line that sums it up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import chance
from .counts import AnswerCounts
from .reference import PLAIN, HoldoutClass, HoldoutSummary, read_holdout

if TYPE_CHECKING:
    from ..predictor import Result

LEVEL = 0.01
FEW = 30  # independent films, of either side, below which nothing is compared
NAMED = 3  # classes that the line names
TEST = (
    "shares of positive films: Fisher's exact test; histograms: Kolmogorov-Smirnov on the bins; all of them together "
    f"at level {LEVEL:g} by Holm's method; films of one group count as if all had the same answer"
)


class ShiftWatch:
    """Counts the answers of a table, and compares them with a model file's hold-out.

    `info` is the metadata of the file at `path`. Memory does not grow with the rows. Raises InputError where the
    file's summary of its hold-out is damaged.
    """

    def __init__(self, info: dict[str, Any], path: Path) -> None:
        self.labels: Sequence[str] = info["labels"]
        self.holdout: HoldoutSummary | None = read_holdout(info, path)
        classes = self.holdout.classes if self.holdout else ()
        edges = [row.edges for row in classes] or [PLAIN] * len(self.labels)
        self._edges = edges
        self._counts = AnswerCounts(np.array(info["thresholds"], np.float64), edges)

    def count(self, results: Iterable[Result]) -> Iterator[Result]:
        """Hand on each result of the table, and count it."""
        return self._counts.count(results)

    def compare(self, groups: Iterable[str]) -> dict[str, Any]:
        """Return the record of all that was counted; `groups` names the group, else the study, of each film, "" where
        it is not known."""
        effective = self._effective(groups)
        few = self._too_few(effective)
        tests = [] if few or self.holdout is None else self._tests(self.holdout, effective)
        adjusted = chance.adjust_by_holm([p for pair in tests for p, _ in pair])
        rows = [self._row(c, adjusted[2 * c : 2 * c + 2]) for c in range(len(self.labels))]
        record: dict[str, Any] = {"line": few, "films": self._counts.films, "effective_films": round(effective, 1)}
        if self.holdout is not None:
            own = {"films": self.holdout.films, "groups": self.holdout.groups}
            record["holdout"] = own | {"effective_films": round(self.holdout.effective, 1)}
            record |= {"test": TEST, "level": LEVEL}
        if tests:
            record["line"] = self._line(rows, [place for _, (_, place) in tests])
        return record | {"classes": rows}

    def _effective(self, groups: Iterable[str]) -> float:
        """How many independent films were counted, with as many films a group as the manifest or the hold-out has,
        whichever is more."""
        sizes = Counter(filter(None, groups)).values()
        worth = [chance.effective_number(sizes) / sum(sizes)] if sizes else []
        if self.holdout is not None and self.holdout.films:
            worth.append(self.holdout.effective / self.holdout.films)
        return self._counts.films * min(worth, default=1.0)

    def _too_few(self, effective: float) -> str:
        """Say why nothing is compared; empty where something is."""
        if self.holdout is None:
            return "not compared with the hold-out: the model file keeps no summary of one"
        for start, films, number in (
            ("too few films in the hold-out to compare with", self.holdout.films, self.holdout.effective),
            ("too few films to tell whether they differ from the hold-out", self._counts.films, effective),
        ):
            if number < FEW:
                return f"{start}: {films:,}, worth {number:.0f} of different patients; {FEW} are needed"
        return ""

    def _tests(self, holdout: HoldoutSummary, effective: float) -> list[tuple[tuple[float, int], tuple[float, int]]]:
        """Of each class (p, 0) of the shares of positives, and p and the bin of the histograms."""
        films, sizes = (self._counts.films, holdout.films), (effective, holdout.effective)
        out = []
        for row, positives, counts in zip(
            holdout.classes, self._counts.positives.tolist(), self._counts.bins, strict=True
        ):
            share = chance.compare_proportions((positives, row.positives), films, sizes)
            out.append(((share, 0), chance.compare_distributions(counts, row.counts, sizes)))
        return out

    def _row(self, c: int, adjusted: Sequence[float]) -> dict[str, Any]:
        """The record of one class: of the table, beside it of the hold-out, and adjusted p values."""
        films, positives = self._counts.films, int(self._counts.positives[c])
        row: dict[str, Any] = {
            "class": self.labels[c],
            "positives": positives,
            "share": _share(positives, films),
            "edges": self._edges[c].tolist(),
            "counts": self._counts.bins[c].tolist(),
        }
        if self.holdout is not None:
            own = self.holdout.classes[c]
            row["holdout_share"] = _share(own.positives, self.holdout.films)
            row["holdout_counts"] = own.counts.tolist()
        if adjusted:
            row |= {"p_share": adjusted[0], "p_histogram": adjusted[1], "differs": min(adjusted) < LEVEL}
        return row

    def _line(self, rows: Sequence[dict[str, Any]], places: Sequence[int]) -> str:
        assert self.holdout is not None
        differing = [c for c, row in enumerate(rows) if row["differs"]]
        films = f"{self._counts.films:,} films against {self.holdout.films:,}"
        if not differing:
            return f"no class differs from the hold-out by more than chance ({films})"
        differing.sort(key=lambda c: min(rows[c]["p_share"], rows[c]["p_histogram"]))
        shown = "; ".join(_describe(rows[c], self.holdout.classes[c], places[c]) for c in differing[:NAMED])
        more = len(differing) - NAMED
        shown += f"; and {more} more" if more > 0 else ""
        verb = "differs" if len(differing) == 1 else "differ"
        return (
            f"{len(differing)} of {len(rows)} classes {verb} from the hold-out by more than chance ({films}): {shown}"
        )


def _describe(row: dict[str, Any], own: HoldoutClass, place: int) -> str:
    """`Effusion positive in 31 % (hold-out 12 %)`, or the share of films above the edge where most differs."""
    if row["p_share"] <= row["p_histogram"]:
        return f"{row['class']} positive in {row['share']:.1%} (hold-out {row['holdout_share']:.1%})"
    here, there = (sum(counts[place:]) / max(sum(counts), 1) for counts in (row["counts"], own.counts.tolist()))
    return f"{row['class']} at {own.edges[place - 1]:g} or more in {here:.1%} (hold-out {there:.1%})"


def _share(count: int, films: int) -> float | None:
    return count / films if films else None
