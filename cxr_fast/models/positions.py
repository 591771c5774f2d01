"""Position tables of vision transformers at other image sizes, interpolated as each library interpolates its own.

A tower learned one position vector for each patch of a grid, 14 x 14 for 224 pixels and patches of 16. At another size
the grid has more or fewer patches, and the table is resized like a picture of D channels. All libraries do that in
float32, by bicubic interpolation with corners not aligned; they differ in smoothing before making a table smaller:

- timm (`timm.layers.resample_abs_pos_embed`) and with it open_clip's timm towers: smoothed (antialias)
- transformers `Dinov2WithRegistersModel`: smoothed
- transformers `Dinov2Model`, `SiglipVisionModel`, `CLIPVisionModel`, `ViTModel`: not smoothed

torch's smoothed bicubic kernel has a = -0.5, the other one a = -0.75: the tables differ when made larger too. Positions
of class and register tokens are not on the grid and stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError

Grid = tuple[int, int]


class SizeError(InputError):
    """An image size that is no multiple of a tower's patch size."""


# Whether a family's library smooths before it resizes.
ANTIALIAS = {
    "timm": True,
    "dinov2_with_registers": True,
    "dinov2": False,
    "siglip": False,
    "clip": False,
    "vit": False,
}


def interpolate(
    table: torch.Tensor, *, prefix_tokens: int, old_grid: Grid, new_grid: Grid, family: str = "timm"
) -> torch.Tensor:
    """Resize a position table as the library of `family` does, one of the keys of `ANTIALIAS`.

    `table` (1, P + rows x columns, D) holds `prefix_tokens` (P) vectors of class and register tokens, 0 where only
    patches have positions, then those of the patches of `old_grid` (rows, columns), row by row. Returns
    (1, P + new rows x new columns, D) in the table's dtype; the table itself where the grids are equal. Raises
    InputError for a family that is not known here, and for a table of another length.

    >>> interpolate(torch.zeros(1, 197, 384), prefix_tokens=1, old_grid=(14, 14), new_grid=(21, 21)).shape
    torch.Size([1, 442, 384])
    """
    if family not in ANTIALIAS:
        raise InputError(f"--image-size: how positions of {family!r} are interpolated is not known here; leave it out.")
    count = prefix_tokens + old_grid[0] * old_grid[1]
    if table.shape[1] != count:
        raise InputError(
            f"--weights: the position table has {table.shape[1]} rows; {old_grid[0]} x {old_grid[1]} patches and "
            f"{prefix_tokens} other token(s) need {count}."
        )
    if new_grid == old_grid:
        return table
    patches = table[:, prefix_tokens:].float().unflatten(1, old_grid).permute(0, 3, 1, 2)
    resized = F.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False, antialias=ANTIALIAS[family])
    rows = resized.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
    return torch.cat([table[:, :prefix_tokens], rows], dim=1)


def set_image_size(visual: Any, size: int, *, family: str = "timm") -> None:
    """Make a tower take films of `size` x `size` pixels, in place: positions are interpolated, nothing else changes.

    Works for a tower on the meta device too, which has shapes and no values. Raises SizeError where `size` is another
    than the tower's own and no multiple of the patch size.
    """
    trunk = visual.trunk
    patches = trunk.patch_embed
    if patches.img_size == (size, size):
        return
    if any(size % side for side in patches.patch_size):
        raise SizeError(_no_multiple(size, max(patches.patch_size)))
    old_grid = patches.grid_size
    patches.img_size, patches.grid_size, patches.num_patches = patches._init_img_size((size, size))
    if trunk.pos_embed is None or patches.grid_size == old_grid:
        return
    prefix_tokens = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
    with torch.no_grad():
        table = interpolate(
            trunk.pos_embed,
            prefix_tokens=prefix_tokens,
            old_grid=old_grid,
            new_grid=patches.grid_size,
            family=family,
        )
    trunk.pos_embed = nn.Parameter(table, requires_grad=False)


def _no_multiple(size: int, patch: int) -> str:
    """What is wrong with a size, and the two nearest that are right."""
    below = max(size // patch, 1) * patch
    nearest = f"{below} or {below + patch}"
    return f"--image-size: {size} is no multiple of the model's patches of {patch} pixels; take {nearest}."
