"""Who is in which part, whose probabilities count there, and studies against a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.errors import InputError
from cxr_fast.metrics import calibration as calibrate
from cxr_fast.training import predictions
from tests.helpers import made


def read(found: dict[str, np.ndarray], **changes: Any) -> predictions.Saved:
    return predictions.Saved(run=made.description(found["labels"].shape[1], **changes), arrays=found)


@pytest.mark.parametrize("kind", ["best-fold", "refit", "ensemble"])
def test_each_part_has_its_images_and_its_models(kind: str) -> None:
    found = made.arrays()
    run, fold = read(found, final={"kind": kind}), found["fold"]
    trained = (fold >= 0) & (fold != 1) if kind == "best-fold" else fold >= 0
    budget = 1
    expected = {
        "train": (trained, found["final"]),
        "out_of_fold": (fold >= 0, found["out_of_fold"][budget]),
        "holdout": (fold == -1, found["final"]),
    }
    for name, (rows, probs) in expected.items():
        part = run.part(name)
        np.testing.assert_array_equal(part.probs, probs[rows])
        np.testing.assert_array_equal(part.labels, found["labels"][rows])
        for column in predictions.COLUMNS:
            np.testing.assert_array_equal(part.columns[column], found[column][rows])
    other = read(found, spec={"split_by": "image"})
    for name in ("out_of_fold", "holdout"):
        assert "other images of their groups were trained on" in other.part(name).of
        assert "other images" not in run.part(name).of
    assert "3 models are mixed" in run.part("out_of_fold").of
    assert ("new to one of its members" in run.part("train").of) == (kind == "ensemble")


def test_probabilities_are_calibrated() -> None:
    found = made.arrays()
    dev = found["fold"] >= 0
    calibration = calibrate.fit(found["labels"][dev], found["out_of_fold"][1][dev], "platt")
    part = read(found, calibration=calibration).part("holdout")
    raw = found["final"][~dev]
    np.testing.assert_array_equal(part.probs, calibrate.apply(calibration, raw))
    assert (part.probs != raw).any()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.sampled_from(["mean", "max"]))
def test_studies_are_a_plain_loop(seed: int, pool: Any) -> None:
    random = np.random.default_rng(seed)
    found = made.arrays(40, 3, seed=seed, views=4)
    # Study names are a patient's own, some images have none, and views do not lie beside each other.
    found["study"] = random.choice(["a", "b", ""], 40)
    order = random.permutation(40)
    found = {name: values[:, order] if name == "out_of_fold" else values[order] for name, values in found.items()}
    images = read(found).part("holdout")
    studies = images.studies(pool)
    groups: dict[tuple[str, ...], list[int]] = {}
    for i in range(len(images.labels)):
        group, study, image = (images.columns[name][i] for name in ("group", "study", "image"))
        groups.setdefault((group, study) if study else (group, "", image), []).append(i)
    assert len(studies.labels) == len(groups)
    for row, members in enumerate(groups.values()):
        assert studies.columns["group"][row] == images.columns["group"][members[0]]
        for c in range(3):
            seen, probs = images.labels[members, c], images.probs[members, c].astype(np.float64)
            assert studies.labels[row, c] == (1 if (seen == 1).any() else 0 if (seen == 0).any() else -1)
            assert studies.probs[row, c] == pytest.approx(probs.mean() if pool == "mean" else probs.max(), abs=1e-12)


def test_a_study_of_one_view_is_that_image() -> None:
    images = read(made.arrays(views=1)).part("holdout")
    for pool in ("mean", "max"):
        studies = images.studies(pool)  # type: ignore[arg-type]
        np.testing.assert_array_equal(studies.probs, images.probs)
        np.testing.assert_array_equal(studies.labels, images.labels)


def test_what_cannot_be_had_is_one_line() -> None:
    with pytest.raises(InputError, match="this run has none"):
        read(made.arrays(holdout=False)).part("holdout")
    found = made.arrays()
    found["final"][np.flatnonzero(found["fold"] == -1)[0]] = np.nan
    with pytest.raises(InputError, match="4 of 120 saved probabilities are NaN"):
        read(found).part("holdout")
    assert len(read(found).part("out_of_fold").labels)


def spoil(name: str) -> dict[str, np.ndarray]:
    found = made.arrays()
    del found[name]
    return found


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (spoil("final"), "holds no final"),
        (spoil("sha256"), "holds no sha256"),
        (made.arrays() | {"labels": np.zeros((7, 4), np.int8)}, r"labels \(7, 4\) is not of this run"),
        (made.arrays() | {"meta:sex": np.array(["F"])}, r"meta:sex \(1,\)"),
        (made.arrays() | {"final": np.zeros((120, 5))}, r"final \(120, 5\)"),
    ],
)
def test_arrays_of_another_run_are_refused(tmp_path: Path, found: dict[str, np.ndarray], said: str) -> None:
    folder = made.write(tmp_path / "run", found)
    with pytest.raises(InputError, match=said) as caught:
        predictions.read(folder, made.description(4))
    assert "\n" not in str(caught.value)
    assert "predictions.npz" in str(caught.value)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"no zip", lambda b: b[:300]])
def test_a_damaged_file_is_one_line(tmp_path: Path, damage: Any) -> None:
    path = made.write(tmp_path / "run") / "predictions.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="cannot be read") as caught:
        predictions.read(tmp_path / "run", made.description(4))
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(InputError, match="is missing; run the sweep again"):
        predictions.read(tmp_path / "run", made.description(4))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([None, "platt", "isotonic"]), st.booleans())
def test_films_are_a_plain_loop(seed: int, kind: str | None, holdout: bool) -> None:
    """Each film once, by the model that did not train on it; decisions as the saved arrays give them."""
    found = made.arrays(24, 3, seed=seed, holdout=holdout)
    dev = found["fold"] >= 0
    fitted = None if kind is None else calibrate.fit(found["labels"][dev], found["out_of_fold"][1][dev], kind)
    run = read(found, calibration=fitted)
    films, limits = run.films(as_text=False), run.run["thresholds"]
    for i, fold in enumerate(found["fold"]):
        raw = found["final"][i] if fold < 0 else found["out_of_fold"][1][i]
        probs = calibrate.apply(fitted, raw[None])[0]
        assert (films["image"][i], films["group"][i]) == (found["image"][i], found["group"][i])
        assert (films["part"][i], films["fold"][i]) == (("holdout", None) if fold < 0 else ("out_of_fold", fold))
        for c, name in enumerate(run.run["classes"]):
            label = found["labels"][i, c]
            assert films[f"{name}_label"][i] == (None if label < 0 else label)
            assert films[f"{name}_probability"][i] == probs[c]
            assert films[f"{name}_decision"][i] == int(probs[c] >= limits[c])
    texts = run.films(as_text=True)
    assert list(texts) == list(films)
    for c, name in enumerate(run.run["classes"]):
        read_back = np.array(list(map(float, texts[f"{name}_probability"])))
        np.testing.assert_array_equal(read_back.astype(np.float32), films[f"{name}_probability"])
        assert [str(int(p >= limits[c])) for p in read_back] == texts[f"{name}_decision"]
        assert texts[f"{name}_label"] == ["" if y is None else str(y) for y in films[f"{name}_label"]]


def test_a_film_without_a_number_has_no_decision() -> None:
    found = made.arrays(24, 2)
    found["final"][:] = np.nan
    found["fold"][0] = -1
    films = read(found).films(as_text=True)
    assert (films["class 0_probability"][0], films["class 0_decision"][0]) == ("", "")
    assert read(found).films(as_text=False)["class 0_decision"][0] is None


def test_films_of_retrained_heads_are_theirs() -> None:
    found = made.arrays(24, 2)
    found["out_of_fold_retrained"] = found["out_of_fold"][1] / 2
    films = read(found, final={"kind": "retrained"}).films(as_text=False)
    dev = found["fold"] >= 0
    np.testing.assert_array_equal(films["class 1_probability"][dev], found["out_of_fold_retrained"][dev, 1])
