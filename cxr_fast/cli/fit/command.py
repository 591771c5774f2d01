"""The command from a table or folder to verified model files: parse, call the other commands' functions, print."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...config import CacheSpec, SweepSpec
from ...errors import CxrFastError, InputError
from ...models import device as cpu
from ..cache.command import cache, open_cache_work, read_cache_flags, run_cache_work
from ..cache.reuse import echo_others
from ..console import echo_notes, show, show_plan, took
from ..data import prepare, verify
from ..dataset import choose_columns, describe_manifest
from ..models.export import export, take_earlier
from ..options import PATH, device_option, read_prepared, recipe_option, source_argument, threads_option
from ..training import open_sweep, read_sweep_flags, run_sweep, show_sweep_plan, sweep
from .flags import exit_code, part_context, part_options, stage
from .kept import describe_request, read_kept, write_kept
from .part_times import PartTimes
from .plan import UNKNOWN, ExportWish, describe_fit, expect_parts

if TYPE_CHECKING:
    from ...grid.points import Point

# Of `cache`, what says how SOURCE is read has no prefix; of `verify`, what is for a cache is left out.
SOURCE_FLAGS = ("images", "unindexed", "skip_missing", "blank", "uncertain", "split")
CACHE_ONLY = ("reencode", "images", "weights", "seed")


@click.command()
@source_argument
@click.option("--out", type=PATH, help="The run folder.  [default: exports/NAME]")
@click.option(
    "--from",
    "earlier",
    type=PATH,
    metavar="RUN",
    help="All settings of an earlier run and of its cache: a run folder, its run.json, or an unfinished run; flags go "
    "before them.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@recipe_option
@device_option
@threads_option
@click.pass_context
def fit(ctx: click.Context, source: Path, dry_run: bool, **_: Any) -> None:
    """Do all from films to a verified model file.

    SOURCE is what `cxrfast prepare` takes. This is prepare, cache, sweep, export and verify, with their flags: those
    of prepare as they are, the others with --cache-, --sweep-, --export- and --verify- before the name. --recipe,
    --device and --threads go to every part.
    Killed or interrupted, the same command goes on where it was; what is done is kept. Exit 1 where films failed, or
    a variant that --export-variants names was over its limit.
    """
    from ...report.writer import PAGE

    asked = _read_asked(ctx)
    with stage(ctx, "prepare"):
        click.echo("prepare, 1 of 5")
        manifest = read_prepared(source, asked.prepare, limit=asked.cache["limit"])
        show(describe_manifest(manifest))
        if warning := choose_columns(manifest).warning():
            echo_notes([warning])
    path, failed = _make_cache(asked, manifest)
    if path is None:
        return
    run = _make_run(asked, path)
    if dry_run:
        return
    where, code = _make_models(asked, run)
    click.echo(f"\nreport: {run / PAGE}   {took()}")
    if code == 1:
        click.echo("exit 1: a model file was not kept or does not verify, see above", err=True)
    if failed:
        click.echo(f"exit 1: films failed and were not trained on, listed beside {path}", err=True)
    if code == 0 or (where.is_dir() and any(where.glob("model.*.onnx"))):
        click.echo(f"predict: cxrfast predict {shlex.quote(str(where))} new_films/ --out predictions.csv")
    sys.exit(code or failed)


fit.params += [
    *part_options(prepare, "", "out", "labels_only"),
    *part_options(cache, "cache", "earlier", "dry_run", *SOURCE_FLAGS),
    *part_options(sweep, "sweep", "out", "name", "earlier", "dry_run"),
    *part_options(export, "export", "earlier"),
    *part_options(verify, "verify", *CACHE_ONLY),
]


@dataclass(frozen=True, kw_only=True)
class FitRequest:
    """The request of a fit: the flags of each part by their names there, and what they ask for."""

    ctx: click.Context
    out: Path | None
    prepare: dict[str, Any]
    cache: dict[str, Any]
    cache_spec: CacheSpec
    sweep: dict[str, Any]
    sweep_spec: SweepSpec
    points: list[Point]
    before: Any  # the run of --from
    export: click.Context
    part_times: PartTimes

    @property
    def wish(self) -> ExportWish:
        """What will be exported."""
        flags, spec = self.export.params, self.sweep_spec
        several = (flags["final"] or spec.final) in ("ensemble", "retrained")
        return ExportWish(
            variants=flags["variants"].split(","),
            films=flags["check"],
            models=spec.folds if several else 1,
            views=1 + ((flags["tta"] or spec.train.tta) == "flip"),
        )


def _read_asked(ctx: click.Context) -> FitRequest:
    """The flags of all parts, checked as far as they can be before anything long."""
    from ...grid.points import make_points

    own = dict(ctx.params)
    with stage(ctx, "cache"):
        told = part_context(ctx, cache, "cache", dry_run=ctx.params["dry_run"])
        cache_flags, cache_spec = read_cache_flags(told, told.params["recipe"], told.params)
    with stage(ctx, "sweep"):
        told = part_context(ctx, sweep, "sweep", cache=None, name=None)
        spec, before = read_sweep_flags(told, told.params["recipe"], told.params)
        sweep_flags = told.params
        points = make_points(spec.train, sweep_flags["grid"], seed=spec.seed, trials=sweep_flags["trials"])
    with stage(ctx, "export"):
        export_flags = _read_export_flags(ctx)
    for part, flags in (("cache", cache_flags), ("sweep", sweep_flags)):
        with stage(ctx, part):
            if not flags["cluster"]:
                cpu.pick_device(flags["device"])
    prepare_flags = part_context(ctx, prepare, "", out=None, labels_only=False).params
    return FitRequest(
        ctx=ctx,
        out=own["out"] or (None if before is None else before.out),
        prepare=prepare_flags | {name: cache_flags[name] for name in ("blank", "uncertain")},
        cache=cache_flags,
        cache_spec=cache_spec,
        sweep=sweep_flags,
        sweep_spec=spec,
        points=points,
        before=before,
        export=export_flags,
        part_times=PartTimes({}),
    )


def _read_export_flags(ctx: click.Context) -> click.Context:
    """The flags of `export`; where --from names a run with model files, those that are not given are as it exported."""
    from ...inference.model_file import split_variants

    earlier: Path | None = ctx.params["earlier"]
    if earlier is not None:
        earlier = earlier.parent if earlier.name in ("run.json", "plan.json") else earlier
        earlier = earlier if any(earlier.glob("model.*.onnx")) else None
    told = part_context(ctx, export, "export", run=None, earlier=earlier)
    try:
        take_earlier(told, told.params)
    except InputError as error:  # of an older version, or exported in several ways
        echo_notes([f"the export is not as that run's: {error}"])
    told.params |= {"earlier": None, "variants": ",".join(split_variants(told.params["variants"]))}
    return told


def _make_cache(asked: FitRequest, manifest: Any) -> tuple[Path | None, int]:
    """Show the plan and make the cache; where it is (None after --dry-run without one), and 1 where films failed."""
    ctx, flags, spec, points = asked.ctx, asked.cache, asked.sweep_spec, asked.points
    with stage(ctx, "cache", "2 of 5"), open_cache_work(manifest, flags["out"], asked.cache_spec, flags) as work:
        path: Path = work.job.out
        click.echo("timing a few calls of each part, for the plan", err=True)
        with stage(ctx, "sweep"):
            device = None if asked.sweep["cluster"] else asked.sweep["device"]
            asked.part_times.expected |= expect_parts(work, spec, points, device, asked.wish).expected
        click.echo()
        show_plan(describe_fit(work, spec, points, asked.out, asked.wish, asked.part_times))
        echo_others(ctx, work, "--cache-reuse")
        if ctx.params["dry_run"]:
            return (path if path.exists() else None), 0
        click.echo("\ncache, 2 of 5")
        with stage(ctx, "cache", "2 of 5", asked.part_times):
            return path, exit_code(lambda: run_cache_work(work))


def _make_run(asked: FitRequest, path: Path) -> Path:
    """Train, unless a finished run of these very settings exists; the run folder."""
    out, overwrite, part_times = asked.out, asked.sweep["overwrite"], asked.part_times
    taken = out is not None and (out / "run.json").is_file()
    click.echo("\nsweep, 3 of 5")
    with (
        stage(asked.ctx, "sweep", "3 of 5", part_times),
        # A finished run is first compared with what is asked for; it is replaced only by the user's own flag.
        open_sweep(path, out, asked.sweep_spec, asked.sweep | {"overwrite": overwrite or taken}) as job,
    ):
        found: Path | None = job.find_finished()
        if found is not None:
            click.echo(f"{found} is a finished run of the same settings and films: kept")
            return found
        if taken and not overwrite:
            raise InputError(f"--out: {out} is a run of other settings or films; give another --out, or --overwrite.")
        plan = show_sweep_plan(job, asked.sweep["recipe"], asked.before)
        part_times.expected["sweep"] = plan.seconds
        done = ", less what the unfinished run holds" if plan.resumed else ""
        click.echo(f"from here on: {part_times.describe()}{done}; {UNKNOWN}")
        if not asked.ctx.params["dry_run"]:
            part_times.begin("sweep")
            run_sweep(job, plan, asked.sweep)
        made: Path = job.out
        return made


def _make_models(asked: FitRequest, run: Path) -> tuple[Path, int]:
    """Export and verify, unless files of these very settings exist and verify; where they are, and the exit code."""
    from ...report.writer import write_report

    ctx, told = asked.ctx, asked.export
    where = ctx.params["export_out"] or run
    told.params |= {"run": run, "out": where}
    request = describe_request(run, told.params)
    known = read_kept(run, request)
    if known is not None:
        click.echo("\nexport, 4 of 5: files of the same settings exist and are verified")
        if _verify(asked, where) == 0:
            return where, known
        click.echo("they are not as they were written, and are exported again")
    click.echo("\nexport, 4 of 5")
    with stage(ctx, "export", "4 of 5", asked.part_times):
        code = exit_code(lambda: export.invoke(told))
    files = [where] if where.suffix == ".onnx" else sorted(where.glob("model.*.onnx"))
    write_report(run)
    write_kept(run, request, files, code)
    return where, (_verify(asked, where) if files else 0) or code


def _verify(asked: FitRequest, where: Path) -> int:
    """Verify model files; the exit code of `verify`, with its error shown."""
    click.echo("\nverify, 5 of 5")
    unused = dict.fromkeys(CACHE_ONLY)
    told = part_context(asked.ctx, verify, "verify", file=where, **unused)
    try:
        with stage(asked.ctx, "verify", "5 of 5", asked.part_times):
            return exit_code(lambda: verify.invoke(told))
    except CxrFastError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
