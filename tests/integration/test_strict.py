"""A film of no chest by its header: a note, or with `--strict` a failed row; and DICOM without pydicom."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cxr_fast.activations.cache import open_cache
from cxr_fast.cli.main import main
from cxr_fast.errors import ImageError
from cxr_fast.inference.predictor import Predictor
from tests.conftest import TOY

pydicom = pytest.importorskip("pydicom", reason="pip install 'cxr-fast[dicom]'")
from tests.data.formats.test_dicom import dicom_file  # noqa: E402

WORDS = {"chest.dcm": "", "ct.dcm": "Modality is CT", "hand.dcm": "BodyPartExamined is HAND"}
ON_CPU = ("--device", "cpu", "--threads", 1)


def cxr(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """A film of a chest, one by a CT and one of a hand, and a table of them."""
    folder = tmp_path / "films"
    folder.mkdir()
    values = np.random.default_rng(0).integers(0, 4096, (40, 40)).astype(np.uint16)
    for k, name in enumerate(WORDS):
        more = {"ct.dcm": {"Modality": "CT"}, "hand.dcm": {"BodyPartExamined": "HAND"}}.get(name, {})
        (folder / name).write_bytes(dicom_file(values + k, bits=13, **more))
    rows = "".join(f"{name},g{k},{k % 2}\n" for k, name in enumerate(WORDS))
    (folder / "m.csv").write_text("image,group,Edema\n" + rows)
    return folder


def table(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {Path(row["path"]).name: row for row in csv.DictReader(file)}


def test_predict_notes_them_and_strict_refuses_them(toy_model: Path, films: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    assert cxr("predict", toy_model, films, "--out", out, *ON_CPU).exit_code == 0
    assert {name: row["note"] for name, row in table(out).items()} == WORDS
    assert {row["status"] for row in table(out).values()} == {"ok"}
    # Answers that an earlier run gave without it do not count.
    again = cxr("predict", toy_model, films, "--out", out, "--strict", *ON_CPU)
    assert again.exit_code == 1
    assert "2 image(s) failed: 2 no_chest" in again.stderr
    rows = table(out)
    assert [row["status"] for row in rows.values()] == ["ok", "failed", "failed"]
    assert rows["ct.dcm"]["reason"].startswith("no_chest: ")
    assert "Modality is CT, which is no film of a chest" in rows["ct.dcm"]["reason"]
    assert "BodyPartExamined is HAND" in rows["hand.dcm"]["reason"]
    assert cxr("predict", toy_model, films, "--out", out, *ON_CPU).exit_code == 0  # nor does what failed by it
    assert {row["status"] for row in table(out).values()} == {"ok"}


def test_cache_notes_them_and_strict_refuses_them(films: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.h5"
    command = ("cache", films / "m.csv", "--weights", TOY, "--out", out, *ON_CPU)
    assert cxr(*command).exit_code == 0
    assert open_cache(out).errors == tuple(WORDS.values())
    again = cxr(*command, "--strict")
    assert again.exit_code == 1, again.output
    assert [error.split(":")[0] for error in open_cache(out).errors] == ["", "no_chest", "no_chest"]
    assert open_cache(out).ok.tolist() == [True, False, False]
    assert cxr(*command).exit_code == 0
    assert open_cache(out).ok.all()


def test_predictor_takes_strict_for_every_kind_of_film(toy_model: Path, films: Path) -> None:
    plain = Predictor(toy_model, device="cpu", threads=1)
    strict = Predictor(toy_model, device="cpu", threads=1, strict=True)
    path = films / "hand.dcm"
    for film in (path, path.read_bytes(), io.BytesIO(path.read_bytes()), pydicom.dcmread(path)):
        with pytest.raises(ImageError, match="BodyPartExamined is HAND") as caught:
            strict(film)
        assert caught.value.reason == "no_chest"
    assert plain(path)
    assert strict(films / "chest.dcm") == plain(films / "chest.dcm")
    assert [result.reason for result in strict.stream(sorted(films.glob("*.dcm")))] == ["", "no_chest", "no_chest"]


def test_cache_ends_with_one_line_where_pydicom_is_missing(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    result = cxr("cache", films / "m.csv", "--weights", TOY, "--out", tmp_path / "c.h5", *ON_CPU)
    assert result.exit_code == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "a DICOM file needs pydicom" in errors[0]
    assert not (tmp_path / "c.h5").exists()
