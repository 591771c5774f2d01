"""Read the Indiana collection: the Kaggle tables, or OpenI's own XML reports."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np

from ..errors import InputError
from ..system.tables import Cells, filled, multi_hot, need, read_csv
from . import labels
from .identifiers import spell_id
from .layouts import PROJECTIONS, ListedImages, by_name, by_stem

Unindexed = Literal["normal", "unknown"]

REPORT_BYTES = 4 * 2**20  # the largest of the 3,955 OpenI reports has 8,967 bytes
REPORT_COUNT = 100_000


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
    headings = studies.get("MeSH", studies.get("Problems"))
    if "label" in studies:
        if headings is None and unindexed == "unknown":
            raise InputError(f"{file} has no MeSH column to find unindexed studies by: leave --unindexed out.")
        values = _published_labels(studies["label"], file)
    elif headings is not None:
        values = _heading_labels(headings)
    else:
        raise InputError(f"{file} lacks a column to take labels from: MeSH, Problems or label.")
    return values, _doubt(values, headings, unindexed) if headings else {}


def _note_no_headings(info: dict[str, Any], studies: int) -> tuple[str, ...]:
    """A line where no study has a heading that gives a class, so that all would be Normal."""
    if not studies or info.get("unindexed_studies", 0) + info.get("only_dropped_studies", 0) < studies:
        return ()
    return (f"No study of {studies:,} has a heading that gives a class: Normal is all that is known of them.",)


def read_kaggle(reports: Path, unindexed: Unindexed) -> ListedImages:
    """The Kaggle copy of Indiana University: reports, and projections beside them, which list the images."""
    projections = reports.with_name(PROJECTIONS)
    if not projections.is_file():
        raise InputError(f"{reports} needs {PROJECTIONS} beside it: it lists the images.")
    studies, images = read_csv(reports), read_csv(projections)
    need(studies, ["uid"], reports)
    need(images, ["uid", "filename", "projection"], projections)
    values, info = _indiana_study_labels(studies, reports, unindexed)
    uids = [spell_id(uid) for uid in filled(studies, "uid", reports)]
    row_of = {uid: row for row, uid in enumerate(uids)}
    if len(row_of) < len(uids):
        raise InputError(f"{reports} lists uid {Counter(uids).most_common(1)[0][0]} twice.")
    wanted = [spell_id(uid) for uid in filled(images, "uid", projections)]
    if lost := sorted(set(wanted) - set(row_of)):
        named = ", ".join(lost[:5])
        raise InputError(f"{projections}: {len(lost)} uid(s) have no row in {reports.name}, first {named}.")
    return ListedImages(
        kind="indiana",
        file=projections,
        images=filled(images, "filename", projections),
        groups=wanted,
        views=images["projection"],
        classes=labels.CLASSES,
        labels=values[[row_of[uid] for uid in wanted]],
        key=by_name,
        info=info,
        notes=_note_no_headings(info, len(uids)),
    )


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


def read_openi(source: Path, unindexed: Unindexed) -> ListedImages:
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
    return ListedImages(
        kind="openi",
        file=source,
        images=images,
        groups=[uids[row] for row in study],
        views=[views.get(by_stem(image), "") for image in images],
        classes=labels.CLASSES,
        labels=values[study],
        key=by_stem,
        info=info,
        notes=_note_no_headings(info, len(uids)),
    )
