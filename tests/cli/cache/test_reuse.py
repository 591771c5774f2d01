"""Rows of another cache: found, offered with the command that copies them, copied only where the bytes are equal."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cxr_fast.activations.cache import open_cache
from cxr_fast.cli.cache.reuse import command_line
from cxr_fast.cli.main import main
from cxr_fast.data.manifest import read_dataset, write_manifest

USUAL = ["--weights", "random:0:test_vit", "--device", "cpu", "--threads", "1"]
OLD, NEW = ["--out", "cache/old.h5"], ["--out", "cache/new.h5"]


def call(*words: Any) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def desk(phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with films, a cache of the first twelve, and a table under another name of those from the seventh on."""
    shutil.copytree(phantoms / "images", tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    write_table(phantoms, tmp_path / "old.csv", 0, 12)
    write_table(phantoms, tmp_path / "new.csv", 6, 16)
    done = call("cache", "old.csv", *OLD, *USUAL)
    assert done.exit_code == 0, done.output
    return tmp_path


def write_table(phantoms: Path, out: Path, first: int, last: int) -> None:
    """A manifest of some of the films of a folder `images` beside it."""
    write_manifest(read_dataset(phantoms, limit=last), out)
    head, *rows = out.read_text().splitlines()
    rows = [f"images/{row.rsplit('/', 1)[-1] if '/' in row else row}" for row in rows[first:]]
    out.write_text("\n".join([head, *rows]) + "\n")


def offered(done: Result) -> list[str]:
    """The words of the command that a note offers."""
    (note,) = [line for line in done.output.splitlines() if "to copy rows: " in line]
    return shlex.split(note.partition("to copy rows: ")[2])


def test_the_offered_command_copies_the_rows(desk: Path) -> None:
    planned = call("cache", "new.csv", *NEW, *USUAL, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "cache/old.h5 was encoded in the same way and holds 6 of these images" in planned.output
    assert [path.name for path in (desk / "cache").iterdir() if path.suffix == ".h5"] == ["old.h5"]
    words = offered(planned)
    assert sorted(words) == sorted(["cxrfast", "cache", "new.csv", *NEW, *USUAL, "--reuse", "cache/old.h5"])
    done = call(*words[1:])
    assert done.exit_code == 0, done.output
    assert "the rows of 6 from another cache" in done.output
    assert "reused 6, encoded 4 images" in done.output
    assert "to copy rows" not in done.output
    old, new = open_cache("cache/old.h5"), open_cache("cache/new.h5")
    assert old.sha256[6:] == new.sha256[:6]
    np.testing.assert_array_equal(old.activations[np.arange(6, 12)], new.activations[np.arange(6)])
    assert new.ok.all()
    assert not [line for line in call("cache", "new.csv", *NEW, *USUAL).output.splitlines() if "to copy rows" in line]


def test_films_that_moved_count_by_name_where_their_bytes_are_the_same(desk: Path) -> None:
    (desk / "elsewhere").mkdir()
    (desk / "images").rename(desk / "elsewhere" / "images")
    shutil.move("new.csv", "elsewhere/new.csv")
    planned = call("cache", "elsewhere/new.csv", *NEW, *USUAL, "--dry-run")
    assert "holds 6 of these images" in planned.output
    for film in (desk / "elsewhere" / "images").iterdir():
        film.write_bytes(film.read_bytes() + b"\0")
    assert "to copy rows" not in call("cache", "elsewhere/new.csv", *NEW, *USUAL, "--dry-run").output


def test_rows_made_in_another_way_are_not_offered_and_refused(desk: Path) -> None:
    other = ["--weights", "random:1:test_vit", *USUAL[2:]]
    assert "to copy rows" not in call("cache", "new.csv", *NEW, *other, "--dry-run").output
    done = call("cache", "new.csv", *NEW, *other, "--reuse", "cache/old.h5")
    assert done.exit_code == 2
    assert "--reuse: cache/old.h5 was made with prefix_sha256" in done.output
    assert "its rows cannot be copied" in done.output
    for words, said in (
        (["--reuse", "cache/none.h5"], "--reuse: cache/none.h5"),
        (["--reuse", "cache/old.h5", "--out", "cache/old.h5"], "is the cache to be made"),
        (["--reuse", "cache/old.h5", "--cluster", "auto"], "leave it out with --cluster"),
    ):
        refused = call("cache", "new.csv", *NEW, *USUAL, *words)
        assert (refused.exit_code, said in refused.output) == (2, True), refused.output
    assert not (desk / "cache" / "new.h5").exists()


def test_shards_are_read_and_made_too(desk: Path) -> None:
    assert (
        call(
            "cache", "old.csv", "--out", "cache/old.shards.json", *USUAL, "--shards", "2", "--batch-size", "4"
        ).exit_code
        == 0
    )
    (desk / "cache" / "old.h5").unlink()
    planned = call(
        "cache", "new.csv", "--out", "cache/new.shards.json", *USUAL, "--shards", "2", "--batch-size", "4", "--dry-run"
    )
    words = offered(planned)
    assert words[-1] == "cache/old.shards.json"
    done = call(*words[1:])
    assert done.exit_code == 0, done.output
    assert "reused 6, encoded 4 images" in done.output
    assert open_cache("cache/old.shards.json").ok.all(), "what was copied from is as it was"


def test_a_command_is_written_as_it_was_given() -> None:
    words = ["my films.csv", "--on-error", "stop", "--strict", "--reuse", "a.h5", "--reuse", "b.h5", "--dry-run"]
    ctx = main.commands["cache"].make_context("cache", list(words))
    assert command_line(ctx, "--reuse", "c.h5") == (
        "cxrfast cache 'my films.csv' --reuse a.h5 --reuse b.h5 --on-error stop --strict --reuse c.h5"
    )
