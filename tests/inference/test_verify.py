"""`cxrfast verify MODEL`: PASS for what was exported, and the line that says what differs for everything else."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper

from cxr_fast.cli.main import main
from cxr_fast.errors import DeviceError, InputError, SchemaError
from cxr_fast.inference import model_file, verify
from cxr_fast.inference.predictor import Predictor
from cxr_fast.system import hardware
from cxr_fast.system.files import file_sha256
from tests.helpers.model_edits import changed, put, weights


def cxr(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments), "--device", "cpu", "--threads", "1"])


def verified(path: Path) -> verify.Report:
    return verify.verify(path, device="cpu", threads=1)


def differs(path: Path) -> dict[str, str]:
    return {check.name: check.detail for check in verified(path).checks if not check.ok}


def edited(model: Path, out: Path, **values: Any) -> Path:
    """Entries set to values, `golden` merged, the file sealed again."""
    golden = model_file.read(model)["golden"]
    values = {k: golden | v if k == "golden" and isinstance(v, dict) else v for k, v in values.items()}
    return changed(model, out, *(put(name, json.dumps(value)) for name, value in values.items()))


def test_what_was_exported_passes(toy_model: Path) -> None:
    report = verified(toy_model)
    assert report.ok, verify.describe(report)
    assert [check.name for check in report.checks] == [
        *("content", "metadata", "labels", "preprocessing", "drift", "graph", "golden answer", "batch of 2")
    ]
    assert (report.variant, report.note, report.provider) == ("fp32", "phantom images", "CPU, 1 thread(s)")
    assert report.sha256 == file_sha256(toy_model)
    text = verify.describe(report)
    assert text.splitlines()[-2:] == ["note: PHANTOM IMAGES", "PASS"]
    assert "0 of 35 decisions flip" in text


def test_a_file_under_another_variants_name_differs(toy_model: Path, tmp_path: Path) -> None:
    """`predict` does not open a folder with it."""
    shutil.copy(toy_model, tmp_path / "model.int8.onnx")
    assert "variant 'fp32' in a file called model.int8.onnx" in differs(tmp_path / "model.int8.onnx")["metadata"]


def test_the_content_hash_is_of_all_but_its_own_entry(toy_model: Path, tmp_path: Path) -> None:
    """Slow twin: with the onnx package, the file without the entry, serialised again."""
    bare = changed(toy_model, tmp_path / "m.onnx", put("content_sha256", None), seal=False)
    expected = hashlib.sha256(bare.read_bytes()).hexdigest()
    assert model_file.read(toy_model)["content_sha256"] == expected == model_file.content_sha256(toy_model)
    foreign = changed(toy_model, tmp_path / "f.onnx", lambda p: p.metadata_props.add(key="ml", value="x"), seal=False)
    assert model_file.content_sha256(foreign) == expected
    assert verified(foreign).ok


def test_a_damaged_weight_is_said_and_nothing_is_run(toy_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    data = bytearray(toy_model.read_bytes())
    data[len(data) // 2] ^= 1
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    monkeypatch.setattr(verify, "Predictor", lambda *_, **__: pytest.fail("a damaged graph was loaded"))
    found = differs(path)
    assert set(found) == {"content", "golden answer"}
    assert found["golden answer"] == "not run: the content differs"
    with pytest.raises(InputError, match="damaged or edited since it was written"):
        Predictor(path, device="cpu")


@pytest.mark.parametrize(
    ("values", "name", "detail"),
    [
        ({"labels_sha256": "0" * 64}, "labels", "the file says 0000"),
        ({"pixel_check": "0" * 64}, "preprocessing", r"other pixels with this Pillow \S+; it was made with Pillow \d"),
        ({"pixel_check": "0" * 64, "toolchain": []}, "preprocessing", "it was made with another one"),
        ({"dicom_policy": "raw"}, "metadata", "dicom_policy 'raw' is not the one in preprocess"),
        ({"calibration": {}}, "graph", r"no raw_probabilities float \(N, 35\)"),
        (
            {"golden": {"expected": [0.5] * 35}},
            "golden answer",
            r"difference .*exported with CPU on .* here CPU",
        ),
        ({"golden": {"tolerance": 0.5}}, "golden answer", "tolerance is not a number above 0 and up to 0.1"),
        ({"golden": {"recipe": "zeros"}}, "golden answer", "a recipe that this version does not know"),
        ({"golden": {"expected": [0.5] * 34}}, "golden answer", "expected are not 35 numbers"),
        ({"golden": None}, "golden answer", "no golden pair"),
    ],
)
def test_what_differs_is_named(toy_model: Path, tmp_path: Path, values: Any, name: str, detail: str) -> None:
    found = differs(edited(toy_model, tmp_path / "m.onnx", **values))
    assert set(found) == {name}
    assert re.search(detail, found[name]), found[name]


@pytest.mark.parametrize("name", [k for k in verify.KEYS if k not in ("schema", *model_file.NEEDED)])
def test_a_missing_key_is_named(toy_model: Path, tmp_path: Path, name: str) -> None:
    found = differs(changed(toy_model, tmp_path / "m.onnx", put(name, None)))
    assert f"no {name}" in found["metadata"]


def test_the_tolerance_decides_and_flips_are_counted(toy_model: Path, tmp_path: Path) -> None:
    info = model_file.read(toy_model)
    expected = np.array(info["golden"]["expected"])
    near, flipped = expected + 5e-4, expected.copy()
    flipped[3] = 0.99 if expected[3] < info["thresholds"][3] else 0.0
    out = tmp_path / "m.onnx"
    assert "golden answer" in differs(edited(toy_model, out, golden={"expected": near.tolist()}))
    assert not differs(edited(toy_model, out, golden={"expected": near.tolist(), "tolerance": 1e-3}))
    found = differs(edited(toy_model, out, golden={"expected": flipped.tolist()}))
    assert "1 of 35 decisions flip" in found["golden answer"]


def test_an_answer_that_is_no_number_fails(toy_model: Path, tmp_path: Path) -> None:
    def spoil(proto: Any) -> None:
        tensor = weights(proto)["logits.weight"]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32("nan"), tensor.name))

    path = changed(toy_model, tmp_path / "m.onnx", spoil)
    assert differs(path) == {"golden answer": "the model answers what is no probability (NaN, or outside 0..1)."}


def test_a_row_that_depends_on_its_neighbour_differs(toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Predictor.run
    monkeypatch.setattr(Predictor, "run", lambda self, pixels, **_: real(self, pixels) + 0.01 * (len(pixels) - 1))
    assert set(differs(toy_model)) == {"batch of 2"}


@pytest.mark.parametrize(("flags", "said"), [(["avx2"], True), (["avx512_vnni"], False), (["avx_vnni"], False)])
def test_int8_without_vnni_is_said(
    toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], said: bool
) -> None:
    monkeypatch.setattr(hardware, "machine", lambda: {"cpu": "Old CPU", "cpu_flags": flags})
    monkeypatch.setattr(verify.platform, "machine", lambda: "x86_64")
    path = edited(toy_model, tmp_path / "m.onnx", variant="int8", golden={"expected": [0.5] * 35})
    monkeypatch.setattr(hardware, "cpu_flags", lambda *_: set(flags))
    checks = {check.name: check for check in verified(path).checks}
    here = checks["int8 on this CPU"]
    assert here.ok, "it says what to expect and judges nothing"
    assert here.detail.startswith("AVX2 only: int8 is slower" if said else f"VNNI ({flags[0]}): int8 is fast")
    found = checks["golden answer"].detail
    assert ("neither VNNI nor AMX" in found) == said
    assert "here CPU, 1 thread(s) on Old CPU" in found


# ----------------------------------------------------------------------------------------- the command


def test_the_command_passes_and_fails(toy_model: Path, tmp_path: Path) -> None:
    result = cxr(toy_model, "--json", tmp_path / "v.json")
    assert (result.exit_code, "\nPASS\n" in result.stdout) == (0, True), result.output
    (found,) = json.loads((tmp_path / "v.json").read_text())["models"]
    assert (found["verdict"], found["sha256"]) == ("PASS", file_sha256(toy_model))
    assert all(check["ok"] for check in found["checks"])
    result = cxr(edited(toy_model, tmp_path / "m.onnx", pixel_check="0" * 64))
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (1, "FAIL")


def test_a_folder_of_variants(toy_model: Path, tmp_path: Path) -> None:
    with_fault = edited(toy_model, tmp_path / "model.int8.onnx", variant="int8", golden={"expected": [0.5] * 35})
    shutil.copy(toy_model, tmp_path / "model.fp32.onnx")
    result = cxr(tmp_path)
    assert result.exit_code == 1
    assert [line for line in result.stdout.splitlines() if line in ("PASS", "FAIL")] == ["PASS", "FAIL"]
    with_fault.write_bytes(b"hello")
    result = cxr(tmp_path, "--json", tmp_path / "v.json")
    assert result.exit_code == 2
    assert "model.int8.onnx: NOT CHECKED\n  not an ONNX file of ours" in result.stdout
    assert [m["verdict"] for m in json.loads((tmp_path / "v.json").read_text())["models"]] == ["PASS", "NOT CHECKED"]


def test_a_pair_that_this_device_cannot_run_does_not_fail_the_folder(toy_model: Path) -> None:
    report = verified(toy_model)
    refused = verify.Unjudged(path="m", error=DeviceError("m: int8 has no CUDA kernels"))
    broken = verify.Unjudged(path="m", error=InputError("m: broken"))
    bad = replace(report, checks=(verify.Check("x", False, ""),))
    assert verify.exit_code([report]) == 0
    assert verify.exit_code([report, refused]) == 0
    assert verify.exit_code([bad, refused]) == 1
    assert verify.exit_code([refused]) == 2
    assert verify.exit_code([report, bad, broken]) == 2


def test_kinds_are_told_by_content(toy_model: Path, toy_cache: Path, tmp_path: Path) -> None:
    shutil.copy(toy_model, tmp_path / "model.h5")
    shutil.copy(toy_cache, tmp_path / "cache.onnx")
    assert cxr(tmp_path / "model.h5").stdout.endswith("PASS\n")
    assert "rows checked" in cxr(tmp_path / "cache.onnx", "--reencode", 0).stdout


@pytest.mark.parametrize(
    ("file", "flags", "match"),
    [
        *(("model", [flag, 1], f"{flag} is for a cache") for flag in ("--reencode", "--images", "--weights", "--seed")),
        ("cache", ["--json", "v.json"], "--json is for a model"),
        ("gone.onnx", [], "no such model"),
        ("gone.h5", [], "no such cache"),
        ("text.onnx", [], "not an ONNX file of ours"),
        ("text.h5", [], "not an HDF5 file"),
        ("empty", [], "no model"),
    ],
)
def test_a_mistake_is_one_line(
    toy_model: Path,
    toy_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    flags: list[object],
    match: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("text.onnx", "text.h5"):
        Path(name).write_text("hello")
    Path("empty").mkdir()
    result = cxr({"model": toy_model, "cache": toy_cache}.get(file, file), *flags)
    assert result.exit_code == 2
    assert match in result.stderr
    assert result.stderr.count("\n") == 1
    assert not Path("v.json").exists()


def test_the_model_is_not_overwritten(toy_model: Path) -> None:
    before = file_sha256(toy_model)
    assert "is the model itself" in cxr(toy_model, "--json", toy_model).stderr
    assert file_sha256(toy_model) == before


def test_another_schema_is_refused(toy_model: Path, tmp_path: Path) -> None:
    path = changed(toy_model, tmp_path / "m.onnx", put("schema", "3"))
    with pytest.raises(SchemaError, match=r"schema 3 \(written by cxr-fast"):
        verified(path)
    assert cxr(path).exit_code == 2


@pytest.mark.parametrize(
    ("parity", "ok", "said"),
    [
        ({"limit": 1e-5, "max_probability_difference": 4e-7}, True, "4e-07"),
        ({"limit": 1e-5, "max_probability_difference": 4e-5}, False, "4e-05 .limit 1e-05.; kept all the same"),
        ({"limit": 1e-5, "max_probability_difference": None}, False, "none"),
        ({"limit_flips_per_10000": 20, "flips_per_10000": 91.5}, False, "91.5 .limit 20."),
        (
            {
                "limit_flips_per_10000": 20,
                "flips_per_10000": 3,
                "limit_macro_auc_drop": 0.002,
                "macro_auc_drop": None,
            },
            True,
            "macro AUC drop none",
        ),
        ({"limit_macro_auc_drop": 0.002, "macro_auc_drop": 0.003}, False, "0.003 .limit 0.002."),
        ({"limit_map_drop": 0.002, "map_drop": 0.003}, False, "macro mAP drop 0.003 .limit 0.002."),
        ({"limit_map_drop": 0.002, "map_drop": None}, True, "macro mAP drop none"),
        (
            {
                "limit_flips_per_10000": 29.5,
                "flips_per_10000": 24.25,
                "yardstick": {"jpeg_95": {"flips_per_10000": 29.5}, "one_pixel": {"flips_per_10000": 182}},
            },
            True,
            r"24.2 .limit 29.5.; changed by the film itself: JPEG 95 29.5, one pixel 182.0$",
        ),
        (
            {"limit_flips_per_10000": 20, "flips_per_10000": 3, "yardstick": {"jpeg_95": [], "one_pixel": {"x": 1}}},
            True,
            r"change sides 3 .limit 20.$",
        ),
        ({}, False, "does not say"),
    ],
)
def test_a_file_kept_over_its_limits_does_not_pass(
    toy_model: Path, tmp_path: Path, parity: dict[str, Any], ok: bool, said: str
) -> None:
    path = changed(toy_model, tmp_path / "m.onnx", put("parity", json.dumps(parity)))
    found = {check.name: check for check in verify.verify(path, device="cpu", threads=1).checks}
    assert found["drift"].ok == ok
    assert re.search(said, found["drift"].detail)
