"""Folds of a search as tasks of a cluster: each a fold of one configuration, trained into the journal.

A node that sees the run folder saves there after each epoch, so that whoever takes over a lost fold goes on from its
last epoch; one that does not trains in a folder of its own and sends the finished snapshots back.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from ..activations.cache import Cache, open_cache
from ..activations.loader import Activations
from ..config import SweepSpec, TrainSpec
from ..errors import CxrFastError, DeviceError, InputError
from ..models import device as cpu
from ..models.backbone import Backbone
from ..training.checkpoints import Journal
from ..training.dataset import Data
from ..training.fold import Epoch, Fold, OnEpoch
from ..training.head_fold import HeadFold, fit_side_by_side
from ..training.search import Search, fit_one
from . import connection
from .connection import Cluster, Node, Stop, Tell

TOKEN = "cluster.json"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all tasks of a search have in common; once a node in the object store.

    `mark` is of the cache's content and `identity` of the very file; `array` is a reference to its activations, in a
    list, where some node does not see it. `token` is what the folder beside `out` says where it is the driver's own.
    """

    backbone: Backbone
    data: Data
    spec: SweepSpec
    unfreeze_blocks: int
    cache: str
    mark: str
    identity: tuple[int, ...]
    array: list[Any]
    out: str
    token: str
    device: str
    residency: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """Fold `fold` of configuration `number`, or with `rates` its refit, to the last of `epochs`.

    `threads` is what the local run would compute with, which decides the last bits. `files` are the fold's saved ones,
    for nodes that do not see the journal.
    """

    number: int
    fold: int
    train: TrainSpec
    epochs: tuple[int, ...]
    threads: int
    rates: tuple[float, ...] | None = None
    files: Mapping[str, np.ndarray]

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return f"config{self.number}." + (f"fold{self.fold}" if self.rates is None else "refit")


@dataclass(frozen=True, kw_only=True)
class Done:
    """A trained fold: its history, seconds, Ray's id of the node, and its files where they are not in place."""

    history: list[dict[str, Any]]
    seconds: float
    node: str
    files: Mapping[str, np.ndarray]


# ------------------------------------------------------------------------------------------------- beside the workers


class ClusterTrainers:
    """A cluster as a place where a sweep's folds can be trained: `Sweep(..., trainers=ClusterTrainers(cluster))`."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def target(self, device: str) -> str:
        """`cpu` or `cuda`, by `--device`. DeviceError where no node lends it."""
        return self.cluster.target(device)

    def gpu(self) -> tuple[str, bool]:
        """The name of some node's GPU, and whether it computes in bfloat16."""
        found: tuple[str, bool] = next(connection.run_tasks(self.cluster, ask_gpu, [()], num_gpus=1))[1]
        return found

    def start(self, search: Search, trains: Sequence[TrainSpec], out: Path, *, device: str, residency: str) -> Spread:
        """The search's folds and refit as tasks of the cluster's nodes."""
        return Spread(self.cluster, search, trains, out, device=device, residency=residency)


class Spread:
    """Trains a search's folds and its refit on a cluster's nodes; `train_folds` and `refit` stand for the local ones.

    `trains` are the configurations, their precision resolved. On CPUs a task computes with as many threads as are set
    here, for the last bits hang on their number, and takes as many CPUs of a node; on `cuda` it takes a GPU. `notes`
    are lines that a user must see before it starts. Close it: that stops what still runs.
    """

    def __init__(
        self, cluster: Cluster, search: Search, trains: Sequence[TrainSpec], out: Path, *, device: str, residency: str
    ) -> None:
        self.cluster, self.search, self.trains, self.device = cluster, search, trains, device
        self.threads = torch.get_num_threads()
        self.heads = device == "cpu" and all(search.kind(train) is HeadFold for train in trains)
        self.out, self.token = out.absolute(), secrets.token_hex(8)
        self.nodes = connection.check_nodes(cluster)
        self.tasks: Counter[str] = Counter()
        self._setup = self._share(residency)
        self._jobs: list[Job] = []
        self._results: Any = None
        self._done: dict[tuple[int, int], Done] = {}

    def __str__(self) -> str:
        return str(self.cluster)

    def _share(self, residency: str) -> list[Any]:
        """What all tasks need, in the object store; and what of it a node already sees."""
        data, search = self.search.data, self.search
        cache, mark = str(data.file.path.resolve()), content(data.file)
        with _token_beside(self.out, self.token) as name:
            seen = connection.on_each(self.cluster, look, cache, mark, name, self.token)
        self.blind = [node for node, (found, _) in seen.items() if not found]
        self.apart = [node for node, (_, found) in seen.items() if not found]
        bare = replace(data.header, meta={}, images=(), groups=(), studies=(), views=())
        setup = Setup(
            backbone=lean(search.backbone, search.unfreeze_blocks),
            data=replace(data, file=cast(Any, None), header=bare),
            spec=search.spec,
            unfreeze_blocks=search.unfreeze_blocks,
            cache=cache,
            mark=mark,
            identity=identity(cache),
            array=[connection.share(np.asarray(data.file.activations))] if self.blind else [],
            out=str(self.out),
            token=self.token,
            device=self.device,
            residency=residency,
        )
        return [connection.share(setup)]

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
        """What of the cluster makes the search slower than it might be."""
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
        """The cluster as `run.json` records it, with the folds each node trained in this call."""
        said = zip(self.nodes, connection.describe(self.nodes), strict=True)
        nodes = [{**one, "folds": self.tasks[node.id]} for node, one in said]
        return {
            "what": str(self.cluster),
            "cpus_a_fold": self.cpus,
            "nodes": nodes,
            "lost": self.cluster.lost(self.nodes),
        }

    def train_folds(
        self, number: int, train: TrainSpec, journal: Journal, on_epoch: OnEpoch | None, stop: Stop
    ) -> dict[str, Any]:
        """The folds of configuration `number`; those of all later ones are handed out with the first call."""
        folds = range(self.search.spec.folds)
        if self._results is None:
            todo = [n for n in range(len(self.trains)) if journal.read(f"config{n}.json") is None]
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

    def _job(self, number: int, fold: int) -> Job:
        return Job(
            number=number,
            fold=fold,
            train=self.trains[number],
            epochs=self.search.spec.epochs,
            threads=self.threads,
            files={},
        )

    def _begin(self, jobs: list[Job], cpus: int, journal: Journal, on_epoch: OnEpoch | None, stop: Stop) -> None:
        journal.write(TOKEN, {"token": self.token})

        def told(at: int, epoch: Epoch) -> None:
            if on_epoch is not None:
                on_epoch(jobs[at].number, jobs[at].fold, epoch)

        def with_files(job: Job) -> Job:
            return replace(job, files=_bytes(journal, job.key)) if self.apart else job

        self._jobs = jobs
        self._results = connection.run_tasks(
            self.cluster,
            train_fold,
            ([with_files(job), self.token, self._setup] for job in jobs),
            num_cpus=cpus,
            num_gpus=int(self.device == "cuda"),
            on_progress=told,
            stop=stop,
            ahead=2 * self.at_once if self.apart else None,
        )

    def _next(self, journal: Journal) -> None:
        """Take in the next fold that has finished, whichever it is."""
        at, done = next(self._results)
        job = self._jobs[at]
        _put(journal, done.files)
        self.tasks[done.node] += 1
        self._done[job.number, job.fold] = done


def lean(backbone: Backbone, unfreeze_blocks: int) -> Backbone:
    """What a `Tail` takes of a tower: the last blocks and what follows them, a sixth of a ViT-B/16 for two."""
    visual, trunk = backbone.visual, backbone.visual.trunk
    names = ("global_pool", "num_prefix_tokens", "embed_dim", "norm", "fc_norm")
    kept = list(trunk.blocks)[len(trunk.blocks) - unfreeze_blocks :]
    part = SimpleNamespace(blocks=kept, **{name: getattr(trunk, name) for name in names})
    return replace(backbone, visual=SimpleNamespace(trunk=part, head=visual.head))


def content(file: Cache) -> str:
    """What two caches of the same bytes have in common: fingerprint, shape, and every row's checksum."""
    said = [file.meta["fingerprint"], list(file.header.shape), str(file.header.dtype)]
    hasher = hashlib.sha256(json.dumps(said).encode())
    hasher.update(np.ascontiguousarray(file.ok).tobytes())
    hasher.update(np.ascontiguousarray(file.crc32).tobytes())
    return hasher.hexdigest()


def identity(path: str) -> tuple[int, ...]:
    """Inode, size and time of a file: the same on all nodes that mount one file system."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def _token_beside(out: Path, token: str) -> Iterator[str]:
    """A file in the run folder's parent, there for as long as the nodes look for it."""
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


def _bytes(journal: Journal, key: str) -> dict[str, np.ndarray]:
    """The saved files of a fold by their path in the journal."""
    return {str(path.relative_to(journal.folder)): np.fromfile(path, np.uint8) for path in journal.files(key)}


def _put(journal: Journal, files: Mapping[str, np.ndarray]) -> None:
    for name, values in files.items():
        scratch = journal.folder / f"{name}.{os.getpid()}.new"
        with open(scratch, "wb") as file:
            file.write(values.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, journal.folder / name)


# ------------------------------------------------------------------------------------------------- inside the workers


def look(cache: str, mark: str, name: str, token: str) -> tuple[bool, bool]:
    """Whether this node sees the driver's cache, and the folder its run goes into."""
    return _cache(cache, mark) is not None, _says(Path(name), token)


def ask_gpu(*, tell: Tell, stop: Stop) -> tuple[str, bool]:
    """See `ClusterTrainers.gpu`."""
    if not torch.cuda.is_available():
        raise DeviceError("--device cuda: Ray lends a GPU that torch cannot use; try `cxrfast doctor` on the nodes.")
    return torch.cuda.get_device_name(), torch.cuda.is_bf16_supported()


def train_fold(job: Job, token: str, setup: list[Any], *, tell: Tell, stop: Stop) -> Done:
    """One task: a fold to its last epoch, going on where its journal is."""
    began = time.perf_counter()
    cpu.prepare(job.threads)
    found, activations = _prepare(token, setup[0])
    search = Search(found.backbone, activations, found.data, found.spec, unfreeze_blocks=found.unfreeze_blocks)
    with _journal(found, job) as (journal, shared):
        fold = search.fold(job.train, job.fold) if job.rates is None else search.refit(job.train, job.rates)
        _fit(fold, job, journal, tell, stop)
        return Done(
            history=[asdict(epoch) for epoch in fold.history],
            seconds=time.perf_counter() - began,
            node=connection.node_id(),
            files={} if shared else _bytes(journal, job.key),
        )


def _fit(fold: Fold, job: Job, journal: Journal, tell: Tell, stop: Stop) -> None:
    """Train with the loop that the local search takes for this fold: heads by themselves on one thread."""
    recorder = journal.recorder(job.number, lambda number, k, epoch: tell(epoch), stop)
    journal.restore(job.key, fold)
    try:
        if isinstance(fold, HeadFold) and job.rates is None:
            fit_side_by_side([fold], job.epochs, recorder, threads=1)
        else:
            fit_one(fold, job.epochs, recorder)
    finally:
        journal.flush()


@lru_cache(maxsize=1)
def _prepare(token: str, reference: Any) -> tuple[Setup, Activations]:
    """What the tasks of one search have in common, once a worker process."""
    setup: Setup = connection.fetch(reference)
    file = _cache(setup.cache, setup.mark)
    if file is not None:
        if identity(setup.cache) != setup.identity:  # a copy; the driver has proved the checksums of its own alone
            _refuse_damaged(file, setup)
        array, residency = file.activations, setup.residency
    elif setup.array:
        array, residency = connection.fetch(setup.array[0]), "auto"
    else:
        raise InputError(f"{setup.cache}: a node that joined after the search began does not see it; start again.")
    return setup, Activations(array, torch.device(setup.device), residency=residency)


def _cache(path: str, mark: str) -> Cache | None:
    """The cache of that content, or None where this node has no such file."""
    with suppress(CxrFastError, OSError):
        file = open_cache(Path(path))
        if content(file) == mark:
            return file
    return None


def _refuse_damaged(file: Cache, setup: Setup) -> None:
    if bad := sum(1 for _ in file.mismatched(setup.data.rows.tolist(), torch.get_num_threads())):
        raise InputError(
            f"{file.path}: on node {os.uname().nodename} {bad:,} of {len(setup.data.rows):,} rows fail their checksum; "
            "copy the file there again."
        )


@contextmanager
def _journal(setup: Setup, job: Job) -> Iterator[tuple[Journal, bool]]:
    """The journal to train into, and whether it is the driver's own; else one in a folder that is taken away after."""
    out = Path(setup.out)
    if _says(Path(f"{out}.partial") / TOKEN, json.dumps({"token": setup.token})):
        with Journal(out, {}, shared=True) as journal:
            yield journal, True
        return
    with tempfile.TemporaryDirectory(prefix="cxr-fast-") as folder, Journal(Path(folder) / "run", {}) as journal:
        _put(journal, job.files)
        yield journal, False


def _says(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except OSError:
        return False
