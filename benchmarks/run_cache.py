"""How close `cxrfast cache` comes to what its parts cost: decode alone, forward alone, the whole, interleaved.

    python benchmarks/run_cache.py [--images DIR] [--count 48] [--rounds 5]

`cxrfast bench cache` on made-up data: copies of the files in DIR, or phantoms drawn at acquisition size
(2,400 x 2,000). On a CPU the parts share the cores, so the bound is their CPU seconds over the cores; on a GPU it is
the slower part. The plain pipeline's pass over the same files is the baseline. Fast and slow are compared first.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import common

from cxr_fast.activations import encoder
from cxr_fast.bench import caching
from cxr_fast.config import CacheSpec
from cxr_fast.models import backbone, device

TARGET = 0.90


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
    device.prepare()
    with tempfile.TemporaryDirectory() as scratch:
        result = run(Path(scratch), args)
    common.save("cache", result, args.json)


def run(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    tower = backbone.load(args.weights)
    spec = encoder.with_size(CacheSpec(weights=args.weights, views=tuple(args.views.split(","))), tower)
    manifest = caching.copies(folder, args.images, args.count)
    parts = caching.Parts(tower, spec, manifest, folder, args.device)
    found = caching.measure(parts, args.rounds)
    assert args.images or found["largest_pixel_difference"] == 0, "the plain pipeline saw other pixels"
    print(caching.describe(found))
    samples = found["samples"]
    shares = [bound / whole for bound, whole in zip(samples["bound"], samples["whole"], strict=True)]
    kept = ("images", "weights", "views", "device", "workers", "bound_is", "seconds_per_image", "ratios", "noise")
    kept += ("largest_embedding_difference", "largest_pixel_difference")
    return {name: found[name] for name in kept} | {
        "source": "phantoms" if args.images is None else "given files",
        "bound_over_whole": common.spread(shares),
        "target": TARGET,
    }


if __name__ == "__main__":
    main()
