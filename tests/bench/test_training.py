"""An epoch from the cache beside the plain way: they train alike before they are timed, and the sums are right."""

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

from cxr_fast.bench import results, training
from cxr_fast.bench.measure import median, spread
from cxr_fast.bench.training import DECODED, EPOCHS, PLAIN, Arms, TrainingImages
from cxr_fast.cli.main import main
from cxr_fast.errors import InputError, SchemaError
from cxr_fast.system import hardware


@pytest.fixture(scope="module")
def material(toy_cache: Path) -> TrainingImages:
    torch.set_num_threads(1)
    return training.from_cache(toy_cache, count=20)


@pytest.fixture(scope="module")
def result(material: TrainingImages) -> dict[str, Any]:
    return training.measure(Arms(material, workers=0), 2)


def test_whole_steps_of_spread_images_are_taken(material: TrainingImages, toy_cache: Path) -> None:
    assert len(material.paths) == len(material.pixels) == len(material.activations) == 16
    assert len({path.name for path in material.paths}) == 16
    assert material.classes == 35
    few = training.from_cache(toy_cache, count=5)
    assert len(few.paths) == 5, "fewer than a step"


def test_cached_and_plain_train_alike(result: dict[str, Any]) -> None:
    assert 0 < result["largest_loss_difference"] < 1e-5
    assert 0 < result["largest_token_difference"] < 2**-10, "the tokens are those of the file, float16"
    assert result["largest_pixel_difference"] == 0


def test_other_tokens_are_refused_before_anything_is_timed(material: TrainingImages) -> None:
    wrong = replace(material, activations=material.activations[::-1].copy())
    with pytest.raises(InputError, match=r"cached and plain training differ in their tokens .*cxrfast verify"):
        training.measure(Arms(wrong, workers=0), 1)


def test_another_training_is_refused_before_anything_is_timed(
    material: TrainingImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One matrix of the slow model twice as large."""
    arms = Arms(material, workers=0)
    model = arms._model

    def other(dropout: float) -> Any:
        found = model(dropout)
        with torch.no_grad():
            found.visual.trunk.blocks[-1].mlp.fc2.weight.mul_(2)
        return found

    monkeypatch.setattr(arms, "_model", other)
    with pytest.raises(InputError, match="cached and plain training differ in their losses"):
        arms.compare()


def test_a_head_alone_has_its_baseline_too(toy_data: Path, lively_weights: Path, tmp_path: Path) -> None:
    from cxr_fast.activations import build
    from cxr_fast.activations.encoder import with_size
    from cxr_fast.activations.job import CacheJob
    from cxr_fast.config import CacheSpec
    from cxr_fast.data import manifest
    from cxr_fast.models import backbone

    spec = CacheSpec(weights=str(lively_weights), unfreeze_blocks=0)
    tower = backbone.load(spec.weights)
    build.run(
        CacheJob(
            manifest=manifest.read_dataset(toy_data, limit=24),
            backbone=tower,
            spec=with_size(spec, tower),
            out=tmp_path / "e.h5",
            workers=1,
        )
    )
    found = Arms(training.from_cache(tmp_path / "e.h5", count=16), workers=0)
    assert found.compare()["largest_loss_difference"] < 1e-5
    assert list(found.folds) == ["cached, float32"]
    assert not any(p.requires_grad for p in found.plain.model.visual.parameters())


def test_every_arm_is_timed_in_every_round(result: dict[str, Any]) -> None:
    names = [PLAIN, DECODED, *(name for name in result["samples"] if name.startswith("cached"))]
    assert list(result["samples"]) == names
    assert "cached, float32" in names
    assert result["fastest"] == names[2]
    for name in names:
        assert len(result["samples"][name]) == 2
        assert result["seconds_per_sample"][name] == spread(result["samples"][name])
    both = zip(result["samples"][PLAIN], result["samples"][names[2]], strict=True)
    assert result["ratios"]["whole"]["median"] == median([a / b for a, b in both])
    assert json.loads(json.dumps(result), parse_constant=pytest.fail)["machine"]["cores"] >= 1


def test_a_round_of_ours_is_several_epochs(material: TrainingImages, monkeypatch: pytest.MonkeyPatch) -> None:
    arms, ticks = Arms(material, workers=0), iter([10.0, 10.0 + 16 * EPOCHS])
    seen = []
    fold = next(iter(arms.folds.values()))
    train = fold.train_epoch
    monkeypatch.setattr(fold, "train_epoch", lambda draws: seen.append(len(draws.rows)) or train(draws))
    monkeypatch.setattr(arms, "_sync", lambda: next(ticks))
    assert arms.cached(next(iter(arms.folds))) == 1.0
    assert seen == [16] * EPOCHS
    assert EPOCHS == 4


def test_the_plain_arm_takes_every_film_and_trains_the_blocks(
    material: TrainingImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = Arms(material, workers=0)
    blocks = arms.plain.model.visual.trunk.blocks
    before = [block.attn.qkv.weight.detach().clone() for block in blocks]
    read: list[str] = []
    pixels = type(arms.films).pixels
    monkeypatch.setattr(
        type(arms.films), "pixels", lambda films, i: read.append(films.paths[i].name) or pixels(films, i)
    )
    arms.whole()
    assert sorted(read) == sorted([path.name for path in material.paths] + [p.name for p in material.paths[:4]])
    moved = [not torch.equal(block.attn.qkv.weight, old) for block, old in zip(blocks, before, strict=True)]
    assert moved == [False] * (len(blocks) - 2) + [True] * 2


def test_the_extrapolation_is_the_arithmetic_it_says(result: dict[str, Any]) -> None:
    assert training.search_seconds(0.0287) == pytest.approx(5 * 100 * 4779 * 0.0287)
    # A fifth of 7,466 held out, and of the rest four fifths train while the validation set is a quarter of that.
    assert round(0.8 * 0.8 * 7466) - training.SEARCH_IMAGES in (-1, 0)
    assert training.VALID_SHARE == (1 / training.FOLDS) / (1 - 1 / training.FOLDS)
    fixed = {**result["seconds_per_sample"][result["fastest"]], "median": 0.0287}
    result = {**result, "seconds_per_sample": result["seconds_per_sample"] | {result["fastest"]: fixed}}
    text = training.describe(result)
    assert results.RATIOS in text
    assert "EXTRAPOLATED: 5 folds x 100 epochs x 4,779 training images x 28.70 ms = 19 h 02 min" in text
    assert "345 epochs for 100: its search is 3.45 times what its row says" in text
    for name, value in result["extrapolated"].items():
        assert value == training.search_seconds(median(result["samples"][name]))


def test_images_that_are_gone_or_changed_are_not_trained_on(toy_cache: Path, toy_data: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_data, tmp_path / "data")
    images = sorted((tmp_path / "data" / "images").iterdir())
    for image in images[40:]:
        image.unlink()
    images[0].write_bytes(images[1].read_bytes())
    found = training.from_cache(toy_cache, count=1000, images=tmp_path / "data")
    assert len(found.paths) == 32
    assert images[0] not in found.paths
    with pytest.raises(InputError, match=r"of 79 images 0 are below .*--images"):
        training.from_cache(toy_cache, count=1000, images=tmp_path)


def test_other_weights_are_refused(toy_cache: Path) -> None:
    with pytest.raises(InputError, match="--weights random:7:test_vit: not the weights"):
        training.from_cache(toy_cache, count=4, weights="random:7:test_vit")


def test_random_labels_have_both_signs() -> None:
    labels = training.random_labels(40, 3)
    assert labels.shape == (40, 3)
    assert (labels.max(axis=0) == 1).all()
    assert (labels.min(axis=0) == 0).all()
    assert np.array_equal(labels, training.random_labels(40, 3))


def test_the_command(toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cpu_count", lambda *_: 1)
    monkeypatch.setattr(training.Arms.__init__, "__kwdefaults__", {"workers": 0})
    out = tmp_path / "t.json"
    command = ["bench", "train", str(toy_cache), "--count", "4", "--rounds", "1", "--device", "cpu", "--json", str(out)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "Indiana search, EXTRAPOLATED: 5 folds x 100 epochs x 4,779 training images x " in done.output
    assert "plain, from files over cached, " in done.output
    assert json.loads(out.read_text())["images"] == 4


def test_the_result_is_checked_as_every_benchmarks_is(result: dict[str, Any]) -> None:
    results.check(result, "it")
    assert {"date", "commit", "versions", "gpus"} <= set(result)
    assert {"share", "noisy", "stretches"} <= set(result["noise"])
    arm, values = next(iter(result["samples"].items()))
    assert len(result["window_medians"][arm]) == min(3, len(values))
    for changed_part in ({"samples": {arm: [*values, 1.0]}}, {"window_medians": {}}, {"schema": 99}, {"machine": {}}):
        with pytest.raises((InputError, SchemaError), match="it: "):
            results.check(result | changed_part, "it")
