"""Every figure of a model file on labelled films, as one record."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..data.manifest import Manifest
from ..errors import InputError
from ..inference import hub
from ..inference.predictor import Predictor
from ..metrics.intervals import Resampling
from ..report import probabilities
from ..report.evaluation import LEVEL, EvaluationJob, cooccurrence, describe_parts, only_shown
from ..report.summary import Record
from ..system.text import Figure, Table, counted
from ..training.operating_points import read_prevalence
from ..training.predictions import Pool, Scored
from ..training.run_folder import clean
from .classes import MatchedClasses, describe_classes
from .films import Answers, score_films
from .training_figures import compare_with_training

KIND, SCHEMA = "cxr-fast evaluation of a model file", 1


@dataclass(frozen=True, kw_only=True)
class FigureSpec:
    """How figures are made: bootstrap resamples of groups and their seed, how the views of a study become one, and a
    prevalence (a share, or a CSV file of class,prevalence) at which PPV and NPV are stated."""

    resamples: int = 1000
    seed: int = 0
    pool: Pool = "mean"
    prevalence: str | None = None

    @property
    def resampling(self) -> Resampling:
        """As the bootstrap takes it."""
        return Resampling(resamples=self.resamples, seed=self.seed, level=LEVEL)


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A model file, labelled films, and the classes that both have."""

    predictor: Predictor
    manifest: Manifest
    matched: MatchedClasses

    @property
    def places(self) -> np.ndarray:
        """Where the matched classes stand among the model's, (C,)."""
        return np.array([self.predictor.labels.index(name) for name in self.matched.names])

    @property
    def limits(self) -> np.ndarray:
        """The file's thresholds of the matched classes, (C,)."""
        return np.asarray(self.predictor.thresholds[self.places])

    @property
    def model_name(self) -> str:
        """The file as a page names it: without a folder of this machine."""
        source = self.predictor.source
        return source if hub.is_address(source) else Path(source).name

    def score(self, answers: Answers, rows: np.ndarray | None = None) -> Scored:
        """The answered films (or those of `rows`, bool (N,)) as a report takes them.

        Raises InputError where no film was answered.
        """
        rows = answers.answered if rows is None else rows
        if not rows.any():
            reasons = ", ".join(f"{n:,} {name}" for name, n in answers.summary["failed_by"].items())
            raise InputError(f"no film of {self.manifest.name} could be read ({reasons}), so there are no figures.")
        of = f"films of {self.manifest.name}, scored by {self.model_name}"
        return score_films(self.manifest, self.matched, answers.probs[:, self.places], np.flatnonzero(rows), of)


def judge(source: Source, answers: Answers, spec: FigureSpec) -> dict[str, Any]:
    """Every figure of the report, of one part `external`, and those of the training data beside them; JSON-ready.

    Films that failed are left out and counted. Raises InputError where no film was answered, and for a prevalence that
    is none.
    """
    scored = source.score(answers)
    columns, shown = only_shown(scored.columns)
    scored = Scored(of=scored.of, labels=scored.labels, probs=scored.probs, columns=columns)
    names = list(source.matched.names)
    job = EvaluationJob(classes=names, limits=source.limits, labels=scored.labels, how=spec.resampling)
    groups = set(columns["group"].tolist())
    if len(groups) < 2:
        job.missing.append("no intervals: all films are of one group")
    failed = int((~answers.answered).sum())
    if failed:
        job.missing.append(f"{counted(failed, 'film')} of {len(answers.probs):,} that failed; predictions.csv says why")
    job.missing.extend(describe_classes(source.matched, source.manifest.name))
    found = {
        **describe_parts({"external": scored}, job, shown, spec.pool),
        "cooccurrence": cooccurrence(scored.labels, names),
    }
    if spec.prevalence is not None:
        probabilities.state_prevalence(found["per_class"], read_prevalence(spec.prevalence, names))
    found |= {"kind": KIND, "schema": SCHEMA, "written_by": f"cxr-fast {__version__}", "created": _now()}
    found |= {"model": _model(source), "data": _data(source, scored, answers)}
    found["training"] = compare_with_training(source.predictor.info, found, source.matched.lacking)
    found["set_here"] = None
    return dict(clean(found))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _model(source: Source) -> dict[str, Any]:
    info = source.predictor.info
    return {
        "file": source.model_name,
        "model_sha256": info.get("model_sha256"),
        "content_sha256": info["content_sha256"],
        "variant": info.get("variant"),
        "provenance": source.predictor.warning,
        "classes": len(source.predictor.labels),
        "threshold_source": info.get("threshold_source"),
        "calibration": info.get("calibration"),
        "trained_on": name_data(info, "data", "name"),
        "recalibrated": name_data(info, "recalibrated", "data"),
    }


def name_data(info: Mapping[str, Any], entry: str, field: str) -> str | None:
    """The name of a data set in an entry of a file's metadata, which may hold anything; None where it holds none."""
    found = info.get(entry)
    name = found.get(field) if isinstance(found, Mapping) else None
    return name if isinstance(name, str) else None


def _data(source: Source, scored: Scored, answers: Answers) -> dict[str, Any]:
    manifest, matched = source.manifest, source.matched
    return {
        "name": manifest.name,
        "kind": manifest.info.get("kind"),
        "synthetic": bool(manifest.info.get("synthetic")),
        "label_rules": manifest.info.get("label_rules"),
        "images": len(manifest),
        "answered": len(scored.labels),
        "failed": len(manifest) - len(scored.labels),
        "failed_by": answers.summary["failed_by"],
        "groups": len(set(scored.columns["group"].tolist())),
        "unlikeness": _unlikeness(answers),
        "unknown_labels": int((scored.labels < 0).sum()),
        "classes": list(matched.names),
        "columns": list(matched.columns),
        "lacking": list(matched.lacking),
        "unknown": list(matched.unknown),
    }


def _unlikeness(answers: Answers) -> dict[str, Any] | None:
    """How many films are over 1, and the quartiles; None where the model file has no unlikeness."""
    known = answers.unlikeness[np.isfinite(answers.unlikeness)]
    if not len(known):
        return None
    quartiles = np.quantile(known, [0.25, 0.5, 0.75]).tolist()
    return {"films": len(known), "over_1": int((known > 1).sum()), "quartiles": quartiles}


def call_table(rows: Sequence[Mapping[str, Any]], confusion: Sequence[Record]) -> Table:
    """How many films each class is called positive in at its threshold, beside how many are; most too many first."""
    cells = {row["class"]: row for row in confusion}
    found = []
    for row in rows:
        each = cells[row["class"]]
        called, known = each["tp"] + each["fp"], each["tp"] + each["fp"] + each["fn"] + each["tn"]
        ratio = called / row["positives"] if row["positives"] else None
        times = Figure(value=ratio, digits=1)
        found.append((called - row["positives"], [row["class"], known, row["positives"], called, times]))
    return Table(
        title="Called positive beside positive",
        columns=["class", "labels", "positive", "called positive", "called for each positive"],
        rows=[cells for _, cells in sorted(found, key=lambda pair: -pair[0])],
        notes=["At the thresholds of the file. Far more calls than positives: set thresholds here (--recalibrate)."],
        sortable=True,
    )
