"""Labels that probability and neighbours speak against come first, in each class by itself, and can be given back."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cxr_fast.data.tables.corrections import read_corrections
from cxr_fast.errors import InputError
from cxr_fast.review import suspects as module
from cxr_fast.review.suspects import positive_shares, suspects, suspicion, write_suspects
from cxr_fast.training import predictions
from cxr_fast.training.run_folder import read_info

NONE = np.nan


def test_shares_count_known_neighbours_only() -> None:
    labels = np.array([[1, -1], [0, -1], [1, 1], [-1, 0]], np.int8)
    near = np.array([[1, 2, 3], [0, 2, -1], [3, -1, -1], [0, 1, 2]])
    found = positive_shares(labels, near)
    np.testing.assert_array_equal(found, [[0.5, 0.5], [1.0, 1.0], [NONE, 0.0], [2 / 3, 1.0]])


def planted(prevalence: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Labels (n, 1) of which 5 % are flipped, probabilities and shares of a fair model, which are flipped, groups."""
    random = np.random.default_rng(seed)
    truth = random.random(1000) < prevalence
    odds = np.where(truth, 2.0, -2.0) + np.log(prevalence / (1 - prevalence)) + random.normal(size=(2, 1000))
    probs, shares = 1 / (1 + np.exp(-odds))
    flipped = random.random(1000) < 0.05
    return (
        (truth ^ flipped).astype(np.int8)[:, None],
        probs[:, None],
        shares[:, None],
        flipped,
        [*map(str, range(1000))],
    )


@pytest.mark.parametrize("prevalence", [0.03, 0.2, 0.5])
def test_flipped_labels_come_first(prevalence: float) -> None:
    labels, probs, shares, flipped, groups = planted(prevalence, 3)
    scores = suspicion(labels, probs, shares, groups)[:, 0]
    first = np.argsort(-scores)[:50]
    assert flipped[first].mean() >= 5 * flipped.mean()
    assert ((scores > 0) & (scores < 1)).all()


def test_a_loss_that_moves_all_probabilities_of_a_class_changes_nothing() -> None:
    labels, probs, shares, _, groups = planted(0.2, 4)
    moved = 1 / (1 + np.exp(-(np.log(probs / (1 - probs)) + 2)))
    np.testing.assert_allclose(
        suspicion(labels, moved, shares, groups), suspicion(labels, probs, shares, groups), atol=1e-6
    )


def test_what_is_unknown_is_left_out_and_one_voice_is_enough() -> None:
    labels = np.array([[1], [-1], [0], [1], [0]], np.int8)
    probs = np.array([[0.1], [0.1], [NONE], [NONE], [0.2]])
    shares = np.array([[NONE], [0.5], [0.9], [NONE], [0.1]])
    found = suspicion(labels, probs, shares, [*"abcde"])[:, 0]
    assert np.isnan(found).tolist() == [False, True, False, True, False]
    assert found[0] > 0.5 < found[2]
    assert found[4] < 0.5


def test_every_class_has_its_own_ranking_and_both_sides(toy_run: Path, toy_cache: Path) -> None:
    found = suspects(toy_run, toy_cache, side=3)
    saved = predictions.read(toy_run, info := read_info(toy_run))
    probs = module.own_probabilities(saved)
    for c, name in enumerate(info["classes"]):
        own = [each for each in found if each.name == name]
        labels = saved.arrays["labels"][:, c]
        assert Counter(each.label for each in own) == Counter(
            {side: min(3, count) for side in (0, 1) if (count := int((labels == side).sum()))}
        )
        assert [each.rank for each in own] == list(range(1, len(own) + 1))
        assert [each.score for each in own] == sorted((each.score for each in own), reverse=True)
        for each in own:
            assert labels[each.place] == each.label
            assert each.image == saved.arrays["image"][each.place]
            assert each.probability == pytest.approx(float(probs[each.place, c]))
            assert (each.part == "holdout") == (saved.arrays["fold"][each.place] == -1)
    assert [each.rank for each in found] == sorted(each.rank for each in found)
    held = saved.arrays["fold"] == -1
    np.testing.assert_allclose(probs[held], saved.part("holdout").probs)
    np.testing.assert_allclose(probs[~held], saved.part("out_of_fold").probs)


def test_the_table_is_one_of_corrections_once_it_is_marked(toy_run: Path, toy_cache: Path, tmp_path: Path) -> None:
    found = suspects(toy_run, side=2)  # the cache that the run names
    write_suspects(tmp_path / "suspects.csv", found)
    with pytest.raises(InputError, match="no row has a mark"):
        read_corrections(tmp_path / "suspects.csv")
    with open(tmp_path / "suspects.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found)
    assert rows[0]["cache_row"] == str(found[0].row)
    rows[0]["mark"], rows[1]["mark"] = "flip", "keep"
    with open(tmp_path / "marked.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    first, second = read_corrections(tmp_path / "marked.csv").marks
    assert (first.sha256, first.name, first.label) == (found[0].sha256, found[0].name, found[0].label)
    assert (first.mark, second.mark) == ("flip", "keep")
