"""What of a file is compared, to the bit; and which files of a folder are results.

Left out, because two undisturbed runs differ in it too or because it says how often a command was run:

- JSON, and the JSON of an ONNX file's metadata: the keys of TIMES (times and dates, and in run.json of a prediction how
  many answers were reused and at what speed) and FILE_HASHES (hashes of files that hold a time);
- CSV: columns of TIMES; HTML and Markdown: dates, durations and hashes of files that hold a time, by TEXTS;
- the answers kept beside a table (`.resume`, SQLite) and whatever has no final name: these are compared by what the
  next run makes of them.

Of HDF5 every dataset, every attribute and the order of both are compared, not the bytes of the file.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TIMES = {"began", "created", "date", "latency_ms", "seconds", "stages", "reused"}
FILE_HASHES = {"model_sha256", "content_sha256", "onnx_sha256"}
TEXTS = (
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\+00:00| UTC|Z)?", "<date>"),
    (r"(\d+ h )?(\d+ min )?\b\d+(\.\d+)? ?(s|ms|min)\b", "<time>"),
    (r' data-v="[^"]*"><time>', "><time>"),  # the same time with all its digits, for sorting
)
# What is no result: locks, files without their final name, files set aside, and SQLite's log.
UNFINISHED = re.compile(r"(\.partial(\.\d+)?|\.lock|\.new|\.reuse\d+|\.old\.\d+|\.resume|-wal|-journal)$")
LEFT = re.compile(r"(\.partial(\.\d+)?|\.lock|\.new|\.reuse\d+|\.old\.\d+|-wal|-journal)$")


def results(root: Path) -> dict[str, str]:
    """A digest of each file below `root` that has its final name, by relative path; `?` and why for one that cannot be
    read."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not is_unfinished(name):
            found[name] = digest(path)
    return found


def is_unfinished(name: str) -> bool:
    """Whether a path within the folder, or a folder above it, has no final name."""
    return any(UNFINISHED.search(part) for part in name.split("/"))


def left_over(root: Path) -> list[str]:
    """Files and folders below `root` that no finished command leaves."""
    return [p.relative_to(root).as_posix() for p in sorted(root.rglob("*")) if LEFT.search(p.name)]


def digest(path: Path, name: str = "") -> str:
    """sha256 of what is compared of a file; `?` and why where it cannot be read as what its name, or `name`, says."""
    try:
        found = KINDS.get(Path(name or path.name).suffix, of_bytes)(path, name or path.name)
        return hashlib.sha256(repr(found).encode()).hexdigest()[:20]
    except Exception as error:  # whatever a damaged file makes a reader raise
        return f"? {type(error).__name__}: {str(error)[:80]}"


def without_times(value: Any, drop: set[str]) -> Any:
    """A JSON value without the keys that are not compared."""
    if isinstance(value, dict):
        return {key: without_times(each, drop) for key, each in value.items() if key not in drop}
    return [without_times(each, drop) for each in value] if isinstance(value, list) else value


def of_bytes(path: Path, _: str) -> Any:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def of_json(path: Path, name: str) -> Any:
    return without_times(json.loads(path.read_bytes()), TIMES | (FILE_HASHES if name != "run.json" else set()))


def of_text(path: Path, _: str) -> Any:
    text = path.read_text(encoding="utf-8")
    for pattern, by in TEXTS:
        text = re.sub(pattern, by, text)
    return text


def of_csv(path: Path, _: str) -> Any:
    text = path.read_bytes().decode()
    rows = list(csv.reader(io.StringIO(text)))
    times = [i for i, name in enumerate(rows[0]) if name in TIMES]
    return [[cell for i, cell in enumerate(row) if i not in times] for row in rows] if times else text


def of_hdf5(path: Path, _: str) -> Any:
    import h5py

    with h5py.File(path) as file:
        arrays = [(name, str(file[name].dtype), file[name].shape, sha(np.asarray(file[name]))) for name in file]
        return arrays, [(name, str(value)) for name, value in file.attrs.items()]


def of_npz(path: Path, _: str) -> Any:
    with np.load(path) as file:
        return [(name, str(file[name].dtype), file[name].shape, sha(file[name])) for name in file.files]


def of_onnx(path: Path, _: str) -> Any:
    import onnx

    model = onnx.load(path)
    says = {entry.key.removeprefix("cxr."): json.loads(entry.value) for entry in model.metadata_props}
    del model.metadata_props[:]
    onnx.checker.check_model(model)
    return without_times(says, TIMES | FILE_HASHES), hashlib.sha256(
        model.SerializeToString(deterministic=True)
    ).hexdigest()


def sha(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


KINDS: dict[str, Callable[[Path, str], Any]] = {
    ".h5": of_hdf5, ".json": of_json, ".html": of_text, ".md": of_text, ".csv": of_csv, ".npz": of_npz,
    ".onnx": of_onnx,
}  # fmt: skip
