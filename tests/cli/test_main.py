"""The whole road as a user walks it, and one line for every way to stumble."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from cxr_fast import __version__
from cxr_fast.activations import encoder
from cxr_fast.activations import file as store
from cxr_fast.bench import results as benchmark_record
from cxr_fast.cli import console
from cxr_fast.cli.cache import outcome
from cxr_fast.cli.describe.sweep import faster_first
from cxr_fast.cli.main import main
from cxr_fast.config import SweepSpec
from cxr_fast.inference import runtime
from cxr_fast.system import hardware
from cxr_fast.system.text import duration, file_name, gigabytes, number

# The road is a fixture of the module, set up before that of a test: its figures are drawn.
pytestmark = pytest.mark.usefixtures("sketched")
GPU = runtime.gpu_present()
RANDOM = "random:0:test_vit"
TRAIN = ["--epochs", "1,2", "--folds", "2", "--lr", "1e-3", "--device", "cpu"]
# A line of Python that runs the command on one core: two threads that spin on a busy machine are 30 times slower.
ONE_CORE = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])" if sys.platform == "linux" else ""


def cxr(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def done(result: Result, code: int = 0) -> Result:
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cpu_count", lambda *_: 1)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# ------------------------------------------------------------------------------------------------- the road


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Result]]]:
    """The commands of the help page, one after another, in a folder of their own."""
    folder, said = tmp_path_factory.mktemp("road"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(hardware, "cpu_count", lambda *_: 1)
        model = "exports/phantom/model.fp32.onnx"
        for name, command in {
            "phantom": ["phantom", "data", "--studies", 30, "--size", 64],
            "prepare": ["prepare", "data", "--out", "tables/manifest.csv"],
            "cache": ["cache", "data", "--weights", RANDOM, "--device", "cpu"],
            "sweep": ["sweep", *TRAIN],
            "export": ["export", "exports/phantom", "--variants", "fp32"],
            "predict": ["predict", model, "data", "--out", "out/p.csv", "--decide", "--device", "cpu"],
            "latency": ["bench", "latency", model, "--images", "data/images", "--repeats", 4, "--json", "l.json"],
            "verify": ["verify", "cache/phantom.h5", "--reencode", 2],
            "report": ["report", "exports/phantom"],
            "info cache": ["info", "cache/phantom.h5"],
            "info run": ["info", "exports/phantom"],
            "info model": ["info", model],
        }.items():
            said[name] = cxr(*command)
        yield folder, said


def test_every_step_of_the_road_is_done(road: tuple[Path, dict[str, Result]]) -> None:
    codes = {name: result.exit_code for name, result in road[1].items()}
    assert codes == dict.fromkeys(codes, 0), {n: r.output for n, r in road[1].items()}


def test_the_road_leaves_what_the_help_page_says(road: tuple[Path, dict[str, Result]]) -> None:
    folder, _ = road
    run = {p.name for p in (folder / "exports" / "phantom").iterdir()}
    assert run >= {"run.json", "folds.csv", "predictions.npz", "history.csv", "model.safetensors", "report.html"}
    assert "model.fp32.onnx" in run
    drawn = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF-"}
    for kind, start in drawn.items():
        pictures = list((folder / "exports" / "phantom").glob(f"*.{kind}"))
        assert len(pictures) == 11
        assert all(path.read_bytes().startswith(start) for path in pictures)
    assert {p.name for p in (folder / "cache").iterdir()} == {"phantom.h5"}
    assert {p.name for p in (folder / "exports").iterdir()} == {"phantom"}
    assert {p.name for p in (folder / "out").iterdir()} == {"p.csv", "p.csv.resume", "p.run.json"}
    assert not [p for p in folder.rglob("*") if "partial" in p.name or p.name.endswith(".lock")]


def test_each_step_says_what_it_did(road: tuple[Path, dict[str, Result]]) -> None:
    folder, said = road
    images = len(list((folder / "data" / "images").iterdir()))
    assert f"drew {images} phantom images of 30 studies in data" in said["phantom"].stdout
    assert f"phantom (indiana): {images} images, 30 studies, 30 groups" in said["prepare"].stdout
    assert "wrote tables/manifest.csv" in said["prepare"].stdout
    assert f"{images} images x 2 view(s) -> cache/phantom.h5" in said["cache"].stdout
    assert "weights: RANDOM, not BiomedCLIP" in said["cache"].stdout
    assert f"encoded {images} images" in said["cache"].stdout
    assert "newest cache: cache/phantom.h5" in said["sweep"].stdout
    assert "trainable parameters 487,971: blocks 83,456, head 404,515" in said["sweep"].stdout
    assert said["sweep"].stdout.count("<- chosen") == 2, "the budget and the final model"
    assert said["sweep"].stdout.count("<- best\n") == 1, "a fold, chosen by no more than one of the final models"
    assert "(random backbone, phantom images)" in said["sweep"].stdout
    assert re.search(r"Positives a fold\nclass +total( +fold \d)+ +hold-out\n", said["sweep"].stdout)
    assert "Not a medical device" in said["sweep"].stdout
    assert re.search(r"against torch float32 on 58 images .*\nfp32 +\S+e-0[6789]", said["export"].stdout, re.DOTALL)
    assert "wrote exports/phantom/model.fp32.onnx" in said["export"].stdout
    assert "note: RANDOM BACKBONE, PHANTOM IMAGES" in said["export"].stdout
    assert f"{images} of {images} images predicted" in said["predict"].stdout
    assert "RANDOM BACKBONE" in said["predict"].stderr
    assert "slowest stage: " in said["latency"].stdout
    assert "PASS" in said["verify"].stdout
    assert said["report"].stdout == "exports/phantom/report.html\n"
    for name in ("info cache", "info run", "info model"):
        assert "random" in said[name].stdout.lower()


def test_the_tables_of_the_road_agree(road: tuple[Path, dict[str, Result]]) -> None:
    folder, _ = road
    run = json.loads((folder / "exports" / "phantom" / "run.json").read_text())
    with open(folder / "out" / "p.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    saved = arrays(folder / "exports" / "phantom")
    by_image = dict(zip((f"data/{image}" for image in saved["image"]), saved["final"], strict=True))
    assert {row["path"] for row in rows} == set(by_image)
    for row in rows:
        found = np.array([float(row[name]) for name in run["classes"]])
        np.testing.assert_allclose(found, by_image[row["path"]], atol=2e-3)
    assert json.loads((folder / "l.json").read_text())["n"] == 4


def test_the_prepared_manifest_is_the_same_dataset(
    road: tuple[Path, dict[str, Result]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(road[0])
    again = done(cxr("prepare", "tables/manifest.csv"))
    table = lambda text: text.split("\n\n")[1].split("\nEvery other column")[0].strip()  # noqa: E731
    assert table(again.stdout) == table(road[1]["prepare"].stdout)
    assert "Every other column is a class: Airspace Disease, " in again.stdout, "a manifest's classes are named"


def test_cache_again_reuses_every_row(road: tuple[Path, dict[str, Result]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(road[0])
    before = Path("cache/phantom.h5").read_bytes()
    again = done(cxr("cache", "data", "--weights", RANDOM, "--device", "cpu"))
    assert "encoded 0 images" in again.stdout
    assert Path("cache/phantom.h5").read_bytes() == before


# ----------------------------------------------------------------------------------------- exit codes 1 and 3


def test_cache_with_an_unreadable_image_ends_with_1(toy_data: Path, here: Path) -> None:
    result = done(cxr("cache", toy_data, "--weights", RANDOM, "--device", "cpu", "--out", "c.h5"), 1)
    bad = sorted(path.name for path in (toy_data / "images").iterdir())[3]
    with open("c.errors.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image", "reason", "message"]
    assert [row[:2] for row in rows[1:]] == [[f"images/{bad}", "truncated"]]
    assert "1 image(s) failed and will not be trained on, listed in c.errors.csv" in result.stderr
    assert bad in result.stderr
    assert "Traceback" not in result.output
    # It is a cache all the same, without that image.
    assert "1 failed images left out" in done(cxr("sweep", "c.h5", *TRAIN)).stdout


def test_notes_on_films_stand_beside_the_cache_and_in_the_table(here: Path, road: Any) -> None:
    pytest.importorskip("pydicom", reason="pip install 'cxr-fast[dicom]'")
    from tests.data.formats.test_dicom import dicom_file

    ramp = np.arange(64 * 32, dtype=np.uint16).reshape(64, 32) * 2
    Path("plain.dcm").write_bytes(dicom_file(ramp, bits=12))
    Path("off.dcm").write_bytes(dicom_file(ramp, bits=12, WindowCenter=60000, WindowWidth=10, Modality="CT"))
    Path("m.csv").write_text("image,group,a\nplain.dcm,1,1\noff.dcm,2,0\n")
    result = done(cxr("cache", "m.csv", "--weights", RANDOM, "--device", "cpu", "--out", "c.h5"))
    assert (
        "note: 1 image(s) have a note in c.notes.csv; the first, off.dcm: the window (60000, 10) shows" in result.stderr
    )
    with open("c.notes.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["note"].endswith("read by its range, 0 to 4094; Modality is CT")
    done(cxr("cache", "m.csv", "--weights", RANDOM, "--device", "cpu", "--out", "d.h5"))  # rows taken over keep theirs
    assert Path("d.notes.csv").read_bytes() == Path("c.notes.csv").read_bytes()


def test_cache_may_stop_at_the_first_unreadable_image(toy_data: Path, here: Path) -> None:
    command = ["cache", toy_data, "--weights", RANDOM, "--device", "cpu", "--on-error", "stop", "--out", "c.h5"]
    line = refused(cxr(*command))
    assert "stopped at the first image that failed" in line
    assert not Path("c.h5").exists()


def test_predict_with_an_unreadable_image_ends_with_1(toy_model: Path, toy_data: Path, here: Path) -> None:
    result = done(cxr("predict", toy_model, toy_data, "--out", "p.csv", "--device", "cpu"), 1)
    assert "1 image(s) failed: 1 truncated; their rows say why" in result.stderr
    with open("p.csv", newline="", encoding="utf-8") as file:
        failed = [row for row in csv.DictReader(file) if row["status"] != "ok"]
    assert len(failed) == 1
    assert failed[0]["reason"].startswith("truncated: ")


def test_predict_goes_on_where_it_stopped(toy_model: Path, toy_data: Path, here: Path) -> None:
    command = ["predict", toy_model, "--out", "p.jsonl", "--device", "cpu", "--batch-size", 4]
    films = sorted((toy_data / "images").iterdir())[4:10]
    shown = done(cxr(*command, *films[:4])).stdout
    assert "4 of 4 images predicted in" in shown
    assert "6 of 6 images predicted, 4 of them by an earlier run, in" in done(cxr(*command, *films)).stdout
    listed = CliRunner().invoke(main, [*map(str, command), "-"], input="\n".join(map(str, films[::-1])))
    assert "nothing new; 6 rows were already there, took " in done(listed).stdout
    found = [json.loads(line)["path"] for line in Path("p.jsonl").read_text().splitlines()]
    assert found == [str(film) for film in films[::-1]]


@pytest.mark.kill
def test_predict_interrupted_says_how_to_go_on(
    toy_model: Path, toy_data: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cxr_fast.inference.checkpoint import Checkpoint

    command, real = ["predict", toy_model, toy_data, "--out", "p.csv", "--device", "cpu"], Checkpoint.append

    def append(self: Checkpoint, results: Any, by: str) -> None:
        real(self, results, by)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "append", append)
        said = done(cxr(*command), 130).stderr
    assert re.search(r"interrupted after 8 of \d+ images; the same command goes on from there", said)
    assert not Path("p.csv").exists()
    assert ", 7 of them by an earlier run," in done(cxr(*command), 1).stdout


def test_predict_pools_the_studies_of_a_manifest(toy_model: Path, toy_data: Path, here: Path) -> None:
    films = sorted((toy_data / "images").iterdir())[4:8]
    Path("m.csv").write_text("image,group\n" + "".join(f"{film},p{i // 2}\n" for i, film in enumerate(films)))
    command = ["predict", toy_model, "m.csv", "--out", "p.csv", "--decide", "--study-pool", "max", "--device", "cpu"]
    assert "2 studies by the column group, max of their images: p.studies.csv" in done(cxr(*command)).stdout
    with open("p.studies.csv", newline="", encoding="utf-8") as file:
        assert [(row["study"], row["images"], row["status"]) for row in csv.DictReader(file)] == [
            ("p0", "2", "ok"),
            ("p1", "2", "ok"),
        ]


def test_predict_says_how_far_it_is_and_what_it_waits_for(
    toy_model: Path, toy_data: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.ProgressBar.__init__, "__defaults__", (0.0,))
    said = done(cxr("predict", toy_model, toy_data, "--out", "p.csv", "--device", "cpu"), 1).stderr
    assert re.search(r" 8 of \d+ images, [\d.]+ images/s, waiting for (decode|model|write), 1 failed, .* left", said)


def test_bench_ends_with_its_verdict(toy_model: Path, phantoms: Path, here: Path) -> None:
    command = ["bench", "latency", toy_model, "--images", phantoms, "--device", "cpu", "--warmup", 0]
    assert "FAIL: p50" in done(cxr(*command, "--repeats", 8, "--budget-ms", 1e-6, "--percentile", 50), 1).stdout
    assert "PASS: p50" in done(cxr(*command, "--repeats", 11, "--budget-ms", 1e6, "--percentile", 50), 0).stdout
    assert "INCONCLUSIVE: p99" in done(cxr(*command, "--repeats", 3, "--budget-ms", 1e6, "--percentile", 99), 3).stdout
    without = done(cxr(*command, "--repeats", 3, "--json", "l.json", "--plot", "l.png"), 0).stdout
    assert not re.search("PASS|FAIL|INCONCLUSIVE|budget", without), "nobody asked for a verdict"
    assert "none: nothing was held against a budget" in done(cxr("info", "l.json"), 0).stdout
    assert (here / "l.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--max-batch", 2], 0, "best: --batch-size "),
        (["--scenario", "single-stream", "--budget-ms", 1e-6], 1, "FAIL: p90 under 1e-06 ms"),
        (["--scenario", "single-stream", "--budget-ms", 1e6, "--percentile", 50], 0, "PASS: p50 under 1e+06 ms"),
        (["--scenario", "server", "--budget-ms", 1e-6], 1, "FAIL: p99 under 1e-06 ms: one image alone takes too long"),
        (["--scenario", "server", "--budget-ms", 1e6], 3, "; give about --seconds "),
    ],
)
def test_throughput_ends_with_its_verdict_and_leaves_what_was_asked(
    toy_model: Path, phantoms: Path, here: Path, more: list[object], code: int, said: str
) -> None:
    command = ["bench", "throughput", toy_model, "--images", phantoms, "--device", "cpu", "--seconds", 0.5, *more]
    found = done(cxr(*command, "--json", "t.json", "--plot", "t.png"), code)
    assert said in found.stdout
    assert found.stdout.endswith("wrote t.json\nwrote t.png\n")
    assert benchmark_record.read(here / "t.json")["kind"] == "cxr-fast throughput"
    assert (here / "t.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------ exit code 2


def arrays(run: Path) -> dict[str, np.ndarray]:
    with np.load(run / "predictions.npz") as file:
        return {name: file[name] for name in file.files}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(result: Result) -> str:
    """One or two lines on stderr, exit 2, no traceback; the lines."""
    assert result.exit_code == 2, (result.output, result.exc_info)
    assert isinstance(result.exception, SystemExit), result.exc_info
    text = result.stderr
    assert text.startswith("error: ")
    assert 1 <= len(text.strip().splitlines()) <= 2, text
    assert text.endswith("\n")
    assert max(len(line) for line in text.splitlines()) < 600
    return text


MANIFEST = "image,group,A,B\n{images}"


def manifest(names: list[str], cells: str = "1,0") -> str:
    return MANIFEST.format(images="".join(f"{name},g{i},{cells}\n" for i, name in enumerate(names)))


@pytest.fixture
def pantry(here: Path, toy_data: Path, toy_cache: Path, toy_run: Path, toy_model: Path) -> Path:
    """A working folder with one of everything that can be named by mistake."""
    images = sorted((toy_data / "images").iterdir())[:3]
    for image in images:
        shutil.copy(image, here / image.name)
    names = [image.name for image in images]
    for name, text in {
        "good.csv": manifest(names),
        "no_group.csv": "image,A\na.png,1\n",
        "no_class.csv": f"image,group\n{names[0]},g\n",
        "two.csv": manifest(names, "2,0"),
        "maybe.csv": manifest(names, "yes,0"),
        "twice.csv": manifest([names[0], names[0]]),
        "absent.csv": manifest([names[0], *(f"absent{i}.png" for i in range(7))]),
        "all_absent.csv": manifest([f"absent{i}.png" for i in range(7)]),
        "short_row.csv": f"image,group,A\n{names[0]},g\n",
        "no_rows.csv": "image,group,A\n",
        "latin.csv": "image,group,A\n\xe9.png,g,1\n",
        "text.h5": "hello",
        "text.onnx": "hello",
        "file": "mine",
    }.items():
        (here / name).write_text(text, encoding="latin-1" if name == "latin.csv" else "utf-8")
    (here / "nothing.csv").touch()
    (here / "empty").mkdir()
    (here / "one_image").mkdir()
    shutil.copy(images[0], here / "one_image" / "a.png")
    shutil.copy(toy_cache, here / "toy.h5")
    with h5py.File(shutil.copy(toy_cache, here / "old.h5"), "r+") as file:
        file.attrs["schema"] = 0
    with h5py.File(shutil.copy(toy_cache, here / "unfinished.h5"), "r+") as file:
        file["done"][3:] = store.PENDING
    with h5py.File(here / "foreign.h5", "w") as file:
        file["x"] = [1]
    shutil.copytree(toy_run, here / "run")
    shutil.copy(toy_model, here / "model.onnx")
    return here


W = ["--weights", RANDOM, "--device", "cpu"]
CASES: list[tuple[list[object], str]] = [
    # the dataset
    (["prepare", "gone"], "gone"),
    (["prepare", "empty"], "empty"),
    (["prepare", "one_image"], "one_image"),
    (["prepare", "no_group.csv"], "no_group.csv|group"),
    (["prepare", "nothing.csv"], "nothing.csv is empty"),
    (["prepare", "no_rows.csv"], "no rows"),
    (["prepare", "latin.csv"], "UTF-8"),
    (["prepare", "good.csv", "--out", "m.xlsx"], r"m\.xlsx.*\.csv or \.parquet"),
    (["prepare", "good.csv", "--out", "file/m.csv"], "cannot write"),
    (["prepare", "good.csv", "--images", "gone"], "--images: gone is not a folder"),
    (["cache", "gone", *W], "gone"),
    (["cache", "empty", *W], "empty"),
    (["cache", "no_group.csv", *W], "group"),
    (["cache", "no_class.csv", *W], "no class column"),
    (["cache", "two.csv", *W], "column 'A' holds '2' in data row 1"),
    (["cache", "maybe.csv", *W], "column 'A' holds 'yes'"),
    (["cache", "twice.csv", *W], "twice, in data rows 1 and 2"),
    (["cache", "short_row.csv", *W], "line 2: 2 fields where the header has 3"),
    (
        ["cache", "absent.csv", *W],
        r"7 of the 8 images .* absent0\.png, absent1\.png, absent2\.png, absent3\.png, absent4\.png, \.\.\.\n"
        r".*--images.*--skip-missing",
    ),
    (["cache", "all_absent.csv", *W, "--skip-missing"], "7 of the 7 images"),
    (["cache", "good.csv", *W, "--out", "empty"], r"--out: empty must be a file that ends in \.h5"),
    (["cache", "good.csv", *W, "--out", "x.hdf5"], r"--out: x\.hdf5 must be a file that ends in \.h5"),
    (["cache", "one_image/a.png", *W], r"a\.png"),
    # what to cache, and where
    (["cache", "good.csv", *W, "--views", "flip"], "--views: 'flip' must be 'plain' or 'plain,flip'"),
    (["cache", "good.csv", *W, "--views", "plain,plain"], "--views"),
    (["cache", "good.csv", *W, "--views", "plain,upside"], "--views"),
    (["cache", "good.csv", *W, "--views", ""], "--views"),
    (["cache", "good.csv", "--weights", "random:x"], "--weights: 'random:x' is not random:SEED"),
    (["cache", "good.csv", "--weights", "random:0:vit_enormous"], "timm knows no architecture 'vit_enormous'"),
    (["cache", "good.csv", "--weights", "random:0:resnet18"], "--weights: .*resnet18"),
    (["cache", "good.csv", "--weights", "no such thing"], "--weights: 'no such thing' is neither"),
    (["cache", "good.csv", "--weights", ""], "--weights"),
    (["cache", "good.csv", "--weights", "empty"], "--weights: empty holds no open_clip_config.json"),
    (["cache", "good.csv", "--weights", "somebody/something"], "cannot fetch somebody/something.*\n.*--weights FOLDER"),
    (["cache", "good.csv", *W, "--unfreeze-blocks", 7], "--unfreeze-blocks: 7 is more than the 6 blocks"),
    (["cache", "good.csv", *W, "--unfreeze-blocks", -1], "--unfreeze-blocks"),
    (["cache", "good.csv", *W[:2], "--device", "gpu"], "--device: 'gpu' is not auto, cpu, cuda or cuda:N"),
    (["cache", "good.csv", *W[:2], "--device", "cuda:99"], "--device cuda:99"),
    (["cache", "good.csv", *W, "--out", "file/c.h5"], "--out: cannot write"),
    (["cache", "good.csv", *W, "--out", "text.h5"], "text.h5: not an HDF5 file"),
    (["cache", "good.csv", *W, "--out", "foreign.h5"], "not an activation file of cxr-fast"),
    (["cache", "good.csv", *W, "--out", "old.h5"], "old.h5: schema 0"),
    (["cache", "good.csv", *W, "--out", "toy.h5"], "--out: toy.h5 was made with .*another --out"),
    (["cache", "good.csv", *W, "--limit", 0], "--limit"),
    (["cache", "good.csv", *W, "--resize", "sideways"], "--resize.*'squash', 'crop', 'pad'"),
    # the sweep
    (["sweep", *TRAIN], "no complete cache in cache/; `cxrfast cache DATASET` makes one"),
    (["sweep", "gone.h5", *TRAIN], "gone.h5: no such cache"),
    (["sweep", "text.h5", *TRAIN], "text.h5: not an HDF5 file"),
    (["sweep", "foreign.h5", *TRAIN], "not an activation file of cxr-fast"),
    (["sweep", "old.h5", *TRAIN], r"old.h5: schema 0 \(written by cxr-fast .*Run `cxrfast cache` again"),
    (["sweep", "unfinished.h5", *TRAIN], "77 of 80 rows are not encoded yet; run the same"),
    (["sweep", "run", *TRAIN], "run: no such cache"),
    (["sweep", "good.csv", *TRAIN], "good.csv: not an HDF5 file"),
    (["sweep", "toy.h5", *TRAIN, "--folds", 99], "40 group.* cannot fill 99 folds and a hold-out: lower --folds"),
    (["sweep", "toy.h5", *TRAIN, "--folds", 1], "--folds: 1 must be at least 2"),
    *((["sweep", "toy.h5", *TRAIN, "--epochs", bad], "--epochs: ") for bad in ("abc", "", "5,3", "3,3", "0", "1,,2")),
    *((["sweep", "toy.h5", *TRAIN, "--epochs", bad], "--epochs: ") for bad in ("1.5", "-1", "10 20", "0x10")),
    *((["sweep", "toy.h5", *TRAIN, "--holdout", bad], "--holdout: ") for bad in ("1", "-0.1", "20", "nan")),
    *((["sweep", "toy.h5", *TRAIN, "--seed", bad], "--seed: ") for bad in (-1, 2**32)),
    *((["sweep", "toy.h5", *TRAIN, "--lr", bad], "--lr: ") for bad in ("0", "-1", "nan", "inf")),
    (["sweep", "toy.h5", *TRAIN, "--weight-decay", "inf"], "--weight-decay: "),
    (
        ["sweep", "toy.h5", *TRAIN, "--clip-norm", 2, "--grid", "clip_norm=1,3"],
        "--clip-norm and --grid clip_norm=... set the same",
    ),
    (["sweep", "toy.h5", *TRAIN, "--batch-size", 1], "--batch-size: 1 must be at least 2"),
    (["sweep", "toy.h5", *TRAIN, "--dropout", 1], "--dropout: "),
    (["sweep", "toy.h5", *TRAIN, "--patience", 0], "--patience: 0 must be at least 1"),
    (["sweep", "toy.h5", *TRAIN, "--loss", "mse"], "--loss"),
    (["sweep", "toy.h5", *TRAIN, "--device", "cuda:99"], "--device cuda:99"),
    (["sweep", "toy.h5", *TRAIN, "--out", "run"], "--out: run exists; give another --out, or pass --overwrite"),
    (["sweep", "toy.h5", *TRAIN, "--out", "empty/../one_image", "--overwrite"], "--overwrite: .* is not a run folder"),
    (["sweep", "toy.h5", *TRAIN, "--out", "file", "--overwrite"], "--overwrite: file is not a run folder"),
    (["sweep", "toy.h5", *TRAIN, "--out", "file/run"], "--out: cannot write file/run"),
    (["sweep", "toy.h5", *TRAIN, "--weights", RANDOM], f"--weights {RANDOM}: not the weights"),
    (["sweep", "toy.h5", *TRAIN, "--weights", "empty"], "--weights: empty holds no"),
    (["sweep", "toy.h5", *TRAIN, "--manifest", "gone.csv"], "gone.csv"),
    (["sweep", "toy.h5", *TRAIN, "--manifest", "absent.csv"], "7 of 8 images are not in toy.h5"),
    # what comes after
    (["export", "gone"], "gone: not a run folder"),
    (["export", "empty"], "empty: not a run folder"),
    (["export", "toy.h5"], "toy.h5: not a run folder"),
    (["export", "run", "--images", "empty"], "none of the 79 is readable under empty .*--images DIR"),
    (["export", "run", "--variants", "fp32", "--out", "file/m.onnx"], "--out: cannot write"),
    (["export", "run", "--out", "m.onnx"], r"--out: m\.onnx is one file for 3 variants; give a folder"),
    (["export", "run", "--variants", "fp32,fp4"], "--variants: 'fp4' is not one of fp32, fp16, int8"),
    (["export", "run", "--final", "best"], "'best' is not one of"),
    (["predict", "gone.onnx", "one_image", "--out", "p.csv"], "gone.onnx: no such model; `cxrfast export RUN`"),
    (["predict", "run", "one_image", "--out", "p.csv"], "run: no such model .*; `cxrfast export run` makes one"),
    (["predict", "text.onnx", "one_image", "--out", "p.csv"], "text.onnx: not an ONNX file"),
    (["predict", "toy.h5", "one_image", "--out", "p.csv"], "toy.h5 is a cache, not a model; `cxrfast sweep toy.h5`"),
    (["predict", "model.onnx", "emtpy", "--out", "p.csv"], "emtpy: no such file or folder"),
    (["predict", "model.onnx", "*.tiff", "--out", "p.csv"], r"\*\.tiff: matches no file"),
    (["predict", "model.onnx", "", "--out", "p.csv"], "empty: a shell variable"),
    (["predict", "model.onnx", "one_image", "--out", "file/p.csv"], "--out: cannot write file/p.csv"),
    (["predict", "model.onnx", "one_image", "--out", "empty"], "--out: empty is a folder"),
    (["predict", "model.onnx", "one_image", "--out", "p.txt"], r"--out: p\.txt must end in \.csv, \.parquet, \.jsonl"),
    (["predict", "model.onnx", "one_image", "--out", "good.csv"], r"good\.csv\.resume is missing, .* --overwrite"),
    (["predict", "model.onnx", "good.csv", "--out", "good.csv", "--overwrite"], "good.csv is the manifest or list"),
    (["predict", "model.onnx", "one_image", "--out", "p.csv", "--study-pool", "mean"], "--study-pool: .* has no study"),
    (["predict", "model.onnx", "@gone.txt", "--out", "p.csv"], "@gone.txt: No such file"),
    (["predict", "model.onnx", "one_image", "--out", "p.csv", "--device", "gpu"], "--device: 'gpu' is not"),
    (["predict", "model.onnx", "one_image", "--out", "p.csv", "--threads", 0], "--threads"),
    (["predict", "model.onnx", "one_image"], "--out"),
    (["bench", "latency", "gone.onnx"], "gone.onnx: no such model"),
    (["bench", "latency", "model.onnx", "--images", "empty", "--device", "cpu"], "empty: a folder without images"),
    (["bench", "latency", "model.onnx", "--images", "gone.png", "--device", "cpu"], "gone.png: no such file"),
    (["bench", "latency", "model.onnx", "--budget-ms", 0], "--budget-ms"),
    (["bench", "latency", "model.onnx", "--percentile", 75], "--percentile"),
    (
        ["bench", "latency", "model.onnx", "--images", "one_image", "--repeats", 1, "--json", "file/l.json"],
        "--json: cannot write file/l.json",
    ),
    (
        ["bench", "latency", "model.onnx", "--images", "one_image", "--plot", "l.pdf"],
        r"--plot: l\.pdf must end in \.png",
    ),
    (["bench", "throughput", "gone.onnx"], "gone.onnx: no such model"),
    (["bench", "throughput", "model.onnx", "--images", "empty", "--device", "cpu"], "empty: a folder without images"),
    (["bench", "throughput", "model.onnx", "--scenario", "burst"], "--scenario"),
    (["bench", "throughput", "model.onnx", "--seconds", 0], "--seconds"),
    (["bench", "throughput", "model.onnx", "--max-batch", 0], "--max-batch"),
    (
        ["bench", "throughput", "model.onnx", "--images", "one_image", "--plot", "file/t.png"],
        "--plot: cannot write file/t",
    ),
    (["bench", "speed"], "No such command 'speed'"),
    (["report", "empty"], "empty: not a run folder"),
    (["report", "toy.h5"], "toy.h5: not a run folder"),
    (["info", "gone"], "gone: no such file"),
    (["info", "good.csv"], "good.csv: not a cache"),
    (["info", "old.h5"], "old.h5: schema 0"),
    (["verify", "gone.h5"], "gone.h5: no such cache"),
    (["verify", "text.h5"], "text.h5: not an HDF5 file"),
    (["phantom", "one_image"], "one_image"),
    (["phantom", "file"], "file is a file"),
    (["phantom", "new", "--size", 8], "--size"),
    (["frobnicate"], "No such command 'frobnicate'"),
    (["cache"], "Missing argument 'SOURCE'"),
    (["sweep", "toy.h5", "--epoch", "3"], "--epoch"),
]


@pytest.mark.parametrize(("command", "match"), CASES, ids=[" ".join(map(str, command))[:70] for command, _ in CASES])
def test_a_mistake_is_one_line_and_leaves_nothing(
    pantry: Path, monkeypatch: pytest.MonkeyPatch, command: list[object], match: str
) -> None:
    monkeypatch.setattr("cxr_fast.models.weights.hub_resolves", lambda: False)
    before = tree(pantry)
    text = refused(cxr(*command))
    assert re.search(match, text, re.DOTALL), text
    assert tree(pantry) == before


@pytest.mark.skipif(GPU, reason="there is a GPU here")
@pytest.mark.parametrize(
    "command",
    [
        ["cache", "good.csv", "--weights", RANDOM],
        ["sweep", "toy.h5"],
        ["predict", "model.onnx", "one_image", "--out", "p.csv"],
        ["bench", "latency", "model.onnx", "--images", "one_image"],
        ["bench", "throughput", "model.onnx", "--images", "one_image"],
        ["verify", "toy.h5"],
    ],
    ids=lambda command: command[0],
)
def test_cuda_that_is_not_there_is_never_the_cpu(pantry: Path, command: list[str]) -> None:
    before = tree(pantry)
    assert "--device cuda" in refused(cxr(*command, "--device", "cuda"))
    assert tree(pantry) == before


def test_skip_missing_goes_on(pantry: Path) -> None:
    result = done(cxr("cache", "absent.csv", *W, "--skip-missing", "--out", "c.h5"))
    assert "encoded 1 images" in result.stdout
    said = f"skipped 7 listed image(s) that are not below {Path.cwd()}"
    assert f"; {said}" in result.stdout
    assert said in done(cxr("prepare", "absent.csv", "--skip-missing")).stdout
    assert f"are not below {Path.cwd()}: " in refused(cxr("prepare", "absent.csv"))
    assert "skipped" not in done(cxr("prepare", "good.csv", "--skip-missing")).stdout
    assert store.ActivationFile("c.h5").header.meta["dataset"]["skipped_missing"] == 7


def test_a_cache_of_nothing_but_broken_images_is_refused(pantry: Path) -> None:
    for image in pantry.glob("*.png"):
        image.write_bytes(b"hello")
    text = refused(cxr("cache", "good.csv", *W, "--out", "c.h5"))
    assert "every one of the 3 images failed; the first, " in text
    assert not Path("c.h5").exists()


@pytest.mark.kill
def test_an_interrupted_sweep_says_how_to_go_on(pantry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cxr_fast.training.folds.fold import Fold

    run_epoch = Fold.run_epoch

    def stop(self: Fold, *arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return run_epoch(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Fold, "run_epoch", stop)
        result = done(cxr("sweep", "toy.h5", *TRAIN, "--out", "new"), 130)
    assert "new.partial. Run the same command again to go on." in result.stderr
    assert not Path("new").exists()
    result = done(cxr("sweep", "toy.h5", *TRAIN, "--out", "new"))
    assert "going on with the unfinished run in new.partial" in result.stdout
    assert (Path("new") / "run.json").is_file()
    assert not Path("new.partial").exists()


# ----------------------------------------------------------------------------------------- other labels, again


def test_a_sweep_may_take_its_labels_from_the_dataset_again(pantry: Path, toy_data: Path) -> None:
    """The same folder: the labels that the cache was made without (one in eight is unknown there) come back."""
    done(cxr("sweep", "toy.h5", *TRAIN, "--manifest", toy_data, "--out", "new"))
    labels = arrays(Path("new"))["labels"]
    assert (arrays(Path("run"))["labels"] == -1).any()
    assert not (labels == -1).any()


def test_a_sweep_may_take_other_labels(pantry: Path, toy_data: Path) -> None:
    """A manifest of one class, of half of the images, in another order."""
    names = [image for image, ok in zip(*_rows("toy.h5"), strict=True) if ok][::-2]
    lines = [f"{toy_data / name},p{i // 2},{i // 2 % 2}\n" for i, name in enumerate(names)]
    Path("other.csv").write_text("image,group,Sick\n" + "".join(lines))
    done(cxr("sweep", "toy.h5", *TRAIN, "--manifest", "other.csv", "--out", "new"))
    saved = arrays(Path("new"))
    expected = {name: (i // 2 % 2, f"p{i // 2}") for i, name in enumerate(names)}
    found = dict(zip(saved["image"].tolist(), zip(saved["labels"][:, 0], saved["group"], strict=True), strict=True))
    assert {name: (int(label), str(group)) for name, (label, group) in found.items()} == expected
    assert json.loads(Path("new/run.json").read_text())["classes"] == ["Sick"]


def _rows(path: str) -> tuple[tuple[str, ...], np.ndarray]:
    file = store.ActivationFile(path)
    return file.header.images, file.ok


# --------------------------------------------------------------------------------------------- real processes


def process(arguments: list[str], before: str = "", **kwargs: object) -> subprocess.Popen[str]:
    script = f"{ONE_CORE}\n{before}\nfrom cxr_fast.cli.main import main\nmain({arguments!r})"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", script], **{**pipes, **kwargs})  # type: ignore[call-overload]


# Stays behind its second block until a line comes.
HELD_WRITER = """
import sys
from cxr_fast.activations.file import Writer
rows, blocks = Writer.rows, 0
def held(self, *args):
    global blocks
    rows(self, *args)
    blocks += 1
    if blocks == 2:
        print("written", flush=True)
        sys.stdin.readline()
Writer.rows = held
"""


@pytest.mark.kill
def test_an_interrupted_cache_goes_on_where_it_stopped(phantoms: Path, here: Path) -> None:
    """A process of its own: nobody else may write its file, SIGINT ends it, and the same command goes on from there to
    the bytes of a run that nobody interrupted."""
    command = ["cache", str(phantoms), *W, "--out", "c.h5"]
    running = process(command, before=HELD_WRITER, stdin=subprocess.PIPE)
    assert running.stdout is not None
    assert "written\n" in iter(running.stdout.readline, "")
    assert f"being written by process {running.pid} on" in refused(cxr(*command))
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate("\n")
    assert running.returncode == 130, errors
    lines = [line for line in errors.splitlines() if "%" not in line]
    assert len(lines) in (1, 2)
    assert lines[0].startswith("error: stopped; ")
    assert "Run the same command again" in errors
    assert not Path("c.h5").exists()
    assert "not encoded yet" in refused(cxr("sweep", "c.h5.partial", *TRAIN))
    again = done(cxr(*command))
    reused = int(re.search(r"reused (\d+), encoded (\d+)", again.stdout)[1])  # type: ignore[index]
    assert 16 <= reused < 80
    done(cxr("cache", phantoms, *W, "--out", "whole.h5"))
    resumed, whole = store.ActivationFile("c.h5"), store.ActivationFile("whole.h5")
    np.testing.assert_array_equal(resumed.crc32, whole.crc32)
    assert resumed.ok.all()
    assert sorted(os.listdir()) == ["c.h5", "whole.h5"]


def test_the_installed_command_is_this_one() -> None:
    command = Path(sys.executable).with_name("cxrfast")
    if not command.exists():
        pytest.skip("run from a source tree without an installation")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"cxrfast, version {__version__}\n", "")


def test_a_pipe_that_closes_is_no_error(toy_cache: Path) -> None:
    """`cxrfast info FILE | head -0`"""
    running = process(["info", str(toy_cache)])
    assert running.stdout is not None
    running.stdout.close()
    assert running.stderr is not None
    errors = running.stderr.read()
    assert running.wait(timeout=60) in (0, 1)
    assert errors == ""
    running.stderr.close()


def test_help_is_quick_and_loads_nothing() -> None:
    script = (
        "import sys\nfrom cxr_fast.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n"
        "    print(sorted({'numpy', 'torch', 'h5py', 'pandas', 'onnxruntime', 'PIL'} & set(sys.modules)))"
    )
    times = []
    for _ in range(5):
        began = time.perf_counter()
        said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
        times.append(time.perf_counter() - began)
        assert said.stdout.splitlines()[-1] == "[]"
    assert min(times) < 1.5


# ------------------------------------------------------------------------------------------------- small parts


def commands(group: click.Group = main, path: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


def test_every_command_shows_its_help() -> None:
    found = dict(commands())
    assert {"prepare", "cache", "verify", "sweep", "export", "predict", "bench latency", "report", "info"} <= set(found)
    for name in found:
        text = done(cxr(*name.split(), "--help")).stdout
        assert text.startswith(f"Usage: main {name} ")
        assert "Options:" in text
    assert "not a medical device" in done(cxr("--help")).stdout


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (duration, 0.4, "0 s"),
        (duration, 59.4, "59 s"),
        (duration, 59.6, "1 min 00 s"),
        (duration, 190, "3 min 10 s"),
        (duration, 3599.6, "1 h 00 min"),
        (duration, 7500, "2 h 05 min"),
        (gigabytes, 4.52e9, "4.5 GB"),
        (gigabytes, 83e6, "83 MB"),
        (gigabytes, 2.1e5, "210 kB"),
        (number, None, "-"),
        (number, 0.123456, "0.1235"),
    ],
)
def test_numbers_for_people(function: Callable[[object], object], value: object, expected: object) -> None:
    assert function(value) == expected


def test_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    bar = console.ProgressBar(every=1000)
    bar.show(1, 10, "one")
    assert capsys.readouterr().err == ""
    bar.show(5, 10, "half", force=True)
    assert re.fullmatch(r" 50\.0 %  half, \d+ s left\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("done", "before", "seconds", "left"),
    [(60, 0, 30.0, "20 s left"), (60, 50, 30.0, "2 min 00 s left"), (100, 90, 7.0, "0 s left"), (50, 50, 3.0, "")],
)
def test_the_time_left_is_of_this_run(
    capsys: pytest.CaptureFixture[str], done: int, before: int, seconds: float, left: str
) -> None:
    console.ProgressBar().show(done, 100, "some", before=before, seconds=seconds, force=True)
    assert capsys.readouterr().err == f"{done:5.1f} %  some{', ' * bool(left)}{left}\n"


def test_each_stage_of_an_export_has_a_line_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    line = console.StageProgress()
    for stage, done in (("torch", 8), ("torch", 16), ("int8", 1), ("int8", 20), ("int8", 1)):
        line.show(stage, done, 20)
    said = [" 40.0 %  torch", "  5.0 %  int8", "  5.0 %  int8"]
    assert capsys.readouterr().err.splitlines() == said, "a stage that begins again is a new one"


def plan(**changed: Any) -> Any:
    return SimpleNamespace(**{"seconds": 24_000.0, "resumed": False, "trainable": {"blocks": 9}, **changed})


@pytest.mark.parametrize(
    ("found", "recipe", "epochs", "said"),
    [
        (plan(), "default", 100, "--recipe tuned (6 epochs instead of 100), or --train-blocks 0 (the head alone)"),
        (plan(trainable={"blocks": 0}), "default", 100, "--recipe tuned (6 epochs instead of 100)"),
        (plan(), "tuned", 6, "--train-blocks 0 (the head alone)"),
        (plan(trainable={"blocks": 0}), "tuned", 6, ""),
        (plan(seconds=3000.0), "default", 100, ""),
        (plan(seconds=float("nan")), "default", 100, ""),
        (plan(resumed=True), "default", 100, ""),
    ],
)
def test_a_sweep_of_hours_names_a_faster_first_try(found: Any, recipe: str, epochs: int, said: str) -> None:
    notes = faster_first(found, SweepSpec(epochs=(epochs,)), recipe)
    assert notes == ([f"a faster first try from the same cache: {said}"] if said else [])


@pytest.mark.parametrize(
    ("error", "whose"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines"), "the GPU's"),
        (MemoryError("Unable to allocate 9 TiB"), "this machine's"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "this machine's"),
    ],
)
def test_memory_that_is_full_is_a_line(
    phantoms: Path, here: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, whose: str
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(encoder.Encoder, "__call__", full)
    text = refused(cxr("cache", phantoms, "--weights", RANDOM, "--device", "cpu", "--out", "c.h5"))
    assert f"{whose} memory is full" in text
    assert "smaller --batch-size" in text
    assert "More lines" not in text


def test_another_failure_of_the_program_keeps_its_traceback(
    phantoms: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(encoder.Encoder, "__call__", wrong)
    result = cxr("cache", phantoms, "--weights", RANDOM, "--device", "cpu", "--out", "c.h5")
    assert str(result.exception) == "a bug"


def test_a_cache_run_says_what_it_compares_and_then_what_it_encodes(capsys: pytest.CaptureFixture[str]) -> None:
    line = outcome.CacheProgress(many=False)
    line.bar.every = 0.0
    line.compare(5, 20)
    line.compare(5, 20)
    line.show(
        encoder.BuildProgress(done=15, total=30, before=10, encoded=5, failed=0, decoding=2, computing=3, writing=0)
    )
    told = capsys.readouterr().err.splitlines()
    assert told[1].startswith(" 50.0 %  10 of 20 images compared with their rows, ")
    assert told[2] == " 50.0 %  15 of 30 images, 1.0 images/s, waiting for the model, 15 s left"


def test_verify_names_a_damaged_row_and_repair_mends_it(phantoms: Path, here: Path) -> None:
    arguments = ["cache", phantoms, "--weights", RANDOM, "--device", "cpu", "--limit", 12, "--out", "c.h5"]
    done(cxr(*arguments))
    assert "PASS" in done(cxr("verify", "c.h5", "--reencode", 3)).stdout
    file = store.ActivationFile("c.h5")
    name, size = file.header.images[7], store.row_bytes(file.header.shape, file.header.dtype)
    with open("c.h5", "r+b") as raw:
        raw.seek(file.offset + 7 * size + 3)
        raw.write(b"\x55\xaa")
    result = done(cxr("verify", "c.h5", "--reencode", 0), code=1)
    assert f"{name}: checksum" in result.stderr
    assert "PASS" not in result.stdout
    assert "reused 11, encoded 1 images" in done(cxr(*arguments, "--repair")).stdout
    assert "PASS" in done(cxr("verify", "c.h5", "--reencode", 12)).stdout


def test_predictions_never_overwrite_the_model(pantry: Path, toy_model: Path) -> None:
    shutil.copy(toy_model, "m.onnx")
    before = Path("m.onnx").read_bytes()
    assert "is the model itself" in refused(cxr("predict", "m.onnx", "a.png", "--out", "m.onnx", "--device", "cpu"))
    assert Path("m.onnx").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "expected"), [("iu", "iu"), ("a/b", "a-b"), ("../x", "--x"), (".hidden", "-hidden"), ("", "dataset")]
)
def test_a_datasets_name_is_one_file_name(name: str, expected: str) -> None:
    assert file_name(name) == expected


def test_a_trial_run_never_costs_a_finished_cache(phantoms: Path, here: Path) -> None:
    flags = ["--weights", RANDOM, "--device", "cpu", "--limit"]
    done(cxr("cache", phantoms, *flags, 9))
    assert Path("cache/phantom-first9.h5").exists()
    before = Path("cache/phantom-first9.h5").read_bytes()
    text = refused(cxr("cache", phantoms, *flags, 4, "--out", "cache/phantom-first9.h5"))
    assert "--limit 4 would take 5 encoded images out of" in text
    assert Path("cache/phantom-first9.h5").read_bytes() == before
    assert "reused 9, encoded 2" in done(cxr("cache", phantoms, *flags, 11, "--out", "cache/phantom-first9.h5")).stdout


def test_predictions_never_overwrite_an_image(pantry: Path, toy_model: Path, phantoms: Path) -> None:
    shutil.copy(next((phantoms / "images").iterdir()), "film.png")
    before = Path("film.png").read_bytes()
    text = refused(cxr("predict", toy_model, "film.png", "--out", "film.png", "--device", "cpu"))
    assert "is one of the images" in text
    assert Path("film.png").read_bytes() == before


def test_export_says_what_each_variant_costs(toy_run: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(main, ["export", str(toy_run), "--out", str(tmp_path), "--check", "20"])
    assert found.exit_code == 0, "no variant was asked for by name"
    lines = found.stdout.splitlines()
    assert re.match(r"best-fold model, 35 classes; against torch float32 on 20 images .*classes with an AUC", lines[0])
    assert lines[1].split()[:2] == ["variant", "largest"]
    assert [line.split()[0] for line in lines[3:6]] == ["fp32", "fp16", "int8"]
    assert "-0.0000" not in found.stdout
    assert f"wrote {tmp_path / 'model.fp32.onnx'}" in lines
    assert any(line.startswith(f"NOT KEPT, {tmp_path / 'model.int8.onnx'}: ") for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.fp16.onnx", "model.fp32.onnx"]


@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize(
    "words",
    [
        ["bench", "latency", "m.onnx", "--budget-ms"],
        ["bench", "throughput", "m.onnx", "--budget-ms"],
        ["bench", "throughput", "m.onnx", "--seconds"],
        ["export", "run", "--logit-adjustment"],
    ],
    ids=" ".join,
)
def test_a_number_that_is_not_finite_is_refused(words: list[str], number: str) -> None:
    result = CliRunner().invoke(main, [*words, number])
    assert result.exit_code == 2
    assert f"'{words[-1]}': {number} is not a finite number" in result.output
