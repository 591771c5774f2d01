"""Peak resident memory of `cxrfast cache` against the number of images: it must not grow with it.

python benchmarks/run_memory.py [--counts 500 5000]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import common

from cxr_fast.data.phantom.dataset import write_dataset


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    drawn = write_dataset(folder / "data", studies=max(args.counts), size=64, limit_images=max(args.counts))
    assert drawn == max(args.counts)

    def peak(count: int) -> float:
        """Peak resident MiB of one run over the first `count` images."""
        out = folder / f"{count}.h5"
        words = ["cache", folder / "data", "--weights", args.weights, "--limit", count, "--device", "cpu", "--out", out]
        memory = common.cxrfast(*words)[1]
        out.unlink()
        return memory / 2**20

    samples, _ = common.turns({str(count): lambda count=count: peak(count) for count in args.counts}, args.rounds)
    return {"weights": args.weights, "peak_mb": common.spreads(samples, "peak MB at N images")}


if __name__ == "__main__":
    common.run(measure, "memory", __doc__, counts=[500, 5000], rounds=3, weights="random:0:test_vit")
