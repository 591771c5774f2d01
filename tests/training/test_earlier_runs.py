"""Parts of earlier runs: kept, matched by group and by bytes, and hold-outs that a sweep would train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxr_fast.data.splits.given import FREE
from cxr_fast.errors import InputError
from cxr_fast.training import earlier_runs
from tests.helpers import made


def run(folder: Path, **changes: Any) -> tuple[Path, dict[str, np.ndarray]]:
    found = made.arrays(40)
    spec = {"split_by": "group", "folds": made.FOLDS, "holdout": 0.25}
    about = {"spec": spec, "cache": {"dataset": {"name": "films"}}} | changes
    return made.write(folder, found, **about), found


def test_parts_are_kept_by_group_then_by_bytes(tmp_path: Path) -> None:
    folder, saved = run(tmp_path / "a")
    earlier = earlier_runs.read_earlier(folder)
    groups, sha256 = saved["group"].tolist(), saved["sha256"].tolist()
    np.testing.assert_array_equal(earlier_runs.keep_parts(earlier, groups, sha256), saved["fold"])
    renamed = [f"other{group}" for group in groups]
    np.testing.assert_array_equal(earlier_runs.keep_parts(earlier, renamed, sha256), saved["fold"])
    added = earlier_runs.keep_parts(earlier, [groups[0], "new", groups[2]], ["ff", "fe", sha256[2]])
    assert added.tolist() == [saved["fold"][0], FREE, saved["fold"][2]]
    line = earlier_runs.describe_kept(added, [groups[0], "new", groups[2]], earlier)
    assert line.startswith(f"--split-from: 2 groups keep their part of {folder}, 1 are new and drawn, 18 of its")


def test_a_run_on_other_films_or_other_folds_is_refused(tmp_path: Path) -> None:
    folder, saved = run(tmp_path / "a")
    earlier = earlier_runs.read_earlier(folder)
    with pytest.raises(InputError, match="has none of these images"):
        earlier_runs.keep_parts(earlier, saved["group"].tolist(), ["ff"] * 40)
    with pytest.raises(InputError, match="has --folds 3, and --folds 5 is asked for"):
        earlier_runs.require_same_folds(earlier, 5, "group")
    with pytest.raises(InputError, match="has --split-by group, and --split-by image"):
        earlier_runs.require_same_folds(earlier, 3, "image")
    (folder / "predictions.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="its split cannot be read") as found:
        earlier_runs.read_earlier(folder)
    assert "\n" not in str(found.value)


def test_a_hold_out_that_would_be_trained_on_is_named(tmp_path: Path) -> None:
    folder, saved = run(tmp_path / "exports" / "a")
    groups, sha256 = saved["group"].tolist(), saved["sha256"].tolist()

    def lines(parts: np.ndarray, name: str = "films", hashes: list[str] = sha256) -> tuple[str, ...]:
        return earlier_runs.find_trained_holdouts(tmp_path / "exports", groups, hashes, parts, name)

    assert lines(saved["fold"]) == ()
    count = int((saved["fold"] == -1).sum())
    (line,) = lines(np.zeros(40, int))
    assert line.startswith(f"{count // 2} groups ({count} images) that this sweep trains on are hold-out of {folder};")
    assert lines(np.zeros(40, int), "other", [f"f{i}" for i in range(40)]) == ()
    # Another film of a patient who was held out, in the same data set.
    held = int(np.flatnonzero(saved["fold"] == -1)[0])
    hashes = [*sha256]
    hashes[held] = hashes[held + 1] = "ff"
    parts = np.where(np.array(groups) == groups[held], 0, saved["fold"])
    assert lines(parts, "films", hashes)[0].startswith("1 groups (2 images)")
    assert lines(parts, "other", hashes) == ()


def test_damaged_runs_are_passed_over(tmp_path: Path) -> None:
    _, saved = run(tmp_path / "a")
    for name, text in (("b", "{"), ("c", "[]"), ("d", '{"kind": "x"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    run(tmp_path / "e")
    (tmp_path / "e" / "predictions.npz").write_bytes(b"")
    columns = (saved["group"].tolist(), saved["sha256"].tolist(), np.zeros(40, int))
    assert len(earlier_runs.find_trained_holdouts(tmp_path, *columns, "films")) == 1
    assert earlier_runs.find_trained_holdouts(tmp_path / "none", *columns, "films") == ()


def test_many_runs_are_three_lines(tmp_path: Path) -> None:
    for i in range(5):
        run(tmp_path / f"run{i}")
    _, saved = run(tmp_path / "run0")
    found = earlier_runs.find_trained_holdouts(
        tmp_path, saved["group"].tolist(), saved["sha256"].tolist(), np.zeros(40, int), "films"
    )
    assert len(found) == 3
    assert "(and of 2 more runs); --split-from RUN" in found[-1]
