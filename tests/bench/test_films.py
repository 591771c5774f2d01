"""Phantoms at acquisition size, copies that take turns, and images evenly spread."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_fast.bench import films
from cxr_fast.config import PreprocessSpec
from cxr_fast.errors import ImageError, InputError


def test_phantoms_are_of_acquisition_size(tmp_path: Path) -> None:
    (path,) = films.draw_films(tmp_path, count=1)
    with Image.open(path) as image:
        assert (image.height, image.width, image.mode) == (*films.FILM, "L")


def test_copies_take_turns(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for name, level in (("a.png", 10), ("b.png", 200)):
        Image.new("L", (40, 40), level).save(tmp_path / "in" / name)
    manifest = films.copy_films(tmp_path / "out", tmp_path / "in", 5)
    levels = [int(np.asarray(Image.open(manifest.path(i)))[0, 0]) for i in range(5)]
    assert levels == [10, 200, 10, 200, 10]


def test_the_users_images_or_phantoms_that_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(films, "FILM", (40, 30))
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    with films.sample_images(tmp_path) as paths:
        assert paths == [str(tmp_path / "a.png")]
    with films.sample_images(None) as paths:
        assert [Path(path).is_file() for path in paths] == [True] * 6
    assert not any(Path(path).exists() for path in paths)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="a folder without images"), films.sample_images(tmp_path / "empty"):
        pass


@pytest.mark.parametrize(("total", "count"), [(1, 1), (1, 9), (5, 9), (100, 7), (100, 1)])
def test_places_are_evenly_spread(total: int, count: int) -> None:
    places = films.spread_evenly(total, count)
    assert len(places) == min(total, count)
    assert places[0] == 0
    assert count == 1 or places[-1] == total - 1
    steps = np.diff(places)
    assert not len(steps) or steps.max() - steps.min() <= 1


def test_what_cannot_be_read_is_told_apart(tmp_path: Path) -> None:
    Image.new("L", (40, 40), 9).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"none")
    paths, spec = [tmp_path / "b.png", tmp_path / "a.png"], PreprocessSpec(size=16)
    bad, good = films.decode_all(paths, spec)
    assert isinstance(bad, ImageError)
    assert not isinstance(good, ImageError)
    assert good[0].shape == (16, 16)
    assert list(films.readable(paths, spec)) == [1]
