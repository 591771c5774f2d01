"""Read patient, study, view, sex and age from the tags of DICOM files; names and dates stay there."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...system.extras import needs
from ..disclosure import is_person
from ..formats.dicom import looks_like_dicom
from ..public_tables import decade

# Of the dates only the age goes further.
_READ = [
    *("PatientID", "StudyInstanceUID", "ViewPosition", "PatientSex", "PatientAge"),
    *("PatientBirthDate", "StudyDate", "Rows", "Columns"),
]
NO_IMAGE, NOT_READ, NO_DICOM = (
    "without an image (report, directory)",
    "that cannot be read as DICOM",
    "that are no DICOM",
)


@dataclass(frozen=True, kw_only=True)
class FilmTags:
    """What the tags of one file say: patient and study as numbers, "" where blank; view; sex as F, M or O; decade."""

    patient: str
    study: str
    view: str
    sex: str
    age: str


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does."""
    try:
        with path.open("rb") as file:
            return looks_like_dicom(file.read(132))
    except OSError:
        return False


def read_tags(root: Path, names: Sequence[str]) -> tuple[list[FilmTags | None], Counter[str]]:
    """The tags of each of N files below `root`, None where there are none, and how many of these by reason.

    Raises InputError where pydicom is missing, and where a PatientID holds the name of a person.
    """
    try:
        import pydicom
    except ImportError:
        raise InputError(f"{root}: reading DICOM tags {needs('pydicom')}.") from None
    found: list[FilmTags | None] = []
    lost: Counter[str] = Counter()
    for name in names:
        tags, why = (None, NO_DICOM) if not is_dicom(root / name) else _read_file(pydicom, root / name)
        if tags is None:
            lost[why] += 1
        elif is_person(tags.patient) or "^" in tags.patient:
            raise InputError(f"{root / name}: PatientID holds the name of a person, which no manifest keeps.")
        found.append(tags)
    return found, lost


def _read_file(pydicom: Any, path: Path) -> tuple[FilmTags | None, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that the standard does not allow
            ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_READ, force=True)
            text = {name: _text(ds, name) for name in _READ}
    except Exception:  # pydicom raises whatever the bytes make it raise
        return None, NOT_READ
    if not text["Rows"] or not text["Columns"]:
        return None, NO_IMAGE
    return FilmTags(
        patient=text["PatientID"],
        study=text["StudyInstanceUID"],
        view=text["ViewPosition"].upper(),
        sex=text["PatientSex"].upper() if text["PatientSex"].upper() in ("F", "M", "O") else "",
        age=decade(text["PatientAge"]) or _age(text["PatientBirthDate"], text["StudyDate"]),
    ), ""


def _text(ds: Any, name: str) -> str:
    value = ds.get(name)
    return "" if value is None else " ".join(str(value).split()).strip("\0 ")


def _age(born: str, day: str) -> str:
    """The decade of the age at a day, both written `19570503`; empty where one is missing."""
    if not (re.fullmatch(r"\d{8}", born) and re.fullmatch(r"\d{8}", day)) or day < born:
        return ""
    return decade(str(int(day[:4]) - int(born[:4]) - (day[4:] < born[4:])))


@dataclass(frozen=True, kw_only=True)
class TagColumns:
    """Columns (N values each) of films whose tags were read, and notes for people."""

    groups: list[str]
    studies: list[str]
    views: list[str]
    subgroups: dict[str, list[str]]
    notes: tuple[str, ...]


def to_columns(names: Sequence[str], tags: Sequence[FilmTags]) -> TagColumns:
    """Columns of N films. A film without a patient is grouped by its study, without both by itself; notes say so."""
    rows = list(zip(names, tags, strict=True))
    sub = {"sex": [tag.sex for tag in tags], "age": [tag.age for tag in tags]}
    return TagColumns(
        groups=[tag.patient or tag.study or f"film {name}" for name, tag in rows],
        studies=[tag.study or tag.patient or f"film {name}" for name, tag in rows],
        views=[tag.view for tag in tags],
        subgroups={name: values for name, values in sub.items() if any(values)},
        notes=tuple(_note_blanks(tags)),
    )


def _note_blanks(tags: Sequence[FilmTags]) -> Iterator[str]:
    if by_study := sum(not tag.patient and bool(tag.study) for tag in tags):
        yield f"{by_study:,} film(s) have no PatientID: the study is their group, so a patient can be on both sides."
    if alone := sum(not tag.patient and not tag.study for tag in tags):
        yield f"{alone:,} film(s) have neither PatientID nor StudyInstanceUID: each is a group of its own."
