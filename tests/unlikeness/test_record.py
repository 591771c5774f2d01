"""From a cache to a run folder and back; the films least like the others."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cxr_fast.activations.cache import open_cache
from cxr_fast.activations.encoder import load_recorded
from cxr_fast.cli.cache.outcome import echo_outcome
from cxr_fast.config import SweepSpec
from cxr_fast.errors import InputError
from cxr_fast.training.dataset import read
from cxr_fast.training.run_folder import read_info, read_run
from cxr_fast.training.run_record import read_record
from cxr_fast.unlikeness import distance
from cxr_fast.unlikeness.features import find_source, norm_features, pool_activations, read_features
from cxr_fast.unlikeness.oddest import describe_measure, describe_oddest, rank_oddest, share_over
from cxr_fast.unlikeness.record import find_oddest, read_unlikeness, write_unlikeness


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toys have some seventy films."""
    monkeypatch.setattr(distance, "LEAST_FILMS", 20)


@pytest.mark.parametrize("name", ["toy_cache", "toy_cache_average"])
def test_features_are_those_of_the_plain_view(name: str, request: pytest.FixtureRequest) -> None:
    cache = open_cache(request.getfixturevalue(name))
    source = find_source(load_recorded(cache.meta).visual, cache.meta["spec"]["unfreeze_blocks"])
    rows = np.flatnonzero(cache.ok)[::-3]
    found = read_features(cache, rows, source)
    for row, features in zip(rows, found, strict=True):
        tokens = np.asarray(cache.activations[row][0], np.float64)
        np.testing.assert_allclose(features, tokens[0] if source.class_token else tokens.mean(axis=0), rtol=1e-5)
    assert source.class_token == (name == "toy_cache")
    assert source.text == ("class token before block 4" if source.class_token else "mean of the tokens before block 6")


def test_an_embedding_is_its_own_feature(toy_cache: Path) -> None:
    visual = load_recorded(open_cache(toy_cache).meta).visual
    source = find_source(visual, 0)
    rows = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float16)
    assert (source.block, source.text) == (None, "embedding")
    np.testing.assert_array_equal(pool_activations(rows, source), rows.astype(np.float32))
    assert norm_features(rows).std(axis=1) == pytest.approx(1, abs=1e-6)


def test_a_run_folder_gives_back_what_was_written(toy_cache: Path, tmp_path: Path, few: None) -> None:
    cache = open_cache(toy_cache)
    visual, rows = load_recorded(cache.meta).visual, np.flatnonzero(cache.ok)
    groups = [cache.header.groups[row] for row in rows]
    (folder := tmp_path / "run").mkdir()
    record = json.loads(json.dumps(write_unlikeness(folder, cache, visual, rows, groups)))
    assert (record["films"], record["groups"], len(record["quantiles"])) == (len(rows), len(set(groups)), 101)
    assert record["quantiles"][99] == pytest.approx(1, abs=1e-6)
    info = {"unlikeness": record, "cache": {"spec": cache.meta["spec"]}}
    kept = read_unlikeness(folder, info, visual)
    assert kept is not None
    values = kept.distance.measure(read_features(cache, rows, kept.source))
    assert values.max() < record["quantiles"][100]
    again = write_unlikeness(folder, cache, visual, rows, groups)
    assert again == record, "the same films give the same to the last bit"


def test_too_few_films_leave_a_line_and_no_file(toy_run: Path, tmp_path: Path) -> None:
    record = read_record(toy_run)
    reason = record.unlikeness["skipped"]  # type: ignore[index]
    assert reason.startswith("no unlikeness: ")
    assert reason.endswith("and it needs 100 of 5.")
    assert not (toy_run / distance.FILE).exists()
    assert read_run(toy_run).unlikeness is None
    earlier = {key: value for key, value in read_info(toy_run).items() if key != "unlikeness"}
    assert read_unlikeness(toy_run, earlier, None) is None
    assert describe_measure(None) == ""
    assert describe_measure(record.unlikeness).endswith(f"({reason.rstrip('.')}).")  # type: ignore[arg-type]


def test_the_oddest_films_are_named(toy_cache: Path, few: None, capsys: pytest.CaptureFixture[str]) -> None:
    cache = open_cache(toy_cache)
    visual = load_recorded(cache.meta).visual
    found = find_oddest(cache, visual)
    assert len(found) == 5
    assert [value for _, value in found] == sorted((value for _, value in found), reverse=True)
    assert found[0][1] > 1
    assert {name for name, _ in found} <= set(np.array(cache.header.images)[cache.ok])
    outcome = SimpleNamespace(reused=1, encoded=0, seconds=0.0, notes=(), noted=(), failed=())
    echo_outcome(outcome, toy_cache, visual)
    told = capsys.readouterr().out.splitlines()
    assert told[-6].startswith("least like the others")
    assert told[-5:] == [f"  {line}" for line in describe_oddest(found)]


def test_of_too_few_films_none_is_odd(toy_cache: Path) -> None:
    cache = open_cache(toy_cache)
    with pytest.raises(InputError, match="needs 100 of 5"):
        find_oddest(cache, load_recorded(cache.meta).visual)


def test_films_without_an_unlikeness_are_left_out() -> None:
    assert rank_oddest("abc", [0.5, None, 1.5]) == [("c", 1.5), ("a", 0.5)]
    assert share_over([0.5, None, 1.5]) == 0.5
    assert share_over([None]) is None


def test_a_sweep_says_that_films_are_too_few(toy_cache: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def lines() -> list[str]:
        spec = SweepSpec(epochs=(1,), folds=2)
        return [note for note in read(toy_cache, spec).notes if note.startswith("no unlikeness: ")]

    assert lines() == []
    monkeypatch.setattr(distance, "LEAST_FILMS", 100)
    assert len(lines()) == 1
