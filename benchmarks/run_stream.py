"""Activations larger than memory: what streaming delivers of the disk's own bandwidth, and what block shuffle costs.

    python benchmarks/run_stream.py [--part stream] [--images 8000] [--rounds 5] [--scratch FOLDER]
    python benchmarks/run_stream.py --part readers
    python benchmarks/run_stream.py --part shuffle [--seeds 10]

`stream`: rows of a ViT-B/16, 197 x 768 float16 x 2 views, one view an image and epoch, on a file of which no page is in
memory: before each arm its pages are given up (posix_fadvise), and mincore tells that they are gone. An arm is one
epoch; its figure is the bytes that reached the trainer over what the disk gives to plain reads of as many bytes side
by side, measured before and after in the same round. `readers`: the same for other numbers of reads under way.
`shuffle`: validation AUC of a head trained in either order, on made-up embeddings with a planted signal.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import numpy as np
import torch
from torch import nn

from cxr_fast.activations import stream
from cxr_fast.activations.loader import (
    Activations,
    Batch,
)
from cxr_fast.config import TrainSpec
from cxr_fast.system import hardware
from cxr_fast.training.fold import draw
from cxr_fast.training.head_fold import HeadFold

CPU = torch.device("cpu")
SHAPE, OFFSET = (197, 768), 6144
CHUNK, GONE, MAPPED = 4 << 20, 0.001, 100
DISK, FEWER = "disk: reads of 4 MB side by side", "disk: the same, 4 under way"


# What the disk gives.


def make(path: Path, images: int) -> np.memmap:
    """A file of random rows behind a header, on disk."""
    row = np.random.default_rng(0).standard_normal((64, 2, *SHAPE), np.float32).astype(np.float16)
    with path.open("wb") as file:
        file.write(b"h" * OFFSET)
        for start in range(0, images, 64):
            row[:, :, 0, 0] = np.arange(start, start + 64)[:, None] % 1000  # so that rows of two blocks differ
            row[:, 1, 0, 1] += 1
            file.write(row[: images - start].tobytes())
        os.fsync(file.fileno())
    return np.memmap(path, np.float16, "r", offset=OFFSET, shape=(images, 2, *SHAPE))


def cached(path: Path) -> float:
    """The share of a file's pages that are in memory."""
    whole = np.memmap(path, np.uint8, "r")
    pages = np.zeros(-(-len(whole) // mmap.PAGESIZE), np.uint8)
    found = ctypes.CDLL(None, use_errno=True).mincore(
        ctypes.c_void_p(whole.ctypes.data), ctypes.c_size_t(len(whole)), ctypes.c_void_p(pages.ctypes.data)
    )
    assert found == 0, os.strerror(ctypes.get_errno())
    return float((pages & 1).mean())


def drop(array: np.memmap) -> None:
    """Give up a file's pages, and see that they are gone. What a map has touched is first taken out of the map."""
    path = Path(str(array.filename))
    array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    assert (share := cached(path)) < GONE, f"{share:.1%} of the file is still in memory: is somebody reading it?"


def plain(path: Path, size: int, under_way: int) -> int:
    """Read `size` bytes side by side from a random place, CHUNK at a time, `under_way` at once."""
    first = int(np.random.default_rng().integers(0, os.path.getsize(path) - size) // CHUNK * CHUNK)
    fd, starts = os.open(path, os.O_RDONLY), iter(range(first, first + size, CHUNK))

    def work(_: int) -> int:
        memory = memoryview(mmap.mmap(-1, CHUNK))
        return sum(os.preadv(fd, [memory], start) for start in starts)

    with ThreadPoolExecutor(under_way) as pool:
        total = sum(pool.map(work, range(under_way)))
    os.close(fd)
    return total


# What reaches the trainer.


def row_by_row(array: np.memmap, batches: Iterator[Batch]) -> Iterator[torch.Tensor]:
    """As it was before: a read a row, 8 at once, 4 batches ahead. The trusted slow way."""
    size, fd = array[0, 0].nbytes, os.open(str(array.filename), os.O_RDONLY)

    def fill(row: np.ndarray, start: int) -> None:
        assert os.preadv(fd, [row.data], start) == size

    def read(rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        out = np.empty((len(rows), *array.shape[2:]), array.dtype)
        starts = (array.offset + (2 * rows + views) * size).tolist()
        list(readers.map(fill, out, starts))
        return torch.from_numpy(out)

    queue: list[Any] = []
    with ThreadPoolExecutor(8) as readers, ThreadPoolExecutor(4) as ahead:
        for batch in batches:
            queue.append(ahead.submit(read, *batch))
            if len(queue) == 4:
                yield queue.pop(0).result().float()
        yield from (future.result().float() for future in queue)
    os.close(fd)


def order(images: int, shuffle: Any, seed: int) -> list[Batch]:
    """The batches of an epoch as a trainer draws them."""
    spec = TrainSpec(shuffle=shuffle, dropout=0)
    draws = draw(torch.Generator().manual_seed(seed), torch.arange(images), spec, views=2)
    return [(draws.rows[a:b], draws.views[a:b]) for a, b in draws.steps]


def deliver(source: Callable[[Iterator[Batch]], Iterator[torch.Tensor]], batches: list[Batch]) -> int:
    """Take every batch; the bytes they have in the file."""
    return sum(x.numel() * 2 for x in source(iter(batches)))


def rate(array: np.memmap, work: Callable[[], int]) -> float:
    """GB a second, from a file of which nothing is in memory."""
    drop(array)
    began = time.perf_counter()
    return work() / (time.perf_counter() - began) / 1e9


def check(array: np.memmap, sources: dict[str, Any]) -> None:
    """Every way gives the bytes of the map."""
    batches = order(len(array), "block", 0)[:60] + order(len(array), "full", 0)[:60]
    for name, source in sources.items():
        for (rows, views), x in zip(batches, source(iter(batches)), strict=True):
            assert np.array_equal(x.numpy(), array[rows.numpy(), views.numpy()].astype(np.float32)), name


def bandwidth(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Arms in turn: the disk, streaming in both orders, and the two ways without this engine."""
    path = scratch / "rows"
    array = make(path, args.images)
    streamed, mapped = (Activations(array, CPU, residency=kind) for kind in ("stream", "host"))
    before = partial(row_by_row, array)
    check(array, {"stream": streamed.ahead, "map": mapped.ahead, "row by row": before})
    size = args.images * array[0, 0].nbytes
    found: dict[str, list[float]] = {}
    with hardware.OtherCpu() as noise:
        for number in range(args.rounds):
            block, full = (order(args.images, kind, number) for kind in ("block", "full"))
            arms: dict[str, Callable[[], int]] = {
                DISK: partial(plain, path, size, stream.READERS),
                "stream, block shuffle": partial(deliver, streamed.ahead, block),
                "stream, full shuffle": partial(deliver, streamed.ahead, full),
                FEWER: partial(plain, path, size, 4),
                "row by row (before), block shuffle": partial(deliver, before, block),
                "row by row (before), full shuffle": partial(deliver, before, full),
                # The beginning of the epoch: they are so slow.
                "memory map, block shuffle": partial(deliver, mapped.ahead, block[:MAPPED]),
                "memory map, full shuffle": partial(deliver, mapped.ahead, full[:MAPPED]),
                "": partial(plain, path, size, stream.READERS),
            }
            rates = {name: rate(array, work) for name, work in arms.items()}
            rates[DISK] = (rates[DISK] + rates.pop("")) / 2
            for name, value in rates.items():
                found.setdefault(name, []).append(value)
    shares = {name: [v / d for v, d in zip(values, found[DISK], strict=True)] for name, values in found.items()}
    return {
        "images": args.images,
        "row_bytes": array[0, 0].nbytes,
        "file_bytes": os.path.getsize(path),
        "window_bytes": streamed.stream.window if streamed.stream else None,
        "readers": stream.READERS,
        "gigabytes_per_second": shown({name: common.spread(v) for name, v in found.items()}, "GB/s"),
        "share_of_disk": shown({n: common.spread(v) for n, v in shares.items() if n != DISK}, "over the disk"),
        "noise": said(noise),
    }


def readers(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Block and full shuffle with other numbers of reads under way, and with the kernel's own reading ahead."""
    path = scratch / "rows"
    array = make(path, args.images)
    found: dict[str, list[float]] = {}
    with hardware.OtherCpu() as noise:
        for number in range(args.rounds):
            batches = {kind: order(args.images, kind, number) for kind in ("block", "full")}
            for count, kind, advised in (
                *((count, kind, True) for count in (4, 8, 16, 32, 64) for kind in batches),
                *((32, kind, False) for kind in batches),
            ):
                name = f"{count} under way, {kind}" + ("" if advised else ", kernel reads ahead")
                stream.READERS = count
                source = Activations(array, CPU, residency="stream")
                if not advised and source.stream:
                    os.posix_fadvise(source.stream._fds[0], 0, 0, os.POSIX_FADV_NORMAL)
                found.setdefault(name, []).append(rate(array, partial(deliver, source.ahead, batches[kind])))
    return {"images": args.images, "gigabytes_per_second": shown(spreads(found), "GB/s"), "noise": said(noise)}


def spreads(found: dict[str, list[float]]) -> dict[str, dict[str, float | int]]:
    """The spread of each."""
    return {name: common.spread(values) for name, values in found.items()}


def shown(found: dict[str, dict[str, float | int]], unit: str) -> dict[str, dict[str, float | int]]:
    """The spreads, printed."""
    common.show(found, unit)
    return found


def said(noise: hardware.OtherCpu) -> dict[str, Any]:
    """What others took of the machine, printed where it is a lot."""
    if noise.noisy:
        print(f"NOISY: other processes took {noise.share:.0%} of the machine")
    return {"share": noise.share, "noisy": noise.noisy}


# What the order costs.


def planted(images: int, seed: int, *, by_finding: bool) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, 1, 64) and labels (N, 8) that follow from them up to noise; in the file in no order, or sorted by
    the labels, which is the worst a block shuffle can meet."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((images, 64))
    hidden = np.tanh(x @ rng.standard_normal((64, 16)) / 8)
    scores = hidden @ rng.standard_normal((16, 8)) / 4 + 0.7 * rng.standard_normal((images, 8))
    y = (scores > np.quantile(scores, [0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.95, 0.95], axis=0).diagonal()).astype(np.int8)
    if by_finding:
        place = np.lexsort(y.T)
        x, y = x[place], y[place]
    return x[:, None].astype(np.float32), y


def trained(spec: TrainSpec, x: np.ndarray, y: np.ndarray, seed: int, epochs: int) -> float:
    """Validation macro AUC of a head after some epochs; every fifth image is validation."""
    trunk = SimpleNamespace(blocks=[], global_pool="token", num_prefix_tokens=1, embed_dim=x.shape[-1])
    tower, rows = SimpleNamespace(trunk=trunk, head=nn.Module()), np.arange(len(x))
    train, valid = rows[rows % 5 != 0], rows[rows % 5 == 0]
    fold = HeadFold(tower, Activations(x, CPU), y, train, valid, spec, unfreeze_blocks=0, seed=seed)
    for _ in range(epochs):
        fold.run_epoch()
    return fold.history[-1].valid_auc


def shuffles(seeds: int, images: int, epochs: int) -> dict[str, Any]:
    """AUC in each order for several seeds, and its paired differences from the full shuffle.

    Blocks of 16 in windows of 64 (the default) and of 8; and, in the file sorted by finding, 400 rows at a time, which
    is nearly no shuffle and shows that a bad order is seen.
    """
    base = TrainSpec(lr=1e-3, dropout=0.2, precision="float32", scheduler="none")
    orders = {"full": {}, "block": {}, "block, windows of 8": {"shuffle_window": 8}}
    bad = {"400 rows at a time": {"shuffle_block": 400, "shuffle_window": 1}}
    out: dict[str, Any] = {}
    for kind, by_finding in (("in no order", False), ("sorted by finding", True)):
        scores: dict[str, list[float]] = {}
        for seed in range(seeds):
            x, y = planted(images, seed, by_finding=by_finding)
            for name, changes in (orders | (bad if by_finding else {})).items():
                spec = dataclasses.replace(base, shuffle="full" if name == "full" else "block", **changes)  # type: ignore[arg-type]
                scores.setdefault(name, []).append(trained(spec, x, y, seed, epochs))
        out[kind] = {"auc": shown(spreads(scores), f"AUC, file {kind}"), "difference": {}}
        for name in (name for name in scores if name != "full"):
            apart = np.array(scores[name]) - np.array(scores["full"])
            ends = {"mean": float(apart.mean()), "sd": float(apart.std(ddof=1)), "n": seeds}
            out[kind]["difference"][name] = ends | {"standard_error": ends["sd"] / seeds**0.5}
            print(f"{name} minus full: {ends['mean']:+.4f}, sd {ends['sd']:.4f}, n {seeds}")
    return {"images": images, "epochs": epochs, "batch": base.batch_size, "files": out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("stream", "readers", "shuffle"), default="stream")
    parser.add_argument("--images", type=int, help="[default: 8000; shuffle: 10000]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="Folder on the disk to measure.  [default: the system's]")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.images = args.images or (10000 if args.part == "shuffle" else 8000)
    if args.part == "shuffle":
        torch.set_num_threads(1)
        with hardware.OtherCpu() as noise:
            result = shuffles(args.seeds, args.images, args.epochs)
        common.save("stream-shuffle", result | {"noise": said(noise)}, args.json)
        return
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        result = (bandwidth if args.part == "stream" else readers)(args, Path(scratch))
    common.save("stream" if args.part == "stream" else "stream-readers", result, args.json)


if __name__ == "__main__":
    main()
