"""Nearest films: in blocks as all at once, other groups only where asked, and never of another cache."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.activations.cache import open_cache
from cxr_fast.errors import InputError
from cxr_fast.review import neighbours
from cxr_fast.training import predictions
from cxr_fast.training.predictions import Saved
from cxr_fast.training.run_folder import read_info


def unit(films: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(films, 5)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@given(films=st.integers(0, 30), count=st.integers(0, 8), patients=st.integers(1, 12), seed=st.integers(0, 99))
def test_blocks_give_what_sorting_everything_gives(films: int, count: int, patients: int, seed: int) -> None:
    vectors = unit(films, seed)
    groups = [f"p{number}" for number in np.random.default_rng(seed).integers(0, patients, films)]
    for own in (None, groups):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(neighbours, "CELLS", 3 * max(films, 1))  # three films a block
            places, cosines = neighbours.find_nearest(vectors, count, groups=own)
        for i in range(films):
            others = [j for j in range(films) if (i != j if own is None else groups[i] != groups[j])]
            slow = sorted((-float(vectors[i] @ vectors[j]), j) for j in others)[:count]
            assert cosines[i][: len(slow)] == pytest.approx([-value for value, _ in slow], abs=1e-6)
            assert {*places[i][: len(slow)].tolist()} <= {*others}
            assert (places[i][len(slow) :] == -1).all()


def test_films_are_described_by_their_plain_view_s_tokens(toy_cache: Path) -> None:
    cache = open_cache(toy_cache)
    rows = np.flatnonzero(cache.ok)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "READ_AT_ONCE", 1)  # a film at once
        found = neighbours.describe_films(cache, rows)
    plain = np.asarray(cache.activations)[rows, 0].astype(np.float32).mean(axis=1)
    slow = (plain - plain.mean(axis=0)) / plain.std(axis=0)
    slow /= np.linalg.norm(slow, axis=1, keepdims=True)
    np.testing.assert_allclose(found, slow, atol=1e-5)


def test_a_cache_behind_the_pooling_and_equal_films() -> None:
    stored = np.ones((3, 2, 4), np.float16)
    cache: Any = SimpleNamespace(activations=stored)
    assert (neighbours.describe_films(cache, np.arange(3)) == 0).all()
    stored[0, 0, 1] = 5
    found = neighbours.describe_films(cache, np.arange(3))
    assert found[0] @ found[1] < 0 < found[1] @ found[2]


def test_rows_are_matched_by_name_and_bytes(toy_run: Path, toy_cache: Path, tmp_path: Path) -> None:
    cache, saved = open_cache(toy_cache), predictions.read(toy_run, read_info(toy_run))
    rows = neighbours.match_rows(saved, cache)
    assert [cache.header.images[row] for row in rows] == saved.arrays["image"].tolist()
    changed = Saved(run=saved.run, arrays={**saved.arrays, "sha256": saved.arrays["sha256"][::-1]})
    with pytest.raises(InputError, match="have other bytes than when it was trained"):
        neighbours.match_rows(changed, cache)
    other = open_cache(shutil.copy(toy_cache, tmp_path / "other.h5"))
    other.header = replace(other.header, images=("x.png", *other.header.images[1:]))
    with pytest.raises(InputError, match="lacks 1 of the run's 79 images, such as"):
        neighbours.match_rows(saved, other)
