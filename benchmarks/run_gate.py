"""What unlikeness sees, on films of other patients than it was fitted to: pictures that are no films, and turned films.

    python benchmarks/run_gate.py --cache nih_512.h5 --data FOLDER

FOLDER holds `nih_512`, `nih` and `full_size` (default: CXR_FAST_REAL_DATA). The patients are dealt into five parts.
The films of a part are measured by a fit to the films of the other four: plain, inverted, turned to the left, to the
right and upside down, and mirrored. Pictures that are no films are drawn here or shipped by matplotlib and
scikit-learn. Intervals of shares are of 2,000 resamples of patients. Where no film is over 1, the upper end is by the
rule of three over patients.
"""

from __future__ import annotations

import argparse
import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import matplotlib
import numpy as np
import sklearn.datasets
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.metrics import roc_auc_score

from cxr_fast.activations.cache import Cache, open_cache
from cxr_fast.activations.encoder import Encoder
from cxr_fast.config import CacheSpec, from_dict
from cxr_fast.data.images import pixels_of
from cxr_fast.training.sweep import backbone_for
from cxr_fast.unlikeness.distance import fit_distance
from cxr_fast.unlikeness.features import FeatureSource, find_source, pool_activations, read_features

BLOCK, PARTS, RESAMPLES, CROPS = 16, 5, 2000, 10
CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "inverted": lambda films: 255 - films,
    "turned left": lambda films: np.rot90(films, 1, (1, 2)),
    "turned right": lambda films: np.rot90(films, 3, (1, 2)),
    "upside down": lambda films: np.rot90(films, 2, (1, 2)),
    "mirrored": lambda films: films[:, :, ::-1],
}
# What the figures must reach; a mirrored film cannot be seen.
MUST = {"no film": 0.995, "inverted": 0.995, "turned left": 0.98, "turned right": 0.98, "upside down": 0.98}
MOST_OVER = 0.02


class Features:
    """Features of films as the cache's own prefix gives them."""

    def __init__(self, cache: Cache) -> None:
        backbone, self.spec = backbone_for(cache), from_dict(CacheSpec, cache.meta["spec"])
        self.source: FeatureSource = find_source(backbone.visual, self.spec.unfreeze_blocks)
        self.encoder = Encoder(backbone, self.spec, torch.device("cpu"), block=BLOCK)

    def read(self, path: Path) -> np.ndarray:
        """uint8 (S, S) of a file."""
        return np.asarray(pixels_of(path, self.spec.preprocess))

    def __call__(self, films: np.ndarray) -> np.ndarray:
        """(N, F) of uint8 (N, S, S)."""
        parts = [np.ascontiguousarray(films[i : i + BLOCK]) for i in range(0, len(films), BLOCK)]
        return np.concatenate([pool_activations(self.encoder(part), self.source) for part in parts])


# ------------------------------------------------------------------ pictures that are no films


def no_films(size: int) -> list[tuple[str, np.ndarray]]:
    """(kind, uint8 (S, S)) of photographs, drawings, text, noise and other things."""
    random = np.random.default_rng(0)
    return [*_shipped(size, random), *_drawn(size, random), *_flat(size, random)]


def _square(image: Image.Image, size: int) -> np.ndarray:
    return np.asarray(image.convert("L").resize((size, size), Image.Resampling.BICUBIC))


def _shipped(size: int, random: np.random.Generator) -> list[tuple[str, np.ndarray]]:
    """Photographs and logos, whole and cut out; a slice of a head by MR; relief maps; written digits."""
    samples = Path(matplotlib.get_data_path()) / "sample_data"
    pictures = [Image.fromarray(each) for each in sklearn.datasets.load_sample_images().images]
    names = ("grace_hopper.jpg", "logo2.png", "Minduka_Present_Blue_Pack.png")
    pictures += [Image.open(samples / name).convert("RGB") for name in names]
    out = []
    for picture in pictures:
        out.append(("photograph or logo", _square(picture, size)))
        for _ in range(CROPS):
            side = int(min(picture.size) * random.uniform(0.3, 0.9))
            x, y = (int(random.integers(0, length - side + 1)) for length in picture.size)
            out.append(("photograph or logo", _square(picture.crop((x, y, x + side, y + side)), size)))
    with gzip.open(samples / "s1045.ima.gz") as packed:
        head = np.frombuffer(packed.read(), np.uint16).reshape(256, 256).astype(float)
    grids = [("slice of a head", np.clip(1.5 * head / head.max(), 0, 1))]
    for name, key in (("jacksboro_fault_dem.npz", "elevation"), ("topobathy.npz", "topo")):
        with np.load(samples / name) as file:
            grid = file[key].astype(float)
        grids.append(("relief map", (grid - grid.min()) / np.ptp(grid)))
    grids += [("digit", each / 16) for each in sklearn.datasets.load_digits().images[:10]]
    return out + [(kind, _square(Image.fromarray(np.uint8(255 * grid)), size)) for kind, grid in grids]


def _drawn(size: int, random: np.random.Generator) -> list[tuple[str, np.ndarray]]:
    """Pages of text and blurred disks."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 12)
    out = []
    for number in range(10):
        ink, paper = (0, 255) if number % 2 else (255, 0)
        draw = ImageDraw.Draw(page := Image.new("L", (size, size), paper))
        for line in range(0, size, 14):
            draw.text((4, line), "".join(map(chr, random.integers(97, 123, size // 7))), ink, font=font)
        out.append(("page of text", np.asarray(page)))
    for number in range(10):
        draw = ImageDraw.Draw(page := Image.new("L", (size, size), 0))
        for _ in range(random.integers(1, 8)):
            x, y, r = (int(random.integers(low, high)) for low, high in ((0, size), (0, size), (size // 20, size // 3)))
            draw.ellipse((x - r, y - r, x + r, y + r), fill=int(random.integers(40, 255)))
        out.append(("disks", np.asarray(page.filter(ImageFilter.GaussianBlur(3.0 * (number % 3))))))
    return out


def _flat(size: int, random: np.random.Generator) -> list[tuple[str, np.ndarray]]:
    """Noise, coarse noise, gradients, chequers and single greys."""
    out = [("noise", random.integers(0, 256, (size, size)).astype(np.uint8)) for _ in range(10)]
    for number in range(10):
        coarse = random.integers(0, 256, (2 ** (number % 5 + 1),) * 2).astype(np.uint8)
        out.append(("coarse noise", _square(Image.fromarray(coarse), size)))
    y, x = np.mgrid[0:size, 0:size] / size
    for angle in np.linspace(0, np.pi, 8, endpoint=False):
        slope = np.cos(angle) * x + np.sin(angle) * y
        out.append(("gradient", np.uint8(255 * (slope - slope.min()) / np.ptp(slope))))
    for k in (2, 4, 8, 16, 32):
        out.append(("chequers", np.uint8(255 * ((np.int64(y * k) + np.int64(x * k)) % 2))))
    return out + [("one grey", np.full((size, size), grey, np.uint8)) for grey in (0, 64, 128, 255)]


# ------------------------------------------------------------------ figures


def share_over(values: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """Share over 1 of films (N,) of `groups` (N,), with its interval by group."""
    names, inverse = np.unique(groups, return_inverse=True)
    counts = np.bincount(inverse), np.bincount(inverse, weights=values > 1)
    random, shares = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        take = random.integers(0, len(names), len(names))
        shares.append(counts[1][take].sum() / counts[0][take].sum())
    low, high = (float(q) for q in np.quantile(shares, (0.025, 0.975)))
    over = int((values > 1).sum())
    high = high if over else min(1.0, 3 / len(names))
    return {
        "films": len(values),
        "groups": len(names),
        "over": over,
        "share": over / len(values),
        "interval": [low, high],
    }


def judge(plain: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """AUC of `other` (M,) against plain films (N,), and how many of them are over 1."""
    truth, scores = np.r_[np.zeros(len(plain)), np.ones(len(other))], np.r_[plain, other]
    return {
        "pictures": len(other),
        "auc": float(roc_auc_score(truth, scores)),
        "share_over": float((other > 1).mean()),
        "median": float(np.median(other)),
    }


def measure(args: argparse.Namespace, _: Path) -> dict[str, Any]:
    """Every figure of the gate."""
    torch.set_num_threads(args.threads)
    cache = open_cache(args.cache)
    features, groups, rows = Features(cache), np.array(cache.header.groups), np.flatnonzero(cache.ok)
    root = args.data / "nih_512"
    films = np.stack([features.read(root / cache.header.images[row]) for row in rows])
    found = {"plain": read_features(cache, rows, features.source)}
    pictures = no_films(films.shape[-1])
    found |= {name: features(change(films)) for name, change in CHANGES.items()}
    strange = features(np.stack([picture for _, picture in pictures]))
    shifts = {name: _folder(features, args.data / name, args.most) for name in ("nih", "full_size")}
    values: dict[str, np.ndarray] = {name: np.empty(len(rows)) for name in found}
    others: dict[str, list[np.ndarray]] = {name: [] for name in ("no film", *shifts)}
    part = _deal(groups[rows])
    for k in range(PARTS):
        train, held = part != k, part == k
        fitted = fit_distance(found["plain"][train], groups[rows][train].tolist()).distance
        for name, each in found.items():
            values[name][held] = fitted.measure(each[held])
        for name, each in {"no film": strange, **shifts}.items():
            others[name].append(fitted.measure(each))
    # A picture that is in no part is measured by all five fits; their median is its unlikeness.
    single = {name: np.median(each, axis=0) for name, each in others.items()}
    judged = {"no film": judge(values["plain"], single["no film"])}
    judged |= {name: judge(values["plain"], values[name]) for name in CHANGES}
    held_out = share_over(values["plain"], groups[rows])
    kinds = sorted({kind for kind, _ in pictures})
    by_kind = {kind: _least(single["no film"], [name == kind for name, _ in pictures]) for kind in kinds}
    missed = [name for name, least in MUST.items() if judged[name]["auc"] < least]
    missed += ["share over 1"] if held_out["share"] > MOST_OVER else []
    result = {
        "cache": cache.meta["fingerprint"],
        "weights": Path(str(cache.meta["weights"])).name,
        "features": features.source.text,
        "held_out": held_out,
        "against_held_out": judged,
        "least_of_kind": by_kind,
        "shift": {name: {"films": len(v), "share_over": float((v > 1).mean()), "median": float(np.median(v))}
                  for name, v in single.items() if name != "no film"},
        "missed": missed,
    }  # fmt: skip
    _show(result)
    return result


def _least(values: np.ndarray, chosen: list[bool]) -> float:
    return float(values[np.array(chosen)].min())


def _deal(groups: np.ndarray) -> np.ndarray:
    """The part (N,) of each film, by group."""
    names = np.unique(groups)
    order = np.random.default_rng(0).permutation(len(names))
    return np.asarray((order % PARTS)[np.searchsorted(names, groups)])


def _folder(features: Features, folder: Path, most: int) -> np.ndarray:
    """Features of at most `most` films of a folder."""
    paths = sorted(path for path in folder.rglob("*.png"))
    paths = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int))]
    return features(np.stack([features.read(path) for path in paths]))


def _show(result: dict[str, Any]) -> None:
    held = result["held_out"]
    low, high = held["interval"]
    print(f"held-out films over 1: {held['over']} of {held['films']}, {held['share']:.3f} [{low:.3f}, {high:.3f}]")
    for name, each in result["against_held_out"].items():
        print(f"{name:14} AUC {each['auc']:.4f}  over 1 {each['share_over']:.2f}  median {each['median']:.2f}")
    for name, each in result["shift"].items():
        print(f"{name:14} {each['films']} films  over 1 {each['share_over']:.2f}  median {each['median']:.2f}")
    print("missed: " + (", ".join(result["missed"]) or "nothing"))


if __name__ == "__main__":
    common.run(
        measure,
        "gate",
        __doc__ or "",
        cache=Path,
        data=Path(os.environ.get("CXR_FAST_REAL_DATA", ".")),
        most=200,
        threads=1,
    )
