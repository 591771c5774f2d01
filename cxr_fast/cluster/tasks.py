"""Tasks on a cluster: run a function for many jobs, begin lost ones again, pass on progress, results and errors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CxrFastError, DeviceError, Interrupted
from ..system.locks import graceful
from .connection import REACH, Cluster, cause_of, ray_module

# Seconds: between two polls of what runs; for running tasks to stop by themselves; without any node that could run what
# waits (a cluster that grows by itself takes minutes); between two reports of one task.
POLL, GRACE, HOPE, REPORT = 0.25, 20.0, 600.0, 0.2
# How often a task is begun again when its worker or node is lost. Our own errors are never tried again.
RETRIES = 10

Report = Callable[[Any], None]
Stop = Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class TaskSize:
    """CPUs and GPUs of a node that a task takes, and how many jobs are handed to Ray at once (None: all)."""

    cpus: float = 1
    gpus: float = 0
    ahead: int | None = None


ONE_CPU = TaskSize()


def share(value: Any) -> Any:
    """Put `value` into the object store (one copy a node, numpy arrays without a copy a task); return a reference.

    Put it into a list among a task's arguments, and `fetch` it there; by itself Ray would fetch it for every task.
    """
    return ray_module().put(value)


def fetch(reference: Any) -> Any:
    """Return the value of a `share`, inside a task."""
    return ray_module().get(reference)


def run_tasks(
    cluster: Cluster,
    function: Callable[..., Any],
    jobs: Iterable[Sequence[Any]],
    size: TaskSize = ONE_CPU,
    on_progress: Callable[[int, Any], None] | None = None,
    stop: Stop = bool,
) -> Iterator[tuple[int, Any]]:
    """Run `function(*job, report=..., stop=...)` for every job on some node; yield (job number, result) as they finish.

    `function` is of this package and takes what pickles. Inside, `report(value)` reaches `on_progress(number, value)`
    here, and `stop()` says whether to raise Interrupted soon. A task whose worker or node is lost is begun again, by
    whoever has room. An error of ours raised in a task is raised here as it is, after the others were asked to stop; so
    it is with Interrupted, once `stop` of the caller returns True.
    """
    ray = ray_module()
    board = _start_board(cluster)
    reader = _Reader(board, on_progress)
    task = _remote_task(size)
    upcoming, waiting = enumerate(jobs), dict[Any, int]()
    hope = time.monotonic() + HOPE
    try:
        # Before the tasks: on a busy machine they might else be over before the first report can be read.
        while not reader.pass_on(POLL) and time.monotonic() < hope:
            if stop():
                raise Interrupted("stopped.")
        while True:
            while size.ahead is None or len(waiting) < size.ahead:
                if (job := next(upcoming, None)) is None:
                    break
                waiting[task.remote(function, board, job[0], *job[1])] = job[0]
            if not waiting:
                return
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL)
            if stop():
                raise Interrupted("stopped.")
            reader.pass_on()
            if done:  # a task's reports before its result; an answer that was asked for earlier may lack the last ones
                _ = reader.pass_on(REACH) and reader.pass_on(REACH)
            for ref in done:
                yield waiting.pop(ref), _result(ref)
            if done or cluster.slots(size.cpus, size.gpus):
                hope = time.monotonic() + HOPE
            elif time.monotonic() > hope:
                raise DeviceError(f"--cluster: no node is left that lends {size.cpus:g} CPUs and {size.gpus:g} GPUs.")
    finally:
        _cancel(list(waiting))
        ray.kill(board)


def _remote_task(size: TaskSize) -> Any:
    # A process that has begun on one GPU stays on it, whatever the next task is lent: so one task a process there.
    # SPREAD: by itself Ray fills half of one node first, whose disk and memory then serve all.
    ray = ray_module()
    once = ray.remote(max_calls=1) if size.gpus else ray.remote
    return once(_run_one).options(
        num_cpus=size.cpus,
        num_gpus=size.gpus,
        max_retries=RETRIES,
        retry_exceptions=False,
        scheduling_strategy="SPREAD",
    )


def _result(ref: Any) -> Any:
    ray = ray_module()
    try:
        found = ray.get(ref)
    except ray.exceptions.TaskCancelledError:
        raise Interrupted("stopped.") from None
    except ray.exceptions.RayTaskError as error:
        raise cause_of(error) from None
    except ray.exceptions.RayError as error:
        text = " ".join(str(error).split())[:160]
        raise DeviceError(
            f"--cluster: a task was lost {RETRIES + 1} times with its worker ({text}).\n"
            "Out of memory? What is finished is kept; the same command goes on."
        ) from None
    if isinstance(found, _Failed):
        raise found.error
    return found


def _cancel(refs: Sequence[Any]) -> None:
    """Ask running tasks to stop, wait a little, end those that did not."""
    if not refs:
        return
    ray = ray_module()
    for ref in refs:
        ray.cancel(ref)
    _, left = ray.wait(list(refs), num_returns=len(refs), timeout=GRACE, fetch_local=False)
    for ref in left:
        ray.cancel(ref, force=True)


# ------------------------------------------------------------------ reports on their way


class _Board:
    """Keeps what the tasks report until it is read: an actor on the driver's node, which no lost node takes along."""

    def __init__(self) -> None:
        self.values: list[tuple[int, Any]] = []

    def put(self, values: list[tuple[int, Any]]) -> None:
        """Keep what a task reports."""
        self.values += values

    def take(self) -> list[tuple[int, Any]]:
        """Return what has come since the last call."""
        values, self.values = self.values, []
        return values


def _start_board(cluster: Cluster) -> Any:
    ray = ray_module()
    near = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(cluster.here, soft=True)
    return ray.remote(_Board).options(num_cpus=0, max_restarts=-1, scheduling_strategy=near).remote()


class _Reader:
    """Passes on what is on the board, never waiting for it: it may still be starting while tasks already run."""

    def __init__(self, board: Any, on_progress: Callable[[int, Any], None] | None) -> None:
        self.board, self.on_progress = board, on_progress
        self.asked: Any = None

    def pass_on(self, seconds: float = 0) -> bool:
        """Call `on_progress` with what has come; False where the board did not answer in that time."""
        if self.on_progress is None:
            return True
        ray = ray_module()
        self.asked = self.asked or self.board.take.remote()
        if not ray.wait([self.asked], timeout=seconds)[0]:
            return False
        asked, self.asked = self.asked, None
        try:
            reports = ray.get(asked)
        except ray.exceptions.RayError:  # it is being started again; progress is worth no failure
            return False
        for number, value in reports:
            self.on_progress(number, value)
        return True


# ------------------------------------------------------------------ inside the workers


@dataclass(frozen=True)
class _Failed:
    error: CxrFastError


def _run_one(function: Callable[..., Any], board: Any, number: int, *arguments: Any) -> Any:
    """Run one task; an error of ours is returned as a value, so that it arrives without Ray's traceback."""
    reporter = _Reporter(board, number)
    try:
        with graceful() as stopped:  # ray.cancel sends SIGINT
            result = function(*arguments, report=reporter, stop=stopped.is_set)
    except CxrFastError as error:
        result = _Failed(error)
    reporter.flush(wait=True)
    return result


class _Reporter:
    """Sends what it is called with: the first at once, then a few times a second, several together."""

    def __init__(self, board: Any, number: int) -> None:
        self.board, self.number = board, number
        self.values: list[Any] = []
        self.last = 0.0

    def __call__(self, value: Any) -> None:
        self.values.append(value)
        if time.monotonic() - self.last > REPORT:
            self.flush()

    def flush(self, *, wait: bool = False) -> None:
        """Send what has come together; with `wait` return once it has arrived."""
        if self.values:
            sent = self.board.put.remote([(self.number, value) for value in self.values])
            if wait:
                ray_module().wait([sent], timeout=REACH)
        self.values, self.last = [], time.monotonic()
