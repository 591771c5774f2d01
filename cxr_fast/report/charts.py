"""Every picture of a report as PNG, SVG and PDF, from the dicts the page shows and nothing else."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

INK, ACCENT, GREY, FAINT = "#1b2a3a", "#1d5c8f", "#6b7884", "#c9d2da"
# Okabe and Ito: colour-blind readers can tell them apart too, and by lightness in a grey print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DPI = 160
# Inches. One column of a phone: what is drawn no wider stays readable there.
NARROW = 4.4
LARGEST = 6
PICTURES = (
    *("epoch_search_plot", "training_plot", "evaluation_plot", "precision_plot", "confusion_matrices"),
    *("roc_curves", "pr_curves", "reliability_diagram", "decision_curves", "cooccurrence_plot"),
    *("strip_plot", "mistaken_plot", "grid_plot"),
)
# A file each: the page and slides take PNG, papers SVG or PDF.
FORMATS = ("png", "svg", "pdf")
# Text stays text, for editors and searches, and no file names a day: the same figures are the same bytes.
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "cxr-fast", "pdf.fonttype": 42}
# What a font holds for kerning, ligatures and formulas. No PDF has a use for it, and to cut it down to the letters of a
# figure took a fifth of the time of the pictures (benchmarks/LOG.md).
UNUSED_TABLES = ("GDEF", "GPOS", "GSUB", "MATH", "kern")
# The cells of a confusion matrix, rows by the reference standard and columns as predicted, as journals print them.
CELLS = (("tp", "fn"), ("fp", "tn"))
CELL_NAMES = {"tp": "true positive", "fp": "false positive", "fn": "false negative", "tn": "true negative"}

Row = dict[str, Any]


Draw = Callable[[], Any]


def all_plots(
    run: Row, history: Sequence[Row], evaluation: Row | None, more: Mapping[str, Draw] | None = None
) -> dict[str, bytes]:
    """The pictures of a run by file name, each in every one of FORMATS; those whose data is missing are left out.

    `more` are others by name, each a function that draws a figure.
    """
    plots: dict[str, Draw] = {"epoch_search_plot": lambda: epoch_search(run), **(more or {})}
    if history:
        plots["training_plot"] = lambda: training(history)
    return draw(plots | evaluation_plots(evaluation or {}))


def evaluation_plots(known: Row) -> dict[str, Draw]:
    """How to draw each picture of an evaluation, by name; none for an empty one."""
    plots: dict[str, Draw] = {}
    if any(row["auc"]["value"] is not None for row in known.get("per_class", [])):
        plots["evaluation_plot"] = lambda: class_intervals(known["per_class"], "auc", "AUC")
        plots["precision_plot"] = lambda: class_intervals(known["per_class"], "ap", "average precision")
    if known.get("confusion"):
        plots["confusion_matrices"] = lambda: confusion(largest(known))
    if known.get("curves"):
        plots["roc_curves"] = lambda: curve_plot(known, "roc")
        plots["pr_curves"] = lambda: curve_plot(known, "pr")
    if known.get("reliability"):
        plots["reliability_diagram"] = lambda: reliability(known["reliability"])
    if (known.get("decisions") or {}).get("curves"):
        plots["decision_curves"] = lambda: decision_plot(known)
    if len(known.get("cooccurrence", {}).get("classes", [])) > 1:
        plots["cooccurrence_plot"] = lambda: cooccurrence(known["cooccurrence"])
    return plots


def draw(plots: dict[str, Draw]) -> dict[str, bytes]:
    """The pictures by file name, each in every one of FORMATS."""
    return {f"{name}.{kind}": data for name, made in plots.items() for kind, data in render(made()).items()}


def largest(evaluation: Row) -> list[Row]:
    """The confusion counts of the classes with most positives, most first."""
    order = sorted(evaluation["confusion"], key=lambda row: -(row["tp"] + row["fn"]))
    return order[:LARGEST]


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **named: Any) -> tuple[Any, Any]:
    """A figure without a window or global state, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(rows, columns, **named)
    for each in np.atleast_1d(axes).flat:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=8)
        each.xaxis.label.set_size(9)
        each.yaxis.label.set_size(9)
    return made, axes


def png(made: Any) -> bytes:
    """The figure as PNG; a script the font lacks is drawn as boxes without a word on the terminal.

    The bytes are those of `made.savefig`, which draws once more for a layout that this drawing finds as well.
    """
    buffer = io.BytesIO()
    with _quiet():
        made.canvas.print_png(buffer)
    return buffer.getvalue()


def render(made: Any) -> dict[str, bytes]:
    """The figure in every one of FORMATS, all with the layout of the PNG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    raster, svg, pdf = png(made), io.BytesIO(), io.BytesIO()
    made.set_layout_engine("none")  # keeps the places found; finding them again takes as long as drawing
    with _quiet(), rc_context(SETTINGS), _small_fonts():
        FigureCanvasSVG(made).print_svg(svg, metadata={"Date": None})
        FigureCanvasPdf(made).print_pdf(pdf, metadata={"CreationDate": None})
    return dict(zip(FORMATS, (raster, svg.getvalue(), pdf.getvalue()), strict=True))


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


@contextmanager
def _small_fonts() -> Iterator[None]:
    """Load fonts for a PDF without UNUSED_TABLES. A matplotlib that loads them in another way embeds the same letters,
    only slower."""
    from fontTools import subset

    load = subset.load_font

    def load_letters(*arguments: Any, **named: Any) -> Any:
        font = load(*arguments, **named)
        for tag in UNUSED_TABLES:
            if tag in font:
                del font[tag]
        return font

    subset.load_font = load_letters
    try:
        yield
    finally:
        subset.load_font = load


def label(name: str, length: int = 26) -> str:
    """A class name as matplotlib shows it: short enough to leave room, and never a formula."""
    short = name if len(name) <= length else name[: length - 1] + "…"
    return short.replace("$", r"\$")


def epoch_search(run: Row) -> Any:
    """Validation macro AUC against the epoch budget: each fold, and their mean with its spread."""
    made, axes = figure(NARROW, 3.2)
    epochs = [b["epochs"] for b in run["budgets"]]
    for fold in run["folds"]:
        scores = _floats(fold[f"auc_{e}"] for e in epochs)
        axes.plot(epochs, scores, color=ACCENT if fold["best"] else GREY, lw=0.9, marker=".", alpha=0.8)
    means, spread = (_floats(b[key] for b in run["budgets"]) for key in ("mean_auc", "std_auc"))
    axes.errorbar(epochs, means, spread, color=INK, lw=2, marker="o", ms=4, capsize=3, label="mean ± std of folds")
    for budget in (b for b in run["budgets"] if b["chosen"]):
        axes.plot(budget["epochs"], budget["mean_auc"], "o", ms=12, mfc="none", mec=COLOURS[1], mew=1.6, label="chosen")
    axes.plot([], [], color=ACCENT, marker=".", lw=0.9, label="best fold")
    axes.plot([], [], color=GREY, marker=".", lw=0.9, label="other folds")
    axes.set(xlabel="epochs", ylabel="validation macro AUC", xticks=epochs)
    _legend_below(made, axes)
    return made


def training(history: Sequence[Row]) -> Any:
    """Training loss and validation macro AUC of each fold, epoch by epoch."""
    made, (above, below) = figure(NARROW, 4.2, 2, 1, sharex=True)
    for k, colour in zip(sorted({row["fold"] for row in history}), COLOURS * 20, strict=False):
        lines = [row for row in history if row["fold"] == k]
        epochs = [row["epoch"] for row in lines]
        above.plot(epochs, _floats(row["train_loss"] for row in lines), lw=1.1, color=colour)
        marker = "." if len(epochs) < 12 else ""
        scores = _floats(row["valid_auc"] for row in lines)
        below.plot(epochs, scores, lw=1.1, marker=marker, color=colour, label=f"fold {k + 1}")
    above.set_ylabel("training loss")
    below.set(xlabel="epoch", ylabel="validation macro AUC")
    _legend_below(made, below, columns=5)
    return made


def class_intervals(rows: Sequence[Row], key: str, name: str) -> Any:
    """One line per class, best above: the figure as a dot, its interval as a bar, chance where it is known."""
    known = sorted((row for row in rows if row[key]["value"] is not None), key=lambda row: row[key]["value"])
    made, axes = figure(NARROW, 0.9 + 0.19 * max(len(known), 2))
    places = np.arange(len(known))
    values = [row[key]["value"] for row in known]
    ends = [[row[key]["low"], row[key]["high"]] for row in known]
    for place, (low, high) in zip(places, ends, strict=True):
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=ACCENT, lw=2.2, alpha=0.45, solid_capstyle="butt")
    axes.plot(values, places, "o", ms=4, color=ACCENT, label=f"{name}, 95 % interval")
    if key == "ap":
        chance = _floats(row["prevalence"] for row in known)
        axes.plot(chance, places, "|", ms=7, mew=1.6, color=COLOURS[1], label="prevalence (chance)")
        _legend_below(made, axes)
    else:
        axes.axvline(0.5, color=GREY, lw=1, ls=":")
    axes.set_yticks(places, [f"{label(row['class'])} ({row['positives']:,})" for row in known])
    axes.set(xlabel=name, xlim=(-0.02, 1.02), ylim=(-0.7, len(known) - 0.3))
    axes.grid(axis="x", color=FAINT, lw=0.5)
    axes.set_axisbelow(True)
    return made


def confusion(rows: Sequence[Row]) -> Any:
    """Two by two counts of the largest classes against the reference standard, shaded by the share of their row."""
    lines = -(-len(rows) // 2)
    made, axes = figure(NARROW, 2.45 * lines, lines, 2, squeeze=False)
    for place, row in zip(axes.flat, rows, strict=False):
        counts = np.array([[row[key] for key in line] for line in CELLS], float)
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        _squares(place, share)
        for (i, j), value in np.ndenumerate(counts):
            colour = "white" if share[i, j] > 0.6 else INK
            words = f"{CELL_NAMES[CELLS[i][j]]}\nn = {value:,.0f}\n({100 * share[i, j]:.0f} %)"
            place.text(j, i, words, ha="center", va="center", fontsize=7, color=colour, linespacing=1.3)
        place.set_title(label(row["class"]), fontsize=9)
        place.set_xticks([0, 1], ["positive", "negative"])
        place.set_yticks([0, 1], ["positive", "negative"], rotation=90, va="center")
        place.set(xlabel="predicted", ylabel="reference standard")
        place.tick_params(length=0, labelsize=8)
    for place in axes.flat[len(rows) :]:
        place.set_visible(False)
    return made


def _squares(axes: Any, share: np.ndarray) -> Any:
    """Draw a matrix of shares as squares, the first row on top: shapes, which stay sharp in SVG and PDF."""
    rows, columns = (np.arange(size) for size in share.shape)
    drawn = axes.pcolormesh(columns, rows, share, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=0.4)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    return drawn


def curve_plot(evaluation: Row, kind: str) -> Any:
    """ROC or precision against recall: all labels pooled in black, the largest classes in colour, others in grey."""
    named = [row["class"] for row in largest(evaluation)]
    made, axes = figure(NARROW, 4.55 + 0.215 * len(named))
    found = {row["class"]: row["auc" if kind == "roc" else "ap"] for row in evaluation["per_class"]}
    for name, curve in evaluation["curves"].items():
        if name != "micro" and name not in named and curve.get(kind):
            _curve(axes, kind, curve[kind], color=FAINT, lw=0.7)
    for name, colour in zip(named, COLOURS, strict=False):
        if points := evaluation["curves"].get(name, {}).get(kind):
            _curve(axes, kind, points, color=colour, lw=1.4, label=f"{label(name)}: {_score(kind, found.get(name))}")
    if points := evaluation["curves"].get("micro", {}).get(kind):
        pooled = evaluation["parts"][evaluation["per_class_of"]]["figures"]["micro_auc"] if kind == "roc" else None
        said = f": {_score(kind, pooled)}" if pooled else ""
        _curve(axes, kind, points, color=INK, lw=2, ls="--", label=f"all labels pooled (micro){said}")
    if kind == "roc":
        axes.plot([0, 1], [0, 1], color=GREY, lw=0.8, ls=":")
        axes.set(xlabel="1 − specificity", ylabel="sensitivity")
    else:
        axes.set(xlabel="recall (sensitivity)", ylabel="precision (PPV)")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    # Of the axes, so that it keeps clear of their label; its lines are too long for two columns.
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.11), frameon=False, fontsize=8)
    return made


def _curve(axes: Any, kind: str, points: Sequence[Sequence[float]], **style: Any) -> None:
    """Draw a curve: ROC from point to point, precision as steps, each as high as at the recall it ends at."""
    x, y = np.array(points, float).T
    if kind == "roc":
        axes.plot(x, y, **style)
    else:
        # From recall 0 the first step is as high as its end: average precision counts it so.
        axes.plot([0, *x], [y[0], *y], drawstyle="steps-pre", **style)


def _score(kind: str, found: Row | None) -> str:
    """`AUC 0.86 (0.79–0.92)`, without brackets where there is no interval."""
    found, name = found or {"value": None}, "AUC" if kind == "roc" else "AP"
    if found["value"] is None:
        return f"{name} undefined"
    ends = f" ({found['low']:.2f}–{found['high']:.2f})" if found.get("low") is not None else ""
    return f"{name} {found['value']:.2f}{ends}"


def reliability(table: Row) -> Any:
    """Observed frequency against predicted probability, and how many predictions each bin holds."""
    made, (above, below) = figure(NARROW, 4.9, 2, 1, sharex=True, height_ratios=[3, 1])
    edges, count = np.array(table["edges"]), np.array(table["count"], float)
    confidence, frequency = (np.array(_floats(table[key])) for key in ("confidence", "frequency"))
    filled = count > 0
    above.plot([0, 1], [0, 1], color=GREY, lw=0.8, ls=":", label="perfect calibration")
    above.plot(confidence[filled], frequency[filled], color=ACCENT, lw=1.2, marker="o", ms=4, label="all labels pooled")
    above.set(ylabel="observed frequency", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    above.legend(frameon=False, fontsize=8, loc="upper left")
    below.bar(edges[:-1], np.maximum(count, 0.5), np.diff(edges), align="edge", color=ACCENT, alpha=0.6, ec="white")
    below.set(yscale="log", ylim=(0.5, max(count.max(), 1) * 3), xlabel="predicted probability", ylabel="labels")
    return made


def decision_plot(evaluation: Row) -> Any:
    """Net benefit against the threshold probability: the mean over classes, and the largest classes in colour.

    Dotted in the same colour: calling every image positive.
    """
    made, axes = figure(NARROW, 4.9)
    curves, steps = evaluation["decisions"]["curves"], evaluation["decisions"]["thresholds"]
    named = [row["class"] for row in largest(evaluation)]
    drawn = [("mean over classes", INK), *zip(named, COLOURS, strict=False)]
    top = 0.0
    for name, colour in drawn:
        if name in curves:
            width = 2 if colour == INK else 1.3
            axes.plot(steps, curves[name]["model"], color=colour, lw=width, label=label(name))
            axes.plot(steps, curves[name]["everyone"], color=colour, lw=0.8, ls=":")
            top = max(top, *curves[name]["model"], curves[name]["everyone"][0])
    axes.axhline(0, color=GREY, lw=0.8, label="calling none")
    axes.plot([], [], color=GREY, lw=0.8, ls=":", label="calling all")
    axes.set(xlabel="threshold probability", ylabel="net benefit an image")
    axes.set(xlim=(0, 1), ylim=(-0.25 * max(top, 0.01), 1.05 * max(top, 0.01)))
    _legend_below(made, axes)
    return made


def cooccurrence(table: Row) -> Any:
    """Share of the images with one finding (row) that have another (column) as well."""
    names, counts = table["classes"], np.array(table["counts"], float)
    return finding_squares(
        names, counts, np.diag(counts)[:, None], ("of the images with this finding …", "… also have this one")
    )


def finding_squares(names: Sequence[str], counts: np.ndarray, of: np.ndarray, titles: tuple[str, str]) -> Any:
    """Draw counts (C, C) as shares `of` (C, C) or (C, 1), white where these are 0 and on the diagonal; `titles` of rows
    and columns."""
    side = max(1.9 + 0.155 * len(names), 3.6)
    made, axes = figure(side, side)
    share = np.divide(counts, of, out=np.full_like(counts, np.nan), where=of > 0)
    np.fill_diagonal(share, np.nan)
    image = _squares(axes, share)
    size = 7 if len(names) > 12 else 8
    axes.set_xticks(range(len(names)), [label(name, 22) for name in names], rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), [label(name, 22) for name in names], fontsize=size)
    axes.tick_params(length=0)
    axes.set(xlabel=titles[1], ylabel=titles[0])
    bar = made.colorbar(image, ax=axes, shrink=0.5, aspect=25, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    return made


def differences(rows: Sequence[Row], names: Sequence[str]) -> Any:
    """One line per class, largest gain above: the AUC of the second run minus that of the first, with its interval."""
    known = [row for row in rows if row["auc"]["difference"] is not None]
    known.sort(key=lambda row: row["auc"]["difference"])
    made, axes = figure(NARROW, 0.9 + 0.19 * max(len(known), 2))
    for place, found in enumerate(row["auc"] for row in known):
        low, high = found["low"], found["high"]
        colour = COLOURS[1] if excludes_zero(found) else ACCENT
        if low is not None:
            axes.plot([low, high], [place, place], color=colour, lw=2.2, alpha=0.45, solid_capstyle="butt")
        axes.plot(found["difference"], place, "o", ms=4, color=colour)
    axes.axvline(0, color=INK, lw=1)
    axes.set_yticks(range(len(known)), [f"{label(row['class'])} ({row['positives']:,})" for row in known])
    axes.set(xlabel=f"AUC: {label(names[1], 18)} minus {label(names[0], 18)}", ylim=(-0.7, len(known) - 0.3))
    axes.grid(axis="x", color=FAINT, lw=0.5)
    axes.set_axisbelow(True)
    return made


def excludes_zero(found: Row) -> bool:
    """Whether the interval of a difference lies on one side of zero."""
    return found["low"] is not None and (found["low"] > 0 or found["high"] < 0)


def _floats(values: Any) -> list[float]:
    return [float("nan") if value is None else float(value) for value in values]


def _legend_below(made: Any, axes: Any, columns: int = 2) -> None:
    handles, names = axes.get_legend_handles_labels()
    if handles:
        made.legend(
            handles, names, loc="outside lower center", ncols=min(columns, len(names)), frameon=False, fontsize=8
        )
