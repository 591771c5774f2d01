"""Labels and probabilities that hypothesis draws for the tests of figures, thresholds and intervals."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

Pair = tuple[np.ndarray, np.ndarray]


@st.composite
def pairs(draw: st.DrawFn, most: int = 40) -> Pair:
    """Labels and probabilities with ties, unknowns, classes without positives or negatives, down to two rows."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(2, most)), draw(st.integers(1, 5)))
    labels = (random.random(shape) < random.choice([0.0, 0.1, 0.5, 0.9, 1.0], shape[1])).astype(np.int8)
    labels[random.random(shape) < draw(st.sampled_from([0.0, 0.2, 0.7]))] = -1
    if draw(st.booleans()):
        labels[:, 0] = -1
    probs = random.random(shape)
    if levels := draw(st.sampled_from([0, 1, 2, 5, 15])):
        probs = np.round(probs * levels) / levels
    return labels, probs.astype(draw(st.sampled_from([np.float32, np.float64])))


def known(labels: np.ndarray, values: np.ndarray, c: int) -> Pair:
    rows = labels[:, c] >= 0
    return labels[rows, c], values[rows, c]
