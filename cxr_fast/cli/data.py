"""Commands on datasets, caches and files: parse, call one function, print."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..config import SHARDS, CacheSpec, PreprocessSpec
from ..errors import InputError
from ..inference.hub import is_address
from ..models import device as cpu
from ..system.files import write_json
from ..system.text import duration, file_name
from .console import ProgressBar, echo_notes, show, took
from .dataset import choose_columns, describe_manifest, echo_oddest, show_cache_plan
from .options import (
    PATH,
    as_in_cache,
    cluster_option,
    dataset_options,
    device_option,
    read_prepared,
    read_source,
    recipe_option,
    source_argument,
    spec_from,
    spec_options,
    split_option,
    strict_option,
    table_options,
    threads_option,
    with_recipe,
)


@click.command()
@source_argument
@click.option("--out", type=PATH, help="Write a manifest here (.csv or .parquet).")
@click.option("--labels-only", is_flag=True, help="Do not look for the images.")
@table_options
@dataset_options
def prepare(source: Path, out: Path | None, **flags: Any) -> None:
    """Read a dataset or any table of films and print its class table.

    SOURCE: a Kaggle Indiana folder, an NIH folder, OpenI reports, CheXpert or MIMIC-CXR tables, a manifest; a table of
    your own (CSV with commas, semicolons or tabs, Excel, Parquet) whose columns --path to --meta name; or a folder of
    DICOM files, or of folders named by findings.
    """
    manifest = read_prepared(source, flags)
    show(describe_manifest(manifest))
    if warning := choose_columns(manifest).warning():
        echo_notes([warning])
    if out is not None:
        from ..data.manifest import write_manifest

        write_manifest(manifest, out)
        click.echo(f"\nwrote {out}")


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
        run_cache_work(work)


def read_cache_flags(ctx: click.Context, recipe: str, flags: dict[str, Any]) -> tuple[dict[str, Any], CacheSpec]:
    """The flags of `cache`, with what --recipe or --from says where none is given, and how films are to be encoded."""
    if flags["gather"] and not flags["cluster"]:
        raise InputError("--gather is for --cluster: without it every shard is made here.")
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
    from ..activations import build
    from ..activations.encoder import with_size
    from ..activations.job import CacheJob
    from ..models import backbone

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
        **{name: flags[name] for name in ("shards", "device", "batch_size", "workers", "repair", "strict")},
    )
    with contextlib.ExitStack() as stack:
        remote = stack.enter_context(_connect_build(job, flags)) if flags["cluster"] else None
        plan = remote.plan() if remote else build.plan(job)
        _refuse_dropping(plan, job.out, flags["limit"])
        yield CacheWork(job=job, plan=plan, remote=remote)


def run_cache_work(work: CacheWork) -> None:
    """Make a cache and say what was done; exit 1 where images failed."""
    from ..activations import build

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
    from ..cluster.activations import connect_build

    with connect_build(flags["cluster"], job, threads=flags["threads"], gather=flags["gather"]) as remote:
        click.echo(str(remote))
        yield remote


def _refuse_dropping(plan: Any, path: Path, limit: int | None) -> None:
    if limit and plan.rows_dropped:
        raise InputError(
            f"--limit {limit} would take {plan.rows_dropped:,} encoded images out of {path}; give another --out."
        )


class CacheProgress:
    """The line of a cache run: images compared with their rows, then images encoded; `many`: by many machines,
    whose seconds do not add up to those that passed."""

    def __init__(self, *, many: bool) -> None:
        self.bar, self.many, self.compared = ProgressBar(), many, 0

    def compare(self, more: int, rows: int) -> None:
        """Show that `more` images were read and compared with the `rows` that the cache holds."""
        self.compared += more
        total = max(rows, self.compared)
        self.bar.show(self.compared, total, f"{self.compared:,} of {total:,} images compared with their rows")

    def show(self, p: Any) -> None:
        """Show a `BuildProgress`."""
        rate = p.encoded / max(self.bar.seconds if self.many else p.seconds, 1e-9)
        text = f"{p.done:,} of {p.total:,} images, {rate:.1f} images/s, waiting for {p.bottleneck}"
        # Not `done`, which counts a block once it is on the disk, while the next one is encoded.
        self.bar.show(p.before + p.encoded, p.total, text, before=p.before, seconds=None if self.many else p.seconds)


def echo_outcome(outcome: Any, path: Path, visual: Any) -> None:
    """What a cache run did, and the images least like the others; exit 1 where images failed."""
    from ..activations import build

    rate = f" ({outcome.encoded / max(outcome.seconds, 1e-9):.1f} images/s)" if outcome.encoded else ""
    encoded = f"encoded {outcome.encoded:,} images in {duration(outcome.seconds)}{rate}"
    click.echo(f"reused {outcome.reused:,}, {encoded}, {took()}: {path}")
    echo_notes(outcome.notes)
    echo_oddest(path, visual)
    noted = build.write_notes(path, outcome.noted)
    if outcome.noted:
        image, note = outcome.noted[0]
        click.echo(
            f"note: {len(outcome.noted):,} image(s) have a note in {noted}; the first, {image}: {note}", err=True
        )
    listing = build.write_errors(path, outcome.failed)
    if outcome.failed:
        click.echo(
            f"{len(outcome.failed):,} image(s) failed and will not be trained on, listed in {listing}:", err=True
        )
        for image, error in outcome.failed[:5]:
            click.echo(f"  {image}: {error}", err=True)
        sys.exit(1)


@click.command()
@click.argument("file", type=PATH)
@click.option("--reencode", type=click.IntRange(0), default=8, show_default=True, help="Random images to encode again.")
@click.option("--images", type=PATH, help="Folder of the images, where they are not where the cache found them.")
@click.option("--weights", help="Where the backbone is now, if not where the cache found it.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Decides which images.")
@device_option
@threads_option
@click.option("--json", "json_out", type=PATH, help="Write what was found of a model here.")
@click.pass_context
def verify(ctx: click.Context, file: Path, json_out: Path | None, **flags: Any) -> None:
    """Check a cache, or a model file on this machine.

    FILE: a cache (checksums, finite values, random images encoded again; exit 1 names the bad rows), a model file, a
    folder whose model.*.onnx are each checked (bytes, label order, pixels, golden answer; exit 1 says what differs), or
    hf-hub:owner/name[@REVISION]. A model must answer here as it did where it was exported.
    --reencode, --images, --weights and --seed are for a cache, --json is for a model.
    """
    model = _is_model(file)
    foreign = ("json_out",) if not model else ("reencode", "images", "weights", "seed")
    for name in foreign:
        if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            kind, other = ("a model", "a cache") if model else ("a cache", "a model")
            raise InputError(f"--{name.removesuffix('_out')} is for {other}; {file} is {kind}.")
    sys.exit(_verify_models(file, json_out, flags) if model else _verify_cache(file, flags))


def _is_model(file: Path) -> bool:
    """By content: a cache begins with HDF5's signature, a model with its IR version; the name decides for the rest."""
    if file.is_dir() or is_address(file):
        return True
    head = b""
    with contextlib.suppress(OSError):
        if file.is_file():
            with open(file, "rb") as opened:
                head = opened.read(8)
    if head == b"\x89HDF\r\n\x1a\n" or head[:1] == b"{":
        return False
    return head[:1] == b"\x08" or not {".h5", ".json"}.intersection(file.suffixes)


def _verify_models(file: Path, json_out: Path | None, flags: dict[str, Any]) -> int:
    from ..inference import verify as model_check

    paths = model_check.models(file)
    if json_out is not None and json_out.exists() and any(json_out.samefile(path) for path in paths if path.exists()):
        raise InputError(f"--json: {json_out} is the model itself; give the name of a JSON file.")
    found = model_check.verify_all(paths, device=flags["device"], threads=flags["threads"])
    if len(found) == 1 and isinstance(found[0], model_check.Unjudged):
        raise found[0].error
    for item in found:
        click.echo(model_check.describe(item))
    if json_out is not None:
        write_json(json_out, {"models": [model_check.to_json(item) for item in found]}, "--json")
        click.echo(f"wrote {json_out}")
    return model_check.exit_code(found)


def _verify_cache(file: Path, flags: dict[str, Any]) -> int:
    from ..activations import verify as cache_check

    cpu.prepare(flags["threads"])
    bar = ProgressBar()

    def show_rows(done: int, total: int) -> None:
        bar.show(done, total, f"{done:,} of {total:,} rows checked")

    named = {name: flags[name] for name in ("images", "weights", "device", "seed")}
    again = cache_check.ReencodeSpec(count=flags["reencode"], **named)
    found = cache_check.check_cache(file, again, show_rows)
    bar.done()
    text = f"{file}: {found.rows:,} rows checked, {found.failed:,} failed images, {found.reencoded:,} encoded again"
    if found.reencoded:
        text += f", largest difference {found.largest:.1e} of a row's peak (tolerance {cache_check.TOLERANCE:g})"
    click.echo(text)
    return echo_verdict(found, file)


def echo_verdict(found: Any, file: Path) -> int:
    """What `verify` found, and its exit code: 1 for rows shown to be wrong, 2 where nothing asked for could be done."""
    if found.bad:
        many = f" --shards {found.shards}" if found.shards else ""
        click.echo(
            f"BAD: {len(found.bad):,} row(s); `cxrfast cache SOURCE --out {file}{many} --repair` mends checksums",
            err=True,
        )
        for image, reason in found.bad[:20]:
            click.echo(f"  {image}: {reason}", err=True)
    why = []
    if found.absent:
        why.append(f"{found.absent:,} images are not found ({found.tried}); give their folder with --images")
    why += [f"{image} {reason}" for image, reason in found.unproven[:3]]
    if found.asked and not found.reencoded and not found.bad:
        raise InputError(
            f"the rows are sound, but none of {found.asked:,} could be encoded again: {'; '.join(why)}, "
            "or pass --reencode 0."
        )
    if why:
        left = found.asked - found.reencoded
        click.echo(f"NOT VERIFIED: {left:,} of the {found.asked:,} images could not be encoded again: {'; '.join(why)}")
    if not found.bad:
        click.echo("PASS")
    return 1 if found.bad else 0


@click.command()
@click.argument("file", type=PATH)
def info(file: Path) -> None:
    """Describe a cache, run, ONNX file, bench result or weights.

    A folder that holds ONNX files alone is described by them; a bench result is what a bench command wrote with --json.
    Weights are what --weights of `cxrfast cache` takes: a folder, owner/name on the hub, biomedclip, or random:SEED.
    To describe them, they are loaded and a few films are timed.
    """
    from . import info as describing

    click.echo(describing.describe(file))


@click.command()
@click.argument("out", type=PATH)
@click.option("--studies", type=click.IntRange(1), default=300, show_default=True, help="Studies to draw.")
@click.option("--size", type=click.IntRange(32, 4096), default=256, show_default=True, help="Pixels a side.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Another seed, other images.")
def phantom(out: Path, studies: int, size: int, seed: int) -> None:
    """Draw synthetic radiographs with planted findings.

    OUT becomes a folder of the Indiana layout.
    """
    from ..data.phantom import dataset

    count = dataset.write_dataset(out, studies=studies, size=size, seed=seed)
    click.echo(f"drew {count:,} phantom images of {studies:,} studies in {out}")
