"""Frozen blocks that are run once: in memory, or in a file without a name, the same activations."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cxr_fast.activations import forward
from cxr_fast.activations.forward import run_blocks
from cxr_fast.activations.loader import Activations
from cxr_fast.models import backbone
from cxr_fast.models.tail import Tail

ROWS = np.arange(1, 20)


@pytest.fixture(scope="module")
def tail() -> Iterator[Tail]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Tail(backbone.load("random:0:test_vit").visual, unfreeze_blocks=2, classes=3)
    torch.set_num_threads(threads)


def tokens(tail: Tail) -> Activations:
    shape = (20, 2, 5, tail.blocks[0].norm1.normalized_shape[0])
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    return Activations(array, torch.device("cpu"), residency="host")


def nameless() -> set[str]:
    """Open files of this process that have no name."""
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    found = {str(link): os.readlink(link) for link in links if link.is_symlink()}
    return {link for link, target in found.items() if target.endswith("(deleted)")}


@pytest.mark.parametrize("blocks", [0, 1])
def test_what_does_not_fit_lies_in_a_file_that_ends_with_it(
    tail: Tail, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = run_blocks(tail, tokens(tail), blocks, ROWS, views=2, folder=tmp_path)
    assert not isinstance(in_memory.array, np.memmap)
    before = nameless()
    monkeypatch.setattr(forward, "SHARE", 0)
    in_file = run_blocks(tail, tokens(tail), blocks, ROWS, views=2, folder=tmp_path)
    assert isinstance(in_file.array, np.memmap)
    assert nameless() > before
    assert not [*tmp_path.iterdir()]
    assert in_file.array.dtype == in_memory.array.dtype
    assert np.array_equal(in_file.array, in_memory.array)
    assert np.asarray(in_file.array)[ROWS].any()
    assert not np.asarray(in_file.array)[0].any()
    rows, views = torch.tensor([3, 1, 19]), torch.tensor([1, 0, 1])
    assert torch.equal(in_file.gather(rows, views), in_memory.gather(rows, views))
    del in_file
    gc.collect()
    assert nameless() == before, "the file stays open"


def test_a_file_is_streamed_where_the_cache_was(tail: Tail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tokens(tail)
    kept = tmp_path / "tokens.npy"
    np.save(kept, source.array)
    streamed = Activations(np.load(kept, mmap_mode="r"), torch.device("cpu"), residency="stream")
    want = run_blocks(tail, source, 1, ROWS, views=2)
    monkeypatch.setattr(forward, "SHARE", 0)
    found = run_blocks(tail, streamed, 1, ROWS, views=2, folder=tmp_path)
    assert found.residency == "stream"
    batches = [(torch.tensor([3, 1, 19]), torch.tensor([1, 0, 1])), (torch.tensor([7]), torch.tensor([0]))]
    for x, (rows, views) in zip(found.ahead(iter(batches)), batches, strict=True):
        assert torch.equal(x, want.gather(rows, views))
