"""Words of training, validation and test, as tables and folders say them, to those of the column `split`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import InputError

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "tr"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "train"),
    **dict.fromkeys(("test", "testing", "holdout", "hold-out", "hold_out"), "holdout"),
}


def read_split(column: str, values: Sequence[str], file: Path) -> tuple[list[str], tuple[str, ...]]:
    """A column of splits as `train`, `holdout` or "", and a note where validation counts as training.

    Raises InputError naming value and row of another word.
    """
    out = []
    for row, value in enumerate(values):
        word = value.casefold()
        if word and word not in SPLIT_WORDS:
            raise InputError(
                f"{file}: column {column!r} holds {value[:20]!r} in data row {row + 1}; it takes train, val, test, or "
                "nothing (then the row is drawn)."
            )
        out.append(SPLIT_WORDS.get(word, ""))
    count = sum(value.casefold().startswith(("val", "dev")) for value in values)
    return out, (f"{count:,} row(s) of validation count as training; folds are drawn there.",) if count else ()
