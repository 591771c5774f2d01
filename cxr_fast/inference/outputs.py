"""Write a table of probabilities as CSV, Parquet or JSON lines, row by row."""

from __future__ import annotations

import itertools
import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import InputError
from ..system.tables import pyarrow

if TYPE_CHECKING:
    from .predictor import Result

Row = tuple[list[Any], np.ndarray | None]  # the values of `Columns.keys`, and (C,) float32 where there are any
ROW_GROUP = 4096
Pool = Literal["mean", "max"]
KEYS = ("path", "status", "reason", "note", "unlikeness")
STUDY_KEYS = ("study", "images", "status", "reason")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a table: `keys`, one probability per class (C), and the findings where `decide`."""

    keys: tuple[str, ...]
    labels: tuple[str, ...]
    thresholds: np.ndarray
    decide: bool

    @property
    def head(self) -> list[str]:
        """The column names, in order."""
        return [*self.keys, *self.labels, *(["findings"] if self.decide else [])]

    def findings(self, probabilities: np.ndarray) -> list[str]:
        """List the classes whose probability (C,) reaches its threshold, compared in double precision."""
        over = probabilities.astype(np.float64) >= self.thresholds
        return [label for label, positive in zip(self.labels, over, strict=True) if positive]


def shown(name: str) -> str:
    r"""Make a name that any UTF-8 file can hold: a byte that is no UTF-8 becomes `\udc` and its two hex digits."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def texts(probabilities: np.ndarray, thresholds: np.ndarray) -> list[str]:
    """Write each of (C,) as the shortest decimal that reads back as the same float32.

    It is longer where that, read in double precision, would fall on the other side of the threshold: whoever
    compares the file's numbers with the thresholds finds the same findings.
    """
    found = [str(p) for p in probabilities.astype(np.float32)]
    for c, (text, p, limit) in enumerate(zip(found, map(float, probabilities), thresholds, strict=True)):
        if (float(text) >= limit) != (p >= limit):
            found[c] = repr(p)
    return found


def _csv_cell(text: str) -> str:
    # csv.writer leaves a carriage return bare where lines end in a mere newline; most readers then see two rows.
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in ',"\r\n') else text


def _key_cell(key: Any) -> str:
    return "" if key is None else str(np.float32(key)) if isinstance(key, float) else str(key)


def _csv(file: IO[bytes], columns: Columns, rows: Iterable[Row]) -> None:
    file.write((",".join(map(_csv_cell, columns.head)) + "\n").encode())
    for keys, probabilities in rows:
        if probabilities is None:
            cells = [""] * (len(columns.labels) + columns.decide)
        else:
            cells = texts(probabilities, columns.thresholds)
            cells += [";".join(columns.findings(probabilities))] if columns.decide else []
        file.write((",".join(map(_csv_cell, [*map(_key_cell, keys), *cells])) + "\n").encode())


def _jsonl(file: IO[bytes], columns: Columns, rows: Iterable[Row]) -> None:
    for keys, probabilities in rows:
        plain = (float(str(np.float32(key))) if isinstance(key, float) else key for key in keys)
        line: dict[str, Any] = dict(zip(columns.keys, plain, strict=True)) | {"probabilities": None}
        if columns.decide:
            line["findings"] = None
        if probabilities is not None:
            numbers = map(float, texts(probabilities, columns.thresholds))
            line["probabilities"] = dict(zip(columns.labels, numbers, strict=True))
            if columns.decide:
                line["findings"] = columns.findings(probabilities)
        file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())


def _parquet(file: IO[bytes], columns: Columns, rows: Iterable[Row]) -> None:
    """Write text, whole numbers, float32 and null, 4,096 rows per group, so that memory stays flat."""
    arrow, parquet = pyarrow("pyarrow", Path("--out")), pyarrow("pyarrow.parquet", Path("--out"))
    of_key = {"images": arrow.int64(), "unlikeness": arrow.float32()}
    kinds = {key: of_key.get(key, arrow.string()) for key in columns.keys}
    kinds |= dict.fromkeys(columns.labels, arrow.float32()) | ({"findings": arrow.string()} if columns.decide else {})
    schema = arrow.schema(list(kinds.items()))
    iterator = iter(rows)
    with parquet.ParquetWriter(file, schema) as writer:
        while group := list(itertools.islice(iterator, ROW_GROUP)):
            cells = [_parquet_cells(row, columns) for row in group]
            arrays = [arrow.array(c, kind) for c, kind in zip(zip(*cells, strict=True), kinds.values(), strict=True)]
            writer.write_table(arrow.Table.from_arrays(arrays, schema=schema))


def _parquet_cells(row: Row, columns: Columns) -> list[Any]:
    keys, probabilities = row
    if probabilities is None:
        return [*keys, *[None] * (len(columns.labels) + columns.decide)]
    return [*keys, *probabilities.tolist(), *([";".join(columns.findings(probabilities))] if columns.decide else [])]


WRITERS: dict[str, Callable[[IO[bytes], Columns, Iterable[Row]], None]] = {
    ".csv": _csv,
    ".parquet": _parquet,
    ".jsonl": _jsonl,
}


def is_pooled(path: Path) -> bool:
    """Whether a file begins as the tables of studies that `WRITERS` write."""
    try:
        if path.suffix == ".parquet":
            return tuple(pyarrow("pyarrow.parquet", path).read_schema(path).names[: len(STUDY_KEYS)]) == STUDY_KEYS
        with open(path, encoding="utf-8") as file:
            line = file.readline()
        names = json.loads(line) if path.suffix == ".jsonl" else line.split(",")
        return tuple(names)[: len(STUDY_KEYS)] == STUDY_KEYS
    except (OSError, ValueError, TypeError, InputError):  # pyarrow's errors are ValueError or OSError
        return False


def pooled(results: Iterable[Result], studies: Sequence[str], pool: Pool) -> Iterator[Row]:
    """Yield one row per study: STUDY_KEYS and (C,) float32, or None where no image could be read.

    Studies come in the order of their first images; one is held until its last image has come, and until those that
    began before it are out.
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
        """Add one image."""
        if result.probabilities is None:
            self.failed[result.reason] += 1
            return
        new = result.probabilities.astype(np.float64)
        join = np.add if pool == "mean" else np.maximum
        self.values = join(self.values, new) if self.good else new
        self.good += 1

    def row(self, study: str, pool: Pool) -> Row:
        """One row for all images of the study."""
        images, lost = self.good + self.failed.total(), self.failed.total()
        reason = f"{lost} of {images} images failed: {', '.join(sorted(self.failed))}" if lost else ""
        values = self.values / self.good if self.good and pool == "mean" else self.values
        return [shown(study), images, "ok" if self.good else "failed", reason], (
            values.astype(np.float32) if self.good else None
        )


def run_path(out: Path) -> Path:
    """NAME.run.json, which says what made `out`."""
    return out.with_suffix(".run.json")


def studies_path(out: Path) -> Path:
    """NAME.studies.csv (.parquet, .jsonl), a row a study."""
    return out.with_name(f"{out.stem}.studies{out.suffix}")
