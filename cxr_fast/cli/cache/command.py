"""The command that encodes: parse, call one function, print."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ...config import SHARDS, CacheSpec, PreprocessSpec
from ...errors import InputError
from ...models import device as cpu
from ...system.text import file_name
from ..dataset import show_cache_plan
from ..options import (
    PATH,
    cluster_option,
    dataset_options,
    device_option,
    read_source,
    recipe_option,
    source_argument,
    spec_from,
    spec_options,
    split_option,
    strict_option,
    threads_option,
    with_recipe,
)
from .earlier import as_in_cache
from .outcome import CacheProgress, echo_outcome
from .reuse import echo_others


@click.command()
@source_argument
@click.option("--out", type=PATH, help="The activation file.  [default: cache/NAME.h5]")
@click.option(
    "--from", "earlier", type=PATH, metavar="CACHE", help="Encode as this cache was, or a run's; flags go first."
)
@recipe_option
@spec_options(CacheSpec, "weights", "image_size", "unfreeze_blocks", "views")
@spec_options(PreprocessSpec, "resize", "dicom_policy")
@spec_options(CacheSpec, "normalize", "dtype")
@device_option
@click.option(
    "--batch-size", type=click.IntRange(1, 4096), help="Images per model call.  [default: 8 on CPU, 64 on CUDA]"
)
@click.option("--workers", type=click.IntRange(1, 256), help="Decoding threads.  [default: usable cores]")
@threads_option
@click.option("--limit", type=click.IntRange(1), help="Only the first N images.")
@click.option(
    "--shards",
    type=click.IntRange(1, 9999),
    help="Write K activation files and an index (NAME.shards.json), read like one.  [default: one file]",
)
@click.option(
    "--reuse",
    type=PATH,
    multiple=True,
    metavar="CACHE",
    help="Copy rows of the same image bytes from this cache, if it was encoded in the same way; may be given again.",
)
@cluster_option
@click.option("--gather", is_flag=True, help="With --cluster: bring the shards here, where nodes share no disk.")
@click.option(
    "--on-error",
    type=click.Choice(["continue", "stop"]),
    default="continue",
    show_default=True,
    help="What an image that cannot be read does; it is never trained on.",
)
@strict_option
@click.option("--dry-run", is_flag=True, help="Print the plan, and which caches hold rows of these images, and stop.")
@click.option("--repair", is_flag=True, help="Also encode rows again whose bytes fail their checksum.")
@split_option
@dataset_options
@click.pass_context
def cache(ctx: click.Context, source: Path, out: Path | None, recipe: str, **flags: Any) -> None:
    """Run every image once through the frozen layers into a file.

    The activations go into one HDF5 file, or with --shards K into several.
    """
    flags, spec = read_cache_flags(ctx, recipe, flags)
    manifest = read_source(source, flags, limit=flags["limit"])
    with open_cache_work(manifest, out, spec, flags) as work:
        show_cache_plan(work.plan, manifest, work.job.out, work.shards)
        echo_others(ctx, work)
        if not flags["dry_run"]:
            run_cache_work(work)


def read_cache_flags(ctx: click.Context, recipe: str, flags: dict[str, Any]) -> tuple[dict[str, Any], CacheSpec]:
    """The flags of `cache`, with what --recipe or --from says where none is given, and how films are to be encoded."""
    if flags["gather"] and not flags["cluster"]:
        raise InputError("--gather is for --cluster: without it every shard is made here.")
    if flags["reuse"] and flags["cluster"]:
        raise InputError("--reuse is for a cache that is made here; leave it out with --cluster.")
    flags = with_recipe(ctx, recipe, flags) if flags["earlier"] is None else as_in_cache(ctx, flags)
    return flags, spec_from(CacheSpec, flags, preprocess=spec_from(PreprocessSpec, flags))


@dataclass(frozen=True, kw_only=True)
class CacheWork:
    """A cache to make: its job, the plan, and the cluster that makes it, if any."""

    job: Any
    plan: Any
    remote: Any

    @property
    def shards(self) -> int | None:
        """How many activation files, None for one."""
        shards: int | None = self.remote.shards if self.remote else self.job.shards
        return shards


@contextlib.contextmanager
def open_cache_work(manifest: Any, out: Path | None, spec: CacheSpec, flags: Mapping[str, Any]) -> Iterator[CacheWork]:
    """Load the encoder, join the cluster if one is named, and plan; nothing is written."""
    from ...activations import build
    from ...activations.encoder import with_size
    from ...activations.job import CacheJob
    from ...models import backbone

    if not flags["cluster"]:
        cpu.pick_device(flags["device"])
    cpu.prepare(flags["threads"])
    tower = backbone.load(spec.weights, spec.image_size)
    job = CacheJob(
        manifest=manifest,
        backbone=tower,
        spec=with_size(spec, tower),
        out=_cache_path(out, manifest.name, flags),
        stop_on_error=flags["on_error"] == "stop",
        reuse=tuple(flags["reuse"]),
        **{name: flags[name] for name in ("shards", "device", "batch_size", "workers", "repair", "strict")},
    )
    with contextlib.ExitStack() as stack:
        remote = stack.enter_context(_connect_build(job, flags)) if flags["cluster"] else None
        plan = remote.plan() if remote else build.plan(job)
        _refuse_dropping(plan, job.out, flags["limit"])
        yield CacheWork(job=job, plan=plan, remote=remote)


def run_cache_work(work: CacheWork) -> None:
    """Make a cache and say what was done; exit 1 where images failed."""
    from ...activations import build

    job, line = work.job, CacheProgress(many=work.remote is not None)
    if job.backbone.random:
        click.echo("weights: RANDOM, not BiomedCLIP")
    if work.remote:
        outcome = work.remote.run(line.show)
    else:
        outcome = build.run(job, line.show, lambda more: line.compare(more, work.plan.rows_done))
    line.bar.done()
    echo_outcome(outcome, job.out, job.backbone.visual)


def _cache_path(out: Path | None, name: str, flags: Mapping[str, Any]) -> Path:
    """Where the cache goes. Raises InputError for a name under which no other command would find it."""

    first = f"-first{flags['limit']}" if flags["limit"] else ""
    ending = SHARDS if flags["shards"] or flags["cluster"] else ".h5"
    path = out or Path("cache") / f"{file_name(name)}{first}{ending}"
    if not path.name.endswith(ending) or path.is_dir():
        raise InputError(
            f"--out: {path} must be a file that ends in {ending}, such as cache/name{ending}"
            + ("." if ending != ".h5" else f"; one that ends in {SHARDS} wants --shards K.")
        )
    return path


@contextlib.contextmanager
def _connect_build(job: Any, flags: Mapping[str, Any]) -> Iterator[Any]:
    """Connect to the cluster and say how the work is divided there."""
    from ...cluster.activations import connect_build

    with connect_build(flags["cluster"], job, threads=flags["threads"], gather=flags["gather"]) as remote:
        click.echo(str(remote))
        yield remote


def _refuse_dropping(plan: Any, path: Path, limit: int | None) -> None:
    if limit and plan.rows_dropped:
        raise InputError(
            f"--limit {limit} would take {plan.rows_dropped:,} encoded images out of {path}; give another --out."
        )
