"""Labels: their codes, the class lists of the public data sets, how CheXpert's and MIMIC's blank and uncertain labels
count, and Indiana's MeSH headings to its 35 classes by a versioned table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InputError, SchemaError

if TYPE_CHECKING:  # help texts name the rules, and numpy would take longer than they do
    import numpy as np

# Beside 1 and 0. An uncertain label is a target of SOFT in training and unknown in every figure.
UNKNOWN, UNCERTAIN = -1, -2
# The middle of the range from which Pham et al. (Interpreting chest X-rays via CNNs that exploit hierarchical disease
# dependencies and uncertainty labels, 2021) draw the target of an uncertain label, 0.55 to 0.85. A loss is linear in
# its target, so the gradient is the mean of theirs.
SOFT = 0.7
RULED = ("chexpert", "mimic")

Blank = Literal["unknown", "negative"]
Uncertain = Literal["unknown", "positive", "negative", "soft"]

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


def check_class_names(classes: Iterable[str], file: Path) -> None:
    """Raise InputError for a class name with a semicolon, which separates the findings of a film in predictions."""
    if joined := [name for name in classes if ";" in name]:
        raise InputError(
            f"{file}: the class {joined[0]!r} holds ';', which separates findings in predictions; rename it."
        )


@dataclass(frozen=True, kw_only=True)
class LabelRules:
    """How the labels of CheXpert and MIMIC-CXR count that are blank (not mentioned) or -1 (uncertain).

    `negative` for blanks is how the authors of both data sets train. An uncertain label may be left out (`unknown`),
    count as `positive` or `negative` in training and in every figure, or be `soft`: a target of SOFT in training, and
    unknown in every figure. Raises InputError for another word.

        >>> LabelRules(blank="negative", uncertain="soft").uncertain
        'soft'
    """

    blank: Blank = "unknown"
    uncertain: Uncertain = "unknown"

    def __post_init__(self) -> None:
        for flag, hint in (("blank", Blank), ("uncertain", Uncertain)):
            words = hint.__args__  # type: ignore[attr-defined]
            if getattr(self, flag) not in words:
                raise InputError(f"--{flag}: {getattr(self, flag)!r} is none of {', '.join(words)}.")

    def apply(self, labels: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """Count labels (N, C) of 1, 0, UNKNOWN where blank and UNCERTAIN as the rules say; and describe what was done.

        An image whose labels are all blank was never labelled, for the labellers of both data sets call an image
        without findings "No Finding": its labels stay unknown. In a labelled image a blank "No Finding" is a negative
        like every other blank.
        """
        blank, uncertain = labels == UNKNOWN, labels == UNCERTAIN
        labelled = ~blank.all(axis=1, keepdims=True)
        out = labels.copy()
        if self.blank == "negative":
            out[blank & labelled] = 0
        out[uncertain] = {"unknown": UNKNOWN, "positive": 1, "negative": 0, "soft": UNCERTAIN}[self.uncertain]
        counts = {"blank_labels": blank & labelled, "uncertain_labels": uncertain, "unlabelled_images": ~labelled}
        return out, asdict(self) | {name: int(found.sum()) for name, found in counts.items()}


def describe_rules(dataset: Mapping[str, Any]) -> str:
    """How blank and uncertain labels of a data set counted, as one sentence; empty for a layout that has neither.

    `dataset` is a manifest's `info` or the record of it in a cache or a run.
    """
    rules = dataset.get("label_rules")
    if rules is None:
        known = dataset.get("kind") in RULED  # read before there was a choice
        return "Blank and uncertain (-1) labels count as unknown." if known else ""
    blank, uncertain = (f"{rules[name]:,} " if name in rules else "" for name in ("blank_labels", "uncertain_labels"))
    said = f"{blank}blank labels count as {rules['blank']}, {uncertain}uncertain (-1) labels "
    if rules["uncertain"] == "soft":
        said += f"are targets of {SOFT:g} in training and unknown in every figure"
    else:
        said += f"count as {rules['uncertain']}"
    if count := rules.get("unlabelled_images"):
        said += f"; {count:,} image(s) have no label at all and stay unknown"
    return said[:1].upper() + said[1:] + "."


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
