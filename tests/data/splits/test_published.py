"""The published lists, on small tables of the three layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from cxr_fast.data.labels import CHEXPERT_CLASSES
from cxr_fast.data.splits.published import published_words, read_published
from cxr_fast.errors import InputError

CLASSES = ",".join(CHEXPERT_CLASSES)
BLANKS = "," * (len(CHEXPERT_CLASSES) - 1)


def nih(folder: Path) -> None:
    rows = ["Image Index,Finding Labels,Follow-up #,Patient ID,View Position"]
    rows += [f"{i}.png,Mass,0,{i},PA" for i in range(4)]
    (folder / "Data_Entry_2017.csv").write_text("\n".join(rows))


def test_nih(tmp_path: Path) -> None:
    nih(tmp_path)
    (tmp_path / "test_list.txt").write_text("1.png\n3.png\n99.png\n")
    assert read_published(tmp_path, missing="keep").splits == ("train", "holdout", "train", "holdout")
    (tmp_path / "train_val_list.txt").write_text("0.png\n")
    assert read_published(tmp_path, missing="keep").splits == ("train", "holdout", "", "holdout")
    assert read_published(tmp_path, missing="keep", limit=2).splits == ("train", "holdout")


def test_chexpert_reads_both_tables(tmp_path: Path) -> None:
    for name, patients in (("train", (1, 2)), ("valid", (3,))):
        paths = [f"CheXpert/{name}/patient{p}/study1/view1_frontal.jpg" for p in patients]
        rows = [f"Path,Sex,{CLASSES}", *(f"{path},F,1{BLANKS}" for path in paths)]
        (tmp_path / f"{name}.csv").write_text("\n".join(rows))
    found = read_published(tmp_path, missing="unchecked")
    assert (found.splits, found.groups) == (("train", "train", "holdout"), ("patient1", "patient2", "patient3"))
    assert found.subgroups["sex"] == ("F", "F", "F")
    assert found.labels.shape == (3, len(CHEXPERT_CLASSES))


def test_mimic(tmp_path: Path) -> None:
    rows = [f"dicom_id,subject_id,study_id,{CLASSES}", *(f"d{i},{i},{i},1{BLANKS}" for i in range(4))]
    (tmp_path / "mimic-cxr-2.0.0-chexpert.csv").write_text("\n".join(rows))
    lists = tmp_path / "mimic-cxr-2.0.0-split.csv"
    lists.write_text("dicom_id,study_id,subject_id,split\nd0,0,0,train\nd1,1,1,validate\nd2,2,2,test\n")
    assert read_published(tmp_path, missing="unchecked").splits == ("train", "train", "holdout", "")
    lists.write_text("dicom_id,study_id,subject_id,split\nd0,0,0,dev\n")
    with pytest.raises(InputError, match=r"column 'split' holds 'dev' in data row 1"):
        read_published(tmp_path, missing="unchecked")
    lists.unlink()
    with pytest.raises(InputError, match="must hold one table"):
        read_published(tmp_path, missing="unchecked")


def test_what_has_no_lists_is_one_line(tmp_path: Path) -> None:
    nih(tmp_path)
    with pytest.raises(InputError, match=r"--split published: .* lacks test_list\.txt"):
        read_published(tmp_path, missing="keep")
    (tmp_path / "test_list.txt").write_text("99.png\n")
    with pytest.raises(InputError, match="holds out none of the 4 images"):
        read_published(tmp_path, missing="keep")
    with pytest.raises(InputError, match="only NIH ChestX-ray14, CheXpert and MIMIC-CXR come with lists"):
        published_words("manifest", tmp_path, ["a.png"])
    with pytest.raises(InputError, match=r"lacks valid\.csv"):
        published_words("chexpert", tmp_path, ["a.png"])
