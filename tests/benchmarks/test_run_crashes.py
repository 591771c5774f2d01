"""A short crash campaign: kills in place of a change and power cuts; and the disk that is played back."""

from __future__ import annotations

import importlib
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHORT = ("cache of changed films", "sweep, head alone", "predict to CSV")


@pytest.fixture(scope="module")
def crashes() -> Iterator[Any]:
    """`benchmarks/crashes`, whose modules import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("campaign", "contents", "disk", "processes", "scenarios")
        yield type("Modules", (), {name: importlib.import_module(f"crashes.{name}") for name in names})


@pytest.fixture(scope="module")
def bench(crashes: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Makes the bench of a scenario; skips where writes cannot be recorded."""
    folder = tmp_path_factory.mktemp("crashes")
    try:
        recorder = crashes.processes.build_recorder(folder)
    except crashes.processes.NoCompiler as error:
        pytest.skip(str(error))
    chosen = {scenario.name: scenario for scenario in crashes.scenarios.ALL if scenario.name in SHORT}
    with crashes.processes.Commands(folder, folder / "said", recorder) as commands:
        (folder / "in").mkdir()
        crashes.scenarios.Inputs(commands, folder / "in", list(chosen.values()), lambda _: None).make()
        # Kills at a moment of time would be other ones on a busy machine.
        yield lambda name: crashes.campaign.Bench(commands, folder, chosen[name], 0, by_change=1.0)


@pytest.mark.kill
@pytest.mark.parametrize("name", SHORT)
def test_kills_and_power_cuts_leave_the_result_of_an_undisturbed_run(name: str, bench: Any, crashes: Any) -> None:
    one, tally = bench(name), crashes.campaign.Tally()
    assert one.reference.changes > 50
    one.kill_trial(0, tally)
    for trial in range(2):
        one.cut_trial(trial, tally)
        one.end_trial(trial, tally)
    assert tally.wrong == []
    assert tally.trials == 5


# The disk.


def record(kind: str, path: Path | None = None, fd: int = 3, flags: int = 0, offset: int = 0, data: bytes = b"") -> Any:
    from crashes.disk import Record

    return Record(kind, 1, fd, flags, offset, () if path is None else (str(path),), data, fd)


def cuts(crashes: Any, root: Path, records: list[Any], count: int = 200) -> set[tuple[tuple[str, bytes], ...]]:
    """All that is found on the disk after so many power cuts."""
    found = set()
    for seed in range(count):
        disk, out = crashes.disk.Disk(root), root.with_name("cut")
        shutil.rmtree(out, ignore_errors=True)
        for each in records:
            disk.play(each)
        disk.write_cut(out, crashes.disk.ORDERS[seed % 2], random.Random(seed))
        found.add(tuple(sorted((path.name, path.read_bytes()) for path in out.rglob("*") if path.is_file())))
    return found


def test_what_was_not_synced_may_be_lost_and_what_was_is_kept(crashes: Any, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").write_bytes(b"old")
    opened = [
        record("open", root / "a.new", flags=os.O_CREAT | os.O_WRONLY),
        record("write", data=b"new" * 400),
    ]
    rename = crashes.disk.Record("rename", 1, -1, 0, 0, (str(root / "a.new"), str(root / "a")), b"", 0)
    careless = {dict(each)["a"] for each in cuts(crashes, root, [*opened, rename])}
    assert {b"old", b"", b"new" * 400, bytes(1200)} <= careless
    assert any(each[:512] == bytes(512) and each[512:] == (b"new" * 400)[512:] for each in careless), "no lost sector"
    synced = {dict(each)["a"] for each in cuts(crashes, root, [*opened, record("sync"), rename])}
    assert synced == {b"old", b"new" * 400}
    folder = [record("open", root, fd=4, offset=1), record("sync", fd=4)]
    lasting = cuts(crashes, root, [*opened, record("sync"), rename, *folder])
    assert lasting == {(("a", b"new" * 400),)}


def test_a_log_that_a_kill_cut_short_is_read_up_to_there(crashes: Any, tmp_path: Path) -> None:
    head = crashes.disk.HEAD.pack(2, 1, 3, 0, 0, 4, 0, 0)
    (tmp_path / "log").write_bytes(head + b"data" + head + b"da")
    (one,) = crashes.disk.read_log(tmp_path / "log")
    assert (one.kind, one.fd, one.data) == ("write", 3, b"data")


def test_files_that_differ_in_a_time_alone_are_the_same_result(crashes: Any, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text('{"seconds": 1.5, "auc": [0.5]}')
    (tmp_path / "two.json").write_text('{"seconds": 2.5, "auc": [0.5]}')
    (tmp_path / "three.json").write_text('{"seconds": 1.5, "auc": [0.6]}')
    (tmp_path / "half.json").write_text('{"seconds": 1.5, "au')
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "plan.json").write_text("{}")
    found = crashes.contents.results(tmp_path)
    assert sorted(found) == ["half.json", "one.json", "three.json", "two.json"]
    assert found["one.json"] == found["two.json"] != found["three.json"]
    assert found["half.json"].startswith("? JSONDecodeError")
