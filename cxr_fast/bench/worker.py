"""A model to compare in a process of its own, asked one thing at a time.

Two models take turns so: the threads of an idle session spin for a while and took half the machine from another model
in the same process (int8: 72 ms for 34). Before each timed call the other's threads get REST seconds to fall asleep,
and one call that is not timed wakes the own ones; so each is timed as `predict` runs it, spinning allowed. Two copies
of a 64-wide ViT in turns, batch 16: 23.6 ms without the rest, 9.4 with it, 9.0 where the other never runs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ..config import PreprocessSpec, from_dict
from ..errors import CxrFastError, InputError

REST = 0.2


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One model to compare: an ONNX file, or a run folder whose final model of a kind torch runs in float32."""

    path: Path
    torch: bool = False
    final: str | None = None
    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class About:
    """What an opened model says of itself; `weights` tells trained weights apart, `variant` is fp32, int8, torch ..."""

    name: str
    variant: str
    where: str
    labels: tuple[str, ...]
    thresholds: tuple[float, ...]
    spec: PreprocessSpec
    weights: str
    warning: str


class Worker:
    """A model in a process of its own, asked one thing at a time."""

    def __init__(self, arm: Arm) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would take our threads' locks along
        self.name = arm.path.name
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=work, args=(far, arm), daemon=True)
        self.process.start()
        far.close()
        self.about: About = self._reply()

    def call(self, *request: Any) -> Any:
        """The answer to a request; what went wrong over there is raised here."""
        self.pipe.send(request)
        return self._reply()

    def _reply(self) -> Any:
        try:
            found = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise InputError(
                f"{self.name}: its process ended with code {self.process.exitcode}; out of memory?"
            ) from None
        if isinstance(found, CxrFastError):
            raise found
        return found

    def close(self) -> None:
        """End the process and wait, so that its CPU time counts as ours."""
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@contextlib.contextmanager
def working(arm: Arm) -> Iterator[Worker]:
    """The model's process, ended whatever happens."""
    worker = Worker(arm)
    try:
        yield worker
    finally:
        worker.close()


def work(pipe: Connection, arm: Arm) -> None:
    """The other process: opens the model, says what it is, then answers and times until told to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's, which ends this one
    try:
        about, run = _open_torch(arm) if arm.torch else _open_onnx(arm)
    except CxrFastError as error:
        pipe.send(error)
        return
    pipe.send(about)
    pixels = np.zeros(0)
    while (request := _next(pipe)) is not None:
        kind, *rest = request
        try:
            if kind == "pixels":
                pixels = rest[0]
                pipe.send(None)
            elif kind == "answer":
                pipe.send(run(pixels[rest[0] : rest[0] + rest[1]]))
            else:
                pipe.send(_timed(run, pixels, *rest))
        except CxrFastError as error:
            pipe.send(error)


def _next(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:  # the other side is gone
        return None


def _timed(run: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray, turn: int, batch_size: int) -> float:
    """Seconds of one call, on the images whose turn it is, once the other model's threads are asleep."""
    batch = pixels[(turn * batch_size + np.arange(batch_size)) % len(pixels)]
    time.sleep(REST)
    run(batch)
    began = time.perf_counter()
    run(batch)
    return time.perf_counter() - began


def _open_onnx(arm: Arm) -> tuple[About, Callable[[np.ndarray], np.ndarray]]:
    from ..inference.predictor import Predictor

    predictor = Predictor(arm.path, device=arm.device, threads=arm.threads)
    about = About(
        name=os.path.relpath(predictor.path),
        variant=predictor.info["variant"],
        where=predictor.where,
        labels=predictor.labels,
        thresholds=tuple(predictor.info["thresholds"]),
        spec=predictor.spec,
        weights=str(predictor.info.get("model_sha256", predictor.path)),
        warning=predictor.warning,
    )
    return about, predictor.probabilities


def _open_torch(arm: Arm) -> tuple[About, Callable[[np.ndarray], np.ndarray]]:
    """The trusted path in torch, open_clip's whole tower in float32, as `export` compares with."""
    import torch

    from ..activations.encoder import normalise
    from ..metrics import calibration
    from ..models import device as cpu
    from ..training.run_folder import read_run

    threads, run = cpu.prepare(arm.threads), read_run(arm.path, arm.final)
    mean, std = (torch.tensor(run.info[k]).reshape(1, 3, 1, 1) for k in ("mean", "std"))

    def answer(pixels: np.ndarray) -> np.ndarray:
        x = normalise(torch.from_numpy(pixels), mean, std)
        return calibration.apply(run.info["calibration"], run.raw_probabilities(x))

    about = About(
        name=os.path.relpath(arm.path),
        variant="torch",
        where=f"CPU, {threads} thread(s)",
        labels=tuple(run.info["classes"]),
        thresholds=tuple(run.info["thresholds"]),
        spec=from_dict(PreprocessSpec, run.info["preprocess"]),
        weights=run.info["model_sha256"],
        warning=str(run.info["provenance"]),
    )
    return about, answer
