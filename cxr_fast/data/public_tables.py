"""Read the tables of NIH ChestX-ray14, CheXpert and MIMIC-CXR: one row per image, labels per class."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..system.tables import KNOWN_OR_NOT, Cells, coded, filled, multi_hot, need, read_csv
from .identifiers import spell_id
from .labels import CHEXPERT_CLASSES, NIH_FINDINGS, UNCERTAIN, UNKNOWN
from .layouts import ListedImages, by_name, by_stem, by_study

CHEXPERT_CODES = KNOWN_OR_NOT | {"-1": UNCERTAIN, "-1.0": UNCERTAIN}


def decade(age: str) -> str:
    """An age such as `58`, `058Y` or `005M` as `50-59`; "" where it is none a person has."""
    match = re.fullmatch(r"(\d+)(?:\.0+)?([YMWD]?)", age.strip().upper())
    if not match:
        return ""
    years = int(match[1]) if match[2] in ("", "Y") else 0
    return f"{years // 10 * 10}-{years // 10 * 10 + 9}" if years < 120 else ""


def _first_of(cells: Cells, *columns: str) -> list[str] | None:
    return next((cells[name] for name in columns if name in cells), None)


def _people(sex: list[str] | None, age: list[str] | None) -> dict[str, list[str]]:
    out = {"sex": sex} if sex else {}
    return out | {"age": [decade(value) for value in age]} if age else out


def read_nih(file: Path) -> ListedImages:
    """NIH ChestX-ray14: `Data_Entry_2017*.csv`, a row an image, findings joined by a bar.

    A patient's visits, up to years apart, are studies of their own: `patient/follow-up`, else each image.
    """
    cells = read_csv(file)
    need(cells, ["Image Index", "Finding Labels", "Patient ID", "View Position"], file)
    found = [set(text.split("|")) - {"No Finding"} for text in filled(cells, "Finding Labels", file)]
    if strange := sorted(set().union(*found) - set(NIH_FINDINGS)):
        raise InputError(f"{file}: 'Finding Labels' names {strange[0]!r}, not one of the {len(NIH_FINDINGS)} findings.")
    patients = filled(cells, "Patient ID", file)
    visits = filled(cells, "Follow-up #", file) if "Follow-up #" in cells else cells["Image Index"]
    return ListedImages(
        kind="nih",
        file=file,
        images=filled(cells, "Image Index", file),
        groups=patients,
        studies=[f"{patient}/{visit}" for patient, visit in zip(patients, visits, strict=True)],
        views=cells["View Position"],
        classes=NIH_FINDINGS,
        labels=multi_hot(found, NIH_FINDINGS),
        subgroups=_people(_first_of(cells, "Patient Gender", "Patient Sex"), _first_of(cells, "Patient Age")),
        key=by_name,
    )


def read_chexpert(file: Path) -> ListedImages:
    """CheXpert: `Path` names patient, study and view; a label of -1 is UNCERTAIN, a blank one UNKNOWN."""
    cells = read_csv(file)
    need(cells, ["Path", *CHEXPERT_CLASSES], file)
    parts = [path.replace("\\", "/").split("/") for path in filled(cells, "Path", file)]
    if short := [path for path, part in zip(cells["Path"], parts, strict=True) if len(part) < 3]:
        raise InputError(f"{file}: 'Path' holds {short[0]!r}; it needs patient/study/view.")
    return ListedImages(
        kind="chexpert",
        file=file,
        images=cells["Path"],
        groups=[part[-3] for part in parts],
        studies=["/".join(part[-3:-1]) for part in parts],
        views=_first_of(cells, "Frontal/Lateral"),
        classes=CHEXPERT_CLASSES,
        labels=coded(cells, CHEXPERT_CLASSES, CHEXPERT_CODES, file),
        subgroups=_people(_first_of(cells, "Sex"), _first_of(cells, "Age")),
        key=by_study,
    )


def read_mimic(file: Path) -> ListedImages:
    """MIMIC-CXR: one table with `dicom_id` and labels, or its labels of each study beside `*metadata.csv*`.

    A label of -1 is UNCERTAIN, a blank one UNKNOWN. Studies are matched as identifiers, however the two tables spell
    them. Raises InputError where no study matches, where a study is listed twice with different labels, and where the
    tables give it to two patients.
    """
    cells = read_csv(file)
    need(cells, ["subject_id", "study_id", *CHEXPERT_CLASSES], file)
    values = coded(cells, CHEXPERT_CLASSES, CHEXPERT_CODES, file)
    notes: tuple[str, ...] = ()
    if "dicom_id" not in cells:
        beside = sorted(file.parent.glob("*metadata.csv*"))
        if len(beside) != 1:
            raise InputError(f"{file} has no dicom_id: it needs MIMIC-CXR's metadata CSV beside it, one of them.")
        images = read_csv(beside[0])
        need(images, ["dicom_id", "subject_id", "study_id"], beside[0])
        row_of, notes = _match_studies(cells, values, file, images, beside[0])
        # A few studies have images and no labels: their last row here is all unknown.
        values = np.vstack([values, np.full((1, values.shape[1]), UNKNOWN, np.int8)])[row_of]
        file, cells = beside[0], images
    return ListedImages(
        kind="mimic",
        file=file,
        images=filled(cells, "dicom_id", file),
        groups=filled(cells, "subject_id", file),
        studies=filled(cells, "study_id", file),
        views=_first_of(cells, "ViewPosition"),
        classes=CHEXPERT_CLASSES,
        labels=values,
        subgroups=_people(_first_of(cells, "gender", "sex", "Sex"), _first_of(cells, "anchor_age", "Age")),
        key=by_stem,
        notes=notes,
    )


def _spell_ids(cells: Cells, column: str, file: Path) -> list[str]:
    """A column of MIMIC's identifiers in one spelling: without the `p` and `s` that its folders have."""
    letter = {"subject_id": "p", "study_id": "s"}[column]
    return [spell_id(text).removeprefix(letter) for text in filled(cells, column, file)]


def _match_studies(
    studies: Cells, labels: np.ndarray, file: Path, images: Cells, metadata: Path
) -> tuple[list[int], tuple[str, ...]]:
    """The row in `studies` of each image, -1 where its study is not there; a note of how many these are."""
    row_of: dict[str, int] = {}
    patients = _spell_ids(studies, "subject_id", file)
    for row, study in enumerate(_spell_ids(studies, "study_id", file)):
        first = row_of.setdefault(study, row)
        if (labels[first] != labels[row]).any() or patients[first] != patients[row]:
            raise InputError(
                f"{file} lists study {study} twice with different labels or patients, in data rows {first + 1} and "
                f"{row + 1}; keep the one that is right."
            )
    wanted = _spell_ids(images, "study_id", metadata)
    found = [row_of.get(study, -1) for study in wanted]
    if (lost := found.count(-1)) == len(found):
        raise InputError(
            f"No study of {metadata.name} is in {file.name}: the first are {wanted[0]} and {next(iter(row_of))}; "
            "give tables of the same studies."
        )
    for at, (row, patient) in enumerate(zip(found, _spell_ids(images, "subject_id", metadata), strict=True)):
        if row >= 0 and patients[row] != patient:
            raise InputError(
                f"Study {wanted[at]} is of patient {patient} in {metadata.name}, data row {at + 1}, and of "
                f"{patients[row]} in {file.name}, data row {row + 1}; correct one of them."
            )
    if not lost:
        return found, ()
    named = wanted[found.index(-1)]
    return found, (
        f"{lost:,} of {len(found):,} images have no labels: their studies, first {named}, are not in {file.name}.",
    )
