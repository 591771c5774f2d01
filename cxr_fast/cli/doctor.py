"""Examine what this machine and this installation can do, and say what to type where something is missing."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import InputError
from ..system import hardware
from ..system.extras import install
from ..system.huggingface import without_login

SCHEMA = 1
OK, ABSENT, WRONG = "ok", "--", "!!"
# Distribution, least version (pyproject's), and what it brings.
PREDICTING = (
    ("numpy", "2.0"),
    ("pillow", "10.3"),
    ("click", "8.1"),
    ("msgspec", "0.18"),
    ("psutil", "5.9"),
    ("rich", "13.7"),
    ("matplotlib", "3.9"),
    ("jinja2", "3.1"),
)
TRAINING = (
    ("torch", "2.11"),
    ("open-clip-torch", "2.30"),
    ("timm", "1.0.15"),
    ("h5py", "3.11"),
    ("onnx", "1.17"),
    ("scipy", "1.11"),
    ("scikit-learn", "1.5"),
    ("iterative-stratification", "0.1.9"),
    ("safetensors", "0.4.5"),
    ("huggingface_hub", "0.27"),
)
OPTIONAL = (
    ("pydicom", "3.0", "DICOM files", "dicom"),
    ("pylibjpeg", "2.0", "compressed DICOM files", "dicom"),
    ("pyarrow", "15", "Parquet manifests", "parquet"),
    ("openpyxl", "3.1", "Excel tables", "excel"),
)
RUNTIMES, RUNTIME_LEAST = ("onnxruntime-gpu", "onnxruntime"), "1.20"
# An Indiana cache takes 4.5 GB (NIH-14 68 GB); a sweep of it holds 1.2 GB.
ROOM = {"cache": 5e9, "exports": 1e9}
LITTLE = 2e8
LEAST_MEMORY = 4e9
HUB, HUB_SECONDS = "https://huggingface.co", 3.0
# An ONNX file of one node, y = Relu(x) on one float, to try a provider with.
RELU = bytes.fromhex(
    "080a3a330a0c0a0178120179220452656c75120167"  # graph g, node Relu x -> y
    "5a0f0a0178120a0a08080112040a020801"
    "620f0a0179120a0a08080112040a020801"
    "42040a001014"
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line: `ok`, `--` (absent and optional) or `!!` (needed and wrong), and what to do about it."""

    name: str
    state: str
    text: str
    mend: str = ""


def examine(*, deep: bool = False, root: Path = Path("/"), folder: Path = Path(".")) -> list[Finding]:
    """Every finding, within seconds; `deep` also imports torch and runs a session on each provider."""
    machine, training = hardware.machine(root), trains()
    return [
        *_packages(training),
        *_runtime(machine, training),
        *_cpu(machine, root, training),
        *(_room(folder, root) if training else ()),
        *([_hub()] if version("huggingface_hub") else ()),
        *(_deep() if deep else ()),
    ]


def trains() -> bool:
    """Whether anything of what training needs is installed; without it this machine predicts, and that is no fault."""
    return any(version(name) for name, _ in TRAINING[:4])


def healthy(findings: Sequence[Finding]) -> bool:
    """Whether nothing that is needed is wrong."""
    return all(finding.state != WRONG for finding in findings)


def describe(findings: Sequence[Finding]) -> str:
    """The findings as aligned lines."""
    width = max(len(finding.name) for finding in findings)
    return "\n".join(
        f"{finding.state}  {finding.name.ljust(width)}  {finding.text}{': ' if finding.mend else ''}{finding.mend}"
        for finding in findings
    )


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings as `doctor --json` writes them."""
    return {
        "kind": "cxr-fast doctor",
        "schema": SCHEMA,
        "written_by": f"cxr-fast {__version__}",
        "healthy": healthy(findings),
        "findings": [asdict(finding) for finding in findings],
    }


# What is installed.


def version(distribution: str) -> str | None:
    """The installed version of a distribution, without importing it; None where it is absent."""
    try:
        # A half-removed distribution has no version: it is not there.
        return metadata.version(distribution) or None
    except (metadata.PackageNotFoundError, KeyError):
        return None


def _packages(training: bool) -> Iterator[Finding]:
    now = sys.version.split()[0]
    old = sys.version_info < (3, 11)
    yield Finding(name="Python", state=WRONG if old else OK, text=now, mend="install 3.11 or newer" if old else "")
    for name, least in PREDICTING:
        yield _package(name, least, WRONG)
    if not training:
        text = f"cache, sweep, export and explain would need {', '.join(name for name, _ in TRAINING)}"
        yield Finding(name="training", state=ABSENT, text=text, mend=install("train"))
    for name, least in TRAINING if training else ():
        yield _package(name, least, WRONG)
    for name, least, brings, extra in OPTIONAL:
        found = _package(name, least, ABSENT)
        if found.state == OK:
            yield found
        else:
            text = f"{found.text}; it would bring {brings}"
            yield Finding(name=name, state=ABSENT, text=text, mend=install(extra))


def _package(name: str, least: str, otherwise: str) -> Finding:
    found = version(name)
    if found is None:
        return Finding(name=name, state=otherwise, text="absent", mend=f"pip install '{name}>={least}'")
    if _numbers(found) < _numbers(least):
        text = f"{found}, older than {least}"
        return Finding(name=name, state=otherwise, text=text, mend=f"pip install '{name}>={least}'")
    return Finding(name=name, state=OK, text=f"{found}{' (built without CUDA)' if '+cpu' in found else ''}")


def _numbers(text: str) -> tuple[int, ...]:
    """`2.15.0rc1+cu130` as (2, 15, 0), without zeros at the end."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    parts = [int(part) for part in found[0].split(".")] if found else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


# ONNX Runtime and the GPU.


def _import_runtime() -> Any:
    """The module that knows ONNX Runtime, or what its import says."""
    try:
        from ..inference import runtime
    except Exception as error:  # absent, or one of its libraries is: whatever it raises is the finding
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    return runtime


def _runtime(machine: dict[str, Any], training: bool) -> Iterator[Finding]:
    there = [(name, version(name)) for name in RUNTIMES if version(name)]
    text = ", ".join(f"{name} {found}" for name, found in there)
    both = f"pip uninstall onnxruntime onnxruntime-gpu; {install('gpu')}"
    runtime = _import_runtime()
    if len(there) > 1:
        text += "; they overwrite each other's files"
        yield Finding(name="ONNX Runtime", state=WRONG, text=text, mend=both)
    elif isinstance(runtime, str):
        mend = both if there else f"{install('cpu')}, or gpu instead of cpu"
        yield Finding(name="ONNX Runtime", state=WRONG, text=f"{text or 'absent'} ({runtime})", mend=mend)
    elif not there:
        yield Finding(name="ONNX Runtime", state=OK, text="a build that pip does not list")
    else:
        yield _package(there[0][0], RUNTIME_LEAST, WRONG)
    if not isinstance(runtime, str) and (training or runtime.gpu_present() or runtime.cuda_libraries()):
        yield from _gpu(runtime, machine["gpus"])


def _gpu(runtime: Any, gpus: list[str]) -> Iterator[Finding]:
    present = runtime.gpu_present()
    if gpus:
        yield Finding(name="GPU", state=OK, text="; ".join(gpus))
    elif present:
        text = "one is here, but nvidia-smi shows none"
        mend = "install NVIDIA's driver, or start the container with GPUs"
        yield Finding(name="GPU", state=WRONG, text=text, mend=mend)
    else:
        yield Finding(name="GPU", state=ABSENT, text="no NVIDIA GPU visible; everything runs on the CPU")
    runtime.preload()
    serious = WRONG if present else ABSENT
    libraries = [(name, serious, install("gpu")) for name in runtime.cuda_libraries()]
    libraries += [(name, ABSENT, install("gpu")) for name in runtime.optional_libraries()]
    libraries += [(name, ABSENT, runtime.pip_tensorrt()) for name in runtime.tensorrt_libraries()]
    for name, state, mend in libraries:
        if runtime.loads(name):
            yield Finding(name=name, state=OK, text="loads")
        else:
            yield Finding(name=name, state=state, text=f"does not load; a GPU {_needs(state, name)}", mend=mend)
    reason = runtime.obstacle("cuda")
    yield Finding(name="--device cuda", state=serious if reason else OK, text=reason or "can be had")
    reason = runtime.obstacle("tensorrt")
    yield Finding(name="--device tensorrt", state=ABSENT if reason else OK, text=reason or "can be had")


def _needs(state: str, name: str) -> str:
    if state == WRONG:
        return "cannot be used without it"
    return "would need it for TensorRT" if name.startswith("libnv") else "would need it"


# The machine.


def _cpu(machine: dict[str, Any], root: Path, training: bool) -> Iterator[Finding]:
    yield Finding(name="CPU", state=OK, text=f"{machine['cpu'] or 'unknown'}, {machine['os']}")
    flags, int8 = hardware.cpu_flags(root), hardware.int8_flags(root)
    if int8:
        yield Finding(name="int8", state=OK, text=hardware.describe_int8(root))
    else:
        text = f"{hardware.describe_int8(root)}; of a folder the float32 file is used"
        yield Finding(name="int8", state=ABSENT, text=text)
    if training:
        yield _bfloat16(flags)
    quota = machine["cores_quota"]
    text = f"{machine['cores']} of the machine's {machine['cores_host']}"
    text += f"; affinity {machine['cores_affinity'] or 'unknown'}, container quota {quota or 'none'}"
    yield Finding(name="cores to use", state=OK, text=text)


def _bfloat16(flags: Collection[str]) -> Finding:
    bf16 = [flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if flag in flags]
    if bf16:
        return Finding(name="bfloat16", state=OK, text=f"{', '.join(bf16)}: training in bfloat16 is fast on this CPU")
    text = "no instructions for it seen: on this CPU train with --precision float32"
    return Finding(name="bfloat16", state=ABSENT, text=text)


def _room(folder: Path, root: Path) -> Iterator[Finding]:
    limit = hardware.memory_limit(root)
    if limit is None:
        yield Finding(name="memory", state=OK, text="unknown on this system")
    elif limit < LEAST_MEMORY:
        text = f"{limit / 1e9:.1f} GB; training wants {LEAST_MEMORY / 1e9:.0f} GB and --residency stream"
        yield Finding(name="memory", state=ABSENT, text=text)
    else:
        yield Finding(name="memory", state=OK, text=f"{limit / 1e9:.1f} GB")
    for name, wanted in ROOM.items():
        yield _disk(folder / name, name, wanted)


def _disk(path: Path, name: str, wanted: float) -> Finding:
    """Free space where `cache` or `exports` lie or would be made."""
    there = next((p for p in (path, *path.absolute().parents) if p.exists()), path)
    mend = "another place with --out"
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Finding(name=f"{name}/", state=WRONG, text=f"cannot be read ({error.strerror})", mend=mend)
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Finding(name=f"{name}/", state=WRONG, text=f"{there} cannot be written", mend=mend)
    text = f"{free / 1e9:.1f} GB free"
    if free < wanted:
        text += f"; an Indiana-sized study takes about {wanted / 1e9:.0f} GB"
        return Finding(name=f"{name}/", state=WRONG if free < LITTLE else ABSENT, text=text, mend=mend)
    return Finding(name=f"{name}/", state=OK, text=text)


def _hub() -> Finding:
    folder = "pass the weights' folder with --weights"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        text = "HF_HUB_OFFLINE is set: only weights already fetched, or a folder"
        return Finding(name="Hugging Face hub", state=ABSENT, text=text, mend=f"unset it, or {folder}")
    address = without_login(os.environ.get("HF_ENDPOINT") or HUB)
    if trouble := reach(address):
        return Finding(name="Hugging Face hub", state=ABSENT, text=f"{address}: {trouble}", mend=folder)
    return Finding(name="Hugging Face hub", state=OK, text=f"{address} answers")


def reach(address: str, seconds: float = HUB_SECONDS) -> str:
    """Why an address gives no answer within `seconds`, or nothing; a thread, for looking up a name obeys no timeout."""
    found = [f"no answer within {seconds:g} s"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=seconds):
                found[0] = ""
        except urllib.error.HTTPError:
            found[0] = ""  # it answered, if only to say no
        except Exception as error:  # an address can be wrong in more ways than OSError and ValueError
            found[0] = f"cannot be reached ({str(error)[:120] or type(error).__name__})"

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0]


# What only trying shows.


def _deep() -> Iterator[Finding]:
    runtime = _import_runtime()
    present = not isinstance(runtime, str) and runtime.gpu_present()
    if version("torch"):
        yield _try("torch imports", WRONG, _torch)
        yield _try("torch on CUDA", WRONG if present else ABSENT, _torch_cuda)
    if isinstance(runtime, str):
        return
    for name in ("cpu", "cuda", "tensorrt"):
        state = WRONG if name == "cpu" or (name == "cuda" and present) else ABSENT
        yield _try(f"session on {runtime.SAID[name]}", state, partial(_session, runtime, name))


def _try(name: str, otherwise: str, work: Callable[[], str]) -> Finding:
    """Whatever goes wrong is the finding: the point of --deep."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Finding(name=name, state=OK, text=work())
    except Exception as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return Finding(name=name, state=otherwise, text=text)


def _torch() -> str:
    import torch

    assert float(torch.ones(3).sum()) == 3
    return f"{torch.__version__}, built for CUDA {torch.version.cuda or '(none)'}"


def _torch_cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        raise InputError("no CUDA device for torch")
    assert float(torch.ones(3, device="cuda").sum()) == 3
    return f"a tensor was made on {torch.cuda.get_device_name(0)}"


def _session(runtime: Any, name: str) -> str:
    if name != "cpu" and (reason := runtime.obstacle(name)):
        raise InputError(reason)
    import numpy as np

    options = runtime.onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    order = {"cpu": ["cpu"], "cuda": ["cuda", "cpu"], "tensorrt": ["tensorrt", "cuda", "cpu"]}[name]
    providers = [runtime.PROVIDERS[provider] for provider in order]
    session = runtime.onnxruntime.InferenceSession(RELU, options, providers=providers, enable_fallback=0)
    if session.get_providers()[0] != providers[0]:
        said = runtime.loader_message(name) or "no reason given"
        raise InputError(f"fell back to {session.get_providers()[0]}: {said}")
    found = session.run(None, {"x": np.array([3.0], np.float32)})[0]
    if found.tolist() != [3.0]:
        raise InputError(f"gave {found.tolist()} for Relu(3)")
    return "runs"
