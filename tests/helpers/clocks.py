"""Time for tests of what waits and measures."""

from __future__ import annotations


class Clock:
    """Time that passes only when somebody waits or works."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time

    def ns(self) -> int:
        """The same in whole nanoseconds."""
        return round(self.time * 1e9)

    def pass_by(self, seconds: float) -> None:
        assert seconds >= 0
        self.time += seconds
