"""Thresholds and calibration found on films, scored on films of other groups, class by class."""

from __future__ import annotations

import numpy as np
import pytest

from cxr_fast.data.splits.assign import SplitSpec, split
from cxr_fast.errors import InputError
from cxr_fast.external.recalibration import FOLDS, OldPoint, PointSpec, find_point, refuse_classes
from cxr_fast.metrics import calibration
from cxr_fast.metrics.thresholds import best_f1_thresholds, thresholds_for

NAMES = ("a", "b", "rare", "absent")


def films(count: int = 240, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and raw probabilities (n, 4) of over-confident scores, three films a group; one class rare, one absent."""
    random = np.random.default_rng(seed)
    groups = np.array([f"g{k // 3}" for k in range(count)])
    labels = (random.random((count, 4)) < [0.3, 0.15, 0, 0]).astype(np.int8)
    labels[:6, 2] = 1
    labels[random.random((count, 4)) < 0.05] = -1
    labels[:, 3] = -1
    scores = 1.5 * (labels == 1) + random.normal(1, 1, labels.shape)
    return labels, (1 / (1 + np.exp(-2 * scores))).astype(np.float32), groups


OLD = OldPoint(classes=NAMES, limits=np.array([0.5, 0.4, 0.3, 0.2]), calibration=None)


@pytest.mark.parametrize("target", ["f1", "sensitivity=0.9", "specificity=0.8"])
@pytest.mark.parametrize("kind", ["platt", "isotonic"])
def test_each_film_is_scored_by_what_others_gave(kind: str, target: str) -> None:
    labels, raw, groups = films()
    found = find_point(labels, raw, groups, OLD, PointSpec(target=target, calibration=kind))
    assert found.fitted == ("a", "b")
    assert set(found.refused) == {"rare", "absent"}
    part = split(labels[:, :3], groups.tolist(), SplitSpec(folds=FOLDS, holdout=0.0))

    def plainly(rows: np.ndarray) -> tuple[dict[str, object], np.ndarray]:
        fitted = calibration.fit(labels[rows][:, :2], raw[rows][:, :2], kind)
        assert fitted is not None
        probs = calibration.apply(fitted, raw[rows][:, :2])
        if target == "f1":
            return fitted, best_f1_thresholds(labels[rows][:, :2], probs)
        name, _, value = target.partition("=")
        return fitted, thresholds_for(labels[rows][:, :2], probs, name, float(value))  # type: ignore[arg-type]

    for k in range(FOLDS):
        fitted, limits = plainly(part != k)
        np.testing.assert_array_equal(found.limits[part == k][:, :2], np.tile(limits, (int((part == k).sum()), 1)))
        np.testing.assert_array_equal(found.probs[part == k][:, :2], calibration.apply(fitted, raw[part == k][:, :2]))
    fitted, limits = plainly(np.ones(len(raw), bool))
    np.testing.assert_array_equal(found.thresholds[:2], limits)
    assert found.calibration is not None
    np.testing.assert_array_equal(
        calibration.apply(found.calibration, raw)[:, :2], calibration.apply(fitted, raw[:, :2])
    )
    # What was refused is as before.
    np.testing.assert_array_equal(found.thresholds[2:], OLD.limits[2:])
    np.testing.assert_array_equal(found.limits[:, 2:], np.tile(OLD.limits[2:], (len(raw), 1)))
    np.testing.assert_allclose(found.probs[:, 2:], raw[:, 2:], atol=1e-6)
    np.testing.assert_allclose(calibration.apply(found.calibration, raw)[:, 2:], raw[:, 2:], atol=1e-6)


def test_the_labels_of_a_film_do_not_change_its_own_score() -> None:
    labels, raw, groups = films()
    before = find_point(labels, raw, groups, OLD, PointSpec())
    part = split(labels[:, :3], groups.tolist(), SplitSpec(folds=FOLDS, holdout=0.0))
    row = int(np.flatnonzero((part == 2) & (labels[:, 0] == 1))[0])
    other = int(np.flatnonzero((part == 2) & (labels[:, 0] == 0) & (groups != groups[row]))[0])
    swapped = raw.copy()
    swapped[[row, other]] = raw[[other, row]]
    after = find_point(labels, swapped, groups, OLD, PointSpec())
    np.testing.assert_array_equal(after.limits[part == 2], before.limits[part == 2])
    assert (after.limits[part == 1, 0] != before.limits[part == 1, 0]).any()


def test_it_is_better_calibrated_out_of_sample() -> None:
    labels, raw, groups = films(1200)
    found = find_point(labels, raw, groups, OLD, PointSpec())
    error = [((p[:, 0] - labels[:, 0]) ** 2)[labels[:, 0] >= 0].mean() for p in (raw, found.probs)]
    assert error[1] < 0.7 * error[0]


def test_a_class_that_is_refused_keeps_its_own_map() -> None:
    labels, raw, groups = films()
    own = {"kind": "platt", "fitted": 4, "a": [1.0, 2.0, 3.0, 4.0], "b": [0.0, 0.1, 0.2, 0.3]}
    old = OldPoint(classes=NAMES, limits=OLD.limits, calibration=own)
    found = find_point(labels, raw, groups, old, PointSpec())
    assert found.kind == "platt"
    assert found.calibration is not None
    assert found.calibration["a"][2:] == [3.0, 4.0]
    assert found.calibration["b"][2:] == [0.2, 0.3]
    assert found.calibration["fitted"] == 4
    with pytest.raises(InputError, match="--calibration isotonic: this file is calibrated by platt"):
        find_point(labels, raw, groups, old, PointSpec(calibration="isotonic"))
    kept = find_point(labels, raw, groups, old, PointSpec(calibration="none"))
    assert kept.calibration == own
    np.testing.assert_array_equal(kept.probs, calibration.apply(own, raw))
    assert (kept.thresholds[:2] != OLD.limits[:2]).all()


def test_targets_by_class(tmp_path: object) -> None:
    labels, raw, groups = films()
    table = f"{tmp_path}/targets.csv"
    with open(table, "w", encoding="utf-8") as file:
        file.write("class,target\na,sensitivity=1\nrare,specificity=0.5\n")
    found = find_point(labels, raw, groups, OLD, PointSpec(target=table))
    probs = calibration.apply(found.calibration, raw)
    assert (probs[labels[:, 0] == 1, 0] >= found.thresholds[0]).all()
    assert found.thresholds[2] == OLD.limits[2]
    assert found.target == "sensitivity 1 for a; specificity 0.5 for rare; F1 for all others"
    with open(table, "a", encoding="utf-8") as file:
        file.write("Quux,f1\n")
    with pytest.raises(InputError, match="'Quux' is not a class of this model; its classes: a, b, rare, absent"):
        find_point(labels, raw, groups, OLD, PointSpec(target=table))


def test_too_few_are_refused_with_their_number() -> None:
    labels, raw, groups = films()
    found = refuse_classes(labels, groups, NAMES)
    assert found["rare"] == f"{(labels[:, 2] == 1).sum()} positives in 2 groups"
    few = labels.copy()
    few[:, :2] = 0
    with pytest.raises(InputError, match=r"no class has 10 positives .*a has 0 positives in 0 groups"):
        find_point(few, raw, groups, OLD, PointSpec())
    one_group = np.full(len(groups), "g")
    with pytest.raises(InputError, match="in 1 group"):
        find_point(labels, raw, one_group, OLD, PointSpec())
