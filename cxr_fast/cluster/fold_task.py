"""One fold of a search as a task on a cluster's node: find the cache, train, save where the run folder is seen."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..activations.cache import Cache, open_cache
from ..activations.loader import Activations
from ..config import SweepSpec, TrainSpec
from ..errors import CxrFastError, DeviceError, InputError
from ..models import device as cpu
from ..models.backbone import Backbone
from ..models.heads import Custom
from ..system.files import atomic
from ..training.checkpoints import Journal
from ..training.dataset import Data
from ..training.folds.fold import Fold
from ..training.folds.head_fold import HeadFold, fit_side_by_side
from ..training.search import Search, fit_one
from . import connection, tasks
from .tasks import Report, Stop

TOKEN = "cluster.json"


@dataclass(frozen=True, kw_only=True)
class SearchSetup:
    """What all tasks of a search have in common; once a node in the object store.

    `assignments` are the folds of each seed. `mark` is of the cache's content and `identity` of the very file; `array`
    is a reference to its activations, in a list, where some node does not see it. `token` is what a file in the folder
    beside `out` holds where that folder is the driver's.
    """

    backbone: Backbone
    data: Data
    assignments: Mapping[int, np.ndarray]
    spec: SweepSpec
    unfreeze_blocks: int
    custom: Custom
    cache: str
    mark: str
    identity: tuple[int, ...]
    array: list[Any]
    out: str
    token: str
    device: str
    residency: str


@dataclass(frozen=True, kw_only=True)
class FoldJob:
    """Fold `fold` of configuration `number`, or with `rates` its refit, to the last of `epochs`.

    `threads` is what the local run would compute with, and `precision` what its blocks train in: both decide the bits.
    `files` are the fold's saved ones, for nodes that do not see the journal.
    """

    number: int
    fold: int
    train: TrainSpec
    precision: str
    seed: int
    epochs: tuple[int, ...]
    threads: int
    rates: tuple[float, ...] | None = None
    files: Mapping[str, np.ndarray]

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return f"config{self.number}." + (f"fold{self.fold}" if self.rates is None else "refit")


@dataclass(frozen=True, kw_only=True)
class FoldResult:
    """A trained fold: its history, seconds, Ray's id of the node, and its files where they are not in place."""

    history: list[dict[str, Any]]
    seconds: float
    node: str
    files: Mapping[str, np.ndarray]


def content_mark(file: Cache) -> str:
    """Hash (hex) what two caches of the same bytes have in common: fingerprint, shape, every row's checksum."""
    described = [file.meta["fingerprint"], list(file.header.shape), str(file.header.dtype)]
    hasher = hashlib.sha256(json.dumps(described).encode())
    hasher.update(np.ascontiguousarray(file.ok).tobytes())
    hasher.update(np.ascontiguousarray(file.crc32).tobytes())
    return hasher.hexdigest()


def file_identity(path: str) -> tuple[int, ...]:
    """Return inode, size and time of a file: the same on all nodes that mount one file system."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_fold_files(journal: Journal, key: str) -> dict[str, np.ndarray]:
    """Return the saved files of a fold as bytes (uint8), by their path in the journal."""
    return {str(path.relative_to(journal.folder)): np.fromfile(path, np.uint8) for path in journal.files(key)}


def write_fold_files(journal: Journal, files: Mapping[str, np.ndarray]) -> None:
    """Write files of a fold to their paths in the journal, each whole or not at all."""
    for name, values in files.items():
        with atomic(journal.folder / name) as file:
            file.write(values.data)


# ------------------------------------------------------------------ inside the workers


def find_shared(cache: str, mark: str, name: str, token: str) -> tuple[bool, bool]:
    """Return whether this node sees the driver's cache, and the folder its run goes into."""
    return _find_cache(cache, mark) is not None, _file_says(Path(name), token)


def ask_gpu(*, report: Report, stop: Stop) -> tuple[str, bool]:
    """Return the name of this node's GPU, and whether it computes in bfloat16."""
    if not torch.cuda.is_available():
        raise DeviceError("--device cuda: Ray lends a GPU that torch cannot use; try `cxrfast doctor` on the nodes.")
    return torch.cuda.get_device_name(), torch.cuda.is_bf16_supported()


def train_fold(job: FoldJob, token: str, setup: list[Any], *, report: Report, stop: Stop) -> FoldResult:
    """Run one task: train a fold to its last epoch, from where its journal is."""
    began = time.perf_counter()
    cpu.prepare(job.threads)
    found, search = _prepare(token, setup[0])
    with _journal(found, job) as (journal, shared):
        search = search.with_seed(job.seed)
        fold = search.fold(job.train, job.fold) if job.rates is None else search.refit(job.train, job.rates)
        fold.kind = job.precision  # this node by itself may choose another
        _fit(fold, job, journal, report, stop)
        return FoldResult(
            history=[asdict(epoch) for epoch in fold.history],
            seconds=time.perf_counter() - began,
            node=connection.node_id(),
            files={} if shared else read_fold_files(journal, job.key),
        )


def _fit(fold: Fold, job: FoldJob, journal: Journal, report: Report, stop: Stop) -> None:
    """Train with the loop that the local search uses for this fold: a head alone, on one thread."""
    recorder = journal.recorder(job.number, lambda number, k, epoch: report(epoch), stop)
    journal.restore(job.key, fold)
    try:
        if isinstance(fold, HeadFold) and job.rates is None:
            fit_side_by_side([fold], job.epochs, recorder, threads=1)
        else:
            fit_one(fold, job.epochs, recorder)
    finally:
        journal.flush()


@lru_cache(maxsize=1)
def _prepare(token: str, reference: Any) -> tuple[SearchSetup, Search]:
    """Fetch what the tasks of one search have in common, once per worker process; so frozen blocks run once there."""
    setup: SearchSetup = tasks.fetch(reference)
    file = _find_cache(setup.cache, setup.mark)
    if file is not None:
        if file_identity(setup.cache) != setup.identity:  # a copy; the driver has proved the checksums of its own alone
            _refuse_damaged(file, setup)
        array, residency = file.activations, setup.residency
    elif setup.array:
        array, residency = tasks.fetch(setup.array[0]), "auto"
    else:
        raise InputError(f"{setup.cache}: a node that joined after the search began does not see it; start again.")
    activations = Activations(array, torch.device(setup.device), residency=residency)
    search = Search(
        setup.backbone,
        activations,
        setup.data,
        setup.spec,
        unfreeze_blocks=setup.unfreeze_blocks,
        custom=setup.custom,
    )
    search.assignments.update(setup.assignments)
    return setup, search


def _find_cache(path: str, mark: str) -> Cache | None:
    """Open the cache of that content; None where this node has no such file."""
    with suppress(CxrFastError, OSError):
        file = open_cache(Path(path))
        if content_mark(file) == mark:
            return file
    return None


def _refuse_damaged(file: Cache, setup: SearchSetup) -> None:
    if bad := sum(1 for _ in file.mismatched(setup.data.rows.tolist(), torch.get_num_threads())):
        raise InputError(
            f"{file.path}: on node {os.uname().nodename} {bad:,} of {len(setup.data.rows):,} rows fail their checksum; "
            "copy the file there again."
        )


@contextmanager
def _journal(setup: SearchSetup, job: FoldJob) -> Iterator[tuple[Journal, bool]]:
    """Open the journal to train into, and say whether it is the driver's; else it is in a temporary folder."""
    out = Path(setup.out)
    if _file_says(Path(f"{out}.partial") / TOKEN, json.dumps({"token": setup.token})):
        with Journal(out, {}, shared=True) as journal:
            yield journal, True
        return
    with tempfile.TemporaryDirectory(prefix="cxr-fast-") as folder, Journal(Path(folder) / "run", {}) as journal:
        write_fold_files(journal, job.files)
        yield journal, False


def _file_says(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except OSError:
        return False
