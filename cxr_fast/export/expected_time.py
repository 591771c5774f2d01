"""Expect the time of an export and of its verification, from one timed call of the tower, before there is a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..models.backbone import Backbone
from .parity import BATCHES, RUNS

BATCH = 8  # images of the timed call, and of most calls of an export
# Of torch's time for an image, what ONNX Runtime's CPU takes for one. Seen of ViT-B/16 on two AMD CPUs: float32 0.39
# and 0.71, int8 0.14 and 0.24 (benchmarks/results/inference-*.json). float16 is computed as float32 there, and was not
# timed.
GRAPH = {"fp32": 0.45, "fp16": 0.5, "int8": 0.2}
CHANGED = 2  # times the films are changed, for the yardstick
LOADED = 1.0  # seconds to write or open a file, beside its calls
VERIFIED = 4  # images that verify computes per file
# Images in whose time the int8 weights are rounded, per unit of the tower's width: one export of a ViT-S/16 (width 384)
# on a busy machine, so a guess for others.
ROUNDED = 1.2


@dataclass(frozen=True, kw_only=True)
class ExportTimes:
    """Expected seconds of an export and of `verify` of its files; int8 files after the first one are not counted."""

    export: float
    verify: float


def expect_export(
    backbone: Backbone, variants: Sequence[str], films: int, *, models: int = 1, views: int = 1
) -> ExportTimes:
    """Time one call of the tower, and count the calls of an export that is checked on `films` images.

    `models` are the members of the final model, `views` those that it answers for. The tower stands for the model: the
    head is small, and members share the frozen part of a graph, which is left out of account.
    """
    one = time_image(backbone) * models * views
    per_file = {name: one * GRAPH[name] for name in variants}
    export = films * one + CHANGED * films * one * GRAPH["fp32"]
    export += sum((films + sum(BATCHES) + RUNS) * each + LOADED for each in per_file.values())
    if "int8" in variants:
        export += ROUNDED * backbone.shape[1] * one / views
    return ExportTimes(export=export, verify=sum(VERIFIED * each + LOADED for each in per_file.values()))


def time_image(backbone: Backbone) -> float:
    """Time torch's float32 answer of the whole tower on this CPU, in seconds an image."""
    device = next(backbone.visual.parameters()).device
    visual = backbone.visual.cpu()
    pixels = torch.zeros((BATCH, 3, backbone.image_size, backbone.image_size))
    with torch.inference_mode():
        visual(pixels)
        began = time.perf_counter()
        visual(pixels)
        seconds = (time.perf_counter() - began) / BATCH
    visual.to(device)
    return seconds
