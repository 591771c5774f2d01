"""Commands that train and compare: parse, call one function, print."""

from __future__ import annotations

import contextlib
import math
import sys
from pathlib import Path
from typing import Any

import click

from ..cluster import connection
from ..config import (
    NOTICE,
    CacheSpec,
    SweepSpec,
    TrainSpec,
    default,
    reference_value,
)
from ..errors import InputError
from ..models import device as cpu
from ..system.text import duration, gigabytes, number, table
from .options import (
    PATH,
    Progress,
    by_recipe,
    cluster_option,
    device_option,
    echo_notes,
    recipe_option,
    setting,
    threads_option,
)


@click.command()
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
@setting(TrainSpec, "shuffle", "Order of an epoch: any, or neighbours in the file together, for caches read from disk.")
@setting(TrainSpec, "shuffle_block", "--shuffle block: neighbouring rows that stay together, read in one go.", type=int)
@setting(TrainSpec, "shuffle_window", "--shuffle block: blocks from all over the file whose rows are mixed.", type=int)
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
@cluster_option
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
    cluster: str | None,
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
    for axis in (flag.partition("=")[0] for flag in grid):
        if ctx.get_parameter_source(axis) == click.core.ParameterSource.COMMANDLINE:
            raise InputError(f"--{axis.replace('_', '-')} and --grid {axis}=... both say it; leave one of them out.")
    spec = SweepSpec(epochs=parse_epochs(epochs), train=train, **own)
    from ..activations import cache as index
    from ..cluster import search
    from ..training import sweep as sweeps

    if cache is None:
        cache = index.newest(Path("cache"))
        click.echo(f"newest cache: {cache}")
    if recipe == "reference":
        require_reference_cache(index.open_cache(cache, partial=True).meta["spec"]["normalize"])
    cpu.prepare(threads)
    labels = None
    if manifest is not None:
        from ..data import manifest as datasets

        labels = datasets.read_dataset(manifest, missing="keep")
    with contextlib.nullcontext() if cluster is None else connection.connect(cluster) as joined:
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
            trainers=None if joined is None else search.ClusterTrainers(joined),
        )
        echo_plan(plan := job.plan(), spec)
        shuffles = {str(train.shuffle) for _, train in job.points}
        echo_notes(streaming_notes(job.activations.residency, plan.activation_bytes, shuffles))
        echo_notes((*job.data.notes, *plan.notes))
        if recipe == "reference":
            echo_recipe(job)
        bar = Progress()
        run = job.run(epoch_line(bar, plan, spec))
        bar.done()
    if lost := run.get("cluster", {}).get("lost"):
        click.echo(f"note: lost during the search: node {', '.join(lost)}; others did its folds", err=True)
    from ..report import writer

    click.echo(describe_run(run))
    written = writer.write(job.out)
    click.echo(f"\nrun: {job.out}   report: {written.page}   took {duration(run['seconds'])}")


def epoch_line(bar: Progress, plan: Any, spec: SweepSpec) -> Any:
    """What shows each epoch as it is trained: (configuration, fold, epoch)."""
    done = 0

    def show(config: int, fold: int, epoch: Any) -> None:
        nonlocal done
        done += 1
        which = f"configuration {config + 1}/{plan.configurations}, " if plan.configurations > 1 else ""
        which += f"fold {fold + 1}/{spec.folds}" if fold < spec.folds else "refit"
        score = f", validation macro AUC {epoch.valid_auc:.4f} ({epoch.classes} classes)" if epoch.classes else ""
        bar.show(min(done, plan.epochs_in_all), plan.epochs_in_all, f"{which} epoch {epoch.epoch}{score}")

    return show


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
    from ..config import NOT_RESTORED, from_dict, recipe_differences

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
    time = "unknown (no GPU here to time a step on)" if math.isnan(plan.seconds) else duration(plan.seconds)
    click.echo(
        f"{plan.images:,} images, {plan.groups:,} groups, {plan.classes} classes{dropped}; hold-out "
        f"{plan.holdout_images:,} images; {plan.folds} folds by {spec.split_by}\n"
        f"activations {gigabytes(plan.activation_bytes)} ({plan.where}), on {plan.device}, {plan.precision}\n"
        f"trainable parameters {count['total']:,}: blocks {count['blocks']:,}, head {count['head']:,}{extra}\n"
        f"{many}epochs {','.join(map(str, plan.epochs))} from one run of {plan.epochs[-1]} a fold; final model "
        f"{spec.final}; expected time {time} in all -> {plan.out}"
    )
    if plan.cluster:
        click.echo(f"cluster: {plan.cluster}")
    if plan.resumed:
        click.echo(f"going on with the unfinished run in {plan.out}.partial")


def streaming_notes(residency: str, size: int, shuffles: set[str]) -> list[str]:
    """A hint where each epoch will read a cache larger than memory in an order that no disk likes."""
    from ..activations.loader import SHARE
    from ..system import hardware

    if residency != "stream" or "full" not in shuffles or size < SHARE * hardware.memory_available():
        return []
    return [
        "every epoch reads rows from all over a cache larger than memory; --shuffle block reads neighbours together, "
        "which slow and shared disks need (it changes the order of training, and so the figures)"
    ]


def parse_epochs(text: str) -> tuple[int, ...]:
    """`30,50,75` to a tuple; duplicates and order are left to the spec's own check."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--epochs: {text!r} is not a list of whole numbers such as 30,50,75.") from error


def describe_run(run: dict[str, Any]) -> str:
    """Fold table, budget table, hold-out figures."""
    from ..metrics import calibration

    budgets = [b["epochs"] for b in run["budgets"]]
    head = ["fold", "images", "classes", *(f"{b} epochs" for b in budgets)]
    rows = [
        [str(f["fold"] + 1), str(f["images"]), str(f["classes_defined"]), *(number(f[f"auc_{b}"]) for b in budgets)]
        for f in run["folds"]
    ]
    best = next(i for i, f in enumerate(run["folds"]) if f["best"])
    lines = ["", "validation macro AUC of each fold", table(head, rows, mark=best, name="best"), ""]
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
    if run["calibration"]:
        lines += ["", f"calibration: {calibration.describe(run['calibration'], len(run['classes']))}"]
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
    """`fold_0` of split.csv as people count, `fold 1`, and the hold-out spelled as everywhere."""
    return f"fold {int(name[5:]) + 1}" if name.startswith("fold_") else name.replace("holdout", "hold-out")


@click.command()
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
    from ..report import writer as reports

    pages = reports.write_all(runs, out, resamples=resamples, seed=seed, pool=pool)
    for written in pages:
        click.echo(written.page)
        for line in written.missing if not written.whole else ():
            click.echo(f"  missing: {line}", err=True)
    sys.exit(0 if all(written.whole for written in pages) else 1)


@click.command()
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
    from ..report import comparison

    result = comparison.compare(run_a, run_b, part=part, resamples=resamples, seed=seed)
    click.echo(describe_comparison(result))
    if json_out is not None:
        from ..bench.latency import write_json

        write_json(result, json_out)
        click.echo(f"wrote {json_out}")


def describe_comparison(result: dict[str, Any]) -> str:
    """What was compared, the headline figures, and each class."""
    from ..metrics.figures import HEADLINE

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
    star = f"* the interval holds no 0; {result['resamples']:,} paired resamples of groups, seed {result['seed']}."
    chance = f"about {sure * (1 - result['level']):.1f} of {sure} AUC intervals are marked by chance."
    notes.append(f"{star} Where nothing differs, {chance}" if sure else star)
    return notes
