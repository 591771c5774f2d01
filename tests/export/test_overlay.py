"""A heat map lies where the model saw what it shows, on the film as it is; the picture says what it must."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from cxr_fast.config import PreprocessSpec
from cxr_fast.data.images import resize
from cxr_fast.export import overlay
from cxr_fast.export.overlay import RED, Explained, Map, Style, on_film, painted, picture, shown_size, strongest

GRID, SIZE = 14, 224
MODES = ["squash", "crop", "pad"]
FILMS = [(224, 224), (500, 311), (311, 500), (640, 520), (97, 301), (1300, 1000)]


def spec(mode: Any) -> PreprocessSpec:
    return PreprocessSpec(size=SIZE, resize=mode)


def patch_means(film: np.ndarray, mode: str) -> np.ndarray:
    """What each patch of the model's own pixels holds: a map that is known exactly."""
    patch = SIZE // GRID
    return resize(film, spec(mode)).reshape(GRID, patch, GRID, patch).mean(axis=(1, 3))


def inner(film: tuple[int, int], mode: str) -> tuple[slice, slice]:
    """Rows and columns of the film away from the edge of what the model saw, by a patch and a half."""
    width, height = film
    scale = min(film) if mode == "crop" else max(film)
    sides = {"squash": (height, width), "pad": film[::-1], "crop": (min(film),) * 2}[mode]
    out = []
    for whole, side in zip((height, width), sides, strict=True):
        patch = (side if mode == "squash" else scale) / GRID
        first = (whole - side) / 2 + 1.5 * patch
        out.append(slice(int(np.ceil(first)), int(whole - first)))
    return out[0], out[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("film", FILMS, ids=str)
def test_a_ramp_comes_back_where_it_was(film: tuple[int, int], mode: str) -> None:
    """Through the model's resize, into patches and back: a linear film must return as itself, to a grey level."""
    width, height = film
    rows, columns = inner(film, mode)
    for ramp in (
        np.tile(np.linspace(0, 255, width), (height, 1)),
        np.tile(np.linspace(0, 255, height)[:, None], (1, width)),
    ):
        grey = np.rint(ramp).astype(np.uint8)
        found, seen = on_film(patch_means(grey, mode), film, film, spec(mode))
        assert found.shape == seen.shape == grey.shape
        assert seen[rows, columns].all()
        assert np.ptp(ramp[rows, columns]) > 20, "nothing left to compare"
        np.testing.assert_allclose(found[rows, columns], ramp[rows, columns], atol=1)


def test_the_ramp_would_show_another_geometry() -> None:
    film = (500, 311)
    ramp = np.tile(np.linspace(0, 255, 311)[:, None], (1, 500))
    rows, columns = inner(film, "pad")
    found, _ = on_film(patch_means(np.rint(ramp).astype(np.uint8), "pad"), film, film, spec("squash"))
    assert np.abs(found[rows, columns] - ramp[rows, columns]).max() > 20


@given(
    mode=st.sampled_from(MODES),
    width=st.integers(60, 900),
    height=st.integers(60, 900),
    across=st.floats(0.2, 0.8),
    down=st.floats(0.2, 0.8),
    scale=st.floats(0.5, 2),
)
def test_a_planted_bright_patch_is_found_where_it_was_planted(
    mode: str, width: int, height: int, across: float, down: float, scale: float
) -> None:
    """Whatever the film's shape, the crop and the size it is shown at."""
    side = min(width, height) if mode == "crop" else max(width, height)
    half_x, half_y = ((width, height) if mode == "squash" else (side, side))[0] / 28, side / 28
    half_y = height / 28 if mode == "squash" else half_y
    room_x, room_y = (min(width, height),) * 2 if mode == "crop" else (width, height)
    x, y = (width - room_x) / 2 + across * room_x, (height - room_y) / 2 + down * room_y
    film = np.zeros((height, width), np.uint8)
    film[max(0, int(y - half_y)) : int(y + half_y) + 1, max(0, int(x - half_x)) : int(x + half_x) + 1] = 255
    shown = (max(1, round(width * scale)), max(1, round(height * scale)))
    found, seen = on_film(patch_means(film, mode), (width, height), shown, spec(mode))
    row, column = np.unravel_index(np.argmax(np.where(seen, found, -1)), found.shape)
    assert abs((column + 0.5) * width / shown[0] - x) <= 2 * half_x + 2
    assert abs((row + 0.5) * height / shown[1] - y) <= 2 * half_y + 2


@pytest.mark.parametrize(("film", "mode", "share"), [((500, 250), "crop", 0.5), ((300, 300), "crop", 1.0)])
def test_what_a_crop_left_out_was_not_seen(film: tuple[int, int], mode: str, share: float) -> None:
    _, seen = on_film(np.ones((GRID, GRID)), film, film, spec(mode))
    assert seen.mean() == pytest.approx(share, abs=0.01)
    assert np.array_equal(seen, seen[:, ::-1])


@pytest.mark.parametrize("mode", ["squash", "pad"])
def test_nothing_is_left_out_elsewhere(mode: str) -> None:
    assert on_film(np.ones((GRID, GRID)), (501, 250), (333, 166), spec(mode))[1].all()


def test_an_even_map_is_even_and_keeps_its_value() -> None:
    found, _ = on_film(np.full((GRID, GRID), 0.3), (500, 250), (100, 50), spec("crop"))
    np.testing.assert_allclose(found, 0.3)


@pytest.mark.parametrize(
    ("film", "shown"),
    [((2496, 1971), (1024, 809)), ((192, 192), (512, 512)), ((600, 300), (600, 300)), ((9000, 3), (1024, 1))],
)
def test_a_film_keeps_its_aspect_and_is_no_larger_than_the_limit(film: tuple[int, int], shown: tuple[int, int]) -> None:
    assert shown_size(*film, 1024) == shown


def test_colour_grows_with_the_map_and_nothing_is_no_colour() -> None:
    film = np.full((1, 3), 100, np.uint8)
    shares = np.array([[0.0, 0.25, 0.5]])
    none, some, most = painted(film, shares, shares, np.ones((1, 3), bool))[0].astype(int)
    assert none.tolist() == [100, 100, 100]
    assert np.ptp(some) > 20
    assert 100 < some.mean() < most.mean()
    empty = painted(film, np.zeros((1, 3)), np.zeros((1, 3)), np.array([[True, True, False]]))[0]
    assert empty.tolist() == [[100] * 3, [100] * 3, [35] * 3]


# ------------------------------------------------------------------------------------------------ the picture


def explained(**changes: Any) -> Explained:
    shares = np.zeros((GRID, GRID))
    shares[3, 10] = 1
    maps = (Map(name="Cardiomegaly", probability=0.7, threshold=0.4, shares=shares),)
    named: dict[str, Any] = {"name": "a.png", "grey": np.full((300, 400), 90, np.uint8), "spec": spec("squash")}
    return Explained(**{**named, "maps": maps, "members": 1, "warning": "", **changes})


def pixels(found: Explained) -> np.ndarray:
    with Image.open(io.BytesIO(picture(found))) as image:
        assert image.format == "PNG"
        return np.array(image)


def words(found: Explained, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text drawn."""
    said: list[str] = []
    real = Figure.text

    def text(self: Any, **named: Any) -> Any:
        said.append(named["s"])
        return real(self, **named)

    monkeypatch.setattr(Figure, "text", text)
    picture(found)
    return said


def test_the_picture_holds_the_film_and_its_overlay() -> None:
    page = pixels(explained())
    grey = (page == 90).all(axis=2)
    left, top = (np.nonzero(grey.sum(axis=axis) > 50)[0][0] for axis in (0, 1))
    shown = shown_size(400, 300, 1024)
    second = left + max(shown[0], overlay.NARROWEST) + (max(shown[0], overlay.NARROWEST) // 28)
    film, panel = (page[top : top + shown[1], start : start + shown[0]].astype(int) for start in (left, second))
    assert (film == 90).all()
    rows, columns = np.nonzero(panel.max(axis=2) > 180)
    # Patch (3, 10) of 14 by 14.
    assert columns.mean() == pytest.approx(10.5 / 14 * shown[0], abs=1)
    assert rows.mean() == pytest.approx(3.5 / 14 * shown[1], abs=1)
    assert (panel[0, 0] == 90).all()


def test_it_says_class_probability_threshold_and_that_it_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    said = " ".join(words(explained(), monkeypatch))
    assert "Cardiomegaly" in said
    assert "probability 0.700, over its threshold 0.400" in said
    assert "highest patch: 100.0% of the map; even: 0.5%" in said
    assert "weighted by the gradient of that class's logit" in said
    assert "no proof of a finding" in said
    assert "Research use only" in said
    assert "models" not in said
    assert "Dimmed" not in said


def test_names_are_written_as_they_are_whatever_their_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Umlauts; and no formula is made of two dollar signs."""
    names = ("Pleuraerguß rechts, Ödem", "$x^", "costs $1 or $2")
    maps = tuple(Map(name=name, probability=0.7, threshold=0.4, shares=np.ones((2, 2)) / 4) for name in names)
    assert set(names) <= set(words(explained(maps=maps), monkeypatch))


def test_no_line_leaves_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The right margin stays white beside the longest notes, a warning in capitals, and names of wide letters."""
    maps = tuple(Map(name="W" * 300, probability=0.7, threshold=0.4, shares=np.ones((2, 2)) / 4) for _ in range(3))
    for warning in ("random backbone", "m w " * 60):
        page = pixels(explained(maps=maps, warning=warning, spec=spec("crop"), members=5))
        assert (page[:, -10:] == 255).all()
        assert (page[-10:] == 255).all()


def test_it_says_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = Map(name="x" * 300, probability=0.1, threshold=0.4, shares=np.zeros((GRID, GRID)))
    said = " ".join(words(explained(maps=(empty,), members=5, spec=spec("crop")), monkeypatch))
    assert "probability 0.100, under its threshold 0.400" in said
    assert "the map is empty" in said
    assert "mean of 5 models' maps" in said
    assert "Dimmed: outside the square" in said
    assert "x" * 300 not in said
    assert "xxx…xxx" in said


def test_a_random_backbone_is_said_in_red() -> None:
    def reds(found: Explained) -> int:
        red = [int(RED[i : i + 2], 16) for i in (1, 3, 5)]
        return int((pixels(found) == red).all(axis=2).sum())

    assert reds(explained()) == 0
    assert reds(explained(warning="random backbone")) > 100


@pytest.mark.parametrize("count", [3, 4, 9])
@pytest.mark.parametrize("film", [(300, 400), (1, 5000), (5000, 1), (2000, 1500)], ids=str)
def test_any_film_and_any_number_of_classes_fit(film: tuple[int, int], count: int) -> None:
    found = explained(grey=np.zeros(film, np.uint8), maps=explained().maps * count)
    page = pixels(found)
    assert max(page.shape) <= 5000


def test_a_file_name_that_is_not_utf_8_is_drawn_with_a_mark_in_its_place() -> None:
    assert overlay._shortened("a\udcff.png", 20, 500) == "a?.png"


# ------------------------------------------------------------------------------------------------ styles


@given(seed=st.integers(0, 999), share=st.floats(0.01, 0.99))
def test_the_outlined_part_is_the_smallest_that_holds_the_share(seed: int, share: float) -> None:
    level = np.random.default_rng(seed).random((6, 7)) ** 3
    inside = strongest(level, share)
    assert level[inside].sum() >= share * level.sum() - 1e-9
    assert level[inside].sum() - level[inside].min() < share * level.sum() + 1e-9
    assert level[inside].min() > level[~inside].max(initial=0)


def test_an_outline_leaves_the_film_as_it_is_inside_and_outside() -> None:
    film, level = np.full((60, 80), 100, np.uint8), np.zeros((60, 80))
    level[20:40, 30:60] = 1
    seen = np.ones(film.shape, bool)
    found = painted(film, level, level, seen, Style(kind="contour", share=0.9))
    line = (found == overlay.LINE).all(axis=2)
    assert line.sum() == 2 * (20 + 30)
    assert (found[22:38, 32:58] == 100).all()
    assert (found[:15] == 100).all()
    rows, columns = np.nonzero(line)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (19, 40, 29, 60)
    nothing = painted(film, np.zeros_like(level), np.zeros_like(level), seen, Style(kind="contour"))
    assert (nothing == 100).all()


def test_opacity_and_the_map_alone() -> None:
    film, seen = np.array([[10, 200, 90, 90]], np.uint8), np.array([[True, True, True, False]])
    shares = np.array([[1.0, 1.0, 0.0, 1.0]])
    clear = painted(film, shares, shares, seen, Style(opacity=0.0))
    assert clear[0, :3, 0].tolist() == [10, 200, 90]
    alone = painted(film, shares, shares, seen, Style(kind="side"))
    assert (alone[0, 0] == alone[0, 1]).all()
    assert alone[0, 2].max() == 0
    assert alone[0, 3].tolist() == [89, 89, 89]
    full = painted(film, shares, shares, seen, Style(opacity=1.0))
    assert (full[0, 0] == alone[0, 0]).all()


@pytest.mark.parametrize("kind", ["overlay", "contour", "side"])
def test_an_svg_has_its_text_as_text_and_is_the_same_twice(kind: Any) -> None:
    found, style = explained(source="of the run's own model"), Style(kind=kind)
    drawn = picture(found, style, "svg").decode()
    texts = re.findall(r"<text[^>]*>([^<]*)", drawn)
    assert {"Cardiomegaly", "probability 0.700, over its threshold 0.400", "a.png"} <= {*texts}
    assert any(text.startswith("Probabilities: of the run") for text in texts)
    assert drawn.count("<image") == (2 if kind == "contour" else 3)
    assert picture(found, style, "svg").decode() == drawn
    assert picture(found, style)[:4] == b"\x89PNG"


def test_each_style_says_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(Figure, "text", lambda self, **named: said.append(named["s"]))
    picture(explained(), Style(kind="contour", share=0.4))
    text = " ".join(said)
    assert "outline: 40% of the map" in text
    assert "smallest area that holds 40% of the map" in text
    assert "from nothing to" not in text
