"""Draw what a search tried: the validation AUC of every configuration over each field of its grid."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

from ...grid.axes import Axis
from ...grid.points import read_axes
from .. import charts
from ..summary import Record
from .grid_tables import searched_fields

MOST = 6  # fields that are drawn
WIDE = 20.0  # how many times the least of listed values the highest is, from where their axis is logarithmic


def drawings(run: Record) -> Mapping[str, charts.Draw]:
    """How to draw the search, by the name of the picture; nothing where one configuration was trained."""
    rows = [row for row in run["grid"] if row["mean_auc"] is not None]
    fields = [name for name in searched_fields(run) if len({str(row[name]) for row in rows}) > 1][:MOST]
    flags = (run.get("search") or {}).get("grid", ())  # runs of earlier versions have none
    log = {axis.name for axis in read_axes(flags, drawn=True) if _is_log(axis)}
    return {"grid_plot": lambda: draw_grid(rows, fields, log)} if len(rows) > 1 and fields else {}


def _is_log(axis: Axis) -> bool:
    if axis.values is None:
        return axis.log
    numbers = [value for value in axis.values if isinstance(value, float)]
    return bool(numbers) and len(numbers) == len(axis.values) and 0 < WIDE * min(numbers) <= max(numbers)


def draw_grid(rows: Sequence[Record], fields: Sequence[str], log: Container[str] = ()) -> Any:
    """Draw a panel for each field: its values across (those of `log` by their logarithm), mean validation macro AUC up
    with the spread over folds, the chosen configuration in orange."""
    columns = min(len(fields), 3)
    lines = math.ceil(len(fields) / columns)
    made, axes = charts.figure(charts.NARROW * (0.4 + 0.6 * columns), 2.4 * lines, lines, columns, squeeze=False)
    for name, each in zip(fields, axes.flat, strict=False):
        _panel(each, rows, name, log=name in log)
    for each in list(axes.flat)[len(fields) :]:
        each.set_visible(False)
    for line in axes:
        line[0].set_ylabel("validation macro AUC")
    return made


def _panel(axes: Any, rows: Sequence[Record], name: str, *, log: bool) -> None:
    values = [row[name] for row in rows]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    names = [] if numbers else sorted({str(value) for value in values})
    across = values if numbers else [names.index(str(value)) for value in values]
    for x, row in zip(across, rows, strict=True):
        colour = charts.COLOURS[1] if row["chosen"] else charts.ACCENT
        axes.errorbar(
            x,
            row["mean_auc"],
            row["std_auc"] or 0.0,
            fmt="o",
            ms=5.5 if row["chosen"] else 3.5,
            color=colour,
            ecolor=charts.FAINT,
            elinewidth=0.8,
            zorder=3 if row["chosen"] else 2,
        )
    axes.set_xlabel(name)
    if not numbers:
        axes.set_xticks(range(len(names)), [charts.label(text, 12) for text in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
    elif log:
        axes.set_xscale("log")
    elif len(set(values)) <= MOST and all(isinstance(value, int) for value in values):
        axes.set_xticks(sorted(set(values)))
    axes.grid(axis="y", color=charts.FAINT, lw=0.5)
    axes.set_axisbelow(True)
