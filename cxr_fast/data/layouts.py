"""Recognise which dataset a folder or file holds, by names and table headers, and read its card; no image is opened."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..system.files import atomic
from ..system.tables import read_header
from ..system.text import counted
from .labels import CHEXPERT_CLASSES
from .paths import find_images

# Files of an Indiana folder, and the card of any dataset: its name, and whether it is synthetic.
REPORTS, PROJECTIONS, CARD = "indiana_reports.csv", "indiana_projections.csv", "dataset.json"
ARCHIVES = (".tgz", ".tar", ".tar.gz")
TABLES = (".csv", ".csv.gz")
LOOKED_FOR = (
    "manifest.csv or manifest.parquet, indiana_reports.csv, Data_Entry_2017*.csv, a CheXpert or MIMIC-CXR table, "
    "OpenI reports (*.xml or NLMCXR_reports.tgz)"
)
SUFFIXES = re.compile(r"(\.(png|jpe?g|dcm|dicom))+$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ListedImages:
    """The images a dataset lists (N), as its files name them, with labels (N, C) int8: 1, 0, UNKNOWN or UNCERTAIN.

    `file` is what an error names. `key` makes a listed name and a path below the dataset comparable;
    None where the listed name is itself a path from the folder of `file`. `notes` are lines for people.
    """

    kind: str
    file: Path
    images: Sequence[str]
    groups: Sequence[str]
    classes: tuple[str, ...]
    labels: np.ndarray
    views: Sequence[str] | None = None
    studies: Sequence[str] | None = None
    splits: Sequence[str] | None = None
    subgroups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    key: Callable[[str], str] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


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
        raise InputError(
            f"{file} is no dataset: give a folder, a .csv or .parquet manifest, or OpenI's .tgz; "
            "`cxrfast prepare` makes a manifest of Excel and text tables."
        )
    header = read_header(file)
    if kind := _kind_of(header):
        return kind
    if {"image", "group"} & {name.lower() for name in header}:
        return "manifest"  # with the other column forgotten, or in upper case: its reader says so
    shown = ", ".join(header[:6])[:120]
    mend = "a manifest has image, group, then one column a class; `cxrfast prepare` makes one of other tables"
    if len(header) == 1:
        mend = "separate columns by commas, semicolons or tabs"
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
        _refuse_images_alone(source)
        raise InputError(f"{source} holds no dataset. Looked for: {LOOKED_FOR}.")
    return found[0]


def read_card(folder: Path) -> dict[str, Any]:
    """`dataset.json` beside the data: {"name": ..., "synthetic": true}; both optional, so is the file."""
    file = folder / CARD
    if not file.is_file():
        return {}
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON and of UTF-8
        raise InputError(f"{file} is not JSON: {error}.") from None
    if not isinstance(about, dict) or not isinstance(about.get("synthetic", False), bool):
        raise InputError(f'{file} must look like {{"name": "my set", "synthetic": false}}.')
    rules = about.get("label_rules", {})
    whole = isinstance(rules, dict) and all(isinstance(each, dict) for each in rules.values())
    if not whole or not all({"blank", "uncertain"} <= set(each) for each in rules.values()):
        raise InputError(f"{file}: label_rules must hold blank and uncertain for each table; write the table again.")
    return about


@contextlib.contextmanager
def replace_card(table: Path, *, synthetic: str | None, rules: Mapping[str, Any] | None) -> Iterator[None]:
    """Write the card beside a table where the `with` block, which writes the table, ends well: both or none.

    `synthetic`, the name of a drawn data set, carries its mark to where its manifest goes: it must not pass for a real
    one there. `rules` say how blank and uncertain labels of the table counted; a cache of it records that.
    """
    card = table.parent / CARD
    about = old = read_card(table.parent)
    if synthetic is not None:
        if card.is_file() and not about.get("synthetic"):
            raise InputError(f"{card} says the data is real and this manifest is synthetic: write to another folder.")
        about = about or {"name": synthetic, "synthetic": True}
    noted = about.get("label_rules", {})
    kept = {name: words for name, words in noted.items() if name != table.name}
    if rules:
        kept[table.name] = {name: rules[name] for name in ("blank", "uncertain")}
    if kept != noted:
        about = about | {"label_rules": kept}
    if about == old:
        yield
        return
    with atomic(card, "--out", folders=True) as file:
        file.write((json.dumps(about) + "\n").encode())
        file.flush()
        yield


def _refuse_images_alone(folder: Path) -> None:
    """Raise InputError where a folder holds images and no table: it says which table to write, and how to predict."""
    if count := len(find_images(str(folder), Counter())):
        tables = ", ".join(sorted(path.name for suffix in TABLES for path in folder.glob("[!.]*" + suffix))[:3])
        others = f" ({tables}: other columns)" if tables else ""
        raise InputError(
            f"{folder} holds {counted(count, 'image')} but no table of labels{others}. "
            f"Write {folder / 'manifest.csv'} with the header image,group,FINDING,... and a row per image: image is "
            "the file, group the patient, each finding 1, 0 or blank (docs/how-to/own_tables.md); where films lie in "
            f"folders named by findings, `cxrfast prepare {folder} --labels folder --out my.csv` writes it.\n"
            f"To predict with a model you have: `cxrfast predict MODEL {folder} --out predictions.csv`."
        )
