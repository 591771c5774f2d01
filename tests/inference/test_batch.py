"""Tables of predictions: every image has its row, a second run does only the rest, a kill changes no byte."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cxr_fast.data.images import self_check
from cxr_fast.data.paths import Inputs, read
from cxr_fast.errors import InputError, Interrupted
from cxr_fast.inference import batch
from cxr_fast.inference.batch import BatchSpec, State
from cxr_fast.inference.checkpoint import Checkpoint, beside
from cxr_fast.inference.outputs import pooled, run_path, shown, studies_path
from cxr_fast.inference.predictor import Predictor, Result
from cxr_fast.system.extras import install
from cxr_fast.system.files import file_sha256, tree_sha256
from cxr_fast.system.locks import FileLock
from tests.helpers import children, states
from tests.helpers.model_edits import changed, put

THREE = (".csv", ".jsonl", ".parquet")


@pytest.fixture(scope="module")
def predictor(toy_model: Path) -> Predictor:
    return Predictor(toy_model, device="cpu", threads=1)


@pytest.fixture(scope="module")
def files(toy_data: Path) -> list[str]:
    """Every image in name order; the fourth is cut short."""
    return [str(path) for path in sorted((toy_data / "images").iterdir())]


@pytest.fixture
def counted(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were decoded."""
    seen: list[str] = []
    real = Predictor._decode

    def decode(self: Predictor, path: str) -> Any:
        seen.append(os.fspath(path))
        return real(self, path)

    monkeypatch.setattr(Predictor, "_decode", decode)
    return seen


def write(predictor: Predictor, inputs: Inputs, out: Path, *, on_batch: Any = None, **choices: Any) -> dict[str, Any]:
    return batch.write(predictor, inputs, out, BatchSpec(**choices), on_batch)


def named(paths: Iterable[str]) -> Inputs:
    return Inputs(paths=list(paths))


def rows(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file, strict=True))


def flat(found: list[dict[str, float]]) -> np.ndarray:
    return np.array([list(answer.values()) for answer in found])


def parsed(path: Path, labels: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """Keys, (C,) float64 or None, and the findings of each row, of any of the three kinds."""
    found: list[tuple[Any, ...]] = []
    if path.suffix == ".csv":
        head, *body = rows(path)
        keys = head.index(labels[0])
        for row in body:
            values = row[keys : keys + len(labels)]
            some = row[head.index("status")] == "ok"
            findings = row[-1].split(";") if row[-1] else []
            found.append((row[:keys], [float(v) for v in values] if some else None, findings if some else None))
    elif path.suffix == ".jsonl":
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            row = json.loads(line)
            values = row.pop("probabilities")
            findings = row.pop("findings")
            assert values is None or tuple(values) == labels
            found.append(([str(v) for v in row.values()], values and list(values.values()), findings))
    else:
        table = pytest.importorskip("pyarrow.parquet").read_table(path)
        assert {str(table.schema.field(label).type) for label in labels} == {"float"}
        for row in table.to_pylist():
            values = [row.pop(label) for label in labels]
            findings = row.pop("findings")
            some = values[0] is not None
            split = None if findings is None else [name for name in findings.split(";") if name]
            found.append(([str(v) for v in row.values()], values if some else None, split))
    return found


# ------------------------------------------------------------------------------------------------ the table


def test_the_table_has_a_row_for_every_image(predictor: Predictor, files: list[str], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    out = tmp_path / "new" / "p.csv"

    def tell(state: State) -> None:
        seen.append((state.done, state.failed))

    summary = write(predictor, named(files[:6]), out, batch_size=3, workers=2, on_batch=tell)
    head, *body = rows(out)
    assert head == ["path", "status", "reason", "note", "unlikeness", *predictor.labels]
    assert [row[0] for row in body] == files[:6]
    assert [row[1] for row in body] == ["ok", "ok", "ok", "failed", "ok", "ok"]
    assert body[3][2].startswith("truncated: ")
    assert body[3][4:] == [""] * 36
    found = np.array([[float(cell) for cell in row[5:]] for row in body if row[1] == "ok"])
    np.testing.assert_allclose(found, flat(predictor(files[:3] + files[4:6])), atol=1e-6)
    assert seen == [(3, 0), (6, 1)]
    assert b"\r" not in out.read_bytes()
    assert sorted(os.listdir(out.parent)) == ["p.csv", "p.csv.resume", "p.run.json"]
    assert json.loads(run_path(out).read_text()) == summary


def test_run_json_says_what_made_it(predictor: Predictor, files: list[str], tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    write(predictor, named(files[:6]), out, batch_size=3, workers=2)
    found = json.loads(run_path(out).read_text())
    assert (found["kind"], found["schema"], found["out"]) == ("cxr-fast predictions", 1, "p.csv")
    assert (found["images"], found["reused"], found["failed"]) == (6, 0, 1)
    assert found["model_sha256"] == file_sha256(predictor.path)
    assert found["provider"] == "CPUExecutionProvider"
    assert sum(found["answered_by"].values()) == 6
    assert found["provenance"] == predictor.warning == "phantom images"
    assert found["labels"] == list(predictor.labels)
    assert found["thresholds"] == predictor.thresholds.tolist()
    assert set(found["stages"]) == {"decode", "model", "write"}
    assert 0 < sum(found["stages"].values()) <= found["seconds"]
    assert {"cxr-fast", "onnxruntime", "numpy", "pillow"} <= set(found["versions"])


@pytest.mark.parametrize("suffix", THREE)
def test_the_three_kinds_say_the_same(predictor: Predictor, files: list[str], tmp_path: Path, suffix: str) -> None:
    """And whoever thresholds the numbers of the file finds its findings."""
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"p{suffix}"
    write(predictor, named(files[:8]), out, batch_size=8, decide=True)
    found = parsed(out, predictor.labels)
    direct = list(predictor.stream(files[:8], batch_size=8))
    assert [keys[:2] for keys, _, _ in found] == [[r.path, "ok" if r.ok else "failed"] for r in direct]
    some = 0
    for (keys, values, findings), result in zip(found, direct, strict=True):
        if result.probabilities is None:
            assert keys[2].startswith("truncated: ")
            assert values is findings is None
            continue
        np.testing.assert_array_equal(np.float32(values), result.probabilities)
        again = [n for n, p, t in zip(predictor.labels, values, predictor.thresholds, strict=True) if p >= t]
        assert findings == again
        some += len(again)
    assert some


UNIT = st.floats(0, 1, width=32)


ODD = ['a, "b".png', "ü 胸.png", "line\nbreak.png", "return\rhere.png", "=1+1.png", " blank .png", "\udcff\udcfe.png"]


@pytest.mark.parametrize("suffix", THREE)
def test_awkward_names_survive(predictor: Predictor, files: list[str], tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    names = [str(tmp_path / name) for name in ODD]
    for name in names:
        shutil.copy(files[0], name)
    gone = [name + ".gone" for name in names]
    summary = write(predictor, named([*names, *gone]), tmp_path / f"p{suffix}", decide=True)
    assert summary["failed"] == len(gone)
    found = [keys for keys, _, _ in parsed(tmp_path / f"p{suffix}", predictor.labels)]
    assert [keys[:2] for keys in found[: len(names)]] == [[shown(name), "ok"] for name in names]
    assert [keys[:2] for keys in found[len(names) :]] == [[shown(name), "failed"] for name in gone]
    assert all(keys[2].startswith("missing: ") for keys in found[len(names) :])
    assert shown(names[-1]).endswith("\\udcff\\udcfe.png")
    again = write(predictor, named([*names, *gone]), tmp_path / f"p{suffix}", decide=True)
    assert again["reused"] == len(names)


def test_what_is_no_image_is_a_row_and_no_hang(predictor: Predictor, files: list[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "loop.png").symlink_to("loop.png")
    kinds = ["pipe", "folder", "empty", "text", "huge", "loop"]
    paths = [*(str(tmp_path / f"{kind}.png") for kind in kinds), "/dev/zero", "nul\0l.png", files[0]]
    write(predictor, named(paths), tmp_path / "p.csv", batch_size=4)
    said = [row[2].split(":")[0] for row in rows(tmp_path / "p.csv")[1:]]
    assert said == ["unreadable", "unreadable", "empty", "not_an_image", "too_large", *["unreadable"] * 3, ""]


def test_permission_denied_is_a_row(predictor: Predictor, files: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    def guarded(name: Any, *rest: Any, real: Any = open, **named: Any) -> Any:
        if name == files[1]:
            raise PermissionError(13, "Permission denied", name)
        return real(name, *rest, **named)

    monkeypatch.setattr("builtins.open", guarded)
    write(predictor, named(files[:3]), tmp_path / "p.csv")
    monkeypatch.undo()
    assert [row[2] for row in rows(tmp_path / "p.csv")[1:]] == ["", f"unreadable: {files[1]}: Permission denied", ""]


def test_dicom_is_read(predictor: Predictor, tmp_path: Path) -> None:
    samples = pytest.importorskip("test_dicom").samples()
    for name in ("dicom", "dicomjpeg"):
        (tmp_path / f"{name}.dcm").write_bytes(samples[name])
    write(predictor, read([str(tmp_path)]), tmp_path / "p.csv")
    found = rows(tmp_path / "p.csv")[1:]
    assert [row[1] for row in found] == ["ok", "ok"]
    direct = flat(predictor([row[0] for row in found]))
    np.testing.assert_allclose([[float(c) for c in row[5:]] for row in found], direct, atol=1e-6)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("where", ["file/p.csv", "folder", "p.txt", "p", "p.csv.gz"])
def test_an_out_that_cannot_be_is_named_before_predicting(
    predictor: Predictor, files: list[str], tmp_path: Path, where: str, counted: list[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="--out: "):
        write(predictor, named(files), tmp_path / where)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"
    assert counted == []


def test_parquet_without_pyarrow_is_named_before_predicting(
    predictor: Predictor, files: list[str], tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=re.escape(install("parquet"))):
        write(predictor, named(files), tmp_path / "p.parquet")
    assert (counted, os.listdir(tmp_path)) == ([], [])


@pytest.mark.parametrize(
    "name",
    [
        *("p.csv", "p.run.json", "p.csv.resume", "p.csv.resume-wal", "p.csv.partial", "p.csv.lock", "p.studies.csv"),
        "p.run.json.partial",
    ],
)
@pytest.mark.parametrize("how", ["image", "hard link", "manifest"])
def test_no_input_is_written_over(predictor: Predictor, files: list[str], tmp_path: Path, name: str, how: str) -> None:
    """Neither by the table nor by anything beside it."""
    shutil.copy(files[0], tmp_path / name)
    before, wanted = (tmp_path / name).read_bytes(), named([files[1], str(tmp_path / name)])
    if how == "hard link":
        os.link(tmp_path / name, tmp_path / "other.png")
        wanted = named([str(tmp_path / "other.png")])
    elif how == "manifest":
        wanted = Inputs(paths=files[:1], sources=(tmp_path / name,))
    match = "the manifest or list" if how == "manifest" else "one of the images"
    with pytest.raises(InputError, match=rf"{name} is {match}"):
        write(predictor, wanted, tmp_path / "p.csv", overwrite=True)
    assert (tmp_path / name).read_bytes() == before


def test_answers_of_another_model_are_kept(
    predictor: Predictor, toy_model: Path, files: list[str], tmp_path: Path
) -> None:
    changed(toy_model, tmp_path / "m.onnx", put("provenance", '"another"'))
    other, out = Predictor(tmp_path / "m.onnx", device="cpu", threads=1), tmp_path / "p.csv"
    write(predictor, named(files[:2]), out)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="holds another model's answers"):
        write(other, named(files[:2]), out)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert write(other, named(files[:3]), out, overwrite=True)["reused"] == 0
    assert len(rows(out)) == 4


def test_a_folder_as_model_has_one_hash(tmp_path: Path) -> None:
    (tmp_path / "m" / "deep").mkdir(parents=True)
    for name in ("a.onnx", "deep/b.json"):
        (tmp_path / "m" / name).write_text(name)
    found = tree_sha256(tmp_path / "m")
    shutil.copytree(tmp_path / "m", tmp_path / "n")
    assert tree_sha256(tmp_path / "n") == found
    (tmp_path / "n" / "deep" / "b.json").write_text("x")
    assert tree_sha256(tmp_path / "n") != found


# --------------------------------------------------------------------------------------------------- resume


def test_a_film_that_moved_keeps_its_answer(
    predictor: Predictor, files: list[str], tmp_path: Path, counted: list[str]
) -> None:
    inbox, done, out = tmp_path / "inbox", tmp_path / "done", tmp_path / "p.csv"
    inbox.mkdir()
    for file in files[:3]:
        shutil.copy(file, inbox)
    write(predictor, read([str(inbox)]), out)
    before = rows(out)
    inbox.rename(done)
    inbox.mkdir()
    shutil.copy(files[4], inbox)
    counted.clear()
    summary = write(predictor, read([str(inbox), str(done)]), out)
    assert counted == [str(inbox / Path(files[4]).name)]
    assert (summary["reused"], summary["kept"]) == (3, 0)
    assert [row[1:] for row in rows(out)[2:]] == [row[1:] for row in before[1:]]
    assert [row[0] for row in rows(out)[2:]] == [row[0].replace("inbox", "done") for row in before[1:]]


def test_rows_are_never_dropped_in_silence(predictor: Predictor, files: list[str], tmp_path: Path) -> None:
    """Night after night with an inbox that is emptied: the table of all nights, in an order that does not change."""
    out, nights = tmp_path / "p.csv", [files[:2], [files[2], files[4]], [], files[5:7]]
    for films in nights:
        write(predictor, named(films), out, append=True)
    assert {row[0] for row in rows(out)[1:]} == set(itertools.chain.from_iterable(nights))
    again = out.read_bytes()
    write(predictor, named(nights[-1]), out, append=True)
    assert out.read_bytes() == again
    with pytest.raises(InputError, match="--append: rows of earlier runs have no study"):
        write(predictor, named(files[:2]), out, append=True, pool="mean")
    write(predictor, named(files[:2]), out, overwrite=True)
    assert [row[0] for row in rows(out)[1:]] == files[:2]


def test_a_missing_package_ends_the_run(
    predictor: Predictor, files: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "a.dcm").write_bytes(bytes(128) + b"DICM" + bytes(100))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(InputError, match="a DICOM file needs pydicom"):
        write(predictor, named([files[0], str(tmp_path / "a.dcm")]), tmp_path / "p.csv")
    assert not (tmp_path / "p.csv").exists()


def test_films_that_arrive_while_they_are_written(toy_model: Path, files: list[str], tmp_path: Path) -> None:
    """The table is whole at every moment, and holds every film in the end, though some were read half written."""
    inbox, out = tmp_path / "inbox", tmp_path / "p.csv"
    inbox.mkdir()

    def answered(file: str) -> bool:
        name = str(inbox / Path(file).name)
        return out.exists() and any(row[:2] == [name, "ok"] for row in rows(out))

    words = [
        sys.executable,
        "-m",
        "cxr_fast",
        "predict",
        str(toy_model),
        str(inbox),
        "--out",
        str(out),
        "--watch",
        "0.1",
    ]
    with subprocess.Popen(
        [*words, "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:

        def running() -> bool:
            return process.poll() is None

        try:
            for file in files[4:8]:
                data = Path(file).read_bytes()
                with open(inbox / Path(file).name, "wb") as film:
                    for at in range(0, len(data), len(data) // 4 + 1):
                        film.write(data[at : at + len(data) // 4 + 1])
                        film.flush()
                        time.sleep(0.1)
                        if out.exists():
                            head, *body = rows(out)
                            assert all(len(row) == len(head) for row in body)
                if file == files[6]:  # fetched by somebody else once it is answered
                    states.wait_until(lambda: answered(files[4]), "an answer to the first film", running)
                    os.unlink(inbox / Path(files[4]).name)

            states.wait_until(lambda: all(map(answered, files[4:8])), "a table of four films", running)
        finally:
            process.terminate()
            said = process.communicate(timeout=60)
    assert process.returncode == 0, said


def test_the_answer_to_a_film_that_was_fetched_after_the_look_is_kept(
    predictor: Predictor, files: list[str], tmp_path: Path
) -> None:
    """`watch` looks first and answers then; a film that is gone in between keeps the answer of the round before."""
    folder, out = tmp_path / "films", tmp_path / "p.csv"
    folder.mkdir()
    for file in files[4:6]:
        shutil.copy(file, folder)
    write(predictor, read([str(folder)]), out)
    first, seen = out.read_bytes(), read([str(folder)])
    os.unlink(folder / Path(files[4]).name)
    assert write(predictor, seen, out, append=True)["reused"] == 2
    assert out.read_bytes() == first
    assert write(predictor, read([str(folder)]), out, append=True)["kept"] == 1
    assert out.read_bytes() == first
    summary = write(predictor, seen, out)
    assert summary["failed"] == 1, "a listed film that is missing is a failure where nothing is appended"


def test_only_what_is_new_changed_or_failed_is_done(
    predictor: Predictor, files: list[str], tmp_path: Path, counted: list[str]
) -> None:
    folder, out = tmp_path / "films", tmp_path / "p.csv"
    folder.mkdir()
    for file in files[:9]:
        shutil.copy(file, folder)
    own = [str(folder / Path(file).name) for file in files[:10]]
    write(predictor, read([str(folder)]), out, batch_size=4)
    assert sorted(counted) == own[:9]
    counted.clear()
    first = out.read_bytes()
    summary = write(predictor, read([str(folder)]), out, batch_size=4)
    assert counted == [own[3]], "the broken one is tried again"
    assert (summary["reused"], summary["failed"], summary["images"]) == (8, 1, 9)
    assert out.read_bytes() == first

    counted.clear()
    shutil.copy(files[20], own[1])  # another image under a known name
    shutil.copy(files[9], folder)
    shutil.copy(files[11], own[3])  # the broken one mended
    os.utime(own[2])  # touched, and still the same
    Path(own[5]).unlink()
    with pytest.raises(InputError, match=r"answers for 1 film\(s\) that are not among the inputs, such as .*--append"):
        write(predictor, read([str(folder)]), out, batch_size=4)
    assert out.read_bytes() == first
    summary = write(predictor, read([str(folder)]), out, batch_size=4, append=True)
    assert sorted(counted) == [own[1], own[3], own[9]]
    assert (summary["reused"], summary["failed"], summary["images"]) == (6, 0, 9)
    found = rows(out)[1:]
    assert [row[0] for row in found] == [own[5], *(path for path in own if path != own[5])]
    assert summary["kept"] == 1
    found = found[1:]
    fresh = tmp_path / "fresh.csv"
    write(predictor, read([str(folder)]), fresh, batch_size=4)
    a, b = ([[float(c) for c in row[5:]] for row in rows(path)[1:]] for path in (out, fresh))
    np.testing.assert_allclose(a[1:], b, atol=1e-6)


def test_a_lost_table_and_another_choice_cost_no_prediction(
    predictor: Predictor, files: list[str], tmp_path: Path, counted: list[str]
) -> None:
    out, sound = tmp_path / "p.csv", files[:3]
    write(predictor, named(sound), out)
    plain = out.read_bytes()
    counted.clear()
    out.unlink()
    write(predictor, named(sound), out)
    assert out.read_bytes() == plain
    assert write(predictor, named(reversed(sound)), out, decide=True)["reused"] == 3
    assert [row[0] for row in rows(out)[1:]] == sound[::-1]
    assert rows(out)[0][-1] == "findings"
    assert counted == []


def test_the_table_appears_when_complete_and_what_is_done_is_kept(
    predictor: Predictor, files: list[str], tmp_path: Path, counted: list[str]
) -> None:
    out = tmp_path / "p.csv"
    out.write_text("of before")

    def stop(state: State) -> None:
        if state.done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(predictor, named(files[:9]), out, batch_size=2, workers=1, overwrite=True, on_batch=stop)
    assert out.read_text() == "of before"
    assert sorted(os.listdir(tmp_path)) == ["p.csv", "p.csv.resume"]
    counted.clear()
    assert write(predictor, named(files[:9]), out, batch_size=2, workers=1)["reused"] == 5
    assert sorted(counted) == [files[3], *files[6:9]]


def test_batches_end_where_they_ended_before(
    predictor: Predictor, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which images share a batch decides a probability's last bits: one tried again must not shift the others."""

    def stop(state: State) -> None:
        if state.done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(predictor, named(files[:11]), tmp_path / "p.csv", batch_size=3, workers=1, on_batch=stop)
    given, real = [], Predictor.stream_batches

    def spy(self: Predictor, batches: Iterable[list[str]], **named: Any) -> Any:
        given.extend(batches)
        return real(self, given, **named)

    monkeypatch.setattr(Predictor, "stream_batches", spy)
    write(predictor, named(files[:11]), tmp_path / "p.csv", batch_size=3, workers=1)
    assert given == [[files[3]], files[6:9], files[9:11]]


@pytest.mark.kill
def test_a_signal_ends_after_the_batch_and_says_how_to_go_on(
    predictor: Predictor, files: list[str], tmp_path: Path
) -> None:
    def hit(state: State) -> None:
        if state.done == 4:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="interrupted after 4 of 9 images; the same command goes on") as caught:
        write(predictor, named(files[:9]), tmp_path / "p.csv", batch_size=2, workers=1, on_batch=hit)
    assert caught.value.exit_code == 130
    identity = {"model_sha256": file_sha256(predictor.path), "pixel_check": self_check()}
    with Checkpoint(tmp_path / "p.csv", identity) as kept:
        assert [kept.holds(file) for file in files[:5]] == [True, True, True, False, False]


def test_a_full_disk_is_one_line_and_keeps_what_there_is(
    predictor: Predictor, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Checkpoint.append

    def append(self: Checkpoint, results: Any, by: str) -> None:
        if any(result.path == files[6] for result in results):
            raise OSError(28, "No space left on device")
        real(self, results, by)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "append", append)
        with pytest.raises(InputError, match="No space left on device; what is predicted so far is kept"):
            write(predictor, named(files[:9]), tmp_path / "p.csv", batch_size=2)
    assert write(predictor, named(files[:9]), tmp_path / "p.csv", batch_size=2)["reused"] == 5


def test_a_disk_that_fills_while_the_table_is_written_keeps_the_answers(
    predictor: Predictor, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setitem(batch.WRITERS, ".csv", full)
        with pytest.raises(
            InputError, match=r"^--out: cannot write .*p\.csv: No space left on device; what .* is kept"
        ):
            write(predictor, named(files[:3]), tmp_path / "p.csv")
    assert os.listdir(tmp_path) == ["p.csv.resume"]
    counted.clear()
    assert write(predictor, named(files[:3]), tmp_path / "p.csv")["reused"] == 3
    assert counted == []


@pytest.fixture(scope="module")
def server() -> multiprocessing.context.ForkServerContext:
    return children.server()


def ran(
    server: Any, model: Path, data: Path, out: Path, number: int = 0, after: int = 0, part: float = 0
) -> tuple[int, list[Any]]:
    """Run `children.predict_all` in a process of its own; its exit code and what it told."""
    told, sender = server.Pipe(duplex=False)
    arguments = (str(model), str(data), str(out), number, after, part, sender)
    process = server.Process(target=children.predict_all, args=arguments)
    process.start()
    sender.close()
    heard = []
    with contextlib.suppress(EOFError):
        while True:
            heard.append(told.recv())
    process.join()
    return process.exitcode, heard


@pytest.mark.kill
def test_killed_at_random_moments_no_byte_differs(
    server: Any, predictor: Predictor, toy_model: Path, toy_data: Path, tmp_path: Path
) -> None:
    """Half the kills come right after a batch, half when a part of the next one is in SQLite's log; every batch that
    was kept before stays."""
    expected, out = tmp_path / "whole.csv", tmp_path / "p.csv"
    write(predictor, read([str(toy_data)]), expected, batch_size=2, workers=1, decide=True)
    moments, counts = random.Random(3), [0]
    for kill in range(12):
        after, part = moments.randint(1, 4), 0 if kill % 2 else moments.uniform(0.01, 0.99)
        code, done = ran(server, toy_model, toy_data, out, signal.SIGKILL, after, part)
        assert code in (-signal.SIGKILL, 0), "a writer failed by itself"
        counts.append(rows_kept(out))
        assert counts[-1] >= max(counts[-2], done[-1] - 1 if done else 0), "a batch that was kept is lost"
        if out.exists():
            assert out.read_bytes() == expected.read_bytes()
            break
    assert len(set(counts)) > 4, "the kills fell on too few states to mean anything"
    assert ran(server, toy_model, toy_data, out)[0] == 0
    assert out.read_bytes() == expected.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("p.*")) == ["p.csv", "p.csv.resume", "p.run.json"]


def rows_kept(out: Path) -> int:
    """Answers, good and bad, that the file and its log hold; copied, for reading changes them."""
    with tempfile.TemporaryDirectory() as folder:
        for suffix in ("", "-wal"):
            if (path := Path(f"{beside(out)}{suffix}")).exists():
                shutil.copy(path, folder)
        with contextlib.closing(sqlite3.connect(Path(folder) / beside(out).name)) as db:
            made = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            return db.execute("SELECT count(*) FROM answers").fetchone()[0] if made else 0


def test_what_a_kill_leaves_stands_in_nobodys_way(predictor: Predictor, files: list[str], tmp_path: Path) -> None:
    """Killed while the table is written: a partial file and a lock."""
    out = tmp_path / "p.csv"
    write(predictor, named(files[:3]), out)
    expected = out.read_bytes()
    out.unlink()
    (tmp_path / "p.csv.partial").write_bytes(expected[:100])
    (tmp_path / "p.csv.lock").write_text('{"pid": 1, "host": "gone"}')
    assert write(predictor, named(files[:3]), out)["reused"] == 3
    assert out.read_bytes() == expected
    assert sorted(os.listdir(tmp_path)) == ["p.csv", "p.csv.resume", "p.run.json"]


@pytest.mark.kill
def test_interrupted_and_continued_no_byte_differs(
    server: Any, predictor: Predictor, toy_model: Path, toy_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.csv"
    code, told = ran(server, toy_model, toy_data, out, signal.SIGINT, 3)
    assert code == 130
    assert told[-1].startswith("interrupted after 6 of ")
    write(predictor, read([str(toy_data)]), out, batch_size=2, workers=1, decide=True)
    write(predictor, read([str(toy_data)]), tmp_path / "whole.csv", batch_size=2, workers=1, decide=True)
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_two_at_once_are_refused(predictor: Predictor, files: list[str], tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / "p.csv"),
        pytest.raises(InputError, match=f"is being written by process {os.getpid()} on "),
    ):
        write(predictor, named(files[:2]), tmp_path / "p.csv")
    write(predictor, named(files[:2]), tmp_path / "p.csv")


def test_answers_of_two_providers_are_counted(
    predictor: Predictor, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(predictor, named(files[:2]), tmp_path / "p.csv")
    monkeypatch.setattr(predictor, "provider", "CUDAExecutionProvider")
    found = write(predictor, named(files[:3]), tmp_path / "p.csv")["answered_by"]
    assert {who.split(",")[0]: count for who, count in found.items()} == {
        "CPUExecutionProvider": 2,
        "CUDAExecutionProvider": 1,
    }


# -------------------------------------------------------------------------------------------------- studies


def manifest(folder: Path, files: list[str], studies: list[str], column: str = "study") -> Path:
    with open(folder / "m.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image", column], *zip(files, studies, strict=True)])
    return folder / "m.csv"


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("suffix", THREE)
def test_studies_are_pooled_beside_the_images(
    predictor: Predictor, files: list[str], tmp_path: Path, how: Any, suffix: str
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    wanted = read([str(manifest(tmp_path, [*files[:6], "gone.png"], ["a", "b", "a", "b", "c", "a", "d"]))])
    out = tmp_path / f"p{suffix}"
    summary = write(predictor, wanted, out, decide=True, pool=how)
    assert summary["study_pool"] == {"how": how, "column": "study", "studies": 4}
    assert len(parsed(out, predictor.labels)) == 7
    found = parsed(studies_path(out), predictor.labels)
    keys = [key for key, _, _ in found]
    assert keys == [
        ["a", "3", "ok", ""],
        ["b", "2", "ok", "1 of 2 images failed: truncated"],
        ["c", "1", "ok", ""],
        ["d", "1", "failed", "1 of 1 images failed: missing"],
    ]
    single = np.array(flat(predictor(files[:3] + files[4:6])), np.float64)
    members = {"a": [0, 2, 4], "b": [1], "c": [3]}
    for (key, values, findings), _ in zip(found[:3], range(3), strict=True):
        expected = getattr(single[members[key[0]]], how)(axis=0)
        np.testing.assert_allclose(values, expected, atol=1e-6)
        again = [n for n, p, t in zip(predictor.labels, values, predictor.thresholds, strict=True) if p >= t]
        assert findings == again
    assert found[3][1:] == (None, None)
    head = rows(studies_path(out))[0] if suffix == ".csv" else []
    assert head[:4] == (["study", "images", "status", "reason"] if head else [])


def test_pooled_rows_never_lie_beside_newer_ones(predictor: Predictor, files: list[str], tmp_path: Path) -> None:
    wanted, out = read([str(manifest(tmp_path, files[:2], ["a", "a"]))]), tmp_path / "p.csv"
    write(predictor, wanted, out, pool="mean")
    assert studies_path(out).exists()
    write(predictor, wanted, out)
    assert not studies_path(out).exists()
    studies_path(out).write_text("mine")
    write(predictor, wanted, out)
    assert studies_path(out).read_text() == "mine"
    with pytest.raises(InputError, match=r"p\.studies\.csv exists and .* did not write it"):
        write(predictor, wanted, out, pool="mean")
    write(predictor, wanted, out, pool="mean", overwrite=True)
    assert len(rows(studies_path(out))) == 2
    for foreign in ('{"kind": "another"}', "[]", "{"):
        run_path(out).write_text(foreign)
        with pytest.raises(InputError, match=r"p\.run\.json exists and .* did not write it"):
            write(predictor, wanted, out)
        assert run_path(out).read_text() == foreign


def test_pooling_needs_the_studies_of_one_manifest(
    predictor: Predictor, files: list[str], tmp_path: Path, counted: list[str]
) -> None:
    (tmp_path / "other").mkdir()
    one = manifest(tmp_path, files[:2], ["a", ""])
    two = tmp_path / "n.csv"
    two.write_text(f"image,group\n{files[4]},a\n{files[5]},b\n")
    for items, match in [
        ([files[0]], "has no study; name a manifest with a column study or group"),
        ([str(one)], f"{files[1]} has no study"),
        ([str(two), files[0]], f"{files[0]} has no study"),
        ([str(two), str(manifest(tmp_path / "other", files[:2], ["a", "b"]))], "one manifest at a time"),
    ]:
        with pytest.raises(InputError, match=f"--study-pool: .*{match}"):
            write(predictor, read(items), tmp_path / "p.csv", pool="mean")
    assert counted == []
    assert write(predictor, read([str(two)]), tmp_path / "p.csv", pool="mean")["study_pool"]["column"] == "group"


@example([("a", 0.0), ("a", 3.208973483303831e-43)])
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.one_of(st.none(), UNIT)), min_size=1, max_size=12))
def test_pooling_is_a_plain_mean_and_max(drawn: list[tuple[str, float | None]]) -> None:
    results = [
        Result(path="x", reason="empty") if p is None else Result(path="x", probabilities=np.float32([p]))
        for _, p in drawn
    ]
    studies = [study for study, _ in drawn]
    for how in ("mean", "max"):
        found = list(pooled(results, studies, how))  # type: ignore[arg-type]
        assert [keys[0] for keys, _ in found] == sorted(set(studies), key=studies.index)
        for keys, values in found:
            good = [np.float64(np.float32(p)) for study, p in drawn if study == keys[0] and p is not None]
            assert keys[1] == studies.count(keys[0])
            assert keys[2] == ("ok" if good else "failed")
            assert bool(keys[3]) == (len(good) < keys[1])
            if values is not None:
                assert values.dtype == np.float32
                # A float32 below 1e-38 has no six digits: there it is right to its last bit.
                last = float(np.finfo(np.float32).smallest_subnormal)
                np.testing.assert_allclose(values, [getattr(np, how)(good)], rtol=1e-6, atol=last)


def test_pooling_holds_no_more_than_the_open_studies() -> None:
    taken = 0

    def results() -> Iterator[Result]:
        nonlocal taken
        for _ in range(3000):
            taken += 1
            yield Result(path="", probabilities=np.zeros(2, np.float32))

    for count, (keys, _) in enumerate(pooled(results(), [str(i // 3) for i in range(3000)], "mean"), 1):
        assert keys[:2] == [str(count - 1), 3]
        assert taken == 3 * count


@pytest.mark.parametrize(("name", "said"), [("status", "a column of its own"), ("a;b", "separates findings")])
def test_a_class_that_the_table_cannot_hold_is_refused(
    predictor: Predictor, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.setattr(predictor, "labels", (name, *predictor.labels[1:]))
    with pytest.raises(InputError, match=said):
        write(predictor, named(files[:1]), tmp_path / "p.csv")
    assert list(tmp_path.iterdir()) == []


def test_a_run_json_of_somebody_else_is_not_replaced(predictor: Predictor, files: list[str], tmp_path: Path) -> None:
    (tmp_path / "p.run.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match=r"p\.run\.json exists and predict did not write it"):
        write(predictor, named(files[:1]), tmp_path / "p.csv")
    assert (tmp_path / "p.run.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize("suffix", THREE)
def test_a_run_killed_before_its_record_goes_on_over_its_own_table_of_studies(
    predictor: Predictor, files: list[str], tmp_path: Path, suffix: str
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    wanted, out = read([str(manifest(tmp_path, files[:3], ["a", "a", "b"]))]), tmp_path / f"p{suffix}"
    write(predictor, wanted, out, pool="mean")
    whole = studies_path(out).read_bytes()
    run_path(out).unlink()
    write(predictor, wanted, out, pool="mean")
    assert studies_path(out).read_bytes() == whole
    run_path(out).unlink()
    studies_path(out).write_bytes(b"study,mine\n")
    with pytest.raises(InputError, match=r"p\.studies\..* exists and predict did not write it"):
        write(predictor, wanted, out, pool="mean")
