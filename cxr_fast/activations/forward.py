"""Layers over cached activations: a tail's answers, and the blocks that stay frozen run once for all training.

Everything here is in evaluation mode and keeps no gradients.
"""

from __future__ import annotations

import math
import tempfile
import weakref
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..config import TrainSpec
from ..models import onednn
from ..models.tail import Tail
from ..system import hardware
from .loader import SHARE, Activations

# Images scored at once. On a CPU 64 do not fit the cache: 12 ms an image against 10 with 16 (bfloat16, ViT-B/16).
EVAL_BATCH, EVAL_BATCH_HEAD = {"cpu": 16, "cuda": 256}, 1024


def precision(spec: TrainSpec, device: torch.device, blocks: int) -> str:
    """`float32` or `bfloat16`: what `auto` means on this device (bfloat16 where the hardware computes in it).

    A head alone on a CPU is float32: its matrices are so small that converting them costs more than it saves.
    """
    if spec.precision != "auto":
        return spec.precision
    if blocks == 0 and device.type == "cpu":
        return "float32"
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bfloat16" if any(probe() for probe in probes if probe is not None) else "float32"


def autocast(device: torch.device, kind: str) -> AbstractContextManager[Any]:
    """bfloat16 autocast on the device, or the way float32 is fastest there."""
    return torch.autocast(device.type, torch.bfloat16) if kind == "bfloat16" else onednn.float32(device)


def batch_size(activations: Activations) -> int:
    """How many images to score at once."""
    return EVAL_BATCH_HEAD if len(activations.array.shape) == 3 else EVAL_BATCH[activations.device.type]


def predict(tail: Tail, activations: Activations, rows: np.ndarray, *, view: int = 0) -> np.ndarray:
    """Logits (n, C) of one view of `rows`, in evaluation mode: the plain one, or 1, the flipped one.

    In float32 arithmetic, whatever the training computes in: every choice and every figure rests on these.
    """
    tail.eval()
    size = batch_size(activations)
    parts = [torch.from_numpy(rows[start : start + size]) for start in range(0, len(rows), size)]
    out = []
    with torch.inference_mode(), autocast(activations.device, "float32"):
        for x in activations.ahead((part, torch.full_like(part, view)) for part in parts):
            out.append(tail(x).float())
    return torch.cat(out).cpu().numpy()


def probabilities(tail: Tail, activations: Activations, rows: np.ndarray, *, tta: str = "none") -> np.ndarray:
    """Probabilities (n, C) float32 of `rows`: of the plain view, or with `tta` "flip" the mean of both views'."""
    plain = predict(tail, activations, rows)
    return sigmoid(plain) if tta == "none" else with_flipped(plain, tail, activations, rows)


def with_flipped(plain: np.ndarray, tail: Tail, activations: Activations, rows: np.ndarray) -> np.ndarray:
    """Mean probabilities (n, C) float32 of both views of `rows`, from the logits (n, C) of the plain one."""
    each = [sigmoid(logits) for logits in (plain, predict(tail, activations, rows, view=1))]
    return np.asarray(np.mean(each, axis=0, dtype=np.float64), np.float32)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits, float32."""
    return torch.sigmoid(torch.from_numpy(logits)).numpy()


def run_blocks(
    tail: Tail, activations: Activations, blocks: int, rows: np.ndarray, *, views: int, folder: Path | None = None
) -> Activations:
    """Run all blocks of `tail` but its last `blocks` over the first `views` views of `rows`; float32 arithmetic.

    The result has the tail's other activations, (N, views, T, D), or with `blocks` 0 embeddings (N, views, E) before
    their length is taken out: what a cache cut there would hold, in the same dtype; rows not asked for are zero. Tokens
    that do not fit into memory lie in a file of `folder` that has no name and ends with them.
    """
    tail.eval()
    first, size = activations.array, batch_size(activations)
    inner = (tail.embed_dim,) if blocks == 0 else first.shape[2:]
    out, file = _room((len(first), views, *inner), first.dtype, folder)
    batches = [
        (torch.from_numpy(rows[start : start + size]), view)
        for view in range(views)
        for start in range(0, len(rows), size)
    ]
    with torch.inference_mode(), autocast(activations.device, "float32"):
        ahead = activations.ahead((part, torch.full_like(part, view)) for part, view in batches)
        for x, (part, view) in zip(ahead, batches, strict=True):
            found = tail.pooled(x) if blocks == 0 else tail.tokens(x, len(tail.blocks) - blocks)
            out[part.numpy(), view] = found.float().cpu().numpy().astype(first.dtype)
    fits = activations.residency != "stream" or file is not None
    done = Activations(out, activations.device, residency=activations.residency if fits else "auto")
    if file is not None:
        weakref.finalize(done, file.close)
    return done


def _room(shape: tuple[int, ...], dtype: np.dtype[Any], folder: Path | None) -> tuple[np.ndarray, IO[bytes] | None]:
    """Zeros in memory, or where they do not fit, in a file of `folder` that is returned too: it must stay open."""
    if math.prod(shape) * dtype.itemsize < SHARE * hardware.memory_available():
        return np.zeros(shape, dtype), None
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    return np.memmap(f"/proc/self/fd/{file.fileno()}", dtype, "w+", shape=shape), file
