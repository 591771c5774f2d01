"""Caching beside its parts and the plain pipeline's pass, on a 64-wide tower."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cxr_fast.activations import build, encoder, file
from cxr_fast.bench import caching
from cxr_fast.bench.measure import median, spread
from cxr_fast.bench.results import RATIOS
from cxr_fast.cli.main import main
from cxr_fast.config import CacheSpec
from cxr_fast.data.manifest import read_dataset
from cxr_fast.errors import InputError
from cxr_fast.models import backbone
from cxr_fast.system import hardware


@pytest.fixture
def parts(toy_data: Path, lively_weights: Path, tmp_path: Path) -> caching.Parts:
    return made(toy_data, lively_weights, tmp_path)


def made(data: Path, weights: Path, folder: Path, **changes: Any) -> caching.Parts:
    torch.set_num_threads(1)
    tower = backbone.load(str(weights))
    spec = encoder.with_size(CacheSpec(weights=str(weights), **changes), tower)
    manifest, _ = caching.few(read_dataset(data), 10, spec.preprocess)
    return caching.Parts(tower, spec, manifest, folder, "cpu")


def test_images_are_spread_and_broken_ones_counted(toy_data: Path) -> None:
    manifest, spec = read_dataset(toy_data), CacheSpec().preprocess
    found, left_out = caching.few(manifest, 1000, spec)
    assert (len(found), left_out) == (len(manifest) - 1, 1)
    some, _ = caching.few(manifest, 10, spec)
    assert some.images[0] == manifest.images[0]
    assert some.images[-1] == manifest.images[-1]
    assert len(some) == 10
    at = [manifest.images.index(image) for image in some.images]
    assert (some.labels == manifest.labels[at]).all()
    assert some.groups == tuple(manifest.groups[i] for i in at)


def test_nothing_readable_is_refused(toy_data: Path, tmp_path: Path) -> None:
    manifest = read_dataset(toy_data)
    gone = replace(manifest, root=tmp_path)
    with pytest.raises(InputError, match=r"none of 5 images of .* can be read"):
        caching.few(gone, 5, CacheSpec().preprocess)


@pytest.mark.parametrize("changes", [{}, {"unfreeze_blocks": 0}, {"dtype": "float32", "views": ("plain",)}])
def test_fast_and_slow_agree(toy_data: Path, lively_weights: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    found = made(toy_data, lively_weights, tmp_path, **changes).compare()
    assert found["largest_embedding_difference"] < caching.TOLERANCE[changes.get("dtype", "float16")]
    assert found["largest_pixel_difference"] == 0


def test_tokens_of_another_tower_are_refused(parts: caching.Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = encoder.Encoder(backbone.load("random:1:test_vit"), parts.spec, parts.device, block=8)
    monkeypatch.setattr(parts, "encoder", wrong)
    monkeypatch.setattr(build, "Encoder", lambda *_, **__: wrong)
    with pytest.raises(InputError, match="cached tokens and the whole tower differ"):
        caching.measure(parts, 1)


def test_a_row_that_is_not_what_its_parts_give_stops_it(parts: caching.Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = parts.forward
    monkeypatch.setattr(parts, "forward", lambda: [rows + np.float16(1) for rows in forward()])
    with pytest.raises(AssertionError, match="not what its parts give"):
        parts.compare()


def test_other_pixels_are_said(parts: caching.Parts) -> None:
    assert caching.pixels_apart(parts.films, np.stack(parts.pixels) ^ 3) == 3


def test_every_part_is_timed_in_every_round(parts: caching.Parts, tmp_path: Path) -> None:
    seen: list[int] = []
    found = caching.measure(parts, 2, workers=0, on_round=seen.append)
    assert seen == [0, 1, 2]
    assert set(found["samples"]) == {"decode", "forward", "whole", "plain", "bound"}
    assert all(len(values) == 2 and min(values) > 0 for values in found["samples"].values())
    assert found["seconds_per_image"]["whole"] == spread(found["samples"]["whole"])
    assert found["extrapolated"]["whole"] == 7466 * median(found["samples"]["whole"])
    assert json.loads(json.dumps(found), parse_constant=pytest.fail)["images"] == 10
    assert len(list(tmp_path.glob("*.h5"))) == 1, "a file a round would fill the disk"
    assert file.ActivationFile(next(tmp_path.glob("*.h5"))).ok.all()
    text = caching.describe({**found, "seconds_per_image": found["seconds_per_image"] | {"whole": spread([0.4])}})
    assert "EXTRAPOLATED: 7,466 images x 400.0 ms = 49 min 46 s with 2 view(s), once" in text
    assert "10 images of 160 x 160 pixels, 2 view(s)" in text
    older = {key: value for key, value in found.items() if key != "image_size"}
    assert "10 images, 2 view(s)" in caching.describe(older)
    assert RATIOS in text
    assert "NOISY" not in caching.describe({**found, "noise": {"share": 0.0, "noisy": False}})
    assert "2 image(s) cannot be read" in caching.describe(found | {"left_out": 2})


def test_the_plain_pass_reads_every_film_and_runs_the_whole_tower(
    parts: caching.Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    monkeypatch.setattr(parts.tower.visual, "forward", lambda x: (counts.append(len(x)), torch.zeros(len(x), 4))[1])
    parts.plain(workers=0)
    assert sum(counts) == 10


def test_the_command(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lively_weights: Path) -> None:
    monkeypatch.setattr(hardware, "cpu_count", lambda *_: 1)
    monkeypatch.setattr(caching.Parts.plain, "__defaults__", (0,))
    monkeypatch.setattr(caching.measure, "__kwdefaults__", {"workers": 0, "on_round": None})
    shutil.copytree(toy_data, tmp_path / "data")
    command = ["bench", "cache", str(tmp_path / "data"), "--weights", str(lively_weights), "--count", "80"]
    done = CliRunner().invoke(main, [*command, "--rounds", "1", "--device", "cpu", "--json", str(tmp_path / "c.json")])
    assert done.exit_code == 0, done.output
    assert "Indiana, EXTRAPOLATED: 7,466 images x " in done.output
    assert "1 image(s) cannot be read and were left out" in done.output
    assert json.loads((tmp_path / "c.json").read_text())["views"] == "plain,flip"
