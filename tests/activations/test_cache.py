"""Several arrays read as one against the concatenated array."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.activations.cache import JoinedRows


def parts(sizes):
    whole = np.arange(sum(sizes) * 2 * 3, dtype=np.float32).reshape(-1, 2, 3)
    return whole, JoinedRows(np.split(whole, np.cumsum(sizes)[:-1]))


@given(st.data(), st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_every_kind_of_index_reads_what_the_whole_array_holds(data, sizes):
    whole, rows = parts(sizes)
    n = len(whole)
    assert (rows.shape, rows.dtype, rows.nbytes, len(rows)) == (whole.shape, whole.dtype, whole.nbytes, n)
    np.testing.assert_array_equal(np.asarray(rows), whole)
    one = data.draw(st.integers(-n, n - 1))
    np.testing.assert_array_equal(rows[one], whole[one])
    some = slice(*data.draw(st.tuples(st.integers(0, n), st.integers(0, n + 3))))
    np.testing.assert_array_equal(rows[some], whole[some])
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=9)), int)
    views = np.array(data.draw(st.lists(st.integers(0, 1), min_size=len(index), max_size=len(index))), int)
    np.testing.assert_array_equal(rows[index], whole[index])
    np.testing.assert_array_equal(rows[index, views], whole[index, views])


def test_a_row_outside_is_refused_not_read_elsewhere():
    _, rows = parts([3, 2])
    for bad in (5, -6):
        with pytest.raises(IndexError):
            rows[bad]
    with pytest.raises(IndexError):
        rows[np.array([0, 5])]
    with pytest.raises(IndexError):
        rows[np.array([-1])]
