"""A run's saved files (never a model) to one self-contained HTML page and its plots."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError
from .runs import read_info

PUBLISHED = {
    "label_accuracy": "Label-wise accuracy",
    "macro_auc": "Macro AUC",
    "sample_jaccard": "Sample-wise Jaccard",
    "class_jaccard": "Per-class Jaccard, mean",
    "macro_f1": "Macro F1",
    "map": "mAP",
}
NOTICE = "Research use only. Not a medical device; not for diagnosis or treatment."
INK, ACCENT, GREY = "#1b2a3a", "#2f6f9f", "#8a97a5"

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1b2a3a;max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #d8dee4}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem;width:100%}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #e6eaee}
th:first-child,td:first-child{text-align:left}
th{font-weight:600}tr.chosen{background:#e8f1f8;font-weight:600}.scroll{overflow-x:auto}
img{max-width:100%;height:auto}.muted{color:#5b6875;font-size:.9rem}
.warn{color:#a8071a;border:2px solid #a8071a;border-radius:4px;padding:.5rem .8rem;font-weight:700}
@media print{body{max-width:none;margin:0}h2{break-after:avoid}tr{break-inside:avoid}}
"""


def write(folder: Path) -> Path:
    """Write `report.html` and the plots into the run folder; the page's path. InputError when it is not a run."""
    run, history = _load(folder)
    plots = {"epoch_search_plot.png": _budget_plot(run), "training_plot.png": _history_plot(history)}
    if run["per_class"]:
        plots["per_class_plot.png"] = _class_plot(run)
    for name, data in plots.items():
        _put(folder / name, data)
    page = folder / "report.html"
    _put(page, _page(run, plots).encode())
    return page


def _put(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    scratch = path.with_name(path.name + f".partial.{os.getpid()}")
    try:
        scratch.write_bytes(data)
        os.replace(scratch, path)
    except OSError as error:
        raise InputError(f"{path}: cannot write it: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def _load(folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    import pandas as pd

    run, table = read_info(folder), folder / "history.csv"
    if not table.is_file():
        raise InputError(f"{folder}: history.csv is missing; run the sweep again.")
    return run, pd.read_csv(table).to_records(index=False)


def _page(run: dict[str, Any], plots: dict[str, bytes]) -> str:
    warn = f'<p class="warn">{_text(run["provenance"].capitalize())}: no figure on this page says anything about '
    warn += "real radiographs or real BiomedCLIP.</p>"
    parts = [
        f"<h1>{_text(run['cache']['dataset']['name'])}: fine-tuning report</h1>",
        f'<p class="muted">{_text(run["written_by"])}, {_text(run["created"])}</p>',
        warn if run["provenance"] else "",
        f"<p>{_summary(run)}</p>",
        "<h2>Figures</h2>",
        _figures_table(run),
        '<p class="muted">Thresholds: F1 on out-of-fold predictions, never on the hold-out. A class without a positive '
        "or without a negative has no AUC and is left out of the mean.</p>",
        "<h2>Folds: validation macro AUC</h2>",
        _fold_table(run),
        "<h2>Epoch search</h2>",
        _image("epoch search", plots["epoch_search_plot.png"]),
        _image("training", plots["training_plot.png"]),
    ]
    if run["per_class"]:
        parts += ["<h2>Classes on the hold-out</h2>", _image("AUC a class", plots["per_class_plot.png"]), _classes(run)]
    parts += ["<h2>Positives a fold</h2>", _split_table(run)]
    parts += ["<h2>Final models on the hold-out</h2>", _finals_table(run)] if run["finals"] else []
    parts += ["<h2>Configurations</h2>", _grid_table(run)] if len(run["grid"]) > 1 else []
    parts += ["<h2>How this was made</h2>", _facts(run)]
    parts += ["<h2>Against the published recipe</h2>", _recipe(run)]
    parts.append(f'<p class="muted">{NOTICE}</p>')
    title = _text(f"cxr-fast: {run['cache']['dataset']['name']}")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    head += f"<title>{title}</title>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _summary(run: dict[str, Any]) -> str:
    images, chosen, held = run["images"], run["chosen"], run["metrics"]["holdout"]
    text = (
        f"{images['used']:,} images of {images['groups']:,} groups, {len(run['classes'])} classes; "
        f"{run['trainable']['total']:,} trained parameters. The search chose {chosen['epochs']} epochs and fold "
        f"{chosen['fold'] + 1}, on validation alone."
    )
    if held is None:
        return _text(text + " There is no hold-out.")
    return _text(
        f"{text} On the {held['n']:,} held-out images the macro AUC is {_number(held['macro_auc'])} over "
        f"{held['classes_defined']} of {held['classes_total']} classes, and {_number(held['frequent_auc'])} over the "
        f"{held['frequent_classes']} classes with at least {held['frequent_min_positives']} positives there."
    )


def _figures_table(run: dict[str, Any]) -> str:
    parts = {"out of fold": run["metrics"]["out_of_fold"], "hold-out": run["metrics"]["holdout"]}
    found = {name: figures for name, figures in parts.items() if figures}
    head = ["figure", *found, *(f"{name}, at 0.5" for name in found)]
    rows = [
        [text, *(_number(f[key]) for f in found.values()), *(_number(f["at_0.5"][key]) for f in found.values())]
        for key, text in PUBLISHED.items()
    ]
    rows.append(["Classes with an AUC", *(f"{f['classes_defined']} of {f['classes_total']}" for f in found.values())])
    rows.append(["Images", *(f"{f['n']:,}" for f in found.values())])
    return _table(head, rows)


def _fold_table(run: dict[str, Any]) -> str:
    budgets = [b["epochs"] for b in run["budgets"]]
    head = ["fold", "images", "classes with an AUC", *(f"{b} epochs" for b in budgets)]
    rows, marks = [], []
    for fold in run["folds"]:
        scores = [_number(fold[f"auc_{b}"]) for b in budgets]
        rows.append([str(fold["fold"] + 1), f"{fold['images']:,}", str(fold["classes_defined"]), *scores])
        marks.append(fold["best"])
    rows.append(["mean", "", "", *(_number(b["mean_auc"]) for b in run["budgets"])])
    rows.append(["std", "", "", *(_number(b["std_auc"]) for b in run["budgets"])])
    return _table(head, rows, [*marks, False, False])


def _finals_table(run: dict[str, Any]) -> str:
    kinds = list(run["finals"])
    rows = [[kind, *(_number(run["finals"][kind][key]) for key in PUBLISHED)] for kind in kinds]
    marks = [kind == run["final"]["kind"] for kind in kinds]
    note = '<p class="muted">The marked one was chosen by flag before the hold-out was scored.</p>'
    return _table(["final model", *PUBLISHED.values()], rows, marks) + note


def _grid_table(run: dict[str, Any]) -> str:
    plain = ("config", "epochs", "mean_auc", "std_auc", "seconds", "chosen")
    fields = [name for name in run["grid"][0] if name not in plain]
    rows = [
        [
            str(r["config"] + 1),
            *(str(r[f]) for f in fields),
            str(r["epochs"]),
            _number(r["mean_auc"]),
            _number(r["std_auc"]),
            f"{r['seconds']:.1f} s",
        ]
        for r in run["grid"]
    ]
    head = ["configuration", *fields, "epochs", "mean AUC", "std", "time"]
    return _table(head, rows, [r["chosen"] for r in run["grid"]])


def _recipe(run: dict[str, Any]) -> str:
    rows = [[r["field"], r["here"], r["published"], r["why"]] for r in run["recipe"]["differences"]]
    notes = "".join(f'<p class="muted">{_text(text)}.</p>' for text in run["recipe"]["not_restored"])
    return _table(["choice", "here", "published", "why ours differs"], rows) + notes


def _classes(run: dict[str, Any]) -> str:
    head = ["class", "AUC", "AP", "Jaccard", "F1", "threshold", "positives", "tier"]
    keys = ("auc", "ap", "jaccard", "f1", "threshold")
    order = sorted(run["per_class"], key=lambda row: -1 if row["auc"] is None else row["auc"], reverse=True)
    rows = [[r["class"], *(_number(r[k]) for k in keys), f"{r['positives']:,}", r["tier"]] for r in order]
    return _table(head, rows)


def _split_table(run: dict[str, Any]) -> str:
    columns = [name for name, value in run["split_table"][0].items() if isinstance(value, int)]
    rows = [[r["class"], *(f"{r[name]:,}" for name in columns)] for r in run["split_table"]]
    return _table(["class", *(_column(name) for name in columns)], rows)


def _facts(run: dict[str, Any]) -> str:
    machine, cache, spec = run["machine"], run["cache"], run["spec"]
    train = spec["train"]
    rows = [
        ["weights", f"{cache['weights']}{' (RANDOM)' if run['random_weights'] else ''}"],
        ["cache fingerprint", cache["fingerprint"][:16]],
        ["trained", f"blocks {run['trainable']['blocks']:,}, head {run['trainable']['head']:,}"],
        ["recipe", f"{train['loss']} loss, lr {train['lr']:g}, batch {train['batch_size']}, {run['precision']}"],
        ["split", f"{spec['folds']} folds by {spec['split_by']}, hold-out {spec['holdout']:.0%}, seed {spec['seed']}"],
        ["images", f"{run['images']['in']:,} in, {run['images']['failed']:,} failed, {run['images']['used']:,} used"],
        ["hardware", f"{run['device']}, {machine.get('cpu', 'unknown CPU')}, {machine.get('cores', '?')} cores"],
        ["versions", ", ".join(f"{k} {v}" for k, v in run["toolchain"].items())],
        ["time", f"{run['seconds']:.1f} s"],
    ]
    return _table(["", ""], rows)


def _table(head: list[str], rows: list[list[str]], marks: list[bool] | None = None) -> str:
    def cells(tag: str, row: list[str]) -> str:
        return "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in row)

    marks = marks or [False] * len(rows)
    body = "\n".join(
        f"<tr{' class=chosen' if mark else ''}>{cells('td', row)}</tr>" for row, mark in zip(rows, marks, strict=True)
    )
    return (
        f'<div class="scroll"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    )


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _budget_plot(run: dict[str, Any]) -> bytes:
    figure, axes = _figure(7, 3.6)
    epochs = [b["epochs"] for b in run["budgets"]]
    for fold in run["folds"]:
        axes.plot(epochs, [fold[f"auc_{e}"] for e in epochs], color=GREY, lw=0.8, marker=".", alpha=0.7)
    means, spread = [b["mean_auc"] for b in run["budgets"]], [b["std_auc"] for b in run["budgets"]]
    axes.errorbar(epochs, means, spread, color=ACCENT, lw=2, marker="o", capsize=3, label="mean and std of folds")
    chosen = next(b for b in run["budgets"] if b["chosen"])
    axes.plot(chosen["epochs"], chosen["mean_auc"], "o", ms=13, mfc="none", mec=INK, label="chosen")
    axes.set(xlabel="epochs", ylabel="validation macro AUC", xticks=epochs)
    axes.legend(frameon=False)
    return _png(figure)


def _history_plot(history: np.ndarray) -> bytes:
    figure, axes = _figure(7, 3.2)
    for fold in np.unique(history["fold"]):
        rows = history[history["fold"] == fold]
        axes.plot(rows["epoch"], rows["valid_auc"], lw=1, label=f"fold {fold + 1}")
    axes.set(xlabel="epoch", ylabel="validation macro AUC")
    axes.legend(frameon=False, fontsize=8, ncols=5)
    return _png(figure)


def _class_plot(run: dict[str, Any]) -> bytes:
    known = sorted((r for r in run["per_class"] if r["auc"] is not None), key=lambda r: r["auc"])
    figure, axes = _figure(7, 0.8 + 0.22 * max(len(known), 1))
    places = range(len(known))
    axes.barh(places, [r["auc"] for r in known], color=ACCENT)
    axes.set_yticks(places, [f"{_label(r['class'])} ({r['positives']})" for r in known])
    axes.axvline(0.5, color=GREY, lw=1, ls=":")
    axes.set(xlabel="hold-out AUC (positives in brackets)", xlim=(0, 1))
    axes.tick_params(axis="y", labelsize=8)
    return _png(figure)


def _label(name: str) -> str:
    """A class name as matplotlib shows it: short enough to leave room for bars, and never a formula."""
    short = name if len(name) <= 40 else name[:39] + "…"
    return short.replace("$", r"\$")


def _image(alt: str, data: bytes) -> str:
    return f'<img alt="{_text(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _column(name: str) -> str:
    return f"fold {int(name[5:]) + 1}" if name.startswith("fold_") else name


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}"


def _text(value: Any) -> str:
    return html.escape(str(value))
