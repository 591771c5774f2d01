"""The command that trains: parse, call one function, print."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ..cluster import connection
from ..config import CacheSpec, SweepOptions, SweepSpec, TrainSpec, default
from ..errors import InputError
from ..models import device as cpu
from ..recipes import NOT_RESTORED, RECIPES, recipe_differences, reference_value
from ..runs.changes import place_run
from .console import EpochProgress, ProgressBar, echo_notes, show, show_plan, took
from .describe.sweep import describe_plan, describe_run, faster_first, streaming_notes
from .options import (
    PATH,
    cluster_option,
    device_option,
    recipe_option,
    spec_from,
    spec_options,
    threads_option,
    with_recipe,
)


@click.command()
@click.argument("cache", type=PATH, required=False)
@click.option("--out", type=PATH, help="The run folder.  [default: exports/NAME]")
@click.option("--name", help="Name of the run: short for --out exports/NAME.")
@click.option("--note", metavar="TEXT", help="A line that `cxrfast runs` shows beside the run.")
@click.option(
    "--from",
    "earlier",
    type=PATH,
    metavar="RUN",
    help="All settings, and the cache, of a run folder, its run.json, or an unfinished run; flags go before them.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan, and what differs from --from, and stop.")
@recipe_option
@spec_options(SweepSpec, "epochs", "folds", "holdout", "seed", "split_by", "split", "split_method")
@click.option(
    "--holdout-list", metavar="FILE", help="Hold out these (an image or a group per line), train on the rest."
)
@click.option("--split-from", metavar="RUN", help="Keep a run's hold-out and folds; new groups are drawn into them.")
@click.option(
    "--grid",
    multiple=True,
    metavar="NAME=A,B",
    help="Try each value of a training field, such as lr=1e-5,2e-5 or seed=0..4; several flags: every combination. "
    "With --trials also a range to draw from: dropout=0.1..0.6, lr=1e-5..1e-3:log.",
)
@click.option(
    "--trials", type=click.IntRange(1), metavar="N", help="Train N random draws from --grid, each on every seed."
)
@spec_options(SweepSpec, "retrain_head", "final", "threshold_target", "calibration")
@spec_options(TrainSpec, "lr", "head_lr", "layer_decay", "train_blocks", "head_first")
@spec_options(TrainSpec, "weight_decay", "batch_size", "clip_norm", "loss", "focal_alpha", "focal_gamma")
@spec_options(TrainSpec, "asl_gamma_neg", "asl_gamma_pos", "asl_clip", "ldam_margin", "logit_adjustment")
@spec_options(TrainSpec, "label_smoothing", "class_weights", "sampling", "dropout", "ema")
@click.option(
    "--views",
    type=click.Choice(["plain,flip", "plain"]),
    default="plain,flip" if default(TrainSpec, "flip") else "plain",
    show_default=True,
    help="Views to train on: half the samples of an epoch are the flipped ones, or none.",
)
@spec_options(
    TrainSpec, "tta", "scheduler", "plateau_factor", "plateau_patience", "patience", "train_norm", "precision"
)
@spec_options(TrainSpec, "shuffle", "shuffle_block", "shuffle_window")
@click.option("--manifest", type=PATH, help="Other labels and groups for the same images (dataset folder or manifest).")
@click.option(
    "--corrections",
    metavar="FILE",
    help="Labels to flip or to make unknown: a list saved from a review, or suspects.csv with its marks filled in.",
)
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
@cluster_option
@click.option(
    "--log",
    multiple=True,
    metavar="KIND[:WHERE]",
    help="Also log every epoch: tensorboard[:FOLDER], mlflow[:ADDRESS], wandb[:PROJECT]; local unless told.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing run folder.")
@click.pass_context
def sweep(ctx: click.Context, cache: Path | None, out: Path | None, **flags: Any) -> None:
    """Train folds, search over epochs, score the hold-out once.

    CACHE is an activation file (default: the newest in cache/); the result is a run folder with the final model.
    Killed or interrupted, the same command goes on where it was, to the same result.
    """
    out, recipe = place_run(out, flags["name"]), flags["recipe"]
    spec, before = read_sweep_flags(ctx, recipe, flags)
    if before is not None:
        cache, out = cache or before.existing_cache(), out or before.out
    from ..activations.cache import newest
    from ..report.writer import lacks_report

    if cache is None:
        cache = newest(Path("cache"))
        click.echo(f"newest cache: {cache}")
    left = out is not None and not flags["overwrite"] and lacks_report(out)
    with open_sweep(cache, out, spec, flags | {"overwrite": flags["overwrite"] or left}) as job:
        if not flags["overwrite"] and _report_finished(job, flags):
            return
        if left:
            raise InputError(f"--out: {out} exists; give another --out, or pass --overwrite.")
        plan = show_sweep_plan(job, recipe, before)
        if not flags["dry_run"]:
            run_sweep(job, plan, flags)
        elif len(job.points) > 1:
            from ..report.configurations.grid_tables import points_table

            show(["", points_table(job.points)])


def read_sweep_flags(ctx: click.Context, recipe: str, flags: dict[str, Any]) -> tuple[SweepSpec, Any]:
    """What the flags of `sweep` ask for, and the run of --from; what that says is put into `flags`."""
    before = None if flags["earlier"] is None else _take_earlier(ctx, flags)
    return _sweep_spec(ctx, recipe, flags), before


@contextlib.contextmanager
def open_sweep(cache: Path, out: Path | None, spec: SweepSpec, flags: Mapping[str, Any]) -> Iterator[Any]:
    """Read the cache, join the cluster if one is named, and make a `Sweep`; nothing is written."""
    from ..activations.cache import open_cache
    from ..cluster.search import ClusterTrainers
    from ..runs.sweep import Sweep

    if flags["recipe"] == "reference":
        require_reference_cache(open_cache(cache, partial=True).meta["spec"]["normalize"])
    cpu.prepare(flags["threads"])
    labels = _other_labels(flags["manifest"])
    cluster = flags["cluster"]
    with contextlib.nullcontext() if cluster is None else connection.connect(cluster) as joined:
        yield Sweep(
            cache,
            out,
            spec,
            SweepOptions(**{name: flags[name] for name in _OPTIONS}),
            manifest=labels,
            trainers=None if joined is None else ClusterTrainers(joined),
        )


def run_sweep(job: Any, plan: Any, flags: Mapping[str, Any]) -> None:
    """Train, and write the run folder with its report; show figures, and progress on the way."""
    from ..loggers.choose import describe_sweep, open_loggers

    with contextlib.ExitStack() as stack:
        loggers = open_loggers(flags["log"], describe_sweep(job), lambda text: echo_notes([text]))
        stack.callback(loggers.close)
        bar = ProgressBar()
        progress = EpochProgress(bar, plan, job.spec)

        def on_epoch(config: int, fold: int, epoch: Any) -> None:
            progress.show(config, fold, epoch)
            loggers.log_epoch(config, fold, epoch)

        run = job.run(on_epoch, report=False)
        bar.done()
        _finish(job.out, run, flags["note"])
        loggers.log_run(run, job.out)


def _report_finished(job: Any, flags: Mapping[str, Any]) -> bool:
    """Finish a run of this very request that only lacks its report, or with --dry-run only say so; whether there is
    one."""
    from ..report.writer import lacks_report
    from ..training.run_folder import read_info

    found: Path | None = job.find_finished()
    if found is None or not lacks_report(found):
        return False
    click.echo(f"{found} is trained; it lacks its report")
    if not flags["dry_run"]:
        if flags["log"]:
            echo_notes(["--log: the run was trained by an earlier call, so nothing is logged now"])
        _finish(found, read_info(found), flags["note"])
    return True


def _finish(out: Path, run: dict[str, Any], note: str | None) -> None:
    """Write note and report of a finished run, and show its figures."""
    from ..runs.note import write_note
    from ..runs.sweep import report_run

    if lost := run.get("cluster", {}).get("lost"):
        click.echo(f"note: node {', '.join(lost)} was lost during the search; other nodes trained its folds", err=True)
    if note:
        write_note(out, note)
    show(describe_run(run))
    written = report_run(out)
    click.echo(f"\nrun: {out}   report: {written.page}   {took()}")


def show_sweep_plan(job: Any, recipe: str, before: Any) -> Any:
    """Say what a sweep will do, and what differs from the run of --from; its plan."""
    from ..runs import request

    spec = job.spec
    if job.runs_blocks_first:
        click.echo("running the blocks that stay frozen once over all images, before the plan", err=True)
    plan = job.plan()
    show_plan(describe_plan(plan, spec))
    shuffles = {str(point.train.shuffle) for point in job.points}
    echo_notes(streaming_notes(job.activations.residency, plan.activation_bytes, shuffles))
    echo_notes((*job.data.notes, *plan.notes, *faster_first(plan, spec, recipe)))
    echo_recipe(job, recipe)
    if before is not None:
        changes = request.describe_changes(before, spec, job.options.grid, job.options.trials)
        click.echo(f"settings of {before.source}" + (f", but {'; '.join(changes)}" if changes else ", all of them"))
    return plan


_OPTIONS = (
    "device",
    "residency",
    "weights",
    "grid",
    "trials",
    "overwrite",
    "holdout_list",
    "split_from",
    "corrections",
)


def _sweep_spec(ctx: click.Context, recipe: str, flags: dict[str, Any]) -> SweepSpec:
    from ..grid.axes import SEED

    for axis in (flag.partition("=")[0] for flag in flags["grid"]):
        if axis != SEED and ctx.get_parameter_source(axis) == click.core.ParameterSource.COMMANDLINE:
            flag = f"--{axis.replace('_', '-')}"
            raise InputError(f"{flag} and --grid {axis}=... set the same field; leave one of them out.")
    from ..training.operating_points import read_target

    flags = with_recipe(ctx, recipe, flags)
    if flags["split_from"] is not None:
        flags |= _as_in_run(ctx, Path(flags["split_from"]))
    flags["threshold_target"] = read_target(flags["threshold_target"])
    train = spec_from(TrainSpec, flags, flip="flip" in flags["views"])
    return spec_from(SweepSpec, flags, train=train)


def _take_earlier(ctx: click.Context, flags: dict[str, Any]) -> Any:
    """Put the settings of the run of --from into the flags that were not given; the run's request."""
    from ..runs import request

    def given(name: str) -> bool:
        return ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE

    if given("recipe"):
        raise InputError("--from and --recipe each name all settings; leave one of them out.")
    named = [name for name in ("manifest", "corrections") if flags[name] is not None]
    if lacking := request.lacking_labels(flags["earlier"], named):
        raise InputError(f"--from: that run's labels came from {lacking} too; give it again.")
    before = request.read_request(flags["earlier"])
    own = before.flags()
    if given("holdout_list") or given("split_from"):
        own.pop("split_from", None)
    flags.update({name: value for name, value in own.items() if not given(name)})
    return before


def _as_in_run(ctx: click.Context, run: Path) -> dict[str, Any]:
    """Folds, share and unit of the run that --split-from names, where no flag gives them."""
    from ..training.run_folder import read_info

    spec = read_info(run)["spec"]
    given = click.core.ParameterSource.COMMANDLINE
    names = [name for name in ("folds", "holdout", "split_by") if ctx.get_parameter_source(name) != given]
    return {name: spec[name] for name in names}


def _other_labels(manifest: Path | None) -> Any:
    """The labels of --manifest; images that are not found keep their names, so that a cache's can be matched."""
    from ..data.manifest import read_dataset
    from ..data.tables.corrections import is_corrections

    if manifest is None:
        return None
    if is_corrections(manifest):
        raise InputError(f"--manifest: {manifest} is a list of marked labels; give it with --corrections {manifest}")
    read = read_dataset(manifest, missing="keep")
    echo_notes(read.notes)
    return read


def require_reference_cache(normalize: str) -> None:
    """The published recipe needs a cache of the published normalisation."""
    wanted = reference_value(CacheSpec, "normalize")
    if normalize != wanted:
        raise InputError(
            f"--recipe reference: this cache was normalised with the {normalize}'s own statistics, the published code "
            f"used {wanted}; make one with `cxrfast cache SOURCE --recipe reference --out OTHER.h5`."
        )


def echo_recipe(job: Any, recipe: str) -> None:
    """Each field in which a recipe differs from our defaults, and why; nothing for the default."""
    from ..config import from_dict, to_dict

    if recipe == "reference":
        click.echo("the published recipe, where it differs from our defaults:")
        for row in recipe_differences(from_dict(CacheSpec, job.data.file.meta["spec"]), job.spec):
            kept = "" if row["here"] == row["published"] else f", but here {row['here']} by your flag"
            click.echo(f"  {row['field']} {row['published']} instead of {row['default']}{kept}: {row['why']}")
        for text in NOT_RESTORED:
            click.echo(f"  not restored: {text}")
    elif RECIPES[recipe]:
        click.echo(f"the recipe {recipe}, where it differs from our defaults:")
        given = to_dict(job.spec)
        for cls, name, value, why in RECIPES[recipe]:
            here = (given["train"] if cls == "TrainSpec" else given)[name]
            value, here = (",".join(map(str, v)) if isinstance(v, tuple | list) else v for v in (value, here))
            kept = "" if here == value else f", but here {here} by your flag"
            click.echo(f"  {name} {value}{kept}: {why}")
