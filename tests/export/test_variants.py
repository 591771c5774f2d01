"""The exported graph against torch's own tower, what the file says of itself, and that a bad one is not kept."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from PIL import Image

from cxr_fast.cli.console import plain as plain_text
from cxr_fast.cli.main import main
from cxr_fast.config import PreprocessSpec, SweepOptions, SweepSpec, TrainSpec, from_dict
from cxr_fast.data.images import decode_grey, read_bytes, resize, self_check
from cxr_fast.errors import DeviceError, InputError, ParityError, SchemaError
from cxr_fast.export import film_changes, graph, int8, variants
from cxr_fast.export import parity as checks
from cxr_fast.export.entries.settings import ExportSpec
from cxr_fast.export.nodes import all_nodes
from cxr_fast.export.rotate import rotated
from cxr_fast.export.summary import describe_export
from cxr_fast.inference import predictor
from cxr_fast.inference.model_file import content_sha256
from cxr_fast.inference.predictor import Predictor
from cxr_fast.inference.shift.reference import read_holdout
from cxr_fast.metrics import calibration, drift
from cxr_fast.metrics.drift import Drift
from cxr_fast.models import backbone
from cxr_fast.models.tail import Head
from cxr_fast.training.run_folder import Member, Run, read_info, read_run
from cxr_fast.training.sweep import SweepJob

SIZE = 160
CLASSES = 35


@pytest.fixture(scope="module", params=["class token", "average"])
def run(request: pytest.FixtureRequest) -> Run:
    """A finished run of each kind of pooling."""
    return read_run(request.getfixturevalue({"class token": "toy_run", "average": "toy_run_average"}[request.param]))


@pytest.fixture(scope="module")
def model(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run, exported."""
    return variants.export_run(run.folder, ExportSpec(out=tmp_path_factory.mktemp("export") / "model.onnx"))[0].path


def noise(count: int, seed: int = 0) -> np.ndarray:
    """Pixels that differ more than phantoms do."""
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE), dtype=np.uint8)


def slow(run: Run, pixels: np.ndarray) -> np.ndarray:
    """Logits by hand: grey to three channels, the run's own statistics, open_clip's tower, the head; one at a time."""
    mean, std = (np.array(run.info[key], np.float32).reshape(3, 1, 1) for key in ("mean", "std"))
    out = []
    for image in pixels:
        x = (np.repeat(image[None].astype(np.float32) / 255, 3, axis=0) - mean) / std
        out.append(run.members[0].logits(torch.from_numpy(x[None])))
    return torch.cat(out).numpy()


def arrays(run: Path) -> dict[str, np.ndarray]:
    with np.load(run / "predictions.npz") as file:
        return {name: file[name] for name in file.files}


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


# ------------------------------------------------------------------------------------------------ the graph


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_the_graph_is_torchs_tower(run: Run, model: Path, batch: int) -> None:
    pixels = noise(min(batch, 7), seed=batch)
    pixels = pixels[np.arange(batch) % len(pixels)]
    logits, probabilities = session(model).run(["logits", "probabilities"], {"pixels": pixels})
    expected = slow(run, pixels[:7])[np.arange(batch) % 7]
    assert logits.shape == probabilities.shape == (batch, CLASSES)
    assert logits.dtype == probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-expected)), atol=variants.LIMIT, rtol=0)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    # That means something only where images differ by far more than the limit.
    if batch > 1:
        assert np.abs(probabilities[0] - probabilities[1]).max() > 100 * variants.LIMIT


def test_the_checker_accepts_it(model: Path) -> None:
    proto = onnx.load(model)
    onnx.checker.check_model(proto, full_check=False)
    assert {o.domain: o.version for o in proto.opset_import} == {"": graph.OPSET, "com.microsoft": 1}
    assert onnx.defs.onnx_opset_version() >= graph.OPSET
    inputs, outputs = proto.graph.input, proto.graph.output
    assert [value.name for value in inputs] == ["pixels"]
    assert inputs[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [value.name for value in outputs] == ["logits", "probabilities"]
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names)
    assert {name for node in proto.graph.node for name in node.input} >= {w.name for w in proto.graph.initializer}


def test_the_last_block_computes_the_class_token_alone(toy_run: Path, toy_run_average: Path, tmp_path: Path) -> None:
    """From the shapes that ONNX Runtime really computes: query, projection and MLP of block 5 see one token of 101."""
    shapes = computed(variants.build(read_run(toy_run)), tmp_path)
    for name in ("blocks.5.proj.product", "blocks.5.fc1.product", "blocks.5.residual2"):
        assert shapes[name][:2] == (3, 1)
    assert shapes["blocks.5.q.product"] == (3, 1, 64)
    assert not {"blocks.5.k.product", "blocks.5.v.product"} & set(shapes), "it makes no key and no value"
    assert shapes["blocks.4.fc1.product"][:2] == (3, 101)
    whole = computed(variants.build(read_run(toy_run_average)), tmp_path)
    assert {shape[1] for name, shape in whole.items() if name.startswith("blocks.")} == {101}


def computed(proto: onnx.ModelProto, folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every node's output on three images."""
    names = [name for node in proto.graph.node for name in node.output]
    known = {value.name for value in proto.graph.output}
    for name in names:
        if name not in known:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    path = folder / "open.onnx"
    path.write_bytes(proto.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    opened = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return dict(zip(names, (a.shape for a in opened.run(names, {"pixels": noise(3)})), strict=True))


def test_the_embedding_is_an_output_when_asked_for(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(variants.build(run, embedding=True).SerializeToString())
    pixels = noise(3)
    (embedding,) = session(path).run(["embedding"], {"pixels": pixels})
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-5)
    with torch.inference_mode():
        logits = run.head(torch.from_numpy(embedding)).numpy()
    np.testing.assert_allclose(logits, slow(run, pixels), atol=1e-4)


def test_a_run_of_embeddings_exports_the_whole_tower(toy_run: Path, tmp_path: Path) -> None:
    """A run with nothing unfrozen holds the tower as it was; its graph is no special case."""
    run = read_run(toy_run)
    tower = backbone.load(run.info["cache"]["weights"]).visual
    plain = dataclasses.replace(run, members=(Member(visual=tower, head=run.head),))
    path = tmp_path / "model.onnx"
    path.write_bytes(variants.build(plain).SerializeToString())
    (logits,) = session(path).run(["logits"], {"pixels": noise(2)})
    np.testing.assert_allclose(logits, slow(plain, noise(2)), atol=1e-4)
    assert np.abs(logits - slow(run, noise(2))).max() > 1e-2


def test_black_and_white_are_read_as_torch_reads_them(run: Run, model: Path) -> None:
    """The folded normalisation has no rounding trouble at the ends of the grey scale."""
    pixels = np.stack([np.full((SIZE, SIZE), g, np.uint8) for g in (0, 1, 128, 255)])
    (found,) = session(model).run(["probabilities"], {"pixels": pixels})
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-slow(run, pixels))), atol=variants.LIMIT)


# ------------------------------------------------------------------------------- what the file says of itself


def metadata(path: Path) -> dict[str, Any]:
    found = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    assert all(key.startswith("cxr.") for key in found)
    return {key.removeprefix("cxr."): json.loads(value) for key, value in found.items()}


def test_the_metadata_is_json_and_complete(run: Run, model: Path) -> None:
    found = metadata(model)
    assert set(found) >= {
        *("schema", "written_by", "variant", "labels", "thresholds", "threshold_source", "calibration", "preprocess"),
        *("dicom_policy", "mean", "std", "weights", "provenance", "backbone", "tower_sha256", "model_sha256"),
        *("trainable", "cache_fingerprint", "data", "nodes", "toolchain", "intended_use", "parity", "golden"),
        *("labels_sha256", "pixel_check", "content_sha256"),
    }
    assert found["labels_sha256"] == hashlib.sha256("\n".join(run.info["classes"]).encode()).hexdigest()
    assert found["pixel_check"] == self_check()
    assert found["labels"] == run.info["classes"]
    assert found["thresholds"] == run.info["thresholds"]
    assert found["preprocess"] == {"size": SIZE, "resize": "squash", "dicom_policy": "voi"}
    assert (found["mean"], found["std"]) == (run.info["mean"], run.info["std"])
    assert found["model_sha256"] == run.info["model_sha256"]
    assert found["data"]["metrics"]["holdout"] == run.info["metrics"]["holdout"]
    assert "not a medical device" in found["intended_use"].lower()
    assert str(run.folder.parent) not in json.dumps({k: v for k, v in found.items() if k != "weights"})


def test_the_nodes_are_counted(run: Run, model: Path) -> None:
    nodes = [node.op_type for node in onnx.load(model).graph.node]
    found = metadata(model)["nodes"]
    assert found == {op: nodes.count(op) for op in set(nodes)}
    assert found["Gelu"] == len(run.visual.trunk.blocks)
    assert found["MultiHeadAttention"] == found["Gelu"] - (run.visual.trunk.global_pool == "token")
    assert "BatchNormalization" not in found


def test_the_golden_pair_is_reproduced(run: Run, model: Path) -> None:
    """From the recipe's words alone, evaluated pixel by pixel."""
    pair = metadata(model)["golden"]
    recipe = pair["recipe"].partition("=")[2]
    assert re.fullmatch(r"[ij0-9 +*/%()]+", recipe)
    code = compile(recipe.strip(), "recipe", "eval")
    pixels = [[eval(code, {"__builtins__": {}}, {"i": i, "j": j}) for j in range(SIZE)] for i in range(SIZE)]
    image = np.array(pixels, np.uint8)[None]
    np.testing.assert_array_equal(image, predictor.golden_pixels(SIZE))
    (found,) = session(model).run(["probabilities"], {"pixels": image})
    np.testing.assert_allclose(found[0], pair["probabilities"], atol=pair["tolerance"], rtol=0)
    np.testing.assert_allclose(found[0], pair["expected"], atol=1e-6, rtol=0)
    assert pair["provider"] == "CPUExecutionProvider"
    # Another image gives another answer, by more than the tolerance.
    (other,) = session(model).run(["probabilities"], {"pixels": image[:, ::-1].copy()})
    assert np.abs(other[0] - pair["probabilities"]).max() > 3 * pair["tolerance"]


def test_the_parity_found_is_in_the_file(toy_run: Path, tmp_path: Path) -> None:
    (one,) = variants.export_run(toy_run, ExportSpec(out=tmp_path / "m.onnx"))
    path, parity, info = one.path, one.parity, one.info
    found = metadata(path)
    assert found.pop("content_sha256") == content_sha256(path)
    assert found == json.loads(json.dumps(info))
    assert found["parity"]["max_probability_difference"] == parity.largest <= found["parity"]["limit"] == 1e-5
    assert found["parity"]["by_batch"].keys() == {"1", "2", "7", "64"}
    assert parity.largest >= max(parity.by_batch.values())
    assert parity.images == 79
    assert one.drift.images == found["parity"]["images"] == 79
    # What the sweep said of these images, from activations rounded to float16.
    assert parity.cached is not None
    assert parity.largest < parity.cached < 1e-2


def test_the_file_keeps_what_the_hold_out_was_answered(toy_run: Path, tmp_path: Path) -> None:
    """Of the model the sweep scored, all of the hold-out; of other views, those of its films that are read again."""
    info, saved = read_info(toy_run), dict(np.load(toy_run / "predictions.npz"))
    held, limits = saved["fold"] < 0, np.array(info["thresholds"])
    probs = calibration.apply(info["calibration"], saved["final"][held]).astype(float)
    (one,) = variants.export_run(toy_run, ExportSpec(out=tmp_path / "m.onnx", count=8))
    entry = metadata(one.path)["holdout"]
    assert (entry["films"], entry["groups"]) == (held.sum(), len(set(saved["group"][held])))
    assert [row["positives"] for row in entry["classes"]] == (probs >= limits).sum(axis=0).tolist()
    assert all(sum(row["counts"]) == held.sum() for row in entry["classes"])
    assert read_holdout(metadata(one.path), one.path) is not None, "of the thresholds and the calibration in the file"
    few = min(8, int(held.sum()))
    (one,) = variants.export_run(toy_run, ExportSpec(out=tmp_path / "m.onnx", count=8, tta="flip"))
    assert metadata(one.path)["holdout"]["films"] == few


def test_a_run_without_hold_out_keeps_no_summary_of_one(toy_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(toy_run, tmp_path / "run")
    saved = dict(np.load(run / "predictions.npz"))
    saved["fold"] = np.maximum(saved["fold"], 0)
    np.savez(run / "predictions.npz", **saved)
    (one,) = variants.export_run(run, ExportSpec(count=8))
    assert metadata(one.path)["holdout"] is None


def test_it_is_written_beside_the_run_by_default(toy_run: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_run, tmp_path / "run")
    before = {p.name for p in (tmp_path / "run").iterdir()}
    (one,) = variants.export_run(tmp_path / "run")
    path = one.path
    assert path == tmp_path / "run" / "model.fp32.onnx"
    assert {p.name for p in (tmp_path / "run").iterdir()} - before == {"model.fp32.onnx"}


def test_the_same_run_gives_the_same_graph(run: Run) -> None:
    assert variants.build(run).SerializeToString() == variants.build(run).SerializeToString()


@pytest.mark.parametrize(
    ("weights", "is_random", "said"),
    [("random:0:test_vit", True, "random"), ("/a/b/weights", False, "weights"), ("biomedclip", False, "biomedclip")],
)
def test_random_weights_are_carried_through(toy_run: Path, weights: str, is_random: bool, said: str) -> None:
    run = read_run(toy_run)
    run.info["cache"]["weights"], run.info["random_weights"] = weights, is_random
    assert variants.metadata(run, variants.build(run))["weights"] == said


# ----------------------------------------------------------------------------------------- what is not kept


def break_weight(monkeypatch: pytest.MonkeyPatch, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """One number of one matrix of the graph, changed after the graph was built."""
    build = variants.build

    def damaged(run: Run, *args: Any, **kwargs: Any) -> onnx.ModelProto:
        proto = build(run, *args, **kwargs)
        weight = next(w for w in proto.graph.initializer if w.name == "logits.weight")
        weight.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(weight).copy()), weight.name))
        return proto

    monkeypatch.setattr(variants, "build", damaged)


@pytest.mark.parametrize("kind", ["off by a little", "not a number"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_graph_that_disagrees_is_not_kept(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, existing: bool
) -> None:
    def change(weight: np.ndarray) -> np.ndarray:
        weight[:, 0] = np.nan if kind == "not a number" else weight[:, 0] + 1e-3
        return weight

    break_weight(monkeypatch, change)
    out = tmp_path / "model.onnx"
    if existing:
        out.write_bytes(b"of before")
    with pytest.raises(ParityError, match=r"model\.onnx was not kept.*limit 1e-05") as caught:
        variants.export_run(toy_run, ExportSpec(out=out))
    assert caught.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == (["model.onnx"] if existing else [])
    assert not existing or out.read_bytes() == b"of before"


def test_not_a_number_in_one_batch_size_alone_is_not_kept(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest of 1e-7 and NaN is NaN, whatever Python's `max` says."""
    run = checks.OpenFile.run

    def sometimes(self: checks.OpenFile, pixels: np.ndarray, output: str = "probabilities") -> np.ndarray:
        out = run(self, pixels, output)
        return np.full_like(out, np.nan) if len(pixels) == 7 else out

    monkeypatch.setattr(checks.OpenFile, "run", sometimes)
    with pytest.raises(ParityError, match="nan"):
        variants.export_run(toy_run, ExportSpec(out=tmp_path / "model.onnx"))
    assert list(tmp_path.iterdir()) == []


def test_the_last_image_counts_as_the_first(toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest batch is 64; what is wrong with the 79th image alone is seen too."""
    run, last = checks.OpenFile.run_all, checks.check_images(read_run(toy_run), None)[0][-1]

    def wrong(self: checks.OpenFile, pixels: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        out = [values.copy() for values in run(self, pixels, outputs)]
        for values in out:
            values[(pixels == last).all(axis=(1, 2))] += 1e-4
        return out

    monkeypatch.setattr(checks.OpenFile, "run_all", wrong)
    with pytest.raises(ParityError, match=r"differ by 1\.0\de-04 .* on 79 images"):
        variants.export_run(toy_run, ExportSpec(out=tmp_path / "model.onnx"))


def test_images_that_moved_are_asked_for(toy_run: Path, toy_data: Path, tmp_path: Path) -> None:
    run = read_run(toy_run)
    run.info["cache"]["dataset"]["root"] = str(tmp_path / "gone")
    with pytest.raises(InputError, match=r"none of the 79 is readable under .*gone.*--images DIR"):
        checks.check_images(run, None)
    pixels, kept, _ = checks.check_images(run, toy_data, most=64)
    assert pixels.shape == (64, SIZE, SIZE)
    assert len(set(kept)) == 64


def test_images_that_changed_are_not_compared(toy_run: Path, toy_data: Path, tmp_path: Path) -> None:
    """The hold-out comes first; a changed file gives its place to the next one."""
    run, saved = read_run(toy_run), arrays(toy_run)
    held = [str(image) for image in saved["image"][saved["fold"] == -1]]
    shutil.copytree(toy_data, tmp_path / "data")
    shutil.copy(tmp_path / "data" / held[1], tmp_path / "data" / held[0])
    (tmp_path / "data" / held[2]).unlink()
    most = len(held) - 2
    _, kept, _ = checks.check_images(run, tmp_path / "data", most=most)
    names = [str(image) for image in saved["image"][kept]]
    assert sorted(names) == sorted({*held} - {held[0], held[2]})
    for path in (tmp_path / "data" / "images").iterdir():
        path.write_bytes(b"changed")
    with pytest.raises(InputError, match="--images DIR"):
        checks.check_images(run, tmp_path / "data")


def test_fewer_images_than_the_largest_batch_are_repeated(toy_run: Path, toy_data: Path, tmp_path: Path) -> None:
    saved = arrays(toy_run)
    (tmp_path / "some" / "images").mkdir(parents=True)
    for image in saved["image"][:3]:
        shutil.copy(toy_data / str(image), tmp_path / "some" / str(image))
    (one,) = variants.export_run(toy_run, ExportSpec(out=tmp_path / "m.onnx", images=tmp_path / "some"))
    parity = one.parity
    assert parity.images == 3
    assert set(parity.by_batch) == {1, 2, 7, 64}


def test_what_is_no_run_is_refused(tmp_path: Path, toy_run: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        variants.export_run(tmp_path)
    shutil.copytree(toy_run, tmp_path / "run")
    (tmp_path / "run" / "predictions.npz").unlink()
    with pytest.raises(InputError, match=r"predictions\.npz"):
        variants.export_run(tmp_path / "run")
    text = (tmp_path / "run" / "run.json").read_text().replace('"schema": 2', '"schema": 7', 1)
    (tmp_path / "run" / "run.json").write_text(text)
    with pytest.raises(SchemaError, match="schema 7"):
        variants.export_run(tmp_path / "run")


def test_an_output_that_cannot_be_written_is_named(toy_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "m.onnx"
    with pytest.raises(InputError, match="--out: cannot write"):
        variants.export_run(toy_run, ExportSpec(out=out))
    assert sorted(os.listdir(tmp_path)) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_in_a_folder_that_is_not_there_makes_it(toy_run: Path, tmp_path: Path) -> None:
    """As `cache`, `sweep` and `predict` do."""
    (one,) = variants.export_run(toy_run, ExportSpec(out=tmp_path / "a" / "b" / "m.onnx"))
    assert one.path.is_file()


# ---------------------------------------------------------------------------------- batch norm, folded


def test_the_folded_head_is_the_head(tmp_path: Path, toy_run: Path) -> None:
    """With statistics far from the initial ones, a constant feature included."""
    head = Head(512, CLASSES, dropout=0.3)
    draw = torch.Generator().manual_seed(3)
    for layer in head:
        if isinstance(layer, torch.nn.BatchNorm1d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 2, generator=draw)
            layer.running_var.uniform_(0.01, 4, generator=draw)
            layer.running_var[0] = 0
            torch.nn.init.normal_(layer.weight, 1, 0.5, generator=draw)
            torch.nn.init.normal_(layer.bias, 0, 0.5, generator=draw)
    run = read_run(toy_run)
    member = Member(visual=run.visual, head=head.eval().requires_grad_(False))
    run = dataclasses.replace(run, members=(member,))
    path = tmp_path / "m.onnx"
    path.write_bytes(variants.build(run).SerializeToString())
    (found,) = session(path).run(["logits"], {"pixels": noise(4)})
    expected = slow(run, noise(4))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    assert np.ptp(expected, axis=0).max() > 1e-2


# ------------------------------------------------------------------------------- several members, calibrated


@pytest.fixture(scope="module", params=["platt", "isotonic"])
def ensemble(request: pytest.FixtureRequest, toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The mean of three folds, norm and projection trained too, calibrated."""
    train = TrainSpec(lr=1e-3, batch_size=4, train_norm=True)
    spec = SweepSpec(epochs=(2,), folds=3, final="ensemble", calibration=request.param, train=train)
    out = tmp_path_factory.mktemp("ensemble") / "run"
    SweepJob(toy_cache, out, spec, SweepOptions(device="cpu")).run()
    return read_run(out)


def test_an_ensemble_is_the_calibrated_mean_of_its_members(ensemble: Run, tmp_path: Path) -> None:
    (one,) = variants.export_run(ensemble.folder, ExportSpec(out=tmp_path / "m.onnx"))
    path, parity, found = one.path, one.parity, one.info
    pixels = noise(5)
    members = [dataclasses.replace(ensemble, members=(member,)) for member in ensemble.members]
    mean = np.mean([1 / (1 + np.exp(-slow(one, pixels).astype(np.float64))) for one in members], axis=0)
    probabilities, logits, raw = session(path).run(["probabilities", "logits", graph.RAW], {"pixels": pixels})
    np.testing.assert_allclose(raw, mean, atol=variants.LIMIT)
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), mean, atol=variants.LIMIT)
    np.testing.assert_allclose(probabilities, calibration.apply(ensemble.info["calibration"], raw), atol=1e-6)
    assert np.abs(probabilities - mean).max() > 1e-3, "the calibration changes nothing"
    assert parity.largest <= variants.LIMIT
    assert found["final"] == ensemble.info["final"]
    assert found["final"]["members"] == ["fold0", "fold1", "fold2"]
    assert found["calibration"] == ensemble.info["calibration"]


def test_an_ensemble_passes_the_frozen_part_once(ensemble: Run) -> None:
    """Four frozen blocks, and two of each of three members."""
    nodes = [node.op_type for node in variants.build(ensemble).graph.node]
    assert nodes.count("MultiHeadAttention") == 4 + 3
    assert nodes.count("Gelu") == 4 + 3 * 2
    assert nodes.count("Conv") == 1


def test_the_members_of_an_ensemble_share_the_frozen_part(ensemble: Run) -> None:
    first, second = (member.visual.trunk.blocks for member in ensemble.members[:2])
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert (a.mlp.fc1.weight.data_ptr() == b.mlp.fc1.weight.data_ptr()) == (i < 4)


# ---------------------------------------------------------------------------------------------------- variants


@pytest.fixture
def calm_run(toy_run: Path, tmp_path: Path) -> Path:
    """A copy of the toy run whose thresholds no probability is near; AUCs may drop by anything."""
    shutil.copytree(toy_run, tmp_path / "run")
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    info["thresholds"] = [0.999] * CLASSES
    (tmp_path / "run" / "run.json").write_text(json.dumps(info))
    return tmp_path / "run"


def test_variants_within_their_limits_are_kept(calm_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "AUC_DROP", 1.0)
    monkeypatch.setattr(drift, "MAP_DROP", 1.0)
    found = variants.export_run(calm_run, ExportSpec(variants=("fp32", "fp16", "int8")))
    assert [one.path.name for one in found] == ["model.fp32.onnx", "model.fp16.onnx", "model.int8.onnx"]
    assert all(one.kept and one.path.is_file() and one.size == one.path.stat().st_size for one in found)
    for one in found:
        said = metadata(one.path)
        assert said["variant"] == one.variant
        assert said["parity"]["images"] == one.drift.images == 79 - 15  # a quarter of 63 training images for int8
        largest = one.parity.largest if one.variant == "fp32" else one.drift.largest
        assert said["parity"]["max_probability_difference"] == largest
        assert len(said["parity"]["auc_drop_by_class"]) == CLASSES
        assert said["golden"]["tolerance"] >= 1e-4
        assert said["float_matrices"] == []
    fp32, _, int8 = found
    assert fp32.drift.largest <= variants.LIMIT < int8.drift.largest
    assert int8.size < fp32.size
    products = [n.name for n in all_nodes(onnx.load(int8.path).graph) if n.op_type == "MatMulIntegerToFloat"]
    assert metadata(int8.path)["nodes"]["MatMulIntegerToFloat"] == len(products)
    assert len({re.sub(r"(fc[12])\.\d", r"\1", name) for name in products}) == 33, "hidden units are in groups"
    assert Predictor(calm_run, device="cpu").info["model_sha256"] == metadata(fp32.path)["model_sha256"]


def test_the_table_gives_each_variant_its_own_auc(calm_run: Path) -> None:
    """Not torch's in every row, beside a change that it does not show."""
    (fp32,) = variants.export_run(calm_run)
    moved = dataclasses.replace(fp32.drift, macro_auc=0.75, macro_drop=0.0125)
    lines = plain_text(describe_export([fp32, dataclasses.replace(fp32, variant="int8", drift=moved)])).splitlines()
    (row,) = [line for line in lines if line.startswith("int8  ")]
    assert "  0.7375  -0.0125  " in row


def test_a_variant_over_its_limits_is_not_kept_unless_asked(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy's probabilities lie as near their thresholds as int8 is exact; half of the matrices do not help.

    Films that JPEG leaves as they are allow no changed decision.
    """
    monkeypatch.setitem(film_changes.CHANGES, "jpeg_95", lambda grey: grey)
    spec = ExportSpec(variants=("int8",), out=tmp_path, count=24)
    (one,) = variants.export_run(toy_run, spec)
    assert not one.kept
    assert re.search(r"of 10,000 decisions change sides .limit 0.0, what saving these films as JPEG 95", one.reason)
    assert re.search(r"with \d+ of 23 matrices left in float .*: \d\.\w+, ", one.reason)
    assert list(tmp_path.iterdir()) == []
    (one,) = variants.export_run(toy_run, dataclasses.replace(spec, allow_drift=True))
    assert one.kept
    assert one.drift.over()
    parity = metadata(one.path)["parity"]
    assert parity["flips_per_10000"] == one.drift.flips > parity["limit_flips_per_10000"] == 0
    assert parity["margin"]["more"] == pytest.approx(one.drift.flips)
    assert parity["margin"]["low"] > 0, "the interval says that it is more than JPEG"
    (again,) = variants.export_run(toy_run, spec)  # the file just kept must not stay in use
    assert not again.kept
    assert list(tmp_path.iterdir()) == []


def test_the_yardstick_is_what_torch_makes_of_changed_films(toy_run: Path, tmp_path: Path) -> None:
    """Slow twin: the films decoded, saved as JPEG or moved, resized one by one, through torch; groups from the run."""
    (one,) = variants.export_run(toy_run, ExportSpec(out=tmp_path / "m.onnx", count=24))
    run = read_run(toy_run)
    pixels, rows, saved = checks.check_images(run, None, most=24)
    spec, root = from_dict(PreprocessSpec, run.info["preprocess"]), Path(run.info["cache"]["dataset"]["root"])
    plain = checks.torch_probabilities(run, pixels) >= np.array(run.info["thresholds"])
    for name, change in (("jpeg_95", as_jpeg), ("one_pixel", lambda grey: np.hstack([grey[:, :1], grey[:, :-1]]))):
        films = [decode_grey(read_bytes(root / saved["image"][row]), spec=spec) for row in rows]
        changed = np.stack([resize(np.ascontiguousarray(change(grey)), spec) for grey in films])
        found = checks.torch_probabilities(run, changed) >= np.array(run.info["thresholds"])
        assert one.yardstick.changes[name].flipped == (found != plain).sum()
        said = metadata(one.path)["parity"]["yardstick"][name]
        assert said["flips_per_10000"] == pytest.approx(1e4 * (found != plain).mean())
        assert set(said) == {"flips_per_10000", "p99_probability_difference", "macro_auc_drop", "map_drop"}
    assert one.yardstick.changes["one_pixel"].flipped > 0, "nothing changes: the test shows nothing"
    assert list(one.yardstick.groups) == saved["group"][rows].tolist()
    text = plain_text(describe_export([one]))
    assert "film: JPEG 95  " in text
    assert "film: one pixel  " in text


def as_jpeg(grey: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "JPEG", quality=95)
    return np.array(Image.open(file))


@pytest.mark.parametrize(("flags", "code"), [((), 0), (("--variants", "fp32,int8"), 1), (("--variants", "fp32"), 0)])
def test_only_a_variant_asked_for_by_name_ends_with_1(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], code: int
) -> None:
    """A script with `set -e` that exports as the README writes it goes on where int8 cannot be kept."""
    export, asked = variants.export_run, []

    def refuse_int8(run: Path, spec: ExportSpec, **named: Any) -> list[variants.Exported]:
        asked.append(tuple(spec.variants))
        (fp32,) = export(run, dataclasses.replace(spec, variants=("fp32",)), **named)
        int8 = dataclasses.replace(fp32, variant="int8", reason="moves too far")
        return [fp32, int8] if "int8" in spec.variants else [fp32]

    monkeypatch.setattr(variants, "export_run", refuse_int8)
    done = CliRunner().invoke(main, ["export", str(toy_run), "--out", str(tmp_path), "--check", "8", *flags])
    assert done.exit_code == code, done.output
    assert ("NOT KEPT" in done.output) == ("moves too far" in done.output) == (flags != ("--variants", "fp32"))
    assert asked == [("fp32", "fp16", "int8") if not flags else tuple(flags[1].split(","))]


def test_variants_of_the_same_weights_and_other_thresholds_are_not_one_model(calm_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    variants.export_run(calm_run, ExportSpec(out=out))
    info = json.loads((calm_run / "run.json").read_text())
    info["thresholds"] = [0.998] * CLASSES
    (calm_run / "run.json").write_text(json.dumps(info))
    variants.export_run(calm_run, ExportSpec(variants=("int8",), out=out, allow_drift=True))
    with pytest.raises(InputError, match="has another thresholds entry than"):
        Predictor(out, device="cpu")


def test_float32_is_never_kept_over_its_limit(toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_weight(monkeypatch, lambda weight: weight + np.float32(0.01))
    with pytest.raises(ParityError):
        variants.export_run(toy_run, ExportSpec(out=tmp_path / "m.onnx", allow_drift=True))
    assert list(tmp_path.iterdir()) == []


def test_matrices_that_int8_hurts_most_are_left_in_float(
    calm_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Part of the distance has to go; the matrices named gain most by it for what they cost."""
    spec = ExportSpec(variants=("int8",), out=tmp_path / "b.onnx", count=24)
    asked = dataclasses.replace(spec, out=tmp_path / "a.onnx", allow_drift=True)
    (plain,) = variants.export_run(calm_run, asked)
    monkeypatch.setattr(Drift, "over", lambda self: ["too far"] if self.p99 > 0.6 * plain.drift.p99 else [])
    (one,) = variants.export_run(calm_run, spec)
    assert one.kept
    left = metadata(one.path)["float_matrices"]
    assert len(left) in (1, 2, 4, 8)
    assert one.drift.p99 <= 0.6 * plain.drift.p99
    turned = rotated(read_run(calm_run))
    few = checks.checks_of(turned, None, spec.count, lambda *_: None, rounding=int8.IMAGES).rounding
    order = int8.order(turned, int8.choose(turned, few, lambda *_: None), few[: variants.FEW])
    assert sorted(order[: len(left)]) == left


@pytest.mark.parametrize("kind", ["refit", "ensemble"])
def test_another_final_model_than_the_sweeps(toy_run: Path, tmp_path: Path, kind: str) -> None:
    """Its hold-out figures and its hash, not those of the model the sweep chose; no drift to the sweep's own."""
    (one,) = variants.export_run(toy_run, ExportSpec(out=tmp_path / "m.onnx", final=kind))
    info = json.loads((toy_run / "run.json").read_text())
    assert info["final"]["kind"] == "best-fold"
    assert one.info["final"]["kind"] == kind
    assert one.info["model_sha256"] != info["model_sha256"]
    assert one.info["data"]["metrics"]["holdout"] == info["finals"][kind]
    assert one.parity.cached is None
    saved, run = arrays(toy_run), read_run(toy_run, kind)
    pixels, kept, _ = checks.check_images(run, None, most=8)
    held = np.flatnonzero(saved["fold"] < 0)
    expected = saved[f"holdout_{kind}"][np.searchsorted(held, kept)]
    found = Predictor(one.path, device="cpu").run(pixels)
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=0)


def test_an_embedding_is_put_out_when_asked(toy_run: Path, tmp_path: Path) -> None:
    (one,) = variants.export_run(toy_run, ExportSpec(out=tmp_path / "m.onnx", embedding=True))
    outputs = [value.name for value in onnx.load(one.path).graph.output]
    assert outputs == ["logits", "probabilities", "embedding"]
    with pytest.raises(InputError, match="--embedding: an ensemble"):
        variants.export_run(toy_run, ExportSpec(out=tmp_path / "m.onnx", embedding=True, final="ensemble"))


def test_a_float16_file_is_not_for_the_cpu(calm_run: Path, tmp_path: Path) -> None:
    (one,) = variants.export_run(calm_run, ExportSpec(variants=("fp16",), out=tmp_path / "m.onnx"))
    with pytest.raises(DeviceError, match="float16 is slower than float32 on a CPU"):
        Predictor(one.path, device="cpu")


def test_some_images_are_enough_and_spread_over_the_holdout(toy_run: Path) -> None:
    run = read_run(toy_run)
    held = np.flatnonzero(arrays(toy_run)["fold"] < 0)
    _, kept, _ = checks.check_images(run, None, most=5)
    assert set(kept) <= set(held)
    assert (kept[0], kept[-1]) == (held[0], held[-1])
    assert checks.checks_of(run, None, 5, lambda *_: None).part == "hold-out"
