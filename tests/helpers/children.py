"""What tests run in processes of their own. No pytest here: a fork server's child would import it each time, for two
seconds, since Python 3.11's fork server does not look for modules where its parent does."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from cxr_fast.activations import encoder
from cxr_fast.config import CacheSpec, SweepSpec
from cxr_fast.data import manifest, paths
from cxr_fast.errors import Interrupted
from cxr_fast.inference import batch as answers
from cxr_fast.inference.predictor import Predictor
from cxr_fast.models import backbone
from cxr_fast.training.fold import Epoch
from cxr_fast.training.sweep import Sweep


def server() -> multiprocessing.context.ForkServerContext:
    """Processes that need not import torch again: thirty starts in the time of a few."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["cxr_fast.inference.batch", "cxr_fast.training.sweep", "open_clip.timm_model", "timm"]
    )
    return context


def encode_all(data: str, out: str, spec: CacheSpec, block: int) -> None:
    """A cache of a dataset folder."""
    torch.set_num_threads(1)
    encoder.run(backbone.load(spec.weights), manifest.read(Path(data)), spec, Path(out), device="cpu", batch_size=block)


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
        Sweep(Path(cache), Path(out), spec, device="cpu").run(hit)
    except Interrupted as error:
        told.send(str(error))
        sys.exit(error.exit_code)


def predict_all(model: str, data: str, out: str, number: int, after: int, told: Any) -> None:
    """Predictions of a folder that tell each batch and send themselves a signal after so many; 130 when interrupted."""
    count = 0

    def batch(state: answers.State) -> None:
        nonlocal count
        count += 1
        told.send(state.done)
        if count == after:
            os.kill(os.getpid(), number)
        time.sleep(0.002)  # or a fast machine is done before the first kill comes

    predictor = Predictor(Path(model), device="cpu", threads=1)
    try:
        answers.write(predictor, paths.read([data]), Path(out), batch_size=2, workers=1, decide=True, on_batch=batch)
    except Interrupted as error:
        told.send(str(error))
        sys.exit(error.exit_code)
