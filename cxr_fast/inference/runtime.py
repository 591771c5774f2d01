"""Which devices ONNX Runtime can have here, and which library or driver stands in the way of the others."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..errors import DeviceError
from ..system.extras import install


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stderr: on import ONNX Runtime 1.23 to 1.30 report virtual graphics cards there, from C++."""
    try:
        kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # a service without a stderr has none to keep clean
        yield
        return
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


with _quiet():
    import onnxruntime

onnxruntime.set_default_logger_severity(4)

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
SAID = {"cpu": "CPU", "cuda": "CUDA", "tensorrt": "TensorRT"}
DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def parse(device: str) -> tuple[str, int]:
    """`auto`, `cpu`, `cuda[:N]` or `tensorrt[:N]` as name and number; DeviceError for anything else."""
    found = re.fullmatch(r"(auto|cpu|cuda|tensorrt)(?::([0-9]{1,4}))?", device)
    if not found or (found[2] and found[1] in ("auto", "cpu")):
        raise DeviceError(f"--device: {device!r} is not auto, cpu, cuda, cuda:N, tensorrt or tensorrt:N.")
    return found[1], int(found[2] or 0)


# The GPU.


def gpu_present(dev: Path = Path("/dev")) -> bool:
    """Whether the system shows an NVIDIA GPU, whatever is missing to use it."""
    if sys.platform == "win32":
        return loads(DRIVER)
    return (dev / "dxg").exists() or any(re.fullmatch(r"nvidia\d+", path.name) for path in dev.glob("nvidia*"))


@functools.cache
def gpu_count() -> int:
    """GPUs the driver shows this process; CUDA_VISIBLE_DEVICES counts. Call it only where CUDA is wanted."""
    try:
        driver, count = ctypes.CDLL(DRIVER), ctypes.c_int()
        ready = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    except (OSError, AttributeError):
        return 0
    return count.value if ready else 0


def loads(library: str) -> bool:
    """Whether the loader finds a shared library and all it needs."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def cuda_libraries() -> tuple[str, ...]:
    """Shared libraries without which CUDA does not run our graph, by the names this ONNX Runtime asks for.

    cuDNN from 1.31 on is no longer linked but loaded by the convolution, which the patch embedding is.
    """
    major = str(getattr(onnxruntime, "cuda_version", "") or "").partition(".")[0]
    if not major or not sys.platform.startswith("linux"):
        return ()
    return (*(f"lib{name}.so.{major}" for name in ("cudart", "cublas", "cublasLt")), "libcurand.so.10", "libcudnn.so.9")


def optional_libraries() -> tuple[str, ...]:
    """Libraries that older versions link and ours does not call: cuFFT."""
    number = {"12": "11", "13": "12"}.get(str(getattr(onnxruntime, "cuda_version", "") or "").partition(".")[0])
    return (f"libcufft.so.{number}",) if number and sys.platform.startswith("linux") else ()


def tensorrt_libraries() -> tuple[str, ...]:
    """TensorRT's, by the names that are written in ONNX Runtime's provider (1 MB); usually version 10."""
    if not sys.platform.startswith("linux"):
        return ()
    try:
        found = re.findall(rb"lib(?:nvinfer|nvonnxparser)\.so\.\d+", provider_file("tensorrt").read_bytes())
    except OSError:
        found = []
    return tuple(sorted({name.decode() for name in found})) or ("libnvinfer.so.10", "libnvonnxparser.so.10")


def pip_tensorrt() -> str:
    """The line that installs the TensorRT this ONNX Runtime wants; a newer major has other library names."""
    return f"pip install 'tensorrt=={tensorrt_libraries()[0].rpartition('.')[2] if tensorrt_libraries() else 10}.*'"


def reinstall() -> str:
    """Return the line that puts ONNX Runtime for GPUs in the place of the one for CPUs: both own the same files."""
    return f"pip uninstall onnxruntime onnxruntime-gpu; {install('gpu')}"


def provider_file(name: str) -> Path:
    """ONNX Runtime's own library of a provider."""
    prefix, suffix = ("", "dll") if sys.platform == "win32" else ("lib", "so")
    return Path(onnxruntime.__file__).parent / "capi" / f"{prefix}onnxruntime_providers_{name}.{suffix}"


@functools.cache
def preload() -> None:
    """Load what pip installed, which is not where the loader looks; what ONNX Runtime prints meanwhile is dropped."""
    if not hasattr(onnxruntime, "preload_dlls"):
        return
    with _quiet(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnxruntime.preload_dlls()
    found = importlib.util.find_spec("tensorrt_libs")
    for folder in (found.submodule_search_locations or []) if found else []:
        for library in tensorrt_libraries():
            loads(os.path.join(folder, library))


def missing(name: str) -> list[str]:
    """Libraries of `cuda` or `tensorrt` that do not load, the driver's not counted."""
    preload()
    wanted = cuda_libraries() + (tensorrt_libraries() if name == "tensorrt" else ())
    return [library for library in wanted if not loads(library)]


def loader_message(name: str) -> str:
    """Why a provider's library did not load, as the loader says it; call it only after ONNX Runtime has tried.

    Loaded before that it would find no ONNX Runtime to speak to and take the process with it.
    """
    try:
        ctypes.CDLL(str(provider_file(name)))
    except OSError as error:
        return str(error).splitlines()[0][:200]
    return ""


def obstacle(name: str, number: int = 0) -> str:
    """What stands in the way of `cuda` or `tensorrt`, and the line that mends it; empty where nothing known does."""
    if PROVIDERS[name] not in onnxruntime.get_available_providers():
        remedy = "macOS has none" if sys.platform == "darwin" else reinstall()
        here = "a GPU is here, but " if gpu_present() else ""
        return f"{here}this ONNX Runtime has no {SAID[name]} provider: {remedy}"
    lost = missing(name)
    install = f"{', '.join(lost)} did not load: {_pip(lost)}" if lost else ""
    if not gpu_present():
        driver = "" if loads(DRIVER) else f", {DRIVER} (the driver's) did not load"
        return f"no NVIDIA GPU visible{driver}{'; nor would it do: ' if install else ''}{install}"
    if not loads(DRIVER):
        return f"a GPU is here, but {DRIVER} did not load: install NVIDIA's driver, or start the container with GPUs"
    if install:
        return f"a GPU is here, but {install}"
    return _beyond(number)


def _pip(lost: list[str]) -> str:
    tensorrt = [library for library in lost if library.startswith(("libnvinfer", "libnvonnx"))]
    lines = ([install("gpu")] if len(tensorrt) < len(lost) else []) + ([pip_tensorrt()] if tensorrt else [])
    return " and ".join(lines)


def _beyond(number: int) -> str:
    count = gpu_count()
    if number < count:
        return ""
    if count:
        return f"there {'is' if count == 1 else 'are'} {count} GPU(s) here, 0 to {count - 1}"
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "the driver shows no GPU" + ("" if shown is None else f" (CUDA_VISIBLE_DEVICES={shown!r})")
