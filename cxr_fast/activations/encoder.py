"""Manifest through preprocess and prefix into the store: decode threads, the model and the writer overlap.

Rows are encoded in fixed blocks of images, always padded to full size, whatever was done before: a resumed file is
bit-identical to an uninterrupted one.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL
import torch

from ..config import CacheSpec, digest, to_dict
from ..data import duplicates
from ..data.images import flip, load, self_check
from ..data.manifest import Manifest
from ..errors import ImageError, InputError, Interrupted
from ..models import onednn
from ..models.backbone import Backbone, identity, prefix
from ..models.device import pick_device
from ..system import hardware
from ..system.locks import FileLock, graceful
from . import cache, reuse
from . import file as store

# Images a model call, unless --batch-size says otherwise; kept in the file, so that a resume uses the same.
BLOCKS = {"cpu": 8, "cuda": 64}
FLOAT16_MAX = 65504.0
WIDER = "--dtype float32"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a cache run will do, known before it starts; `seconds` from one image decoded and one block encoded."""

    images: int
    views: int
    cut: str
    dtype: str
    bytes_needed: int
    bytes_free: int
    rows_done: int
    rows_dropped: int
    device: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is: images done of total, of them `before` this call, images encoded by this call, images failed,
    and the seconds this call waited for decoding, computed, and waited for the disk."""

    done: int
    total: int
    before: int
    encoded: int
    failed: int
    decoding: float
    computing: float
    writing: float

    @property
    def seconds(self) -> float:
        """Since the first image of this call, looking for what can be reused aside."""
        return self.decoding + self.computing + self.writing

    @property
    def bottleneck(self) -> str:
        """The stage the run waits for."""
        stages = {"decoding": self.decoding, "the model": self.computing, "the disk": self.writing}
        return max(stages, key=lambda name: stages[name])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a cache run did; `reused` counts rows that were there before, `notes` say what is odd about the images."""

    path: Path
    images: int
    encoded: int
    reused: int
    failed: tuple[tuple[str, str], ...]
    seconds: float
    fingerprint: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """One image after decoding: pixels (S, S) uint8 and the file's sha256, or the reason why not."""

    pixels: np.ndarray | None = None
    sha256: str = ""
    error: str | None = None


def header_for(manifest: Manifest, backbone: Backbone, spec: CacheSpec, *, block: int) -> store.Header:
    """The activation file's header: spec, identity and fingerprint, and the manifest's rows."""
    tokens, width, embedding = backbone.shape
    tail_shape = (embedding,) if spec.unfreeze_blocks == 0 else (tokens, width)
    parts = identity(backbone.visual, spec.unfreeze_blocks)
    mean, std = backbone.statistics(spec.normalize)
    fingerprint_parts = {
        "prefix_sha256": parts["prefix_sha256"],
        "cut": parts["cut"],
        **to_dict(spec.preprocess),
        reuse.PIXEL_CHECK: self_check(),
        "mean": list(mean),
        "std": list(std),
        "views": list(spec.views),
        "dtype": spec.dtype,
    }
    meta = {
        "spec": to_dict(spec),
        "block": block,
        "fingerprint": digest(fingerprint_parts),
        "fingerprint_parts": fingerprint_parts,
        "tower_sha256": parts["tower_sha256"],
        "backbone": backbone.config,
        "weights": backbone.source,
        "random_weights": backbone.random,
        "pillow": PIL.__version__,
        "mean": list(mean),
        "std": list(std),
        "dataset": {"name": manifest.name, "root": str(manifest.root.resolve()), **manifest.info},
        "subgroups": {name: list(values) for name, values in manifest.subgroups.items()},
    }
    return store.Header(
        meta=json.loads(json.dumps(meta)),  # as it will be read back: comparing the two must not trip over tuples
        shape=(len(manifest.images), len(spec.views), *tail_shape),
        dtype=spec.dtype,
        images=manifest.images,
        groups=manifest.groups,
        studies=manifest.studies,
        views=manifest.views,
        classes=manifest.classes,
        labels=manifest.labels,
    )


def plan(
    manifest: Manifest,
    backbone: Backbone,
    spec: CacheSpec,
    out: Path,
    *,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    files: Sequence[Path] | None = None,
) -> Plan:
    """What `run` with the same arguments will do. Writes nothing; refuses what `run` would refuse.

    `files` are those that may hold rows, where it is not `out` and what lies beside it.
    """
    target = pick_device(device)
    block = batch_size or BLOCKS[target.type]
    header = header_for(manifest, backbone, spec, block=block)
    done = reuse.check(header, out, files)
    folder = next(parent for parent in out.resolve().parents if parent.exists())
    return Plan(
        images=header.shape[0],
        views=header.shape[1],
        cut=header.meta["fingerprint_parts"]["cut"],
        dtype=header.dtype,
        bytes_needed=store.row_bytes(header.shape, header.dtype) * header.shape[0],
        bytes_free=shutil.disk_usage(folder).free,
        rows_done=done,
        rows_dropped=reuse.dropped(header, [out] if files is None else [f for f in files if f.suffix == ".h5"]),
        device=str(target),
        seconds=_expected(Encoder(backbone, spec, target, block=block), manifest, header.shape[0] - done, workers),
    )


def _expected(encoder: Encoder, manifest: Manifest, images: int, workers: int | None) -> float:
    """Seconds for `images`: decoding shares the cores with a model on the CPU, and runs beside one on a GPU."""
    if not images:
        return 0.0
    mark = time.perf_counter()
    _decode(manifest.path(0), encoder.spec)
    decode = (time.perf_counter() - mark) / (workers or hardware.cpu_count())
    pixels = np.zeros((encoder.block, *(encoder.spec.preprocess.size,) * 2), np.uint8)
    encoder(pixels)
    mark = time.perf_counter()
    encoder(pixels)
    model = (time.perf_counter() - mark) / encoder.block * len(encoder.spec.views)
    return images * (decode + model if encoder.device.type == "cpu" else max(decode, model))


def run(
    backbone: Backbone,
    manifest: Manifest,
    spec: CacheSpec,
    out: Path,
    *,
    device: str = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    repair: bool = False,
    stop_on_error: bool = False,
    also: Sequence[Path] = (),
    all_may_fail: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    on_looked: Callable[[int], None] | None = None,
) -> Outcome:
    """Encode every image that is not in the file yet, and give it its final name.

    Rows encoded before, in `also` too, are kept where fingerprint and image bytes are the same (see `reuse.prepare`).
    Failed images are marked with their reason and never reach training; with `stop_on_error` the first ends the run
    (InputError), and so does a run without an image that succeeded, unless `all_may_fail`. SIGINT and SIGTERM finish
    the block and raise Interrupted; the same call goes on from there. `on_looked`: see `reuse.Look`.
    """
    began = time.perf_counter()
    target, threads = pick_device(device), workers or hardware.cpu_count()
    header = header_for(manifest, backbone, spec, block=batch_size or BLOCKS[target.type])
    paths = [manifest.path(row) for row in range(len(manifest))]
    total = len(paths)
    with FileLock(out), graceful() as stopped:
        look = reuse.Look(paths, threads, stopped.is_set, on_looked)
        work = reuse.prepare(header, out, look, repair=repair, also=also)
        if stopped.is_set():
            raise Interrupted(f"stopped before anything was encoded; run the same command again to go on with {out}.")
        if not work:
            return _outcome(out, 0, began)
        with store.Writer(out) as writer:
            block = int(store.read_header(store.partial_path(out)).meta["block"])
            blocks = _pending_blocks(writer.state, block)
            encoder = Encoder(backbone, spec, target, block=block)
            _encode(encoder, writer, paths, blocks, threads, stopped, stop_on_error, on_progress)
            if (writer.state == store.PENDING).any():
                raise Interrupted(
                    f"stopped; {int((writer.state != store.PENDING).sum()):,} of {total:,} images are safe in "
                    f"{store.partial_path(out)}. Run the same command again to go on."
                )
            if (writer.state == store.FAILED).all() and not all_may_fail:
                image, error = failures(store.partial_path(out))[0]
                raise InputError(f"every one of the {total:,} images failed; the first, {image}: {error}")
            writer.finish()
        reuse.finish(out)
    return _outcome(out, sum(map(len, blocks)), began)


def _outcome(out: Path, tried: int, began: float) -> Outcome:
    """`tried` rows were pending; every failed row was among them."""
    file, failed = store.ActivationFile(out), failures(out)
    header, ok = file.header, np.flatnonzero(file.ok)
    images, groups, hashes = ([column[i] for i in ok] for column in (header.images, header.groups, file.sha256))
    return Outcome(
        path=out,
        images=header.shape[0],
        encoded=tried - len(failed),
        reused=header.shape[0] - tried,
        failed=failed,
        seconds=time.perf_counter() - began,
        fingerprint=header.meta["fingerprint"],
        notes=duplicates.notes(images, hashes, groups, header.labels[ok]),
    )


def _pending_blocks(state: np.ndarray, block: int) -> list[list[int]]:
    """Pending rows by the block they lie in; a row keeps its place in the block whatever else is encoded there."""
    pending = np.flatnonzero(state == store.PENDING)
    edges = np.flatnonzero(np.diff(pending // block)) + 1
    return [rows.tolist() for rows in np.split(pending, edges) if len(rows)]


def _encode(
    encoder: Encoder,
    writer: store.Writer,
    paths: list[Path],
    blocks: list[list[int]],
    workers: int,
    stopped: threading.Event,
    stop_on_error: bool,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    """Blocks through decode threads, the model (this thread) and one writing thread, in order."""
    clock, encoded = {"decoding": 0.0, "computing": 0.0, "writing": 0.0}, 0
    before = int((writer.state != store.PENDING).sum())
    written: Future[None] | None = None

    def timed(stage: str, began: float) -> float:
        clock[stage] += (now := time.perf_counter()) - began
        return now

    with ThreadPoolExecutor(workers) as decoding, ThreadPoolExecutor(1) as writing:
        images = _prefetch(decoding, paths, blocks, encoder, depth=2 + workers // encoder.block)
        for rows in blocks:
            if stopped.is_set():
                break
            mark = time.perf_counter()
            decoded = next(images)
            mark = timed("decoding", mark)
            values, errors = encoder.encode(decoded, [row % encoder.block for row in rows])
            mark = timed("computing", mark)
            if written is not None:
                written.result()
            timed("writing", mark)
            _stop_at_first(stop_on_error, rows, errors, paths)
            written = writing.submit(writer.rows, rows, values, [d.sha256 for d in decoded], errors)
            encoded += len(rows)
            if on_progress is not None:
                state = writer.state
                done, failed = int((state != store.PENDING).sum()), int((state == store.FAILED).sum())
                on_progress(
                    Progress(done=done, total=len(paths), before=before, encoded=encoded, failed=failed, **clock)
                )
        images.close()
        if written is not None:
            written.result()


def _stop_at_first(stop: bool, rows: Sequence[int], errors: Sequence[str | None], paths: Sequence[Path]) -> None:
    for row, error in zip(rows, errors, strict=True):
        if stop and error is not None:
            raise InputError(f"stopped at the first image that failed, {paths[row]}: {error}")


class Encoder:
    """The frozen prefix on a device: uint8 pixels in, activations in the file's dtype out."""

    def __init__(self, backbone: Backbone, spec: CacheSpec, device: torch.device, *, block: int) -> None:
        self.visual = backbone.visual.to(device)
        self.spec, self.device, self.block = spec, device, block
        mean, std = backbone.statistics(spec.normalize)
        self.mean = torch.tensor(mean, device=device).reshape(1, 3, 1, 1)
        self.std = torch.tensor(std, device=device).reshape(1, 3, 1, 1)

    def encode(self, decoded: Sequence[Decoded], places: Sequence[int]) -> tuple[np.ndarray, list[str | None]]:
        """Activations (n, V, ...) of images at their places in a block, and each image's error or None.

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
    """uint8 grey (B, H, W) to normalised (B, 3, H, W) float32."""
    return (pixels[:, None].float().div(255).expand(-1, 3, -1, -1) - mean) / std


def row_bytes(backbone: Backbone, spec: CacheSpec) -> int:
    """Bytes of one image's activations, all views."""
    tokens, width, embedding = backbone.shape
    tail_shape = (embedding,) if spec.unfreeze_blocks == 0 else (tokens, width)
    return store.row_bytes((1, len(spec.views), *tail_shape), spec.dtype)


def write_errors(path: Path, failed: tuple[tuple[str, str], ...]) -> Path:
    """`NAME.errors.csv` beside the cache: image, reason code, message; removed where nothing failed."""
    out = path.with_name(path.name.removesuffix(".h5").removesuffix(cache.SUFFIX) + ".errors.csv")
    if not failed:
        out.unlink(missing_ok=True)
        return out
    scratch = out.with_name(out.name + f".{os.getpid()}")
    with open(scratch, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "reason", "message"])
        rows.writerows([image, *error.split(": ", 1)] for image, error in failed)
    os.replace(scratch, out)
    return out


def with_size(spec: CacheSpec, backbone: Backbone) -> CacheSpec:
    """The spec with the backbone's own input size."""
    return replace(spec, preprocess=replace(spec.preprocess, size=backbone.image_size))


def _decode(path: Path, spec: CacheSpec) -> Decoded:
    try:
        pixels, sha256 = load(path, spec.preprocess)
    except ImageError as error:
        return Decoded(error=f"{error.reason}: {error}", sha256=reuse.file_hash(path))
    return Decoded(pixels=pixels, sha256=sha256)


def _prefetch(
    pool: ThreadPoolExecutor, paths: list[Path], blocks: list[list[int]], encoder: Encoder, *, depth: int
) -> Generator[list[Decoded], None, None]:
    """Decoded blocks in order, at most `depth` of them ahead: memory stays flat however many images there are."""
    queue: deque[list[Future[Decoded]]] = deque()
    upcoming = iter(blocks)

    def enqueue() -> None:
        if (rows := next(upcoming, None)) is not None:
            queue.append([pool.submit(_decode, paths[row], encoder.spec) for row in rows])

    for _ in range(depth):
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


def failures(path: Path) -> tuple[tuple[str, str], ...]:
    """(image, reason) of every failed row."""
    file = store.ActivationFile(path, partial=True)
    return tuple((file.header.images[i], file.errors[i]) for i in np.flatnonzero(file.state == store.FAILED))
