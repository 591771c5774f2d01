"""What commands share: options, and errors as one or two lines."""

from __future__ import annotations

import csv
import dataclasses
import errno
import math
import os
import signal
import sys
import tempfile
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..data.labels import SOFT, Blank, LabelRules, Uncertain
from ..errors import CxrFastError, InputError
from ..recipes import RECIPES
from ..system import extras
from .console import ProgressBar, echo_notes

if TYPE_CHECKING:
    from ..data.manifest import Manifest
    from ..data.tables.columns import TableSpec

T = TypeVar("T")
PATH = click.Path(path_type=Path)
# What a disk says that refuses a file; where no closer place names the flag, the line names the file.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EISDIR)


class FiniteFloat(click.FloatRange):
    """A number within a range; `nan` and `inf`, which click takes and no limit refuses, are none."""

    name = "float range"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the float. Fails as click's own types do."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Group(click.Group):
    """A plain group that turns this package's errors into one or two lines and their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        # So that half-written files are cleaned up; a shell starts what runs behind `&` with SIGINT ignored.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler)
        try:
            try:
                return super().invoke(ctx)
            finally:
                ProgressBar.close()
        except CxrFastError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except ModuleNotFoundError as error:
            if not (library := extras.missing(error)):
                raise
            command = f"{ctx.command_path} {ctx.invoked_subcommand or ''}".strip()
            click.echo(f"error: `{command}` {extras.needs(library)}", err=True)
            ctx.exit(2)
        except click.UsageError as error:
            if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
                raise
            usage = error.ctx.command_path if error.ctx else "cxrfast"
            click.echo(f"error: {error.format_message()}\n`{usage} --help` lists what it takes.", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("interrupted; no file was left half written, run the same command again to go on", err=True)
            ctx.exit(130)
        except (MemoryError, RuntimeError) as error:
            if not (whose := full_memory(error)):
                raise
            why = str(error).partition("\n")[0][:120]
            mend = "try a smaller --batch-size, for a sweep also --residency stream."
            click.echo(f"error: {whose} memory is full ({why}); {mend}", err=True)
            ctx.exit(2)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)
        except OSError as error:
            if error.errno not in DISK:
                raise
            where = error.filename or f"what is written, or temporary files below {tempfile.gettempdir()}"
            click.echo(f"error: {where}: {error.strerror or error}.", err=True)
            ctx.exit(2)


def full_memory(error: Exception) -> str:
    """Whose memory an error says is full, empty for another error; torch's errors are known by name, without torch."""
    if type(error).__name__ == "OutOfMemoryError":
        return "the GPU's"
    return "this machine's" if isinstance(error, MemoryError) or "can't allocate memory" in str(error) else ""


def spec_options(cls: type, *names: str) -> Callable[[Any], Any]:
    """Options for fields of a spec: their names, types, choices, defaults and help are those of the fields."""
    hints = typing.get_type_hints(cls)
    found = {field.name: field for field in dataclasses.fields(cls)}

    def add(command: Any) -> Any:
        for name in reversed(names):
            command = _field_option(found[name], hints[name])(command)
        return command

    return add


def _field_option(field: dataclasses.Field[Any], hint: Any) -> Callable[[Any], Any]:
    value, flag = field.default, f"--{field.name.replace('_', '-')}"
    kind = next((arg for arg in typing.get_args(hint) if arg is not type(None)), hint)  # int of int | None
    if typing.get_origin(hint) is typing.Literal:
        kind = click.Choice(typing.get_args(hint))
    elif isinstance(value, tuple):
        value, kind = ",".join(map(str, value)), str
    elif isinstance(value, bool):
        flag, kind = f"{flag}/--no-{flag.removeprefix('--')}", None
    known = {"default": value, "show_default": value is not None, "help": field.metadata["help"]}
    return click.option(flag, field.name, type=kind, **known)


def spec_from(cls: type[T], flags: Mapping[str, Any], **others: Any) -> T:
    """A spec from the options of its fields among `flags`, and from `others`. Raises InputError as the spec does."""
    hints = typing.get_type_hints(cls)
    values = {
        name: _items(name, hint, flags[name]) if typing.get_origin(hint) is tuple else flags[name]
        for name, hint in hints.items()
        if name in flags and name not in others
    }
    return cls(**values, **others)


def _items(name: str, hint: Any, text: str) -> tuple[Any, ...]:
    """`30,50,75` as a tuple of the field's type; duplicates and order are left to the spec's own check."""
    kind = typing.get_args(hint)[0]
    try:
        return tuple(kind(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--{name}: {text!r} is not a list of whole numbers such as 30,50,75.") from error


threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    help="Threads of the model; fewer on a shared machine.  [default: usable cores]",
)

strict_option = click.option(
    "--strict",
    is_flag=True,
    help="Refuse films whose DICOM header names another modality or body part than a film of a chest.",
)

recipe_option = click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default="default",
    show_default=True,
    help="reference: the published choices where our defaults differ. tuned: two rates and few epochs (measured: "
    "docs/recipes.md). longtail: the same, for rare findings, not shown to be better for them. A flag of your own goes "
    "before the recipe's.",
)

pool_option = click.option(
    "--pool",
    type=click.Choice(["mean", "max"]),
    default="mean",
    show_default=True,
    help="How the views of a study become one probability a class.",
)

resamples_option = click.option(
    "--resamples",
    type=click.IntRange(0),
    default=1000,
    show_default=True,
    help="Bootstrap resamples of the groups behind every interval; 0 leaves intervals out.",
)

prevalence_option = click.option(
    "--prevalence",
    metavar="SHARE",
    help="Also give PPV and NPV at this prevalence, such as 0.02, or at those of a CSV file of class,prevalence.",
)

adjustment_option = click.option(
    "--logit-adjustment",
    type=FiniteFloat(0),
    default=0.0,
    show_default=True,
    help="Take this times each class's log odds in training from its logit, after training; thresholds move along.",
)

_target = click.option(
    "--threshold-target",
    metavar="TARGET",
    help="Thresholds from the saved out-of-fold predictions: f1, sensitivity=X, specificity=X, or a CSV file of "
    "class,target (others f1).  [default: as the sweep chose]",
)
_calibration = click.option(
    "--calibration",
    type=click.Choice(["none", "platt", "isotonic"]),
    help="Calibration from the same predictions; thresholds are chosen behind it.  [default: the sweep's]",
)


def point_options(command: Any) -> Any:
    """The options of thresholds and calibration that are chosen after a sweep."""
    return _target(_calibration(command))


device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N; for ONNX files also tensorrt."
)

cluster_option = click.option(
    "--cluster",
    metavar="auto|ADDRESS",
    help="Spread the work over a Ray cluster: the one this machine belongs to (else all of this machine), or HOST:6379 "
    "or ray://HOST:10001.",
)

source_argument = click.argument("source", type=PATH)

images_option = click.option(
    "--images", type=PATH, help="Folder that holds the images, where they are not beside the labels."
)

unindexed_option = click.option(
    "--unindexed",
    type=click.Choice(["normal", "unknown"]),
    default="normal",
    show_default=True,
    help='How Indiana studies headed "No Indexing" count; the published labels say normal.',
)


split_option = click.option(
    "--split",
    type=click.Choice(["column", "published"]),
    default="column",
    show_default=True,
    help="Hold-out from the table's column split, if any, or from the published lists of NIH, CheXpert or MIMIC.",
)


blank_option = click.option(
    "--blank",
    type=click.Choice(typing.get_args(Blank)),
    default=LabelRules.blank,
    show_default=True,
    help="How blank labels of CheXpert and MIMIC-CXR count; their authors train with negative.",
)

uncertain_option = click.option(
    "--uncertain",
    type=click.Choice(typing.get_args(Uncertain)),
    default=LabelRules.uncertain,
    show_default=True,
    help=f"How uncertain (-1) labels of CheXpert and MIMIC-CXR count; soft is a target of {SOFT:g} in training, and "
    "unknown in every figure.",
)


def dataset_options(command: Any) -> Any:
    """The options of `read_source`."""
    command = blank_option(uncertain_option(command))
    skip = click.option("--skip-missing", is_flag=True, help="Go on without the images that are not found.")
    return images_option(skip(unindexed_option(command)))


def table_options(command: Any) -> Any:
    """The options of `prepare` that name columns of a table."""
    flags = {
        "--path": "Column of the image files, where its name is not a usual one.",
        "--group": "Column of the patient, whose images stay on one side of a split.",
        "--study": "Column of the examination.",
        "--view": "Column of the projection.",
        "--labels": "Column that lists the findings; `folder` where SOURCE is a folder: class/film.png.",
        "--label-sep": "What separates the findings in the column of --labels.  [default: |]",
        "--classes": "Comma-separated columns that are findings, or words of the column of --labels.",
        "--meta": "Comma-separated columns to break figures down by, such as sex.",
    }
    for flag, said in reversed(flags.items()):
        kind = {"--classes": "COL,...", "--meta": "COL,...", "--label-sep": "TEXT"}.get(flag, "COL")
        command = click.option(flag, metavar=kind, help=said)(command)
    return click.option(
        "--split",
        metavar="COL|published",
        default="column",
        help="Hold-out from a column (train, val, test), or from the published lists of NIH, CheXpert or MIMIC.  "
        "[default: the column split, if any]",
    )(command)


def table_spec(flags: Mapping[str, Any]) -> TableSpec:
    """The columns that a user named. Raises InputError for an empty name."""
    from ..data.tables.columns import TableSpec

    names = ("path", "group", "study", "view", "labels", "label_sep")
    given: dict[str, Any] = {name: flags[name] for name in names if flags[name]}
    for name in ("classes", "meta"):
        if flags[name] is not None:
            given[name] = tuple(part.strip() for part in next(csv.reader([flags[name]]), []))
            if not given[name] or "" in given[name]:
                raise InputError(f"--{name}: {flags[name]!r} names an empty column; give names between commas.")
    if flags["split"] not in ("column", "published"):
        given["split"] = flags["split"]
    if flags["label_sep"] is not None and not flags["labels"]:
        raise InputError("--label-sep is for the column of --labels; name that too.")
    return TableSpec(**given)


def read_prepared(source: Path, flags: Mapping[str, Any], *, limit: int | None = None) -> Manifest:
    """What `prepare` is given: as `read_source`, and tables and folders of no known layout; its notes are shown."""
    from ..data.tables.source import read_any

    spec = table_spec(flags)
    missing: Any = "unchecked" if flags["labels_only"] else "skip" if flags["skip_missing"] else "refuse"
    rules = LabelRules(blank=flags["blank"], uncertain=flags["uncertain"])
    if flags["split"] == "published" and spec.named():
        raise InputError(f"{spec.named()[0]}: --split published is for tables as they are published, without it.")
    if flags["split"] == "published":
        return read_source(source, flags, limit=limit)
    manifest = read_any(source, spec, images=flags["images"], missing=missing, rules=rules, limit=limit)
    if manifest is None:
        return read_source(source, flags, limit=limit)
    echo_notes(manifest.notes)
    return manifest


def read_source(source: Path, flags: Mapping[str, Any], *, limit: int | None = None) -> Manifest:
    """The dataset that a command names, read as its dataset options say; its notes are shown."""
    from ..data.manifest import read_dataset

    missing: Any = "unchecked" if flags.get("labels_only") else "skip" if flags["skip_missing"] else "refuse"
    named = {name: flags[name] for name in ("images", "unindexed")}
    rules = LabelRules(blank=flags["blank"], uncertain=flags["uncertain"])
    if flags.get("split") == "published":
        from ..data.splits.published import read_published

        manifest = read_published(source, missing=missing, limit=limit, rules=rules, **named)
    else:
        manifest = read_dataset(source, missing=missing, limit=limit, rules=rules, **named)
    echo_notes(manifest.notes)
    return manifest


def with_recipe(ctx: click.Context, recipe: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a command, with the recipe's value of each field that was not given on the command line."""
    from click.core import ParameterSource

    out = dict(flags)
    for _, name, value, _ in RECIPES[recipe]:
        if name in out and ctx.get_parameter_source(name) != ParameterSource.COMMANDLINE:
            out[name] = ",".join(map(str, value)) if isinstance(value, tuple) else value
    return out
