"""Read whatever `prepare` is given: a known layout, a manifest, a table of a hospital, a folder without a table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ...errors import InputError
from ...system.files import AnyPath
from ...system.table_files import SUFFIXES, read_table
from ...system.tables import EXCEL, read_header
from ..labels import LabelRules
from ..layouts import recognise
from ..manifest import Manifest, Missing, list_images, read_dataset
from .columns import TableSpec
from .findings import select_classes
from .folders import all_dicom, read_folder
from .hospital import read_hospital


def read_any(
    source: AnyPath,
    spec: TableSpec,
    *,
    images: AnyPath | None = None,
    missing: Missing = "refuse",
    rules: LabelRules | None = None,
    limit: int | None = None,
) -> Manifest | None:
    """Read a table or folder by the columns that `spec` names; None where it is a known layout and `spec` is empty.

    The classes of a known layout are those that `spec` names, or all. `limit` keeps the first images. Raises InputError
    as `read_dataset` does.

        >>> manifest = read_any("table.xlsx", TableSpec(group="Patient", classes=("Edema", "Mass")))
    """
    source, rules = Path(source), rules or LabelRules()
    kind, file = _recognise(source, spec)
    if kind and not spec.named():
        return None
    if kind not in ("", "manifest") and spec.named() == ["--classes"]:
        return keep_classes(
            read_dataset(source, images=images, missing=missing, rules=rules, limit=limit), spec.classes
        )
    if rules.uncertain != "unknown":
        raise InputError(f"--uncertain is for the tables of CheXpert and MIMIC-CXR; {source} is read as another table.")
    folder = source if source.is_dir() else source.parent
    if file.is_dir():
        if rules.blank != "unknown":
            raise InputError(f"--blank: {source} holds no table, so no label is blank.")
        return list_images(read_folder(file, spec), folder, images=images, missing=missing, limit=limit)
    root = folder if images is None else Path(images)
    rows = read_hospital(file, spec, root=root, blank=rules.blank)
    return list_images(rows, folder, images=images, missing=missing, limit=limit)


def keep_classes(manifest: Manifest, wanted: tuple[str, ...]) -> Manifest:
    """Keep the classes that are named. Raises InputError for an unknown one, with the nearest."""
    keep = select_classes(manifest.classes, wanted, f"a class of {manifest.name}")
    labels = np.ascontiguousarray(manifest.labels[:, keep])
    labels.setflags(write=False)
    return replace(manifest, classes=tuple(manifest.classes[c] for c in keep), labels=labels)


def _recognise(source: Path, spec: TableSpec) -> tuple[str, Path]:
    """(kind, file) of a source; the kind is "" for a table of no known layout and for a folder without a table."""
    if source.is_dir():
        try:
            return recognise(source)
        except InputError:
            if (spec.labels or spec.classes or all_dicom(source)) and not _has_table(source):
                return "", source
            raise
    name = source.name.lower()
    if not source.is_file() or not name.endswith(SUFFIXES):
        return recognise(source)
    if name.endswith((*EXCEL, ".parquet")):
        header = set(map(str.lower, read_table(source)))
    else:
        header = set(map(str.lower, read_header(source)))
    if {"image", "group"} <= header and not name.endswith(EXCEL):
        return "manifest", source
    try:
        kind, file = recognise(source)
    except InputError:
        return "", source
    return ("", source) if kind == "manifest" and "image" not in header else (kind, file)


def _has_table(folder: Path) -> bool:
    return any(path.name.lower().endswith(SUFFIXES) for path in folder.glob("[!.]*"))
