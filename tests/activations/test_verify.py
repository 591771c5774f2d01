"""What is wrong is shown to be wrong; what could not be looked at is said, and counts neither way."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cxr_fast.activations import build, verify
from cxr_fast.activations import file as store
from cxr_fast.activations.encoder import with_size
from cxr_fast.activations.job import CacheJob
from cxr_fast.activations.verify import ReencodeSpec
from cxr_fast.cli.main import main
from cxr_fast.config import CacheSpec
from cxr_fast.data import manifest
from cxr_fast.errors import InputError
from cxr_fast.models import backbone
from tests.conftest import TOY


@pytest.fixture(scope="module")
def made(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` of twelve phantoms and their cache `a.h5`; do not write into it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "data").mkdir()
    names = sorted(path.name for path in (phantoms / "images").iterdir())[:12]
    for name in names:
        shutil.copy(phantoms / "images" / name, folder / "data" / name)
    rows = "".join(f"{name},p{i},{i % 2}\n" for i, name in enumerate(names))
    (folder / "data" / "manifest.csv").write_text("image,group,Edema\n" + rows)
    tower = backbone.load(TOY)
    spec = with_size(CacheSpec(weights=TOY), tower)
    build.run(
        CacheJob(
            manifest=manifest.read_dataset(folder / "data"),
            backbone=tower,
            spec=spec,
            out=folder / "a.h5",
            device="cpu",
            batch_size=4,
        )
    )
    return folder


@pytest.fixture
def own(made: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A cache and a copy of its images, to be named with --images; free to be changed."""
    shutil.copytree(made / "data", tmp_path / "data")
    return Path(shutil.copy(made / "a.h5", tmp_path / "a.h5")), tmp_path / "data"


def names_of(path: Path) -> tuple[str, ...]:
    return store.ActivationFile(path).header.images


def cxr(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments), "--device", "cpu", "--threads", "1"])


def test_a_good_cache_passes(own: tuple[Path, Path]) -> None:
    path, images = own
    found = verify.check_cache(path, ReencodeSpec(count=12, images=images))
    assert (found.rows, found.failed, found.asked, found.reencoded) == (12, 0, 12, 12)
    assert (found.bad, found.unproven, found.absent) == ((), (), 0)
    assert found.largest <= verify.TOLERANCE
    result = cxr(path, "--reencode", 3, "--images", images)
    assert (result.exit_code, result.stdout.splitlines()[-1], result.stderr) == (0, "PASS", "")


def test_more_than_there_is_means_all(own: tuple[Path, Path]) -> None:
    assert verify.check_cache(own[0], ReencodeSpec(count=99, images=own[1])).asked == 12


def test_rows_of_another_image_are_bad(own: tuple[Path, Path]) -> None:
    path, images = own
    file = store.ActivationFile(path)
    row = np.array(file.activations[8:9])
    del file
    os.replace(path, store.partial_path(path))
    with store.Writer(path) as writer:  # a row that is sound but wrong: checksums cannot tell
        writer.rows([2], row, [writer.sha256[2]], [None])
        writer.finish()
    found = verify.check_cache(path, ReencodeSpec(count=12, images=images))
    assert [image for image, _ in found.bad] == [names_of(path)[2]]
    assert "differs from a fresh encoding" in found.bad[0][1]


@pytest.mark.parametrize("content", ["another film", "nonsense"])
def test_a_row_whose_image_changed_is_bad(own: tuple[Path, Path], content: str) -> None:
    path, images = own
    names = names_of(path)
    (images / names[1]).write_bytes((images / names[0]).read_bytes() if content == "another film" else b"text")
    assert dict(verify.check_cache(path, ReencodeSpec(count=12, images=images)).bad) == {
        names[1]: "the image has changed since; run `cxrfast cache` again"
    }


def test_some_images_gone_others_are_drawn(own: tuple[Path, Path]) -> None:
    path, images = own
    for name in names_of(path)[:5]:
        (images / name).unlink()
    found = verify.check_cache(path, ReencodeSpec(count=7, images=images))
    assert (found.reencoded, found.absent, found.bad) == (7, 0, ())
    found = verify.check_cache(path, ReencodeSpec(count=9, images=images))
    assert (found.asked, found.reencoded, found.absent, found.bad) == (9, 7, 5, ())
    result = cxr(path, "--reencode", 9, "--images", images)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-2:] == [
        "NOT VERIFIED: 2 of the 9 images could not be encoded again: "
        f"5 images are not found (tried {images / names_of(path)[0]}); give their folder with --images",
        "PASS",
    ]


def test_a_folder_that_moved_is_said_and_is_no_bad_row(own: tuple[Path, Path], tmp_path: Path) -> None:
    path, _ = own
    (tmp_path / "empty").mkdir()
    result = cxr(path, "--images", tmp_path / "empty")
    assert result.exit_code == 2
    assert "BAD" not in result.output
    assert "PASS" not in result.output
    assert result.stderr == (
        "error: the rows are sound, but none of 8 could be encoded again: 12 images are not found "
        f"(tried {tmp_path / 'empty' / names_of(path)[0]}); give their folder with --images, or pass --reencode 0.\n"
    )
    result = cxr(path, "--images", tmp_path / "empty", "--reencode", 0)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "PASS")


def test_a_bad_row_is_bad_wherever_the_images_are(own: tuple[Path, Path], tmp_path: Path) -> None:
    path, _ = own
    file = store.ActivationFile(path)
    with open(path, "r+b") as raw:
        raw.seek(file.offset + 9)
        raw.write(b"\x55\xaa")
    result = cxr(path, "--images", tmp_path / "gone")
    assert result.exit_code == 1
    assert f"{names_of(path)[0]}: checksum" in result.stderr
    assert "NOT VERIFIED: 8 of the 8 images could not be encoded again: 11 images are not found" in result.stdout


def test_an_image_that_cannot_be_decoded_here_is_not_proven(
    own: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same bytes, and a decoder's plugin missing on this machine."""
    from cxr_fast.errors import ImageError

    def fails(path: Path, spec: object) -> None:
        raise ImageError("needs_plugin", f"{path}: no plugin")

    monkeypatch.setattr(verify, "load_image", fails)
    found = verify.check_cache(own[0], ReencodeSpec(count=4, images=own[1]))
    assert (found.bad, found.reencoded, len(found.unproven), found.absent) == ((), 0, 4, 0)
    result = cxr(own[0], "--images", own[1])
    assert result.exit_code == 2
    assert "none of 8 could be encoded again" in result.stderr
    assert "needs_plugin" in result.stderr


def test_what_cannot_be_judged_is_refused(own: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="not the weights"):
        verify.check_cache(own[0], ReencodeSpec(count=1, images=own[1], weights="random:5:test_vit"))
    monkeypatch.setattr(verify, "self_check", lambda: "f" * 64)
    with pytest.raises(InputError, match=r"the Pillow here gives other pixels than .*--reencode 0"):
        verify.check_cache(own[0], ReencodeSpec(count=1, images=own[1]))
    assert verify.check_cache(own[0]).bad == ()
