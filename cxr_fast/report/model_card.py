"""The model card: Hugging Face front matter, then what a user must know before the model runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..config import BIOMEDCLIP, NOTICE
from ..data.labels import TRAPS
from ..metrics import calibration
from .html import PARTS, number, of_classes, with_interval
from .summary import FEW, FIGURES, Material

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


def card(material: Material) -> str:
    """The whole card as Markdown with YAML front matter."""
    blocks = [front_matter(material), f"# {_plain(material.name)}: chest radiograph findings", _warning(material)]
    blocks += [f"**{NOTICE}**", " ".join(map(_plain, material.summary()))]
    for title, lines in _sections(material):
        if lines:
            blocks += [f"## {title}", "\n".join(lines)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def front_matter(material: Material) -> str:
    """License, tags and the hold-out figures as the hub's model-index; strings quoted as JSON, which YAML reads."""
    run, real = material.run, not material.run["random_weights"]
    hub = real and run["cache"]["weights"] in ("biomedclip", BIOMEDCLIP)
    # BiomedCLIP is MIT; of other weights, and of what the data's owner allows, this program knows nothing.
    lines = ["license: mit"] if hub else ["license: other", "license_name: not-stated"]
    lines += ["library_name: onnx", "pipeline_tag: image-classification"]
    lines += [f"base_model: {_quoted(BIOMEDCLIP.removeprefix('hf-hub:'))}"] if hub else []
    tags = [*TAGS, *([] if real else ["random-weights"]), *(["synthetic-data"] if _synthetic(run) else [])]
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    lines += ["metrics:", *(f"- {name}" for name in dict.fromkeys(METRICS.values()))]
    return "\n".join(["---", *lines, *_model_index(material), "---"])


def _model_index(material: Material) -> list[str]:
    kind = next((name for name in ("holdout", "out_of_fold") if material.parts.get(name)), None)
    if kind is None:
        return []
    part = material.parts[kind]
    known = {key: part["figures"][key]["value"] for key in METRICS if part["figures"][key]["value"] is not None}
    if not known:
        return []
    said = f" ({material.run['provenance']})" if material.run["provenance"] else ""
    lines = ["model-index:", f"- name: {_quoted(material.name)}", "  results:", "  - task:"]
    lines += ["      type: image-classification", "      name: Multi-label classification of chest radiographs"]
    lines += ["    dataset:", f"      name: {_quoted(material.name + said)}", f"      type: {_quoted(_slug(material))}"]
    lines += [f"      split: {'holdout' if kind == 'holdout' else 'validation'}", "    metrics:"]
    for key, value in known.items():
        lines += [f"    - type: {METRICS[key]}", f"      name: {_quoted(FIGURES[key])}", f"      value: {value:.6f}"]
    return lines


def _slug(material: Material) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in material.name.casefold()).split()) or "dataset"


def _warning(material: Material) -> str:
    if not material.warning:
        return ""
    loud = "RANDOM WEIGHTS: THE BACKBONE IS NOT BIOMEDCLIP. " if material.run["random_weights"] else ""
    return f"> **WARNING. {loud}{_plain(material.warning)}**"


def _sections(material: Material) -> Iterator[tuple[str, Sequence[str]]]:
    yield (
        "Intended use",
        [
            "Research on finding labels in frontal and lateral chest radiographs, and comparison of training methods. "
            "The probabilities rank images; at a threshold they are decisions of the quality that the tables below "
            "state, on images like those it was judged on.",
            "",
            "Not for diagnosis, triage, treatment or any decision about a patient. It was not tested as a medical "
            "device, on other hospitals' images, or with a reader.",
        ],
    )
    yield "Missing", [f"- {_plain(line)}" for line in material.missing]
    yield "Data", _data(material.run)
    yield "Splits", _splits(material.run)
    yield "Training", _training(material.run)
    yield "Figures", _figures(material)
    yield f"Classes and thresholds, on {material.judged_on}", _classes(material)
    yield "Calibration", _calibration(material)
    yield "Limits", _limits(material)
    yield "Label traps", _traps(material.run)


def _data(run: Mapping[str, Any]) -> list[str]:
    images, dataset = run["images"], run["cache"]["dataset"]
    kind = "synthetic phantoms, no patient" if _synthetic(run) else f"layout {dataset.get('kind', 'manifest')}"
    return [
        f"- {_plain(dataset['name'])} ({kind}), labels from {_plain(run['cache']['labels_from'])}",
        f"- {images['in']:,} images in, {images['failed']:,} failed and left out, {images['used']:,} used, of "
        f"{images['groups']:,} groups",
        f"- {len(run['classes'])} classes; unknown labels are masked in training and in every figure",
        "- the data's own license and terms hold for the model too",
    ]


def _splits(run: Mapping[str, Any]) -> list[str]:
    spec, images = run["spec"], run["images"]
    return [
        f"- {spec['folds']} folds by {spec['split_by']}"
        + (
            ", no group in two parts"
            if spec["split_by"] == "group"
            else ": views of one patient may be in several parts"
        ),
        f"- hold-out: {images['holdout']:,} images, used once, after every choice"
        if images["holdout"]
        else "- no hold-out: no figure here is free of the choices made on the same images",
        f"- seed {spec['seed']}",
    ]


def _training(run: Mapping[str, Any]) -> list[str]:
    train, count = run["train"], run["trainable"]
    weights = f"{run['cache']['weights']}{' (RANDOM)' if run['random_weights'] else ''}"
    lines = [
        f"- backbone: {_plain(weights)}, the last {run['unfreeze_blocks']} blocks trained: {count['total']:,} "
        f"parameters (blocks {count['blocks']:,}, head {count['head']:,})",
        f"- {train['loss']} loss, learning rate {train['lr']:g}, batch {train['batch_size']}, {run['precision']}; "
        f"{run['chosen']['epochs']} epochs",
        f"- final model: {run['final']['kind']}, {run['final']['rule']}",
        f"- activations {run['cache']['fingerprint'][:16]}, model {run['model_sha256'][:16]}, {run['written_by']}",
    ]
    told = run["recipe"]["differences"]
    lines += [
        f"- {r['field']} {r['here']} (published recipe: {r['published']})" for r in told if r["here"] != r["published"]
    ]
    return lines


def _figures(material: Material) -> list[str]:
    parts = {name: material.parts[name] for name in PARTS if material.parts.get(name)}
    if not parts:
        return []
    rows = [["Images", *(f"{part['n']:,}" for part in parts.values())]]
    rows += [["Classes with an AUC", *(of_classes(part) for part in parts.values())]]
    for key, name in FIGURES.items():
        rows.append([name, *(with_interval(part["figures"].get(key)) for part in parts.values())])
    said = "Out-of-fold figures pool one model a fold; training figures say how well the model remembers."
    return [*_table(["", *(PARTS[name] for name in parts)], rows), "", f"{material.confidence} {said}"]


def _classes(material: Material) -> list[str]:
    if not material.rows:
        return []
    keys = ("auc", "ap", "sensitivity", "specificity")
    rows = [
        [
            str(row["class"]),
            f"{row['positives']:,}",
            *(with_interval(row[key]) for key in keys),
            number(row["threshold"]),
            str(row["tier"]),
        ]
        for row in material.ranked()
    ]
    head = ["class", "positives", "AUC", "AP", "sensitivity", "specificity", "threshold", "tier"]
    return [*_table(head, rows), "", f"Thresholds: {material.run['threshold_source']}."]


def _calibration(material: Material) -> list[str]:
    fitted = material.run["calibration"]
    if fitted:
        said = calibration.describe(fitted, len(material.run["classes"]))
    elif material.run["train"]["loss"] == "bce":
        said = "none"
    else:
        said = "none; focal loss alone gives no probabilities"
    bins = material.evaluation["reliability"] if material.evaluation else None
    found = f" Calibration error on {material.judged_on}, all labels pooled: {number(bins['ece'])}." if bins else ""
    return [f"Calibration: {said}.{found}"]


def _limits(material: Material) -> list[str]:
    lines = ["- One data set, one split: other scanners, ages and prevalences change every figure, PPV and NPV first."]
    if rare := [str(row["class"]) for row in material.rows if row["positives"] < FEW]:
        lines.append(
            f"- {len(rare)} of {len(material.rows)} classes have fewer than {FEW} positives on {material.judged_on} "
            f"and cannot be judged alone: {_plain(', '.join(rare))}."
        )
    if material.run["final"]["kind"] == "best-fold":
        lines.append(
            "- The best fold's model was chosen among folds with different validation images; part of its lead is luck."
        )
    return [*lines, "- Labels come from reports, not from a second reading of the images."]


def _traps(run: Mapping[str, Any]) -> list[str]:
    dataset = run["cache"]["dataset"]
    if dataset.get("kind") not in INDIANA or _synthetic(run):
        return []
    known = set(run["classes"])
    return [f"- {name}: {text}" if name else f"- {text}" for name, text in TRAPS if name in known or not name]


def _synthetic(run: Mapping[str, Any]) -> bool:
    return bool(run["cache"]["dataset"].get("synthetic"))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(_plain(cell).replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(head), f"|---|{'---:|' * (len(head) - 1)}", *(line(row) for row in rows)]


def _plain(value: Any) -> str:
    """One line of text that Markdown does not take for markup."""
    return " ".join(str(value).split()).replace("<", "&lt;")


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
