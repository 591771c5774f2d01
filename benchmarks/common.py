"""What every driver records beside its figures, and where the result goes."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import cxr_fast
from cxr_fast.bench import measure
from cxr_fast.system import hardware

HERE = Path(__file__).parent
spread = measure.spread


def environment() -> dict[str, Any]:
    """Date, commit, library versions and machine."""
    import numpy
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "versions": {"cxr-fast": cxr_fast.__version__, "torch": torch.__version__, "numpy": numpy.__version__},
        "gpu": gpu,
        "machine": hardware.machine(),
    }


def commit() -> str | None:
    """Short revision of this checkout; None where it is a copy without one, or git is not there."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


def show(spreads: dict[str, dict[str, float | int]], unit: str) -> None:
    """A table of spreads."""
    width = max(map(len, spreads))
    print(f"{unit:{width}}  {'median':>10}  {'min':>10}  {'max':>10}   n")
    for name, s in spreads.items():
        print(f"{name:{width}}  {s['median']:10.4g}  {s['min']:10.4g}  {s['max']:10.4g}  {s['n']:2d}")


def save(name: str, result: dict[str, Any], out: Path | None) -> None:
    """Write `results/NAME-DEVICE-DATE.json` (or `out`) and print the result as the last line."""
    env = environment()
    result = {"name": name, **env, **result}
    device = re.sub(r"[^a-z0-9]+", "-", str(env["gpu"] or env["machine"]["cpu"]).lower()).strip("-")
    path = out or HERE / "results" / f"{name}-{device}-{env['machine']['cores']}c-{env['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path.name}")
    print(json.dumps(result))
