"""The splits that NIH ChestX-ray14, CheXpert and MIMIC-CXR come with: lists and tables beside the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ...system.tables import filled, need, read_csv
from ..layouts import by_name, by_stem, by_study, recognise
from ..manifest import Manifest, read_dataset

FLAG = "--split published"
NIH_TEST, NIH_TRAIN = "test_list.txt", "train_val_list.txt"
CHEXPERT_TRAIN, CHEXPERT_VALID = "train.csv", "valid.csv"
MIMIC_TABLE = "*split.csv*"
MIMIC_WORDS = {"train": "train", "validate": "train", "test": "holdout"}

Published = tuple[dict[str, str], str, Callable[[str], str]]  # word by key, word of all others, key of an image


def published_words(kind: str, folder: Path, images: Sequence[str]) -> tuple[str, ...]:
    """What the lists in `folder` say of each image: `train`, `holdout`, or "" where they do not name it.

    `kind` is the layout (nih, chexpert, mimic). Raises InputError for another layout, a list that is missing or holds
    another word, and lists that hold out none of the images.
    """
    readers = {"nih": _read_nih, "chexpert": _read_chexpert, "mimic": _read_mimic}
    if kind not in readers:
        raise InputError(
            f"{FLAG}: only NIH ChestX-ray14, CheXpert and MIMIC-CXR come with lists, and this is {kind}; a manifest "
            "takes a column split, and `sweep` a --holdout-list."
        )
    words, others, key = readers[kind](folder)
    found = tuple(words.get(key(image), others) for image in images)
    if "holdout" not in found:
        raise InputError(f"{FLAG}: the list in {folder} holds out none of the {len(found):,} images.")
    return found


def read_published(source: Path, *, limit: int | None = None, **named: Any) -> Manifest:
    """Read a data set as `read_dataset` does, with its published lists in the place of a column split.

    Of CheXpert's folder both tables are read, `train.csv` and `valid.csv`.
    """
    train, valid = source / CHEXPERT_TRAIN, source / CHEXPERT_VALID
    if train.is_file() and valid.is_file() and recognise(train)[0] == recognise(valid)[0] == "chexpert":
        parts = [read_dataset(train, limit=limit, **named)]
        if limit is None or len(parts[0]) < limit:
            parts.append(read_dataset(valid, limit=None if limit is None else limit - len(parts[0]), **named))
        manifest = _join(parts)
    else:
        manifest = read_dataset(source, limit=limit, **named)
    folder = source if source.is_dir() else source.parent
    return replace(manifest, splits=published_words(manifest.info["kind"], folder, manifest.images))


def _join(parts: Sequence[Manifest]) -> Manifest:
    """Manifests of one layout and folder, end to end."""
    first = parts[0]

    def column(name: str) -> tuple[str, ...]:
        return tuple(value for part in parts for value in getattr(part, name))

    shared = [name for name in first.subgroups if all(name in part.subgroups for part in parts)]
    skipped = sum(part.info["skipped_missing"] for part in parts)
    return replace(
        first,
        labels=np.concatenate([part.labels for part in parts]),
        subgroups={name: tuple(value for part in parts for value in part.subgroups[name]) for name in shared},
        info={**first.info, "skipped_missing": skipped},
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        images=column("images"),
        groups=column("groups"),
        views=column("views"),
        studies=column("studies"),
    )


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{FLAG}: {file} cannot be read ({error}).") from None


def _read_nih(folder: Path) -> Published:
    """`test_list.txt` is held out; all others are trained on, or only those of `train_val_list.txt` where it exists."""
    test, train = folder / NIH_TEST, folder / NIH_TRAIN
    if not test.is_file():
        raise InputError(f"{FLAG}: {folder} lacks {NIH_TEST}, which comes with NIH ChestX-ray14; put it there.")
    words = dict.fromkeys(map(by_name, _lines(train)), "train") if train.is_file() else {}
    words |= dict.fromkeys(map(by_name, _lines(test)), "holdout")
    return words, "" if train.is_file() else "train", by_name


def _read_chexpert(folder: Path) -> Published:
    """The images of `valid.csv` are held out."""
    file = folder / CHEXPERT_VALID
    if not file.is_file():
        raise InputError(f"{FLAG}: {folder} lacks {CHEXPERT_VALID}, which comes with CheXpert; put it there.")
    cells = read_csv(file)
    need(cells, ["Path"], file)
    return dict.fromkeys(map(by_study, cells["Path"]), "holdout"), "train", by_study


def _read_mimic(folder: Path) -> Published:
    """The table's `test` is held out, `train` and `validate` are trained on."""
    files = sorted(folder.glob(MIMIC_TABLE))
    if len(files) != 1:
        raise InputError(
            f"{FLAG}: {folder} must hold one table mimic-cxr-...-split.csv(.gz), which comes with MIMIC-CXR-JPG; it "
            f"holds {len(files)}."
        )
    cells = read_csv(files[0])
    need(cells, ["dicom_id", "split"], files[0])
    for row, word in enumerate(cells["split"]):
        if word not in MIMIC_WORDS:
            raise InputError(
                f"{files[0]}: column 'split' holds {word!r} in data row {row + 1}; it takes train, validate or test."
            )
    images = filled(cells, "dicom_id", files[0])
    words = {by_stem(image): MIMIC_WORDS[word] for image, word in zip(images, cells["split"], strict=True)}
    return words, "", by_stem
