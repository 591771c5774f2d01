"""Open a model file as an ONNX Runtime session on a device that works, with the reason for each choice."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DeviceError, InputError
from ..system import hardware
from ..system.extras import install
from . import hub, model_file, runtime
from .model_file import VARIANTS, file_name
from .runtime import PROVIDERS, SAID, onnxruntime

CPU = PROVIDERS["cpu"]
# Which files a device may run, the fastest first. Dynamic int8 has no CUDA kernels, float16 no fast ones on a CPU.
RUNS = {"cpu": ("int8", "fp32"), "cuda": ("fp16", "fp32"), "tensorrt": ("fp16", "fp32")}
# What the variants of one model have in common, all that decides an answer or its name.
SAME = ("model_sha256", "labels", "thresholds", "calibration", "preprocess")


@dataclass(frozen=True, kw_only=True)
class ModelPlace:
    """The file that stands for a model on a device.

    `source` is how a record names it: its path, or its address on the hub with the commit. `chosen`: of several
    variants; `why` says why this one, and where it came from if that is not plain.
    """

    path: Path
    source: str
    chosen: bool = False
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model ready to run: its file, session and metadata, and why this file runs on this device.

    `source` is how a record names it: its path, or its address on the hub with the commit.
    """

    path: Path
    source: str
    session: Any
    provider: str
    threads: int
    variant: str
    info: dict[str, Any]
    where: str
    why: str


def open_model(
    path: str | os.PathLike[str],
    device: str = "auto",
    threads: int | None = None,
    *,
    strict: bool = True,
    check: bool = True,
    spin: bool = True,
) -> Opened:
    """Open a model file, or of a folder of variants or an address on the hub the one this device runs best.

    `strict=False` runs a variant where it is slow (float16 on a CPU), as an export that checks itself must. `check`
    hashes the file first, for a flipped bit of a weight would change answers without a message. Threads that wait for
    work `spin`, which answers one image soonest; not so where others decode on the same cores. Raises InputError for
    what is no model or damaged, SchemaError for another schema, DeviceError where an explicit device is not available
    or does not run the file.
    """
    name, number = runtime.parse(device)
    target, reason = _target(name, number, device)
    found = locate(path, target, explicit=name != "auto")
    given, path = path, found.path
    with hub.named_by_address(found.source, path):
        info = model_file.read(path, check=check)  # first: a damaged graph may crash ONNX Runtime
        model_file.check_operations(path)
    kind = _variant(info, path)
    if found.chosen and f".{kind}." not in path.name:
        raise InputError(f"{path}: its metadata say {kind}; was it renamed? `cxrfast export RUN` makes it again.")
    if name == "auto" and kind == "int8" and target != "cpu":
        target, reason = "cpu", "an int8 file, which has no CUDA kernels"
    if strict and kind not in RUNS[target]:
        raise DeviceError(_wrong_pair(found, kind, target, reason if name == "auto" else ""))
    count = threads or hardware.cpu_count()
    session, trouble = _start(path, target, number, _options(count, spin))
    if trouble and name == "auto":
        # Only a file that another one replaces is not checked yet.
        fallen = open_model(given, "cpu", threads, strict=strict, check=check and found.chosen, spin=spin)
        rest = fallen.why.partition("; ")[2]
        why = f"CPU: a GPU is here, but {trouble}" + (f"; {rest}" if rest else "")
        return dataclasses.replace(fallen, why=why)
    if trouble:
        raise DeviceError(f"--device {device}: {trouble}.\nUse --device cpu, or ask `cxrfast doctor` what is missing.")
    model_file.check_graph(session, info, path)
    place = SAID[target] + (f":{number}" if number else "")
    return Opened(
        path=path,
        source=found.source,
        session=session,
        provider=session.get_providers()[0],
        threads=count,
        variant=kind,
        info=info,
        where=f"{place}, {count} thread(s)" if target == "cpu" else place,
        why=f"{place}: {reason}" + (f"; {found.why}" if found.why else ""),
    )


def _target(name: str, number: int, device: str) -> tuple[str, str]:
    """Choose the device to try, and say why. Raises DeviceError where the one asked for is not available."""
    if name == "cpu":
        return name, "as asked"
    if name == "auto":
        found = runtime.obstacle("cuda") if runtime.gpu_present() else "no NVIDIA GPU visible"
        return ("cpu", found) if found else ("cuda", "a GPU is here and its libraries load")
    if found := runtime.obstacle(name, number):
        raise DeviceError(f"--device {device}: {found}; or use --device cpu.")
    return name, "as asked"


def locate(path: str | os.PathLike[str], target: str, *, explicit: bool) -> ModelPlace:
    """Find the file of a model that a device runs: the file itself, one of a folder, or one of an address on the hub.

    `explicit`: the device was asked for by name. Raises InputError where there is none or it cannot be fetched.
    """
    if hub.is_address(path):
        return _fetch(hub.parse_address(path), target, explicit=explicit)
    if not (found := Path(path)).is_dir():
        return ModelPlace(path=found, source=str(found))
    there = [variant for variant in VARIANTS if (found / file_name(variant)).is_file()]
    if not there and (found / "run.json").is_file():
        raise InputError(f"{found}: no such model in this run folder yet; `cxrfast export {found}` makes one.")
    if not there:
        names = ", ".join(map(file_name, VARIANTS))
        raise InputError(f"{found}: no such model in this folder ({names}); `cxrfast export RUN` makes one.")
    require_one_model(found, there)
    variant, why = _choose(there, target, explicit=explicit)
    file = found / file_name(variant)
    return ModelPlace(path=file, source=str(file), chosen=True, why=f"{file.name}: {why}")


def locate_for(path: str | os.PathLike[str], device: str = "auto") -> ModelPlace:
    """Call `locate` for a device as a user names it. Raises DeviceError where it cannot be had."""
    name, number = runtime.parse(device)
    return locate(path, _target(name, number, device)[0], explicit=name != "auto")


def _fetch(address: hub.HubAddress, target: str, *, explicit: bool) -> ModelPlace:
    """Fetch the one file of an address that a device runs best."""
    wanted = list(dict.fromkeys([*_preference(target)[0], *VARIANTS]))
    names = [address.file] if address.file else [file_name(variant) for variant in wanted]
    found = hub.list_files(address, names)
    why = ""
    name = found.names[0]
    if not address.file:
        variant, because = _choose([v for v in VARIANTS if file_name(v) in found.names], target, explicit=explicit)
        name, why = file_name(variant), f"{file_name(variant)}: {because}"
    path, taken = hub.download(found, name)
    if found.offline:
        why += f"{'; ' if why else ''}from the cache ({found.offline})"
    return ModelPlace(path=path, source=str(taken), chosen=not address.file, why=why)


def _choose(there: Sequence[str], target: str, *, explicit: bool) -> tuple[str, str]:
    """Choose of some variants the one that a device runs best, and say why."""
    wanted, because = _preference(target)
    usable = [variant for variant in wanted if variant in there]
    if not usable and not explicit and "int8" in there:
        return "int8", "the only one here"
    if not usable:
        # The refusal that names the right file is the one a single file gets.
        return there[0], "the only one here"
    taken, first = usable[0], wanted[0]
    if usable == ["fp32"] and first == "fp32":
        return taken, "the only one here that a CPU runs fast" if len(there) > 1 else "the only one here"
    lacks = "" if taken == first else f" ({file_name(first)}, preferred, is not there)"
    return taken, f"{because}{lacks}"


def _preference(target: str) -> tuple[Sequence[str], str]:
    if target != "cpu":
        return RUNS[target], "float16 is the fastest on a GPU"
    if flags := hardware.int8_flags():
        return RUNS["cpu"], f"this CPU has {flags[0]}, which int8 is fast with"
    return ("fp32", "int8"), "this CPU has neither VNNI nor AMX, without which int8 gains little"


def _variant(info: dict[str, Any], path: Path) -> str:
    """Read `fp32`, `fp16` or `int8`; a file without the entry is float32. Raises InputError for any other."""
    said = info.get("variant", "fp32")
    if said not in VARIANTS:
        raise InputError(f"{path}: damaged metadata (variant {str(said)[:40]!r} is not {', '.join(VARIANTS)}).")
    return str(said)


def require_one_model(folder: Path, there: Sequence[str]) -> None:
    """Refuse a folder whose files are not one model: a variant left from an earlier run would answer for another.

    `model_sha256` is of the weights alone; two runs may share them and differ in thresholds or calibration.
    """
    infos = [model_file.read(folder / file_name(v), check=False) for v in there]
    for variant, info in zip(there, infos, strict=True):
        if apart := [name for name in SAME if info.get(name) != infos[0].get(name)]:
            what = "is of another model than" if apart[0] == "model_sha256" else f"has another {apart[0]} entry than"
            raise InputError(
                f"{folder}: model.{variant}.onnx {what} model.{there[0]}.onnx; export the run again, or name one file."
            )


def _wrong_pair(model: ModelPlace, variant: str, target: str, reason: str) -> str:
    """Say in one line why the device does not run this variant, and which file it runs."""
    fault = "int8 has no CUDA kernels" if variant == "int8" else "float16 is slower than float32 on a CPU"
    other = ", or --device cpu" if variant == "int8" else ""
    because = f" ({reason})" if reason else ""
    path = model.path
    if hub.is_address(model.source):
        names = " or ".join(map(file_name, RUNS[target]))
        return f"{model.source}: {fault}{because}; use {names} of this repository, if it has one{other}."
    marked = f".{variant}." in path.name
    beside = [path.with_name(path.name.replace(f".{variant}.", f".{v}.") if marked else file_name(v))
              for v in RUNS[target]]  # fmt: skip
    there = [file for file in beside if file.is_file()]
    # Float32 is the file that every export makes.
    use = f"use {there[0]}" if there else f"use {beside[-1]}, which is to be exported first"
    return f"{path}: {fault}{because}; {use}{other}."


def _options(threads: int, spin: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    options.log_severity_level = 4  # errors come as exceptions; a second copy on stderr helps nobody
    return options


def _start(path: Path, target: str, number: int, options: Any) -> tuple[Any, str]:
    """Start a session on `target`, or say what went wrong with the device. InputError where the file is at fault."""
    if target == "cpu":
        return _cpu(path, options), ""
    # TF32 keeps 10 bits of a float32 product's 23: not the arithmetic that the file was checked in.
    options_of = {"tensorrt": {"device_id": number}, "cuda": {"device_id": number, "use_tf32": 0}}
    order = ["tensorrt", "cuda"] if target == "tensorrt" else ["cuda"]
    providers = [*((PROVIDERS[name], options_of[name]) for name in order), CPU]
    try:
        # Without enable_fallback=0 a failing provider is replaced by the CPU, now or in the middle of a run.
        session = onnxruntime.InferenceSession(path, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime raises its own classes, all straight from Exception
        _cpu(path, options)
        return None, f"ONNX Runtime could not start {SAID[target]} ({_first_line(error)})"
    # A provider whose library does not load is left out without a message; only the session's own list tells.
    if session.get_providers()[0] == PROVIDERS[target]:
        return session, ""
    said = runtime.loader_message(target) or "it gives no reason"
    return None, f"ONNX Runtime could not load its {SAID[target]} provider ({said}): {install('gpu')}"


def _cpu(path: Path, options: Any) -> Any:
    try:
        return onnxruntime.InferenceSession(path, options, providers=[CPU], enable_fallback=0)
    except Exception as error:  # as above
        raise InputError(f"{path}: not an ONNX file that runs here ({_first_line(error)}).") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:160] if text else "no reason"
