"""Write the review page of a run, and the table that says which film each card is."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..config import PreprocessSpec, from_dict
from ..data.disclosure import Secrets, list_paths
from ..errors import InputError
from ..system.files import AnyPath, atomic, write_bytes
from ..training.run_folder import read_info
from . import nearest
from .cards import NO_CLASS, Card, CardMaker, all_cards, error_sections
from .collect import Collector
from .films import RunFilms, choose_classes, find_errors, largest_top, read_films
from .heat import HeatMaps
from .page import ReviewPage, render_review
from .pictures import Reader
from .state import FOLDER, KeptFiles

PAGE, TABLE, REPORT = "review.html", "review.csv", "report.html"
TOP, MOST = 24, 1500  # films a list by default, and cards a page: a browser is slow with more
COLUMNS = (
    *("card", "film", "image", "image_sha256", "group", "group_number", "part", "fold", "kind", "class", "label"),
    *("probability", "threshold"),
)
LINK = '<p id="films"><a href="review.html">Films behind these figures</a> (pictures of patients)</p>\n'
READING = "reading films and drawing heat maps"
OnProgress = Callable[[str, int, int], None]
HOW_NEAR = (
    "Nearest: the three films with the highest cosine of embeddings among those that the model which scored the film "
    "was trained on, none of its own group. The embeddings are of the backbone before training, from the cache."
)
HOW_HEAT = (
    "Heat maps show on hover or tap, and all with the key h: as the command explain draws them, of the plain view, by "
    "the fold's model that did not train on the film, or for the hold-out by the final model. A heat map is no proof "
    "of a finding."
)
HOW_MARKED = (
    "Marks say what you think of a label: keep, flip, unknown. They stay in this browser; “Save marks” writes them as "
    "a CSV file."
)


@dataclass(frozen=True, kw_only=True)
class ReviewSpec:
    """What a review shows: `images` where the films are now, `cache` where the cache is now, names of `classes` (all
    where none is named), and at most `top` films a class, part and kind. `link` puts a link into the run's report.

        >>> ReviewSpec(top=10).classes
        ()
    """

    images: Path | None = None
    cache: Path | None = None
    classes: Sequence[str] = ()
    top: int = TOP
    link: bool = False


@dataclass(frozen=True, kw_only=True)
class Reviewed:
    """What was written: the page and its bytes, its cards and films; `missing` is what the page lacks, as it says.

    `whole` is whether every film was found as it was cached.
    """

    page: Path
    size: int
    cards: int
    films: int
    missing: tuple[str, ...]
    whole: bool


def write_review(folder: AnyPath, spec: ReviewSpec, on_progress: OnProgress = lambda *_: None) -> Reviewed:
    """Write RUN/review.html and RUN/review.csv; what is made on the way is kept in RUN/review, so that a second call
    goes on from there.

    InputError or SchemaError where the folder is no run of this version, its predictions cannot be read, or a class is
    unknown; whatever else is missing only makes the page partial.
    """
    folder = Path(folder)
    run = read_info(folder)
    films = read_films(folder, run)
    numbers = choose_classes(spec.classes, films.classes)
    if spec.link and not (folder / REPORT).is_file():
        raise InputError(f"--link: {folder / REPORT} is missing; `cxrfast report {folder}` writes it.")
    missing = list(films.notes)
    top = largest_top(films, numbers, spec.top, MOST)
    errors = find_errors(films, numbers, top)
    found = Collector(
        films=films,
        state=KeptFiles(folder=folder / FOLDER),
        reader=_reader(run, spec.images),
        models=_models(folder, films, missing),
    )
    maker = CardMaker(films)
    maker.nearest = _nearest(folder, run, found, [row for each in errors for row in each.rows], (spec, missing))
    sections = error_sections(maker, errors)
    cards = all_cards(sections)
    found.collect(_wanted(cards), partial(on_progress, READING))
    clean = Secrets(paths=tuple(list_paths(folder, run))).clean
    page = ReviewPage(
        name=folder.resolve().name,
        films=films,
        sections=tuple(sections),
        notes=tuple(_notes(found, maker, top, spec)),
        missing=tuple(map(clean, [*missing, *found.describe_lost()])),
        warning=f"{run['provenance']}: these films say nothing about a patient".upper() if run["provenance"] else "",
        heat=found.heat,
        lost=found.lost,
    )
    data = render_review(page, found.thumbnails)
    with atomic(folder / PAGE) as file:  # both files or none
        file.write(data)
        write_bytes(folder / TABLE, write_table(folder, films, cards))
    if spec.link:
        link_report(folder)
    return Reviewed(
        page=folder / PAGE,
        size=len(data),
        cards=len(cards),
        films=len({card.row for card in cards}),
        missing=page.missing,
        whole=not found.lost,
    )


def _nearest(
    folder: Path,
    run: Mapping[str, Any],
    found: Collector,
    rows: Sequence[int],
    said: tuple[ReviewSpec, list[str]],
) -> nearest.Neighbours:
    """The nearest training films of each row; none, and a line among what is missing, where the cache is not here."""
    spec, missing = said
    try:
        cache = nearest.open_run_cache(run, spec.cache)
        places = nearest.match_rows(found.films, cache)
        embeddings = nearest.embed_films(folder, run, cache, places, found.state, lambda *_: None)
    except InputError as error:
        if spec.cache is not None:
            raise
        missing.append(f"nearest training films: {error}")
        return {}
    if found.models:
        found.models.start_from(cache, places)
    return nearest.find_nearest(found.films, run, embeddings, rows)


def _notes(found: Collector, maker: CardMaker, top: int, spec: ReviewSpec) -> Iterator[str]:
    """What the page says of itself."""
    if maker.nearest:
        yield HOW_NEAR
    if found.models:
        yield HOW_HEAT
        yield from found.models.notes
    if top < spec.top:
        yield f"A page holds {MOST:,} cards at most: the worst {top} of each class, part and kind are shown."
    yield HOW_MARKED


def link_report(folder: Path) -> None:
    """Put a link to the page into the head of the run's report, once."""
    path = folder / REPORT
    text = path.read_text(encoding="utf-8")
    if LINK not in text:
        write_bytes(path, text.replace("<nav ", f"{LINK}<nav ", 1).encode())


def write_table(folder: Path, films: RunFilms, cards: Sequence[Card]) -> bytes:
    """The table of the cards as CSV, with the names of images and groups: for whoever has the films."""
    with np.load(folder / "predictions.npz") as file:
        groups = file["group"]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for card in cards:
        row, c = card.row, card.c
        who = [films.images[row], films.sha256[row], groups[row], films.groups[row]]
        place = [card.part, films.fold[row] if films.fold[row] >= 0 else "", card.kind]
        of_class: list[Any] = ["", "", "", ""]
        if c != NO_CLASS:
            label = films.labels[row, c] if films.labels[row, c] >= 0 else ""
            of_class = [films.classes[c], label, films.probs[row, c], films.limits[c]]
        writer.writerow([card.number, row, *who, *place, *of_class])
    return text.getvalue().encode()


def _reader(run: Mapping[str, Any], images: Path | None) -> Reader:
    root = Path(run["cache"]["dataset"]["root"])
    return Reader(root=root, images=images, spec=from_dict(PreprocessSpec, run["preprocess"]))


def _models(folder: Path, films: RunFilms, missing: list[str]) -> HeatMaps | None:
    try:
        return HeatMaps(folder, films)
    except InputError as error:
        missing.append(f"heat maps: {error}")
        return None


def _wanted(cards: Sequence[Card]) -> dict[int, set[int]]:
    """The films that the page shows, the cards' own first, and the classes of their heat maps."""
    wanted: dict[int, set[int]] = {}
    for card in cards:
        wanted.setdefault(card.row, set()).update({card.c} - {NO_CLASS})
        if card.second is not None:
            wanted.setdefault(card.second, set())
    for card in cards:
        for each in card.near:
            wanted.setdefault(each.row, set())
    return wanted
