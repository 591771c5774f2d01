"""Labelled films for the toy model: drawn labels that follow its answers, in a manifest of its own."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from cxr_fast.inference.predictor import Predictor

CLASSES = 6  # of the model's, which the manifest has
RENAMED = "Their first"


@pytest.fixture(scope="session")
def films(toy_model: Path, toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of all toy films, one of them broken, two a group: six classes, the first under another name, one
    class of two positives, one column that no model has, sex, and study."""
    predictor = Predictor(toy_model, device="cpu", threads=1)
    paths = sorted((toy_data / "images").iterdir())
    random, names = np.random.default_rng(4), predictor.labels[:CLASSES]
    probs = np.array(
        [r.probabilities if r.ok else np.full(len(predictor.labels), 0.5) for r in predictor.stream(paths)]
    )
    ranks = probs[:, :CLASSES].argsort(axis=0).argsort(axis=0) / len(paths)
    labels = (ranks + random.normal(0, 0.4, ranks.shape) > 0.6).astype(int)
    labels[:, CLASSES - 1] = np.arange(len(paths)) < 2
    out = tmp_path_factory.mktemp("external") / "site.csv"
    with open(out, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "group", "study", "view", "meta:sex", RENAMED, *names[1:], "Old fracture"])
        for k, (path, row) in enumerate(zip(paths, labels.tolist(), strict=True)):
            cells = ["" if random.random() < 0.05 else value for value in row]
            sex = "FM"[(k // 2) % 2]
            rows.writerow([path, f"p{k // 2}", f"s{k // 2}", ("PA", "LAT")[k % 2], sex, *cells, k % 2])
    return out


@pytest.fixture(scope="session")
def renamed(toy_model: Path) -> str:
    """The flag that takes the first column as the model's first class."""
    return f"{RENAMED}={Predictor(toy_model, device='cpu', threads=1).labels[0]}"
