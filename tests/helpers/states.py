"""What tests of processes go by: states that are waited for, points at which a process stays or dies, never a moment.

Nothing but Python's own modules here: processes of tests and the workers of a cluster's nodes import it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

# Seconds after which a test that waits fails instead of hanging. No test takes as long, however busy the machine is.
PATIENCE = 240.0
T = TypeVar("T")


def wait_until(true: Callable[[], T], what: str, running: Callable[[], bool] = lambda: True) -> T:
    """What `true()` returns once that is true; fails where it does not come about, or `running()` ends before."""
    end = time.monotonic() + PATIENCE
    while not (found := true()):
        assert running() or true(), f"all was over before there was {what}"
        assert time.monotonic() < end, f"waited {PATIENCE:g} s for {what}"
        time.sleep(0.005)
    return found


def alive(pid: int) -> bool:
    """Whether a process runs: it is there, and not only because its parent has not yet asked how it ended."""
    return _fields(pid)[:1] not in ([], ["Z"], ["X"])


def parent(pid: int) -> int:
    """The parent of a process, 0 for one that is gone."""
    return int(_fields(pid)[1]) if alive(pid) else 0


def cpu_seconds(pid: int) -> float:
    """What a process has used of the machine's cores so far."""
    return sum(map(int, _fields(pid)[11:13])) / os.sysconf("SC_CLK_TCK")


def _fields(pid: int) -> list[str]:
    """What the system says of a process behind its name; nothing for one that is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


@contextmanager
def busy_core() -> Iterator[int]:
    """A process that takes a core, running already; its id."""
    command = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as burner:
        try:
            assert burner.stdout is not None
            burner.stdout.readline()
            yield burner.pid
        finally:
            burner.kill()


@dataclass(frozen=True)
class Gate:
    """A point in the work of other processes: while it is shut, whoever comes there stays. Pickles; `folder` is all."""

    folder: Path

    def shut(self) -> None:
        """From now on."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "shut").touch()

    def open(self) -> None:
        """Let all go on."""
        (self.folder / "shut").unlink(missing_ok=True)

    def held(self) -> list[int]:
        """The processes that stay there now, and live."""
        return [pid for pid in map(int, (path.stem for path in self.folder.glob("*.held"))) if alive(pid)]

    def pass_through(self) -> None:
        """Called where the point is. A signal that the process takes as a request to stop lets it go on as well."""
        if not (self.folder / "shut").exists():
            return
        mark, handler = self.folder / f"{os.getpid()}.held", signal.getsignal(signal.SIGINT)
        mark.touch()
        # `graceful` gives the handler back that was there before, as soon as one signal has come.
        while (self.folder / "shut").exists() and signal.getsignal(signal.SIGINT) is handler:
            time.sleep(0.005)
        mark.unlink(missing_ok=True)


class Steps:
    """What this process does to files, step by step; at the one of which `last` says so it is killed in the middle.

    Steps are the calls of `os` that change a file, and of `more`, (owner, name) each; `last(name, arguments)` is asked
    before every one. In the middle means: of a write half of the bytes, of all others nothing. For a process of its
    own: what is changed here stays so.
    """

    CALLS = ("pwrite", "ftruncate", "fsync", "fdatasync", "replace", "unlink")

    def __init__(self, last: Callable[[str, tuple[Any, ...]], bool], *more: tuple[Any, str]) -> None:
        self.last, self.done, self.lock = last, 0, threading.Lock()
        for owner, name in (*((os, name) for name in self.CALLS), *more):
            setattr(owner, name, self._counted(name, getattr(owner, name)))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            with self.lock:
                if self.last(name, arguments):
                    if name == "pwrite":
                        fd, data, offset = arguments
                        real(fd, bytes(data)[: len(bytes(data)) // 2], offset)
                    os.kill(os.getpid(), signal.SIGKILL)
                self.done += 1
            return real(*arguments, **named)

        return step


def at(number: int) -> Callable[[str, tuple[Any, ...]], bool]:
    """For `Steps`: the step of that number, counted from 1; none for 0."""
    count = 0

    def last(*_: Any) -> bool:
        nonlocal count
        count += 1
        return count == number

    return last
