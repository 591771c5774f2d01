"""Peak resident memory of `cxrfast cache` against the number of images: it must not grow with it.

python benchmarks/run_memory.py [--counts 500,5000]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import common

from cxr_fast.data.phantom.dataset import write_dataset

MEASURE = """
import resource, sys
from cxr_fast.cli.main import main
try:
    main(sys.argv[1:], standalone_mode=False)
finally:
    print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(folder: Path, count: int, weights: str) -> float:
    """Peak resident MB of one run over the first `count` images."""
    arguments = ["cache", str(folder / "data"), "--weights", weights, "--limit", str(count), "--device", "cpu"]
    arguments += ["--out", str(folder / f"{count}.h5")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout.split("PEAK")[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="500,5000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", default="random:0:test_vit")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    counts = [int(count) for count in args.counts.split(",")]
    found: dict[str, list[float]] = {str(count): [] for count in counts}
    with tempfile.TemporaryDirectory() as scratch:
        drawn = write_dataset(Path(scratch) / "data", studies=max(counts), size=64, limit_images=max(counts))
        assert drawn == max(counts)
        for _ in range(args.rounds):
            for count in counts:
                found[str(count)].append(peak(Path(scratch), count, args.weights))
                (Path(scratch) / f"{count}.h5").unlink()
    spreads = {name: common.spread(values) for name, values in found.items()}
    common.show(spreads, "peak MB at N images")
    common.save("memory", {"weights": args.weights, "peak_mb": spreads}, args.json)


if __name__ == "__main__":
    main()
