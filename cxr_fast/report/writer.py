"""A run's saved files (never a model) to its page, its model card, and the same figures as JSON, CSV and pictures."""

from __future__ import annotations

import contextlib
import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..data.disclosure import Secrets, list_paths
from ..errors import InputError
from ..system.files import AnyPath, atomic, write_bytes
from ..system.tables import write_table
from ..system.text import Table, to_csv
from ..training import predictions
from ..training.operating_points import AS_CHOSEN, OperatingPoint, read_prevalence
from ..training.predictions import Pool
from ..training.run_folder import read_info, read_run_info
from ..unlikeness.oddest import describe_measure
from . import charts, class_means, comparison, evaluation, probabilities, settings, shortcut_table, tables
from .at_a_glance import forest, pictures
from .at_a_glance import tables as glance
from .configurations import grid_pictures, grid_tables
from .html import render_page
from .model_card import render_card
from .summary import FIGURES, Record, ReportData

RESAMPLES = 1000
# What `evaluate` says of a part whose predictions are not numbers: damage, and not only something a run never had.
NAN = "probabilities are NaN"
NEEDED = (
    *("provenance", "random_weights", "spec", "recipe", "cache", "classes", "preprocess", "unfreeze_blocks", "images"),
    *("split_table", "machine", "toolchain", "precision", "device", "threads", "residency", "trainable", "grid"),
    *("train", "thresholds", "threshold_source", "calibration", "folds", "budgets", "chosen", "final", "finals"),
    *("model_sha256", "seconds", "written_by", "created"),
)
PAGE, CARD, EVALUATION, COMPARISON = "report.html", "MODEL_CARD.md", "evaluation.json", "comparison.html"
FILMS = ("predictions.csv", "predictions.parquet")
# Everything a report may write: what an earlier one left and this one cannot make must not stay beside it.
OWN = (
    *(PAGE, CARD, EVALUATION, "figures.csv", "confusion.csv", "curves.csv", "reliability.csv", "cooccurrence.csv"),
    *("recalibration.csv", "decision_curves.csv", "operating_points.csv", "mistaken.csv"),
    *(f"{picture}.{kind}" for picture in charts.PICTURES for kind in charts.FORMATS),
)


@dataclass(frozen=True, kw_only=True)
class Written:
    """A page that was written; `missing`: what it lacks, as it says itself; `whole`: no file is missing or damaged."""

    page: Path
    missing: tuple[str, ...] = ()
    whole: bool = True
    evaluation: Record | None = field(default=None, repr=False)


def write_all(
    folders: Sequence[Path], out: Path | None = None, *, resamples: int = RESAMPLES, seed: int = 0, **asked: Any
) -> list[Written]:
    """Call `write_report` for each run, and with two or more compare each with the first, into `out` or its folder.

    All runs are checked before anything is written; `asked` are the other arguments of `write_report`, and it raises as
    that does.
    """
    titles = name_runs(folders)
    runs = {title: read_whole(folder) for title, folder in zip(titles, folders, strict=True)}
    pages = [write_report(folder, resamples=resamples, seed=seed, **asked) for folder in folders]
    if len(folders) < 2:
        return pages
    found = {title: page.evaluation for title, page in zip(titles, pages, strict=True)}
    missing, pairs = [], {}
    for title, folder in zip(titles[1:], folders[1:], strict=True):
        try:
            pairs[title] = compare_any_part(folders[0], folder, resamples=resamples, seed=seed)
        except InputError as error:
            paths = [path for each in (folder, folders[0]) for path in list_paths(each, read_info(each))]
            told = Secrets(paths=tuple(sorted(paths, key=len, reverse=True))).clean(str(error))
            missing.append(f"the comparison of {title} with {titles[0]}: {told}")
    path = out or folders[0] / COMPARISON
    write_bytes(path, render_comparison(runs, found, pairs, missing), "--out" if out else "")
    return [*pages, Written(page=path, missing=tuple(missing), whole=not missing)]


def compare_any_part(a: Path, b: Path, **named: Any) -> dict[str, Any]:
    """B against A on the held-out images of both, else on those both scored out of fold. InputError where neither."""
    try:
        return comparison.compare_runs(a, b, part="holdout", **named)
    except InputError as error:
        with contextlib.suppress(InputError):
            return comparison.compare_runs(a, b, part="out_of_fold", **named)
        raise InputError(str(error).replace(", or pass --part out_of_fold", "")) from error


def write_report(
    folder: AnyPath,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    pool: Pool = "mean",
    logit_adjustment: float = 0.0,
    point: OperatingPoint = AS_CHOSEN,
) -> Written:
    """Write the page of one run and all that goes with it into its folder; `point` asks for other thresholds, another
    calibration, or PPV and NPV at a stated prevalence.

    InputError or SchemaError when it is no run of this version; what else is missing or damaged only makes it partial.

        >>> write_report("exports/indiana", resamples=0).page.name
        'report.html'
    """
    folder = Path(folder)
    asked = {"resamples": resamples, "seed": seed, "pool": pool}
    material, whole = gather(folder, logit_adjustment=logit_adjustment, point=point, **asked)  # type: ignore[arg-type]
    files = {**material.plots, CARD: render_card(material), PAGE: render_run(material)}
    if material.evaluation is not None:
        # Line ends as of Python's csv module and of every report before.
        full = {name: to_csv(table, "\r\n") for name, table in evaluation.csv_tables(material.evaluation).items()}
        files = {
            EVALUATION: _json(material.evaluation),
            **{name: text.encode() for name, text in full.items()},
            **files,
        }
    with contextlib.ExitStack() as stack:  # all files or none; the page, entered first, gets its name last
        for name, data in reversed(files.items()):
            file = stack.enter_context(atomic(folder / name))
            file.write(data)
            file.flush()
        films = () if material.evaluation is None else write_films(folder, material.run)
    for name in {*OWN, *FILMS} - {*files, *films}:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    return Written(page=folder / PAGE, missing=tuple(material.missing), whole=whole, evaluation=material.evaluation)


def lacks_report(folder: Path) -> bool:
    """Whether a folder is a run, complete, that was killed before its page had its name, the last of all."""
    return (folder / "run.json").is_file() and not (folder / PAGE).is_file()


def write_films(folder: Path, run: Record) -> tuple[str, ...]:
    """Write predictions.csv, and predictions.parquet where pyarrow is installed: each film's labels, probabilities and
    decisions, as `Saved.films` gives them. The names of the files."""
    saved = predictions.read(folder, run)
    names = FILMS if find_spec("pyarrow") is not None else FILMS[:1]
    for name in names:
        write_table(saved.films(as_text=name.endswith(".csv")), folder / name)
    return names


def render_run(material: ReportData) -> bytes:
    """The page of one run."""
    return render_page(
        "report.html.j2",
        material=material,
        tables=tables,
        means=class_means,
        probabilities=probabilities,
        settings=settings,
        confusions=_largest_confusions(material),
        shortcuts=shortcut_table.shortcut_table(material.run),
        unlikeness=describe_measure(material.run.get("unlikeness")),
        stated=probabilities.prevalence_table(material.ranked()),
        glance=glance,
        grid_tables=grid_tables,
    )


def _largest_confusions(material: ReportData) -> Table:
    rows = charts.largest(dict(material.evaluation)) if material.evaluation is not None else []
    title = "Counts of the six largest classes" if len(rows) == charts.LARGEST else "Counts of the classes"
    return tables.confusion_table(rows, title)


def render_comparison(
    runs: Record,
    evaluations: Mapping[str, Record | None],
    pairs: Mapping[str, Record],
    missing: Sequence[str],
) -> bytes:
    """The page of several runs, by their names; `pairs` holds what `compare` says of each other run and the first."""
    first = next(iter(runs))
    plots = {
        name: charts.png(charts.differences(pair["per_class"], (first, name)))
        for name, pair in pairs.items()
        if any(row["auc"]["difference"] is not None for row in pair["per_class"])
    }
    return render_page(
        "comparison.html.j2",
        runs=runs,
        evaluations=evaluations,
        pairs=pairs,
        missing=missing,
        plots=plots,
        all_runs=forest.draw_runs(pairs, evaluations, first),
        comparison=comparison,
        means=class_means,
        settings=settings,
    )


def read_whole(folder: Path) -> dict[str, Any]:
    """`run.json` with everything a report needs of it, without paths of this machine.

    InputError or SchemaError with one line where it is none of this version.
    """
    run = read_info(folder)
    if lacking := [name for name in NEEDED if name not in run]:
        raise InputError(f"{folder / 'run.json'} holds no {', '.join(lacking[:5])}; run the sweep again.")
    cleaned: dict[str, Any] = _paths_of(folder, run).clean_values(run)
    return cleaned


def _paths_of(folder: Path, run: Record) -> Secrets:
    return Secrets(paths=tuple(list_paths(folder, run)))


def gather(
    folder: Path,
    *,
    resamples: int,
    seed: int,
    pool: Pool,
    logit_adjustment: float = 0.0,
    point: OperatingPoint = AS_CHOSEN,
) -> tuple[ReportData, bool]:
    """Everything a page says of a run, and whether no file of it is missing or damaged."""
    run, broken = read_whole(folder), []
    paths = _paths_of(folder, read_info(folder))
    if logit_adjustment or point.changes:
        run = paths.clean_values(read_run_info(folder, logit_adjustment=logit_adjustment, point=point))
    if point.prevalence is not None:
        read_prevalence(point.prevalence, run["classes"])  # what is wrong with it is no fault of a saved file
    try:
        history = read_history(folder / "history.csv")
    except InputError as error:
        history = []
        broken.append(f"training progression: {error}")
    found, unknown = None, None
    try:
        asked = {"resamples": resamples, "seed": seed, "pool": pool, "logit_adjustment": logit_adjustment}
        found = evaluation.evaluate(folder, point=point, **asked)  # type: ignore[arg-type]
        labels = predictions.read(folder, run).arrays["labels"]
        unknown = int((labels == -1).sum())
    except InputError as error:
        broken.append(f"every figure of the predictions: {error}")
    lacking = tuple(map(name_figures, found["missing"])) if found else ()
    files, unread = settings.model_files(folder)
    missing = (*map(paths.clean, [*broken, *unread]), *lacking)
    whole = not broken and not any(NAN in line for line in lacking)
    plots = charts.all_plots(run, history, found, {**pictures.drawings(found), **grid_pictures.drawings(run)})
    material = ReportData(
        run=run,
        evaluation=found,
        history=history,
        missing=missing,
        unknown_labels=unknown,
        plots=plots,
        title=folder.resolve().name,
        files=files,
    )
    return material, whole


def name_figures(line: str) -> str:
    """A line about a figure with the figure's name as the page has it."""
    key = line.removeprefix("interval of ").partition(",")[0]
    return line.replace(f"interval of {key},", f"interval of {FIGURES[key]},") if key in FIGURES else line


def read_history(path: Path) -> list[dict[str, Any]]:
    """One dict an epoch of a fold, None where a figure is undefined. InputError where the file is not the sweep's."""
    if not path.is_file():
        raise InputError(f"{path} is missing; run the sweep again to have it.")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{name: _value(name, text) for name, text in row.items()} for row in csv.DictReader(file)]
        columns = ("fold", "epoch", "train_loss", "valid_loss", "valid_auc", "lr")
        if not rows or any(name not in rows[0] for name in columns):
            raise ValueError("columns are missing")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a history of `cxrfast sweep` ({error}); run the sweep again.") from error
    return rows


def _value(name: str, text: str) -> int | float | None:
    if name in ("fold", "epoch"):
        return int(text)
    number = float(text or "nan")
    return number if math.isfinite(number) else None


def name_runs(folders: Sequence[Path]) -> list[str]:
    """A name for each run: its folder's, with as many parents as make the names differ."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise InputError("the same run is given twice; a comparison needs different ones.")
    depth = next(k for k in range(1, 1 + max(map(len, parts))) if len({each[-k:] for each in parts}) == len(parts))
    return ["/".join(each[-depth:]) for each in parts]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
