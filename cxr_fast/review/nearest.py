"""The nearest training films of a film, by the embeddings of the frozen backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..activations.cache import Cache, open_cache
from ..errors import InputError
from ..models.backbone import assemble
from ..models.tail import Tail
from ..training.run_folder import TOWER
from .films import RunFilms
from .state import KeptFiles

COUNT = 3
BATCH = 64
Neighbours = dict[int, list[tuple[int, float]]]


def open_run_cache(run: Mapping[str, Any], path: Path | None) -> Cache:
    """The cache that a run was trained from, or one like it at another `path`. InputError where it is another."""
    place = path or Path(run["cache"]["path"])
    try:
        cache = open_cache(place)
    except InputError as error:
        raise InputError(
            f"{error} Name it with --cache where it moved." if path is None else f"--cache: {error}"
        ) from None
    if cache.meta["fingerprint"] != run["cache"]["fingerprint"]:
        raise InputError(f"{place} is not the cache that this run was trained from; name that with --cache.")
    return cache


def match_rows(films: RunFilms, cache: Cache) -> np.ndarray:
    """The row of each film in the cache (N,). InputError where the cache holds other films."""
    at = {(name, sha): row for row, (name, sha) in enumerate(zip(cache.header.images, cache.sha256, strict=True))}
    names = zip(films.images.tolist(), films.sha256.tolist(), strict=True)
    rows = np.array([at.get(pair, -1) for pair in names], np.int64)
    if lost := int((rows < 0).sum()):
        raise InputError(f"{cache.path}: {lost:,} of {len(rows):,} films of this run are not in it.")
    return rows


def embed_films(
    folder: Path,
    run: Mapping[str, Any],
    cache: Cache,
    rows: np.ndarray,
    state: KeptFiles,
    on_done: Callable[[int, int], None],
) -> np.ndarray:
    """Embeddings (N, E) float32 of length 1 of `rows` (N,) of a cache, plain views, by the backbone before training.

    Of a cache that is cut before the last blocks these run here, and what is done is kept in `state`. `on_done` gets
    films done and all.
    """
    if len(cache.header.shape) == 3:
        return _unit(np.asarray(cache.activations[rows, np.zeros_like(rows)], np.float32))
    key = f"{cache.meta['fingerprint']}{len(rows)}"
    kept = state.embeddings(key)
    tail = _frozen_tail(folder, run)
    if kept is None or kept.shape[1:] != (tail.embed_dim,) or len(kept) > len(rows):
        kept = np.empty((0, tail.embed_dim), np.float16)
    done = [kept]
    count = len(kept)
    try:
        while count < len(rows):
            some = rows[count : count + BATCH]
            x = torch.from_numpy(np.asarray(cache.activations[some, np.zeros_like(some)], np.float32))
            with torch.inference_mode():
                done.append(tail.pooled(x).numpy().astype(np.float16))
            count += len(some)
            on_done(count, len(rows))
    finally:
        if len(done) > 1:
            state.keep_embeddings(key, np.concatenate(done))
    return _unit(np.concatenate(done).astype(np.float32))


def find_nearest(films: RunFilms, run: Mapping[str, Any], embeddings: np.ndarray, rows: Sequence[int]) -> Neighbours:
    """The COUNT nearest films of each of `rows`, with the cosine of their embeddings (N, E) of length 1.

    Only films that the model which scored a film was trained on, and none of the film's own group.
    """
    chosen = run["chosen"]["fold"] if run["final"]["kind"] == "best-fold" else None
    found: Neighbours = {}
    for row in rows:
        fold = int(films.fold[row])
        trained = (films.fold >= 0) & (films.fold != (fold if fold >= 0 else -2 if chosen is None else chosen))
        others = trained & (films.groups != films.groups[row])
        cosine = np.where(others, embeddings @ embeddings[row], -np.inf)
        nearest = np.argsort(-cosine, kind="stable")[: min(COUNT, int(others.sum()))]
        found[row] = [(int(place), float(cosine[place])) for place in nearest]
    return found


def _unit(embeddings: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return np.asarray(embeddings / np.maximum(length, 1e-12))


def _frozen_tail(folder: Path, run: Mapping[str, Any]) -> Tail:
    """The blocks behind the cut as they were before training, from the tower that the run keeps."""
    from safetensors import SafetensorError, safe_open

    path = folder / "model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(TOWER)]  # noqa: SIM118
            tensors = {name.removeprefix(TOWER): file.get_tensor(name) for name in names}
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: cannot read the model ({str(error)[:120]}).") from error
    visual = assemble(run["backbone"], tensors)
    return Tail(visual, unfreeze_blocks=run["unfreeze_blocks"], classes=1).eval().requires_grad_(False)
