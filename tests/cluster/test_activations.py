"""A cache made on three nodes, one worker and one node killed in the middle, against one machine's: the same files."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cxr_fast.activations import build, cache, reuse
from cxr_fast.activations import file as store
from cxr_fast.activations.encoder import BuildProgress, with_size
from cxr_fast.activations.job import CacheJob
from cxr_fast.cli.main import main
from cxr_fast.cluster import activations, connection
from cxr_fast.config import CacheSpec
from cxr_fast.data.manifest import read_dataset
from cxr_fast.errors import DeviceError, InputError, Interrupted
from cxr_fast.models import backbone
from tests.conftest import TOY
from tests.helpers import tasks
from tests.helpers.ray_nodes import RayNodes, losing, three_nodes, untouched
from tests.helpers.states import Gate, wait_until

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning:ray"),
    pytest.mark.timeout(900),
]
BLOCK, COUNT, SHARDS = 2, 48, 6


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    with three_nodes() as started, untouched(started) as found:
        yield found


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, each image another."""
    folder, rng = tmp_path_factory.mktemp("films"), np.random.default_rng(0)
    rows = [["image", "group", "Edema"]]
    for k in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (200, 200), np.uint8)).save(folder / f"{k}.png")
        rows.append([f"{k}.png", f"p{k}", str(k % 2)])
    with open(folder / "films.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return folder / "films.csv"


def in_the_middle(out: Path) -> list[int]:
    """The processes that hold a shard of which a part is encoded."""
    found = []
    for lock in out.parent.glob("*.h5.lock"):
        path = lock.with_suffix("")
        try:
            state = store.ActivationFile(store.partial_path(path), partial=True).state
            pid = json.loads(lock.read_text())["pid"]
        except (InputError, OSError, ValueError):
            continue
        if 0 < (state != store.PENDING).sum() < len(state):
            found.append(pid)
    return found


def made(out: Path) -> list[bytes]:
    return [(out.parent / shard.file).read_bytes() for shard in cache.read_index(out).shards]


@pytest.mark.kill
@pytest.mark.ray
def test_three_nodes_one_lost_make_the_files_of_one_machine(
    nodes: RayNodes, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower, manifest = backbone.load(TOY), read_dataset(films)
    spec = with_size(CacheSpec(weights=TOY), tower)
    one, many, sent = (tmp_path / name / "a.shards.json" for name in ("one", "many", "sent"))
    named: dict[str, Any] = {
        "manifest": manifest,
        "backbone": tower,
        "spec": spec,
        "device": "cpu",
        "batch_size": BLOCK,
    }
    build.run(CacheJob(out=one, shards=SHARDS, **named))
    gate = Gate(tmp_path / "gate")

    def interrupt(pid: int) -> str:
        """Control-C for the command, with a shard in the middle, which lets its tasks go on."""
        if pid not in in_the_middle(many):
            return ""
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: not gate.held(), "an end of all tasks")
        return "interrupted"

    def remove_node(pid: int) -> str:
        return nodes.remove_node(pid, remote.cluster.here) if pid in in_the_middle(many) else ""

    def kill(pid: int) -> str:
        return nodes.kill_worker(pid) if pid in in_the_middle(many) else ""

    seen: list[BuildProgress] = []
    job = CacheJob(out=many, shards=SHARDS, **named)
    with activations.connect_build(nodes.address, job, threads=1) as remote:
        assert (remote.kind, remote.slots, remote.shards, remote.job.block) == ("cpu", 3, SHARDS, BLOCK)
        assert "3 nodes, 3 CPUs" in str(remote)
        monkeypatch.setattr(activations, "_make_shard", partial(tasks.held_shard, gate))
        with losing(gate, interrupt) as killed, pytest.raises(Interrupted, match="Run the same command again"):
            remote.run()
        assert killed
        assert not many.exists()
        kept = sum(
            int((store.ActivationFile(p, partial=True).state == 1).sum()) for p in reuse.find_files(many, sharded=True)
        )
        assert kept
        with losing(gate, remove_node, kill) as killed:
            outcome = remote.run(seen.append)
        assert len(killed) == 2
    assert (outcome.images, outcome.failed) == (COUNT, ())
    assert outcome.encoded + outcome.reused == COUNT
    assert seen[-1].done == COUNT
    assert made(many) == made(one)

    with activations.connect_build(nodes.address, CacheJob(out=many, **named), threads=1) as remote:
        assert remote.shards == SHARDS  # as many as exist
        assert remote.run().encoded == 0
        remote = replace(remote, job=replace(remote.job, out=sent), gather=True)
        assert remote.run().encoded == COUNT
        assert made(sent) == made(one)
        assert remote.run().encoded == 0
        first = cache.shard_path(sent, 1, SHARDS)
        data = bytearray(first.read_bytes())
        data[store.ActivationFile(first).offset + 5] ^= 255
        first.write_bytes(data)
        remote = replace(remote, job=replace(remote.job, repair=True))
        assert remote.run().encoded == COUNT // SHARDS
        assert made(sent) == made(one)


def test_what_does_not_go_with_a_cluster_is_one_line(films: Path, tmp_path: Path) -> None:
    flags = ["cache", str(films), "--weights", TOY, "--out", str(tmp_path / "a.shards.json")]
    for more, said in (
        (["--gather", "--shards", "2"], "--gather is for --cluster"),
        (["--cluster", "nothing"], "is not auto, HOST:PORT"),
        (["--cluster", "127.0.0.1:9"], "cannot be reached"),
    ):
        done = CliRunner().invoke(main, [*flags, *more])
        assert done.exit_code == 2, done.output
        assert said in done.output
        assert len(done.output.splitlines()) == 1


def test_every_task_runs_on_one_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found = object.__new__(connection.Cluster)
    node = connection.Node(id="a", name="a", cpus=8, gpus=0)
    monkeypatch.setattr(connection.Cluster, "nodes", lambda self: [node, replace(node, gpus=2)])
    assert [found.target(name) for name in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    assert (found.slots(2, 1), found.slots(2), found.slots(16)) == (2, 8, 0)
    with pytest.raises(DeviceError, match="Ray says which GPU"):
        found.target("cuda:1")
    monkeypatch.setattr(connection.Cluster, "nodes", lambda self: [node])
    assert found.target("auto") == "cpu"
    with pytest.raises(DeviceError, match="no node of the cluster lends a GPU"):
        found.target("cuda")


def test_a_gathered_shard_that_arrives_damaged_is_not_kept(toy_cache: Path, tmp_path: Path) -> None:
    data = np.fromfile(toy_cache, np.uint8)
    activations._write_shard(tmp_path / "a.h5", data)
    assert (tmp_path / "a.h5").read_bytes() == toy_cache.read_bytes()
    data[store.ActivationFile(toy_cache).offset + 5] ^= 255
    with pytest.raises(InputError, match=r"1 row\(s\) arrived damaged"):
        activations._write_shard(tmp_path / "b.h5", data)
    assert not list(tmp_path.glob("b*"))
