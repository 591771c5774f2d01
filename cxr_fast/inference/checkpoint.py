"""What a prediction has answered so far: one line a batch in `NAME.resume`, so that a second run does only the rest."""

from __future__ import annotations

import json
import os
import stat
import time
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .. import __version__
from ..errors import InputError
from ..system.files import file_sha256
from .predictor import Result, changed_ns

SUFFIX = ".resume"
KIND, SCHEMA = "cxr-fast predictions so far", 1
LINES = 16  # parsed ones kept: what is read in input order comes from a few runs, each in order
HEADER = 1 << 16
SYNC_SECONDS = 1.0  # a killed process loses nothing it wrote; this is what a power cut may take


class Resume:
    """The rows answered so far, beside `out`; kept when it is finished, so that more can follow.

    Appended batch by batch, each a line with its checksum; a line cut short by a kill is cut off when opened next.
    `model` says what the answers are of (JSON): InputError where the file says otherwise, or where `out` is there
    without it, unless `overwrite`. Use as a context manager, under the lock of `out`.
    """

    def __init__(self, out: Path, model: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.out, self.path = out, beside(out)
        self._offsets: dict[str, int] = {}
        self._lines: OrderedDict[int, dict[str, tuple[Result, str]]] = OrderedDict()
        self._header = {"kind": KIND, "schema": SCHEMA, "written_by": f"cxr-fast {__version__}", **model}
        if out.exists() and not self.path.exists() and not overwrite:
            raise InputError(
                f"--out: {out} is there, and {self.path.name}, which would say what it is of, is not; "
                "give another --out, or pass --overwrite."
            )
        self._file = open(self.path, "w+b" if overwrite or not self.path.exists() else "r+b")  # noqa: SIM115
        self._synced = time.monotonic()
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Resume:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sync()
        self._file.close()

    def holds(self, path: str) -> bool:
        """Whether there are probabilities of this very file; where its time cannot tell, its content does."""
        if path not in self._offsets or not (known := self.row(path)[0]).ok:
            return False
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode) or status.st_size != known.size:
                return False
            return changed_ns(status) == known.mtime_ns or file_sha256(Path(path)) == known.sha256
        except (OSError, ValueError):
            return False

    def row(self, path: str) -> tuple[Result, str]:
        """The newest answer to a path, and who gave it. KeyError where there is none."""
        offset = self._offsets[path]
        if offset not in self._lines:
            self._file.seek(offset)
            self._remember(offset, json.loads(_content(self._file.readline())))
        return self._lines[offset][path]

    def append(self, results: Sequence[Result], by: str) -> None:
        """Write a batch, all of it or nothing. A file that fails as it did before is not written again."""
        fresh = [result for result in results if not self._same_failure(result)]
        if not fresh:
            return
        offset = self._write({"by": by, "rows": [_packed(result) for result in fresh]})
        self._offsets |= dict.fromkeys((result.path for result in fresh), offset)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._sync()

    def _same_failure(self, result: Result) -> bool:
        if result.ok or result.path not in self._offsets:
            return False
        known = self.row(result.path)[0]
        return (known.reason, known.message) == (result.reason, result.message)

    def _write(self, value: Any) -> int:
        offset = self._file.seek(0, os.SEEK_END)
        text = json.dumps(value, separators=(",", ":")).encode()  # ASCII: names of any bytes come back as they were
        self._file.write(b"%08x %s\n" % (zlib.crc32(text), text))
        self._file.flush()
        return offset

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _read(self) -> None:
        """Find where each answer lies, and cut off what a kill left half written."""
        head = self._file.readline(HEADER)
        if not head.endswith(b"\n") and len(head) < HEADER:  # nothing, or killed in its first line
            self._file.truncate(0)
            self._write(self._header)
            return
        self._compare(_content(head))
        offset = self._file.tell()
        while text := _content(line := self._file.readline()):
            self._offsets |= dict.fromkeys((row[0] for row in json.loads(text)["rows"]), offset)
            offset += len(line)
        self._file.truncate(offset)

    def _compare(self, text: bytes) -> None:
        mend = "give another --out, or pass --overwrite"
        try:
            old = json.loads(text)
        except ValueError:
            old = {}
        if old.get("kind") != KIND:
            raise InputError(f"--out: {self.path} is damaged or not of ours; {mend}.")
        if old["schema"] != SCHEMA:
            raise InputError(f"--out: {self.path} was written by {old['written_by']}; {mend}.")
        if old["model_sha256"] != self._header["model_sha256"]:
            one, two = old["model_sha256"][:12], self._header["model_sha256"][:12]
            raise InputError(f"--out: {self.out} holds another model's answers ({one}, this is {two}); {mend}.")
        if old["pixel_check"] != self._header["pixel_check"]:
            raise InputError(
                f"--out: {self.out} was made where Pillow decodes or resizes a picture to other pixels; {mend}."
            )

    def _remember(self, offset: int, line: dict[str, Any]) -> None:
        self._lines[offset] = {row[0]: (_unpacked(row), line["by"]) for row in line["rows"]}
        if len(self._lines) > LINES:
            self._lines.popitem(last=False)


def beside(out: Path) -> Path:
    """Where the rows of `out` are kept."""
    return out.with_name(out.name + SUFFIX)


def _content(line: bytes) -> bytes:
    """What a whole line says; nothing for one that was cut short or damaged."""
    text = line[9:-1]
    return text if line[-1:] == b"\n" and line[:9] == b"%08x " % zlib.crc32(text) else b""


def _packed(result: Result) -> list[Any]:
    values = None if result.probabilities is None else [float(str(p)) for p in result.probabilities.astype(np.float32)]
    return [result.path, result.size, result.mtime_ns, result.sha256, result.reason, result.message, values]


def _unpacked(row: list[Any]) -> Result:
    path, size, mtime_ns, sha256, reason, message, values = row
    return Result(
        path=path,
        size=size,
        mtime_ns=mtime_ns,
        sha256=sha256,
        reason=reason,
        message=message,
        probabilities=None if values is None else np.array(values, np.float32),
    )
