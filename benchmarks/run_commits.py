"""Two commits side by side in one run: start-up, caching, training, the model's files, and a folder of films.

    python benchmarks/run_commits.py [--old 5ede8c5] [--new HEAD] [--rounds 5] [--count 48] [--weights random:0]

Both commits are unpacked by `git archive`; every figure is of a fresh process of each, old, new, old, new. All go
through the command line, which is the same wherever the modules lie: what `run_cache.py`, `run_training.py` and
`run_inference.py` measure comes from `cxrfast bench`. The old commit makes the cache, the run and the models, and both
read them. A ratio is new over old, round by round; it is beyond noise where all rounds are on one side of 1.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import models

from cxr_fast.bench import measure as timing
from cxr_fast.data.phantom.dataset import write_dataset

SIDES = ("old", "new")
TOY = "random:0:test_vit"


def unpack(commit: str, folder: Path) -> Path:
    """The package of a commit, in `folder`."""
    command = ["git", "-C", str(common.ROOT), "archive", commit, "cxr_fast"]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as file:
        file.extractall(folder, filter="data")
    found = common.python("import cxr_fast\nprint(cxr_fast.__file__)", root=folder)
    assert Path(found.strip()).is_relative_to(folder), f"{found} is not of {commit}"
    return folder


def prepare(folder: Path, args: argparse.Namespace, root: Path) -> None:
    """Films, a cache of them, a run with both models, and a cache of embeddings for the head alone."""
    models.films(folder, None, args.count)
    cache = partial(common.cxrfast, "cache", root=root)
    cache(folder / "films/manifest.csv", "--weights", args.weights, "--device", "cpu", "--out", folder / "c.h5")
    words = ("sweep", folder / "c.h5", "--epochs", 1, "--folds", 2, "--holdout", 0, "--device", "cpu")
    common.cxrfast(*words, "--out", folder / "run", root=root)
    common.cxrfast("export", folder / "run", "--variants", "fp32,int8", "--allow-drift", root=root)
    write_dataset(folder / "small", studies=args.embeddings, size=64, limit_images=args.embeddings)
    cache(
        folder / "small",
        "--weights",
        TOY,
        "--unfreeze-blocks",
        0,
        "--device",
        "cpu",
        "--out",
        folder / "e.h5",
        root=root,
    )


def processes(folder: Path, weights: str) -> dict[str, Callable[[Path], dict[str, float]]]:
    """Each takes the folder of a commit and gives the seconds of what it measured by name."""
    films, out = folder / "films", folder / "result.json"

    def bench(*words: object, root: Path, figures: str) -> dict[str, float]:
        common.cxrfast("bench", *words, "--json", out, "--device", "cpu", root=root)
        found = json.loads(out.read_text(encoding="utf-8"))[figures]
        return {f"bench {words[0]}: {name}": spread["median"] for name, spread in found.items()}

    def head(root: Path) -> dict[str, float]:
        run = folder / "head"
        words = ("sweep", folder / "e.h5", "--epochs", 20, "--device", "cpu", "--out", run, "--overwrite")
        common.cxrfast(*words, root=root)
        return {"head alone, 5 folds x 20 epochs": json.loads((run / "run.json").read_text())["seconds"]}

    def predict(root: Path) -> dict[str, float]:
        words = ("predict", folder / "run/model.int8.onnx", films, "--out", folder / "p.csv", "--device", "cpu")
        (folder / "p.csv").unlink(missing_ok=True)
        return {"predict, a folder": common.cxrfast(*words, root=root)[0]}

    def start(root: Path) -> dict[str, float]:
        # A tenth of a second each, so the median of five makes a turn.
        shown = [common.cxrfast("--help", root=root)[0] for _ in range(5)]
        imported = [common.seconds(common.python, "import cxr_fast.predict", root=root) for _ in range(5)]
        return {"--help": timing.median(shown), "import cxr_fast.predict": timing.median(imported)}

    def compare(root: Path) -> dict[str, float]:
        both = [folder / f"run/model.{form}.onnx" for form in ("fp32", "int8")]
        found = bench("compare", *both, "--count", 8, "--rounds", 10, root=root, figures="seconds")
        return dict(zip(("fp32 file, one image", "int8 file, one image"), found.values(), strict=True))

    cached = ("cache", films / "manifest.csv", "--weights", weights, "--rounds", 1)
    return {
        "start": start,
        "cache": lambda root: bench(*cached, root=root, figures="seconds_per_image"),
        "train": lambda root: bench("train", folder / "c.h5", "--rounds", 1, root=root, figures="seconds_per_sample"),
        "models": compare,
        "head": head,
        "predict": predict,
    }


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    roots = {side: unpack(getattr(args, side), folder / side) for side in SIDES}
    prepare(folder, args, roots["old"])
    work = processes(folder, args.weights)
    arms = {f"{name}, {side}": partial(call, roots[side]) for name, call in work.items() for side in SIDES}
    samples, noise = common.turns(arms, args.rounds)
    seconds: dict[str, dict[str, list[float]]] = {side: {} for side in SIDES}
    for side in SIDES:
        for name in work:
            seconds[side] |= common.by_key(samples[f"{name}, {side}"])
    ratios = {name: common.ratios(new, seconds["old"][name]) for name, new in seconds["new"].items()}
    return {
        "old": args.old,
        "new": args.new,
        "weights": args.weights,
        "seconds": {side: common.spreads(found, f"s, {side}") for side, found in seconds.items()},
        "ratios": common.spreads(ratios, "new over old"),
        # The commands are other processes to this one, so their share is the load that was meant.
        "cpu_share_of_other_processes_and_arms": noise["share"],
    }


if __name__ == "__main__":
    options = {"old": "5ede8c5", "new": "HEAD", "rounds": 5, "count": 48, "embeddings": 2000, "weights": "random:0"}
    common.run(measure, "commits", __doc__, **options)
