"""The command line: parse, call one function, print. Heavy imports stay inside command bodies."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from . import __version__, cpu
from .config import CacheSpec, PreprocessSpec, SweepSpec, TrainSpec, choices, default, reference_value
from .errors import CxrFastError, InputError

PATH = click.Path(path_type=Path)
NOTICE = "Research use only: not a medical device, not for diagnosis."


class Group(click.Group):
    """A plain group that turns this package's errors into one or two lines and their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that half-written files are cleaned up
        try:
            return super().invoke(ctx)
        except CxrFastError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except click.UsageError as error:
            if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
                raise
            usage = error.ctx.command_path if error.ctx else "cxrfast"
            click.echo(f"error: {error.format_message()}\n`{usage} --help` lists what it takes.", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("interrupted; no unfinished file has a final name, run the same command again", err=True)
            ctx.exit(130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="cxrfast")
def main() -> None:
    """Fine-tune BiomedCLIP on chest radiographs from cached activations, export one ONNX file, predict without torch.

    \b
    The main job:   cxrfast cache DATASET    encode every image once through the frozen layers
                    cxrfast sweep            train the tail: folds, epoch search, hold-out
                    cxrfast export RUN       one verified ONNX file
                    cxrfast predict MODEL FILES --out preds.csv

    Research use only: not a medical device, not for diagnosis.
    """


def setting(cls: type, name: str, help: str, flag: str | None = None, **kwargs: Any) -> Callable[[Any], Any]:
    """An option whose name, choices and default come from a field of a config dataclass."""
    value = default(cls, name)
    try:
        kind: Any = click.Choice(choices(cls, name)) if choices(cls, name) and isinstance(value, str) else None
    except TypeError:
        kind = None
    if isinstance(value, tuple):
        value, kind = ",".join(map(str, value)), str
    if isinstance(value, bool):
        flag = flag or f"--{name.replace('_', '-')}/--no-{name.replace('_', '-')}"
    kind = kwargs.pop("type", kind)
    flag = flag or "--" + name.replace("_", "-")
    return click.option(flag, name, default=value, show_default=value is not None, type=kind, help=help, **kwargs)


threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    help="Threads of the model; fewer on a shared machine.  [default: usable cores]",
)
recipe_option = click.option(
    "--recipe",
    type=click.Choice(["default", "reference"]),
    default="default",
    show_default=True,
    help="reference: the published choices where our defaults differ.",
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
source_argument = click.argument("source", type=PATH)
images_option = click.option("--images", type=PATH, help="Folder to look for the images in, where it is not SOURCE.")
skip_option = click.option("--skip-missing", is_flag=True, help="Go on without the images that are not there.")
unindexed_option = click.option(
    "--unindexed",
    type=click.Choice(["normal", "unknown"]),
    default="normal",
    show_default=True,
    help='How Indiana studies headed "No Indexing" count; the published labels say normal.',
)


@main.command()
@source_argument
@click.option("--out", type=PATH, help="Write a manifest here (.csv or .parquet).")
@click.option("--labels-only", is_flag=True, help="Do not look for the images.")
@images_option
@skip_option
@unindexed_option
def prepare(
    source: Path, out: Path | None, labels_only: bool, images: Path | None, skip_missing: bool, unindexed: Any
) -> None:
    """Read a dataset folder or manifest and print its class table.

    SOURCE: a Kaggle Indiana folder, an NIH folder, OpenI reports, CheXpert or MIMIC-CXR tables, or a manifest.
    """
    from . import datasets

    manifest = datasets.read(
        source, labels_only=labels_only, images=images, skip_missing=skip_missing, unindexed=unindexed
    )
    click.echo(describe_manifest(manifest))
    if out is not None:
        datasets.write_manifest(manifest, out)
        click.echo(f"\nwrote {out}")


def describe_manifest(manifest: Any) -> str:
    """The class table and the counts above it."""
    from . import datasets

    total = datasets.summary(manifest)
    views = ", ".join(f"{name or 'unknown'} {n:,}" for name, n in total["views"].items())
    lines = [
        f"{manifest.name} ({manifest.info.get('kind', 'manifest')}): {total['images']:,} images, "
        f"{total['studies']:,} studies, {total['groups']:,} groups",
        f"views: {views}",
        f"{total['positives']:,} positives, {total['labels_an_image']:.3f} labels an image",
    ]
    if total["skipped_missing"]:
        lines.append(f"skipped {total['skipped_missing']:,} listed image(s) that are not below {manifest.root}")
    rows = [
        [r.name, f"{r.positives:,}", f"{r.percent:.2f}", f"{r.unknown:,}", f"{r.groups:,}"]
        for r in datasets.class_table(manifest)
    ]
    lines += ["", table(["class", "positives", "% of images", "unknown", "groups"], rows)]
    if manifest.info.get("kind") in ("indiana", "openi"):
        from .labels import TRAPS

        known = set(manifest.classes)
        notes = [f"  {name}: {text}" for name, text in TRAPS if name in known or not name]
        lines += ["", "Know before you trust a class of this label set:", *notes]
    return "\n".join(lines)


def table(head: list[str], rows: list[list[str]], *, mark: int | None = None) -> str:
    """Columns aligned, first left, the others right; `mark` puts an arrow behind one row."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "  ".join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]).rstrip()

    body = [line(row) + ("  <- chosen" if i == mark else "") for i, row in enumerate(rows)]
    return "\n".join([line(head), "  ".join("-" * w for w in widths), *body])


class Progress:
    """One line that updates on a terminal; elsewhere a plain line every few seconds."""

    def __init__(self, every: float = 20.0) -> None:
        self.live = sys.stderr.isatty()
        self.every = 0.1 if self.live else every
        self.began = self.last = time.monotonic()

    def show(
        self,
        done: float,
        total: float,
        text: str,
        *,
        before: float = 0,
        seconds: float | None = None,
        force: bool = False,
    ) -> None:
        """`done` of `total` in any unit, `before` of them by an earlier run.

        The time left follows from what this run did, in `seconds` or since the line began.
        """
        now = time.monotonic()
        if now - self.last < self.every and not force:
            return
        self.last = now
        took = now - self.began if seconds is None else seconds
        left = f", {duration(took / (done - before) * (total - done))} left" if done > before else ""
        line = f"{100 * done / total:5.1f} %  {text}{left}"
        click.echo(f"\r{line:<100}" if self.live else line, err=True, nl=not self.live)

    def done(self) -> None:
        """Leave the line."""
        if self.live:
            click.echo("\r" + " " * 100 + "\r", err=True, nl=False)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 10 s`, `2 h 05 min`."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"


@main.command()
@source_argument
@click.option("--out", type=PATH, help="The activation file.  [default: cache/NAME.h5]")
@recipe_option
@setting(CacheSpec, "weights", "biomedclip, a hub id, a local folder, or random:SEED[:timm_arch].")
@setting(CacheSpec, "unfreeze_blocks", "Blocks left to train; 0 caches embeddings and trains the head alone.", type=int)
@setting(CacheSpec, "views", "Views to cache: plain, or plain,flip.")
@setting(PreprocessSpec, "resize", "How a film becomes a square.")
@setting(PreprocessSpec, "dicom_policy", "How DICOM intensities become grey levels.")
@setting(CacheSpec, "normalize", "Channel statistics: the model's own, or ImageNet's.")
@setting(CacheSpec, "dtype", "Stored precision.")
@device_option
@click.option(
    "--batch-size", type=click.IntRange(1, 4096), help="Images a model call.  [default: 8 on CPU, 64 on CUDA]"
)
@click.option("--workers", type=click.IntRange(1, 256), help="Decoding threads.  [default: usable cores]")
@threads_option
@click.option("--limit", type=click.IntRange(1), help="Only the first N images.")
@click.option(
    "--on-error",
    type=click.Choice(["continue", "stop"]),
    default="continue",
    show_default=True,
    help="What an image that cannot be read does; it is never trained on.",
)
@click.option("--repair", is_flag=True, help="Also encode rows again whose bytes fail their checksum.")
@images_option
@skip_option
@unindexed_option
@click.pass_context
def cache(
    ctx: click.Context,
    source: Path,
    out: Path | None,
    recipe: str,
    weights: str,
    unfreeze_blocks: int,
    views: str,
    resize: Any,
    dicom_policy: Any,
    normalize: Any,  # read by by_recipe
    dtype: Any,
    device: str,
    batch_size: int | None,
    workers: int | None,
    threads: int | None,
    limit: int | None,
    on_error: str,
    repair: bool,
    images: Path | None,
    skip_missing: bool,
    unindexed: Any,
) -> None:
    """Run every image once through the frozen layers and keep the activations in one HDF5 file."""
    spec = CacheSpec(
        weights=weights,
        unfreeze_blocks=unfreeze_blocks,
        views=tuple(view.strip() for view in views.split(",")),
        normalize=by_recipe(ctx, recipe, CacheSpec, "normalize"),
        dtype=dtype,
        preprocess=PreprocessSpec(resize=resize, dicom_policy=dicom_policy),
    )
    from . import datasets

    manifest = datasets.read(source, images=images, skip_missing=skip_missing, unindexed=unindexed, limit=limit)
    from . import backbone as backbones
    from . import encode

    encode.pick_device(device)
    cpu.prepare(threads)
    tower = backbones.load(weights)
    spec = encode.with_size(spec, tower)
    first = f"-first{limit}" if limit else ""
    path = out or Path("cache") / f"{file_name(manifest.name)}{first}.h5"
    if path.suffix != ".h5" or path.is_dir():  # else no other command would find it
        raise InputError(f"--out: {path} must be a file that ends in .h5, such as cache/name.h5.")
    plan = encode.plan(manifest, tower, spec, path, device=device, batch_size=batch_size, workers=workers)
    if limit and plan.rows_dropped:
        raise InputError(
            f"--limit {limit} would take {plan.rows_dropped:,} encoded images out of {path}; give another --out."
        )
    skipped = manifest.info["skipped_missing"]
    click.echo(
        f"{plan.images:,} images x {plan.views} view(s) -> {path}: {gigabytes(plan.bytes_needed)} "
        f"({gigabytes(plan.bytes_free)} free), cut {plan.cut}, {plan.dtype}, on {plan.device}"
        + (f"; {plan.rows_done:,} already there" if plan.rows_done else "")
        + (f"; {plan.rows_dropped:,} there are no longer listed and go" if plan.rows_dropped else "")
        + (f"; skipped {skipped:,} listed image(s) that are not below {manifest.root}" if skipped else "")
        + f"; expected time {duration(plan.seconds)}"
    )
    if tower.random:
        click.echo("weights: RANDOM, not BiomedCLIP")
    bar = Progress()

    def show(p: Any) -> None:
        rate = p.encoded / max(p.seconds, 1e-9)
        text = f"{p.done:,} of {p.total:,} images, {rate:.1f} images/s, waiting for {p.bottleneck}"
        bar.show(p.done, p.total, text, before=p.before, seconds=p.seconds)

    outcome = encode.run(
        tower,
        manifest,
        spec,
        path,
        device=device,
        workers=workers,
        batch_size=batch_size,
        repair=repair,
        stop_on_error=on_error == "stop",
        on_progress=show,
    )
    bar.done()
    rate = f" ({outcome.encoded / max(outcome.seconds, 1e-9):.1f} images/s)" if outcome.encoded else ""
    click.echo(
        f"reused {outcome.reused:,}, encoded {outcome.encoded:,} images in {duration(outcome.seconds)}{rate}: {path}"
    )
    echo_notes(outcome.notes)
    listing = encode.write_errors(path, outcome.failed)
    if outcome.failed:
        click.echo(
            f"{len(outcome.failed):,} image(s) failed and will not be trained on, listed in {listing}:", err=True
        )
        for image, error in outcome.failed[:5]:
            click.echo(f"  {image}: {error}", err=True)
        sys.exit(1)


def file_name(name: str) -> str:
    """A dataset's name as part of a path: separators and what hides a file become a dash."""
    return re.sub(r"[/\\\0]+|^\.+", "-", name).strip() or "dataset"


def gigabytes(count: float) -> str:
    """`4.5 GB`, `83 MB`, `210 kB`."""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


@main.command()
@click.argument("file", type=PATH)
@click.option("--reencode", type=click.IntRange(0), default=8, show_default=True, help="Random images to encode again.")
@click.option("--images", type=PATH, help="Folder of the images, where they are not where the cache found them.")
@click.option("--weights", help="Where the backbone is now, if not where the cache found it.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Decides which images.")
@device_option
@threads_option
def verify(
    file: Path, reencode: int, images: Path | None, weights: str | None, seed: int, device: str, threads: int | None
) -> None:
    """Prove a cache: checksums, finite values, and random images encoded again; exit 1 names the bad rows."""
    from . import verify as verifying

    cpu.prepare(threads)
    bar = Progress()

    def show(done: int, total: int) -> None:
        bar.show(done, total, f"{done:,} of {total:,} rows checked")

    found = verifying.cache(
        file, reencode=reencode, images=images, weights=weights, device=device, seed=seed, on_progress=show
    )
    bar.done()
    text = f"{file}: {found.rows:,} rows checked, {found.failed:,} failed images, {found.reencoded:,} encoded again"
    if found.reencoded:
        text += f", largest difference {found.largest:.1e} of a row's peak (tolerance {verifying.TOLERANCE:g})"
    click.echo(text)
    sys.exit(echo_verdict(found, file))


def echo_verdict(found: Any, file: Path) -> int:
    """What `verify` found, and its exit code: 1 for rows shown to be wrong, 2 where nothing asked for could be done."""
    if found.bad:
        click.echo(
            f"BAD: {len(found.bad):,} row(s); `cxrfast cache SOURCE --out {file} --repair` mends checksums", err=True
        )
        for image, reason in found.bad[:20]:
            click.echo(f"  {image}: {reason}", err=True)
    why = [f"{found.absent:,} images are not below {found.root}; give their folder with --images"] * bool(found.absent)
    why += [f"{image} {reason}" for image, reason in found.unproven[:3]]
    if found.asked and not found.reencoded and not found.bad:
        raise InputError(
            f"the rows are sound, but none of {found.asked:,} could be encoded again: {'; '.join(why)}, "
            "or pass --reencode 0."
        )
    if why:
        click.echo(f"NOT PROVEN: {found.asked - found.reencoded:,} of {found.asked:,} asked for: {'; '.join(why)}")
    if not found.bad:
        click.echo("PASS")
    return 1 if found.bad else 0


@main.command()
@click.argument("cache", type=PATH, required=False)
@click.option("--out", type=PATH, help="The run folder.  [default: exports/NAME]")
@recipe_option
@setting(SweepSpec, "epochs", "Budgets of the search; one run a fold passes through all of them.")
@setting(SweepSpec, "folds", "Folds of the cross-validation.", type=int)
@setting(SweepSpec, "holdout", "Share of the groups kept out until the end.", type=float)
@setting(SweepSpec, "seed", "Decides splits, initialisation and every draw.", type=int)
@setting(SweepSpec, "split_by", "What may not be shared between folds; image splits views of one patient.")
@click.option(
    "--grid",
    multiple=True,
    metavar="NAME=A,B",
    help="Try each value of a training field, such as lr=1e-5,2e-5; several flags: every combination.",
)
@setting(SweepSpec, "final", "The final model: the best fold's, one of all folds' data, or the folds' mean.")
@setting(SweepSpec, "threshold_target", "f1, sensitivity=X or specificity=X, a class, out of fold.", type=str)
@setting(SweepSpec, "calibration", "Calibration a class, fitted out of fold.")
@setting(TrainSpec, "lr", "Learning rate of AdamW.", type=float)
@setting(TrainSpec, "weight_decay", "Weight decay of AdamW.", type=float)
@setting(TrainSpec, "batch_size", "Images a step.", type=int)
@setting(TrainSpec, "clip_norm", "Gradient norm limit.", type=float)
@setting(TrainSpec, "loss", "Loss; focal+jaccard is 0.7 focal and 0.3 soft Jaccard.")
@setting(TrainSpec, "focal_alpha", "Focal loss: weight of positives.", type=float)
@setting(TrainSpec, "focal_gamma", "Focal loss: focusing exponent.", type=float)
@setting(TrainSpec, "class_weights", "Weigh rare classes up: by one over their share, or its square root.")
@setting(TrainSpec, "dropout", "Dropout in the head.", type=float)
@click.option(
    "--views",
    type=click.Choice(["plain,flip", "plain"]),
    default="plain,flip" if default(TrainSpec, "flip") else "plain",
    show_default=True,
    help="Views to train on: half the samples of an epoch are the flipped ones, or none.",
)
@setting(TrainSpec, "scheduler", "Learning-rate schedule on validation macro AUC.")
@setting(TrainSpec, "plateau_factor", "Plateau: what the rate is multiplied by.", type=float)
@setting(TrainSpec, "plateau_patience", "Plateau: epochs without a better AUC that it waits.", type=int)
@setting(TrainSpec, "patience", "Stop a fold after this many epochs without a better AUC.", type=int)
@setting(TrainSpec, "train_norm", "Train the final norm and projection too.")
@setting(TrainSpec, "precision", "Arithmetic of training; validation of the chosen model is always float32.")
@click.option("--manifest", type=PATH, help="Other labels and groups for the same images (dataset folder or manifest).")
@click.option("--weights", help="Where the backbone is now, if not where the cache found it.")
@device_option
@click.option(
    "--residency",
    type=click.Choice(["auto", "device", "host", "stream"]),
    default="auto",
    show_default=True,
    help="Activations on the device, in host memory, or read ahead from the file; the result is the same.",
)
@threads_option
@click.option("--overwrite", is_flag=True, help="Replace an existing run folder.")
@click.pass_context
def sweep(
    ctx: click.Context,
    cache: Path | None,
    out: Path | None,
    recipe: str,
    grid: tuple[str, ...],
    views: str,
    manifest: Path | None,
    weights: str | None,
    device: str,
    residency: str,
    threads: int | None,
    overwrite: bool,
    epochs: str,
    **flags: Any,
) -> None:
    """Hold-out, folds, epoch search and the final model, from an activation file (default: the newest in cache/).

    Killed or interrupted, the same command goes on where it was, to the same result.
    """
    names = ("folds", "holdout", "seed", "split_by", "final", "threshold_target", "calibration")
    own = {name: flags.pop(name) for name in names}
    own["split_by"] = by_recipe(ctx, recipe, SweepSpec, "split_by")
    train = TrainSpec(flip="flip" in views, **flags)
    spec = SweepSpec(epochs=parse_epochs(epochs), train=train, **own)
    from . import store
    from . import sweep as sweeps

    if cache is None:
        cache = store.newest(Path("cache"))
        click.echo(f"newest cache: {cache}")
    if recipe == "reference":
        require_reference_cache(store.read_header(cache).meta["spec"]["normalize"])
    cpu.prepare(threads)
    labels = None
    if manifest is not None:
        from . import datasets

        labels = datasets.read(manifest, keep_missing=True)
    job = sweeps.Sweep(
        cache,
        out,
        spec,
        grid_flags=grid,
        device=device,
        residency=residency,
        weights=weights,
        manifest=labels,
        overwrite=overwrite,
    )
    plan = job.plan()
    echo_plan(plan, spec)
    echo_notes(job.data.notes)
    if recipe == "reference":
        echo_recipe(job)
    bar = Progress()
    done = 0

    def show(config: int, fold: int, epoch: Any) -> None:
        nonlocal done
        done += 1
        which = f"configuration {config + 1}/{plan.configurations}, " if plan.configurations > 1 else ""
        which += f"fold {fold + 1}/{spec.folds}" if fold < spec.folds else "refit"
        score = f", validation macro AUC {epoch.valid_auc:.4f} ({epoch.classes} classes)" if epoch.classes else ""
        bar.show(min(done, plan.epochs_in_all), plan.epochs_in_all, f"{which} epoch {epoch.epoch}{score}")

    run = job.run(show)
    bar.done()
    from . import report

    click.echo(describe_run(run))
    written = report.write(job.out)
    click.echo(f"\nrun: {job.out}   report: {written.page}   took {duration(run['seconds'])}")


def by_recipe(ctx: click.Context, recipe: str, cls: type, name: str) -> Any:
    """A flag's value; where it was not given, the recipe's."""
    from click.core import ParameterSource

    given = ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE
    return ctx.params[name] if given or recipe == "default" else reference_value(cls, name)


def require_reference_cache(normalize: str) -> None:
    """The published recipe needs a cache of the published normalisation."""
    wanted = reference_value(CacheSpec, "normalize")
    if normalize != wanted:
        raise InputError(
            f"--recipe reference: this cache was normalised with the {normalize}'s own statistics, the published code "
            f"used {wanted}; make one with `cxrfast cache SOURCE --recipe reference --out OTHER.h5`."
        )


def echo_recipe(job: Any) -> None:
    """Each difference of the published recipe from our defaults."""
    from .config import NOT_RESTORED, from_dict, recipe_differences

    click.echo("the published recipe, where it differs from our defaults:")
    for row in recipe_differences(from_dict(CacheSpec, job.data.file.meta["spec"]), job.spec):
        kept = "" if row["here"] == row["published"] else f", but here {row['here']} by your flag"
        click.echo(f"  {row['field']} {row['published']} instead of {row['default']}{kept}: {row['why']}")
    for text in NOT_RESTORED:
        click.echo(f"  not restored: {text}")


def echo_plan(plan: Any, spec: SweepSpec) -> None:
    """The plan of a sweep, before it starts."""
    count = plan.trainable
    dropped = f", {plan.failed} failed images left out" if plan.failed else ""
    extra = "".join(f", {part} {count[part]:,}" for part in ("norm",) if count.get(part))
    many = f"{plan.configurations} configurations, " if plan.configurations > 1 else ""
    click.echo(
        f"{plan.images:,} images, {plan.groups:,} groups, {plan.classes} classes{dropped}; hold-out "
        f"{plan.holdout_images:,} images; {plan.folds} folds by {spec.split_by}\n"
        f"activations {gigabytes(plan.activation_bytes)} ({plan.where}), on {plan.device}, {plan.precision}\n"
        f"trainable parameters {count['total']:,}: blocks {count['blocks']:,}, head {count['head']:,}{extra}\n"
        f"{many}epochs {','.join(map(str, plan.epochs))} from one run of {plan.epochs[-1]} a fold; final model "
        f"{spec.final}; expected time {duration(plan.seconds)} in all -> {plan.out}"
    )
    if plan.resumed:
        click.echo(f"going on with the unfinished run in {plan.out}.partial")


def echo_notes(notes: Iterable[str]) -> None:
    """What a user should know of the data and nothing went wrong with."""
    for note in notes:
        click.echo(f"note: {note}", err=True)


def parse_epochs(text: str) -> tuple[int, ...]:
    """`30,50,75` to a tuple; duplicates and order are left to the spec's own check."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--epochs: {text!r} is not a list of whole numbers such as 30,50,75.") from error


def describe_run(run: dict[str, Any]) -> str:
    """Fold table, budget table, hold-out figures."""
    budgets = [b["epochs"] for b in run["budgets"]]
    head = ["fold", "images", "classes", *(f"{b} epochs" for b in budgets)]
    rows = [
        [str(f["fold"] + 1), str(f["images"]), str(f["classes_defined"]), *(number(f[f"auc_{b}"]) for b in budgets)]
        for f in run["folds"]
    ]
    best = next(i for i, f in enumerate(run["folds"]) if f["best"])
    lines = ["", "validation macro AUC of each fold", table(head, rows, mark=best), ""]
    rows = [[str(b["epochs"]), number(b["mean_auc"]), number(b["std_auc"])] for b in run["budgets"]]
    chosen = next(i for i, b in enumerate(run["budgets"]) if b["chosen"])
    lines += [table(["epochs", "mean AUC", "std"], rows, mark=chosen), ""]
    if len(run["grid"]) > 1:
        lines += [describe_grid(run), ""]
    lines += [positives_note(run), ""]
    names = {
        "label_accuracy": "label-wise accuracy",
        "macro_auc": "macro AUC",
        "sample_jaccard": "sample-wise Jaccard",
        "class_jaccard": "per-class Jaccard, mean",
        "macro_f1": "macro F1",
        "map": "mAP",
    }
    parts = {"out of fold": run["metrics"]["out_of_fold"], "hold-out": run["metrics"]["holdout"]}
    found = {name: figures for name, figures in parts.items() if figures}
    rows = [[text, *(number(f[key]) for f in found.values())] for key, text in names.items()]
    rows.append(["classes with an AUC", *(f"{f['classes_defined']} of {f['classes_total']}" for f in found.values())])
    rows.append(["images", *(f"{f['n']:,}" for f in found.values())])
    goal = run["spec"]["threshold_target"].replace("f1", "F1")
    lines += [table([f"figure (thresholds from out-of-fold {goal})", *found], rows)]
    if run["finals"]:
        lines += ["", describe_finals(run)]
    if held := parts["hold-out"]:
        said = f" ({run['provenance']})" if run["provenance"] else ""
        lines.append(
            f"\nheld-out macro AUC over the {held['frequent_classes']} classes with at least "
            f"{held['frequent_min_positives']} positives: {number(held['frequent_auc'])}{said}"
        )
    lines.append(NOTICE)
    return "\n".join(lines)


def describe_grid(run: dict[str, Any]) -> str:
    """Every configuration, best first."""
    plain = ("config", "epochs", "mean_auc", "std_auc", "seconds", "chosen")
    fields = [name for name in run["grid"][0] if name not in plain]
    rows = [
        [
            str(r["config"] + 1),
            *(str(r[name]) for name in fields),
            str(r["epochs"]),
            number(r["mean_auc"]),
            number(r["std_auc"]),
            duration(r["seconds"]),
        ]
        for r in run["grid"]
    ]
    chosen = next(i for i, r in enumerate(run["grid"]) if r["chosen"])
    return table(["configuration", *fields, "epochs", "mean AUC", "std", "time"], rows, mark=chosen)


def describe_finals(run: dict[str, Any]) -> str:
    """The hold-out figures of the three final models; the arrow was chosen by flag, not by these."""
    keys = {"macro_auc": "macro AUC", "map": "mAP", "macro_f1": "macro F1", "sample_jaccard": "sample Jaccard"}
    rows = [[kind, *(number(found[key]) for key in keys)] for kind, found in run["finals"].items()]
    chosen = list(run["finals"]).index(run["final"]["kind"])
    return table(["final model, on the hold-out", *keys.values()], rows, mark=chosen)


def positives_note(run: dict[str, Any]) -> str:
    """Positives a fold of every class, as in split.csv."""
    rows = run["split_table"]
    columns = [name for name, value in rows[0].items() if isinstance(value, int)]
    head = ["positives a fold", *(column_name(name) for name in columns)]
    return table(head, [[row["class"], *(f"{row[name]:,}" for name in columns)] for row in rows])


def column_name(name: str) -> str:
    """`fold_0` of split.csv as people count: `fold 1`."""
    return f"fold {int(name[5:]) + 1}" if name.startswith("fold_") else name


def number(value: Any) -> str:
    """Four decimals, or `-` where a figure is undefined."""
    return "-" if value is None else f"{value:.4f}"


@main.command()
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, help="The ONNX file.  [default: RUN/model.fp32.onnx]")
@images_option
def export(run: Path, out: Path | None, images: Path | None) -> None:
    """Write one self-describing ONNX file, kept only when ONNX Runtime and torch agree on real cached images."""
    from . import export as exports

    path, parity, info = exports.export(run, out=out, images=images)
    each = ", ".join(f"batch {b}: {d:.1e}" for b, d in parity.by_batch.items())
    click.echo(f"wrote {path} ({gigabytes(path.stat().st_size)}), {len(info['labels'])} classes")
    click.echo(
        f"largest probability difference to torch on {parity.images} images: {parity.largest:.1e} "
        f"(limit {exports.LIMIT:g}; {each})"
    )
    if parity.cached is not None:
        click.echo(f"largest difference to the sweep's own predictions from stored activations: {parity.cached:.1e}")
    if info["provenance"]:
        click.echo(f"note: {info['provenance'].upper()}")


@main.command()
@click.argument("model", type=PATH)
@click.argument("inputs", nargs=-1, required=True)
@click.option("--out", type=PATH, required=True, help="CSV of path, status, reason and one probability a class.")
@click.option("--decide", is_flag=True, help="Add the findings over their thresholds.")
@device_option
@threads_option
@click.option("--batch-size", type=click.IntRange(1, 4096), default=8, show_default=True, help="Images a model call.")
@click.option("--workers", type=click.IntRange(1, 256), help="Decoding threads.  [default: usable cores]")
def predict(
    model: Path,
    inputs: tuple[str, ...],
    out: Path,
    decide: bool,
    device: str,
    threads: int | None,
    batch_size: int,
    workers: int | None,
) -> None:
    """Probabilities for files, folders (recursive) and globs, from the ONNX file alone; needs no torch."""
    from . import predict as predicting

    predictor = predicting.Predictor(model, device=device, threads=threads)
    paths = predicting.expand(inputs)
    bar = Progress()

    def show(done: int, failed: int) -> None:
        bar.show(done, len(paths), f"{done:,} of {len(paths):,} images, {failed} failed")

    summary = predicting.write_csv(
        predictor, paths, out, batch_size=batch_size, workers=workers, decide=decide, on_result=show
    )
    bar.done()
    good, rate = summary["images"] - summary["failed"], summary["images"] / max(summary["seconds"], 1e-9)
    click.echo(
        f"{good:,} of {summary['images']:,} images predicted in {summary['seconds']:.1f} s ({rate:.1f}/s) "
        f"on {predictor.where}: {out}"
    )
    if predictor.warning:
        click.echo(f"note: {predictor.warning.upper()}: these probabilities say nothing about a patient", err=True)
    if summary["failed"]:
        click.echo(f"{summary['failed']:,} image(s) failed; their rows say why", err=True)
        sys.exit(1)


@main.group()
def bench() -> None:
    """Measure, on this machine."""


@bench.command()
@click.argument("model", type=PATH)
@click.option("--images", type=PATH, help="Folder of images to time.  [default: phantoms at acquisition size]")
@click.option("--repeats", type=click.IntRange(1), default=100, show_default=True, help="Timed images.")
@click.option("--warmup", type=click.IntRange(0), default=5, show_default=True, help="Untimed images first.")
@click.option(
    "--budget-ms",
    type=click.FloatRange(min=0, min_open=True),
    default=100.0,
    show_default=True,
    help="Milliseconds from file to probabilities.",
)
@click.option(
    "--percentile",
    type=click.Choice(["50", "90", "95", "99"]),
    default="90",
    show_default=True,
    help="The percentile that must keep it.",
)
@device_option
@threads_option
@click.option("--json", "json_out", type=PATH, help="Write the result here.")
def latency(
    model: Path,
    images: Path | None,
    repeats: int,
    warmup: int,
    budget_ms: float,
    percentile: str,
    device: str,
    threads: int | None,
    json_out: Path | None,
) -> None:
    """One image at a time: file to probabilities and model only, with a verdict against a budget."""
    from . import bench as benches

    result = benches.latency(
        model,
        images=images,
        repeats=repeats,
        warmup=warmup,
        budget_ms=budget_ms,
        percentile=int(percentile),
        device=device,
        threads=threads,
    )
    click.echo(benches.describe_latency(result))
    if json_out is not None:
        benches.write_json(result, json_out)
        click.echo(f"wrote {json_out}")
    sys.exit(benches.EXIT[result["verdict"]["result"]])


@main.command()
@click.argument("runs", metavar="RUN...", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, help="The comparison of several runs.  [default: FIRST_RUN/comparison.html]")
@click.option(
    "--pool",
    type=click.Choice(["mean", "max"]),
    default="mean",
    show_default=True,
    help="How the views of a study become one probability a class.",
)
@click.option(
    "--resamples",
    type=click.IntRange(0),
    default=1000,
    show_default=True,
    help="Bootstrap resamples of the groups behind every interval; 0 leaves intervals out.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the resamples.")
def report(runs: tuple[Path, ...], out: Path | None, pool: Any, resamples: int, seed: int) -> None:
    """Write RUN/report.html, its model card, CSV and PNG from the run's saved files; of several runs, a comparison too.

    Exit 1 where a saved file is missing or damaged: the page then says what it lacks.
    """
    if out is not None and len(runs) < 2:
        raise InputError("--out: where the comparison of several runs goes; a single run's page goes into its folder.")
    if len(runs) > 1 and resamples < 1:
        raise InputError("--resamples: a comparison needs at least 1; 1000 is usual.")
    from . import report as reports

    pages = reports.write_all(runs, out, resamples=resamples, seed=seed, pool=pool)
    for written in pages:
        click.echo(written.page)
        for line in written.missing if not written.whole else ():
            click.echo(f"  missing: {line}", err=True)
    sys.exit(0 if all(written.whole for written in pages) else 1)


@main.command()
@click.argument("file", type=PATH)
def info(file: Path) -> None:
    """Describe a cache, a run folder, or an ONNX file."""
    from . import info as describing

    click.echo(describing.describe(file))


@main.command()
@click.argument("run_a", type=PATH)
@click.argument("run_b", type=PATH)
@click.option(
    "--part",
    type=click.Choice(["holdout", "out_of_fold"]),
    default="holdout",
    show_default=True,
    help="Which images of the runs.",
)
@click.option("--resamples", type=click.IntRange(100), default=1000, show_default=True, help="Of the groups.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the resamples.")
@click.option("--json", "json_out", type=PATH, help="Write the result here.")
def compare(run_a: Path, run_b: Path, part: Any, resamples: int, seed: int, json_out: Path | None) -> None:
    """Differences of two runs on the images both scored, with paired 95 % intervals over groups."""
    from . import compare as comparing

    result = comparing.compare(run_a, run_b, part=part, resamples=resamples, seed=seed)
    click.echo(describe_comparison(result))
    if json_out is not None:
        from .bench import write_json

        write_json(result, json_out)
        click.echo(f"wrote {json_out}")


def describe_comparison(result: dict[str, Any]) -> str:
    """What was compared, the headline figures, and each class."""
    from .metrics import HEADLINE

    def row(found: dict[str, Any]) -> list[str]:
        low, high = found["low"], found["high"]
        ends = "-" if low is None else f"{low:+.4f} to {high:+.4f}"
        sure = "*" if low is not None and (low > 0 or high < 0) else ""
        change = "-" if found["difference"] is None else f"{found['difference']:+.4f}"
        return [number(found["a"]), number(found["b"]), change, ends, sure]

    head = ["A", "B", "B - A", f"{result['level']:.0%} interval", ""]
    figures = [[HEADLINE[name], *row(found)] for name, found in result["figures"].items()]
    part = result["part"].replace("holdout", "hold-out").replace("_", "-")
    said = {side: f" ({text.upper()})" if (text := result[f"provenance_{side}"]) else "" for side in "ab"}
    lines = [
        f"A: {result['a']}{said['a']}\nB: {result['b']}{said['b']}",
        f"{result['images']:,} {part} images of {result['groups']:,} groups in common; "
        f"{result['only_a']:,} only in A, {result['only_b']:,} only in B",
        "",
        table(["figure", *head], figures),
    ]
    shown = [r for r in result["per_class"] if r["auc"]["difference"] is not None]
    for key, text in (("auc", "AUC"), ("ap", "average precision")):
        rows = [[f"{r['class']} ({r['positives']:,})", *row(r[key])] for r in shown]
        lines += ["", table([f"{text} (positives)", *head], rows)]
    lines += ["", *comparison_notes(result, shown), NOTICE]
    return "\n".join(lines)


def comparison_notes(result: dict[str, Any], shown: list[dict[str, Any]]) -> list[str]:
    """What is left out, and what a star is worth."""
    total, sure = len(result["per_class"]), sum(r["auc"]["low"] is not None for r in shown)
    notes = []
    if left := total - len(shown):
        notes.append(f"{left} of {total} classes have no positive or no negative among these images and are left out.")
    if few := len(shown) - sure:
        notes.append(f"{few} of {total} classes are in too few groups for an interval.")
    notes.append(
        f"* the interval holds no 0; {result['resamples']:,} paired resamples of groups, seed {result['seed']}. Where "
        f"nothing differs, about {sure * (1 - result['level']):.1f} of {sure} AUC intervals are marked by chance."
    )
    return notes


@main.command()
@click.argument("out", type=PATH)
@click.option("--studies", type=click.IntRange(1), default=300, show_default=True, help="Studies to draw.")
@click.option("--size", type=click.IntRange(32, 4096), default=256, show_default=True, help="Pixels a side.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Another seed, other images.")
def phantom(out: Path, studies: int, size: int, seed: int) -> None:
    """Draw synthetic radiographs with planted findings into a folder of the Indiana layout."""
    from . import phantom as phantoms

    count = phantoms.write_dataset(out, studies=studies, size=size, seed=seed)
    click.echo(f"drew {count:,} phantom images of {studies:,} studies in {out}")


if __name__ == "__main__":
    main()
