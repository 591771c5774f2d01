"""What the code of commit 5ede8c5 made is opened and gone on with by the present code, on the command line alone.

    OMP_NUM_THREADS=1 python -m pytest tests/integration/test_made_before.py

The old code comes from `git archive`; where the history lacks that commit (a shallow clone, a source archive) all of
this is skipped. Both run in forks of one process, see forked.py, and nothing of cxr_fast is imported here.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from forked import Commands, Done
from record import differences
from record_files import PAGES, of_file

# 45 seconds of one core in all, half of them in the fixture; on a machine with ten others at work it took 220.
pytestmark = pytest.mark.timeout(900)

COMMIT = "5ede8c5"
PRESENT = Path(__file__).resolve().parents[2]
CACHE = "cache few.csv --weights random:0:test_vit --out"
# float32 told: where a CPU trains blocks in bfloat16, the old code validated in it too, and today's does not.
SWEEP = "sweep old.h5 --epochs 1,2 --folds 3 --lr 1e-3 --batch-size 8 --precision float32 --out"
HEAD = "sweep head.h5 --epochs 1,2 --folds 2 --lr 1e-2 --grid batch_size=8,16 --out"
PREDICT = "predict run/model.fp32.onnx data/images --decide --batch-size 4 --out"

# Python that the old code's process runs first: SIGINT to itself once so much is on disk. A time would be a guess.
STOP = """
import signal
def stop_after(cls, name, reached):
    real = getattr(cls, name)
    def call(self, *arguments):
        out = real(self, *arguments)
        if reached(self, *arguments):
            signal.raise_signal(signal.SIGINT)
        return out
    setattr(cls, name, call)
"""
# 16 of the images encoded.
STOP_CACHE = f"""{STOP}
from cxr_fast.store import Writer
stop_after(Writer, "rows", lambda writer, *_: writer.state.sum() == 16)
"""
# One fold whole, and an epoch of the next.
STOP_SWEEP = f"""{STOP}
from cxr_fast.journal import Journal
def reached(journal, key, fold):
    journal.flush()
    return key == "config0.fold1" and fold.epoch == 1
stop_after(Journal, "save", reached)
"""
# The first of two configurations.
STOP_GRID = f"""{STOP}
from cxr_fast.journal import Journal
stop_after(Journal, "write", lambda journal, name, value: name == "config0.json")
"""
# 8 of the images answered.
STOP_PREDICT = f"""{STOP}
from cxr_fast.resume import Resume
stop_after(Resume, "append", lambda kept, *_: len(kept._offsets) == 8)
"""


# What a report computes otherwise since: intervals over one set of classes, steps of precision, subgroups of enough
# groups. An epoch's AUC is of probabilities now, as that of a fold, and no longer of logits: rounding may tie two. The
# figures themselves (`value` in evaluation.json, per_class.csv, confusion.csv) stay.
SINCE = re.compile(
    r"/(curves|figures)\.csv/|/history\.csv/valid_auc|/evaluation\.json/(missing|curves|views|subgroups)\b|/evaluation\.json/.*/(low|high)\b"
)

# How groups were drawn at that time; today's default draws others.
DRAWN = "--split-method iterative"


class Both:
    """The old code and the present one, side by side in one folder."""

    def __init__(self, folder: Path, old: Path, commands: Commands) -> None:
        self.folder, self.old, self.commands = folder, old, commands

    def before(self, command: str, *, stop: str = "") -> None:
        """Run a command with the old code to its end, or until `stop` interrupts it."""
        done = self.commands.run(self.old, command.split(), before=stop)
        assert done.code == (130 if stop else 0), (command, done.stderr)

    def now(self, command: str, *, codes: Sequence[int] = (0,)) -> Done:
        """Run a command with the present code."""
        done = self.commands.run(PRESENT, command.split())
        assert done.code in codes, (command, done.stderr)
        return done

    def same(self, one: str, other: str) -> None:
        """Fail where two files, or all files of two folders but pages and models, hold other values."""
        a, b = ({p: of_file(path, str(self.folder)) for p, path in self._files(name)} for name in (one, other))
        assert not [*differences(a, b)]

    def kept(self, one: str, other: str) -> None:
        """Fail where a folder lacks a file, a field or a column of another, or holds another value there."""
        a, b = ({p: of_file(path, str(self.folder)) for p, path in self._files(name)} for name in (one, other))
        found = differences(a, without_new_columns(a, b))
        lines = [line for line in found if not line.endswith(": only in the second")]
        assert not [line for line in lines if not SINCE.match(line)]

    def _files(self, name: str) -> Iterator[tuple[str, Path]]:
        path = self.folder / name
        for each in [path] if path.is_file() else sorted(path.iterdir()):
            if each.suffix not in (*PAGES, ".onnx"):
                yield each.name if path.is_dir() else "", each


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    """A folder in which the old code has made one of everything, some of it interrupted by SIGINT."""
    git = shutil.which("git")
    found = subprocess.run(
        [git or "false", "-C", str(PRESENT), "archive", COMMIT, "cxr_fast"], capture_output=True, check=False
    )
    if found.returncode:
        pytest.skip(f"the history here lacks commit {COMMIT}, whose files this opens: git fetch --unshallow")
    temporary = tmp_path_factory.mktemp("before")
    folder, old, scratch = (temporary / name for name in ("work", "old", "scratch"))
    for each in (folder, old, scratch):
        each.mkdir()
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
        archive.extractall(old, filter="data")
    with Commands(folder, scratch) as commands:
        both = Both(folder, old, commands)
        both.before("phantom data --studies 24 --size 64")
        both.before("prepare data --out all.csv")
        few_classes(folder)
        both.before(f"{CACHE} old.h5")
        both.before(f"{CACHE} old.shards.json --shards 2")
        both.before(f"{CACHE} cut.h5", stop=STOP_CACHE)
        both.before(f"{SWEEP} run")
        both.before(f"{SWEEP} cut", stop=STOP_SWEEP)
        both.before(f"{CACHE} head.h5 --unfreeze-blocks 0")
        both.before(f"{HEAD} head-run")
        both.before(f"{HEAD} head-cut", stop=STOP_GRID)
        both.before("export run --variants fp32")
        both.before(f"{PREDICT} whole.csv")
        both.before(f"{PREDICT} cut.csv", stop=STOP_PREDICT)
        yield both


def few_classes(folder: Path) -> None:
    """A manifest of four of the 35 classes: the pictures of a report take a quarter of the time."""
    with open(folder / "all.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = ("image", "group", "view", "Normal", "Lesion", "Degenerative Change", "Hyperinflation")
    with open(folder / "few.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("cache", ["old.h5", "old.shards.json"])
def test_a_cache_is_described_and_proved(both: Both, cache: str) -> None:
    both.now(f"info {cache}")
    both.now(f"verify {cache} --reencode 4")


@pytest.mark.parametrize("cache", ["old.h5", "old.shards.json --shards 2"])
def test_a_complete_cache_is_left_as_it_is(both: Both, cache: str) -> None:
    before = caches(both.folder)
    assert len(before) == 4
    both.now(f"{CACHE} {cache}")
    assert caches(both.folder) == before


def test_an_unfinished_cache_is_gone_on_with(both: Both) -> None:
    partial = both.folder / "cut.h5.partial"
    inode = partial.stat().st_ino
    both.now(f"{CACHE} cut.h5")
    assert (both.folder / "cut.h5").stat().st_ino == inode, "made anew, not gone on with"
    assert not partial.exists()
    both.same("cut.h5", "old.h5")


def test_a_sweep_on_an_old_cache_gives_the_old_bits(both: Both) -> None:
    both.now(f"{SWEEP} again {DRAWN}")
    both.kept("run", "again")


def test_an_interrupted_sweep_goes_on_to_the_old_bits(both: Both) -> None:
    saved = histories(both.folder / "cut.partial")
    assert {config: [*map(len, folds)] for config, folds in saved.items()} == {0: [2, 1]}
    both.now(f"{SWEEP} cut {DRAWN}")
    assert not (both.folder / "cut.partial").exists()
    both.kept("run", "cut")
    # An epoch that was trained again would have taken another time.
    lines = (both.folder / "cut" / "history.csv").read_text().splitlines()[1:]
    times = [float(line.rpartition(",")[2]) for line in lines]
    assert times[:3] == [line["seconds"] for fold in saved[0] for line in fold]


def test_an_interrupted_search_over_a_grid_goes_on_to_the_old_bits(both: Both) -> None:
    saved = histories(both.folder / "head-cut.partial")
    assert {config: [*map(len, folds)] for config, folds in saved.items()} == {0: [2, 2]}
    both.now(f"{HEAD} head-cut {DRAWN}")
    both.kept("head-run", "head-cut")


def test_a_run_is_described_reported_compared_and_explained(both: Both) -> None:
    both.now("info run")
    shutil.copytree(both.folder / "run", both.folder / "reported")
    both.now("report reported")
    both.kept("run", "reported")
    both.now("compare run reported --resamples 100")
    image = next((both.folder / "data" / "images").iterdir()).relative_to(both.folder)
    both.now(f"explain run {image} --out explained.png")


def test_a_run_is_exported_to_the_old_answers(both: Both) -> None:
    both.now("export run --variants fp32 --out new.onnx")
    both.same("new.onnx", "run/model.fp32.onnx")


def test_a_model_is_verified_and_predicts_what_it_did(both: Both) -> None:
    both.now("info run/model.fp32.onnx")
    both.now("verify run/model.fp32.onnx")
    both.now(f"{PREDICT} now.csv")
    assert without_notes(both.folder / "now.csv") == without_notes(both.folder / "whole.csv")


@pytest.mark.parametrize("table", ["cut.csv", "whole.csv"])
def test_predictions_are_completed(both: Both, table: str) -> None:
    """`cut.csv` is unfinished, `whole.csv` has all rows.

    What an unfinished table keeps its rows in is private and may take another form. The present code may then refuse
    the old one (exit 2), never misread it, and --overwrite has it done from the beginning.
    """
    whole = without_notes(both.folder / "whole.csv")
    if both.now(f"{PREDICT} {table}", codes=(0, 2)).code:
        both.now(f"{PREDICT} {table} --overwrite")
    assert without_notes(both.folder / table) == whole


def without_notes(table: Path) -> list[list[str]]:
    """The rows of a prediction table but for the columns `note` and `unlikeness`, which came later."""
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    places = [i for i, name in enumerate(rows[0]) if name in ("note", "unlikeness")]
    assert not any("".join(row[place] for place in places) for row in rows[1:])
    return [[cell for i, cell in enumerate(row) if i not in places] for row in rows]


def without_new_columns(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The files `b` as of_file gives them; of tables that are in `a` too only the columns that are there."""
    out = dict(b)
    for name in a.keys() & b.keys():
        if name.endswith(".csv"):
            head = [column for column in b[name]["head"] if column in a[name]["head"]]
            out[name] = b[name] | {"head": head}
    return out


def caches(folder: Path) -> dict[str, tuple[int, bytes]]:
    """The old caches by name: their bytes, and the inodes of the activation files, for one written anew is another."""
    paths = [path for path in folder.iterdir() if path.name.startswith("old.")]
    return {path.name: (path.suffix == ".h5" and path.stat().st_ino, path.read_bytes()) for path in paths}


def histories(folder: Path) -> dict[int, list[list[dict[str, Any]]]]:
    """What an unfinished sweep holds: the lines of each fold of each configuration."""
    from safetensors import safe_open

    out: dict[int, list[list[dict[str, Any]]]] = {}
    for path in sorted(folder.glob("config*.json")):
        out[int(path.stem.removeprefix("config"))] = json.loads(path.read_text())["histories"]
    for path in sorted((folder / "states").glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            values = json.loads(file.metadata()["values"])
        out.setdefault(int(path.name.partition(".")[0].removeprefix("config")), []).append(values["history"])
    return out
