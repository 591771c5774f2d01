"""A file appears whole, or the one before stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cxr_fast.errors import InputError
from cxr_fast.system.files import (
    atomic,
    make_folders,
    put_in_place,
    reserve_space,
    sync_folder,
    write_at,
    write_bytes,
)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"one")
    write_bytes(tmp_path / "a", b"two")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"two"}


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"^--out: cannot write .*file.a: "):
        write_bytes(tmp_path / "file" / "a", b"x", "--out", folders=True)
    with pytest.raises(InputError, match=r"gone.a: cannot write it: "):
        write_bytes(tmp_path / "gone" / "a", b"x")
    write_bytes(tmp_path / "new" / "a", b"x", folders=True)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError):
        write_bytes(tmp_path / "folder", b"x")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "file", "folder", "new"]


def test_under_a_lock_what_a_kill_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "a.partial").write_text("left by a kill, and longer than what follows")
    with atomic(tmp_path / "a", locked=True) as file:
        file.write(b"whole")
        assert (tmp_path / "a.partial").stat().st_size == 0
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "whole")]


def test_all_of_the_bytes_are_written_at_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, pwrite = tmp_path / "a", os.pwrite
    path.write_bytes(b"." * 8)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:2], at))  # the system may write less
    with open(path, "r+b") as file:
        write_at(file.fileno(), b"abcde", 2)
    reserve_space(path)
    sync_folder(tmp_path)
    assert path.read_bytes() == b"..abcde."


class Calls:
    """The syncs and renames that are made from now on, with the names they are of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        fsync, replace = os.fsync, os.replace

        def sync(fd: int) -> None:
            self.made.append("sync " + Path(os.readlink(f"/proc/self/fd/{fd}")).name)
            fsync(fd)

        def rename(old: Path, new: Path) -> None:
            self.made.append(f"{Path(old).name} -> {Path(new).name}")
            replace(old, new)

        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(os, "replace", rename)


def test_a_power_cut_leaves_the_old_file_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, calls = tmp_path / "new", Calls(monkeypatch)
    with atomic(folder / "a", folders=True, locked=True) as file:
        file.write(b"whole")
    # The folder's own name, then the bytes before the name that they get, then that name.
    assert calls.made == [f"sync {tmp_path.name}", "sync a.partial", "a.partial -> a", "sync new"]


def test_folders_are_made_from_above_each_name_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, made = Calls(monkeypatch), [tmp_path]
    make_folders(tmp_path / "a" / "b", made)
    make_folders(tmp_path / "a" / "b")
    assert calls.made == [f"sync {tmp_path.name}", "sync a"]
    assert made == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]


def test_a_folder_gets_its_name_when_all_in_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch" / "inner").mkdir(parents=True)
    (tmp_path / "scratch" / "one").write_text("1")
    (tmp_path / "scratch" / "inner" / "two").write_text("2")
    calls = Calls(monkeypatch)
    put_in_place(tmp_path / "scratch", tmp_path / "run")
    rename = calls.made.index("scratch -> run")
    assert sorted(calls.made[:rename]) == ["sync inner", "sync one", "sync scratch", "sync two"]
    assert calls.made[rename + 1 :] == [f"sync {tmp_path.name}"]
    assert (tmp_path / "run" / "inner" / "two").read_text() == "2"


def test_a_file_system_that_cannot_sync_a_folder_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> None:
        def fsync(fd: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)

    refuse(errno.EINVAL)
    sync_folder(tmp_path)
    refuse(errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)
