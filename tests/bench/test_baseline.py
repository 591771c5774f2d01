"""The baseline is what it says: the published method, with the last blocks really trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cxr_fast.bench.baseline import Films, Model, Trainer, focal, loader
from cxr_fast.config import PreprocessSpec, TrainSpec
from cxr_fast.data.images import load
from cxr_fast.models import backbone
from cxr_fast.models.tail import Tail

CLASSES = 3


@pytest.fixture(scope="module")
def tower(lively_weights: Path) -> backbone.Backbone:
    return backbone.load(str(lively_weights))


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_the_last_blocks_are_really_trained(tower: backbone.Backbone, blocks: int) -> None:
    model = Model(tower.visual, CLASSES, blocks=blocks, embedding=tower.config["embed_dim"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer, draw = Trainer(model, TrainSpec(lr=1e-3)), torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 160, 160, generator=draw)
    trainer.step(x, torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    last = tuple(f"visual.trunk.blocks.{tower.depth - 1 - i}." for i in range(blocks))
    # A key's bias has no gradient: it shifts every score of a query alike; all other parts of a block move.
    assert moved == {name for name in before if name.startswith(("head.", *last))}
    tail = Tail(tower.visual, unfreeze_blocks=blocks, classes=CLASSES)
    assert sum(p.numel() for p in trainer.parameters) == sum(p.numel() for p in tail.trainable())
    assert all(
        torch.equal(p, q) for p, q in zip(tower.visual.parameters(), model.visual.parameters(), strict=True)
    ) == (blocks == 0), "the tower it was given is left as it was"


def test_its_pixels_are_ours_on_grey_films(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (90, 120), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    films = Films([tmp_path / "a.png"], np.ones((1, 2)), (0.5,) * 3, (0.25,) * 3, size=32, flip=False)
    ours = load(tmp_path / "a.png", PreprocessSpec(size=32))[0]
    assert (films.pixels(0) == ours[..., None]).all()
    x, label = films[0]
    assert torch.allclose(x[1], (torch.from_numpy(ours) / 255 - 0.5) / 0.25)
    assert label.tolist() == [1, 1]


def test_half_its_films_are_mirrored_and_every_one_is_seen(tmp_path: Path) -> None:
    grey = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    for i in range(20):
        Image.fromarray(grey).save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(20)]
    labels = np.arange(20)[:, None]
    torch.manual_seed(0)
    batches = list(loader(Films(paths, labels, (0.0,) * 3, (1.0,) * 3, size=64), 8, workers=0))
    assert sorted(int(v) for _, y in batches for v in y) == list(range(20))
    mirrored = sum(bool(x[0, 0, 0] > x[0, 0, -1]) for batch, _ in batches for x in batch)
    assert 3 < mirrored < 17


def test_what_pillow_does_not_open_our_own_reader_does(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    film = FileDataset(str(tmp_path / "a.dcm"), {}, file_meta=meta, preamble=b"\0" * 128)
    film.Rows = film.Columns = 40
    film.SamplesPerPixel, film.BitsAllocated, film.BitsStored, film.HighBit, film.PixelRepresentation = 1, 8, 8, 7, 0
    film.PhotometricInterpretation = "MONOCHROME2"
    film.PixelData = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8).tobytes()
    film.save_as(tmp_path / "a.dcm")
    films = Films([tmp_path / "a.dcm"], np.ones((1, 1)), (0.5,) * 3, (0.25,) * 3, size=32)
    assert (films.pixels(0) == load(tmp_path / "a.dcm", PreprocessSpec(size=32))[0][..., None]).all()


def test_the_loss_is_focal() -> None:
    """Against the definition, -alpha_t (1 - p_t)^gamma log p_t."""
    logits, target = torch.tensor([[0.3, -1.2]]), torch.tensor([[1.0, 0.0]])
    p = torch.sigmoid(logits)
    p_t, alpha = torch.where(target == 1, p, 1 - p), torch.where(target == 1, 0.25, 0.75)
    expected = (-alpha * (1 - p_t) ** 2 * p_t.log()).mean()
    assert torch.allclose(focal(logits, target, TrainSpec()), expected)
