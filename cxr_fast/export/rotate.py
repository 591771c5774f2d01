"""Turn the token space of a vision tower, so that no channel is larger than the others.

A layer norm without its weights commutes with every rotation that keeps the mean, so the weights take the rotation in
and the answers stay (QuaRot, Ashkboos et al. 2024, there for RMS norms).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..training.run_folder import Run


class Turned(nn.Module):
    """The last norm of a turned tower: tokens (B, T, D) are turned back by `back` (D, D) first."""

    def __init__(self, norm: nn.Module, back: torch.Tensor) -> None:
        super().__init__()
        self.norm, self.back = norm, back

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(x @ self.back)
        return out


def rotation(width: int) -> torch.Tensor:
    """Draw a rotation (D, D) float64, always the same, that keeps the vector of ones."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(width, width, generator=generator, dtype=torch.float64)
    drawn[:, 0] = 1
    basis = torch.linalg.qr(drawn)[0]  # its first column is the ones', up to its sign
    inner = _drawn(width - 1, generator)
    turn = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), inner)
    return basis @ turn @ basis.T


def rotated(run: Run) -> Run:
    """Return the run with turned towers and the same answers; itself where a norm stands before the first block."""
    trunk = run.visual.trunk
    if not isinstance(trunk.norm_pre, nn.Identity) or not isinstance(trunk.patch_embed.norm, nn.Identity):
        return run
    turn = rotation(trunk.embed_dim)
    return replace(run, members=tuple(replace(m, visual=_turned(m.visual, turn)) for m in run.members))


def _turned(visual: Any, turn: torch.Tensor) -> Any:
    visual = copy.deepcopy(visual).requires_grad_(False)
    trunk = visual.trunk

    def write(linear: Any, *behind: Any) -> None:
        """What a layer writes into the tokens is turned, the layer scale behind it included."""
        weight = linear.weight.double()
        bias = None if linear.bias is None else linear.bias.double()
        for scale in behind:
            weight, bias = weight * scale[:, None], None if bias is None else bias * scale
        linear.weight.copy_((weight.flatten(1).T @ turn).T.reshape(weight.shape))
        if bias is not None:
            linear.bias.copy_(bias @ turn)

    def read(linear: Any, norm: Any) -> None:
        """What a layer reads behind a norm takes the norm's weights in and is turned."""
        weight = linear.weight.double()
        bias = weight @ norm.bias.double()
        bias = bias if linear.bias is None else bias + linear.bias.double()
        linear.weight.copy_((weight * norm.weight.double()) @ turn)
        linear.bias = nn.Parameter(bias.float(), requires_grad=False)
        norm.weight.fill_(1.0)
        norm.bias.zero_()

    with torch.no_grad():
        write(trunk.patch_embed.proj)
        for name in ("cls_token", "reg_token", "pos_embed"):
            if (value := getattr(trunk, name, None)) is not None:
                value.copy_(value.double() @ turn)
        for block in trunk.blocks:
            read(block.attn.qkv, block.norm1)
            write(block.attn.proj, *_taken(block, "ls1"))
            _turn_values(block.attn)
            read(block.mlp.fc1, block.norm2)
            write(block.mlp.fc2, *_taken(block, "ls2"))
        trunk.norm = Turned(trunk.norm, turn.T.float())
    return visual


def _turn_values(attn: Any) -> None:
    """Turn the values of each head, and what the projection reads of them: attention is a mean of values."""
    width, heads = attn.head_dim, attn.num_heads
    turn = torch.block_diag(*[_drawn(width, torch.Generator().manual_seed(1))] * heads)
    rows = attn.qkv.weight[-width * heads :]
    rows.copy_(turn.T @ rows.double())
    if attn.qkv.bias is not None:
        bias = attn.qkv.bias[-width * heads :]
        bias.copy_(bias.double() @ turn)
    attn.proj.weight.copy_(attn.proj.weight.double() @ turn)


def _drawn(width: int, generator: torch.Generator) -> torch.Tensor:
    """Draw a rotation (D, D) float64."""
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]


def _taken(block: Any, name: str) -> list[torch.Tensor]:
    """The layer scale of a block, which is taken out of it."""
    gamma = getattr(getattr(block, name), "gamma", None)
    if gamma is None:
        return []
    setattr(block, name, nn.Identity())
    return [gamma.double()]
