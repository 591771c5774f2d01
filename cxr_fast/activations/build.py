"""A manifest into a cache: one activation file, or K shards of it and their index.

Decode threads, the model and the writer overlap. Rows are encoded in fixed blocks of images, always padded to full
size, whatever was done before: a resumed file is bit-identical to an uninterrupted one, and a shard, which begins
where a block does, holds the rows that the same images have in one file.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np

from ..config import CacheSpec
from ..data import duplicates
from ..data.manifest import Manifest
from ..errors import InputError, Interrupted
from ..models.backbone import load
from ..models.device import pick_device
from ..system.files import AnyPath, write_csv
from ..system.locks import FileLock, graceful
from . import cache, reuse
from . import file as store
from .encoder import BuildProgress, Encoder, Pipeline, decode, with_size
from .job import CacheJob, FileJob, make_header, shard_ranges

USUAL_SIZE = 224
NOTHING_YET = "stopped before anything was encoded; run the same command again to go on with {}."


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """What a cache run will do, known before it starts; `seconds` from one image decoded and one block encoded.

    `size` is what the tower sees, pixels a side; `rows_copied` are expected to come out of the caches of `reuse`.
    """

    images: int
    size: int
    views: int
    cut: str
    dtype: str
    bytes_needed: int
    bytes_free: int
    rows_done: int
    rows_dropped: int
    device: str
    seconds: float
    rows_copied: int = 0


@dataclass(frozen=True, kw_only=True)
class FileOutcome:
    """One activation file that is complete: its images, those encoded by this call, (image, reason) of failed ones."""

    images: int
    encoded: int = 0
    failed: tuple[tuple[str, str], ...] = ()

    @property
    def reused(self) -> int:
        """Images whose rows were there before."""
        return self.images - self.encoded - len(self.failed)


@dataclass(frozen=True, kw_only=True)
class BuildOutcome:
    """What a cache run did; `reused` counts rows that were there before, `notes` name suspicious images.

    `failed` and `noted` hold images with the reason, or the note on how they were read.
    """

    path: Path
    images: int
    encoded: int
    reused: int
    failed: tuple[tuple[str, str], ...]
    seconds: float
    fingerprint: str
    notes: tuple[str, ...] = ()
    noted: tuple[tuple[str, str], ...] = ()


OnProgress = Callable[[BuildProgress], None]
OnCompared = Callable[[int], None]
Runner = Callable[[Sequence[FileJob], "TotalProgress"], Sequence[FileOutcome]]


# ------------------------------------------------------------------ plan and run


def plan(job: CacheJob) -> BuildPlan:
    """Say what `run(job)` will do. Writes nothing; refuses what `run` would refuse."""
    if job.shards is not None:
        shard_ranges(len(job.manifest), job.shards, job.block)
    header = make_header(job, job.manifest)
    files = reuse.find_files(job.out, sharded=job.shards is not None)
    done = reuse.count_reusable(header, files)
    folder = next(parent for parent in job.out.resolve().parents if parent.exists())
    copied = _count_copied(job, header, files)
    return BuildPlan(
        images=header.shape[0],
        size=job.backbone.image_size,
        views=header.shape[1],
        cut=header.meta["fingerprint_parts"]["cut"],
        dtype=header.dtype,
        bytes_needed=store.row_bytes(header.shape, header.dtype) * header.shape[0],
        bytes_free=shutil.disk_usage(folder).free,
        rows_done=done,
        rows_dropped=reuse.count_dropped(header, files),
        device=str(pick_device(job.device)),
        seconds=_expected_seconds(job, max(header.shape[0] - done - copied, 0)),
        rows_copied=copied,
    )


def _count_copied(job: CacheJob, header: store.Header, files: Sequence[Path]) -> int:
    """Count the images whose rows the caches of `reuse` seem to hold, beside those that are encoded in `files`."""
    have: set[str] = set()
    for path in files:
        file = store.ActivationFile(path, partial=True)
        have.update(image for image, ok in zip(file.header.images, file.ok, strict=True) if ok)
    sources = reuse.open_sources(job.reuse, header)
    return max((reuse.count_same_images(other, job.manifest, have) for other in sources), default=0)


def _expected_seconds(job: CacheJob, images: int) -> float:
    """Seconds for `images`: decoding shares the cores with a model on the CPU, and runs beside one on a GPU."""
    if not images:
        return 0.0
    encoder = Encoder(job.backbone, job.spec, pick_device(job.device), block=job.block)
    mark = time.perf_counter()
    decode(job.manifest.path(0), job.spec)
    decoding = (time.perf_counter() - mark) / job.threads
    size = job.spec.preprocess.size
    few = max(1, min(encoder.block, encoder.block * USUAL_SIZE**2 // size**2))  # no longer wait for larger images
    pixels = np.zeros((few, size, size), np.uint8)
    encoder(pixels)
    mark = time.perf_counter()
    encoder(pixels)
    computing = (time.perf_counter() - mark) / few * len(job.spec.views)
    return images * (decoding + computing if encoder.device.type == "cpu" else max(decoding, computing))


def build_cache(
    manifest: Manifest,
    out: AnyPath,
    spec: CacheSpec | None = None,
    *,
    shards: int | None = None,
    device: str = "auto",
    on_progress: OnProgress | None = None,
) -> cache.Cache:
    """Encode a data set once through the frozen layers of `spec.weights`, keep the activations at `out`, and open them.

    `shards` None writes one activation file, K writes K of them and an index. The same call goes on with what an
    interrupted one left. Raises what `run` raises, and InputError for weights that cannot be read.

        >>> spec = CacheSpec(weights="random:0:test_vit", unfreeze_blocks=0)
        >>> found = build_cache(read_dataset("indiana", limit=4), "cache/few.h5", spec, device="cpu")
        >>> found.header.shape  # images, views, embedding
        (4, 2, 512)
    """
    spec = spec or CacheSpec()
    tower = load(spec.weights, spec.image_size)
    job = CacheJob(
        manifest=manifest, backbone=tower, spec=with_size(spec, tower), out=Path(out), shards=shards, device=device
    )
    run(job, on_progress)
    return cache.open_cache(job.out)


def run(
    job: CacheJob,
    on_progress: OnProgress | None = None,
    on_compared: OnCompared | None = None,
    runner: Runner | None = None,
) -> BuildOutcome:
    """Encode every image that is not in the cache yet, and give it its final name.

    Rows encoded before are kept where fingerprint and image bytes are the same, also those of another list of images
    or number of shards (see `reuse`). Failed images are marked with their reason and never reach training; a run in
    which no image succeeded is an InputError, and with `stop_on_error` the first failure is. SIGINT and SIGTERM finish
    the block and raise Interrupted; the same call goes on from there. `on_compared(n)` is called after n more images
    were compared with their rows. `runner` makes the shards in place of this process, one after another.
    """
    began = time.perf_counter()
    if job.shards is None:
        outcomes: Sequence[FileOutcome] = [make_file(job, job.files[0], on_progress, on_compared)]
    else:
        outcomes = _run_shards(job, on_progress, on_compared, runner)
    file = cache.open_cache(job.out)
    header, ok = file.header, np.flatnonzero(file.ok)
    images, groups, hashes = ([column[i] for i in ok] for column in (header.images, header.groups, file.sha256))
    return BuildOutcome(
        path=job.out,
        images=header.shape[0],
        encoded=sum(outcome.encoded for outcome in outcomes),
        reused=sum(outcome.reused for outcome in outcomes),
        failed=tuple(itertools.chain.from_iterable(outcome.failed for outcome in outcomes)),
        seconds=time.perf_counter() - began,
        fingerprint=header.meta["fingerprint"],
        notes=duplicates.notes(images, hashes, groups, header.labels[ok]),
        noted=tuple((image, note) for image, i in zip(images, ok, strict=True) if (note := file.errors[i])),
    )


def _run_shards(
    job: CacheJob, on_progress: OnProgress | None, on_compared: OnCompared | None, runner: Runner | None
) -> Sequence[FileOutcome]:
    """Make every shard that is not complete, then the index; while shards change there is none to read."""

    def here(files: Sequence[FileJob], progress: TotalProgress) -> list[FileOutcome]:
        outcomes = []
        for number, file in enumerate(files):
            outcomes.append(make_file(job, file, partial(progress.update, number), on_compared))
            progress.finish(number, outcomes[-1])
        return outcomes

    with FileLock(job.out), graceful() as stopped:
        also = reuse.set_aside_others({file.path: file.header for file in job.files}, job.out)
        files = [replace(file, also=(*file.also, *also)) for file in job.files]
        if stopped.is_set():
            raise Interrupted(NOTHING_YET.format(job.out))
        outcomes = (runner or here)(files, TotalProgress(files, on_progress, stopped.is_set))
        failed = list(itertools.chain.from_iterable(outcome.failed for outcome in outcomes))
        _refuse_all_failed(failed, len(job.manifest))
        cache.write_index(job.out, [file.path for file in files])
        for path in also:
            path.unlink(missing_ok=True)
    return outcomes


def _refuse_all_failed(failed: Sequence[tuple[str, str]], total: int) -> None:
    if len(failed) == total:
        image, error = failed[0]
        raise InputError(f"every one of the {total:,} images failed; the first, {image}: {error}")


class TotalProgress:
    """Adds up the progress of all shards and passes a stop request to the workers (`stop`)."""

    def __init__(
        self, files: Sequence[FileJob], on_progress: OnProgress | None = None, stop: Callable[[], bool] = bool
    ) -> None:
        self.on_progress, self.stop = on_progress, stop
        self.latest = [BuildProgress(total=len(file.manifest)) for file in files]
        self.finished: set[int] = set()

    def update(self, number: int, progress: BuildProgress) -> None:
        """Take in the progress of shard `number`; a report that arrives after the shard finished is dropped."""
        if number not in self.finished:
            self._keep(number, progress)

    def finish(self, number: int, outcome: FileOutcome) -> None:
        """Take in that shard `number` is complete; one in which nothing was pending reported nothing before."""
        self.finished.add(number)
        failed, before = len(outcome.failed), outcome.reused
        counts = {"done": outcome.images, "before": before, "encoded": outcome.encoded + failed, "failed": failed}
        self._keep(number, replace(self.latest[number], **counts))

    def _keep(self, number: int, progress: BuildProgress) -> None:
        self.latest[number] = progress
        if self.on_progress is not None:
            self.on_progress(self.sum())

    def sum(self) -> BuildProgress:
        """All shards."""
        names = [field.name for field in fields(BuildProgress)]
        return BuildProgress(**{name: sum(getattr(one, name) for one in self.latest) for name in names})


def write_notes(path: Path, noted: Sequence[tuple[str, str]]) -> Path:
    """Write `NAME.notes.csv` beside the cache (image, note); remove it where no image has a note."""
    out = path.with_name(cache.stem(path) + ".notes.csv")
    if noted:
        write_csv(out, ["image", "note"], noted, "--out")
    else:
        out.unlink(missing_ok=True)
    return out


def write_errors(path: Path, failed: Sequence[tuple[str, str]]) -> Path:
    """Write `NAME.errors.csv` beside the cache (image, reason code, message); remove it where nothing failed."""
    out = path.with_name(cache.stem(path) + ".errors.csv")
    if failed:
        write_csv(
            out, ["image", "reason", "message"], ([image, *error.split(": ", 1)] for image, error in failed), "--out"
        )
    else:
        out.unlink(missing_ok=True)
    return out


# ------------------------------------------------------------------ one activation file


def make_file(
    job: CacheJob, file: FileJob, on_progress: OnProgress | None = None, on_compared: OnCompared | None = None
) -> FileOutcome:
    """Encode what one activation file lacks, and give it its final name. Errors as `run`.

    A shard in which every image failed is kept, for only all of them together are an error.
    """
    out, total = file.path, len(file.manifest)
    with FileLock(out), graceful() as stopped:
        paths = [file.manifest.path(row) for row in range(total)]
        hasher = reuse.ImageHasher(paths, job.threads, stopped.is_set, on_compared)
        pending = reuse.prepare(file.header, out, hasher, repair=job.repair, strict=job.strict, also=file.also)
        if stopped.is_set():
            raise Interrupted(NOTHING_YET.format(out))
        if not pending:
            return FileOutcome(images=total)
        unfinished = store.partial_path(out)
        with store.Writer(out) as writer:
            block = int(store.read_header(unfinished).meta["block"])
            encoder = Encoder(job.backbone, job.spec, pick_device(job.device), block=block)
            before = int((writer.state != store.PENDING).sum())
            Pipeline(encoder, writer, paths, job, on_progress).run(stopped)
            done = int((writer.state != store.PENDING).sum())
            if done < total:
                raise Interrupted(
                    f"stopped; {done:,} of {total:,} images are safe in {unfinished}. "
                    "Run the same command again to go on."
                )
            failed = find_failed(unfinished)
            if job.shards is None:
                _refuse_all_failed(failed, total)
            writer.finish()
        reuse.remove_asides(out)
    return FileOutcome(images=total, encoded=total - before - len(failed), failed=failed)


def find_failed(path: Path) -> tuple[tuple[str, str], ...]:
    """Return (image, reason) of every failed row of an activation file, complete or not."""
    file = store.ActivationFile(path, partial=True)
    return tuple((file.header.images[i], file.errors[i]) for i in np.flatnonzero(file.state == store.FAILED))
