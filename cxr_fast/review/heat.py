"""Heat maps of films by the model that scored each: the fold's model that did not train on it, or the final one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..activations.cache import Cache
from ..activations.encoder import normalise
from ..config import PreprocessSpec, digest
from ..data.images import placed
from ..errors import InputError
from ..export.heatmaps import relevance_behind, shares
from ..export.overlay import COLOURS, FAINTEST, OPACITY
from ..models.backbone import embed
from ..training.run_folder import Member, Run, read_run
from .films import RunFilms

LEVELS = 16  # colours of a map on the page: 4 bits a patch; a browser smooths between the patches


class HeatMaps:
    """Draws heat maps by the models of one run.

    `notes` say where another model than the one that scored a film draws its map. InputError where its
    backbone averages its patches.
    """

    def __init__(self, final: Run, films: RunFilms) -> None:
        info = final.info
        trunk = final.visual.trunk
        if trunk.global_pool not in ("token", "map"):
            raise InputError("the backbone averages its patches, so that nothing says where it looked.")
        self.notes: tuple[str, ...] = ()
        self._cached: tuple[Any, np.ndarray] | None = None
        self._films, self._visual = films, final.visual
        # Blocks that all models share, which run once a film; the last one is looked into where it pools.
        depth = len(trunk.blocks)
        self._shared = min(depth - info["unfreeze_blocks"], depth if trunk.global_pool == "map" else depth - 1)
        self._mean, self._std = (torch.tensor(info[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
        self._weights = info["weights_sha256"]
        self._models: dict[int, tuple[list[str], Sequence[Member]]] = {-1: (info["final"]["members"], final.members)}
        kind = "retrained" if films.decided_by == "retrained" else "ensemble"
        try:
            folds = final if info["final"]["kind"] == kind else read_run(final.folder, kind)
        except InputError as error:
            self.notes = (f"the models that scored films out of fold: {error} The final model draws their maps.",)
            return
        for k, (name, member) in enumerate(zip(folds.info["final"]["members"], folds.members, strict=True)):
            self._models[k] = ([name], [member])

    def model(self, row: int) -> str:
        """A key of the model that draws the maps of a film: the hash of its weights."""
        names, _ = self._of(row)
        return digest([self._weights[name] for name in ("tower", *names)])

    def start_from(self, cache: Cache, rows: np.ndarray) -> None:
        """Start from what the run's cache holds, which films (N,) have in `rows`, where it holds tokens.

        Ten of twelve blocks then need not run; float16 tokens move a map by about a thousandth of its highest patch.
        """
        if len(cache.header.shape) == 4:
            self._cached = (cache.activations, rows)

    def draw(self, rows: Sequence[int], pixels: np.ndarray, classes: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Maps of films: their pixels (n, S, S) uint8, and of each the numbers of its classes.

        Returns one array a film, (classes, rows, columns) float32, each map as shares of its own sum and the mean over
        the members of a final model, as `cxrfast explain` draws it.
        """
        tokens = self._tokens(rows, pixels)
        out = []
        for place, (row, numbers) in enumerate(zip(rows, classes, strict=True)):
            one = tokens[place : place + 1].clone()
            _, members = self._of(row)
            each = [shares(relevance_behind(member, one, numbers, self._shared)) for member in members]
            out.append(np.mean(each, axis=0))
        return out

    def _tokens(self, rows: Sequence[int], pixels: np.ndarray) -> torch.Tensor:
        """Tokens (n, T, D) of the plain view behind the blocks that all models share."""
        if self._cached is not None:
            activations, places = self._cached
            some = places[list(rows)]
            return torch.from_numpy(np.asarray(activations[some, np.zeros_like(some)], np.float32))
        x = normalise(torch.from_numpy(np.ascontiguousarray(pixels)), self._mean, self._std)
        with torch.no_grad():
            tokens = embed(self._visual, x)
            for block in self._visual.trunk.blocks[: self._shared]:
                tokens = block(tokens)
        return tokens

    def _of(self, row: int) -> tuple[list[str], Sequence[Member]]:
        fold = int(self._films.fold[row])
        return self._models.get(fold, self._models[-1])


def as_png(map_shares: np.ndarray) -> bytes:
    """A map of shares (rows, columns) as a PNG of that size: LEVELS colours, from clear to that of the highest patch.

    Colours and opacity are those of `cxrfast explain`.
    """
    highest = float(map_shares.max())
    level = np.asarray(map_shares, np.float64) / highest if highest > 0 else np.zeros(map_shares.shape)
    image = Image.fromarray(np.rint(level * (LEVELS - 1)).astype(np.uint8), "P")
    colours, opacity = _palette()
    image.putpalette(colours)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", bits=4, transparency=opacity, optimize=True)
    return buffer.getvalue()


def _palette() -> tuple[list[int], bytes]:
    import matplotlib

    steps = np.arange(LEVELS) / (LEVELS - 1)
    colours = matplotlib.colormaps[COLOURS](FAINTEST + (1 - FAINTEST) * steps)[:, :3]
    opacity = np.rint(255 * OPACITY * steps).astype(np.uint8)
    return np.rint(255 * colours).astype(int).ravel().tolist(), opacity.tobytes()


def place_style(size: tuple[int, int], spec: PreprocessSpec) -> str:
    """Where a map lies on a film of (width, height), as CSS; empty where it covers the whole film."""
    wide, high, left, top = placed(*size, spec)
    edges: dict[str, Any] = {
        "left": left / wide,
        "top": top / high,
        "width": spec.size / wide,
        "height": spec.size / high,
    }
    if edges == {"left": 0, "top": 0, "width": 1, "height": 1}:
        return ""
    return ";".join(f"{name}:{100 * share:.2f}%" for name, share in edges.items())
