"""Class lists of the public datasets, and Indiana's MeSH headings to its 35 classes by a versioned table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import SchemaError

SCHEMA = 1
# Beside this file in the wheel too. importlib.resources would cost 10 ms of import for the same bytes.
TABLE_FILE = Path(__file__).parents[1] / "assets" / "indiana_headings.json"
NO_INDEXING = "no indexing"

NIH_FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia",
    "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax",
)  # fmt: skip
CHEXPERT_CLASSES = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip


def normalise(heading: str) -> str:
    """A heading in the form the table is compared in: no qualifiers, spaces collapsed, casefolded.

    `normalise("Cardiac  Shadow /enlarged/mild")` is `"cardiac shadow"`.
    """
    return " ".join(heading.partition("/")[0].split()).casefold()


def split_headings(headings: str | Iterable[str]) -> frozenset[str]:
    """The normalised headings of one study, from a `MeSH` or `Problems` field or from `<major>` elements.

    Separators are semicolons only: headings themselves contain commas.
    """
    fields = (headings,) if isinstance(headings, str) else headings
    found = {normalise(part) for field in fields for part in field.split(";")}
    return frozenset(found - {""})


@dataclass(frozen=True, kw_only=True)
class HeadingTable:
    """The versioned table: normalised heading to classes, the class of nothing, and what misleads."""

    version: str
    headings: dict[str, tuple[str, ...]]
    fallback: str
    traps: tuple[tuple[str, str], ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Every class the table can give, sorted without regard to case."""
        named = {name for names in self.headings.values() for name in names}
        return tuple(sorted(named | {self.fallback}, key=str.casefold))


def parse_table(text: str) -> HeadingTable:
    """The table from its JSON. Raises SchemaError for a schema number this version does not know."""
    raw = json.loads(text)
    if raw.get("schema") != SCHEMA:
        written = f"{raw.get('name', 'heading table')} {raw.get('version', '?')}"
        raise SchemaError(f"{written} has schema {raw.get('schema')!r}; this cxr-fast reads schema {SCHEMA}.")
    show = raw["display"]
    return HeadingTable(
        version=f"{raw['name']} {raw['version']}",
        headings={
            normalise(heading): tuple(show.get(name, name) for name in names)
            for heading, names in raw["headings"].items()
        },
        fallback=show.get(raw["fallback"], raw["fallback"]),
        traps=tuple(sorted(raw.get("traps", {}).items())),
    )


_TABLE = parse_table(TABLE_FILE.read_text(encoding="utf-8"))
TABLE_VERSION = _TABLE.version
NORMAL = _TABLE.fallback
CLASSES: tuple[str, ...] = _TABLE.classes
# (class, one sentence): names that promise something else than the images they stand for.
TRAPS: tuple[tuple[str, str], ...] = _TABLE.traps


def classes_of_headings(headings: str | Iterable[str]) -> tuple[str, ...]:
    """The classes of one study, sorted; ("Normal",) where no heading gives one.

    `classes_of_headings("Opacity/lung/base;Heart Failure")` is `("Cardiomegaly", "Edema", "Lesion")`.
    Headings the table lacks add nothing, as in the published labels.
    """
    found = {name for heading in split_headings(headings) for name in _TABLE.headings.get(heading, ())}
    return tuple(sorted(found or {NORMAL}, key=str.casefold))


def unindexed(headings: str | Iterable[str]) -> bool:
    """Whether nobody indexed this study ("No Indexing", or no heading): labelled Normal, really unknown."""
    return split_headings(headings) <= {NO_INDEXING}


def only_dropped(headings: str | Iterable[str]) -> bool:
    """Whether headings exist but none gives a class (devices, tortuous aorta): labelled Normal, is not."""
    found = split_headings(headings)
    silent = not any(heading in _TABLE.headings for heading in found)
    return silent and normalise(NORMAL) not in found and not unindexed(headings)
