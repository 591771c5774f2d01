"""Sparse products where SciPy is not installed, against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.metrics import sparse


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 9), st.integers(0, 40), st.integers(1, 5))
def test_our_product_is_scipys(seed: int, rows: int, width: int, entries: int, step: int) -> None:
    """Also with empty rows, a column twice in a row, and products made in several steps."""
    random = np.random.default_rng(seed)
    at, columns = random.integers(0, rows, entries), random.integers(0, width, entries)
    weights = random.integers(0, 9, (width, 3)).astype(np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "HELD", step * 3)
        for values in (np.ones(entries, np.int32), random.normal(size=entries)):
            theirs = sparse.by_entries(values, at, columns, (rows, width))
            order = np.argsort(at, kind="stable")
            edges = np.concatenate([[0], np.cumsum(np.bincount(at, minlength=rows))])
            ours = sparse.Rows(values[order], columns[order], edges)
            assert not isinstance(theirs, sparse.Rows)
            np.testing.assert_allclose(ours @ weights, theirs @ weights, rtol=0, atol=1e-12)
    assert (sparse.Rows(np.ones(entries, np.int32)[order], columns[order], edges) @ weights).dtype == np.int32
