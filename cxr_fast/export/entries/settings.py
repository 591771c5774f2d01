"""How an export was asked for: written into each model file, and read back for another export. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ...errors import InputError
from ...inference import model_file
from ...inference.model_file import VARIANTS
from ...system.files import AnyPath
from ...training.operating_points import read_target

KEY = "export"
IMAGES = 256
FLAGS = {"count": "check"}  # settings whose flag has another name


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """What is exported and kept.

    `out` is a folder, or a file for a single variant, by default the run's folder; `final` another final model than the
    run's own; `tta` other views than the run was scored on ("none", or "flip" for the mean of plain and mirrored);
    `logit_adjustment` is taken from the logits after training, times each class's log odds; `threshold_target` and
    `calibration` are chosen again from the saved out-of-fold predictions, as for a sweep, the former also by a CSV file
    of class,target;
    `images` where the cached images are now; `count` how many of them each variant is checked on.

        >>> ExportSpec(variants=("fp32", "int8")).count
        256
    """

    out: AnyPath | None = None
    variants: Sequence[str] = ("fp32",)
    final: str | None = None
    tta: str | None = None
    logit_adjustment: float = 0.0
    threshold_target: str | None = None
    calibration: str | None = None
    images: AnyPath | None = None
    embedding: bool = False
    allow_drift: bool = False
    count: int = IMAGES


class ExportRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of an export as its model files hold them: those of `ExportSpec` but its paths."""

    variants: tuple[str, ...]
    final: str | None
    tta: str | None
    logit_adjustment: float
    threshold_target: str | None
    calibration: str | None
    embedding: bool
    allow_drift: bool
    count: int

    def flags(self) -> dict[str, Any]:
        """Every setting by the name of its flag, with the text or value that the flag takes."""
        return {FLAGS.get(name, name): value for name, value in msgspec.structs.asdict(self).items()} | {
            "variants": ",".join(self.variants)
        }


@dataclass(frozen=True, kw_only=True)
class EarlierExport:
    """An earlier export: where it was read, how it was asked for, and what of its files these settings do not give."""

    source: Path
    record: ExportRecord
    notes: tuple[str, ...] = ()


def record_export(spec: ExportSpec) -> ExportRecord:
    """The record of a request; targets that a CSV file names are taken in, its path is not."""
    target = None if spec.threshold_target is None else read_target(spec.threshold_target)
    return ExportRecord(
        variants=tuple(dict.fromkeys(spec.variants)),
        final=spec.final,
        tta=spec.tta,
        logit_adjustment=float(spec.logit_adjustment),
        threshold_target=target,
        calibration=spec.calibration,
        embedding=spec.embedding,
        allow_drift=spec.allow_drift,
        count=spec.count,
    )


def read_export(path: Path) -> EarlierExport:
    """Read how a model file was exported, or the `model.*.onnx` of a folder, which must have been exported alike.

    Variants that were exported one after another with the same settings count as one export. Raises InputError where
    there is no such file, where it holds no record, and where files of a folder differ.
    """
    folder = path.parent if path.name == "run.json" else path
    files = sorted(folder.glob("model.*.onnx")) if folder.is_dir() else [folder]
    if not files:
        raise InputError(f"--from: {folder} holds no model.*.onnx; `cxrfast export` writes them into a run folder.")
    infos = [model_file.read(file) for file in files]
    records = [_read_record(info, file) for info, file in zip(infos, files, strict=True)]
    first = records[0]
    for file, other in zip(files, records, strict=True):
        if differ := [text for text in describe_changes(first, other) if not text.startswith("variants ")]:
            raise InputError(
                f"--from: the files of {folder} were exported in different ways ({file.name}: {differ[0]} in "
                f"{files[0].name}); name one of them."
            )
    asked = {variant for record in records for variant in record.variants}
    variants = tuple(variant for variant in VARIANTS if variant in asked)
    later = [info["recalibrated"] for info in infos if isinstance(info.get("recalibrated"), dict)]
    notes = [f"thresholds that were set on {each.get('data')} after that export are not taken" for each in later[:1]]
    return EarlierExport(source=path, record=msgspec.structs.replace(first, variants=variants), notes=tuple(notes))


def _read_record(info: Mapping[str, Any], file: Path) -> ExportRecord:
    if KEY not in info:
        raise InputError(
            f"--from: {file} does not say how it was exported (written by {info.get('written_by')}, before that was "
            "recorded); give the flags themselves, or export its run again first."
        )
    try:
        return msgspec.convert(info[KEY], ExportRecord)
    except msgspec.ValidationError as error:
        raise InputError(f"--from: {file}: how it was exported cannot be read ({error}).") from error


def describe_changes(before: ExportRecord, now: ExportRecord) -> list[str]:
    """Name each setting that differs, by its flag: `check 512 instead of 256`."""
    old, new = before.flags(), now.flags()
    return [
        f"{name.replace('_', '-')} {_text(new[name])} instead of {_text(old[name])}"
        for name in new
        if new[name] != old[name]
    ]


def _text(value: Any) -> str:
    """A setting in words; None is what the run itself says."""
    if value is None:
        return "as in the run"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
