"""The quality benchmark: its arms are sweeps that can be asked for, and its differences are paired."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cxr_fast.config import SweepSpec

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("run_quality")


def test_every_arm_is_a_sweep_or_reads_one(quality: ModuleType) -> None:
    for name, arm in quality.ARMS.items():
        assert not arm.of or arm.of in quality.ARMS, name
        assert isinstance(quality.spec_of(arm, 3, 4), SweepSpec)
        assert quality.spec_of(arm, 3, 4).seed == 3
    assert quality.spec_of(quality.ARMS[quality.DEFAULT], 0, 5).train == SweepSpec().train


def test_arms_are_compared_on_the_same_patients_and_not_trained_twice(
    quality: ModuleType,
    toy_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = {"epochs": (1,)}
    arms = {
        quality.PROBE: quality.Arm(of="head, focal"),
        quality.PUBLISHED: quality.Arm({"train_blocks": 0, "batch_size": 4}, short),
        "head, focal": quality.Arm({"train_blocks": 0, "batch_size": 4, "lr": 1e-3}, short),
        "again": quality.Arm({"train_blocks": 0, "batch_size": 4, "lr": 1e-3}, short),
    }
    monkeypatch.setattr(quality, "ARMS", arms)
    mine = {"cache": toy_cache, "work": tmp_path, "seeds": "0,1", "folds": 2, "resamples": 20}
    args = argparse.Namespace(**(quality.OPTIONS | mine))  # what the command has, so that no flag is forgotten
    found = quality.measure(args, tmp_path)
    shown = capsys.readouterr().out
    assert shown.count(", seed 0") == shown.count(", seed 1") == 3, "the probe reads another arm's run"
    assert list(found["arms"]) == list(arms)
    assert found["against_published"][quality.PUBLISHED]["macro_auc"] == [0, 0, 0]
    assert found["arms"]["again"]["mAP"] == found["arms"]["head, focal"]["mAP"]
    for low, value, high in ((d[1], d[0], d[2]) for d in found["against_published"][quality.PROBE].values()):
        assert low <= high
        assert np.isfinite(value)
    again = quality.measure(args, tmp_path)
    assert ", seed" not in capsys.readouterr().out.replace("| ", "")
    assert again == found
