"""What a fit will do, before anything long: films, encoder, cache, folds, files, and the disk that they need."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...config import SweepSpec
from ...system.text import gigabytes
from ..dataset import describe_cache_plan

# Bytes of run and model files for each parameter of the tower: float32 in the run folder, then float32, float16 and
# int8 files. Of a trained parameter: float32 in each saved model, with two moments of AdamW while it is trained.
TOWER, TRAINED, MOMENTS = 4 + 4 + 2 + 1, 4, 8
PAGES = 8 << 20  # report and pictures; 550 films and 14 classes took 6 MB


def describe_fit(work: Any, spec: SweepSpec, configurations: int, out: Path | None, variants: Sequence[str]) -> str:
    """The plan of a fit, a line for each part."""
    job = work.job
    manifest = job.manifest
    many = f"{configurations:,} configurations, " if configurations > 1 else ""
    known = "its plan follows" if job.out.exists() else "expected time unknown until the cache exists"
    named = out or Path("exports") / job.out.stem
    random = ", RANDOM weights" if job.backbone.random else ""
    need, free = expected_size(work, spec), free_beside(named)
    short = "; this may not be enough" if need > free else ""
    lines = [
        f"prepare: {len(manifest):,} films, {len(set(manifest.groups)):,} groups, {len(manifest.classes)} classes of "
        f"{manifest.name}",
        f"cache: encoder {job.spec.weights}{random}; {describe_cache_plan(work.plan, manifest, job.out, work.shards)}",
        f"sweep: {many}{spec.folds} folds, epochs {','.join(map(str, spec.epochs))} -> {named}"
        f"{'' if out else ' or the next free name'}; {known}",
        f"export: {', '.join(variants)}, then verify",
        f"disk: cache {gigabytes(work.plan.bytes_needed)}, run and model files about {gigabytes(need)} "
        f"({gigabytes(free)} free){short}",
    ]
    return "\n".join(lines)


def expected_size(work: Any, spec: SweepSpec) -> int:
    """Estimate the bytes of run folder, checkpoints and model files, where every cached block is trained."""
    visual = work.job.backbone.visual
    tower = sum(each.numel() for each in visual.parameters())
    blocks = visual.trunk.blocks[len(visual.trunk.blocks) - work.job.spec.unfreeze_blocks :]
    trained = sum(each.numel() for each in blocks.parameters())
    models = spec.folds + 1
    return PAGES + tower * TOWER + trained * models * (TRAINED * (1 + len(spec.epochs)) + MOMENTS)


def free_beside(path: Path) -> int:
    """Bytes that are free where a file or folder will be."""
    return shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free
