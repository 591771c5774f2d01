"""Parts of earlier runs: kept in a new one, and films held out there that a new one would train on."""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.splits.given import EARLIER, FREE, HOLDOUT, TRAIN
from ..errors import CxrFastError, InputError
from .run_folder import read_info

NAMED = 3


@dataclass(frozen=True, kw_only=True)
class EarlierRun:
    """A finished run's split: its spec and data set's name, and group, hash and part of each image (N)."""

    folder: Path
    spec: dict[str, Any]
    dataset: str
    groups: Sequence[str]
    sha256: Sequence[str]
    parts: Sequence[int]


def read_earlier(folder: Path) -> EarlierRun:
    """Read the split of a run. Raises InputError with one line where the folder is none, or is damaged."""
    info = read_info(folder)
    try:
        with open(folder / "predictions.npz", "rb") as raw, np.load(raw) as file:
            groups, sha256, parts = (file[name].tolist() for name in ("group", "sha256", "fold"))
        return EarlierRun(
            folder=folder,
            spec=info["spec"],
            dataset=str(info["cache"]["dataset"]["name"]),
            groups=groups,
            sha256=sha256,
            parts=parts,
        )
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{folder}: its split cannot be read ({type(error).__name__}: {str(error)[:80]}).") from None


def require_same_folds(earlier: EarlierRun, folds: int, by: str) -> None:
    """Raise InputError where a run's parts cannot be those of a new one."""
    for flag, was, now in (("--folds", earlier.spec["folds"], folds), ("--split-by", earlier.spec["split_by"], by)):
        if was != now:
            raise InputError(f"{EARLIER}: {earlier.folder} has {flag} {was}, and {flag} {now} is asked for.")


def keep_parts(earlier: EarlierRun, groups: Sequence[str], sha256: Sequence[str]) -> np.ndarray:
    """The part of each image (N,) by an earlier run: by its group, else by that of an image of the group with the same
    bytes, else -3. Where images were split, by bytes alone.

    Raises InputError where the run has none of the images, so that equal names of groups may be other patients.
    """
    by_bytes: dict[str, int] = dict(zip(earlier.sha256, earlier.parts, strict=True))
    if not by_bytes.keys() & set(sha256):
        raise InputError(f"{EARLIER}: {earlier.folder} has none of these images; name a run on the same films.")
    by_group = dict(zip(earlier.groups, earlier.parts, strict=True))
    if earlier.spec["split_by"] == "image":
        by_group = {}
    own = (by_group.get(group, by_bytes.get(value, FREE)) for group, value in zip(groups, sha256, strict=True))
    return np.fromiter(own, np.int16, len(groups))


def describe_kept(parts: np.ndarray, groups: Sequence[str], earlier: EarlierRun) -> str:
    """How many groups keep their part, are new, or are gone."""
    kept = {group for group, part in zip(groups, parts.tolist(), strict=True) if part not in (FREE, TRAIN)}
    new, gone = set(groups) - kept, set(earlier.groups) - set(groups)
    return f"{EARLIER}: {len(kept):,} groups keep their part of {earlier.folder}, {len(new):,} are new and drawn" + (
        f", {len(gone):,} of its groups are no longer here" if gone else ""
    )


def find_trained_holdouts(
    folder: Path, groups: Sequence[str], sha256: Sequence[str], assignment: np.ndarray, dataset: str
) -> tuple[str, ...]:
    """Lines on the runs in `folder` whose hold-out has groups that this split trains on; damaged runs are passed over.

    groups and sha256 (N) are of the images, assignment (N,) their parts, `dataset` the name of the data set. A group
    was held out where one of its images was, by its bytes; in a run of the same data set also by the group's name.
    """
    trained: dict[str, set[str]] = defaultdict(set)
    for group, value, part in zip(groups, sha256, assignment.tolist(), strict=True):
        if part >= 0:
            trained[value].add(group)
    names = set().union(*trained.values()) if trained else set()
    images = Counter(group for group, part in zip(groups, assignment.tolist(), strict=True) if part >= 0)
    said: list[tuple[int, str]] = []
    for run in _runs(folder):
        held = [i for i, part in enumerate(run.parts) if part == HOLDOUT]
        found = {group for i in held for group in trained.get(run.sha256[i], ())}
        if run.dataset == dataset and found | (set(run.sha256) & set(sha256)):
            found |= {run.groups[i] for i in held} & names
        if found:
            count = sum(images[group] for group in found)
            many = f"{len(found):,} groups ({count:,} images)"
            said.append((count, f"{many} that this sweep trains on are hold-out of {run.folder}"))
    lines = [text for _, text in sorted(said, key=lambda each: -each[0])]
    if not lines:
        return ()
    more = f" (and of {len(lines) - NAMED:,} more runs)" if len(lines) > NAMED else ""
    shown = lines[:NAMED]
    return (*shown[:-1], f"{shown[-1]}{more}; --split-from RUN keeps a run's hold-out and folds")


def _runs(folder: Path) -> list[EarlierRun]:
    """The finished runs in a folder that can be read, by name."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            if (path / "run.json").is_file():
                with contextlib.suppress(CxrFastError, OSError):
                    found.append(read_earlier(path))
    return found
