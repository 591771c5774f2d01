"""`verify`, `export` and `explain` find films that moved, also those of a table with absolute names."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cxr_fast.activations import build, verify
from cxr_fast.activations.encoder import with_size
from cxr_fast.activations.job import CacheJob
from cxr_fast.activations.verify import ReencodeSpec
from cxr_fast.cli.main import main
from cxr_fast.config import CacheSpec
from cxr_fast.data.manifest import read_dataset
from cxr_fast.errors import InputError
from cxr_fast.export import parity
from cxr_fast.models import backbone
from cxr_fast.training.run_folder import read_run
from tests.conftest import TOY
from tests.helpers.runs import arrays


def cxr(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def absolute(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `moved/p/films`, six films, and `a.h5`, which knows them by absolute names that are gone."""
    folder = tmp_path_factory.mktemp("absolute")
    films = folder / "old" / "p" / "films"
    films.mkdir(parents=True)
    for path in sorted((phantoms / "images").iterdir())[:6]:
        shutil.copy(path, films)
    rows = "".join(f"{path},g{k},{k % 2}\n" for k, path in enumerate(sorted(films.iterdir())))
    (folder / "m.csv").write_text("image,group,Edema\n" + rows)
    tower = backbone.load(TOY)
    spec = with_size(CacheSpec(weights=TOY), tower)
    job = CacheJob(
        manifest=read_dataset(folder / "m.csv"), backbone=tower, spec=spec, out=folder / "a.h5", device="cpu"
    )
    build.run(job)
    (folder / "old").rename(folder / "moved")
    return folder


@pytest.mark.parametrize("below", ["moved", "moved/p", "moved/p/films"])
def test_verify_finds_films_of_absolute_names(absolute: Path, below: str) -> None:
    found = verify.check_cache(absolute / "a.h5", ReencodeSpec(count=6, images=absolute / below))
    assert (found.reencoded, found.absent, found.bad) == (6, 0, ())


def test_verify_takes_the_file_with_the_same_bytes(absolute: Path, tmp_path: Path) -> None:
    """Two files may have one name; the longer part of the path is tried first, and is another film here."""
    shutil.copytree(absolute / "moved" / "p" / "films", tmp_path / "films")
    names = sorted(path.name for path in (tmp_path / "films").iterdir())
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        shutil.copy(tmp_path / "films" / other, tmp_path / name)
    found = verify.check_cache(absolute / "a.h5", ReencodeSpec(count=6, images=tmp_path))
    assert (found.reencoded, found.bad) == (6, ())


def test_verify_says_where_it_looked(absolute: Path, tmp_path: Path) -> None:
    result = cxr("verify", absolute / "a.h5", "--images", tmp_path, "--reencode", 2, "--device", "cpu")
    assert result.exit_code == 2
    name = min(path.name for path in (absolute / "moved" / "p" / "films").iterdir())
    assert "6 images are not found (tried " in result.stderr
    assert f"and {len((absolute / 'old' / 'p' / 'films' / name).parts) - 4} more" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def run(toy_run: Path, toy_data: Path, tmp_path: Path) -> Path:
    """A run whose table has absolute names below a folder that is gone, and its films in `films`."""
    folder = tmp_path / "run"
    shutil.copytree(toy_run, folder, ignore=shutil.ignore_patterns("*.png", "*.svg", "*.pdf", "*.html"))
    saved = arrays(toy_run)
    saved["image"] = np.array([f"/gone/set/{name}" for name in saved["image"]])
    np.savez_compressed(folder / "predictions.npz", **saved)  # type: ignore[arg-type]
    (tmp_path / "films").symlink_to(toy_data)
    return folder


def test_export_checks_itself_on_films_of_absolute_names(run: Path, toy_data: Path) -> None:
    read = read_run(run)
    with pytest.raises(InputError, match=r"none of the 79 is readable .*tried /gone/set/.*--images DIR"):
        parity.check_images(read, None)
    with pytest.raises(InputError, match=r"tried .*/models/gone/set/images/\S+\.png, .*--images DIR"):
        parity.check_images(read, run / "models")
    for images in (run.parent / "films", toy_data / "images"):
        assert len(parity.check_images(read, images, most=4)[1]) == 4


def test_explain_takes_a_name_of_the_table(run: Path, toy_data: Path, tmp_path: Path) -> None:
    name = str(arrays(run)["image"][0])
    out = tmp_path / "h.png"
    result = cxr("explain", run, name, "--out", out, "--top", 1, "--images", toy_data)
    assert result.exit_code == 0, result.output
    assert out.is_file()
    result = cxr("explain", run, name, "--out", tmp_path / "i.png")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert f"{name}: no such file (tried {name}); give the folder of the films with --images" in result.stderr


def test_a_cache_that_was_cut_short_says_what_mends_it(absolute: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.h5"
    cut.write_bytes((absolute / "a.h5").read_bytes()[:5000])
    for words in (["verify", cut], ["sweep", cut], ["info", cut]):
        result = cxr(*words)
        assert result.exit_code == 2, words
        assert "copy it again, or remove it and run `cxrfast cache` again" in result.stderr
    (tmp_path / "text.h5").write_text("no cache")
    assert "remove it" not in cxr("info", tmp_path / "text.h5").stderr
