"""Prove a cache: done bits, checksums, finite values, and random images encoded again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import CacheSpec, from_dict
from ..data.images import load as load_image
from ..data.images import self_check
from ..data.paths import describe_places, recorded_places
from ..errors import ImageError, InputError
from ..models.backbone import prefix_sha256
from ..models.device import pick_device
from .cache import Cache, open_cache
from .encoder import Decoded, Encoder, load_recorded
from .reuse import PIXEL_CHECK, hash_image

# Of a row's largest absolute value. Rounding to float16 alone is 2**-11 = 4.9e-4 of it; the rest is room for another
# device's order of summation.
TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class CacheVerdict:
    """What was checked and what is wrong: (image, reason) of every bad row; `largest` is relative to a row's peak.

    `asked` rows were to be encoded again, `reencoded` were. `unproven` (image, reason) could not be, which says nothing
    against them; `absent` counts the images of all rows that are not found, 0 unless one was missed, and `tried` says
    where one of them was looked for; `shards` is 0 for one file.
    """

    rows: int
    failed: int
    asked: int
    reencoded: int
    largest: float
    bad: tuple[tuple[str, str], ...]
    unproven: tuple[tuple[str, str], ...]
    absent: int
    tried: str = ""
    shards: int = 0


@dataclass(frozen=True, kw_only=True)
class ReencodeSpec:
    """Which images are encoded again: `count` random ones, drawn by `seed` from those that exist.

    `images` is their folder and `weights` the backbone's source, where they are not those that the cache names.
    """

    count: int = 0
    images: Path | None = None
    weights: str | None = None
    device: str = "auto"
    seed: int = 0


def check_cache(
    path: Path, again: ReencodeSpec | None = None, on_progress: Callable[[int, int], None] | None = None
) -> CacheVerdict:
    """Check every encoded row's checksum and values, and encode random images again to compare them with their rows.

    `on_progress(done, total)` is called after each row. Raises InputError where the file cannot be judged: incomplete,
    another schema, other weights, a broken fingerprint, a Pillow that gives other pixels.
    """
    again = again or ReencodeSpec()
    file = open_cache(path)
    bad: dict[int, str] = {}
    rows = np.flatnonzero(file.ok).tolist()
    for count, row in enumerate(rows, 1):
        if reason := file.damage(row):
            bad[row] = reason
        if on_progress is not None:
            on_progress(count, len(rows))
    sound = np.random.default_rng(again.seed).permutation([row for row in rows if row not in bad]).tolist()
    asked = min(again.count, len(sound))
    chosen = [row for row, _ in zip(_existing(file, sound, again), range(asked), strict=False)]
    largest, unproven = 0.0, dict[int, str]()
    if chosen:
        largest, wrong, unproven = _reencode(file, chosen, again)
        bad |= wrong
    absent = sorted(set(sound).difference(_existing(file, sound, again))) if len(chosen) < asked else []

    def named(found: dict[int, str]) -> tuple[tuple[str, str], ...]:
        return tuple((file.header.images[row], reason) for row, reason in sorted(found.items()))

    return CacheVerdict(
        rows=len(rows),
        failed=int((~file.ok).sum()),
        asked=asked,
        reencoded=len(chosen) - len(unproven),
        largest=largest,
        bad=named(bad),
        unproven=named(unproven),
        absent=len(absent),
        tried=describe_places(_places(file, absent[0], again)) if absent else "",
        shards=len(file.files) if file.sharded else 0,
    )


def _places(file: Cache, row: int, again: ReencodeSpec) -> list[Path]:
    return recorded_places(file.header.images[row], Path(file.meta["dataset"]["root"]), again.images)


def _existing(file: Cache, rows: list[int], again: ReencodeSpec) -> Iterator[int]:
    return (row for row in rows if any(place.is_file() for place in _places(file, row, again)))


def _place(file: Cache, row: int, again: ReencodeSpec) -> Path:
    """Where a row's image lies: of several files of its name the one with its bytes, else the first."""
    found = [place for place in _places(file, row, again) if place.is_file()]
    same = (place for place in found if len(found) > 1 and hash_image(place) == file.sha256[row])
    return next(same, found[0])


def _reencode(file: Cache, rows: list[int], again: ReencodeSpec) -> tuple[float, dict[int, str], dict[int, str]]:
    """Largest difference, and which rows are wrong or could not be encoded again, each with the reason."""
    parts = file.meta["fingerprint_parts"]
    if parts.get(PIXEL_CHECK, self_check()) != self_check():
        raise InputError(
            f"the Pillow here gives other pixels than {file.meta.get('pillow')}, with which {file.path} was made: "
            "encoding again proves nothing. Install that one, or pass --reencode 0."
        )
    backbone = load_recorded(file.meta, again.weights)
    spec = from_dict(CacheSpec, file.meta["spec"])
    if prefix_sha256(backbone.visual, spec.unfreeze_blocks) != parts["prefix_sha256"]:
        raise InputError(f"--weights {backbone.source}: not the weights {file.path} was made with.")
    encoder = Encoder(backbone, spec, pick_device(again.device), block=int(file.meta["block"]))
    largest, bad, unproven = 0.0, dict[int, str](), dict[int, str]()
    for row in rows:
        path = _place(file, row, again)
        try:
            pixels, sha256 = load_image(path, spec.preprocess)[:2]
        except ImageError as error:
            pixels, sha256 = np.zeros(0), hash_image(path)
            if sha256 in ("", file.sha256[row]):
                unproven[row] = f"{error.reason}: {error}"
                continue
        if sha256 != file.sha256[row]:
            bad[row] = "the image has changed since; run `cxrfast cache` again"
            continue
        difference, reason = _compare(file, row, encoder, pixels)
        largest = max(largest, difference)
        if reason:
            bad[row] = reason
    return largest, bad, unproven


def _compare(file: Cache, row: int, encoder: Encoder, pixels: np.ndarray) -> tuple[float, str]:
    """Largest difference of one row to a fresh encoding, relative to the row's peak, and what is wrong with it."""
    values, errors = encoder.encode([Decoded(pixels=pixels)], [row % encoder.block])
    if errors[0]:
        return 0.0, errors[0]
    stored = file.activations[row].astype(np.float32)
    peak = float(np.abs(stored).max()) or 1.0
    difference = float(np.abs(values[0].astype(np.float32) - stored).max()) / peak
    too_far = f"differs from a fresh encoding by {difference:.1e} of its peak (tolerance {TOLERANCE:g})"
    return difference, too_far if difference > TOLERANCE else ""
