"""What metrics compute where SciPy is not installed, against SciPy's: sparse products, and tails of intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import stdtrit

from cxr_fast.metrics import sparse
from cxr_fast.metrics.intervals import plain_tail, student_quantile, tail_shares


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


@pytest.mark.parametrize("freedom", [1, 2, 3, 7, 30, 999, 10**6])
@pytest.mark.parametrize("tail", [0.1, 0.025, 0.0005])
def test_students_quantile_is_scipys(freedom: int, tail: float) -> None:
    assert student_quantile(freedom, tail) == pytest.approx(-stdtrit(freedom, tail), rel=1e-11)


@pytest.mark.parametrize("groups", [2, 3, 5, 60, 4000])
def test_the_plain_tail_is_that_of_the_intervals(groups: int) -> None:
    ids = np.arange(groups)
    found = tail_shares((ids % 2)[:, None].astype(np.int8), ids, 0.95)
    assert plain_tail(groups, 0.025) == pytest.approx(float(found["overall"]), rel=1e-11)
