"""The sections of a run's page that say how the model was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..config import (
    CacheSpec,
    PreprocessSpec,
    SweepSpec,
    TrainSpec,
    reference_value,
)
from .html import (
    NONE,
    Cell,
    Lines,
    count_cell,
    duration,
    listing,
    note,
    pair,
    picture,
    section,
    table,
    value_cell,
)
from .summary import Material

EVERY = 10
GRID_COLUMNS = ("config", "epochs", "mean_auc", "std_auc", "seconds", "chosen")


def search(material: Material) -> str:
    """Folds, budgets, training progression, and the grid where there was one."""
    run = material.run
    pictures = pair(
        picture(
            "Validation macro AUC of each fold at each epoch budget",
            material.plots.get("epoch_search_plot.png"),
            "The budget with the highest mean over folds is chosen; ties go to the smaller one.",
        ),
        picture(
            "Training loss and validation macro AUC of each fold by epoch",
            material.plots.get("training_plot.png"),
            "Each fold, epoch by epoch.",
        ),
    )
    return section(
        "search",
        "Folds and epoch search",
        _folds(run),
        pictures,
        _progress(material),
        _grid(run) if run["grid"] else "",
    )


def _folds(run: Mapping[str, Any]) -> str:
    budgets = run["budgets"]
    head = ["fold", "images", "classes with an AUC"]
    head += [f"{b['epochs']} epochs{' (chosen)' if b['chosen'] else ''}" for b in budgets]
    rows: Lines = [
        [
            f"{fold['fold'] + 1}{' (best)' if fold['best'] else ''}",
            count_cell(fold["images"]),
            count_cell(fold["classes_defined"]),
            *(value_cell(fold[f"auc_{b['epochs']}"]) for b in budgets),
        ]
        for fold in run["folds"]
    ]
    foot: Lines = [
        [name, "", "", *(value_cell(b[key]) for b in budgets)]
        for name, key in (("mean", "mean_auc"), ("std", "std_auc"))
    ]
    marks = [fold["best"] for fold in run["folds"]]
    said = (
        "Validation macro AUC. Folds are judged on different images and average over different classes, so the best "
        "fold need not be the best model. These figures chose the budget and the fold, and are a little too good."
    )
    return table(head, rows, caption="Validation macro AUC of each fold", foot=foot, marks=marks) + note(said)


def _progress(material: Material) -> str:
    if not material.history:
        return ""
    last = max(int(line["epoch"]) for line in material.history)
    shown = sorted({1, *range(EVERY, last + 1, EVERY), last})
    rows = [_progress_row(epoch, [x for x in material.history if x["epoch"] == epoch]) for epoch in shown]
    head = [
        "epoch",
        "folds",
        "training loss",
        "validation loss",
        "validation AUC",
        "lowest",
        "highest",
        "learning rate",
    ]
    return table(head, rows, caption="Training progression, means over folds") + note(
        f"The first epoch, every {EVERY}th and the last; every epoch of every fold is in history.csv."
    )


def _progress_row(epoch: int, lines: Sequence[Mapping[str, Any]]) -> list[str | Cell]:
    def values(key: str) -> list[float]:
        return [float(x[key]) for x in lines if x[key] is not None]

    def mean(key: str) -> float | None:
        return float(np.mean(values(key))) if values(key) else None

    rates = values("lr")
    return [
        str(epoch),
        count_cell(len(lines)),
        _loss_cell(mean("train_loss")),
        _loss_cell(mean("valid_loss")),
        value_cell(mean("valid_auc")),
        value_cell(min(values("valid_auc"), default=None)),
        value_cell(max(values("valid_auc"), default=None)),
        f"{min(rates):.3g}" if rates else NONE,
    ]


def _loss_cell(value: float | None) -> Cell:
    """Losses are of the order of 0.01: a fourth decimal."""
    return Cell(text=NONE if value is None else f"{value:.4f}", sort=value)


def _grid(run: Mapping[str, Any]) -> str:
    if len(run["grid"]) < 2:
        return ""
    fields = [name for name in run["grid"][0] if name not in GRID_COLUMNS]
    rows: Lines = [
        [
            str(row["config"] + 1) + (" (chosen)" if row["chosen"] else ""),
            *(str(row[name]) for name in fields),
            count_cell(row["epochs"]),
            value_cell(row["mean_auc"]),
            value_cell(row["std_auc"]),
            Cell(text=duration(row["seconds"]), sort=row["seconds"]),
        ]
        for row in run["grid"]
    ]
    head = ["configuration", *fields, "epochs", "mean AUC", "std", "time"]
    marks = [row["chosen"] for row in run["grid"]]
    return table(head, rows, caption="Configurations, by validation AUC", marks=marks, css="full sortable")


def data(material: Material) -> str:
    """What became of the images and labels, and where the positives went."""
    run = material.run
    flow = table(["", ""], _flow(material), caption="From the dataset to the folds", css="")
    rows = run["split_table"]
    columns = [name for name, value in rows[0].items() if isinstance(value, int)] if rows else []
    # The first rows are "(images)" and "(groups)"; a class may be called so too.
    sizes = [row for row in rows[:2] if row["class"] in ("(images)", "(groups)")]
    head = ["class", *(column(name) for name in columns)]
    body: Lines = [[row["class"], *(_positives(row[name]) for name in columns)] for row in rows[len(sizes) :]]
    foot: Lines = [[row["class"].strip("()"), *(count_cell(row[name]) for name in columns)] for row in sizes]
    spread = table(head, body, caption="Positives a fold", foot=foot, css="full sortable") if rows else ""
    by = run["spec"]["split_by"]
    said = (
        f"Split by {by}, seed {run['spec']['seed']}, every label spread over the folds as far as {by}s allow. In red: "
        "no positive there, so no AUC of this class."
    )
    if by == "image":
        said += " Views of one patient may lie in several folds and in the hold-out: figures are too good by that."
    return section("data", "Data and folds", flow, spread, note(said))


def _flow(material: Material) -> Lines:
    run = material.run
    images, held = run["images"], run["images"]["holdout"]
    skipped = int(run["cache"]["dataset"].get("skipped_missing") or 0)
    other = images["in"] - images["failed"] - images["used"]
    rows: Lines = [
        ["Listed but not found, skipped", count_cell(skipped)] if skipped else [],
        ["Images in", count_cell(images["in"])],
        ["Failed to read, left out", count_cell(images["failed"])],
        ["Not in the manifest given, left out", count_cell(other)] if other > 0 else [],
        ["Images used", count_cell(images["used"])],
        ["… in the folds", count_cell(images["used"] - held)],
        ["… held out", count_cell(held)],
        ["Groups (never split)" if run["spec"]["split_by"] == "group" else "Groups", count_cell(images["groups"])],
    ]
    labels = images["used"] * len(run["classes"])
    rows.append([f"Labels (images × {len(run['classes'])} classes)", count_cell(labels)])
    if material.unknown_labels is not None:
        share = f"{material.unknown_labels:,} ({100 * material.unknown_labels / max(labels, 1):.1f} %)"
        rows.append(["Unknown labels, masked everywhere", Cell(text=share, sort=material.unknown_labels)])
    return [row for row in rows if row]


def column(name: str) -> str:
    """`fold_0` of split.csv as people count: `fold 1`."""
    return f"fold {int(name[5:]) + 1}" if name.startswith("fold_") else name.replace("holdout", "hold-out")


def _positives(count: int) -> Cell:
    return Cell(text=f"{count:,}", sort=count, css="" if count else "none")


def recipe(material: Material) -> str:
    """Everything that was done differently from the published recipe."""
    told, train = material.run["recipe"], material.run["train"]
    differ = [row for row in told["differences"] if row["here"] != row["published"]]
    rows = [[str(row[key]) for key in ("field", "here", "published", "why")] for row in differ]
    rows += [[name, _said(here), _said(published), "by flag"] for name, here, published in by_flag(material.run)]
    head = ["choice", "here", "published", "why"]
    said = table(head, rows, caption="Choices", css="full words", show_caption=False) if rows else ""
    notes = [f"{text[0].upper()}{text[1:]}." for text in told["not_restored"]]
    notes += [
        f"As published, against this program's advice: {row['field']} {row['here']} ({row['why']})."
        for row in told["differences"]
        if row["here"] == row["published"] != row["default"]
    ]
    used = ", ".join(f"{name} {_said(value)}" for name, value in train.items())
    notes.append(f"All training settings: {used}.")
    return section("recipe", "Done differently from the published recipe", said, listing(notes, "note"))


def by_flag(run: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What a flag changed against the published recipe: field, value here, published value."""
    told = {row["field"] for row in run["recipe"]["differences"]}
    given = ((CacheSpec, run["cache"]["spec"]), (PreprocessSpec, run["preprocess"]), (SweepSpec, run["spec"]))
    out = []
    for spec, values in (*given, (TrainSpec, run["train"])):
        for name, here in values.items():
            # The size is the backbone's, the seed nobody's choice.
            if name in told or name in ("train", "preprocess", "size", "seed"):
                continue
            published = to_json_value(reference_value(spec, name))
            if here != published:
                out.append((name, here, published))
    return out


def to_json_value(value: Any) -> Any:
    """A default as `run.json` holds it."""
    return list(value) if isinstance(value, tuple) else value


def _said(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def facts(material: Material) -> str:
    """Hardware, versions, time, fingerprint."""
    run = material.run
    rows = [[name, value] for name, value in _facts(run).items() if value]
    return section("made", "How this was made", table(["", ""], rows, caption="Facts", css="words", show_caption=False))


def _facts(run: Mapping[str, Any]) -> dict[str, str | Cell]:
    machine, cache, spec = run["machine"], run["cache"], run["spec"]
    count, share = run["trainable"], 100 * spec["holdout"]
    gpus = ", ".join(
        str(gpu.get("name", gpu) if isinstance(gpu, Mapping) else gpu) for gpu in machine.get("gpus") or []
    )
    memory = machine.get("memory_gib")
    hardware = [
        f"trained on {run['device']}",
        machine.get("cpu") or "unknown CPU",
        f"{machine.get('cores', '?')} cores, threads: {run['threads']}",
        f"{memory:.0f} GiB memory" if memory else "",
        gpus,
    ]
    weights = f"{cache['weights']} (RANDOM, not BiomedCLIP)" if run["random_weights"] else cache["weights"]
    extra = "".join(f", {part} {count[part]:,}" for part in ("norm",) if count.get(part))
    versions = {**run["toolchain"], "Python": machine.get("python")}
    return {
        "weights": Cell(text=weights, css="random" if run["random_weights"] else ""),
        "cache fingerprint": cache["fingerprint"],
        "model": run["model_sha256"],
        "trained parameters": f"{count['total']:,}: blocks {count['blocks']:,}, head {count['head']:,}{extra}",
        "final model": f"{run['final']['kind']}: {run['final']['rule']}",
        "arithmetic": f"{run['precision']}, activations {run['residency']}",
        "split": f"{spec['folds']} folds by {spec['split_by']}, hold-out {share:g} %, seed {spec['seed']}",
        "labels from": cache["labels_from"],
        "hardware": ", ".join(part for part in hardware if part),
        "system": machine.get("os") or "",
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items() if value),
        "time": duration(run["seconds"]),
        "written": f"{run['written_by']}, {run['created']}",
    }


ALL: Sequence[Any] = (search, data, recipe, facts)
