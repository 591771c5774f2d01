"""Folds on made-up embeddings: no tower, no images, an epoch in milliseconds."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from cxr_fast.activations.loader import Activations
from cxr_fast.config import TrainSpec
from cxr_fast.training.folds.fold import Fold, FoldData, Snapshot
from cxr_fast.training.folds.loop import Recorder

CPU = torch.device("cpu")
IMAGES, WIDTH, CLASSES = 37, 24, 5
# 25 in batches of 8 leave one image over, which joins the third step.
TRAIN, VALID = np.arange(25), np.arange(25, IMAGES)
SPEC = TrainSpec(batch_size=8, precision="float32", lr=1e-3)


def bare(width: int = WIDTH) -> Any:
    """What a head needs of a tower: no blocks and the embedding's width."""
    trunk = SimpleNamespace(blocks=[], global_pool="token", num_prefix_tokens=1, embed_dim=width)
    return SimpleNamespace(trunk=trunk, head=nn.Module())


@cache
def embeddings(dtype: str = "float32", length: float = 1.0) -> np.ndarray:
    """(N, 2, E) of the given length."""
    out = np.random.default_rng(3).standard_normal((IMAGES, 2, WIDTH))
    return (length * out / np.linalg.norm(out, axis=-1, keepdims=True)).astype(dtype)


@cache
def labels() -> np.ndarray:
    """(N, C) with 1, 0 and some unknown, an image of unknown ones alone; each class has both signs on both sides."""
    random = np.random.default_rng(0)
    out = random.integers(0, 2, (IMAGES, CLASSES)).astype(np.int8)
    out[random.random(out.shape) < 0.2] = -1
    out[7] = -1
    for part in (TRAIN, VALID):
        out[part[0]], out[part[1]] = 1, 0
    return out


def make(
    kind: type[Fold] = Fold, spec: TrainSpec = SPEC, *, activations: Activations | None = None, **changes: Any
) -> Any:
    """A fold of `kind` over the toy embeddings."""
    named: dict[str, Any] = {"labels": labels(), "train_rows": TRAIN, "valid_rows": VALID, "seed": 0, **changes}
    activations = activations or Activations(embeddings(), CPU)
    return build(kind, bare(activations.array.shape[-1]), activations, spec=spec, unfreeze_blocks=0, **named)


def build(kind: type[Fold], visual: Any, activations: Activations, **named: Any) -> Any:
    """A fold of `kind`, its rows, labels and number (`fold`) given by name."""
    rows = {name: named.pop(name) for name in ("labels", "train_rows", "valid_rows")}
    data = FoldData(activations=activations, number=named.pop("fold", 0), **rows)
    return kind(visual, data, named.pop("spec"), **named)


def keep(snapshots: list[Snapshot]) -> Recorder:
    """A recorder that adds each snapshot to a list."""
    return Recorder(snapshot=lambda _, snapshot: snapshots.append(snapshot))


def same(one: Fold, other: Fold) -> bool:
    """Whether two folds would go on alike to the last bit; times aside."""
    (tensors, values), (others, other_values) = one.state(), other.state()
    for side in (values, other_values):
        side["history"] = [{**line, "seconds": 0} for line in side["history"]]
    return (
        list(tensors) == list(others)
        and all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
        and values == other_values
    )
