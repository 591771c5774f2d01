"""The GPU road without a GPU: what a captured step may do, on fake CUDA tensors; streams and graph by stand-ins."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import subprocess
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cxr_fast.models.device import pick_device
from cxr_fast.training import checkpoints, search
from cxr_fast.training.checkpoints import Journal
from cxr_fast.training.folds.fold import Fold, Snapshot
from cxr_fast.training.folds.loop import Recorder, fit
from cxr_fast.training.folds.stacked_folds import WARM_UP, Stack, fit_together, lay_out, run_epoch
from tests.conftest import TOY, TOY_AVERAGE
from tests.helpers import toys
from tests.helpers.states import wait_until
from tests.training.folds.test_stacked_folds import EQUAL, alike, change, everything, lines, make

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda", 0)


# What a step does.


def moved(stack: Stack, mode: FakeTensorMode) -> None:
    """Every tensor of a stack to a fake of its shape and strides on a GPU, which none needs to be there for."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)

    weights = stack.weights
    stack.weights = {name: fake(w) for name, w in weights.items()}
    stack.moments = {key: [fake(m) for m in moments] for key, moments in stack.moments.items()}
    stack.statistics = {i: [fake(t) for t in three] for i, three in stack.statistics.items()}
    stack.plan = {name: fake(t) for name, t in stack.plan.items()}
    for name in ("counts", "rates", "total", "at", "buffer"):
        setattr(stack, name, fake(getattr(stack, name)))
    stack.terms = stack.terms.map(fake)
    now = {id(weight): stack.weights[name] for name, weight in weights.items()}
    stack.averages = [(fake(average), now.get(id(new), fake(new))) for average, new in stack.averages]
    first = stack.first
    first.device_labels, stack.source = fake(first.device_labels), copy.copy(stack.source)
    assert stack.source.resident is not None
    stack.source.resident = fake(stack.source.resident)
    for module in first.tail.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else torch.nn.Parameter(fake(p.detach()), p.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fake(buffer)
    stack.device = CUDA


class Optimiser:
    """Stands for the fused AdamW: takes what its CUDA kernel takes, and refuses what that would refuse or misread."""

    def __init__(self) -> None:
        self.weights = 0

    def __call__(self, *lists: list[torch.Tensor], **named: Any) -> None:
        weights, gradients, first, second, none, counts = lists
        alone = [*counts, named["lr"], named["grad_scale"], named["found_inf"]]
        assert none == []
        assert all(
            t.device == CUDA and t.dtype == torch.float32 for t in [*weights, *gradients, *first, *second, *alone]
        )
        assert all(t.ndim == 0 for t in alone)
        for four in zip(weights, gradients, first, second, strict=True):
            assert len({(t.shape, t.stride()) for t in four}) == 1
        self.weights += len(weights)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, {"source": TOY}),
        ({"train_norm": True}, {"source": TOY_AVERAGE}),
        ({"class_weights": "inverse", "loss": "focal+jaccard"}, {"k": 1}),
        ({}, {"k": 0}),
    ],
)
def test_a_step_stays_on_the_gpu(
    kind: str, fields: dict[str, Any], named: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake tensor mixes with none of the CPU and has no value to read back: the two things a capture cannot do.

    Autograd would start CUDA, so gradients are made up; `step` checks their layout on CPUs.
    """
    stack = Stack(make(change(precision=kind, **fields), still=False, **named))
    stack.first.tail.train()
    stack._prepare(lay_out([fold.draw() for fold in stack.folds]))
    moved(stack, mode := FakeTensorMode())
    optimiser, losses = Optimiser(), list[torch.Tensor]()

    def grad(loss: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        losses.append(loss)
        return [torch.empty_like(leaf) for leaf in leaves]

    monkeypatch.setattr(torch, "_fused_adamw_", optimiser)
    monkeypatch.setattr(torch.autograd, "grad", grad)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with mode:
        stack.step()
    assert [(loss.device, loss.dtype, loss.requires_grad) for loss in losses] == [(CUDA, torch.float32, True)]
    assert optimiser.weights == len(stack.folds) * len(stack.weights)


# Its capture.


class Graphs:
    """Stands for CUDA's streams and graphs, and writes down what is asked of them; a replay is a step."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.said = list[str]()
        self.stream = "main"
        self.names = iter(("side", "another"))
        self.stack: Stack | None = None
        outer = self

        class Stream:
            def __init__(self, name: str = "") -> None:
                self.name = name or next(outer.names)

            def wait_stream(self, other: Stream) -> None:
                outer.said.append(f"{self.name} waits for {other.name}")

        class Graph:
            def replay(self) -> None:
                assert outer.stream == "main"
                outer.said.append("replay")
                assert outer.stack is not None
                Stack.step(outer.stack)

        @contextlib.contextmanager
        def on(stream: Stream) -> Iterator[None]:
            outer.stream, before = stream.name, outer.stream
            yield
            outer.stream = before

        @contextlib.contextmanager
        def capture(graph: Graph, *, stream: Stream) -> Iterator[None]:
            assert isinstance(graph, Graph)
            outer.said.append("capture")
            with on(stream):
                yield

        for name, value in {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "stream": on,
            "graph": capture,
            "current_stream": lambda: Stream(outer.stream),
            "device": lambda device: contextlib.nullcontext(),
        }.items():
            patch.setattr(torch.cuda, name, value)

    def watch(self, stack: Stack) -> Stack:
        """A stack whose steps are written down too, with the stream they are on."""
        self.stack = stack

        def step() -> None:
            self.said.append(f"step on {self.stream}")
            Stack.step(stack)

        stack.step = step  # type: ignore[method-assign]
        return stack


def test_a_graph_is_captured_once_behind_its_warm_up_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, rates = Graphs(monkeypatch), (1e-4, 1e-5, 1e-6)
    stack, plain = graphs.watch(Stack(make(), graph=True)), Stack(make())
    places = list[list[int]]()
    for lr in rates:
        for fold in (*stack.folds, *plain.folds):
            fold.optimizer.param_groups[0]["lr"] = lr
        list(run_epoch(stack))
        list(run_epoch(plain))
        static = [*stack._state(), *stack.plan.values(), stack.rates, stack.buffer, stack.first.device_labels]
        places.append([tensor.data_ptr() for tensor in static])
    warm_up = ["side waits for main", *["step on side"] * WARM_UP, "main waits for side"]
    assert graphs.said == [*warm_up, "capture", "step on side", *["replay"] * 3 * len(rates)]
    assert all(map(torch.equal, everything(stack), everything(plain)))
    assert places[0] == places[1] == places[2], "a graph knows its tensors by address"
    assert [e.lr for e in stack.folds[0].history] == list(rates)
    assert (lines(stack.folds[1])[:, :6] == lines(plain.folds[1])[:, :6]).all()


def test_one_fold_on_a_gpu_is_a_stack_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fold, other = make(ranges=EQUAL[:1])[0], make(ranges=EQUAL[:1])[0]
    told, snapshots, asked = list[int](), list[Snapshot](), list[bool]()

    def on_the_cpu(folds: list[Fold], *rest: Any, **named: Any) -> None:
        fold.device = torch.device("cpu")
        fit_together(folds, *rest, **named)

    def stop() -> bool:
        asked.append(True)
        return False

    monkeypatch.setattr(search, "fit_together", on_the_cpu)
    monkeypatch.setattr(search, "fit", lambda *_, **__: pytest.fail("launched kernel by kernel"))
    recorder = Recorder(
        epoch=lambda _, epoch: told.append(epoch.epoch), snapshot=lambda _, s: snapshots.append(s), stop=stop
    )
    fold.device, fold.taken = CUDA, {1}
    search.fit_one(fold, (1, 2), recorder)
    assert (told, [s.budget for s in snapshots], len(asked)) == ([1, 2], [2], 6)
    fit(other, (2,), Recorder())
    alike([fold], [other])


def test_a_stack_let_go_takes_its_memory_with_it() -> None:
    gc.disable()
    try:
        stack = Stack(make())
        list(run_epoch(stack))
        left = weakref.ref(stack)
        del stack
        assert left() is None, "its graph's memory would be there until cycles are collected"
    finally:
        gc.enable()


# States on disk.


def test_no_fold_on_a_gpu_goes_without_being_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes one state an epoch of five folds, one of which stops early."""
    room, written = threading.Semaphore(0), Counter[str]()

    def slow(path: Path, *_: object) -> None:
        assert room.acquire(timeout=60)
        written[path.stem] += 1

    monkeypatch.setattr(checkpoints, "_save", slow)
    folds = [toys.make(fold=k) for k in range(5)]
    for fold in folds:
        fold.device = CUDA
    with Journal(tmp_path / "run", {}) as saved:
        for epoch in range(30):
            for k, fold in enumerate(folds if epoch < 12 else folds[1:]):
                saved.save(f"fold{k + (epoch >= 12)}", fold)
            room.release()
            wait_until(lambda: not saved._waiting, "a write of what was handed over")
        for _ in range(10):
            room.release()
    assert sorted(written) == [f"fold{k}" for k in range(5)]
    assert min(written[f"fold{k}"] for k in range(1, 5)) >= 4
    assert sum(written.values()) >= 25


# float32.


def test_float32_on_a_gpu_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        assert pick_device("cpu").type == "cpu"
        assert torch.backends.cudnn.allow_tf32, "a CPU has no TF32"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        for name, found in (("auto", "cuda"), ("cuda", "cuda"), ("cuda:1", "cuda:1")):
            torch.backends.cudnn.allow_tf32 = True
            assert str(pick_device(name)) == found
            assert not torch.backends.cudnn.allow_tf32


# The benchmarks.


def test_a_benchmark_that_fails_costs_no_other_its_figures(tmp_path: Path) -> None:
    """`gpu.sh` in a copy of the checkout, with an interpreter that fails in one driver."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "gpu.sh").write_bytes((ROOT / "benchmarks" / "gpu.sh").read_bytes())
    old = tmp_path / "benchmarks" / "results" / "old.json"
    old.write_text("{}")
    os.utime(old, (1e9, 1e9))
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        '[ "$1" = -c ] && exit 0\n'
        'echo "$@" >>calls\n'
        'case "$*" in *run_cache*) exit 3;; esac\n'
        'name=$(basename "$1" .py); case "$*" in *--compile*) name=compiled;; esac\n'
        "sleep 0.02; echo '{}' >benchmarks/results/$name.json\n"
    )
    python.chmod(0o755)
    (out := tmp_path / "out").mkdir()
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(out)}
    done = subprocess.run(
        ["bash", str(tmp_path / "benchmarks" / "gpu.sh")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "failed: run_cache.py" in done.stderr
    calls = (tmp_path / "calls").read_text().split("\n")[:-1]
    assert all((ROOT / call.split()[0]).is_file() for call in calls)
    assert len(calls) == 4
    assert sorted(path.name for path in out.iterdir()) == ["compiled.json", "run_inference_gpu.json", "run_search.json"]


def test_a_copy_without_git_has_figures_without_a_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import common

    assert common.environment()["commit"] == common.commit()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert common.environment()["commit"] is None
