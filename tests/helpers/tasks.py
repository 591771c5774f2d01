"""What tests run on a cluster's nodes. No torch and no pytest here: every worker process imports it, for seconds."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from cxr_fast.cluster.tasks import Report, Stop, fetch
from cxr_fast.errors import ImageError, Interrupted
from tests.helpers.states import Gate, wait_until


def square(number: int, *, report: Report, stop: Stop) -> int:
    """A result and two reports."""
    report("begun")
    report("done")
    return number * number


def die_once(number: int, folder: str, *, report: Report, stop: Stop) -> tuple[int, int]:
    """The first worker of job 1 kills itself as the system would."""
    mark = Path(folder) / f"{number}"
    with open(mark, "a", encoding="utf-8") as file:
        file.write("x")
    if number == 1 and mark.stat().st_size == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number, mark.stat().st_size


def refuse(number: int, folder: str, *, report: Report, stop: Stop) -> int:
    """An error of ours in one of them once another runs, which ends only when it is asked to."""
    if number == 2:
        wait_until(lambda: list(Path(folder).glob("begun*")), "another task that runs")
        raise ImageError("empty", "2.png is empty")
    (Path(folder) / f"begun{number}").touch()
    return wait(number, folder, report=report, stop=stop)


def wait(number: int, folder: str, *, report: Report, stop: Stop) -> int:
    """Until asked to stop."""
    report(os.getpid())
    wait_until(stop, "a request to stop")
    (Path(folder) / f"stopped{number}").touch()
    raise Interrupted("stopped.")


def held_fold(gate: Gate, job: Any, *arguments: Any, report: Report, stop: Stop) -> Any:
    """`train_fold` with a gate behind each epoch but the first and the last."""
    from cxr_fast.cluster import search

    def told(epoch: Any) -> None:
        report(epoch)
        if 1 < epoch.epoch < job.epochs[-1]:
            gate.pass_through()

    return search.train_fold(job, *arguments, report=told, stop=stop)


def held_answer(gate: Gate, *arguments: Any, report: Report, stop: Stop) -> Any:
    """`answer` with a gate behind each batch of a chunk."""
    from cxr_fast.cluster import predict

    def asked() -> bool:
        gate.pass_through()
        return stop()

    return predict.answer(*arguments, report=report, stop=asked)


def held_shard(gate: Gate, *arguments: Any, report: Report, stop: Stop) -> Any:
    """`_make_shard` with a gate wherever some rows are on disk and some are not encoded."""
    from cxr_fast.cluster import activations

    def told(progress: Any) -> None:
        report(progress)
        if 0 < progress.done < progress.total and progress.encoded < progress.total - progress.before:
            gate.pass_through()

    return activations._make_shard(*arguments, report=told, stop=stop)


def look(reference: list[Any], *, report: Report, stop: Stop) -> tuple[int, bool]:
    """The sum of a shared array, and whether it is a view of the store."""
    array = fetch(reference[0])
    return int(array.sum()), array.flags.owndata


def where() -> str:
    """Ray's id of the node this runs on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())
