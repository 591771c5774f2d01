"""Choose the columns of a table: by the names that a user gives, in any case, else by usual names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError

FOLDER = "folder"  # --labels folder: the folder above a film is its finding


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Usual names of columns, in the spelling of `_key`.
USUAL: Mapping[str, frozenset[str]] = {
    "path": _words(
        "image path file filename filepath fileid imagepath imagefile imagename imageindex imagefilename dicompath "
        "dicomfile dicom film filmpath pngpath jpgpath"
    ),
    "group": _words("group patient patientid patientnumber patientno patientnr subject subjectid pid mrn"),
    "study": _words("study studyid studyuid studyinstanceuid exam examid examination examinationid"),
    "view": _words("view viewposition projection"),
    "split": frozenset({"split"}),
}
MEANS = {
    "path": "the image file",
    "group": "the patient, whose images stay on one side of a split",
    "study": "the examination",
    "view": "the projection",
    "split": "training or hold-out",
}


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """Which columns of a table become what in a manifest; empty where the user said nothing.

    `labels` is a column of findings separated by `label_sep` (`|` where that is empty), or `folder`; `classes` are the
    columns (or the words of `labels`) that become classes, `meta` further columns to break figures down by.
    """

    path: str = ""
    group: str = ""
    study: str = ""
    view: str = ""
    split: str = ""
    labels: str = ""
    label_sep: str = ""
    classes: tuple[str, ...] = ()
    meta: tuple[str, ...] = ()

    def named(self) -> list[str]:
        """Return the flags that were given, label_sep aside."""
        names = ("path", "group", "study", "view", "split", "labels", "classes", "meta")
        return [f"--{name}" for name in names if getattr(self, name)]


def find_column(cells: Collection[str], name: str, flag: str, file: Path) -> str:
    """Return the column that a user means by `name`: exactly, else but for case, spaces, `_` and `-`.

    Raises InputError naming the nearest columns.
    """
    return find_word(cells, name, flag, f"a column of {file}")


def find_word(words: Collection[str], name: str, flag: str, where: str) -> str:
    """Return the word that a user means by `name`, as `find_column` does."""
    if name in words:
        return name
    alike = [each for each in words if _key(each) == _key(name)]
    if len(alike) == 1:
        return alike[0]
    raise InputError(f"{flag}: {_unknown(name, alike, words, where)}")


def _unknown(name: str, alike: Sequence[str], known: Iterable[str], what: str) -> str:
    if alike:
        return f"{name!r} could be {' or '.join(map(repr, alike))}; write it as it is there."
    keys = {_key(each): each for each in known}
    near = [keys[key] for key in difflib.get_close_matches(_key(name), keys, n=3, cutoff=0.6)]
    mend = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {_some(keys.values())}."
    return f"{name!r} is not {what}; {mend}"


def choose_column(cells: Collection[str], role: str, spec: TableSpec, file: Path) -> str:
    """Return the column of a role, "" where there is none: the one the user names, else the one of a usual name.

    Raises InputError where the name is unknown, and where several columns have usual names.
    """
    flag = f"--{role}"
    if given := getattr(spec, role):
        return find_column(cells, given, flag, file)
    taken = {_key(name) for name in (*spec.classes, *spec.meta, spec.labels)}
    usual = [name for name in cells if _key(name) in USUAL[role] - taken]
    exact = [name for name in usual if _key(name) in ("image", role)]
    usual = exact if len(exact) == 1 else usual
    if len(usual) > 1:
        named = " and ".join(map(repr, usual[:3]))
        raise InputError(f"{file}: {named} could each be {MEANS[role]}; name one with {flag}.")
    return usual[0] if usual else ""


def need_column(cells: Collection[str], role: str, spec: TableSpec, file: Path) -> str:
    """As `choose_column`; raises InputError where there is none."""
    if found := choose_column(cells, role, spec, file):
        return found
    raise InputError(
        f"{file}: no column has a usual name for {MEANS[role]}; name it with --{role}. There are {_some(cells)}."
    )


def _some(names: Iterable[str]) -> str:
    shown = [name for name in names if name]
    return ", ".join(shown[:12]) + (", ..." if len(shown) > 12 else "")


def _key(name: str) -> str:
    return re.sub(r"[\s_\-./]+", "", name).casefold()
