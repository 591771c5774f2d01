"""A model run by the nodes of a cluster: the list in chunks of whole batches, each a task."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..data.images import self_check
from ..errors import InputError, Interrupted
from ..inference import hub, model_file, session
from ..inference.predictor import Predictor, Result
from ..system import hardware
from ..system.files import file_sha256
from . import connection, tasks
from .connection import Cluster
from .tasks import Report, Stop, TaskSize

PACKAGES = ("onnxruntime-gpu|onnxruntime", "numpy", "pillow")
# Images a task. What is lost with a worker; long enough that beginning (an empty queue of pixels) costs little. On a
# GPU every task opens the model again, which takes seconds.
CHUNK = {"cpu": 128, "cuda": 2048}
SAMPLE = 128  # images of which a node must see at least one

Batch = list[str]


@dataclass(frozen=True, kw_only=True)
class PredictSetup:
    """What all tasks have in common: the model by its path and sha256, and a reference to its bytes, in a list, where
    some node does not see that. `folder` is where relative names begin, `pixels` what `self_check` says here."""

    path: str
    sha256: str
    content: list[Any]
    device: str
    threads: int
    workers: int
    folder: str
    pixels: str
    strict: bool
    refuse_unlike: float | None


@dataclass(frozen=True, kw_only=True)
class ChunkAnswer:
    """A chunk: the results of its batches, seconds by stage, and Ray's id of the node."""

    batches: list[list[Result]]
    seconds: dict[str, float]
    node: str


@dataclass(frozen=True, kw_only=True)
class NodeSpec:
    """How nodes run a model: the device, threads of the model, threads that decode, whether films are refused that
    their header calls no film of a chest, and the unlikeness over which a film is refused."""

    device: str = "auto"
    threads: int | None = None
    workers: int | None = None
    strict: bool = False
    refuse_unlike: float | None = None


class ClusterPredictor:
    """A model file that a cluster's nodes run; an `inference.batch.Answerer`, as `Predictor` is.

    A task computes with as many threads as the model would here, because the last bits may depend on their number, and
    takes as many CPUs of a node, or one GPU. `sample` are the first names of the list. Raises InputError where a node
    runs other versions or sees none of them, DeviceError where no node lends what `device` asks for.
    """

    def __init__(
        self,
        cluster: Cluster,
        model: Path,
        sample: Sequence[str],
        spec: NodeSpec | None = None,
    ) -> None:
        spec = spec or NodeSpec()
        self.strict, self.refuse_unlike = spec.strict, spec.refuse_unlike
        self.cluster, self.nodes = cluster, connection.check_nodes(cluster, PACKAGES)
        self.target = cluster.target(spec.device)
        found = session.locate(model, self.target, explicit=True)
        self.path, self.source = found.path, found.source
        with hub.named_by_address(self.source, self.path):
            self.info = model_file.read(self.path)
        if spec.refuse_unlike is not None:
            model_file.require_unlikeness(self.info, self.path)
        self.labels: tuple[str, ...] = tuple(self.info["labels"])
        self.thresholds = np.array(self.info["thresholds"], np.float64)
        self.threads = spec.threads or hardware.cpu_count()
        self.cpus = 1 if self.target == "cuda" else min(self.threads, cluster.largest())
        _require_seen(cluster, sample)
        self.token, self.answered = secrets.token_hex(8), Counter[str]()
        self._setup = self._share(spec.workers)
        (_, described), *_ = tasks.run_tasks(cluster, describe, [(self.token, self._setup)], self._size())
        self.provider, where, why = described
        if spec.device == "auto":  # a task gets cpu or cuda by name, the command did not
            why = why.replace("as asked", "a node lends a GPU" if self.target == "cuda" else "no node lends a GPU", 1)
        self.where, self.why = f"{where} a task, {cluster}", f"{why}{f'; {found.why}' if found.why else ''}"

    def _share(self, workers: int | None) -> list[Any]:
        """Put what a task needs into the object store; the model's bytes too where some node does not see it."""
        path, sha256 = str(self.path.resolve()), file_sha256(self.path)
        seen = connection.on_each(self.cluster, same_file, path, sha256)
        content = [] if all(seen.values()) else [tasks.share(np.fromfile(path, np.uint8))]
        setup = PredictSetup(
            path=path,
            sha256=sha256,
            content=content,
            device=self.target,
            threads=self.threads,
            workers=workers or self.threads,
            folder=os.getcwd(),
            pixels=self_check(),
            strict=self.strict,
            refuse_unlike=self.refuse_unlike,
        )
        return [tasks.share(setup)]

    def _size(self, ahead: int | None = None) -> TaskSize:
        return TaskSize(cpus=self.cpus, gpus=int(self.target == "cuda"), ahead=ahead)

    @property
    def warning(self) -> str:
        """What a user must know of the model before trusting it, as `Predictor.warning`."""
        return str(self.info.get("provenance", ""))

    def stream_batches(
        self,
        batches: Sequence[Sequence[str]],
        *,
        workers: int | None = None,
        seconds: dict[str, float] | None = None,
        stop: Stop = bool,
    ) -> Generator[list[Result], None, None]:
        """Yield the results of the batches, each one call of the model, chunk by chunk as they are finished.

        `seconds` collects what the tasks' processes spent, all together; `workers` is unused, for each task has its
        number since this was made. Raises Interrupted once `stop` returns True.
        """
        spent = seconds if seconds is not None else {}
        slots = max(self.cluster.slots(self.cpus, int(self.target == "cuda")), 1)
        if not batches:
            return
        # Four chunks a slot, so that the last ones end together.
        most = max(CHUNK[self.target] // len(batches[0]), 1)
        size = max(1, min(most, len(batches) // (4 * slots)))
        chunks = ([list(batch) for batch in batches[i : i + size]] for i in range(0, len(batches), size))
        jobs = ((chunk, self.token, self._setup) for chunk in chunks)
        for _, found in tasks.run_tasks(self.cluster, answer, jobs, self._size(ahead=2 * slots), stop=stop):
            self.answered[found.node] += sum(map(len, found.batches))
            for stage, more in found.seconds.items():
                spent[stage] = spent.get(stage, 0.0) + more
            yield from found.batches

    def describe(self) -> dict[str, Any]:
        """Return the cluster as NAME.run.json records it, with the images each node answered in this call."""
        described = zip(self.nodes, connection.describe(self.nodes), strict=True)
        nodes = [{**one, "images": self.answered[node.id]} for node, one in described]
        lost = self.cluster.lost(self.nodes)
        return {"cluster": {"what": str(self.cluster), "cpus_a_task": self.cpus, "nodes": nodes, "lost": lost}}


def _require_seen(cluster: Cluster, names: Sequence[str]) -> None:
    """Raise InputError where a node sees none of the first images that exist here.

    Single images that a node does not see become rows with that error.
    """
    here = [os.path.abspath(name) for name in names[:SAMPLE] if os.path.exists(name)]
    if not here:
        return
    for node, count in connection.on_each(cluster, count_seen, here).items():
        if not count:
            raise InputError(
                f"--cluster: node {node.name} sees none of the first {len(here)} images ({here[0]}); put them where "
                "every node finds them under the same path."
            )


# ------------------------------------------------------------------------------------------------- inside the workers


def count_seen(paths: Sequence[str]) -> int:
    """Count the paths that exist."""
    return sum(map(os.path.exists, paths))


def same_file(path: str, sha256: str) -> bool:
    """Whether the file exists with that content."""
    return os.path.isfile(path) and file_sha256(Path(path)) == sha256


def describe(token: str, setup: list[Any], *, report: Report, stop: Stop) -> tuple[str, str, str]:
    """Say which provider runs the model on some node, and where and why."""
    predictor, _ = _open(token, setup[0])
    return predictor.provider, predictor.where, predictor.why


def answer(chunk: list[Batch], token: str, setup: list[Any], *, report: Report, stop: Stop) -> ChunkAnswer:
    """Run one task: the results of some batches, under the names that the list has."""
    predictor, found = _open(token, setup[0])
    seconds: dict[str, float] = {}
    places = [[os.path.join(found.folder, name) for name in batch] for batch in chunk]
    out: list[list[Result]] = []
    for results in predictor.stream_batches(places, workers=found.workers, seconds=seconds):
        out.append([_named(result, name) for result, name in zip(results, chunk[len(out)], strict=True)])
        if stop():
            raise Interrupted("stopped.")
    return ChunkAnswer(batches=out, seconds=seconds, node=connection.node_id())


def _named(result: Result, name: str) -> Result:
    return replace(result, path=name, message=result.message.replace(result.path, name))


@lru_cache(maxsize=1)
def _open(token: str, reference: Any) -> tuple[Predictor, PredictSetup]:
    """Open the model, once per worker process."""
    setup: PredictSetup = tasks.fetch(reference)
    if self_check() != setup.pixels:
        raise InputError(
            f"--cluster: on node {os.uname().nodename} Pillow decodes or resizes a picture to other pixels than here."
        )
    if same_file(setup.path, setup.sha256):
        return _predictor(setup.path, setup), setup
    if not setup.content:
        raise InputError(f"{setup.path}: a node that joined after the command began does not see it; run it again.")
    with tempfile.TemporaryDirectory(prefix="cxr-fast-") as folder:
        path = Path(folder) / Path(setup.path).name
        tasks.fetch(setup.content[0]).tofile(path)
        return _predictor(path, setup), setup


def _predictor(path: str | Path, setup: PredictSetup) -> Predictor:
    predictor = Predictor(path, setup.device, setup.threads, strict=setup.strict, spin=False)
    predictor.refuse_unlike = setup.refuse_unlike
    return predictor
