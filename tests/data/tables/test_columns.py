"""Columns are found by the names that a user gives, in any case, or by usual names; in doubt nothing is chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from cxr_fast.data.tables.columns import TableSpec, choose_column, find_column, need_column
from cxr_fast.errors import InputError

FILE = Path("t.csv")


@pytest.mark.parametrize("name", ["Patient ID", "patient id", "PATIENT_ID", "patientid", "Patient-Id"])
def test_a_name_is_found_but_for_case_and_marks(name: str) -> None:
    assert find_column(["Patient ID", "Patient Age"], name, "--group", FILE) == "Patient ID"


def test_an_exact_name_goes_first_and_two_that_are_alike_are_refused() -> None:
    assert find_column(["edema", "Edema"], "Edema", "--classes", FILE) == "Edema"
    with pytest.raises(InputError, match="'EDEMA' could be 'edema' or 'Edema'; write it as it is there"):
        find_column(["edema", "Edema"], "EDEMA", "--classes", FILE)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"--classes: 'Edma' is not a column of t\.csv; did you mean 'Edema'\?"):
        find_column(["Edema", "Mass"], "Edma", "--classes", FILE)
    with pytest.raises(InputError, match=r"'zzz' is not a column of t\.csv; there are Edema, Mass"):
        find_column(["Edema", "Mass"], "zzz", "--classes", FILE)


@pytest.mark.parametrize(
    ("role", "names", "found"),
    [
        ("path", ["File Name", "x"], "File Name"),
        ("path", ["image", "file"], "image"),
        ("group", ["PatientID", "y"], "PatientID"),
        ("group", ["group", "patient_id"], "group"),
        ("study", ["StudyInstanceUID"], "StudyInstanceUID"),
        ("view", ["View Position"], "View Position"),
        ("split", ["Split"], "Split"),
        ("study", ["x"], ""),
    ],
)
def test_usual_names(role: str, names: list[str], found: str) -> None:
    assert choose_column(names, role, TableSpec(), FILE) == found


def test_two_usual_names_are_a_question_and_none_is_too() -> None:
    with pytest.raises(InputError, match="'file' and 'filename' could each be the image file; name one with --path"):
        choose_column(["file", "filename"], "path", TableSpec(), FILE)
    with pytest.raises(InputError, match=r"no column has a usual name for the patient.*--group\. There are a, b"):
        need_column(["a", "b"], "group", TableSpec(), FILE)
    assert choose_column(["file", "path"], "path", TableSpec(path="FILE"), FILE) == "file"
    assert choose_column(["view", "A"], "view", TableSpec(classes=("view",)), FILE) == "", "a class is no view"


def test_flags_that_were_given() -> None:
    assert TableSpec().named() == []
    assert TableSpec(label_sep=";").named() == []
    assert TableSpec(group="g", classes=("A",)).named() == ["--group", "--classes"]
