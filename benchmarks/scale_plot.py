"""The picture of `scale_model.py`: hours of cache and sweep over the number of GPUs, a line a data set."""

from __future__ import annotations

import io
import itertools
from typing import TYPE_CHECKING, Any

from cxr_fast.report import charts

if TYPE_CHECKING:
    from scale_model import Line

MARKERS = {
    "training step": "o",
    "number of tasks": "s",
    "network": "^",
    "storage": "v",
    "copies to the GPU": "P",
    "decode": "D",
    "prefix": "X",
    "write": "p",
    "start-up": "<",
}
TICKS = {60.0: "1 min", 600.0: "10 min", 3600.0: "1 h", 36000.0: "10 h", 360000.0: "100 h", 3.6e6: "1,000 h"}


def draw(found: list[Line]) -> bytes:
    """PNG."""
    made, axes = charts.figure(6.8, 4.4)
    groups = {name: list(some) for name, some in itertools.groupby(found, key=lambda line: line.data)}
    for (name, some), colour in zip(groups.items(), charts.COLOURS, strict=False):
        gpus, seconds = [line.gpus for line in some], [line.seconds for line in some]
        axes.plot(gpus, seconds, color=colour, lw=1.4, zorder=2)
        for line in some:
            axes.plot(
                line.gpus, line.seconds, MARKERS[line.bottleneck], color=colour, ms=6.5, mec="white", mew=0.7, zorder=3
            )
        axes.annotate(
            name,
            (gpus[-1], seconds[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            fontsize=9,
            va="center",
        )
    _scales(axes, found)
    _legend(made, axes, {line.bottleneck for line in found})
    return fewer_colours(charts.png(made))


def _scales(axes: Any, found: list[Line]) -> None:
    gpus = sorted({line.gpus for line in found})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(gpus, [str(g) for g in gpus])
    least, most = min(line.seconds for line in found), max(line.seconds for line in found)
    shown = {at: text for at, text in TICKS.items() if least / 3 < at < most * 3}
    axes.set_yticks(list(shown), list(shown.values()))
    axes.minorticks_off()
    axes.grid(True, axis="y", color=charts.FAINT, lw=0.5)
    axes.set(xlabel="GPUs", ylabel="time of cache and sweep", xlim=(0.9, 150))
    axes.set_title("MODELLED; nothing here was measured on a GPU", fontsize=10, loc="left")


def _legend(made: Any, axes: Any, used: set[str]) -> None:
    for name, marker in MARKERS.items():
        if name in used:
            axes.plot([], [], marker, color=charts.GREY, ms=6.5, label=name)
    made.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(used),
        fontsize=8,
        frameon=False,
        title="what the longer of the two waits for",
        title_fontsize=8,
        handletextpad=0.1,
        columnspacing=1.2,
    )


def fewer_colours(png: bytes) -> bytes:
    """The same picture in 64 colours, a third of the bytes; nothing of the library that drew it is kept in it."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
