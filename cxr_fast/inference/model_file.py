"""Read and check the metadata of a model file without running it: no onnx package, no ONNX Runtime.

Source: onnx.proto (ModelProto: graph 7, metadata_props 14).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from .. import __version__
from ..config import FILM_CHANGES, PreprocessSpec, from_dict
from ..errors import CxrFastError, InputError, SchemaError
from . import operations
from .protobuf import BYTES, NotOnnx, Record, records
from .shift.reference import read_holdout, read_training_unlikeness

SCHEMA = 2
VARIANTS = ("fp32", "fp16", "int8")
PREFIX = "cxr."
SEAL = "content_sha256"
NEEDED = (SEAL, "labels", "labels_sha256", "thresholds", "preprocess")

_GRAPH, _ENTRY = 7, 14
HDF5 = b"\x89HDF\r\n\x1a\n"  # how a cache begins
MOST_TEXT = 64 << 20
CHUNK = 1 << 20


def split_variants(text: str | None) -> list[str]:
    """The variants that a comma-separated list names, all without one. Raises InputError for an unknown one."""
    names = list(VARIANTS) if text is None else [name.strip() for name in text.split(",")]
    require_variants(names)
    return names


def require_variants(names: Iterable[str]) -> None:
    """Raise InputError where a name is not that of a variant."""
    if unknown := [name for name in names if name not in VARIANTS]:
        raise InputError(f"--variants: {unknown[0]!r} is not one of {', '.join(VARIANTS)}.")


class Entry(NamedTuple):
    """A metadata entry: its key, its value, and where it lies in the file."""

    key: str
    value: str
    record: Record


def file_name(variant: str) -> str:
    """Return the name that an export gives a variant's file."""
    return f"model.{variant}.onnx"


def read(path: Path, *, check: bool = True) -> dict[str, Any]:
    """Return the `cxr.*` entries of a model file, parsed and validated, without their prefix.

    `check` also hashes the file (1.6 GB/s with SHA instructions): then no bit of the weights, the graph or the entries
    differs from what was written. Raises InputError for a file that is damaged or that `cxrfast export` did not write,
    SchemaError for one of another schema.
    """
    with _opened(path) as file:
        entries = _entries(file)
        info = _info(entries, path)
        if check and (found := _digest(file, entries)) != info[SEAL]:
            raise InputError(
                f"{path}: damaged or edited since it was written (its content's sha256 is {found[:16]}..., "
                f"it says {_brief(info[SEAL], 16)}); export the run again."
            )
    if check and labels_sha256(info["labels"]) != info["labels_sha256"]:
        raise InputError(f"{path}: damaged metadata (the labels are not those of labels_sha256).")
    return info


def content_sha256(path: Path) -> str:
    """Hash (sha256, hex) a model file's bytes, without the entry that holds the hash and those of other programs.

    Raises InputError for a file that is no ONNX file.
    """
    with _opened(path) as file:
        return _digest(file, _entries(file))


def entries(path: Path) -> dict[str, str]:
    """Return every metadata entry as it stands in a model file, with its prefix; those of other programs too.

    Raises InputError for a file that is no ONNX file.
    """
    with _opened(path) as file:
        return {entry.key: entry.value for entry in _entries(file)}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open the file; raise what goes wrong with its bytes as InputError."""
    if not path.is_file():  # opening a pipe would wait for ever
        raise InputError(f"{path}: no such model; `cxrfast export RUN` makes one.")
    try:
        with open(path, "rb") as file:
            if file.read(len(HDF5)) == HDF5:
                raise InputError(
                    f"{path} is a cache, not a model; `cxrfast sweep {path}` trains from it, `cxrfast export RUN` then "
                    "makes a model."
                )
            file.seek(0)
            yield file
    except NotOnnx as error:
        raise InputError(f"{path}: not an ONNX file of ours ({error}).") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error


def write(path: Path, serialised: bytes) -> None:
    """Write a serialised model with the `content_sha256` of it as one more entry."""
    file = io.BytesIO(serialised)
    entries = _entries(file)
    assert PREFIX + SEAL not in {key for key, _, _ in entries}, "sealed twice"
    key, value = (PREFIX + SEAL).encode(), json.dumps(_digest(file, entries)).encode()
    pair = b"".join(bytes([n << 3 | BYTES, len(text)]) + text for n, text in ((1, key), (2, value)))
    assert len(pair) < 128, "a length of one byte"
    with open(path, "wb") as out:
        out.write(serialised)
        out.write(bytes([_ENTRY << 3 | BYTES, len(pair)]) + pair)


def labels_sha256(labels: Sequence[str]) -> str:
    """Hash (sha256, hex) the class names, in order, a line each."""
    return hashlib.sha256("\n".join(labels).encode()).hexdigest()


def check_operations(path: Path) -> None:
    """Raise InputError where a file holds what `cxrfast export` never writes, before ONNX Runtime sees it.

    The hash is no signature: whoever writes a new one may make the graph compute for ever, or take all memory.
    """
    with _opened(path) as file:
        operations.check(file)


def check_graph(session: Any, info: dict[str, Any], path: Path) -> None:
    """Raise InputError unless a session takes `pixels` (N, S, S) and answers `probabilities` (N, C), as `info` says."""
    size, count = info["preprocess"]["size"], len(info["labels"])
    wanted = [("input", session.get_inputs(), "pixels", "tensor(uint8)", [size, size])]
    wanted += [("output", session.get_outputs(), "probabilities", "tensor(float)", [count])]
    if has_unlikeness(info):
        wanted += [("output", session.get_outputs(), "unlikeness", "tensor(float)", [])]
    for kind, nodes, name, dtype, shape in wanted:
        try:
            found = {node.name: (node.type, list(node.shape or [])) for node in nodes}
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: damaged graph (an {kind} has a name that is not UTF-8).") from error
        if name not in found or (kind == "input" and len(found) > 1):
            raise InputError(f"{path}: damaged graph ({kind}s are {', '.join(found)[:80] or 'none'}, not {name}).")
        is_a, dims = found[name]
        if is_a != dtype or dims[1:] != shape or not dims or isinstance(dims[0], int):
            raise InputError(f"{path}: damaged graph ({name} is {is_a} {dims[:6]}, not {dtype} {['N', *shape]}).")


# The entries.


def _info(entries: list[Entry], path: Path) -> dict[str, Any]:
    """Parse and validate the entries that are ours."""
    ours = [(key.removeprefix(PREFIX), value) for key, value, _ in entries if key.startswith(PREFIX)]
    names = [name for name, _ in ours]
    if "schema" not in names:
        raise InputError(f"{path}: an ONNX file, but not one `cxrfast export` wrote (no cxr.schema inside).")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path}: damaged metadata ({_brief(twice[0])} appears twice).")
    try:
        info = {name: json.loads(value) for name, value in ours}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged metadata ({_brief(error)}).") from error
    if type(info["schema"]) is not int or info["schema"] != SCHEMA:
        raise SchemaError(
            f"{path}: schema {_brief(info['schema'])} (written by {_brief(info.get('written_by'))}); "
            f"cxr-fast {__version__} reads schema {SCHEMA}. Export the run again."
        )
    if missing := [name for name in NEEDED if name not in info]:
        raise InputError(f"{path}: damaged metadata (no {', '.join(missing)}).")
    try:
        from_dict(PreprocessSpec, info["preprocess"])
    except CxrFastError as error:
        raise type(error)(f"{path}: damaged metadata (preprocess: {_brief(error, 160)})") from error
    if wrong := _wrong(info):
        raise InputError(f"{path}: damaged metadata ({wrong}).")
    read_holdout(info, path)
    read_training_unlikeness(info, path)
    return info


def _wrong(info: dict[str, Any]) -> str:
    """Say what is wrong with the entries that predictions are made from; empty where nothing is."""
    labels, limits, spec = info["labels"], info["thresholds"], info["preprocess"]
    if not _texts(labels) or not labels or len(set(labels)) < len(labels):
        return "labels are not a list of different names"
    if not isinstance(limits, list) or len(limits) != len(labels):
        return f"thresholds are not a list of {len(labels)} numbers"
    # Just above 1 is what a specificity may need: call nothing positive.
    if not all(is_number(limit) and 0 <= limit <= 1 + 1e-6 for limit in limits):
        return "a threshold is not a number between 0 and 1"
    if missing := [field.name for field in dataclasses.fields(PreprocessSpec) if field.name not in spec]:
        return f"preprocess has no {', '.join(missing)}"  # a default would give other pixels without a word
    if type(spec["size"]) is not int:
        return f"the size in preprocess is {_brief(spec['size'])}"
    if not _texts([info[SEAL], info["labels_sha256"]]):
        return f"{SEAL} or labels_sha256 is not text"
    return ""


def has_unlikeness(info: dict[str, Any]) -> bool:
    """Whether a model file puts out `unlikeness`."""
    return isinstance(info.get("unlikeness"), dict)


def require_unlikeness(info: dict[str, Any], path: Path) -> None:
    """Raise InputError where a model file does not put out `unlikeness`."""
    if not has_unlikeness(info):
        raise InputError(
            f"--refuse-unlike: {path} has no unlikeness (an earlier version trained it, or its films were too few); "
            "train and export again, or leave the flag out."
        )


def describe_yardstick(parity: dict[str, Any]) -> str:
    """`JPEG 95 29.0, one pixel 182.0`: decisions of float32 in 10,000 that change where the checked films are changed.

    Empty for a file of an earlier version, whose `parity` has no yardstick.
    """
    beside = parity.get("yardstick")
    found = {name: beside.get(name) for name in FILM_CHANGES} if isinstance(beside, dict) else {}
    flips = {name: each.get("flips_per_10000") for name, each in found.items() if isinstance(each, dict)}
    return ", ".join(f"{FILM_CHANGES[name]} {count:.1f}" for name, count in flips.items() if is_number(count))


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _texts(value: object) -> bool:
    """Whether a JSON value is a list of text that UTF-8 can hold; JSON's \\ud800 alone cannot be written."""
    return isinstance(value, list) and all(
        isinstance(text, str) and text.strip() and not any("\ud800" <= c <= "\udfff" for c in text) for text in value
    )


def _brief(value: object, most: int = 60) -> str:
    """Show a value out of a file that may hold anything in one short line."""
    text = " ".join(str(value).encode("utf-8", "replace").decode().split())
    return text if len(text) <= most else text[:most] + "..."


# The bytes.


def _entries(file: IO[bytes]) -> list[Entry]:
    """Read every metadata entry. Raises NotOnnx."""
    size = file.seek(0, io.SEEK_END)
    found, graphs, text = [], 0, 0
    for record in records(file, 0, size, operations.MOST_RECORDS):
        if record.field == _GRAPH and record.wire == BYTES:
            graphs += 1
        elif record.field == _ENTRY and record.wire == BYTES:
            text += record.end - record.body
            if text > MOST_TEXT:
                raise NotOnnx(f"over {MOST_TEXT >> 20} MiB of metadata")
            found.append(Entry(*_pair(file, record), record))
    if graphs != 1:
        raise NotOnnx("no graph inside" if not graphs else "several graphs inside")
    return found


def _pair(file: IO[bytes], entry: Record) -> tuple[str, str]:
    """Read key and value of one entry."""
    texts: dict[int, str] = {}
    for record in records(file, entry.body, entry.end, 2):
        file.seek(record.body)
        try:
            texts[record.field] = file.read(record.end - record.body).decode()
        except ValueError:
            raise NotOnnx("metadata that is not UTF-8") from None
        if record.wire != BYTES or record.field not in (1, 2):
            raise NotOnnx("a metadata entry that is not a key and a value")
    return texts.get(1, ""), texts.get(2, "")


def _digest(file: IO[bytes], entries: list[Entry]) -> str:
    """Hash the bytes in file order, but for the entry of the hash itself and entries that are not ours."""
    left_out = [r for key, _, r in entries if key == PREFIX + SEAL or not key.startswith(PREFIX)]
    total, at = hashlib.sha256(), 0
    size = file.seek(0, io.SEEK_END)
    buffer = memoryview(bytearray(CHUNK))
    for start, end in [*((record.start, record.end) for record in left_out), (size, size)]:
        file.seek(at)
        while at < start:
            count = file.readinto(buffer[: min(CHUNK, start - at)])  # type: ignore[attr-defined]
            if not count:
                raise NotOnnx("it became shorter while it was read")
            total.update(buffer[:count])
            at += count
        at = end
    return total.hexdigest()
