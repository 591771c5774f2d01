"""Commands on a disk of their own that is full, read-only or closed to them: a program for a process of its own.

`python -m tests.helpers.small_disk REQUEST` mounts a file system in memory that no other process sees, runs every
command of CASES on it under every condition of its own, and writes what came of each as JSON. Where no such mount is
allowed, only what a plain folder can have is tried, and standard error says so. Nothing but Python's own modules at the
top: the mount must come before the first thread.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NEW_MOUNTS, NEW_USER = 0x20000, 0x10000000  # of unshare(2)
READ_ONLY, REMOUNT, PRIVATE = 0x1, 0x20, 0x44000  # of mount(2)
PAGE, SIZE = 4096, "24m"
IGNORES_PERMISSIONS = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: root without them is refused as others are

DEVICE = ["--device", "cpu", "--threads", "1"]
RANDOM = ["--weights", "random:0:test_vit", *DEVICE]
TRAIN = ["--epochs", "1,2", "--folds", "2", "--lr", "1e-3", "--train-blocks", "0", *DEVICE]
# No byte free, fewer pages free than the command needs, a disk and a folder that may not be written, and a path below
# a file or that is a folder.
CONDITIONS = ("full", "short", "read_only", "closed", "below", "folder")
ON_ANY_DISK = ("closed", "below", "folder")


@dataclass(frozen=True)
class Case:
    """A command. Words in capitals are paths of the request, and what begins with `@` lies on the small disk.

    `short` pages are fewer than it needs. `keeps` are the ends of names that may stay after `short`, and with them the
    same command goes on once there is room. `setup` is copied onto the disk first. `only` are the conditions.
    """

    words: tuple[str, ...]
    short: int = 1
    keeps: tuple[str, ...] = ()
    setup: str = ""
    only: tuple[str, ...] = CONDITIONS


OUT = CONDITIONS[:-1]  # a folder as --out is no mistake
CASES: dict[str, Case] = {
    "phantom": Case(("phantom", "@new/d", "--studies", "12", "--size", "48"), short=8, only=OUT),
    "prepare": Case(("prepare", "DATA", "--out", "@new/m.csv")),
    "prepare parquet": Case(("prepare", "DATA", "--out", "@new/m.parquet"), only=("full", "short")),
    "cache": Case(("cache", "DATA", *RANDOM, "--out", "@new/c.h5"), short=148),
    "cache in shards": Case(
        ("cache", "DATA", *RANDOM, "--shards", "3", "--out", "@new/c.shards.json"),
        short=148,
        keeps=("-of-0003.h5",),
        only=("full", "short"),
    ),
    "sweep": Case(("sweep", "CACHE", *TRAIN, "--out", "@new/run"), short=600, keeps=("run.partial/",)),
    "report": Case(("report", "@run", "--resamples", "0"), short=40, setup="RUN", only=("full", "short", "closed")),
    "comparison": Case(
        ("report", "@run", "@run2", "--resamples", "1", "--out", "@new/c.html"), setup="RUN", only=("folder",)
    ),
    "compare": Case(("compare", "RUN", "RUN", "--resamples", "100", "--json", "@c.json", "--allow-trained")),
    "export": Case(
        ("export", "RUN", "--variants", "fp32", "--check", "2", "--out", "@new/m.onnx"), short=100, only=OUT
    ),
    "verify": Case(("verify", "MODEL", "--json", "@v.json"), only=("full", "closed", "folder")),
    "explain": Case(("explain", "RUN", "FILM", "--top", "1", "--out", "@new/h.png", "--npy", "@new/h.npy")),
    "predict": Case(
        ("predict", "MODEL", "DATA/images", *DEVICE, "--out", "@new/p.csv"), short=12, keeps=(".resume", ".resume-wal")
    ),
    "predict parquet": Case(("predict", "MODEL", "DATA/images", *DEVICE, "--out", "@new/p.parquet"), only=("full",)),
    "predict lines": Case(("predict", "MODEL", "DATA/images", *DEVICE, "--out", "@new/p.jsonl"), only=("full",)),
    "latency": Case(
        ("bench", "latency", "MODEL", "--images", "DATA/images", "--repeats", "2", *DEVICE, "--json", "@l.json"),
        only=("full", "closed", "folder", "below"),
    ),
    # The commands of bench write by one function; these refuse before they measure.
    "throughput": Case(
        ("bench", "throughput", "MODEL", "--seconds", "0.1", *DEVICE, "--plot", "@t.png"), only=("read_only", "folder")
    ),
    "bench compare": Case(("bench", "compare", "MODEL", "MODEL", "--json", "@b.json"), only=("read_only", "folder")),
    "bench cache": Case(("bench", "cache", "DATA", *RANDOM, "--json", "@b.json"), only=("read_only", "folder")),
    "bench train": Case(("bench", "train", "CACHE", *DEVICE, "--json", "@b.json"), only=("read_only", "folder")),
    "doctor": Case(("doctor", "--json", "@d.json"), only=("full", "closed", "folder")),
}


@dataclass
class Came:
    """What came of a command: exit code, standard error, a traceback, and names that are new, changed or gone."""

    code: int
    said: str
    error: str
    changed: list[str] = field(default_factory=list)
    again: int | None = None
    again_said: str = ""
    again_left: list[str] = field(default_factory=list)


# ------------------------------------------------------------------ the disk


libc = ctypes.CDLL(None, use_errno=True)


def _call(function: Any, *arguments: Any) -> None:
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def own_mounts() -> None:
    """Leave the mounts of all others; a user who may not gets a name space of his own, as root of it."""
    user, group = os.getuid(), os.getgid()
    try:
        _call(libc.unshare, NEW_MOUNTS)
    except OSError:
        _call(libc.unshare, NEW_USER | NEW_MOUNTS)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _call(libc.mount, b"none", b"/", None, PRIVATE, None)


def mount(disk: Path, flags: int = 0) -> None:
    """Mount an empty file system in memory, or change the flags of one."""
    _call(libc.mount, b"tmpfs", bytes(disk), b"tmpfs", flags, f"size={SIZE}".encode())


def leave_free(disk: Path, pages: int) -> None:
    """Fill the disk but for so many pages."""
    status = os.statvfs(disk)
    fd = os.open(disk / ".filler", os.O_CREAT | os.O_RDWR)
    os.posix_fallocate(fd, 0, status.f_bfree * status.f_bsize - pages * PAGE)
    os.close(fd)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextmanager
def bound_by_permissions() -> Iterator[None]:
    """Give up what lets root write into folders that are closed to it, in this thread and those it starts."""
    header, sets = _Header(0x20080522, 0), (_Sets * 2)()
    _call(libc.capget, ctypes.byref(header), sets)
    before = sets[0].effective
    sets[0].effective = before & ~IGNORES_PERMISSIONS
    _call(libc.capset, ctypes.byref(header), sets)
    try:
        yield
    finally:
        sets[0].effective = before
        _call(libc.capset, ctypes.byref(header), sets)


# ------------------------------------------------------------------ the commands


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below a folder, with size and time."""
    found = {}
    for path in folder.rglob("*"):
        status = path.stat()
        found[path.relative_to(folder).as_posix()] = (status.st_size, status.st_mtime_ns) if path.is_file() else (-1, 0)
    return found


def run_command(words: list[str]) -> Came:
    """Run a command in this process."""
    from click.testing import CliRunner

    from cxr_fast.cli.main import main

    result = CliRunner().invoke(main, words)
    raised = result.exception is not None and not isinstance(result.exception, SystemExit)
    error = "".join(traceback.format_exception(result.exception)) if raised else ""  # type: ignore[arg-type]
    return Came(code=result.exit_code, said=result.stderr if error == "" else "", error=error)


@contextmanager
def empty(disk: Path, mounted: bool) -> Iterator[None]:
    """Give an empty disk, or only an empty folder."""
    if mounted:
        mount(disk)
    try:
        yield
    finally:
        if mounted:
            _call(libc.umount2, bytes(disk), 2)  # lazily: a memory map may live
        else:
            shutil.rmtree(disk / "desk")


def run_case(case: Case, condition: str, disk: Path, paths: dict[str, str], mounted: bool = True) -> Came:
    """Run a case under a condition on an empty disk."""
    work = disk / "desk"
    with empty(disk, mounted):
        work.mkdir()
        if case.setup:
            for word in (word for word in case.words if word.startswith("@run")):
                large = shutil.ignore_patterns("*.onnx", "*.safetensors")
                shutil.copytree(paths[case.setup], work / word[1:], ignore=large)
        words = [_path(word, work, paths) for word in case.words]
        own = [work / word[1:] for word in case.words if word.startswith("@")]
        if condition == "folder":
            for path in own:
                path.mkdir(parents=True, exist_ok=True)
        if condition == "below":
            (work / "new").write_text("a file")
            words = [word.replace(str(path), str(work / "new" / path.name)) for word in words for path in own[:1]]
        before = snapshot(work)
        came = _under(condition, case, disk, words)
        after = snapshot(work)
        came.changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
        if condition == "short" and case.keeps:
            (disk / ".filler").unlink()
            again = run_command(words)
            came.again, came.again_said = again.code, again.said + again.error
            came.again_left = sorted(snapshot(work))
    return came


def _path(word: str, work: Path, paths: dict[str, str]) -> str:
    name, slash, rest = word.partition("/")
    return str(work / word[1:]) if word.startswith("@") else paths[name] + slash + rest if name in paths else word


def _under(condition: str, case: Case, disk: Path, words: list[str]) -> Came:
    if condition in ("full", "short"):
        leave_free(disk, case.short if condition == "short" else 0)
    if condition == "read_only":
        mount(disk, READ_ONLY | REMOUNT)
    if condition != "closed":
        return run_command(words)
    folders = [disk / "desk", *(path for path in (disk / "desk").rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        with bound_by_permissions():
            return run_command(words)
    finally:
        for folder in folders:
            folder.chmod(0o755)


def main() -> int:
    """Run all cases of a request and write what came of them to its `answers`."""
    request = json.loads(Path(sys.argv[1]).read_text())
    disk, mounted = Path(request["disk"]), True
    try:
        own_mounts()
        mount(disk)
        _call(libc.umount2, bytes(disk), 2)
    except (OSError, AttributeError) as error:
        print(f"no file system of its own can be mounted here: {error}", file=sys.stderr)
        mounted = False
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # two threads that spin on a busy machine are slow
    from cxr_fast.report import charts

    # Drawing them takes seconds, and they are files like others.
    charts.all_plots = lambda *_: {f"{name}.png": b"x" * 20_000 for name in charts.PICTURES}  # type: ignore[assignment]
    came = {
        f"{name}, {condition}": vars(run_case(case, condition, disk, request["paths"], mounted))
        for name, case in CASES.items()
        for condition in case.only
        if mounted or condition in ON_ANY_DISK
    }
    Path(request["answers"]).write_text(json.dumps(came))
    return 0


if __name__ == "__main__":
    sys.exit(main())
