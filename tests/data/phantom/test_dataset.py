"""Phantoms: the same seed gives the same bytes, findings are where they should be, and the folder is Indiana's."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cxr_fast.data.labels import CLASSES, NORMAL, classes_of_headings
from cxr_fast.data.phantom.anatomy import Patient
from cxr_fast.data.phantom.dataset import (
    ALL_CLASSES_FROM,
    FILMS,
    HEADINGS,
    SILENT,
    VIEWS,
    draw,
    sample_films,
    sample_headings,
    write_dataset,
    write_for,
)
from cxr_fast.data.phantom.findings import drawable
from cxr_fast.errors import InputError

REPORT_COLUMNS = ("uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression")
ABNORMAL = tuple(name for name in CLASSES if name != NORMAL)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def film(view: str, *findings: str, seed: int = 0, size: int = 192) -> np.ndarray:
    """A film whose positioning, exposure and grain are the same whatever is planted."""
    patient = Patient.sample(np.random.default_rng([seed, 1]))
    rng = np.random.default_rng([seed, 2])
    return draw(rng, view=view, findings=findings, size=(size, size), patient=patient).astype(np.int16)


def region(image: np.ndarray, left: float, top: float, right: float, bottom: float) -> float:
    """Mean grey of a box given in shares of width and height."""
    h, w = image.shape
    return float(image[int(top * h) : int(bottom * h), int(left * w) : int(right * w)].mean())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom") / "ds"
    write_dataset(out, studies=40, size=32, seed=7)
    return out


# --- one film ---------------------------------------------------------------------------------------------------


def test_every_class_can_be_drawn_and_nothing_else() -> None:
    assert drawable() | {NORMAL} == set(CLASSES)


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (96, 80), (80, 96), (700, 560)])
@pytest.mark.parametrize("view", VIEWS)
def test_size_and_kind(view: str, size: tuple[int, int]) -> None:
    image = draw(np.random.default_rng(0), view=view, size=size)
    assert image.shape == size
    assert image.dtype == np.uint8
    assert image.max() > 220
    assert image.min() < 20


def test_acquisition_size_shows_the_same_body() -> None:
    large = draw(np.random.default_rng(3), size=(2400, 2000))
    small = draw(np.random.default_rng(3), size=(240, 200))
    assert large.shape == (2400, 2000)
    shrunk = np.asarray(Image.fromarray(large).resize((200, 240), Image.Resampling.BOX), dtype=np.float32)
    assert np.abs(shrunk - small).mean() < 6


@pytest.mark.parametrize("view", VIEWS)
def test_lungs_are_dark_and_the_belly_is_bright(view: str) -> None:
    for seed in range(5):
        image = film(view, seed=seed)
        lung = region(image, 0.25, 0.25, 0.35, 0.5) if view == "Frontal" else region(image, 0.58, 0.55, 0.65, 0.65)
        assert lung + 60 < region(image, 0.3, 0.85, 0.6, 0.95)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    view=st.sampled_from(VIEWS),
    findings=st.lists(st.sampled_from(CLASSES), max_size=9),
)
def test_the_same_seed_draws_the_same_pixels(seed: int, view: str, findings: list[str]) -> None:
    def once(names: list[str]) -> np.ndarray:
        return draw(np.random.default_rng(seed), view=view, findings=names, size=(40, 40))

    assert np.array_equal(once(findings), once(findings[::-1] + findings))


@pytest.mark.parametrize("name", ABNORMAL)
@pytest.mark.parametrize("view", VIEWS)
def test_every_finding_shows_in_both_views(view: str, name: str) -> None:
    for seed in range(3):
        changed = np.abs(film(view, name, seed=seed) - film(view, seed=seed)) > 10
        assert 0.0005 < changed.mean() < 0.6, f"{name} changes {changed.mean():.2%} of a {view} film"


def test_normal_plants_nothing() -> None:
    assert np.array_equal(film("Frontal", NORMAL), film("Frontal"))


# A box (left, top, right, bottom) of the frontal film, and whether it gets brighter on most patients.
WHERE = {
    "Cardiomegaly": ((0.68, 0.55, 0.73, 0.68), True),
    "Cardiac Shadow (abnormal)": ((0.33, 0.55, 0.39, 0.65), True),
    "Pleural Effusion": ((0.80, 0.66, 0.84, 0.75), True),
    "Pneumothorax": ((0.15, 0.3, 0.22, 0.5), False),
    "Emphysema": ((0.24, 0.3, 0.4, 0.6), False),
    "Hyperinflation": ((0.25, 0.71, 0.4, 0.75), False),
    "Mass": ((0.25, 0.4, 0.33, 0.5), True),
    "Consolidation": ((0.26, 0.28, 0.34, 0.38), True),
    "Lesion": ((0.7, 0.48, 0.78, 0.58), True),
    "Calcinosis": ((0.57, 0.43, 0.63, 0.5), True),
    "Volume Loss": ((0.62, 0.68, 0.75, 0.72), True),
    "Edema": ((0.3, 0.45, 0.4, 0.55), True),
    "Kyphosis": ((0.45, 0.0, 0.55, 0.06), True),
    "Interstitial Lung Disease": ((0.2, 0.5, 0.35, 0.62), True),
    "Thickening": ((0.29, 0.15, 0.38, 0.18), True),
}


@pytest.mark.parametrize("name", sorted(WHERE))
def test_findings_sit_where_they_belong(name: str) -> None:
    box, brighter = WHERE[name]
    change = np.mean([region(film("Frontal", name, seed=s) - film("Frontal", seed=s), *box) for s in range(6)])
    assert change > 4 if brighter else change < -4


def test_a_finding_keeps_its_place_on_another_film_of_the_patient() -> None:
    patient = Patient.sample(np.random.default_rng(5))
    peaks = []
    for film_seed in (1, 2):
        with_mass, without = (
            draw(np.random.default_rng(film_seed), findings=f, size=(128, 128), patient=patient).astype(int)
            for f in (["Mass"], [])
        )
        peaks.append(np.argwhere(with_mass - without > 20).mean(axis=0))
    assert np.abs(peaks[0] - peaks[1]).max() < 12


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"view": "Oblique"}, "Oblique.*Frontal, Lateral"),
        ({"findings": ["Plague", "Mass"]}, "cannot draw Plague"),
        ({"size": (8, 64)}, "--size"),
        ({"size": (9000, 64)}, "--size"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        draw(np.random.default_rng(0), **arguments)


# --- headings ---------------------------------------------------------------------------------------------------


def test_every_heading_means_something_and_the_silent_ones_nothing() -> None:
    assert all(NORMAL not in classes_of_headings(heading) for heading, _ in HEADINGS)
    assert all(classes_of_headings(heading) == (NORMAL,) for heading, _ in SILENT)
    assert {c for heading, _ in HEADINGS for c in classes_of_headings(heading)} == set(ABNORMAL)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), studies=st.integers(1, 400))
def test_headings_hold_every_class_and_never_repeat(seed: int, studies: int) -> None:
    fields = sample_headings(np.random.default_rng(seed), studies)
    assert len(fields) == studies
    for field in fields:
        assert len(set(field.split(";"))) == len(field.split(";"))
    if studies >= ALL_CLASSES_FROM:
        assert {c for field in fields for c in classes_of_headings(field)} == set(CLASSES)


def test_the_long_tail_follows_the_published_counts() -> None:
    fields = sample_headings(np.random.default_rng(0), 3851)
    found = Counter(c for field in fields for c in classes_of_headings(field))
    published = {
        NORMAL: 1628, "Degenerative Change": 715, "Lesion": 694, "Hyperinflation": 547, "Calcified Granuloma": 409,
        "Cardiomegaly": 349, "Volume Loss": 324, "Airspace Disease": 193, "Emphysema": 144, "Nodule": 106,
        "Consolidation": 61, "Pneumothorax": 26, "Effusion": 12,
    }  # fmt: skip
    for name, count in published.items():
        assert found[name] == pytest.approx(count, rel=0.15, abs=4), name
    tail = [NORMAL, "Lesion", "Hyperinflation", "Cardiomegaly", "Airspace Disease", "Nodule", "Consolidation"]
    assert all(found[a] > found[b] for a, b in pairwise(tail))
    sizes = Counter(len(classes_of_headings(field)) for field in fields)
    assert 0.60 < sizes[1] / 3851 < 0.70
    assert 4 <= max(sizes) <= 14


# --- a folder ---------------------------------------------------------------------------------------------------


def test_layout_is_the_public_copys(folder: Path) -> None:
    reports, films = rows(folder / "indiana_reports.csv"), rows(folder / "indiana_projections.csv")
    assert list(reports[0]) == list(REPORT_COLUMNS)
    assert list(films[0]) == ["uid", "filename", "projection"]
    assert [r["uid"] for r in reports] == [str(k) for k in range(1, 41)]
    assert {f["uid"] for f in films} == {r["uid"] for r in reports}
    assert {f["filename"] for f in films} == {p.name for p in (folder / "images").iterdir()}
    assert {f["projection"] for f in films} == set(VIEWS)
    assert set(Counter(f["uid"] for f in films).values()) <= {1, 2, 3, 4, 5}
    assert {p.name for p in folder.iterdir()} == {
        "images", "indiana_reports.csv", "indiana_projections.csv", "dataset.json",
    }  # fmt: skip
    card = json.loads((folder / "dataset.json").read_text())
    assert (card["name"], card["synthetic"], card["seed"]) == ("phantom", True, 7)
    with Image.open(folder / "images" / films[0]["filename"]) as image:
        assert (image.mode, image.size, image.format) == ("L", (32, 32), "PNG")


def test_films_a_study_follow_the_collection() -> None:
    films = [sample_films(np.random.default_rng([0, k])) for k in range(3000)]
    assert {len(f) for f in films} >= {1, 2, 3}
    assert max(len(f) for f, _ in FILMS) == 5
    assert np.mean([len(f) for f in films]) == pytest.approx(7466 / 3851, abs=0.03)
    assert np.mean([f.count("Frontal") for f in films]) == pytest.approx(3818 / 3851, abs=0.03)


def test_mesh_and_problems_give_the_same_classes(folder: Path) -> None:
    for report in rows(folder / "indiana_reports.csv"):
        classes = classes_of_headings(report["MeSH"])
        assert classes == classes_of_headings(report["Problems"])
        assert report["impression"] == ", ".join(classes) + "."


def test_the_same_arguments_write_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "again", studies=40, size=32, seed=7)
    assert tree(tmp_path / "again") == tree(folder)
    write_dataset(tmp_path / "other", studies=40, size=32, seed=8)
    assert tree(tmp_path / "other") != tree(folder)


def test_a_limit_gives_the_first_images_unchanged(folder: Path, tmp_path: Path) -> None:
    assert write_dataset(tmp_path / "few", studies=40, size=32, seed=7, limit_images=5) == 5
    whole, few = tree(folder), tree(tmp_path / "few")
    images = {name: data for name, data in few.items() if name.endswith(".png")}
    assert len(images) == 5
    assert images.items() <= whole.items()
    kept = {row["uid"] for row in rows(tmp_path / "few" / "indiana_projections.csv")}
    assert {row["uid"] for row in rows(tmp_path / "few" / "indiana_reports.csv")} == kept


def test_an_earlier_phantom_is_replaced_entirely(tmp_path: Path) -> None:
    write_dataset(tmp_path, studies=9, size=16, seed=1)
    write_dataset(tmp_path, studies=3, size=16, seed=1)
    listed = {row["filename"] for row in rows(tmp_path / "indiana_projections.csv")}
    assert {p.name for p in (tmp_path / "images").iterdir()} == listed


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "notes.txt"
    mine.write_text("mine")
    for card in (None, "{", "[]", '{"name": "indiana"}'):
        if card is not None:
            (tmp_path / "dataset.json").write_text(card)
        with pytest.raises(InputError, match=r"no phantom dataset.*name a folder"):
            write_dataset(tmp_path, studies=2, size=16)
    with pytest.raises(InputError, match=r"is a file.*name a folder"):
        write_dataset(mine, studies=2, size=16)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"studies": 0}, "--studies"),
        ({"size": 8}, "--size"),
        ({"seed": -1}, "--seed"),
        ({"limit_images": 0}, "--limit"),
    ],
)
def test_numbers_out_of_range_touch_nothing(tmp_path: Path, arguments: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        write_dataset(tmp_path / "out", **{"studies": 2, "size": 16, **arguments})
    assert not (tmp_path / "out").exists()


def _write_and_die(out: Path) -> None:
    import cxr_fast.data.phantom.dataset as phantom

    drawn = phantom._draw_row
    calls = iter(range(100))

    def dying(*args: object, **kwargs: object) -> np.ndarray:
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return drawn(*args, **kwargs)  # type: ignore[arg-type]

    phantom._draw_row = dying  # type: ignore[assignment]
    write_dataset(out, studies=5, size=16, seed=2)


@pytest.mark.kill
def test_a_killed_run_never_looks_complete_and_can_be_repeated(tmp_path: Path) -> None:
    write_dataset(tmp_path / "ds", studies=5, size=16, seed=1)
    worker = multiprocessing.get_context("spawn").Process(target=_write_and_die, args=(tmp_path / "ds",))
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    left = {p.name for p in (tmp_path / "ds").iterdir()}
    assert left == {"images", "phantom.unfinished"}
    write_dataset(tmp_path / "ds", studies=5, size=16, seed=2)
    write_dataset(tmp_path / "fresh", studies=5, size=16, seed=2)
    assert tree(tmp_path / "ds") == tree(tmp_path / "fresh")


# --- under the names of a real copy -----------------------------------------------------------------------------


def test_phantoms_under_given_names_are_the_same_phantoms(folder: Path, tmp_path: Path) -> None:
    reports, films = folder / "indiana_reports.csv", folder / "indiana_projections.csv"
    count = write_for(reports, films, tmp_path / "copy", size=32, seed=7)
    assert count == len(rows(films))
    assert tree(tmp_path / "copy") == tree(folder)
    assert write_for(reports, films, tmp_path / "few", size=32, seed=7, limit=3) == 3
    assert len(list((tmp_path / "few" / "images").iterdir())) == 3


@pytest.mark.parametrize(
    ("reports", "films", "match"),
    [
        (None, "uid,filename,projection\n", "reports.csv is missing"),
        ("uid,Problems\n", "uid,filename,projection\n", "no column MeSH"),
        ("uid,MeSH\n1,normal\n", "uid,filename\n", "no column projection"),
        ("uid,MeSH\n1,normal\n", "uid,filename,projection\n2,a.png,Frontal\n", "uid 2 has images but no report"),
        ("uid,MeSH\n1,normal\n", "uid,filename,projection\n1,../a.png,Frontal\n", "not the plain name"),
        ("uid,MeSH\n1,normal\n", "uid,filename,projection\n1,a.jpg,Frontal\n", "not the plain name"),
        ("uid,MeSH\n1,normal\n", "uid,filename,projection\n1,a.png,Oblique\n", "'Oblique' cannot be drawn"),
        ("uid,MeSH\n1,normal\n", "uid,filename,projection\n" + "1,a.png,Frontal\n" * 2, "one image twice"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, reports: str | None, films: str, match: str) -> None:
    if reports is not None:
        (tmp_path / "reports.csv").write_text(reports)
    (tmp_path / "films.csv").write_text(films)
    with pytest.raises(InputError, match=match):
        write_for(tmp_path / "reports.csv", tmp_path / "films.csv", tmp_path / "out", size=16)
    assert not (tmp_path / "out").exists()


REAL = os.environ.get("CXR_FAST_REAL_DATA")


@pytest.mark.skipif(not REAL, reason="CXR_FAST_REAL_DATA is unset: no Indiana reports to draw under")
def test_the_first_rows_of_the_real_copy(tmp_path: Path) -> None:
    source = Path(str(REAL)) / "iu"
    reports, films = source / "indiana_reports.csv", source / "indiana_projections.csv"
    assert write_for(reports, films, tmp_path / "iu", size=32, limit=60) == 60
    drawn = rows(tmp_path / "iu" / "indiana_projections.csv")
    assert drawn == rows(films)[:60]
