"""Student's t where SciPy is not installed, against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import stdtrit

from cxr_fast.metrics.intervals import tail_shares
from cxr_fast.metrics.student import plain_tail, student_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 7, 30, 999, 10**6])
@pytest.mark.parametrize("tail", [0.1, 0.025, 0.0005])
def test_students_quantile_is_scipys(freedom: int, tail: float) -> None:
    assert student_quantile(freedom, tail) == pytest.approx(-stdtrit(freedom, tail), rel=1e-11)


@pytest.mark.parametrize("groups", [2, 3, 5, 60, 4000])
def test_the_plain_tail_is_that_of_the_intervals(groups: int) -> None:
    ids = np.arange(groups)
    found = tail_shares((ids % 2)[:, None].astype(np.int8), ids, 0.95)
    assert plain_tail(groups, 0.025) == pytest.approx(float(found["overall"]), rel=1e-11)
