"""The films of a run as a review shows them, and its errors: which are wrong, in which class and part, worst first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import InputError
from ..metrics.figures import decisions
from ..metrics.subgroups import OTHER, choose, split
from ..training.predictions import Saved

PARTS = {"out_of_fold": "out of fold", "holdout": "hold-out"}
FALSE_NEGATIVE, FALSE_POSITIVE = "false negative", "false positive"
KINDS = (FALSE_NEGATIVE, FALSE_POSITIVE)


@dataclass(frozen=True, kw_only=True)
class RunFilms:
    """The N films that a run was made of, with its probabilities as the report has them.

    images and sha256 (N,) texts; `groups` (N,) numbers from 1, a group the same number; `fold` (N,) with -1 for the
    hold-out; labels (N, C) 1, 0, -1 unknown; probs (N, C) calibrated, NaN where the run has none; limits (C,);
    `columns` are those that may be shown, by title, (N,) texts each. `notes` say what is left out.
    """

    classes: tuple[str, ...]
    images: np.ndarray
    sha256: np.ndarray
    groups: np.ndarray
    fold: np.ndarray
    labels: np.ndarray
    probs: np.ndarray
    limits: np.ndarray
    decided_by: str
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def part(self, row: int) -> str:
        """The key of PARTS that a film is in."""
        return "holdout" if self.fold[row] < 0 else "out_of_fold"

    def positives(self, row: int, without: int = -1) -> list[str]:
        """Names of the classes that a film is labelled with, one class left out."""
        return [name for c, name in enumerate(self.classes) if self.labels[row, c] == 1 and c != without]


@dataclass(frozen=True, kw_only=True)
class ErrorList:
    """The errors of one class, kind and part: `rows` those to show, worst first, of `total` among `of` films.

    `groups` is how many groups the `total` are of, `most` how many of them are of one group.
    """

    number: int
    kind: str
    part: str
    rows: tuple[int, ...]
    total: int
    of: int
    groups: int
    most: int


def describe_films(saved: Saved) -> RunFilms:
    """The films of a run from its predictions."""
    run, arrays, notes = saved.run, saved.arrays, []
    fold, labels = arrays["fold"], arrays["labels"]
    probs = np.full(labels.shape, np.nan, np.float32)
    for part, rows in (("out_of_fold", fold >= 0), ("holdout", fold == -1)):
        try:
            probs[rows] = saved.part(part).probs
        except InputError as error:
            notes.append(f"{PARTS[part]} films: {error}")
    groups = arrays["group"].astype(str).tolist()
    number = {name: place + 1 for place, name in enumerate(dict.fromkeys(groups))}
    named = {name: v.astype(str).tolist() for name, v in arrays.items() if name == "view" or name.startswith("meta:")}
    shown = choose(named, groups)
    return RunFilms(
        classes=tuple(run["classes"]),
        images=arrays["image"],
        sha256=arrays["sha256"],
        groups=np.array([number[name] for name in groups]),
        fold=fold,
        labels=labels,
        probs=probs,
        limits=np.array(run["thresholds"], np.float64),
        decided_by=saved.decided_by,
        columns={title: _frequent(values, np.array(groups)) for title, values in shown.columns.items()},
        notes=(*notes, *filter(None, [str(shown)])),
    )


def _frequent(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The values (N,) of a column, those of few groups as OTHER: a rare value could say who it is."""
    kept, _ = split(values, groups)
    return np.where(np.isin(values, list(kept)), values, OTHER)


def choose_classes(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Numbers of the named classes, of all where none is named. InputError for a name that the run has not."""
    folded = {name.casefold(): c for c, name in enumerate(classes)}
    for name in names:
        if name.casefold() not in folded:
            raise InputError(f"--class: this run has no {name!r}; its classes: {', '.join(classes)}.")
    return list(dict.fromkeys(folded[name.casefold()] for name in names)) or list(range(len(classes)))


def find_errors(films: RunFilms, numbers: Sequence[int], top: int) -> list[ErrorList]:
    """One list a class, part and kind, also where it is empty; `top` films in each at most.

    A false negative is worse the lower its probability, a false positive the higher. A film whose label is unknown is
    in none.
    """
    known = np.isfinite(films.probs)
    called = decisions(films.probs, films.limits) & known
    out = []
    for c in numbers:
        for part in PARTS:
            inside = (films.fold >= 0) == (part == "out_of_fold")
            for kind, label in zip(KINDS, (1, 0), strict=True):
                of = inside & (films.labels[:, c] == label) & known[:, c]
                wrong = np.flatnonzero(of & (called[:, c] != bool(label)))
                order = np.argsort(films.probs[wrong, c] * (1 if label else -1), kind="stable")
                count = Counter(films.groups[wrong].tolist())
                out.append(
                    ErrorList(
                        number=c,
                        kind=kind,
                        part=part,
                        rows=tuple(wrong[order][:top].tolist()),
                        total=len(wrong),
                        of=int(of.sum()),
                        groups=len(count),
                        most=max(count.values(), default=0),
                    )
                )
    return out


def largest_top(films: RunFilms, numbers: Sequence[int], top: int, most: int) -> int:
    """The largest number of films a list, 1 to `top`, with which all lists together hold `most` at most."""
    totals = np.array([each.total for each in find_errors(films, numbers, 0)])
    while top > 1 and int(np.minimum(totals, top).sum()) > most:
        top -= 1
    return top
