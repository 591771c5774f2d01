"""Net benefit against the published formula, on an example worked by hand and in a plain loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.errors import InputError
from cxr_fast.metrics.curves import STEPS, net_benefit

from .drawn import Pair, pairs


def test_a_worked_example() -> None:
    """100 patients, 20 ill. At 20 % the model calls 16 of them and 24 others: 16/100 - 24/100 x 0.2/0.8 = 0.10.

    Calling all has 20/100 - 80/100 x 0.2/0.8 = 0.
    """
    labels = np.repeat([1, 1, 0, 0], [16, 4, 24, 56])[:, None].astype(np.int8)
    probs = np.repeat([0.6, 0.1, 0.2, 0.05], [16, 4, 24, 56])[:, None]
    found = net_benefit(labels, probs, np.array([0.1, 0.2, 0.5]))
    assert found.model[0] == pytest.approx([20 / 100 - 24 / 100 / 9, 0.10, 0.16])
    assert found.everyone[0] == pytest.approx([20 / 100 - 80 / 100 / 9, 0.0, -0.6])


@settings(deadline=None, max_examples=40)
@given(pairs(30), st.integers(0, 100))
def test_it_is_a_plain_loop(pair: Pair, seed: int) -> None:
    labels, probs = pair
    found = net_benefit(labels, probs)
    for c in range(labels.shape[1]):
        known = [(int(y), float(p)) for y, p in zip(labels[:, c], probs[:, c], strict=True) if y >= 0]
        for place in np.random.default_rng(seed).integers(0, len(STEPS), 5):
            t = float(STEPS[place])
            if not known:
                assert math.isnan(found.model[c, place])
                continue
            true = sum(y == 1 and p >= t for y, p in known) / len(known)
            false = sum(y == 0 and p >= t for y, p in known) / len(known)
            share = sum(y for y, _ in known) / len(known)
            assert found.model[c, place] == pytest.approx(true - false * t / (1 - t), abs=1e-12)
            assert found.everyone[c, place] == pytest.approx(share - (1 - share) * t / (1 - t), abs=1e-12)


def test_scores_that_are_no_probabilities_are_refused() -> None:
    with pytest.raises(InputError, match="are outside 0"):
        net_benefit(np.array([[1], [0]]), np.array([[3.0], [-1.0]]))
