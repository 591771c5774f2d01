"""The entries of a model file that come of real films: `parity`, how far from torch, and `holdout`, its answers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from ...config import JPEG_95
from ...inference.shift.reference import point_digest, summarise_holdout
from ...metrics import calibration, drift
from ...metrics.drift import Drift, Yardstick
from ...training import predictions
from ...training.run_folder import Run, clean
from ...unlikeness.reference import LIMITS
from ..parity import Checks, OpenFile, Parity

LIMIT = 1e-5  # of a float32 file, in probability


def parity_record(yardstick: Yardstick, part: str, parity: Parity, far: Drift, file: OpenFile) -> dict[str, Any]:
    """Return the entry, JSON-ready; files of earlier versions lack `yardstick`, `margin` and what is about mAP.

    `yardstick` says what the float32 model itself does on the same films after each change, by the change's name.
    """
    exact = file.variant == "fp32"
    found = clean(asdict(far))
    drifting = {
        "limit_macro_auc_drop": drift.AUC_DROP,
        "limit_map_drop": drift.MAP_DROP,
        "limit_flips_per_10000": yardstick.changes[JPEG_95].flips,
        "margin": found["margin"],
    }
    return {
        "against": "torch float32, the whole tower",
        "images": far.images,
        "part": part,
        "provider": file.provider,
        "max_probability_difference": parity.largest if exact else found["largest"],
        "p99_probability_difference": found["p99"],
        "flips_per_10000": far.flips,
        "macro_auc_torch": found["macro_auc"],
        "macro_auc_drop": found["macro_drop"],
        "map_torch": found["macro_ap"],
        "map_drop": found["map_drop"],
        "classes_with_auc": far.classes,
        "auc_drop_by_class": list(far.auc_drop),
        "by_batch": {str(k): v for k, v in parity.by_batch.items()},
        "to_cached_activations": parity.cached,
        "yardstick": {name: _change(change) for name, change in yardstick.changes.items()},
        **({"limit": LIMIT} if exact else drifting),
        **_unlikeness(parity, file.variant),
    }


def _unlikeness(parity: Parity, variant: str) -> dict[str, Any]:
    if parity.unlikeness is None:
        return {}
    limit = LIMITS[variant]
    return {"max_unlikeness_difference": parity.unlikeness, "limit_unlikeness_difference": limit}


def _change(change: Drift) -> dict[str, Any]:
    found = clean(asdict(change))
    return {
        "flips_per_10000": change.flips,
        "p99_probability_difference": found["p99"],
        "macro_auc_drop": found["macro_drop"],
        "map_drop": found["map_drop"],
    }


def holdout_record(run: Run, checks: Checks) -> dict[str, Any] | None:
    """Return the `holdout` entry of the exported model, for comparisons in daily use; None where nothing was held out.

    Of the final model and the views that the sweep scored the whole hold-out is known; of others the films of it that
    the export is checked on, by torch.
    """
    if checks.cached is not None:
        arrays = predictions.read(run.folder, run.info).arrays
        held = arrays["fold"] < 0
        raw, groups = arrays["final"][held], arrays["group"][held]
    else:
        raw, groups = checks.raw[checks.held], checks.groups[checks.held]
    known = np.isfinite(raw).all(axis=1)
    if not known.any():
        return None
    fitted = calibration.apply(run.info["calibration"], raw[known])
    found = summarise_holdout(fitted, run.info["thresholds"], groups[known].tolist())
    return found | {"point": point_digest(run.info)}
