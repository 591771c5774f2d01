"""Names, numbers and dates planted in every column of a manifest are in nothing that is made to be shown."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cxr_fast.cli.main import main

WEIGHTS = "random:0:test_vit"
# Files of a run folder that docs/reference/run_folder.md says to keep: they hold paths and a line an image.
KEPT = {"run.json", "predictions.npz", "predictions.csv", "predictions.parquet"}
SHOWN, HIDDEN = {"sex", "weight"}, 9  # of the columns: view and eight of `meta:`


def cxr(*words: object) -> str:
    """What a command says, which must work."""
    result = CliRunner().invoke(main, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code in (0, 3), result.output
    return result.output


def holds(data: bytes, word: str) -> bool:
    """Whether bytes hold a word; a number only by itself, for the digits of a figure may hold any other."""
    if word.encode() not in data or not word.replace(".", "").isdigit():
        return word.encode() in data
    return re.search(rb"(?<![\w.])" + re.escape(word.encode()) + rb"(?!\w)", data) is not None


def plant(folder: Path, phantoms: Path) -> set[str]:
    """Write a manifest of 80 films whose columns identify their patients; return what must be nowhere."""
    (folder / "films").mkdir(parents=True)
    found = []
    for i, film in enumerate(sorted((phantoms / "images").iterdir())):
        patient = i // 2
        shutil.copy(film, folder / "films" / f"Schmidt_Johann_{i:03d}.png")
        found.append(
            {
                "image": f"films/Schmidt_Johann_{i:03d}.png",
                "group": f"PAT-77{patient:04d}",
                "study": f"EXAM88{i:05d}",
                "view": "MEIER^ANNA" if i == 5 else ("AP", "PA")[patient % 2],
                "meta:sex": "MF"[patient % 2],
                "meta:weight": f"{50 + patient / 7:.4f}",
                "meta:patient_name": f"Weber{patient}",
                "meta:acc": f"ACC99{patient:06d}",
                "meta:taken": f"2021{1 + patient % 12:02d}{1 + patient % 28:02d}",
                "meta:iso": ("2019-05-17", "2020-06-18")[patient % 2],
                "meta:seen": ("17.05.1931", "3 May 1942")[patient % 2],
                "meta:operator": ("Fruehling", "Herbst")[patient % 2],
                "meta:ward": ("Hanna Sommer", "North")[patient % 2],
                "meta:consecutive": str(31000 + patient),
                "Opacity": str(patient % 2),
                "Effusion": str(patient // 2 % 2),
            }
        )
    with open(folder / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    secret = {value for row in found for name, value in row.items() if name not in ("view", "meta:sex")}
    secret -= {"North", "0", "1"}
    return secret | {"MEIER", "Sommer", "Weber", "Schmidt", "PAT-", "EXAM88", "ACC99", "May 1942"}


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> tuple[Path, set[str], dict[str, str]]:
    """A folder in which every command was run, what must be nowhere, and what each command said."""
    import torch

    torch.set_num_threads(1)
    here = tmp_path_factory.mktemp("of Dr Winter")
    secret = plant(here / "data", phantoms)
    said = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        said["prepare"] = cxr("prepare", "data")
        said["cache"] = cxr("cache", "data", "--out", "c.h5", "--weights", WEIGHTS, "--device", "cpu", "--threads", 1)
        quick = ("--train-blocks", 0, "--folds", 2, "--epochs", 2, "--batch-size", 8, "--device", "cpu", "--threads", 1)
        for seed, name in enumerate(("one", "two")):
            said[f"sweep {name}"] = cxr(
                "sweep", "c.h5", "--out", name, "--seed", 0, "--head-lr", (1e-3, 3e-3)[seed], *quick
            )
        said["report"] = cxr("report", "one", "two", "--out", "comparison.html", "--resamples", 50)
        said["compare"] = cxr("compare", "one", "two", "--resamples", 100, "--json", "compare.json")
        said["export"] = cxr("export", "one")
        said["info"] = cxr("info", "c.h5") + cxr("info", "one") + cxr("info", "one/model.fp32.onnx")
        said["verify"] = cxr("verify", "one", "--device", "cpu", "--json", "verify.json")
        timed = ("--repeats", 3, "--warmup", 0, "--budget-ms", 1e9, "--json", "latency.json")
        said["bench"] = cxr(
            "bench", "latency", "one", "--images", "data/films", "--device", "cpu", "--threads", 1, *timed
        )
        said["push"] = cxr("push", "one", "anna/lungs", "--dry-run", "--device", "cpu")
    return here, secret, said


def shared(here: Path) -> list[Path]:
    """Every file that is made to be shown."""
    found = [path for run in ("one", "two") for path in (here / run).rglob("*") if path.name not in KEPT]
    return [*found, *(here / name for name in ("comparison.html", "compare.json", "verify.json", "latency.json"))]


def test_no_file_made_to_be_shown_names_anybody(clinic: tuple[Path, set[str], dict[str, str]]) -> None:
    here, secret, _ = clinic
    files = shared(here)
    assert {"report.html", "MODEL_CARD.md", "evaluation.json", "split.csv", "model.fp32.onnx", "roc_curves.png"} <= {
        path.name for path in files
    }
    kept = b"".join(str(value).encode() for value in np.load(here / "one" / "predictions.npz")["meta:acc"])
    assert b"ACC99000001" in kept, "the search can find: the run itself keeps the values"
    for path in files:
        text = path.read_bytes()
        for word in secret | {str(here), "Dr Winter"}:
            assert not holds(text, word), (path.name, word)


def test_no_command_says_a_value(clinic: tuple[Path, set[str], dict[str, str]]) -> None:
    _, secret, said = clinic
    for command, text in said.items():
        for word in secret:
            assert not holds(text.encode(), word), (command, word)
    assert "patient_name (its name means a person, an identifier or a date)" in said["prepare"]
    assert f"{HIDDEN} of {HIDDEN + len(SHOWN)} columns" in said["prepare"]


def test_what_may_be_shown_is_shown(clinic: tuple[Path, set[str], dict[str, str]]) -> None:
    here, _, _ = clinic
    found = json.loads((here / "one" / "evaluation.json").read_text())
    assert found["columns_not_shown"] == HIDDEN
    assert {row["column"] for row in found["shortcuts"]} == SHOWN
    for name in ("report.html", "MODEL_CARD.md"):
        assert f"{HIDDEN} columns not shown" in (here / "one" / name).read_text()
    record = json.loads((here / "one" / "run.json").read_text())
    assert record["shortcuts"] == found["shortcuts"]
