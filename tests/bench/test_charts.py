"""A benchmark's picture marks what its verdict rests on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cxr_fast.bench import charts, results
from cxr_fast.report import charts as plots


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were drawn, before they became bytes."""
    figures: list[Any] = []
    real = plots.png
    monkeypatch.setattr(plots, "png", lambda made: (figures.append(made), real(made))[1])
    return figures


HEAD = {"model": "m.onnx", "provider": "CPUExecutionProvider", "machine": {"cpu": "Some $CPU$"}}


def result(budget: float, samples: list[float], noisy: bool = False) -> dict[str, Any]:
    limit = {"seconds": budget, "percentile": 90}
    timed = {"samples": {"file to probabilities": samples}, "budget": limit, "verdict": results.verdict(samples, limit)}
    return {**HEAD, **timed, "noise": {"noisy": noisy}}


def test_budget_percentile_and_bound_are_marked(drawn: list[Any]) -> None:
    samples = np.linspace(0.05, 0.1, 64).tolist()
    found = result(0.2, samples, noisy=True)
    assert charts.draw(found).startswith(b"\x89PNG")
    axes = drawn[0].axes[0]
    lines = {line.get_label(): line.get_xdata() for line in axes.lines}
    assert lines["budget 200 ms"][0] == pytest.approx(200)
    assert lines["p90"][0] == pytest.approx(1000 * found["verdict"]["estimate"])
    assert lines["its 99 % bound"][0] == pytest.approx(1000 * found["verdict"]["bound"])
    assert "PASS, n 64, NOISY" in axes.get_title()
    assert axes.get_xscale() == "linear"
    charts.draw(result(100.0, samples))
    assert drawn[1].axes[0].get_xscale() == "log"


def test_too_few_samples_have_no_bound_to_mark(drawn: list[Any]) -> None:
    charts.draw(result(0.2, [0.1] * 3))
    assert "its 99 % bound" not in {line.get_label() for line in drawn[0].axes[0].lines}


@pytest.mark.parametrize(("fast", "scale"), [(1.5, "linear"), (100.0, "log")])
def test_rates_by_batch_with_their_knees(drawn: list[Any], fast: float, scale: str) -> None:
    def arm(rate: float) -> dict[str, Any]:
        return {"rate": rate, "rates": [0.9 * rate, rate, 1.2 * rate]}

    points = [{"batch": b, "model only": arm(fast * b), "from files": arm(b)} for b in (1, 2, 4)]
    knee = {"model only": 4, "from files": 2}
    charts.draw({**HEAD, "points": points, "knee": knee, "noise": {"noisy": False}})
    axes = drawn[0].axes[0]
    assert axes.get_yscale() == scale
    rings = [tuple(map(float, (*line.get_xdata(), *line.get_ydata()))) for line in axes.lines
             if line.get_markersize() == 12]  # fmt: skip
    assert rings == [(4, 4 * fast), (2, 2)]
    assert not any(line.get_clip_on() for line in axes.lines if line.get_markersize() == 12), "cut off at the edge"


def test_trials_by_rate(drawn: list[Any]) -> None:
    trials = [
        {"rate": r, "verdict": {"result": v, "estimate": e}} for r, v, e in ((2.0, "PASS", 0.1), (5.0, "FAIL", 9.0))
    ]
    base = {
        **HEAD,
        "trials": trials,
        "budget": {"seconds": 0.5, "percentile": 99},
        "capacity": 6.0,
        "noise": {"noisy": False},
    }
    charts.draw({**base, "verdict": {"result": "PASS"}})
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in drawn[0].axes[0].lines}
    assert lines["PASS"] == ([2.0], [100.0])
    assert lines["FAIL"] == ([5.0], [9000.0])
    charts.draw({**base, "trials": [], "verdict": {"result": "FAIL"}})
