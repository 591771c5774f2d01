"""Verify that a model file answers here as it did where it was exported: bytes, labels, pixels, golden answer."""

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
from . import hub, model_file
from .model_file import VARIANTS, is_number
from .predictor import UNLIKENESS, Predictor, golden_pixels
from .session import locate_for

KEYS = (
    *("schema", "written_by", "variant", "labels", "labels_sha256", "thresholds", "threshold_source", "calibration"),
    *("final", "preprocess", "pixel_check", "dicom_policy", "mean", "std", "weights", "provenance", "backbone"),
    *("tower_sha256", "model_sha256", "trainable", "cache_fingerprint", "data", "nodes", "toolchain", "parity"),
    *("golden", "intended_use", model_file.SEAL),
)
RECIPE = "pixels[0, i, j] = (7*i + 13*j + i*j//16) % 256"
# A golden pair that lets more than this pass checks nothing: most thresholds are smaller.
LOOSEST = 0.1
AUC_TEXT, MAP_TEXT = "macro AUC drop", "macro mAP drop"
LIMITS = (
    ("max_probability_difference", "limit", "largest difference in probability"),
    ("flips_per_10000", "limit_flips_per_10000", "decisions in 10,000 that change sides"),
    ("macro_auc_drop", "limit_macro_auc_drop", AUC_TEXT),
    ("map_drop", "limit_map_drop", MAP_TEXT),
    ("max_unlikeness_difference", "limit_unlikeness_difference", "largest difference in unlikeness"),
)
# Of the golden input's unlikeness on another machine, as a share of it or of 1.
UNLIKE_TOLERANCE = 0.02


@dataclass(frozen=True)
class Check:
    """One check by name: whether what was found agrees with the file, and what was found."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """The checks of one model file; `note` must be shown beside every figure of it."""

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
    """List the model files to check: the file, every `model.*.onnx` of a folder, or the address on the hub.

    Raises InputError for a folder without any.
    """
    if hub.is_address(path) or not path.is_dir():
        return [path]
    found = sorted(path.glob("model.*.onnx"))
    if not found:
        raise InputError(f"{path}: no model.*.onnx in this folder; `cxrfast export RUN` makes one.")
    return found


def verify(path: Path, *, device: str = "auto", threads: int | None = None) -> Report:
    """Check a model file on the machine and the device that will run it; a file with damaged bytes is not run.

    Of an address on the hub, the variant that the device runs best is checked. Raises InputError for a file that
    `cxrfast export` did not write or that cannot be checked, SchemaError for another schema, DeviceError for a device
    that cannot be had.
    """
    source = str(path)
    if hub.is_address(path):
        place = locate_for(path, device)
        path, source = place.path, place.source
    with hub.named_by_address(source, path):
        info = model_file.read(path, check=False)
    content = _content(info, path)
    checks = [content, _keys(info, path), _labels(info), _preprocessing(info), _limits(info)]
    provider = ""
    if content.ok:
        predictor = Predictor(path, device=device, threads=threads, check=False)
        provider = predictor.where
        checks += [_graph(predictor), *_answers(predictor)]
        if predictor.info.get("variant") == "int8":
            checks.append(Check("int8 on this CPU", True, hardware.describe_int8()))  # says it, judges nothing
    else:
        checks.append(Check("golden answer", False, "not run: the content differs"))
    return Report(
        path=source,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        variant=str(info.get("variant")),
        provider=provider,
        note=str(info.get("provenance") or ""),
        checks=tuple(checks),
    )


def verify_all(paths: list[Path], *, device: str = "auto", threads: int | None = None) -> list[Report | Unjudged]:
    """Return a report of each file, or why it could not be checked."""
    found: list[Report | Unjudged] = []
    for path in paths:
        try:
            found.append(verify(path, device=device, threads=threads))
        except CxrFastError as error:
            found.append(Unjudged(path=str(path), error=error))
    return found


def exit_code(found: list[Report | Unjudged]) -> int:
    """Return 0 where all pass, 1 where one differs, 2 where one could not be checked.

    Of several files those that this device cannot run (an int8 file on CUDA) do not count, unless none can.
    """
    errors = [item.error for item in found if isinstance(item, Unjudged)]
    if len(errors) == len(found) or any(not isinstance(error, DeviceError) for error in errors):
        return 2
    return 0 if all(item.ok for item in found if isinstance(item, Report)) else 1


def describe(found: Report | Unjudged) -> str:
    """Show a report as a line per check and PASS or FAIL; of a file that could not be checked, show why."""
    if isinstance(found, Unjudged):
        return f"{found.path}: NOT CHECKED\n  {str(found.error).removeprefix(found.path + ': ')}"
    width = max(len(check.name) for check in found.checks)
    on = f", on {found.provider}" if found.provider else ""
    lines = [f"{found.path}: {found.variant}, {found.bytes / 1e6:,.1f} MB, sha256 {found.sha256}{on}"]
    lines += [f"  {'ok' if c.ok else 'DIFFERS':7}  {c.name.ljust(width)}  {c.detail}" for c in found.checks]
    lines += [f"note: {found.note.upper()}"] * bool(found.note)
    return "\n".join([*lines, "PASS" if found.ok else "FAIL"])


def to_json(found: Report | Unjudged) -> dict[str, Any]:
    """Return the same as JSON-ready values."""
    if isinstance(found, Unjudged):
        return {"path": found.path, "verdict": "NOT CHECKED", "error": str(found.error)}
    return {**asdict(found), "verdict": "PASS" if found.ok else "FAIL"}


# The file.


def _content(info: dict[str, Any], path: Path) -> Check:
    found, written = model_file.content_sha256(path), info[model_file.SEAL]
    if found == written:
        return Check("content", True, f"every byte as it was written, sha256 {found[:16]}")
    detail = f"sha256 {found[:16]}, the file says {written[:16]}: damaged or edited since; export the run again"
    return Check("content", False, detail)


def _keys(info: dict[str, Any], path: Path) -> Check:
    wrong = [f"no {name}" for name in KEYS if name not in info]
    named = [variant for variant in VARIANTS if f".{variant}." in path.name]
    if named and info.get("variant") not in named:  # a folder of variants is not opened with it
        wrong.append(f"variant {info.get('variant')!r} in a file called {path.name}")
    if "dicom_policy" in info and info["dicom_policy"] != info["preprocess"]["dicom_policy"]:
        wrong.append(f"dicom_policy {info['dicom_policy']!r} is not the one in preprocess")
    return Check("metadata", not wrong, ", ".join(wrong) or f"schema {info['schema']}, {len(info)} keys")


def _labels(info: dict[str, Any]) -> Check:
    found, written = model_file.labels_sha256(info["labels"]), info["labels_sha256"]
    if found == written:
        return Check("labels", True, f"{len(info['labels'])} in this order, sha256 {found[:16]}")
    return Check("labels", False, f"sha256 of the names in order {found[:16]}, the file says {written[:16]}")


def _preprocessing(info: dict[str, Any]) -> Check:
    if "pixel_check" not in info:
        return Check("preprocessing", False, "the file does not say which pixels it was made from")
    if info["pixel_check"] == self_check():
        spec = ", ".join(f"{name} {value}" for name, value in info["preprocess"].items())
        return Check("preprocessing", True, f"{spec}; the built-in pictures give the same pixels here")
    made = info.get("toolchain")
    was = made.get("pillow") if isinstance(made, dict) else None
    by = f"Pillow {was}" if was else "another one"
    here = f"the built-in pictures give other pixels with this Pillow {PIL.__version__}"
    return Check("preprocessing", False, f"{here}; it was made with {by}")


def _graph(predictor: Predictor) -> Check:
    """Check names, types and shapes; `pixels` and `probabilities` were checked when the file was loaded."""
    count, outputs = len(predictor.labels), predictor.session.get_outputs()
    found = {node.name: (node.type, list(node.shape or [])[1:]) for node in outputs}
    wanted = {"logits": count, "probabilities": count}
    if predictor.info.get("calibration") is not None:
        wanted["raw_probabilities"] = count
    wrong = [f"no {name} float (N, {n})" for name, n in wanted.items() if found.get(name) != ("tensor(float)", [n])]
    if predictor.gives_unlikeness and found.get(UNLIKENESS) != ("tensor(float)", []):
        wrong.append(f"no {UNLIKENESS} float (N)")
    known = (*wanted, "embedding", *([UNLIKENESS] if predictor.gives_unlikeness else []))
    wrong += [f"unknown output {name}" for name in found if name not in known]
    size = predictor.spec.size
    text = f"pixels uint8 (N, {size}, {size}) to {', '.join(found)}, {count} classes"
    return Check("graph", not wrong, ", ".join(wrong) or text)


# The answers.


def _answers(predictor: Predictor) -> list[Check]:
    pair = predictor.info.get("golden")
    if wrong := _pair_wrong(pair, len(predictor.labels)):
        return [Check("golden answer", False, wrong)]
    assert isinstance(pair, dict)
    pixels = golden_pixels(predictor.spec.size)
    try:
        alone = predictor.probabilities(pixels)[0]
        beside = predictor.probabilities(np.concatenate([pixels, flip(pixels)]))[0]
    except InputError as error:
        return [Check("golden answer", False, str(error).removeprefix(f"{predictor.path}: "))]
    found = [_golden(predictor, pair, alone), _batch(pair["tolerance"], alone, beside)]
    return found + ([_unlikeness(predictor, pair, pixels)] if predictor.gives_unlikeness else [])


def _pair_wrong(pair: Any, count: int) -> str:
    """Say why a golden pair cannot be used; empty where it can."""
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
    """Check that the file was within its limits where it was exported; `--allow-drift` keeps one that was not."""
    parity = info.get("parity")
    parity = parity if isinstance(parity, dict) else {}
    figures = [(text, parity.get(name), parity[limit]) for name, limit, text in LIMITS if is_number(parity.get(limit))]
    if not figures:
        return Check("drift", False, "the file does not say which limits it was held to")
    over = [figure for figure in figures if _over(*figure)]
    shown = ", ".join(
        f"{text} {'none' if value is None else format(value, '.3g')} (limit {limit:.4g})"
        for text, value, limit in over or figures
    )
    beside = model_file.describe_yardstick(parity)
    shown += f"; changed by the film itself: {beside}" * bool(beside)
    return Check("drift", not over, f"from torch where exported: {shown}" + "; kept all the same" * bool(over))


def _over(text: str, value: Any, limit: float) -> bool:
    """Whether a figure is over its limit, or is none; no AUC or mAP is defined where no class has both signs."""
    return bool(value > limit) if is_number(value) else text not in (AUC_TEXT, MAP_TEXT)


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
    return Check("golden answer", ok, detail + _machines(predictor, pair, ok))


def _unlikeness(predictor: Predictor, pair: dict[str, Any], pixels: np.ndarray) -> Check:
    expected, torch = pair.get("expected_unlikeness"), pair.get("unlikeness")
    if not is_number(expected) or not is_number(torch) or expected is None:
        return Check(UNLIKENESS, False, "the golden pair has no unlikeness")
    found = float(predictor.run(pixels, output=UNLIKENESS)[0])
    apart = abs(found - expected) / max(expected, 1)
    detail = f"{found:.4g} for the golden input, {expected:.4g} where it was exported ({torch:.4g} in torch float32)"
    return Check(UNLIKENESS, apart <= UNLIKE_TOLERANCE, f"{detail}; tolerance {UNLIKE_TOLERANCE:.0%}")


def _machines(predictor: Predictor, pair: dict[str, Any], ok: bool) -> str:
    """Say how the machines differ, where that may be why the answers do."""
    integer = predictor.info.get("variant") == "int8" and predictor.provider == "CPUExecutionProvider"
    if ok and not integer:
        return ""
    here = hardware.machine()
    slow = set(hardware.INT8_FLAGS).isdisjoint(here["cpu_flags"])
    lacks = integer and platform.machine() in ("x86_64", "AMD64") and slow
    why = "; this CPU has neither VNNI nor AMX: sums of files of earlier versions may saturate" * lacks
    if ok:
        return why
    was = f"{str(pair.get('provider')).removesuffix('ExecutionProvider')} on {pair.get('cpu')}"
    return f"{why}; exported with {was}, here {predictor.where} on {here['cpu']}"


def _batch(tolerance: float, alone: np.ndarray, beside: np.ndarray) -> Check:
    apart = np.abs(alone.astype(np.float64) - beside).max()
    detail = f"largest difference {apart:.1e} between the image alone and beside its mirror (tolerance {tolerance:g})"
    return Check("batch of 2", bool(apart <= tolerance), detail)
