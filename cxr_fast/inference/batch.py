"""Predictions as files: a table that a second run completes, pooled by study where asked, and what made it."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import json
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np
import onnxruntime
import PIL

from .. import __version__
from ..data.images import self_check
from ..data.paths import Inputs
from ..errors import InputError, Interrupted
from ..system import hardware
from ..system.files import file_sha256
from ..system.locks import FileLock, graceful
from ..system.tables import pyarrow
from .checkpoint import Resume, beside
from .outputs import WRITERS, Columns, Row, shown
from .predictor import BATCH, Result

KIND, SCHEMA = "cxr-fast predictions", 1
Pool = Literal["mean", "max"]
KEYS = ("path", "status", "reason")
STUDY_KEYS = ("study", "images", "status", "reason")


class Answerer(Protocol):
    """Whatever answers batches of images with one model file: a `Predictor`, or a cluster that runs many."""

    path: Path
    labels: tuple[str, ...]
    thresholds: np.ndarray
    threads: int
    provider: str

    @property
    def warning(self) -> str:
        """What must be said beside every figure of the model; empty for a real one."""
        ...

    def stream_batches(
        self,
        batches: Sequence[Sequence[str]],
        *,
        workers: int | None = None,
        seconds: dict[str, float] | None = None,
        stop: Callable[[], bool] = bool,
    ) -> Generator[list[Result], None, None]:
        """The results of one batch after the other, in order. Raises Interrupted once `stop` returns True."""
        ...

    def describe(self) -> dict[str, Any]:
        """What NAME.run.json says beyond the fields above."""
        ...


@dataclass(kw_only=True)
class State:
    """How far a run is: images answered of `total`, `reused` of them by an earlier run, and where time went."""

    total: int
    done: int = 0
    reused: int = 0
    failed: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"decode": 0.0, "model": 0.0, "write": 0.0})

    @property
    def waiting_for(self) -> str:
        """The stage that holds the others up so far."""
        return max(self.seconds, key=lambda stage: self.seconds[stage])


def write(
    predictor: Answerer,
    inputs: Inputs,
    out: Path,
    *,
    batch_size: int = BATCH,
    workers: int | None = None,
    decide: bool = False,
    pool: Pool | None = None,
    overwrite: bool = False,
    on_batch: Callable[[State], None] | None = None,
) -> dict[str, Any]:
    """Predict `inputs` into `out` (.csv, .parquet or .jsonl, a row an image), and say what made it in NAME.run.json.

    What `out` holds of the same model and the same files is not done again; failed files are tried again. Rows are
    kept batch by batch in NAME.resume, and `out` appears, or is replaced, when all are there. With `pool` the studies
    of a manifest are written beside it, NAME.studies.csv. `predictor` may be a cluster's. Returns what
    NAME.run.json says.

    Raises InputError for an `out` that cannot be written, holds something else, or is an input; Interrupted after
    SIGINT or SIGTERM, when the batch at hand is kept.
    """
    began, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
    _check(predictor, inputs, out, pool)
    before = _earlier(out, pool, overwrite)
    identity = {"model_sha256": _model_sha256(predictor.path), "pixel_check": self_check()}
    state = State(total=len(inputs.paths))
    try:
        with FileLock(out), Resume(out, identity, overwrite=overwrite) as kept:
            _predict(predictor, inputs.paths, kept, state, batch_size, workers, on_batch)
            tables = _write_tables(predictor, inputs, kept, out, state, decide, pool)
            summary = {
                **_request(predictor, out, batch_size, workers, decide),
                **identity,
                "images": state.total,
                "reused": state.reused,
                "failed": state.failed,
                **tables,
                **predictor.describe(),
                "began": began.isoformat(timespec="seconds"),
                "seconds": time.perf_counter() - clock,
                "stages": state.seconds,
            }
            _replace(run_path(out), lambda file: file.write((json.dumps(summary, indent=1) + "\n").encode()))
            if before.get("study_pool") and not pool:  # of other answers than the table has now
                studies_path(out).unlink(missing_ok=True)
    except OSError as error:
        kept_so_far = "; what is predicted so far is kept, the same command goes on" if beside(out).exists() else ""
        raise InputError(f"--out: cannot write {out}: {error.strerror or error}{kept_so_far}.") from error
    return summary


def run_path(out: Path) -> Path:
    """NAME.run.json, which says what made `out`."""
    return out.with_suffix(".run.json")


def studies_path(out: Path) -> Path:
    """NAME.studies.csv (.parquet, .jsonl), a row a study."""
    return out.with_name(f"{out.stem}.studies{out.suffix}")


def pooled(results: Iterable[Result], studies: Sequence[str], pool: Pool) -> Iterator[Row]:
    """Rows of STUDY_KEYS and (C,) float32, in the order in which the studies begin; one of no readable image failed.

    A study is held until its last image has come, and until those that began before it are out.
    """
    left = Counter(studies)
    open_ones: OrderedDict[str, _Study] = OrderedDict()
    for result, study in zip(results, studies, strict=True):
        open_ones.setdefault(study, _Study()).add(result, pool)
        left[study] -= 1
        while open_ones and not left[first := next(iter(open_ones))]:
            yield open_ones.pop(first).row(first, pool)


class _Study:
    def __init__(self) -> None:
        self.good, self.failed = 0, Counter[str]()
        self.values = np.zeros(0)

    def add(self, result: Result, pool: Pool) -> None:
        """One more image."""
        if result.probabilities is None:
            self.failed[result.reason] += 1
            return
        new = result.probabilities.astype(np.float64)
        join = np.add if pool == "mean" else np.maximum
        self.values = join(self.values, new) if self.good else new
        self.good += 1

    def row(self, study: str, pool: Pool) -> Row:
        """All images as one."""
        images, lost = self.good + self.failed.total(), self.failed.total()
        reason = f"{lost} of {images} images failed: {', '.join(sorted(self.failed))}" if lost else ""
        values = self.values / self.good if self.good and pool == "mean" else self.values
        return [shown(study), images, "ok" if self.good else "failed", reason], (
            values.astype(np.float32) if self.good else None
        )


# ---------------------------------------------------------------------------------------------- the parts of `write`


def _check(predictor: Answerer, inputs: Inputs, out: Path, pool: Pool | None) -> None:
    """Everything that is wrong with the request, before hours of predicting and not after."""
    if out.is_dir():
        raise InputError(f"--out: {out} is a folder; give the name of a file.")
    _protect(predictor, inputs, out)
    if out.suffix not in WRITERS:
        raise InputError(f"--out: {out} is to end in {', '.join(WRITERS)}.")
    if out.suffix == ".parquet":
        pyarrow("pyarrow.parquet", out)
    if taken := {*KEYS, *STUDY_KEYS, "findings"} & set(predictor.labels):
        raise InputError(
            f"{predictor.path}: a class is called {min(taken)}, which is a column of its own in the table."
        )
    if joined := [name for name in predictor.labels if ";" in name]:
        raise InputError(f"{predictor.path}: the class {joined[0]!r} holds ';', which separates findings.")
    if pool and ("" in inputs.studies or not inputs.studies):
        path = inputs.paths[list(inputs.studies).index("")] if inputs.studies else next(iter(inputs.paths), "")
        raise InputError(f"--study-pool: {shown(path)} has no study; name a manifest with a column study or group.")
    if pool and inputs.manifests > 1:
        raise InputError("--study-pool: one manifest at a time, for two may mean different studies by one name.")


def _protect(predictor: Answerer, inputs: Inputs, out: Path) -> None:
    """No file that is written may be one that is read."""
    own = (out, run_path(out), studies_path(out), beside(out), *map(_partial, (out, run_path(out), studies_path(out))))
    written = {_identity(path): path for path in (*own, out.with_name(out.name + ".lock")) if path.exists()}
    if not written:
        return
    model = predictor.path
    readers: Iterator[tuple[str, str]] = itertools.chain(
        ((str(p), "the model itself") for p in ([model] if model.is_file() else model.rglob("*"))),
        ((str(p), "the manifest or list of the images") for p in inputs.sources),
        ((p, "one of the images") for p in inputs.paths),
    )
    for path, what in readers:
        if (identity := _identity(path)) and identity in written:
            raise InputError(f"--out: {written[identity]} is {what}; give another name.")


def _earlier(out: Path, pool: Pool | None, overwrite: bool) -> dict[str, Any]:
    """What an earlier run said of `out`, {} for none. InputError where a file beside it is not of ours."""
    try:
        found = json.loads(run_path(out).read_bytes())
    except (FileNotFoundError, NotADirectoryError):  # the latter is refused by what writes
        found = {}
    except (OSError, ValueError):
        found = None
    ours = isinstance(found, dict) and found.get("kind", KIND) == KIND
    foreign = [] if ours else [run_path(out)]
    if pool and studies_path(out).exists() and not (ours and found.get("study_pool")):
        foreign.append(studies_path(out))
    if foreign and not overwrite:
        raise InputError(f"--out: {foreign[0]} is there and not of ours; give another --out, or pass --overwrite.")
    return found if ours else {}


def _identity(path: str | Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _model_sha256(path: Path) -> str:
    """Of the model file; of a folder, of its files' names and contents in the order of the names."""
    if path.is_file():
        return file_sha256(path)
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    return hashlib.sha256("".join(f"{file_sha256(path / name)} {name}\n" for name in names).encode()).hexdigest()


def _request(predictor: Answerer, out: Path, batch_size: int, workers: int | None, decide: bool) -> dict[str, Any]:
    """What was asked of which model by which code, as NAME.run.json says it."""
    own = {"cxr-fast": __version__, "onnxruntime": onnxruntime.__version__}
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "written_by": f"cxr-fast {__version__}",
        "out": out.name,
        "model": str(predictor.path),
        "provenance": predictor.warning,
        "provider": predictor.provider,
        "threads": predictor.threads,
        "workers": workers or hardware.cpu_count(),
        "batch_size": batch_size,
        "labels": list(predictor.labels),
        "thresholds": predictor.thresholds.tolist(),
        "decide": decide,
        "versions": own | {"numpy": np.__version__, "pillow": PIL.__version__},
    }


def _predict(
    predictor: Answerer,
    paths: Sequence[str],
    kept: Resume,
    state: State,
    batch_size: int,
    workers: int | None,
    on_batch: Callable[[State], None] | None,
) -> None:
    """Answer what is not held yet, each batch kept before the next one runs.

    Batches end where they would end if all were to do: which images share one decides the last bits of a probability,
    so a run that was killed ends in the same file.
    """
    todo = [i for i, path in enumerate(paths) if not kept.holds(path)]
    state.done = state.reused = len(paths) - len(todo)
    batches = [[paths[i] for i in part] for _, part in itertools.groupby(todo, key=lambda i: i // batch_size)]
    by = f"{predictor.provider}, onnxruntime {onnxruntime.__version__}"
    with graceful() as stopped:
        answers = predictor.stream_batches(batches, workers=workers, seconds=state.seconds, stop=stopped.is_set)
        with contextlib.closing(answers), _told(state):
            for results in answers:
                began = time.perf_counter()
                kept.append(results, by)
                state.seconds["write"] += time.perf_counter() - began
                state.done += len(results)
                state.failed += sum(not result.ok for result in results)
                if on_batch is not None:
                    on_batch(state)


@contextlib.contextmanager
def _told(state: State) -> Iterator[None]:
    """Interrupted with how far the run is."""
    try:
        yield
    except Interrupted:
        said = f"interrupted after {state.done:,} of {state.total:,} images"
        raise Interrupted(f"{said}; the same command goes on from there.") from None


def _write_tables(
    predictor: Answerer,
    inputs: Inputs,
    kept: Resume,
    out: Path,
    state: State,
    decide: bool,
    pool: Pool | None,
) -> dict[str, Any]:
    """All rows in input order, under the final names; what answered them, and how they were pooled."""
    began = time.perf_counter()
    of_model: dict[str, Any] = {"labels": predictor.labels, "thresholds": predictor.thresholds, "decide": decide}
    by: Counter[str] = Counter()
    found: dict[str, Any] = {"answered_by": by, "study_pool": None}
    _write_table(out, Columns(keys=KEYS, **of_model), map(_image_row, _answers(kept, inputs.paths, by)))
    if pool:
        rows = pooled(_answers(kept, inputs.paths, Counter()), inputs.studies, pool)
        _write_table(studies_path(out), Columns(keys=STUDY_KEYS, **of_model), rows)
        found["study_pool"] = {"how": pool, "column": inputs.by, "studies": len(set(inputs.studies))}
    state.seconds["write"] += time.perf_counter() - began
    return found


def _answers(kept: Resume, paths: Iterable[str], by: Counter[str]) -> Iterator[Result]:
    for path in paths:
        result, who = kept.row(path)
        by[who] += 1
        yield result


def _image_row(result: Result) -> Row:
    if result.probabilities is None:
        return [shown(result.path), "failed", shown(f"{result.reason}: {result.message}")], None
    return [shown(result.path), "ok", ""], result.probabilities


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")  # one name, for the lock is held: what a kill leaves is replaced


def _replace(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    """A file that is there when it is whole and on disk, and not before."""
    try:
        with open(_partial(path), "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(_partial(path), path)
    finally:
        _partial(path).unlink(missing_ok=True)


def _write_table(path: Path, columns: Columns, rows: Iterable[Row]) -> None:
    _replace(path, lambda file: WRITERS[path.suffix](file, columns, rows))
