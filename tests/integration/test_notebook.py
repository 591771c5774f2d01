"""The notebook of the tutorial: stored without outputs, of public names, and run cell by cell as it stands."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cxr_fast
from cxr_fast import Predictor, read_record

ROOT = Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / "docs" / "tutorial" / "first_run.ipynb"
BOOK: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in BOOK["cells"] if cell["cell_type"] == "code"]
# What it takes from modules, since no public name does the same.
FROM_MODULES = {"cxr_fast.data.phantom.dataset.write_dataset", "cxr_fast.export.heatmaps.write"}
# The cells in one namespace, as Jupyter runs them; their output to the terminal.
RUN = """
import json, sys
names = {"__name__": "__main__"}
for number, cell in enumerate(json.load(open(sys.argv[1], encoding="utf-8"))["cells"]):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
"""


def test_it_is_stored_without_outputs() -> None:
    assert (BOOK["nbformat"], BOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in BOOK["cells"]}) == len(BOOK["cells"])
    for cell in BOOK["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_it_uses_public_names() -> None:
    found = set()
    for node in ast.walk(ast.parse("\n".join(CODE))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("cxr_fast") for alias in node.names)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("cxr_fast"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    public = {f"cxr_fast.{name}" for name in cxr_fast.__all__}
    assert found - public == FROM_MODULES
    assert len(found & public) > 8


@pytest.mark.timeout(900)
def test_it_runs_as_it_stands(tmp_path: Path) -> None:
    environment = {**os.environ, "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, str(NOTEBOOK)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=880, check=False
    )
    assert result.returncode == 0, result.stderr
    work = tmp_path / "first_run"
    assert list(tmp_path.iterdir()) == [work]
    record = read_record(work / "run")
    assert record.provenance == "random backbone, phantom images"
    assert Predictor(work / "run" / "model.fp32.onnx", device="cpu").labels == tuple(record.classes)
    for name in ("run/report.html", "overlay.png"):
        assert (work / name).stat().st_size > 1000
    said = result.stdout.splitlines()
    assert "broken.png: truncated" in said
    assert any(line.startswith("macro_auc ") for line in said)
    assert any(record.provenance in line for line in said), "random weights are called random"
