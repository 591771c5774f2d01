"""What no reader could see: the changed films against Pillow and plain loops."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cxr_fast.config import FILM_CHANGES, PreprocessSpec
from cxr_fast.data.images import load, resize
from cxr_fast.errors import ImageError
from cxr_fast.export import film_changes

SPEC = PreprocessSpec(size=32)


def film(seed: int, height: int = 70, width: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


@given(st.integers(0, 50), st.integers(1, 40), st.integers(1, 40))
def test_a_moved_film_pixel_by_pixel(seed: int, height: int, width: int) -> None:
    grey = film(seed, height, width)
    moved = film_changes.move_by_one_pixel(grey)
    for y in range(height):
        for x in range(width):
            assert moved[y, x] == grey[y, max(x - 1, 0)]


def test_a_film_as_jpeg_is_what_a_file_of_it_holds(tmp_path: Path) -> None:
    grey = film(1)
    Image.fromarray(grey, "L").save(tmp_path / "film.jpg", quality=95)
    found = film_changes.save_as_jpeg(grey)
    np.testing.assert_array_equal(found, np.array(Image.open(tmp_path / "film.jpg")))
    assert 0 < np.abs(found.astype(int) - grey).mean() < 3
    assert np.abs(film_changes.save_as_jpeg(grey, 30).astype(int) - grey).mean() > 5


def test_a_side_that_no_jpeg_holds_stays_as_it_is() -> None:
    grey = film(2, 2, film_changes.MOST + 1)
    assert film_changes.save_as_jpeg(grey) is grey
    film_changes.save_as_jpeg(grey[:, :-1])


@pytest.mark.parametrize("kind", ["png", "deep", "colour"])
def test_the_changes_are_made_on_the_grey_picture_at_full_size(tmp_path: Path, kind: str) -> None:
    """Of a 16 bit and of a colour file too; the plain pixels are those that `load` gives."""
    grey = film(3)
    path = tmp_path / "film.png"
    if kind == "deep":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    else:
        Image.fromarray(np.stack([grey] * 3, axis=-1) if kind == "colour" else grey).save(path)
    found = film_changes.load_changed(path, SPEC)
    plain = load(path, SPEC)
    np.testing.assert_array_equal(found.pixels, plain.pixels)
    assert found.sha256 == plain.sha256
    assert list(found.changed) == list(FILM_CHANGES)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", quality=95)
    np.testing.assert_array_equal(found.changed["jpeg_95"], resize(np.array(Image.open(buffer)), SPEC))
    moved = np.concatenate([grey[:, :1], grey[:, :-1]], axis=1)
    np.testing.assert_array_equal(found.changed["one_pixel"], resize(moved, SPEC))


def test_a_dicom_file_is_changed_by_its_grey_picture() -> None:
    from pydicom.data import get_testdata_file

    path = str(get_testdata_file("CT_small.dcm"))
    found, plain = film_changes.load_changed(path, SPEC), load(path, SPEC)
    np.testing.assert_array_equal(found.pixels, plain.pixels)
    assert all((found.changed[name] != plain.pixels).any() for name in FILM_CHANGES)


def test_what_cannot_be_read_is_an_image_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError):
        film_changes.load_changed(tmp_path / "gone.png", SPEC)
