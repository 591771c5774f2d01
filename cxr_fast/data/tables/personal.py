"""Keep names of patients out of a manifest: which columns `prepare` refuses to take."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import InputError
from ..disclosure import is_person, why_hidden

# Reasons of `why_hidden` that are no person, and that a report hides by itself.
_HARMLESS = ("long texts", "numbers differ")


def refuse_persons(column: str, values: Sequence[str], flag: str) -> None:
    """Raise InputError, without a value, for a column of persons' names that would identify patients or be shown."""
    if any(map(is_person, sorted({*values})[:1000])):
        raise InputError(
            f"{flag}: column {column!r} holds names of persons, which no manifest keeps; use their numbers."
        )


def refuse_meta(column: str, values: Sequence[str], groups: Sequence[str]) -> None:
    """Raise InputError, without a value, for a `meta:` column that could identify a person (`disclosure`)."""
    why = why_hidden(column, values, groups)
    if why and not any(word in why for word in _HARMLESS):
        raise InputError(f"--meta: column {column!r} could identify a person ({why}); leave it out.")
