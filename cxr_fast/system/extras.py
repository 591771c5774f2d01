"""Say which extra of this package brings a missing library, and the line that installs it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

# Which extra of pyproject.toml brings a library, by the name that is imported.
EXTRA = {
    **dict.fromkeys(("torch", "timm", "open_clip", "h5py", "safetensors", "onnx"), "train"),
    **dict.fromkeys(("scipy", "iterstrat"), "train"),
    "sklearn": "recalibrate",
    "onnxruntime": "cpu",
    **dict.fromkeys(("pydicom", "pylibjpeg"), "dicom"),
    "pyarrow": "parquet",
    "openpyxl": "excel",
    "huggingface_hub": "hub",
    "ray": "cluster",
    **dict.fromkeys(("mlflow", "tensorboard", "wandb"), "log"),
}
ROOT = Path(__file__).resolve().parents[2]


def install(extra: str, root: Path = ROOT) -> str:
    """Return the line that installs an extra: of the folder where this package is a checkout, else by its name."""
    pip = "pip" if importlib.util.find_spec("pip") else "uv pip"
    where = root if (root / "pyproject.toml").is_file() else "cxr-fast"
    return f"{pip} install {'-e ' if where == root else ''}'{where}[{extra}]'"


def needs(library: str) -> str:
    """Return the end of a line that begins with who needs a library: that it is absent, and how to install it."""
    extra = EXTRA[library]
    either = f"the extra {extra}" if extra != "cpu" else "the extra cpu, or gpu on a machine with an NVIDIA GPU"
    return f"needs {library}, which is not installed; {either} brings it: {install(extra)}"


def missing(error: ImportError) -> str:
    """Return the library of ours that an import did not find, by the name that is imported; empty for another error."""
    name = (error.name or "").partition(".")[0]
    return name if isinstance(error, ModuleNotFoundError) and name in EXTRA else ""
