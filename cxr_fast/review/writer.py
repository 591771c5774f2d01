"""Write the review page of a run, and the table that says which film each card is."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..activations.cache import Cache
from ..config import PreprocessSpec, from_dict
from ..data.disclosure import Secrets, list_paths
from ..errors import InputError
from ..system.files import AnyPath, atomic, write_bytes
from ..training import predictions
from ..training.predictions import Saved
from ..training.run_folder import Run, read_info, read_run
from ..unlikeness.features import read_features
from . import cards, near_twins, nearest, neighbours, suspects
from .collect import Collector
from .films import ErrorList, RunFilms, choose_classes, describe_films, find_errors, largest_top
from .heat import HeatMaps
from .page import ReviewPage, render_review
from .pictures import Reader
from .state import FOLDER, KeptFiles

PAGE, TABLE, REPORT = "review.html", "review.csv", "report.html"
SUSPECTS, TWINS = "suspects.csv", "near_twins.csv"
TOP, MOST = 24, 1500  # films a list by default, and errors a page: a browser is slow with more
FEW = 6  # suspects of a class and label that the page shows
ODD = 24  # odd films, and pairs of twins
COLUMNS = (
    *("card", "film", "image", "image_sha256", "group", "group_number", "part", "fold", "kind", "class", "label"),
    *("probability", "threshold"),
)
LINK = '<p id="films"><a href="review.html">Films behind these figures</a> (pictures of patients)</p>\n'
READING, COMPARING = "reading films and drawing heat maps", "comparing films with their nearest"
OnProgress = Callable[[str, int, int], None]
HOW_NEAR = (
    "Nearest training films: the three most alike among those that the model was trained on, none of the same group. "
    "The figure is the cosine of the mean tokens in the cache: 1 is the same picture. Bold: the film has the class."
)
HOW_HEAT = (
    "A heat map shows on hover or tap; the key h shows all. It is drawn as by `cxrfast explain`, by the model that "
    "scored the film: of the fold that did not train on it, or for the hold-out the final model. A heat map is no "
    "proof of a finding."
)
HOW_MARKED = (
    "Marks say what you think of a label: keep, flip, unknown. They stay in this browser; “Save marks” writes them as "
    "a CSV file. `cxrfast sweep CACHE --corrections FILE` trains with it."
)


@dataclass(frozen=True, kw_only=True)
class ReviewSpec:
    """What a review shows: `images` where the films are now, `cache` where the cache is now, names of `classes` (all
    where none is named), and at most `top` films a class, part and kind. `twins` also compares films with their nearest
    by pixels, which reads nearly all of them. `link` puts a link into the run's report.

        >>> ReviewSpec(top=10).classes
        ()
    """

    images: Path | None = None
    cache: Path | None = None
    classes: Sequence[str] = ()
    top: int = TOP
    twins: bool = True
    link: bool = False


@dataclass(frozen=True, kw_only=True)
class Reviewed:
    """What was written: the page and its bytes, its cards and films, and the `tables` beside it.

    `missing` is what the page lacks, as it says. `whole` is whether every film was found as it was cached.
    """

    page: Path
    size: int
    cards: int
    films: int
    tables: tuple[str, ...]
    missing: tuple[str, ...]
    whole: bool


def write_review(folder: AnyPath, spec: ReviewSpec, on_progress: OnProgress = lambda *_: None) -> Reviewed:
    """Write RUN/review.html and RUN/review.csv, and where the cache is here RUN/suspects.csv and RUN/near_twins.csv.

    What is made on the way is kept in RUN/review, so that a second call goes on from there. InputError or SchemaError
    where the folder is no run of this version, its predictions cannot be read, or a class is unknown; whatever else is
    missing only makes the page partial.
    """
    folder = Path(folder)
    saved = predictions.read(folder, read_info(folder))
    work = _Work(folder=folder, spec=spec, saved=saved, films=describe_films(saved), on_progress=on_progress)
    numbers = choose_classes(spec.classes, work.films.classes)
    if spec.link and not (folder / REPORT).is_file():
        raise InputError(f"--link: {folder / REPORT} is missing; `cxrfast report {folder}` writes it.")
    top = largest_top(work.films, numbers, spec.top, MOST)
    found = work.collector()
    sections = work.sections(find_errors(work.films, numbers, top), numbers, found)
    made = cards.all_cards(sections)
    found.collect(_wanted(made), partial(on_progress, READING))
    data = render_review(work.page(sections, found, top), found.thumbnails)
    with atomic(folder / PAGE) as file:  # both files or none
        file.write(data)
        write_bytes(folder / TABLE, write_table(saved, work.films, made))
    if spec.link:
        link_report(folder)
    return Reviewed(
        page=folder / PAGE,
        size=len(data),
        cards=len(made),
        films=len({row for card in made for row in card.rows}),
        tables=(TABLE, *work.tables),
        missing=work.said(found),
        whole=not found.lost,
    )


@dataclass(kw_only=True)
class _Work:
    """One review in the making; `missing` are lines of what the page lacks, and `notes` of how it was made.

    `tables` are the files that stand beside the page and its own table.
    """

    folder: Path
    spec: ReviewSpec
    saved: Saved
    films: RunFilms
    on_progress: OnProgress
    tables: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    final: Run | None = None

    @property
    def run(self) -> Mapping[str, Any]:
        """The run's `run.json`."""
        return self.saved.run

    def collector(self) -> Collector:
        """What reads the films and draws their heat maps, as far as the run's models can."""
        models = None
        try:
            self.final = read_run(self.folder)
            models = HeatMaps(self.final, self.films)
            self.notes += [HOW_HEAT, *models.notes]
        except InputError as error:
            self.missing.append(f"heat maps: {error}")
        root, spec = Path(self.run["cache"]["dataset"]["root"]), from_dict(PreprocessSpec, self.run["preprocess"])
        reader = Reader(root=root, images=self.spec.images, spec=spec)
        return Collector(films=self.films, kept=KeptFiles(folder=self.folder / FOLDER), reader=reader, models=models)

    def sections(self, errors: Sequence[ErrorList], numbers: Sequence[int], found: Collector) -> list[cards.Section]:
        """The sections of the page: errors by class, and where the cache is here label suspects, twins, odd films."""
        maker = cards.CardMaker(self.films)
        try:
            cache, places = nearest.open_run_cache(self.saved, self.spec.cache)
        except InputError as error:
            if self.spec.cache is not None:
                raise
            self.missing.append(f"nearest training films, label suspects, near twins and odd films: {error}")
            return cards.error_sections(maker, errors)
        if found.models:
            found.models.start_from(cache, places)
        doubtful = suspects.rank_labels(self.saved, cache)
        self._write_suspects(doubtful)
        self.tables.append(SUSPECTS)
        doubtful = [each for c in numbers for each in _first(doubtful, self.films.classes[c])]
        twins = None
        if self.spec.twins:
            twins = near_twins.find_twins(self.saved, cache, self.spec.images, partial(self.on_progress, COMPARING))
            near_twins.write_near_twins(self.folder / TWINS, twins)
            self.tables.append(TWINS)
        odd = self._odd(cache, places)
        rows = [*(row for each in errors for row in each.rows), *(s.place for s in doubtful), *(row for row, _ in odd)]
        vectors = neighbours.describe_films(cache, places)
        maker.nearest = nearest.find_nearest(self.films, self.run, vectors, list(dict.fromkeys(rows)))
        self.notes.insert(0, HOW_NEAR)
        sections = cards.error_sections(maker, errors)
        sections.append(cards.suspect_section(maker, doubtful))
        if twins is not None:
            sections.append(cards.twin_section(maker, twins, ODD))
        return [*sections, *([cards.odd_section(maker, odd)] if odd else [])]

    def page(self, sections: Sequence[cards.Section], found: Collector, top: int) -> ReviewPage:
        """The page without its films."""
        if top < self.spec.top:
            self.notes.append(
                f"A page holds {MOST:,} errors at most: the worst {top} of each class, part and kind are shown."
            )
        warning = self.run["provenance"]
        return ReviewPage(
            name=self.folder.resolve().name,
            films=self.films,
            sections=tuple(sections),
            notes=(*self.notes, HOW_MARKED),
            missing=self.said(found),
            warning=f"{warning}: these films say nothing about a patient".upper() if warning else "",
            heat=found.heat,
            lost=found.lost,
        )

    def said(self, found: Collector) -> tuple[str, ...]:
        """What the page lacks, without paths."""
        clean = Secrets(paths=tuple(list_paths(self.folder, self.run))).clean
        return tuple(map(clean, [*self.films.notes, *self.missing, *found.describe_lost()]))

    def _write_suspects(self, found: Sequence[suspects.Suspect]) -> None:
        """Write the table of suspects, unless somebody has filled in marks there."""
        path = self.folder / SUSPECTS
        try:
            with open(path, newline="", encoding="utf-8") as file:
                marked = any(row.get("mark") for row in csv.DictReader(file))
        except (OSError, ValueError, csv.Error):
            marked = False
        if marked:
            self.notes.append(f"{SUSPECTS} holds marks and was left as it was.")
        else:
            suspects.write_suspects(path, found)

    def _odd(self, cache: Cache, places: np.ndarray) -> list[tuple[int, float]]:
        """The films of the largest unlikeness, with it; none, and a line, where the run has no measure of it."""
        measure = self.final.unlikeness if self.final else None
        if measure is None:
            why = "this run has no measure of unlikeness" if self.final else "the run's model cannot be read"
            why = (self.run.get("unlikeness") or {}).get("skipped", why)
            self.missing.append(f"odd films: {why}")
            return []
        values = measure.distance.measure(read_features(cache, places, measure.source))
        return [(int(row), float(values[row])) for row in np.argsort(-values, kind="stable")[:ODD]]


def _first(found: Sequence[suspects.Suspect], name: str) -> list[suspects.Suspect]:
    """The first FEW positives and FEW negatives of a class."""
    sides = [[each for each in found if each.name == name and each.label == label][:FEW] for label in (1, 0)]
    return [each for side in sides for each in side]


def link_report(folder: Path) -> None:
    """Put a link to the page into the head of the run's report, once."""
    path = folder / REPORT
    text = path.read_text(encoding="utf-8")
    if LINK not in text:
        write_bytes(path, text.replace("<nav ", f"{LINK}<nav ", 1).encode())


def write_table(saved: Saved, films: RunFilms, made: Iterable[cards.Card]) -> bytes:
    """The table of the cards as CSV, with the names of images and groups: for whoever has the films."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for card in made:
        writer.writerows(_table_rows(saved, films, card))
    return text.getvalue().encode()


def _table_rows(saved: Saved, films: RunFilms, card: cards.Card) -> Iterator[list[Any]]:
    """A row for each film of a card."""
    of_class: list[Any] = ["", "", "", ""]
    if (c := card.c) != cards.NO_CLASS:
        of_class = [films.classes[c], card.label if card.label != -1 else "", films.probs[card.row, c], films.limits[c]]
    for row in card.rows:
        who = [films.images[row], films.sha256[row], saved.arrays["group"][row], films.groups[row]]
        place = [films.part(row), films.fold[row] if films.fold[row] >= 0 else "", card.kind]
        yield [card.number, row, *who, *place, *of_class]


def _wanted(made: Sequence[cards.Card]) -> dict[int, set[int]]:
    """The films that the page shows, the cards' own first, and the classes of their heat maps."""
    wanted: dict[int, set[int]] = {}
    for card in made:
        for row in card.rows:
            wanted.setdefault(row, set()).update({card.c} - {cards.NO_CLASS})
    for card in made:
        for each in card.near:
            wanted.setdefault(each.row, set())
    return wanted
