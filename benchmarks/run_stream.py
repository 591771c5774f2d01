"""Activations larger than memory: what streaming delivers of the disk's own bandwidth.

    python benchmarks/run_stream.py [--images 8000] [--rounds 5] [--scratch FOLDER]

Rows of a ViT-B/16, 197 x 768 float16 x 2 views, one view an image and epoch, on a file of which no page is in memory:
before each arm its pages are given up (posix_fadvise), and mincore tells that they are gone. An arm is one epoch; its
figure is the bytes that reached the trainer over what the disk gives to plain reads of as many bytes side by side,
measured before and after in the same round. `--under-way` tries another number of reads.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from cxr_fast.activations import stream
from cxr_fast.activations.loader import (
    Activations,
    Batch,
)
from cxr_fast.config import TrainSpec
from cxr_fast.training.folds.draws import draw

CPU = torch.device("cpu")
SHAPE, OFFSET = (197, 768), 6144
CHUNK, GONE, MAPPED = 4 << 20, 0.001, 100
DISK, DISK_AFTER, FEWER = "disk: reads of 4 MB side by side", "the same, after", "disk: the same, 4 under way"
SEEDS = itertools.count()


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


def rate(array: np.memmap, work: Callable[[], int]) -> float:
    """GB a second, from a file whose pages are given up first. What a map has touched is taken out of the map."""
    path = Path(str(array.filename))
    array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    assert (share := cached(path)) < GONE, f"{share:.1%} of the file is still in memory: is somebody reading it?"
    began = time.perf_counter()
    return work() / (time.perf_counter() - began) / 1e9


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


def order(images: int, shuffle: Any) -> list[Batch]:
    """The batches of an epoch as a trainer draws them, others each time."""
    generator = torch.Generator().manual_seed(next(SEEDS))
    draws = draw(generator, torch.arange(images), TrainSpec(shuffle=shuffle, dropout=0), views=2)
    return [(draws.rows[a:b], draws.views[a:b]) for a, b in draws.steps]


def deliver(source: Activations, batches: Sequence[Batch]) -> int:
    """Take every batch; the bytes they have in the file."""
    return sum(x.numel() * 2 for x in source.ahead(iter(batches)))


def check(array: np.memmap, sources: dict[str, Activations]) -> None:
    """Every way gives the bytes of the map."""
    batches = order(len(array), "block")[:60] + order(len(array), "full")[:60]
    for name, source in sources.items():
        for (rows, views), x in zip(batches, source.ahead(iter(batches)), strict=True):
            assert np.array_equal(x.numpy(), array[rows.numpy(), views.numpy()].astype(np.float32)), name


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Arms in turn: the disk, streaming in both orders, and the memory map without this engine."""
    path, images, stream.READERS = folder / "rows", args.images, args.under_way
    array = make(path, images)
    size = images * array[0, 0].nbytes
    streamed, mapped = (Activations(array, CPU, residency=kind) for kind in ("stream", "host"))
    check(array, {"stream": streamed, "map": mapped})

    def epoch(source: Activations, shuffle: str, batches: int | None = None) -> float:
        return rate(array, partial(deliver, source, order(images, shuffle)[:batches]))

    arms = {
        DISK: partial(rate, array, partial(plain, path, size, stream.READERS)),
        "stream, block shuffle": partial(epoch, streamed, "block"),
        "stream, full shuffle": partial(epoch, streamed, "full"),
        FEWER: partial(rate, array, partial(plain, path, size, 4)),
        # The beginning of the epoch: they are so slow.
        "memory map, block shuffle": partial(epoch, mapped, "block", MAPPED),
        "memory map, full shuffle": partial(epoch, mapped, "full", MAPPED),
        DISK_AFTER: partial(rate, array, partial(plain, path, size, stream.READERS)),
    }
    found, noise = common.turns(arms, args.rounds)
    found[DISK] = [(before + after) / 2 for before, after in zip(found[DISK], found.pop(DISK_AFTER), strict=True)]
    shares = {name: common.ratios(rates, found[DISK]) for name, rates in found.items() if name != DISK}
    return {
        "images": images,
        "row_bytes": array[0, 0].nbytes,
        "file_bytes": os.path.getsize(path),
        "window_bytes": streamed.stream.window if streamed.stream else None,
        "readers": stream.READERS,
        "gigabytes_per_second": common.spreads(found, "GB/s"),
        "share_of_disk": common.spreads(shares, "over the disk"),
        "noise": noise,
    }


if __name__ == "__main__":
    common.run(measure, "stream", __doc__, images=8000, rounds=5, under_way=stream.READERS)
