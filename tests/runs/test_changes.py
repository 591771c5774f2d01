"""Runs keep every byte through a new name, and one that is being written is left alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cxr_fast.errors import InputError
from cxr_fast.runs.changes import remove_run, rename_run, require_run
from cxr_fast.system.files import tree_sha256
from cxr_fast.system.locks import FileLock, HeldError, holder
from cxr_fast.training.run_folder import read_info


def make(folder: Path, name: str = "run.json") -> Path:
    folder.mkdir(parents=True)
    (folder / name).write_text("{}")
    return folder


def test_a_renamed_run_is_the_same_run(toy_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(toy_run, run)
    before = tree_sha256(run)
    new = rename_run(run, "better")
    assert new == tmp_path / "better"
    assert tree_sha256(new) == before
    assert [path.name for path in tmp_path.iterdir()] == ["better"]
    assert read_info(new)["kind"] == "cxr-fast run"
    assert rename_run(new, "better") == new


def test_an_unfinished_run_stays_unfinished(tmp_path: Path) -> None:
    run = make(tmp_path / "a.partial", "plan.json")
    assert rename_run(run, "b") == tmp_path / "b.partial"
    assert rename_run(tmp_path / "b.partial", "c.partial") == tmp_path / "c.partial"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/x", ".hidden"])
def test_a_path_is_no_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give a name, not a path"):
        rename_run(make(tmp_path / "a"), name)


@pytest.mark.parametrize("taken", ["b", "b.partial"])
def test_a_taken_name_is_refused(taken: str, tmp_path: Path) -> None:
    run = make(tmp_path / "a")
    make(tmp_path / taken)
    with pytest.raises(InputError, match="exists; give another name"):
        rename_run(run, "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", taken]


def test_what_a_sweep_writes_is_left_alone(tmp_path: Path) -> None:
    run, partial = make(tmp_path / "a"), make(tmp_path / "a.partial", "plan.json")
    with FileLock(run):
        assert holder(run).startswith("process ")
        for path in (run, partial):
            with pytest.raises(HeldError, match="is being written by process"):
                remove_run(path)
            with pytest.raises(HeldError, match="is being written by process"):
                rename_run(path, "b")
    assert holder(run) == ""
    assert run.is_dir()
    assert partial.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.partial"]


def test_a_removed_run_leaves_nothing_and_its_neighbours_stay(tmp_path: Path) -> None:
    run = make(tmp_path / "a")
    make(tmp_path / "a.partial", "plan.json")
    remove_run(run)
    assert [path.name for path in tmp_path.iterdir()] == ["a.partial"]
    remove_run(tmp_path / "a.partial")
    assert not list(tmp_path.iterdir())


def test_only_runs_are_touched(tmp_path: Path) -> None:
    (tmp_path / "films").mkdir()
    make(tmp_path / "a.partial", "plan.json")
    for path, said in ((tmp_path / "films", "not a run folder"), (tmp_path / "a", "a.partial is an unfinished run")):
        for change in (remove_run, require_run):
            with pytest.raises(InputError, match=said):
                change(path)
    run = make(tmp_path / "real")
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(InputError, match="is a link"):
        remove_run(tmp_path / "link")
    assert require_run(run / "run.json") == run
