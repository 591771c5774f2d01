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

from . import __version__
from .config import CacheSpec, PreprocessSpec, SweepSpec, TrainSpec, choices, default
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
    kind = kwargs.pop("type", kind)
    flag = flag or "--" + name.replace("_", "-")
    return click.option(flag, name, default=value, show_default=value is not None, type=kind, help=help, **kwargs)


threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    help="Threads of the model; fewer on a shared machine.  [default: usable cores]",
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
def cache(
    source: Path,
    out: Path | None,
    weights: str,
    unfreeze_blocks: int,
    views: str,
    resize: Any,
    dicom_policy: Any,
    normalize: Any,
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
        normalize=normalize,
        dtype=dtype,
        preprocess=PreprocessSpec(resize=resize, dicom_policy=dicom_policy),
    )
    from . import datasets

    manifest = datasets.read(source, images=images, skip_missing=skip_missing, unindexed=unindexed, limit=limit)
    from . import backbone as backbones
    from . import encode

    encode.pick_device(device)
    use_threads(threads)
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


def use_threads(threads: int | None) -> None:
    """Size torch's thread pool from affinity and cgroup quota, not from the host."""
    import torch

    from . import timing

    torch.set_num_threads(threads or timing.cpu_count())


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

    use_threads(threads)
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
@setting(SweepSpec, "epochs", "Budgets of the search; one run a fold passes through all of them.")
@setting(SweepSpec, "folds", "Folds of the cross-validation.", type=int)
@setting(SweepSpec, "holdout", "Share of the groups kept out until the end.", type=float)
@setting(SweepSpec, "seed", "Decides splits, initialisation and every draw.", type=int)
@setting(SweepSpec, "split_by", "What may not be shared between folds; image splits views of one patient.")
@setting(TrainSpec, "lr", "Learning rate of AdamW.", type=float)
@setting(TrainSpec, "weight_decay", "Weight decay of AdamW.", type=float)
@setting(TrainSpec, "batch_size", "Images a step.", type=int)
@setting(TrainSpec, "clip_norm", "Gradient norm limit.", type=float)
@setting(TrainSpec, "loss", "Loss.")
@setting(TrainSpec, "focal_alpha", "Focal loss: weight of positives.", type=float)
@setting(TrainSpec, "focal_gamma", "Focal loss: focusing exponent.", type=float)
@setting(TrainSpec, "dropout", "Dropout in the head.", type=float)
@click.option("--flip/--no-flip", default=default(TrainSpec, "flip"), show_default=True, help="Draw the flipped view.")
@setting(TrainSpec, "scheduler", "Learning-rate schedule on validation macro AUC.")
@setting(TrainSpec, "patience", "Stop a fold after this many epochs without a better AUC.", type=int)
@setting(TrainSpec, "precision", "Arithmetic of training; validation of the chosen model is always float32.")
@click.option("--manifest", type=PATH, help="Other labels and groups for the same images (dataset folder or manifest).")
@click.option("--weights", help="Where the backbone is now, if not where the cache found it.")
@device_option
@threads_option
@click.option("--overwrite", is_flag=True, help="Replace an existing run folder.")
def sweep(
    cache: Path | None,
    out: Path | None,
    manifest: Path | None,
    weights: str | None,
    device: str,
    threads: int | None,
    overwrite: bool,
    epochs: str,
    **flags: Any,
) -> None:
    """Hold-out, folds, epoch search and the final model, from an activation file (default: the newest in cache/)."""
    own = {name: flags.pop(name) for name in ("folds", "holdout", "seed", "split_by")}
    spec = SweepSpec(epochs=parse_epochs(epochs), train=TrainSpec(**flags), **own)
    from . import store
    from . import sweep as sweeps

    if cache is None:
        cache = store.newest(Path("cache"))
        click.echo(f"newest cache: {cache}")
    path = out or free_name(Path("exports") / cache.stem)
    use_threads(threads)
    labels = None
    if manifest is not None:
        from . import datasets

        labels = datasets.read(manifest, keep_missing=True)
    job = sweeps.Sweep(cache, path, spec, device=device, weights=weights, manifest=labels, overwrite=overwrite)
    plan = job.plan()
    echo_plan(plan, spec)
    echo_notes(job.data.notes)
    bar = Progress()
    whole = spec.folds * spec.epochs[-1]

    def show(fold: int, epoch: Any) -> None:
        text = f"fold {fold + 1}/{spec.folds} epoch {epoch.epoch}/{spec.epochs[-1]}, validation macro AUC "
        bar.show(fold * spec.epochs[-1] + epoch.epoch, whole, text + f"{epoch.valid_auc:.4f} ({epoch.classes} classes)")

    run = job.run(show)
    bar.done()
    from . import report

    page = report.write(path)
    click.echo(describe_run(run))
    click.echo(f"\nrun: {path}   report: {page}   took {duration(run['seconds'])}")


def echo_plan(plan: Any, spec: SweepSpec) -> None:
    """The plan of a sweep, before it starts."""
    count = plan.trainable
    dropped = f", {plan.failed} failed images left out" if plan.failed else ""
    click.echo(
        f"{plan.images:,} images, {plan.groups:,} groups, {plan.classes} classes{dropped}; hold-out "
        f"{plan.holdout_images:,} images; {plan.folds} folds by {spec.split_by}\n"
        f"activations {gigabytes(plan.activation_bytes)} ({plan.where}), on {plan.device}, {plan.precision}\n"
        f"trainable parameters {count['total']:,}: blocks {count['blocks']:,}, head {count['head']:,}\n"
        f"epochs {','.join(map(str, plan.epochs))} from one run of {plan.epochs[-1]} a fold; "
        f"expected time {duration(plan.seconds)}"
    )


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


def free_name(path: Path) -> Path:
    """`path`, or `path-2`, `path-3`, ... where it exists."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


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
    lines += [table(["figure (thresholds from out-of-fold F1)", *found], rows)]
    if held := parts["hold-out"]:
        said = f" ({run['provenance']})" if run["provenance"] else ""
        lines.append(
            f"\nheld-out macro AUC over the {held['frequent_classes']} classes with at least "
            f"{held['frequent_min_positives']} positives: {number(held['frequent_auc'])}{said}"
        )
    lines.append(NOTICE)
    return "\n".join(lines)


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
@click.argument("run", type=PATH)
def report(run: Path) -> None:
    """Write RUN/report.html from the run's saved files."""
    from . import report as reports

    click.echo(reports.write(run))


@main.command()
@click.argument("file", type=PATH)
def info(file: Path) -> None:
    """Describe a cache, a run folder, or an ONNX file."""
    from . import info as describing

    click.echo(describing.describe(file))


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
