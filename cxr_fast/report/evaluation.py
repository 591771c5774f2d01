"""What a run's saved files (never a model) say of it: every figure with its interval, by part, study and subgroup."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.disclosure import GROUPS
from ..errors import InputError
from ..metrics import curves, figures, rarity, subgroups
from ..metrics.intervals import FEW, Interval, Resampling, bootstrap, support
from ..metrics.subgroups import VIEW
from ..system.files import AnyPath
from ..system.text import Table
from ..training import operating_points
from ..training.operating_points import AS_CHOSEN, OperatingPoint, read_prevalence
from ..training.predictions import META, PARTS, Pool, Saved, Scored, read
from ..training.run_folder import clean, read_run_info
from . import class_means, probabilities
from .at_a_glance import records as glance
from .class_means import name_some
from .summary import Record, as_figure

SCHEMA = 1
LEVEL = 0.95
TITLES = PARTS | {"external": "these films"}


@dataclass(frozen=True, kw_only=True)
class EvaluationJob:
    """What every part is computed with; `missing` and `withheld` collect what could not be had.

    `limits` are the thresholds (C,), or (n, C) where each image of a part has its own; `labels` (n, C) those that
    divide the classes by how frequent they are.
    """

    classes: Sequence[str]
    limits: np.ndarray
    labels: np.ndarray
    how: Resampling
    missing: list[str] = field(default_factory=list)
    withheld: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def rarity(self) -> np.ndarray:
        """Whether each class is head, medium or tail, (C,)."""
        return rarity.class_groups(self.labels)

    def intervals(self, scored: Scored) -> dict[str, Interval]:
        """Of every figure, by group; none from a single group."""
        groups = scored.columns["group"]
        if not self.how.resamples or len(set(groups.tolist())) < 2:
            return {}
        subsets = class_means.rarity_subsets(self.rarity)
        return bootstrap(scored.labels, scored.probs, groups.tolist(), self.limits, self.how, subsets)

    def part(self, title: str, scored: Scored, intervals: dict[str, Interval]) -> dict[str, Any]:
        """The figures of one set of images."""
        found = figures.headline(scored.labels, scored.probs, self.limits)
        values = {}
        for name in figures.HEADLINE:
            interval = intervals.get(figures.overall_key(name))
            values[name] = (
                class_means.mean_record(found[name], interval, self.classes)
                if name in figures.MEANS
                else _figure(found[name], interval)
            )
            if interval is not None and found[name] == found[name] and values[name]["low"] is None:
                self.withheld[name].append(title)
        counted = {key: found[key] for key in ("n", "classes_defined", "classes_total")}
        groups = len(set(scored.columns["group"].tolist()))
        frequent = class_means.rarity_record((scored.labels, scored.probs), self.rarity, intervals, self.classes)
        return {"of": scored.of, **counted, "groups": groups, "figures": values, "rarity": frequent}


def evaluate(
    folder: AnyPath,
    *,
    resamples: int = 1000,
    seed: int = 0,
    pool: Pool = "mean",
    logit_adjustment: float = 0.0,
    point: OperatingPoint = AS_CHOSEN,
) -> dict[str, Any]:
    """Every figure of a finished run as one JSON-ready dict, null where undefined; what cannot be had is in `missing`.

    `resamples` 0 leaves the intervals out; `logit_adjustment` adjusts the logits after training; `point` asks for other
    thresholds, another calibration, or PPV and NPV at a stated prevalence. Figures of training images have no
    intervals. Raises InputError or SchemaError where the folder is no run of this version or its predictions cannot be
    read.

        >>> found = evaluate("exports/indiana", resamples=0)
        >>> sorted(found["parts"])
        ['holdout', 'out_of_fold', 'train']
    """
    folder = Path(folder)
    run = read_run_info(folder, logit_adjustment=logit_adjustment, point=point)
    saved = read(folder, run)
    arrays, shown = only_shown(saved.arrays)
    saved, every = replace(saved, arrays=arrays), saved.arrays["labels"]
    limits, dev = np.array(run["thresholds"], float), every[arrays["fold"] >= 0]
    how = Resampling(resamples=resamples, seed=seed, level=LEVEL)
    job = EvaluationJob(classes=run["classes"], limits=limits, labels=dev, how=how)
    result = describe_parts(_parts(saved, job), job, shown, pool)
    result["out_of_fold_auc"] = _two_means(saved, result["parts"].get("out_of_fold"))
    result |= {"shortcuts": run.get("shortcuts") or [], "cooccurrence": cooccurrence(every, job.classes)}
    if point.prevalence is not None:
        probabilities.state_prevalence(result["per_class"], read_prevalence(point.prevalence, job.classes))
    return dict(clean(result))


def describe_parts(
    scored: Mapping[str, Scored], job: EvaluationJob, shown: subgroups.Shown, pool: Pool
) -> dict[str, Any]:
    """Every figure of these parts, by the keys of TITLES: those of classes, curves and subgroups of the first that a
    model was not trained on."""
    intervals = {name: job.intervals(part) if name != "train" else {} for name, part in scored.items()}
    parts = {name: job.part(TITLES[name], part, intervals[name]) for name, part in scored.items()}
    chief = next((name for name in ("external", "holdout", "out_of_fold", "train") if name in scored), None)
    views, columns = _by(VIEW, scored.get(chief or ""), job), _subgroups(scored.get(chief or ""), job)
    result = {
        "schema": SCHEMA,
        "level": job.how.level,
        "resamples": job.how.resamples,
        "seed": job.how.seed,
        "unit": "group",
        "missing": job.missing,
        "parts": parts,
        "out_of_fold_auc": None,
        "rarity": class_means.rarity_classes(job.labels, job.rarity, job.classes),
        "studies": {"pool": pool, "parts": _studies(scored, pool, job)},
        "views": views,
        "subgroups": columns,
        "gaps": _gaps(scored.get(chief or ""), views, columns, job),
        "columns_not_shown": len(shown.hidden),
        "shortcuts": [],
        "per_class_of": chief,
        **(_details(scored[chief], intervals[chief], job) if chief else _NOTHING),
    }
    _tell_withheld(job)
    job.missing.extend(f"by {title}: the data names none" for title in shown.empty)
    job.missing.extend([str(shown)] if shown.hidden else [])
    return result


def _two_means(saved: Saved, part: Record | None) -> dict[str, Any] | None:
    """Macro AUC out of fold, pooled as the part has it and as the mean of the folds."""
    if part is None:
        return None
    raw = saved.out_of_fold()[saved.decided_by]
    mean = operating_points.mean_of_folds(saved.arrays["labels"], saved.arrays["fold"], raw)
    return operating_points.two_means(part["figures"]["macro_auc"]["value"], mean)


_NOTHING: dict[str, Any] = {
    "per_class": [],
    "curves": {},
    "reliability": None,
    "recalibration": [],
    "decisions": None,
    "confusion": [],
}


def _parts(saved: Saved, job: EvaluationJob) -> dict[str, Scored]:
    out = {}
    for name, title in PARTS.items():
        try:
            part = saved.part(name)
            figures.headline(part.labels, part.probs, job.limits)
        except InputError as error:
            job.missing.append(f"{title}: {error}")
        else:
            out[name] = part
    if "train" in out:
        job.missing.append("training images: no intervals, which would tell nothing of new images")
    for name in ("out_of_fold", "holdout"):
        if name in out and len(set(out[name].columns["group"].tolist())) < 2:
            job.missing.append(f"{PARTS[name]}: no intervals, all its images are of one group")
    return out


def _studies(scored: Mapping[str, Scored], pool: Pool, job: EvaluationJob) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in ("out_of_fold", "holdout", "external"):
        if name not in scored:
            continue
        if not (scored[name].columns["study"] != "").any():
            job.missing.append(f"studies, {TITLES[name]}: the data names none")
            continue
        pooled = scored[name].studies(pool)
        out[name] = job.part(f"{TITLES[name]} studies", pooled, job.intervals(pooled))
    return out


def only_shown(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], subgroups.Shown]:
    """Put the name of a subgroup in place of each value of `view` and `meta:` columns, "" where it is not shown."""
    out = {name: values for name, values in arrays.items() if not name.startswith(META)}
    columns = {name: arrays[name].tolist() for name in arrays if name == VIEW or name.startswith(META)}
    shown = subgroups.choose(columns, out["group"].tolist())
    out |= {META + title: named for title, named in shown.columns.items() if title != VIEW}
    out[VIEW] = shown.columns.get(VIEW, np.full(len(out["group"]), ""))
    return out, shown


def _subgroups(scored: Scored | None, job: EvaluationJob) -> dict[str, Any]:
    names = [] if scored is None else [name for name in scored.columns if name.startswith(META)]
    found = {name.removeprefix(META): _by(name, scored, job) for name in names}
    return {name: parts for name, parts in found.items() if parts}


def _by(column: str, scored: Scored | None, job: EvaluationJob) -> dict[str, Any]:
    """A PART for every value of a column that enough groups have; the column holds names of subgroups."""
    if scored is None or not any(scored.columns[column]):
        return {}
    name, groups = column.removeprefix(META), scored.columns["group"]
    rows, small = subgroups.split(scored.columns[column], groups)
    if small and subgroups.OTHER not in rows:
        job.missing.append(f"by {name}: {small} value{'s' if small > 1 else ''} of fewer than {GROUPS} groups")
    out = {}
    for value, members in rows.items():
        part = scored.select_rows(members, f"{name} {value}: {scored.of}")
        out[value] = job.part(f"{name} {value}", part, job.intervals(part))
    return out


def _gaps(scored: Scored | None, views: Record, columns: Record, job: EvaluationJob) -> dict[str, Any]:
    """The widest gaps between the values shown of each column; unknown is no value."""
    out: dict[str, Any] = {}
    for column, parts in {"view": views, **{META + name: parts for name, parts in columns.items()}}.items():
        name, named = column.removeprefix(META), [value for value in parts if value != subgroups.UNKNOWN]
        if scored is None or name in out or len(named) < 2 or not job.how.resamples:
            continue
        groups = scored.columns["group"]
        rows, _ = subgroups.split(scored.columns[column], groups)
        members = {value: rows[value] for value in named}
        found = subgroups.widest_gaps(scored.labels, scored.probs, job.limits, groups.tolist(), members, job.how)
        if found:
            out[name] = {figure: class_means.gap_record(gap, job.classes) for figure, gap in found.items()}
        else:
            job.missing.append(
                f"gap by {name}: no class has positives and negatives in {FEW} groups of two of its values"
            )
    return out


def _details(scored: Scored, intervals: dict[str, Interval], job: EvaluationJob) -> dict[str, Any]:
    """Per-class table, curves, reliability and confusion counts of one part."""
    table = figures.counts(scored.labels, figures.decisions(scored.probs, job.limits))
    cells = {name: getattr(table, name).tolist() for name in ("tp", "fp", "fn", "tn")}
    return {
        "per_class": describe_classes(scored, intervals, job),
        "curves": _curves(scored, job.classes),
        "reliability": reliability(scored.labels, scored.probs),
        "recalibration": probabilities.recalibration(
            scored.labels, scored.probs, scored.columns["group"].tolist(), job.classes, LEVEL
        ),
        "decisions": probabilities.decision_curves(scored.labels, scored.probs, job.classes),
        **glance.glance_records(scored.labels, scored.probs, job.limits, job.classes),
        "confusion": [
            {"class": name} | {cell: values[c] for cell, values in cells.items()} for c, name in enumerate(job.classes)
        ],
    }


def describe_classes(scored: Scored, intervals: dict[str, Interval], job: EvaluationJob) -> list[dict[str, Any]]:
    """One row a class of one part: counts, threshold, tier, and every figure with its interval."""
    enough = enough_groups(scored.labels, scored.columns["group"])
    plain = ("class", "positives", "negatives", "unknown", "prevalence", "threshold", "tier")
    rows = []
    for c, row in enumerate(figures.per_class(scored.labels, scored.probs, job.limits, job.classes)):
        of_class = {name: intervals[name].of_class(c) for name in figures.OF_CLASSES if name in intervals and enough[c]}
        values = {name: _figure(row[name], of_class.get(name)) for name in figures.OF_CLASSES}
        rows.append({name: row[name] for name in plain} | values)
    if intervals and not enough.all():
        names = [name for name, ok in zip(job.classes, enough, strict=True) if not ok]
        job.missing.append(
            f"intervals of {len(names)} of {len(enough)} classes, with positives or negatives in fewer than {FEW} "
            f"groups: {name_some(names)}"
        )
    return rows


def enough_groups(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Which classes, bool (C,), have positives and negatives in FEW groups or more; labels (n, C), groups (n,)."""
    return np.asarray(support(labels, groups.tolist()) >= FEW)


def _figure(value: float, interval: Interval | None) -> dict[str, float | None]:
    """Value and ends. An interval without width, or beside its own figure, is none.

    Where every positive is found, every resample finds them all, and says nothing of other patients.
    """
    low = high = None
    if interval is not None and float(interval.low) <= value <= float(interval.high) and interval.low < interval.high:
        low, high = float(interval.low), float(interval.high)
    return {"value": value, "low": low, "high": high}


def _tell_withheld(job: EvaluationJob) -> None:
    for name, titles in job.withheld.items():
        job.missing.append(f"interval of {name}, which resampling cannot give here: {name_some(titles)}")


def _curves(scored: Scored, classes: Sequence[str]) -> dict[str, Any]:
    """Of all classes as one, `micro`, and of each class that has positives and negatives."""
    columns = {"micro": (scored.labels.ravel(), scored.probs.ravel())}
    columns |= {name: (scored.labels[:, c], scored.probs[:, c]) for c, name in enumerate(classes)}
    found = {name: {"roc": curves.roc(*pair), "pr": curves.precision_recall(*pair)} for name, pair in columns.items()}
    return {name: lines for name, lines in found.items() if lines["roc"]}


def reliability(labels: np.ndarray, probs: np.ndarray) -> dict[str, Any]:
    """Bins of predicted probability over all known entries (n, C) as one, and their calibration error."""
    value, bins = figures.ece(labels.reshape(-1, 1), probs.reshape(-1, 1))
    table = {"count": bins.count[0], "confidence": bins.confidence[0], "frequency": bins.frequency[0]}
    lists = {"edges": bins.edges.tolist(), **{name: values.tolist() for name, values in table.items()}}
    return lists | {"ece": float(value[0])}


def cooccurrence(labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """In how many images (N, C) two classes are positive together; on the diagonal, one class."""
    yes = (labels == 1).astype(np.int64)
    return {"classes": list(classes), "counts": (yes.T @ yes).tolist()}


def csv_tables(evaluation: Record) -> dict[str, Table]:
    """The evaluation in full precision by file name, for CSV; a table without rows is left out."""
    co = evaluation["cooccurrence"]
    records = {
        "figures.csv": _figure_records(evaluation),
        "per_class.csv": evaluation["per_class"],
        "confusion.csv": evaluation["confusion"],
        "curves.csv": _curve_records(evaluation["curves"]),
        "reliability.csv": _bin_records(evaluation["reliability"]),
        "recalibration.csv": evaluation.get("recalibration", []),
        "decision_curves.csv": probabilities.curve_records(evaluation.get("decisions")),
        "operating_points.csv": glance.point_records(evaluation),
        "mistaken.csv": glance.mistaken_records(evaluation),
        "cooccurrence.csv": (
            {"class": name, **dict(zip(co["classes"], counts, strict=True))}
            for name, counts in zip(co["classes"], co["counts"], strict=True)
        ),
    }
    lists = {name: list(rows) for name, rows in records.items()}
    return {name: _record_table(rows) for name, rows in lists.items() if rows}


def _record_table(records: Sequence[Record]) -> Table:
    """Rows of equal keys as rows; a value with an interval as a Figure."""
    return Table(
        columns=list(records[0]),
        rows=[
            [as_figure(value) if isinstance(value, Mapping) else value for value in record.values()]
            for record in records
        ],
    )


def _figure_records(evaluation: Record) -> Iterator[Record]:
    """One record a figure of a part: training, out of fold, hold-out, their studies, each view, each subgroup."""
    places = [(part, name, "image", "", "") for name, part in evaluation["parts"].items()]
    studies = evaluation["studies"]
    places += [(part, name, f"study ({studies['pool']})", "", "") for name, part in studies["parts"].items()]
    for by, parts in {"view": evaluation["views"], **evaluation["subgroups"]}.items():
        places += [(part, evaluation["per_class_of"], "image", by, group) for group, part in parts.items()]
    for part, *place in places:
        counts = {key: part[key] for key in ("n", "groups", "classes_defined", "classes_total")}
        frequent = {
            f"{kind}_{name}": found[name]
            for kind, found in part["rarity"].items()
            for name in class_means.RARITY_FIGURES
        }
        for name, figure in {**part["figures"], **frequent}.items():
            ends = {key: figure[key] for key in ("value", "low", "high")}
            over = figure.get("over") or {}
            of = {"interval_classes": over.get("classes"), "interval_value": over.get("value")}
            place_of = dict(zip(("part", "level", "by", "group"), place, strict=True))
            yield {**place_of, "figure": name, **ends, **counts, **of}


def _curve_records(curves: Record) -> Iterator[Record]:
    """The points of every curve: `roc` false positive rate and sensitivity, `pr` recall and precision."""
    for name, curve in curves.items():
        for kind, points in curve.items():
            yield from ({"class": name, "curve": kind, "x": x, "y": y} for x, y in points)


def _bin_records(bins: Record | None) -> Iterator[Record]:
    """One record a bin of predicted probability."""
    if bins is None:
        return
    for k, (low, high) in enumerate(itertools.pairwise(bins["edges"])):
        yield {"from": low, "to": high, **{key: bins[key][k] for key in ("count", "confidence", "frequency")}}
