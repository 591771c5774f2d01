"""mAP by how frequent a class is, against a loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from cxr_fast.metrics.rarity import GROUPS, class_groups, group_maps


def plain_groups(labels: np.ndarray) -> list[str]:
    out = []
    for column in labels.T:
        known = [int(y) for y in column if y >= 0]
        positives = known.count(1)
        # In whole numbers: a share of exactly a tenth, or a hundredth, is medium.
        out.append("head" if 10 * positives > len(known) else "tail" if 100 * positives < len(known) else "medium")
        if not known:
            out[-1] = "tail"
    return out


def plain_maps(labels: np.ndarray, scores: np.ndarray, groups: list[str]) -> dict[str, float]:
    out: dict[str, float] = {}
    for name in GROUPS:
        found = []
        for c, group in enumerate(groups):
            known = labels[:, c] >= 0
            y = labels[known, c]
            if group == name and 0 < y.sum() < len(y):
                found.append(average_precision_score(y, scores[known, c]))
        out[f"{name}_map"] = sum(found) / len(found) if found else math.nan
        out[f"{name}_classes"] = len(found)
    return out


@given(st.integers(1, 250), st.integers(1, 8), st.integers(0, 2**16), st.booleans())
@settings(max_examples=40, deadline=None)
def test_groups_and_their_means_are_those_of_a_loop(images: int, classes: int, seed: int, others: bool) -> None:
    """Shares from none to most, unknown labels, tied scores."""
    random = np.random.default_rng(seed)
    shares = random.choice([0, 0.004, 0.01, 0.05, 0.1, 0.3, 0.9, 1], classes)
    labels = (random.random((images, classes)) < shares).astype(np.int8)
    labels[random.random(labels.shape) < random.choice([0, 0.2, 1], classes, p=[0.5, 0.4, 0.1])] = -1
    scores = np.round(random.standard_normal(labels.shape), 1).astype(np.float32)
    given_groups = class_groups(labels[::2]) if others and images > 1 else None
    groups = plain_groups(labels) if given_groups is None else [str(g) for g in given_groups]
    assert plain_groups(labels) == class_groups(labels).tolist()
    assert group_maps(labels, scores, given_groups) == pytest.approx(plain_maps(labels, scores, groups), nan_ok=True)


@pytest.mark.parametrize(
    ("positives", "known", "group"),
    [(10, 100, "medium"), (11, 100, "head"), (1, 100, "medium"), (1, 101, "tail"), (0, 50, "tail"), (50, 50, "head")],
)
def test_a_class_on_the_border_is_medium(positives: int, known: int, group: str) -> None:
    labels = np.full((120, 1), -1, np.int8)
    labels[:known], labels[:positives] = 0, 1
    assert class_groups(labels).tolist() == [group]


def test_no_class_of_a_group_is_no_figure() -> None:
    found = group_maps(np.array([[1], [0], [1]]), np.array([[0.9], [0.1], [0.8]]))
    assert found["head_map"] == 1
    assert (found["head_classes"], found["medium_classes"], found["tail_classes"]) == (1, 0, 0)
    assert math.isnan(found["medium_map"])
    assert math.isnan(found["tail_map"])
