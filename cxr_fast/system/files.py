"""Write files so that they appear whole or not at all, after a kill and after a power cut; hash them."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import InputError

AnyPath = str | os.PathLike[str]  # what a user may pass for a path
# What a file system says that cannot wait for a folder's names, and what it says of a folder that may not be read.
CANNOT_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES)


@contextlib.contextmanager
def atomic(path: Path, flag: str = "", *, folders: bool = False, locked: bool = False) -> Iterator[IO[bytes]]:
    """Open a file that gets the name `path` when the `with` block ends well, and leaves nothing where it does not.

    Its bytes are on the disk before it gets the name, and the name is when this returns: a power cut leaves the old
    file or the new one. `folders` makes the folders above it. What a kill leaves is NAME.partial.PID; with `locked`,
    for a caller that holds the lock of `path`, it is NAME.partial and the next writer replaces it. Raises InputError,
    which names `flag` if one is given, where the file cannot be written. An OSError raised by the block itself counts
    as such.
    """
    scratch = path.with_name(f"{path.name}.partial" + ("" if locked else f".{os.getpid()}"))
    try:
        with folders_above(path) if folders else contextlib.nullcontext():
            try:
                with open(scratch, "wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(scratch, path)
                sync_folder(path.parent)
            finally:
                with contextlib.suppress(OSError):
                    scratch.unlink()
    except OSError as error:
        what = f"{flag}: cannot write {path}" if flag else f"{path}: cannot write it"
        raise InputError(f"{what}: {disk_reason(path, error)}.") from error


@contextlib.contextmanager
def folders_above(path: Path) -> Iterator[None]:
    """Make the folders above `path`; where the `with` block does not end well, remove those of them that are empty."""
    made: list[Path] = []
    try:
        make_folders(path.parent, made)
        yield
    except BaseException:
        remove_empty(made)
        raise


def make_folders(path: Path, made: list[Path] | None = None) -> None:
    """Make a folder and those above it that do not exist, each name on the disk before the next; add them to `made`."""
    for folder in reversed((path := path.absolute(), *path.parents)):
        if not folder.is_dir():
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)
            if made is not None:
                made.append(folder)


def put_in_place(scratch: Path, path: Path) -> None:
    """Give a file, or a folder with all that is in it, the name `path` once its bytes are on the disk, and wait until
    the name is."""
    sync_tree(scratch)
    os.replace(scratch, path)
    sync_folder(path.parent)
    if scratch.parent != path.parent:
        sync_folder(scratch.parent)


def sync_tree(path: Path) -> None:
    """Wait until a file, or all files and names of a folder, are on the disk."""
    if path.is_dir():
        for child in path.iterdir():
            sync_tree(child)
        sync_folder(path)
        return
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove the folders that are empty, the last first; others, and those that cannot be removed, stay."""
    for folder in reversed(folders):
        with contextlib.suppress(OSError):
            folder.rmdir()


def disk_reason(path: Path, error: OSError) -> str:
    """Say in a few words why `path` cannot be written: the system's words, or which file stands where a folder must."""
    above = next((p for p in path.absolute().parents if os.path.isfile(p)), None)
    if isinstance(error, (FileExistsError, NotADirectoryError)) and above:
        return f"{above} is a file, not a folder"
    return error.strerror or str(error)


def write_bytes(path: Path, data: bytes, flag: str = "", *, folders: bool = False) -> None:
    """Write `data` with `atomic`."""
    with atomic(path, flag, folders=folders) as file:
        file.write(data)


def write_json(path: Path, value: Any, flag: str = "", *, folders: bool = False) -> None:
    """Write a value as JSON, indented by one, a newline at the end, with `atomic`."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode(), flag, folders=folders)


def write_csv(
    path: Path,
    head: Iterable[str],
    rows: Iterable[Sequence[Any]],
    flag: str = "",
    *,
    end: str = "\r\n",
    folders: bool = False,
) -> None:
    """Write a UTF-8 CSV with a header and line ends as in Python's csv module, or `end`, with `atomic`."""
    with atomic(path, flag, folders=folders) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.writer(text, lineterminator=end)
        writer.writerow(head)
        writer.writerows(rows)
        text.detach()


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes; of a folder, of the names and contents of all files in it."""
    if path.is_file():
        return file_sha256(path)
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    return hashlib.sha256("".join(f"{file_sha256(path / name)} {name}\n" for name in names).encode()).hexdigest()


def write_at(fd: int, data: Any, offset: int) -> None:
    """Write all of `data` at `offset` of an open file."""
    view = memoryview(data).cast("B")
    while len(view):
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def reserve_space(path: Path) -> None:
    """Claim a file's space on disk now, so that a full disk shows before hours of work."""
    fd = os.open(path, os.O_RDWR)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, os.fstat(fd).st_size)
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    """Wait until a folder's names are on the disk, so that a rename survives a power cut; do nothing where the file
    system cannot."""
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
