"""The time left that each command prints, by a clock that the test moves."""

import itertools
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cxr_fast.activations.encoder import BuildProgress
from cxr_fast.cli import console, training
from cxr_fast.cli.cache import outcome
from cxr_fast.cli.models import predict
from cxr_fast.config import SweepSpec
from cxr_fast.inference.batch import State
from cxr_fast.training.expected_time import EpochTimes

Clock = SimpleNamespace
UNITS = {"h": 3600, "min": 60, "s": 1}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Seconds that only the test moves."""
    found = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


def left(text: str) -> float | None:
    """Read `2 min 05 s left` at the end of a line."""
    said = re.search(r", ((?:\d+ (?:h|min|s) ?)+) left$", text)
    return None if said is None else sum(int(n) * UNITS[u] for n, u in re.findall(r"(\d+) (h|min|s)", said[1]))


def require_within_two(capsys: pytest.CaptureFixture[str], lasts: list[float], done: list[float]) -> None:
    """Each printed line from a tenth of the work on against what was really left; `done` are shares of the work."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(lasts)
    ends = np.cumsum(lasts)
    judged = 0
    for line, now, share in zip(lines, ends, done, strict=True):
        real = float(ends[-1] - now)
        if share < 0.1 or real < 2:  # whole seconds are printed
            continue
        said = left(line)
        assert said is not None, line
        assert real / 2 - 1 <= said <= 2 * real + 1, (line, real)
        judged += 1
    assert judged > 3, "too few lines"


def follow(clock: Clock, lasts: list[float], show: Callable[[int], None]) -> None:
    """Let each item take its time, then show it."""
    for number, seconds in enumerate(lasts):
        clock.now += seconds
        show(number)


@pytest.mark.parametrize("first", [0.1, 5.0, 200.0])
def test_predict(clock: Clock, capsys: pytest.CaptureFixture[str], first: float) -> None:
    bar, lasts, total = console.ProgressBar(every=0.0), [first, *[5.0] * 39], 320
    clock.now += 30  # reading the list of films and hashing the model
    state = State(total=total)

    def show(number: int) -> None:
        state.done = 8 * (number + 1)
        predict.show_batch(bar, state)

    follow(clock, lasts, show)
    require_within_two(capsys, lasts, [(i + 1) / 40 for i in range(40)])


@pytest.mark.parametrize("before", [0, 160])
def test_cache(clock: Clock, capsys: pytest.CaptureFixture[str], before: int) -> None:
    """Rows are on the disk, and counted as done, a block after they were encoded."""
    line, lasts, began = outcome.CacheProgress(many=False), [60.0, *[5.0] * 29], clock.now
    line.bar.every = 0.0

    def show(number: int) -> None:
        more, state = 8 * (number + 1), BuildProgress(total=before + 240, before=before)
        done = {"done": before + more - 8, "encoded": more, "computing": clock.now - began}
        line.show(BuildProgress(**{**vars(state), **done}))

    follow(clock, lasts, show)
    require_within_two(capsys, lasts, [i / 30 for i in range(30)])


def test_sweep(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """A head alone and then two trained blocks, fifty times slower: by epochs the first half takes no time."""
    each = np.array([[0.1] * 10, [5.0] * 10])
    times = EpochTimes(each=each, refit=np.full(10, 7.0), retrained=np.zeros(10), folds=2, in_turn=True)
    line = training.EpochProgress(
        console.ProgressBar(every=0.0), SimpleNamespace(times=times, configurations=2), SweepSpec(folds=2)
    )
    places = [(c, k, e) for c in range(2) for k in range(2) for e in range(10)] + [(1, 2, e) for e in range(10)]
    lasts = [1.3 * times.of(c, k)[e] for c, k, e in places]
    lasts[0] += 20

    def show(number: int) -> None:
        config, fold, epoch = places[number]
        line.show(config, fold, SimpleNamespace(epoch=epoch + 1, classes=0, valid_auc=0.0))

    follow(clock, lasts, show)
    shares = np.cumsum([times.of(c, k)[e] for c, k, e in places]) / times.total
    require_within_two(capsys, lasts, shares.tolist())


def test_after_the_last_epoch_it_says_what_follows(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    times = EpochTimes(each=np.array([[0.1] * 3]), refit=np.zeros(3), retrained=np.zeros(3), folds=2, in_turn=True)
    line = training.EpochProgress(
        console.ProgressBar(every=20.0), SimpleNamespace(times=times, configurations=1), SweepSpec(folds=2)
    )
    for fold, epoch in itertools.product(range(2), range(3)):
        clock.now += 1
        line.show(0, fold, SimpleNamespace(epoch=epoch + 1, classes=0, valid_auc=0.0))
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("100.0 %  fold 2/2 epoch 3; figures and report follow")


def test_a_long_stage_has_a_second_line_after_a_tenth(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    line = console.StageProgress()
    for stage, seconds in (("torch", 5.0), ("fp32", 0.1), ("int8", 0.5)):
        for number in range(1, 41):
            clock.now += 300 if number == 1 else seconds
            line.show(stage, number, 40)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "  2.5 %  torch"
    assert said[1] == " 10.0 %  torch, 3 min 00 s left", "as soon as a tenth is done, and not 20 s later"
    assert [text for text in said if "fp32" in text] == ["  2.5 %  fp32"], "a short stage needs no second line"
    assert [text for text in said if "int8" in text] == ["  2.5 %  int8", " 10.0 %  int8, 18 s left"]


def test_other_work_on_the_same_line_has_a_pace_of_its_own(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = console.ProgressBar(every=0.0)
    show: Any = lambda done, total: bar.show(done, total, "x")  # noqa: E731
    for done in range(1, 21):
        clock.now += 10
        show(done, 20)
    for done in range(1, 11):
        clock.now += 3
        show(done, 30)
    assert left(capsys.readouterr().err.splitlines()[-1]) == 60
