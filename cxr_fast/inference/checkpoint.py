"""Answers of an unfinished or finished prediction, kept beside its table in one SQLite file, `NAME.resume`."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import stat
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..data.formats.dicom import other_subject
from ..errors import InputError
from ..system.files import file_sha256
from .predictor import Result, changed_ns

SUFFIX, WAL = ".resume", ".resume-wal"
# A file with any other tables than these is refused: to change what a row means, change a name here.
TABLES = (
    "CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID",
    "CREATE TABLE answers (path BLOB PRIMARY KEY, size INT, mtime_ns INT, sha256 TEXT, reason TEXT, message BLOB,"
    " probabilities BLOB, unlikeness REAL, provider TEXT, crc INT) WITHOUT ROWID",
)
# Those of versions before unlikeness, which are made into the ones above.
EARLIER_TABLES = (TABLES[0], TABLES[1].replace(" unlikeness REAL,", ""))
INSERT = "REPLACE INTO answers VALUES (?,?,?,?,?,?,?,?,?,?)"
# No other process has the file open (the table's lock is held), so SQLite needs neither locks, which some network
# file systems lack, nor shared memory. WAL: a batch is one write without a wait for the disk. cell_size_check and
# trusted_schema are SQLite's own advice for files that may be damaged.
SETTINGS = ("locking_mode=EXCLUSIVE", "synchronous=NORMAL", "cell_size_check=ON", "trusted_schema=OFF")
SYNC_SECONDS = 1.0  # a killed process loses no batch that it kept; a power cut may lose those of this time
MEND = "give another --out, or pass --overwrite"

Row = tuple[bytes, int, int, str, str, bytes, bytes | None, float | None, str]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which kept answers a run takes: with `strict` none whose note says that the film is none of a chest; with `gone`
    also those of films that are gone; with `limit` none of a film whose unlikeness is unknown or over it."""

    strict: bool = False
    gone: bool = False
    limit: float | None = None


class Checkpoint:
    """Answers by path, kept beside `out` so that a second run predicts only what is missing or has changed.

    `model` holds `model_sha256` and `pixel_check`, of which the answers are. Raises InputError where the file holds
    answers of another model, is damaged or is not ours, and where `out` exists without it, unless `overwrite`; OSError
    where the disk is full or cannot be written. Use as a context manager, under the lock of `out`.
    """

    def __init__(self, out: Path, model: Mapping[str, str], asked: Asked = Asked(), *, overwrite: bool = False) -> None:
        self.asked = asked
        self.out, self.path = out, beside(out)
        if overwrite:
            self.path.unlink(missing_ok=True)  # SQLite removes a WAL without its file
        elif out.exists() and not self.path.exists():
            raise InputError(
                f"--out: {out} exists but {self.path.name} is missing, so it is unknown which model wrote {out.name}; "
                f"{MEND}."
            )
        new = not self.path.exists()
        with self._errors():
            self.db = sqlite3.connect(f"{self.path.absolute().as_uri()}?vfs=unix-none", uri=True)
        try:
            with self._errors():
                self._open(dict(model))
        except BaseException:
            self.db.close()
            if new:  # no answer is in it
                self.path.unlink(missing_ok=True)
                out.with_name(out.name + WAL).unlink(missing_ok=True)
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.db.close()  # moves the WAL into the file

    def holds(self, path: str) -> bool:
        """Whether there are probabilities of this very file: of its size and time, else of its content.

        `asked` says which do not count. With its `gone` the answer to a file that is gone counts: it may be fetched by
        somebody between the look at a folder and the answers.
        """
        try:
            known = self.row(path)[0]
            if self.asked.strict and other_subject(known.note):
                return False
            if self.asked.limit is not None and not _likely(known.unlikeness, self.asked.limit):
                return False
            if self.asked.gone and known.ok and not os.path.lexists(path):
                return True
            status = os.stat(path)
            if not known.ok or not stat.S_ISREG(status.st_mode) or status.st_size != known.size:
                return False
            return changed_ns(status) == known.mtime_ns or file_sha256(Path(path)) == known.sha256
        except (KeyError, OSError, ValueError):
            return False

    def row(self, path: str) -> tuple[Result, str]:
        """The newest answer to a path, and which provider gave it. KeyError where there is none that is sound."""
        with self._errors():
            found = self.db.execute("SELECT * FROM answers WHERE path = ?", (_bytes(path),)).fetchone()
        if found is None or found[-1] != _crc(found[:-1]):
            raise KeyError(path)
        _, size, mtime_ns, sha256, reason, message, values, unlikeness, provider, _ = found
        result = Result(
            path=path,
            size=size,
            mtime_ns=mtime_ns,
            sha256=sha256,
            reason=reason,
            message=message.decode("utf-8", "surrogatepass"),
            probabilities=None if values is None else np.frombuffer(values, "<f4"),
            unlikeness=unlikeness,
        )
        return result, provider

    def absent(self, paths: Iterable[str]) -> list[str]:
        """The answered paths that are not among `paths`, sorted."""
        with self._errors():
            known = {
                bytes(path).decode("utf-8", "surrogatepass") for (path,) in self.db.execute("SELECT path FROM answers")
            }
        return sorted(known.difference(paths))

    def is_answered(self, path: str) -> bool:
        """Whether there are probabilities of a path, of whatever content it had."""
        try:
            return self.row(path)[0].ok
        except KeyError:
            return False

    def follow_moved(self, paths: Sequence[str], absent: Sequence[str]) -> list[str]:
        """Give answers of `absent` files that are gone to those of `paths` with the same bytes; return the others.

        Only files of the size of a gone one are read.
        """
        gone: dict[int, list[Result]] = {}
        for path in absent:
            with contextlib.suppress(KeyError):
                result, _ = self.row(path)
                if result.ok and not os.path.lexists(path):
                    gone.setdefault(result.size, []).append(result)
        followed = set()
        for path in paths if gone else ():
            with contextlib.suppress(OSError, ValueError):
                status = os.stat(path)
                if not (fits := gone.get(status.st_size)) or not stat.S_ISREG(status.st_mode):
                    continue
                value = file_sha256(Path(path))
                old = next((result for result in fits if result.sha256 == value), None)
                if old is not None:
                    fits.remove(old)
                    followed.add(old.path)
                    self._move(old, path)
        return [path for path in absent if path not in followed]

    def _move(self, old: Result, path: str) -> None:
        row = _row(replace(old, path=path, mtime_ns=0), self.row(old.path)[1])
        with self._errors(), self.db:
            self.db.execute(INSERT, (*row, _crc(row)))
            self.db.execute("DELETE FROM answers WHERE path = ?", (_bytes(old.path),))

    def append(self, results: Sequence[Result], provider: str) -> None:
        """Keep a batch, all of it or nothing."""
        rows = [_row(result, provider) for result in results]
        with self._errors(), self.db:
            self.db.executemany(INSERT, [(*row, _crc(row)) for row in rows])
        if time.monotonic() - self._synced > SYNC_SECONDS:
            with self._errors():
                self.db.execute("PRAGMA wal_checkpoint")
            self._synced = time.monotonic()

    def _open(self, model: dict[str, str]) -> None:
        """Make the tables, or refuse those found before anything is written."""
        for setting in SETTINGS:
            self.db.execute(f"PRAGMA {setting}")
        found = tuple(sql for (sql,) in self.db.execute("SELECT sql FROM sqlite_master ORDER BY name"))
        if found and found not in (TABLES, EARLIER_TABLES):
            raise self._unreadable()
        self.db.execute("PRAGMA journal_mode=WAL")
        if not found:  # new, or killed before it was made
            with self.db:
                for statement in ("BEGIN", *TABLES):
                    self.db.execute(statement)
                self.db.executemany("INSERT INTO about VALUES (?, ?)", model.items())
        about = dict(self.db.execute("SELECT name, value FROM about"))
        if about.keys() != model.keys():
            raise self._unreadable()
        one, two = about["model_sha256"], model["model_sha256"]
        if one != two:
            raise InputError(
                f"--out: {self.out} holds another model's answers ({one[:12]}, this is {two[:12]}); {MEND}."
            )
        if about != model:
            raise InputError(
                f"--out: {self.out} was made where Pillow decodes or resizes a picture to other pixels; {MEND}."
            )
        if found == EARLIER_TABLES:
            self._add_unlikeness()

    def _add_unlikeness(self) -> None:
        """Give the answers of an earlier version an unknown unlikeness; leave unsound ones out."""
        with self.db:
            self.db.execute("BEGIN")
            rows = self.db.execute("SELECT * FROM answers").fetchall()
            self.db.execute("DROP TABLE answers")
            self.db.execute(TABLES[1])
            new = [(*row[:-2], None, row[-2]) for row in rows if row[-1] == _crc(row[:-1])]
            self.db.executemany(INSERT, [(*row, _crc(row)) for row in new])

    def _unreadable(self) -> InputError:
        with open(self.path, "rb") as file:
            earlier = file.read(200).startswith(b'{"kind": "cxr-fast predictions so far"')
        if earlier:
            return InputError(
                f"--out: {self.path} holds answers in the format of an earlier cxr-fast; finish them with that one, or "
                f"{MEND} to predict all images again."
            )
        return InputError(
            f"--out: {self.path} is damaged, or another version of cxr-fast or another program wrote it; {MEND} to "
            "predict all images again."
        )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise what SQLite says of the disk as OSError, and of the file's content as InputError."""
        try:
            yield
        except sqlite3.ProgrammingError:
            raise
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter where its message quotes damaged text
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path)) from error
            if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
                raise OSError(errno.EIO, str(error), str(self.path)) from error
            raise self._unreadable() from error


def beside(out: Path) -> Path:
    """Where the answers of `out` are kept."""
    return out.with_name(out.name + SUFFIX)


def _bytes(text: str) -> bytes:
    """A name as bytes; those of names that are no UTF-8 too, and by no locale."""
    return text.encode("utf-8", "surrogatepass")


def _row(result: Result, provider: str) -> Row:
    values = None if result.probabilities is None else result.probabilities.astype("<f4").tobytes()
    head = (_bytes(result.path), result.size, result.mtime_ns, result.sha256, result.reason)
    return (*head, _bytes(result.message), values, result.unlikeness, provider)


def _likely(unlikeness: float | None, limit: float) -> bool:
    return unlikeness is not None and unlikeness <= limit


def _crc(row: tuple[object, ...]) -> int:
    """SQLite does not see a flipped bit in a value: a row that has one is predicted again."""
    return zlib.crc32(repr(row).encode("utf-8", "surrogatepass"))
