"""Broken model files through `Predictor` and `verify`, in a process of its own: a crash is then seen, and takes nobody
along. No pytest here. A line of JSON a file; the last name begun is the one that crashed or hung."""

from __future__ import annotations

import json
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cxr_fast import model_check
from cxr_fast.errors import CxrFastError
from cxr_fast.predict import Predictor

MEMORY = 16 << 30


def images() -> list[np.ndarray]:
    """Two films that a model answers differently."""
    rng = np.random.default_rng(4)
    return [rng.integers(0, 256, (40, 50), np.uint8), np.tile(np.arange(90, dtype=np.uint8), (90, 1))]


def answers(path: Path) -> list[list[float]]:
    """A row an image."""
    return [list(row.values()) for row in Predictor(path, device="cpu", threads=1)(images())]


def verdict(path: Path) -> str:
    """PASS, or the checks that differ."""
    report = model_check.verify(path, device="cpu", threads=1)
    model_check.describe(report)
    return "PASS" if report.ok else "DIFFERS: " + ", ".join(check.name for check in report.checks if not check.ok)


def told(work: Callable[[Path], Any], path: Path) -> dict[str, Any]:
    """What came of it: `found`, `refused` with one of our messages, or `traceback`."""
    try:
        return {"found": work(path)}
    except CxrFastError as error:
        return {"refused": str(error)}
    except Exception:
        return {"traceback": traceback.format_exc()}


def main(folder: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for path in sorted(Path(folder).glob("*.onnx")):
        print(json.dumps({"begins": path.name}), flush=True)
        found = {"predict": told(answers, path), "verify": told(verdict, path)}
        print(json.dumps({"name": path.name, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
