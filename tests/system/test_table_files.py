"""CSV of any delimiter, Excel and Parquet to the same cells; what cannot be read is one line."""

from __future__ import annotations

import builtins
import datetime
import sys
from pathlib import Path
from typing import Any

import pytest

from cxr_fast.errors import InputError
from cxr_fast.system.table_files import read_table
from cxr_fast.system.tables import find_delimiter


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("a,b\n1,2\n", ","),
        ("a;b\n1;2\n", ";"),
        ("a\tb\n1\t2\n", "\t"),
        ("a\n1\n", ","),
        ("", ","),
        ('a,"b;c;d"\n1,2\n', ","),
        ('a;"b, c, d"\n1;2\n', ";"),
        ("a,b\n1,x;y;z\n", ","),
        ("a;b\n1;2,5\n", ";"),
        ("a,b,c;d;e;f\n1,2,0\n", ","),
        ("\n\na;b\n1;2\n", ";"),
        ('a;b\n"x\ny";2\n', ";"),
    ],
)
def test_the_delimiter_is_recognised(text: str, mark: str) -> None:
    assert find_delimiter(text) == mark


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_text_in_several_encodings(tmp_path: Path, encoding: str, mark: str) -> None:
    file = tmp_path / "t.csv"
    file.write_text(f"a{mark}b\n\u00e9{mark} 2 \n", encoding=encoding)
    assert read_table(file) == {"a": ["\u00e9"], "b": ["2"]}


def sheet(path: Path, rows: list[list[Any]], *others: list[list[Any]]) -> Path:
    book = pytest.importorskip("openpyxl").Workbook()
    for number, each in enumerate((rows, *others)):
        page = book.active if number == 0 else book.create_sheet()
        for row in each:
            page.append(row)
    book.save(path)
    return path


def test_excel_cells_read_as_in_a_csv(tmp_path: Path) -> None:
    day = datetime.datetime(2024, 5, 31)
    rows = [["id", " name ", "x", "day", None], [7, "a", 1.5, day, None], [], [8.0, None, True, None, None]]
    assert read_table(sheet(tmp_path / "t.xlsx", rows, [])) == {
        "id": ["7", "8"], "name": ["a", ""], "x": ["1.5", "1"], "day": ["2024-05-31", ""]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pages", "said"),
    [
        ([[["a", "b"], [1, "=A2*2"]]], "row 2: =A2*2 has no value"),
        ([[["a", "b"], [1, "#N/A"]]], "row 2: a cell holds the error #N/A"),
        ([[["a"], [1]], [["b"], [2]]], "2 sheets with data (Sheet, Sheet1)"),
        ([[["a", "a"], [1, 2]]], "two columns named 'a'"),
        ([[["a"], [1, 2]]], "line 2: 2 fields where the header has 1"),
        ([[["a", "b"]]], "a header and no rows"),
        ([[]], "is empty"),
    ],
)
def test_excel_in_doubt_is_refused(tmp_path: Path, pages: list[list[list[Any]]], said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_table(sheet(tmp_path / "t.xlsx", *pages))
    assert said in str(caught.value)


def test_what_is_no_excel_file_and_what_is_no_table(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")
    (tmp_path / "t.xlsx").write_bytes(b"hello")
    with pytest.raises(InputError, match=r"t\.xlsx is not a whole Excel file"):
        read_table(tmp_path / "t.xlsx")
    with pytest.raises(InputError, match="No such file"):
        read_table(tmp_path / "gone.xlsx")
    with pytest.raises(InputError, match=r"t\.xls is no table: give a file that ends in \.csv"):
        read_table(tmp_path / "t.xls")


def test_without_openpyxl_one_line_says_which_extra_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def refuse(name: str, *args: Any, **named: Any) -> Any:
        if name == "openpyxl":
            raise ModuleNotFoundError("No module named 'openpyxl'", name="openpyxl")
        return found(name, *args, **named)

    monkeypatch.delitem(sys.modules, "openpyxl", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"Excel needs openpyxl, .*\[excel\]'.*, or save it as CSV\.") as caught:
        read_table(tmp_path / "t.xlsx")
    assert "\n" not in str(caught.value)
