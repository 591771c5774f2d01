"""`cxrfast prepare` on tables of a hospital: what it prints, what it refuses, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cxr_fast.cli.main import main

TABLE = "File;Patient;Inpatient;Edema;Mass;Name\na.png;1;1;yes;;x\nb.png;1;0;no;1;y\nc.png;2;1;no;0;z\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).touch()
    (tmp_path / "h.csv").write_text(TABLE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["prepare", *arguments])


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") <= 2
    return result.stderr


def test_a_table_becomes_a_manifest(here: Path) -> None:
    result = run("h.csv", "--classes", "edema,MASS", "--out", "my.csv")
    assert result.exit_code == 0, result.output
    assert "h (table): 3 images, 2 studies, 2 groups" in result.stdout
    assert "Edema          1       33.33          2        0" in result.stdout
    assert "Mass           1       50.00          1        1" in result.stdout
    assert "note: image from 'File', group from 'Patient'.\n" in result.stderr
    assert "note: no class, though of 0 and 1: Inpatient.\n" in result.stderr
    written = (here / "my.csv").read_text(encoding="utf-8")
    assert written == "image,group,Edema,Mass\na.png,1,1,\nb.png,1,0,1\nc.png,2,0,0\n"
    again = run("my.csv")
    assert "Every other column is a class: Edema, Mass. --classes A,B takes only some." in again.stdout


def test_mistakes(here: Path) -> None:
    assert "--classes 'Inpatient,Edema,Mass' (these hold 0 and 1; leave out what is no finding)" in refused("h.csv")
    assert "did you mean 'Edema'?" in refused("h.csv", "--classes", "Edma")
    assert "names an empty column" in refused("h.csv", "--classes", "Edema,,Mass")
    assert "--label-sep is for the column of --labels" in refused("h.csv", "--label-sep", ";")
    assert "--meta: column 'Name' could identify a person" in refused("h.csv", "--classes", "Edema", "--meta", "Name")
    assert "--split published is for tables as they are published" in refused(
        "h.csv", "--classes", "Edema", "--split", "published"
    )
    assert "--uncertain is for the tables of CheXpert" in refused(
        "h.csv", "--classes", "Edema", "--uncertain", "positive"
    )
    (here / "c.png").unlink()
    assert "1 of the 3 images that h.csv lists are not below" in refused("h.csv", "--classes", "Edema")
    assert run("h.csv", "--classes", "Edema", "--skip-missing").exit_code == 0
    assert run("h.csv", "--classes", "Edema", "--labels-only").exit_code == 0


def test_the_split_of_a_table_and_of_a_manifest(here: Path) -> None:
    (here / "s.csv").write_text("image,group,Part,A\na.png,1,train,1\nb.png,2,test,0\n", encoding="utf-8")
    assert "split: training 1, hold-out 1" in run("s.csv", "--classes", "A", "--split", "part").stdout
    (here / "t.csv").write_text("image,group,split,A\na.png,1,train,1\nb.png,2,holdout,0\n", encoding="utf-8")
    assert "split: training 1, hold-out 1" in run("t.csv").stdout
    assert "split: training 1, hold-out 1" in run("t.csv", "--split", "column").stdout
