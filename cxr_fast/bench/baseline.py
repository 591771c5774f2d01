"""The published pipeline's method in our own words: every image decoded and passed through the whole model every epoch.

Unlike the published code it really trains the last two blocks. The baseline row of every benchmark of training; nothing
here is fast, and nothing is slower than the method asks for.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..config import PreprocessSpec, TrainSpec
from ..data.images import load
from ..models.tail import HEAD_WIDTHS


class Films(Dataset):
    """Image files and labels (N, C): decoded to RGB, resized, flipped at random, normalised, one at a time.

    Always squashed to (size, size). What Pillow does not open (DICOM) our own `load` reads, in the baseline's favour.
    """

    def __init__(
        self, paths: list[Path], labels: np.ndarray, mean: Any, std: Any, *, size: int = 224, flip: bool = True
    ) -> None:
        self.paths, self.labels, self.flip = paths, torch.from_numpy(labels.astype(np.float32)), flip
        self.size = size
        self.mean, self.std = (torch.tensor(v).reshape(3, 1, 1) for v in (mean, std))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.from_numpy(self.pixels(i)).permute(2, 0, 1).float().div(255)
        if self.flip and torch.rand(()) < 0.5:
            x = x.flip(-1)
        return (x - self.mean) / self.std, self.labels[i]

    def pixels(self, i: int) -> np.ndarray:
        """One image as uint8 RGB (size, size, 3)."""
        try:
            with Image.open(self.paths[i]) as image:
                return np.array(image.convert("RGB").resize((self.size,) * 2, Image.Resampling.BICUBIC))
        except UnidentifiedImageError:
            return np.repeat(load(self.paths[i], PreprocessSpec(size=self.size))[0][..., None], 3, axis=2)


class Model(nn.Module):
    """open_clip's vision tower, its last blocks trainable, and the MLP head E-512-256-C."""

    def __init__(
        self, visual: Any, classes: int, *, dropout: float = 0.5, blocks: int = 2, embedding: int = 512
    ) -> None:
        super().__init__()
        self.visual = copy.deepcopy(visual).requires_grad_(False)
        for block in self.visual.trunk.blocks[len(self.visual.trunk.blocks) - blocks :]:
            block.requires_grad_(True)
        layers: list[nn.Module] = []
        width = embedding
        for hidden in HEAD_WIDTHS:
            layers += [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(dropout)]
            width = hidden
        self.head = nn.Sequential(*layers, nn.Linear(width, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) to logits (B, C)."""
        out: torch.Tensor = self.head(F.normalize(self.visual(x), dim=-1))
        return out


def focal(logits: torch.Tensor, target: torch.Tensor, spec: TrainSpec) -> torch.Tensor:
    """Focal loss over all entries (Lin et al. 2017)."""
    cross = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    p = torch.exp(-cross)
    alpha = spec.focal_alpha * target + (1 - spec.focal_alpha) * (1 - target)
    return (alpha * (1 - p) ** spec.focal_gamma * cross).mean()


class Trainer:
    """AdamW on the trainable parameters, a batch at a time."""

    def __init__(self, model: Model, spec: TrainSpec) -> None:
        self.model, self.spec = model, spec
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=spec.lr, weight_decay=spec.weight_decay)

    def step(self, x: torch.Tensor, target: torch.Tensor) -> float:
        """One optimiser step; the loss."""
        self.model.train()
        loss = focal(self.model(x), target, self.spec)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.spec.clip_norm)
        self.optimizer.step()
        return float(loss.detach())

    def score(self, x: torch.Tensor) -> torch.Tensor:
        """Logits in evaluation mode."""
        self.model.eval()
        with torch.inference_mode():
            out: torch.Tensor = self.model(x)
        return out


def loader(films: Films, batch_size: int, *, workers: int = 2, shuffle: bool = True) -> DataLoader:
    """Batches from worker processes, as the published pipeline loads them."""
    return DataLoader(films, batch_size=batch_size, shuffle=shuffle, num_workers=workers)
