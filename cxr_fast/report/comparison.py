"""Two runs on the images both have scored: differences with paired intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import InputError
from ..metrics.figures import HEADLINE, MEANS, headline, overall_key, per_class
from ..metrics.intervals import Decided, Interval, Resampling, paired_bootstrap
from ..metrics.rarity import class_groups
from ..system.files import AnyPath
from ..system.text import NONE, Cell, Figure, Table
from ..training.predictions import PARTS, Scored, read
from ..training.run_folder import clean, read_info
from . import class_means
from .charts import excludes_zero
from .evaluation import LEVEL, enough_groups
from .summary import FIGURES, ROUNDING, Record, as_figure, of_classes

SCHEMA = 1
TABLED = ("auc", "ap")
Part = Literal["holdout", "out_of_fold"]


def compare_runs(
    run_a: AnyPath,
    run_b: AnyPath,
    *,
    part: Part = "holdout",
    resamples: int = 1000,
    seed: int = 0,
    allow_trained: bool = False,
) -> dict[str, Any]:
    """Compare B with A on the images in this part of both runs, by paired bootstrap over A's groups; JSON-ready.

    `figures` (those of HEADLINE), `rarity` (auc, map) and the rows of `per_class` (auc, ap) hold a, b, difference, low,
    high; null where undefined. Of a mean over classes `over` says which its interval is of. Images are matched by
    their bytes; `trained_a` and `trained_b` count those of the other run's hold-out that a run was trained on, which no
    figure holds. Raises InputError where there are such images, unless `allow_trained`, and where the runs share no
    image, have other classes, or label an image differently.

        >>> found = compare_runs("exports/indiana", "exports/indiana", resamples=100)
        >>> found["figures"]["macro_auc"]["difference"]
        0.0
    """
    run_a, run_b = Path(run_a), Path(run_b)
    one, two = _side(run_a, part), _side(run_b, part)
    info_a, a, info_b, b = one.run, one.scored, two.run, two.scored
    classes, others = list(info_a["classes"]), list(info_b["classes"])
    _same_classes(run_a, classes, run_b, others)
    order = [others.index(name) for name in classes]
    leaks = {"trained_a": _count(b, one.trained), "trained_b": _count(a, two.trained)} if part == "holdout" else {}
    rows_a, rows_b = _common(a, b)
    if any(leaks.values()) and not allow_trained:
        _refuse_trained(run_a, run_b, leaks, len(rows_a))
    if not len(rows_a):
        other = "out_of_fold" if part == "holdout" else "holdout"
        raise InputError(
            f"{run_a} and {run_b} have no {PARTS[part]} image in common: compare runs of one data set and split, or "
            f"pass --part {other}."
        )
    both = a.select_rows(rows_a, a.of)
    probs_b, labels_b = b.probs[rows_b][:, order], b.labels[rows_b][:, order]
    _same_labels(both.labels, labels_b, run_a, run_b)
    resampling = Resampling(resamples=resamples, seed=seed, level=LEVEL)
    decided = ((both.probs, one.limits), (probs_b, two.limits[order]))
    kinds = class_groups(one.labels)
    figures = describe_differences(both, decided, classes, kinds, resampling)
    figures["rarity_classes"] = class_means.rarity_classes(one.labels, kinds, classes)
    counted = {"images": len(rows_a), "groups": len(set(both.columns["group"].tolist()))}
    counted |= leaks | {"only_a": len(a.labels) - len(rows_a), "only_b": len(b.labels) - len(rows_b)}
    sides = {"a": str(run_a), "b": str(run_b), "part": part}
    sides |= {"provenance_a": info_a["provenance"], "provenance_b": info_b["provenance"]}
    how = {"level": LEVEL, "resamples": resamples, "seed": seed, "unit": "group"}
    return dict(clean({"schema": SCHEMA, **sides, **how, **counted, **figures}))


@dataclass(frozen=True, kw_only=True)
class _Side:
    """One run: run.json, what it scored in the part, its thresholds (C,), the labels of its folds' images, and the
    hashes of the images it was trained on."""

    run: dict[str, Any]
    scored: Scored
    limits: np.ndarray
    labels: np.ndarray
    trained: set[str]


def _side(folder: Path, part: Part) -> _Side:
    run = read_info(folder)
    try:
        saved = read(folder, run)
        scored = saved.part(part)
    except InputError as error:
        if str(folder) in str(error):
            raise
        raise InputError(f"{folder}: {PARTS[part]}: {error}") from error
    hashes, held = saved.arrays["sha256"], saved.arrays["fold"] < 0
    trained = set(hashes[~held].tolist()) - set(hashes[held].tolist())
    limits, labels = np.array(run["thresholds"], float), saved.arrays["labels"][~held]
    return _Side(run=run, scored=scored, limits=limits, labels=labels, trained=trained)


def _refuse_trained(run_a: Path, run_b: Path, leaks: Mapping[str, int], common: int) -> None:
    sides = ((run_a, leaks["trained_a"], run_b), (run_b, leaks["trained_b"], run_a))
    said = ", and ".join(
        f"{one} was trained on {count:,} hold-out images of {two}" for one, count, two in sides if count
    )
    mend = f"--allow-trained to compare on the {common:,} that both held out" if common else "--part out_of_fold"
    raise InputError(f"{said}; sweep one with --split-from the other, or pass {mend}.")


def _count(scored: Scored, trained: set[str]) -> int:
    """How many of the scored images are among those trained on."""
    return sum(value in trained for value in scored.columns["sha256"].tolist())


def _same_classes(run_a: Path, a: Sequence[str], run_b: Path, b: Sequence[str]) -> None:
    if odd := sorted(set(a) ^ set(b)):
        raise InputError(
            f"{run_a} has {len(a)} classes and {run_b} {len(b)}; not in both: {', '.join(odd[:5])}"
            f"{' and more' if len(odd) > 5 else ''}. Only runs of the same classes can be compared."
        )


def _same_labels(a: np.ndarray, b: np.ndarray, run_a: Path, run_b: Path) -> None:
    if different := int((a != b).any(axis=1).sum()):
        raise InputError(
            f"{different:,} of {len(a):,} common images have other labels in {run_b} than in {run_a}; sweep both on "
            "one manifest (`cxrfast sweep --manifest FILE`)."
        )


def _common(a: Scored, b: Scored) -> tuple[np.ndarray, np.ndarray]:
    """Rows in a, in their order, and the same images' rows in b."""
    at = {key: row for row, key in enumerate(_keys(b))}
    pairs = [(row, at[key]) for row, key in enumerate(_keys(a)) if key in at]
    both = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _keys(scored: Scored) -> list[tuple[str, int]]:
    """Hash of each file; of files with equal bytes the first, second, ..."""
    seen: Counter[str] = Counter()
    keys = []
    for value in scored.columns["sha256"].tolist():
        keys.append((value, seen[value]))
        seen[value] += 1
    return keys


def describe_differences(
    a: Scored, sides: tuple[Decided, Decided], classes: Sequence[str], kinds: np.ndarray, how: Resampling
) -> dict[str, Any]:
    """Differences of the second side minus the first in every figure, each side probabilities and thresholds of the
    images of `a`; NaN where undefined. Raises InputError where all images are of one group."""
    groups = a.columns["group"]
    if len(set(groups.tolist())) < 2:
        raise InputError("the common images are all of one group: nothing can be resampled.")
    paired = paired_bootstrap(a.labels, *sides, groups.tolist(), how, class_means.rarity_subsets(kinds))
    one, two = (headline(a.labels, probs, limits) for probs, limits in sides)
    figures = {
        name: class_means.mean_difference(one[name], two[name], paired[name], classes)
        if name in MEANS
        else _difference(one[name], two[name], paired[overall_key(name)])
        for name in HEADLINE
    }
    probs = [probs for probs, _ in sides]
    frequent = class_means.rarity_difference(a.labels, probs, kinds, paired, classes)
    tables = [per_class(a.labels, probs, limits, classes) for probs, limits in sides]
    enough = enough_groups(a.labels, groups)
    rows = []
    for c, (row_a, row_b) in enumerate(zip(*tables, strict=True)):
        found = {
            name: _difference(row_a[name], row_b[name], paired[name].of_class(c) if enough[c] else None)
            for name in TABLED
        }
        rows.append({"class": row_a["class"], "positives": row_a["positives"], **found})
    return {"figures": figures, "rarity": frequent, "per_class": rows}


def _difference(a: float, b: float, interval: Interval | None) -> dict[str, float]:
    """An interval that does not hold its own difference is none."""
    low = high = float("nan")
    if interval is not None and float(interval.low) - ROUNDING <= b - a <= float(interval.high) + ROUNDING:
        low, high = float(interval.low), float(interval.high)
    return {"a": a, "b": b, "difference": b - a, "low": low, "high": high}


# ---------------------------------------------------------------------------------------------------- its tables


def runs_table(runs: Mapping[str, Record], evaluations: Mapping[str, Record | None]) -> Table:
    """Each run's own figures, on its own images: its hold-out, or out of fold where it has none."""
    words = {"holdout": "hold-out", "out_of_fold": "out of fold"}
    parts: list[Record | None] = []
    kinds = []
    for name in runs:
        found = (evaluations[name] or {}).get("parts", {})
        kind = next((kind for kind in words if found.get(kind)), None)
        kinds.append(words[kind] if kind else NONE)
        parts.append(found[kind] if kind else None)
    rows: list[list[Cell]] = [
        ["Dataset", *(str(run["cache"]["dataset"]["name"]) for run in runs.values())],
        ["Final model", *(str(run["final"]["kind"]) for run in runs.values())],
        ["Epochs chosen", *(run["chosen"]["epochs"] for run in runs.values())],
        ["Figures on", *kinds],
        ["Images", *(part["n"] if part else None for part in parts)],
        ["Classes with an AUC", *(of_classes(part) if part else NONE for part in parts)],
    ]
    for key, name in FIGURES.items():
        rows.append([name, *(as_figure(part["figures"].get(key) if part else None) for part in parts)])
    return Table(title="Figures of each run", columns=["figure", *runs], rows=rows)


def comparison_table(pair: Record, names: Sequence[str], digits: int = 3) -> Table:
    """The headline figures of two runs (`names`: A's and B's) and their differences.

    Chosen: rows whose interval holds no 0.
    """
    found = {key: pair["figures"][key] for key in FIGURES if key in pair["figures"]}
    return Table(
        title=f"Differences in the figures, {names[1]} minus {names[0]}",
        columns=["figure", *names, "difference"],
        rows=[[FIGURES[key], *_sides(each, digits)] for key, each in found.items()],
        chosen=[row for row, each in enumerate(found.values()) if excludes_zero(each)],
        mark="differs",
        notes=[f"{note[0].upper()}{note[1:]}."] if (note := class_means.left_out(pair)) else [],
    )


def class_comparison_table(rows: Sequence[Record], names: Sequence[str], key: str = "auc", digits: int = 3) -> Table:
    """AUC, or average precision for the key `ap`, of each class in two runs, from the rows of `per_class`.

    Chosen: rows whose interval holds no 0.
    """
    word = {"auc": "AUC", "ap": "AP"}[key]
    return Table(
        title=f"Differences in {word} by class, {names[1]} minus {names[0]}",
        columns=["class", "positives", *(f"{word}, {name}" for name in names), "difference"],
        rows=[[str(row["class"]), row["positives"], *_sides(row[key], digits)] for row in rows],
        chosen=[place for place, row in enumerate(rows) if excludes_zero(row[key])],
        mark="differs",
        sortable=True,
    )


def difference_table(rows: Sequence[Record], names: Sequence[str]) -> Table:
    """`class_comparison_table` of the AUC, with one more column: the differences in average precision."""
    table = class_comparison_table(rows, names)
    return replace(
        table,
        title=f"Differences by class, {names[1]} minus {names[0]}",
        columns=[*table.columns, "difference in AP"],
        rows=[[*cells, as_difference(row["ap"])] for cells, row in zip(table.rows, rows, strict=True)],
    )


def _sides(found: Record, digits: int) -> list[Figure]:
    return [*(Figure(value=found[side], digits=digits) for side in "ab"), as_difference(found, digits)]


def as_difference(found: Record, digits: int = 3) -> Figure:
    """The difference of two runs in a figure, with its interval."""
    return as_figure({**found, "value": found["difference"]}, digits, signed=True)
