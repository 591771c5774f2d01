"""What is left of a fit, by a clock that the test moves."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from cxr_fast.cli import console
from cxr_fast.cli.fit import part_times
from cxr_fast.cli.fit.part_times import PartTimes

EXPECTED = {"cache": 100.0, "sweep": 200.0, "export": 60.0, "verify": 5.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Seconds that only the test moves."""
    found = SimpleNamespace(now=1000.0)
    for module in (part_times, console):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


def test_the_parts_to_come_are_added_to_what_is_left_of_this_one(clock: SimpleNamespace) -> None:
    way = PartTimes(EXPECTED)
    way.begin("cache")
    assert way.left(None, True) == "about 6 min 05 s of all"
    clock.now += 40
    assert way.left(None, True) == "about 5 min 25 s of all", "before any pace is known, the plan counts"
    assert way.left(80.0, True) == "about 5 min 45 s of all", "then the pace does"
    way.begin("export")
    clock.now += 20
    assert way.left(3.0, False) == "about 45 s of all", "a step of a part is not the part"
    assert way.left(50.0, False) == "about 55 s of all"
    clock.now += 100
    assert way.left(None, False) == "about 5 s of all", "a part that takes longer is not over before it began"
    way.begin("verify")
    assert way.left(1.0, True) == "about 1 s of all"


def test_a_part_whose_time_is_unknown_is_named(clock: SimpleNamespace) -> None:
    way = PartTimes({**EXPECTED, "sweep": math.nan})
    assert way.describe() == "about 2 min 45 s without the sweep"
    assert way.left(10.0, True) == "about 1 min 15 s of all without the sweep"
    way.begin("sweep")
    assert way.left(None, True) == "about 1 min 05 s of all"
    assert PartTimes({}).describe() == "about 0 s without the cache and the sweep and the export and the verify"


def test_it_stands_behind_the_time_left_of_each_line(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    way = PartTimes(EXPECTED)
    monkeypatch.setattr(console.ProgressBar, "part_times", way.left)
    bar = console.ProgressBar(every=0.0)
    for done in (1, 2):
        clock.now += 10
        bar.show(done, 4, f"{done} of 4")
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].endswith("2 of 4, 20 s left, about 4 min 45 s of all")
