"""Toy data sets of every layout, every way they can be wrong, and the published figures where the data is."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.data import indiana as indiana_reports
from cxr_fast.data import labels, layouts, public_tables
from cxr_fast.data.manifest import (
    META,
    RESERVED,
    Manifest,
    class_table,
    read_dataset,
    summary,
    write_manifest,
)
from cxr_fast.errors import InputError
from cxr_fast.system import tables


def real(name: str) -> Path:
    root = os.environ.get("CXR_FAST_REAL_DATA")
    if not root or not (Path(root) / name).exists():
        pytest.skip(f"CXR_FAST_REAL_DATA is unset or holds no {name}")
    return Path(root) / name


def put(path: Path, text: str | bytes = b"") -> Path:
    """A file with its folders; an image is any file here, for no pixel is read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refuses(source: Path, *parts: object, **options: object) -> str:
    """The message of the InputError that reading raises: short, and naming each of `parts`."""
    with pytest.raises(InputError) as caught:
        read_dataset(source, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.count("\n") <= 1, message
    for part in parts:
        assert str(part) in message, message
    return message


def positives(manifest: Manifest) -> list[set[str]]:
    return [{manifest.classes[c] for c in np.flatnonzero(row == 1)} for row in manifest.labels]


# --------------------------------------------------------------------------------------------- Indiana

REPORTS = """uid,MeSH,Problems,findings
1,normal,normal,None
2,Cardiomegaly/borderline;Pulmonary Artery/enlarged,Cardiomegaly;Pulmonary Artery,"Two lines,
""quoted"", NA"
3,No Indexing,No Indexing,
4,Aorta/tortuous,Aorta,None.
5,Nodule,Nodule,a study without an image
"""
PROJECTIONS = """uid,filename,projection
1,1_IM-0001-4001.dcm.png,Frontal
1,1_IM-0001-3001.dcm.png,Lateral
2,2_IM-0652-1001.dcm.png,Frontal
3,3_a.png,Frontal
4,4_a.png,Lateral
"""


def indiana(folder: Path, reports: str = REPORTS, projections: str = PROJECTIONS, images: bool = True) -> Path:
    put(folder / "indiana_reports.csv", reports)
    put(folder / "indiana_projections.csv", projections)
    for line in projections.splitlines()[1:] if images else []:
        put(folder / "images" / "normalized" / line.split(",")[1])
    put(folder / "images" / "normalized" / "not_listed.png")
    return folder


def test_indiana(tmp_path: Path) -> None:
    m = read_dataset(indiana(tmp_path / "iu"))
    assert m.name == "iu"
    assert m.root == tmp_path / "iu"
    assert m.images[0] == "images/normalized/1_IM-0001-4001.dcm.png"
    assert m.path(0).is_file()
    assert m.groups == m.studies == ("1", "1", "2", "3", "4")
    assert m.views == ("Frontal", "Lateral", "Frontal", "Frontal", "Lateral")
    assert m.classes == labels.CLASSES
    normal = {"Normal"}
    assert positives(m) == [normal, normal, {"Cardiomegaly", "Pulmonary Artery Enlargement"}, normal, normal]
    assert m.info["kind"] == "indiana"
    assert (m.info["unindexed_studies"], m.info["only_dropped_studies"]) == (1, 1)
    assert not m.info["synthetic"]


def test_indiana_unindexed_unknown_masks_what_the_headings_do_not_tell(tmp_path: Path) -> None:
    m = read_dataset(indiana(tmp_path), unindexed="unknown")
    assert (m.labels[3] == -1).all()
    normal = labels.CLASSES.index("Normal")
    assert m.labels[4, normal] == -1
    assert (np.delete(m.labels[4], normal) == 0).all()
    assert (m.labels[:3] >= 0).all()


def test_indiana_label_column_wins_over_headings(tmp_path: Path) -> None:
    reports = "uid,MeSH,label\n1,Nodule,normal\n2,Nodule,Mass;Nodule\n3,No Indexing,normal\n4,normal,normal\n"
    m = read_dataset(indiana(tmp_path, reports))
    assert positives(m) == [{"Normal"}, {"Normal"}, {"Mass", "Nodule"}, {"Normal"}, {"Normal"}]
    assert (read_dataset(tmp_path, unindexed="unknown").labels[3] == -1).all()


def test_indiana_problems_column_alone_is_enough_and_a_file_may_be_named(tmp_path: Path) -> None:
    indiana(tmp_path, "uid,Problems\n1,normal\n2,Mass\n3,Mass\n4,Mass\n")
    m = read_dataset(tmp_path / "indiana_reports.csv")
    assert positives(m)[2] == {"Mass"}
    assert m.name == tmp_path.name


@pytest.mark.parametrize(
    ("reports", "parts"),
    [
        ("uid,age\n1,3\n", ["indiana_reports.csv", "MeSH, Problems or label"]),
        ("MeSH\nnormal\n", ["indiana_reports.csv", "uid"]),
        ("uid,MeSH\n1,normal\n2,normal\n", ["indiana_projections.csv", "2 uid(s)", "first 3, 4."]),
        ("uid,MeSH\n1,a\n2,a\n3,a\n4,a\n2,a\n", ["indiana_reports.csv", "uid 2 twice"]),
        ("uid,label\n1,Lesoin\n2,Mass\n3,Mass\n4,Mass\n", ["indiana_reports.csv", "'label'", "'Lesoin'"]),
        ("uid,label\n1,Mass\n2,\n3,Mass\n4,Mass\n", ["indiana_reports.csv", "'label'", "data row 2"]),
        ("uid,MeSH\n1,a,b\n", ["indiana_reports.csv", "line 2", "3 fields", "header has 2"]),
        ('uid,MeSH\n1,"cut off', ["indiana_reports.csv", "not a whole CSV"]),
        ("uid,MeSH\n", ["indiana_reports.csv", "no rows"]),
        ("", ["indiana_reports.csv", "empty"]),
        ("uid,MeSH,MeSH\n1,a,b\n", ["indiana_reports.csv", "two columns", "'MeSH'"]),
        (b"uid,MeSH\n1,\xe9\n", ["indiana_reports.csv", "UTF-8"]),
        ("\n", ["indiana_reports.csv", "empty"]),
    ],
)
def test_indiana_bad_reports(tmp_path: Path, reports: str | bytes, parts: list[str]) -> None:
    indiana(tmp_path)
    put(tmp_path / "indiana_reports.csv", reports)
    refuses(tmp_path, *parts)


def test_indiana_bad_projections(tmp_path: Path) -> None:
    indiana(tmp_path, projections=PROJECTIONS + "4,4_a.png,Frontal\n")
    refuses(tmp_path, "indiana_projections.csv", "4_a.png twice", "data rows 5 and 6")
    put(tmp_path / "indiana_projections.csv", "uid,file\n1,a\n")
    refuses(tmp_path, "indiana_projections.csv", "filename, projection")
    (tmp_path / "indiana_projections.csv").unlink()
    refuses(tmp_path, "indiana_reports.csv", "indiana_projections.csv")
    indiana(tmp_path, "uid,label\n1,Mass\n2,Mass\n3,Mass\n4,Mass\n")
    refuses(tmp_path, "MeSH", unindexed="unknown")


# --------------------------------------------------------------------------------------- missing images


def test_missing_images_are_counted_named_and_can_be_left_out(tmp_path: Path) -> None:
    indiana(tmp_path)
    for name in ("3_a.png", "4_a.png"):
        (tmp_path / "images" / "normalized" / name).unlink()
    refuses(tmp_path, "2 of the 5 images", "indiana_projections.csv", "3_a.png, 4_a.png", "--skip-missing", "--images")
    m = read_dataset(tmp_path, missing="skip")
    assert m.groups == ("1", "1", "2")
    assert m.info["skipped_missing"] == 2
    assert summary(m)["skipped_missing"] == 2
    assert len(read_dataset(tmp_path, missing="unchecked")) == 5
    assert len(read_dataset(tmp_path, limit=3)) == 3, "no image beyond the limit is asked for"


def test_missing_names_only_the_first_five(tmp_path: Path) -> None:
    rows = "".join(f"i{n}.png,{n},1\n" for n in range(9))
    put(tmp_path / "i0.png")
    message = refuses(put(tmp_path / "m.csv", "image,group,A\n" + rows), "8 of the 9", "i1.png", "i5.png, ...")
    assert "i6.png" not in message


def test_nothing_found_at_all_is_an_error_even_when_missing_images_may_be_left_out(tmp_path: Path) -> None:
    indiana(tmp_path, images=False)
    message = refuses(tmp_path, "5 of the 5", "--images", missing="skip")
    assert "--skip-missing" not in message


def test_limit_counts_images_that_exist(tmp_path: Path) -> None:
    indiana(tmp_path)
    (tmp_path / "images/normalized/1_IM-0001-4001.dcm.png").unlink()
    assert read_dataset(tmp_path, missing="skip", limit=2).groups == ("1", "2")
    assert read_dataset(tmp_path, missing="unchecked", limit=99).groups == ("1", "1", "2", "3", "4")
    refuses(tmp_path, "--limit", "0", limit=0)


def test_images_may_lie_elsewhere(tmp_path: Path) -> None:
    indiana(tmp_path / "tables", images=False)
    indiana(tmp_path / "pixels")
    m = read_dataset(tmp_path / "tables", images=tmp_path / "pixels")
    assert m.root == tmp_path / "pixels"
    assert m.path(4).is_file()
    refuses(tmp_path / "tables", "--images", "nowhere", images=tmp_path / "nowhere")


def test_one_name_in_two_places_is_ambiguous(tmp_path: Path) -> None:
    put(indiana(tmp_path) / "resized" / "3_a.png")
    refuses(tmp_path, "images/normalized/3_a.png", "resized/3_a.png", "--images")
    assert len(read_dataset(tmp_path, images=tmp_path / "images")) == 5
    (tmp_path / "resized").rename(tmp_path / ".resized")
    assert len(read_dataset(tmp_path)) == 5, "hidden folders are no place for images"


def test_a_link_that_loops_is_walked_once(tmp_path: Path) -> None:
    (indiana(tmp_path) / "images" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert len(read_dataset(tmp_path)) == 5


# ------------------------------------------------------------------------------------------------- NIH

NIH = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
    "00000003_001.png,Hernia,0,3,74,F,PA,2500,2048,0.168,0.168,\n"
    "00000003_002.png,Hernia|Mass,1,3,075Y,F,AP,2048,2500,0.168,0.168,\n"
    "00000004_000.png,No Finding,0,4,414,M,PA,2048,2500,0.168,0.168,\n"
    "00000005_000.png,Pleural_Thickening,0,5,011M,M,PA,2048,2500,0.168,0.168,\n"
)


def nih(folder: Path, text: str = NIH) -> Path:
    put(folder / "Data_Entry_2017_v2020.csv", text)
    for n, line in enumerate(text.splitlines()[1:]):
        put(folder / f"images_00{n}" / "images" / line.split(",")[0])
    return folder


def test_nih(tmp_path: Path) -> None:
    m = read_dataset(nih(tmp_path))
    assert m.classes == labels.NIH_FINDINGS
    assert len(m.classes) == 14
    assert positives(m) == [{"Hernia"}, {"Hernia", "Mass"}, set(), {"Pleural_Thickening"}]
    assert m.groups == ("3", "3", "4", "5")
    assert m.studies == ("3/0", "3/1", "4/0", "5/0"), "visits of one patient, years apart, are not views of one study"
    assert m.views == ("PA", "AP", "PA", "PA")
    assert m.subgroups == {"sex": ("F", "F", "M", "M"), "age": ("70-79", "70-79", "", "0-9")}
    assert m.images[1] == "images_001/images/00000003_002.png"


def test_nih_without_follow_up_numbers(tmp_path: Path) -> None:
    m = read_dataset(nih(tmp_path, NIH.replace("Follow-up #", "Visit")))
    assert m.studies == ("3/00000003_001.png", "3/00000003_002.png", "4/00000004_000.png", "5/00000005_000.png")


def test_nih_bad(tmp_path: Path) -> None:
    refuses(nih(tmp_path, NIH.replace("Hernia|", "Hernai|")), "Data_Entry_2017_v2020.csv", "Finding Labels", "Hernai")
    put(tmp_path / "Data_Entry_2017.csv", NIH)
    refuses(tmp_path, "several datasets", "Data_Entry_2017.csv, Data_Entry_2017_v2020.csv")
    (tmp_path / "Data_Entry_2017_v2020.csv").unlink()
    put(tmp_path / "Data_Entry_2017.csv", "Image Index,Patient ID\na.png,1\n")
    refuses(tmp_path, "Data_Entry_2017.csv", "Finding Labels, View Position")
    put(tmp_path / "Data_Entry_2017.csv", NIH.replace(",3,74", ",,74"))
    refuses(tmp_path, "Data_Entry_2017.csv", "'Patient ID'", "data row 1")


# ------------------------------------------------------------------------------- CheXpert and MIMIC-CXR

FOURTEEN = ",".join(labels.CHEXPERT_CLASSES)
HEAD = f"Path,Sex,Age,Frontal/Lateral,AP/PA,{FOURTEEN}\n"


def chexpert_row(path: str, *values: str, view: str = "Frontal") -> str:
    return ",".join([path, "Female", "68", view, "AP", *values, *[""] * (14 - len(values))]) + "\n"


def test_chexpert(tmp_path: Path) -> None:
    listed = [
        f"CheXpert-v1.0-small/train/{p}" for p in ("patient00001/study1", "patient00001/study2", "patient2/study1")
    ]
    text = HEAD + chexpert_row(f"{listed[0]}/view1_frontal.jpg", "1.0", "0.0", "-1.0")
    text += chexpert_row(f"{listed[1]}/view1_frontal.jpg") + chexpert_row(
        f"{listed[2]}/view2_lateral.jpg", view="Lateral"
    )
    put(tmp_path / "train.csv", text)
    for place, view in zip(listed, ("view1_frontal", "view1_frontal", "view2_lateral"), strict=True):
        put(tmp_path / place.partition("/")[2] / f"{view}.jpg")
    m = read_dataset(tmp_path)
    assert m.images[0] == "train/patient00001/study1/view1_frontal.jpg"
    assert m.groups == ("patient00001", "patient00001", "patient2")
    assert m.studies == ("patient00001/study1", "patient00001/study2", "patient2/study1")
    assert m.views == ("Frontal", "Frontal", "Lateral")
    assert m.labels[0].tolist() == [1, 0, -1] + [-1] * 11
    assert m.subgroups == {"sex": ("Female",) * 3, "age": ("60-69",) * 3}
    put(tmp_path / "valid.csv", text)
    refuses(tmp_path, "several datasets", "train.csv, valid.csv")
    assert len(read_dataset(tmp_path / "train.csv")) == 3


RULED = HEAD + "".join(
    chexpert_row(f"p{i}/s/v.jpg", *values)
    for i, values in enumerate(
        (
            ("1.0", "", "", "", "", "", "", "", "", "", "", "", "", "1.0"),  # nothing found; a device
            ("", "0.0", "1.0", "-1.0"),  # findings: the labeller leaves "No Finding" blank
            ("", "", "", "-1.0"),  # uncertain alone: "No Finding" is blank too
            (),  # never labelled
        )
    )
)


@pytest.mark.parametrize("blank", ["unknown", "negative"])
@pytest.mark.parametrize(
    ("uncertain", "code"), [("unknown", -1), ("positive", 1), ("negative", 0), ("soft", labels.UNCERTAIN)]
)
def test_blank_and_uncertain_labels_count_as_the_rules_say(
    tmp_path: Path, blank: Any, uncertain: Any, code: int
) -> None:
    file = put(tmp_path / "train.csv", RULED)
    m = read_dataset(file, missing="unchecked", rules=labels.LabelRules(blank=blank, uncertain=uncertain))
    empty = -1 if blank == "unknown" else 0
    # The slow way: cell by cell.
    for row, line in enumerate(RULED.splitlines()[1:]):
        cells = line.split(",")[5:]
        for c, cell in enumerate(cells):
            words = {"1.0": 1, "0.0": 0, "-1.0": code, "": empty if any(cells) else -1}
            assert m.labels[row, c] == words[cell], (row, c)
    counts = {"blank_labels": 36, "uncertain_labels": 2, "unlabelled_images": 1}
    assert m.info["label_rules"] == {"blank": blank, "uncertain": uncertain} | counts
    positive, negative, unknown = ((m.labels == value).sum(axis=0) for value in (1, 0, -1))
    for c, row in enumerate(class_table(m)):
        assert (row.positives, row.negatives) == (positive[c], negative[c])
        assert row.unknown == unknown[c] + (m.labels[:, c] == labels.UNCERTAIN).sum()
    assert class_table(m)[0].negatives == (0 if blank == "unknown" else 2), "No Finding"


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_uncertain_labels_and_their_rules_go_with_a_manifest(tmp_path: Path, suffix: str) -> None:
    rules = labels.LabelRules(blank="negative", uncertain="soft")
    m = read_dataset(put(tmp_path / "a/train.csv", RULED), missing="unchecked", rules=rules)
    out = tmp_path / "b" / f"m.{suffix}"
    write_manifest(m, out)
    back = read_dataset(out, missing="unchecked")
    np.testing.assert_array_equal(back.labels, m.labels)
    assert back.info["label_rules"] == {"blank": "negative", "uncertain": "soft"}
    assert back.name == "m"
    assert "negative" in labels.describe_rules(back.info)
    write_manifest(read_dataset(tmp_path / "a/train.csv", missing="unchecked"), tmp_path / "b" / "other.csv")
    assert read_dataset(out, missing="unchecked").info["label_rules"]["blank"] == "negative", "each table has its own"
    write_manifest(read_dataset(own(tmp_path / "c")), out)
    assert "label_rules" not in read_dataset(out, missing="unchecked").info, "another table of that name has none"
    assert read_dataset(tmp_path / "b" / "other.csv", missing="unchecked").info["label_rules"]["blank"] == "unknown"


def test_rules_are_refused_where_they_mean_nothing(tmp_path: Path) -> None:
    for rules in ({"blank": "negative"}, {"uncertain": "soft"}):
        with pytest.raises(InputError, match=f"^--{next(iter(rules))} is for the tables of CheXpert and MIMIC-CXR"):
            read_dataset(own(tmp_path), rules=labels.LabelRules(**rules))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^--blank: 'zero' is none of unknown, negative"):
        labels.LabelRules(blank="zero")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^--uncertain: 'ones' is none of unknown, positive, negative, soft"):
        labels.LabelRules(uncertain="ones")  # type: ignore[arg-type]
    for wrong in ("[]", '{"m.csv": 3}', '{"m.csv": {"blank": "unknown"}}'):
        put(tmp_path / "dataset.json", f'{{"label_rules": {wrong}}}')
        refuses(own(tmp_path), "dataset.json", "label_rules must hold blank and uncertain")


def test_a_study_without_labels_stays_unknown(tmp_path: Path) -> None:
    put(tmp_path / "mimic-cxr-2.0.0-chexpert.csv", f"subject_id,study_id,{FOURTEEN}\n100,500,,1.0" + "," * 12 + "\n")
    meta = "dicom_id,subject_id,study_id\na,100,500\nb,102,777\n"
    put(tmp_path / "mimic-cxr-2.0.0-metadata.csv", meta)
    m = read_dataset(tmp_path, missing="unchecked", rules=labels.LabelRules(blank="negative"))
    assert m.labels[0].tolist() == [0, 1] + [0] * 12
    assert (m.labels[1] == -1).all()


def test_chexpert_bad(tmp_path: Path) -> None:
    file = put(tmp_path / "train.csv", HEAD + chexpert_row("p/s/v.jpg") + chexpert_row("p/s/w.jpg", "0.5"))
    refuses(file, "train.csv", "'No Finding'", "'0.5'", "data row 2")
    put(file, HEAD + chexpert_row("v.jpg"))
    refuses(file, "train.csv", "'Path'", "'v.jpg'")
    put(file, "Path,Edema\np/s/v.jpg,1.0\n")
    refuses(file, "train.csv", "No Finding", "Support Devices")


def test_mimic_in_one_table(tmp_path: Path) -> None:
    text = f"dicom_id,subject_id,study_id,ViewPosition,{FOURTEEN}\n"
    text += "02aa-5c,100,500,PA,1.0" + "," * 13 + "\n" + "174f-3b,101,501,LL,-1.0" + "," * 13 + "\n"
    put(tmp_path / "merged.csv", text)
    put(tmp_path / "files/p10/p100/s500/02aa-5c.jpg")
    put(tmp_path / "files/p10/p101/s501/174f-3b.dcm")
    m = read_dataset(tmp_path)
    assert m.images == ("files/p10/p100/s500/02aa-5c.jpg", "files/p10/p101/s501/174f-3b.dcm")
    assert (m.groups, m.studies, m.views) == (("100", "101"), ("500", "501"), ("PA", "LL"))
    assert m.labels[:, 0].tolist() == [1, -1]


def test_mimic_as_published(tmp_path: Path) -> None:
    rows = "100,500,1.0" + "," * 13 + "\n100,501,0.0" + "," * 13 + "\n"
    put(tmp_path / "mimic-cxr-2.0.0-chexpert.csv", f"subject_id,study_id,{FOURTEEN}\n{rows}")
    refuses(tmp_path, "mimic-cxr-2.0.0-chexpert.csv", "metadata")
    meta = "dicom_id,subject_id,study_id,ViewPosition\na,100,501,AP\nb,100,500,LATERAL\nc,102,777,PA\n"
    put(tmp_path / "mimic-cxr-2.0.0-metadata.csv", meta)
    m = read_dataset(tmp_path, missing="unchecked")
    assert m.labels[:, 0].tolist() == [0, 1, -1]
    assert (m.labels[2] == -1).all(), "a study without labels is unknown, not another's"
    assert m.studies == ("501", "500", "777")


# ----------------------------------------------------------------------------------------------- OpenI


def report(uid: str, majors: list[str], images: list[str]) -> str:
    tags = "".join(f"<major>{major}</major>" for major in majors) + "<automatic>nodule</automatic>"
    parents = "".join(f'<parentImage id="{image}"><caption>x</caption></parentImage>' for image in images)
    head = '<?xml version="1.0" encoding="utf-8"?>'
    return f'{head}<eCitation><uId id="CXR{uid}"/><MeSH>{tags}</MeSH>{parents}</eCitation>'


XML = {
    "1.xml": report("1", ["normal"], ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"]),
    "10.xml": report("10", ["Calcified Granuloma/lung", "Cardiomegaly/mild"], ["CXR10_IM-0002-1001"]),
    "11.xml": report("11", ["Nodule"], []),
}


def archive(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"ecgen-radiology/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


@pytest.mark.parametrize("shape", ["folder", "nested", "archive", "archive_file"])
def test_openi(tmp_path: Path, shape: str) -> None:
    if shape in ("folder", "nested"):
        for name, text in XML.items():
            put(tmp_path / ("ecgen-radiology" if shape == "nested" else "") / name, text)
    else:
        archive(tmp_path / "NLMCXR_reports.tgz", XML)
    put(tmp_path / "png" / "CXR1_1_IM-0001-3001.png")
    put(tmp_path / "dicom" / "1" / "1_IM-0001-4001.dcm")
    put(tmp_path / "png" / "10_IM-0002-1001.dcm.png")
    source = tmp_path / "NLMCXR_reports.tgz" if shape == "archive_file" else tmp_path
    m = read_dataset(source)
    assert m.images == ("png/CXR1_1_IM-0001-3001.png", "dicom/1/1_IM-0001-4001.dcm", "png/10_IM-0002-1001.dcm.png")
    assert m.groups == ("1", "1", "10")
    assert m.views == ("", "", "")
    assert positives(m) == [{"Normal"}, {"Normal"}, {"Calcified Granuloma", "Cardiomegaly"}]
    put(tmp_path / "indiana_projections.csv", "uid,filename,projection\n1,1_IM-0001-4001.dcm.png,Frontal\n")
    assert read_dataset(source).views == ("", "Frontal", "")


def test_kaggle_tables_come_before_the_archive_beside_them(tmp_path: Path) -> None:
    archive(indiana(tmp_path) / "NLMCXR_reports.tgz", XML)
    put(tmp_path / "another_table.csv", REPORTS)
    assert read_dataset(tmp_path).info["kind"] == "indiana"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><eCitation>&b;</eCitation>', "entities"),
        ("<eCitation>", "whole XML"),
        ("<eCitation/>", "no OpenI report"),
        (b"\xff\xfe<\x00a\x00/\x00>\x00", "UTF-8"),
        (b" " * (indiana_reports.REPORT_BYTES + 1), "larger than 4 MiB"),
    ],
)
def test_openi_bad_reports(tmp_path: Path, text: str | bytes, part: str) -> None:
    put(tmp_path / "x1.xml", text)
    refuses(tmp_path, part)


def test_openi_bad_archive(tmp_path: Path) -> None:
    whole = archive(tmp_path / "whole.tgz", XML).read_bytes()
    refuses(put(tmp_path / "cut.tgz", whole[: len(whole) // 2]), "cut.tgz", "whole tar archive")
    refuses(put(tmp_path / "text.tgz", "hello"), "text.tgz", "whole tar archive")
    refuses(archive(tmp_path / "none.tgz", {}), "none.tgz", "no OpenI report")
    refuses(archive(tmp_path / "twice.tgz", {"1.xml": XML["1.xml"], "2.xml": XML["1.xml"]}), "twice.tgz", "3001 twice")


# ------------------------------------------------------------------------------------------ own manifest

OWN = """image,group,view,study,meta:sex,A,B, C c
x/a.png,p1,Frontal,s1,F,1,0,
x/../b.png,p1,,s2,,1.0,0.0,1
c.png,p2,,s3,M,,,0
"""


def own(folder: Path, text: str = OWN) -> Path:
    for name in ("x/a.png", "b.png", "c.png"):
        put(folder / name)
    return put(folder / "manifest.csv", text)


def test_own_manifest(tmp_path: Path) -> None:
    for source in (own(tmp_path / "mine"), tmp_path / "mine"):
        m = read_dataset(source)
        assert m.name == "mine"
        assert m.images == ("x/a.png", "b.png", "c.png")
        assert m.classes == ("A", "B", "C c")
        assert m.labels.tolist() == [[1, 0, -1], [1, 0, 1], [-1, -1, 0]]
        assert m.groups == ("p1", "p1", "p2")
        assert m.studies == ("s1", "s2", "s3")
        assert m.views == ("Frontal", "", "")
        assert m.subgroups == {"sex": ("F", "", "M")}


def test_own_manifest_from_a_spreadsheet_has_a_bom_and_crlf(tmp_path: Path) -> None:
    own(tmp_path, "\ufeff" + OWN.replace("\n", "\r\n"))
    assert read_dataset(tmp_path).labels.shape == (3, 3)


def test_own_manifest_paths_may_leave_its_folder_or_be_absolute(tmp_path: Path) -> None:
    put(tmp_path / "pixels/a.png")
    absolute = put(tmp_path / "elsewhere/b.png").as_posix()
    m = read_dataset(put(tmp_path / "lists/m.csv", f"image,group,A\n../pixels/a.png,1,1\n{absolute},2,0\n"))
    assert m.images == ("../pixels/a.png", absolute)
    assert m.path(0).is_file()
    assert m.path(1) == Path(absolute)
    assert m.name == "m"
    assert m.studies == m.groups
    assert m.views == ("", "")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("image,group,A\na.png,1,1\nb.png,2,7\n", ["'A'", "'7'", "data row 2", "meta:"]),
        ("image,group,A\na.png,1,-1\n", ["'A'", "'-1'", "data row 1"]),
        ("image,group,age,A\na.png,1,63,1\n", ["'age'", "'63'", "meta:"]),
        ("image,A\na.png,1\n", ["lacks the column(s) group (the patient, whose images stay on one side of a split)."]),
        ("Image,image,group,IMAGE,A\na.png,b.png,1,c.png,1\n", ["column 'Image' holds more than 1, 0 or nothing"]),
        ("group,A\na.png,1\n", ["lacks the column(s) image"]),
        ("image,group\na.png,1\n", ["no class column"]),
        ("image,group,A,A\na.png,1,1,1\n", ["two columns", "'A'"]),
        ("image,group,A\na.png,,1\n", ["'group'", "blank", "data row 1"]),
        ("image,group,A\n,1,1\n", ["'image'", "blank", "data row 1"]),
        ("image,group,study,A\na.png,1,,1\n", ["'study'", "blank"]),
        (",image,group,A\n0,a.png,1,1\n", ["column 1 has no name", "index=False"]),
        ("image,group,A\na.png,1,1\n./a.png,2,0\n", ["a.png twice", "data rows 1 and 2"]),
        ("image group A\na.png 1 1\n", ["commas"]),
        ("name,sex\na,b\n", ["no table cxr-fast knows", "name, sex", "image, group"]),
        ("image,group,A\na.png,1\n", ["line 2", "2 fields", "header has 3"]),
        ("", ["empty"]),
        (b"\x89PNG\r\n\x1a\n\x00", ["UTF-8"]),
    ],
)
def test_own_manifest_bad(tmp_path: Path, text: str | bytes, parts: list[str]) -> None:
    refuses(put(tmp_path / "list.csv", text), "list.csv", *parts)


@pytest.mark.parametrize("mark", [";", "\t", ","])
@pytest.mark.parametrize("head", ["image,group,Meta:sex,A", "Image,GROUP,meta:sex,A", "IMAGE,Group,META:sex,A"])
def test_own_manifest_with_other_delimiters_and_in_any_case(tmp_path: Path, mark: str, head: str) -> None:
    text = f"{head}\na.png,1,F,1\nb.png,2,M,\n".replace(",", mark)
    found = read_dataset(put(tmp_path / "list.csv", text), missing="unchecked")
    assert (found.images, found.groups, found.classes) == (("a.png", "b.png"), ("1", "2"), ("A",))
    assert found.labels.tolist() == [[1], [-1]]
    assert found.subgroups == {"sex": ("F", "M")}


def test_sources_that_are_none(tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", "nowhere", "no such file or folder")
    refuses(tmp_path, "holds no dataset", "manifest.csv", "indiana_reports.csv", "Data_Entry_2017", "OpenI")
    refuses(put(tmp_path / "list.xlsx"), "list.xlsx", ".csv or .parquet")
    refuses(put(tmp_path / "list.parquet", "hello"), "list.parquet", "not a whole Parquet file")
    refuses(put(tmp_path / "list.csv.gz", b"\x1f\x8b\x08cut"), "list.csv.gz", "gzip")
    refuses(tmp_path, "holds no dataset")


def test_a_folder_of_images_without_a_table_says_which_table_to_write(tmp_path: Path) -> None:
    for name in ("a.png", "below/b.DCM"):
        put(tmp_path / name)
    header = ["manifest.csv with the header image,group,FINDING", "group the patient", "docs/how-to/own_tables.md"]
    predict = f"`cxrfast predict MODEL {tmp_path} --out predictions.csv`"
    refuses(tmp_path, "holds 2 images but no table of labels. Write", *header, predict)
    put(tmp_path / "codes.csv", "code,meaning\n1,yes\n")
    refuses(tmp_path, "holds 2 images but no table of labels (codes.csv: other columns). Write", *header)


def test_two_manifests_are_one_too_many(tmp_path: Path) -> None:
    own(tmp_path)
    write_manifest(read_dataset(tmp_path), tmp_path / "manifest.parquet")
    refuses(tmp_path, "several datasets", "manifest.csv, manifest.parquet")


def test_dataset_json_names_and_marks_synthetic(tmp_path: Path) -> None:
    own(tmp_path)
    about = put(tmp_path / "dataset.json", '{"name": "phantoms", "synthetic": true}')
    m = read_dataset(tmp_path)
    assert m.name == "phantoms"
    assert m.info["synthetic"] is True
    for bad in ("{", "[]", '{"synthetic": "yes"}', b"\xff"):
        put(about, bad)
        refuses(tmp_path, "dataset.json")


# ------------------------------------------------------------------------------------------------ write


@pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
def test_written_elsewhere_and_read_back(tmp_path: Path, name: str) -> None:
    m = read_dataset(own(tmp_path / "data"))
    out = tmp_path / "lists" / "deep" / name
    write_manifest(m, out)
    back = read_dataset(out)
    assert back.images == ("../../data/x/a.png", "../../data/b.png", "../../data/c.png")
    assert [back.path(row).resolve() for row in range(3)] == [m.path(row).resolve() for row in range(3)]
    assert (back.groups, back.views, back.studies) == (m.groups, m.views, m.studies)
    assert (back.classes, back.subgroups) == (m.classes, m.subgroups)
    np.testing.assert_array_equal(back.labels, m.labels)
    assert [path.name for path in out.parent.iterdir()] == [name], "nothing half-written stays"


def test_csv_bytes(tmp_path: Path) -> None:
    write_manifest(read_dataset(own(tmp_path)), tmp_path / "out.csv")
    expected = (
        "image,group,view,study,meta:sex,A,B,C c\n"
        "x/a.png,p1,Frontal,s1,F,1,0,\nb.png,p1,,s2,,1,0,1\nc.png,p2,,s3,M,,,0\n"
    )
    assert (tmp_path / "out.csv").read_bytes().decode() == expected


def test_write_refuses(tmp_path: Path) -> None:
    m = read_dataset(own(tmp_path))
    for out, part in (
        (tmp_path / "out.xlsx", ".csv or .parquet"),
        (tmp_path / "c.png" / "out.csv", "c.png is a file, not a folder"),
    ):
        with pytest.raises(InputError, match=part):
            write_manifest(m, out)
    clash = Manifest(**{**vars(m), "classes": ("A", "view", "C")})
    with pytest.raises(InputError, match="'view'"):
        write_manifest(clash, tmp_path / "out.csv")


def test_synthetic_goes_along_and_never_into_a_real_data_set(tmp_path: Path) -> None:
    own(tmp_path / "drawn")
    put(tmp_path / "drawn/dataset.json", '{"name": "phantoms", "synthetic": true}')
    m = read_dataset(tmp_path / "drawn")
    write_manifest(m, tmp_path / "lists/out.csv")
    assert read_dataset(tmp_path / "lists/out.csv").info["synthetic"] is True
    put(tmp_path / "real/dataset.json", '{"name": "real"}')
    with pytest.raises(InputError, match=r"dataset\.json says the data is real"):
        write_manifest(m, tmp_path / "real/out.csv")


WORD = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8)
NAME = WORD.filter(lambda word: "/" not in word and "\\" not in word and word.strip(".") != "")


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    images = tuple(draw(st.lists(st.builds("{}/{}".format, NAME, NAME), min_size=1, max_size=6, unique=True)))
    n = len(images)
    free = WORD.filter(lambda w: w.lower() not in RESERVED and not w.lower().startswith(META) and ";" not in w)
    classes = tuple(draw(st.lists(free, min_size=1, max_size=4, unique=True)))
    cells = st.lists(st.sampled_from([1, 0, -1]), min_size=n * len(classes), max_size=n * len(classes))

    def column(values: st.SearchStrategy[str]) -> tuple[str, ...]:
        return tuple(draw(st.lists(values, min_size=n, max_size=n)))

    return Manifest(
        name="any",
        root=Path("/data"),
        images=images,
        groups=column(WORD),
        views=column(st.just("") | WORD),
        classes=classes,
        labels=np.array(draw(cells), np.int8).reshape(n, -1),
        studies=column(WORD),
        subgroups={"sex": column(st.just("") | WORD)},
    )


@settings(max_examples=60, deadline=None)
@given(manifests(), st.sampled_from([".csv", ".parquet"]))
def test_any_manifest_survives_the_file(tmp_path_factory: pytest.TempPathFactory, m: Manifest, suffix: str) -> None:
    folder = tmp_path_factory.mktemp("any")
    m = Manifest(**{**vars(m), "root": folder})
    write_manifest(m, folder / f"any{suffix}")
    back = read_dataset(folder / f"any{suffix}", missing="unchecked")
    for name in ("name", "images", "groups", "views", "classes", "studies", "subgroups"):
        assert getattr(back, name) == getattr(m, name), name
    np.testing.assert_array_equal(back.labels, m.labels)


@pytest.mark.parametrize("name", ["split", "SPLIT", "Meta:sex", "Group"])
def test_a_class_named_like_a_column_of_ours_is_not_written(name: str, tmp_path: Path) -> None:
    """The reader takes such a column for ours in any case of its letters."""
    found = Manifest(
        name="any",
        root=tmp_path,
        images=("a.png",),
        groups=("p",),
        views=("",),
        classes=(name,),
        labels=np.ones((1, 1), np.int8),
        studies=("p",),
    )
    with pytest.raises(InputError, match=f"a class cannot be named '{name}'"):
        write_manifest(found, tmp_path / "any.csv")
    assert not list(tmp_path.iterdir())


def test_parquet_cells_may_be_bool_float_or_null(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = {"image": ["a", "b", "c"], "group": [1, 2, 3], "A": [True, False, None], "B": [1.0, float("nan"), 0.0]}
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    m = read_dataset(tmp_path / "m.parquet", missing="unchecked")
    assert m.labels.tolist() == [[1, 1], [0, -1], [-1, 0]]
    assert m.groups == ("1", "2", "3")


# --------------------------------------------------------------------------------------------- describe


def test_class_table_and_summary(tmp_path: Path) -> None:
    m = read_dataset(own(tmp_path))
    rows = class_table(m)
    assert [tuple(row) for row in rows] == [
        ("A", 2, 100.0, 1, 1, 0),
        ("B", 0, 0.0, 1, 0, 2),
        ("C c", 1, 50.0, 1, 1, 1),
    ]
    told = summary(m)
    assert json.loads(json.dumps(told)) == told
    assert (told["images"], told["groups"], told["studies"], told["classes"]) == (3, 2, 3, 3)
    assert told["views"] == {"": 2, "Frontal": 1}
    assert (told["positives"], told["unknown"], told["labels_an_image"]) == (3, 3, 1.0)
    assert told["images_a_study"] == {"min": 1, "max": 1}


def test_labels_cannot_be_changed_in_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        read_dataset(own(tmp_path)).labels[0, 0] = 0


@pytest.mark.parametrize(
    ("age", "said"),
    [
        ("58", "50-59"),
        ("058Y", "50-59"),
        ("011M", "0-9"),
        ("9", "0-9"),
        ("90.0", "90-99"),
        ("414", ""),
        ("", ""),
        ("?", ""),
    ],
)
def test_decade(age: str, said: str) -> None:
    assert public_tables.decade(age) == said


# -------------------------------------------------------------------------------------------- real data


def test_real_indiana_has_the_published_figures() -> None:
    folder = real("iu")
    m = read_dataset(folder, missing="unchecked")
    told, table = summary(m), {row.name: row for row in class_table(m)}
    assert (told["images"], told["studies"], told["groups"]) == (7466, 3851, 3851)
    assert told["positives"] == 13123
    assert round(told["labels_an_image"], 3) == 1.758
    assert told["images_a_study"] == {"min": 1, "max": 5}
    assert told["views"] == {"Frontal": 3818, "Lateral": 3648}
    assert (m.info["unindexed_studies"], m.info["only_dropped_studies"]) == (92, 157)
    spot = {"Normal": 3162, "Degenerative Change": 1360, "Lesion": 1338, "Bronchiolitis": 2}
    assert {name: table[name].positives for name in spot} == spot
    with (folder / "indiana_reports_labelled.csv").open(encoding="utf-8", newline="") as file:
        published = {
            row["uid"]: ["Normal" if name == "normal" else name for name in row["label"].split(";")]
            for row in csv.DictReader(file)
        }
    counts = Counter(name for uid in m.groups for name in published[uid])
    assert len(counts) == 35
    assert {name: row.positives for name, row in table.items()} == counts
    assert positives(m) == [set(published[uid]) for uid in m.groups]


def test_real_indiana_label_column_equals_the_headings() -> None:
    computed = read_dataset(real("iu"), missing="unchecked")
    given_ = read_dataset(real("iu") / "indiana_reports_labelled.csv", missing="unchecked")
    assert computed.images == given_.images
    np.testing.assert_array_equal(computed.labels, given_.labels)


def test_real_openi_archive_equals_the_kaggle_copy() -> None:
    kaggle = read_dataset(real("iu"), missing="unchecked")
    openi = read_dataset(real("iu") / "NLMCXR_reports.tgz", missing="unchecked")
    assert len(openi) == 7470
    row_of = {layouts.by_stem(image): row for row, image in enumerate(openi.images)}
    rows = [row_of[layouts.by_stem(image)] for image in kaggle.images]
    np.testing.assert_array_equal(openi.labels[rows], kaggle.labels)
    assert tuple(openi.groups[row] for row in rows) == kaggle.groups
    assert tuple(openi.views[row] for row in rows) == kaggle.views


def test_real_indiana_with_all_its_files(tmp_path: Path) -> None:
    for name in ("indiana_reports.csv", "indiana_projections.csv"):
        put(tmp_path / name, (real("iu") / name).read_bytes())
    (tmp_path / "images").mkdir()
    for image in tables.read_csv(tmp_path / "indiana_projections.csv")["filename"]:
        (tmp_path / "images" / image).touch()
    m = read_dataset(tmp_path)
    assert len(m) == 7466
    assert m.path(7465).is_file()
    for name in ("manifest.csv", "manifest.parquet"):
        write_manifest(m, tmp_path / name)
        back = read_dataset(tmp_path / name)
        assert back.images == m.images
        np.testing.assert_array_equal(back.labels, m.labels)


def test_real_nih() -> None:
    m = read_dataset(real("nih"))
    told = summary(m)
    assert (told["images"], told["studies"], told["groups"], told["classes"]) == (550, 550, 129, 14)
    assert told["views"] == {"PA": 366, "AP": 184}
    assert all(m.path(row).is_file() for row in range(len(m)))
    assert set(m.subgroups["sex"]) == {"F", "M"}
    assert "" not in m.subgroups["age"]


@pytest.mark.parametrize(
    "values",
    [
        [f"A{i}" for i in range(4)],  # all different
        ["4711", "4712", "4713", "4714"],
        ["Anna Meier", "Anna Meier", "Hans Sommer", ""],
        ["3.5.1957", "3.5.1957", "", "4.6.1958"],
    ],
)
def test_a_column_that_names_patients_is_not_invited_as_meta(tmp_path: Path, values: list[str]) -> None:
    rows = "".join(f"{i}.png,p{i},{value},1\n" for i, value in enumerate(values))
    file = put(tmp_path / "manifest.csv", f"image,group,extra,Mass\n{rows}")
    with pytest.raises(
        InputError, match=r"column 'extra' .* could identify a person .*leave it out of the manifest"
    ) as e:
        read_dataset(file, missing="unchecked")
    assert "meta:" not in str(e.value)
    assert not any(value in str(e.value) for value in values if value)


def test_a_column_that_groups_patients_is_invited_as_meta(tmp_path: Path) -> None:
    file = put(tmp_path / "manifest.csv", "image,group,sex,Mass\na.png,1,F,1\nb.png,2,F,0\nc.png,3,M,0\n")
    with pytest.raises(InputError, match=r"column 'sex' holds 'F' in data row 1; .* is named 'meta:\.\.\.'"):
        read_dataset(file, missing="unchecked")


# ------------------------------------------------------------------------------- identifiers and class names

METADATA = "dicom_id,subject_id,study_id,ViewPosition\na1,10,501,PA\na2,20,502,AP\na3,20,502,LL\n"


def mimic_tables(folder: Path, *studies: str, metadata: str = METADATA) -> Path:
    """`studies` are subject, study and the label of Edema."""
    blank = dict.fromkeys(labels.CHEXPERT_CLASSES, "")
    rows = [dict(zip(("subject_id", "study_id", "Edema"), study.split(","), strict=True)) for study in studies]
    head = ["subject_id", "study_id", *labels.CHEXPERT_CLASSES]
    lines = [",".join(head), *(",".join({**blank, **row}[name] for name in head) for row in rows)]
    put(folder / "mimic-cxr-2.0.0-metadata.csv", metadata)
    put(folder / "mimic-cxr-2.0.0-chexpert.csv", "\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize(
    "studies", [("10,501,1", "20,502,0"), ("10.0,501.0,1", "p20,s502,0"), ("p10,5.01e2,1", "020,0502,0")]
)
def test_mimic_matches_studies_as_identifiers(tmp_path: Path, studies: tuple[str, ...]) -> None:
    found = read_dataset(mimic_tables(tmp_path, *studies), missing="unchecked")
    assert found.labels[:, labels.CHEXPERT_CLASSES.index("Edema")].tolist() == [1, 0, 0]
    assert found.notes == ()


def test_mimic_counts_images_whose_study_has_no_labels_and_refuses_where_none_has(tmp_path: Path) -> None:
    found = read_dataset(mimic_tables(tmp_path, "10,501,1"), missing="unchecked")
    assert found.notes == (
        "2 of 3 images have no labels: their studies, first 502, are not in mimic-cxr-2.0.0-chexpert.csv.",
    )
    refuses(mimic_tables(tmp_path, "10,601,1"), "No study of", "metadata.csv", "501", "601", missing="unchecked")


def test_mimic_refuses_contradictions(tmp_path: Path) -> None:
    once = read_dataset(mimic_tables(tmp_path, "10,501,1", "10,501.0,1", "20,502,0"), missing="unchecked")
    assert once.labels[:, labels.CHEXPERT_CLASSES.index("Edema")].tolist() == [1, 0, 0]
    twice = mimic_tables(tmp_path, "10,501,1", "20,502,0", "10,s501,0")
    refuses(twice, "lists study 501 twice", "data rows 1 and 3", missing="unchecked")
    refuses(mimic_tables(tmp_path, "10,501,1", "30,502,0"), "of patient 20", "of 30", missing="unchecked")


def test_indiana_matches_studies_as_identifiers(tmp_path: Path) -> None:
    floats = "".join(
        line.replace(",", ".0,", 1) if line[0].isdigit() else line for line in PROJECTIONS.splitlines(True)
    )
    found = read_dataset(indiana(tmp_path / "floats", projections=floats))
    assert (found.labels == read_dataset(indiana(tmp_path / "whole")).labels).all()
    assert found.groups == ("1", "1", "2", "3", "4")


def test_a_class_with_a_semicolon_is_refused_where_it_is_read(tmp_path: Path) -> None:
    refuses(put(tmp_path / "m.csv", 'image,group,"Edema; acute"\na.png,1,1\n'), "'Edema; acute'", "';'", "rename")
    with pytest.raises(InputError, match="holds ';'"):
        write_manifest(
            Manifest(**{**vars(read_dataset(own(tmp_path))), "classes": ("A;B", "C", "D")}), tmp_path / "o.csv"
        )


def test_groups_that_differ_in_spelling_alone_are_noted(tmp_path: Path) -> None:
    rows = "".join(f"{i}.png,{group},{i % 2}\n" for i, group in enumerate(("1", "1.0", "01", "P2", "p2")))
    found = read_dataset(put(tmp_path / "m.csv", f"image,group,A\n{rows}"), missing="unchecked")
    assert len(found.notes) == 1
    assert found.notes[0].startswith("4 pair(s) of groups differ in spelling alone")


def test_labels_that_are_all_unknown_or_never_positive_are_noted(tmp_path: Path) -> None:
    for cells, said in ((",", "No label is known"), ("0,", "No image has a positive label"), ("1,", "")):
        found = read_dataset(put(tmp_path / "m.csv", f"image,group,A,B\na.png,1,{cells}\n"), missing="unchecked")
        assert [note.startswith(said) for note in found.notes] == [True] * bool(said)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("mimic_labels_lost/ok", ""),
        ("mimic_labels_lost/float_ids", ""),
        ("mimic_labels_lost/twice", "lists study 50000001 twice with different labels"),
        ("names_that_differ_a_little/upper", ""),
        ("names_that_differ_a_little/nfc", ""),
        ("names_that_differ_a_little/backslash", ""),
        ("names_that_differ_a_little/chexpert_png", ""),
        ("groups_spelled_twice/m.csv", ""),
        ("semicolon_in_class/m.csv", "'Edema; acute' holds ';'"),
    ],
)
def test_real_cases(case: str, said: str) -> None:
    source = real(f"cases/{case}")
    missing: Any = "refuse" if "names" in case else "unchecked"
    if said:
        refuses(source, said, missing=missing)
        return
    found = read_dataset(source, missing=missing)
    assert (found.labels == 1).any()
    assert ("names" not in case) or all(found.path(row).is_file() for row in range(len(found)))
