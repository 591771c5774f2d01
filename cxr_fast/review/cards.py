"""The cards of a review page: one a film and class, with what is known of it, in lists and sections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..system.text import counted, number
from .films import FALSE_NEGATIVE, KINDS, PARTS, ErrorList, RunFilms
from .near_twins import Twins
from .nearest import Neighbours
from .suspects import Suspect

NO_CLASS = -1
ODD, SUSPECT, TWIN = "odd film", "label suspect", "near twin"


@dataclass(frozen=True, kw_only=True)
class Near:
    """A training film near another one: its row, its labels, the cosine of both embeddings, its group's number.

    `same` is whether it is labelled with the class of the card.
    """

    row: int
    labels: str
    same: bool
    cosine: float
    group: int


@dataclass(frozen=True, kw_only=True)
class Card:
    """A film as the page shows it. `number` runs over the page; `c` is its class, NO_CLASS for none.

    `label` is 1, 0 or -1 for unknown, None without a class; `lines` are short texts; `facts` the values to filter by;
    `second` is the row of the other film of a pair.
    """

    number: int
    row: int
    c: int
    kind: str
    part: str
    title: str
    label: int | None
    lines: tuple[str, ...]
    facts: tuple[str, ...]
    near: tuple[Near, ...] = ()
    second: int | None = None

    @property
    def rows(self) -> tuple[int, ...]:
        """The films that it shows large."""
        return (self.row,) if self.second is None else (self.row, self.second)


@dataclass(frozen=True, kw_only=True)
class CardList:
    """Cards below one heading, with a line about them."""

    title: str
    note: str
    cards: tuple[Card, ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page."""

    id: str
    title: str
    notes: tuple[str, ...]
    lists: tuple[CardList, ...]


class CardMaker:
    """Makes cards of films, numbered as they are made; `nearest` may stay empty."""

    def __init__(self, films: RunFilms) -> None:
        self.films, self._count = films, 0
        self.nearest: Neighbours = {}

    def card(self, row: int, c: int, kind: str, lines: Sequence[str] = (), *, same: int = 1) -> Card:
        """A card of one film and class; `lines` stand first. `same` films of its list are of its group."""
        films = self.films
        self._count += 1
        part, name = films.part(row), films.classes[c] if c != NO_CLASS else ""
        others = films.positives(row, c)
        facts = tuple(str(values[row]) for values in films.columns.values())
        shown = [f"{title} {value}" for title, value in zip(films.columns, facts, strict=True)]
        of = f", of which {same} are in this list" if same > 1 else ""
        fold = f", fold {films.fold[row]}" if part == "out_of_fold" else ""
        said = [
            *lines,
            f"{'other labels' if name else 'labels'}: {', '.join(others) or 'none'}",
            ", ".join(shown),
            f"{PARTS[part]}{fold}; group {films.groups[row]}{of}",
        ]
        return Card(
            number=self._count,
            row=row,
            c=c,
            kind=kind,
            part=part,
            title=f"{name}: {kind}" if name else kind,
            label=int(films.labels[row, c]) if name else None,
            lines=tuple(filter(None, said)),
            facts=facts,
            near=tuple(self._near(row, c)),
        )

    def _near(self, row: int, c: int) -> Iterator[Near]:
        films = self.films
        for other, cosine in self.nearest.get(row, []):
            labels = ", ".join(films.positives(other)) or "no label"
            same = c != NO_CLASS and bool(films.labels[other, c] == 1)
            yield Near(row=other, labels=labels, same=same, cosine=cosine, group=int(films.groups[other]))


def probability_line(films: RunFilms, row: int, c: int) -> str:
    """`probability 0.0312, threshold 0.2966`, with all digits where four would look equal."""
    p, limit = float(films.probs[row, c]), float(films.limits[c])
    if not np.isfinite(p):
        return "no probability"
    texts = (number(p), number(limit))
    if texts[0] == texts[1]:
        texts = (f"{p:.9g}", f"{limit:.17g}")
    return f"probability {texts[0]}, threshold {texts[1]}"


def error_sections(maker: CardMaker, errors: Sequence[ErrorList]) -> list[Section]:
    """One section a class, with a list of each kind and part that has errors, and a line where there are none."""
    by_class: dict[int, list[ErrorList]] = {}
    for each in errors:
        by_class.setdefault(each.number, []).append(each)
    sections = []
    for c, lists in by_class.items():
        name = maker.films.classes[c]
        without = [line for each in lists if (line := _none(each))]
        shown = tuple(_error_list(maker, each) for each in lists if each.rows)
        sections.append(Section(id=f"class-{c}", title=name, notes=tuple(without), lists=shown))
    return sections


def _error_list(maker: CardMaker, errors: ErrorList) -> CardList:
    films, c = maker.films, errors.number
    same = Counter(films.groups[list(errors.rows)].tolist())
    cards = tuple(
        maker.card(row, c, errors.kind, [probability_line(films, row, c)], same=same[int(films.groups[row])])
        for row in errors.rows
    )
    what = "positives" if errors.kind == FALSE_NEGATIVE else "negatives"
    did = "are below the threshold" if errors.kind == FALSE_NEGATIVE else "reach the threshold"
    note = f"{errors.total:,} of {errors.of:,} {what} {did}. They are of {counted(errors.groups, 'group')}"
    note += f", at most {errors.most:,} of one." if errors.groups > 1 and errors.most > 1 else "."
    shown = len(errors.rows)
    note += f" The worst {shown:,} are shown." if shown < errors.total else ""
    return CardList(title=f"{errors.kind.capitalize()}s, {PARTS[errors.part]}", note=note, cards=cards)


def _none(errors: ErrorList) -> str:
    if errors.total:
        return ""
    what = "positive" if errors.kind == FALSE_NEGATIVE else "negative"
    if not errors.of:
        return f"{PARTS[errors.part].capitalize()}: no film is known to be {what}."
    return f"{PARTS[errors.part].capitalize()}: no {errors.kind} among {counted(errors.of, what)}."


def odd_section(maker: CardMaker, odd: Sequence[tuple[int, float]]) -> Section:
    """The films least like the training films: rows with their unlikeness, the oddest first."""
    cards = tuple(maker.card(row, NO_CLASS, ODD, [f"unlikeness {value:.2f}"]) for row, value in odd)
    note = (
        "The films least like the training films; 1 is what 99 of 100 training films stay below. Those that were "
        "trained on come out a little lower than others."
    )
    return Section(
        id="odd", title="Odd films", notes=(), lists=(CardList(title="Oddest first", note=note, cards=cards),)
    )


def suspect_section(maker: CardMaker, suspects: Sequence[Suspect]) -> Section:
    """Labels that probability and nearest films speak against, those of a class in a list, by rank."""
    by_class: dict[str, list[Card]] = {}
    for each in sorted(suspects, key=lambda each: (maker.films.classes.index(each.name), each.rank)):
        c = maker.films.classes.index(each.name)
        lines = [
            f"labelled {'positive' if each.label else 'negative'}, rank {each.rank}, score {each.score:.2f}",
            probability_line(maker.films, each.place, c),
            f"{each.neighbours:.0%} of its nearest films of other groups are positive",
        ]
        by_class.setdefault(each.name, []).append(maker.card(each.place, c, SUSPECT, lines))
    lists = tuple(CardList(title=name, note="", cards=tuple(cards)) for name, cards in by_class.items())
    notes = (
        "Labels that the probability and the nearest films speak against, a few positive and a few negative ones of "
        "each class. The score orders the labels of a class; it is not the chance that a label is wrong. "
        "More: suspects.csv.",
    )
    return Section(id="suspects", title="Label suspects", notes=notes, lists=lists)


def twin_section(maker: CardMaker, twins: Twins, most: int) -> Section:
    """Pairs of films that are one picture, the surest first."""
    films, cards = maker.films, []
    for twin in twins.pairs[:most]:
        seen = "pixels not compared" if twin.correlation is None else f"pixels correlate to {twin.correlation:.3f}"
        other = twin.b.place
        said = f"{PARTS[films.part(other)]}; group {films.groups[other]}"
        lines = [
            f"{twin.kind}: {seen}",
            *([f"labels contradict: {', '.join(twin.classes)}"] if twin.classes else []),
            f"second film: {', '.join(films.positives(other)) or 'no label'}; {said}",
        ]
        cards.append(replace(maker.card(twin.a.place, NO_CLASS, TWIN, lines), second=other, near=()))
    lists = (CardList(title="Pairs", note="", cards=tuple(cards)),) if cards else ()
    return Section(id="twins", title="Near twins", notes=tuple(twins.notes()), lists=lists)


def all_cards(sections: Sequence[Section]) -> list[Card]:
    """The cards of all sections, in the order of the page."""
    return [card for section in sections for each in section.lists for card in each.cards]


def kinds_of(cards: Sequence[Card]) -> list[str]:
    """The kinds that the cards have, errors first."""
    found = dict.fromkeys(card.kind for card in cards)
    return sorted(found, key=lambda kind: (kind not in KINDS, list(found).index(kind)))


def filters(films: RunFilms, cards: Sequence[Card]) -> Mapping[str, list[str]]:
    """What the page filters by beside class, part and kind: columns of two values or more among the cards."""
    out = {}
    for place, title in enumerate(films.columns):
        values = sorted({card.facts[place] for card in cards})
        if len(values) > 1:
            out[title] = values
    return out
