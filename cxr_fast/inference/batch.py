"""Batch prediction to CSV, Parquet or JSON lines, resumable, with a JSON record of how it was made."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import onnxruntime
import PIL

from .. import __version__
from ..data.images import self_check
from ..data.paths import Inputs
from ..errors import InputError, Interrupted
from ..system import hardware
from ..system.files import atomic, tree_sha256
from ..system.locks import FileLock, graceful
from ..system.tables import pyarrow
from .checkpoint import WAL, Asked, Checkpoint, beside
from .outputs import KEYS, STUDY_KEYS, WRITERS, Columns, Pool, Row, is_pooled, pooled, run_path, shown, studies_path
from .predictor import BATCH, Result, changed_ns
from .shift.comparison import ShiftWatch

KIND, SCHEMA = "cxr-fast predictions", 1


class Answerer(Protocol):
    """Whatever answers batches of images with one model file: a `Predictor`, or a cluster that runs many."""

    path: Path
    source: str
    info: dict[str, Any]
    labels: tuple[str, ...]
    thresholds: np.ndarray
    threads: int
    provider: str
    strict: bool
    refuse_unlike: float | None

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


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """How images are predicted into a table, and what the table says.

    `batch_size` images are one call of the model; `workers` threads decode (default: usable cores); `decide` adds the
    findings over their thresholds; `pool` also writes NAME.studies.csv, the images of a study as one; `overwrite`
    drops what the table holds; `append` keeps rows of films that are no longer among the inputs (before the others), or
    that are gone from the disk.
    """

    batch_size: int = BATCH
    workers: int | None = None
    decide: bool = False
    pool: Pool | None = None
    overwrite: bool = False
    append: bool = False


@dataclass(kw_only=True)
class State:
    """How far a run is: images answered of `total`, `reused` of them by an earlier run, failures by reason, seconds."""

    total: int
    done: int = 0
    reused: int = 0
    failed_by: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: {"decode": 0.0, "model": 0.0, "write": 0.0})

    @property
    def failed(self) -> int:
        """Images that failed, for whatever reason."""
        return self.failed_by.total()

    @property
    def waiting_for(self) -> str:
        """The stage that holds the others up so far."""
        return max(self.seconds, key=lambda stage: self.seconds[stage])


OnBatch = Callable[[State], None]
OnRound = Callable[[Inputs, dict[str, Any]], None]


def write(
    predictor: Answerer, inputs: Inputs, out: Path, spec: BatchSpec | None = None, on_batch: OnBatch | None = None
) -> dict[str, Any]:
    """Predict `inputs` into `out` (.csv, .parquet or .jsonl, a row an image), and record how in NAME.run.json.

    What `out` holds of the same model and the same files is not predicted again, also where a file has moved; failed
    files are tried again. Answers are kept batch by batch in NAME.resume, and `out` appears, or is replaced, when all
    are there. Returns what NAME.run.json says.

    Raises InputError for an `out` that cannot be written, holds something else, is an input, or has answered films not
    among the inputs (unless `append` or `overwrite`); Interrupted after SIGINT or SIGTERM, when a batch is kept.
    """
    began, clock, spec = datetime.datetime.now(datetime.UTC), time.perf_counter(), spec or BatchSpec()
    if spec.append and spec.pool:
        raise InputError("--append: rows of earlier runs have no study to pool; leave out --append or --study-pool.")
    _check(predictor, inputs, out, spec.pool)
    before = _earlier(out, spec)
    identity = {"model_sha256": tree_sha256(predictor.path), "pixel_check": self_check()}
    state = State(total=len(inputs.paths))
    with FileLock(out), _kept_so_far(out), _checkpoint(predictor, out, identity, spec) as kept:
        earlier = _earlier_films(kept, inputs, out, spec)
        _predict(predictor, inputs.paths, kept, state, spec, on_batch)
        writing = time.perf_counter()
        tables = _write_tables(predictor, inputs, earlier, kept, out, spec)
        state.seconds["write"] += time.perf_counter() - writing
        summary = {
            **_request(predictor, out, spec),
            **identity,
            "images": state.total,
            "kept": len(earlier),
            "reused": state.reused,
            "failed": state.failed,
            "failed_by": dict(state.failed_by.most_common()),
            **tables,
            **predictor.describe(),
            "began": began.isoformat(timespec="seconds"),
            "seconds": time.perf_counter() - clock,
            "stages": state.seconds,
        }
        with _replacing(run_path(out)) as file:
            file.write((json.dumps(summary, indent=1) + "\n").encode())
        if before.get("study_pool") and not spec.pool:  # of other answers than the table has now
            studies_path(out).unlink(missing_ok=True)
    return summary


def watch(
    predictor: Answerer, look: Callable[[], Inputs], out: Path, spec: BatchSpec, seconds: float, on_round: OnRound
) -> None:
    """Call `write` with `append` whenever `look` finds other films or files, every `seconds`, until SIGINT or SIGTERM.

    `on_round` gets the inputs and the summary of each round that wrote. A file that is still being written fails or is
    predicted as it is, and again once it has changed. Raises as `write`.
    """
    seen: dict[str, tuple[int, int]] = {}
    with graceful() as stopped:
        while not stopped.is_set():
            inputs = look()
            found = {path: _version(path) for path in inputs.paths}
            if found and found != seen:
                on_round(inputs, write(predictor, inputs, out, replace(spec, append=True)))
                seen, spec = found, replace(spec, overwrite=False)
            stopped.wait(seconds)


def _version(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1, 0
    return status.st_size, changed_ns(status)


# ---------------------------------------------------------------------------------------------- the parts of `write`


def _check(predictor: Answerer, inputs: Inputs, out: Path, pool: Pool | None) -> None:
    """Refuse a request that cannot be fulfilled before hours of predicting, not after."""
    if out.is_dir():
        raise InputError(f"--out: {out} is a folder; give the name of a file.")
    _protect(predictor, inputs, out)
    if out.suffix not in WRITERS:
        raise InputError(f"--out: {out} must end in {', '.join(WRITERS)}.")
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


def _checkpoint(predictor: Answerer, out: Path, identity: dict[str, str], spec: BatchSpec) -> Checkpoint:
    asked = Asked(strict=predictor.strict, gone=spec.append, limit=predictor.refuse_unlike)
    return Checkpoint(out, identity, asked, overwrite=spec.overwrite)


def _protect(predictor: Answerer, inputs: Inputs, out: Path) -> None:
    """Refuse to write a file that is also read."""
    tables = (out, run_path(out), studies_path(out))
    own = [*tables, *(path.with_name(path.name + ".partial") for path in tables)]
    own += [beside(out), *(out.with_name(out.name + suffix) for suffix in (WAL, ".lock"))]
    written = {_identity(path): path for path in own if path.exists()}
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


def _earlier(out: Path, spec: BatchSpec) -> dict[str, Any]:
    """Read NAME.run.json of an earlier run, {} for none. InputError where a file beside `out` is not ours."""
    try:
        found = json.loads(run_path(out).read_bytes())
    except (FileNotFoundError, NotADirectoryError):  # the latter is refused by what writes
        found = {}
    except (OSError, ValueError):
        found = None
    ours = found == {} or (isinstance(found, dict) and found.get("kind") == KIND)
    foreign = [] if ours else [run_path(out)]
    studies = studies_path(out)
    # A run killed between its tables and NAME.run.json left answers, and a table that begins as ours.
    known = ours and (found.get("study_pool") or (beside(out).exists() and is_pooled(studies)))
    if spec.pool and studies.exists() and not known:
        foreign.append(studies)
    if foreign and not spec.overwrite:
        raise InputError(
            f"--out: {foreign[0]} exists and predict did not write it; give another --out, or pass --overwrite."
        )
    return found if ours else {}


def _identity(path: str | Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _request(predictor: Answerer, out: Path, spec: BatchSpec) -> dict[str, Any]:
    """The part of NAME.run.json that is known before the first answer."""
    own = {"cxr-fast": __version__, "onnxruntime": onnxruntime.__version__}
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "written_by": f"cxr-fast {__version__}",
        "out": out.name,
        "model": predictor.source,
        "provenance": predictor.warning,
        "provider": predictor.provider,
        "threads": predictor.threads,
        "workers": spec.workers or hardware.cpu_count(),
        "batch_size": spec.batch_size,
        "labels": list(predictor.labels),
        "thresholds": predictor.thresholds.tolist(),
        "decide": spec.decide,
        "strict": predictor.strict,
        "refuse_unlike": predictor.refuse_unlike,
        "versions": own | {"numpy": np.__version__, "pillow": PIL.__version__},
    }


def _earlier_films(kept: Checkpoint, inputs: Inputs, out: Path, spec: BatchSpec) -> list[str]:
    """The films of earlier runs that are not among the inputs; those that only moved keep their answers."""
    absent = kept.absent(inputs.paths)
    if absent:
        absent = kept.follow_moved([path for path in inputs.paths if not kept.holds(path)], absent)
    if spec.append:
        return absent
    if lost := [path for path in absent if kept.is_answered(path)]:
        raise InputError(
            f"--out: {out} has answers for {len(lost):,} film(s) that are not among the inputs, such as "
            f"{shown(lost[0])}; --append keeps their rows, --overwrite drops them."
        )
    return []


def _predict(
    predictor: Answerer, paths: Sequence[str], kept: Checkpoint, state: State, spec: BatchSpec, on_batch: OnBatch | None
) -> None:
    """Answer what is not held yet, each batch kept before the next one runs.

    Batches end where they would end if all were to do: which images share one decides the last bits of a probability,
    so a run that was killed ends in the same file.
    """
    todo = [i for i, path in enumerate(paths) if not kept.holds(path)]
    state.done = state.reused = len(paths) - len(todo)
    batches = [[paths[i] for i in part] for _, part in itertools.groupby(todo, key=lambda i: i // spec.batch_size)]
    by = f"{predictor.provider}, onnxruntime {onnxruntime.__version__}"
    with graceful() as stopped:
        answers = predictor.stream_batches(batches, workers=spec.workers, seconds=state.seconds, stop=stopped.is_set)
        with contextlib.closing(answers), _progress_in_interrupt(state):
            for results in answers:
                _refuse_lacking(results)
                began = time.perf_counter()
                kept.append(results, by)
                state.seconds["write"] += time.perf_counter() - began
                state.done += len(results)
                state.failed_by.update(result.reason for result in results if not result.ok)
                if on_batch is not None:
                    on_batch(state)
                # A cluster hands on several batches at once, and a second signal while they are kept would kill.
                if stopped.is_set() and state.done < state.total:
                    raise Interrupted("stopped.")


def _refuse_lacking(results: Sequence[Result]) -> None:
    """End the run where a package is missing, which every further film of the kind would say again."""
    for result in results:
        if result.reason == "needs_pydicom":
            raise InputError(result.message)


@contextlib.contextmanager
def _progress_in_interrupt(state: State) -> Iterator[None]:
    """Make an Interrupted say how far the run is."""
    try:
        yield
    except Interrupted:
        said = f"interrupted after {state.done:,} of {state.total:,} images"
        raise Interrupted(f"{said}; the same command goes on from there.") from None


def _write_tables(
    predictor: Answerer, inputs: Inputs, earlier: Sequence[str], kept: Checkpoint, out: Path, spec: BatchSpec
) -> dict[str, Any]:
    """Write all rows in input order, after those of earlier films; return what answered them, how pooled."""
    of_model: dict[str, Any] = {"labels": predictor.labels, "thresholds": predictor.thresholds, "decide": spec.decide}
    by, shift = Counter[str](), ShiftWatch(predictor.info, predictor.path)
    found: dict[str, Any] = {"answered_by": by, "study_pool": None}
    with _replacing(out) as file:
        images = map(_image_row, shift.count(_answers(kept, [*earlier, *inputs.paths], by)))
        WRITERS[out.suffix](file, Columns(keys=KEYS, **of_model), images)
    found["shift"] = shift.compare(inputs.groups or inputs.studies)
    if spec.pool:
        with _replacing(studies_path(out)) as file:
            studies = pooled(_answers(kept, inputs.paths, Counter()), inputs.studies, spec.pool)
            WRITERS[out.suffix](file, Columns(keys=STUDY_KEYS, **of_model), studies)
        found["study_pool"] = {"how": spec.pool, "column": inputs.by, "studies": len(set(inputs.studies))}
    return found


def _answers(kept: Checkpoint, paths: Iterable[str], by: Counter[str]) -> Iterator[Result]:
    for path in paths:
        result, who = kept.row(path)
        by[who] += 1
        yield result


def _image_row(result: Result) -> Row:
    if result.probabilities is None:
        reason = shown(f"{result.reason}: {result.message}")
        return [shown(result.path), "failed", reason, "", result.unlikeness], None
    return [shown(result.path), "ok", "", shown(result.note), result.unlikeness], result.probabilities


def _replacing(path: Path) -> contextlib.AbstractContextManager[IO[bytes]]:
    """Open a file that appears when it is whole and on the disk; what a kill left of it is written over."""
    return atomic(path, "--out", locked=True)


@contextlib.contextmanager
def _kept_so_far(out: Path) -> Iterator[None]:
    """Make an error of the disk one line, which says whether answers are kept."""
    try:
        yield
    except (OSError, InputError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        kept = "; what is predicted so far is kept, the same command goes on" if beside(out).exists() else ""
        raise InputError(f"--out: cannot write {out}: {cause.strerror or cause}{kept}.") from error
