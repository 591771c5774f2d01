"""File locks (one writer or many readers) that the kernel releases when the process dies; signals as an event.

Not the filelock package: its Unix lock has no shared form and does not name its holder, and ours must do both.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError
from .files import disk_reason, make_folders, remove_empty

UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


def share(fd: int) -> bool:
    """Take the kernel's shared lock on an open file; False while another process holds the exclusive one.

    The lock lasts until every copy of `fd` (a memory map holds one) is closed or the process dies. True as well on a
    file system without locks: nothing can be known there.
    """
    return _flock(fd, fcntl.LOCK_SH) is not False


def exclude(fd: int) -> bool:
    """Take the kernel's exclusive lock on a file open for writing; False while any other process holds a lock."""
    return _flock(fd, fcntl.LOCK_EX) is not False


def _flock(fd: int, kind: int) -> bool | None:
    """Whether the lock was taken, without waiting; None where the file system has no locks."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, *TAKEN):
            raise
        return None if error.errno in UNSUPPORTED else False
    return True


class HeldError(InputError):
    """Another process holds the lock."""


class FileLock:
    """Hold `NAME.lock` beside `path` during the `with` block; the file names the holder's pid and host.

    Folders above it are made, and removed again where they are still empty at the end.

    The kernel drops the lock when the process dies, so a dead holder never blocks. Raises HeldError, which names the
    holder, while another process has it, and InputError where the lock file cannot be written (a full disk). On a
    file system without locks the pid in the file decides.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(path.name + ".lock")
        self._fd = -1
        self._made: list[Path] = []

    def __enter__(self) -> FileLock:
        try:
            make_folders(self.path.parent, self._made)
            while self._fd < 0:
                self._fd = self._try()
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        except OSError as error:
            self.__exit__()
            raise InputError(f"--out: cannot write {self.path}: {disk_reason(self.path, error)}.") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)  # while held: whoever opened it meanwhile sees it gone and tries again
            os.close(self._fd)
            self._fd = -1
        remove_empty(self._made)  # nothing was written into them

    def _try(self) -> int:
        """Open and lock the file now at `path`; -1 where its last holder removed it meanwhile."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            locked, (pid, host) = _flock(fd, fcntl.LOCK_EX), _holder(os.pread(fd, 4096, 0))
            if locked is False or (locked is None and _may_run(pid, host)):
                name = _named(pid, host)
                raise HeldError(
                    f"{self.path.with_suffix('')} is being written by {name}; wait for it, or give another "
                    f"--out. If that process is gone, remove {self.path}."
                )
            if os.fstat(fd).st_ino == os.stat(self.path).st_ino:
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return -1


def holder(path: Path) -> str:
    """Who holds the `FileLock` of `path`, such as `process 12 on host`; empty where nobody does. Makes no file."""
    try:
        fd = os.open(path.with_name(path.name + ".lock"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        free, (pid, host) = _flock(fd, fcntl.LOCK_SH), _holder(os.pread(fd, 4096, 0))
        held = free is False or (free is None and _may_run(pid, host))
        return _named(pid, host) if held else ""
    finally:
        os.close(fd)


def _holder(text: bytes) -> tuple[int, str]:
    """The pid and host that a lock file names; 0 and "" where it names none."""
    try:
        found = json.loads(text)
        return int(found["pid"]), str(found["host"])
    except (ValueError, KeyError, TypeError):
        return 0, ""


def _named(pid: int, host: str) -> str:
    return f"process {pid} on {host}" if pid else "another process"


def _may_run(pid: int, host: str) -> bool:
    """Whether a process may still run; only this host can be asked about its own."""
    if not pid or host != socket.gethostname():
        return bool(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def graceful() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into an event; a second one acts as usual. Only the main thread can do so."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def stop(number: int, frame: object) -> None:
        stopped.set()
        for n in numbers:
            signal.signal(n, before[n])

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number in numbers:
            signal.signal(number, before[number])
