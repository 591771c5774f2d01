"""Numbers that read back on their side of the threshold, and cells that stay one cell."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.inference import outputs
from cxr_fast.inference.outputs import ROW_GROUP, WRITERS, Columns, shown, texts

UNIT = st.floats(0, 1, width=32)
COLUMNS = Columns(keys=("path", "images"), labels=("one, two", "three"), thresholds=np.array([0.5, 0.25]), decide=True)


@given(UNIT, st.floats(-3, 3))
def test_a_number_is_read_back_and_stays_on_its_side(p: float, away: float) -> None:
    """Thresholds at the number itself, at what its short text says, and a few bits off."""
    value = np.float32(p)
    for limit in (float(value), float(str(value)), float(value) + away * 1e-9, np.nextafter(float(value), away)):
        [text] = texts(np.array([value]), np.array([limit]))
        assert np.float32(text) == value
        assert (float(text) >= limit) == (float(value) >= limit)


def test_ties_need_the_long_text() -> None:
    """0.3 as float32 is a little over 0.3: its short text would fall below a threshold at the value itself."""
    value = np.float32(0.3)
    assert float(str(value)) < float(value)
    assert texts(np.array([value]), np.array([float(value)])) == ["0.30000001192092896"]
    assert texts(np.array([value]), np.array([0.5])) == ["0.3"]


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=2, max_size=4))
def test_a_csv_row_reads_back(cells: list[str]) -> None:
    line = ",".join(map(outputs._csv_cell, cells)) + "\n"
    assert list(csv.reader(io.StringIO(line, newline=""), strict=True)) == [cells]


@given(st.binary(max_size=12))
def test_a_name_of_any_bytes_is_utf8_and_a_sound_one_is_itself(name: bytes) -> None:
    text = os.fsdecode(name)
    assert shown(text).encode().decode() == shown(text)
    if not any("\ud800" <= mark <= "\udfff" for mark in text):
        assert shown(text) == text
    assert shown("a\udcff.png") == "a\\udcff.png"


ROWS = [(["a", 1], np.float32([0.5, 0.125])), (["b", 2], None), (["c", 3], np.float32([0.75, 0.25]))]


def test_what_each_kind_writes() -> None:
    file = io.BytesIO()
    WRITERS[".csv"](file, COLUMNS, ROWS)
    assert file.getvalue().decode() == (
        'path,images,"one, two",three,findings\na,1,0.5,0.125,"one, two"\nb,2,,,\nc,3,0.75,0.25,"one, two;three"\n'
    )
    file = io.BytesIO()
    WRITERS[".jsonl"](file, COLUMNS, ROWS)
    assert [json.loads(line) for line in file.getvalue().splitlines()] == [
        {"path": "a", "images": 1, "probabilities": {"one, two": 0.5, "three": 0.125}, "findings": ["one, two"]},
        {"path": "b", "images": 2, "probabilities": None, "findings": None},
        {
            "path": "c",
            "images": 3,
            "probabilities": {"one, two": 0.75, "three": 0.25},
            "findings": ["one, two", "three"],
        },
    ]


def test_parquet_of_several_row_groups(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    many = ([(str(i), i), np.float32([i / 10_000, 0.25])] for i in range(ROW_GROUP + 5))
    with open(tmp_path / "p.parquet", "wb") as file:
        WRITERS[".parquet"](file, COLUMNS, many)  # type: ignore[arg-type]
    found = parquet.ParquetFile(tmp_path / "p.parquet")
    assert found.num_row_groups == 2
    table = found.read().to_pydict()
    assert list(table) == COLUMNS.head
    assert table["images"] == list(range(ROW_GROUP + 5))
    np.testing.assert_array_equal(np.float32(table["one, two"]), np.float32(np.arange(ROW_GROUP + 5) / 10_000))
    assert table["findings"][:2] == ["three", "three"]


def test_nothing_to_write_is_a_head_alone() -> None:
    file = io.BytesIO()
    WRITERS[".csv"](file, COLUMNS, [])
    assert list(csv.reader(io.StringIO(file.getvalue().decode()))) == [COLUMNS.head]
