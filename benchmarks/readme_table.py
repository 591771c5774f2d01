"""The README's table of ratios from `results/`: rewrites what stands between its two marker comments.

    python benchmarks/readme_table.py

A row is the newest result of its name on each machine, the newest first. A figure that no file holds is an empty cell
beside the command that gives it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README, RESULTS = HERE.parent / "README.md", HERE / "results"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
HEAD = "| what | ratio | rounds | machine, date | from |\n|---|---|---|---|---|"
Found = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: the results it may be of, the ratio in them (a spread or a number), and their command.

    `gpu`: of a GPU's results. `real`: of results with weights that are not random.
    """

    what: str
    names: tuple[str, ...]
    ratio: Callable[[Found], Any]
    command: str
    gpu: bool = False
    real: bool = False


def medians(group: str, slow: str, fast: str) -> Callable[[Found], float]:
    """The ratio of two medians, where a driver keeps no ratio round by round."""
    return lambda found: found[group][slow]["median"] / found[group][fast]["median"]


ROWS = (
    Row(
        what="training, an image's share of an epoch: plain pipeline from files over cached tokens",
        names=("training", "training-steps"),
        ratio=lambda found: found["steps"]["ratios"]["whole"],
        command="run_training.py",
    ),
    Row(
        what="the same, decoding left out, both float32",
        names=("training", "training-steps"),
        ratio=lambda found: found["steps"]["ratios"]["float32"],
        command="run_training.py",
    ),
    Row(
        what="`cache`: time its parts need over time taken (1 is perfect)",
        names=("cache",),
        ratio=lambda found: found["bound_over_whole"],
        command="run_cache.py",
    ),
    Row(
        what="one image, model alone: time of the fp32 file over eager torch's",
        names=("inference",),
        ratio=lambda found: found["single"]["ratios"]["fp32 of torch"],
        command="run_inference.py",
    ),
    Row(
        what="the same, the int8 file's over the fp32 file's",
        names=("inference",),
        ratio=lambda found: found["single"]["ratios"]["int8 of fp32"],
        command="run_inference.py",
    ),
    Row(
        what="a folder of films: time decoding and model need over time taken (1 is perfect)",
        names=("inference",),
        ratio=lambda found: found["whole"]["folder"]["share"],
        command="run_inference.py",
    ),
    Row(
        what="start to first probability: torch + open_clip over the fp32 file",
        names=("cold-start",),
        ratio=lambda found: found["ratios"]["fp32"],
        command="run_cold_start.py",
    ),
    Row(
        what="the same over the int8 file",
        names=("cold-start",),
        ratio=lambda found: found["ratios"]["int8"],
        command="run_cold_start.py",
    ),
    Row(
        what="activation rows read: as the trainer takes them over an h5py index list",
        names=("gather",),
        ratio=medians("rows_per_second", "batch as the trainer takes it, float32", "h5py index list"),
        command="run_gather.py",
    ),
    Row(
        what="streaming from disk, block shuffle: what reaches the trainer over the disk's own bandwidth",
        names=("stream",),
        ratio=lambda found: found["share_of_disk"]["stream, block shuffle"],
        command="run_stream.py",
    ),
    Row(
        what="1,000 resamples: macro AUC with rows repeated over every figure of a run by weights",
        names=("bootstrap",),
        ratio=medians("seconds", "macro AUC alone, rows repeated", "every figure, one run"),
        command="run_bootstrap.py",
    ),
    Row(
        what="peak memory of `cache`: 5,000 images over 500",
        names=("memory",),
        ratio=medians("peak_mb", "5000", "500"),
        command="run_memory.py",
    ),
    Row(
        what="GPU: `cache`, time its parts need over time taken",
        names=("cache",),
        ratio=lambda found: found["bound_over_whole"],
        command="gpu.sh",
        gpu=True,
    ),
    Row(
        what="GPU: a whole search, time its arithmetic needs over time taken",
        names=("search",),
        ratio=lambda found: found["share_of_floor"],
        command="gpu.sh",
        gpu=True,
    ),
    Row(
        what="GPU: model alone, share of the card's peak at the best batch",
        names=("inference-gpu",),
        ratio=lambda found: max(each["share_of_peak"] for each in found["batches"].values()),
        command="gpu.sh",
        gpu=True,
    ),
    Row(
        what="real BiomedCLIP weights: training, plain pipeline from files over cached tokens",
        names=("training", "training-steps"),
        ratio=lambda found: found["steps"]["ratios"]["whole"],
        command="run_training.py --weights biomedclip",
        real=True,
    ),
)


def results(folder: Path = RESULTS) -> list[Found]:
    """Every result, the newest first."""
    found = [json.loads(path.read_text(encoding="utf-8")) | {"file": path.name} for path in folder.glob("*.json")]
    return sorted(found, key=lambda result: (result["date"], result["file"]), reverse=True)


def random(found: Found) -> bool:
    """Whether a result is of random weights, or of none."""
    weights = found.get("weights") or found.get("steps", {}).get("weights") or "random"
    return str(weights).startswith("random")


def line(row: Row, found: list[Found]) -> str:
    """One line: each machine's newest ratio with its spread, or an empty cell where there is no result."""
    own = [
        each
        for each in found
        if each["name"] in row.names and bool(each["gpu"]) == row.gpu and random(each) != row.real
    ]
    if not own:
        return f"| {row.what} | | | | `{row.command}` |"
    newest: dict[str, Found] = {}
    for each in own:
        newest.setdefault(place(each), each)
    cells = zip(*(figure(row, each) for each in newest.values()), strict=True)
    return f"| {row.what} | {' | '.join('<br>'.join(column) for column in cells)} | `{row.command}` |"


def figure(row: Row, found: Found) -> tuple[str, str, str]:
    """A result's ratio with its spread, its number of rounds, and where and when it was measured."""
    value = row.ratio(found)
    measured = f"{place(found)}, {found['date']}"
    if not isinstance(value, dict):
        return f"{value:.2f}", "", measured
    low, high = (value.get(a, value.get(b)) for a, b in (("min", "low"), ("max", "high")))
    ends = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    return f"{value['median']:.2f}{ends}", str(value["n"]), measured


def place(found: Found) -> str:
    """The GPU, or the CPU and its cores."""
    return found["gpu"] or f"{found['machine']['cpu']}, {found['machine']['cores']} cores"


def table(folder: Path = RESULTS) -> str:
    """The whole table, markdown."""
    found = results(folder)
    return "\n".join([HEAD, *(line(row, found) for row in ROWS)])


def between(readme: str) -> str:
    """What the README has between the markers."""
    return readme.partition(BEGIN)[2].partition(END)[0].strip()


def replaced(readme: str, text: str) -> str:
    """The README with `text` between the markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"README.md lacks {BEGIN}"
    assert end, f"README.md lacks {END}"
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> None:
    README.write_text(replaced(README.read_text(encoding="utf-8"), table()), encoding="utf-8")
    print(f"wrote the table of {README.name}\n{table()}")


if __name__ == "__main__":
    main()
