"""The driver that shows every small input beside what is right, and the public files that pydicom ships."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydicom", reason="pip install 'cxr-fast[dicom]'")


@pytest.fixture(scope="module")
def driver() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "run_cases.py"
    spec = importlib.util.spec_from_file_location("run_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
def test_no_public_file_is_read_wrongly(driver: Any) -> None:
    found = list(driver.public_files())
    assert not [one for one in found if not one.ok]
    compared = [one for one in found if one.kind == "grey"]
    assert len(found) >= 70
    assert len(compared) >= 10


@pytest.mark.filterwarnings("ignore")
def test_every_case_of_films_and_lists_is_right(driver: Any, real_data: Path) -> None:
    found = list(driver.run_cases(real_data / "cases"))
    assert {one.name.partition("/")[0] for one in found} == {
        path.name for path in (real_data / "cases").iterdir() if path.is_dir()
    }
    assert not [one for one in found if not one.ok and one.kind != "table"]
    table = driver.as_table(found, "cases", real_data / "cases")
    assert str(real_data) not in driver.to_plain(table)
