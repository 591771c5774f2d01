"""Folds of a search as tasks of a cluster: each a fold of one configuration, trained into the journal.

A node that sees the run folder saves there after each epoch, so that whoever takes over a lost fold goes on from its
last epoch; one that does not trains in a folder of its own and sends the finished snapshots back.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from ..errors import InputError
from ..grid.points import Point
from ..models.backbone import Backbone
from ..training.checkpoints import Journal
from ..training.folds.fold import Epoch, OnEpoch
from ..training.folds.head_fold import HeadFold
from ..training.search import Search
from . import connection, tasks
from .connection import Cluster, Node
from .fold_task import (
    TOKEN,
    FoldJob,
    FoldResult,
    SearchSetup,
    ask_gpu,
    content_mark,
    file_identity,
    find_shared,
    read_fold_files,
    train_fold,
    write_fold_files,
)
from .tasks import Stop, TaskSize


class ClusterTrainers:
    """A cluster as a place where a sweep's folds can be trained: `SweepJob(..., trainers=ClusterTrainers(cluster))`."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def target(self, device: str) -> str:
        """Return `cpu` or `cuda`, by `--device`. DeviceError where no node lends it."""
        return self.cluster.target(device)

    def gpu(self) -> tuple[str, bool]:
        """Return the name of some node's GPU, and whether it computes in bfloat16."""
        found: tuple[str, bool] = next(tasks.run_tasks(self.cluster, ask_gpu, [()], TaskSize(gpus=1)))[1]
        return found

    def start(
        self, search: Search, points: Sequence[tuple[Point, str]], out: Path, *, device: str, residency: str
    ) -> ClusterFolds:
        """Start what trains the search's folds and refit as tasks of the cluster's nodes."""
        return ClusterFolds(self.cluster, search, points, out, device=device, residency=residency)


class ClusterFolds:
    """Trains a search's folds and its refit on a cluster's nodes, in place of the local `train_folds` and `refit`.

    `points` are the configurations, each with the precision of its blocks. On CPUs a task computes with as many threads
    as are set here, because the last bits depend on their number, and takes as many CPUs of a node; on `cuda` it takes
    a GPU. `notes` are lines that a user must see before it starts. `close` stops what still runs.
    """

    def __init__(
        self,
        cluster: Cluster,
        search: Search,
        points: Sequence[tuple[Point, str]],
        out: Path,
        *,
        device: str,
        residency: str,
    ) -> None:
        self.cluster, self.search, self.device = cluster, search, device
        self.points, self.kinds = [point for point, _ in points], [kind for _, kind in points]
        self.threads = torch.get_num_threads()
        self.heads = device == "cpu" and all(search.kind(point.train) is HeadFold for point in self.points)
        self.out, self.token = out.absolute(), secrets.token_hex(8)
        self.nodes = connection.check_nodes(cluster)
        self.trained: Counter[str] = Counter()
        self._setup = self._share(residency)
        self._jobs: list[FoldJob] = []
        self._results: Any = None
        self._done: dict[tuple[int, int], FoldResult] = {}

    def __str__(self) -> str:
        return str(self.cluster)

    def _share(self, residency: str) -> list[Any]:
        """Put what all tasks need into the object store; find which nodes see the cache and the run folder."""
        data, search = self.search.data, self.search
        cache, mark = str(data.file.path.resolve()), content_mark(data.file)
        with _token_beside(self.out, self.token) as name:
            seen = connection.on_each(self.cluster, find_shared, cache, mark, name, self.token)
        self.blind = [node for node, (found, _) in seen.items() if not found]
        self.apart = [node for node, (_, found) in seen.items() if not found]
        bare = replace(data.header, meta={}, images=(), groups=(), studies=(), views=())
        setup = SearchSetup(
            backbone=lean(search.backbone, search.unfreeze_blocks),
            data=replace(data, file=cast(Any, None), header=bare),
            assignments={point.seed: search.with_seed(point.seed).data.assignment for point in self.points},
            spec=search.spec,
            unfreeze_blocks=search.unfreeze_blocks,
            custom=search.custom,
            cache=cache,
            mark=mark,
            identity=file_identity(cache),
            array=[tasks.share(np.asarray(data.file.activations))] if self.blind else [],
            out=str(self.out),
            token=self.token,
            device=self.device,
            residency=residency,
        )
        return [tasks.share(setup)]

    @property
    def cpus(self) -> int:
        """CPUs a fold's task takes of a node."""
        if self.device == "cuda":
            return 1
        return 1 if self.heads else min(self.threads, self.cluster.largest())

    @property
    def at_once(self) -> int:
        """How many folds train at once."""
        return max(self.cluster.slots(self.cpus, int(self.device == "cuda")), 1)

    @property
    def notes(self) -> list[str]:
        """Lines that say what in the cluster makes the search slower than it could be."""
        out = []
        if self.device == "cpu" and not self.heads and self.cpus < self.threads:
            out.append(
                f"no node has {self.threads} CPUs: a fold takes all {self.cpus} of one and computes with "
                f"{self.threads} threads all the same, to the bits of this machine; --threads {self.cpus} is faster"
            )
        if self.blind:
            out.append(f"{_named(self.blind)} the cache; its activations go through Ray's object store, a copy a node")
        if self.apart:
            out.append(f"{_named(self.apart)} the run folder; a fold lost or interrupted there begins again")
        return out

    def describe(self) -> dict[str, Any]:
        """Return the cluster as `run.json` records it, with the folds each node trained in this call."""
        described = zip(self.nodes, connection.describe(self.nodes), strict=True)
        nodes = [{**one, "folds": self.trained[node.id]} for node, one in described]
        return {
            "what": str(self.cluster),
            "cpus_a_fold": self.cpus,
            "nodes": nodes,
            "lost": self.cluster.lost(self.nodes),
        }

    def train_folds(
        self, number: int, point: Point, journal: Journal, on_epoch: OnEpoch | None, stop: Stop
    ) -> dict[str, Any]:
        """Train the folds of configuration `number`; the first call hands out those of all later ones too."""
        folds = range(self.search.spec.folds)
        if self._results is None:
            todo = [n for n in range(len(self.points)) if journal.read(f"config{n}.json") is None]
            self._begin([self._job(n, k) for n in todo for k in folds], self.cpus, journal, on_epoch, stop)
        while any((number, k) not in self._done for k in folds):
            self._next(journal)
        mine = [self._done.pop((number, k)) for k in folds]
        return {"histories": [done.history for done in mine], "seconds": sum(done.seconds for done in mine)}

    def refit(
        self,
        number: int,
        epochs: int,
        rates: Sequence[float],
        journal: Journal,
        on_epoch: OnEpoch | None,
        stop: Stop,
    ) -> None:
        """The refit of configuration `number`, as `FinalModels.refit` leaves it."""
        self.close()
        job = replace(self._job(number, self.search.spec.folds), epochs=(epochs,), rates=tuple(rates))
        cpus = self.cpus if self.device == "cuda" else min(self.threads, self.cluster.largest())
        self._begin([job], cpus, journal, on_epoch, stop)
        self._next(journal)

    def close(self) -> None:
        """Stop what still runs."""
        if self._results is not None:
            self._results.close()
        self._results = None

    def _job(self, number: int, fold: int) -> FoldJob:
        return FoldJob(
            number=number,
            fold=fold,
            train=self.points[number].train,
            precision=self.kinds[number],
            seed=self.points[number].seed,
            epochs=self.search.spec.epochs,
            threads=self.threads,
            files={},
        )

    def _begin(self, jobs: list[FoldJob], cpus: int, journal: Journal, on_epoch: OnEpoch | None, stop: Stop) -> None:
        journal.write(TOKEN, {"token": self.token})

        def pass_on(at: int, epoch: Epoch) -> None:
            if on_epoch is not None:
                on_epoch(jobs[at].number, jobs[at].fold, epoch)

        def with_files(job: FoldJob) -> FoldJob:
            return replace(job, files=read_fold_files(journal, job.key)) if self.apart else job

        self._jobs = jobs
        self._results = tasks.run_tasks(
            self.cluster,
            train_fold,
            ([with_files(job), self.token, self._setup] for job in jobs),
            TaskSize(cpus=cpus, gpus=int(self.device == "cuda"), ahead=2 * self.at_once if self.apart else None),
            pass_on,
            stop,
        )

    def _next(self, journal: Journal) -> None:
        """Wait for the next fold that finishes, whichever it is, and keep its result."""
        at, done = next(self._results)
        job = self._jobs[at]
        write_fold_files(journal, done.files)
        self.trained[done.node] += 1
        self._done[job.number, job.fold] = done


def lean(backbone: Backbone, unfreeze_blocks: int) -> Backbone:
    """Keep what a `Tail` needs of a tower: the last blocks and what follows them, a sixth of a ViT-B/16 for two."""
    visual, trunk = backbone.visual, backbone.visual.trunk
    names = ("global_pool", "num_prefix_tokens", "pool_include_prefix", "embed_dim", "norm", "attn_pool", "fc_norm")
    kept = list(trunk.blocks)[len(trunk.blocks) - unfreeze_blocks :]
    part = SimpleNamespace(blocks=kept, **{name: getattr(trunk, name) for name in names if hasattr(trunk, name)})
    return replace(backbone, visual=SimpleNamespace(trunk=part, head=visual.head))


@contextmanager
def _token_beside(out: Path, token: str) -> Iterator[str]:
    """Keep a file in the run folder's parent while the nodes look for it."""
    path = out.with_name(f".{out.name}.{token}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(token, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out: cannot write {out}: {error.strerror or error}.") from error
    try:
        yield str(path)
    finally:
        path.unlink(missing_ok=True)


def _named(nodes: Sequence[Node]) -> str:
    names = ", ".join(node.name for node in nodes[:3]) + (", ..." if len(nodes) > 3 else "")
    return f"{len(nodes)} node(s) do not see ({names})"
