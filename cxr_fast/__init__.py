"""Fine-tune BiomedCLIP on chest radiographs from cached activations; predict from one ONNX file without torch.

`import cxr_fast` loads nothing else: each name below loads its module when it is first used, and only the names that
encode, train or export load torch. The command `cxrfast` offers the same steps.
"""

import os
from importlib import import_module

# ONNX Runtime 1.29 and later report use to their maker unless this is set before they are imported. Seen with 1.32: the
# import alone leaves an identifier and a queue in the home folder; with this it leaves nothing.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

TYPE_CHECKING = False
if TYPE_CHECKING:  # what _MODULE says, for type checkers and editors; a test compares the two
    # isort: off
    from .activations.build import build_cache as build_cache
    from .activations.cache import Cache as Cache, open_cache as open_cache
    from .config import CacheSpec as CacheSpec, PreprocessSpec as PreprocessSpec
    from .config import SweepOptions as SweepOptions, SweepSpec as SweepSpec, TrainSpec as TrainSpec
    from .data.labels import LabelRules as LabelRules
    from .data.manifest import Manifest as Manifest, read_dataset as read_dataset, write_manifest as write_manifest
    from .errors import CxrFastError as CxrFastError, DeviceError as DeviceError, ImageError as ImageError
    from .errors import InputError as InputError, Interrupted as Interrupted, ParityError as ParityError
    from .errors import SchemaError as SchemaError
    from .export.entries.settings import ExportSpec as ExportSpec
    from .export.variants import export_run as export_run
    from .inference.predictor import Predictor as Predictor, Result as Result
    from .report.comparison import compare_runs as compare_runs
    from .report.evaluation import evaluate as evaluate
    from .report.writer import write_report as write_report
    from .runs.sweep import Sweep as Sweep
    from .training.operating_points import OperatingPoint as OperatingPoint
    from .training.run_folder import read_run as read_run
    from .training.run_record import RunRecord as RunRecord, read_record as read_record
    # isort: on

__version__ = "0.1.0"

_MODULE = {
    **dict.fromkeys(("Cache", "open_cache"), "activations.cache"),
    **dict.fromkeys(("CacheSpec", "PreprocessSpec", "SweepOptions", "SweepSpec", "TrainSpec"), "config"),
    "LabelRules": "data.labels",
    **dict.fromkeys(("Manifest", "read_dataset", "write_manifest"), "data.manifest"),
    **dict.fromkeys(("CxrFastError", "DeviceError", "ImageError", "InputError"), "errors"),
    **dict.fromkeys(("Interrupted", "ParityError", "SchemaError"), "errors"),
    **dict.fromkeys(("Predictor", "Result"), "inference.predictor"),
    "build_cache": "activations.build",
    "compare_runs": "report.comparison",
    "evaluate": "report.evaluation",
    "ExportSpec": "export.entries.settings",
    "export_run": "export.variants",
    "OperatingPoint": "training.operating_points",
    "read_run": "training.run_folder",
    **dict.fromkeys(("RunRecord", "read_record"), "training.run_record"),
    "Sweep": "runs.sweep",
    "write_report": "report.writer",
}
__all__ = sorted(_MODULE)


def __getattr__(name: str) -> object:
    """Load a public name when it is first used."""
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f".{_MODULE[name]}", __name__), name)
    except ModuleNotFoundError as error:
        from .system.extras import missing, needs

        if not (library := missing(error)):
            raise
        raise ModuleNotFoundError(f"cxr_fast.{name} {needs(library)}", name=error.name) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
