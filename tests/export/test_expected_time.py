"""What an export is expected to take: one timed call, and how often it is made."""

from __future__ import annotations

import pytest
import torch

from cxr_fast.export import expected_time
from cxr_fast.export.expected_time import CHANGED, GRAPH, LOADED, ROUNDED, VERIFIED, expect_export, time_image
from cxr_fast.models.backbone import load


def test_calls_are_counted_for_each_file(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = load("random:0:test_vit")
    monkeypatch.setattr(expected_time, "time_image", lambda backbone: 1.0)
    one = expect_export(tower, ["fp32"], 100)
    # torch, the changed films, batches of 1, 2, 7 and 64, nine for the latency
    assert one.export == pytest.approx(100 + (CHANGED * 100 + 100 + 74 + 9) * GRAPH["fp32"] + LOADED)
    assert one.verify == pytest.approx(VERIFIED * GRAPH["fp32"] + LOADED)
    both = expect_export(tower, ["fp32", "fp16"], 100)
    assert both.export - one.export == pytest.approx(183 * GRAPH["fp16"] + LOADED)
    with_int8 = expect_export(tower, ["fp32", "int8"], 100)
    assert with_int8.export - one.export == pytest.approx(183 * GRAPH["int8"] + LOADED + ROUNDED * tower.shape[1])
    folds = expect_export(tower, ["fp32"], 100, models=3, views=2)
    assert folds.export - LOADED == pytest.approx(6 * (one.export - LOADED))


def test_a_call_is_timed_and_the_tower_stays_as_it_was() -> None:
    tower = load("random:0:test_vit")
    before = {name: tensor.clone() for name, tensor in tower.visual.state_dict().items()}
    assert 0 < time_image(tower) < 60
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.visual.state_dict().items())
