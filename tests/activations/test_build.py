"""A sharded cache against the same images in one file: the same bytes, and nothing wrong goes unnamed."""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.activations import build, reuse, verify
from cxr_fast.activations import cache as index
from cxr_fast.activations import file as store
from cxr_fast.activations.encoder import BuildProgress, with_size
from cxr_fast.activations.job import CacheJob, shard_ranges
from cxr_fast.activations.verify import ReencodeSpec
from cxr_fast.cli.main import main
from cxr_fast.config import CacheSpec, SweepSpec
from cxr_fast.data.manifest import read_dataset
from cxr_fast.errors import InputError, Interrupted, SchemaError
from cxr_fast.models import backbone
from cxr_fast.models.backbone import Backbone
from cxr_fast.training import dataset
from tests.conftest import TOY
from tests.helpers import children

BLOCK = 2


@pytest.fixture(scope="module")
def tower() -> Backbone:
    return backbone.load(TOY)


@pytest.fixture(scope="module")
def spec(tower: Backbone) -> CacheSpec:
    return with_size(CacheSpec(weights=TOY), tower)


@pytest.fixture
def images(tmp_path: Path, phantoms: Path) -> Path:
    """Thirteen phantoms and a manifest of them, free to be changed."""
    folder = tmp_path / "data"
    folder.mkdir()
    names = sorted((phantoms / "images").iterdir())[:13]
    for path in names:
        shutil.copy(path, folder / path.name)
    listed(folder, [path.name for path in names])
    return folder


def listed(folder: Path, names: list[str]) -> None:
    rows = [
        ["image", "group", "Edema", "meta:sex"],
        *([name, f"p{i}", str(i % 2), "FM"[i % 2]] for i, name in enumerate(names)),
    ]
    with open(folder / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


def names_of(folder: Path) -> list[str]:
    return list(read_dataset(folder / "manifest.csv").images)


def run(tower: Backbone, spec: CacheSpec, folder: Path, out: Path, count: int = 3, **flags: Any) -> build.BuildOutcome:
    manifest, watch = read_dataset(folder / "manifest.csv"), flags.pop("on_progress", None)
    named: dict[str, Any] = {"shards": count, "device": "cpu", "batch_size": BLOCK, **flags}
    return build.run(CacheJob(manifest=manifest, backbone=tower, spec=spec, out=out, **named), watch)


def whole(tower: Backbone, spec: CacheSpec, folder: Path, out: Path) -> store.ActivationFile:
    manifest = read_dataset(folder / "manifest.csv")
    build.run(CacheJob(manifest=manifest, backbone=tower, spec=spec, out=out, device="cpu", batch_size=BLOCK))
    return store.ActivationFile(out)


def assert_same(sharded: index.Cache, one: store.ActivationFile) -> None:
    assert sharded.header.images == one.header.images
    assert np.array_equal(np.asarray(sharded.activations), one.activations)
    for name in ("state", "ok", "crc32", "absmax"):
        assert np.array_equal(getattr(sharded, name), getattr(one, name)), name
    assert (sharded.sha256, sharded.errors) == (one.sha256, one.errors)
    for name in ("groups", "studies", "views", "classes", "shape", "dtype"):
        assert getattr(sharded.header, name) == getattr(one.header, name), name
    assert np.array_equal(sharded.header.labels, one.header.labels)
    assert sharded.meta == one.meta


@given(images=st.integers(1, 500), block=st.integers(1, 64), data=st.data())
def test_shards_are_whole_blocks_in_order_and_even(images: int, block: int, data: st.DataObject) -> None:
    blocks = -(-images // block)
    count = data.draw(st.integers(1, blocks))
    pieces = shard_ranges(images, count, block)
    assert [row for piece in pieces for row in piece] == list(range(images))
    assert all(piece.start % block == 0 for piece in pieces)
    sizes = [-(-len(piece) // block) for piece in pieces]
    assert max(sizes) - min(sizes) <= 1
    with pytest.raises(InputError, match=f"at most {blocks:,}"):
        shard_ranges(images, blocks + 1, block)


def test_the_shards_hold_what_one_file_holds(tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path) -> None:
    (images / names_of(images)[4]).write_bytes(b"no image")
    out = tmp_path / "a.shards.json"
    seen: list[BuildProgress] = []
    outcome = run(tower, spec, images, out, on_progress=seen.append)
    one = whole(tower, spec, images, tmp_path / "one.h5")
    assert_same(index.open_cache(out), one)
    assert (outcome.images, outcome.encoded, outcome.reused, len(outcome.failed)) == (13, 12, 0, 1)
    assert (seen[-1].done, seen[-1].total, seen[-1].before, seen[-1].failed) == (13, 13, 0, 1)
    assert all(a.done <= b.done for a, b in itertools.pairwise(seen))
    assert sorted(p.name for p in tmp_path.glob("a.*")) == [
        *(f"a.shard-{k:04d}-of-0003.h5" for k in (1, 2, 3)),
        "a.shards.json",
    ]
    assert index.newest(tmp_path).name == "one.h5"
    again = run(tower, spec, images, out)
    assert (again.encoded, again.reused, len(again.failed)) == (0, 12, 1)
    spec_of = SweepSpec(folds=2)
    a, b = (dataset.read(path, spec_of) for path in (out, tmp_path / "one.h5"))
    assert np.array_equal(a.assignment, b.assignment)
    assert np.array_equal(a.rows, b.rows)


@pytest.mark.usefixtures("sketched")
def test_the_search_over_shards_is_the_search_over_one_file(
    toy_data: Path, tmp_path: Path, lively_weights: Path
) -> None:
    """Through the commands."""
    out, one = tmp_path / "toy.shards.json", tmp_path / "toy.h5"
    common = ["--device", "cpu", "--threads", "1"]
    for path, many in ((one, []), (out, ["--shards", "4"])):
        flags = ["--weights", str(lively_weights), "--out", str(path), *many, *common]
        made = CliRunner().invoke(main, ["cache", str(toy_data), *flags])
        assert made.exit_code == 1, made.output  # one film of the toy data cannot be read
    assert "and 4 shards" in made.output
    assert_same(index.open_cache(out), store.ActivationFile(one))
    told = CliRunner().invoke(main, ["info", str(out)])
    assert "4: toy.shard-0001-of-0004.h5 to toy.shard-0004-of-0004.h5" in told.output
    proved = CliRunner().invoke(main, ["verify", str(out), "--reencode", "2", *common])
    assert proved.exit_code == 0, proved.output
    sweep = ["--epochs", "1,2", "--folds", "2", "--lr", "1e-3", "--precision", "float32", *common]
    runs = []
    for number, cache in enumerate((out, one)):
        folder = tmp_path / f"run{number}"
        done = CliRunner().invoke(main, ["sweep", str(cache), "--out", str(folder), *sweep])
        assert done.exit_code == 0, done.output
        runs.append(json.loads((folder / "run.json").read_text()))
    assert runs[0]["model_sha256"] == runs[1]["model_sha256"]
    assert runs[0]["metrics"] == runs[1]["metrics"]


@pytest.mark.parametrize("shards", [None, 6])
def test_weights_are_hashed_once_however_many_shards_there_are(
    shards: int | None, tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For plan and run together: the prefix once, and the tower once."""
    hashed: list[int] = []
    real = backbone.weights_sha256

    def count(tensors: Any, names: Any) -> str:
        names = list(names)
        hashed.append(sum(tensors[name].nbytes for name in names))
        return real(tensors, names)

    monkeypatch.setattr(backbone, "weights_sha256", count)
    manifest, out = read_dataset(images / "manifest.csv"), tmp_path / ("a.shards.json" if shards else "a.h5")
    named: dict[str, Any] = {"shards": shards, "device": "cpu", "batch_size": BLOCK}
    job = CacheJob(manifest=manifest, backbone=tower, spec=spec, out=out, **named)
    build.plan(job)
    build.run(job)
    state = tower.visual.state_dict()
    whole = sum(tensor.nbytes for tensor in state.values())
    assert hashed == [sum(state[name].nbytes for name in backbone.prefix_names(tower.visual, 2)), whole]
    parts = index.open_cache(out).meta["fingerprint_parts"]
    assert parts["prefix_sha256"] == backbone.prefix_sha256(tower.visual, 2)


def damage(path: Path, row: int) -> None:
    """Turn over one byte of a row's activations."""
    file = store.ActivationFile(path)
    place = file.offset + row * store.row_bytes(file.header.shape, file.header.dtype) + 5
    with open(path, "r+b") as opened:
        opened.seek(place)
        byte = opened.read(1)
        opened.seek(place)
        opened.write(bytes([byte[0] ^ 255]))


def test_missing_foreign_and_damaged_shards_are_named(
    tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.shards.json"
    run(tower, spec, images, out)
    second = index.shard_path(out, 2, 3)
    kept = second.read_bytes()
    names = names_of(images)
    said = rf"shard 2 of 3, {second.name} \({names[4]} to {names[7]}\)"

    second.unlink()
    with pytest.raises(InputError, match=said + ", is missing"):
        index.open_cache(out)
    second.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(InputError, match=said + ", cannot be read"):
        index.open_cache(out)
    shutil.copy(index.shard_path(out, 1, 3), second)
    with pytest.raises(InputError, match=said + ", is not the file the index was written for"):
        index.open_cache(out)
    second.unlink()
    other = tmp_path / "other.shards.json"
    run(tower, with_size(CacheSpec(weights=TOY, views=("plain",)), tower), images, other)
    shutil.copy(index.shard_path(other, 2, 3), second)
    with pytest.raises(InputError, match=said + ", is foreign"):
        index.open_cache(out)
    second.rename(store.partial_path(second))
    with pytest.raises(InputError, match=said + ", is not finished"):
        index.open_cache(out)
    store.partial_path(second).unlink()

    second.write_bytes(kept)
    damage(second, 1)
    assert [row for row, _ in index.open_cache(out).damaged()] == [5]
    with pytest.raises(InputError, match=rf"1 of 13 rows fail their checksum: {names[5]}.\n.*--shards 3 --repair"):
        dataset.read(out, SweepSpec(folds=2))
    assert [image for image, _ in verify.check_cache(out).bad] == [names[5]]
    assert run(tower, spec, images, out, repair=True).encoded == 1
    assert not verify.check_cache(out, ReencodeSpec(count=13)).bad
    assert second.read_bytes() == kept


def test_a_folder_of_shards_moves_with_its_index(
    tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.shards.json"
    run(tower, spec, images, out)
    (tmp_path / "there").mkdir()
    for path in tmp_path.glob("a.shard*"):
        shutil.move(path, tmp_path / "there" / path.name)
    assert len(index.open_cache(tmp_path / "there" / out.name).ok) == 13


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda v: "not json", InputError, "not an index"),
        (lambda v: {**v, "kind": "x"}, InputError, "not the index of a sharded cache"),
        (lambda v: {**v, "schema": 99}, SchemaError, "schema 99"),
        (lambda v: {**v, "images": 12}, InputError, "do not add up"),
        (lambda v: {**v, "shards": v["shards"][:-1]}, InputError, "do not add up"),
        (lambda v: {**v, "shards": v["shards"][::-1]}, InputError, "do not add up"),
        (lambda v: {**v, "shards": [{**v["shards"][0], "file": "../a.h5"}, *v["shards"][1:]]}, InputError, "add up"),
        (lambda v: {k: x for k, x in v.items() if k != "shards"}, InputError, "a damaged index"),
        (lambda v: {**v, "shards": [{"file": "a.h5"}]}, InputError, "a damaged index"),
        (lambda v: {**v, "shards": [{**v["shards"][0], "more": 1}]}, InputError, "unknown field `more`"),
        (lambda v: [], InputError, "not the index"),
    ],
)
def test_an_index_changed_by_hand_is_refused(
    change: Any, error: type[Exception], said: str, tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.shards.json"
    run(tower, spec, images, out)
    changed = change(json.loads(out.read_text()))
    out.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(error, match=said):
        index.open_cache(out)


def test_another_list_and_another_number_of_shards_keep_every_row(
    tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.shards.json"
    names = names_of(images)
    listed(images, names[1:])
    run(tower, spec, images, out)
    listed(images, names)  # every image moves on by one: in each shard one comes from the shard before
    outcome = run(tower, spec, images, out)
    assert (outcome.encoded, outcome.reused) == (1, 12)
    outcome = run(tower, spec, images, out, 5)
    assert (outcome.encoded, outcome.reused) == (0, 13)
    assert len(list(tmp_path.glob("a.*"))) == 6
    assert_same_values(index.open_cache(out), whole(tower, spec, images, tmp_path / "one.h5"))
    with pytest.raises(InputError, match="was made with views"):
        run(tower, with_size(CacheSpec(weights=TOY, views=("plain",)), tower), images, out)
    assert len(index.open_cache(out).ok) == 13  # refused before anything was moved


def assert_same_values(sharded: index.Cache, one: store.ActivationFile) -> None:
    """Rows encoded at another place of their block may differ in the last bit."""
    assert sharded.sha256 == one.sha256
    np.testing.assert_allclose(np.asarray(sharded.activations), one.activations, atol=2e-3)


def test_one_shard_may_fail_whole_but_not_all(tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.shards.json"
    names = names_of(images)
    for name in names[:4]:
        (images / name).write_bytes(b"no image")
    outcome = run(tower, spec, images, out)
    assert (len(outcome.failed), index.open_cache(out).ok.sum()) == (4, 9)
    for name in names:
        (images / name).write_bytes(b"no image")
    with pytest.raises(InputError, match="every one of the 13 images failed"):
        run(tower, spec, images, tmp_path / "b.shards.json")
    assert not (tmp_path / "b.shards.json").exists()


@pytest.mark.kill
def test_a_run_in_the_middle_leaves_no_index_and_goes_on(
    tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.shards.json"
    names = names_of(images)
    listed(images, names[:11])
    run(tower, spec, images, out)
    listed(images, names)

    def stop(progress: BuildProgress) -> None:
        if progress.encoded:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="Run the same command again"):
        run(tower, spec, images, out, on_progress=stop)
    assert not out.exists()
    outcome = run(tower, spec, images, out)
    assert outcome.encoded + outcome.reused == 13
    assert not list(tmp_path.glob("a.*reuse*"))
    assert not list(tmp_path.glob("a.*partial*"))


def test_two_runs_at_once_are_refused(tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.shards.json"

    refused = 0

    def nested(progress: BuildProgress) -> None:
        nonlocal refused
        with pytest.raises(InputError, match="being written by process"):
            run(tower, spec, images, out)
        refused += 1

    run(tower, spec, images, out, on_progress=nested)
    assert refused


@pytest.mark.kill
def test_killed_at_random_moments_the_shards_are_the_same(
    tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path
) -> None:
    """Real processes: each is killed in the middle of a step of its own, the last one is let through."""
    out, moments = tmp_path / "a.shards.json", random.Random(0)
    words = ["cache", str(images / "manifest.csv"), "--weights", TOY, "--out", str(out), "--shards", "3"]
    words += ["--batch-size", str(BLOCK), "--device", "cpu", "--threads", "1"]
    context = children.server()
    for kill in range(5):
        # Whole blocks of two rows, and steps of the next one, which are eight, and behind it: seven blocks at most, as
        # many as thirteen rows are.
        killed = context.Process(target=children.run_and_die, args=(words, kill % 2, moments.randint(0, 10)))
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        assert not out.exists()
    assert encoded(out), "the kills fell on nothing"
    command = [sys.executable, "-m", "cxr_fast", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same(index.open_cache(out), whole(tower, spec, images, tmp_path / "one.h5"))


def encoded(out: Path) -> int:
    """Rows done in whatever shards there are."""
    total = 0
    for path in reuse.find_files(out, sharded=True):
        try:
            total += int((store.ActivationFile(path, partial=True).state != store.PENDING).sum())
        except (InputError, OSError, KeyError):  # it has just got another name
            continue
    return total


def test_newest_takes_the_last_complete_cache_and_no_single_shard(
    tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    with pytest.raises(InputError, match="cxrfast cache"):
        index.newest(folder)
    run(tower, spec, images, folder / "a.shards.json")
    for age, name in ((30, "old"), (10, "new"), (20, "middle")):
        shutil.copy(index.shard_path(folder / "a.shards.json", 1, 3), folder / f"{name}.h5")
        os.utime(folder / f"{name}.h5", (1e9 - age, 1e9 - age))
    (folder / "text.h5").write_text("not hdf5")
    assert index.newest(folder).name == "a.shards.json"
    (folder / "a.shards.json").unlink()
    assert index.newest(folder).name == "new.h5"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shards", "2", "--out", "a.h5"], "ends in .shards.json"),
        (["--out", "a.shards.json"], "wants --shards K"),
        (["--shards", "900", "--out", "a.shards.json"], "at most"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(
    flags: list[str], said: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["cache", str(images / "manifest.csv"), "--weights", TOY, *flags])
    assert done.exit_code == 2
    assert said in done.output
    assert len(done.output.splitlines()) == 1
