"""How many films saved again are found as near twins, and how many false alarms there are among the others.

    python benchmarks/run_twins.py --films nih_512 --weights WEIGHTS [--changed 40]

A data set is made of the films and of changed copies of some of them under other patients: JPEG 90, another size, a
window that clips 3 % at either end, gamma 0.6, 2 % of each side cut, 4 % cut, and a hard window that clips 10 %. It is
cached (the plain view), a head is trained for an epoch, and near twins are looked for. A pair of films that are not of
one picture is a false alarm. Beside it stands the highest correlation of any such pair of candidates, by whether both
are of one patient.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
from PIL import Image

from cxr_fast.review import near_twins

COPY = ".img"
GAMMA = [round(255 * (value / 255) ** 0.6) for value in range(256)]


def clip(image: Image.Image, percent: float) -> Image.Image:
    """A window that clips `percent` of the pixels at either end."""
    values = np.asarray(image, dtype=float)
    low, high = np.percentile(values, [percent, 100 - percent])
    return Image.fromarray(np.clip((values - low) / max(high - low, 1) * 255, 0, 255).astype(np.uint8))


def cut(image: Image.Image, share: float) -> Image.Image:
    """The image without `share` of each side."""
    across, down = image.width * share, image.height * share
    return image.crop((round(across), round(down), round(image.width - across), round(image.height - down)))


def changes(image: Image.Image) -> dict[str, tuple[Image.Image, dict[str, Any]]]:
    """Each kind of copy, with how it is saved."""
    jpeg: dict[str, Any] = {"format": "JPEG", "quality": 90}
    return {
        "JPEG 90": (image, jpeg),
        "300 pixels": (image.resize((300, 300), Image.Resampling.BICUBIC), {"format": "PNG"}),
        "window, 3 %": (clip(image, 3), {"format": "PNG"}),
        "gamma 0.6": (image.point(GAMMA), {"format": "PNG"}),
        "cut, 2 %": (cut(image, 0.02), jpeg),
        "cut, 4 %": (cut(image, 0.04), jpeg),
        "window, 10 %": (clip(image, 10), {"format": "PNG"}),
    }


def read_films(source: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of a data set's manifest, and its classes."""
    with open(source / "manifest.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    others = ("image", "group", "view", "study", "split")
    return rows, [name for name in rows[0] if name not in others and not name.startswith("meta:")]


def make_films(source: Path, count: int, out: Path) -> list[str]:
    """Write a manifest of the films and of changed copies of `count` of them; the kinds."""
    rows, classes = read_films(source)
    lines = [[str((source / row["image"]).resolve()), row["group"], *(row[name] for name in classes)] for row in rows]
    kinds: list[str] = []
    for place in np.random.default_rng(0).choice(len(rows), count, replace=False).tolist():
        with Image.open(source / rows[place]["image"]) as image:
            made = changes(image.convert("L"))
        kinds = list(made)
        for number, (copy, how) in enumerate(made.values()):
            path = out / f"{place}-{number}{COPY}"
            copy.save(path, **how)
            lines.append([str(path.resolve()), f"copy {path.name}", *lines[place][2:]])
    with open(out / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image", "group", *classes], *lines])
    return kinds


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Make the films, cache them, train a head, look for twins."""
    kinds = make_films(args.films, args.changed, scratch)
    cache, run = scratch / "twins.h5", scratch / "run"
    common.cxrfast("cache", scratch / "manifest.csv", "--weights", args.weights, "--views", "plain", "--out", cache)
    flags = ["--train-blocks", 0, "--epochs", 1, "--folds", 2, "--views", "plain", "--device", "cpu"]
    common.cxrfast("sweep", cache, *flags, "--out", run)
    least, near_twins.LEAST = near_twins.LEAST, -1.0  # every candidate, with its correlation
    began = time.perf_counter()
    found = near_twins.near_twins(run, cache)
    rows, _ = read_films(args.films)
    place = {str((args.films / row["image"]).resolve()): number for number, row in enumerate(rows)}

    def origin(image: str) -> int:
        return int(Path(image).name.partition("-")[0]) if image.endswith(COPY) else place[str(Path(image).resolve())]

    best, alarms = {"other patients": -1.0, "one patient": -1.0}, 0
    correct, lowest = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 1.0)
    for pair in found.pairs:
        one, two, value = origin(pair.a.image), origin(pair.b.image), float(pair.correlation or 0.0)
        copies = [film.image for film in (pair.a, pair.b) if film.image.endswith(COPY)]
        if one != two:
            alarms += value >= least
            whose = "one patient" if rows[one]["group"] == rows[two]["group"] else "other patients"
            best[whose] = max(best[whose], value)
        elif len(copies) == 1:
            kind = kinds[int(Path(copies[0]).stem.partition("-")[2])]
            lowest[kind] = min(lowest[kind], value)
            correct[kind] += value >= least
    return {
        "what": "films saved again under another patient that are found, of those made, and false alarms",
        "films": len(rows),
        "copies_of_each_kind": args.changed,
        "found": correct,
        "lowest_correlation_of_candidates": lowest,
        "candidates": len(found.pairs),
        "false_alarms": alarms,
        "highest_correlation_of_two_pictures": best,
        "least": least,
        "seconds": time.perf_counter() - began,
    }


if __name__ == "__main__":
    common.run(measure, "twins", __doc__, films=Path, weights=Path, changed=40)
