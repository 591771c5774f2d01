"""Whether a model file answers here as it did where it was exported: bytes, labels, pixels, golden answer."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from ..data.images import flip, self_check
from ..errors import CxrFastError, DeviceError, InputError
from ..system import hardware
from ..system.files import file_sha256
from . import model_file
from .model_file import is_number
from .predictor import Predictor, golden_pixels
from .session import VARIANTS

KEYS = (
    *("schema", "written_by", "variant", "labels", "labels_sha256", "thresholds", "threshold_source", "calibration"),
    *("final", "preprocess", "pixel_check", "dicom_policy", "mean", "std", "weights", "provenance", "backbone"),
    *("tower_sha256", "model_sha256", "trainable", "cache_fingerprint", "data", "nodes", "toolchain", "parity"),
    *("golden", "intended_use", model_file.SEAL),
)
RECIPE = "pixels[0, i, j] = (7*i + 13*j + i*j//16) % 256"
# A golden pair that lets more than this pass checks nothing: most thresholds are smaller.
LOOSEST = 0.1
AUC_TEXT = "macro AUC drop"
LIMITS = (
    ("max_probability_difference", "limit", "largest difference in probability"),
    ("flips_per_10000", "limit_flips_per_10000", "decisions in 10,000 that change sides"),
    ("macro_auc_drop", "limit_macro_auc_drop", AUC_TEXT),
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing looked at: whether it is as the file says, and what was found."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `verify` found of one model file; `note` is what must be said beside every figure of it."""

    path: str
    bytes: int
    sha256: str
    variant: str
    provider: str
    note: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)


@dataclass(frozen=True, kw_only=True)
class Unjudged:
    """A model file that could not be checked, and why."""

    path: str
    error: CxrFastError


def models(path: Path) -> list[Path]:
    """The model files to check: the file itself, or every `model.*.onnx` of a folder. Raises InputError for none."""
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("model.*.onnx"))
    if not found:
        raise InputError(f"{path}: no model.*.onnx in this folder; `cxrfast export RUN` makes one.")
    return found


def verify(path: Path, *, device: str = "auto", threads: int | None = None) -> Report:
    """Check a model file on the machine and the device that will run it; nothing is run whose bytes are damaged.

    Raises InputError for a file that is not ours or cannot be judged, SchemaError for another schema, DeviceError
    for a device that cannot be had.
    """
    info = model_file.read(path, check=False)
    content = _content(info, path)
    checks = [content, _keys(info, path), _labels(info), _preprocessing(info), _limits(info)]
    provider = ""
    if content.ok:
        predictor = Predictor(path, device=device, threads=threads, check=False)
        provider = predictor.where
        checks += [_graph(predictor), *_answers(predictor)]
    else:
        checks.append(Check(name="golden answer", ok=False, detail="not run: the content differs"))
    return Report(
        path=str(path),
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        variant=str(info.get("variant")),
        provider=provider,
        note=str(info.get("provenance") or ""),
        checks=tuple(checks),
    )


def verify_all(paths: list[Path], *, device: str = "auto", threads: int | None = None) -> list[Report | Unjudged]:
    """A report of each file, or why it could not be judged."""
    found: list[Report | Unjudged] = []
    for path in paths:
        try:
            found.append(verify(path, device=device, threads=threads))
        except CxrFastError as error:
            found.append(Unjudged(path=str(path), error=error))
    return found


def exit_code(found: list[Report | Unjudged]) -> int:
    """0 all pass, 1 one differs, 2 one could not be judged.

    Of several files those that this device cannot run (an int8 file on CUDA) do not count, unless none can.
    """
    errors = [item.error for item in found if isinstance(item, Unjudged)]
    if len(errors) == len(found) or any(not isinstance(error, DeviceError) for error in errors):
        return 2
    return 0 if all(item.ok for item in found if isinstance(item, Report)) else 1


def describe(found: Report | Unjudged) -> str:
    """A line a check, and PASS or FAIL; of a file that could not be judged why."""
    if isinstance(found, Unjudged):
        return f"{found.path}: NOT CHECKED\n  {str(found.error).removeprefix(found.path + ': ')}"
    width = max(len(check.name) for check in found.checks)
    on = f", on {found.provider}" if found.provider else ""
    lines = [f"{found.path}: {found.variant}, {found.bytes / 1e6:,.1f} MB, sha256 {found.sha256}{on}"]
    lines += [f"  {'ok' if c.ok else 'DIFFERS':7}  {c.name.ljust(width)}  {c.detail}" for c in found.checks]
    lines += [f"note: {found.note.upper()}"] * bool(found.note)
    return "\n".join([*lines, "PASS" if found.ok else "FAIL"])


def to_json(found: Report | Unjudged) -> dict[str, Any]:
    """The same as JSON-ready values."""
    if isinstance(found, Unjudged):
        return {"path": found.path, "verdict": "NOT CHECKED", "error": str(found.error)}
    return {**asdict(found), "verdict": "PASS" if found.ok else "FAIL"}


# The file.


def _content(info: dict[str, Any], path: Path) -> Check:
    found, told = model_file.content_sha256(path), info[model_file.SEAL]
    if found == told:
        return Check(name="content", ok=True, detail=f"every byte as it was written, sha256 {found[:16]}")
    detail = f"sha256 {found[:16]}, the file says {told[:16]}: damaged or edited since; export the run again"
    return Check(name="content", ok=False, detail=detail)


def _keys(info: dict[str, Any], path: Path) -> Check:
    wrong = [f"no {name}" for name in KEYS if name not in info]
    named = [variant for variant in VARIANTS if f".{variant}." in path.name]
    if named and info.get("variant") not in named:  # a folder of variants is not opened with it
        wrong.append(f"variant {info.get('variant')!r} in a file called {path.name}")
    if "dicom_policy" in info and info["dicom_policy"] != info["preprocess"]["dicom_policy"]:
        wrong.append(f"dicom_policy {info['dicom_policy']!r} is not the one in preprocess")
    return Check(name="metadata", ok=not wrong, detail=", ".join(wrong) or f"schema {info['schema']}, {len(info)} keys")


def _labels(info: dict[str, Any]) -> Check:
    found, told = model_file.labels_sha256(info["labels"]), info["labels_sha256"]
    if found == told:
        return Check(name="labels", ok=True, detail=f"{len(info['labels'])} in this order, sha256 {found[:16]}")
    return Check(
        name="labels", ok=False, detail=f"sha256 of the names in order {found[:16]}, the file says {told[:16]}"
    )


def _preprocessing(info: dict[str, Any]) -> Check:
    spec = ", ".join(f"{name} {value}" for name, value in info["preprocess"].items())
    if "pixel_check" not in info:
        return Check(name="preprocessing", ok=False, detail="the file does not say which pixels it was made from")
    if info["pixel_check"] == self_check():
        return Check(name="preprocessing", ok=True, detail=f"{spec}; the built-in pictures give the same pixels here")
    made = info.get("toolchain")
    was = made.get("pillow") if isinstance(made, dict) else None
    by = f"it was made with Pillow {was}" if was else "it was made with another one"
    detail = f"the built-in pictures give other pixels with this Pillow {PIL.__version__}; {by}"
    return Check(name="preprocessing", ok=False, detail=detail)


def _graph(predictor: Predictor) -> Check:
    """Names, types and shapes; `pixels` and `probabilities` were checked when it was loaded."""
    count, outputs = len(predictor.labels), predictor.session.get_outputs()
    found = {node.name: (node.type, list(node.shape or [])[1:]) for node in outputs}
    wanted = {"logits": count, "probabilities": count}
    if predictor.info.get("calibration") is not None:
        wanted["raw_probabilities"] = count
    wrong = [f"no {name} float (N, {n})" for name, n in wanted.items() if found.get(name) != ("tensor(float)", [n])]
    wrong += [f"unknown output {name}" for name in found if name not in (*wanted, "embedding")]
    size = predictor.spec.size
    text = f"pixels uint8 (N, {size}, {size}) to {', '.join(found)}, {count} classes"
    return Check(name="graph", ok=not wrong, detail=", ".join(wrong) or text)


# The answers.


def _answers(predictor: Predictor) -> list[Check]:
    pair = predictor.info.get("golden")
    if wrong := _pair_wrong(pair, len(predictor.labels)):
        return [Check(name="golden answer", ok=False, detail=wrong)]
    assert isinstance(pair, dict)
    pixels = golden_pixels(predictor.spec.size)
    try:
        alone = predictor.probabilities(pixels)[0]
        beside = predictor.probabilities(np.concatenate([pixels, flip(pixels)]))[0]
    except InputError as error:
        return [Check(name="golden answer", ok=False, detail=str(error).removeprefix(f"{predictor.path}: "))]
    return [_golden(predictor, pair, alone), _batch(pair["tolerance"], alone, beside)]


def _pair_wrong(pair: Any, count: int) -> str:
    """Why a golden pair cannot be used; empty where it can."""
    if not isinstance(pair, dict):
        return "the file has no golden pair"
    if pair.get("recipe") != RECIPE:
        return "the golden input is made by a recipe that this version does not know"
    for name in ("expected", "probabilities"):
        values = pair.get(name)
        if not isinstance(values, list) or len(values) != count or not all(map(is_number, values)):
            return f"the golden pair's {name} are not {count} numbers"
    tolerance = pair.get("tolerance")
    if tolerance is None or not is_number(tolerance) or not 0 < tolerance <= LOOSEST:
        return f"the golden pair's tolerance is not a number above 0 and up to {LOOSEST:g}"
    return ""


def _limits(info: dict[str, Any]) -> Check:
    """Whether the file was within its limits where it was exported; `--allow-drift` keeps one that was not."""
    parity = info.get("parity")
    parity = parity if isinstance(parity, dict) else {}
    told = [(text, parity.get(name), parity[limit]) for name, limit, text in LIMITS if is_number(parity.get(limit))]
    if not told:
        return Check(name="drift", ok=False, detail="the file does not say what it was held to")
    # No AUC is defined where no class has both signs; the other limits hold then.
    over = [told for told in told if not (is_number(told[1]) and told[1] <= told[2]) and told[0] != AUC_TEXT]
    over += [told for told in told if told[0] == AUC_TEXT and is_number(told[1]) and told[1] > told[2]]
    shown = ", ".join(f"{text} {'none' if value is None else format(value, '.3g')} (limit {limit:g})"
                      for text, value, limit in over or told)  # fmt: skip
    return Check(
        name="drift", ok=not over, detail=f"from torch where exported: {shown}" + "; kept all the same" * bool(over)
    )


def _golden(predictor: Predictor, pair: dict[str, Any], found: np.ndarray) -> Check:
    expected = np.array(pair["expected"], np.float64)
    apart = np.abs(found - expected).max()
    ok = bool(apart <= pair["tolerance"])  # a NaN is not
    flips = int(((found >= predictor.thresholds) != (expected >= predictor.thresholds)).sum())
    torch = np.abs(found - np.array(pair["probabilities"], np.float64)).max()
    detail = (
        f"largest difference {apart:.1e} to the answer where it was exported (tolerance {pair['tolerance']:g}), "
        f"{flips} of {len(found)} decisions flip; {torch:.1e} to torch float32"
    )
    return Check(name="golden answer", ok=ok, detail=detail + _machines(predictor, pair, ok))


def _machines(predictor: Predictor, pair: dict[str, Any], ok: bool) -> str:
    """What differs between the machines, where that may be why the answers do."""
    integer = predictor.info.get("variant") == "int8" and predictor.provider == "CPUExecutionProvider"
    if ok and not integer:
        return ""
    here = hardware.machine()
    slow = set(hardware.INT8_FLAGS).isdisjoint(here["cpu_flags"])
    lacks = integer and platform.machine() in ("x86_64", "AMD64") and slow
    why = "; this CPU has neither VNNI nor AMX, without which int8 sums may saturate" * lacks
    if ok:
        return why
    was = f"{str(pair.get('provider')).removesuffix('ExecutionProvider')} on {pair.get('cpu')}"
    return f"{why}; exported with {was}, here {predictor.where} on {here['cpu']}"


def _batch(tolerance: float, alone: np.ndarray, beside: np.ndarray) -> Check:
    apart = np.abs(alone.astype(np.float64) - beside).max()
    detail = f"largest difference {apart:.1e} between the image alone and beside its mirror (tolerance {tolerance:g})"
    return Check(name="batch of 2", ok=bool(apart <= tolerance), detail=detail)
