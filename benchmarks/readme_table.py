"""The table of ratios in docs/explanation/benchmarks.md, from `results/`.

    python benchmarks/readme_table.py

Rewrites what stands between the page's two marker comments. A row is a line of `readme_table.csv`: what it says, the
results it may be of, where the ratio is in them (`a : b` is one median over another), their command, and whether they
are of a GPU or of real weights. It shows the newest result of each machine, the newest first. A figure that no file
holds is an empty cell beside the command that gives it.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common

PAGE = common.ROOT / "docs" / "explanation" / "benchmarks.md"
HEAD = "| what | ratio | rounds | machine, date | from |\n|---|---|---|---|---|"
Found = Mapping[str, Any]


def rows() -> list[dict[str, str]]:
    """The lines of the table."""
    text = (common.HERE / "readme_table.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def random(found: Found) -> bool:
    """Whether a result is of random weights, or of none."""
    weights = found.get("weights") or found.get("steps", {}).get("weights") or "random"
    return str(weights).startswith("random")


def line(row: Mapping[str, str], found: list[dict[str, Any]]) -> str:
    """One line: each machine's newest ratio with its spread, or an empty cell where there is no result."""
    newest: dict[str, Found] = {}
    for each in found:
        kind = "gpu" if each["gpu"] else "" if random(each) else "real"
        if each["name"] in row["results"].split() and kind == row["of"]:
            newest.setdefault(place(each), each)
    if not newest:
        return f"| {row['what']} | | | | `{row['command']}` |"
    cells = zip(*(figure(row["figure"], each) for each in newest.values()), strict=True)
    return f"| {row['what']} | {' | '.join('<br>'.join(column) for column in cells)} | `{row['command']}` |"


def figure(path: str, found: Found) -> tuple[str, str, str]:
    """A result's ratio with its spread, its number of rounds, and where and when it was measured."""
    value, *under = (common.figure(found, part) for part in path.split(" : "))
    measured = f"{place(found)}, {found['date']}"
    if under:
        return f"{value['median'] / under[0]['median']:.2f}", "", measured
    if not isinstance(value, dict):
        return f"{value:.2f}", "", measured
    low, high = (value.get(a, value.get(b)) for a, b in (("min", "low"), ("max", "high")))
    ends = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    return f"{value['median']:.2f}{ends}", str(value["n"]), measured


def place(found: Found) -> str:
    """The GPU, or the CPU and its cores."""
    return found["gpu"] or f"{found['machine']['cpu']}, {found['machine']['cores']} cores"


def table(folder: Path = common.RESULTS) -> str:
    """The whole table, markdown."""
    found = common.results(folder)
    return "\n".join([HEAD, *(line(row, found) for row in rows())])


if __name__ == "__main__":
    PAGE.write_text(common.filled(PAGE.read_text(encoding="utf-8"), "benchmarks", table()), encoding="utf-8")
    print(f"wrote the table of {PAGE.relative_to(common.ROOT)}\n{table()}")
