"""How close `cxrfast cache` comes to what its parts cost: decode alone, forward alone, the whole, interleaved.

    python benchmarks/run_cache.py [--images DIR] [--count 48] [--rounds 5]

`cxrfast bench cache` on made-up data: copies of the files in DIR, or phantoms drawn at acquisition size
(2,400 x 2,000). On a CPU the parts share the cores, so the bound is their CPU seconds over the cores; on a GPU it is
the slower part. The plain pipeline's pass over the same files is the baseline. Fast and slow are compared first.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import common

from cxr_fast.activations.encoder import with_size
from cxr_fast.bench import caching
from cxr_fast.config import CacheSpec
from cxr_fast.models import backbone, device

TARGET = 0.90
KEPT = ("images", "weights", "views", "device", "workers", "bound_is", "seconds_per_image", "ratios", "noise")
KEPT += ("largest_embedding_difference", "largest_pixel_difference")


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    device.prepare()
    tower = backbone.load(args.weights)
    spec = with_size(CacheSpec(weights=args.weights, views=tuple(args.views.split(","))), tower)
    manifest = caching.copies(folder, args.images, args.count)
    found = caching.measure(caching.Parts(tower, spec, manifest, folder, args.device), args.rounds)
    assert args.images or found["largest_pixel_difference"] == 0, "the plain pipeline saw other pixels"
    print(caching.describe(found))
    shares = common.ratios(found["samples"]["bound"], found["samples"]["whole"])
    return {name: found[name] for name in KEPT} | {
        "source": "phantoms" if args.images is None else "given files",
        "bound_over_whole": common.spread(shares),
        "target": TARGET,
    }


if __name__ == "__main__":
    options = {"images": Path, "count": 48, "rounds": 5, "weights": "random:0", "views": "plain", "device": "auto"}
    common.run(measure, "cache", __doc__, **options)
