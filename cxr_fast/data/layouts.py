"""Which dataset a folder or file is, and what its own files say: one function a layout, no image looked at.

Floor 2, below `datasets`, which finds the images these rows name.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np

from ..errors import InputError
from ..system.tables import (
    KNOWN_OR_NOT,
    Cells,
    coded,
    filled,
    multi_hot,
    need,
    read_csv,
    read_header,
)
from . import labels

Unindexed = Literal["normal", "unknown"]

NIH_FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia",
    "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax",
)  # fmt: skip
CHEXPERT_CLASSES = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
CHEXPERT_CODES = KNOWN_OR_NOT | {"-1": -1, "-1.0": -1}

ARCHIVES = (".tgz", ".tar", ".tar.gz")
TABLES = (".csv", ".csv.gz")
LOOKED_FOR = (
    "manifest.csv or manifest.parquet, indiana_reports.csv, Data_Entry_2017*.csv, a CheXpert or MIMIC-CXR table, "
    "OpenI reports (*.xml or NLMCXR_reports.tgz)"
)

REPORTS, PROJECTIONS = "indiana_reports.csv", "indiana_projections.csv"
REPORT_BYTES = 4 * 2**20  # the largest of the 3,955 OpenI reports has 8,967 bytes
REPORT_COUNT = 100_000
SUFFIXES = re.compile(r"(\.(png|jpe?g|dcm|dicom))+$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The images a dataset lists (N), as its files name them, with labels (N, C) int8: 1, 0, -1 unknown.

    `file` is what an error names. `key` makes a listed name and a path below the dataset comparable;
    None where the listed name is itself a path from the folder of `file`.
    """

    kind: str
    file: Path
    images: Sequence[str]
    groups: Sequence[str]
    classes: tuple[str, ...]
    labels: np.ndarray
    views: Sequence[str] | None = None
    studies: Sequence[str] | None = None
    subgroups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    key: Callable[[str], str] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)


def by_name(path: str) -> str:
    """The file name."""
    return path.rpartition("/")[2]


def by_stem(path: str) -> str:
    """The file name without image suffixes, OpenI's two spellings of one image made equal.

    `CXR1_1_IM-0001-3001` in a report, `CXR1_1_IM-0001-3001.png`, `1_IM-0001-3001.dcm` and Kaggle's
    `1_IM-0001-3001.dcm.png` are the same radiograph.
    """
    return re.sub(r"^CXR(\d+)_(?:\1_)?", r"\1_", SUFFIXES.sub("", by_name(path)))


def by_study(path: str) -> str:
    """The last three parts of a path: patient, study, view."""
    return "/".join(path.split("/")[-3:])


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


# ------------------------------------------------------------------------------------------- recognise


def _kind_of(header: Collection[str]) -> str | None:
    """Which layout a table's columns belong to."""
    names = set(header)
    chexpert = bool(names & set(CHEXPERT_CLASSES))
    tests = {
        "manifest": {"image", "group"} <= names,
        "indiana": "uid" in names and bool(names & {"MeSH", "Problems", "label"}),
        "nih": bool(names & {"Image Index", "Finding Labels"}),
        "chexpert": "Path" in names and chexpert,
        "mimic": {"subject_id", "study_id"} <= names and chexpert,
    }
    return next((kind for kind, ok in tests.items() if ok), None)


def _kind_of_file(file: Path) -> str:
    name = file.name.lower()
    if name.endswith(ARCHIVES):
        return "openi"
    if name.endswith(".parquet"):
        return "manifest"
    if not name.endswith(TABLES):
        raise InputError(f"{file} is no dataset: give a folder, a .csv or .parquet manifest, or OpenI's .tgz.")
    header = read_header(file)
    if kind := _kind_of(header):
        return kind
    if {"image", "group"} & set(header):
        return "manifest"  # with the other column forgotten: its reader says so
    shown = ", ".join(header[:6])[:120]
    mend = "separate columns by commas" if len(header) == 1 else "a manifest has image, group, then one column a class"
    raise InputError(f"{file} is no table cxr-fast knows (columns: {shown}): {mend}.")


def _sniff(file: Path) -> str | None:
    try:
        return _kind_of(read_header(file))
    except InputError:
        return None


def _candidates(folder: Path) -> list[tuple[str, Path]]:
    """(kind, file) of the datasets in a folder; well-known names come before whatever else lies there."""
    named = [("manifest", folder / name) for name in ("manifest.csv", "manifest.parquet")]
    named += [("indiana", folder / REPORTS)]
    named += [("nih", path) for path in sorted(folder.glob("Data_Entry_2017*.csv"))]
    named += [("mimic", path) for path in sorted(folder.glob("mimic-cxr-*-chexpert.csv*"))]
    if found := [(kind, path) for kind, path in named if path.is_file()]:
        return found
    tables = sorted(path for suffix in TABLES for path in folder.glob("[!.]*" + suffix))
    if found := [(kind, path) for path in tables if (kind := _sniff(path))]:
        return found
    archives = [path for path in (folder / "NLMCXR_reports.tgz",) if path.is_file()]
    reports = [path for path in (folder, folder / "ecgen-radiology") if next(path.glob("[!.]*.xml"), None)]
    return [("openi", path) for path in archives + reports]


def recognise(source: Path) -> tuple[str, Path]:
    """(kind, file or folder) of a source. Raises InputError where nothing, or more than one thing, is recognised."""
    if source.is_file():
        return _kind_of_file(source), source
    if not source.is_dir():
        raise InputError(f"{source}: no such file or folder.")
    found = _candidates(source)
    if len(found) > 1:
        names = ", ".join(path.name for _, path in found[:5])
        raise InputError(f"{source} holds several datasets ({names}): give the one file you mean.")
    if not found:
        raise InputError(f"{source} holds no dataset. Looked for: {LOOKED_FOR}.")
    return found[0]


# --------------------------------------------------------------------------------------------- Indiana


def _heading_labels(headings: Sequence[str]) -> np.ndarray:
    return multi_hot([labels.classes_of_headings(text) for text in headings], labels.CLASSES)


def _doubt(out: np.ndarray, headings: Sequence[str], unindexed: Unindexed) -> dict[str, Any]:
    """Mask in place what the headings do not tell; how many studies that concerns, masked or not."""
    nobody = np.array([labels.unindexed(text) for text in headings], bool)
    dropped = np.array([labels.only_dropped(text) for text in headings], bool)
    if unindexed == "unknown":
        out[nobody] = -1
        out[dropped, labels.CLASSES.index(labels.NORMAL)] = -1
    return {
        "heading_table": labels.TABLE_VERSION,
        "unindexed": unindexed,
        "unindexed_studies": int(nobody.sum()),
        "only_dropped_studies": int(dropped.sum()),
    }


def _published_labels(column: Sequence[str], file: Path) -> np.ndarray:
    names = [{name.strip() for name in text.split(";")} - {""} for text in column]
    found = [{labels.NORMAL if name == "normal" else name for name in study} for study in names]
    if strange := sorted(set().union(*found) - set(labels.CLASSES)):
        raise InputError(
            f"{file}: column 'label' names {strange[0]!r}, not one of the {len(labels.CLASSES)} classes. "
            "Remove the column and labels come from the headings."
        )
    if set() in found:
        raise InputError(f"{file}: column 'label' is blank in data row {found.index(set()) + 1}.")
    return multi_hot(found, labels.CLASSES)


def _indiana_study_labels(studies: Cells, file: Path, unindexed: Unindexed) -> tuple[np.ndarray, dict[str, Any]]:
    """(studies, 35) int8 from the `label` column where there is one, else from the headings."""
    headings = _first_of(studies, "MeSH", "Problems")
    if "label" in studies:
        if headings is None and unindexed == "unknown":
            raise InputError(f"{file} has no MeSH column, so what was not indexed cannot be told.")
        values = _published_labels(studies["label"], file)
    elif headings is not None:
        values = _heading_labels(headings)
    else:
        raise InputError(f"{file} lacks a column to take labels from: MeSH, Problems or label.")
    return values, _doubt(values, headings, unindexed) if headings else {}


def indiana(reports: Path, unindexed: Unindexed) -> Rows:
    """The Kaggle copy of Indiana University: reports, and projections beside them, which list the images."""
    projections = reports.with_name(PROJECTIONS)
    if not projections.is_file():
        raise InputError(f"{reports} needs {PROJECTIONS} beside it: it lists the images.")
    studies, images = read_csv(reports), read_csv(projections)
    need(studies, ["uid"], reports)
    need(images, ["uid", "filename", "projection"], projections)
    values, info = _indiana_study_labels(studies, reports, unindexed)
    row_of = {uid: row for row, uid in enumerate(filled(studies, "uid", reports))}
    if len(row_of) < len(studies["uid"]):
        raise InputError(f"{reports} lists uid {Counter(studies['uid']).most_common(1)[0][0]} twice.")
    if lost := sorted(set(filled(images, "uid", projections)) - set(row_of)):
        named = ", ".join(lost[:5])
        raise InputError(f"{projections}: {len(lost)} uid(s) have no row in {reports.name}, first {named}.")
    return Rows(
        kind="indiana",
        file=projections,
        images=filled(images, "filename", projections),
        groups=images["uid"],
        views=images["projection"],
        classes=labels.CLASSES,
        labels=values[[row_of[uid] for uid in images["uid"]]],
        key=by_name,
        info=info,
    )


# ----------------------------------------------------------------------------------------------- OpenI


def _report_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of each XML report, from a folder or from the archive; nothing is written to disk."""
    if source.is_dir():
        for path in sorted(source.rglob("[!.]*.xml")):
            with path.open("rb") as file:
                yield path.name, file.read(REPORT_BYTES + 1)
        return
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                report = member.isfile() and re.search(r"(^|/)[^/.][^/]*\.xml$", member.name)
                if report and (content := archive.extractfile(member)):
                    yield member.name, content.read(REPORT_BYTES + 1)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{source} is not a whole tar archive ({reason.rstrip('( ')}): fetch it again.") from None


def _parse_report(name: str, data: bytes) -> tuple[str, list[str], list[str]]:
    """(uid, headings, image ids) of one report.

    Entities and document types are refused, not expanded: that is where an XML parser can be made to
    read other files or to fill the memory.
    """
    if len(data) > REPORT_BYTES:
        raise InputError(f"{name} is larger than {REPORT_BYTES >> 20} MiB: not an OpenI report.")
    try:
        text = data.decode("utf-8-sig")
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise InputError(f"{name} declares a document type or entities, which OpenI reports do not: refused.")
        root = ElementTree.fromstring(text)
    except (UnicodeDecodeError, ElementTree.ParseError) as error:
        raise InputError(f"{name} is not a whole XML file in UTF-8: {error}.") from None
    uid = root.find("uId")
    named = "" if uid is None else uid.get("id", "")
    headings = [element.text or "" for element in root.iterfind("MeSH/major")]
    images = [element.get("id", "") for element in root.iterfind("parentImage")]
    return (named or PurePosixPath(name).stem).removeprefix("CXR"), headings, images


def openi(source: Path, unindexed: Unindexed) -> Rows:
    """The OpenI XML reports, a folder or the archive; views only where Kaggle's projections lie beside them."""
    uids: list[str] = []
    headings: list[str] = []
    images: list[str] = []
    study: list[int] = []
    for count, (name, data) in enumerate(_report_files(source)):
        if count >= REPORT_COUNT:
            raise InputError(f"{source} holds more than {REPORT_COUNT:,} reports: not OpenI.")
        uid, found, ids = _parse_report(name, data)
        if not ids:
            continue  # 104 of the 3,955 reports
        study += [len(uids)] * len(ids)
        images += ids
        uids.append(uid)
        headings.append(";".join(found))
    if not images:
        raise InputError(f"{source} holds no OpenI report that names an image (<parentImage id=...>).")
    values = _heading_labels(headings)
    info = _doubt(values, headings, unindexed)
    views: dict[str, str] = {}
    for beside in filter(Path.is_file, (source / PROJECTIONS, source.parent / PROJECTIONS)):
        listed = read_csv(beside)
        need(listed, ["filename", "projection"], beside)
        views |= zip(map(by_stem, listed["filename"]), listed["projection"], strict=True)
    return Rows(
        kind="openi",
        file=source,
        images=images,
        groups=[uids[row] for row in study],
        views=[views.get(by_stem(image), "") for image in images],
        classes=labels.CLASSES,
        labels=values[study],
        key=by_stem,
        info=info,
    )


# ------------------------------------------------------------------------------ NIH, CheXpert, MIMIC-CXR


def nih(file: Path) -> Rows:
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
    return Rows(
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


def chexpert(file: Path) -> Rows:
    """CheXpert: `Path` names patient, study and view; uncertain (-1) and unmentioned labels are both unknown."""
    cells = read_csv(file)
    need(cells, ["Path", *CHEXPERT_CLASSES], file)
    parts = [path.split("/") for path in filled(cells, "Path", file)]
    if short := [path for path, part in zip(cells["Path"], parts, strict=True) if len(part) < 3]:
        raise InputError(f"{file}: 'Path' holds {short[0]!r}; it needs patient/study/view.")
    return Rows(
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


def mimic(file: Path) -> Rows:
    """MIMIC-CXR: one table with `dicom_id` and labels, or its labels a study beside `*metadata.csv*`."""
    cells = read_csv(file)
    need(cells, ["subject_id", "study_id", *CHEXPERT_CLASSES], file)
    values = coded(cells, CHEXPERT_CLASSES, CHEXPERT_CODES, file)
    if "dicom_id" not in cells:
        beside = sorted(file.parent.glob("*metadata.csv*"))
        if len(beside) != 1:
            raise InputError(f"{file} has no dicom_id: it needs MIMIC-CXR's metadata CSV beside it, one of them.")
        row_of = {study: row for row, study in enumerate(cells["study_id"])}
        file, cells = beside[0], read_csv(beside[0])
        need(cells, ["dicom_id", "subject_id", "study_id"], file)
        # A few studies have images and no labels: their last row here is all unknown.
        values = np.vstack([values, np.full((1, values.shape[1]), -1, np.int8)])
        values = values[[row_of.get(study, -1) for study in cells["study_id"]]]
    return Rows(
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
    )
