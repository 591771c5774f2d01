"""A run's final model as an `nn.Module`: uint8 pixels in, logits out, as the exported file computes them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ...activations.encoder import normalise
from ...metrics.calibration import EDGE
from ...models.tail import Dropout


class TowerAndHead(Protocol):
    """A tower and its head, as `run_folder.Member` holds them."""

    @property
    def visual(self) -> Any:
        """The tower."""
        ...

    @property
    def head(self) -> Any:
        """The head."""
        ...


class PixelModel(nn.Module):
    """pixels (N, S, S) uint8 to logits (N, C) float32; the sigmoid of these are the probabilities before calibration.

    `classes` names the outputs, `image_size` is S. Several members (an ensemble), and both views where the run was
    scored on both, are averaged as probabilities, whose logits these are. All parameters want a gradient; members share
    the tensors of the frozen part, and all modules made from one `Run` share its towers. Made by
    `read_run(RUN).module()`, in evaluation mode; after `train()` dropout is that of the training.
    """

    def __init__(self, info: Mapping[str, Any], members: Sequence[TowerAndHead]) -> None:
        super().__init__()
        self.classes, self.image_size = tuple(info["classes"]), int(info["preprocess"]["size"])
        self.both_views = info["train"].get("tta") == "flip"
        self.towers = nn.ModuleList(member.visual for member in members)
        self.heads = nn.ModuleList(_own_dropout(member.head, float(info["train"]["dropout"])) for member in members)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(info[name]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(True)
        self.eval()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Answer uint8 (N, S, S) with logits (N, C)."""
        x = normalise(pixels, self.get_buffer("mean"), self.get_buffer("std"))
        views = [x, x.flip(-1)] if self.both_views else [x]
        pairs = list(zip(self.towers, self.heads, strict=True))
        each = [head(nn.functional.normalize(tower(view), dim=-1)) for tower, head in pairs for view in views]
        if len(each) == 1:
            return torch.as_tensor(each[0])
        return torch.logit(torch.stack(each).sigmoid().mean(0), eps=EDGE)


def _own_dropout(head: nn.Module, p: float) -> nn.Module:
    """A copy of a head whose dropout draws its own masks; that of the trainer gets them from outside."""
    copied = copy.deepcopy(head)
    for name, layer in list(copied.named_children()):
        if isinstance(layer, Dropout):
            setattr(copied, name, nn.Dropout(p))
    return copied
