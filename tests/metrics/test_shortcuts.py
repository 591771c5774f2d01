"""The audit finds what is planted, agrees with plain loops, and names nothing that is noise."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as sk

from cxr_fast.metrics import shortcuts
from cxr_fast.metrics.intervals import Resampling
from cxr_fast.metrics.shortcuts import ANY, Trait, deal_folds, find_traits, follow, read_aucs, strength


def drawn(n: int = 400, seed: int = 0) -> tuple[np.random.Generator, list[str]]:
    """A generator, and groups of two images each."""
    return np.random.default_rng(seed), [f"p{i // 2}" for i in range(n)]


def test_traits_are_values_that_enough_groups_have() -> None:
    _, groups = drawn(400)
    named = {
        "sex": np.array(["F"] * 150 + ["M"] * 240 + ["unknown"] * 10),
        "site": np.array(["a"] * 200 + ["b"] * 100 + ["c"] * 90 + ["d"] * 10),
        "age": np.array([f"{10 * (i % 8)}-{10 * (i % 8) + 9}" for i in range(400)]),
        "one": np.array(["x"] * 400),
        "rare": np.array(["x"] * 390 + ["y"] * 10),
        "dose": np.array(["up to 5", "over 5"] * 200),
    }
    found = find_traits(named, groups)
    assert [(trait.column, trait.value) for trait in found] == [
        *(("sex", "F"), ("site", "a"), ("site", "b"), ("site", "c"), ("age", "40 and above"), ("dose", "over 5")),
    ]
    assert found[0].present.tolist() == [1] * 150 + [0] * 240 + [-1] * 10
    assert (found[4].present == 1).sum() == 200


def test_folds_hold_whole_groups_and_every_trait() -> None:
    random, groups = drawn()
    traits = [Trait(column="a", value="x", present=np.repeat(random.integers(0, 2, 200), 2).astype(np.int8))]
    folds = deal_folds(traits, groups, 0)
    assert set(folds.tolist()) == set(range(shortcuts.FOLDS))
    assert all(folds[i] == folds[i + 1] for i in range(0, 400, 2))
    share = traits[0].present.mean()
    for fold in range(shortcuts.FOLDS):
        assert traits[0].present[folds == fold].mean() == pytest.approx(share, abs=0.03)
    assert folds.tolist() == deal_folds(traits, groups, 0).tolist()


def test_reading_is_the_mean_auc_of_the_folds_with_an_interval() -> None:
    random, groups = drawn()
    present = np.stack([random.integers(0, 2, 400), random.integers(-1, 2, 400)], axis=1).astype(np.int8)
    traits = [Trait(column="a", value=str(k), present=present[:, k]) for k in range(2)]
    scores = random.normal(size=(400, 2)) + (present == 1) * [3.0, 0.5]
    folds = deal_folds(traits, groups, 0)
    found = read_aucs(traits, scores, folds, groups, Resampling(resamples=200))
    for k, row in enumerate(found):
        each = []
        for fold in range(shortcuts.FOLDS):
            rows = (folds == fold) & (present[:, k] >= 0)
            each.append(sk.roc_auc_score(present[rows, k], scores[rows, k]))
        assert row["auc"] == pytest.approx(np.mean(each), abs=1e-12)
        assert row["low"] < row["auc"] < row["high"]
        assert row["high"] - row["low"] < 0.2


def test_following_is_the_auc_of_the_trait_by_scikit_learn() -> None:
    random, groups = drawn()
    present = random.integers(-1, 2, 400).astype(np.int8)
    labels = np.stack(
        [
            np.where(random.random(400) < np.where(present == 1, 0.7, 0.3), 1, 0),
            random.integers(-1, 2, 400),
            (np.arange(400) < 12).astype(int),
        ],
        axis=1,
    ).astype(np.int8)
    trait = Trait(column="view", value="AP", present=present)
    found = {row["class"]: row for row in follow(trait, labels, groups, ["planted", "noise", "rare"])}
    assert set(found) == {"planted", "noise", ANY}, "a class that 6 groups have says nothing"
    for c, name in enumerate(("planted", "noise")):
        known = (labels[:, c] >= 0) & (present >= 0)
        area = sk.roc_auc_score(labels[known, c], present[known])
        assert found[name]["auc"] == pytest.approx(max(area, 1 - area), abs=1e-12)
        has = known & (present == 1)
        assert found[name]["with"] == pytest.approx((labels[has, c] == 1).mean())
    assert next(iter(found)) == "planted"
    assert found["planted"]["low"] > 0.55
    assert found["noise"]["low"] == 0.5


def test_a_label_that_is_independent_is_rarely_named() -> None:
    random, groups = drawn(300)
    wrong = 0
    for _ in range(100):
        trait = Trait(column="a", value="x", present=np.repeat(random.integers(0, 2, 150), 2).astype(np.int8))
        labels = np.repeat(random.random((150, 10)) < 0.2, 2, axis=0).astype(np.int8)
        rows = follow(trait, labels, groups, [f"c{k}" for k in range(10)])
        wrong += any(row["low"] > 0.5 for row in rows)
    assert wrong <= 10, "95 % for all classes together"


def test_the_strength_is_what_a_label_could_be_told_by() -> None:
    labels = [{"auc": 0.75, "low": 0.6}]
    assert strength({"auc": 1.0, "labels": labels}) == 0.5
    assert strength({"auc": 0.75, "labels": labels}) == 0.25
    assert strength({"auc": 0.4, "labels": labels}) == 0.0
    assert strength({"auc": 1.0, "labels": [{"auc": 0.75, "low": 0.5}]}) == 0.0
    assert strength({"auc": 1.0, "labels": []}) == 0.0


def test_a_class_of_no_finding_is_no_finding() -> None:
    labels = np.array([[1, 0], [0, 1], [0, 0], [-1, 0]], np.int8)
    assert shortcuts._any_finding(labels, ["Mass", "Nodule"])[ANY].tolist() == [1, 1, 0, -1]
    assert shortcuts._any_finding(labels, ["Mass", "Normal"]) == {}, "it equals a class"
