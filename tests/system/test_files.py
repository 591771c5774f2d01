"""A file appears whole, or the one before stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cxr_fast.errors import InputError
from cxr_fast.system.files import atomic, reserve_space, sync_folder, write_at, write_bytes


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
