"""What a fit exported of a run, so that a second call of it need not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ... import __version__
from ...system.files import write_json

FILE = "fit.json"


def describe_request(run: Path, flags: Mapping[str, Any]) -> dict[str, str]:
    """All that decides the model files: flags of the export, the run's model, and this version."""
    from ...training.run_folder import read_info

    asked = {name: str(value) for name, value in sorted(flags.items())}
    return asked | {"model_sha256": read_info(run)["model_sha256"], "cxr-fast": __version__}


def read_kept(run: Path, request: Mapping[str, str]) -> int | None:
    """The exit code of an export of this very request whose files are there, None where there is none."""
    try:
        found = json.loads((run / FILE).read_text(encoding="utf-8"))
        same = found["export"] == request and all(Path(path).is_file() for path in found["files"])
        return int(found["exit_code"]) if same and found["files"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_kept(run: Path, request: Mapping[str, str], files: list[Path], code: int) -> None:
    """Write `fit.json` into a run folder."""
    found = {"export": dict(request), "files": [str(path.absolute()) for path in files], "exit_code": code}
    write_json(run / FILE, found, "--out")
