"""An evaluation of a model file to its page, and the same figures as JSON, CSV and pictures."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..report import charts, class_means, evaluation, probabilities, tables
from ..report.at_a_glance import tables as glance
from ..report.at_a_glance.pictures import drawings
from ..report.html import render_page
from ..report.summary import Record, ReportData, as_figure, of_classes
from ..report.writer import name_figures
from ..system.files import atomic
from ..system.text import Figure, Label, Table, to_csv
from . import improvement, training_figures
from .evaluation import call_table

PAGE, EVALUATION = "report.html", "evaluation.json"
OWN = (
    *(PAGE, EVALUATION, "figures.csv", "confusion.csv", "curves.csv", "reliability.csv", "cooccurrence.csv"),
    *("recalibration.csv", "decision_curves.csv", "per_class.csv", "training.csv", "set_here.csv"),
    *("operating_points.csv", "mistaken.csv"),
    *(f"{picture}.{kind}" for picture in charts.PICTURES for kind in charts.FORMATS),
)


@dataclass(frozen=True, kw_only=True)
class ExternalData(ReportData):
    """All that the page of an evaluated model file may say."""

    @property
    def same_data(self) -> str:
        """A warning where the films have the name of the training data; empty elsewhere."""
        return warn_same_data(self.evaluation or {})

    def summary(self) -> list[str]:
        """What was scored, how well it does, beside the training data, and how far that can be trusted."""
        found = self.evaluation or {}
        data, part = found["data"], found["parts"]["external"]
        named = {"macro_auc": "macro AUC", "map": "mAP", "macro_f1": "macro F1"}
        figures = [f"{name} is {as_figure(part['figures'][key])}" for key, name in named.items()]
        figures[0] += f" over {of_classes(part)} classes"
        lines = [
            f"{found['model']['file']}, trained on {found['model']['trained_on']}, on {part['n']:,} films of "
            f"{part['groups']:,} groups of {data['name']}: {', '.join(figures[:-1])} and {figures[-1]}.",
        ]
        lines += [text] if (text := describe_training(found)) else []
        return [*lines, self._trust()]


def warn_same_data(found: Record) -> str:
    """Say that these films have the name of the training data, or of those on which the file's thresholds were set;
    empty where they have neither."""
    name = found["data"]["name"]
    if found["model"]["recalibrated"] == name:
        return (
            f"The thresholds of this file were set on films called {name}, as these are. If these are the same, the "
            "figures at its thresholds and of its calibration are too good."
        )
    if found["model"]["trained_on"] != name:
        return ""
    return (
        f"These films and the training data are both called {name}. If films of the training data are among them, the "
        "figures also tell how well the model remembers."
    )


def describe_training(found: Record) -> str:
    """One sentence: macro AUC there and here; empty where the file does not say."""
    each = (found["training"] or {"figures": {}})["figures"].get("macro_auc")
    if not each or each["difference"] is None:
        return ""
    classes = f" over the same {each['classes']} classes" if each["classes"] else ""
    change = Figure(value=each["difference"], signed=True)
    words = training_figures.WORDS[found["training"]["part"]]
    return (
        f"On the {words} of the training data macro AUC was {Figure(value=each['training'])}{classes}, here it is "
        f"{Figure(value=each['here'])} ({change})."
    )


def write_page(found: Record, folder: Path, title: str) -> Path:
    """Write the page, evaluation.json, the CSV files and the pictures of an evaluation into a folder; the page's path.

    Files of an earlier evaluation that this one does not make are removed. Raises InputError where the folder cannot be
    written.
    """
    pictures = charts.draw({**charts.evaluation_plots(dict(found)), **drawings(dict(found))})
    csv = {name: to_csv(table, "\r\n").encode() for name, table in csv_tables(found).items()}
    text = (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode()
    files = {EVALUATION: text, **csv, **pictures, PAGE: render(found, title, pictures)}
    with contextlib.ExitStack() as stack:  # all files or none; the page, entered first, gets its name last
        for name, data in reversed(files.items()):
            file = stack.enter_context(atomic(folder / name, "--out", folders=True))
            file.write(data)
            file.flush()
    for name in {*OWN} - {*files}:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    return folder / PAGE


def csv_tables(found: Record) -> dict[str, Table]:
    """The CSV files of a report, and those of the training figures and of what was set here."""
    out = evaluation.csv_tables(found)
    for name, table in {"training.csv": _training_rows(found), "set_here.csv": _point_rows(found)}.items():
        if table.rows:
            out[name] = table
    return out


def _training_rows(found: Record) -> Table:
    record = found["training"] or {"figures": {}, "per_class": []}
    sides = ("training", "here", "difference")
    rows = [["", key, *(each[side] for side in sides), each["classes"]] for key, each in record["figures"].items()]
    for row in record["per_class"]:
        for key in training_figures.OF_CLASSES:
            rows.append([row["class"], key, *(row[key][side] for side in sides), None])
    return Table(columns=["class", "figure", *sides, "classes"], rows=rows)


def _point_rows(found: Record) -> Table:
    record = found.get("set_here") or {"per_class": []}
    rows = []
    for row in record["per_class"]:
        for key in ("threshold", "called", *improvement.AT_THRESHOLDS):
            before, after = (row[key][side] for side in ("before", "after"))
            values = [each["value"] if isinstance(each, Mapping) else each for each in (before, after)]
            rows.append([row["class"], key, *values, row["kept"]])
    return Table(columns=["class", "figure", "before", "after", "kept"], rows=rows)


def render(found: Record, title: str, pictures: Mapping[str, bytes]) -> bytes:
    """The page of one evaluation."""
    data = found["data"]
    dataset = {"name": data["name"], "kind": data["kind"], "label_rules": data["label_rules"]}
    run = {
        "cache": {"dataset": dataset},
        "provenance": found["model"]["provenance"],
        "classes": data["classes"],
        "calibration": found["model"]["calibration"],
        "written_by": found["written_by"],
        "created": found["created"],
    }
    material = ExternalData(
        run=run,
        evaluation=found,
        missing=tuple(map(name_figures, found["missing"])),
        unknown_labels=data["unknown_labels"],
        plots=pictures,
        title=title,
    )
    rows = charts.largest(dict(found))
    named = "Counts of the six largest classes" if len(rows) == charts.LARGEST else "Counts of the classes"
    frequent = class_means.rarity_table(material.named_parts, found["rarity"])
    notes = [note.replace("of the images of the folds", "of these films") for note in frequent.notes]
    return render_page(
        "external.html.j2",
        kind="evaluation of a model file",
        material=material,
        tables=tables,
        means=class_means,
        probabilities=probabilities,
        improvement=improvement,
        training=training_figures,
        calls=call_table(found["per_class"], found["confusion"]),
        frequent=replace(frequent, notes=notes),
        confusions=tables.confusion_table(rows, named),
        stated=probabilities.prevalence_table(material.ranked()),
        facts=fact_table(found),
        glance=glance,
    )


def fact_table(found: Record) -> Table:
    """The model file and the films, as a page names them."""
    model, data = found["model"], found["data"]
    unlike = data["unlikeness"]
    failed = ", ".join(f"{count:,} {reason}" for reason, count in data["failed_by"].items())
    renamed = [
        f"{column} as {name}" for name, column in zip(data["classes"], data["columns"], strict=True) if name != column
    ]
    facts = {
        "model file": f"{model['file']}, {model['variant']}",
        "content": f"sha256 {model['content_sha256']}",
        "weights": f"sha256 {model['model_sha256']}",
        "trained on": model["trained_on"],
        "thresholds set on": model["recalibrated"],
        "thresholds": model["threshold_source"],
        "films": f"{data['answered']:,} of {data['images']:,} in {data['name']}",
        "failed films": Label(text=failed, alarm=True) if failed else None,
        "films unlike the training films": f"{unlike['over_1']:,} of {unlike['films']:,} over 1" if unlike else None,
        "classes": f"{len(data['classes'])} of {model['classes']}",
        "columns taken as classes": ", ".join(renamed),
        "classes without a column": ", ".join(data["lacking"]),
        "columns that are no class": ", ".join(data["unknown"]),
        "unlikeness": describe_unlikeness(data["unlikeness"]),
        "unknown labels": f"{data['unknown_labels']:,}, left out of every figure",
        "written": f"{found['written_by']}, {found['created']}",
    }
    return Table(title="Facts", columns=["", ""], rows=[[name, value] for name, value in facts.items() if value])


def describe_unlikeness(found: Record | None) -> str:
    """Say how many films are unlike the training films; empty where the file does not say."""
    if not found:
        return ""
    over, films = found["over_1"], found["films"]
    return (
        f"{over:,} of {films:,} films ({100 * over / films:.1f} %) are less like the training films than 99 % of those "
        f"(unlikeness over 1); the median is {found['quartiles'][1]:.2f}"
    )


def render_pair(sides: Mapping[str, Record], pair: Record, missing: Sequence[str]) -> bytes:
    """The page of two models on the films that both answered; `sides` their evaluations by name, the first first."""
    first, other = sides
    parts = {name: found["parts"]["external"] for name, found in sides.items()}
    plots = {}
    if any(row["auc"]["difference"] is not None for row in pair["per_class"]):
        plots[other] = charts.png(charts.differences(pair["per_class"], (first, other)))
    from ..report import comparison, settings
    from ..report.at_a_glance.forest import draw_runs

    return render_page(
        "external_comparison.html.j2",
        kind="models",
        runs={name: {"provenance": found["model"]["provenance"]} for name, found in sides.items()},
        evaluations=dict(sides),
        pairs={other: pair},
        missing=missing,
        plots=plots,
        all_runs=draw_runs({other: pair}, dict(sides), first),
        comparison=comparison,
        means=class_means,
        settings=settings,
        beside=tables.figure_table(parts, "Figures of each model"),
    )


def write_pair(path: Path, page: bytes, pair: Any) -> None:
    """Write the comparison's page, and the same figures as JSON beside it."""
    text = (json.dumps(pair, indent=1, ensure_ascii=False) + "\n").encode()
    for name, data in ((path.with_suffix(".json"), text), (path, page)):
        with atomic(name, "--out", folders=True) as file:
            file.write(data)
