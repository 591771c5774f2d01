"""Batches of rows from files larger than memory: read a window ahead, in the order of the file, many reads at once.

The trainer decides which rows come when; this module only reads. It holds two windows in memory, however long the
files are.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from ..errors import InputError

# Reads under way, bytes of one, and what is read only to make one of two: measured by benchmarks/run_stream.py.
READERS, MERGE, GAP = 16, 4 << 20, 16 << 10
# Pieces of one read: with a gap between each two they are under the 1,024 parts that Linux takes in a call.
PIECES = 512

# Row and view numbers (B,) each, of one batch.
Wanted = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class ReadPlan:
    """The reads that fill a window: pieces in file order, cut at `edges` (reads + 1,).

    For each piece its `part`, its `start` there in bytes and its `slot` in the window; `repeats` are slots that hold
    what the slots `of` hold.
    """

    part: np.ndarray
    start: np.ndarray
    slot: np.ndarray
    edges: np.ndarray
    repeats: np.ndarray
    of: np.ndarray


def plan_reads(part: np.ndarray, start: np.ndarray, size: int) -> ReadPlan:
    """Plan how to read pieces of `size` bytes, wanted in the order given: sorted, neighbours in one read, each once."""
    order = np.lexsort((start, part))
    first = np.append(True, (np.diff(part[order]) != 0) | (np.diff(start[order]) != 0))[: len(order)]
    slot = order[first]
    of = slot[np.cumsum(first) - 1]
    part, start = part[slot], start[slot]
    jump = np.append(True, (np.diff(part) != 0) | (np.diff(start) > size + GAP))[: len(slot)]
    heads = np.flatnonzero(jump)[np.cumsum(jump) - 1]  # of each piece: the first of those that follow on each other
    far, many = (start - start[heads]) // MERGE, (np.arange(len(slot)) - heads) // PIECES
    cut = jump.copy()
    cut[1:] |= (np.diff(far) != 0) | (np.diff(many) != 0)
    edges = np.append(np.flatnonzero(cut), len(slot))
    return ReadPlan(part=part, start=start, slot=slot, edges=edges, repeats=order[~first], of=of[~first])


@dataclass(kw_only=True)
class Window:
    """Some batches on their way into `memory`: as `values` (n, ...), batch i at ends[i] to ends[i + 1]."""

    memory: np.ndarray
    values: np.ndarray
    ends: list[int]
    plan: ReadPlan
    left: deque[tuple[int, int]]
    under_way: list[Future[None]] = field(default_factory=list)

    def wait(self) -> None:
        """Wait until every read has ended; raises the first error among them."""
        errors = [error for future in self.under_way if (error := future.exception())]
        if errors:
            raise errors[0]
        if len(self.plan.repeats):
            self.values[self.plan.repeats] = self.values[self.plan.of]

    def cancel(self) -> None:
        """Start no further read, and wait for those that write into the window."""
        self.left.clear()
        for future in self.under_way:
            future.exception()


class Stream:
    """Rows of `parts`, whole maps (n_k, V, ...) end to end, read from their files.

    `window`: bytes read ahead at a time; two windows are in memory. `allocate` makes their memory (uint8, bytes), and
    `settle` is called before it is written again. Errors are InputErrors of one line that name the file.
    """

    def __init__(
        self,
        parts: Sequence[np.memmap],
        *,
        window: int,
        allocate: Callable[[int], np.ndarray] = lambda size: np.empty(size, np.uint8),
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self.dtype, self.shape, self.views = parts[0].dtype, parts[0].shape[2:], parts[0].shape[1]
        self.size = math.prod(self.shape) * self.dtype.itemsize
        self.window, self.allocate, self.settle = window, allocate, settle
        self.first = np.cumsum([0, *(len(part) for part in parts)])
        self.offsets = np.array([part.offset for part in parts])
        self.paths = [str(part.filename) for part in parts]
        self._fds: list[int] = []
        for path in self.paths:
            self._fds.append(_open(path))
        self._readers = ThreadPoolExecutor(READERS)
        self._gap = memoryview(bytearray(GAP))  # receives what lies between two pieces of a read; never used
        self._spare: list[np.ndarray] = []
        self._lock = threading.Lock()

    def read(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Read (B, ...) in the stored dtype for (B,) rows and views."""
        window = self._start([(rows, views)], np.empty(len(rows) * self.size, np.uint8))
        window.wait()
        return window.values

    def ahead(self, batches: Iterable[Wanted]) -> Iterator[np.ndarray]:
        """Read each batch in turn, into memory that is written again once the next batch is asked for.

        Several may run at once; each has two windows of its own.
        """
        coming, under_way = self._cut(batches), deque[Window]()
        with self._lock:
            memory = [self._spare.pop() if self._spare else np.empty(0, np.uint8) for _ in range(2)]
        try:
            while True:
                while memory and (batch := next(coming, None)) is not None:
                    under_way.append(self._start(batch, self._grown(memory.pop(), batch)))
                if not under_way:
                    return
                under_way[0].wait()
                window = under_way.popleft()
                yield from (window.values[a:b] for a, b in pairwise(window.ends))
                self.settle()
                memory.append(window.memory)
        finally:
            for window in under_way:
                window.cancel()
            self.settle()
            with self._lock:
                self._spare += [*memory, *(window.memory for window in under_way)]

    def _cut(self, batches: Iterable[Wanted]) -> Iterator[list[Wanted]]:
        """As many batches at a time as a window holds, at least one."""
        held: list[Wanted] = []
        count = 0
        for batch in batches:
            if held and (count + len(batch[0])) * self.size > self.window:
                yield held
                held, count = [], 0
            held.append(batch)
            count += len(batch[0])
        if held:
            yield held

    def _grown(self, memory: np.ndarray, batches: list[Wanted]) -> np.ndarray:
        need = sum(len(rows) for rows, _ in batches) * self.size
        return memory if len(memory) >= need else self.allocate(need)

    def _start(self, batches: list[Wanted], memory: np.ndarray) -> Window:
        rows, views = (_column([batch[i] for batch in batches]) for i in range(2))
        for numbers, count in ((rows, self.first[-1]), (views, self.views)):
            if len(numbers) and not (numbers.min() >= 0 and numbers.max() < count):
                raise IndexError(f"{numbers.min()}..{numbers.max()} of {count}")
        part = np.searchsorted(self.first, rows, side="right") - 1
        start = self.offsets[part] + ((rows - self.first[part]) * self.views + views) * self.size
        reads = plan_reads(part, start, self.size)
        values = memory[: len(rows) * self.size].view(self.dtype).reshape(-1, *self.shape)
        ends = np.cumsum([0, *(len(batch[0]) for batch in batches)]).tolist()
        edges = reads.edges.tolist()
        left = deque(pairwise(edges))
        window = Window(memory=memory, values=values, ends=ends, plan=reads, left=left)
        for _ in range(min(READERS, len(window.left))):
            window.under_way.append(self._readers.submit(self._work, window))
        return window

    def _work(self, window: Window) -> None:
        """Do the reads of a window until none is left."""
        try:
            while (edges := _next(window.left)) is not None:
                self._read(window, *edges)
        except BaseException:
            window.left.clear()
            raise

    def _read(self, window: Window, a: int, b: int) -> None:
        """Pieces a to b of a window's plan by one call, or more where the system gives less than was asked."""
        starts, part = window.plan.start[a:b].tolist(), int(window.plan.part[a])
        views, at, end = [], starts[0], starts[0]
        for slot, start in zip(window.plan.slot[a:b].tolist(), starts, strict=True):
            if start > end:
                views.append(self._gap[: start - end])
            views.append(window.values[slot].reshape(-1).view(np.uint8).data)
            end = start + self.size
        while views:
            try:
                got = os.preadv(self._fds[part], views, at)
            except OSError as error:
                raise InputError(f"{self.paths[part]}: {error.strerror or error}; run `cxrfast verify`.") from error
            if not got:
                raise InputError(f"{self.paths[part]}: ends before its last row; run `cxrfast verify`.")
            at += got
            while views and got >= len(views[0]):
                got -= len(views.pop(0))
            if got:
                views[0] = views[0][got:]

    def __del__(self) -> None:
        for fd in getattr(self, "_fds", ()):
            os.close(fd)


def _column(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64)


def _next(left: deque[tuple[int, int]]) -> tuple[int, int] | None:
    """Take the next of what several threads take from; None where nothing is left."""
    try:
        return left.popleft()
    except IndexError:
        return None


def _open(path: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}.") from error
    if hasattr(os, "posix_fadvise"):  # the reads are as large as they should be; what lies behind them is not wanted
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return fd
