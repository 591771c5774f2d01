"""The distance against its definition, film by film."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.errors import InputError
from cxr_fast.unlikeness import distance
from cxr_fast.unlikeness.distance import Distance, fit_distance, load_distance, quantiles, save_distance, why_not
from cxr_fast.unlikeness.features import EPSILON, norm_features

FILMS, WIDTH = 180, 12


def films(seed: int = 0, count: int = FILMS) -> np.ndarray:
    """Features (N, F) whose first are tied to one another."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((count, WIDTH)) * np.linspace(0.2, 3, WIDTH) + 5
    x[:, 1] += x[:, 0]
    return x.astype(np.float32)


def groups(count: int = FILMS, each: int = 3) -> list[str]:
    return [f"p{i // each}" for i in range(count)]


def slow_covariance(x: np.ndarray) -> np.ndarray:
    """Ledoit and Wolf's covariance of (N, F), written out as in their paper, for features of spread 1."""
    n, width = x.shape
    sample = sum(np.outer(row, row) for row in x) / n
    level = np.trace(sample) / width
    apart = ((sample - level * np.eye(width)) ** 2).sum() / width
    spread = sum(((np.outer(row, row) - sample) ** 2).sum() for row in x) / n**2 / width
    share = min(spread, apart) / apart
    return np.asarray((1 - share) * sample + share * level * np.eye(width))


def slow_distances(train: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """Mahalanobis distances (M,) of `tested` from `train`, by a solve for each film."""

    def norm(rows: np.ndarray) -> np.ndarray:
        return np.array([(r - r.mean()) / np.sqrt(r.var() + EPSILON) for r in rows.astype(np.float64)])

    x, y = norm(train), norm(tested)
    mean, spread = x.mean(axis=0), x.std(axis=0)
    shrunk = slow_covariance((x - mean) / spread)
    shrunk = (1 - distance.IDENTITY) * shrunk + distance.IDENTITY * np.trace(shrunk) / len(shrunk) * np.eye(len(shrunk))
    apart = (y - mean) / spread
    return np.array([np.sqrt(row @ np.linalg.solve(shrunk, row)) for row in apart])


def test_the_distance_is_that_of_the_definition() -> None:
    fitted = fit_distance(films(), groups())
    new = films(1, 20)
    slow = slow_distances(films(), new)
    found = fitted.distance.measure(new)
    np.testing.assert_allclose(found / found[0], slow / slow[0], rtol=1e-4)


def test_one_is_the_99th_percentile_of_films_out_of_fold() -> None:
    fitted = fit_distance(films(), groups())
    assert np.quantile(fitted.out_of_fold, 0.99) == pytest.approx(1)
    folds = distance._deal_folds(groups(), 0)
    names = np.array(groups())
    for fold in range(distance.FOLDS):
        assert set(names[folds == fold]).isdisjoint(names[folds != fold])
        inside = folds == fold
        slow = slow_distances(films()[~inside], films()[inside])
        found = fitted.out_of_fold[inside]
        np.testing.assert_allclose(found / found[0], slow / slow[0], rtol=1e-4)
    assert fitted.out_of_fold.mean() > fitted.distance.measure(films()).mean()  # a film's own fit knows it


@given(st.floats(0.01, 100), st.floats(-50, 50))
def test_neither_scale_nor_level_of_features_counts(factor: float, level: float) -> None:
    fitted = fit_distance(films(), groups())
    new = films(1, 5).astype(np.float64)
    np.testing.assert_allclose(fitted.distance.measure(new * factor + level), fitted.distance.measure(new), rtol=2e-3)


def test_films_unlike_the_others_are_far() -> None:
    fitted = fit_distance(films(), groups())
    other = films(2, 50)[:, ::-1]
    assert fitted.distance.measure(other).min() > 1
    assert (fitted.distance.measure(films(3, 500)) > 1).mean() < 0.03


def test_too_few_films_are_counted() -> None:
    assert why_not(groups()) == ""
    assert why_not(groups(99)) == "no unlikeness: 99 training film(s) of 33 group(s), and it needs 100 of 5"
    assert "of 4 group(s)" in why_not(groups(200, 50))
    with pytest.raises(InputError, match="it needs 100 of 5"):
        fit_distance(films(count=99), groups(99))
    with pytest.raises(InputError, match="all have the same features"):
        fit_distance(np.tile(films()[:1], (FILMS, 1)), groups())


def test_a_feature_that_never_varies_is_no_division_by_zero() -> None:
    x = films()
    x[:, 3:] = np.arange(WIDTH - 3)  # the norm still moves it
    constant = np.concatenate([np.ones((FILMS, 1)), -np.ones((FILMS, 1))] * 3, axis=1)
    constant[:, :2] *= np.linspace(1, 2, FILMS)[:, None]
    for features in (x, constant):
        fitted = fit_distance(features, groups())
        assert np.isfinite(fitted.out_of_fold).all()
        assert np.isfinite(fitted.distance.measure(np.zeros((1, features.shape[1])))).all()


def test_many_films_are_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distance, "MOST", 120)
    assert distance.draw_places(120).tolist() == list(range(120))
    places = distance.draw_places(FILMS)
    assert len(places) == 120
    assert (np.diff(places) > 0).all()


def test_the_file_is_the_distance(tmp_path: Path) -> None:
    (folder := tmp_path / "run").mkdir()
    fitted = fit_distance(films(), groups())
    record = {"sha256": save_distance(folder, fitted.distance)}
    again: Distance = load_distance(folder, record)
    np.testing.assert_array_equal(again.measure(films()), fitted.distance.measure(films()))
    with pytest.raises(InputError, match="not the file that"):
        load_distance(folder, {"sha256": "0" * 64})
    (folder / distance.FILE).unlink()
    with pytest.raises(InputError, match=r"cannot be read.*run the sweep again"):
        load_distance(folder, record)


def test_quantiles_go_from_the_least_to_the_largest() -> None:
    found = quantiles(np.arange(1001.0))
    assert len(found) == 101
    assert (found[0], found[50], found[100]) == (0, 500, 1000)
    assert norm_features(np.zeros((2, 3))).tolist() == [[0, 0, 0], [0, 0, 0]]
