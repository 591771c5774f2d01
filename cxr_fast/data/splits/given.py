"""Parts that are given, not drawn: a column, a list of the hold-out, the parts of an earlier run; combined by group."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...errors import InputError

HOLDOUT, TRAIN, FREE = -1, -2, -3  # a fold is 0 and above; TRAIN is any fold, FREE anything
WORDS = {"train": TRAIN, "holdout": HOLDOUT, "": FREE}
COLUMN, LIST, EARLIER = "the column split", "--holdout-list", "--split-from"
NAMED = 3


def check_words(words: Sequence[str], file: Path) -> Sequence[str]:
    """The column `split` of a table. Raises InputError naming the first other word, and its row."""
    for row, word in enumerate(words):
        if word not in WORDS:
            raise InputError(
                f"{file}: column 'split' holds {word!r} in data row {row + 1}; it takes train, holdout, or nothing "
                "(then the row is drawn)."
            )
    return words


def from_words(words: Sequence[str]) -> np.ndarray:
    """What the column says of each image, (N,)."""
    return np.array([WORDS[word] for word in words], dtype=np.int16)


def read_list(file: Path) -> list[str]:
    """The lines of a list of the hold-out, each once, without blank ones. Raises InputError."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{LIST}: {file} is not UTF-8 text.") from None
    except OSError as error:
        raise InputError(f"{LIST}: {file}: {error.strerror or error}.") from None
    if not (found := list(dict.fromkeys(line.strip() for line in lines if line.strip()))):
        raise InputError(f"{LIST}: {file} is empty; it takes an image or a group per line.")
    return found


def from_list(lines: Sequence[str], images: Sequence[str], groups: Sequence[str], of: str) -> np.ndarray:
    """The hold-out for the images that the lines name, by image or by group, else any fold; (N,).

    An image is named by its path, or by its file name where only one image has it. An image that is named takes its
    group along. Raises InputError for lines that name nothing; `of` says where they were looked for.
    """
    bare = Counter(image.rpartition("/")[2] for image in images)
    rows: dict[str, list[int]] = defaultdict(list)
    for row, (image, group) in enumerate(zip(images, groups, strict=True)):
        name = image.rpartition("/")[2]
        for key in {image, group, *((name,) if bare[name] == 1 else ())} - {""}:
            rows[key].append(row)
    if lost := [line for line in lines if line not in rows]:
        raise InputError(
            f"{LIST}: {len(lost):,} of {len(lines):,} lines name no image or group of {of}: {', '.join(lost[:NAMED])}"
            f"{', ...' if len(lost) > NAMED else ''}; an image per line as the cache or the table names it, or a group."
        )
    out = np.full(len(images), TRAIN, dtype=np.int16)
    out[[row for line in lines for row in rows[line]]] = HOLDOUT
    return out


def whole_groups(given: np.ndarray, units: Sequence[str], source: str, *, listed: bool = False) -> np.ndarray:
    """Spread what is given for images (N,) over their groups (N names): one value per group.

    Images without a part follow the others of their group; of two folds the one with more images wins. Raises
    InputError where a group is in training and in the hold-out, unless it was `listed`: then it is held out.
    """
    names, unit = np.unique(np.asarray(list(units), dtype=str), return_inverse=True)
    unit = unit.reshape(-1)
    held, trained, folds = (np.bincount(unit[rows], minlength=len(names)) for rows in _kinds(given))
    if (both := (held > 0) & (trained > 0)).any() and not listed:
        first = str(names[np.flatnonzero(both)[0]])
        raise InputError(
            f"{source}: {int(both.sum()):,} group(s) have images in training and in the hold-out, first {first!r}; a "
            "group is on one side: mark its images alike, or pass --split-by image."
        )
    out = np.where(held > 0, HOLDOUT, np.where(trained > 0, TRAIN, FREE))
    if folds.any():
        votes = np.zeros((len(names), int(given.max()) + 1), int)
        np.add.at(votes, (unit[given >= 0], given[given >= 0]), 1)
        out = np.where((out == TRAIN) & (folds > 0), votes.argmax(axis=1), out)
    return np.asarray(out[unit], dtype=np.int16)


def _kinds(given: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return given == HOLDOUT, (given == TRAIN) | (given >= 0), given >= 0


def combine(sources: Mapping[str, np.ndarray], units: Sequence[str]) -> np.ndarray:
    """One answer of several sources, (N,) each, one value per group; a fold goes before "any fold".

    Raises InputError naming the first group that one source holds out and another trains on.
    """
    out, by = np.full(len(units), FREE, dtype=np.int16), np.full(len(units), "", dtype=object)
    for name, given in sources.items():
        contradicts = ((out == HOLDOUT) & ((given == TRAIN) | (given >= 0))) | (
            (given == HOLDOUT) & ((out == TRAIN) | (out >= 0))
        )
        if contradicts.any():
            row = int(np.flatnonzero(contradicts)[0])
            held, trained = (by[row], name) if out[row] == HOLDOUT else (name, by[row])
            count = len({units[i] for i in np.flatnonzero(contradicts).tolist()})
            raise InputError(
                f"{held} holds out what {trained} trains on: {count:,} group(s), first {units[row]!r}; leave one of "
                "them out (--split drawn leaves the column out), or make them agree."
            )
        better = (out == FREE) | ((out == TRAIN) & (given >= 0))
        better &= given != FREE
        out[better], by[better] = given[better], name
    return out
