"""Compare identifiers of patients and studies, however tables spell them: `50000001`, `50000001.0`, `050000001`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

NAMED = 3
_EXPONENT = re.compile(r"\d(?:\.\d+)?e\+?\d{1,2}")  # as spreadsheets write long numbers
_NUMBERED = re.compile(r"(\D*?)0*(\d+)(?:\.0*)?")


def spell_id(text: str) -> str:
    """Return one spelling for all of one identifier: without case, leading zeros, and the decimals of a whole number.

    `spell_id("050000001.0")` is `"50000001"`, `spell_id("P01")` is `"p1"`.
    """
    key = unicodedata.normalize("NFKC", text).strip().casefold()
    if _EXPONENT.fullmatch(key) and (value := float(key)).is_integer():
        return str(int(value))
    match = _NUMBERED.fullmatch(key)
    return match[1] + match[2] if match else key


def note_groups(groups: Iterable[str]) -> tuple[str, ...]:
    """At most one line for people: how many pairs of groups differ in spelling alone, so that a patient may be two."""
    spelled: dict[str, list[str]] = {}
    for group in dict.fromkeys(groups):
        spelled.setdefault(spell_id(group), []).append(group)
    twice = [names for names in spelled.values() if len(names) > 1]
    if not twice:
        return ()
    pairs = sum(len(names) * (len(names) - 1) // 2 for names in twice)
    named = ", ".join(f"{names[0]!r} and {names[1]!r}" for names in twice[:NAMED]) + ", ..." * (len(twice) > NAMED)
    return (
        f"{pairs:,} pair(s) of groups differ in spelling alone, so a patient can be on both sides of a fold: {named}; "
        "give each patient one spelling in the table.",
    )
