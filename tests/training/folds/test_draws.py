"""Block shuffle: every row once, windows of whole blocks mixed, drawn each epoch, gone on with to the same bits."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.activations.loader import (
    Activations,
)
from cxr_fast.cli.describe.sweep import streaming_notes
from cxr_fast.cli.main import (
    main,
)
from cxr_fast.config import TrainSpec
from cxr_fast.system import hardware
from cxr_fast.training.folds.draws import draw, order_by_block
from cxr_fast.training.folds.fold import Fold
from cxr_fast.training.folds.head_fold import HeadFold
from cxr_fast.training.folds.stacked_folds import Stack
from tests.helpers import toys
from tests.helpers.toys import CPU, make, same

BLOCKS = dataclasses.replace(toys.SPEC, shuffle="block", shuffle_block=3, shuffle_window=2)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def epoch(rows: Any, block: int, window: int, seed: int) -> list[int]:
    spec = TrainSpec(shuffle="block", shuffle_block=block, shuffle_window=window, dropout=0)
    return draw(generator(seed), torch.as_tensor(rows), spec, views=1).rows.tolist()


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.integers(0, 400), min_size=2, max_size=120, unique=True),
    block=st.integers(1, 20),
    window=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_every_row_comes_once_in_windows_of_whole_blocks(rows: list[int], block: int, window: int, seed: int) -> None:
    order = epoch(rows, block, window, seed)
    assert sorted(order) == sorted(rows)
    number = {row: i // block for i, row in enumerate(sorted(rows))}
    size = Counter(number.values())
    at = 0
    while at < len(order):  # the next window: the blocks of its first rows, until so many are whole
        seen: Counter[int] = Counter()
        while at < len(order) and not (len(seen) == window and all(seen[b] == size[b] for b in seen)):
            seen[number[order[at]]] += 1
            at += 1
        assert len(seen) <= window
        assert all(seen[b] == size[b] for b in seen)
        assert len(seen) == window or at == len(order)


def test_any_row_may_follow_any_row() -> None:
    """In a file of 8 rows, blocks of 2 and windows of 4 rows: all 56 pairs are met, and more often within a block."""
    pairs: Counter[tuple[int, int]] = Counter()
    for seed in range(1500):
        order = epoch(range(8), 2, 2, seed)
        pairs.update((a, b) for i in (0, 4) for a, b in zip(order[i : i + 3], order[i + 1 : i + 4], strict=True))
    assert set(pairs) == {(a, b) for a in range(8) for b in range(8) if a != b}
    # Three neighbouring pairs in each of two windows of 4. Block mates always share one: 6 of its 12 ordered pairs a
    # window follow each other at 1/4; another row shares it one time in three.
    mates = {pair: count for pair, count in pairs.items() if pair[0] // 2 == pair[1] // 2}
    assert all(count / 1500 == pytest.approx(1 / 4, abs=0.06) for count in mates.values())
    assert all(count / 1500 == pytest.approx(1 / 12, abs=0.04) for pair, count in pairs.items() if pair not in mates)


def test_within_a_window_every_order_is_as_likely() -> None:
    seen = Counter(tuple(epoch(range(4), 2, 2, seed)) for seed in range(4800))
    assert len(seen) == 24
    assert sum((count - 200) ** 2 / 200 for count in seen.values()) < 50  # chi-square, 23 degrees: 49.7 at 0.001


def test_up_to_one_window_it_is_a_full_shuffle_and_rows_need_no_order() -> None:
    assert len({tuple(epoch(range(5), 16, 64, seed)) for seed in range(2000)}) == 120
    rows = np.random.default_rng(0).permutation(50)
    assert epoch(rows, 4, 3, 1) == epoch(np.sort(rows), 4, 3, 1)


def test_the_parameters_matter() -> None:
    """With one block a window, the blocks come whole; with everything in a window, they do not."""
    order = np.array(epoch(range(96), 8, 1, 0)).reshape(12, 8)
    assert (order // 8 == order[:, :1] // 8).all()
    assert (order[:, 0] // 8 != np.arange(12)).any()
    assert (np.sort(order) != order).any()
    mixed = np.array(epoch(range(96), 8, 12, 0)).reshape(12, 8)
    assert not (mixed // 8 == mixed[:, :1] // 8).all(axis=1).any()


def test_the_full_shuffle_is_the_bits_it_was() -> None:
    rows, spec = torch.arange(100, 141), TrainSpec(batch_size=8)
    found, again = draw(generator(3), rows, spec, views=2), generator(3)
    assert torch.equal(found.rows, rows[torch.randperm(41, generator=again)])
    assert torch.equal(found.views, torch.randint(0, 2, (41,), generator=again))


@pytest.mark.parametrize("kind", [Fold, HeadFold])
def test_each_epoch_is_drawn_anew_and_gone_on_with_to_the_same_bits(kind: type[Fold]) -> None:
    fold, other = make(kind, BLOCKS), make(kind, BLOCKS)
    fold.run_epoch()
    other.restore(*fold.state())
    drawn = [fold.draw().rows.tolist() for _ in range(3)]
    assert len(set(map(tuple, drawn))) == 3
    assert [other.draw().rows.tolist() for _ in range(3)] == drawn
    for one in (fold, other):
        one.run_epoch()
    assert same(fold, other)


def test_folds_trained_together_draw_what_each_would() -> None:
    def folds() -> list[Fold]:
        return [make(Fold, BLOCKS, activations=shared, fold=k) for k in range(3)]

    shared = Activations(toys.embeddings(), CPU)
    together, alone = Stack(folds(), graph=False).draw(), [fold.draw() for fold in folds()]
    assert [d.rows.tolist() for d in together] == [d.rows.tolist() for d in alone]
    assert len({tuple(d.rows.tolist()) for d in alone}) == 3


# A sweep.


@pytest.mark.usefixtures("sketched")
def test_a_sweep_with_block_shuffle_says_so_in_its_run(toy_cache: Path, tmp_path: Path) -> None:
    base = ["sweep", str(toy_cache), "--epochs", "2", "--folds", "2", "--device", "cpu", "--lr", "1e-3"]
    flags = ["--shuffle", "block", "--shuffle-block", "2", "--shuffle-window", "3"]
    for name, more in (("a", ["--residency", "stream"]), ("b", ["--residency", "host"])):
        found = CliRunner().invoke(main, [*base, *flags, *more, "--threads", "1", "--out", str(tmp_path / name)])
        assert found.exit_code == 0, found.output
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in "ab"]
    for run in runs:
        for train in (run["train"], run["spec"]["train"]):
            assert (train["shuffle"], train["shuffle_block"], train["shuffle_window"]) == ("block", 2, 3)
    assert [run["residency"] for run in runs] == ["stream", "host"]
    assert runs[0]["model_sha256"] == runs[1]["model_sha256"]


@pytest.mark.parametrize(
    ("residency", "size", "shuffles", "said"),
    [
        ("stream", 900, {"full"}, True),
        ("stream", 900, {"block", "full"}, True),
        ("stream", 900, {"block"}, False),
        ("stream", 700, {"full"}, False),
        ("host", 900, {"full"}, False),
    ],
)
def test_the_plan_hints_at_block_shuffle_where_a_disk_would_suffer(
    residency: str, size: int, shuffles: set[str], said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "memory_available", lambda: 1000.0)
    notes = streaming_notes(residency, size, shuffles)
    assert bool(notes) is said
    assert all("--shuffle block" in note and "\n" not in note for note in notes)


@pytest.mark.usefixtures("sketched")
def test_a_sweep_prints_the_hint_once(toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "memory_available", lambda: 1000.0)
    flags = ["--epochs", "1", "--folds", "2", "--device", "cpu", "--lr", "1e-3", "--out", str(tmp_path / "run")]
    found = CliRunner().invoke(main, ["sweep", str(toy_cache), "--threads", "1", *flags])
    assert found.exit_code == 0, found.output
    assert found.stderr.count("--shuffle block") == 1


# What it costs.


def test_a_head_learns_as_much_from_either_order_and_less_from_none() -> None:
    """A planted signal in a file sorted by one finding, the worst case: blocks from 64 places do, 60 rows at a time do
    not. Four seeds; benchmarks/LOG.md has ten."""
    apart: dict[str, list[float]] = {"mixed": [], "not": []}
    for seed in range(4):
        full = learned(TrainSpec(**RECIPE), seed)
        apart["mixed"].append(learned(TrainSpec(shuffle="block", shuffle_block=4, **RECIPE), seed) - full)
        spec = TrainSpec(shuffle="block", shuffle_block=200, shuffle_window=1, **RECIPE)
        apart["not"].append(learned(spec, seed) - full)
    assert abs(np.mean(apart["mixed"])) < 0.01
    assert np.mean(apart["not"]) < -0.02


RECIPE: dict[str, Any] = {"lr": 1e-3, "dropout": 0.2, "precision": "float32", "batch_size": 16}


def learned(spec: TrainSpec, seed: int) -> float:
    """Validation AUC after three epochs on 1,500 images."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1500, 1, 24)).astype(np.float32)
    y = (x[:, 0] @ rng.standard_normal((24, 3)) + 2 * rng.standard_normal((1500, 3)) > 0).astype(np.int8)
    order, rows = np.lexsort(y.T), np.arange(1500)
    named = {"train_rows": rows[rows % 3 > 0], "valid_rows": rows[rows % 3 == 0], "seed": seed}
    fold = make(HeadFold, spec, activations=Activations(x[order], CPU), labels=y[order], **named)
    for _ in range(3):
        fold.run_epoch()
    return float(fold.history[-1].valid_auc)


def test_rows_are_taken_in_file_order_before_they_are_cut() -> None:
    spec = dataclasses.replace(BLOCKS, shuffle_block=2, shuffle_window=1)
    order = order_by_block(generator(0), torch.tensor([9, 1, 8, 2]), spec).tolist()
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({1, 2}), frozenset({8, 9})}
