"""Commands on datasets and files: parse, call one function, print."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from ..inference.hub import is_address
from ..models import device as cpu
from ..system.files import write_json
from .console import ProgressBar, echo_notes, show
from .dataset import choose_columns, describe_manifest
from .options import (
    PATH,
    dataset_options,
    device_option,
    read_prepared,
    source_argument,
    table_options,
    threads_option,
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
