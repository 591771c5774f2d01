"""Files in, probabilities out: the same as torch's, in order, with a reason for every file that fails."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cxr_fast import export, predict
from cxr_fast.errors import ImageError, InputError, SchemaError
from cxr_fast.predict import Predictor, Result, expand, write_csv
from cxr_fast.preprocess import load
from cxr_fast.runs import read_run

SPEC_SIZE = 160


@pytest.fixture(scope="module")
def predictor(toy_model: Path) -> Predictor:
    return Predictor(toy_model, device="cpu", threads=1)


@pytest.fixture(scope="module")
def files(toy_data: Path) -> list[str]:
    """Every image in name order; the fourth is cut short."""
    return [str(path) for path in sorted((toy_data / "images").iterdir())]


def rows(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def arrays(run: Path) -> dict[str, np.ndarray]:
    with np.load(run / "predictions.npz") as file:
        return {name: file[name] for name in file.files}


def flat(answers: list[dict[str, float]]) -> np.ndarray:
    return np.array([list(answer.values()) for answer in answers])


# -------------------------------------------------------------------------------------------- probabilities


def test_probabilities_are_torchs(predictor: Predictor, files: list[str], toy_run: Path) -> None:
    sound = [file for file in files[:20] if file != files[3]]
    run = read_run(toy_run)
    expected = export.torch_probabilities(run, np.stack([load(file, predictor.spec)[0] for file in sound]))
    found = predictor(sound)
    assert all(tuple(answer) == tuple(run.info["classes"]) == predictor.labels for answer in found)
    np.testing.assert_allclose(flat(found), expected, atol=1e-5, rtol=0)
    assert expected.std(axis=0).max() > 1e-2, "all images look alike: the comparison shows nothing"


def test_probabilities_are_the_sweeps_own(predictor: Predictor, toy_run: Path, toy_data: Path) -> None:
    """From the file, by name, against what was computed from stored activations."""
    saved = arrays(toy_run)
    found = flat(predictor([toy_data / str(image) for image in saved["image"]]))
    np.testing.assert_allclose(found, saved["final"], atol=2e-3, rtol=0)


def test_pixels_are_the_training_pixels(predictor: Predictor, files: list[str], toy_run: Path) -> None:
    assert predictor.spec.size == SPEC_SIZE
    saved = arrays(toy_run)
    known = dict(zip(saved["image"].tolist(), saved["sha256"].tolist(), strict=True))
    for file in files[:3]:
        pixels, sha256 = load(file, predictor.spec)
        np.testing.assert_array_equal(predictor.pixels(file), pixels)
        assert sha256 == known[f"images/{Path(file).name}"]


def test_arrays_files_and_paths_may_be_mixed(predictor: Predictor, files: list[str]) -> None:
    grey = np.array(Image.open(files[0]))
    assert grey.dtype == np.uint8
    assert grey.ndim == 2
    colour, deep = np.repeat(grey[..., None], 3, axis=2), grey.astype(np.uint16) * 257
    found = flat(predictor([files[0], Path(files[0]), grey, colour, deep, files[1]]))
    for other in found[1:5]:
        np.testing.assert_allclose(other, found[0], atol=1e-6)
    assert np.abs(found[5] - found[0]).max() > 1e-3


def test_more_images_than_one_batch(predictor: Predictor, files: list[str]) -> None:
    sound = [file for file in files if file != files[3]][: 2 * predict.BATCH + 3]
    together, alone = flat(predictor(sound)), np.concatenate([flat(predictor([file])) for file in sound])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert predictor([]) == []


def test_the_first_unreadable_image_is_raised(predictor: Predictor, files: list[str], tmp_path: Path) -> None:
    for bad, reason in [
        (files[3], "truncated"),
        (tmp_path / "gone.png", "missing"),
        (np.zeros((2, 2, 2)), "bad_array"),
    ]:
        with pytest.raises(ImageError) as caught:
            predictor([files[0], bad])
        assert caught.value.reason == reason


def test_many_threads_share_one_predictor(predictor: Predictor, files: list[str]) -> None:
    """Calls and streams at once, each with images of its own: the answers are those of one thread, to the bit."""
    sound = [file for file in files[:15] if file != files[3]]
    calls = [sound[k : k + 3] for k in range(12)]
    expected = [flat(predictor(names)) for names in calls]
    streamed = [[result.probabilities for result in predictor.stream(names, workers=1)] for names in calls]
    ready = threading.Barrier(24)

    def call(k: int) -> np.ndarray:
        ready.wait(60)
        return flat(predictor(calls[k]))

    def stream(k: int) -> list[Any]:
        ready.wait(60)
        return [result.probabilities for result in predictor.stream(calls[k], workers=1)]

    with ThreadPoolExecutor(24) as pool:
        called, ran = [pool.submit(call, k) for k in range(12)], [pool.submit(stream, k) for k in range(12)]
        for k in range(12):
            np.testing.assert_array_equal(called[k].result(), expected[k])
            np.testing.assert_array_equal(ran[k].result(), streamed[k])
    assert len({tuple(rows.ravel()) for rows in expected}) == 12, "all answers look alike: the comparison shows nothing"


# ---------------------------------------------------------------------------------------------------- stream


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_the_stream_keeps_its_order(predictor: Predictor, files: list[str], batch_size: int, workers: int) -> None:
    """A broken file in the middle takes its own place and nobody else's."""
    paths = [*files[:7], "gone.png", *files[7:12]]
    found = list(predictor.stream(paths, batch_size=batch_size, workers=workers))
    assert [result.path for result in found] == paths
    assert [result.reason for result in found if not result.ok] == ["truncated", "missing"]
    assert [i for i, result in enumerate(found) if not result.ok] == [3, 7]
    good = [result for result in found if result.probabilities is not None]
    expected = flat(predictor([result.path for result in good]))
    np.testing.assert_allclose(np.stack([result.probabilities for result in good]), expected, atol=1e-6)


def test_a_stream_of_broken_files_alone(predictor: Predictor) -> None:
    found = list(predictor.stream(["a.png", "b.png", "c.png"], batch_size=2))
    assert [(result.path, result.reason) for result in found] == [(f"{x}.png", "missing") for x in "abc"]
    assert list(predictor.stream([])) == []


def test_the_stream_reads_ahead_by_little(predictor: Predictor, files: list[str]) -> None:
    """Flat memory: of a million paths, no more are taken than a few batches need."""
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield files[taken % 3]

    stream = predictor.stream(endless(), batch_size=2, workers=1)
    for _ in range(4):
        next(stream)
    stream.close()
    assert taken <= 4 + 3 * 2


# ---------------------------------------------------------------------------------------------------- expand


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ["b.png", "a.JPG", "notes.txt", "deep/er/c.dcm", "deep/d.jpeg", "x[1].png", "none/readme.md"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"?")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (["b.png"], ["b.png"]),
        (["deep"], ["deep/d.jpeg", "deep/er/c.dcm"]),
        (["."], ["a.JPG", "b.png", "deep/d.jpeg", "deep/er/c.dcm", "x[1].png"]),
        (["*.png"], ["b.png", "x[1].png"]),
        (["**/*.dcm"], ["deep/er/c.dcm"]),
        (["x[1].png"], ["x[1].png"]),  # a file of that name, not a glob for x1.png
        (["notes.txt", "gone.png"], ["notes.txt", "gone.png"]),  # named by hand: the answer says what is wrong
        (["b.png", "*.png", ".", "b.png"], ["b.png", "x[1].png", "a.JPG", "deep/d.jpeg", "deep/er/c.dcm"]),
        ([], []),
    ],
)
def test_inputs_become_paths(tree: Path, inputs: list[str], expected: list[str]) -> None:
    assert expand(inputs) == expected


@pytest.mark.parametrize(
    ("item", "match"), [("none", "none: a folder without images"), ("*.tif", r"\*.tif: matches no file"), ("", "empty")]
)
def test_inputs_that_are_surely_a_mistake(tree: Path, item: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        expand(["b.png", item])


@given(st.lists(st.sampled_from(["a.png", "b.png", "c.dcm"]), max_size=8))
def test_each_path_comes_once_where_it_came_first(names: list[str]) -> None:
    assert expand(names) == sorted(set(names), key=names.index)


# ------------------------------------------------------------------------------------------------- refusals


def change(model: Path, out: Path, edit: Callable[[onnx.ModelProto], Any]) -> Path:
    proto = onnx.load(model)
    edit(proto)
    out.write_bytes(proto.SerializeToString())
    return out


def put(key: str, value: str | None) -> Callable[[onnx.ModelProto], None]:
    """Set one entry of the metadata, or take it away."""

    def edit(proto: onnx.ModelProto) -> None:
        kept = [(p.key, p.value) for p in proto.metadata_props if p.key != key]
        del proto.metadata_props[:]
        for k, v in [*kept, *([(key, value)] if value is not None else [])]:
            proto.metadata_props.add(key=k, value=v)

    return edit


@pytest.mark.parametrize(
    ("key", "value", "error", "match"),
    [
        ("cxr.schema", "3", SchemaError, r"schema 3 \(written by cxr-fast .*Export the run again"),
        ("cxr.schema", None, InputError, "not one `cxrfast export` wrote"),
        ("cxr.schema", "{", InputError, "damaged metadata"),
        ("cxr.labels", None, InputError, r"damaged metadata \(no labels\)"),
        ("cxr.thresholds", None, InputError, r"damaged metadata \(no thresholds\)"),
        ("cxr.preprocess", None, InputError, r"damaged metadata \(no preprocess\)"),
        ("cxr.thresholds", "[0.5", InputError, "damaged metadata"),
        ("cxr.preprocess", '{"size": 160, "sharpen": 1}', SchemaError, "sharpen"),
        ("cxr.preprocess", '{"size": 160, "resize": "sideways"}', InputError, "sideways"),
    ],
)
def test_damaged_metadata_is_refused(
    toy_model: Path, tmp_path: Path, key: str, value: str | None, error: type[Exception], match: str
) -> None:
    model = change(toy_model, tmp_path / "m.onnx", put(key, value))
    with pytest.raises(error, match=match) as caught:
        Predictor(model, device="cpu")
    assert str(caught.value).count("\n") == 0


def test_an_entry_of_somebody_else_is_left_alone(toy_model: Path, tmp_path: Path) -> None:
    model = change(toy_model, tmp_path / "m.onnx", put("mlflow.note", "not { json"))
    assert "mlflow.note" not in Predictor(model, device="cpu").info


def test_a_foreign_model_is_refused(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value], [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"an ONNX file, but not one"):
        Predictor(tmp_path / "m.onnx", device="cpu")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", None])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(InputError, match=r"m\.onnx: (no such model|not an ONNX file)") as caught:
        Predictor(tmp_path / "m.onnx", device="cpu")
    assert str(caught.value).count("\n") == 0


def test_a_model_cut_short_is_refused(toy_model: Path, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(toy_model.read_bytes()[:-5000])
    with pytest.raises(InputError, match=r"m\.onnx: (not an ONNX file|an ONNX file, but not|damaged)"):
        Predictor(tmp_path / "m.onnx", device="cpu")
    with pytest.raises(InputError, match="no such model"):
        Predictor(tmp_path, device="cpu")


# ------------------------------------------------------------------------------------------------ the table


def test_the_table_has_a_row_for_every_image(predictor: Predictor, files: list[str], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    out = tmp_path / "new" / "p.csv"
    summary = write_csv(predictor, files[:6], out, on_result=lambda *counts: seen.append(counts))
    head, *body = rows(out)
    assert head == ["path", "status", "reason", *predictor.labels]
    assert [row[0] for row in body] == files[:6]
    assert [row[1] for row in body] == ["ok", "ok", "ok", "failed", "ok", "ok"]
    assert body[3][2].startswith("truncated: ")
    assert body[3][3:] == [""] * 35
    found = np.array([[float(cell) for cell in row[3:]] for row in body if row[1] == "ok"])
    np.testing.assert_allclose(found, flat(predictor(files[:3] + files[4:6])), atol=1e-6)
    assert seen == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)]
    assert (summary["images"], summary["failed"]) == (6, 1)
    saved = json.loads((tmp_path / "new" / "p.run.json").read_text())
    assert saved == summary
    assert saved["model_sha256"] == predict.file_sha256(predictor.path)
    assert saved["provider"] == "CPUExecutionProvider"
    assert sorted(os.listdir(out.parent)) == ["p.csv", "p.run.json"]


def test_findings_are_those_over_their_thresholds(predictor: Predictor, files: list[str], tmp_path: Path) -> None:
    write_csv(predictor, files[:8], tmp_path / "p.csv", decide=True)
    head, *body = rows(tmp_path / "p.csv")
    assert head[-1] == "findings"
    assert body[3][-1] == ""
    answers = iter(predictor(files[:3] + files[4:8]))
    some = 0
    for row in body[:3] + body[4:]:
        pairs = zip(next(answers).items(), predictor.thresholds, strict=True)
        expected = [name for (name, p), limit in pairs if p >= limit]
        assert row[-1].split(";") == (expected or [""])
        some += len(expected)
    assert some


def test_the_table_appears_only_when_complete(predictor: Predictor, files: list[str], tmp_path: Path) -> None:
    def stop(count: int, failed: int) -> None:
        assert [path.name for path in tmp_path.iterdir() if path.name == "p.csv"] == []
        if count == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_csv(predictor, files, tmp_path / "p.csv", on_result=stop)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "p.csv").write_text("of before")
    with pytest.raises(KeyboardInterrupt):
        write_csv(predictor, files, tmp_path / "p.csv", on_result=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert (tmp_path / "p.csv").read_text() == "of before"


@pytest.mark.parametrize("where", ["below a file", "a folder"])
def test_a_table_that_cannot_be_written_is_named(
    predictor: Predictor, files: list[str], tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before hours of predicting, not after."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(Predictor, "stream", lambda *_, **__: pytest.fail("predicted first"))
    with pytest.raises(InputError, match="--out: "):
        write_csv(predictor, files, tmp_path / ("file/p.csv" if where == "below a file" else "folder"))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"


def test_awkward_names_survive_the_table(predictor: Predictor, files: list[str], tmp_path: Path) -> None:
    names = [tmp_path / name for name in ['a, "b".png', "ü 胸.png", "line\nbreak.png", "=1+1.png"]]
    for name in names:
        shutil.copy(files[0], name)
    write_csv(predictor, [str(name) for name in names], tmp_path / "p.csv")
    assert [row[:2] for row in rows(tmp_path / "p.csv")[1:]] == [[str(name), "ok"] for name in names]


def test_probabilities_in_the_table_are_numbers(predictor: Predictor, files: list[str], tmp_path: Path) -> None:
    write_csv(predictor, files[:3], tmp_path / "p.csv")
    for row in rows(tmp_path / "p.csv")[1:]:
        assert all(re_is_probability(cell) for cell in row[3:])


def re_is_probability(cell: str) -> bool:
    value = float(cell)
    return math.isfinite(value) and 0 <= value <= 1 and len(cell) == 8


# --------------------------------------------------------------------------------------- what is not loaded

LOADED = """
import sys
{before}
from cxr_fast.cli import main
try:
    main({arguments!r})
except SystemExit as end:
    print(end.code, *sorted({{"torch", "open_clip", "timm", "h5py", "pandas", "onnx", "sklearn"}} & set(sys.modules)))
"""


def in_a_process(arguments: Iterable[str], before: str = "") -> list[str]:
    """Exit code and heavy modules of `cxrfast ARGUMENTS` in a process of its own."""
    script = LOADED.format(arguments=[str(a) for a in arguments], before=before)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout, done.stderr
    return done.stdout.splitlines()[-1].split()


def test_predicting_loads_no_torch(toy_model: Path, files: list[str], tmp_path: Path) -> None:
    command = ["predict", toy_model, *files[:2], "--out", tmp_path / "p.csv", "--device", "cpu"]
    assert in_a_process(command) == ["0"]
    assert [row[1] for row in rows(tmp_path / "p.csv")] == ["status", "ok", "ok"]


def test_the_check_above_can_fail(toy_model: Path, files: list[str], tmp_path: Path) -> None:
    command = ["predict", toy_model, *files[:1], "--out", tmp_path / "p.csv", "--device", "cpu"]
    assert in_a_process(command, before="import h5py, pandas") == ["0", "h5py", "pandas"]


def test_results_say_whether_they_are_sound() -> None:
    assert Result(path="a", probabilities=np.zeros(2)).ok
    assert not Result(path="a", reason="missing", message="a: no such file").ok


def test_the_warning_is_the_files_own(predictor: Predictor) -> None:
    assert predictor.warning == predictor.info["provenance"] == "phantom images"


def test_device_and_threads_may_be_given_by_place(toy_model: Path) -> None:
    found = Predictor(toy_model, "cpu", 1)
    assert (found.provider, found.threads, found.where) == ("CPUExecutionProvider", 1, "CPU, 1 thread(s)")
    assert found.why == "CPU: as asked"


def test_a_folder_of_variants_is_a_model(toy_model: Path, files: list[str], tmp_path: Path) -> None:
    shutil.copy(toy_model, tmp_path / "model.fp32.onnx")
    found = Predictor(tmp_path, device="cpu", threads=1)
    assert found.path == tmp_path / "model.fp32.onnx"
    assert "model.fp32.onnx" in found.why
    write_csv(found, files[:1], tmp_path / "p.csv")
    assert json.loads((tmp_path / "p.run.json").read_text())["model"] == str(found.path)
