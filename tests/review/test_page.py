"""A page stays below its limit, whatever it holds, and a map becomes a picture of its colours."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cxr_fast.config import PreprocessSpec
from cxr_fast.export import overlay
from cxr_fast.review.cards import (
    CardMaker,
    all_cards,
    error_sections,
    odd_section,
    probability_line,
    twin_section,
)
from cxr_fast.review.films import RunFilms, find_errors, largest_top
from cxr_fast.review.heat import LEVELS, as_png, place_style
from cxr_fast.review.near_twins import Film, Twin, Twins
from cxr_fast.review.page import Heat, ReviewPage, render_review
from cxr_fast.review.pictures import shrink


def some_films(n: int, classes: int, seed: int = 0) -> RunFilms:
    draw = np.random.default_rng(seed)
    return RunFilms(
        classes=tuple(f"class {c}, <b>" for c in range(classes)),
        images=np.array([f"{i}.png" for i in range(n)]),
        sha256=np.array([f"{i:064x}" for i in range(n)]),
        groups=draw.integers(1, n, n),
        fold=draw.integers(-1, 3, n),
        labels=draw.integers(-1, 2, (n, classes)).astype(np.int8),
        probs=draw.random((n, classes), np.float32),
        limits=np.full(classes, 0.5),
        decided_by="folds",
    )


def some_page(films: RunFilms, top: int = 1000) -> ReviewPage:
    maker = CardMaker(films)
    rows = range(len(films.fold))
    maker.nearest = {row: [((row + 1) % len(rows), 0.5), ((row + 7) % len(rows), 0.25)] for row in rows}
    sections = tuple(error_sections(maker, find_errors(films, range(len(films.classes)), top)))
    heat = {
        (card.row, card.c): Heat.of(as_png(np.random.default_rng(card.row).random((14, 14))), "")
        for card in all_cards(sections)
    }
    return ReviewPage(name="run", films=films, sections=sections, notes=(), missing=(), warning="", heat=heat, lost={})


def test_pairs_and_odd_films_have_cards_of_their_own() -> None:
    films = some_films(30, 2)
    films.labels[3], films.labels[4] = [1, 0], [0, 0]
    sides = [Film(place=r, row=r, image="x", sha256=str(r), group=str(r), fold=int(films.fold[r])) for r in (3, 4)]
    twin = Twin(a=sides[0], b=sides[1], cosine=0.9, correlation=0.912, classes=(films.classes[0],))
    pairs = (twin, replace(twin, correlation=None))
    twins = Twins(pairs=pairs, films=30, compared=9, missing=1, between_folds=1, held_out=0)
    maker = CardMaker(films)
    sections = (twin_section(maker, twins, 5), twin_section(maker, replace(twins, pairs=()), 5))
    sections += (odd_section(maker, [(7, 1.234), (3, 0.5)]),)
    page = replace(some_page(films, 0), sections=sections)
    first, _, odd, _ = page.cards
    assert (first.row, first.second, first.rows, first.label) == (3, 4, (3, 4), None)
    assert "other group, other labels: pixels correlate to 0.912" in first.lines
    assert f"labels contradict: {films.classes[0]}" in first.lines
    assert (odd.row, odd.kind, odd.lines[0]) == (7, "odd film", "unlikeness 1.23")
    text = render_review(page, {row: noise(row) for row in (3, 4, 7)}).decode()
    assert text.count('<div class="film f3"') == 3
    assert text.count('<div class="film f4"') == 2
    assert text.count(".f3{") == text.count(".f4{") == 1, "a film is in the page once"
    assert "data-sha" not in text, "no mark without a class"
    assert "1 pairs are in two folds" in text
    assert "1 film" in text
    assert "were not found" in text
    assert len(page.classes) == 0


def noise(row: int) -> bytes:
    """A thumbnail that no encoder makes small."""
    return shrink(Image.fromarray(np.random.default_rng(row).integers(0, 256, (384, 320), np.uint8)), 384, 90)


def test_a_page_stays_below_its_limit_and_takes_the_largest_films_that_fit() -> None:
    films = some_films(60, 3)
    page, thumbnails = some_page(films), {row: noise(row) for row in range(60)}
    sizes, shown = [], []
    least = len(render_review(page, {}, 0)) + 60_000
    for limit in (20_000_000, 3_000_000, 1_000_000, 700_000, least):
        data = render_review(page, thumbnails, limit)
        assert len(data) <= limit
        sizes.append(len(data))
        shown.append(data.count(b"background-image:url("))
    assert shown[0] == shown[1] == 60
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] > 1_500_000, "smaller films than fit"
    assert 0 < shown[-1] < 60, "where the smallest do not fit, some are left out"
    assert data.count(b"no picture: left out") > 0


def test_names_of_classes_are_text_and_every_card_is_on_the_page() -> None:
    films = some_films(30, 2)
    page = some_page(films)
    text = render_review(page, {}).decode()
    assert "<b>:" not in text
    assert text.count("<article") == len(page.cards) > 15
    assert text.count("no picture: left out") == len(page.cards)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), top=st.integers(1, 5), most=st.integers(1, 60))
def test_errors_are_those_of_plain_loops(seed: int, top: int, most: int) -> None:
    films = some_films(25, 3, seed)
    films.probs[np.random.default_rng(seed).random(films.probs.shape) < 0.1] = np.nan
    found = find_errors(films, [2, 0], top)
    assert [(each.number, each.part, each.kind) for each in found] == [
        (c, part, kind)
        for c in (2, 0)
        for part in ("out_of_fold", "holdout")
        for kind in ("false negative", "false positive")
    ]
    for each in found:
        c, label = each.number, int(each.kind == "false negative")
        wrong, of = [], 0
        for row in range(25):
            p, inside = float(films.probs[row, c]), films.part(row) == each.part
            if inside and films.labels[row, c] == label and not np.isnan(p):
                of += 1
                if (p >= 0.5) != bool(label):
                    wrong.append((p if label else -p, row))
        assert each.rows == tuple(row for _, row in sorted(wrong)[:top])
        groups = [int(films.groups[row]) for _, row in wrong]
        counts = (each.total, each.of, each.groups, each.most)
        assert counts == (len(wrong), of, len(set(groups)), max(map(groups.count, groups), default=0))
    chosen = largest_top(films, [2, 0], top, most)
    held = [sum(min(each.total, t) for each in found) for t in range(1, top + 1)]
    assert chosen == max([t for t in range(1, top + 1) if held[t - 1] <= most], default=1)


def test_a_line_shows_the_decision_where_four_digits_would_not() -> None:
    films = some_films(2, 1)
    films.probs[0, 0], films.limits[0] = 0.29661, 0.29664
    assert probability_line(films, 0, 0) == "probability 0.296609998, threshold 0.29664000000000001"
    films.probs[1, 0] = 0.1
    assert probability_line(films, 1, 0) == "probability 0.1000, threshold 0.2966"


def test_a_map_is_a_small_picture_of_the_colours_of_explain() -> None:
    shares = np.linspace(0, 1, 15 * 14, dtype=np.float32).reshape(15, 14) ** 2
    png = as_png(shares / shares.sum())
    assert len(png) < 400
    with Image.open(io.BytesIO(png)) as image:
        assert image.size == (14, 15)
        found = np.asarray(image.convert("RGBA"), float)
    film = np.full(shares.shape, 90.0)
    expected = overlay.painted(film, shares, shares, np.ones(shares.shape, bool)).astype(float)
    opacity = found[..., 3:] / 255
    drawn = (1 - opacity) * film[..., None] + opacity * found[..., :3]
    assert np.abs(drawn - expected).max() < 255 / LEVELS
    assert found[0, 0, 3] == 0
    assert as_png(np.zeros((3, 3)))


@pytest.mark.parametrize(
    ("resize", "size", "style"),
    [
        ("squash", (384, 100), ""),
        ("crop", (200, 100), "left:25.00%;top:0.00%;width:50.00%;height:100.00%"),
        ("pad", (200, 100), "left:0.00%;top:-50.00%;width:100.00%;height:200.00%"),
        ("pad", (100, 100), ""),
    ],
)
def test_a_map_lies_where_the_model_saw_it(resize: str, size: tuple[int, int], style: str) -> None:
    assert place_style(size, PreprocessSpec(size=224, resize=resize)) == style  # type: ignore[arg-type]
