"""What `scale_model.py` stands on: every figure with its unit, and whether it was measured, computed or assumed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MEASURED, COMPUTED, NOTED, ASSUMED, GIVEN = "measured", "computed", "noted", "assumed", "given"

# ViT-B/16 at 224 pixels: tokens, width, MLP, heads, blocks, patches; embedding and head as trained for 35 classes.
TOKENS, WIDTH, MLP, HEADS, DEPTH, PATCHES = 197, 768, 3072, 12, 12, 196
HEAD_WIDTHS = (512, 512, 256, 35)
UNFREEZE, VIEWS = 2, 2
ROW = TOKENS * WIDTH * 2


@dataclass(frozen=True, kw_only=True)
class Input:
    """One figure: `kind` is measured (a result file holds it), computed, noted (seen, but in no file) or assumed."""

    name: str
    value: float
    unit: str
    kind: str
    source: str


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """How many images, how they are kept (as in `run_cluster.FILMS`), their pixels over that film's, a file's bytes."""

    name: str
    images: int
    film: str
    pixels: float
    file_bytes: float


PNG, JPEG, SMALL = "PNG 2400x2000", "JPEG 3056x2544", "PNG 1024x1024"
DATA_SETS = (
    DataSet(name="Indiana", images=7_466, film=PNG, pixels=1.0, file_bytes=2.0e6),
    DataSet(name="NIH-14", images=112_120, film=SMALL, pixels=1.0, file_bytes=0.4e6),
    DataSet(name="CheXpert", images=224_316, film=JPEG, pixels=0.85, file_bytes=2.0e6),
    DataSet(name="MIMIC-CXR", images=377_110, film=JPEG, pixels=1.0, file_bytes=1.5e6),
    DataSet(name="ten million", images=10_000_000, film=JPEG, pixels=1.0, file_bytes=1.5e6),
)


# Arithmetic of the network, a multiply-add as two; `run_search.py` has the formula and the tests hold the two together.


def block_flops(tokens: int = TOKENS, width: int = WIDTH, mlp: int = MLP) -> float:
    """A whole block, forward."""
    return 2 * tokens * (4 * width**2 + 2 * width * mlp) + 4 * tokens**2 * width


def tail_flops(
    tokens: int = TOKENS,
    width: int = WIDTH,
    mlp: int = MLP,
    heads: int = HEADS,
    blocks: int = UNFREEZE,
    head: tuple[int, ...] = HEAD_WIDTHS,
) -> tuple[float, float]:
    """(a training sample, forward alone) of `blocks` >= 1 trained blocks, the last for the class token alone."""
    alone = 8 * width**2 + 4 * width * mlp + 4 * heads * tokens * width
    trained = (blocks - 1) * block_flops(tokens, width, mlp) + alone
    layers, projection = 2 * sum(a * b for a, b in itertools.pairwise(head)), 2 * width * head[0]
    saved = 6 * tokens * width**2 if blocks > 1 else 0
    return 3 * (trained + layers) + 2 * projection - saved, trained + layers + projection


def prefix_flops() -> float:
    """The frozen blocks and the patch embedding, one view."""
    return (DEPTH - UNFREEZE) * block_flops() + 2 * PATCHES * (16 * 16 * 3) * WIDTH


# Results.


def newest(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The newest result of a driver on the CPU of `run_cluster.py`'s newest, or on any where that has not run; with its
    file's name, None where there is none. Figures of two machines say nothing about each other.
    """
    found = []
    for path in folder.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["name"] in (name, "cluster") and not result["gpu"]:
            found.append(result | {"file": path.name})
    found.sort(key=lambda result: (result["date"], result["file"]), reverse=True)
    here = next((cpu(result) for result in found if result["name"] == "cluster"), None)
    return next((result for result in found if result["name"] == name and here in (None, cpu(result))), None)


def cpu(result: Mapping[str, Any]) -> str:
    """The CPU that a result was measured on."""
    return str(result.get("machine", {}).get("cpu"))


def collect(folder: Path = RESULTS) -> dict[str, Input]:
    """Every input by name: from a result where one holds it, else what is assumed in its place."""
    results = {name: newest(name, folder) for name in ("cluster", "cache", "gather")}

    def figure(name: str, unit: str, driver: str, read: Callable[[Any], float], otherwise: Input) -> Input:
        result = results[driver]
        if result is None:
            return otherwise
        return Input(name=name, value=read(result), unit=unit, kind=MEASURED, source=f"`{result['file']}`")

    missing = "stands in until `run_cluster.py` has run"
    stand_ins = {
        PNG: figure(
            f"decode {PNG}",
            "s a film and core",
            "cache",
            # Both threads decode, so a film takes a core twice the wall time of one.
            lambda r: r["seconds_per_image"]["decode"]["median"] * r["workers"],
            _given(f"decode {PNG}", 0.039, "s a film and core", missing, NOTED),
        ),
        JPEG: _given(f"decode {JPEG}", 0.039, "s a film and core", f"one thread; {missing}", NOTED),
        SMALL: _given(f"decode {SMALL}", 0.009, "s a film and core", f"by its pixels; {missing}", ASSUMED),
    }
    found = [
        figure(
            f"decode {film}",
            "s a film and core",
            "cluster",
            lambda r, film=film: r["parts"]["decode"][film]["seconds"]["median"],  # type: ignore[misc]
            stand_in,
        )
        for film, stand_in in stand_ins.items()
    ]
    found += [
        figure(
            "write",
            "s a row and GPU",
            "cluster",
            lambda r: r["parts"]["write"]["median"],
            _given("write", 6e-4, "s a row and GPU", f"0.5 GB/s a writing thread; {missing}", ASSUMED),
        ),
        figure(
            "start-up",
            "s",
            "cluster",
            lambda r: max(0.0, r["split"]["one node"]["start"]["median"]),
            _given("start-up", 20.0, "s", missing, ASSUMED),
        ),
        figure(
            "task",
            "s a task",
            "cluster",
            lambda r: max(0.0, r["split"]["one node"]["shard"]["median"]),
            _given("task", 5.0, "s a task", missing, ASSUMED),
        ),
        figure(
            "overlap",
            "of 1",
            "cache",
            lambda r: min(1.0, r["bound_over_whole"]["median"]),
            _given("overlap", 0.9, "of 1", "target of `run_cache.py`", ASSUMED),
        ),
        figure(
            "rows from memory",
            "rows/s and GPU",
            "gather",
            lambda r: r["rows_per_second"]["batch copied, float16"]["median"],
            _given("rows from memory", 70_000, "rows/s and GPU", "`run_gather.py` has not run", ASSUMED),
        ),
    ]
    found += FIXED
    return {each.name: each for each in found}


def _given(name: str, value: float, unit: str, source: str, kind: str = ASSUMED) -> Input:
    return Input(name=name, value=value, unit=unit, kind=kind, source=source)


_training, _forward = tail_flops()
FIXED = [
    _given("row", ROW, "bytes a view", "197 x 768 float16", COMPUTED),
    _given("views", VIEWS, "views cached", "default of `cxrfast cache`", COMPUTED),
    _given("prefix work", prefix_flops(), "FLOP a view", "10 blocks and the patch embedding", COMPUTED),
    _given("training work", _training, "FLOP a sample", "formula of `run_search.py`", COMPUTED),
    _given("validation work", _forward, "FLOP a sample", "formula of `run_search.py`", COMPUTED),
    _given("model work", prefix_flops() + _forward, "FLOP an image", "the whole model", COMPUTED),
    _given("float32 speed", 60e12, "FLOP/s and GPU", "H100 class; `cxrfast cache` runs the frozen layers in float32"),
    _given("16-bit speed", 790e12, "FLOP/s and GPU", "products on an H100 or H200, as in `run_search.py`", NOTED),
    _given("share, prefix", 0.5, "of float32 speed", "NOT measured on a GPU"),
    _given("share, training", 0.3, "of 16-bit speed", "NOT measured on a GPU"),
    _given("share, model", 0.3, "of 16-bit speed", "NOT measured on a GPU"),
    _given("cores", 16, "cores a GPU", "as fast as those measured here"),
    _given("GPUs a node", 8, "GPUs", "and so many share a node's link; fewer GPUs are one node"),
    _given("GPU memory", 80e9, "bytes", "H100 class; 0.8 of it may hold activations"),
    _given("host memory", 128e9, "bytes a GPU", "0.8 of it may hold activations, one copy a node"),
    _given("host to GPU", 25e9, "bytes/s and GPU", "PCIe, half its nominal rate"),
    _given("link", 3e9, "bytes/s a node", "25 Gbit/s"),
    _given("storage", 20e9, "bytes/s for all nodes", "shared file system, reads and writes together"),
    _given("share, streaming", 0.8, "of link and storage", "target of streaming from disk"),
    _given("shards", 4, "shards a GPU", "default of `cxrfast cache --cluster`", COMPUTED),
    _given("shard", 50_000, "images a shard at most", "more shards where they would be larger"),
    _given("block", 64, "images a model call", "default on CUDA; a shard is whole blocks", COMPUTED),
    _given("nodes lost", 0.01, "a node and hour", "one loss in 100 node hours"),
    _given("replacement", 300, "s until a lost node is replaced", "its share of the work waits"),
    _given("folds", 5, "folds", "default of `cxrfast sweep`", COMPUTED),
    _given("epochs", 100, "epochs a fold", "largest default budget", COMPUTED),
    # The README's example grid: three learning rates, two gammas.
    _given("configurations", 6, "configurations", "the example grid of the README, `--configurations`"),
    _given("price", 3.0, "USD a GPU and hour", "an example; ask your provider, `--price`"),
]


def changed(found: Mapping[str, Input], name: str, value: float) -> dict[str, Input]:
    """The inputs with another value for one of them, which is then called given."""
    return {**found, name: replace(found[name], value=value, kind=GIVEN, source="`--set`")}


def values(found: Mapping[str, Input]) -> dict[str, float]:
    """The numbers alone."""
    return {name: each.value for name, each in found.items()}
