"""One picture saved twice is found under another patient, and two pictures are not taken for one."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter

from cxr_fast.activations import build
from cxr_fast.activations.cache import Cache, open_cache
from cxr_fast.activations.encoder import with_size
from cxr_fast.activations.job import CacheJob
from cxr_fast.config import CacheSpec
from cxr_fast.data.manifest import read_dataset
from cxr_fast.models import backbone
from cxr_fast.review import near_twins as module
from cxr_fast.review.near_twins import LEAST, Twins, correlation, find_twins, near_twins, write_near_twins
from cxr_fast.training.predictions import Saved

Change = Callable[[Image.Image], Image.Image]


def as_jpeg(image: Image.Image, path: Path, quality: int = 90) -> None:
    image.save(path, "JPEG", quality=quality)


def window(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=float)
    low, high = np.percentile(values, [3, 97])
    return Image.fromarray(np.clip((values - low) / (high - low) * 255, 0, 255).astype(np.uint8))


CHANGES: dict[str, Change] = {
    "jpeg": lambda image: image,
    "size": lambda image: image.resize((150, 130), Image.Resampling.BICUBIC),
    "window": window,
    "gamma": lambda image: image.point([round(255 * (value / 255) ** 0.6) for value in range(256)]),
    "cut": lambda image: image.crop((4, 4, image.width - 4, image.height - 4)),
}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 films of 128 pixels with one chest's coarse shape and a texture of their own.

    Phantoms will not do: their anatomy is drawn alike, and two of them correlate as one film does with itself.
    """
    out = tmp_path_factory.mktemp("films")
    random, (y, x) = np.random.default_rng(0), np.mgrid[-1:1:128j, -1:1:128j]
    lungs = np.exp(-(((np.abs(x) - 0.45) / 0.3) ** 2) - (y / 0.6) ** 2)
    for i in range(24):
        texture = gaussian_filter(random.normal(size=(128, 128)), 3)
        film = np.clip(170 - 110 * lungs + 30 * texture / texture.std(), 0, 255).astype(np.uint8)
        Image.fromarray(film).save(out / f"{i:02d}.png")
    return out


@pytest.fixture(scope="module")
def cached(films: Path, lively_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The films, each its own patient, and one film five times more under other patients; in a cache."""
    folder = tmp_path_factory.mktemp("twins")
    names = sorted(films.iterdir())
    rows = [[f"{i}.png", f"p{i}", i % 2] for i in range(len(names))]
    for i, name in enumerate(names):
        shutil.copy(name, folder / f"{i}.png")
    for number, (kind, change) in enumerate(CHANGES.items()):
        with Image.open(names[number]) as image:
            as_jpeg(change(image.convert("L")), folder / f"{kind}.jpg")
        rows.append([f"{kind}.jpg", f"other {kind}", number % 2])
    with Image.open(names[7]) as image:  # the same patient, another label
        as_jpeg(image.convert("L"), folder / "label.jpg", quality=95)
    rows.append(["label.jpg", "p7", 0])
    with open(folder / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "group", "Mass"], *rows])
    tower = backbone.load(str(lively_weights))
    spec = with_size(CacheSpec(weights=str(lively_weights), views=("plain",)), tower)
    job = CacheJob(
        manifest=read_dataset(folder / "manifest.csv"),
        backbone=tower,
        spec=spec,
        out=folder / "twins.h5",
        device="cpu",
        workers=1,
    )
    build.run(job)
    return folder / "twins.h5"


def saved_of(cache: Cache) -> Saved:
    """Predictions of all films; the copies lie in fold 1 and the first film in the hold-out, all others in fold 0."""
    header, count = cache.header, len(cache.header.images)
    fold = np.array([1 if name.endswith(".jpg") else 0 for name in header.images])
    fold[header.images.index("0.png")] = -1
    arrays = {name: np.array(values) for name, values in (("image", header.images), ("group", header.groups))}
    arrays |= {"sha256": np.array(cache.sha256), "labels": header.labels, "fold": fold}
    return Saved(run={"classes": list(header.classes)}, arrays={**arrays, "study": np.array([""] * count)})


def pairs_of(found: Twins) -> set[tuple[str, str]]:
    return {(twin.a.image, twin.b.image) for twin in found.pairs}


EXPECTED = {("0.png", "jpeg.jpg"), ("1.png", "size.jpg"), ("2.png", "window.jpg"), ("3.png", "gamma.jpg")}
EXPECTED |= {("4.png", "cut.jpg"), ("7.png", "label.jpg")}


def test_a_film_saved_again_under_another_patient_is_found_and_nothing_else(cached: Path, tmp_path: Path) -> None:
    cache, seen = open_cache(cached), []
    found = find_twins(saved_of(cache), cache, progress=lambda done, total: seen.append((done, total)))
    assert pairs_of(found) == EXPECTED
    by_name = {twin.b.image: twin for twin in found.pairs}
    assert by_name["jpeg.jpg"].kind == "other group"
    assert by_name["label.jpg"].kind == "other labels"
    assert by_name["label.jpg"].classes == ("Mass",)
    assert all(twin.correlation is not None and twin.correlation >= LEAST for twin in found.pairs)
    assert (found.held_out, found.between_folds, found.missing) == (1, 5, 0)
    assert seen[-1] == (found.films, found.films)
    assert "1 films of the hold-out have a twin" in found.notes()[1]
    write_near_twins(tmp_path / "near_twins.csv", found)
    with open(tmp_path / "near_twins.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["image_a"], row["image_b"]) for row in rows} == EXPECTED
    row = next(row for row in rows if row["image_b"] == "jpeg.jpg")
    assert (row["part_a"], row["part_b"], row["group_b"], row["same_bytes"]) == ("holdout", "fold 1", "other jpeg", "0")


def test_films_that_are_gone_or_changed_are_said_and_sure_pairs_stay(cached: Path, tmp_path: Path) -> None:
    cache = open_cache(cached)
    nothing = find_twins(saved_of(cache), cache, images=tmp_path)
    assert nothing.missing == nothing.films
    assert ("0.png", "jpeg.jpg") in pairs_of(nothing)
    assert all(twin.correlation is None and twin.cosine >= module.UNSEEN for twin in nothing.pairs)
    assert "were not found, or changed" in nothing.notes()[-1]
    for name in cache.header.images:
        shutil.copy(cached.parent / name, tmp_path / name)
    (tmp_path / "jpeg.jpg").write_bytes((tmp_path / "size.jpg").read_bytes())
    (tmp_path / "size.jpg").write_bytes(b"no film")
    some = find_twins(saved_of(cache), cache, images=tmp_path)
    assert some.missing == 2
    assert {(a, b) for a, b in EXPECTED if b not in ("jpeg.jpg", "size.jpg")} <= pairs_of(some)


def test_the_same_bytes_need_no_film(cached: Path, tmp_path: Path) -> None:
    cache = open_cache(cached)
    at = cache.header.images.index("jpeg.jpg")
    cache.sha256 = (*cache.sha256[:at], cache.sha256[0], *cache.sha256[at + 1 :])
    found = find_twins(saved_of(cache), cache, images=tmp_path)
    (twin,) = (twin for twin in found.pairs if twin.same_bytes)
    assert (twin.correlation, twin.kind) == (1.0, "other group")


def test_a_run_names_its_cache(toy_run: Path, toy_cache: Path) -> None:
    found = near_twins(toy_run)
    assert found.films == 79
    assert found.pairs == near_twins(toy_run, toy_cache).pairs


def test_candidates_are_the_pairs_of_a_slow_search() -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(40, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = random.integers(-1, 2, (40, 2)).astype(np.int8)
    groups = [f"p{number}" for number in random.integers(0, 6, 40)]
    cosines = vectors @ vectors.T
    wanted = set()
    for i in range(40):
        order = [j for j in np.argsort(-cosines[i], kind="stable").tolist() if j != i]
        other = [j for j in order if groups[j] != groups[i]][: module.CANDIDATES]
        against = [
            j
            for j in order[: module.CANDIDATES]
            if any({labels[i, c], labels[j, c]} == {0, 1} for c in range(2))
        ]  # fmt: skip
        wanted |= {(min(i, j), max(i, j)) for j in (*other, *against)}
    assert module._candidates(vectors, labels, groups).keys() == wanted


@settings(max_examples=25)
@given(
    kind=st.sampled_from(sorted(CHANGES)),
    film=st.integers(0, 23),
    quality=st.integers(80, 95),
    swapped=st.booleans(),
)
def test_any_change_keeps_the_correlation_and_another_film_has_little(
    films: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, film: int, quality: int, swapped: bool
) -> None:
    names = sorted(films.iterdir())
    path = tmp_path_factory.mktemp("changed") / "a.jpg"
    with Image.open(names[film]) as image:
        grey = image.convert("L")
        as_jpeg(CHANGES[kind](grey), path, quality)
        a = np.asarray(grey)
    with Image.open(path) as image, Image.open(names[(film + 1) % 24]) as other:
        b, c = np.asarray(image), np.asarray(other.convert("L"))
    pair = (b, a) if swapped else (a, b)
    assert correlation(*pair) >= LEAST > correlation(a, c)


def test_a_film_of_one_grey_is_nobody_s_twin() -> None:
    flat = np.full((50, 40), 90, np.uint8)
    noise = np.random.default_rng(0).integers(0, 255, (50, 40), np.uint8)
    assert correlation(flat, noise) == pytest.approx(0)
    assert correlation(noise, noise) == pytest.approx(1, abs=1e-5)


def test_the_matching_cache_is_needed(cached: Path) -> None:
    cache = open_cache(cached)
    saved = saved_of(cache)
    cache.header = replace(cache.header, images=("x", *cache.header.images[1:]))
    with pytest.raises(Exception, match="lacks 1 of the run's"):
        find_twins(saved, cache)


def test_real_films_of_other_patients_are_no_twins(real_data: Path) -> None:
    with open(real_data / "nih_512" / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    first = list({row["group"]: row["image"] for row in rows}.values())[:20]
    films = []
    for name in first:
        with Image.open(real_data / "nih_512" / name) as image:
            films.append(np.asarray(image.convert("L")))
    found = [correlation(a, b) for i, a in enumerate(films) for b in films[:i]]
    assert max(found) < 0.6
