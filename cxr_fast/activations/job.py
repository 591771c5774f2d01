"""What a cache is made of: its images, the tower, the activation files, and the header of each."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import PIL

from ..config import CacheSpec, digest, to_dict
from ..data.images import self_check
from ..data.manifest import Manifest
from ..errors import InputError
from ..models.backbone import Backbone, identity
from ..models.device import pick_device
from ..system import hardware
from . import cache, reuse
from . import file as store

# Images of one model call, unless --batch-size says otherwise; kept in the file, so that a resumed run uses the same.
BLOCKS = {"cpu": 8, "cuda": 64}


@dataclass(frozen=True, kw_only=True)
class CacheJob:
    """A cache to make: the images, the tower that encodes them, where it goes, and how.

    `shards` None is one activation file at `out`; K is K files beside `out`, which becomes their index. `batch_size`
    images are one call of the model (default: 8 on a CPU, 64 on a GPU), `workers` threads decode (default: the usable
    cores). `repair` also encodes rows again whose bytes fail their checksum; `stop_on_error` ends the run at the first
    image that fails; with `strict` an image fails whose DICOM header names another modality or body part. `reuse` are
    other caches made in the same way, whose rows of the same image bytes are copied.
    """

    manifest: Manifest
    backbone: Backbone
    spec: CacheSpec
    out: Path
    shards: int | None = None
    device: str = "auto"
    batch_size: int | None = None
    workers: int | None = None
    repair: bool = False
    stop_on_error: bool = False
    strict: bool = False
    reuse: tuple[Path, ...] = ()

    @property
    def block(self) -> int:
        """Images of one model call."""
        return self.batch_size or BLOCKS[pick_device(self.device).type]

    @property
    def threads(self) -> int:
        """Threads that read, hash and decode images."""
        return self.workers or hardware.cpu_count()

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, V, T, D) of the activations, or (N, V, E) for a cut after pooling."""
        tokens, width, embedding = self.backbone.shape
        row = (embedding,) if self.spec.unfreeze_blocks == 0 else (tokens, width)
        return (len(self.manifest), len(self.spec.views), *row)

    @cached_property
    def identity(self) -> dict[str, str]:
        """The cut and the hashes of the weights; computed once, for a ViT-B's are 0.6 GB and 64 shards need them."""
        return identity(self.backbone.visual, self.spec.unfreeze_blocks)

    @cached_property
    def files(self) -> tuple[FileJob, ...]:
        """The activation files to make, in order. Raises InputError for more shards than blocks."""
        count, n = self.shards, len(self.manifest)
        if count is None:
            header = make_header(self, self.manifest)
            return (FileJob(path=self.out, manifest=self.manifest, header=header, also=self._sources(header)),)
        parts = [select_rows(self.manifest, rows) for rows in shard_ranges(n, count, self.block)]
        paths = [cache.shard_path(self.out, number, count) for number in range(1, count + 1)]
        headers = [make_header(self, part) for part in parts]
        also = self._sources(headers[0])
        return tuple(
            FileJob(path=path, manifest=part, header=header, also=also)
            for path, part, header in zip(paths, parts, headers, strict=True)
        )

    def _sources(self, header: store.Header) -> tuple[Path, ...]:
        """The activation files of the caches of `reuse`. Raises InputError for the cache itself."""
        if twice := [path for path in self.reuse if path.resolve() == self.out.resolve()]:
            raise InputError(f"--reuse: {twice[0]} is the cache to be made, whose rows are kept anyway; leave it out.")
        return tuple(file.path for other in reuse.open_sources(self.reuse, header) for file in other.files)


@dataclass(frozen=True, kw_only=True)
class FileJob:
    """One activation file of a cache, the whole of it or a shard: its images, and files that may hold their rows."""

    path: Path
    manifest: Manifest
    header: store.Header
    also: tuple[Path, ...] = ()


def shard_ranges(images: int, shards: int, block: int) -> list[range]:
    """Cut rows into shards of whole blocks, so that every image lies in its block as it would in one file.

    The sizes differ by a block at most. Raises InputError for more shards than blocks.
    """
    blocks = -(-images // block)
    if not 1 <= shards <= blocks:
        raise InputError(
            f"--shards {shards}: {images:,} images are {blocks:,} block(s) of {block}, and a shard is at least one; "
            f"at most {blocks:,}."
        )
    edges = [min(images, blocks * k // shards * block) for k in range(shards + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def select_rows(manifest: Manifest, rows: range) -> Manifest:
    """Return a manifest of the images `rows`, neighbours in the list."""
    piece = slice(rows.start, rows.stop)
    return replace(
        manifest,
        images=manifest.images[piece],
        groups=manifest.groups[piece],
        views=manifest.views[piece],
        studies=manifest.studies[piece],
        labels=manifest.labels[piece],
        splits=manifest.splits[piece],
        subgroups={name: values[piece] for name, values in manifest.subgroups.items()},
    )


def make_header(job: CacheJob, manifest: Manifest) -> store.Header:
    """Make the header of an activation file of `manifest`'s rows: spec, identity and fingerprint, and the columns."""
    backbone, spec = job.backbone, job.spec
    mean, std = backbone.statistics(spec.normalize)
    parts = {
        "prefix_sha256": job.identity["prefix_sha256"],
        "cut": job.identity["cut"],
        **to_dict(spec.preprocess),
        reuse.PIXEL_CHECK: self_check(),
        "mean": list(mean),
        "std": list(std),
        "views": list(spec.views),
        "dtype": spec.dtype,
    }
    asked = to_dict(spec)
    del asked["image_size"]  # `preprocess.size` says it, whether it was asked for or is the tower's own
    meta = {
        "spec": asked,
        "block": job.block,
        "fingerprint": digest(parts),
        "fingerprint_parts": parts,
        "tower_sha256": job.identity["tower_sha256"],
        "backbone": backbone.config,
        "weights": backbone.source,
        "random_weights": backbone.random,
        "pillow": PIL.__version__,
        "mean": list(mean),
        "std": list(std),
        "dataset": {"name": manifest.name, "root": str(manifest.root.resolve()), **manifest.info},
        "subgroups": {name: list(values) for name, values in manifest.subgroups.items()},
    }
    if manifest.splits:
        meta["splits"] = list(manifest.splits)
    return store.Header(
        meta=json.loads(json.dumps(meta)),  # as it will be read back: comparing the two must not trip over tuples
        shape=(len(manifest), *job.shape[1:]),
        dtype=spec.dtype,
        images=manifest.images,
        groups=manifest.groups,
        studies=manifest.studies,
        views=manifest.views,
        classes=manifest.classes,
        labels=manifest.labels,
    )
