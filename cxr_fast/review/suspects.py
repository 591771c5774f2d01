"""Find labels that are likely wrong: those that out-of-fold probability and nearest films speak against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..activations.cache import Cache, open_cache
from ..metrics import calibration
from ..metrics.arrays import number_groups
from ..system.files import AnyPath, write_csv
from ..training import predictions
from ..training.predictions import Saved
from ..training.run_folder import read_info
from . import neighbours

NEIGHBOURS = 20  # of 5, 10, 20, 50 the best on real films (benchmarks/LOG.md, 2026-11-29)
PRIOR = 2.0  # films of the class's share that are added to the neighbours, so that none of 20 is no certainty
SIDE = 100  # suspects of each class that are kept of its positives, and of its negatives
HEAD = (
    *("rank", "class", "label", "probability", "neighbours", "score", "part", "cache_row", "image", "group"),
    *("image_sha256", "mark"),
)


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """One label of one film.

    `place` is the film's in the run's predictions and `row` its in the cache; `probability` is the run's own,
    calibrated, of the model that did not train on the film; `neighbours` the share of positives among the nearest films
    of other groups; `score` the estimated chance that the label is wrong, by which `rank` counts from 1 in each class.
    """

    rank: int
    place: int
    row: int
    image: str
    sha256: str
    group: str
    part: str
    name: str
    label: int
    probability: float
    neighbours: float
    score: float


def suspects(run: AnyPath, cache: AnyPath | Cache | None = None, *, side: int = SIDE) -> list[Suspect]:
    """The labels of a run that are most likely wrong, by rank, then class: each class has its own ranking.

    `side` bounds how many positives, and how many negatives, of a class are kept. `cache` None takes the one that the
    run names. Raises InputError where the cache is not the run's.
    """
    folder = Path(run)
    saved = predictions.read(folder, info := read_info(folder))
    file = cache if isinstance(cache, Cache) else open_cache(cache or info["cache"]["path"])
    return rank_labels(saved, file, side)


def rank_labels(saved: Saved, cache: Cache, side: int = SIDE) -> list[Suspect]:
    """As `suspects`, of what is read already."""
    rows, arrays, classes = neighbours.match_rows(saved, cache), saved.arrays, saved.run["classes"]
    labels, probabilities = arrays["labels"], own_probabilities(saved)
    groups = arrays["group"].tolist()
    near, _ = neighbours.find_nearest(neighbours.describe_films(cache, rows), NEIGHBOURS, groups=groups)
    shares = positive_shares(labels, near)
    scores = suspicion(labels, probabilities, shares, groups)
    found = []
    for c, name in enumerate(classes):
        for rank, place in enumerate(_chosen(labels[:, c], scores[:, c], side), 1):
            found.append(
                Suspect(
                    rank=rank,
                    place=place,
                    row=int(rows[place]),
                    image=str(arrays["image"][place]),
                    sha256=str(arrays["sha256"][place]),
                    group=groups[place],
                    part="holdout" if arrays["fold"][place] < 0 else "out_of_fold",
                    name=name,
                    label=int(labels[place, c]),
                    probability=float(probabilities[place, c]),
                    neighbours=float(shares[place, c]),
                    score=float(scores[place, c]),
                )
            )
    return sorted(found, key=lambda each: each.rank)


def own_probabilities(saved: Saved) -> np.ndarray:
    """Calibrated probabilities (n, C) of the models that did not train on the film: folds' or final; NaN for none."""
    fold = saved.arrays["fold"]
    raw = np.where((fold >= 0)[:, None], saved.out_of_fold()[saved.decided_by], saved.arrays["final"])
    return np.asarray(calibration.apply(saved.run["calibration"], raw))


def _chosen(labels: np.ndarray, scores: np.ndarray, side: int) -> list[int]:
    """Places of the highest scores of a class, best first, at most `side` of its positives and of its negatives."""
    order = np.argsort(-scores, kind="stable")
    order = order[np.isfinite(scores[order])]
    kept = np.concatenate([order[labels[order] == value][:side] for value in (0, 1)])
    return sorted(kept.tolist(), key=lambda place: (-scores[place], place))


def positive_shares(labels: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Share of positives (n, C) among the known labels of the nearest films, whose places are (n, k), -1 for none.

    NaN where no neighbour's label is known. labels (n, C) 1, 0, -1 unknown.
    """
    there = (near >= 0)[..., None]
    beside = labels[near]
    known = ((beside >= 0) & there).sum(axis=1)
    out = np.full(known.shape, np.nan)
    np.divide(((beside == 1) & there).sum(axis=1), known, out=out, where=known > 0)
    return out


def suspicion(labels: np.ndarray, probabilities: np.ndarray, shares: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """The estimated chance that each label is wrong (n, C); NaN where the label, or all that speaks on it, is unknown.

    The mean of two log odds that the finding is there, turned against the label: of the probability, shifted so that
    those of a class have its prevalence on average (a loss that weighs classes moves them), and of the share of
    positive neighbours, drawn to the prevalence. Ranking by the probability of the given label is the self-confidence
    of Northcutt, Jiang and Chuang 2021, Confident Learning.
    """
    known, scored = labels >= 0, np.isfinite(probabilities)
    shift = calibration.recalibrate(
        np.where(scored, labels, -1), np.where(scored, probabilities, 0.5), number_groups(groups, len(labels))
    )
    odds = _log_odds(probabilities) + np.nan_to_num(shift.in_the_large)
    base = (labels == 1).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    drawn = (NEIGHBOURS * shares + PRIOR * base) / (NEIGHBOURS + PRIOR)
    both = np.stack([odds, _log_odds(drawn)])
    count = np.isfinite(both).sum(axis=0)
    mean = np.divide(np.nansum(both, axis=0), count, out=np.full(count.shape, np.nan), where=count > 0)
    present = 1 / (1 + np.exp(-mean))
    return np.where(known, np.where(labels == 1, 1 - present, present), np.nan)


def _log_odds(values: np.ndarray) -> np.ndarray:
    kept = np.clip(values.astype(np.float64), 1e-6, 1 - 1e-6)
    return np.log(kept / (1 - kept))


def write_suspects(path: Path, found: Sequence[Suspect]) -> None:
    """Write `suspects.csv`; its column `mark` is empty, and `sweep --corrections` reads it once it is filled in."""
    write_csv(path, HEAD, _records(found))


def _records(found: Sequence[Suspect]) -> Iterator[tuple[object, ...]]:
    for each in found:
        figures = (f"{value:.4f}" for value in (each.probability, each.neighbours, each.score))
        yield (each.rank, each.name, each.label, *figures, each.part, each.row, each.image, each.group, each.sha256, "")
