"""run.json as a typed record: what is read is what was written, and a damaged one is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest

from cxr_fast.errors import InputError
from cxr_fast.training.run_record import RunRecord, read_record


def test_a_record_reads_back_and_writes_the_same_values_in_the_same_order(toy_run: Path) -> None:
    text = (toy_run / "run.json").read_text()
    record = read_record(toy_run)
    assert isinstance(record, RunRecord)
    assert json.dumps(record.to_dict(), indent=1) + "\n" == text
    assert record.cluster is msgspec.UNSET
    assert "cluster" not in record.to_dict()


def test_a_damaged_record_is_refused_and_the_field_named(toy_run: Path, tmp_path: Path) -> None:
    values = json.loads((toy_run / "run.json").read_text())
    shutil.copytree(toy_run, tmp_path / "run")
    for change, part in (({"threads": "two"}, "threads"), ({"chosen": {"epochs": 4}}, "chosen")):
        (tmp_path / "run" / "run.json").write_text(json.dumps(values | change))
        with pytest.raises(InputError, match=part) as caught:
            read_record(tmp_path / "run")
        assert "\n" not in str(caught.value)
    (tmp_path / "run" / "run.json").write_text(json.dumps({k: v for k, v in values.items() if k != "final"}))
    with pytest.raises(InputError, match="final"):
        read_record(tmp_path / "run")
