"""How fast batches of activation rows come out of a warm file: the memory map against h5py and against memcpy.

    python benchmarks/run_gather.py [--rows 4000] [--rounds 7]

Rows have the size of a ViT-B/16's, 197 x 768 float16 (302,592 bytes). All arms are checked against each other first.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import h5py
import numpy as np
import torch

from cxr_fast.activations import file as store
from cxr_fast.config import digest
from cxr_fast.system import hardware
from cxr_fast.training.fold import Activations

BATCH = 16


def make(path: Path, rows: int) -> None:
    """A complete file of random rows."""
    header = store.Header(
        meta={"fingerprint": digest({}), "fingerprint_parts": {}, "block": 64},
        shape=(rows, 1, 197, 768),
        dtype="float16",
        images=tuple(map(str, range(rows))),
        groups=tuple(map(str, range(rows))),
        studies=tuple(map(str, range(rows))),
        views=("",) * rows,
        classes=("A",),
        labels=np.zeros((rows, 1), np.int8),
    )
    store.create(path, header)
    rng = np.random.default_rng(0)
    with store.Writer(path) as writer:
        for start in range(0, rows, 64):
            indices = range(start, min(start + 64, rows))
            values = rng.standard_normal((len(indices), 1, 197, 768), np.float32).astype(np.float16)
            writer.rows(indices, values, ["0" * 64] * len(indices), [None] * len(indices))
        writer.finish()


def rate(work: Callable[[np.ndarray], object], batches: np.ndarray) -> float:
    """Rows a second."""
    began = time.perf_counter()
    for batch in batches:
        work(batch)
    return batches.size / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "a.h5"
        make(path, args.rows)
        file = store.ActivationFile(path)
        rows, cpu = file.activations, torch.device("cpu")
        zeros = torch.zeros(BATCH, dtype=torch.long)
        activations = Activations(rows, cpu)
        out = np.empty((BATCH, 1, 197, 768), np.float16)
        source = np.array(rows[:BATCH])
        h5 = h5py.File(path)
        arms: dict[str, Callable[[np.ndarray], object]] = {
            "row views, no copy": lambda batch: [rows[i] for i in batch],
            "batch copied, float16": lambda batch: np.take(rows, batch, axis=0, out=out, mode="clip"),
            "batch as the trainer takes it, float32": lambda batch: activations.gather(torch.from_numpy(batch), zeros),
            "memcpy of a batch from cache": lambda batch: np.copyto(out, source),
            "h5py index list": lambda batch: h5["activations"][np.sort(batch)],
        }
        rng = np.random.default_rng(1)
        check = rng.permutation(args.rows)[:BATCH]
        assert np.array_equal(rows[check], h5["activations"][np.sort(check)][np.argsort(np.argsort(check))])
        assert np.array_equal(activations.gather(torch.from_numpy(check), zeros), rows[check, 0].astype(np.float32))
        np.array(rows[:, 0, 0, 0])  # every page is warm: it was just written
        found: dict[str, list[float]] = {name: [] for name in arms}
        with hardware.OtherCpu() as noise:
            for _ in range(args.rounds):
                batches = rng.permutation(args.rows)[: args.rows // BATCH * BATCH].reshape(-1, BATCH)
                for name, work in arms.items():
                    found[name].append(rate(work, batches[:40] if name.startswith("h5py") else batches))
        h5.close()
    spreads = {name: common.spread(values) for name, values in found.items()}
    common.show(spreads, "rows/s")
    if noise.noisy:
        print(f"NOISY: other processes took {noise.share:.0%} of the machine")
    result = {"rows": args.rows, "batch": BATCH, "rows_per_second": spreads}
    common.save("gather", result | {"noise": {"share": noise.share, "noisy": noise.noisy}}, args.json)


if __name__ == "__main__":
    main()
