"""The time left of work whose pace is known, by a clock that the test moves."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.system.time_left import TimeLeft

SECONDS = st.floats(1e-3, 1e3)


def estimates(lasts: list[float], start: float = 0.0, before: int = 0) -> list[tuple[int, float, float]]:
    """How many items are done, the seconds said to be left, and those really left, after each of the items."""
    pace, total = TimeLeft(start, before), before + len(lasts)
    ends, out = list(itertools.accumulate(lasts, initial=start))[1:], []
    for done, now in enumerate(ends, before + 1):
        pace.report(now, done, total)
        said = pace.seconds(total)
        assert said is not None
        out.append((done - before, said, ends[-1] - now))
    return out


def require_within_two(found: list[tuple[int, float, float]]) -> None:
    """From a tenth on, and from the second item on: one item alone cannot tell whether it was a slow one."""
    for done, said, real in found:
        if done >= max(len(found) / 10, 2):
            assert real / 2 <= said + 1e-9 * real + 1e-6, (done, said, real)
            assert said <= 2 * real + 1e-6 * real + 1e-6, (done, said, real)


@given(items=st.integers(11, 3000), each=SECONDS, start=st.floats(0, 1e4), before=st.integers(0, 5000))
def test_steady_work(items: int, each: float, start: float, before: int) -> None:
    for done, said, real in estimates([each] * items, start, before):
        assert said == pytest.approx(real, rel=1e-3, abs=1e-6 * (start + each)), done


@given(items=st.integers(11, 300), each=SECONDS, first=st.floats(1e-2, 1e5))
def test_work_whose_first_item_is_slow(items: int, each: float, first: float) -> None:
    require_within_two(estimates([each * first] + [each] * (items - 1)))


@given(st.lists(st.floats(0.7, 1.4), min_size=11, max_size=200), st.floats(0.1, 100))
def test_work_that_varies(lasts: list[float], first: float) -> None:
    require_within_two(estimates([lasts[0] * first, *lasts[1:]]))


@given(items=st.integers(40, 200), other=st.floats(0.05, 20))
def test_work_that_changes_its_pace_is_followed(items: int, other: float) -> None:
    found = estimates([1.0] * items + [other] * 2 * items)
    for done, said, real in found:
        if done >= 2 * items:  # the later half of what is done is all of the new pace
            assert said == pytest.approx(real, rel=1e-6, abs=1e-6)


def test_a_report_of_nothing_done_moves_the_start() -> None:
    pace = TimeLeft(0.0, 5)
    pace.report(60.0, 5, 15)
    assert pace.seconds(15) is None, "nothing is done"
    pace.report(62.0, 6, 15)
    assert pace.seconds(15) == 18.0


def test_few_points_are_kept_however_many_reports_come() -> None:
    pace = TimeLeft(0.0, 0)
    for done in range(1, 100_001):
        pace.report(done * 1e-3, done, 100_000)
    assert len(pace.points) < 1100
    pace.report(200.0, 100_000, 100_000)
    assert pace.seconds(100_000) == 0.0
