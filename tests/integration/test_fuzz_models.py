"""Hundreds of broken model files through `cxrfast predict` and `verify`: a line that refuses, or the right answers."""

from __future__ import annotations

import csv
import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from cxr_fast.inference import model_file
from cxr_fast.inference.model_file import SEAL
from cxr_fast.inference.predictor import Predictor
from tests.data.test_images import samples as pictures
from tests.helpers import fuzz_worker
from tests.helpers.fuzz_worker import LEAST
from tests.helpers.model_edits import Edit, changed, put, weights

SECONDS = 120
FLOAT = TensorProto.FLOAT
Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two that a model answers differently."""
    folder, rng = tmp_path_factory.mktemp("films"), np.random.default_rng(4)
    pictures = [rng.integers(0, 256, (40, 50), np.uint8), np.tile(np.arange(90, dtype=np.uint8), (90, 1))]
    for name, picture in zip("ab", pictures, strict=True):
        Image.fromarray(picture).save(folder / f"{name}.png")
    return [str(folder / f"{name}.png") for name in "ab"]


def run(folder: Path, films: list[str], how: str = "apart") -> Found:
    """What became of each file; a worker that is lost fails here, with the name of the file."""
    command = [sys.executable, fuzz_worker.__file__, how, str(folder), *films]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        out, how = done.stdout, f"exit {done.returncode}: {done.stderr[-2000:]}"
    except subprocess.TimeoutExpired as error:
        out, how = (error.stdout or b"").decode(), f"more than {SECONDS} s"
        done = None
    lines = [json.loads(line) for line in out.splitlines()]
    assert done is not None, (how, lines[-1:])
    assert (done.returncode, done.stderr) == (0, ""), (how, lines[-1:])
    return {line["name"]: line for line in lines if "name" in line}


def answers(model: Path, films: list[str]) -> np.ndarray:
    """(2, C), what a sound file says."""
    return np.array([list(row.values()) for row in Predictor(model, device="cpu", threads=1)(films)])


def probabilities(name: str, line: dict[str, Any], films: list[str]) -> np.ndarray | None:
    """(2, C) of a table, NaN where a row failed; None where the command refused and left no table."""
    told = line["predict"]
    if told["code"] == 2:
        assert line["table"] is None, name
        return None
    rows = list(csv.reader(line["table"]))[1:]
    assert [row[0] for row in rows] == films, name
    failed = [row[1] == "failed" for row in rows]
    assert told["code"] == int(any(failed)), name
    for row, lost in zip(rows, failed, strict=True):
        assert row[2].startswith("not_finite: ") if lost else row[1:3] == ["ok", ""], (name, row)
        assert not any(row[3:]) if lost else all(0 <= float(cell) <= 1 + 1e-6 for cell in row[5:]), (name, row)
    return np.array([[float(cell or "nan") for cell in row[5:]] for row in rows])


def judged(model: Path, films: list[str], folder: Path, made: dict[str, Path], how: str = "apart") -> Found:
    """What became of each: an exit code of ours, a line a refusal, no crash; a PASS answers as the sound file does."""
    found, sound = run(folder, films, how), answers(model, films)
    assert set(found) == {path.name for path in made.values()}
    for name, path in made.items():
        line = found[path.name]
        for command, codes in (("predict", (0, 1, 2)), ("verify", (0, 1, 2))):
            told = line[command]
            print(name, command, told["code"], round(told["seconds"], 1), told["err"].strip()[:150])
            assert told["code"] in codes, (name, command, told)
            assert "Traceback" not in told["out"] + told["err"], (name, told)
            assert told["seconds"] < fuzz_worker.SECONDS, (name, told)
            if told["code"] == 2 and not (command == "verify" and path.is_dir()):
                assert told["out"] == "", (name, told)
                assert told["err"].startswith("error: "), (name, told)
                assert told["err"].count("\n") <= 2, (name, told)
                assert len(told["err"]) < len(str(path)) + 310, (name, told)
        assert line["verify"]["code"] == 2 or line["verify"]["out"].splitlines()[-1] in ("PASS", "FAIL"), name
        rows = probabilities(name, line, films)
        if rows is not None:
            assert rows.shape == sound.shape, name
        if line["verify"]["code"] == 0:
            np.testing.assert_allclose(rows, sound, atol=1e-4, err_msg=name)
    return found


def refused(line: dict[str, Any], command: str = "predict") -> bool:
    return bool(line[command]["code"] == 2)


def write_all(folder: Path, made: Iterator[tuple[str, bytes]]) -> dict[str, Path]:
    paths = {}
    for i, (name, data) in enumerate(made):
        paths[f"{i} {name}"] = folder / f"{i:04}.onnx"
        paths[f"{i} {name}"].write_bytes(data)
    return paths


# ------------------------------------------------------------------------------- damage, which nobody seals


def flips(data: bytes, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """Half of them among the metadata at the end, where structure is; the rest anywhere, so in weights."""
    for k in range(240):
        broken = bytearray(data)
        low = len(data) - 9000 if k % 2 else 0
        for _ in range(draw.choice((1, 1, 1, 2, 40))):
            broken[draw.randrange(low, len(data))] ^= 1 << draw.randrange(8)
        yield "flip", bytes(broken)


def cuts(data: bytes, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    for k in range(90):
        at = draw.randrange(len(data)) if k % 3 else draw.randrange(len(data) - 9000, len(data))
        tail = draw.choice((b"", bytes(len(data) - at), draw.randbytes(50), data[: 1 << 12]))
        yield f"cut at {at} + {len(tail)}", data[:at] + tail
    yield from [("empty", b""), ("one byte", data[:1]), ("zeros", bytes(5000)), ("noise", draw.randbytes(5000))]
    yield from [("doubled", data + data), ("more", data + b"\0"), ("text", b"hello"), ("head", data[:40])]


def swaps(data: bytes, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    for _ in range(90):
        size = draw.choice((1, 4, 64, 4096))
        a, b = sorted(draw.randrange(len(data) // size) * size for _ in range(2))
        if a == b or data[a : a + size] == data[b : b + size]:
            continue
        broken = bytearray(data)
        broken[a : a + size], broken[b : b + size] = data[b : b + size], data[a : a + size]
        yield f"swap {size} at {a} and {b}", bytes(broken)


@pytest.mark.parametrize("damage", [flips, cuts, swaps])
def test_damage_is_refused(
    toy_model: Path,
    films: list[str],
    tmp_path: Path,
    damage: Callable[[bytes, random.Random], Iterator[tuple[str, bytes]]],
) -> None:
    """Not one damaged file gives a row or passes, whatever the damage hit; what ORT would make of it is never tried."""
    made = write_all(tmp_path, damage(toy_model.read_bytes(), random.Random(7)))
    assert len(made) >= LEAST[damage.__name__]
    found = judged(toy_model, films, tmp_path, made, "inside")
    for name, path in made.items():
        assert refused(found[path.name]), name
        assert found[path.name]["verify"]["code"] != 0, name


def test_a_flipped_weight_would_have_answered(toy_model: Path, films: list[str], tmp_path: Path) -> None:
    """What the check is for: unchecked, the file runs and the row is another one."""
    data = bytearray(toy_model.read_bytes())
    tensor = weights(onnx.load(toy_model))["blocks.0.fc1.weight"].raw_data
    data[data.index(tensor) + 403] ^= 0x40  # the exponent of the 100th weight
    path = tmp_path / "files" / "m.onnx"
    path.parent.mkdir()
    path.write_bytes(data)
    predictor = Predictor(path, device="cpu", threads=1, check=False)
    rows = [list(row.values()) for row in predictor(films)]
    assert np.abs(np.array(rows) - answers(toy_model, films)).max() > 1e-3
    (line,) = judged(toy_model, films, path.parent, {"flipped": path}).values()
    assert "damaged or edited" in line["predict"]["err"]
    assert [row for row in line["verify"]["out"].splitlines() if "DIFFERS" in row][1].split()[1:3] == [
        "golden",
        "answer",
    ]


# --------------------------------------------------------------- edits by somebody who seals the file again

VALUES = [
    *("null", "true", "0", "-1", "2", "1e999", "NaN", "[]", "{}", '""', '"text"', '"\\ud800"', "[[]]", "[null]"),
    *('{"a": 1}', "[1, 2, 3]", '["a", "a"]', '["a"]', "{", "", "[" * 100_000, "9" * 5000, "1e-400", '"\\n\\n"'),
]
NAMES = (*("schema", "labels", "labels_sha256", "thresholds", "preprocess", "golden", "pixel_check", "calibration"),)
OTHERS = (*("variant", "provenance", "toolchain", "dicom_policy", "written_by", "data", "nodes"), SEAL)


def entries(model: Path, draw: random.Random) -> Iterator[tuple[str, Edit]]:
    for name in (*NAMES, *OTHERS):
        yield f"{name} gone", put(name, None)
        for value in draw.sample(VALUES, 10 if name in NAMES else 3):
            if (name, value) == ("schema", "2"):
                continue
            yield f"{name} = {value[:20]}", put(name, value)
    info = model_file.read(model)
    labels, limits, spec, golden = (info[name] for name in ("labels", "thresholds", "preprocess", "golden"))
    for name, value in [
        *(("labels", labels[:-1]), ("labels", [*labels, "x"]), ("labels", labels[::-1]), ("labels", [*labels[:-1], 3])),
        *(("thresholds", limits[1:]), ("thresholds", [*limits, 0.5]), ("thresholds", [*limits[:-1], None])),
        *(("thresholds", [*limits[:-1], bad]) for bad in (float("nan"), float("inf"), "0.5", True, -0.1, 1.1)),
        *(("preprocess", spec | {"size": bad}) for bad in (224, 0, -8, 8.5, 160.0, "160", None, 10**30, [160], True)),
        *(("preprocess", spec | {"resize": bad}) for bad in ("sideways", None, 1, [], {})),
        *(("preprocess", {k: v for k, v in spec.items() if k != gone}) for gone in spec),
        *(("golden", golden | {"tolerance": bad}) for bad in (0, -1, 5, "x", None, float("nan"))),
        *(("golden", golden | {"expected": bad}) for bad in ([], golden["expected"][1:], "x", [None] * 35, {})),
        *(("golden", golden | {"recipe": bad}) for bad in ("", "pixels[0, i, j] = 0", None, ["x"])),
        *(("schema", bad) for bad in (1, 3, 2.0, True, "2", [2], {"2": 2}, 10**40)),
    ]:
        yield f"{name} = {json.dumps(value)[:60]}", put(name, json.dumps(value))


def test_entries_changed_and_sealed_again(toy_model: Path, films: list[str], tmp_path: Path) -> None:
    made = {}
    for i, (name, edit) in enumerate(entries(toy_model, random.Random(3))):
        made[f"{i} {name}"] = changed(toy_model, tmp_path / f"{i:04}.onnx", edit)
    assert len(made) >= LEAST["entries"]
    found = judged(toy_model, films, tmp_path, made, "inside")
    for name, path in made.items():
        if name.split()[1] in ("schema", "labels", "thresholds", "preprocess"):
            assert refused(found[path.name]), name
        if name.split()[1] in (*NAMES, "dicom_policy") and name.split()[1] != "calibration":
            assert found[path.name]["verify"]["code"] != 0, name


def io_name(which: str, name: str, new: str) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        (value,) = (v for v in getattr(proto.graph, which) if v.name == name)
        value.name = new

    return edit


def renamed(name: str, new: str) -> Edit:
    """A tensor's name everywhere in the graph."""

    def edit(proto: onnx.ModelProto) -> None:
        for value in (*proto.graph.input, *proto.graph.output):
            value.name = new if value.name == name else value.name
        for node in proto.graph.node:
            node.input[:] = [new if n == name else n for n in node.input]
            node.output[:] = [new if n == name else n for n in node.output]

    return edit


def declared(which: str, k: int, *, dtype: int = 0, dims: list[int | str] | None = None) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        kind = getattr(proto.graph, which)[k].type.tensor_type
        kind.elem_type = dtype or kind.elem_type
        if dims is not None:
            kind.CopyFrom(helper.make_tensor_type_proto(kind.elem_type, dims).tensor_type)

    return edit


def weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        tensor = weights(proto)[name]
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(numpy_helper.to_array(tensor))), name))

    return edit


def outside(name: str, location: str) -> Edit:
    """Its values in another file."""

    def edit(proto: onnx.ModelProto) -> None:
        tensor = weights(proto)[name]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return edit


def dims(name: str, *shape: int) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        weights(proto)[name].dims[:] = shape

    return edit


def ends(*nodes: onnx.NodeProto) -> Edit:
    """Further nodes between the old `probabilities`, now `before`, and the output."""

    def edit(proto: onnx.ModelProto) -> None:
        renamed("probabilities", "before")(proto)
        proto.graph.node.extend(nodes)
        io_name("output", "before", "probabilities")(proto)

    return edit


def constant(name: str, values: Any, dtype: Any) -> onnx.NodeProto:
    value = numpy_helper.from_array(np.array(values, dtype), name)
    return helper.make_node("Constant", [], [name], value=value)


def drop(which: str, k: int) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        del getattr(proto.graph, which)[k]

    return edit


def outer(field: str, value: Any) -> Edit:
    return lambda proto: setattr(proto, field, value)


def opset(version: int) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        proto.opset_import[0].version = version

    return edit


def graphs(model: Path) -> Iterator[tuple[str, Edit]]:
    proto = onnx.load(model)
    names = [name for name, tensor in weights(proto).items() if tensor.data_type == FLOAT]
    for old, new in [("pixels", "image"), ("probabilities", "p"), ("logits", "scores"), ("pixels", ""), ("logits", "")]:
        yield f"renamed {old} {new}", renamed(old, new)
    for which, name in [("input", "pixels"), ("output", "probabilities"), ("output", "logits")]:
        yield f"{name} undeclared", io_name(which, name, "nowhere")
    for dtype in (FLOAT, TensorProto.INT8, TensorProto.STRING, TensorProto.FLOAT16, 99):
        yield f"pixels of type {dtype}", declared("input", 0, dtype=dtype)
        yield f"probabilities of type {dtype}", declared("output", 1, dtype=dtype)
    for shape in ([1, 160, 160], ["N", 160], ["N", 224, 224], [], ["N", -1, 160], ["N", 2**40, 2**40], ["N", "S", "S"]):
        yield f"pixels {shape}", declared("input", 0, dims=shape)
    for shape in (["N", 34], ["N", 36], [35], [], ["N", "C"], ["N", 2**62], [1, 35], ["N", 35, 1]):
        yield f"probabilities {shape}", declared("output", 1, dims=shape)
    for which, k in [("input", 0), ("output", 0), ("output", 1), ("node", 0), ("node", 20), ("node", -1)]:
        yield f"without {which} {k}", drop(which, k)
    for name in ("patch.weight", "positions", "head.0.weight", "logits.weight", "blocks.2.norm1.bias"):
        assert name in names
        yield f"{name} NaN", weight(name, lambda a: a * np.nan)
        yield f"{name} infinite", weight(name, lambda a: a + np.inf)
        yield f"{name} doubled", weight(name, lambda a: a * 2)
        yield f"{name} cut", weight(name, lambda a: a[..., :-1])
        yield f"{name} of integers", weight(name, lambda a: a.astype(np.int32))
        yield f"{name} empty", weight(name, lambda a: a[..., :0])
        for location in ("/etc/passwd", "../../../etc/passwd", "gone.bin", "", "0000.onnx", "/dev/zero"):
            yield f"{name} in {location}", outside(name, location)
    for shape in ((2**40,), (2**62, 4), (-1, 64), (0,), (2**31, 2**31), (1,) * 60):
        yield f"dims {shape[:3]}", dims("head.0.weight", *shape)
    yield "classes permuted", weight("logits.weight", lambda a: a[:, ::-1])
    yield from ends_of(proto)
    yield from [("old opset", opset(1)), ("new opset", opset(999)), ("negative opset", opset(-1))]
    yield from [("ir version", outer("ir_version", 2**40)), ("ir version 1", outer("ir_version", 1))]
    yield from [("domain", outer("domain", "x" * 5000)), ("producer", outer("producer_name", "somebody"))]


def ends_of(proto: onnx.ModelProto) -> Iterator[tuple[str, Edit]]:
    """Graphs that run and whose answer is not one row an image."""
    node, answer = helper.make_node, "probabilities"
    flat = constant("shape", [-1], np.int64)
    yield "flat", ends(flat, node("Reshape", ["before", "shape"], ["probabilities"]))
    one = constant("axes", [0], np.int64)
    yield "one row", ends(one, node("ReduceMean", ["before", "axes"], ["probabilities"], keepdims=1))
    yield "classes first", ends(node("Transpose", ["before"], ["probabilities"], perm=[1, 0]))
    yield "double", ends(node("Cast", ["before"], ["probabilities"], to=TensorProto.DOUBLE))
    yield (
        "batch mean",
        ends(one, node("ReduceMean", ["before", "axes"], ["m"]), node("Mean", ["m", "before"], [answer])),
    )
    yield "above 1", ends(node("Add", ["before", "before"], ["twice"]), node("Exp", ["twice"], ["probabilities"]))
    yield "log", ends(node("Log", ["before"], ["l"]), node("Log", ["l"], ["probabilities"]))
    wide = constant("wide", [1, 1 << 40], np.int64)
    yield "terabytes", ends(wide, node("Expand", ["before", "wide"], ["probabilities"]))
    huge = constant("huge", [1 << 62, 4], np.int64)
    yield "exabytes", ends(huge, node("ConstantOfShape", ["huge"], ["probabilities"]))
    yield "unknown operator", ends(node("Frobnicate", ["before"], ["probabilities"], domain="com.example"))
    yield (
        "a ring",
        ends(
            node("Add", ["before", "x"], ["y"]),
            node("Add", ["y", "y"], ["x"]),
            node("Identity", ["x"], ["probabilities"]),
        ),
    )


def test_graphs_edited_and_sealed_again(toy_model: Path, films: list[str], tmp_path: Path) -> None:
    """A seal is no signature: what its maker changed is found by the graph's own shape and the golden answer."""
    made = {}
    for i, (name, edit) in enumerate(graphs(toy_model)):
        made[f"{i} {name}"] = changed(toy_model, tmp_path / f"{i:04}.onnx", edit)
    assert len(made) >= LEAST["graphs"]
    found = judged(toy_model, films, tmp_path, made)
    passed = {name.split(" ", 1)[1] for name, path in made.items() if found[path.name]["verify"]["code"] == 0}
    # A declared output shape that ONNX Runtime overrules by the one it infers, what it does not read, and no change.
    harmless = {"domain", "producer", "probabilities of type 1", "ir version 1"}
    assert {name for name in passed if not name.startswith("probabilities [")} <= harmless
    outside = [found[path.name]["predict"]["err"] for name, path in made.items() if " in " in name]
    assert all("its weights lie in another file" in said for said in outside)


def structure(data: bytes, proto: onnx.ModelProto) -> np.ndarray:
    """Which bytes are neither values of weights nor metadata."""
    inside = np.ones(len(data), bool)
    for tensor in proto.graph.initializer:
        at = data.index(tensor.raw_data)
        inside[at : at + len(tensor.raw_data)] &= len(tensor.raw_data) <= 64  # shapes, pads and axes are structure
    inside[data.index(b"cxr.schema") - 8 :] = False
    return np.flatnonzero(inside)


def test_damaged_structure_sealed_again(toy_model: Path, films: list[str], tmp_path: Path) -> None:
    """What the seal keeps from ONNX Runtime when damage comes alone, let through to it."""
    draw, proto = random.Random(23), onnx.load(toy_model)
    put(SEAL, None)(proto)
    data = proto.SerializeToString()
    places, made = structure(data, proto).tolist(), {}
    while len(made) < LEAST["sealed"]:
        broken = bytearray(data)
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            at = draw.choice(places)
            broken[at] = draw.choice((broken[at] ^ 1 << draw.randrange(8), broken[draw.choice(places)], 0, 127, 255))
        path = tmp_path / f"{len(made):04}.onnx"
        try:
            model_file.write(path, bytes(broken))
        except model_file.NotOnnx:  # cannot be sealed
            continue
        made[path.name] = path
    found = judged(toy_model, films, tmp_path, made)
    assert 0 < sum(map(refused, found.values())) < len(found)


# ------------------------------------------------------------------------------------------ what is no model at all


def odd(model: Path, folder: Path) -> Iterator[str]:
    """Other people's files, folders, links and names; what each is called."""
    data = model.read_bytes()
    proto = onnx.load(model)

    def bare(edit: Edit) -> bytes:
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        edit(copy)
        return copy.SerializeToString()

    a, b = (weights(proto)[f"blocks.{k}.fc1.weight"].raw_data for k in (0, 1))
    swapped = data.replace(a, b"?" * len(a)).replace(b, a).replace(b"?" * len(a), b)
    files = {
        "swapped.onnx": swapped,
        "stranger.onnx": bare(lambda p: p.ClearField("metadata_props")),
        "stranger2.onnx": bare(
            lambda p: (p.ClearField("metadata_props"), p.metadata_props.add(key="author", value="x"))
        ),
        "unsealed.onnx": bare(put(SEAL, None)),
        "wrong sha.onnx": bare(put(SEAL, json.dumps("0" * 64))),
        "old schema.onnx": bare(put("schema", "1")),
        "new schema.onnx": bare(put("schema", "3")),
        "huge length.onnx": data[:2] + b"\x3a" + b"\xff" * 8 + b"\x7f" + data[2:],
        "huge graph.onnx": b"\x08\x0a\x3a\xff\xff\xff\xff\x7f" + data[:5000],
        "huge varint.onnx": b"\x08" + b"\xff" * 12 + data,
        "groups.onnx": b"\x0b" * 5000,
        "many records.onnx": b"\x08\x0a" * 50_000,
        "many graphs.onnx": data[:2] + b"\x3a\x00" * 5000 + data[2:],
        "not utf8.onnx": data.replace(b"cxr.labels", b"cxr.l\xffbels", 1),
        "twice.onnx": data + data[data.index(b"cxr.variant") - 4 :],
        "text.onnx": "no model, \U0001f9b4\n".encode() * 50,
        "cache.h5": b"\x89HDF\r\n\x1a\n" + bytes(500),
        "a film.png": (folder / "films.png").read_bytes(),
        "pickle.pt": b"\x80\x04K\x01.",
        "zip.onnx": b"PK\x03\x04" + bytes(200),
        "empty.onnx": b"",
        "empty": b"",
        "new\nline.onnx": data[:-5],
        "a name with spaces, 'quotes' & \u00e4\u4e2d\U0001f9b4.onnx": data[:90],
        "x" * 200 + ".onnx": data[:-9],
    }
    (folder / "films.png").unlink()
    for name, content in pictures().items():
        files |= {name: content, f"{name} cut": content[: len(content) // 2]}
    for name, content in files.items():
        (folder / name).write_bytes(content)
        yield name
    variants = {
        "folder empty": {},
        "folder of text": {"model.fp32.onnx": b"hello"},
        "folder cut": {"model.fp32.onnx": data[:-1]},
        "folder one broken": {"model.fp32.onnx": data, "model.int8.onnx": data[: len(data) // 2]},
        "folder one empty": {"model.fp32.onnx": data, "model.fp16.onnx": b""},
        "folder false name": {"model.int8.onnx": data},
        "folder of others": {"weights.onnx": data, "model.onnx": data},
    }
    for name, inside in variants.items():
        (folder / name).mkdir()
        for part, content in inside.items():
            (folder / name / part).write_bytes(content)
        yield name
    (folder / "folder.onnx" / "model.fp32.onnx").mkdir(parents=True)
    for name, target in {"dangling.onnx": "nowhere", "ring.onnx": "ring.onnx", "device.onnx": "/dev/zero"}.items():
        (folder / name).symlink_to(target)
        yield name
    yield "folder.onnx"


def test_what_is_no_model_at_all(toy_model: Path, films: list[str], tmp_path: Path) -> None:
    shutil.copy(films[0], tmp_path / "films.png")
    made = {name: tmp_path / name for name in odd(toy_model, tmp_path)}
    assert len(made) >= LEAST["odd"]
    found = judged(toy_model, films, tmp_path, made)
    assert {name for name in made if not refused(found[name])} == set()
    differs = {name for name in made if not refused(found[name], "verify")}
    assert differs == {"swapped.onnx", "wrong sha.onnx", "folder false name"}


# ------------------------------------------------------------------------------------------------------ the net itself


def test_there_are_a_thousand() -> None:
    assert sum(LEAST.values()) >= 1000


DIES = """
import json, os, signal, time
from tests.helpers import fuzz_worker

def dies(arguments, prog_name):
    if arguments == ["crash"]:
        os.kill(os.getpid(), signal.SIGSEGV)
    while arguments == ["hang"]:
        time.sleep(1)
    raise ZeroDivisionError

fuzz_worker.main, found = dies, []
for how in ("crash", "hang", "else"):
    fuzz_worker.SECONDS = 1 if how == "hang" else 60
    found.append(fuzz_worker.call([how]))
print(json.dumps(found))
"""


@pytest.mark.kill
def test_a_crash_a_hang_and_a_traceback_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above can fail."""
    folder = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", DIES], cwd=folder, capture_output=True, text=True, check=True)
    crash, hang, other = json.loads(done.stdout)
    assert [crash["code"], hang["code"], other["code"]] == [-signal.SIGSEGV, -signal.SIGALRM, 1]
    assert "Traceback" in other["err"]
    assert "ZeroDivisionError" in other["err"]
    (tmp_path / "worker.py").write_text('print(\'{"begins": "a.onnx"}\', flush=True)\nimport sys\nsys.exit(3)\n')
    monkeypatch.setattr(fuzz_worker, "__file__", str(tmp_path / "worker.py"))
    with pytest.raises(AssertionError, match=r"exit 3.*a\.onnx"):
        run(tmp_path, [])
