"""Compute heat maps: the attention of the one query that is pooled to each patch, weighted by the gradient of a logit.

The query is the class token's in the last block, or that of attention pooling.
"""

from __future__ import annotations

import difflib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..activations.encoder import normalise
from ..config import PreprocessSpec, from_dict
from ..data.images import decode_grey, read_bytes, resize
from ..data.paths import describe_places, recorded_places
from ..errors import ImageError, InputError
from ..metrics import calibration
from ..models.backbone import embed
from ..models.tail import not_pooled
from ..system.files import atomic, write_bytes
from ..training.run_folder import Member, Run, read_info, read_run
from .overlay import Explained, Map, Style, picture

TOP = 3


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What is drawn: the named `classes`, else the `top` highest above their thresholds, and in which style."""

    classes: Sequence[str] = ()
    top: int = TOP
    style: Style = field(default_factory=Style)


def write(
    folder: Path, image: Path, out: Path, *, npy: Path | None = None, classes: Sequence[str] = (), top: int = TOP
) -> Explained:
    """Explain one image by a run's final model into a PNG or SVG, and its maps into a float32 array (C, rows, columns).

    Raises InputError or ImageError before anything is written.
    """
    return write_one(folder, image, out, npy, Drawing(classes=classes, top=top))


def write_one(folder: Path, image: Path, out: Path, npy: Path | None, drawing: Drawing) -> Explained:
    """As `write`, in any style."""
    _check_outputs(image, out, npy)
    found = explain(read_run(folder), image, classes=drawing.classes, top=drawing.top)
    with atomic(out, "--out", folders=True) as file:  # both files or none
        file.write(picture(found, drawing.style, out.suffix.lower()[1:]))
        file.flush()
        if npy is not None:
            buffer = io.BytesIO()
            np.save(buffer, np.stack([each.shares for each in found.maps]))
            write_bytes(npy, buffer.getvalue(), "--npy", folders=True)
    return found


def write_many(
    folder: Path,
    images: Sequence[Path],
    out: Path,
    drawing: Drawing,
    tell: Callable[[Path, Explained | ImageError], None],
) -> int:
    """Explain images by a run's final model into `out`/NAME.png, one a film; how many could not be read.

    Films of equal names get a number. `tell` gets each picture's path with what is on it, or the film's with the error.
    Raises InputError before anything is written.
    """
    if out.suffix or out.is_file():
        raise InputError(f"--out: {out} is one file; of {len(images):,} films give a folder.")
    run, failed = read_run(folder), 0
    for image, path in zip(images, _free_names(images, out), strict=True):
        try:
            found = explain(run, image, classes=drawing.classes, top=drawing.top)
        except ImageError as error:
            failed += 1
            tell(image, error)
            continue
        write_bytes(path, picture(found, drawing.style), "--out", folders=True)
        tell(path, found)
    return failed


def _free_names(images: Sequence[Path], out: Path) -> Iterator[Path]:
    """A path `out`/NAME.png for each image, no two the same."""
    taken: set[str] = set()
    for image in images:
        name, number = image.stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{image.stem}-{number}"
        taken.add(name.casefold())
        yield out / f"{name}.png"


def find_film(run_folder: Path, image: Path, images: Path | None) -> Path:
    """Find an image by its path, or by its name in the run's tables, which `images` gives another folder.

    Raises InputError that names the places where it was looked for.
    """
    if os.path.lexists(image) and images is None:
        return image
    root = Path(read_info(run_folder)["cache"]["dataset"]["root"])
    places = [*recorded_places(str(image), root, images), image]
    if found := next((place for place in places if place.is_file()), None):
        return found
    tried = describe_places(list(dict.fromkeys(places)))
    raise InputError(f"{image}: no such file ({tried}); give the folder of the films with --images.")


def explain(run: Run, image: Path, *, classes: Sequence[str] = (), top: int = TOP) -> Explained:
    """Maps of the named classes, or of the `top` ones by probability minus threshold, highest first.

    An ensemble's map is the mean of its members' maps, each as shares of its own sum, since their logits have scales of
    their own. Raises InputError for an unknown class or a backbone that averages its patches, ImageError for the image.
    """
    if run.visual.trunk.global_pool not in ("token", "map"):
        raise InputError(
            "heat maps need a backbone that pools its class token or by attention; this run's averages its patches, "
            "which reach the score past all attention too."
        )
    info = run.info
    asked = [_index(name, info["classes"]) for name in dict.fromkeys(classes)]
    spec = from_dict(PreprocessSpec, info["preprocess"])
    grey = decode_grey(read_bytes(image), spec=spec, name=str(image))
    mean, std = (torch.tensor(info[k]).reshape(1, 3, 1, 1) for k in ("mean", "std"))
    x = normalise(torch.from_numpy(resize(grey, spec)[None]), mean, std)
    probs = calibration.apply(info["calibration"], run.raw_probabilities(x))[0].astype(np.float64)
    limits = np.array(info["thresholds"], np.float64)
    chosen = asked or [int(c) for c in np.argsort(limits - probs, kind="stable")[:top]]
    each = np.mean([shares(relevance(member, x, chosen)) for member in run.members], axis=0)
    maps = tuple(
        Map(name=info["classes"][c], probability=float(probs[c]), threshold=float(limits[c]), shares=one)
        for c, one in zip(chosen, each, strict=True)
    )
    members, warning = len(run.members), str(info["provenance"])
    found = Explained(
        name=image.name, grey=grey, spec=spec, maps=maps, members=members, warning=warning, source=describe_source(run)
    )
    return replace(found, query="attention pooling looked") if run.visual.trunk.global_pool == "map" else found


def describe_source(run: Run) -> str:
    """Say whose probabilities stand beside a map: those of the run's final model, in float32, by torch.

    A model file of the run is another arithmetic (int8: other by up to some hundredths), and may have another final
    model, calibration or thresholds, where its export was asked for them.
    """
    kinds = {
        "best-fold": "the best fold's model",
        "refit": "the model trained on all folds",
        "ensemble": f"the mean of {len(run.members)} folds' models",
        "retrained": f"the mean of {len(run.members)} folds' models with retrained heads",
    }
    kind = kinds.get(run.info["final"]["kind"], "the final model")
    fitted = "calibrated" if run.info["calibration"] else "not calibrated"
    return (
        f"of the run's own model, {kind}, in float32 by torch, {fitted}; a model file of another arithmetic, such as "
        "int8, gives slightly others"
    )


def relevance(member: Member, x: torch.Tensor, classes: Sequence[int]) -> np.ndarray:
    """Return each patch's relevance to each class for one normalised image (1, 3, S, S); (C, rows, columns) >= 0.

    Mean over heads of max(0, A * d logit / d A), A the class token's attention in the last block, or that of attention
    pooling: equation 5 of Chefer, Gur and Wolf, "Generic Attention-model Explainability" (ICCV 2021), in logits. Their
    product over blocks is left out: it supposes how blocks compose, and a map must not change its meaning with the
    number of blocks trained.
    """
    with torch.no_grad():
        tokens = embed(member.visual, x)
    return relevance_behind(member, tokens, classes, 0)


def relevance_behind(member: Member, tokens: torch.Tensor, classes: Sequence[int], start: int) -> np.ndarray:
    """Return what `relevance` does, from one image's tokens (1, T, D) behind the first `start` blocks.

    Models that share their first blocks then run them once.
    """
    visual, trunk = member.visual, member.visual.trunk
    pooled = trunk.global_pool == "map"
    with torch.no_grad():
        for block in trunk.blocks[start : None if pooled else -1]:
            tokens = block(tokens)
        if pooled:
            tokens = trunk.norm(tokens)[:, not_pooled(trunk) :]
            a, v = pool_attention(trunk.attn_pool, tokens)
        else:
            a, v = attention(trunk.blocks[-1], tokens)
    with torch.enable_grad():
        a.requires_grad_(True)
        if pooled:
            embedding = visual.head(trunk.fc_norm(from_pool_attention(trunk.attn_pool, a, v)))
        else:
            tokens = from_attention(trunk.blocks[-1], tokens, a, v)
            embedding = visual.head(trunk.forward_head(trunk.norm(tokens)))
        logits = member.head(torch.nn.functional.normalize(embedding, dim=-1))[0]
        slopes = [torch.autograd.grad(logits[c], a, retain_graph=True)[0] for c in classes]
    rows, columns = trunk.patch_embed.grid_size  # the patches are last in line
    maps = [(a.detach() * slope).clamp(min=0)[0, :, 0, -rows * columns :].mean(dim=0) for slope in slopes]
    return np.asarray(torch.stack(maps).reshape(len(classes), rows, columns).numpy())


def attention(block: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute probabilities (B, heads, T, T) and values (B, heads, T, D / heads) of a timm `Block` at tokens (B, T, D).

    timm's own attention is fused and returns no probabilities.
    """
    attn = block.attn
    b, t, _ = x.shape
    qkv = attn.qkv(block.norm1(x)).reshape(b, t, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    return torch.softmax((attn.q_norm(q) * attn.scale) @ attn.k_norm(k).mT, dim=-1), v


def from_attention(block: Any, x: torch.Tensor, a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Compute the block's output (B, T, D) from its input x and the result of `attention`."""
    z = (a @ v).transpose(1, 2).reshape(*x.shape[:2], -1)
    x = x + block.ls1(block.attn.proj(z))
    out: torch.Tensor = x + block.ls2(block.mlp(block.norm2(x)))
    return out


def pool_attention(pool: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute probabilities (B, heads, 1, T) and values (B, heads, T, D / heads) of timm's `AttentionPoolLatent`."""
    b, t, _ = x.shape
    k, v = pool.kv(x).reshape(b, t, 2, pool.num_heads, pool.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    q = pool.q_norm(pool.q(pool.latent).reshape(1, 1, pool.num_heads, pool.head_dim).transpose(1, 2))
    return torch.softmax((q * pool.scale) @ pool.k_norm(k).mT, dim=-1), v


def from_pool_attention(pool: Any, a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Compute what attention pooling gives (B, D) from the result of `pool_attention`."""
    x = pool.proj((a @ v).transpose(1, 2).reshape(len(v), -1))
    out: torch.Tensor = x + pool.mlp(pool.norm(x))
    return out


def shares(maps: np.ndarray) -> np.ndarray:
    """Divide each map (C, rows, columns) by its own sum; one that is nowhere positive stays 0."""
    total = maps.sum(axis=(1, 2), keepdims=True, dtype=np.float64)
    return np.divide(maps, total, out=np.zeros_like(maps), where=total > 0)


def _index(name: str, classes: Sequence[str]) -> int:
    if name in classes:
        return classes.index(name)
    folded = {known.casefold(): known for known in classes}
    near = [folded[found] for found in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)]
    names = f"did you mean {', '.join(near)}?" if near else f"its classes: {', '.join(classes)}."
    raise InputError(f"--class: this run has no {name!r}; {names}")


def _check_outputs(image: Path, out: Path, npy: Path | None) -> None:
    for flag, path, suffixes in (("--out", out, (".png", ".svg")), ("--npy", npy, (".npy",))):
        if path is not None and (path.suffix.lower() not in suffixes or path.is_dir()):
            raise InputError(f"{flag}: {path} must be the name of a {' or '.join(suffixes)} file.")
        if path is not None and path.exists() and image.exists() and path.samefile(image):
            raise InputError(f"{flag}: {path} is the image itself; give another name.")
