"""A missing library is one line that names the extra and a pip line that works, in a checkout and out of one."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cxr_fast.system import extras

ROOT = Path(__file__).parents[2]
# Names of distributions that are imported under another one.
IMPORTED = {
    "open-clip-torch": "open_clip",
    "scikit-learn": "sklearn",
    "iterative-stratification": "iterstrat",
    "onnxruntime-gpu": "onnxruntime",
}
# Hides libraries as if they were not installed, then runs the command line.
WITHOUT = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""
BROUGHT = ("train", "hub", "recalibrate")  # what the extra train brings, by itself or by other extras
TRAIN = {library for library, extra in extras.EXTRA.items() if extra in BROUGHT} | {"torchvision"}


def run(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    text = WITHOUT.format(hidden=sorted(TRAIN)) + code
    return subprocess.run([sys.executable, "-c", text, *words], capture_output=True, text=True, timeout=250)


def test_every_library_of_an_extra_is_known() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in ("train", "cpu", "hub", "recalibrate", "dicom", "parquet", "excel", "cluster"):
        for line in project["optional-dependencies"][extra]:
            name = re.match(r"[\w-]+", line)[0]  # type: ignore[index]
            if name != "cxr-fast":
                assert extras.EXTRA[IMPORTED.get(name, name)] == extra, line


def test_the_line_installs_the_checkout_or_the_package(tmp_path: Path) -> None:
    assert extras.install("train") == f"pip install -e '{ROOT}[train]'"
    assert extras.install("train", tmp_path) == "pip install 'cxr-fast[train]'"
    assert "the extra cpu, or gpu on a machine with an NVIDIA GPU" in extras.needs("onnxruntime")


def test_only_a_library_of_an_extra_is_missing() -> None:
    assert extras.missing(ModuleNotFoundError("no", name="torch.nn")) == "torch"
    assert extras.missing(ModuleNotFoundError("no", name="cxr_fast.nothing")) == ""
    assert extras.missing(ImportError("no", name="torch")) == ""


@pytest.mark.parametrize(
    ("words", "library"),
    [
        (["cache", "films.csv"], "torch"),
        (["sweep"], "h5py"),
        (["export", "run"], "onnx"),
        (["bench", "train", "x.h5"], "torch"),
        (["info", "x.h5"], "h5py"),
    ],
)
def test_a_command_without_its_library_says_so_in_one_line(words: list[str], library: str, tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_bytes(b"")
    (tmp_path / "film.png").write_bytes(b"")
    (tmp_path / "films.csv").write_text("image,group,Effusion\nfilm.png,p1,1\n")
    words = [str(tmp_path / word) if "." in word else word for word in words]
    done = run("from cxr_fast.cli.main import main\nmain(prog_name='cxrfast')", *words)
    command = " ".join(["cxrfast", *(words[:2] if words[0] == "bench" else words[:1])])
    mend = extras.install("train")
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"error: `{command}` needs {library}, which is not installed; the extra train brings it: {mend}\n"
    )


def test_a_public_name_without_its_library_says_so(tmp_path: Path) -> None:
    done = run("from cxr_fast import Sweep")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: cxr_fast.Sweep needs torch, which is not installed; the extra train")
    assert run("from cxr_fast import Predictor, evaluate, compare_runs, write_report, read_record").returncode == 0
