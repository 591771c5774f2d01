"""How close `cxrfast cache` comes to what its parts cost, beside the plain pipeline's pass over the same files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..activations import build, encoder
from ..activations import file as store
from ..activations.job import BLOCKS, CacheJob
from ..config import CacheSpec, PreprocessSpec
from ..data.images import load
from ..data.manifest import Manifest
from ..errors import InputError
from ..models.backbone import Backbone
from ..models.device import pick_device
from ..models.tail import Tail
from ..system import hardware
from ..system.text import Table, duration, to_plain
from . import results
from .baseline import Films, loader
from .films import readable, spread_evenly
from .measure import median, ratio_fields, run_rounds, spreads
from .records import CACHE, CacheResult

# Images of the main job: Indiana, each with as many views as were measured.
INDIANA = 7466
BATCH, FEW = 16, 4
# Of an embedding of length 1, cached tokens through the rest of the tower against the whole: float16 keeps 11 bits.
TOLERANCE = {"float32": 1e-4, "float16": 5e-3}


def few(manifest: Manifest, count: int, spec: PreprocessSpec) -> tuple[Manifest, int]:
    """`count` images evenly spread over a manifest, and how many of them were left out since they cannot be read.

    Raises InputError where none can.
    """
    wanted = spread_evenly(len(manifest), count)
    found = readable([manifest.path(row) for row in wanted], spec)
    rows = wanted[sorted(found)].tolist()
    if not rows:
        raise InputError(f"none of {len(wanted)} images of {manifest.name} can be read; `cxrfast prepare` says more.")

    def column(values: Sequence[str]) -> tuple[str, ...]:
        return tuple(values[row] for row in rows)

    kept = replace(
        manifest,
        images=column(manifest.images),
        groups=column(manifest.groups),
        views=column(manifest.views),
        studies=column(manifest.studies),
        labels=manifest.labels[rows],
        splits=column(manifest.splits) if manifest.splits else (),
        subgroups={name: column(values) for name, values in manifest.subgroups.items()},
    )
    return kept, len(wanted) - len(rows)


def pixels_apart(films: Films, pixels: np.ndarray, most: int = FEW) -> int:
    """Largest difference in grey levels between the plain pipeline's pixels and ours (n, S, S), of the first images."""
    first = range(min(most, len(pixels)))
    return max(int(np.abs(films.pixels(i).astype(int) - pixels[i][..., None]).max()) for i in first)


class Parts:
    """The parts of caching a manifest, each a method to be timed, and the plain pipeline's pass over the same files."""

    def __init__(
        self, tower: Backbone, spec: CacheSpec, manifest: Manifest, folder: Path, device: str = "auto"
    ) -> None:
        self.tower, self.spec, self.manifest, self.folder, self.device_name = tower, spec, manifest, folder, device
        self.device, self.cores = pick_device(device), hardware.cpu_count()
        self.encoder = encoder.Encoder(tower, spec, self.device, block=BLOCKS[self.device.type])
        self.paths = [manifest.path(i) for i in range(len(manifest))]
        self.mean, self.std = tower.statistics(spec.normalize)
        labels = np.zeros((len(self.paths), 1))
        self.films = Films(self.paths, labels, self.mean, self.std, size=spec.preprocess.size, flip=False)
        self.pixels, self.files = self.decode(), 0

    def decode(self) -> list[np.ndarray]:
        """Every file to pixels, on all cores."""
        with ThreadPoolExecutor(self.cores) as pool:
            return [found.pixels for found in pool.map(lambda path: load(path, self.spec.preprocess), self.paths)]

    def forward(self) -> list[np.ndarray]:
        """The frozen layers alone, on decoded pixels."""
        decoded, block = [encoder.Decoded(pixels=p) for p in self.pixels], self.encoder.block
        return [
            self.encoder.encode(decoded[i : i + block], range(len(decoded[i : i + block])))[0]
            for i in range(0, len(decoded), block)
        ]

    def whole(self) -> Path:
        """`cxrfast cache`; the file it wrote, the one before it deleted."""
        (self.folder / f"cache{self.files}.h5").unlink(missing_ok=True)
        self.files += 1
        out = self.folder / f"cache{self.files}.h5"
        build.run(
            CacheJob(manifest=self.manifest, backbone=self.tower, spec=self.spec, out=out, device=self.device_name)
        )
        return out

    def plain(self, workers: int = 2) -> None:
        """The plain pipeline's way with a film, once an epoch: decoded as RGB by loader workers, the whole tower."""
        with torch.inference_mode():
            for x, _ in loader(self.films, BATCH, workers=workers, shuffle=False):
                self.tower.visual(x.to(self.device)).cpu()

    def compare(self) -> dict[str, float]:
        """How far fast and slow are apart before either is timed: rows, embeddings of a few images, and pixels.

        Raises InputError where the tokens written do not lead to the embedding of the whole tower.
        """
        stored = np.array(store.ActivationFile(self.whole()).activations)
        assert np.array_equal(stored, np.concatenate(self.forward())), "the file is not what its parts give"
        rest = Tail(self.tower.visual, unfreeze_blocks=self.spec.unfreeze_blocks, classes=1).to(self.device).eval()
        mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (self.mean, self.std))
        x = encoder.normalise(torch.from_numpy(np.stack(self.pixels[:FEW])), mean, std)
        with torch.inference_mode():
            want = F.normalize(self.tower.visual(x.to(self.device)), dim=-1)
            found = F.normalize(rest.embedding(torch.from_numpy(stored[:FEW, 0]).float().to(self.device)), dim=-1)
        apart, allowed = float((want - found).abs().max()), TOLERANCE[self.spec.dtype]
        if not apart < allowed:
            raise InputError(
                f"cached tokens and the whole tower differ by {apart:.1e} in the embedding (allowed {allowed:g}), so "
                "their times compare nothing; try --dtype float32."
            )
        return {
            "largest_embedding_difference": apart,
            "largest_pixel_difference": pixels_apart(self.films, np.stack(self.pixels)),
        }


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """(wall, CPU) seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(
    parts: Parts, rounds: int, *, workers: int = 2, on_round: Callable[[int], None] | None = None
) -> CacheResult:
    """Seconds an image of each part, of the whole and of the plain pass, in interleaved rounds; JSON-ready.

    On a CPU the parts share the cores, so the bound of the whole is their CPU seconds over the cores; on a GPU it is
    the slower part. The files are warm: what a cold disk costs is not in it.
    """
    before, difference, n = hardware.gpu_states(), parts.compare(), len(parts.paths)

    def one_round() -> dict[str, float]:
        (d, d_cpu), (f, f_cpu), (w, _) = map(measured, (parts.decode, parts.forward, parts.whole))
        p, _ = measured(lambda: parts.plain(workers))
        bound = (d_cpu + f_cpu) / parts.cores if parts.device.type == "cpu" else max(d, f)
        return {"decode": d / n, "forward": f / n, "whole": w / n, "plain": p / n, "bound": bound / n}

    samples, watch = run_rounds(one_round, rounds, on_round)
    ratios = {
        "bound over whole": ratio_fields(samples["bound"], samples["whole"]),
        "plain over whole": ratio_fields(samples["plain"], samples["whole"]),
    }
    return {
        **results.turns(CACHE, samples, watch, before),
        "seconds_per_image": spreads(samples),
        "images": n,
        "weights": parts.tower.source,
        "views": ",".join(parts.spec.views),
        "image_size": parts.tower.image_size,
        "device": parts.device.type,
        "workers": parts.cores,
        "bound_is": "CPU seconds of the parts / cores" if parts.device.type == "cpu" else "slower part",
        "ratios": ratios,
        "largest_embedding_difference": difference["largest_embedding_difference"],
        "largest_pixel_difference": int(difference["largest_pixel_difference"]),
        "extrapolated": {"whole": cache_seconds(median(samples["whole"]))},
    }


def cache_seconds(seconds_per_image: float) -> float:
    """Seconds to cache Indiana, extrapolated: images x seconds an image, with the views that were measured."""
    return INDIANA * seconds_per_image


def describe(result: CacheResult) -> str:
    """The result as a table a person reads."""
    names = {
        "decode": "decoding alone",
        "forward": "frozen layers alone",
        "whole": "cxrfast cache",
        "bound": f"bound: {result['bound_is']}",
        "plain": "plain pipeline, each epoch",
    }
    rows = [
        [text, *(f"{1000 * result['seconds_per_image'][name][key]:.1f}" for key in ("median", "min", "max"))]
        for name, text in names.items()
    ]
    views, whole = len(result["views"].split(",")), result["seconds_per_image"]["whole"]["median"]
    share, plain = (result["ratios"][f"{name} over whole"] for name in ("bound", "plain"))
    sized = " of {0} x {0} pixels".format(result["image_size"]) if "image_size" in result else ""
    lines = [
        to_plain(Table(columns=["ms an image", "median", "min", "max"], rows=rows)),
        "",
        f"{result['images']} images{sized}, {views} view(s), {share['n']} rounds in turn, warm files, "
        f"{result['workers']} decoding thread(s), {result['device']}, {result['machine']['cpu']}",
        f"bound over whole: {results.describe_ratio(share)}",
        f"plain over whole: {results.describe_ratio(plain)}; the cache is made once, the plain "
        "pipeline takes its time every epoch (one view, whole tower, 2 loader workers)",
        results.RATIOS,
        f"embeddings agree within {result['largest_embedding_difference']:.1e}; pixels differ by at most "
        f"{result['largest_pixel_difference']} grey level(s)",
        f"Indiana, EXTRAPOLATED: {INDIANA:,} images x {1000 * whole:.1f} ms = "
        f"{duration(cache_seconds(whole))} with {views} view(s), once; `cxrfast bench train CACHE` has the search",
    ]
    if left := result.get("left_out"):
        lines.append(f"{left} image(s) cannot be read and were left out; `cxrfast cache SOURCE` names them")
    if result["weights"].startswith("random:"):
        lines.append("note: random weights; they do not change the time")
    return "\n".join([*lines, *results.describe_noise(result)])
