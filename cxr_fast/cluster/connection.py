"""One command over many machines: a Ray cluster joined or started, its nodes compared, tasks run, lost ones again.

Ray schedules; what is here only asks. It is imported inside functions, by `--cluster` alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CxrFastError, DeviceError, InputError, Interrupted
from ..system import hardware
from ..system.locks import graceful

NEEDS = "--cluster: needs Ray: pip install 'cxr-fast[cluster]'"
# No reports to its makers; no hint at every CPU task of a machine with GPUs.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "GRPC_VERBOSITY": "NONE",
}
# Seconds: to reach an address; for a head to say that it lives, Python's start included; for all nodes to answer a
# probe; between two looks at what runs; for running tasks to stop by themselves; without any node that could run what
# waits (a cluster that grows by itself takes minutes).
REACH, ALIVE, ANSWER, LOOK, GRACE, HOPE = 5.0, 20.0, 120.0, 0.25, 20.0, 600.0
# How often a task is begun again when its worker or node is lost. Our own errors are never tried again.
RETRIES = 10
TELL_SECONDS = 0.2  # between two reports of one task
PIECE, PIECES = 1 << 16, 8  # of a file's content marker

Tell = Callable[[Any], None]
Stop = Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine of a cluster: Ray's id of it, the name people know it by, and what it lends to tasks."""

    id: str
    name: str
    cpus: int
    gpus: int


class Cluster:
    """A cluster this process is connected to; made by `connect`. `str()` is its line in a plan."""

    def __init__(self, where: str) -> None:
        self.where, self.here = where, node_id()

    def nodes(self) -> list[Node]:
        """The nodes that are alive and lend CPUs or GPUs, those of most CPUs first."""
        alive = [node for node in _ray().nodes() if node["Alive"]]
        hosts = Counter(node["NodeManagerHostname"] for node in alive)
        found = []
        for node in alive:
            host, number = node["NodeManagerHostname"], str(node["NodeID"])
            lent = node["Resources"]
            found.append(
                Node(
                    id=number,
                    name=host if hosts[host] == 1 else f"{host}/{number[:6]}",
                    cpus=int(lent.get("CPU", 0)),
                    gpus=int(lent.get("GPU", 0)),
                )
            )
        return sorted((n for n in found if n.cpus or n.gpus), key=lambda n: (-n.cpus, n.id))

    def __str__(self) -> str:
        nodes = self.nodes()
        cpus, gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
        each = (
            f"{len(nodes)} node{'s' * (len(nodes) != 1)}, {cpus} CPU{'s' * (cpus != 1)}, {gpus} GPU{'s' * (gpus != 1)}"
        )
        return f"{each} (Ray {_ray().__version__}, {self.where})"

    def slots(self, cpus: float, gpus: float = 0) -> int:
        """How many tasks of this size run at once."""
        rooms = [[n.cpus // cpus if cpus else None, n.gpus // gpus if gpus else None] for n in self.nodes()]
        return int(sum(min((room for room in pair if room is not None), default=0) for pair in rooms))

    def lost(self, nodes: Iterable[Node]) -> list[str]:
        """The names of those of `nodes` that are no longer alive."""
        alive = {n.id for n in self.nodes()}
        return [n.name for n in nodes if n.id not in alive]

    def target(self, device: str) -> str:
        """`cpu` or `cuda`, by `--device`: what tasks compute on. DeviceError where no node lends it."""
        if device not in ("auto", "cpu", "cuda"):
            raise DeviceError(f"--device {device}: on a cluster Ray says which GPU; give auto, cpu or cuda.")
        gpus = sum(node.gpus for node in self.nodes())
        if device == "cuda" and not gpus:
            raise DeviceError("--device cuda: no node of the cluster lends a GPU; use --device cpu.")
        return "cuda" if gpus and device != "cpu" else "cpu"

    def largest(self) -> int:
        """CPUs of the node that has most."""
        return max((n.cpus for n in self.nodes()), default=0)


@contextmanager
def connect(address: str) -> Iterator[Cluster]:
    """Join a cluster while in the `with` block, or with `auto`, where this machine belongs to none, start one here.

    `auto` joins what RAY_ADDRESS names, or the cluster this machine is a node of. Only what was started here is shut
    down. Raises InputError with one line where Ray is not installed or `HOST:PORT`, `ray://HOST:PORT` is not reached.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError(NEEDS)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}  # ray.init takes SIGTERM for itself
    try:
        where = _join(address)
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
    try:
        with _hushed():
            yield Cluster(where)
    finally:
        _ray().shutdown()


def check_nodes(cluster: Cluster, packages: Sequence[str] = ("torch",)) -> list[Node]:
    """The nodes, each of which runs this very cxr-fast, Python minor version and `packages` (`a|b`: the first there).

    Raises InputError naming the first node that does not, and both versions.
    """
    own = _probe()(packages)
    nodes = cluster.nodes()
    for node, found in on_each(cluster, _probe(), packages).items():
        for name, version in own.items():
            if found[name] != version:
                what = name if found[name].split()[0] != version.split()[0] else f"{name} (its source files differ)"
                raise InputError(
                    f"--cluster: node {node.name} has {what} {found[name]}, this machine {version}; install the same "
                    "on all."
                )
    return nodes


def visible(cluster: Cluster, paths: Sequence[Path | str]) -> dict[Node, list[bool]]:
    """For each node, which of `paths` it sees with the size and content marker they have here."""
    names = [os.path.abspath(path) for path in paths]
    own = markers(names)
    return {
        node: [mine is not None and mine == theirs for mine, theirs in zip(own, found, strict=True)]
        for node, found in on_each(cluster, markers, names).items()
    }


def markers(paths: Sequence[str]) -> list[tuple[int, str] | None]:
    """Size, and sha256 of a few pieces, of each file; None for one that is not there."""
    return [_marker(path) for path in paths]


def _marker(path: str) -> tuple[int, str] | None:
    try:
        with open(path, "rb") as file:
            size, hasher = os.fstat(file.fileno()).st_size, hashlib.sha256()
            for i in range(PIECES):
                file.seek(max(size - PIECE, 0) * i // (PIECES - 1))
                hasher.update(file.read(PIECE))
    except OSError:
        return None
    return size, hasher.hexdigest()


def on_each(cluster: Cluster, function: Callable[..., Any], *arguments: Any) -> dict[Node, Any]:
    """What `function(*arguments)` returns on every node; a node that is lost meanwhile is left out.

    Raises DeviceError naming a node that does not answer in two minutes.
    """
    ray = _ray()
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    remote = ray.remote(function)
    refs = {
        node: remote.options(num_cpus=0, scheduling_strategy=strategy(node.id, soft=False)).remote(*arguments)
        for node in cluster.nodes()
    }
    ray.wait(list(refs.values()), num_returns=len(refs), timeout=ANSWER)
    out = {}
    for node, ref in refs.items():
        try:
            out[node] = ray.get(ref, timeout=1)
        except ray.exceptions.GetTimeoutError:
            raise DeviceError(f"--cluster: node {node.name} does not answer; is it alive (`ray status`)?") from None
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except ray.exceptions.RayError:
            if node.id in {n.id for n in cluster.nodes()}:
                raise DeviceError(f"--cluster: node {node.name} starts no worker; see `ray status`.") from None
    return out


def share(value: Any) -> Any:
    """A reference to `value` in the object store: one copy a node, numpy arrays without a copy a task.

    Put it into a list among a task's arguments, and `fetch` it there; by itself Ray would fetch it for every task.
    """
    return _ray().put(value)


def fetch(reference: Any) -> Any:
    """The value of a `share`, inside a task."""
    return _ray().get(reference)


def node_id() -> str:
    """Ray's id of the node this runs on."""
    return str(_ray().get_runtime_context().get_node_id())


def run_tasks(
    cluster: Cluster,
    function: Callable[..., Any],
    jobs: Iterable[Sequence[Any]],
    *,
    num_cpus: float = 1,
    num_gpus: float = 0,
    on_progress: Callable[[int, Any], None] | None = None,
    stop: Stop = bool,
    ahead: int | None = None,
) -> Iterator[tuple[int, Any]]:
    """Run `function(*job, tell=..., stop=...)` for every job on some node; yields (job number, result) as they finish.

    `function` is of this package and takes what pickles. Inside, `tell(value)` reaches `on_progress(number, value)`
    here, and `stop()` says whether to raise Interrupted soon. A task whose worker or node is lost is begun again, by
    whoever has room. At most `ahead` jobs are handed to Ray at once. An error of ours raised in a task is raised here
    as it is, after the others were asked to stop; so it is with Interrupted, once `stop` of the caller says so.
    """
    ray = _ray()
    board = _board(cluster)
    reader = _Reader(board, on_progress)
    # A process that has begun on one GPU stays on it, whatever the next task is lent: so one task a process there.
    # SPREAD: by itself Ray fills half of one node first, whose disk and memory then serve all.
    once = ray.remote(max_calls=1) if num_gpus else ray.remote
    task = once(_work).options(
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        max_retries=RETRIES,
        retry_exceptions=False,
        scheduling_strategy="SPREAD",
    )
    upcoming, waiting = enumerate(jobs), dict[Any, int]()
    hope = time.monotonic() + HOPE
    try:
        # Before the tasks: on a busy machine they might else be over before the first report can be read.
        while not reader.look(LOOK) and time.monotonic() < hope:
            if stop():
                raise Interrupted("stopped.")
        while True:
            while ahead is None or len(waiting) < ahead:
                if (job := next(upcoming, None)) is None:
                    break
                waiting[task.remote(function, board, job[0], *job[1])] = job[0]
            if not waiting:
                return
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK)
            if stop():
                raise Interrupted("stopped.")
            reader.look()
            if done:  # what a task told is passed on before its result: an answer asked for before that came is one old
                _ = reader.look(REACH) and reader.look(REACH)
            for ref in done:
                yield waiting.pop(ref), _result(ref)
            if done or cluster.slots(num_cpus, num_gpus):
                hope = time.monotonic() + HOPE
            elif time.monotonic() > hope:
                raise DeviceError(f"--cluster: no node is left that lends {num_cpus:g} CPUs and {num_gpus:g} GPUs.")
    finally:
        _cancel(list(waiting))
        ray.kill(board)


# ------------------------------------------------------------------------------------------------- joining a cluster


def _ray() -> Any:
    import ray
    import ray.util.scheduling_strategies

    return ray


def _join(address: str) -> str:
    """Connect; how this cluster was come by. InputError with one line where it cannot be had."""
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    options: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False, "namespace": "cxr-fast"}
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    flag = f"--cluster {address}" + (f" (RAY_ADDRESS={named})" if address == "auto" and named else "")
    if named or address != "auto":
        _reach(named, flag)
    ray = _ray()
    try:
        if named:
            ray.init(named, **options)
            return f"joined at {named}"
        try:
            if not _alive():
                raise ConnectionError
            ray.init("auto", **options)
            return f"joined at {ray.get_runtime_context().gcs_address}"
        except ConnectionError:
            ray.init("local", num_cpus=hardware.cpu_count(), include_dashboard=False, **options)
            return "started here"
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        ray.shutdown()
        text = " ".join(str(error).split())[:200]
        raise InputError(f"{flag}: cannot be joined ({text}); see `ray status` there.") from None


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep Ray from writing a page on stdout for each lost worker or node, which none of its settings does.

    Its own name for that; where a later Ray has it no longer, the pages are back and nothing else is lost.
    """
    import ray._private.worker as worker

    said = getattr(worker, "print_to_stdstream", None)
    if said is None:
        yield
        return
    worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        worker.print_to_stdstream = said


def _reach(address: str, flag: str) -> None:
    """InputError where nothing listens at an address."""
    bare = address.removeprefix("ray://")
    host, colon, port = bare.rpartition(":")
    if not colon or not host or not port.isdecimal():
        raise InputError(f"{flag}: is not auto, HOST:PORT or ray://HOST:PORT.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH).close()
    except OSError as error:
        raise InputError(
            f"{flag}: cannot be reached ({error.strerror or error}); is a head running there (`ray start --head`)?"
        ) from None
    if bare == address and not _alive(address):
        raise InputError(f"{flag}: what listens there is no Ray head that answers; see `ray status` there.")


def _alive(address: str | None = None) -> bool:
    """Whether a Ray head answers at an address, or at the one this machine knows. `ray.init` would wait for minutes
    at an address that says nothing, and at one that a cluster left behind, and take SIGTERM for itself meanwhile."""
    where = ["--address", address] if address else []
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--skip-version-check", *where]
    try:
        done = subprocess.run(command, capture_output=True, timeout=ALIVE, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _probe() -> Callable[[Sequence[str]], dict[str, str]]:
    """A function for a node on which nothing of ours may be there, so that it must not be looked up by its name."""

    def versions(packages: Sequence[str]) -> dict[str, str]:
        import contextlib
        import hashlib
        import importlib.metadata
        import importlib.util
        import platform
        from pathlib import Path

        def version(names: str) -> str:
            for name in names.split("|"):
                with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                    return importlib.metadata.version(name).partition("+")[0]  # of torch: cpu or cu130
            return "none"

        own, hasher = "none", hashlib.sha256()
        if (spec := importlib.util.find_spec("cxr_fast")) and spec.origin:
            import cxr_fast

            for path in sorted(Path(spec.origin).parent.rglob("*.py")):
                hasher.update(path.read_bytes())
            own = f"{cxr_fast.__version__} ({hasher.hexdigest()[:8]})"
        python = ".".join(platform.python_version_tuple()[:2])
        return {"cxr-fast": own, "Python": python, **{name: version(name) for name in packages}}

    return versions


# ------------------------------------------------------------------------------------------------ inside the workers


def _work(function: Callable[..., Any], board: Any, number: int, *arguments: Any) -> Any:
    """One task: its result, or an error of ours as a value, so that it arrives without Ray's traceback."""
    teller = _Teller(board, number)
    try:
        with graceful() as stopped:  # ray.cancel sends SIGINT
            result = function(*arguments, tell=teller, stop=stopped.is_set)
    except CxrFastError as error:
        result = _Failed(error)
    teller.flush(wait=True)
    return result


@dataclass(frozen=True)
class _Failed:
    error: CxrFastError


class _Teller:
    """Sends what it is called with: the first at once, then a few times a second and not each by itself."""

    def __init__(self, board: Any, number: int) -> None:
        self.board, self.number = board, number
        self.values: list[Any] = []
        self.last = 0.0

    def __call__(self, value: Any) -> None:
        self.values.append(value)
        if time.monotonic() - self.last > TELL_SECONDS:
            self.flush()

    def flush(self, *, wait: bool = False) -> None:
        """Send what has come together; with `wait` it is there before this returns."""
        if self.values:
            sent = self.board.put.remote([(self.number, value) for value in self.values])
            if wait:
                _ray().wait([sent], timeout=REACH)
        self.values, self.last = [], time.monotonic()


class _Board:
    """What the tasks told since it was last read; an actor beside the driver, so that no lost node takes it along."""

    def __init__(self) -> None:
        self.values: list[tuple[int, Any]] = []

    def put(self, values: list[tuple[int, Any]]) -> None:
        """Keep what a task told."""
        self.values += values

    def take(self) -> list[tuple[int, Any]]:
        """What has come since the last call."""
        values, self.values = self.values, []
        return values


# ------------------------------------------------------------------------------------------------- beside the workers


def _board(cluster: Cluster) -> Any:
    ray = _ray()
    near = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(cluster.here, soft=True)
    return ray.remote(_Board).options(num_cpus=0, max_restarts=-1, scheduling_strategy=near).remote()


class _Reader:
    """Passes on what is on the board, never waiting for it: it may still be starting while tasks already run."""

    def __init__(self, board: Any, on_progress: Callable[[int, Any], None] | None) -> None:
        self.board, self.on_progress = board, on_progress
        self.asked: Any = None

    def look(self, seconds: float = 0) -> bool:
        """Pass on what has come; whether the board answered."""
        if self.on_progress is None:
            return True
        ray = _ray()
        self.asked = self.asked or self.board.take.remote()
        if not ray.wait([self.asked], timeout=seconds)[0]:
            return False
        asked, self.asked = self.asked, None
        try:
            told = ray.get(asked)
        except ray.exceptions.RayError:  # it is being started again; progress is worth no failure
            return False
        for number, value in told:
            self.on_progress(number, value)
        return True


def _result(ref: Any) -> Any:
    ray = _ray()
    try:
        found = ray.get(ref)
    except ray.exceptions.TaskCancelledError:
        raise Interrupted("stopped.") from None
    except ray.exceptions.RayTaskError as error:
        raise _cause(error) from None
    except ray.exceptions.RayError as error:
        text = " ".join(str(error).split())[:160]
        raise DeviceError(
            f"--cluster: a task was lost {RETRIES + 1} times with its worker ({text}).\n"
            "Out of memory? What is finished is kept; the same command goes on."
        ) from None
    if isinstance(found, _Failed):
        raise found.error
    return found


def _cause(error: Any) -> BaseException:
    """What was raised in a task, without Ray's wrapping; one line where that is Ray's own, such as a lost object."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, _ray().exceptions.RayError):
        text = " ".join(str(cause).split())[:160]
        return DeviceError(
            f"--cluster: a task lost what it works on ({text}).\nIs the cluster still up (`ray status`)? What is "
            "finished is kept; the same command goes on."
        )
    return cause if isinstance(cause, BaseException) else error


def _cancel(refs: Sequence[Any]) -> None:
    """Ask running tasks to stop, wait a little, end those that did not."""
    if not refs:
        return
    ray = _ray()
    for ref in refs:
        ray.cancel(ref)
    _, left = ray.wait(list(refs), num_returns=len(refs), timeout=GRACE, fetch_local=False)
    for ref in left:
        ray.cancel(ref, force=True)


def describe(nodes: Iterable[Node]) -> list[Mapping[str, Any]]:
    """Nodes as JSON, for a run's record."""
    return [{"node": n.name, "cpus": n.cpus, "gpus": n.gpus} for n in nodes]
