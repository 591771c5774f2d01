"""What a model file keeps of the hold-out: no film shows, and what is damaged is one line."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.data.disclosure import GROUPS
from cxr_fast.errors import InputError
from cxr_fast.inference.shift import reference


def drawn(seed: int, films: int, patients: int, classes: int = 3) -> tuple[np.ndarray, list[float], list[str]]:
    """Probabilities (n, C), thresholds and groups; the last class answers with few values."""
    draw = np.random.default_rng(seed)
    probs = draw.beta(0.5, 3, (films, classes))
    probs[:, -1] = np.round(probs[:, -1], 1)
    return probs.astype(np.float32), [0.1] * classes, [f"p{g}" for g in draw.integers(0, patients, films)]


@given(st.integers(0, 10**6), st.integers(0, 300), st.integers(1, 200))
def test_no_bin_is_of_few_patients(seed: int, films: int, patients: int) -> None:
    """And every count is that of a plain loop."""
    probs, limits, groups = drawn(seed, films, patients)
    found = json.loads(json.dumps(reference.summarise_holdout(probs, limits, groups)))
    sizes = Counter(groups).values()
    assert (found["films"], found["groups"]) == (films, len(sizes))
    assert found["effective_films"] == pytest.approx(films**2 / sum(n * n for n in sizes) if films else 0)
    for c, row in enumerate(found["classes"]):
        bins: list[list[int]] = [[] for _ in row["counts"]]
        for i in range(films):
            bins[sum(float(probs[i, c]) >= edge for edge in row["edges"])].append(i)
        assert [len(each) for each in bins] == row["counts"]
        assert len(bins) == 1 or min(len({groups[i] for i in each}) for each in bins) >= GROUPS
        assert len(bins) <= reference.BINS
        assert row["positives"] == sum(float(p) >= 0.1 for p in probs[:, c])
        assert all(edge == float(f"{edge:.3g}") for edge in row["edges"])


def test_many_films_fill_all_bins_alike() -> None:
    probs, limits, _ = drawn(1, 4000, 4000)
    found = reference.summarise_holdout(probs, limits, list(map(str, range(4000))))
    assert len(found["classes"][0]["counts"]) == 20
    assert max(found["classes"][0]["counts"]) < 220


def entry() -> dict[str, Any]:
    """A sound entry of three classes."""
    return reference.summarise_holdout(*drawn(3, 200, 80))


def test_the_entry_reads_back() -> None:
    wanted = entry()
    found = reference.read_holdout({"holdout": wanted, "labels": ["a", "b", "c"]}, Path("m.onnx"))
    assert found is not None
    assert (found.films, found.groups, found.effective) == (200, wanted["groups"], wanted["effective_films"])
    for row, one in zip(found.classes, wanted["classes"], strict=True):
        assert (row.positives, row.edges.tolist(), row.counts.tolist()) == tuple(one.values())
    for info in ({"labels": ["a"]}, {"labels": ["a"], "holdout": None}):
        assert reference.read_holdout(info, Path("m.onnx")) is None


def test_an_entry_of_other_thresholds_counts_for_nothing() -> None:
    """A copy of a model file whose thresholds were set on other films must not be compared by them."""
    info: dict[str, Any] = {"labels": ["a", "b", "c"], "thresholds": [0.1] * 3, "calibration": None}
    info["holdout"] = entry() | {"point": reference.point_digest(info)}
    again = json.loads(json.dumps(info))
    assert reference.read_holdout(again, Path("m.onnx")) is not None
    for changed in ({"thresholds": [0.1, 0.1, 0.2]}, {"calibration": {"kind": "platt"}}):
        assert reference.read_holdout(again | changed, Path("m.onnx")) is None


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *[(("films",), value) for value in (-1, "many", None, 201, [], 10**400)],
        *[(("effective_films",), value) for value in (-1, float("nan"), float("inf"), 1e9, "x")],
        *[(("classes",), value) for value in ([], None, "abc", 7, {"a": 1})],
        *[(("classes", 0), value) for value in ({}, [], None, "x")],
        *[(("classes", 1, "positives"), value) for value in (-1, 201, "x", None)],
        *[(("classes", 1, "edges"), value) for value in ([0.5], [0.5, 0.1], ["x"], None, [float("nan")] * 7)],
        *[(("classes", 1, "counts"), value) for value in ([], [200], [[200]], "x", [2**70], None)],
    ],
)
def test_a_damaged_entry_is_one_line(place: tuple[Any, ...], value: Any) -> None:
    info: dict[str, Any] = {"labels": ["a", "b", "c"], "holdout": copy.deepcopy(entry())}
    at = info["holdout"]
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    with pytest.raises(InputError, match=r"m\.onnx: damaged metadata \(holdout is no summary of 3 classes\)"):
        reference.read_holdout(info, Path("m.onnx"))


@pytest.mark.parametrize("whole", [7, "x", [], True])
def test_an_entry_of_another_kind_is_one_line(whole: Any) -> None:
    with pytest.raises(InputError, match="damaged metadata"):
        reference.read_holdout({"labels": ["a"], "holdout": whole}, Path("m.onnx"))
