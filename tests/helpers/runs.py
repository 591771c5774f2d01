"""What tests read of finished runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def arrays(run: Path) -> dict[str, np.ndarray]:
    """The arrays of a run's predictions."""
    with np.load(run / "predictions.npz") as file:
        return {name: file[name] for name in file.files}


def same_numbers(a: Path, b: Path) -> None:
    """Two runs have the same predictions and weights, to the bit."""
    one, two = arrays(a), arrays(b)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].tobytes() == two[name].tobytes(), name
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
