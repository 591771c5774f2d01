"""A cache as a torch Dataset holds the rows, views and labels of the cache, also over workers and shards."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cxr_fast.activations.cache import open_cache
from cxr_fast.activations.dataset import targets
from cxr_fast.errors import InputError


@pytest.mark.parametrize("view", ["plain", "flip"])
def test_items_are_rows_of_the_cache(view: str, toy_cache: Path) -> None:
    cache = open_cache(toy_cache)
    films = cache.dataset(view)
    rows, number = np.flatnonzero(cache.ok), ["plain", "flip"].index(view)
    assert len(films) == len(rows) < len(cache.ok), "one film failed"
    for index in (0, 5, len(films) - 1, -1):
        activations, labels = films[index]
        wanted = np.asarray(cache.activations[int(rows[index]), number], np.float32)
        np.testing.assert_array_equal(activations.numpy(), wanted)
        assert activations.dtype == labels.dtype == torch.float32
        np.testing.assert_array_equal(labels.numpy(), targets(cache.header.labels[rows[index]][None])[0])
    with pytest.raises(IndexError):
        films[len(films)]
    with pytest.raises(InputError, match="holds plain, flip"):
        cache.dataset("turned")


def test_a_loader_and_a_copy_give_the_same(toy_cache: Path) -> None:
    films = open_cache(toy_cache).dataset()
    batches = list(DataLoader(films, batch_size=7))
    assert sum(len(labels) for _, labels in batches) == len(films)
    again = pickle.loads(pickle.dumps(films))
    torch.testing.assert_close(torch.cat([x for x, _ in batches])[3], again[3][0], rtol=0, atol=0)


def test_labels_become_targets() -> None:
    found = targets(np.array([[1, 0, -1, -2]], np.int8))
    np.testing.assert_array_equal(found, np.array([[1, 0, np.nan, 0.7]], np.float32))
