"""A file whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ..errors import InputError


def put(path: Path, data: bytes, flag: str = "", *, folders: bool = False) -> None:
    """Write `data` beside `path`, then put it in its place; `folders` makes the folders above it.

    Raises InputError, which names the flag, where it cannot be written.
    """
    scratch = path.with_name(path.name + f".partial.{os.getpid()}")
    try:
        if folders:
            path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(data)
        os.replace(scratch, path)
    except OSError as error:
        what = f"{flag}: cannot write {path}" if flag else f"{path}: cannot write it"
        raise InputError(f"{what}: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()
