"""Search texts that leave this machine for its paths and for names of images, patients and studies."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError

# An absolute path, `~/...`, `file://...` or `C:\...`; a slash after a letter, a colon or a slash is part of an address.
_UNIX = r"(?<![\w/.:~<])~?/[A-Za-z_.][\w.+@%-]*(?:/[^\s'\"`,;|()<>]*)*"
ABSOLUTE = re.compile(rf"{_UNIX}|file://[^\s'\"`]+|\b[A-Za-z]:\\[^\s'\"`,;|()<>]*")
META = "meta:"


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """What must not leave: paths of this machine, the longest first, and names of images, patients and studies."""

    paths: tuple[str, ...]
    names: tuple[str, ...]

    def clean(self, text: str) -> str:
        """Put the last part of each path in its place."""
        for path in self.paths:
            text = text.replace(path, last_part(path))
        return ABSOLUTE.sub(lambda found: last_part(found[0]), text)

    def find(self, text: str) -> str:
        """Say what a text holds that must not leave; empty where it holds nothing."""
        if path := ABSOLUTE.search(text):
            return f"the path {path[0]}"
        for name in (*self.paths, *self.names):
            if name in text and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text):
                return f"{name!r}, a path or the name of an image, a patient or a study of the run"
        return ""


def read_names(path: Path, classes: Collection[str]) -> tuple[str, ...]:
    """Read the names of images, groups and studies, and hashes, from a run's predictions.npz, sorted.

    Left out are what any text may hold: fewer than four characters, numbers of up to five digits, the classes, and
    values of `meta:` columns without a digit. Raises InputError where the file cannot be read.
    """
    try:
        with np.load(path) as file:
            columns = {name: file[name].astype(str).tolist() for name in file.files if file[name].dtype.kind in "US"}
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}); it names the patients that the texts are searched for."
        ) from error
    images = columns.pop("image", [])
    names = {part for image in images for part in (image, Path(image).name, Path(image).stem)}
    columns.pop("view", None)
    for column, values in columns.items():
        names |= {value for value in values if not column.startswith(META) or any(map(str.isdigit, value))}
    return tuple(sorted(n for n in names - set(classes) if len(n) >= 4 and not re.fullmatch(r"[\d.]{1,5}", n)))


def last_part(path: str) -> str:
    """Return a path's last part, whichever system it is of."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
