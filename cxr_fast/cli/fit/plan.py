"""What a fit will do, before anything long: films, encoder, cache, folds, files, the time and disk that they need."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import SweepSpec
from ...models import device as cpu
from ...system.text import duration, gigabytes
from ..dataset import describe_cache_plan
from .part_times import PartTimes

if TYPE_CHECKING:
    from ...grid.points import Point

# Bytes of run and model files for each parameter of the tower: float32 in the run folder, then float32, float16 and
# int8 files. Of a trained parameter: float32 in each saved model, with two moments of AdamW while it is trained.
TOWER, TRAINED, MOMENTS = 4 + 4 + 2 + 1, 4, 8
PAGES = 8 << 20  # report and pictures; 550 films and 14 classes took 6 MB
UNKNOWN = (
    "not counted, since not known before: figures and report after the training, and matrices that int8 leaves in float"
)


@dataclass(frozen=True, kw_only=True)
class ExportWish:
    """What a fit exports: variants, films to check on, members of the final model, and views that it answers for."""

    variants: Sequence[str]
    films: int
    models: int
    views: int


def expect_parts(
    work: Any, spec: SweepSpec, points: Sequence[Point], device: str | None, wish: ExportWish
) -> PartTimes:
    """Expect how long each part takes, from a few timed calls; of a sweep only where there is no whole cache yet.

    `device` is where folds are trained, None for a cluster, whose time is unknown.
    """
    from ...export.expected_time import expect_export
    from ...training.expected_time import expect_before_cache

    job, part_times = work.job, PartTimes({"cache": work.plan.seconds})
    if device is not None and not is_whole(work):
        trains = [point.train for point in points]
        part_times.expected["sweep"] = expect_before_cache(job, spec, trains, cpu.pick_device(device))
    films = min(wish.films, len(job.manifest))
    times = expect_export(job.backbone, wish.variants, films, models=wish.models, views=wish.views)
    part_times.expected |= {"export": times.export, "verify": times.verify}
    return part_times


def is_whole(work: Any) -> bool:
    """Whether the cache is there and holds every image, so that a sweep can be planned from it."""
    return bool(work.job.out.exists() and work.plan.rows_done >= work.plan.images and not work.plan.rows_dropped)


def describe_fit(
    work: Any, spec: SweepSpec, points: Sequence[Point], out: Path | None, wish: ExportWish, part_times: PartTimes
) -> str:
    """The plan of a fit, a line for each part, then what all of it needs."""
    job = work.job
    manifest = job.manifest
    many = f"{len(points):,} configurations, " if len(points) > 1 else ""
    whole, seconds = is_whole(work), part_times.expected
    if whole:
        known = "its plan follows"
    elif math.isnan(seconds["sweep"]):
        known = "expected time unknown: a cluster trains"
    else:
        known = f"expected time {duration(seconds['sweep'])}, timed on made-up activations"
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
        f"export: {', '.join(wish.variants)}; expected time {duration(seconds['export'])}",
        f"verify: expected time {duration(seconds['verify'])}",
        f"disk: cache {gigabytes(work.plan.bytes_needed)}, run and model files about {gigabytes(need)} "
        f"({gigabytes(free)} free){short}",
        *([] if whole else [f"in all: {part_times.describe()}; {UNKNOWN}"]),
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
