"""A manifest into a sharded cache: each shard an ordinary cache run of its own, then the index."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..config import CacheSpec
from ..data import duplicates
from ..data.manifest import Manifest
from ..errors import InputError, Interrupted
from ..models.backbone import Backbone
from ..models.device import pick_device
from ..system.locks import FileLock, graceful
from . import cache, reuse
from . import file as store
from .encoder import (
    BLOCKS,
    Outcome,
    Plan,
    Progress,
    failures,
    header_for,
)
from .encoder import plan as plan_one
from .encoder import run as run_one

SUFFIX = cache.SUFFIX
OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class Work:
    """One shard to make: its file, the images that belong into it, and files that may hold their rows."""

    path: Path
    manifest: Manifest
    also: tuple[Path, ...]


def ranges(images: int, shards: int, block: int) -> list[range]:
    """The rows of each shard: whole blocks, so that every image lies in its block as it would in one file; the sizes
    differ by a block at most. Raises InputError for more shards than blocks."""
    blocks = -(-images // block)
    if not 1 <= shards <= blocks:
        raise InputError(
            f"--shards {shards}: {images:,} images are {blocks:,} block(s) of {block}, and a shard is at least one; "
            f"at most {blocks:,}."
        )
    edges = [min(images, blocks * k // shards * block) for k in range(shards + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def shard_path(path: Path, number: int, count: int) -> Path:
    """Where shard `number` of `count` (from 1) of the index `path` lies: `NAME.shard-0001-of-0004.h5` beside it."""
    return path.with_name(f"{_stem(path)}.shard-{number:04d}-of-{count:04d}.h5")


def cut(manifest: Manifest, path: Path, shards: int, block: int) -> list[Work]:
    """The shards of a manifest, with nothing yet to take rows from."""
    pieces = ranges(len(manifest), shards, block)
    return [
        Work(path=shard_path(path, k, shards), manifest=part(manifest, rows), also=())
        for k, rows in enumerate(pieces, 1)
    ]


def part(manifest: Manifest, rows: range) -> Manifest:
    """The images `rows` of a manifest."""
    piece = slice(rows.start, rows.stop)
    return replace(
        manifest,
        images=manifest.images[piece],
        groups=manifest.groups[piece],
        views=manifest.views[piece],
        studies=manifest.studies[piece],
        labels=manifest.labels[piece],
        subgroups={name: values[piece] for name, values in manifest.subgroups.items()},
    )


def files_of(path: Path) -> list[Path]:
    """Every file that may hold rows of the sharded cache `path`: shards of any number, unfinished ones, set aside."""
    pattern = re.compile(re.escape(_stem(path)) + cache.SHARD_NAME.pattern + "(" + re.escape(store.PARTIAL) + ")?")
    if not path.parent.is_dir():
        return []
    return sorted(p for p in path.parent.iterdir() if pattern.fullmatch(p.name)) + reuse.asides(path)


def plan(
    manifest: Manifest,
    backbone: Backbone,
    spec: CacheSpec,
    out: Path,
    *,
    shards: int,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
) -> Plan:
    """What `run` with the same arguments will do; see `encode.plan`."""
    ranges(len(manifest), shards, _block(device, batch_size))
    named = {"device": device, "batch_size": batch_size, "workers": workers}
    return plan_one(manifest, backbone, spec, out, files=files_of(out), **named)  # type: ignore[arg-type]


def run(
    backbone: Backbone,
    manifest: Manifest,
    spec: CacheSpec,
    out: Path,
    *,
    shards: int,
    device: str = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    repair: bool = False,
    stop_on_error: bool = False,
    on_progress: OnProgress | None = None,
    on_looked: Callable[[int], None] | None = None,
    runner: Callable[[Sequence[Work], Together], list[Outcome]] | None = None,
) -> Outcome:
    """Make every shard that is not whole, then the index at `out`.

    Each shard goes through `encode.run`, here one after another, or through `runner`. Rows of other layouts (another
    list of images, another number of shards) are kept where the image's bytes are the same. Interrupted and errors as
    `encode.run`; the same call goes on from there. While shards change there is no index, so nobody reads a mixture.
    """
    began = time.perf_counter()
    works = cut(manifest, out, shards, _block(device, batch_size))

    def here(works: Sequence[Work], together: Together) -> list[Outcome]:
        outcomes = []
        for number, work in enumerate(works):
            one = run_one(
                backbone,
                work.manifest,
                spec,
                work.path,
                device=device,
                workers=workers,
                batch_size=batch_size,
                repair=repair,
                stop_on_error=stop_on_error,
                also=work.also,
                all_may_fail=True,
                on_progress=lambda p, number=number: together.tell(number, p),  # type: ignore[misc]
                on_looked=on_looked,
            )
            together.finished(number, one)
            outcomes.append(one)
        return outcomes

    with FileLock(out), graceful() as stopped:
        headers = [header_for(w.manifest, backbone, spec, block=_block(device, batch_size)) for w in works]
        also = _clear(works, headers, out)
        works = [replace(work, also=also) for work in works]
        if stopped.is_set():
            raise Interrupted(f"stopped before anything was encoded; run the same command again to go on with {out}.")
        outcomes = (runner or here)(works, Together(works, on_progress, stopped.is_set))
        _refuse_all_failed(outcomes, works)
        cache.write(out, [work.path for work in works])
        for path in also:
            path.unlink(missing_ok=True)
    return _outcome(out, outcomes, began)


def _block(device: str, batch_size: int | None) -> int:
    return batch_size or BLOCKS[pick_device(device).type]


def _clear(works: Sequence[Work], headers: Sequence[store.Header], out: Path) -> tuple[Path, ...]:
    """Set aside what lies at the shards' names, or at those of another layout, and is not of this list; all asides.

    Raises InputError, before anything is moved, when a file was made another way. The index goes first, unless every
    shard is already whole: it must never list what is being changed.
    """
    found = files_of(out)
    olds = {path: store.read_header(path) for path in found}
    for path, old in olds.items():
        reuse.refuse_other(old, headers[0], path)
    wanted = {work.path: header for work, header in zip(works, headers, strict=True)}
    keep, move = set(), []
    for path, old in olds.items():
        final = path.with_name(path.name.removesuffix(store.PARTIAL))
        if final in wanted and reuse.same_rows(old, wanted[final]):
            keep.add(path)
        elif path.suffix == ".h5" or path.name.endswith(store.PARTIAL):
            move.append(path)
    if move or not all(path in keep for path in wanted):
        out.unlink(missing_ok=True)
    for path in move:
        reuse.set_aside(path, out)
    return tuple(reuse.asides(out))


class Together:
    """The progress of several shards as one; `stop` tells whoever makes them to end with Interrupted."""

    def __init__(
        self, works: Sequence[Work], on_progress: OnProgress | None = None, stop: Callable[[], bool] = bool
    ) -> None:
        self.on_progress, self.stop = on_progress, stop
        nothing = Progress(done=0, total=0, before=0, encoded=0, failed=0, decoding=0.0, computing=0.0, writing=0.0)
        self.latest = [replace(nothing, total=len(work.manifest)) for work in works]
        self.whole: set[int] = set()

    def tell(self, number: int, progress: Progress) -> None:
        """A shard got on; what is told of one that is whole comes late and says nothing new."""
        if number not in self.whole:
            self._keep(number, progress)

    def _keep(self, number: int, progress: Progress) -> None:
        self.latest[number] = progress
        if self.on_progress is not None:
            self.on_progress(self.sum())

    def finished(self, number: int, outcome: Outcome) -> None:
        """A shard is whole; one in which nothing was to be done has told nothing before."""
        done, failed = outcome.images, len(outcome.failed)
        before = done - outcome.encoded - failed
        self.whole.add(number)
        self._keep(number, replace(self.latest[number], done=done, before=before, encoded=done - before, failed=failed))

    def sum(self) -> Progress:
        """All shards."""
        names = ("done", "total", "before", "encoded", "failed", "decoding", "computing", "writing")
        return Progress(**{name: sum(getattr(p, name) for p in self.latest) for name in names})


def _refuse_all_failed(outcomes: Sequence[Outcome], works: Sequence[Work]) -> None:
    total = sum(outcome.images for outcome in outcomes)
    if sum(len(outcome.failed) for outcome in outcomes) == total:
        image, error = failures(works[0].path)[0]
        raise InputError(f"every one of the {total:,} images failed; the first, {image}: {error}")


def _outcome(out: Path, outcomes: Sequence[Outcome], began: float) -> Outcome:
    file = cache.ShardedFile(out)
    header, ok = file.header, np.flatnonzero(file.ok)
    images, groups, hashes = ([column[i] for i in ok] for column in (header.images, header.groups, file.sha256))
    return Outcome(
        path=out,
        images=header.shape[0],
        encoded=sum(outcome.encoded for outcome in outcomes),
        reused=sum(outcome.reused for outcome in outcomes),
        failed=tuple(_chain(outcome.failed for outcome in outcomes)),
        seconds=time.perf_counter() - began,
        fingerprint=header.meta["fingerprint"],
        notes=duplicates.notes(images, hashes, groups, header.labels[ok]),
    )


def _chain(parts: Iterator[tuple[tuple[str, str], ...]]) -> Iterator[tuple[str, str]]:
    for some in parts:
        yield from some


def _stem(path: Path) -> str:
    return path.name.removesuffix(cache.SUFFIX).removesuffix(".json")
