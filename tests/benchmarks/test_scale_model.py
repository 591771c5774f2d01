"""The model of many GPUs on made-up figures with known answers; its page is what the results give."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"

# Drivers are scripts beside each other, not a package.
sys.path.insert(0, str(BENCHMARKS))
common = importlib.import_module("common")
model = importlib.import_module("scale_model")
sys.path.remove(str(BENCHMARKS))

GPUS = model.GPUS
# A plant in which nothing is scarce and nothing is lost; each test makes one thing scarce.
AMPLE = model.values(model.collect(BENCHMARKS / "nowhere")) | {
    **dict.fromkeys(("link", "storage", "host memory", "GPU memory", "shard"), 1e15),
    **dict.fromkeys(("nodes lost", "start-up", "task"), 0.0),
    **dict.fromkeys(("GPUs a node", "overlap", "shards"), 1.0),
}
DATA = model.DataSet(name="toy", images=6_400_000, film=model.PNG, pixels=1.0, file_bytes=1e6)


def pipe(**changes: Any) -> Any:
    """1,000,000 images in 1,000 tasks, 10 ms each in the slowest stage."""
    given: dict[str, Any] = {"images": 1_000_000, "tasks": 1000, "block": 10, "bytes_an_image": 0.0}
    return model.Pipeline(**{**given, "stages": {"decode": 0.01, "prefix": 0.004}, **changes})


# Known answers.


def test_stages_overlap_on_a_gpu_and_add_up_on_a_core() -> None:
    assert model.pipeline_seconds(pipe(), 1, AMPLE).seconds == pytest.approx(10_000)
    assert model.pipeline_seconds(pipe(shared=True), 1, AMPLE).seconds == pytest.approx(14_000)
    assert model.pipeline_seconds(pipe(overlap=0.5), 1, AMPLE).seconds == pytest.approx(20_000)


def test_time_halves_with_workers_until_the_storage_is_full() -> None:
    n = AMPLE | {"storage": 400e6}
    work = pipe(bytes_an_image=1e6)  # a worker draws 100 MB/s, so four fill the storage
    found = [model.pipeline_seconds(work, workers, n) for workers in (1, 2, 4, 8, 1000)]
    assert [phase.seconds for phase in found] == pytest.approx([10_000, 5_000, 2_500, 2_500, 2_500])
    assert [phase.bottleneck for phase in found] == ["decode", "decode", "decode", "storage", "storage"]


def test_a_nodes_link_is_shared_by_its_workers() -> None:
    n = AMPLE | {"link": 400e6, "GPUs a node": 8.0}
    found = [model.pipeline_seconds(pipe(bytes_an_image=1e6), workers, n) for workers in (4, 8, 16)]
    assert [phase.seconds for phase in found] == pytest.approx([2_500, 2_500, 1_250])
    assert [phase.bottleneck for phase in found[1:]] == ["network", "network"]


def test_a_phase_ends_with_its_last_task() -> None:
    assert model.pipeline_seconds(pipe(tasks=10), 4, AMPLE).seconds == pytest.approx(3 * 100_000 * 0.01)
    many = model.pipeline_seconds(pipe(tasks=10), 64, AMPLE)
    assert (many.seconds, many.bottleneck, many.workers) == (pytest.approx(1000), "number of tasks", 10)


def test_tasks_are_whole_blocks_and_differ_by_one_at_most() -> None:
    assert pipe(images=117, tasks=10).most(1) == 20
    assert pipe(images=7, tasks=1).most(1) == 7
    assert pipe(images=1000, tasks=10).most(3) == 300
    assert pipe(images=1290, tasks=128).most(4) == 50, "one of 128 tasks has two blocks, not all"


def test_start_up_counts_once_and_a_task_once_a_round() -> None:
    n = AMPLE | {"start-up": 7.0, "task": 3.0}
    assert model.pipeline_seconds(pipe(), 4, n).seconds == pytest.approx(7 + 250 * 3 + 2_500)
    small = model.pipeline_seconds(pipe(images=100, tasks=2), 2, n)
    assert (small.seconds, small.bottleneck) == (pytest.approx(7 + 3 + 0.5), "start-up")


def test_the_bottleneck_moves_from_decode_to_prefix_to_write() -> None:
    n = AMPLE | {f"decode {model.PNG}": 1.0, "cores": 10.0, "write": 0.001}
    n |= {"prefix work": 5e9, "float32 speed": 1e12, "share, prefix": 0.5, "views": 2.0}
    assert model.cache(DATA, 1, n).bottleneck == "decode"  # 0.1 s, 0.02 s, 0.002 s
    assert model.cache(DATA, 1, n).seconds == pytest.approx(640_000)
    n |= {"cores": 100.0}
    assert model.cache(DATA, 1, n).bottleneck == "prefix"
    assert model.cache(DATA, 1, n).seconds == pytest.approx(128_000)
    n |= {"float32 speed": 1e14, "cores": 1000.0}
    assert model.cache(DATA, 1, n).bottleneck == "write"


def test_prediction_waits_for_decoding_or_for_the_model() -> None:
    n = AMPLE | {f"decode {model.PNG}": 1.0, "cores": 10.0, "16-bit speed": 1e12, "share, model": 0.5}
    assert model.predict(DATA, 2, n | {"model work": 1e10}).seconds == pytest.approx(320_000)
    assert model.predict(DATA, 2, n | {"model work": 1e11}).bottleneck == "model"


SWEEP = AMPLE | {"training work": 1e9, "validation work": 0.0, "16-bit speed": 1e12, "share, training": 0.5}


def test_a_sweep_is_no_faster_than_one_task_and_five_folds_are_five_tasks() -> None:
    """Amdahl: 64 GPUs do for 5 folds what 5 do."""
    one = 100 * 0.64 * DATA.images * 0.002
    n = SWEEP | {"configurations": 1.0}
    found = [model.sweep(DATA, gpus, n) for gpus in (1, 2, 4, 5, 8, 64)]
    assert [phase.seconds / one for phase in found] == pytest.approx([5, 3, 2, 1, 1, 1])
    assert [phase.bottleneck for phase in found] == ["training step"] * 3 + ["number of tasks"] * 3
    assert [phase.workers for phase in found] == [1, 2, 4, 5, 5, 5]
    assert model.sweep(DATA, 64, n | {"configurations": 10.0}).seconds == pytest.approx(one)


def test_where_activations_lie_follows_their_size() -> None:
    size = DATA.images * 2 * AMPLE["row"]
    for memory, place in ((size / 0.79, "GPU"), (size / 0.81, "host")):
        assert model.where(DATA, 1, AMPLE | {"GPU memory": memory}) == place
    n = AMPLE | {"GPU memory": 0.0, "host memory": size / 4 / 0.79, "GPUs a node": 8.0}
    assert [model.where(DATA, gpus, n) for gpus in (1, 2, 4, 8, 64)] == ["disk", "disk", "host", "host", "host"]


def test_streamed_activations_wait_for_link_and_storage_and_held_ones_for_copies() -> None:
    slow = {"GPU memory": 0.0, "host memory": 0.0, "share, streaming": 0.8}
    read = 5 * 100 * 0.8 * DATA.images * AMPLE["row"] / 0.8
    n = SWEEP | {"configurations": 1.0, "16-bit speed": 1e15} | slow
    linked = model.sweep(DATA, 1, n | {"link": 1e9})
    assert (linked.bottleneck, linked.where) == ("network", "disk")
    assert linked.seconds == pytest.approx(read / 1e9)
    stored = model.sweep(DATA, 5, n | {"link": 1e9, "storage": 1.9e9})
    assert (stored.bottleneck, stored.seconds) == ("storage", pytest.approx(read / 1.9e9))
    copied = model.sweep(DATA, 1, n | {"host memory": 1e15, "host to GPU": 1e8})
    assert copied.bottleneck == "copies to the GPU"
    assert copied.seconds == pytest.approx(5 * 100 * 0.8 * DATA.images * AMPLE["row"] / 1e8, rel=1e-3)


def test_a_lost_node_costs_half_a_task_a_start_and_its_replacement() -> None:
    n = AMPLE | {"nodes lost": 0.5, "start-up": 0.0, "replacement": 600.0}
    # 10,000 s in one task: 0.5 an hour x 2.78 h losses, each 5,000 s again and 600 s of waiting.
    assert model.pipeline_seconds(pipe(tasks=1), 1, n).seconds == pytest.approx(10_000 + 0.5 * 10_000 / 3600 * 5_600)
    small = model.pipeline_seconds(pipe(tasks=1000), 1, n).seconds
    assert small < model.pipeline_seconds(pipe(tasks=1), 1, n).seconds, "smaller shards lose less"


# Properties.

BASE = model.values(model.collect(BENCHMARKS / "nowhere"))
SCALES = st.floats(0.01, 100.0)
SCARCE = ("link", "storage", "start-up", "task", "cores", "float32 speed", "16-bit speed", "host memory", "GPU memory")


@settings(max_examples=300)
@given(
    images=st.integers(1, 20_000_000),
    scales=st.fixed_dictionaries(dict.fromkeys(SCARCE, SCALES)),
    node=st.integers(1, 16),
    configurations=st.integers(1, 20),
)
@example(
    images=12_182_742,
    scales=dict.fromkeys(SCARCE, 1.0) | {"link": 9.0, "storage": 2.0, "16-bit speed": 0.5, "host memory": 9.0},
    node=9,
    configurations=1,
)
def test_more_gpus_are_never_slower(images: int, scales: dict[str, float], node: int, configurations: int) -> None:
    """Losses aside: on a full storage more GPUs make longer tasks, of which a lost node wastes more."""
    base = BASE | {"nodes lost": 0.0}
    n = base | {name: base[name] * scale for name, scale in scales.items()}
    n |= {"GPUs a node": float(node), "configurations": float(configurations)}
    data = replace(DATA, images=images)
    for phase in (model.cache, model.predict, model.sweep):
        seconds = [phase(data, gpus, n).seconds for gpus in GPUS]
        assert all(math.isfinite(s) and s > 0 for s in seconds)
        # 1e-9: the same sum in another order.
        assert all(more <= fewer * (1 + 1e-9) for fewer, more in itertools.pairwise(seconds)), phase
        lossy = [phase(data, gpus, n | {"nodes lost": 0.01}).seconds for gpus in GPUS]
        assert all(more > less for less, more in zip(seconds, lossy, strict=True))


@given(images=st.integers(1, 20_000_000), workers=st.integers(1, 64))
def test_shards_are_enough_for_all_gpus_and_none_too_large(images: int, workers: int) -> None:
    n = AMPLE | {"shard": 50_000.0, "shards": 4.0}
    shards = model.shards(images, workers, n)
    blocks = math.ceil(images / n["block"])
    assert 1 <= shards <= blocks
    assert shards == blocks or (shards % workers == 0 and shards >= 4 * workers and images / shards <= 50_000)


# Inputs.


def test_the_flops_are_those_of_the_layers_that_torch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own count of products: a whole block, the tail forward, and a training step."""
    from torch.utils.flop_counter import FlopCounterMode

    from cxr_fast.models import backbone
    from cxr_fast.models.tail import Tail
    from tests.conftest import TOY

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    search = importlib.import_module("run_search")
    tower = backbone.load(TOY)
    tokens, width, _ = tower.shape
    x = torch.zeros(1, tokens, width)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        tower.visual.trunk.blocks[0](x)
    mlp = tower.visual.trunk.blocks[0].mlp.fc1.out_features
    assert counted.get_total_flops() == common.block_flops(tokens, width, mlp)
    for blocks in (1, 2, 3):
        tail = Tail(tower.visual, unfreeze_blocks=blocks, classes=35).eval()
        training, forward = search.flops(tail, tokens)
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            tail(x)
        assert counted.get_total_flops() == forward
        with FlopCounterMode(display=False) as counted:
            tail(x).sum().backward()
        assert counted.get_total_flops() == training


def test_every_input_says_what_it_is_and_none_is_called_measured_without_a_file(tmp_path: Path) -> None:
    kinds = {"measured", "computed", "noted", "assumed"}
    for found in (model.collect(), model.collect(tmp_path)):
        assert all(i.kind in kinds and i.source and i.unit and i.name == name for name, i in found.items())
        measured = [i.source.strip("`") for i in found.values() if i.kind == "measured"]
        assert all((BENCHMARKS / "results" / name).is_file() for name in measured)
    assert not [i for i in model.collect(tmp_path).values() if i.kind == "measured"]
    gpu = [model.collect()[name].kind for name in ("float32 speed", "share, prefix", "share, training", "share, model")]
    assert gpu == ["assumed"] * 4


def spread(median: float) -> dict[str, float]:
    return {"n": 3, "median": median, "min": median, "max": median}


def cluster_result(*, two: float = 1.0) -> dict[str, Any]:
    """A result of `run_cluster.py` in which one node takes 10 s + 0.5 s a film + 2 s a shard, and its parts 0.4 s."""
    runs = {"32 films, 4 shards": (32, 4), "64 films, 4 shards": (64, 4), "64 films, 8 shards": (64, 8)}
    arms = {"without Ray": (1, 1.0), "one node": (1, 1.0), "two nodes": (2, two)}
    return {
        "name": "cluster",
        "gpu": None,
        "date": "2026-01-01",
        "films": [32, 64],
        "shards": [4, 8],
        "seconds": {
            arm: {
                name: spread((10 + (films * 0.5 + shards * 2) / nodes) * factor)
                for name, (films, shards) in runs.items()
            }
            for arm, (nodes, factor) in arms.items()
        },
        "split": {arm: {"start": spread(10.0), "film": spread(0.5), "shard": spread(2.0)} for arm in arms},
        "parts": {
            "decode": {film: {"seconds": spread(0.05), "bytes": 1} for film in (model.PNG, model.JPEG, model.SMALL)},
            "prefix": spread(0.3),
            "write": spread(0.05),
            "train": {"seconds_per_sample": {"bfloat16": spread(0.06), "float32": spread(0.1)}},
        },
    }


def test_the_check_predicts_two_nodes_from_one(tmp_path: Path) -> None:
    (tmp_path / "cluster-x.json").write_text(json.dumps(cluster_result()))
    found, missing = model.checks(tmp_path)
    two = [check for check in found if check.what.startswith("cache, two nodes")]
    assert [check.predicted for check in two] == pytest.approx([22.0, 30.0, 34.0])
    assert [check.error for check in two] == pytest.approx([0, 0, 0])
    parts = [check for check in found if "from decode" in check.what]
    assert [check.error for check in parts] == pytest.approx([-0.2, -0.2])
    assert [line.split("`")[1] for line in missing] == ["results/cache-*.json", "results/training-steps-*.json"]


def test_the_check_can_fail(tmp_path: Path) -> None:
    (tmp_path / "cluster-x.json").write_text(json.dumps(cluster_result(two=1.25)))
    found, _ = model.checks(tmp_path)
    assert [c.error for c in found if c.what.startswith("cache, two nodes")] == pytest.approx([-0.2] * 3)
    assert "The largest error is 20%" in model.page(model.collect(tmp_path), tmp_path)


def test_a_cluster_result_takes_the_place_of_what_was_assumed(tmp_path: Path) -> None:
    before = model.collect(tmp_path)
    (tmp_path / "cluster-x.json").write_text(json.dumps(cluster_result()))
    after = model.collect(tmp_path)
    names = [name for name in after if after[name] != before[name]]
    assert names == [
        f"decode {model.PNG}",
        f"decode {model.JPEG}",
        f"decode {model.SMALL}",
        "write",
        "start-up",
        "task",
    ]
    assert all(after[name].kind == "measured" and "cluster-x.json" in after[name].source for name in names)
    assert [after[name].value for name in names] == [0.05, 0.05, 0.05, 0.05, 10.0, 2.0]


def test_the_newest_result_of_a_cpu_counts(tmp_path: Path) -> None:
    for date, gpu, name in (("2026-01-02", None, "b"), ("2026-01-01", None, "a"), ("2026-01-03", "H100", "c")):
        (tmp_path / f"cache-{name}.json").write_text(json.dumps({"name": "cache", "date": date, "gpu": gpu}))
    (tmp_path / "cache-z.json").write_text(json.dumps({"name": "cache-other", "date": "2027-01-01", "gpu": None}))
    found = model.newest("cache", tmp_path)
    assert found is not None
    assert found["file"] == "cache-b.json"
    assert model.newest("cluster", tmp_path) is None


def test_figures_of_two_machines_are_not_mixed(tmp_path: Path) -> None:
    for name, date, cpu in (("cluster", "01", "X"), ("cache", "01", "X"), ("cache", "02", "Y"), ("gather", "02", "Y")):
        result = {"name": name, "date": f"2026-01-{date}", "gpu": None, "machine": {"cpu": cpu}}
        (tmp_path / f"{name}-{cpu}.json").write_text(json.dumps(result))
    found = model.newest("cache", tmp_path)
    assert found is not None
    assert found["file"] == "cache-X.json", "run_cluster.py ran on X"
    assert model.newest("gather", tmp_path) is None


# The page.


def test_the_page_is_what_the_results_give() -> None:
    text = (BENCHMARKS / "SCALE.md").read_text(encoding="utf-8")
    assert text == model.page(model.collect()), "run python benchmarks/scale_model.py"


def test_the_short_table_of_the_scaling_page_is_what_the_results_give() -> None:
    found = model.values(model.collect())
    wanted = model.short_table(model.lines(found), found["price"])
    page = (ROOT / "docs" / "explanation" / "scaling.md").read_text(encoding="utf-8")
    assert common.between(page, "scale") == wanted, "run python benchmarks/scale_model.py"
    assert "MODELLED" in wanted
    assert wanted.count("\n") == len(model.DATA_SETS) + 1


def test_a_table_takes_the_place_of_the_one_before() -> None:
    before = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n"
    after = common.filled(before, "x", "| new |")
    assert common.between(after, "x") == "| new |"
    assert after == common.filled(after, "x", "| new |") == before.replace("\nold\n", "\n\n| new |\n\n")
    with pytest.raises(SystemExit, match="<!-- x: begin -->"):
        common.filled("no markers", "x", "| new |")


def test_the_page_calls_its_figures_modelled_and_says_what_is_missing(tmp_path: Path) -> None:
    text = model.page(model.collect(tmp_path), tmp_path)
    assert "MODELLED" in text.splitlines()[0]
    assert "Nothing could be checked." in text
    assert "run `run_cluster.py`" in text
    assert "NOT measured on a GPU" in text
    for data in model.DATA_SETS:
        assert text.count(f"\n| {data.name} |") == len(GPUS) + 1


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["scale_model.py", *words])
    model.main()


def test_the_command_writes_page_and_picture_the_same_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        run(monkeypatch, "--out", str(tmp_path / folder))
    assert (tmp_path / "a" / "SCALE.md").read_text() == (BENCHMARKS / "SCALE.md").read_text()
    first, second = ((tmp_path / folder / "scale.png").read_bytes() for folder in ("a", "b"))
    assert first == second
    assert first.startswith(b"\x89PNG")
    assert len(first) < 50_000
    assert "MODELLED" in capsys.readouterr().out


def test_the_command_takes_a_price_and_any_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(BENCHMARKS / "results", tmp_path / "results")
    usual = model.lines(model.values(model.collect()))
    run(
        monkeypatch,
        *("--price", "6", "--configurations", "1", "--set", "link=24e9", "--set", "share, training=0.6"),
        *("--results", str(tmp_path / "results"), "--out", str(tmp_path)),
    )
    text = capsys.readouterr().out
    assert "| link | 2.4e+10 | bytes/s a node | given | `--set` |" in text
    assert "**USD**: 6 a GPU" in text
    assert "5 folds x 1 configurations x 100 epochs, so 5 tasks" in text
    cost = next(line for line in text.splitlines() if line.startswith("| MIMIC-CXR | 8 |")).split(" | ")[-1]
    assert float(cost.rstrip(" |")) < usual[3 * len(GPUS) + 3].seconds / 3600 * 8 * 3


@pytest.mark.parametrize("words", [["--set", "lnik=1"], ["--set", "link"], ["--set", "link=-1"], ["--price", "0"]])
def test_the_command_refuses_what_is_no_input(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *words, "--out", str(tmp_path))
    assert str(stopped.value.code).startswith("--set ")
    assert not list(tmp_path.iterdir())


# The driver that measures a cluster.


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`run_cluster.py`, of which nothing that starts Ray is called here."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("run_cluster")


@pytest.mark.parametrize("nodes", [1, 2])
def test_start_up_is_told_from_work(driver: ModuleType, nodes: int) -> None:
    seconds = [7 + (films * 0.5 + shards * 2) / nodes for films, shards in ((32, 4), (64, 4), (64, 8))]
    assert driver.start_and_work(seconds, (32, 64), nodes) == pytest.approx({"start": 7, "film": 0.5, "shard": 2})


def test_the_drivers_result_is_what_the_model_reads(
    driver: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {arm: [[26.0 / max(n, 1) + 10] * 3, [42.0, 58.0, 66.0]] for arm, n in driver.ARMS.items()}
    result = cluster_result() | driver.summary(found, (32, 64))
    assert set(result["seconds"]) == set(result["split"]) == set(cluster_result()["seconds"])
    assert result["two_nodes_times_faster"]["n"] == 2
    (tmp_path / "cluster-x.json").write_text(json.dumps(result))
    assert len(model.checks(tmp_path)[0]) == 5
    assert set(driver.FILMS) == {model.PNG, model.JPEG, model.SMALL}
    assert "two nodes" in capsys.readouterr().out


def test_the_parts_of_the_driver_are_measured_on_a_toy(driver: ModuleType, tmp_path: Path) -> None:
    from cxr_fast.activations.encoder import with_size
    from cxr_fast.config import CacheSpec
    from cxr_fast.data.manifest import read_dataset
    from cxr_fast.data.phantom.dataset import write_dataset
    from cxr_fast.models import backbone
    from tests.conftest import TOY

    tower = backbone.load(TOY)
    spec = with_size(CacheSpec(weights=TOY, views=("plain",)), tower)
    write_dataset(tmp_path / "data", studies=4, size=64, seed=0)
    driver.FILMS = {"small": (64, 48, "png")}
    for seconds in (
        driver.decode_seconds(tmp_path, spec.preprocess, 2)["small"]["seconds"],
        driver.write_seconds(tmp_path, tower, spec, read_dataset(tmp_path / "data"), 2),
        driver.step_seconds(tower, 1)["seconds_per_sample"]["float32"],
    ):
        assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
