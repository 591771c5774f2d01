"""Find the images that a table lists below a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import InputError
from .layouts import ListedImages
from .near_names import NearNames, name_differences, spell_name
from .paths import is_hidden

NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Located:
    """Each wanted image as a path below the folder, None where there is none; `notes` are lines for people, `doubts`
    what an image that was not found may be."""

    paths: Sequence[str | None]
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


def find_listed(rows: ListedImages, wanted: Sequence[str], root: Path, *, twice: bool) -> Located:
    """Find each wanted image below `root`, by its name, else by one that differs a little (`near_names`).

    Where two files fit, the image is not found (`twice`), or InputError.
    """
    if rows.key is None:
        exact: list[str | None] = [image if os.path.isfile(root / image) else None for image in wanted]
        if None not in exact:
            return Located(paths=exact)
        near = NearNames()
        fits = [[] if path else near.find(str(root), image) for image, path in zip(wanted, exact, strict=True)]
    else:
        exact, fits = _find_by_key(rows, wanted, root, twice=twice)
    return _add_near(wanted, exact, fits)


def _find_by_key(
    rows: ListedImages, wanted: Sequence[str], root: Path, *, twice: bool
) -> tuple[list[str | None], list[list[str]]]:
    """Each image where exactly one file has its key; for the others the files whose key differs a little."""
    assert rows.key is not None
    keys = [rows.key(image) for image in wanted]
    below: dict[str, list[str]] = {key: [] for key in keys}
    others: dict[str, list[str]] = {}
    for path in _walk(root):
        if (key := rows.key(path)) in below:
            below[key].append(path)
        else:
            others.setdefault(spell_name(key), []).append(path)
    exact: list[str | None] = []
    for image, key in zip(wanted, keys, strict=True):
        found = [image] if image in below[key] else sorted(below[key])
        if len(found) > 1 and not twice:
            raise InputError(
                f"{root}: {image} is both {found[0]} and {found[1]}. Give the folder that counts with --images."
            )
        exact.append(found[0] if len(found) == 1 else None)
    near = [
        [] if path or below[key] else sorted(others.get(spell_name(rows.key(image.replace("\\", "/"))), []))
        for image, key, path in zip(wanted, keys, exact, strict=True)
    ]
    return exact, near


def _add_near(wanted: Sequence[str], exact: list[str | None], near: Sequence[Sequence[str]]) -> Located:
    """The exact paths, and for images without one the only file near it, where no other image is that file."""
    used = Counter(os.path.normpath(path) for path in exact if path)
    used.update(os.path.normpath(fits[0]) for fits in near if len(fits) == 1)
    paths, moved, doubts = list(exact), [], []
    for row, (image, fits) in enumerate(zip(wanted, near, strict=True)):
        if len(fits) == 1 and used[os.path.normpath(fits[0])] == 1:
            paths[row] = fits[0]
            moved.append((image, fits[0]))
        elif len(fits) > 1:
            doubts.append(f"{image} may be {fits[0]} or {fits[1]}")
    return replace(Located(paths=paths, doubts=tuple(doubts)), notes=_note_moved(moved))


def _note_moved(moved: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """One line per kind of difference, with the number of images and the first."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for listed, found in moved:
        plain = listed.replace("\\", "/")
        shared = min(plain.count("/"), found.count("/")) + 1
        tails = [name[-len("/".join(path.split("/")[-shared:])) :] for name, path in ((listed, plain), (found, found))]
        kinds.setdefault(name_differences(*tails), []).append((listed, found))
    return tuple(
        f"{len(pairs):,} image(s) were found under a name that differs in {kind}: {pairs[0][0]} is {pairs[0][1]}."
        for kind, pairs in kinds.items()
    )


def _walk(root: Path) -> Iterator[str]:
    """POSIX paths of the files below `root`, links followed once; what `paths.is_hidden` names is left out."""
    seen = set()
    for folder, below, files in os.walk(root, followlinks=True):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            below.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        below[:] = sorted(name for name in below if not is_hidden(name))
        prefix = Path(folder).relative_to(root).as_posix()
        yield from (name if prefix == "." else f"{prefix}/{name}" for name in files if not is_hidden(name))


def refuse_missing(rows: ListedImages, located: Located, wanted: Sequence[str], root: Path) -> None:
    """Raise InputError for the images that were not found: how many, the first, what they may be, what to do."""
    missing = [image for image, path in zip(wanted, located.paths, strict=True) if path is None]
    named = ", ".join(missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
    doubt = f"; {located.doubts[0]}" if located.doubts else ""
    mend = "Give their folder with --images" + (
        ", or leave them out with --skip-missing." if len(missing) < len(wanted) else "."
    )
    raise InputError(
        f"{len(missing):,} of the {len(wanted):,} images that {rows.file.name} lists are not below "
        f"{os.path.abspath(root)}: {named}{doubt}\n{mend}"
    )
