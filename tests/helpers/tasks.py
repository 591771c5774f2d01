"""What tests run on a cluster's nodes. No torch and no pytest here: every worker process imports it, for seconds."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from cxr_fast.cluster.connection import Stop, Tell, fetch
from cxr_fast.errors import ImageError, Interrupted


def square(number: int, *, tell: Tell, stop: Stop) -> int:
    """A result and two reports."""
    tell("begun")
    tell("done")
    return number * number


def die_once(number: int, folder: str, *, tell: Tell, stop: Stop) -> tuple[int, int]:
    """The first worker of job 1 kills itself as the system would."""
    mark = Path(folder) / f"{number}"
    with open(mark, "a", encoding="utf-8") as file:
        file.write("x")
    if number == 1 and mark.stat().st_size == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number, mark.stat().st_size


def refuse(number: int, *, tell: Tell, stop: Stop) -> int:
    """An error of ours in one of them, the others slow."""
    if number == 2:
        raise ImageError("empty", "2.png is empty")
    wait(number, "", tell=tell, stop=stop)
    return number


def wait(number: int, folder: str, *, tell: Tell, stop: Stop) -> int:
    """Until asked to stop."""
    tell(os.getpid())
    until = time.monotonic() + 60
    while not stop() and time.monotonic() < until:
        time.sleep(0.01)
    if folder:
        (Path(folder) / f"stopped{number}").touch()
    raise Interrupted("stopped.")


def look(reference: list[Any], *, tell: Tell, stop: Stop) -> tuple[int, bool]:
    """The sum of a shared array, and whether it is a view of the store."""
    array = fetch(reference[0])
    return int(array.sum()), array.flags.owndata


def where() -> str:
    """Ray's id of the node this runs on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())
