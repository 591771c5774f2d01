"""Write a copy of a model file with other thresholds and calibration: the same weights, and what was set where."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import InputError
from ..inference import model_file, verify
from ..inference.model_file import PREFIX, SEAL, VARIANTS
from ..inference.predictor import Predictor, golden_pixels
from ..inference.session import open_model
from ..inference.shift.reference import KEY as HOLDOUT
from ..inference.shift.reference import point_digest, summarise_holdout
from ..metrics import calibration
from ..report.summary import Record
from ..system.files import disk_reason, folders_above, put_in_place
from .evaluation import Source, name_data
from .graph_edit import PROBABILITIES, RAW, recalibrate_graph, replace_entries
from .recalibration import KEEP, NewPoint


def check_out(out: Path, model: Path, variant: str) -> None:
    """Raise InputError where the copy cannot be written under this name, before hours of predicting."""
    if out.suffix != ".onnx" or out.is_dir():
        raise InputError(f"--recalibrate: {out} must be the name of a file that ends in .onnx.")
    if out.exists() and model.exists() and os.path.samefile(out, model):
        raise InputError(f"--recalibrate: {out} is the model itself; give another name.")
    named = [each for each in VARIANTS if f".{each}." in out.name]
    if named and variant not in named:
        raise InputError(f"--recalibrate: {out} names the variant {named[0]}, and the model is {variant}.")
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir():
        raise InputError(f"--recalibrate: cannot write {out}: {above} is a file.")


def check_source(predictor: Predictor, device: str) -> None:
    """Raise InputError where the model does not pass `cxrfast verify` here: neither would its copy."""
    report = verify.verify(predictor.path, device=device, threads=predictor.threads)
    if not report.ok:
        raise InputError(f"--recalibrate: {predictor.source} does not pass `cxrfast verify`: {_wrong(report)}.")


def _wrong(report: verify.Report) -> str:
    return "; ".join(f"{each.name}: {each.detail}" for each in report.checks if not each.ok)


def write_copy(source: Source, point: NewPoint, figures: Record, out: Path, device: str) -> verify.Report:
    """Write the copy, kept only if `cxrfast verify` passes it on this device; its report.

    `figures` go into the metadata: those of the file and those of the new point, out of sample. Raises InputError where
    the copy cannot be written, or does not pass.
    """
    model = source.predictor.path
    data = model.read_bytes()
    info = dict(source.predictor.info)
    added: Counter[str] = Counter()
    if point.kind != KEEP:
        assert point.calibration is not None
        data, added = recalibrate_graph(data, point.calibration)
    info |= _changes(source, point, figures)
    # What daily films are compared with is these films: the hold-out was answered at other thresholds.
    summary = summarise_holdout(point.probs, point.thresholds.tolist(), point.groups.tolist())
    info[HOLDOUT] = summary | {"point": point_digest(info)}
    info["nodes"] = _count(info.get("nodes"), added)
    scratch = out.with_name(f"{out.name}.partial.{os.getpid()}")
    try:
        with folders_above(out):
            try:
                if point.kind != KEEP:
                    _save(data, model, info, scratch)
                    info["golden"] = _golden(info["golden"], source, point, scratch)
                _save(data, model, info, scratch)
                report = verify.verify(scratch, device=device, threads=source.predictor.threads)
                if not report.ok:
                    raise InputError(f"--recalibrate: {out} was not kept: verify finds {_wrong(report)}.")
                put_in_place(scratch, out)
            finally:
                with contextlib.suppress(OSError):
                    scratch.unlink()
    except OSError as error:
        raise InputError(f"--recalibrate: cannot write {out}: {disk_reason(out, error)}.") from error
    return report


def _save(data: bytes, model: Path, info: dict[str, Any], path: Path) -> None:
    """Write the graph with these entries; those of other programs stay."""
    others = [(key, value) for key, value in model_file.entries(model).items() if not key.startswith(PREFIX)]
    own = [(PREFIX + key, json.dumps(value)) for key, value in info.items() if key != SEAL]
    model_file.write(path, replace_entries(data, [*own, *others]))


def _changes(source: Source, point: NewPoint, figures: Record) -> dict[str, Any]:
    """The entries of the copy that differ from those of the file."""
    info, name = source.predictor.info, source.manifest.name
    total = len(source.predictor.labels)
    said = f"{point.target} on {name}, for {len(point.fitted)} of {total} classes"
    others = f"; others: {info.get('threshold_source')}" if len(point.fitted) < total else ""
    return {
        "thresholds": [float(limit) for limit in point.thresholds],
        "threshold_source": said + others,
        "calibration": point.calibration,
        "recalibrated": {
            "data": name,
            "trained_on": name_data(info, "data", "name"),
            "written_by": f"cxr-fast {__version__}",
            "from_content_sha256": info[SEAL],
            "images": figures["images"],
            "groups": figures["groups"],
            "target": point.target,
            "calibration": "kept" if point.kind == KEEP else point.kind,
            "classes": list(point.fitted),
            "kept": point.refused,
            "folds": point.folds,
            "before": figures["before"],
            "out_of_sample": figures["out_of_sample"],
        },
    }


def _count(nodes: Any, added: Counter[str]) -> dict[str, int]:
    """The operations of the graph, by their number."""
    found = Counter(nodes if isinstance(nodes, dict) else {})
    found.update(added)
    return {kind: count for kind, count in found.items() if count > 0}


def _golden(pair: dict[str, Any], source: Source, point: NewPoint, path: Path) -> dict[str, Any]:
    """The golden pair behind the new calibration: its answer here, and torch's raw one calibrated.

    Of a file that was calibrated the raw probabilities of torch are not kept: those of the file stand for them. The
    tolerance grows as far as the new calibration spreads what the old one allowed.
    """
    pixels = golden_pixels(source.predictor.spec.size)
    opened = open_model(path, "cpu", source.predictor.threads, strict=False, check=False)
    expected, raw = (opened.session.run([name], {"pixels": pixels})[0] for name in (PROBABILITIES, RAW))
    if source.predictor.info.get("calibration") is None:
        raw_of_torch = np.array([pair["probabilities"]], np.float32)
    else:
        raw_of_torch = raw
    most = float(pair["tolerance"])
    ends = [calibration.apply(point.calibration, (raw + step).clip(0, 1)) for step in (-most, most)]
    spread = max(float(np.abs(end - expected).max()) for end in ends)
    return {
        **pair,
        "probabilities": [float(p) for p in calibration.apply(point.calibration, raw_of_torch)[0]],
        "expected": [float(p) for p in expected[0]],
        "tolerance": min(max(most, spread), verify.LOOSEST),
        "provider": opened.provider,
    }
