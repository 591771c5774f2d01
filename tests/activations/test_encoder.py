"""From images to rows: right, resumable at any moment, reusing what is the same, refusing what is not."""

from __future__ import annotations

import csv
import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cxr_fast.activations import build, reuse, verify
from cxr_fast.activations import file as store
from cxr_fast.activations.encoder import BuildProgress, with_size
from cxr_fast.activations.job import CacheJob
from cxr_fast.activations.verify import ReencodeSpec
from cxr_fast.config import CacheSpec, PreprocessSpec, SweepSpec
from cxr_fast.data.images import load
from cxr_fast.data.manifest import read_dataset
from cxr_fast.errors import InputError, Interrupted
from cxr_fast.models import backbone
from cxr_fast.models.backbone import Backbone
from cxr_fast.training import dataset
from tests.conftest import TOY
from tests.helpers import children

BLOCK = 4


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
    write_manifest(folder, [path.name for path in names])
    return folder


def write_manifest(folder: Path, names: list[str], flip: bool = False) -> None:
    rows = [["image", "group", "Edema"], *([name, f"p{i}", str((i + flip) % 2)] for i, name in enumerate(names))]
    with open(folder / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


def run(tower: Backbone, spec: CacheSpec, folder: Path, out: Path, **flags: Any) -> build.BuildOutcome:
    manifest = read_dataset(folder / "manifest.csv")
    watch = [flags.pop(name, None) for name in ("on_progress", "on_compared")]
    named: dict[str, Any] = {"device": "cpu", "batch_size": BLOCK, **flags}
    return build.run(CacheJob(manifest=manifest, backbone=tower, spec=spec, out=out, **named), *watch)


def rows_of(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    file = store.ActivationFile(path)
    return np.array(file.activations), file.crc32, file.header.labels, file.sha256


def same(a: Path, b: Path) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(rows_of(a), rows_of(b), strict=True))


def test_rows_are_the_prefix_of_the_preprocessed_image(
    tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path
) -> None:
    run(tower, spec, images, tmp_path / "a.h5")
    file = store.ActivationFile(tmp_path / "a.h5")
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in tower.statistics("model"))
    for row in (0, 5, 12):
        pixels, sha256, _ = load(images / file.header.images[row], spec.preprocess)
        assert file.sha256[row] == sha256
        for v, array in enumerate((pixels, pixels[:, ::-1].copy())):
            x = (torch.from_numpy(array).float().div(255).expand(3, -1, -1) - mean) / std
            with torch.inference_mode():
                tokens = backbone.embed(tower.visual, x[None])
                for block in tower.visual.trunk.blocks[:4]:
                    tokens = block(tokens)
            assert np.allclose(file.activations[row, v], tokens[0].numpy(), atol=2e-3)


@pytest.mark.parametrize("unfreeze", [0, 1, 6])
def test_every_cut_can_be_cached(unfreeze: int, tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path) -> None:
    cut = replace(spec, unfreeze_blocks=unfreeze, views=("plain",))
    run(tower, cut, images, tmp_path / "a.h5")
    file = store.ActivationFile(tmp_path / "a.h5")
    assert file.header.shape == ((13, 1, 512) if unfreeze == 0 else (13, 1, 101, 64))
    assert file.meta["fingerprint_parts"]["cut"] == ("embedding" if unfreeze == 0 else f"blocks.{6 - unfreeze}")


def test_more_blocks_than_the_backbone_has_is_refused(
    tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--unfreeze-blocks"):
        run(tower, replace(spec, unfreeze_blocks=7), images, tmp_path / "a.h5")
    assert not list(tmp_path.glob("a.h5*"))


def test_a_row_does_not_depend_on_the_block_size(
    tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path
) -> None:
    manifest = read_dataset(images / "manifest.csv")
    for name, block in (("a", 4), ("b", 8)):
        build.run(
            CacheJob(
                manifest=manifest,
                backbone=tower,
                spec=spec,
                out=tmp_path / f"{name}.h5",
                device="cpu",
                batch_size=block,
            )
        )
    a, b = (store.ActivationFile(tmp_path / f"{name}.h5").activations for name in "ab")
    assert np.allclose(a, b, atol=2e-3)


def test_the_plan_writes_nothing(tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path) -> None:
    manifest = read_dataset(images / "manifest.csv")
    plan = build.plan(
        CacheJob(manifest=manifest, backbone=tower, spec=spec, out=tmp_path / "deep" / "a.h5", device="cpu")
    )
    assert (plan.images, plan.views, plan.rows_done, plan.cut) == (13, 2, 0, "blocks.4")
    assert plan.bytes_needed == 13 * 2 * 101 * 64 * 2
    assert plan.seconds > 0
    assert not (tmp_path / "deep").exists()


# ------------------------------------------------------------------ failures


def test_failed_images_are_listed_and_the_rest_goes_on(
    tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path
) -> None:
    names = sorted(path.name for path in images.glob("*.png"))
    (images / names[3]).write_bytes((images / names[3]).read_bytes()[:200])
    (images / names[7]).write_text("not an image")
    outcome = run(tower, spec, images, tmp_path / "a.h5")
    assert [name for name, _ in outcome.failed] == [names[3], names[7]]
    assert [error.split(":")[0] for _, error in outcome.failed] == ["truncated", "not_an_image"]
    file = store.ActivationFile(tmp_path / "a.h5")
    assert np.flatnonzero(~file.ok).tolist() == [3, 7]
    listing = build.write_errors(tmp_path / "a.h5", outcome.failed)
    assert listing.name == "a.errors.csv"
    rows = list(csv.DictReader(listing.read_text().splitlines()))
    assert [row["reason"] for row in rows] == ["truncated", "not_an_image"]
    build.write_errors(tmp_path / "a.h5", ())
    assert not listing.exists()


def test_stop_on_error_names_the_first_and_keeps_what_is_done(
    tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path
) -> None:
    names = sorted(path.name for path in images.glob("*.png"))
    good = (images / names[9]).read_bytes()
    (images / names[9]).write_bytes(b"")
    with pytest.raises(InputError, match=names[9]):
        run(tower, spec, images, tmp_path / "a.h5", stop_on_error=True)
    assert not (tmp_path / "a.h5").exists()
    (images / names[9]).write_bytes(good)
    assert run(tower, spec, images, tmp_path / "a.h5").reused == 8


def test_nothing_usable_leaves_no_cache(tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path) -> None:
    for path in images.glob("*.png"):
        path.write_text("no")
    with pytest.raises(InputError, match="every one of the 13 images failed"):
        run(tower, spec, images, tmp_path / "a.h5")
    assert not (tmp_path / "a.h5").exists()


@pytest.mark.parametrize("scale", [1e6, float("inf"), float("nan")])
def test_what_float16_cannot_hold_is_never_stored(scale: float, spec: CacheSpec, images: Path, tmp_path: Path) -> None:
    loud = backbone.load(TOY)
    loud.visual.trunk.pos_embed.data[0, 5, 3] = scale
    with pytest.raises(InputError, match=r"range: .*--dtype float32"):
        run(loud, spec, images, tmp_path / "a.h5")
    if scale == 1e6:
        run(loud, replace(spec, dtype="float32"), images, tmp_path / "b.h5")
        file = store.ActivationFile(tmp_path / "b.h5")
        assert file.absmax.min() > 65504
        assert np.isfinite(file.activations).all()


# ------------------------------------------------------------------ identity


def test_running_again_does_nothing(tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.h5"
    run(tower, spec, images, out)
    before = (out.stat().st_ino, out.stat().st_mtime_ns)
    outcome = run(tower, spec, images, out)
    assert (outcome.reused, outcome.encoded) == (13, 0)
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == before


def test_only_a_changed_image_is_encoded_again(tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.h5"
    run(tower, spec, images, out)
    names = store.ActivationFile(out).header.images
    shutil.copy(images / names[0], images / names[6])
    outcome = run(tower, spec, images, out)
    assert (outcome.reused, outcome.encoded) == (12, 1)
    run(tower, spec, images, tmp_path / "fresh.h5")
    assert same(out, tmp_path / "fresh.h5")


def test_added_and_dropped_images_reuse_the_rest(
    tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path
) -> None:
    out, names = tmp_path / "a.h5", sorted(path.name for path in images.glob("*.png"))
    write_manifest(images, names[:9])
    run(tower, spec, images, out)
    write_manifest(images, names[2:][::-1], flip=True)
    outcome = run(tower, spec, images, out)
    assert (outcome.reused, outcome.encoded) == (7, 4)
    run(tower, spec, images, tmp_path / "fresh.h5")
    assert same(out, tmp_path / "fresh.h5")
    assert store.ActivationFile(out).header.images == tuple(names[2:][::-1])
    assert sorted(path.name for path in tmp_path.glob("a.h5*")) == ["a.h5"]


def test_other_labels_cost_no_encoding(tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path) -> None:
    out, names = tmp_path / "a.h5", sorted(path.name for path in images.glob("*.png"))
    run(tower, spec, images, out)
    before = store.ActivationFile(out).header.labels
    write_manifest(images, names, flip=True)
    assert run(tower, spec, images, out).encoded == 0
    assert np.array_equal(store.ActivationFile(out).header.labels, 1 - before)


def test_the_same_film_under_two_patients_is_reported(
    tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path
) -> None:
    assert run(tower, spec, images, tmp_path / "a.h5").notes == ()
    names = store.ActivationFile(tmp_path / "a.h5").header.images
    shutil.copy(images / names[0], images / names[7])
    outcome = run(tower, spec, images, tmp_path / "a.h5")
    assert len(outcome.notes) == 2
    assert f"{names[0]} of p0 = {names[7]} of p7" in outcome.notes[0]
    assert f"other labels: {names[0]} = {names[7]}" in outcome.notes[1]
    data = dataset.read(tmp_path / "a.h5", SweepSpec(epochs=(1,), folds=2))
    assert data.notes[: len(outcome.notes)] == outcome.notes
    assert [note for note in data.notes if note not in outcome.notes] == [
        "no unlikeness: 10 training film(s) of 10 group(s), and it needs 100 of 5"
    ]
    assert len(data.rows) == 13, "told, and nothing else"


def test_a_failed_image_is_tried_again(tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path) -> None:
    out, name = tmp_path / "a.h5", sorted(path.name for path in images.glob("*.png"))[4]
    good = (images / name).read_bytes()
    (images / name).write_bytes(good[:300])
    assert len(run(tower, spec, images, out).failed) == 1
    (images / name).write_bytes(good)
    outcome = run(tower, spec, images, out)
    assert (outcome.reused, outcome.encoded, outcome.failed) == (12, 1, ())


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("views", {"views": ("plain",)}),
        ("dtype", {"dtype": "float32"}),
        ("cut", {"unfreeze_blocks": 1}),
        ("resize", {"preprocess": PreprocessSpec(size=160, resize="pad")}),
        ("dicom_policy", {"preprocess": PreprocessSpec(size=160, dicom_policy="raw")}),
        ("mean", {"normalize": "imagenet"}),
    ],
)
def test_a_mismatch_names_the_field_and_both_values(
    field: str, change: dict[str, object], tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.h5"
    run(tower, spec, images, out)
    data = out.read_bytes()
    with pytest.raises(InputError) as caught:
        run(tower, replace(spec, **change), images, out)  # type: ignore[arg-type]
    text = str(caught.value)
    assert f"made with {'prefix_sha256' if field == 'cut' else field} " in text
    assert "this run has" in text
    assert out.read_bytes() == data
    assert not store.partial_path(out).exists()


def test_another_pillow_is_a_mismatch(
    tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tower, spec, images, tmp_path / "a.h5")
    monkeypatch.setattr("cxr_fast.activations.job.self_check", lambda: "f" * 64)
    with pytest.raises(InputError, match=r"made with pixel_check .* this run has ffffffffffff…; Pillow"):
        run(tower, spec, images, tmp_path / "a.h5")


def test_other_weights_are_a_mismatch(tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path) -> None:
    run(tower, spec, images, tmp_path / "a.h5")
    with pytest.raises(InputError, match="prefix_sha256"):
        run(backbone.load("random:1:test_vit"), spec, images, tmp_path / "a.h5")


def test_the_fingerprint_leaves_paths_and_labels_out(
    tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path
) -> None:
    one = run(tower, spec, images, tmp_path / "a.h5").fingerprint
    moved = tmp_path / "elsewhere"
    shutil.move(images, moved)
    write_manifest(moved, sorted(path.name for path in moved.glob("*.png"))[:5], flip=True)
    manifest = read_dataset(moved / "manifest.csv")
    two = build.run(
        CacheJob(
            manifest=manifest, backbone=tower, spec=spec, out=tmp_path / "b.h5", device="cpu", batch_size=8, workers=1
        )
    )
    assert one == two.fingerprint
    meta = store.ActivationFile(tmp_path / "b.h5").meta
    assert str(tmp_path) not in json.dumps(meta["fingerprint_parts"])


def test_damage_is_proved_and_repaired(tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.h5"
    run(tower, spec, images, out)
    file, reference = store.ActivationFile(out), rows_of(out)[0]
    name = file.header.images[5]
    assert verify.check_cache(out, ReencodeSpec(count=13)).bad == ()
    with open(out, "r+b") as raw:
        raw.seek(file.offset + 5 * reference[0].nbytes + 11)
        raw.write(b"\xff\x01")
    found = verify.check_cache(out, ReencodeSpec(count=13))
    assert found.bad == ((name, "checksum"),)
    assert found.reencoded == 12
    assert run(tower, spec, images, out).encoded == 0, "without --repair nothing is read back"
    outcome = run(tower, spec, images, out, repair=True)
    assert (outcome.reused, outcome.encoded) == (12, 1)
    assert np.array_equal(store.ActivationFile(out).activations, reference)


READ = """
import sys
from cxr_fast.activations.file import ActivationFile
rows = ActivationFile(sys.argv[1]).activations
print("reading", flush=True)
sys.stdin.readline()
"""


def test_rows_never_change_under_a_reader(tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path) -> None:
    out, names = tmp_path / "a.h5", sorted(path.name for path in images.glob("*.png"))
    run(tower, spec, images, out)
    before = out.read_bytes()
    command = [sys.executable, "-c", READ, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
        assert run(tower, spec, images, out).encoded == 0, "nothing to write, nothing in the way"
        shutil.copy(images / names[0], images / names[6])
        with pytest.raises(InputError, match="is being read by another process"):
            run(tower, spec, images, out)
        assert out.read_bytes() == before
        assert sorted(path.name for path in tmp_path.glob("a.h5*")) == ["a.h5"]
        reader.communicate("\n", timeout=60)
    assert run(tower, spec, images, out).encoded == 1


def test_images_compared_with_their_rows_are_reported(
    tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven thousand films on a network disk take minutes to read again; that must not look like a hang."""
    monkeypatch.setattr(reuse, "AT_ONCE", 5)
    compared: list[int] = []
    run(tower, spec, images, tmp_path / "a.h5", on_compared=compared.append)
    assert compared == []
    assert run(tower, spec, images, tmp_path / "a.h5", on_compared=compared.append).encoded == 0
    assert compared == [5, 5, 3]


# ------------------------------------------------------------------ crashes


@pytest.mark.kill
def test_a_stop_is_clean_and_resumes_bit_for_bit(
    tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.h5"

    def stop(progress: BuildProgress) -> None:
        if progress.encoded == 2 * BLOCK:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match=r"of 13 images are safe .*same command"):
        run(tower, spec, images, out, on_progress=stop)
    assert not out.exists()
    assert store.ActivationFile(store.partial_path(out), partial=True).ok.sum() == 2 * BLOCK
    seen: list[BuildProgress] = []
    assert run(tower, spec, images, out, on_progress=seen.append).reused == 2 * BLOCK
    assert {progress.before for progress in seen} == {2 * BLOCK}
    assert seen[-1].encoded == 13 - 2 * BLOCK
    assert all(progress.done - progress.before <= progress.encoded for progress in seen)
    run(tower, spec, images, tmp_path / "b.h5")
    assert same(out, tmp_path / "b.h5")


@pytest.fixture(scope="module")
def server() -> multiprocessing.context.ForkServerContext:
    return children.server()


def check_partial(out: Path, expected: tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]) -> int:
    """Rows done in what a kill left, each of them proved to be whole."""
    file = store.ActivationFile(store.partial_path(out), partial=True)
    done = np.flatnonzero(file.ok)
    assert np.array_equal(file.activations[done], expected[0][done]), "a row was marked before it was written"
    assert np.array_equal(file.crc32[done], expected[1][done])
    assert np.array_equal(file.header.labels, expected[2])
    return len(done)


@pytest.mark.kill
@pytest.mark.timeout(600)
def test_killed_at_thirty_random_moments_the_file_is_the_same(
    server: multiprocessing.context.ForkServerContext, phantoms: Path, spec: CacheSpec, tmp_path: Path
) -> None:
    """A moment is the middle of one of the steps that change a file, each as likely: how fast or how evenly the machine
    runs decides neither how many states the kills fall on nor whether the test ends."""
    reference, out = tmp_path / "reference.h5", tmp_path / "a.h5"

    def ran(path: Path, step: int) -> tuple[int | None, int]:
        """A writer's exit code, killed in the middle of that step, and how many steps it took where it was not."""
        told, sender = server.Pipe(duplex=False)
        arguments = (str(phantoms), str(path), spec, BLOCK, step, sender)
        process = server.Process(target=children.encode_all, args=arguments)
        process.start()
        sender.close()
        process.join()
        return process.exitcode, told.recv() if process.exitcode == 0 else 0

    code, steps = ran(reference, 0)
    assert code == 0
    expected = rows_of(reference)
    moments, kills, seen = random.Random(0), 0, set()
    while kills < 30:
        # Every other one within a few blocks, so that they add up to a file that many have written.
        code, _ = ran(out, moments.randint(1, steps // 6 if kills % 2 else steps))
        assert code in (0, -signal.SIGKILL), "a writer failed by itself"
        kills += code != 0
        if store.partial_path(out).exists():
            seen.add(check_partial(out, expected))
        if out.exists():
            assert all(np.array_equal(a, b) for a, b in zip(rows_of(out), expected, strict=True))
            out.unlink()
    assert ran(out, 0)[0] == 0
    assert all(np.array_equal(a, b) for a, b in zip(rows_of(out), expected, strict=True))
    assert len(seen) >= 4, f"the kills fell on too few states to mean anything: {seen}"
    assert sorted(path.name for path in tmp_path.glob("a.h5*")) == ["a.h5"]


def test_a_failing_image_hash_is_recorded(tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path) -> None:
    name = sorted(path.name for path in images.glob("*.png"))[2]
    Image.new("L", (3, 3)).save(images / name, "GIF")
    run(tower, spec, images, tmp_path / "a.h5")
    file = store.ActivationFile(tmp_path / "a.h5")
    assert len(file.sha256[2]) == 64
    assert file.errors[2].startswith("not_an_image")


def test_an_image_that_cannot_be_read_now_keeps_its_row(
    tower: Backbone, spec: CacheSpec, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tower, spec, images, tmp_path / "a.h5")
    before = (tmp_path / "a.h5").read_bytes()
    monkeypatch.setattr(reuse, "hash_image", lambda path: "")
    assert run(tower, spec, images, tmp_path / "a.h5").reused == 13
    assert (tmp_path / "a.h5").read_bytes() == before
