"""How a file was exported, read back from it: the same file again, flags on top, and files that do not say."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from cxr_fast.cli.main import main
from cxr_fast.errors import InputError
from cxr_fast.export.entries.settings import (
    KEY,
    ExportRecord,
    ExportSpec,
    describe_changes,
    read_export,
    record_export,
)
from cxr_fast.inference import model_file
from cxr_fast.inference.model_file import PREFIX, SEAL

# All that is not as the command offers it.
FLAGS = ["--final", "ensemble", "--tta", "flip", "--threshold-target", "sensitivity=0.8", "--calibration", "platt"]
FLAGS += ["--check", "8", "--variants", "fp32"]


def edited(path: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a model file with other entries, sealed again."""
    model = onnx.load(path)
    entries = {p.key.removeprefix(PREFIX): json.loads(p.value) for p in model.metadata_props}
    del entries[SEAL]
    change(entries)
    onnx.helper.set_model_props(model, {PREFIX + name: json.dumps(value) for name, value in entries.items()})
    model_file.write(out, model.SerializeToString())
    return out


def same_but_clocks(one: Path, two: Path) -> None:
    """The same bytes of the graph, and the same entries but for the time of one image and what hashes it."""
    a, b = onnx.load(one), onnx.load(two)
    assert a.graph.SerializeToString() == b.graph.SerializeToString()
    infos = [model_file.read(path) for path in (one, two)]
    for info in infos:
        del info[SEAL], info["parity"]["latency_ms"]
    assert infos[0] == infos[1]


def export(*words: Any) -> Any:
    return CliRunner().invoke(main, ["export", *map(str, words)])


def test_a_record_holds_every_setting_but_paths() -> None:
    names = {field.name for field in dataclasses.fields(ExportSpec)} - {"out", "images"}
    assert set(ExportRecord.__struct_fields__) == names
    told = {param.name for param in main.commands["export"].params}
    assert set(record_export(ExportSpec()).flags()) == told - {"run", "out", "images", "earlier"}


def test_targets_of_a_file_are_taken_in_and_its_path_is_not(tmp_path: Path) -> None:
    (tmp_path / "targets.csv").write_text("class,target\nMass,sensitivity=0.9\n")
    found = record_export(ExportSpec(threshold_target=str(tmp_path / "targets.csv")))
    assert found.threshold_target == '{"Mass": "sensitivity=0.9"}'
    assert found == record_export(ExportSpec(threshold_target=found.threshold_target))


def test_the_same_file_again_and_flags_on_top(toy_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(toy_run, run)
    done = export(run, *FLAGS)
    assert done.exit_code == 0, done.output
    model = run / "model.fp32.onnx"
    asked = read_export(run)
    assert asked.record.flags() == {
        "variants": "fp32",
        "final": "ensemble",
        "tta": "flip",
        "logit_adjustment": 0.0,
        "calibration": "platt",
        "threshold_target": "sensitivity=0.8",
        "embedding": False,
        "allow_drift": False,
        "check": 8,
    }
    assert read_export(model).record == read_export(run / "run.json").record == asked.record
    again = export(run, "--from", run, "--out", tmp_path / "again.onnx")
    assert again.exit_code == 0, again.output
    assert f"settings of {run}, all of them" in again.output
    same_but_clocks(model, tmp_path / "again.onnx")
    words = ["--tta", "none", "--check", "4", "--out", tmp_path / "other.onnx"]
    other = export(run, "--from", model, *words)
    assert other.exit_code == 0, other.output
    assert f"settings of {model}, but tta none instead of flip; check 4 instead of 8" in other.output
    info = model_file.read(tmp_path / "other.onnx")
    assert (info["views"], info["final"]["kind"], info["parity"]["images"]) == (["plain"], "ensemble", 4)


def test_variants_one_after_another_are_one_export_and_others_are_named(toy_model: Path, tmp_path: Path) -> None:
    def changed(name: str, **settings: Any) -> None:
        def change(entries: dict[str, Any]) -> None:
            entries[KEY] |= settings

        edited(toy_model, tmp_path / f"model.{name}.onnx", change)

    changed("fp32", variants=["fp32"])
    changed("int8", variants=["int8", "fp16"])
    assert read_export(tmp_path).record.variants == ("fp32", "fp16", "int8")
    changed("int8", variants=["int8"], final="ensemble")
    said = r"model\.int8\.onnx: final ensemble instead of as in the run in model\.fp32\.onnx"
    with pytest.raises(InputError, match=said):
        read_export(tmp_path)


def test_what_holds_no_settings_says_so(toy_model: Path, toy_run: Path, tmp_path: Path) -> None:
    old = edited(toy_model, tmp_path / "old.onnx", lambda entries: entries.pop(KEY))
    written_by = model_file.read(toy_model)["written_by"]
    done = export(toy_run, "--from", old)
    assert done.exit_code == 2
    (line,) = done.output.splitlines()
    assert f"--from: {old} does not say how it was exported (written by {written_by}" in line
    assert "export its run again first" in line
    with pytest.raises(InputError, match=r"holds no model\.\*\.onnx"):
        read_export(toy_run)
    with pytest.raises(InputError, match="no such model"):
        read_export(tmp_path / "nowhere.onnx")
    odd = edited(toy_model, tmp_path / "odd.onnx", lambda entries: entries[KEY].update(count="many"))
    with pytest.raises(InputError, match="cannot be read"):
        read_export(odd)


def test_thresholds_that_were_set_later_are_not_taken_and_said(toy_model: Path, tmp_path: Path) -> None:
    copy = edited(toy_model, tmp_path / "m.onnx", lambda entries: entries.update(recalibrated={"data": "ours"}))
    assert read_export(copy).notes == ("thresholds that were set on ours after that export are not taken",)


def test_changes_are_named_by_flag() -> None:
    old, new = record_export(ExportSpec()), record_export(ExportSpec(embedding=True, logit_adjustment=1.0, count=9))
    assert describe_changes(old, old) == []
    assert describe_changes(old, new) == [
        "logit-adjustment 1.0 instead of 0.0",
        "embedding yes instead of no",
        "check 9 instead of 256",
    ]
