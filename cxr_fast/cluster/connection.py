"""A Ray cluster: join or start one, name its nodes, compare their versions, run a function on each.

Ray is imported inside functions, so that it loads with `--cluster` alone.
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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DeviceError, InputError
from ..system import hardware
from ..system.extras import needs

# No reports to its makers; no hint at every CPU task of a machine with GPUs.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "GRPC_VERBOSITY": "NONE",
}
# Seconds: to reach an address; for a head to answer a health check, Python's start included; for all nodes to answer.
REACH, ALIVE, ANSWER = 5.0, 20.0, 120.0
PIECE, PIECES = 1 << 16, 8  # of a file's content marker


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine of a cluster: Ray's id of it, its host name, and the CPUs and GPUs that tasks may use."""

    id: str
    name: str
    cpus: int
    gpus: int


class Cluster:
    """A cluster this process is connected to; made by `connect`. `str()` is its line in a plan."""

    def __init__(self, where: str) -> None:
        self.where, self.here = where, node_id()

    def nodes(self) -> list[Node]:
        """List the nodes that are alive and lend CPUs or GPUs, those of most CPUs first."""
        alive = [node for node in ray_module().nodes() if node["Alive"]]
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
        return f"{each} (Ray {ray_module().__version__}, {self.where})"

    def slots(self, cpus: float, gpus: float = 0) -> int:
        """Count the tasks of this size that run at once."""
        fits = [[n.cpus // cpus if cpus else None, n.gpus // gpus if gpus else None] for n in self.nodes()]
        return int(sum(min((count for count in pair if count is not None), default=0) for pair in fits))

    def lost(self, nodes: Iterable[Node]) -> list[str]:
        """Name those of `nodes` that are no longer alive."""
        alive = {n.id for n in self.nodes()}
        return [n.name for n in nodes if n.id not in alive]

    def target(self, device: str) -> str:
        """Return the kind of device that tasks compute on, `cpu` or `cuda`. DeviceError where no node lends it."""
        if device not in ("auto", "cpu", "cuda"):
            raise DeviceError(f"--device {device}: on a cluster Ray says which GPU; give auto, cpu or cuda.")
        gpus = sum(node.gpus for node in self.nodes())
        if device == "cuda" and not gpus:
            raise DeviceError("--device cuda: no node of the cluster lends a GPU; use --device cpu.")
        return "cuda" if gpus and device != "cpu" else "cpu"

    def largest(self) -> int:
        """CPUs of the node that has most."""
        return max((n.cpus for n in self.nodes()), default=0)


def ray_module() -> Any:
    """Import Ray, with what schedules a task on a chosen node."""
    import ray
    import ray.util.scheduling_strategies

    return ray


@contextmanager
def connect(address: str) -> Iterator[Cluster]:
    """Join a cluster while in the `with` block, or with `auto`, where this machine belongs to none, start one here.

    `auto` joins what RAY_ADDRESS names, or the cluster this machine is a node of. Only what was started here is shut
    down. Raises InputError with one line where Ray is not installed or `HOST:PORT`, `ray://HOST:PORT` is not reached.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError(f"--cluster {needs('ray')}")
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
        with _without_ray_pages():
            yield Cluster(where)
    finally:
        ray_module().shutdown()


def check_nodes(cluster: Cluster, packages: Sequence[str] = ("torch",)) -> list[Node]:
    """Return the nodes, after each was found to run this cxr-fast, Python minor version and `packages`.

    `a|b` is the first of two packages that is installed. Raises InputError naming the first node that differs, and
    both versions.
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
    """Say for each node which of `paths` it sees with the size and content marker they have here."""
    names = [os.path.abspath(path) for path in paths]
    own = markers(names)
    return {
        node: [mine is not None and mine == theirs for mine, theirs in zip(own, found, strict=True)]
        for node, found in on_each(cluster, markers, names).items()
    }


def markers(paths: Sequence[str]) -> list[tuple[int, str] | None]:
    """Return size and sha256 of a few pieces of each file; None for one that cannot be read."""
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
    """Run `function(*arguments)` on every node and return the results; a node lost meanwhile is left out.

    Raises DeviceError naming a node that does not answer in two minutes.
    """
    ray = ray_module()
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
            raise cause_of(error) from None
        except ray.exceptions.RayError:
            if node.id in {n.id for n in cluster.nodes()}:
                raise DeviceError(f"--cluster: node {node.name} starts no worker; see `ray status`.") from None
    return out


def node_id() -> str:
    """Return Ray's id of the node this runs on."""
    return str(ray_module().get_runtime_context().get_node_id())


def describe(nodes: Iterable[Node]) -> list[Mapping[str, Any]]:
    """Return the nodes as JSON, for a run's record."""
    return [{"node": n.name, "cpus": n.cpus, "gpus": n.gpus} for n in nodes]


# ------------------------------------------------------------------------------------------------- joining a cluster


def _join(address: str) -> str:
    """Connect; return whether the cluster was joined or started. InputError with one line where neither works."""
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    options: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False, "namespace": "cxr-fast"}
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    flag = f"--cluster {address}" + (f" (RAY_ADDRESS={named})" if address == "auto" and named else "")
    if named or address != "auto":
        _require_listener(named, flag)
    ray = ray_module()
    try:
        if named:
            ray.init(named, **options)
            return f"joined at {named}"
        try:
            if not _head_answers():
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
def _without_ray_pages() -> Iterator[None]:
    """Keep Ray from writing a page on stdout for each lost worker or node, which none of its settings does.

    This replaces a private function of Ray; where a later Ray lacks it, the pages return and nothing else is lost.
    """
    import ray._private.worker as worker

    printer = getattr(worker, "print_to_stdstream", None)
    if printer is None:
        yield
        return
    worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        worker.print_to_stdstream = printer


def _require_listener(address: str, flag: str) -> None:
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
    if bare == address and not _head_answers(address):
        raise InputError(f"{flag}: what listens there is no Ray head that answers; see `ray status` there.")


def _head_answers(address: str | None = None) -> bool:
    """Whether a Ray head answers at an address, or at the one this machine knows.

    `ray.init` would wait for minutes at an address that does not answer, or that an ended cluster left behind, and
    would take SIGTERM for itself meanwhile.
    """
    where = ["--address", address] if address else []
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--skip-version-check", *where]
    try:
        done = subprocess.run(command, capture_output=True, timeout=ALIVE, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _probe() -> Callable[[Sequence[str]], dict[str, str]]:
    """Return the function that reads a node's versions. It is sent by value: the node may lack this package."""

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


def cause_of(error: Any) -> BaseException:
    """Return what was raised in a task, without Ray's wrapping; one line for an error of Ray's own (a lost object)."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, ray_module().exceptions.RayError):
        text = " ".join(str(cause).split())[:160]
        return DeviceError(
            f"--cluster: a task lost what it works on ({text}).\nIs the cluster still up (`ray status`)? What is "
            "finished is kept; the same command goes on."
        )
    return cause if isinstance(cause, BaseException) else error
