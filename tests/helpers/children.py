"""What tests run in processes of their own. No pytest here: a fork server's child would import it each time, for two
seconds, since Python 3.11's fork server does not look for modules where its parent does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import h5py
import torch

from cxr_fast.activations import build
from cxr_fast.activations import file as store
from cxr_fast.activations.job import CacheJob
from cxr_fast.config import CacheSpec, SweepOptions, SweepSpec
from cxr_fast.data import manifest, paths
from cxr_fast.errors import Interrupted
from cxr_fast.inference import batch as answers
from cxr_fast.inference import checkpoint
from cxr_fast.inference.checkpoint import Checkpoint
from cxr_fast.inference.predictor import Predictor
from cxr_fast.models import backbone
from cxr_fast.training.folds.fold import Epoch
from cxr_fast.training.sweep import SweepJob
from tests.helpers import states


def server() -> multiprocessing.context.ForkServerContext:
    """Processes that need not import torch again: thirty starts in the time of a few."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["cxr_fast.inference.batch", "cxr_fast.training.sweep", "open_clip.timm_model", "timm"]
    )
    return context


def encode_all(data: str, out: str, spec: CacheSpec, block: int, step: int, told: Any) -> None:
    """A cache of a dataset folder by a process that dies in the middle of a step, or with 0 of none and tells how many
    there were; a table of the file's head is a step too."""
    torch.set_num_threads(1)
    steps = states.Steps(states.at(step), (h5py.Group, "create_dataset"))
    build.run(
        CacheJob(
            manifest=manifest.read_dataset(Path(data)),
            backbone=backbone.load(spec.weights),
            spec=spec,
            out=Path(out),
            device="cpu",
            batch_size=block,
        )
    )
    told.send(steps.done)


def run_and_die(words: list[str], blocks: int, steps: int) -> None:
    """`cxrfast` with these words, killed in the middle of a step of writing rows, so many blocks and steps on."""
    from cxr_fast.cli.main import main

    def last(name: str, _: Any) -> bool:
        nonlocal blocks, steps
        blocks -= name == "rows"
        steps -= blocks < 0
        return steps < 0

    torch.set_num_threads(1)
    states.Steps(last, (store.Writer, "rows"))
    main(words)


def sweep(cache: str, out: str, spec: SweepSpec, number: int, after: int, told: Any) -> None:
    """A sweep that sends itself a signal after so many epochs; exits with 130 when interrupted."""
    torch.set_num_threads(1)
    count = 0

    def hit(config: int, fold: int, epoch: Epoch) -> None:
        nonlocal count
        count += 1
        told.send((fold, epoch.epoch))
        if count == after:
            os.kill(os.getpid(), number)

    try:
        SweepJob(Path(cache), Path(out), spec, SweepOptions(device="cpu")).run(hit)
    except Interrupted as error:
        told.send(str(error))
        sys.exit(error.exit_code)


def predict_all(model: str, data: str, out: str, number: int, after: int, part: float, told: Any) -> None:
    """Predictions of a folder that tell each batch and send themselves a signal after so many; 130 when interrupted.

    With a `part` the signal is SIGKILL, and comes when that part of the next batch is in SQLite's log.
    """
    count, append = 0, Checkpoint.append
    checkpoint.SYNC_SECONDS = 1e9  # else the log may start again at its beginning and not grow

    def torn(self: Checkpoint, results: Any, provider: str) -> None:
        log = Path(out + checkpoint.WAL)
        size = log.stat().st_size
        append(self, results, provider)
        if count == after:
            os.truncate(log, size + int(part * (log.stat().st_size - size)))
            os.kill(os.getpid(), signal.SIGKILL)

    def batch(state: answers.State) -> None:
        nonlocal count
        count += 1
        told.send(state.done)
        if count == after and not part:
            os.kill(os.getpid(), number)

    if part:
        Checkpoint.append = torn  # type: ignore[method-assign]
    predictor = Predictor(Path(model), device="cpu", threads=1)
    spec = answers.BatchSpec(batch_size=2, workers=1, decide=True)
    try:
        answers.write(predictor, paths.read([data]), Path(out), spec, batch)
    except Interrupted as error:
        told.send(str(error))
        sys.exit(error.exit_code)
