"""What counts as a difference between two records, and what does not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from record import commands, compare
from record_files import keys_of, of_file, plain_text
from safetensors.numpy import save_file

HERE = "/scratch/cxr-record-x/work"


def record() -> dict[str, Any]:
    step = {"exit": 0, "stdout": ["12 images"], "stderr": [], "files": {"a.npz": {"x": "1"}}, "pages": {}, "gone": []}
    return {"libraries": {"torch": "2"}, "steps": {"info a": step}}


@pytest.mark.parametrize(
    ("path", "value", "count", "said"),
    [
        (["info a", "exit"], 1, 1, "/exit: 0 -> 1"),
        (["info a", "files", "a.npz", "x"], "2", 1, '/files/a.npz/x: "1" -> "2"'),
        (["info a", "files", "b.csv"], {}, 1, "/files/b.csv: only in the second"),
        (["info a", "gone"], ["a.npz"], 1, "/gone"),
        (["info b"], {}, 1, "only in the second record"),
        (["info a", "stdout"], ["13 images"], 0, "+13 images"),
        (["info a", "pages", "r.html"], ["a heading"], 0, "+a heading"),
    ],
)
def test_figures_and_files_count_and_texts_do_not(
    capsys: pytest.CaptureFixture[str], path: list[str], value: Any, count: int, said: str
) -> None:
    one, other = record(), record()
    at = other["steps"]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    assert compare(one, other, text=True, most=20) == count
    assert said in capsys.readouterr().out
    assert compare(one, copy.deepcopy(one), text=True, most=20) == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("encoded 9 images in 3 s (3.1 images/s)", "encoded 9 images in 1 min 02 s (12 images/s)"),
        ("cxr-fast 0.1.0, 2026-11-28T19:38:03+00:00", "cxr-fast 0.2.0, 2027-01-02T03:04:05+00:00"),
        (f"{HERE}/data  (78.1 GB free)", f"{HERE}/data (7.1 GB free)"),
        ("fp32  1.0e-08   -   2.1", "fp32  1.0e-08  -  12.0"),
        (" 50.0 %  9 of 18 images, 3 s left\ndone", "done"),
    ],
)
def test_times_and_places_are_no_difference(one: str, other: str) -> None:
    assert plain_text(one, HERE) == plain_text(other, HERE)
    assert HERE not in plain_text(one, HERE)


def test_a_figure_in_a_text_is_a_difference() -> None:
    assert plain_text("macro AUC 0.4687", HERE) != plain_text("macro AUC 0.4688", HERE)


def test_the_last_bit_of_an_array_is_a_difference(tmp_path: Path) -> None:
    found = []
    for last in (1.0, np.nextafter(np.float32(1), 2)):
        values = np.array([0, last], np.float32)
        np.savez(tmp_path / "a.npz", x=values)
        save_file({"x": values}, tmp_path / "a.safetensors")
        (tmp_path / "run.json").write_text(json.dumps({"auc": float(last), "seconds": float(last)}))
        (tmp_path / "a.csv").write_text(f"image,x\na.png,{last!r}\n")
        found.append([of_file(path, HERE) for path in sorted(tmp_path.iterdir())])
    assert len(found[0]) == 4
    assert all(a != b for a, b in zip(*found, strict=True))
    assert found[0][-1]["seconds"] == "<VOLATILE>", "its key is kept"


def test_of_measurements_the_keys_are_kept() -> None:
    few, more = {"of": {"50": 0.1}, "n": 3}, {"of": {"50": 0.2, "90": 0.3}, "ratio": {"low": None}}
    expected = {"a": None, "seconds": None, "b": {"[]": {"n": None, "of": {}, "ratio": {"low": None}}}}
    for times in ([few, more], [more, few]):
        assert keys_of({"b": times, "a": 1, "seconds": 3}) == expected
    assert keys_of([1, 2]) == keys_of([]) is None


def test_no_command_is_recorded_twice() -> None:
    lines = [line for line in commands() if not line.startswith("!")]
    assert len(lines) > 150
    assert {line for line in lines if lines.count(line) > 1} == {"verify cache/phantom-first9.h5"}
