"""The saved predictions of a run, by part: images, labels and calibrated probabilities."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import InputError
from ..inference import outputs
from ..metrics import calibration

PARTS = {"train": "training images", "out_of_fold": "out-of-fold", "holdout": "hold-out"}
COLUMNS = ("image", "sha256", "group", "study", "view")
META = "meta:"
Pool = Literal["mean", "max"]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """n images, or studies, with a prediction each.

    labels (n, C) 1, 0, -1 unknown; probs (n, C) calibrated; columns: n texts each, those of COLUMNS and `meta:`
    ones; of: a sentence that says what was scored by what.
    """

    of: str
    labels: np.ndarray
    probs: np.ndarray
    columns: dict[str, np.ndarray]

    def select_rows(self, rows: np.ndarray, of: str) -> Scored:
        """The given rows, in the given order."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        return replace(self, of=of, labels=self.labels[rows], probs=self.probs[rows], columns=columns)

    def studies(self, pool: Pool = "mean") -> Scored:
        """One row per study, its views' probabilities averaged (or the highest of them); in order of first view.

        A class is positive where any view is, else negative where any view is known, else unknown. An image without a
        study is one.
        """
        _, first, member = np.unique(self._study_keys(), return_index=True, return_inverse=True)
        place = np.argsort(np.argsort(first))[member.reshape(-1)]
        shape = (len(first), self.labels.shape[1])
        labels, probs = np.full(shape, -1, np.int8), np.zeros(shape)
        np.maximum.at(labels, place, self.labels)
        (np.maximum if pool == "max" else np.add).at(probs, place, self.probs)
        if pool == "mean":
            probs /= np.bincount(place)[:, None]
        studies = self.select_rows(np.sort(first), f"{self.of}; the {pool} of each study's views")
        return replace(studies, labels=labels, probs=probs)

    def _study_keys(self) -> np.ndarray:
        group, study, image = (self.columns[name] for name in ("group", "study", "image"))
        keys = [f"{g}\0s{s}" if s else f"{g}\0i{i}" for g, s, i in zip(group, study, image, strict=True)]
        return np.array(keys, dtype=object)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """`predictions.npz` of a run beside its `run.json`: arrays by name, as written (raw probabilities)."""

    run: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]

    def part(self, name: str) -> Scored:
        """Everything scored in one of PARTS, calibrated. InputError, without a path, where the run has none of it."""
        fold = self.arrays["fold"]
        if name == "holdout":
            of = f"images held out, scored by {self._final()}{self._shared()}"
            return self._scored(self.arrays["final"], fold == -1, of)
        if name == "out_of_fold":
            folds = int(fold.max()) + 1
            of = (
                f"images of the folds, each scored by the one model that did not train on it: {folds} models are mixed "
                f"here, so figures over all folds also compare the scores of different models{self._shared()}"
            )
            return self._scored(self.out_of_fold()[self.decided_by], fold >= 0, of)
        seen = (fold >= 0) & (fold != self.run["chosen"]["fold"]) if self._kind == "best-fold" else fold >= 0
        of = f"images that {self._final()} was trained on: how well it remembers, not how well it does"
        if self._kind in ("ensemble", "retrained"):
            of += " (each image is new to one of its members)"
        return self._scored(self.arrays["final"], seen, of)

    def out_of_fold(self) -> dict[str, np.ndarray]:
        """Raw probabilities (N, C) of the folds' images at the chosen budget, each by the one model that did not train
        on it, NaN for the hold-out: of the `folds`, and where the run has them of the `retrained` heads."""
        budget = next(i for i, b in enumerate(self.run["budgets"]) if b["chosen"])
        found = {"folds": self.arrays["out_of_fold"][budget]}
        if "out_of_fold_retrained" in self.arrays:
            found["retrained"] = self.arrays["out_of_fold_retrained"]
        return found

    @property
    def decided_by(self) -> str:
        """`folds` or `retrained`: whose out-of-fold predictions the final model's thresholds come from."""
        return "retrained" if self._kind == "retrained" else "folds"

    def films(self, *, as_text: bool) -> dict[str, Any]:
        """One row a film by column: image, group, part (`out_of_fold` or `holdout`), fold, and of each class
        `NAME_label`, `NAME_probability` and `NAME_decision`.

        Probabilities are calibrated: a film of the folds is scored by the model that did not train on it, one of the
        hold-out by the final model. With `as_text` cells are those of a CSV file, unknown ones empty; a probability
        read in double precision is on the same side of its threshold. Else numbers, None where unknown.
        """
        labels, fold = self.arrays["labels"], self.arrays["fold"]
        limits = np.array(self.run["thresholds"], float)
        raw = np.where((fold >= 0)[:, None], self.out_of_fold()[self.decided_by], self.arrays["final"])
        probs = calibration.apply(self.run["calibration"], raw).astype(np.float32)
        held, known = fold < 0, np.isfinite(probs)
        columns: dict[str, Any] = {name: self.arrays[name].tolist() for name in ("image", "group")}
        columns["part"] = np.where(held, "holdout", "out_of_fold").tolist()
        columns["fold"] = _cells(fold, ~held, as_text)
        texts = np.array([outputs.texts(row, limits) for row in probs], object) if as_text else probs
        for c, name in enumerate(self.run["classes"]):
            columns[f"{name}_label"] = _cells(labels[:, c], labels[:, c] >= 0, as_text)
            found = np.where(known[:, c], texts[:, c], "") if as_text else probs[:, c]
            columns[f"{name}_probability"] = found
            columns[f"{name}_decision"] = _cells((probs[:, c] >= limits[c]).astype(int), known[:, c], as_text)
        return columns

    @property
    def _kind(self) -> str:
        return str(self.run["final"]["kind"])

    def _final(self) -> str:
        return {
            "best-fold": "the best fold's model",
            "ensemble": "the mean of the folds' models",
            "retrained": "the mean of the folds' models with retrained heads",
        }.get(self._kind, "the model trained on all folds' images")

    def _shared(self) -> str:
        by_image = self.run["spec"]["split_by"] == "image"
        return "; split by image, so other images of their groups were trained on" if by_image else ""

    def _scored(self, probs: np.ndarray, rows: np.ndarray, of: str) -> Scored:
        if not rows.any():
            raise InputError("this run has none.")
        if missing := int(np.isnan(probs[rows]).sum()):
            raise InputError(
                f"{missing:,} of {probs[rows].size:,} saved probabilities are NaN: the model diverged or the file is "
                "damaged."
            )
        columns = {name: values[rows] for name, values in self.arrays.items() if _is_column(name)}
        scored = calibration.apply(self.run["calibration"], probs[rows])
        return Scored(of=of, labels=self.arrays["labels"][rows], probs=scored, columns=columns)


def read(folder: Path, run: Mapping[str, Any]) -> Saved:
    """Read the predictions of a run, given its `run.json`. InputError with one line when unreadable."""
    path = folder / "predictions.npz"
    if not path.is_file():
        raise InputError(f"{path} is missing; run the sweep again.")
    try:
        with open(path, "rb") as raw, np.load(raw) as file:  # numpy leaves a damaged file open
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({str(error)[:80]}); run the sweep again.") from error
    own = ("out_of_fold_retrained",) if run["final"]["kind"] == "retrained" else ()
    needed = ("labels", "fold", "out_of_fold", "final", *own, *COLUMNS)
    if lacking := [name for name in needed if name not in arrays]:
        raise InputError(f"{path}: holds no {', '.join(lacking)}; run the sweep again.")
    images, classes = len(arrays["fold"]), len(run["classes"])
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(("labels", "final", *own), (images, classes))
    expected["out_of_fold"] = (len(run["budgets"]), images, classes)
    expected |= {name: (images,) for name in arrays if _is_column(name)}
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise InputError(f"{path}: {name} {arrays[name].shape} is not of this run ({shape}); run the sweep again.")
    return Saved(run=run, arrays=arrays)


def _cells(values: np.ndarray, known: np.ndarray, as_text: bool) -> list[Any]:
    """Whole numbers (n,) as a column, empty or None where not known."""
    pairs = zip(values.tolist(), known.tolist(), strict=True)
    return [(str(value) if as_text else value) if ok else ("" if as_text else None) for value, ok in pairs]


def _is_column(name: str) -> bool:
    return name in COLUMNS or name.startswith(META)
