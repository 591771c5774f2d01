"""Cached activations on their way to the training device: copied there once, from host memory, or read ahead.

All three hand the trainer the same bytes, so the choice changes the time and nothing else.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from ..errors import InputError
from ..system import hardware
from .cache import JoinedRows
from .stream import Stream

RESIDENCIES = ("auto", "device", "host", "stream")
# Of the memory that is free; the rest is for weights, gradients and what a batch needs.
SHARE = 0.8
DEPTH = 4
# Bytes of a window of the stream, two of which are in memory, and its limit as a share of the memory that is free. At
# 302,592 bytes a row, 512 MB are 1,774 rows: more than the 1,024 that a block shuffle mixes, so that most of its blocks
# are read whole.
WINDOW, WINDOW_SHARE = 512 << 20, 1 / 16

Batch = tuple[torch.Tensor, torch.Tensor]


class Activations:
    """Rows of an activation array on their way to `device`.

    `array` is (N, V, T, D) or (N, V, E), float16 or float32, usually a memory map, or `JoinedRows` of several.
    Residency `device` copies it there once; `host` gathers each batch from memory (a map's page cache); `stream` reads
    the rows of many batches ahead from the files, `window` bytes at a time; `auto` takes the first of the three that
    fits. Raises InputError on `stream` without a file, or `device` where it cannot fit.
    """

    def __init__(
        self,
        array: np.ndarray | JoinedRows,
        device: torch.device,
        *,
        residency: str = "auto",
        window: int | None = None,
    ) -> None:
        self.array, self.device = array, device
        self.residency = choose_residency(array.nbytes, device, in_file(array)) if residency == "auto" else residency
        self.resident: torch.Tensor | None = None
        self.stream: Stream | None = None
        if self.residency == "device":
            self.resident = _upload(array, device)
        elif self.residency == "stream":
            self.stream = _stream(array, device, window or int(min(WINDOW, WINDOW_SHARE * hardware.memory_available())))

    @property
    def where(self) -> str:
        """Say where the activations are kept, for the plan."""
        if self.residency == "device":
            return f"copied to {self.device}"
        return "memory map" if self.residency == "host" else "read ahead from the file"

    @property
    def views(self) -> int:
        """V, the number of cached views."""
        return int(self.array.shape[1])

    def gather(self, rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """Gather float32 activations (B, ...) on the device for (B,) row and view numbers."""
        if self.resident is not None:
            return self.resident[rows.to(self.device), views.to(self.device)].float()
        read = self.stream.read if self.stream is not None else self._take
        return self._finish(torch.from_numpy(read(rows.numpy(), views.numpy())))

    def ahead(self, batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
        """`gather` of each batch in turn; what must be fetched from elsewhere is fetched while the last one is used."""
        if self.residency == "device" or (self.residency == "host" and self.device.type == "cpu"):
            yield from (self.gather(*batch) for batch in batches)
            return
        if self.stream is not None:
            for values in self.stream.ahead((rows.numpy(), views.numpy()) for rows, views in batches):
                yield self._finish(torch.from_numpy(values), copy=True)
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

    def _take(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        return self.array[rows, views]

    def _stage(self, rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """A batch in host memory in its stored dtype, pinned where a GPU takes it from there."""
        found = torch.from_numpy(self._take(rows.numpy(), views.numpy()))
        return found.pin_memory() if self.device.type == "cuda" else found

    def _finish(self, batch: torch.Tensor, *, copy: bool = False) -> torch.Tensor:
        if copy and self.device.type == "cpu":
            return batch.to(torch.float32, copy=True)
        return batch.to(self.device, non_blocking=True).float()


def _stream(array: np.ndarray | JoinedRows, device: torch.device, window: int) -> Stream:
    maps = [part for part in parts(array) if isinstance(part, np.memmap)]
    if not in_file(array):
        raise InputError("--residency stream: these activations are not in a file.")
    if device.type != "cuda":
        return Stream(maps, window=window)
    return Stream(
        maps,
        window=window,
        allocate=lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy(),
        # The copies to the device are under way when the loop asks for more, and read this memory.
        settle=lambda: torch.cuda.current_stream(device).synchronize(),
    )


def parts(array: np.ndarray | JoinedRows) -> tuple[np.ndarray, ...]:
    """Return the arrays that hold the rows."""
    return array.parts if isinstance(array, JoinedRows) else (array,)


def in_file(array: np.ndarray | JoinedRows) -> bool:
    """Whether all rows are in whole maps; a part of one still has the map's class, name and offset, and other rows."""
    return all(isinstance(part, np.memmap) and isinstance(part.base, mmap.mmap) for part in parts(array))


def choose_residency(size: int, device: torch.device, mapped: bool) -> str:
    """Choose `device`, `host` or `stream` for `size` bytes, by what is free now.

    On a CPU the memory map is already in the memory the device computes in, and copying it would need that twice.
    """
    if device.type == "cuda" and size < SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    return "host" if not mapped or size < SHARE * hardware.memory_available() else "stream"


def _upload(array: np.ndarray | JoinedRows, device: torch.device, *, chunk: int = 256) -> torch.Tensor:
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
