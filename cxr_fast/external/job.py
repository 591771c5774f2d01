"""Evaluate one model file, or two, on labelled films: predictions, figures, page, and a recalibrated copy."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data.manifest import Manifest
from ..errors import InputError
from ..inference import hub
from ..inference.batch import BatchSpec, OnBatch
from ..inference.predictor import Predictor
from ..inference.verify import Report
from ..system.files import make_folders
from . import improvement, recalibrated_file
from .classes import MatchedClasses, describe_classes, match_classes
from .comparison import compare_models
from .evaluation import FigureSpec, Source, judge
from .films import PREDICTIONS, RAW_PREDICTIONS, Answers, RawPredictor, predict_films, require_labels
from .recalibration import (
    NewPoint,
    OldPoint,
    PointSpec,
    check_target,
    find_point,
    refuse_all,
    refuse_classes,
    require_library,
)
from .writer import render_pair, write_page, write_pair

FOLDER = Path("evaluations")
COMPARISON = "comparison.html"


@dataclass(frozen=True, kw_only=True)
class ExternalSpec:
    """How a model file is evaluated: `renamed` are texts THEIRS=OURS, `recalibrate` where a copy with `point` set on
    the films is written; `device` and `threads` run the model; `strict` refuses films of no chest.

        >>> ExternalSpec(renamed=("Pleural effusion=Effusion",)).figures.resamples
        1000
    """

    renamed: Sequence[str] = ()
    figures: FigureSpec = field(default_factory=FigureSpec)
    batch: BatchSpec = field(default_factory=BatchSpec)
    recalibrate: Path | None = None
    point: PointSpec = field(default_factory=PointSpec)
    device: str = "auto"
    threads: int | None = None
    strict: bool = False

    def open(self, model: Path, kind: type[Predictor] = Predictor) -> Predictor:
        """The model, ready to run."""
        return kind(model, self.device, self.threads, strict=self.strict, spin=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluated:
    """One model file on the films: its figures as evaluation.json has them, its page, and the check of the copy."""

    source: Source
    answers: Answers
    found: dict[str, Any]
    page: Path
    verified: Report | None = None

    @property
    def failed(self) -> int:
        """Films that failed."""
        return int((~self.answers.answered).sum())


def name_model(model: Path) -> str:
    """A name for a folder: `my.fp32` of exports/my/model.fp32.onnx, `other` of other.onnx."""
    text = str(model).removeprefix(hub.PREFIX)
    path = Path(text)
    stem = path.name.removesuffix(".onnx")
    if stem.startswith("model.") or stem == "model":
        stem = path.resolve().parent.name + stem.removeprefix("model")
    return re.sub(r"[^\w.@-]+", "-", stem).strip(".-") or "model"


def evaluate_models(
    models: Sequence[Path],
    manifest: Manifest,
    out: Path | None,
    spec: ExternalSpec,
    on_batch: OnBatch | None = None,
    on_note: Callable[[str], None] = lambda note: None,
) -> tuple[list[Evaluated], dict[str, Any] | None]:
    """Evaluate one model into `out` (default: evaluations/DATA/MODEL), or two into folders of it (evaluations/DATA) and
    compare them in its comparison.html; what each is, and the comparison.

    Everything that can be refused is refused before the first film is read; `on_note` then gets lines about classes
    without figures. Raises InputError for classes, labels or
    names that do not fit, and as `batch.write` does; Interrupted as that does.
    """
    names = [name_model(model) for model in models]
    if len(models) > 1 and names[0] == names[1]:
        names = [f"{name}-{k + 1}" for k, name in enumerate(names)]
    if len(models) > 2:
        raise InputError("one or two models can be evaluated at a time; name one or two, then the table of the films.")
    if len(models) > 1 and spec.recalibrate is not None:
        raise InputError("--recalibrate writes a copy of one model; name one.")
    sources = [_open(model, manifest, spec) for model in models]
    for line in dict.fromkeys(line for each in sources for line in describe_classes(each.matched, manifest.name)):
        on_note(line)
    base = out or FOLDER / _plain(manifest.name)
    folders = [base / name for name in names] if len(models) > 1 or out is None else [base]
    _refuse_runs(folders)
    done = [
        _evaluate(source, folder, name, spec, on_batch)
        for source, folder, name in zip(sources, folders, names, strict=True)
    ]
    if len(done) < 2:
        return done, None
    one, two = ((each.source, each.answers) for each in done)
    pair = compare_models(one, two, (names[0], names[1]), spec.figures)
    lines = [f"{each} is in one model alone" for each in pair["classes_of_one"]]
    sides = {name: each.found for name, each in zip(names, done, strict=True)}
    write_pair(base / COMPARISON, render_pair(sides, pair, lines), pair)
    return done, pair


def _refuse_runs(folders: Sequence[Path]) -> None:
    """Raise InputError where a folder is a run, whose page and tables have the names of those of an evaluation."""
    for folder in folders:
        if (folder / "run.json").exists():
            raise InputError(f"--out: {folder} is a run, whose report would be replaced; give another folder.")


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "films"


def _open(model: Path, manifest: Manifest, spec: ExternalSpec) -> Source:
    """The model and the classes that it shares with the films; what the request asks of both is checked."""
    predictor = spec.open(model)
    matched = match_classes(manifest.classes, predictor.labels, spec.renamed, manifest.name)
    require_labels(manifest, matched, manifest.name)
    if spec.recalibrate is not None:
        recalibrated_file.check_out(spec.recalibrate, predictor.path, str(predictor.info.get("variant")))
        require_library(spec.point)
        check_target(spec.point, predictor.labels)
        labels = all_labels(manifest, matched, predictor)
        refuse_all(_refused(labels, manifest, predictor), _present(labels))
        recalibrated_file.check_source(predictor, spec.device)
    return Source(predictor=predictor, manifest=manifest, matched=matched)


def all_labels(manifest: Manifest, matched: MatchedClasses, predictor: Predictor) -> np.ndarray:
    """The labels of all classes of the model, (N, C) int8, -1 for those that the films do not have."""
    out = np.full((len(manifest), len(predictor.labels)), -1, np.int8)
    for name, column in zip(matched.names, matched.columns, strict=True):
        values = manifest.labels[:, manifest.classes.index(column)]
        out[:, predictor.labels.index(name)] = np.maximum(values, -1)
    return out


def _refused(labels: np.ndarray, manifest: Manifest, predictor: Predictor) -> dict[str, str]:
    known = [c for c in range(labels.shape[1]) if (labels[:, c] >= 0).any()]
    return refuse_classes(labels[:, known], np.array(manifest.groups), [predictor.labels[c] for c in known])


def _present(labels: np.ndarray) -> int:
    return int((labels >= 0).any(axis=0).sum())


def _evaluate(source: Source, folder: Path, name: str, spec: ExternalSpec, on_batch: OnBatch | None) -> Evaluated:
    """Predict, judge, set thresholds where asked, and write everything of one model."""
    make_folders(folder)
    answers = predict_films(source.predictor, source.manifest, folder / PREDICTIONS, spec.batch, on_batch)
    found = judge(source, answers, spec.figures)
    verified = None
    if spec.recalibrate is not None:
        point = _find_point(source, answers, folder, spec, on_batch)
        found["set_here"] = improvement.describe_point(source, answers, point, spec.figures, found)
        figures = improvement.figures_for_file(found, found["set_here"])
        verified = recalibrated_file.write_copy(source, point, figures, spec.recalibrate, spec.device)
    page = write_page(found, folder, f"{name} on {source.manifest.name}")
    return Evaluated(source=source, answers=answers, found=found, page=page, verified=verified)


def _find_point(
    source: Source, answers: Answers, folder: Path, spec: ExternalSpec, on_batch: OnBatch | None
) -> NewPoint:
    """Thresholds and calibration from the answered films; of a calibrated file from its raw probabilities."""
    predictor, raw = source.predictor, answers.probs
    fitted = predictor.info.get("calibration")
    if fitted is not None:
        opened = spec.open(predictor.path, RawPredictor)
        raw = predict_films(opened, source.manifest, folder / RAW_PREDICTIONS, spec.batch, on_batch).probs
    rows = answers.answered
    if not np.isfinite(raw[rows]).all():
        raise InputError(f"{folder}: films changed while they were predicted; run the same command again.")
    labels = all_labels(source.manifest, source.matched, predictor)[rows]
    old = OldPoint(classes=predictor.labels, limits=predictor.thresholds, calibration=fitted)
    return find_point(labels, raw[rows], np.array(source.manifest.groups)[rows], old, spec.point)
