"""The table of other engines in docs/explanation/int8.md, from `results/peers-...`.

    python benchmarks/peers_table.py

Rewrites what stands between the page's two marker comments: the newest result of a CPU without VNNI and of one with it.
What no file holds is an empty cell, with the command that measures it below.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common

from cxr_fast.bench.results import describe_ratio
from cxr_fast.config import FILM_CHANGES
from cxr_fast.system.hardware import INT8_FLAGS

PAGE = common.ROOT / "docs" / "explanation" / "int8.md"
KINDS = ("without VNNI", "with VNNI")
HEAD = ("engine", *(f"{what}, {kind}" for kind in KINDS for what in ("time", "decisions", "p99", "AUC", "mAP")))
COMMAND = "python benchmarks/run_peers.py --run RUN"
Found = Mapping[str, Any]


def newest(folder: Path) -> dict[str, Found]:
    """The newest result of each kind of CPU."""
    out: dict[str, Found] = {}
    for result in common.results(folder):
        if result["name"] == "peers":
            fast = any(flag in result["machine"]["cpu_flags"] for flag in INT8_FLAGS)
            out.setdefault(KINDS[fast], result)
    return out


def cells(result: Found | None, name: str) -> list[str]:
    """Time over ours in float32, decisions changed of 10,000, p99 of the difference, and what AUC and mAP lose."""
    if result is None or (name not in result["engines"] and name not in result["yardstick"]):
        return [""] * 5
    row = result["engines"].get(name)
    far = row["drift"] if row else result["yardstick"][name]
    ratio = row["over_ours_float32"] if row else None
    drops = [far["macro_drop"], far["map_drop"]]
    return [
        describe_ratio(ratio) if ratio else "",
        f"{far['flips']:.1f}",
        f"{far['p99']:.4f}",
        *("" if drop is None else f"{drop:+.4f}" for drop in drops),
    ]


def about(kind: str, result: Found | None) -> list[str]:
    """What a kind of CPU was measured on and what was not, or the command that measures it."""
    if result is None:
        return [f"- {kind}: **not measured**; `{COMMAND}` measures it."]
    films, machine = result["films"], result["machine"]
    busy = result["noise"]["share"]
    lines = [
        f"- {kind}: {machine['cpu']}, {machine['cores']} cores, {result['threads']} thread(s) for each engine, "
        f"{result['date']}; {films['checked']} films, {films['calibration']} for NNCF, {result['rounds']} rounds "
        f"of {result['calls_a_round']} images; other processes took {busy or 0:.0%} of the machine."
    ]
    return lines + [f"- {kind}, {name}: not measured, {why}." for name, why in result["not_measured"].items()]


def table(folder: Path = common.RESULTS) -> str:
    """The table and the lines below it, Markdown."""
    found = newest(folder)
    names = dict.fromkeys(name for each in found.values() for name in (*each["engines"], *each["not_measured"]))
    shown = {name: name for name in names} | {name: f"film: {text}" for name, text in FILM_CHANGES.items()}
    rows = [[text, *(cell for kind in KINDS for cell in cells(found.get(kind), name))] for name, text in shown.items()]
    below = [line for kind in KINDS for line in about(kind, found.get(kind))]
    return "\n".join([common.table(HEAD, rows), "", *below])


if __name__ == "__main__":
    PAGE.write_text(common.filled(PAGE.read_text(encoding="utf-8"), "peers", table()), encoding="utf-8")
    print(f"wrote the table of {PAGE.relative_to(common.ROOT)}\n{table()}")
