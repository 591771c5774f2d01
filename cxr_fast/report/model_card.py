"""The model card: Hugging Face front matter, then what a user must know before the model runs."""

from __future__ import annotations

from ..config import BIOMEDCLIP
from ..data.labels import TRAPS
from ..unlikeness.oddest import describe_measure
from . import class_means, settings, tables
from .html import render_markdown
from .shortcut_table import shortcut_lines
from .summary import FEW, FIGURES, Record, ReportData

TAGS = ("chest-x-ray", "radiology", "multi-label", "biomedclip", "onnx", "research-only")
# Our figure, the hub's name of it.
METRICS = {
    "macro_auc": "roc_auc",
    "micro_auc": "roc_auc",
    "map": "average_precision",
    "macro_f1": "f1",
    "micro_f1": "f1",
    "label_accuracy": "accuracy",
}
INDIANA = ("indiana", "openi")


def render_card(material: ReportData) -> bytes:
    """The whole card as Markdown with YAML front matter."""
    run = material.run
    synthetic = bool(run["cache"]["dataset"].get("synthetic"))
    split, results = _results(material)
    return render_markdown(
        "card.md.j2",
        material=material,
        run=run,
        tables=tables,
        means=class_means,
        # BiomedCLIP is MIT; of other weights, and of what the data's owner allows, this program knows nothing.
        known_license=not run["random_weights"] and run["cache"]["weights"] in ("biomedclip", BIOMEDCLIP),
        base_model=BIOMEDCLIP.removeprefix("hf-hub:"),
        tags=[
            *TAGS,
            *(["random-weights"] if run["random_weights"] else []),
            *(["synthetic-data"] if synthetic else []),
        ],
        metrics=METRICS,
        names=FIGURES,
        image_size=settings.describe_size(run),
        split=split,
        results=results,
        shortcuts=shortcut_lines(run),
        unlikeness=describe_measure(run.get("unlikeness")),
        files=settings.file_table(material.files, run),
        slug="-".join("".join(c if c.isalnum() else " " for c in material.name.casefold()).split()) or "dataset",
        synthetic=synthetic,
        calibrated=material.calibrated,
        few=FEW,
        rare=[str(row["class"]) for row in material.rows if row["positives"] < FEW],
        traps=[] if synthetic else _traps(run),
    )


def _results(material: ReportData) -> tuple[str, dict[str, float]]:
    """The hub's name of the part that the model is judged on, and the figures of METRICS that are defined there."""
    for kind, split in (("holdout", "holdout"), ("out_of_fold", "validation")):
        if part := material.parts.get(kind):
            values = {key: part["figures"][key]["value"] for key in METRICS}
            return split, {key: value for key, value in values.items() if value is not None}
    return "", {}


def _traps(run: Record) -> list[tuple[str, str]]:
    """What is odd about the labels of the Indiana data, for the classes of this run."""
    if run["cache"]["dataset"].get("kind") not in INDIANA:
        return []
    return [(name, text) for name, text in TRAPS if name in set(run["classes"]) or not name]
