"""How close `cxrfast cache` comes to what its parts cost: decode alone, forward alone, the whole, interleaved.

    python benchmarks/run_cache.py [--images DIR] [--count 48] [--rounds 5]

On a CPU the parts share the cores, so the bound is their CPU seconds over the cores; on a GPU it is the slower part.
Without --images, phantoms are drawn at acquisition size (2,400 x 2,000). Fast and slow are compared before timing.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from cxr_fast import backbone, cpu, datasets, encode, store, timing
from cxr_fast.config import CacheSpec
from cxr_fast.preprocess import IMAGE_SUFFIXES, load


def dataset(folder: Path, images: Path | None, count: int) -> datasets.Manifest:
    """`count` full-size files: copies of those in `images` in turn, or phantoms."""
    if images is None:
        from cxr_fast.bench import films

        sources = [Path(path) for path in films(folder)]
    else:
        sources = sorted(p for p in images.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    with open(folder / "manifest.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "group", "A"])
        for i in range(count):
            source = sources[i % len(sources)]
            shutil.copy(source, folder / f"copy{i}{source.suffix}")
            rows.writerow([f"copy{i}{source.suffix}", str(i), str(i % 2)])
    return datasets.read(folder / "manifest.csv")


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """(wall, CPU) seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weights", default="random:0")
    parser.add_argument("--views", default="plain")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cpu.prepare()
    with tempfile.TemporaryDirectory() as scratch:
        result = run(Path(scratch), args)
    common.save("cache", result, args.json)


def run(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    tower = backbone.load(args.weights)
    spec = encode.with_size(CacheSpec(weights=args.weights, views=tuple(args.views.split(","))), tower)
    manifest = dataset(folder, args.images, args.count)
    device, cores = encode.pick_device(args.device), timing.cpu_count()
    block = encode.BLOCKS[device.type]
    encoder = encode.Encoder(tower, spec, device, block=block)
    paths = [manifest.path(i) for i in range(len(manifest))]
    out, number = folder / "cache.h5", iter(range(1000))

    def decode() -> list[np.ndarray]:
        with ThreadPoolExecutor(cores) as pool:
            return [pixels for pixels, _ in pool.map(lambda path: load(path, spec.preprocess), paths)]

    pixels = decode()

    def forward() -> list[np.ndarray]:
        decoded = [encode.Decoded(pixels=p) for p in pixels]
        return [
            encoder.encode(decoded[i : i + block], range(len(decoded[i : i + block])))[0]
            for i in range(0, len(decoded), block)
        ]

    def whole() -> None:
        nonlocal out
        out = folder / f"cache{next(number)}.h5"
        encode.run(tower, manifest, spec, out, device=args.device)

    whole()
    assert np.array_equal(store.ActivationFile(out).activations, np.concatenate(forward())), "fast and slow differ"
    walls: dict[str, list[float]] = {"decode": [], "forward": [], "whole": []}
    shares, bounds = [], []
    with timing.other_cpu_share() as noise:
        for _ in range(args.rounds):
            (d, d_cpu), (f, f_cpu), (w, _) = measured(decode), measured(forward), measured(whole)
            for name, value in (("decode", d), ("forward", f), ("whole", w)):
                walls[name].append(value / len(paths))
            bounds.append(((d_cpu + f_cpu) / cores if device.type == "cpu" else max(d, f)) / len(paths))
            shares.append(bounds[-1] / walls["whole"][-1])
    spreads = {name: common.spread(values) for name, values in walls.items()} | {"bound": common.spread(bounds)}
    common.show(spreads, "s/image")
    share = common.spread(shares)
    print(f"bound / whole: {share['median']:.3f} [{share['min']:.3f}, {share['max']:.3f}] over {args.rounds} rounds")
    if noise.noisy:
        print(f"NOISY: other processes took {noise.share:.0%} of the machine")
    torch.cuda.empty_cache() if device.type == "cuda" else None
    return {
        "images": len(paths),
        "source": "phantoms" if args.images is None else "given files",
        "weights": args.weights,
        "views": args.views,
        "device": device.type,
        "workers": cores,
        "bound_is": "CPU seconds of the parts / cores" if device.type == "cpu" else "slower part",
        "seconds_per_image": spreads,
        "bound_over_whole": share,
        "target": 0.90,
        "noise": {"share": noise.share, "noisy": noise.noisy},
    }


if __name__ == "__main__":
    main()
