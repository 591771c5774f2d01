"""A table's answers against those for the hold-out: counts as a plain loop finds them, and few false alarms."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.errors import InputError
from cxr_fast.inference.predictor import Result
from cxr_fast.inference.shift import comparison, reference
from cxr_fast.inference.shift.comparison import FEW, ShiftWatch
from cxr_fast.inference.shift.counts import AnswerCounts

HERE = Path("m.onnx")


def results(probs: Iterable[np.ndarray | None]) -> list[Result]:
    """Answered films, and failed ones where there is None."""
    return [
        Result(path="a", reason="missing") if p is None else Result(path="a", probabilities=np.float32(p))
        for p in probs
    ]


def watched(
    info: dict[str, Any], probs: Iterable[np.ndarray | None], groups: Iterable[str] = ()
) -> tuple[str, dict[str, Any]]:
    """The line and the record of a table with these rows."""
    shift, rows = ShiftWatch(info, HERE), results(probs)
    assert list(shift.count(rows)) == rows
    record = shift.compare(groups)
    return record["line"], record


def films(seed: int, patients: int, each: int, classes: int, mean: float = 0.2) -> tuple[np.ndarray, list[str]]:
    """Probabilities (n, C) whose films of one patient resemble each other, and groups."""
    draw = np.random.default_rng(seed)
    own = draw.normal(0, 1, (patients, classes))
    logits = np.repeat(own, each, axis=0) + draw.normal(0, 0.3, (patients * each, classes))
    names = [f"p{i}" for i in range(patients) for _ in range(each)]
    return 1 / (1 + np.exp(-logits - np.log(mean / (1 - mean)))), names


def info_of(probs: np.ndarray, groups: list[str], threshold: float = 0.4) -> dict[str, Any]:
    """A model file's metadata, as far as it is needed."""
    limits = [threshold] * probs.shape[1]
    labels = [f"c{c}" for c in range(probs.shape[1])]
    entry = reference.summarise_holdout(probs, limits, groups)
    return {"labels": labels, "thresholds": limits, "holdout": entry}


@given(st.integers(0, 10**6), st.integers(0, 700), st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_counts_are_those_of_a_plain_loop(seed: int, rows: int, bins: list[int]) -> None:
    draw = np.random.default_rng(seed)
    probs = np.round(draw.uniform(0, 1, (rows, len(bins))), 2).astype(np.float32)
    edges = [np.unique(np.round(draw.uniform(0, 1, b), 2)) for b in bins]
    limits = np.round(draw.uniform(0, 1, len(bins)), 2)
    counts = AnswerCounts(limits, edges)
    for row in probs:
        counts.add(row)
    answered = [row.astype(float) for row in probs]
    assert counts.films == len(answered)
    for c, each in enumerate(edges):
        found = [sum(float(row[c]) >= edge for edge in each) for row in answered]
        assert counts.bins[c].tolist() == [found.count(b) for b in range(len(each) + 1)]
        assert counts.positives[c] == sum(float(row[c]) >= limits[c] for row in answered)


def test_false_alarms_are_rarer_than_the_level() -> None:
    """50 tables of the same kind of films as the hold-out, patients of four films, no manifest, ten classes: at level
    0.01 at most 3 lines (more by chance: p 0.002); tests that took films for independent would give far more."""
    alarms = naive = 0
    for seed in range(50):
        info = info_of(*films(2 * seed, 60, 4, 10))
        line, _ = watched(info, films(2 * seed + 1, 60, 4, 10)[0])
        alarms += "differ" in line and not line.startswith("no class")
        info["holdout"]["effective_films"] = 240
        line, _ = watched(info, films(2 * seed + 1, 60, 4, 10)[0])
        naive += "differ" in line and not line.startswith("no class")
    assert alarms <= 3
    assert naive >= 6


def test_a_class_that_moved_is_named_and_no_other() -> None:
    probs, groups = films(1, 200, 1, 4)
    new, _ = films(2, 300, 1, 4)
    new[:, 2] = films(3, 300, 1, 1, mean=0.5)[0][:, 0]
    line, record = watched(info_of(probs, groups), new)
    here, there = (np.mean(np.float32(x[:, 2]) >= 0.4) for x in (new, probs))
    assert line == (
        "1 of 4 classes differs from the hold-out by more than chance (300 films against 200): "
        f"c2 positive in {here:.1%} (hold-out {there:.1%})"
    )
    assert [row["differs"] for row in record["classes"]] == [False, False, True, False]
    row = record["classes"][2]
    assert row["share"] == pytest.approx(here)
    assert row["holdout_share"] == pytest.approx(there)
    assert sum(row["counts"]) == 300
    assert sum(row["holdout_counts"]) == 200
    assert record["effective_films"] == 300
    assert record["holdout"] == {"films": 200, "groups": 200, "effective_films": 200}


def test_a_distribution_that_moved_below_the_threshold_is_told_by_its_edge() -> None:
    probs, groups = films(1, 400, 1, 1)
    moved = probs * np.where(probs < 0.3, 0.5, 1)
    line, record = watched(info_of(probs, groups), moved)
    assert record["classes"][0]["p_share"] == 1
    assert "c0 at 0." in line
    assert "or more in" in line


def test_more_classes_than_a_line_holds() -> None:
    probs, groups = films(1, 200, 1, 6)
    line, record = watched(info_of(probs, groups), films(2, 200, 1, 6, mean=0.7)[0])
    assert line.startswith("6 of 6 classes differ from the hold-out by more than chance")
    assert line.count("(hold-out") == 3
    assert line.endswith("; and 3 more")
    assert all(row["differs"] for row in record["classes"])


def test_few_films_tell_nothing() -> None:
    probs, groups = films(1, 200, 1, 2)
    line, record = watched(info_of(probs, groups), [np.array([0.99, 0.99])] * (FEW - 1))
    assert line == ("too few films to compare with the hold-out: 30 of different patients are needed; there are 29")
    assert "differs" not in record["classes"][0]
    assert record["classes"][0]["share"] == 1
    line, _ = watched(info_of(probs, ["one patient"] * 200), probs)
    assert line == (
        "the hold-out has too few films to compare with: 30 of different patients are needed; there are 200, which "
        "count as 1 because several may be of one patient"
    )
    line, _ = watched(info_of(probs[:0], []), probs)
    assert line.startswith("the hold-out has too few films to compare with: 30 ")
    assert line.endswith("there are 0")
    line, record = watched(info_of(probs, groups), [])
    assert line.startswith("too few films to compare with the hold-out")
    assert record["classes"][0]["share"] is None


def test_groups_of_a_manifest_weaken_what_films_say() -> None:
    probs, groups = films(1, 200, 1, 1)
    new, names = films(2, 40, 10, 1)
    _, record = watched(info_of(probs, groups), new, names)
    assert (record["films"], record["effective_films"]) == (400, 40)
    _, record = watched(info_of(probs, groups), new, [""] * 400)
    assert record["effective_films"] == 400
    dependent = info_of(*films(1, 50, 4, 1))
    _, record = watched(dependent, new, [str(i) for i in range(400)])  # never more than the hold-out's
    assert record["effective_films"] == 100


def test_a_file_without_a_summary_of_a_hold_out_says_so() -> None:
    info = {"labels": ["a", "b"], "thresholds": [0.5, 0.2]}
    line, record = watched(info, [np.array([0.5, 0.1]), None, np.array([0.04, 0.3])])
    assert line == "not compared with the hold-out: the model file keeps no summary of one for its thresholds"
    assert (record["films"], "holdout" in record, "test" in record) == (2, False, False)
    assert record["classes"][0] == {
        "class": "a",
        "positives": 1,
        "share": 0.5,
        "edges": [k / 20 for k in range(1, 20)],
        "counts": [1, *[0] * 9, 1, *[0] * 9],
    }
    assert comparison.TEST.count("0.01") == 1


def with_unlikeness(info: dict[str, Any], films: int = 500, groups: int = 400) -> dict[str, Any]:
    """The metadata with an unlikeness whose quantiles are those of the square of a uniform variable, of which 1 % is
    over 1."""
    values = np.linspace(0, 1, 101) ** 2 / 0.99**2
    return info | {"unlikeness": {"films": films, "groups": groups, "quantiles": values.tolist()}}


def unlike(values: Iterable[float], answered: bool = True) -> list[Result]:
    """Films of these unlikenesses, refused where not answered."""
    probs = np.float32([0.5, 0.5]) if answered else None
    return [Result(path="a", probabilities=probs, reason="" if answered else "unlike", unlikeness=x) for x in values]


def test_unlikeness_is_compared_with_the_training_films() -> None:
    """Also where the file has no summary of a hold-out, and of films that were refused."""
    info = with_unlikeness({"labels": ["a", "b"], "thresholds": [0.6, 0.6]})
    draw = np.random.default_rng(0).random(300) ** 2 / 0.99**2
    shift = ShiftWatch(info, HERE)
    assert len(list(shift.count(unlike(draw)))) == 300
    record = shift.compare([])
    same = record["unlikeness"]
    assert record["line"] == "not compared with the hold-out: the model file keeps no summary of one for its thresholds"
    assert (same["films"], same["over_1"], same["differs"]) == (300, (draw > 1).sum(), False)
    assert len(same["edges"]) == 20
    assert sum(same["training_shares"]) == pytest.approx(1)
    assert sum(same["counts"]) == 300
    assert max(abs(a / 300 - b) for a, b in zip(same["counts"], same["training_shares"], strict=True)) < 0.05

    shift = ShiftWatch(info, HERE)
    assert len(list(shift.count([*unlike(draw[:250]), *unlike([1.7] * 50, answered=False)]))) == 300
    record = shift.compare([])
    assert record["films"] == 250
    assert record["unlikeness"]["differs"]
    over = (50 + (draw[:250] > 1).sum()) / 300
    assert record["line"].endswith(f"; unlikeness over 1 in {over:.1%} (training films 1.0%)")


def test_few_unlike_films_tell_nothing_and_all_tests_share_one_level() -> None:
    probs, groups = films(1, 200, 1, 2)
    info = with_unlikeness(info_of(probs, groups))
    shift = ShiftWatch(info, HERE)
    rows = [Result(path="a", probabilities=np.float32(p), unlikeness=1.2) for p in films(2, 100, 1, 2)[0]]
    assert list(shift.count(rows[:20])) == rows[:20]
    assert "differs" not in shift.compare([])["unlikeness"]
    assert list(shift.count(rows[20:])) == rows[20:]
    record = shift.compare([])
    assert record["line"] == (
        "no class differs from the hold-out by more than chance (100 films against 200); "
        "unlikeness over 1 in 100.0% (training films 1.0%)"
    )
    few = ShiftWatch(with_unlikeness(info_of(probs, groups), films=500, groups=FEW - 1), HERE)
    assert list(few.count(rows)) == rows
    assert "differs" not in few.compare([])["unlikeness"]


@pytest.mark.parametrize(
    "entry", [{}, {"films": 3}, {"films": 9, "groups": 3, "quantiles": [1] * 100}, {"films": 2, "groups": 3}]
)
def test_damaged_unlikeness_is_one_line(entry: dict[str, Any]) -> None:
    info = {"labels": ["a"], "thresholds": [0.5], "unlikeness": {"quantiles": [1] * 101} | entry}
    with pytest.raises(InputError, match="unlikeness has no 101 rising quantiles"):
        ShiftWatch(info, HERE)
