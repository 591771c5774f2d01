"""One writer a file: refused by name while the holder lives, taken over when it is dead; signals as an event."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cxr_fast.errors import InputError
from cxr_fast.system.locks import FileLock, HeldError, graceful

HOLD = """
import sys
from pathlib import Path
from cxr_fast.system.locks import FileLock
with FileLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "a.h5")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_writer_is_refused_with_pid_and_host(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(InputError) as caught, FileLock(tmp_path / "a.h5"):
        pass
    text = str(caught.value)
    assert f"process {holder.pid} on {socket.gethostname()}" in text
    assert len(text.splitlines()) <= 2


@pytest.mark.kill
def test_a_dead_holders_lock_is_taken_over(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / "a.h5.lock").exists(), "the dead holder leaves its file"
    with FileLock(tmp_path / "a.h5"):
        assert str(os.getpid()) in (tmp_path / "a.h5.lock").read_text()
    assert not (tmp_path / "a.h5.lock").exists()


def test_threads_never_hold_it_together(tmp_path: Path) -> None:
    inside, most, guard = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(30):
            try:
                with FileLock(tmp_path / "a.h5"):
                    with guard:
                        inside += 1
                        most = max(most, inside)
                    time.sleep(0.001)
                    with guard:
                        inside -= 1
            except InputError:
                time.sleep(0.001)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"), FileLock(tmp_path / "file" / "a.h5"):
        pass


@pytest.mark.parametrize("call", ["open", "pwrite"])
def test_a_full_disk_is_one_line_and_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(InputError, match=r"^--out: cannot write .*a\.h5\.lock: No space left on device\.$"):
            FileLock(tmp_path / "a.h5").__enter__()
    assert list(tmp_path.iterdir()) == []
    with FileLock(tmp_path / "a.h5"):
        pass


@pytest.mark.parametrize(("pid", "host", "held"), [(0, None, True), (2**22 + 1, None, False), (1, "other", True)])
def test_without_kernel_locks_the_pid_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pid: int, host: str | None, held: bool
) -> None:
    """0 is this process; no Linux has a pid above 2**22; another host cannot be asked."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    holder = {"pid": pid or os.getpid(), "host": host or socket.gethostname()}
    (tmp_path / "a.h5.lock").write_text(json.dumps(holder))
    monkeypatch.setattr(fcntl, "flock", unsupported)
    if held:
        with (
            pytest.raises(HeldError, match=f"process {holder['pid']} on {holder['host']}"),
            FileLock(tmp_path / "a.h5"),
        ):
            pass
    else:
        with FileLock(tmp_path / "a.h5"):
            pass
    assert (tmp_path / "a.h5.lock").exists() == held


@pytest.fixture
def python_s_own_interrupt() -> Iterator[None]:
    """A shell starts what runs behind `&` with SIGINT ignored; the test is of what Python does with it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.kill
@pytest.mark.usefixtures("python_s_own_interrupt")
def test_the_first_signal_asks_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with graceful() as stopped:
        assert not stopped.is_set()
        signal.raise_signal(signal.SIGINT)
        assert stopped.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_no_handler_is_touched() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with graceful() as stopped:
            seen.append((stopped.is_set(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
