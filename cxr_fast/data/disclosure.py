"""Decide what may be shown: which columns could identify a person, and which texts hold paths or names of a run.

The rule, for `meta:` columns and for `view`: a column is shown where it has at most VALUES different values, none of
which looks like a name, an identifier, a contact or a full date, and its own name does not either; numbers are grouped
first (`metrics.subgroups`). Of such a column a value is shown where at least GROUPS groups have it.

The name of a shown column is shown, as the names of the classes are: it describes every row alike. The names of other
columns are shown by `prepare` alone, which answers whoever holds the table.
"""

from __future__ import annotations

import html
import math
import os
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from ..errors import InputError

# An absolute path, `~/...`, `file://...` or `C:\...`; a slash after a letter, a colon or a slash is part of an address.
_UNIX = r"(?<![\w/.:~<])~?/[A-Za-z_.][\w.+@%-]*(?:/[^\s'\"`,;|()<>]*)*"
ABSOLUTE = re.compile(rf"{_UNIX}|file://[^\s'\"`]+|\b[A-Za-z]:\\[^\s'\"`,;|()<>]*")
META = "meta:"
GROUPS, VALUES = 10, 12
# Longer texts are remarks, which may say anything.
LONG = 60
# Of more different texts these many are looked at for dates and names; so many that are no numbers are never shown.
SAMPLE = 1000


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words of a column's name that mean a person, a number of one, or a date.
_PERSONAL = _words(
    "accession address author birth birthdate birthday birthdt date dates datetime deathdate dob doctor "
    "email firstname forename guid initials insured lastname login mail mrn mrno nurse operator "
    "pat patientid patientname patnr phone physician pid postcode radiologist reader referrer referring reporter "
    "requester reviewer serial signature ssn street studyid surgeon surname technician technologist telephone "
    "timestamp uid url user username uuid zip zipcode"
)
# Words that mean one unless the name also says what thing it is of.
_OF_THINGS = _words("code id ident identifier ids name nr no num number")
_THINGS = _words(
    "age body clinic center centre department detector device gender hospital institution machine manufacturer model "
    "part plate position projection protocol race region room scanner series sex site software stage station unit "
    "vendor version view ward"
)
# Capitalised words that are no name of a person: two words or more are one unless each of them is here.
_PLAIN = _words(
    "a african agfa alaska american and anteroposterior antero ap asian black both british canon caribbean carestream "
    "center centre chest chinese clinic corporation current decubitus department dx east electric electronics "
    "emergency erect european ever female floor for former frontal fujifilm ge general gevaert group health healthcare "
    "healthineers hispanic hospital imaging in inc indian inpatient intensive islander kodak konica latino lateral "
    "left light ll lordotic low ltd male medical minolta mobile native never no non north not oblique of or other out "
    "outpatient pa pacific philips portable post posterior postero prone public private quality radiology ray right "
    "room samsung shimadzu siemens site smoker south stage standing state supine system systems the toshiba type unit "
    "university unknown upright view ward west white x"
)
# Projections and positions as data sets name them, which `prepare` counts however few images have them.
PROJECTIONS = _words(
    "antero-posterior anteroposterior ap decubitus erect frontal lat lateral left ll lordotic oblique pa portable "
    "postero-anterior posteroanterior prone right rl supine unknown upright view"
)

_MONTHS = r"(?:jan|feb|mar|mär|apr|may|mai|jun|jul|aug|sep|oct|okt|nov|dec|dez)[a-zä]*"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_DATE = re.compile(
    r"(?<!\d)\d{4}[-/._ ]\d{1,2}[-/._ ]\d{1,2}(?!\d)"
    r"|(?<!\d)\d{1,2}[-/._ ]\d{1,2}[-/._ ](?:\d{4}|\d\d)(?!\d)"
    r"|(?<![\d.])(?:1[89]|2[01])\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?!\d*\.\d*[1-9])"
    rf"|(?<!\d){_DAY}[\s.\-/]*{_MONTHS}[\s.,\-/]*\d{{2,4}}|\b{_MONTHS}[\s.\-/]*{_DAY}[\s.,\-/]+\d{{2,4}}"
    r"|\d{4}年\d{1,2}月\d{1,2}",
    re.IGNORECASE,
)
# Six digits in a row, letters before five, a UID, a UUID, a hash, an address of mail.
_CODE = re.compile(
    r"\d{6,}|[^\W\d_]+[-_ /#:.]?\d{5,}|\d+(?:\.\d+){3,}|\b[0-9a-f]{8}-[0-9a-f]{4}\b"
    r"|\b(?=[a-f]*\d)[0-9a-f]{12,}\b|\w@\w",
    re.IGNORECASE,
)
# Three numbers or more, as of a telephone.
_PARTS = re.compile(r"\+?\(?\d+\)?(?:[ \-/.]+\(?\d+\)?){2,}")
_IMAGE = re.compile(r"\.(png|jpe?g|dcm|dicom|tiff?|bmp)$", re.IGNORECASE)
_TITLED = re.compile(
    r"\w\^|\b(?:dr|prof|mr|mrs|ms|miss|herr|frau|mme|md|phd|hr|fr)\b\.?\s+\w|\w,?\s+(?:md|m\.d\.|phd)\b", re.IGNORECASE
)
_WORD = r"[^\W\d_]['’.]?(?:[^\W\d_]|['’-])*\.?"
_WORDS = re.compile(rf"{_WORD}(?:,\s*|\s+){_WORD}(?:\s+{_WORD}){{0,3}}")


def why_hidden(name: str, values: Sequence[str], groups: Sequence[str]) -> str:
    """Say why a column could identify a person, as `it holds full dates`; empty where nothing says that it could.

    name without `meta:`, values and groups N texts each, empty ones unknown.
    """
    filled = {value.strip() for value in values} - {""}
    if _named_like_a_person(name):
        return "its name means a person, an identifier or a date"
    some = sorted(filled)[:SAMPLE]
    tests = (
        ("full dates", is_date, some),
        ("identifiers", is_identifier, filled),
        ("names of persons", is_person, some),
    )
    for reason, test, texts in tests:
        if any(map(test, texts)):
            return f"it holds {reason}"
    if any(len(value) > LONG for value in filled):
        return "it holds long texts"
    if len(filled) > VALUES and all(map(_whole, filled)):
        known = [group for group, value in zip(groups, values, strict=True) if value.strip()]
        if len(filled) >= min(len(known), len(set(known))):
            return "its numbers differ from image to image or from group to group"
    return ""


def differ_everywhere(values: Sequence[str], codes: Collection[str] = ()) -> bool:
    """Whether the texts that are not empty are all different: more than VALUES, or 3 that are none of `codes`."""
    filled = [value for value in values if value]
    enough = len(filled) > VALUES or (len(filled) > 2 and not set(filled).intersection(codes))
    return enough and len(set(filled)) == len(filled)


def is_date(text: str) -> bool:
    """Whether a text holds a day of a year, however written: `19570503`, `3.5.1957`, `May 3, 1957`."""
    return _DATE.search(text) is not None


def is_identifier(text: str) -> bool:
    """Whether a text looks like the number of a person or of an examination, an address of mail or a file."""
    if (number := _number(text)) is not None:
        return number.is_integer() and abs(number) >= 1e5
    if _PARTS.fullmatch(text) and sum(map(str.isdigit, text)) >= 7:
        return True
    return any(pattern.search(text) is not None for pattern in (_CODE, ABSOLUTE, _IMAGE))


def is_person(text: str) -> bool:
    """Whether a text looks like a person's name: `MEIER^ANNA`, `Dr. Meier`, `Meier, Anna`, `Anna Meier`."""
    if _TITLED.search(text):
        return True
    words = re.findall(r"[^\W\d_]+", text)
    if not _WORDS.fullmatch(text) or _PLAIN.issuperset(map(str.casefold, words)):
        return False
    capitals = [word for word in words if word[0].isupper()]
    initials = "." in text or "," in text  # `A. Meier`, but `Scanner A`
    return len(capitals) >= 2 and (initials or all(len(word) > 1 for word in capitals))


def _named_like_a_person(name: str) -> bool:
    words = set(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).replace("_", " ").casefold().split())
    words = {part for word in words for part in re.findall(r"[^\W\d_]+", word)}
    if words & _PERSONAL or is_date(name) or is_identifier(name) or _TITLED.search(name):
        return True
    return bool(words & _OF_THINGS) and not words & _THINGS


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _whole(text: str) -> bool:
    number = _number(text)
    return number is not None and number.is_integer()


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """What must not leave: paths of this machine, the longest first, and names of images, patients and studies."""

    paths: tuple[str, ...]
    names: tuple[str, ...] = ()

    def clean(self, text: str) -> str:
        """Put the last part of each path in its place."""
        for path in self.paths:
            text = text.replace(path, last_part(path))
        return ABSOLUTE.sub(lambda found: last_part(found[0]), text)

    def clean_values(self, value: Any) -> Any:
        """Do so in every text of a JSON-ready value, its keys aside."""
        if isinstance(value, str):
            return self.clean(value)
        if isinstance(value, Mapping):
            return {key: self.clean_values(each) for key, each in value.items()}
        return [self.clean_values(each) for each in value] if isinstance(value, list | tuple) else value

    def find(self, text: str) -> str:
        """Say what a text holds that must not leave, in whatever spelling; empty where it holds nothing."""
        if path := ABSOLUTE.search(text):
            return f"the path {path[0]}"
        plain = spell_plainly(text)
        for name in (*self.paths, *self.names):
            key = spell_plainly(name)
            if key and key in plain and re.search(rf"(?<!\w){re.escape(key)}(?!\w)", plain):
                return f"{name!r}, a path or the name of an image, a patient or a study of the run"
        return ""


def spell_plainly(text: str) -> str:
    """One spelling of a text for all that mean the same: escapes of HTML, addresses and JSON read, letters composed and
    without case, and one space for each run of spaces, `_` and `-`."""
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), html.unescape(unquote(text)))
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def list_paths(run: Path, record: Mapping[str, Any]) -> list[str]:
    """List paths that a text of a run may hold, the longest first: of its folder, its cache, its data and its weights.

    record is the run's `run.json`.
    """
    cache, weights = record["cache"], str(record["cache"].get("weights") or "")
    known = [cache.get("path"), cache["dataset"].get("root"), run, run.resolve(), os.getcwd(), Path.home()]
    if not weights.startswith(("hf-hub:", "random:")) and (weights.count("/") != 1 or Path(weights).is_dir()):
        known.append(weights)
    found = {str(path).rstrip("/") for path in known if path and len(Path(str(path)).parts) > 1}
    return sorted(found, key=len, reverse=True)


def read_names(path: Path, classes: Collection[str]) -> tuple[str, ...]:
    """Read the names of images, groups and studies, and hashes, from a run's predictions.npz, sorted.

    Left out are what any text may hold: fewer than four characters, numbers of up to five digits, the classes, and
    values of `view` and `meta:` columns that have no digit and look like no person's name. Raises InputError where the
    file cannot be read.
    """
    try:
        with np.load(path) as file:
            columns = {name: file[name].astype(str).tolist() for name in file.files if file[name].dtype.kind in "US"}
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}); it names the patients that the texts are searched for."
        ) from error
    images = columns.pop("image", [])
    names = {part for image in images for part in (image, Path(image).name, Path(image).stem)}
    for column, values in columns.items():
        free = column == "view" or column.startswith(META)
        names |= {value for value in set(values) if not free or any(map(str.isdigit, value)) or is_person(value)}
    return tuple(sorted(n for n in names - set(classes) if len(n) >= 4 and not re.fullmatch(r"[\d.]{1,5}", n)))


def last_part(path: str) -> str:
    """Return a path's last part, whichever system it is of."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
