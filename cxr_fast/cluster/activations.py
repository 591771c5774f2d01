"""A sharded cache made on a Ray cluster: a task per shard, on whichever node has room."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..activations import build, reuse
from ..activations import file as store
from ..activations.build import BuildOutcome, BuildPlan, FileOutcome, OnProgress, TotalProgress, make_file
from ..activations.job import BLOCKS, CacheJob, FileJob, select_rows, shard_ranges
from ..data.formats.dicom import other_subject
from ..data.images import self_check
from ..errors import InputError, Interrupted
from ..models import device as cpu
from ..system import hardware
from ..system.files import atomic
from ..system.locks import HeldError
from . import connection, tasks
from .connection import Cluster, Node
from .tasks import Report, Stop, TaskSize

# Shards for each task that runs at once, where the user does not say: a lost node costs little, and the last ones
# are not waited for by all the others.
SHARES = 4
# A gathered shard goes through the memory of both ends.
GATHER_BYTES = 4 * 10**9
# How long a task waits for the lock of a node that was lost: a file server keeps it until the lease ends (NFS: 90 s).
LEASE = 180.0
SAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class ClusterBuild:
    """How a cache is made on a cluster: `slots` tasks at once, each one shard on `threads` CPUs or one GPU.

    `job` is the cache as this machine plans it, its shards and batch size resolved. `kind` is `cpu` or `cuda`, on every
    node the same, so that all shards come from one kind of device. With `gather` the shards are made on the nodes' own
    disks and sent here.
    """

    cluster: Cluster
    job: CacheJob
    kind: str
    threads: int
    cpus: float
    slots: int
    gather: bool

    def __str__(self) -> str:
        size = "1 GPU" if self.kind == "cuda" else f"{self.threads} thread{'s' * (self.threads != 1)}"
        return f"cluster: {self.cluster}; {self.shards} shards, {self.slots} at once, {size} each"

    @property
    def shards(self) -> int:
        """How many shards are made."""
        return self.job.shards or 1

    def plan(self) -> BuildPlan:
        """Plan as `build.plan`; the time is a part of one machine's, NaN where only the nodes could measure it."""
        found = build.plan(replace(self.job, workers=self.threads))
        known = self.job.device == self.kind
        seconds = found.seconds / min(self.slots, self.shards) if known else math.nan
        return replace(found, device=f"{self.slots} x {self.kind}", seconds=seconds)

    def run(self, on_progress: OnProgress | None = None) -> BuildOutcome:
        """Run as `build.run`, to the same bytes.

        A task whose worker or node is lost is begun again where there is room, and goes on from the rows that are on
        the shared disk (with `gather`: from none). Raises InputError where a node sees neither the images nor, without
        `gather`, the folder of the cache.
        """
        try:
            return build.run(self.job, on_progress, runner=self._run_shards)
        except Interrupted as error:
            raise Interrupted(
                f"stopped; what is encoded is safe beside {self.job.out}. Run the same command again to go on."
            ) from error

    def _run_shards(self, files: Sequence[FileJob], progress: TotalProgress) -> list[FileOutcome]:
        """Make every shard on some node; a `Runner` of `build.run`."""
        self._require_seen()
        workers = self.job.workers or max(1, round(self.cpus))
        nothing = select_rows(self.job.manifest, range(0))  # each task brings its own rows
        shared = [tasks.share(replace(self.job, manifest=nothing, device=self.kind, workers=workers))]
        ahead = 2 * self.slots if self.gather else None
        found: dict[int, FileOutcome] = {}
        for number, (outcome, data) in tasks.run_tasks(
            self.cluster,
            _make_gathered if self.gather else _make_shard,
            ([ShardTask(job=shared, file=f, threads=self.threads, known=self._known_hashes(f))] for f in files),
            TaskSize(cpus=self.cpus, gpus=float(self.kind == "cuda"), ahead=ahead),
            progress.update,
            progress.stop,
        ):
            if data is not None:
                _write_shard(files[number].path, data)
            progress.finish(number, outcome)
            found[number] = outcome
        return [found[number] for number in range(len(files))]

    def _require_seen(self) -> None:
        """Raise InputError naming a node that does not see what a task needs.

        A folder that is not mounted there must not become a shard of failed images.
        """
        manifest, out = self.job.manifest, self.job.out
        lock = out.with_name(out.name + ".lock")  # held, with this process in it
        evenly = np.linspace(0, len(manifest) - 1, SAMPLES).astype(int)
        images = [path for path in {manifest.path(int(row)): None for row in evenly} if path.is_file()]
        for node, (folder, *seen) in connection.visible(self.cluster, [lock, *images]).items():
            if images and not any(seen):
                raise InputError(
                    f"--cluster: node {node.name} does not see the images ({images[0]}); put them where every node "
                    "finds them under the same path."
                )
            if not folder and not self.gather:
                raise InputError(
                    f"--cluster: node {node.name} does not see {out.parent}; put --out on a disk that all nodes share, "
                    "or pass --gather to have the shards sent here."
                )

    def _known_hashes(self, shard: FileJob) -> tuple[str, ...]:
        """With `gather`: sha256 of the images of a shard that is complete here without failures, else nothing.

        With `repair` it must be without damaged rows too, with `strict` without films of no chest.
        """
        if not self.gather or not shard.path.is_file():
            return ()
        file = store.ActivationFile(shard.path)
        sound = file.ok.all() and reuse.same_rows(file.header, shard.header)
        if not sound or (self.job.repair and any(file.damaged())):
            return ()
        if self.job.strict and any(map(other_subject, file.errors)):
            return ()
        return file.sha256


@contextmanager
def connect_build(
    address: str, job: CacheJob, *, threads: int | None = None, gather: bool = False
) -> Iterator[ClusterBuild]:
    """Connect, compare the nodes, and decide how the work is divided while in the `with` block.

    Device auto takes GPUs where there are any. Shards are those of the job, else those that exist already, else four
    for each task that runs at once.
    """
    with connection.connect(address) as cluster:
        nodes = connection.check_nodes(cluster, ("torch", "open_clip_torch", "timm", "pillow"))
        kind = cluster.target(job.device)
        each, cpus = _task_threads(cluster, nodes, kind, threads)
        slots = cluster.slots(cpus, float(kind == "cuda"))
        block = job.batch_size or BLOCKS[kind]
        blocks = -(-len(job.manifest) // block)
        count = job.shards or _existing_shards(job.out) or min(blocks, SHARES * max(slots, 1), 9999)
        job = replace(job, device=_local_device(kind), batch_size=block, shards=count)
        if gather:
            _require_small(job, blocks)
        yield ClusterBuild(cluster=cluster, job=job, kind=kind, threads=each, cpus=cpus, slots=slots, gather=gather)


def _task_threads(cluster: Cluster, nodes: Sequence[Node], kind: str, threads: int | None) -> tuple[int, float]:
    """Threads of a task, and the CPUs of a node it takes. On a GPU they decode: its part of the node's cores."""
    largest = cluster.largest()
    if kind == "cuda":
        part = min(n.cpus // n.gpus for n in nodes if n.gpus)
        each = threads or max(1, part)
        return each, float(min(each, part))
    if threads is not None and threads > largest:
        raise InputError(f"--threads {threads}: the largest node lends {largest} CPUs.")
    each = threads or min(hardware.cpu_count(), largest)
    return each, float(each)


def _require_small(job: CacheJob, blocks: int) -> None:
    shards = job.shards or 1
    rows = max(map(len, shard_ranges(len(job.manifest), shards, job.block)))
    size = rows * store.row_bytes(job.shape, job.spec.dtype)
    if size > GATHER_BYTES:
        wanted = min(blocks, math.ceil(shards * size / GATHER_BYTES))
        raise InputError(
            f"--gather sends each shard through memory, and {shards} shards are {size / 1e9:.1f} GB each; "
            f"take --shards {wanted}."
        )


def _local_device(kind: str) -> str:
    """The device with which this machine may plan."""
    import torch

    return kind if kind == "cpu" or torch.cuda.is_available() else "cpu"


def _existing_shards(out: Path) -> int:
    """The number of shards that lie at `out` already; 0 for none, or for several layouts."""
    files = reuse.find_files(out, sharded=True)
    names = {path.name.partition("-of-")[2][:4] for path in files if "-of-" in path.name}
    return int(names.pop()) if len(names) == 1 else 0


def _write_shard(path: Path, data: np.ndarray) -> None:
    """Write a gathered shard under its name, whole or not at all; its rows proved as they arrived."""
    with atomic(path, "--out") as file:
        file.write(data.data)
        file.flush()
        if bad := list(store.ActivationFile(file.name).damaged()):
            raise InputError(f"{path}: {len(bad)} row(s) arrived damaged; run the same command again.")


# ------------------------------------------------------------------------------------------------ inside the workers

Made = tuple[FileOutcome, np.ndarray | None]


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """What a task needs: a reference to the job without its images, in a list, and its shard.

    `known` are the sha256 of the images of a shard that the driver has and keeps if they are still the same.
    """

    job: list[Any]
    file: FileJob
    threads: int
    known: tuple[str, ...]


def _make_shard(task: ShardTask, *, report: Report, stop: Stop) -> Made:
    """Make one shard on a disk that all nodes share."""
    job, began = _prepare(task), time.monotonic()
    while True:
        try:
            return make_file(job, task.file, report), None
        except HeldError:
            if stop() or time.monotonic() - began > LEASE:
                raise
            time.sleep(1)  # the holder may be lost and its lock not yet


def _make_gathered(task: ShardTask, *, report: Report, stop: Stop) -> Made:
    """Make one shard on this node's own disk and return its bytes; none where the images are those that are known."""
    job, shard = _prepare(task), task.file
    rows = range(len(shard.manifest))
    if task.known:
        hasher = reuse.ImageHasher([shard.manifest.path(row) for row in rows], job.threads, stop)
        if task.known == tuple(found for _, found in hasher.hash_rows(rows)):
            return FileOutcome(images=len(rows)), None
    with tempfile.TemporaryDirectory(prefix="cxr-fast-") as folder:
        path = Path(folder) / shard.path.name
        outcome = make_file(job, replace(shard, path=path, also=()), report)
        return outcome, np.fromfile(path, np.uint8)


def _prepare(task: ShardTask) -> CacheJob:
    """Size this process's threads; return the job, once this node is known to decode as the driver does.

    The shard's header comes from the driver, where the weights were hashed, and it vouches for the pixels too.
    """
    cpu.prepare(task.threads)
    if self_check() != task.file.header.meta["fingerprint_parts"][reuse.PIXEL_CHECK]:
        raise InputError(
            f"--cluster: on node {os.uname().nodename} Pillow decodes or resizes a picture to other pixels than here; "
            "install the same Pillow on all."
        )
    job: CacheJob = tasks.fetch(task.job[0])
    return job
