"""Strips, operating points and mistaken findings against plain loops over films."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.report.at_a_glance import records, tables


def films(seed: int, n: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Labels with unknown ones, probabilities with ties, thresholds of which some are a probability, names."""
    draw = np.random.default_rng(seed)
    labels = draw.choice([1, 0, -1], (n, classes), p=[0.3, 0.5, 0.2]).astype(np.int8)
    probs = np.round(draw.beta(0.6, 2, (n, classes)), 2).astype(np.float32)
    limits = np.where(draw.random(classes) < 0.5, probs[0].astype(float), draw.random(classes))
    return labels, probs, limits, [f"c{c}" for c in range(classes)]


@given(st.integers(0, 10**6), st.integers(1, 300))
def test_operating_points_are_counts_of_calls(seed: int, n: int) -> None:
    labels, probs, limits, _ = films(seed, n, 2)
    for c in range(2):
        y, p, limit = labels[:, c], probs[:, c].astype(float), float(limits[c])
        found = json.loads(json.dumps(records.operating_points(y, probs[:, c], limit)))
        assert (found["positives"], found["negatives"]) == ((y == 1).sum(), (y == 0).sum())
        assert len(found["points"]) <= records.POINTS + 2
        assert found["points"][found["chosen"]][0] == limit
        for x, true, false in found["points"]:
            called = p >= (np.inf if x is None else x)
            assert (true, false) == ((called & (y == 1)).sum(), (called & (y == 0)).sum())
        shown = [x for x, *_ in found["points"] if x is not None]
        assert shown == sorted(shown)
        assert found["points"][-1][1:] == [0, 0]
        assert found["points"][0][1:] == [found["positives"], found["negatives"]]


def test_films_may_have_thresholds_of_their_own() -> None:
    """As cross-fitted ones are: then no point is that of the class."""
    labels, probs, limits, names = films(1, 40, 3)
    each = np.tile(limits, (40, 1))
    one, two = (records.glance_records(labels, probs, given, names) for given in (limits, each))
    assert one["mistaken"] == two["mistaken"]
    for name in names:
        found = two["operating_points"][name]
        assert found["chosen"] is None
        assert found["positives"] == one["operating_points"][name]["positives"]
        assert all(found["points"][k][0] is not None for k in range(len(found["points"]) - 1))


@given(st.integers(0, 10**6), st.integers(1, 80))
def test_mistaken_findings_are_those_of_a_plain_loop(seed: int, n: int) -> None:
    labels, probs, limits, names = films(seed, n, 4)
    called = probs >= limits
    found = json.loads(json.dumps(records.mistaken(labels, called, names)))
    for a in range(4):
        for b in range(4):
            missed = [i for i in range(n) if labels[i, a] == 1 and not called[i, a]]
            wrong = [i for i in missed if labels[i, b] == 0 and called[i, b]]
            assert found["counts"][a][b] == len(wrong)
            assert found["known"][a][b] == len([i for i in missed if labels[i, b] >= 0])
    for b in range(4):
        assert found["wrong"][b] == ((labels[:, b] == 0) & called[:, b]).sum()
        assert found["all"][b] == (labels[:, b] >= 0).sum()
    told = list(records.mistaken_records({"mistaken": found}))
    assert sum(row["films"] for row in told) == np.sum(found["counts"])
    assert all(row["missed"] != row["called"] for row in told), "a class that is missed is not called"


def test_strips_keep_ends_and_ranks() -> None:
    labels = np.array([1] * 3 + [0] * 1001 + [-1] * 5, np.int8)
    probs = np.concatenate([[0.9, 0.1, 0.5], np.linspace(0, 1, 1001) ** 2, np.full(5, 0.7)])
    found = records.strip(labels, probs)
    assert found["positive"] == [0.1, 0.5, 0.9]
    assert len(found["negative"]) == records.DOTS
    assert (found["negative"][0], found["negative"][-1]) == (0, 1)
    assert found["negative"] == sorted(found["negative"])
    assert abs(np.median(found["negative"]) - 0.25) < 0.01
    assert records.strip(np.array([-1]), np.array([0.5])) == {"positive": [], "negative": []}


def test_pairs_are_ranked_by_what_is_beyond_the_share_of_all_films() -> None:
    found: dict[str, Any] = {
        "classes": ["a", "b", "often"],
        "counts": [[0, 6, 9], [1, 0, 5], [0, 0, 0]],
        "known": [[10, 10, 10], [5, 5, 5], [0, 0, 0]],
        "wrong": [0, 10, 90],
        "all": [100, 100, 100],
    }
    table = tables.mistaken_table(found)
    assert [[str(cell) for cell in row] for row in table.rows] == [
        ["a → b", "6", "60 % of 10", "10 % of 100"],
        ["b → often", "5", "100 % of 5", "90 % of 100"],
    ]
    assert table.notes
    assert tables.mistaken_table(None).rows == []


def test_the_slider_has_classes_with_both_signs_alone() -> None:
    one = {"positives": 1, "negatives": 2, "chosen": 1, "points": [[0.123456789, 1, 2], [0.5, 1, 0], [None, 0, 0]]}
    found = tables.slider_data({"a": one, "b": one | {"positives": 0}, "c": one | {"negatives": 0}})
    points = [[0.1235, 1, 2], [0.5, 1, 0], [None, 0, 0]]
    assert found == [{"name": "a", "counts": [1, 2], "chosen": 1, "points": points}]
    assert tables.slider_data(None) == []
