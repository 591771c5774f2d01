"""Estimate how long work still takes, from reports of how much of it is done."""

from __future__ import annotations

from collections import deque

STEP = 1000  # reports closer together than this part of the whole are taken as one, so that few are kept


class TimeLeft:
    """The seconds that work still takes at the pace of the later half of what was done.

    The first part of the work counts only while there is no later one: it also pays for what happens once, such as
    loading, compiling and a pipeline that fills. `start` is when the work began, `before` what was done by then; a
    report of `before` moves the start.

        >>> pace = TimeLeft(start=0.0, before=0)
        >>> for second, done in ((30, 1), (31, 2), (32, 3)):
        ...     pace.report(second, done, total=20)
        >>> pace.seconds(total=20)
        17.0
    """

    def __init__(self, start: float, before: float) -> None:
        self.before = before
        self.points: deque[tuple[float, float]] = deque([(start, before)])
        self.whole = True  # whether the oldest point is the start

    def report(self, now: float, done: float, total: float) -> None:
        """Take in that `done` of `total`, in any unit, are done at `now`, in seconds; no less than reported before."""
        points = self.points
        if done <= points[-1][1]:
            if len(points) == 1:
                points[0] = (now, self.before)
            return
        if len(points) > 2 and points[-1][1] - points[-2][1] < total / STEP:
            points.pop()
        points.append((now, done))
        if self.whole and len(points) == 3:
            points.popleft()
            self.whole = False
        while len(points) > 2 and points[1][1] <= (self.before + done) / 2:
            points.popleft()

    @property
    def done(self) -> float:
        """What was reported last."""
        return self.points[-1][1]

    def seconds(self, total: float) -> float | None:
        """Return the seconds from the last report to the end; None before anything is done."""
        (began, first), (now, done) = self.points[0], self.points[-1]
        return (now - began) / (done - first) * max(total - done, 0.0) if done > first else None
