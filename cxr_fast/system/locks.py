"""One writer a file and no reader beside it: locks that die with their holder; and signals as an event."""

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
from types import TracebackType

from ..errors import InputError

UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


def share(fd: int) -> bool:
    """Take the kernel's shared lock on an open file, or False while a writer has it.

    Kept until every copy of `fd`, a memory map's own included, is closed or its process dies. True as well where the
    file system has no locks: nothing can be known there.
    """
    return _flock(fd, fcntl.LOCK_SH)


def exclude(fd: int) -> bool:
    """Take the kernel's exclusive lock on a file open for writing, or False while anybody reads or writes it."""
    return _flock(fd, fcntl.LOCK_EX)


def _flock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, *TAKEN):
            raise
        return error.errno in UNSUPPORTED
    return True


class HeldError(InputError):
    """Another process has the lock."""


class FileLock:
    """Hold `NAME.lock` beside `path` while in the `with` block.

    The kernel drops the lock when its process dies, so a dead holder never blocks. Raises HeldError naming the
    holder's pid and host when another process has it. Where the file system has no locks, the pid in the file decides.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(path.name + ".lock")
        self._fd = -1

    def __enter__(self) -> FileLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while self._fd < 0:
                self._fd = self._try()
        except OSError as error:
            raise InputError(f"--out: cannot write {self.path}: {error.strerror or error}.") from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)  # while still held: whoever opened it meanwhile sees it gone and tries again
        os.close(self._fd)
        self._fd = -1

    def _try(self) -> int:
        """A locked descriptor of the file now at `path`, or -1 when it was taken away meanwhile."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 4096, 0)
            if error.errno not in (*UNSUPPORTED, *TAKEN):
                os.close(fd)
                raise
            if error.errno not in UNSUPPORTED or _alive(holder):
                os.close(fd)
                raise HeldError(
                    f"{self.path.with_suffix('')} is being written by {_name(holder)}; wait for it, or give another "
                    f"--out. If that process is gone, remove {self.path}."
                ) from None
        try:
            same = os.fstat(fd).st_ino == os.stat(self.path).st_ino
        except FileNotFoundError:
            same = False
        if same:
            return fd
        os.close(fd)
        return -1


def _parse(holder: bytes) -> tuple[int, str]:
    try:
        found = json.loads(holder)
        return int(found["pid"]), str(found["host"])
    except (ValueError, KeyError, TypeError):
        return 0, ""


def _name(holder: bytes) -> str:
    pid, host = _parse(holder)
    return f"process {pid} on {host}" if pid else "another process"


def _alive(holder: bytes) -> bool:
    """Whether the process written into the file may still run; only this host's can be asked."""
    pid, host = _parse(holder)
    if not pid:
        return False
    if host != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def graceful() -> Iterator[threading.Event]:
    """Turn SIGINT and SIGTERM into an event; a second signal kills. Outside the main thread nothing is caught."""
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
