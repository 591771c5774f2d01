"""How long the parts of a fit are expected to take, and how much of all of them is left."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from ...system.text import duration

PARTS = ("cache", "sweep", "export", "verify")


class PartTimes:
    """The parts of a fit with their expected seconds, NaN where unknown; `begin` says which one is under way."""

    def __init__(self, expected: Mapping[str, float]) -> None:
        self.expected = {part: expected.get(part, math.nan) for part in PARTS}
        self.part, self.began = PARTS[0], time.monotonic()

    def begin(self, part: str) -> None:
        """Take all parts before this one as done."""
        self.part, self.began = part, time.monotonic()

    def left(self, seconds: float | None, whole: bool) -> str:
        """Say what is left of all, where `seconds` are left of the part under way, or of a step of it (not `whole`).

        Of a step, the part takes at least as long as it was expected to; before any pace is known, just so long.
        """
        if seconds is None or not whole:
            planned = self.expected[self.part] - (time.monotonic() - self.began)
            seconds = max(seconds or 0.0, 0.0 if math.isnan(planned) else planned)
        later = {part: self.expected[part] for part in PARTS[PARTS.index(self.part) + 1 :]}
        return describe_sum(seconds, later, "of all")

    def describe(self) -> str:
        """All parts from the part under way on: `about 12 min 30 s, without the sweep`."""
        parts = {part: self.expected[part] for part in PARTS[PARTS.index(self.part) :]}
        return describe_sum(0.0, parts, "").rstrip()


def describe_sum(seconds: float, parts: Mapping[str, float], of: str) -> str:
    """Add up what is known: `about 3 min 10 s of all without the sweep`."""
    known = sum(each for each in parts.values() if not math.isnan(each))
    unknown = [f"the {part}" for part, each in parts.items() if math.isnan(each)]
    lacking = f"without {' and '.join(unknown)}" if unknown else ""
    return " ".join(filter(None, [f"about {duration(seconds + known)}", of, lacking]))
