"""A heat map is the class token's attention times its gradient: against timm's own attention, and by differences."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from cxr_fast.activations import build
from cxr_fast.activations.encoder import normalise, with_size
from cxr_fast.activations.job import CacheJob
from cxr_fast.cli.main import main
from cxr_fast.config import CacheSpec, PreprocessSpec, SweepOptions, SweepSpec, TrainSpec, from_dict
from cxr_fast.data.images import load
from cxr_fast.errors import ImageError, InputError
from cxr_fast.export import parity
from cxr_fast.export.heatmaps import attention, explain, from_attention, relevance, shares
from cxr_fast.inference.predictor import Predictor
from cxr_fast.metrics import calibration as calibrate
from cxr_fast.models import backbone
from cxr_fast.models.backbone import embed
from cxr_fast.training.run_folder import Member, Run, read_run
from cxr_fast.training.sweep import SweepJob
from tests.helpers.towers import MAPPED, TOKEN, run_of, tower

CLASSES = [0, 7, 34]


@pytest.fixture(scope="module")
def run(toy_run: Path) -> Run:
    return read_run(toy_run)


@pytest.fixture(scope="module")
def film(toy_data: Path) -> Path:
    return sorted((toy_data / "images").iterdir())[0]


def pixels(run: Run, film: Path) -> torch.Tensor:
    """One image as the tower takes it, (1, 3, S, S)."""
    mean, std = (torch.tensor(run.info[k]).reshape(1, 3, 1, 1) for k in ("mean", "std"))
    grey, *_ = load(film, from_dict(PreprocessSpec, run.info["preprocess"]))
    return normalise(torch.from_numpy(grey[None]), mean, std)


# ---------------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize("which", ["toy_run", "toy_run_average"])
def test_a_block_with_its_attention_in_the_open_is_timms_block(
    which: str, film: Path, request: pytest.FixtureRequest
) -> None:
    """Layer scale and registers are in the second tower."""
    run = read_run(request.getfixturevalue(which))
    with torch.no_grad():
        tokens = embed(run.visual, pixels(run, film))
        for block in run.visual.trunk.blocks:
            a, v = attention(block, tokens)
            torch.testing.assert_close(a.sum(dim=-1), torch.ones(a.shape[:3]), atol=1e-5, rtol=0)
            expected = block(tokens)
            torch.testing.assert_close(from_attention(block, tokens, a, v), expected, atol=1e-5, rtol=1e-5)
            tokens = expected


def by_timm(member: Member, x: torch.Tensor, classes: list[int]) -> np.ndarray:
    """The same maps through open_clip's whole tower: timm's unfused attention, its probabilities caught on the way."""
    visual, caught = copy.deepcopy(member.visual), []
    visual.requires_grad_(True)
    attn = visual.trunk.blocks[-1].attn
    attn.fused_attn = False
    attn.attn_drop.register_forward_hook(lambda *call: caught.append(call[2]))
    logits = member.head(torch.nn.functional.normalize(visual(x), dim=-1))[0]
    np.testing.assert_allclose(logits.detach().numpy(), member.logits(x)[0].numpy(), atol=1e-5)
    (a,) = caught
    out = []
    for c in classes:
        (slope,) = torch.autograd.grad(logits[c], a, retain_graph=True)
        heads = [np.maximum((a * slope)[0, h, 0, 1:].detach().numpy(), 0) for h in range(a.shape[1])]
        out.append(np.mean(heads, axis=0).reshape(visual.trunk.patch_embed.grid_size))
    return np.stack(out)


def test_the_map_is_that_of_timms_own_attention(run: Run, film: Path) -> None:
    x = pixels(run, film)
    found, expected = relevance(run.members[0], x, CLASSES), by_timm(run.members[0], x, CLASSES)
    assert found.shape == (3, 10, 10)
    assert (found >= 0).all()
    assert expected.max() > 1e-4
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.max(), rtol=0)


@pytest.mark.parametrize("kind", [*TOKEN, *MAPPED])
def test_the_map_of_every_kind_of_tower_is_that_of_timms_own_attention(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm's unfused softmax of the class token's last block, or of attention pooling, caught on the way."""
    (member,) = run_of(tower(kind)).members
    x = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    found = relevance(member, x, [0, 3])
    assert found.shape == (2, 5, 5)
    assert member.visual.trunk.blocks[-1].attn.fused_attn
    visual, caught = copy.deepcopy(member.visual).requires_grad_(True), list[torch.Tensor]()
    (visual.trunk.attn_pool or visual.trunk.blocks[-1].attn).fused_attn = False
    softmax = torch.Tensor.softmax

    def keep(scores: torch.Tensor, dim: int) -> torch.Tensor:
        caught.append(softmax(scores, dim))
        return caught[-1]

    monkeypatch.setattr(torch.Tensor, "softmax", keep)
    logits = member.head(torch.nn.functional.normalize(visual(x), dim=-1))[0]
    (a,) = caught
    for i, c in enumerate([0, 3]):
        (slope,) = torch.autograd.grad(logits[c], a, retain_graph=True)
        expected = (a * slope)[0, :, 0, -25:].clamp(min=0).mean(0).detach().reshape(5, 5).numpy()
        assert expected.max() > 1e-5
        np.testing.assert_allclose(found[i], expected, atol=1e-4 * expected.max(), rtol=0)


def test_the_gradient_is_the_logits_change_by_differences(run: Run, film: Path) -> None:
    """Every probability of the class token's attention moved up and down, in float64, and the logit read again."""
    member, x = run.members[0], pixels(run, film)
    visual, head = copy.deepcopy(member.visual).double(), copy.deepcopy(member.head).double()
    trunk, step = visual.trunk, 1e-5
    with torch.no_grad():
        tokens = embed(visual, x.double())
        for block in trunk.blocks[:-1]:
            tokens = block(tokens)
        a, v = attention(trunk.blocks[-1], tokens)

        def logit(changed: torch.Tensor, c: int) -> float:
            out = from_attention(trunk.blocks[-1], tokens, changed, v)
            embedding = visual.head(trunk.forward_head(trunk.norm(out)))
            return float(head(torch.nn.functional.normalize(embedding, dim=-1))[0, c])

        expected = np.zeros((a.shape[1], 100))
        for h in range(a.shape[1]):
            for j in range(100):
                up, down = a.clone(), a.clone()
                up[0, h, 0, 1 + j] += step
                down[0, h, 0, 1 + j] -= step
                expected[h, j] = float(a[0, h, 0, 1 + j]) * (logit(up, 7) - logit(down, 7)) / (2 * step)
    assert (expected < 0).any(), "nothing to clamp"
    assert (expected > 0).any()
    slow = np.maximum(expected, 0).mean(axis=0).reshape(10, 10)
    np.testing.assert_allclose(relevance(member, x, [7])[0], slow, atol=1e-3 * slow.max(), rtol=0)


def test_maps_leave_nothing_behind(run: Run, film: Path) -> None:
    """No gradient is kept, and a second call gives the same."""
    x = pixels(run, film)
    first = relevance(run.members[0], x, CLASSES)
    np.testing.assert_array_equal(relevance(run.members[0], x, CLASSES), first)
    np.testing.assert_array_equal(relevance(run.members[0], x, CLASSES[::-1]), first[::-1])
    assert all(p.grad is None and not p.requires_grad for p in run.visual.parameters())
    assert not x.requires_grad


def test_shares_sum_to_one_and_an_empty_map_stays_empty() -> None:
    maps = np.stack([np.full((2, 3), 4.0), np.zeros((2, 3))]).astype(np.float32)
    np.testing.assert_array_equal(shares(maps), [np.full((2, 3), np.float32(1 / 6)), np.zeros((2, 3))])


# ---------------------------------------------------------------------------------------------- the answer


def test_probabilities_and_thresholds_are_the_model_files(run: Run, film: Path, toy_model: Path) -> None:
    found = explain(run, film, top=35)
    predictor = Predictor(toy_model, device="cpu", threads=1)
    expected = predictor([film])[0]
    limits = dict(zip(predictor.labels, predictor.thresholds, strict=True))
    assert {each.name for each in found.maps} == set(expected)
    for each in found.maps:
        assert each.probability == pytest.approx(expected[each.name], abs=1e-5)
        assert each.threshold == limits[each.name]
        assert each.shares.sum() == pytest.approx(1, abs=1e-5)
    margins = [each.probability - each.threshold for each in found.maps]
    assert margins == sorted(margins, reverse=True)
    assert [each.name for each in explain(run, film).maps] == [each.name for each in found.maps[:3]]


@pytest.mark.parametrize("kind", ["platt", "isotonic"])
def test_probabilities_are_calibrated_and_order_the_classes(run: Run, film: Path, kind: str) -> None:
    count = len(run.info["classes"])
    maps: dict[str, Any] = {"platt": {"a": [0.5] * count, "b": list(np.linspace(-2, 2, count))}}
    maps["isotonic"] = {"x": [[0.0, 1.0]] * count, "y": [[0.1 * (c % 7), 0.95] for c in range(count)]}
    calibration = {"kind": kind, "fitted": count, **maps[kind]}
    changed = dataclasses.replace(run, info={**run.info, "calibration": calibration})
    grey, *_ = load(film, from_dict(PreprocessSpec, run.info["preprocess"]))
    expected = calibrate.apply(calibration, parity.torch_probabilities(run, grey[None]))[0]
    found = explain(changed, film)
    best = np.argsort(-(expected - np.array(run.info["thresholds"])), kind="stable")[:3]
    assert [each.name for each in found.maps] == [run.info["classes"][c] for c in best]
    np.testing.assert_allclose([each.probability for each in found.maps], expected[best], atol=1e-6)


def test_named_classes_come_in_the_order_asked_for_and_once(run: Run, film: Path) -> None:
    first, second = run.info["classes"][20], run.info["classes"][3]
    found = explain(run, film, classes=[first, second, first])
    assert [each.name for each in found.maps] == [first, second]
    both = shares(relevance(run.members[0], pixels(run, film), [20, 3]))
    np.testing.assert_allclose([each.shares for each in found.maps], both, atol=1e-7)
    assert np.abs(both[0] - both[1]).max() > 1e-3, "every class has the same map: the comparison shows nothing"


def test_an_ensembles_map_is_the_mean_of_its_members_shares(run: Run, film: Path) -> None:
    """A member whose logits are ten times as steep counts no more than another."""
    one, steep, other = run.members[0], copy.deepcopy(run.members[0]), copy.deepcopy(run.members[0])
    steep.head[-1].weight.mul_(10)
    other.head[-1].weight.neg_()
    maps = [shares(relevance(member, pixels(run, film), [7]))[0] for member in (one, steep, other)]
    np.testing.assert_allclose(maps[1], maps[0], atol=1e-6)
    assert np.abs(maps[2] - maps[0]).max() > 1e-3
    together = dataclasses.replace(run, members=(one, steep, other))
    found = explain(together, film, classes=[run.info["classes"][7]])
    assert found.members == 3
    np.testing.assert_allclose(found.maps[0].shares, np.mean(maps, axis=0), atol=1e-7)
    probs = [float(m.logits(pixels(run, film)).sigmoid()[0, 7]) for m in together.members]
    assert found.maps[0].probability == pytest.approx(np.mean(probs), abs=1e-6)


def test_a_run_with_a_head_alone_is_explained(toy_data: Path, lively_weights: Path, film: Path, tmp_path: Path) -> None:
    from cxr_fast.data import manifest

    tower = backbone.load(str(lively_weights))
    spec = with_size(CacheSpec(weights=str(lively_weights), unfreeze_blocks=0), tower)
    build.run(
        CacheJob(
            manifest=manifest.read_dataset(toy_data),
            backbone=tower,
            spec=spec,
            out=tmp_path / "c.h5",
            device="cpu",
            workers=1,
        )
    )
    sweep = SweepSpec(epochs=(2,), folds=2, final="ensemble", train=TrainSpec(lr=1e-3, batch_size=4))
    SweepJob(tmp_path / "c.h5", tmp_path / "run", sweep, SweepOptions(device="cpu")).run()
    run = read_run(tmp_path / "run")
    assert len(run.members) == 2
    expected = np.mean([shares(by_timm(m, pixels(run, film), [7])) for m in run.members], axis=0)
    found = explain(run, film, classes=[run.info["classes"][7]])
    np.testing.assert_allclose(found.maps[0].shares, expected[0], atol=1e-5)


def test_the_picture_says_whose_attention_it_is(run: Run, film: Path) -> None:
    mapped = run_of(tower("attention_pool"))
    info = {**run.info, **mapped.info, "preprocess": {**run.info["preprocess"], "size": 40}, "thresholds": [0.5] * 5}
    found = explain(dataclasses.replace(mapped, info=info), film, top=1)
    assert "attention pooling" in found.query
    assert "class token" in explain(run, film, top=1).query


def test_a_tower_that_averages_is_refused(toy_run_average: Path, film: Path) -> None:
    with pytest.raises(InputError, match="averages its patches") as caught:
        explain(read_run(toy_run_average), film)
    assert "\n" not in str(caught.value)


def test_the_film_is_the_whole_one_and_upright(run: Run, tmp_path: Path) -> None:
    tall = Image.fromarray(np.tile(np.linspace(0, 255, 90).astype(np.uint8), (200, 1)))
    exif = Image.Exif()
    exif[0x0112] = 6
    tall.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    found = explain(run, tmp_path / "turned.jpg")
    assert found.grey.shape == (90, 200)
    assert found.grey[0].mean() < 10 < 245 < found.grey[-1].mean()


# --------------------------------------------------------------------------------------------- the command


def cxr(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["explain", *map(str, arguments)])


def test_the_command_writes_the_picture_and_the_maps(run: Run, film: Path, tmp_path: Path) -> None:
    names = run.info["classes"][4], run.info["classes"][9]
    out, npy = tmp_path / "new" / "o.png", tmp_path / "m.npy"
    asked = [word for name in names for word in ("--class", name)]
    result = cxr(run.folder, film, "--out", out, "--npy", npy, *asked)
    assert result.exit_code == 0, result.output
    found = explain(run, film, classes=names)
    maps = np.load(npy)
    assert maps.dtype == np.float32
    np.testing.assert_array_equal(maps, np.stack([each.shares for each in found.maps]))
    with Image.open(out) as image:
        assert image.format == "PNG"
    assert [row.split("  ")[0] for row in result.stdout.splitlines()[2:4]] == list(names)
    assert f"{found.maps[0].probability:.4f}" in result.stdout
    assert f"wrote {out} and {npy}" in result.stdout
    assert "Research use only" in result.stdout
    assert "PHANTOM IMAGES" in result.stderr
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["m.npy", "o.png"]


def test_a_mistake_is_one_line_and_writes_nothing(run: Run, film: Path, toy_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.png"
    broken = sorted((toy_data / "images").iterdir())[3]
    (tmp_path / "folder.png").mkdir()
    for arguments, said in [
        ((run.folder, film, "--class", "cardiomegly"), "did you mean Cardiomegaly?"),
        ((run.folder, film, "--class", "qqqq"), "its classes: Airspace"),
        ((run.folder, broken), "truncated"),
        ((run.folder, tmp_path / "gone.png"), "no such file"),
        ((run.folder, toy_data), "not a plain file"),
        ((tmp_path, film), "not a run folder"),
        ((run.folder, film, "--top", 2, "--class", "Edema"), "--top"),
        ((run.folder, film, "--out", tmp_path / "o.jpg"), "--out"),
        ((run.folder, film, "--out", tmp_path / "folder.png"), "--out"),
        ((run.folder, film, "--npy", run.folder / "run.json"), "--npy"),
        ((run.folder, film, "--out", film), "image itself"),
    ]:
        result = cxr(*arguments, *([] if "--out" in arguments else ["--out", out]))
        assert result.exit_code == 2, (arguments, result.output)
        assert said in result.stderr
        assert len(result.stderr.splitlines()) <= 2
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


def test_an_unwritable_place_is_said(run: Run, film: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = cxr(run.folder, film, "--out", tmp_path / "file" / "o.png")
    assert result.exit_code == 2
    assert "cannot write" in result.stderr


def test_a_broken_image_is_an_image_error(run: Run, toy_data: Path) -> None:
    with pytest.raises(ImageError) as caught:
        explain(run, sorted((toy_data / "images").iterdir())[3])
    assert caught.value.reason == "truncated"


def test_a_real_radiograph_is_explained(run: Run, real_data: Path, tmp_path: Path) -> None:
    films = [sorted((real_data / "full_size").glob("*.png"))[0], real_data / "dicom" / "monochrome1.dcm"]
    for film in films:
        result = cxr(run.folder, film, "--out", tmp_path / "o.png")
        assert result.exit_code == 0, result.output
        with Image.open(tmp_path / "o.png") as image:
            assert max(image.size) <= 4 * 1024 + 200


def test_several_films_become_a_folder_and_a_broken_one_is_said(run: Run, toy_data: Path, tmp_path: Path) -> None:
    films = sorted((toy_data / "images").iterdir())
    again = tmp_path / films[0].name
    again.write_bytes(films[0].read_bytes())
    result = cxr(run.folder, films[0], films[3], again, "--out", tmp_path / "maps", "--style", "contour", "--top", 1)
    assert result.exit_code == 1, result.output
    stem = films[0].stem
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == [f"{stem}-2.png", f"{stem}.png"]
    assert (tmp_path / "maps" / f"{stem}.png").read_bytes() == (tmp_path / "maps" / f"{stem}-2.png").read_bytes()
    assert "truncated" in result.stderr
    assert "1 of 3 films could not be read" in result.stderr
    found = explain(run, films[0], top=1)
    assert f"{stem}.png: {found.maps[0].name} {found.maps[0].probability:.4f}" in result.stdout


def test_it_says_whose_probabilities_these_are(run: Run, film: Path, tmp_path: Path) -> None:
    result = cxr(run.folder, film, "--out", tmp_path / "o.svg", "--top", 1)
    assert result.exit_code == 0, result.output
    assert "the best fold's model, in float32 by torch, not calibrated" in " ".join(result.stdout.split())
    assert "<text" in (tmp_path / "o.svg").read_text()
    ensemble = dataclasses.replace(run, members=run.members * 3, info={**run.info, "final": {"kind": "ensemble"}})
    assert "the mean of 3 folds' models" in explain(ensemble, film, top=1).source


def test_flags_that_do_not_go_together_are_refused(run: Run, film: Path, tmp_path: Path) -> None:
    for arguments, said in [
        ((film, "--out", tmp_path / "o.png", "--share", 0.4), "--share is of --style contour"),
        ((film, "--out", tmp_path / "o.png", "--style", "side", "--opacity", 0.4), "--opacity is of --style overlay"),
        ((film, film, "--out", tmp_path / "o", "--npy", tmp_path / "m.npy"), "--npy takes one film"),
        ((film, film, "--out", tmp_path / "o.png"), "of 2 films give a folder"),
    ]:
        result = cxr(run.folder, *arguments)
        assert result.exit_code == 2, result.output
        assert said in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []
