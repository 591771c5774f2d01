"""A few true lines about each kind of file, and one about everything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import pytest

from cxr_fast.activations import file as store
from cxr_fast.cli import info
from cxr_fast.errors import InputError, SchemaError
from cxr_fast.training.run_folder import read_info
from tests.helpers.encoders import DINOV2, dinov2_tensors, write_plain


def facts(path: Path) -> dict[str, str]:
    """The aligned lines as a table."""
    lines = info.describe(path).splitlines()
    width = max(len(line.split("  ")[0]) for line in lines) + 2
    assert all(line[width - 2 : width] == "  " and line[width] != " " for line in lines), "not aligned"
    return {line[:width].strip(): line[width:] for line in lines}


def test_a_cache(toy_cache: Path) -> None:
    found, file = facts(toy_cache), store.ActivationFile(toy_cache)
    n = len(file.ok)
    assert found["activation file"].startswith(f"{toy_cache}, schema 1, cxr-fast ")
    assert found["state"] == f"{n - 1} of {n} images encoded, 1 failed"
    assert found["data"] == f"phantom, {len(set(file.header.groups))} groups, 35 classes"
    assert found["array"].startswith(f"({n}, 2, 101, 64) float16, {toy_cache.stat().st_size / 1e6:,.0f} MB")
    assert found["array"].endswith(f"largest value {file.absmax.max():.4g}")
    assert found["cut"] == "blocks.4 (2 block(s) left to train), views plain, flip"
    assert set(found["pixels"].split(", ")) == {"size 160", "resize squash", "dicom_policy voi"}
    assert found["normalisation"] == "mean 0.4/0.45/0.5, std 0.2/0.25/0.3"
    assert found["fingerprint"] == file.meta["fingerprint"]
    assert "RANDOM" not in found["weights"]


def test_random_weights_are_said_loudly(toy_cache: Path, tmp_path: Path) -> None:
    own = Path(shutil.copy(toy_cache, tmp_path / "own.h5"))
    with h5py.File(own, "r+") as file:
        meta = json.loads(file.attrs["meta"])
        file.attrs["meta"] = json.dumps({**meta, "weights": "random:0", "random_weights": True})
    assert facts(own)["weights"] == "random:0 (RANDOM, not BiomedCLIP)"


def test_a_cache_that_is_not_finished(toy_cache: Path, tmp_path: Path) -> None:
    own = Path(shutil.copy(toy_cache, tmp_path / "own.h5.partial"))
    with h5py.File(own, "r+") as file:
        file["done"][10:] = store.PENDING
    assert facts(own)["state"].startswith("10 of ")
    with h5py.File(own, "r+") as file:
        file["done"][:] = store.PENDING
    assert facts(own)["array"].endswith("largest value -")


def test_a_run(toy_run: Path, tmp_path: Path) -> None:
    found, run = facts(toy_run), json.loads((toy_run / "run.json").read_text())
    held = run["metrics"]["holdout"]
    assert found["run"] == f"{toy_run}, schema 2, {run['written_by']}, {run['created']}"
    assert found["note"] == "PHANTOM IMAGES"
    assert found["trained"] == "487,971 parameters: blocks 83,456, head 404,515"
    assert found["chosen"] == f"{run['chosen']['epochs']} epochs, fold {run['chosen']['fold'] + 1}"
    assert found["hold-out"] == (
        f"macro AUC {held['macro_auc']:.4f} over {held['classes_defined']} of 35 classes, "
        f"macro F1 {held['macro_f1']:.4f}, mAP {held['map']:.4f} on {held['n']} images"
    )
    assert found["models"] == "none yet; `cxrfast export` makes one"
    assert info.describe(toy_run / "run.json") == info.describe(toy_run)
    shutil.copytree(toy_run, tmp_path / "run")
    (tmp_path / "run" / "model.fp32.onnx").write_bytes(b"")
    run["metrics"]["holdout"], run["provenance"] = None, ""
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    found = facts(tmp_path / "run")
    assert (found["models"], found["hold-out"]) == ("model.fp32.onnx", "no hold-out")
    assert "note" not in found, "a line without a value is left out"


def test_a_model(toy_model: Path, toy_run: Path) -> None:
    found, run = facts(toy_model), json.loads((toy_run / "run.json").read_text())
    assert found["model"].startswith(f"{toy_model}, schema 2, cxr-fast ")
    assert found["labels"] == f"35: {', '.join(run['classes'])}"
    assert found["note"] == "PHANTOM IMAGES"
    assert found["variant"] == "fp32"
    assert found["data"] == "phantom"
    assert json.loads(found["pixels"]) == run["preprocess"]
    assert " to torch float32, the whole tower on 79 images (limit 1e-05); decisions changed" in found["parity"]
    assert "6 Gelu" in found["nodes"]
    assert "Not a medical device" in found["intended use"]


def test_a_folder_that_holds_models_alone(toy_model: Path, tmp_path: Path) -> None:
    first = Path(shutil.copy(toy_model, tmp_path / "a.onnx"))
    assert info.describe(tmp_path) == info.describe(first)
    second = Path(shutil.copy(toy_model, tmp_path / "b.onnx"))
    assert info.describe(tmp_path) == f"{info.describe(first)}\n\n{info.describe(second)}"
    with pytest.raises(InputError, match=rf"not a run folder .* it holds a model file, which `cxrfast info {first}`"):
        read_info(tmp_path)


def test_a_variant_with_limits_of_its_own_says_them() -> None:
    """fp16 and int8 have no limit in probability: theirs are of the AUC lost and of the decisions changed."""
    parity = {"against": "torch", "images": 79, "max_probability_difference": 0.0123, "flips_per_10000": 4.56}
    limits = {"macro_auc_drop": 0.00123, "limit_macro_auc_drop": 0.002, "limit_flips_per_10000": 10}
    said = info._parity(parity | limits)
    assert said == (
        "1.2e-02 to torch on 79 images; macro AUC lost 0.0012 (limit 0.002), "
        "decisions changed 4.6 per 10,000 (limit 10)"
    )
    assert "macro AUC lost undefined" in info._parity(parity | limits | {"macro_auc_drop": None})
    assert "None" not in said + info._parity({})
    beside = {"jpeg_95": {"flips_per_10000": 29.5}, "one_pixel": {"flips_per_10000": 182}}
    newer = {"limit_flips_per_10000": 29.46, "limit_map_drop": 0.002, "map_drop": -0.0004, "yardstick": beside}
    assert info._parity(parity | limits | newer) == (
        "1.2e-02 to torch on 79 images; macro AUC lost 0.0012 (limit 0.002), mAP lost -0.0004 (limit 0.002), decisions "
        "changed 4.6 per 10,000 (limit 29.46); changed by the film itself: JPEG 95 29.5, one pixel 182.0"
    )
    exact = parity | {"limit": 1e-5, "yardstick": beside}
    assert info._parity(exact).endswith(
        "(limit 1e-05); decisions changed per 10,000 by the film itself: JPEG 95 29.5, one pixel 182.0"
    )


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("gone.h5", "no such file"),
        ("gone", "no such file"),
        ("text.h5", "not an HDF5 file"),
        ("text.onnx", "not an ONNX file"),
        ("text.csv", r"not a cache \(.h5 or .shards.json\), a run folder, a model"),
        ("folder", "not a run folder"),
    ],
)
def test_everything_else_is_refused(tmp_path: Path, name: str, match: str) -> None:
    for kind in ("h5", "onnx", "csv"):
        (tmp_path / f"text.{kind}").write_text("hello")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=match):
        info.describe(tmp_path / name)


def test_an_unknown_schema_is_refused(toy_cache: Path, tmp_path: Path) -> None:
    own = Path(shutil.copy(toy_cache, tmp_path / "own.h5"))
    with h5py.File(own, "r+") as file:
        file.attrs["schema"] = 9
        file.attrs["written_by"] = "cxr-fast 9.9"
    with pytest.raises(SchemaError, match=r"schema 9 \(written by cxr-fast 9\.9\)"):
        info.describe(own)


def test_weights(tmp_path: Path) -> None:
    folder = write_plain(tmp_path, DINOV2, dinov2_tensors())
    found = facts(folder)
    assert found["weights"] == str(folder)
    assert found["family"] == "transformers, dinov2"
    assert found["tokens"] == "5: 1 class, 4 patches of 14 x 14 pixels"
    assert found["embedding"] == "32 from class token"
    assert found["resize"].startswith("squash, bicubic by its files; films are resized bicubic")
    assert found["left out"] == "mask_token"
    assert found["licence"] == "not named in the files; see the model's page"
    assert found["cache"] == "640 bytes a film: 2 views in float16, 2 blocks left to train"
    assert found["time"].startswith("about ")
    assert "an estimate from 2 blocks and 4 films" in found["time"]
    found = facts(Path("random:0:test_vit2"))
    assert found["weights"] == "random:0:test_vit2 (RANDOM, not learned)"
    assert found["tokens"] == "101: 1 register, 100 patches of 16 x 16 pixels"


def test_what_names_no_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, said in (
        ("nothing", "nothing: no such file"),
        ("cache/nothing.h5", "cache/nothing.h5: no such file"),
        ("no/such/folder", "no/such/folder: no such file"),
        ("some/weights", "some/weights is no folder here"),
    ):
        with pytest.raises(InputError, match=said):
            info.describe(Path(name))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        info.describe(tmp_path)
