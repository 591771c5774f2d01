"""The note of a run: one line of a person's words in `note.txt` of its folder; run.json stays as the sweep wrote it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ..system.files import write_bytes

FILE = "note.txt"


def read_note(folder: Path) -> str:
    """The note of a run; empty where there is none."""
    with contextlib.suppress(OSError):
        return " ".join((folder / FILE).read_bytes().decode("utf-8", "replace").split())
    return ""


def write_note(folder: Path, text: str) -> None:
    """Write the note of a run as one line; an empty text removes it. Raises InputError where it cannot be written."""
    if text := " ".join(text.split()):
        write_bytes(folder / FILE, f"{text}\n".encode("utf-8", "replace"))
    else:
        (folder / FILE).unlink(missing_ok=True)
