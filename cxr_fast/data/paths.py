"""Find the image files that a command line names: files, folders, globs, lists and manifests."""

from __future__ import annotations

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import BinaryIO

from ..errors import InputError
from ..system.tables import Cells, filled, read_csv, read_parquet
from .formats.dicom import looks_like_dicom
from .images import IMAGE_SUFFIXES
from .near_names import NearNames

MANIFESTS = (".csv", ".csv.gz", ".parquet")
# Of Apple's archives; what lies in it, and files of names with `._`, hold no picture.
FOREIGN = "__MACOSX"
HIDDEN, NO_SUFFIX = "hidden", "without a known suffix"
MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
BY = ("study", "group")  # the columns that say which images are pooled, the first there is


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The images to predict (N), each once, in order.

    `studies` has one a path, "" where unknown, or is empty where no manifest said any; `by` is the column they are
    of. `groups` likewise: the patients, which may have several studies; a manifest's studies where it has no groups.
    `sources` are the manifests and lists that were read, `manifests` how many of them are manifests.
    `passed_over` counts the files of folders that are not among them, by reason.
    """

    paths: Sequence[str]
    studies: Sequence[str] = ()
    by: str = ""
    groups: Sequence[str] = ()
    sources: tuple[Path, ...] = ()
    manifests: int = 0
    passed_over: Mapping[str, int] = field(default_factory=dict)


def is_hidden(name: str) -> bool:
    """Whether a folder walk passes over a file or folder of this name: hidden, or of Apple's archives."""
    return name.startswith(".") or name == FOREIGN


def expand(items: Iterable[str]) -> list[str]:
    """Files, folders (recursive) and globs to a list of paths, in order, each once.

    Of a folder everything counts that has an image's suffix or begins as a DICOM file does; hidden files and folders do
    not. A named file is taken whatever its suffix. One that does not exist becomes a row that says so where it has an
    image's suffix, and is an InputError else, as a mistyped folder would be. So is a folder without images.
    """
    out: list[str] = []
    for item in items:
        if not (found := _named(item, Counter())):
            raise InputError(f"{item}: a folder without images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        out += found
    return list(dict.fromkeys(out))


def read(items: Iterable[str], *, stdin: BinaryIO | None = None) -> Inputs:
    """As `expand`, but a folder may be empty; also `-` and `@FILE`, a path a line, and a manifest of a column `image`.

    Lists are taken word by word, no globs and no folders, and are split at NUL instead of line ends where there is
    one (`find -print0`). A manifest's images are relative to it. Raises InputError, also where two rows put one image
    in two studies.
    """
    found: dict[str, str] = {}
    groups: dict[str, str] = {}
    sources: list[Path] = []
    columns: list[str] = []
    passed: Counter[str] = Counter()
    for item in items:
        if item == "-":
            studies = dict.fromkeys(_listed(item, (stdin or sys.stdin.buffer).read()), "")
        elif item.startswith("@") and not os.path.exists(item):
            sources.append(Path(item[1:]))
            studies = dict.fromkeys(_listed(item, _bytes(sources[-1])), "")
        elif item.lower().endswith(MANIFESTS):
            sources.append(Path(item))
            by, studies, owners = _manifest(sources[-1])
            columns.append(by)
            groups = owners | groups
        else:
            studies = dict.fromkeys(_named(item, passed), "")
        for path, study in studies.items():
            if not found.get(path):
                found[path] = study
    return Inputs(
        paths=list(found),
        studies=list(found.values()) if any(columns) else (),
        by=next(filter(None, columns), ""),
        groups=[groups.get(path, "") for path in found] if any(columns) else (),
        sources=tuple(sources),
        manifests=len(columns),
        passed_over=passed,
    )


def _named(item: str, passed: Counter[str]) -> list[str]:
    if not item:
        raise InputError("one of the inputs is empty: a shell variable without a value?")
    if os.path.isdir(item):
        return find_images(str(Path(item)), passed)
    if not os.path.lexists(item) and glob.has_magic(item):
        if not (matched := sorted(p for p in glob.glob(item, recursive=True) if not os.path.isdir(p))):
            raise InputError(f"{item}: matches no file.")
        return matched
    if not os.path.lexists(item) and os.path.splitext(item)[1].lower() not in IMAGE_SUFFIXES:
        raise InputError(f"{item}: no such file or folder.")
    return [item]


def find_images(root: str, passed: Counter[str]) -> list[str]:
    """Everything below a folder with an image's suffix or the beginning of a DICOM file; `passed` counts the rest.

    Links to folders are followed once. What turns out to be a pipe or a link to nothing is taken too, so that its row
    says what is wrong. Raises InputError for a folder that cannot be read.
    """
    found: list[str] = []
    seen = {_identity(root)}
    for folder, inside, names in os.walk(root, followlinks=True, onerror=_refuse):
        for name in names:
            path = os.path.join(folder, name)
            if is_hidden(name):
                passed[HIDDEN] += 1
            elif os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES or _begins_as_dicom(path):
                found.append(path)
            else:
                passed[NO_SUFFIX] += 1
        fresh = []
        for name in sorted(inside):
            if is_hidden(name):
                passed[HIDDEN] += 1
                continue
            if (identity := _identity(os.path.join(folder, name))) not in seen:
                seen.add(identity)
                fresh.append(name)
        inside[:] = fresh
    if root == os.curdir:
        found = [path.removeprefix(f"{os.curdir}{os.sep}") for path in found]
    return sorted(found, key=lambda path: path.replace(os.sep, "\0"))  # a folder's files stay together


def recorded_places(name: str, root: Path, images: Path | None = None) -> list[Path]:
    """List where an image that a cache or a run names may lie, the likeliest place first.

    `name` is absolute or relative to `root`, the folder it was found in. Where `images` says where the films are now,
    the last parts of the name are looked for below it, the longest first: of /a/b/c.png `images`/a/b/c.png,
    `images`/b/c.png and `images`/c.png; an absolute name itself comes last.
    """
    if images is None:
        return [root / name]
    path = PurePath(name)
    parts = path.parts[1:] if path.is_absolute() else path.parts
    below = [images.joinpath(*parts[start:]) for start in range(len(parts))]
    return [*below, Path(name)] if path.is_absolute() else below


def describe_places(places: Sequence[Path], most: int = 4) -> str:
    """Say where an image was looked for."""
    more = f" and {len(places) - most:,} more" if len(places) > most else ""
    return f"tried {', '.join(map(str, places[:most]))}{more}"


def _begins_as_dicom(path: str) -> bool:
    """Whether a file of no known suffix is DICOM, as scanners write it; a pipe or what cannot be read is not."""
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            return looks_like_dicom(file.read(132))
    except OSError:
        return False


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename}: {error.strerror}; its images would be missing from the answers.") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"@{path}: {error.strerror or error}.") from None


def _listed(item: str, data: bytes) -> list[str]:
    """The paths of a list; bytes that are not UTF-8 stay what they are. A byte order mark is no part of a name."""
    for mark, encoding in MARKS:
        if data.startswith(mark):
            data = data[len(mark) :]
            if encoding != "utf-8":
                data = _recoded(item, data, encoding)
            break
    lines = data.split(b"\0") if b"\0" in data else [line.removesuffix(b"\r") for line in data.split(b"\n")]
    if not (paths := [os.fsdecode(line) for line in lines if line]):
        raise InputError(f"{'standard input' if item == '-' else item}: a list without a path; a path a line is read.")
    return paths


def _recoded(item: str, data: bytes, encoding: str) -> bytes:
    try:
        return data.decode(encoding).encode()
    except UnicodeDecodeError:
        raise InputError(f"{item}: begins as UTF-16 and is none; save the list as UTF-8.") from None


def _manifest(path: Path) -> tuple[str, dict[str, str], dict[str, str]]:
    """The column that says the study, "" where there is none, path to study, and path to group, else to study."""
    cells: Cells = read_parquet(path) if path.suffix.lower() == ".parquet" else read_csv(path)
    if "image" not in cells:
        raise InputError(
            f"{path} lacks the column(s) image; a dataset's table becomes a manifest by "
            f"`cxrfast prepare {path} --out manifest.csv`."
        )
    images = filled(cells, "image", path)
    by = next((name for name in BY if name in cells), "")
    studies = cells[by] if by else [""] * len(images)
    found: dict[str, str] = {}
    groups: dict[str, str] = {}
    near, folder = NearNames(), os.path.dirname(path)
    for image, study, group in zip(images, studies, cells.get("group", studies), strict=True):
        name = os.path.join(folder, image)
        if not os.path.lexists(name) and len(fits := near.find(folder or os.curdir, image)) == 1:
            name = os.path.join(folder, fits[0])
        if found.setdefault(name, study) != study:
            raise InputError(f"{path}: {image} is in {by} {found[name]!r} and in {study!r}.")
        groups.setdefault(name, group or study)
    return by, found, groups
