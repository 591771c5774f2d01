"""The answers of a model file to labelled films, made and kept as `cxrfast predict` makes and keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.disclosure import META
from ..data.manifest import Manifest
from ..data.paths import Inputs
from ..errors import InputError
from ..inference import batch
from ..inference.batch import BatchSpec, OnBatch
from ..inference.predictor import Predictor
from ..system.tables import read_csv
from ..training.predictions import Scored
from .classes import MatchedClasses

PREDICTIONS, RAW_PREDICTIONS = "predictions.csv", "raw_predictions.csv"
RAW = "raw_probabilities"


class RawPredictor(Predictor):
    """A predictor whose probabilities are those of a calibrated file before their calibration."""

    answers = RAW


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """A model's probabilities (N, C) of all its classes for every film, NaN where a film failed, its unlikeness (N,),
    NaN where the film or the file has none; and how they were made, as `predictions.run.json` says it."""

    probs: np.ndarray
    unlikeness: np.ndarray
    summary: dict[str, Any]

    @property
    def answered(self) -> np.ndarray:
        """Which films have probabilities, bool (N,)."""
        return np.asarray(np.isfinite(self.probs).all(axis=1))


def predict_films(
    predictor: Predictor, manifest: Manifest, table: Path, spec: BatchSpec, on_batch: OnBatch | None = None
) -> Answers:
    """Predict every film of a manifest into `table` (CSV), going on from what it holds of the same model and films.

    Raises InputError where `table` holds another model's answers or other films, unless `spec.overwrite`.
    """
    paths = [str(manifest.path(row)) for row in range(len(manifest))]
    inputs = Inputs(paths=paths, studies=manifest.studies, by="study", groups=manifest.groups, manifests=1)
    try:
        summary = batch.write(predictor, inputs, table, spec, on_batch)
    except InputError as error:
        mend = "--overwrite predicts all films of this table again"
        told = str(error).replace("--append keeps their rows, --overwrite drops them", mend)
        raise InputError(told) from error
    probs, unlikeness = _read(table, predictor.labels, len(paths))
    return Answers(probs=probs, unlikeness=unlikeness, summary=summary)


def _read(table: Path, labels: Sequence[str], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The probabilities (N, C) float32 of a table of predictions, in the order of its rows, and the unlikeness (N,),
    NaN where the table has none."""
    cells = read_csv(table)
    assert len(cells["status"]) == count, "a row for each film"
    out = np.full((count, len(labels)), np.nan, np.float32)
    rows = np.flatnonzero(np.array(cells["status"]) == "ok").tolist()
    for c, name in enumerate(labels):
        out[rows, c] = [float(cells[name][row]) for row in rows]
    return out, np.array([float(text or "nan") for text in cells.get("unlikeness", [""] * count)])


def score_films(manifest: Manifest, found: MatchedClasses, probs: np.ndarray, rows: np.ndarray, of: str) -> Scored:
    """The films of `rows` as a report takes them: labels and probabilities (N, C) of the matched classes."""
    places = [manifest.classes.index(name) for name in found.columns]
    labels = np.maximum(manifest.labels[:, places], -1)  # uncertain is unknown in every figure
    columns = {
        "image": manifest.images,
        "group": manifest.groups,
        "study": manifest.studies,
        "view": manifest.views,
        **{META + name: values for name, values in manifest.subgroups.items()},
    }
    texts = {name: np.array(values, dtype=str)[rows] for name, values in columns.items()}
    return Scored(of=of, labels=labels[rows], probs=probs[rows], columns=texts)


def require_labels(manifest: Manifest, found: MatchedClasses, table: str) -> None:
    """Raise InputError where no label of the matched classes is known, or all are of one sign."""
    places = [manifest.classes.index(name) for name in found.columns]
    labels = manifest.labels[:, places]
    if (labels < 0).all():
        raise InputError(
            f"{table}: no label of the {len(places)} classes that the model has is known, so nothing can be scored; "
            "write 1 or 0 in the class columns."
        )
