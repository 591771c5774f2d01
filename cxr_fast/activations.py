"""Cached activations on their way to the training device: copied there once, from host memory, or read ahead.

All three hand the trainer the same bytes, so the choice changes the time and nothing else.
"""

from __future__ import annotations

import math
import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from .errors import InputError

RESIDENCIES = ("auto", "device", "host", "stream")
# Of the memory that is free; the rest is for weights, gradients and what a batch needs.
SHARE = 0.8
READERS, DEPTH = 8, 4

Batch = tuple[torch.Tensor, torch.Tensor]


class Activations:
    """Rows of an activation array on their way to `device`.

    `array` is (N, V, T, D) or (N, V, E), float16 or float32, usually a memory map. `residency`: `device` copies it
    there once; `host` gathers each batch from memory (a map's page cache); `stream` reads each row from the file with
    many reads under way; `auto` takes the first of the three that fits. Raises InputError on `stream` without a file,
    or `device` where it cannot fit.
    """

    def __init__(self, array: np.ndarray, device: torch.device, *, residency: str = "auto") -> None:
        self.array, self.device = array, device
        self.residency = choose(array.nbytes, device, in_file(array)) if residency == "auto" else residency
        self.resident: torch.Tensor | None = None
        if self.residency == "device":
            self.resident = _upload(array, device)
        elif self.residency == "stream" and not in_file(array):
            raise InputError("--residency stream: these activations are not in a file.")
        self._fd = -1
        if self.residency == "stream":
            assert isinstance(array, np.memmap)
            self._fd = os.open(str(array.filename), os.O_RDONLY)
            self._readers = ThreadPoolExecutor(READERS)

    @property
    def where(self) -> str:
        """Where the activations live, for the plan."""
        if self.residency == "device":
            return f"copied to {self.device}"
        return "memory map" if self.residency == "host" else "read ahead from the file"

    @property
    def views(self) -> int:
        """V, the number of cached views."""
        return int(self.array.shape[1])

    def gather(self, rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """(B,) row and view numbers to float32 activations (B, ...) on the device."""
        if self.resident is not None:
            return self.resident[rows.to(self.device), views.to(self.device)].float()
        if self.residency == "stream":
            return self._finish(torch.from_numpy(self._read(rows.numpy(), views.numpy())))
        return self._finish(torch.from_numpy(self.array[rows.numpy(), views.numpy()]))

    def ahead(self, batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
        """`gather` of each batch in turn; what must be fetched from elsewhere is fetched while the last one is used."""
        if self.residency == "device" or (self.residency == "host" and self.device.type == "cpu"):
            yield from (self.gather(*batch) for batch in batches)
            return
        queue: deque[Future[torch.Tensor]] = deque()
        upcoming = iter(batches)
        with ThreadPoolExecutor(DEPTH) as pool:
            try:
                for batch in upcoming:
                    queue.append(pool.submit(self._stage, *batch))
                    if len(queue) == DEPTH:
                        yield self._finish(queue.popleft().result())
                while queue:
                    yield self._finish(queue.popleft().result())
            finally:
                for future in queue:
                    future.cancel()

    def _stage(self, rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """A batch in host memory in its stored dtype, pinned where a GPU takes it from there."""
        indices = rows.numpy(), views.numpy()
        values = self._read(*indices) if self.residency == "stream" else self.array[indices]
        found = torch.from_numpy(values)
        return found.pin_memory() if self.device.type == "cuda" else found

    def _finish(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.to(self.device, non_blocking=True).float()

    def _read(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """(B, ...) in the stored dtype, each row by a read of its own; READERS of them at once."""
        array = self.array
        assert isinstance(array, np.memmap)
        out = np.empty((len(rows), *array.shape[2:]), array.dtype)
        size = math.prod(out.shape[1:]) * out.itemsize
        starts = [array.offset + (int(r) * array.shape[1] + int(v)) * size for r, v in zip(rows, views, strict=True)]
        for _ in self._readers.map(self._fill, out, starts):
            pass
        return out

    def _fill(self, row: np.ndarray, start: int) -> None:
        view = memoryview(row.data).cast("B")
        while len(view):
            got = os.preadv(self._fd, [view], start)
            if not got:
                raise InputError(f"{Path(str(self.array.filename))}: ends before its last row; run `cxrfast verify`.")  # type: ignore[attr-defined]
            view, start = view[got:], start + got

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)


def in_file(array: np.ndarray) -> bool:
    """Whether an array is a whole map; a part of one still has the map's class, name and offset, and other rows."""
    return isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap)


def choose(size: int, device: torch.device, mapped: bool) -> str:
    """`device`, `host` or `stream` for `size` bytes, by what is free now.

    On a CPU the memory map is already in the memory the device computes in, and copying it would need that twice.
    """
    if device.type == "cuda" and size < SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    return "host" if not mapped or size < SHARE * host_free() else "stream"


def host_free(meminfo: Path = Path("/proc/meminfo")) -> float:
    """Bytes of host memory that a page cache may fill; infinity where the system does not say."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return float("inf")
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return float(found[0]) if found else float("inf")


def _upload(array: np.ndarray, device: torch.device, *, chunk: int = 256) -> torch.Tensor:
    dtype = torch.float16 if array.dtype == np.float16 else torch.float32
    try:
        out = torch.empty(array.shape, dtype=dtype, device=device)
    except RuntimeError as error:
        raise InputError(
            f"--residency device: {array.nbytes / 1e9:.1f} GB do not fit on {device}; use --residency host or stream."
        ) from error
    for start in range(0, len(array), chunk):
        out[start : start + chunk] = torch.from_numpy(np.array(array[start : start + chunk]))
    return out
