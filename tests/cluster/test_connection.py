"""The same work over several nodes: real Ray processes, nodes and workers killed, and what comes out compared."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxr_fast.cluster import connection, predict, search
from cxr_fast.cluster.connection import Cluster, check_nodes, connect, describe, on_each, visible
from cxr_fast.cluster.predict import ClusterPredictor, NodeSpec
from cxr_fast.cluster.search import ClusterTrainers
from cxr_fast.cluster.tasks import TaskSize, run_tasks, share
from cxr_fast.config import CacheSpec, SweepOptions, SweepSpec, TrainSpec
from cxr_fast.data import paths as inputs
from cxr_fast.errors import DeviceError, ImageError, InputError, Interrupted
from cxr_fast.inference import batch as answers
from cxr_fast.inference.predictor import Predictor
from cxr_fast.system.files import file_sha256
from cxr_fast.training.sweep import SweepJob
from tests.helpers import tasks
from tests.helpers.ray_nodes import RayNodes, losing, three_nodes, untouched
from tests.helpers.states import Gate, wait_until
from tests.helpers.tasks import die_once, look, refuse, square, wait, where

# Ray's own sockets and processes, closed when its modules go, and its use of names Python is about to drop. On a busy
# machine the tests of what is lost take minutes.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning:ray"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def started() -> Iterator[RayNodes]:
    with three_nodes() as found:
        yield found


@pytest.fixture
def nodes(started: RayNodes) -> Iterator[RayNodes]:
    """Three nodes, as the test before found them."""
    with untouched(started) as found:
        yield found


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """Where tasks stay in the middle of their work; open at first."""
    found = Gate(tmp_path / "gate")
    yield found
    found.open()


# Without Ray.


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = connection.importlib.util.find_spec
    monkeypatch.setattr(connection.importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    with pytest.raises(InputError, match=r"^--cluster needs ray, which is not installed; .*cluster"), connect("auto"):
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


LOCAL = """
import sys
from cxr_fast.cli.main import main
import cxr_fast.cluster.connection, cxr_fast.cluster.predict, cxr_fast.cluster.search
try:
    main(["sweep", *sys.argv[1:], "--epochs", "1", "--folds", "2", "--lr", "1e-3", "--threads", "1"])
finally:
    print([name for name in sys.modules if name.split(".")[0] == "ray"])
"""


def test_a_local_sweep_never_imports_ray(toy_cache: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOCAL, str(toy_cache), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.ray
def test_an_address_where_something_else_listens_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray.init` alone was still trying after 81 s."""
    monkeypatch.setattr(connection, "ALIVE", 4.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(InputError, match="no Ray head that answers") as found:
            connect(address).__enter__()
    assert "\n" not in str(found.value)


# The core, with Ray.


@pytest.fixture(scope="module")
def connected(started: RayNodes) -> Iterator[Cluster]:
    with connect(started.address) as found:
        yield found


@pytest.fixture
def cluster(nodes: RayNodes, connected: Cluster) -> Cluster:
    return connected


@pytest.mark.ray
def test_the_nodes_are_named_and_counted(cluster: Cluster, nodes: RayNodes) -> None:
    found = check_nodes(cluster, ("torch", "onnxruntime-gpu"))
    assert [(node.cpus, node.gpus) for node in found] == [(1, 0)] * 3
    assert len({node.name for node in found}) == 3
    assert str(cluster).startswith("3 nodes, 3 CPUs, 0 GPUs (Ray ")
    assert str(cluster).endswith(f", joined at {nodes.address})")
    assert (cluster.slots(1), cluster.slots(2), cluster.slots(3), cluster.slots(1, 1)) == (3, 0, 0, 0)
    assert describe(found)[0] == {"node": found[0].name, "cpus": 1, "gpus": 0}


@pytest.mark.ray
def test_a_node_of_another_version_is_named(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {node: {"cxr-fast": "1 (a)", "Python": "3", "torch": "2.15.0"} for node in cluster.nodes()}
    last = list(answers)[-1]
    answers[last] = answers[last] | {"torch": "2.14.1"}
    monkeypatch.setattr(connection, "on_each", lambda *_: answers)
    monkeypatch.setattr(connection, "_probe", lambda: lambda _: answers[cluster.nodes()[0]])
    with pytest.raises(InputError, match=f"node {last.name} has torch 2.14.1, this machine 2.15.0; install the same"):
        check_nodes(cluster)


@pytest.mark.ray
def test_a_path_is_visible_where_its_content_is(cluster: Cluster, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 300_000)
    found = visible(cluster, [tmp_path / "a", tmp_path / "b", tmp_path / "none"])
    assert list(found.values()) == [[True, True, False]] * 3
    one, other = connection.markers([str(tmp_path / "a"), str(tmp_path / "b")])
    assert one is not None
    assert other is not None
    assert one[0] == other[0]
    assert one != other


@pytest.mark.ray
def test_tasks_report_and_come_back(cluster: Cluster) -> None:
    told: list[tuple[int, str]] = []
    jobs = ([number] for number in range(7))
    found = dict(run_tasks(cluster, square, jobs, TaskSize(ahead=2), lambda *one: told.append(one)))
    assert found == {number: number * number for number in range(7)}
    assert sorted(told) == sorted((number, text) for number in range(7) for text in ("begun", "done"))


@pytest.mark.kill
@pytest.mark.ray
def test_a_killed_workers_task_is_begun_again(cluster: Cluster, tmp_path: Path) -> None:
    found = dict(run_tasks(cluster, die_once, ((number, str(tmp_path)) for number in range(3))))
    assert found == {0: (0, 1), 1: (1, 2), 2: (2, 1)}


@pytest.mark.kill
@pytest.mark.ray
def test_an_error_of_ours_arrives_as_itself_and_stops_the_others(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"^2.png is empty$") as found:
        list(run_tasks(cluster, refuse, ([number, str(tmp_path)] for number in range(6))))
    assert found.value.reason == "empty"
    # They end only when they are asked to, so that nobody waited for them, or this would not be reached.
    assert list(tmp_path.glob("stopped*")), "no other ran"


@pytest.mark.kill
@pytest.mark.ray
def test_stopping_asks_the_running_tasks_first(cluster: Cluster, tmp_path: Path) -> None:
    running: set[int] = set()
    with pytest.raises(Interrupted):
        list(
            run_tasks(
                cluster,
                wait,
                ((number, str(tmp_path)) for number in range(8)),
                on_progress=lambda number, _: running.add(number),
                stop=lambda: len(running) > 1,
            )
        )
    assert {path.name for path in tmp_path.iterdir()} >= {f"stopped{number}" for number in running}
    assert len(list(tmp_path.iterdir())) <= 3, "tasks that had not begun were run"


@pytest.mark.ray
def test_an_array_is_shared_without_a_copy(cluster: Cluster) -> None:
    reference = share(np.arange(1_000_000))
    found = dict(run_tasks(cluster, look, ([[reference]] for _ in range(4))))
    assert set(found.values()) == {(499_999_500_000, False)}


@pytest.mark.ray
def test_a_function_runs_once_on_every_node(cluster: Cluster) -> None:
    found = on_each(cluster, where)
    assert {node.id: there for node, there in found.items()} == {node.id: node.id for node in cluster.nodes()}


# A sweep.


FAST = TrainSpec(lr=1e-3, batch_size=4)
GRID = ["focal_gamma=1,2"]
SPEC = SweepSpec(epochs=(2, 8), folds=3, final="refit", train=FAST)


def info(run: Path) -> dict[str, Any]:
    """What run.json says, without times and what only a cluster's has."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "created", "machine", "cluster")}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    return timeless(json.loads((run / "run.json").read_text(encoding="utf-8")))


def same(run: Path, other: Path) -> None:
    """Two run folders hold the same to the last bit: figures, every saved array, weights; histories but for times."""
    assert info(run) == info(other)
    with np.load(run / "predictions.npz") as one, np.load(other / "predictions.npz") as two:
        assert one.files == two.files
        for name in one.files:
            assert one[name].dtype == two[name].dtype
            assert one[name].tobytes() == two[name].tobytes(), name
    assert (run / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    lines = [(folder / "history.csv").read_text().splitlines() for folder in (run, other)]
    assert [line.rpartition(",")[0] for line in lines[0]] == [line.rpartition(",")[0] for line in lines[1]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def local(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one machine makes of SPEC and GRID."""
    out = tmp_path_factory.mktemp("local") / "run"
    SweepJob(toy_cache, out, SPEC, SweepOptions(grid=GRID, device="cpu")).run()
    return out


def interrupted(cache: Path, out: Path, after: int) -> None:
    """A local run of SPEC and GRID that gets a signal after so many epochs."""
    count = itertools.count(1)

    def hit(*_: Any) -> None:
        if next(count) == after:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        SweepJob(cache, out, SPEC, SweepOptions(grid=GRID, device="cpu")).run(hit)


@pytest.mark.kill
@pytest.mark.ray
def test_a_sweep_begun_here_that_loses_a_worker_and_a_node_ends_as_on_one_machine(
    cluster: Cluster,
    nodes: RayNodes,
    gate: Gate,
    toy_cache: Path,
    local: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupted(toy_cache, tmp_path / "run", after=3)
    job = SweepJob(
        toy_cache, tmp_path / "run", SPEC, SweepOptions(grid=GRID, device="cpu"), trainers=ClusterTrainers(cluster)
    )
    plan = job.plan()
    assert plan.cluster == str(cluster)
    assert plan.resumed
    assert plan.notes == ()
    epochs: list[tuple[int, int, int]] = []
    monkeypatch.setattr(search, "train_fold", partial(tasks.held_fold, gate))
    with losing(gate, nodes.kill_worker, partial(nodes.remove_node, here=cluster.here)) as killed:
        run = job.run(lambda number, fold, epoch: epochs.append((number, fold, epoch.epoch)))
    assert [said.split()[0] for said in killed] == ["worker", "node"]
    assert epochs
    assert (0, 0, 1) not in epochs, "what the local run had done was done again"
    same(tmp_path / "run", local)
    assert [node["cpus"] for node in run["cluster"]["nodes"]] == [1, 1, 1]
    assert sum(node["folds"] for node in run["cluster"]["nodes"]) == 7, "six folds and the refit"
    assert len(run["cluster"]["lost"]) == 1
    assert not list(tmp_path.glob("run.partial*"))


HELD = """
import sys
from functools import partial
from pathlib import Path
from tests.helpers import tasks
from tests.helpers.states import Gate
from cxr_fast.cluster import search
from cxr_fast.cli.main import main
search.train_fold = partial(tasks.held_fold, Gate(Path(sys.argv[1])))
main(sys.argv[2:])
"""


def command(gate: Gate, cache: Path, out: Path, address: str) -> subprocess.Popen[str]:
    """`cxrfast sweep` of SPEC and GRID on the cluster, in a process group of its own as a terminal gives it."""
    flags = "--epochs 2,8 --folds 3 --final refit --lr 1e-3 --batch-size 4 --grid focal_gamma=1,2 --device cpu"
    said = [sys.executable, "-c", HELD, str(gate.folder), "sweep", str(cache), "--out", str(out), *flags.split()]
    said += ["--threads", "1", "--cluster", address]
    return subprocess.Popen(said, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0)


@pytest.mark.kill
@pytest.mark.ray
def test_a_command_interrupted_then_killed_is_finished_by_one_machine(
    nodes: RayNodes, gate: Gate, toy_cache: Path, local: Path, tmp_path: Path
) -> None:
    out, states = tmp_path / "run", tmp_path / "run.partial" / "states"

    def saved() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in states.glob("*.safetensors")}

    gate.shut()  # and so it stays: neither command can end by itself
    process = command(gate, toy_cache, out, nodes.address)
    wait_until(lambda: len(saved()) > 1 and gate.held(), "two states", lambda: process.poll() is None)
    os.killpg(process.pid, signal.SIGINT)
    said, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "cluster: 3 nodes, 3 CPUs, 0 GPUs (Ray " in said
    assert "stopped; every finished epoch is safe in" in errors
    assert "Run the same command again to go on." in errors
    assert not any(word in said + errors for word in ("Traceback", "raylet", "ray."))
    before = saved()
    process = command(gate, toy_cache, out, nodes.address)
    wait_until(lambda: saved() != before and gate.held(), "another state", lambda: process.poll() is None)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert states.is_dir(), "it had ended"
    SweepJob(toy_cache, out, SPEC, SweepOptions(grid=GRID, device="cpu")).run()
    same(out, local)


@pytest.fixture(scope="module")
def embeddings(toy_data: Path, lively_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache after pooling: heads alone are trained."""
    from cxr_fast.activations import build
    from cxr_fast.activations.encoder import with_size
    from cxr_fast.activations.job import CacheJob
    from cxr_fast.data import manifest
    from cxr_fast.models import backbone

    out, tower = tmp_path_factory.mktemp("heads") / "toy.h5", backbone.load(str(lively_weights))
    spec = with_size(CacheSpec(weights=str(lively_weights), unfreeze_blocks=0), tower)
    build.run(
        CacheJob(manifest=manifest.read_dataset(toy_data), backbone=tower, spec=spec, out=out, device="cpu", workers=1)
    )
    return out


@pytest.mark.ray
def test_nodes_that_see_neither_cache_nor_run_folder_train_the_same_heads(
    cluster: Cluster, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SweepSpec(epochs=(3, 5), folds=3, final="refit", train=FAST)
    SweepJob(embeddings, tmp_path / "local", spec, SweepOptions(device="cpu")).run()
    # Here the cache has another content than the nodes find under its name, and the token another name.
    monkeypatch.setattr(search, "content_mark", lambda _: "another cache")
    monkeypatch.setattr(search, "TOKEN", "another name")
    look = search.find_shared
    monkeypatch.setattr(search, "find_shared", lambda *names: (look(*names)[0], False))
    job = SweepJob(embeddings, tmp_path / "run", spec, SweepOptions(device="cpu"), trainers=ClusterTrainers(cluster))
    cache, folder = job.plan().notes
    assert cache.startswith("3 node(s) do not see (")
    assert cache.endswith(") the cache; its activations go through Ray's object store, a copy a node")
    assert folder.endswith(") the run folder; a fold lost or interrupted there begins again")
    assert job.trainer is not None
    assert (job.trainer.cpus, job.trainer.at_once) == (1, 3)
    job.run()
    same(tmp_path / "run", tmp_path / "local")


@pytest.mark.ray
def test_the_fields_of_a_recipe_are_trained_there_to_the_same_bits(
    cluster: Cluster, toy_cache: Path, tmp_path: Path
) -> None:
    """Two rates, blocks frozen first or for good, another loss, sampling and averages; a head trained again."""
    train = dataclasses.replace(FAST, lr=1e-4, head_lr=1e-3, loss="asl", sampling="sqrt", ema=0.9, tta="flip")
    spec = dataclasses.replace(SPEC, epochs=(2,), retrain_head="balanced", final="retrained", train=train)
    options = SweepOptions(device="cpu", grid=("train_blocks=0,1", "label_smoothing=0.1"))
    SweepJob(toy_cache, tmp_path / "local", spec, options).run()
    SweepJob(toy_cache, tmp_path / "run", spec, options, trainers=ClusterTrainers(cluster)).run()
    same(tmp_path / "run", tmp_path / "local")
    first = dataclasses.replace(
        spec, retrain_head="none", final="refit", train=dataclasses.replace(train, head_first=1)
    )
    SweepJob(toy_cache, tmp_path / "local-first", first, SweepOptions(device="cpu")).run()
    SweepJob(toy_cache, tmp_path / "first", first, SweepOptions(device="cpu"), trainers=ClusterTrainers(cluster)).run()
    same(tmp_path / "first", tmp_path / "local-first")


@pytest.mark.ray
def test_draws_and_seeds_are_trained_there_to_the_same_bits(cluster: Cluster, toy_cache: Path, tmp_path: Path) -> None:
    """Each seed has folds of its own, which the nodes are told; the refit takes those of the seed that is kept."""
    grid = ("lr=1e-4..1e-2:log", "seed=2,0")
    spec, options = dataclasses.replace(SPEC, epochs=(1, 2)), SweepOptions(device="cpu", grid=grid, trials=2)
    one = SweepJob(toy_cache, tmp_path / "local", spec, options).run()
    two = SweepJob(toy_cache, tmp_path / "run", spec, options, trainers=ClusterTrainers(cluster)).run()
    same(tmp_path / "run", tmp_path / "local")
    assert two["seeds"] == one["seeds"]
    with np.load(tmp_path / "run" / "grid.npz") as here, np.load(tmp_path / "local" / "grid.npz") as there:
        np.testing.assert_array_equal(here["fold"], there["fold"])
        np.testing.assert_array_equal(here["out_of_fold"], there["out_of_fold"])


@pytest.mark.ray
@pytest.mark.parametrize(
    ("device", "match"),
    [
        ("cuda", "^--device cuda: no node of the cluster lends a GPU; use --device cpu.$"),
        ("cuda:1", "^--device cuda:1: on a cluster Ray says which GPU; give auto, cpu or cuda.$"),
    ],
)
def test_a_gpu_that_no_node_lends_is_refused(
    cluster: Cluster, toy_cache: Path, tmp_path: Path, device: str, match: str
) -> None:
    with pytest.raises(DeviceError, match=match):
        SweepJob(toy_cache, tmp_path / "run", SPEC, SweepOptions(device=device), trainers=ClusterTrainers(cluster))


@pytest.mark.ray
def test_a_fold_takes_the_cpus_that_it_computes_with(cluster: Cluster, toy_cache: Path, tmp_path: Path) -> None:
    import torch

    torch.set_num_threads(4)
    try:
        job = SweepJob(toy_cache, tmp_path / "run", SPEC, SweepOptions(device="cpu"), trainers=ClusterTrainers(cluster))
    finally:
        torch.set_num_threads(1)
    assert job.trainer is not None
    assert (job.trainer.threads, job.trainer.cpus, job.trainer.at_once) == (4, 1, 3)
    assert [note.partition(":")[0] for note in job.trainer.notes] == ["no node has 4 CPUs"]


# Predictions.

PREDICTED = answers.BatchSpec(batch_size=3, workers=1, decide=True)


def rows(out: Path) -> tuple[bytes, dict[str, Any]]:
    """The table, and what NAME.run.json says but for times and what only a cluster's has."""
    said = json.loads(answers.run_path(out).read_bytes())
    for name in ("out", "began", "seconds", "stages", "cluster"):
        said.pop(name, None)
    return out.read_bytes(), said


@pytest.fixture(scope="module")
def table(toy_model: Path, toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one machine answers: 80 images, one of them broken, in batches of 3."""
    out = tmp_path_factory.mktemp("predictions") / "local.csv"
    predictor = Predictor(toy_model, device="cpu", threads=1)
    answers.write(predictor, inputs.read([str(toy_data)]), out, PREDICTED)
    return out


@pytest.mark.kill
@pytest.mark.ray
def test_predictions_that_lose_workers_are_those_of_one_machine(
    cluster: Cluster,
    nodes: RayNodes,
    gate: Gate,
    toy_model: Path,
    toy_data: Path,
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted, out = inputs.read([str(toy_data)]), tmp_path / "cluster.csv"
    remote = ClusterPredictor(cluster, toy_model, wanted.paths, NodeSpec(device="cpu", threads=1, workers=1))
    monkeypatch.setattr(predict, "answer", partial(tasks.held_answer, gate))
    with losing(gate, nodes.kill_worker, nodes.kill_worker) as killed:
        summary = answers.write(remote, wanted, out, PREDICTED)
    assert len(killed) == 2
    assert rows(out) == rows(table)
    assert summary["failed"] == 1
    assert sum(node["images"] for node in summary["cluster"]["nodes"]) == len(wanted.paths)


@pytest.mark.ray
def test_nodes_without_the_model_and_names_without_a_folder(
    cluster: Cluster, toy_model: Path, toy_data: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(toy_data / "images")
    monkeypatch.setattr(predict, "same_file", lambda *_: False)
    own = tmp_path / "model.onnx"
    shutil.copy(toy_model, own)
    wanted = inputs.read(["."])
    assert not any(os.path.isabs(path) for path in wanted.paths)
    remote = ClusterPredictor(cluster, own, wanted.paths, NodeSpec(device="cpu", threads=1, workers=1))
    own.rename(tmp_path / "moved.onnx")  # now no node finds it by its name
    monkeypatch.setattr(answers, "tree_sha256", lambda _: file_sha256(toy_model))
    answers.write(remote, wanted, tmp_path / "cluster.csv", PREDICTED)
    near = (tmp_path / "cluster.csv").read_text().splitlines()
    far = table.read_text().splitlines()
    assert near == [far[0], *(line.replace(f"{toy_data / 'images'}/", "") for line in far[1:])]


@pytest.mark.ray
def test_a_node_that_sees_no_image_is_named(
    cluster: Cluster, toy_model: Path, toy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "count_seen", lambda paths: 0)
    wanted = inputs.read([str(toy_data)])
    with pytest.raises(
        InputError, match=r"^--cluster: node \S+ sees none of the first 80 images \(/.*\); put them where"
    ):
        ClusterPredictor(cluster, toy_model, wanted.paths, NodeSpec(device="cpu", threads=1))


@pytest.mark.kill
@pytest.mark.ray
def test_an_interrupted_prediction_is_finished_by_one_machine(
    cluster: Cluster, toy_model: Path, toy_data: Path, table: Path, tmp_path: Path
) -> None:
    wanted, out = inputs.read([str(toy_data)]), tmp_path / "p.csv"
    remote = ClusterPredictor(cluster, toy_model, wanted.paths, NodeSpec(device="cpu", threads=1, workers=1))

    def hit(_: answers.State) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(
        Interrupted, match=r"^interrupted after \d+ of 80 images; the same command goes on from there.$"
    ):
        answers.write(remote, wanted, out, PREDICTED, hit)
    assert not out.exists()
    summary = answers.write(Predictor(toy_model, device="cpu", threads=1), wanted, out, PREDICTED)
    assert 0 < summary["reused"] < 80
    assert rows(out)[0] == rows(table)[0]


@pytest.mark.ray
def test_the_command_predicts_without_torch_on_the_driver(
    nodes: RayNodes, toy_model: Path, toy_data: Path, table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.csv"
    code = (
        "import sys\nfrom cxr_fast.cli.main import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    )
    flags = ["--decide", "--device", "cpu", "--threads", "1", "--workers", "1", "--batch-size", "3"]
    said = ["predict", str(toy_model), str(toy_data), "--out", str(out), *flags, "--cluster", nodes.address]
    done = subprocess.run(
        [sys.executable, "-c", code, *said],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "cluster: 3 nodes, 3 CPUs, 0 GPUs (Ray " in done.stderr
    assert "1 image(s) failed: 1 truncated; their rows say why" in done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert out.read_bytes() == table.read_bytes()


# Where there is none.


CODE = """
import sys
from cxr_fast.cluster import connection as cluster
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
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("1 node, ")
    assert "started here" in done.stdout
