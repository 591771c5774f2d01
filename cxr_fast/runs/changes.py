"""Rename and remove run folders, finished or not; one that a sweep is writing is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..config import PARTIAL
from ..errors import InputError
from ..system.files import sync_folder
from ..system.locks import FileLock


def require_run(path: Path) -> Path:
    """The path of a run folder or of `NAME.partial`, made absolute. Raises InputError where it is neither."""
    path = Path(os.path.abspath(path))
    if (path / "run.json").is_file() or (path.name.endswith(PARTIAL) and (path / "plan.json").is_file()):
        return path
    if path.is_file() and path.name == "run.json":
        return path.parent
    partial = path.with_name(path.name + PARTIAL)
    hint = f"; {partial} is an unfinished run" if (partial / "plan.json").is_file() else ""
    raise InputError(f"{path}: not a run folder{hint}; `cxrfast runs` lists what there is.")


def rename_run(path: Path, name: str) -> Path:
    """Give a run another name in the same folder; returns its new path.

    Raises InputError where the name is taken or is no name, and HeldError while a sweep writes either of the two.
    """
    path, name = require_run(path), name.rstrip("/").removesuffix(PARTIAL)
    if not name or name in (".", "..") or "/" in name or name.startswith("."):
        raise InputError(f"{name!r}: give a name, not a path; the run stays in {path.parent}.")
    end = PARTIAL if path.name.endswith(PARTIAL) else ""
    new, out = path.with_name(name + end), path.with_name(path.name.removesuffix(PARTIAL))
    if new == path:
        return new
    with FileLock(out), FileLock(path.with_name(name)):
        for taken in (path.with_name(name), path.with_name(name + PARTIAL)):
            if os.path.lexists(taken) and taken != path:
                raise InputError(f"{taken} exists; give another name.")
        os.rename(path, new)
        sync_folder(new.parent)
    return new


def remove_run(path: Path) -> None:
    """Remove a run folder and all that is in it.

    It loses its name first, so that a kill leaves no half of a run under it. Raises HeldError while a sweep writes it.
    """
    path = require_run(path)
    if path.is_symlink():
        raise InputError(f"{path} is a link; remove the link, or name the folder it leads to.")
    with FileLock(path.with_name(path.name.removesuffix(PARTIAL))):
        old = path.with_name(f".{path.name}.removed.{os.getpid()}")
        os.rename(path, old)
        sync_folder(old.parent)
    shutil.rmtree(old)


def place_run(out: Path | None, name: str | None) -> Path | None:
    """The folder that --out or --name gives a run. Raises InputError for both, and for a name that is a path."""
    if name is None:
        return out
    if out is not None:
        raise InputError("--name is short for --out exports/NAME; leave one of them out.")
    if not name or "/" in name or name.startswith("."):
        raise InputError(f"--name: {name!r} must be a name, not a path; --out takes a path.")
    return Path("exports") / name
