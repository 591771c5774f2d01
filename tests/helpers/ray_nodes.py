"""A cluster of three Ray nodes on this machine for tests, which lose its workers and nodes and find it whole again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cxr_fast.cluster.connection import QUIET
from tests.helpers import states
from tests.helpers.states import Gate, wait_until

COUNT, STORE = 3, 100 * 2**20


class RayNodes:
    """Nodes of one CPU, started as `ray start` does; the first one has the cluster's own processes."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        # A dead node is noticed in a second, not in fifteen.
        quick = {
            "health_check_initial_delay_ms": 500,
            "health_check_period_ms": 300,
            "health_check_failure_threshold": 3,
        }
        self.cluster = Cluster()
        self._add(include_dashboard=False, _system_config=quick)
        self.restore()

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return str(self.cluster.address)

    def _add(self, **more: Any) -> None:
        self.cluster.add_node(num_cpus=1, object_store_memory=STORE, **more)

    def restore(self) -> None:
        """Start a node for each that was lost, and wait until all nodes are there and nothing runs on them."""
        while len(self.cluster.list_all_nodes()) < COUNT:
            self._add(include_dashboard=False)
        wait_until(self.whole, f"{COUNT} nodes that are idle")

    def whole(self) -> bool:
        """Whether all nodes live, no other does, and every CPU is free."""
        alive = [node["NodeID"] for node in self.cluster.global_state.node_table() if node["Alive"]]
        expected = [node.node_id for node in self.cluster.list_all_nodes()]
        free = self.cluster.global_state.available_resources_per_node()
        cpus = [free.get(node, {}).get("CPU", 0) for node in alive]
        return sorted(alive) == sorted(expected) and cpus == [1] * COUNT

    def node_of(self, pid: int) -> Any:
        """The living node whose worker a process is, or None."""
        owner = states.parent(pid)
        return next(
            (n for n in self.cluster.list_all_nodes() if n.all_processes["raylet"][0].process.pid == owner), None
        )

    def kill_worker(self, pid: int) -> str:
        """SIGKILL a process that works for a node; what was done, nothing where it is none."""
        if self.node_of(pid) is None:
            return ""
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not states.alive(pid), "an end of what was killed")
        return f"worker {pid}"

    def remove_node(self, pid: int, here: str = "") -> str:
        """SIGKILL all processes of the node that a process works for, unless it is the first, or the one this test is
        connected to; what was done."""
        node = self.node_of(pid)
        if node is None or node is self.cluster.head_node or node.node_id == here:
            return ""
        self.cluster.remove_node(node, allow_graceful=False)
        return f"node {node.node_id}"


@contextmanager
def three_nodes() -> Iterator[RayNodes]:
    """Started, and ended after the block; their workers find the package and these tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        root = str(Path(__file__).parents[2])
        patch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
        nodes = RayNodes()
        yield nodes
        nodes.cluster.shutdown()


@contextmanager
def untouched(nodes: RayNodes) -> Iterator[RayNodes]:
    """For one test: it finds the nodes whole, and so does the next one whatever this one did."""
    assert nodes.whole(), "an earlier test left the cluster otherwise than it was"
    try:
        yield nodes
    finally:
        nodes.restore()


@contextmanager
def losing(gate: Gate, *deeds: Callable[[int], str]) -> Iterator[list[str]]:
    """Beside the block, which works with the gate shut: each deed in turn, once it can be done to a process that stays
    at the gate; then the gate is opened. What was done is in the list."""
    done, errors, over = list[str](), list[BaseException](), threading.Event()

    def watch() -> None:
        try:
            for deed in deeds:
                what = lambda deed=deed: next(filter(None, map(deed, gate.held())), "")  # noqa: E731
                done.append(wait_until(what, "a process in the middle", lambda: not over.is_set()))
        except BaseException as error:
            errors.append(error)
        finally:
            gate.open()

    gate.shut()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()
    if errors:
        raise errors[0]
