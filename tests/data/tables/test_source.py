"""Whatever `prepare` is given: tables of any kind, folders by finding, DICOM by its tags; nothing wrong in silence."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.data.labels import NIH_FINDINGS, LabelRules
from cxr_fast.data.manifest import Manifest, read_dataset, write_manifest
from cxr_fast.data.tables.columns import TableSpec
from cxr_fast.data.tables.findings import CODES
from cxr_fast.data.tables.source import read_any
from cxr_fast.errors import InputError

TABLE = """File;Patient No;Sex;Inpatient;Edema;Mass;Findings
a.png;1;F;1;yes;;Edema|Mass
b.png;1;F;0;no;1;edema
c.png;2;M;1;TRUE;0;
"""


def put(path: Path, text: str | bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(source: Path, *, rules: LabelRules | None = None, **named: Any) -> Manifest:
    found = read_any(source, TableSpec(**named), missing="unchecked", rules=rules)
    assert found is not None
    return found


def refused(source: Path, **named: Any) -> str:
    with pytest.raises(InputError) as caught:
        read_any(source, TableSpec(**named), missing="unchecked")
    assert str(caught.value).count("\n") <= 1
    return str(caught.value)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return put(tmp_path / "h.csv", TABLE)


def test_a_column_per_finding(table: Path) -> None:
    found = read(table, group="patient no", classes=("edema", "Mass"), meta=("SEX",))
    assert (found.images, found.groups) == (("a.png", "b.png", "c.png"), ("1", "1", "2"))
    assert (found.classes, found.labels.tolist()) == (("Edema", "Mass"), [[1, -1], [0, 1], [1, 0]])
    assert found.subgroups == {"Sex": ("F", "F", "M")}
    assert "no class, though of 0 and 1: Inpatient." in found.notes
    assert found.name == "h"


def test_the_manifest_that_is_written_is_read_back(table: Path) -> None:
    found = read(table, classes=("Edema", "Mass"), meta=("Sex",))
    write_manifest(found, table.with_name("my.csv"))
    back = read_dataset(table.with_name("my.csv"), missing="unchecked")
    assert (back.images, back.groups, back.classes, back.subgroups) == (
        *(found.images, found.groups, found.classes, found.subgroups),
    )
    np.testing.assert_array_equal(back.labels, found.labels)


def test_a_column_of_0_and_1_is_no_class_by_accident(table: Path) -> None:
    said = refused(table)
    assert "--classes 'Inpatient,Edema,Mass' (these hold 0 and 1; leave out what is no finding)" in said
    assert "--labels COLUMN" in said


def test_a_column_that_lists_findings(table: Path) -> None:
    found = read(table, labels="findings")
    assert (found.classes, found.labels.tolist()) == (("Edema", "Mass"), [[1, 1], [1, 0], [-1, -1]])
    assert any("1 row(s) list nothing in 'Findings'" in note for note in found.notes)
    assert any("1 spelling(s) of findings differ in case or spaces alone" in note for note in found.notes)
    negative = read(table, labels="findings", rules=LabelRules(blank="negative"))
    assert negative.labels.tolist() == [[1, 1], [1, 0], [0, 0]]
    assert read(table, labels="Findings", classes=("mass",)).labels.tolist() == [[1], [0], [-1]]
    assert "did you mean 'Edema'?" in refused(table, labels="Findings", classes=("Edma",))


def test_another_separator_is_asked_for(tmp_path: Path) -> None:
    file = put(tmp_path / "p.csv", "image,group,Labels\na.png,1,\"['edema', 'mass']\"\nb.png,2,['mass']\n")
    assert "--label-sep ','" in refused(file, labels="labels")
    found = read(file, labels="labels", label_sep=",")
    assert (found.classes, found.labels.tolist()) == (("edema", "mass"), [[1, 1], [0, 1]])


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"path": "Fiel"}, "did you mean 'File'?"),
        ({"classes": ("Edema", "edema")}, "'Edema' is named twice"),
        ({"classes": ("Sex",)}, "column 'Sex' holds 'F' in data row 1; a finding takes 1 or yes"),
        ({"classes": ("Edema",), "group": "Edema"}, "is also taken as image, group"),
        ({"classes": ("Edema",), "split": "Sex"}, "column 'Sex' holds 'F' in data row 1; it takes train, val, test"),
        ({"labels": "Gone"}, "--labels: 'Gone' is not a column"),
    ],
)
def test_mistakes_are_a_line(table: Path, named: dict[str, Any], said: str) -> None:
    assert said in refused(table, **named)


@pytest.mark.parametrize(
    ("column", "values", "flag"),
    [
        ("Patient", ["Meier, Anna", "Sommer, Hans"], "group"),
        ("Patient", ["MEIER^ANNA", "SOMMER^HANS"], "group"),
        ("PatientName", ["x", "y"], "meta"),
        ("born", ["1957-05-03", "1958-05-03"], "meta"),
        ("view", ["Dr. Meier", ""], "view"),
    ],
)
def test_names_of_persons_never_go_into_a_manifest(tmp_path: Path, column: str, values: list[str], flag: str) -> None:
    groups = "" if flag == "group" else ",group"
    rows = "".join(f'{row}.png,"{value}",1{"" if flag == "group" else f",{row}"}\n' for row, value in enumerate(values))
    file = put(tmp_path / "h.csv", f"image,{column},Edema{groups}\n{rows}")
    said = refused(file, **{flag: (column,) if flag == "meta" else column, "classes": ("Edema",)})
    assert f"--{flag}: column {column!r}" in said
    assert not any(value in said for value in values if len(value) > 1)


def test_a_split_of_three_words(tmp_path: Path) -> None:
    file = put(
        tmp_path / "h.csv", "image,group,Part,A\n" + "".join(f"{w}.png,{w},{w},1\n" for w in ("train", "VAL", "Test"))
    )
    found = read(file, classes=("A",), split="part")
    assert found.splits == ("train", "train", "holdout")
    assert any("1 row(s) of validation count as training" in note for note in found.notes)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([*CODES, "Yes", "NO"]), st.sampled_from([*CODES])), min_size=1, max_size=6),
    st.sampled_from([",", ";", "\t"]),
)
def test_cells_are_read_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]], mark: str
) -> None:
    rows = [mark.join((f"{row}.png", f"p{row}", *pair)) for row, pair in enumerate(cells)]
    file = put(
        tmp_path_factory.mktemp("any") / "t.csv", "\n".join([mark.join(("path", "pid", "A", "B")), *rows]) + "\n"
    )
    found = read(file, classes=("A", "B"))
    assert found.labels.tolist() == [[CODES[one.lower()], CODES[other.lower()]] for one, other in cells]


# -------------------------------------------------------------------------------- known layouts and formats


def test_a_known_layout_without_flags_is_left_to_its_reader_and_may_lose_classes(tmp_path: Path) -> None:
    nih = "Image Index,Finding Labels,Patient ID,View Position\na.png,Mass|Edema,1,PA\n"
    file = put(tmp_path / "Data_Entry_2017.csv", nih)
    assert read_any(tmp_path, TableSpec()) is None
    found = read(tmp_path, classes=("edema", "Mass"))
    assert (found.classes, found.labels.tolist()) == (("Edema", "Mass"), [[1, 1]])
    assert "did you mean 'Edema'?" in refused(file, classes=("Edma",))
    manifest = put(tmp_path / "m.csv", "image,group,A,Inpatient\na.png,1,1,0\n")
    assert read_any(manifest, TableSpec()) is None
    assert read(manifest, classes=("a",)).classes == ("A",)


def test_real_nih_read_as_any_table_is_what_its_own_reader_says() -> None:
    root = os.environ.get("CXR_FAST_REAL_DATA")
    if not root or not (Path(root) / "nih").exists():
        pytest.skip("CXR_FAST_REAL_DATA is unset or holds no nih")
    own = read_dataset(Path(root) / "nih", missing="unchecked")
    file = Path(root) / "nih" / "Data_Entry_2017.csv"
    found = read(
        file,
        labels="finding labels",
        classes=NIH_FINDINGS,
        view="view position",
        path="image index",
        group="patient id",
    )
    assert (found.groups, found.views, found.classes) == (own.groups, own.views, own.classes)
    np.testing.assert_array_equal(found.labels, own.labels)


@pytest.mark.parametrize("suffix", [".xlsx", ".parquet", ".tsv", ".csv"])
def test_every_format_says_the_same(table: Path, suffix: str) -> None:
    named: dict[str, Any] = {"classes": ("Edema", "Mass"), "meta": ("Sex",)}
    rows = [line.split(";") for line in TABLE.splitlines()]
    out = table.with_name(f"again{suffix}")
    if suffix == ".xlsx":
        book = pytest.importorskip("openpyxl").Workbook()
        for row in rows:
            book.active.append([int(cell) if cell.isdigit() else cell or None for cell in row])
        book.save(out)
    elif suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        columns = {name: [row[c] or None for row in rows[1:]] for c, name in enumerate(rows[0])}
        pytest.importorskip("pyarrow.parquet").write_table(pa.table(columns), out)
    elif suffix == ".tsv":
        put(out, TABLE.replace(";", "\t"))
    else:
        put(out, TABLE.replace(";", ",").encode("utf-16"))
    first, again = read(table, **named), read(out, **named)
    assert (first.images, first.groups, first.subgroups) == (again.images, again.groups, again.subgroups)
    np.testing.assert_array_equal(first.labels, again.labels)


# ---------------------------------------------------------------------------------------------- folders


def test_folders_named_by_findings(tmp_path: Path) -> None:
    for name in ("train/NORMAL/a.png", "train/Mass/b.png", "val/Mass/c.png", "test/Mass/a.png"):
        put(tmp_path / name)
    found = read(tmp_path, labels="folder")
    by_image = dict(zip(found.images, found.labels.tolist(), strict=True))
    assert found.classes == ("Mass", "NORMAL")
    assert by_image == {
        "train/NORMAL/a.png": [0, 1],
        "train/Mass/b.png": [1, 0],
        "val/Mass/c.png": [1, 0],
        "test/Mass/a.png": [1, 0],
    }
    assert dict(zip(found.images, found.splits, strict=True))["test/Mass/a.png"] == "holdout"
    assert any("No patient is known" in note for note in found.notes)
    assert any("1 file name(s) are in more than one folder" in note for note in found.notes)
    assert read(tmp_path, labels="folder", classes=("mass",)).classes == ("Mass",)
    put(tmp_path / "bare.png")
    assert "bare.png lies in no folder of a finding" in refused(tmp_path, labels="folder")
    assert "names a column" in refused(tmp_path, labels="folder", group="x")


def test_a_folder_of_films_without_findings_says_what_to_do(tmp_path: Path) -> None:
    put(tmp_path / "Mass" / "a.png")
    assert f"`cxrfast prepare {tmp_path} --labels folder --out my.csv`" in refused(tmp_path)
    assert "`--labels folder`" in refused(tmp_path, classes=("Mass",))


def dicom(path: Path, **tags: str) -> Path:
    pydicom = pytest.importorskip("pydicom")
    ds = pydicom.Dataset()
    ds.Rows = ds.Columns = 2
    ds.PatientName, ds.PatientBirthDate, ds.StudyDate = "MEIER^ANNA", "19570503", "20200502"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lower case, which the standard does not allow
        for name, value in tags.items():
            setattr(ds, name, value)
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.save_as(path, enforce_file_format=True)
    return path


def test_dicom_without_a_table(tmp_path: Path) -> None:
    films = tmp_path / "films"
    dicom(films / "a", PatientID="7", StudyInstanceUID="1.2.1", ViewPosition="pa", PatientSex="F", PatientAge="061Y")
    dicom(films / "b.dcm", PatientID="7", StudyInstanceUID="1.2.2", PatientSex="f")
    dicom(films / "c.dcm", StudyInstanceUID="1.2.3")
    dicom(films / "d.dcm")
    put(films / "e.dcm", b"\0" * 128 + b"DICM\xff\xff")
    found = read(films, classes=("Edema",))
    assert found.images == ("a", "b.dcm", "c.dcm", "d.dcm")
    assert found.groups == ("7", "7", "1.2.3", "film d.dcm")
    assert found.studies == ("1.2.1", "1.2.2", "1.2.3", "film d.dcm")
    assert found.views == ("PA", "", "", "")
    assert found.subgroups == {"sex": ("F", "F", "", ""), "age": ("60-69", "60-69", "60-69", "60-69")}
    assert (found.labels == -1).all()
    notes = " ".join(found.notes)
    assert "left out 1 file(s)" in notes
    assert "1 film(s) have no PatientID" in notes
    assert "1 film(s) have neither" in notes
    write_manifest(found, tmp_path / "my.csv")
    text = (tmp_path / "my.csv").read_text(encoding="utf-8").lower()
    assert not any(word in text for word in ("meier", "anna", "1957", "20200502"))
    (films / "e.dcm").unlink()
    assert read(films).classes == ()


def test_a_table_of_labels_takes_the_patients_from_dicom_tags(tmp_path: Path) -> None:
    dicom(tmp_path / "a.dcm", PatientID="7", StudyInstanceUID="1.2.1", ViewPosition="PA")
    dicom(tmp_path / "b.dcm", PatientID="8", StudyInstanceUID="1.2.2")
    file = put(tmp_path / "t.csv", "file,Edema\na.dcm,1\nb.dcm,0\n")
    found = read_any(file, TableSpec(classes=("Edema",)))
    assert found is not None
    assert (found.groups, found.studies, found.views) == (("7", "8"), ("1.2.1", "1.2.2"), ("PA", ""))
    put(tmp_path / "b.dcm", b"no film")
    assert "no column has a usual name for the patient" in refused(file, classes=("Edema",))


def test_a_patient_id_that_is_a_name_is_refused(tmp_path: Path) -> None:
    dicom(tmp_path / "a.dcm", PatientID="MEIER^ANNA")
    said = refused(tmp_path, classes=("Edema",))
    assert "PatientID holds the name of a person" in said
    assert "MEIER" not in said
