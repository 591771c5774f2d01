"""Draw runs against each other: differences with their intervals as a forest plot, and curves over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...system.files import write_bytes
from .. import charts
from ..summary import FIGURES, Record

# Of the headline figures those of which more is better, in the order of a page.
FOREST = ("macro_auc", "micro_auc", "map", "macro_f1", "class_jaccard")
CURVES = (("roc", "1 − specificity", "sensitivity"), ("pr", "recall (sensitivity)", "precision (PPV)"))
MOST = len(charts.COLOURS)


def forest(pairs: Mapping[str, Record], first: str) -> Any | None:
    """Draw the difference of each run (by its name) to `first` in the figures FOREST, with its interval.

    Orange where the interval holds no 0. None where no figure has a difference.
    """
    rows: list[tuple[str, Record] | None] = []
    for key in FOREST:
        found = [(name, pair["figures"][key]) for name, pair in pairs.items() if key in pair["figures"]]
        known = [(name, each) for name, each in found if each["difference"] is not None]
        rows += [None] if rows and known else []  # room between figures
        rows += [(f"{_name(key, each)}, {charts.label(name, 18)}", each) for name, each in known]
    return _draw(rows, f"minus {charts.label(first, 30)}")


def _draw(rows: Sequence[tuple[str, Record] | None], across: str) -> Any | None:
    """Draw a row a difference, the first on top, and room for None; None without any."""
    if not any(rows):
        return None
    made, axes = charts.figure(charts.NARROW + 0.6, 0.9 + 0.2 * max(len(rows), 2))
    shown = [(place, *row) for place, row in enumerate(reversed(rows)) if row]
    for place, _, found in shown:
        colour = charts.COLOURS[1] if charts.excludes_zero(dict(found)) else charts.ACCENT
        if found["low"] is not None:
            ends = [found["low"], found["high"]]
            axes.plot(ends, [place, place], color=colour, lw=2.2, alpha=0.45, solid_capstyle="butt")
        axes.plot(_value(found), place, "s", ms=4.5, color=colour)
    axes.axvline(0, color=charts.INK, lw=1)
    axes.set_yticks([place for place, *_ in shown], [text for _, text, _ in shown])
    axes.set(xlabel=across, ylim=(-0.7, len(rows) - 0.3))
    axes.grid(axis="x", color=charts.FAINT, lw=0.5)
    axes.set_axisbelow(True)
    return made


def _value(found: Record) -> float:
    """The difference that the interval is of: of a mean over classes, of those classes alone that are behind it."""
    over = found.get("over") or {"value": None}
    return float(found["difference"] if over["value"] is None or found["low"] is None else over["value"])


def _name(key: str, found: Record) -> str:
    """The name of a figure, with the number of classes where its interval is over fewer than its mean."""
    over = found.get("over") or {}
    few = found["low"] is not None and over.get("left_out")
    return f"{FIGURES[key]} of {over['classes']} classes" if few else FIGURES[key]


def overlaid(evaluations: Mapping[str, Record | None]) -> Any | None:
    """Draw the ROC and precision-recall curves of all labels pooled of the first MOST runs over each other, each run on
    its own images. None where fewer than two have them."""
    known = {name: found["curves"]["micro"] for name, found in evaluations.items() if found and found.get("curves")}
    if len(known) < 2:
        return None
    made, both = charts.figure(2 * charts.NARROW, charts.NARROW + 0.2 * min(len(known), MOST), 1, 2)
    for axes, (kind, across, up) in zip(both, CURVES, strict=True):
        for colour, (name, curve) in zip(charts.COLOURS, known.items(), strict=False):
            x, y = zip(*curve[kind], strict=True)
            label = charts.label(name, 40) if kind == "roc" else None
            axes.plot(x, y, color=colour, lw=1.5, label=label, drawstyle="default" if kind == "roc" else "steps-pre")
        axes.set(xlabel=across, ylabel=up, xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    made.legend(loc="outside lower left", frameon=False, fontsize=8)
    return made


def draw_runs(
    pairs: Mapping[str, Record], evaluations: Mapping[str, Record | None], first: str
) -> dict[str, bytes | None]:
    """Return the pictures of a comparison as PNG, `forest` and `overlaid`; None where there is nothing to draw."""
    found = {"forest": forest(pairs, first), "overlaid": overlaid(evaluations)}
    return {name: None if made is None else charts.png(made) for name, made in found.items()}


def check_path(path: Path) -> None:
    """Raise InputError unless a forest plot can be written under this name."""
    if path.suffix.lstrip(".") not in charts.FORMATS:
        raise InputError(f"--plot: {path} must end in {', '.join(f'.{kind}' for kind in charts.FORMATS)}.")


def write_forest(result: Record, path: Path) -> None:
    """Write what `compare` found as a forest plot: the headline figures, and below them the AUC of each class.

    InputError where the name has another ending, or the runs have no figure in common.
    """
    check_path(path)
    made = _headline_and_classes(result)
    if made is None:
        raise InputError("--plot: no figure of these runs has a difference; leave it out.")
    write_bytes(path, charts.render(made)[path.suffix.lstrip(".")], "--plot")


def _headline_and_classes(result: Record) -> Any | None:
    figures = {key: result["figures"].get(key) for key in FOREST}
    rows: list[tuple[str, Record] | None] = [
        (_name(key, found), found) for key, found in figures.items() if found and found["difference"] is not None
    ]
    classes = [row for row in result["per_class"] if row["auc"]["difference"] is not None]
    classes.sort(key=lambda row: -row["auc"]["difference"])
    rows += [None] if rows and classes else []
    rows += [(f"AUC, {charts.label(row['class'])} ({row['positives']:,})", row["auc"]) for row in classes]
    return _draw(rows, "B minus A")
