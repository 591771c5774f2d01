"""A sharded cache made on a Ray cluster: a task a shard, on whichever node has room."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..activations import build as shards
from ..activations import file as store
from ..activations import reuse
from ..activations.build import Work
from ..activations.encoder import BLOCKS, Outcome, Plan, Progress, header_for
from ..activations.encoder import run as run_one
from ..config import CacheSpec
from ..data.manifest import Manifest
from ..errors import InputError, Interrupted
from ..models import device as cpu
from ..models.backbone import Backbone
from ..system import hardware
from ..system.locks import HeldError
from . import connection
from .connection import Cluster, Stop, Tell

# Shards for each task that runs at once, where the user does not say: a lost node costs little, and the last ones
# are not waited for by all the others.
SHARES = 4
# A gathered shard goes through the memory of both ends.
GATHER_BYTES = 4 * 10**9
# How long a task waits for the lock of a node that was lost: a file server keeps it until the lease ends (NFS: 90 s).
LEASE = 180.0
SAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a cache run is spread: `shards` tasks of `threads` CPUs or one GPU each, `slots` of them at once.

    `kind` is `cpu` or `cuda`, on every node the same, so that all shards come from one kind of device. `local` is the
    device with which this machine may plan.
    """

    cluster: Cluster
    kind: str
    local: str
    threads: int
    cpus: float
    slots: int
    shards: int
    block: int
    gather: bool

    def __str__(self) -> str:
        size = "1 GPU" if self.kind == "cuda" else f"{self.threads} thread{'s' * (self.threads != 1)}"
        return f"cluster: {self.cluster}; {self.shards} shards, {self.slots} at once, {size} each"

    def plan(self, manifest: Manifest, backbone: Backbone, spec: CacheSpec, out: Path) -> Plan:
        """As `shards.plan`; the time is a part of one machine's, NaN where only the nodes could tell."""
        named: dict[str, Any] = {"shards": self.shards, "device": self.local, "batch_size": self.block}
        found = shards.plan(manifest, backbone, spec, out, workers=self.threads, **named)
        known = self.local == self.kind
        seconds = found.seconds / min(self.slots, self.shards) if known else math.nan
        return replace(found, device=f"{self.slots} x {self.kind}", seconds=seconds)

    def run(
        self,
        backbone: Backbone,
        manifest: Manifest,
        spec: CacheSpec,
        out: Path,
        *,
        workers: int | None = None,
        repair: bool = False,
        stop_on_error: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Outcome:
        """As `shards.run`, to the same bytes. A task whose worker or node is lost is begun again where there is room,
        and goes on from the rows that are on the shared disk (with `gather`: from none).

        Raises InputError where a node sees neither the images nor, without `gather`, the folder of the cache.
        """
        flags: dict[str, Any] = {
            "device": self.kind,
            "workers": workers or max(1, round(self.cpus)),
            "batch_size": self.block,
            "repair": repair,
            "stop_on_error": stop_on_error,
        }

        def everywhere(works: Sequence[Work], together: shards.Together) -> list[Outcome]:
            self._see(manifest, out)
            tower = [connection.share(backbone)]
            function = _gathered if self.gather else _shard

            def job(work: Work) -> Job:
                known = self._known(work, backbone, spec, repair)
                return Job(tower=tower, work=work, spec=spec, flags=flags, threads=self.threads, known=known)

            found: dict[int, Outcome] = {}
            for number, (outcome, data) in connection.run_tasks(
                self.cluster,
                function,
                ([job(work)] for work in works),
                num_cpus=self.cpus,
                num_gpus=float(self.kind == "cuda"),
                on_progress=together.tell,
                stop=together.stop,
                ahead=2 * self.slots if self.gather else None,
            ):
                if data is not None:
                    _keep(works[number].path, data)
                outcome = replace(outcome, path=works[number].path)
                together.finished(number, outcome)
                found[number] = outcome
            return [found[number] for number in range(len(works))]

        named: dict[str, Any] = {"shards": self.shards, "device": self.local, "batch_size": self.block}
        try:
            return shards.run(backbone, manifest, spec, out, on_progress=on_progress, runner=everywhere, **named)
        except Interrupted as error:
            raise Interrupted(
                f"stopped; what is encoded is safe beside {out}. Run the same command again to go on."
            ) from error

    def _see(self, manifest: Manifest, out: Path) -> None:
        """InputError naming a node that does not see what a task needs; a folder that is not mounted must not become a
        shard of failed images."""
        lock = out.with_name(out.name + ".lock")  # held, with this process in it
        spread = np.linspace(0, len(manifest) - 1, SAMPLES).astype(int)
        images = [path for path in {manifest.path(int(row)): None for row in spread} if path.is_file()]
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

    def _known(self, work: Work, backbone: Backbone, spec: CacheSpec, repair: bool) -> tuple[str, ...]:
        """With `gather`: the sha256 of the images of a shard that is here, whole and without failures; with `repair`
        without damaged rows too."""
        if not self.gather or not work.path.is_file():
            return ()
        file = store.ActivationFile(work.path)
        header = header_for(work.manifest, backbone, spec, block=self.block)
        if not file.ok.all() or not reuse.same_rows(file.header, header) or (repair and any(file.damaged())):
            return ()
        return file.sha256


@contextmanager
def over(
    address: str,
    manifest: Manifest,
    out: Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    batch_size: int | None = None,
    count: int | None = None,
    gather: bool = False,
    image_bytes: int = 0,
) -> Iterator[Spread]:
    """Connect, compare the nodes, and say how the work is spread while in the `with` block.

    `device` auto takes GPUs where there are any. `count` shards, by default those that are there already, else
    four for each task that runs at once. `image_bytes` is the size of one image's row.
    """
    with connection.connect(address) as cluster:
        nodes = connection.check_nodes(cluster, ("torch", "open_clip_torch", "timm", "pillow"))
        kind = cluster.target(device)
        largest = cluster.largest()
        if threads is not None and threads > largest and kind == "cpu":
            raise InputError(f"--threads {threads}: the largest node lends {largest} CPUs.")
        each = threads or min(hardware.cpu_count(), largest)
        cpus = float(each)
        if kind == "cuda":  # the decoding threads of a GPU: its part of the node's cores
            each = threads or max(1, min(n.cpus // n.gpus for n in nodes if n.gpus))
            cpus = float(min(each, min(n.cpus // n.gpus for n in nodes if n.gpus)))
        slots = cluster.slots(cpus, float(kind == "cuda"))
        block = batch_size or BLOCKS[kind]
        blocks = -(-len(manifest) // block)
        chosen = count or _there(out) or min(blocks, SHARES * max(slots, 1), 9999)
        if gather and (size := max(map(len, shards.ranges(len(manifest), chosen, block))) * image_bytes) > GATHER_BYTES:
            wanted = min(blocks, math.ceil(chosen * size / GATHER_BYTES))
            raise InputError(
                f"--gather sends each shard through memory, and {chosen} shards are {size / 1e9:.1f} GB each; "
                f"take --shards {wanted}."
            )
        yield Spread(
            cluster=cluster,
            kind=kind,
            local=_local(kind),
            threads=each,
            cpus=cpus,
            slots=slots,
            shards=chosen,
            block=block,
            gather=gather,
        )


def _local(kind: str) -> str:
    import torch

    return kind if kind == "cpu" or torch.cuda.is_available() else "cpu"


def _there(out: Path) -> int:
    """The number of shards of what lies at `out` already, 0 for nothing, or for several layouts."""
    names = {path.name.partition("-of-")[2][:4] for path in shards.files_of(out) if "-of-" in path.name}
    return int(names.pop()) if len(names) == 1 else 0


def _keep(path: Path, data: np.ndarray) -> None:
    """A gathered shard under its name, whole or not at all; its rows proved as they arrived."""
    scratch = path.with_name(path.name + ".gather")
    try:
        with open(scratch, "wb") as file:
            file.write(data.data)
            file.flush()
            os.fsync(file.fileno())
        if bad := list(store.ActivationFile(scratch).damaged()):
            raise InputError(f"{path}: {len(bad)} row(s) arrived damaged; run the same command again.")
        os.replace(scratch, path)
    except OSError as error:
        raise InputError(f"--out: cannot write {path}: {error.strerror or error}.") from error
    finally:
        scratch.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ inside the workers

Made = tuple[Outcome, np.ndarray | None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a task needs: a reference to the tower, in a list, and its shard. `known` are the sha256 of the images of a
    shard that the driver has and keeps if they are still the same."""

    tower: list[Any]
    work: Work
    spec: CacheSpec
    flags: dict[str, Any]
    threads: int
    known: tuple[str, ...]


def _shard(job: Job, *, tell: Tell, stop: Stop) -> Made:
    """One shard on a disk that all nodes share."""
    cpu.prepare(job.threads)
    backbone, work, began = connection.fetch(job.tower[0]), job.work, time.monotonic()
    named: dict[str, Any] = {"also": work.also, "all_may_fail": True, "on_progress": tell, **job.flags}
    while True:
        try:
            return run_one(backbone, work.manifest, job.spec, work.path, **named), None
        except HeldError:
            if stop() or time.monotonic() - began > LEASE:
                raise
            time.sleep(1)  # the holder may be lost and its lock not yet


def _gathered(job: Job, *, tell: Tell, stop: Stop) -> Made:
    """One shard on this node's own disk, and its bytes; none where the images are those that are known."""
    cpu.prepare(job.threads)
    manifest, name = job.work.manifest, job.work.path.name
    rows = range(len(manifest))
    if job.known:
        told = reuse.Look([manifest.path(row) for row in rows], job.flags["workers"], stop).hashes(rows)
        if job.known == tuple(found for _, found in told):
            one: dict[str, Any] = {"images": len(rows), "encoded": 0, "reused": len(rows), "failed": (), "seconds": 0.0}
            return Outcome(path=job.work.path, fingerprint="", **one), None
    with tempfile.TemporaryDirectory(prefix="cxr-fast-") as folder:
        path, named = Path(folder) / name, {"all_may_fail": True, "on_progress": tell, **job.flags}
        made = run_one(connection.fetch(job.tower[0]), manifest, job.spec, path, **named)
        return made, np.fromfile(path, np.uint8)
