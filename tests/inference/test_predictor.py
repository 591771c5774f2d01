"""Files in, probabilities out: the same as torch's, in order, with a reason for every file that fails."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from cxr_fast.data.images import load
from cxr_fast.errors import ImageError, InputError, SchemaError
from cxr_fast.export import parity
from cxr_fast.export.entries.settings import ExportSpec
from cxr_fast.export.variants import export_run
from cxr_fast.inference import predictor as predict
from cxr_fast.inference.predictor import Decoded, Predictor, Result, changed_ns
from cxr_fast.system.files import file_sha256
from cxr_fast.training.run_folder import read_run
from tests.helpers import states

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
    expected = parity.torch_probabilities(run, np.stack([load(file, predictor.spec)[0] for file in sound]))
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
        pixels, sha256, _ = load(file, predictor.spec)
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


def test_one_image_of_any_kind(predictor: Predictor, files: list[str]) -> None:
    """Each way to hand over a film gives the answer of its file, to the bit."""
    path = Path(files[0])
    with Image.open(path) as image:
        grey, picture = np.asarray(image), image.copy()
    tensor = torch.from_numpy(grey.copy())
    kinds: list[Any] = [str(path), path, path.read_bytes(), io.BytesIO(path.read_bytes())]
    kinds += [picture, Image.open(path), grey]
    kinds += [np.repeat(grey[..., None], 3, axis=2), grey.astype(np.float64) / 255, grey.astype(np.uint16) * 257]
    kinds += [tensor, tensor[None], tensor[None].repeat(3, 1, 1), tensor.float() / 255]
    (expected,) = predictor([str(path)])
    for kind in kinds:
        assert predictor(kind) == expected, type(kind)
    with open(path, "rb") as file:
        assert predictor([file, str(path), grey]) == [expected] * 3
    assert predictor(image for image in [grey, grey]) == [expected] * 2


def test_a_pydicom_data_set_is_an_image(predictor: Predictor, tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom", reason="pip install 'cxr-fast[dicom]'")
    from tests.data.formats.test_dicom import dicom_file

    path = tmp_path / "film.dcm"
    path.write_bytes(dicom_file(np.arange(90 * 70, dtype=np.uint16).reshape(90, 70) % 4096, bits=12))
    (expected,) = predictor([path])
    assert predictor(pydicom.dcmread(path)) == expected
    transform, groups = pydicom.Dataset(), pydicom.Dataset()
    transform.RescaleSlope, transform.RescaleIntercept = -1, 4095
    groups.PixelValueTransformationSequence = [transform]
    film = np.arange(90 * 70, dtype=np.uint16).reshape(90, 70) % 4096
    path.write_bytes(dicom_file(film, bits=12, SharedFunctionalGroupsSequence=[groups]))
    enhanced = pydicom.dcmread(path)
    before = str(enhanced)
    assert predictor(enhanced) == predictor(path) != expected
    assert str(enhanced) == before, "the caller's data set was changed"
    bad = pydicom.dcmread(path)
    del bad.Rows
    with pytest.raises(ImageError, match="no Rows"):
        predictor(bad)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (17, "a int is no image"),
        ([None], "a NoneType is no image"),
        (b"secret bytes" * 1000, "12,000 bytes: not a PNG"),
        (io.StringIO("text"), "'rb'"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.full((4, 4), 7.0), "0 to 1"),
    ],
)
def test_what_is_no_image_is_named_in_a_line(predictor: Predictor, image: Any, words: str) -> None:
    with pytest.raises(ImageError, match=words) as caught:
        predictor(image)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_predictor_travels_to_other_processes(predictor: Predictor, files: list[str]) -> None:
    """Pickled for spawn; and after a fork, in which ONNX Runtime's threads do not live on."""
    expected = predictor(files[0])
    assert pickle.loads(pickle.dumps(predictor))(files[0]) == expected
    quiet = Predictor(predictor.path, "cpu", predictor.threads, spin=False)
    assert pickle.loads(pickle.dumps(quiet))(files[0]) == quiet(files[0]) == expected
    for method in ("spawn", "fork"):
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
            assert list(pool.map(predictor, files[:1] * 3, timeout=120)) == [expected] * 3
    assert repr(predictor).startswith("Predictor(")
    assert f"{len(predictor.labels)} classes" in repr(predictor)


def test_batch_size_and_embedding_that_cannot_be(predictor: Predictor, files: list[str]) -> None:
    with pytest.raises(InputError, match="batch_size 0"):
        next(predictor.stream(files, batch_size=0))
    assert [result.path for result in predictor.stream(files[0])] == [files[0]]
    with pytest.raises(InputError, match="export the run with --embedding"):
        predictor.embed(files[0])


def test_embeddings_are_what_the_head_sees(toy_run: Path, files: list[str], tmp_path: Path) -> None:
    export_run(toy_run, ExportSpec(out=tmp_path / "e.onnx", embedding=True, count=4))
    predictor, run = Predictor(tmp_path / "e.onnx", device="cpu", threads=1), read_run(toy_run)
    found = predictor.embed(files[:3])
    pixels = np.stack([predictor.pixels(file) for file in files[:3]])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(found, predictor.run(pixels, output="embedding"))
    np.testing.assert_allclose(predictor.embed(files[0]), found[0], atol=1e-6)
    assert predictor.embed([]).shape[0] == 0
    with torch.inference_mode():
        logits = run.head(torch.from_numpy(found)).sigmoid().numpy()
    np.testing.assert_allclose(logits, predictor.probabilities(pixels), atol=1e-4)


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


class Fake(Predictor):
    """Decodes nothing and knows how many images are decoded and not answered yet; its model waits until it were
    once `enough`."""

    def __init__(self, enough: int = 0) -> None:
        self.held = self.most = 0
        self.enough, self.labels = enough, ("one",)
        self.counting = threading.Lock()

    def _decode(self, path: str | os.PathLike[str]) -> Decoded:
        with self.counting:
            self.held += 1
            self.most = max(self.most, self.held)
        return np.full((1, 1), int(path) % 251, np.uint8), Result(path=os.fspath(path))

    def run(self, pixels: np.ndarray, *, output: str = "probabilities") -> np.ndarray:
        states.wait_until(lambda: self.most >= self.enough, "enough images decoded at once")
        with self.counting:
            self.held -= len(pixels)
        return pixels.reshape(-1, 1).astype(np.float32) / 255


def test_twenty_thousand_paths_stay_bounded() -> None:
    """Decoding is faster than the model: without a bound all of them would wait decoded."""
    fake, taken = Fake(), 0

    def names() -> Iterator[str]:
        nonlocal taken
        for taken in range(1, 20_001):
            yield str(taken)

    for count, result in enumerate(fake.stream(names(), batch_size=64, workers=2), 1):
        assert result.path == str(count)
        assert result.probabilities is not None
        assert result.probabilities[0] == np.float32(count % 251) / np.float32(255)
        assert taken - count < 4 * 64
    assert count == 20_000
    assert 0 < fake.most <= 4 * 64


def test_small_batches_keep_every_thread_busy() -> None:
    """A batch of one image each and sixteen threads: the model must not wait for one decode after the other."""
    fake = Fake(enough=16)
    assert len(list(fake.stream(map(str, range(60)), batch_size=1, workers=16))) == 60
    assert fake.most >= 16


def test_batches_are_answered_as_given(predictor: Predictor, files: list[str]) -> None:
    seconds: dict[str, float] = {}
    wanted = [files[:2], [files[3]], ["gone.png", *files[4:9]], []]
    found = list(predictor.stream_batches(wanted, workers=2, seconds=seconds))
    assert [[result.path for result in batch] for batch in found] == wanted
    assert set(seconds) == {"decode", "model"}
    assert min(seconds.values()) > 0


def test_an_answer_says_which_bytes_it_is_of(
    predictor: Predictor, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old.png"
    shutil.copy(files[0], old)
    os.utime(old, ns=(10**18, 10**18))
    young = tmp_path / "young.png"
    shutil.copy(files[0], young)
    monkeypatch.setattr("cxr_fast.inference.predictor.TICK_NS", -1)
    (aged,) = predictor.stream([str(old)])
    assert aged.mtime_ns == changed_ns(old.stat()) > 10**18
    monkeypatch.setattr("cxr_fast.inference.predictor.TICK_NS", 10**15)
    first, second, third = predictor.stream([str(old), str(young), files[3]])
    assert first.sha256 == second.sha256 == file_sha256(old)
    assert first.size == old.stat().st_size
    assert (first.mtime_ns, second.mtime_ns) == (0, 0)  # changed again within a tick, its time would not show it
    assert third.sha256 == ""


def test_an_answer_that_is_no_number_is_a_failure(
    predictor: Predictor, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = predictor.run

    def spoilt(pixels: np.ndarray, **named: str) -> np.ndarray:
        out = real(pixels, **named)
        out[1, 4] = np.nan
        return out

    monkeypatch.setattr(predictor, "run", spoilt)
    found = list(predictor.stream(files[:3], batch_size=3))
    assert [(result.ok, result.reason) for result in found] == [(True, ""), (False, "not_finite"), (True, "")]


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


# --------------------------------------------------------------------------------------- what is not loaded

LOADED = """
import sys
{before}
from cxr_fast.cli.main import main
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
    assert in_a_process(command, before="import h5py, onnx") == ["0", "h5py", "onnx"]


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
    assert found(files[:1]) == Predictor(toy_model, device="cpu", threads=1)(files[:1])
