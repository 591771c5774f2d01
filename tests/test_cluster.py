"""The same work over several nodes: real Ray processes, nodes and workers killed, and what comes out compared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cxr_fast import cluster as module
from cxr_fast.cluster import Cluster, check_nodes, connect, describe, fetch, on_each, run_tasks, share, visible
from cxr_fast.errors import ImageError, InputError, Interrupted

HERE = Path(__file__).parent
STORE = 80 * 2**20
# Ray's own sockets and processes, closed when its modules go, and its use of names Python is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning:ray")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Three nodes of two CPUs, started as `ray start` does; their workers find the package and these tests."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    for name, value in module.QUIET.items():
        os.environ[name] = value
    from ray.cluster_utils import Cluster as Nodes

    found = Nodes()
    for _ in range(3):
        found.add_node(num_cpus=2, object_store_memory=STORE, include_dashboard=False)
    yield found
    found.shutdown()


# Without Ray.


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    with pytest.raises(InputError, match=r"^--cluster: needs Ray: pip install 'cxr-fast\[cluster\]'$"), connect("auto"):
        pass


@pytest.mark.parametrize("address", ["", "here", "host:", ":6379", "ray://host"])
def test_an_address_that_is_none_is_one_line(address: str) -> None:
    with pytest.raises(InputError, match="is not auto, HOST:PORT or ray://HOST:PORT"), connect(address):
        pass


def test_an_address_where_nothing_listens_is_one_line_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=r"^--cluster 127.0.0.1:9: cannot be reached \(Connection refused\)") as found:
        connect("127.0.0.1:9").__enter__()
    assert "\n" not in str(found.value)
    assert time.monotonic() - began < 5


# The core, with Ray. What runs in the workers is of this module, which they import by its name.


def square(number: int, *, tell: module.Tell, stop: module.Stop) -> int:
    """A result and two reports."""
    tell("begun")
    tell("done")
    return number * number


def die_once(number: int, folder: str, *, tell: module.Tell, stop: module.Stop) -> tuple[int, int]:
    """The first worker of job 1 kills itself as the system would."""
    mark = Path(folder) / f"{number}"
    with open(mark, "a", encoding="utf-8") as file:
        file.write("x")
    if number == 1 and mark.stat().st_size == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number, mark.stat().st_size


def refuse(number: int, *, tell: module.Tell, stop: module.Stop) -> int:
    """An error of ours in one of them, the others slow."""
    if number == 2:
        raise ImageError("empty", "2.png is empty")
    wait(number, "", tell=tell, stop=stop)
    return number


def wait(number: int, folder: str, *, tell: module.Tell, stop: module.Stop) -> int:
    """Until asked to stop."""
    tell(os.getpid())
    until = time.monotonic() + 60
    while not stop() and time.monotonic() < until:
        time.sleep(0.01)
    if folder:
        (Path(folder) / f"stopped{number}").touch()
    raise Interrupted("stopped.")


def look(reference: list[Any], *, tell: module.Tell, stop: module.Stop) -> tuple[int, bool]:
    """The sum of a shared array, and whether it is a view of the store."""
    array = fetch(reference[0])
    return int(array.sum()), array.flags.owndata


@pytest.fixture(scope="module")
def cluster(nodes: Any) -> Iterator[Cluster]:
    with connect(nodes.address) as found:
        yield found


@pytest.mark.ray
def test_the_nodes_are_named_and_counted(cluster: Cluster, nodes: Any) -> None:
    found = check_nodes(cluster, ("torch", "onnxruntime-gpu"))
    assert [(node.cpus, node.gpus) for node in found] == [(2, 0)] * 3
    assert len({node.name for node in found}) == 3
    assert str(cluster).startswith("3 nodes, 6 CPUs, 0 GPUs (Ray ")
    assert str(cluster).endswith(f", joined at {nodes.address})")
    assert (cluster.slots(1), cluster.slots(2), cluster.slots(3), cluster.slots(1, 1)) == (6, 3, 0, 0)
    assert describe(found)[0] == {"node": found[0].name, "cpus": 2, "gpus": 0}


@pytest.mark.ray
def test_a_node_of_another_version_is_named(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {node: {"cxr-fast": "1 (a)", "Python": "3", "torch": "2.15.0"} for node in cluster.nodes()}
    last = list(answers)[-1]
    answers[last] = answers[last] | {"torch": "2.14.1"}
    monkeypatch.setattr(module, "on_each", lambda *_: answers)
    monkeypatch.setattr(module, "_probe", lambda: lambda _: answers[cluster.nodes()[0]])
    with pytest.raises(InputError, match=f"node {last.name} has torch 2.14.1, this machine 2.15.0; install the same"):
        check_nodes(cluster)


@pytest.mark.ray
def test_a_path_is_visible_where_its_content_is(cluster: Cluster, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 300_000)
    found = visible(cluster, [tmp_path / "a", tmp_path / "b", tmp_path / "none"])
    assert list(found.values()) == [[True, True, False]] * 3
    one, other = module.markers([str(tmp_path / "a"), str(tmp_path / "b")])
    assert one is not None
    assert other is not None
    assert one[0] == other[0]
    assert one != other


@pytest.mark.ray
def test_tasks_report_and_come_back(cluster: Cluster) -> None:
    told: list[tuple[int, str]] = []
    jobs = ([number] for number in range(7))
    found = dict(run_tasks(cluster, square, jobs, on_progress=lambda *one: told.append(one), ahead=2))
    assert found == {number: number * number for number in range(7)}
    assert sorted(told) == sorted((number, text) for number in range(7) for text in ("begun", "done"))


@pytest.mark.ray
def test_a_killed_workers_task_is_begun_again(cluster: Cluster, tmp_path: Path) -> None:
    found = dict(run_tasks(cluster, die_once, ((number, str(tmp_path)) for number in range(3))))
    assert found == {0: (0, 1), 1: (1, 2), 2: (2, 1)}


@pytest.mark.ray
def test_an_error_of_ours_arrives_as_itself_and_stops_the_others(cluster: Cluster) -> None:
    began = time.monotonic()
    with pytest.raises(ImageError, match=r"^2.png is empty$") as found:
        list(run_tasks(cluster, refuse, ([number] for number in range(6))))
    assert found.value.reason == "empty"
    assert time.monotonic() - began < 10


@pytest.mark.ray
def test_stopping_asks_the_running_tasks_first(cluster: Cluster, tmp_path: Path) -> None:
    running: set[int] = set()
    with pytest.raises(Interrupted):
        list(
            run_tasks(
                cluster,
                wait,
                ((number, str(tmp_path)) for number in range(8)),
                num_cpus=2,
                on_progress=lambda number, _: running.add(number),
                stop=lambda: len(running) > 1,
            )
        )
    assert {path.name for path in tmp_path.iterdir()} >= {f"stopped{number}" for number in running}
    assert len(list(tmp_path.iterdir())) <= 3, "tasks that had not begun were run"


@pytest.mark.ray
def test_an_array_is_shared_without_a_copy(cluster: Cluster) -> None:
    import numpy as np

    reference = share(np.arange(1_000_000))
    found = dict(run_tasks(cluster, look, ([[reference]] for _ in range(4))))
    assert set(found.values()) == {(499_999_500_000, False)}


@pytest.mark.ray
def test_a_function_runs_once_on_every_node(cluster: Cluster) -> None:
    found = on_each(cluster, where)
    assert {node.id: there for node, there in found.items()} == {node.id: node.id for node in cluster.nodes()}


def where() -> str:
    """Ray's id of the node this runs on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


CODE = """
import sys
from cxr_fast import cluster
assert "ray" not in sys.modules
import ray
real = ray.init
def init(address=None, **named):
    if address == "auto":
        raise ConnectionError
    return real(address, object_store_memory=80 * 2**20, **named)
ray.init = init
with cluster.connect("auto") as found:
    print(found, [n.cpus for n in found.nodes()])
"""


@pytest.mark.ray
def test_where_there_is_none_one_is_started_and_ended(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("1 node, ")
    assert "started here" in done.stdout
