"""Prove a cache: done bits, checksums, finite values, and random images encoded again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import store
from .backbone import load, prefix_sha256
from .config import CacheSpec, from_dict
from .encode import Decoded, Encoder, pick_device
from .errors import ImageError, InputError
from .preprocess import load as load_image

# Of a row's largest absolute value. Rounding to float16 alone is 2**-11 = 4.9e-4 of it; the rest is room for another
# device's order of summation.
TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was checked and what is wrong: (image, reason) of every bad row; `largest` is relative to a row's peak."""

    rows: int
    failed: int
    reencoded: int
    largest: float
    bad: tuple[tuple[str, str], ...]


def cache(
    path: Path,
    *,
    reencode: int = 0,
    images: Path | None = None,
    weights: str | None = None,
    device: str = "auto",
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Check every encoded row's checksum and values, and `reencode` random images against what is stored.

    Raises InputError where the file cannot be judged: incomplete, another schema, other weights, a broken fingerprint.
    """
    file = store.ActivationFile(path)
    bad: dict[int, str] = {}
    rows = np.flatnonzero(file.ok)
    for count, row in enumerate(rows, 1):
        if reason := file.damage(int(row)):
            bad[int(row)] = reason
        if on_progress is not None:
            on_progress(count, len(rows))
    sound = [int(row) for row in rows if int(row) not in bad]
    chosen = np.random.default_rng(seed).permutation(sound)[:reencode].tolist()
    largest = 0.0
    if chosen:
        largest, wrong = _reencode(file, chosen, images, weights, device)
        bad |= wrong
    return Verdict(
        rows=len(rows),
        failed=int((~file.ok).sum()),
        reencoded=len(chosen),
        largest=largest,
        bad=tuple((file.header.images[row], reason) for row, reason in sorted(bad.items())),
    )


def _reencode(
    file: store.ActivationFile, rows: list[int], images: Path | None, weights: str | None, device: str
) -> tuple[float, dict[int, str]]:
    backbone = load(weights or file.meta["weights"])
    spec = from_dict(CacheSpec, file.meta["spec"])
    if prefix_sha256(backbone.visual, spec.unfreeze_blocks) != file.meta["fingerprint_parts"]["prefix_sha256"]:
        raise InputError(f"--weights {backbone.source}: not the weights {file.path} was made with.")
    encoder = Encoder(backbone, spec, pick_device(device), block=int(file.meta["block"]))
    root = images or Path(file.meta["dataset"]["root"])
    largest, bad = 0.0, {}
    for row in rows:
        difference, reason = _compare(file, row, encoder, root)
        largest = max(largest, difference)
        if reason:
            bad[row] = reason
    return largest, bad


def _compare(file: store.ActivationFile, row: int, encoder: Encoder, root: Path) -> tuple[float, str]:
    """Largest difference of one row to a fresh encoding, relative to the row's peak, and what is wrong with it."""
    try:
        pixels, sha256 = load_image(root / file.header.images[row], encoder.spec.preprocess)
    except ImageError as error:
        return 0.0, f"cannot be encoded again, {error.reason}: {error}"
    if sha256 != file.sha256[row]:
        return 0.0, "the image has changed since; run `cxrfast cache` again"
    values, errors = encoder.encode([Decoded(pixels=pixels, sha256=sha256)], [row % encoder.block])
    if errors[0]:
        return 0.0, errors[0]
    stored = file.activations[row].astype(np.float32)
    peak = float(np.abs(stored).max()) or 1.0
    difference = float(np.abs(values[0].astype(np.float32) - stored).max()) / peak
    too_far = f"differs from a fresh encoding by {difference:.1e} of its peak (tolerance {TOLERANCE:g})"
    return difference, too_far if difference > TOLERANCE else ""
