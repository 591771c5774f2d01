"""Runs are found, filtered and sorted as a plain loop over their columns does it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.errors import InputError
from cxr_fast.runs.entry import RunEntry
from cxr_fast.runs.listing import (
    COLUMNS,
    NUMBERS,
    filter_runs,
    find_runs,
    list_runs,
    runs_table,
    sort_runs,
    to_rows,
)
from cxr_fast.system.text import to_csv, to_plain

ENTRIES = st.lists(
    st.builds(
        RunEntry,
        name=st.sampled_from("abc"),
        path=st.just("exports/x"),
        state=st.sampled_from(["done", "stopped"]),
        done=st.floats(0, 1),
        created=st.sampled_from(["2026-01-02T03:04:05+00:00", "2026-11-29T00:00:00+00:00"]),
        data=st.sampled_from(["", "nih", "Indiana"]),
        settings=st.sampled_from(["", "tuned, seed 1"]),
        holdout_auc=st.none() | st.floats(0, 1),
        size=st.integers(0, 10**12),
    ),
    max_size=6,
)


def write(path: Path, text: str = "{}") -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text)


def test_runs_are_found_at_any_depth_and_never_inside_of_a_run(tmp_path: Path) -> None:
    write(tmp_path / "a" / "run.json")
    write(tmp_path / "a" / "old" / "run.json")
    write(tmp_path / "deep" / "er" / "b" / "run.json")
    write(tmp_path / "c.partial" / "plan.json")
    write(tmp_path / "c.partial" / "run" / "run.json")
    write(tmp_path / "not.partial" / "other.json")
    write(tmp_path / ".hidden" / "run.json")
    found = [path.relative_to(tmp_path).as_posix() for path in find_runs(tmp_path)]
    assert sorted(found) == ["a", "c.partial", "deep/er/b"]
    assert {entry.state for entry in list_runs(tmp_path)} == {"unreadable"}
    with pytest.raises(InputError, match="no such folder"):
        list_runs(tmp_path / "nothing")


@given(ENTRIES, st.floats(0, 1))
def test_conditions_equal_a_plain_loop(entries: list[RunEntry], limit: float) -> None:
    kept = filter_runs(entries, [f"holdout_auc>={limit}", "state=done", "settings~TUNED"])
    assert kept == [
        entry
        for entry in entries
        if entry.holdout_auc is not None
        and entry.holdout_auc >= limit
        and entry.state == "done"
        and "tuned" in entry.settings
    ]
    assert filter_runs(entries, ["data!=NIH"]) == [entry for entry in entries if entry.data != "nih"]
    assert filter_runs(entries, ["created=2026-11"]) == [e for e in entries if e.created.startswith("2026-11")]
    assert filter_runs(entries, ["created<2026-06"]) == [e for e in entries if e.created < "2026-06"]
    assert filter_runs(entries, []) == entries


@given(ENTRIES, st.sampled_from(COLUMNS), st.booleans())
def test_sorting_keeps_every_run_and_puts_what_is_unknown_last(
    entries: list[RunEntry], column: str, reverse: bool
) -> None:
    found = sort_runs(entries, column, reverse=reverse)
    assert sorted(map(repr, found)) == sorted(map(repr, entries))
    values = [getattr(entry, column) for entry in found]
    known = [value for value in values if value not in (None, "")]
    assert values[: len(known)] == known
    if column in NUMBERS or column == "created":
        assert known == sorted(known, reverse=not reverse)
    elif column in ("name", "data", "settings", "state"):
        assert known == sorted(known, key=str.casefold, reverse=reverse)


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("auc>0.7", "'auc' is no column; it takes name, path"),
        ("holdout_auc>high", "'high' is not a number"),
        ("data>nih", "data is text"),
        ("nonsense", "must be COLUMN=VALUE"),
    ],
)
def test_a_condition_that_is_none_is_one_line(condition: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        filter_runs([], [condition])
    with pytest.raises(InputError, match="'auc' is no column"):
        sort_runs([], "auc")


def test_the_table_has_a_row_for_each_run_and_no_empty_column(tmp_path: Path) -> None:
    one = RunEntry(
        name="b", path=str(tmp_path / "deep" / "b"), state="done", done=1, created="2026-11-29T10:11:12+00:00", size=5
    )
    two = msgspec.structs.replace(
        one,
        path=str(tmp_path / "c.partial"),
        state="running",
        done=0.304,
        valid_auc=0.71239,
        valid_std=0.04,
        random=True,
    )
    text = to_plain(runs_table([one, two], tmp_path))
    head, _, first, second = text.splitlines()
    assert head.split() == ["run", "state", "date", "encoder", "validation", "AUC", "size"]
    assert first.startswith("deep/b  done")
    assert "2026-11-29 10:11" in first
    assert second.startswith("c ")
    assert "running at 30 %" in second
    assert "0.712 ± 0.040" in second
    assert "RANDOM" in second
    assert [list(row) for row in to_rows([one])] == [list(COLUMNS)]
    assert to_csv(runs_table([], tmp_path)).startswith("run")
