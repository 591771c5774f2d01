"""Images through decoding and the frozen prefix into rows of an activation file."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import CacheSpec
from ..data.images import flip, load
from ..errors import ImageError, InputError
from ..models import onednn
from ..models.backbone import Backbone, prefix
from ..models.backbone import load as load_backbone
from ..models.positions import SizeError
from .file import FAILED, PENDING, Writer
from .job import CacheJob
from .reuse import hash_image

FLOAT16_MAX = 65504.0
WIDER = "--dtype float32"


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """One image after decoding: pixels (S, S) uint8, the file's sha256 and a note; or the reason why not."""

    pixels: np.ndarray | None = None
    sha256: str = ""
    error: str | None = None
    note: str = ""


def decode(path: Path, spec: CacheSpec, *, strict: bool = False) -> Decoded:
    """Decode and resize an image file; for one that cannot be read, or is refused by `strict`, the result holds the
    reason."""
    try:
        found = load(path, spec.preprocess, strict=strict)
    except ImageError as error:
        return Decoded(error=f"{error.reason}: {error}", sha256=hash_image(path))
    return Decoded(pixels=found.pixels, sha256=found.sha256, note=found.note)


class Encoder:
    """The frozen prefix on a device: uint8 pixels in, activations in the file's dtype out."""

    def __init__(self, backbone: Backbone, spec: CacheSpec, device: torch.device, *, block: int) -> None:
        self.visual = backbone.visual.to(device)
        self.spec, self.device, self.block = spec, device, block
        mean, std = backbone.statistics(spec.normalize)
        self.mean = torch.tensor(mean, device=device).reshape(1, 3, 1, 1)
        self.std = torch.tensor(std, device=device).reshape(1, 3, 1, 1)

    def encode(self, decoded: Sequence[Decoded], places: Sequence[int]) -> tuple[np.ndarray, list[str | None]]:
        """Encode images at their places in a block: activations (n, V, ...), and each image's error or None.

        The block is always full-sized, empty places black, so that a row's bytes never depend on what was done before.
        """
        size = self.spec.preprocess.size
        pixels = np.zeros((self.block, size, size), np.uint8)
        for place, image in zip(places, decoded, strict=True):
            if image.pixels is not None:
                pixels[place] = image.pixels
        values = np.stack([self(flip(pixels) if v == "flip" else pixels) for v in self.spec.views], axis=1)
        values, errors = values[list(places)], [image.error for image in decoded]
        limit = FLOAT16_MAX if self.spec.dtype == "float16" else float(np.finfo(np.float32).max)
        for i, row in enumerate(values):
            outside = int((~(np.abs(row) <= limit)).sum())  # counts NaN too
            if errors[i] is None and outside:
                errors[i] = f"range: {outside:,} activations are not finite or outside {self.spec.dtype}; use {WIDER}"
            if errors[i] is not None:
                values[i] = 0
        return values.astype(self.spec.dtype), errors

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (B, S, S) to float32 activations at the cut, (B, T, D) or (B, E)."""
        with torch.inference_mode(), onednn.float32(self.device):
            x = torch.from_numpy(pixels).to(self.device)
            x = normalise(x, self.mean, self.std)
            out: np.ndarray = prefix(self.visual, x, self.spec.unfreeze_blocks).float().cpu().numpy()
        return out


def normalise(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Turn uint8 grey (B, H, W) into normalised (B, 3, H, W) float32."""
    return (pixels[:, None].float().div(255).expand(-1, 3, -1, -1) - mean) / std


def load_recorded(meta: Mapping[str, Any], weights: str | None = None) -> Backbone:
    """Load the tower that the header of a cache names, or `weights` in its place, at the image size of the cache.

    The caller checks by their hash that these are the weights of the cache. Raises InputError for weights that cannot
    be, because their patches do not fit the size.
    """
    source, size = weights or meta["weights"], meta["spec"]["preprocess"]["size"]
    try:
        return load_backbone(source, size)
    except SizeError as error:
        raise InputError(
            f"--weights {source}: not the weights of this cache, whose films have {size} pixels a side, no multiple of "
            "the patches of these weights; pass those it was made with."
        ) from error


def with_size(spec: CacheSpec, backbone: Backbone) -> CacheSpec:
    """Return the spec with the size of the films that the backbone takes."""
    return replace(spec, preprocess=replace(spec.preprocess, size=backbone.image_size))


@dataclass(frozen=True, kw_only=True)
class BuildProgress:
    """How far a run is, in images: done of total, of them `before` this call, encoded by this call, failed.

    Seconds of this call: waiting for decoding, computing, waiting for the disk (writing).
    """

    done: int = 0
    total: int = 0
    before: int = 0
    encoded: int = 0
    failed: int = 0
    decoding: float = 0.0
    computing: float = 0.0
    writing: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the first image of this call, without comparing images with rows that exist."""
        return self.decoding + self.computing + self.writing

    @property
    def bottleneck(self) -> str:
        """The stage the run waits for."""
        stages = {"decoding": self.decoding, "the model": self.computing, "the disk": self.writing}
        return max(stages, key=lambda name: stages[name])


class Pipeline:
    """Blocks of images through decode threads, the model (this thread) and one writing thread, in order."""

    def __init__(
        self,
        encoder: Encoder,
        writer: Writer,
        paths: Sequence[Path],
        job: CacheJob,
        on_progress: Callable[[BuildProgress], None] | None,
    ) -> None:
        self.encoder, self.writer, self.paths, self.job, self.on_progress = encoder, writer, paths, job, on_progress
        before = int((writer.state != PENDING).sum())
        self.progress = BuildProgress(done=before, total=len(paths), before=before)

    def run(self, stopped: threading.Event) -> None:
        """Encode every pending row, block by block, until `stopped` is set."""
        written: Future[None] | None = None
        blocks = self._pending_blocks()
        with ThreadPoolExecutor(self.job.threads) as decoding, ThreadPoolExecutor(1) as writing:
            images = self._decoded(decoding, blocks)
            for rows in blocks:
                if stopped.is_set():
                    break
                mark = time.perf_counter()
                decoded = next(images)
                mark = self._time("decoding", mark)
                values, errors = self.encoder.encode(decoded, [row % self.encoder.block for row in rows])
                mark = self._time("computing", mark)
                if written is not None:
                    written.result()
                self._time("writing", mark)
                self._stop_at_first(rows, errors)
                hashes, notes = [d.sha256 for d in decoded], [d.note for d in decoded]
                written = writing.submit(self.writer.rows, rows, values, hashes, errors, notes)
                self._report(len(rows))
            images.close()
            if written is not None:
                written.result()

    def _time(self, stage: str, began: float) -> float:
        """Add the seconds since `began` to a stage; returns now."""
        now = time.perf_counter()
        seconds: dict[str, Any] = {stage: getattr(self.progress, stage) + now - began}
        self.progress = replace(self.progress, **seconds)
        return now

    def _pending_blocks(self) -> list[list[int]]:
        """Pending rows by the block they lie in; a row keeps its place whatever else is encoded there."""
        pending = np.flatnonzero(self.writer.state == PENDING)
        edges = np.flatnonzero(np.diff(pending // self.encoder.block)) + 1
        return [rows.tolist() for rows in np.split(pending, edges) if len(rows)]

    def _decoded(self, pool: ThreadPoolExecutor, blocks: list[list[int]]) -> Generator[list[Decoded], None, None]:
        """Decoded blocks in order, a few of them ahead: memory stays flat however many images there are."""
        queue: deque[list[Future[Decoded]]] = deque()
        upcoming = iter(blocks)

        def enqueue() -> None:
            if (rows := next(upcoming, None)) is not None:
                read = partial(decode, spec=self.job.spec, strict=self.job.strict)
                queue.append([pool.submit(read, self.paths[row]) for row in rows])

        for _ in range(2 + self.job.threads // self.encoder.block):
            enqueue()
        try:
            while queue:
                block = [future.result() for future in queue.popleft()]
                enqueue()
                yield block
        finally:
            for futures in queue:
                for future in futures:
                    future.cancel()

    def _stop_at_first(self, rows: Sequence[int], errors: Sequence[str | None]) -> None:
        for row, error in zip(rows, errors, strict=True):
            if error is None:
                continue
            if error.startswith("needs_pydicom: "):  # which every further film of the kind would say again
                raise InputError(error.removeprefix("needs_pydicom: "))
            if self.job.stop_on_error:
                raise InputError(f"stopped at the first image that failed, {self.paths[row]}: {error}")

    def _report(self, more: int) -> None:
        state = self.writer.state
        self.progress = replace(
            self.progress,
            done=int((state != PENDING).sum()),
            encoded=self.progress.encoded + more,
            failed=int((state == FAILED).sum()),
        )
        if self.on_progress is not None:
            self.on_progress(self.progress)
