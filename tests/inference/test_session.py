"""The device is the one that was asked for or an error that says why; of several files the right one is taken."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxr_fast.errors import DeviceError, InputError
from cxr_fast.inference import runtime, session
from cxr_fast.inference.runtime import onnxruntime
from cxr_fast.inference.session import open_model
from cxr_fast.system import hardware
from cxr_fast.system.extras import install
from tests.helpers.model_edits import changed, put

GPU = runtime.gpu_present()
ALL = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
no_gpu = pytest.mark.skipif(GPU, reason="there is a GPU here")


@pytest.fixture(scope="module")
def variants(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with the named variants: the same graph that calls itself so."""
    root = tmp_path_factory.mktemp("variants")

    def make(*names: str) -> Path:
        folder = root / "-".join(names)
        if not folder.exists():
            folder.mkdir()
            for name in names:
                label(toy_model, folder / f"model.{name}.onnx", name)
        return folder

    return make


def label(model: Path, out: Path, variant: str) -> Path:
    return changed(model, out, put("variant", json.dumps(variant)))


class Fake:
    """A machine with GPUs: which libraries load, and a session that says it runs on what was asked for.

    The real session beneath runs on the CPU. `fails` is raised by a session on the GPU, `falls` leaves it out silently.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.gpus, self.lost, self.fails, self.falls = 1, set[str](), "", False
        self.asked: list[Any] = []
        self.options: list[Any] = []
        self.real = onnxruntime.InferenceSession
        patch.setattr(onnxruntime, "get_available_providers", lambda: list(ALL))
        patch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
        patch.setattr(onnxruntime, "InferenceSession", self.session)
        patch.setattr(runtime, "preload", lambda: None)
        patch.setattr(runtime, "gpu_present", lambda: self.gpus > 0)
        patch.setattr(runtime, "gpu_count", lambda: self.gpus)
        patch.setattr(runtime, "loads", lambda library: library not in self.lost)
        patch.setattr(hardware, "int8_flags", lambda: ["avx512_vnni"])
        patch.setattr(runtime, "loader_message", lambda name: "libx.so.1: cannot open" if self.falls else "")

    def session(self, path: Path, options: Any, *, providers: list[Any], enable_fallback: int) -> Any:
        assert enable_fallback == 0, "a failing provider would be replaced by the CPU"
        self.options.append(options)
        real = self.real(path, options, providers=["CPUExecutionProvider"])
        if providers[0] != "CPUExecutionProvider":
            self.asked.append(providers)
            if self.fails:
                raise RuntimeError(self.fails)
            if not self.falls:
                real.get_providers = lambda: [p if isinstance(p, str) else p[0] for p in providers]
        return real


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


# --------------------------------------------------------------------------------------------- this machine


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:3", "tensorrt", "tensorrt:1"])
@no_gpu
def test_what_cannot_be_had_here_is_an_error(toy_model: Path, device: str) -> None:
    with pytest.raises(DeviceError, match=f"^--device {device}: .*; or use --device cpu") as caught:
        open_model(toy_model, device)
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert "\n" not in text
    # A library by name, or an ONNX Runtime built without the provider; and a line to mend what pip can.
    assert "libcuda.so.1" in text or "provider: pip uninstall" in text or sys.platform != "linux"
    if device.startswith("tensorrt") and "libcuda" in text:
        assert "libnvinfer.so." in text
        assert "pip install 'tensorrt==" in text


@no_gpu
def test_auto_says_that_it_took_the_cpu_and_why(toy_model: Path) -> None:
    found = open_model(toy_model, threads=1)
    assert (found.provider, found.where) == ("CPUExecutionProvider", "CPU, 1 thread(s)")
    assert found.why == "CPU: no NVIDIA GPU visible"


@pytest.mark.parametrize(
    "device",
    [
        "gpu",
        "",
        "cuda:x",
        "cuda:-1",
        "cuda:",
        "cuda: 1",
        "cuda:²",
        "cuda:99999",
        "cpu:1",
        "CPU",
        "auto:0",
        "mps",
        "cuda\n",
    ],
)
def test_unknown_devices_are_an_error(toy_model: Path, device: str) -> None:
    with pytest.raises(DeviceError, match="is not auto, cpu, cuda, cuda:N, tensorrt or tensorrt:N"):
        open_model(toy_model, device)


def test_threads_are_as_asked(toy_model: Path, gpu: Fake) -> None:
    found = open_model(toy_model, "cpu", 3)
    assert (found.threads, gpu.options[-1].intra_op_num_threads) == (3, 3)
    assert open_model(toy_model, "cpu").threads == session.hardware.cpu_count()


def test_threads_spin_unless_told(toy_model: Path, gpu: Fake) -> None:
    """What a thread does while it waits changes no answer: the options are all that differs."""
    for spin in (True, False):
        open_model(toy_model, "cpu", 2, spin=spin)
        assert gpu.options[-1].get_session_config_entry("session.intra_op.allow_spinning") == str(int(spin))


NOISE = """
import os, sys
from cxr_fast.inference import runtime as devices
from cxr_fast.inference.session import open_model
for device in ("auto", "cuda", "cuda:7", "tensorrt"):
    try:
        open_model({model!r}, device)
    except Exception as error:
        assert type(error).__name__ == "DeviceError", error
devices.gpu_present = lambda: True
open_model({model!r}, "auto")
{extra}
"""


@no_gpu
def test_nothing_of_onnx_runtime_reaches_the_terminal(toy_model: Path) -> None:
    def said(extra: str) -> str:
        code = NOISE.format(model=str(toy_model), extra=extra)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
        return done.stdout + done.stderr

    assert said("") == ""
    # The check can fail: told to speak, ONNX Runtime does.
    loud = f"devices.onnxruntime.set_default_logger_severity(0)\nopen_model({str(toy_model)!r}, 'cpu')"
    assert said(loud) != ""


def test_warnings_of_the_first_import_are_kept_off_stderr(tmp_path: Path) -> None:
    """ONNX Runtime 1.23 to 1.30 report virtual graphics cards from C++ before Python can ask them not to."""
    code = "import os\nos.write(2, b'[W:onnxruntime] GPU device discovery failed')\n"
    code += "def set_default_logger_severity(n): os.write(2, b'then all is well again')\n"
    (tmp_path / "onnxruntime.py").write_text(code)
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport cxr_fast.inference.runtime"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == "then all is well again"


def test_a_process_without_stderr_opens_models_too(toy_model: Path) -> None:
    script = "import os; os.close(2)\nfrom cxr_fast.inference.session import open_model\n"
    script += f"print(open_model({str(toy_model)!r}, 'cpu').why)"
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True, timeout=120)
    assert done.stdout == "CPU: as asked\n"


# ---------------------------------------------------------------------------------- what stands in the way


def test_cuda_is_had_where_nothing_does(toy_model: Path, gpu: Fake) -> None:
    gpu.gpus = 2
    for device, number, where in (("auto", 0, "CUDA"), ("cuda", 0, "CUDA"), ("cuda:1", 1, "CUDA:1")):
        found = open_model(toy_model, device)
        assert (found.provider, found.where) == ("CUDAExecutionProvider", where)
        assert gpu.asked[-1] == [
            ("CUDAExecutionProvider", {"device_id": number, "use_tf32": 0}),
            "CPUExecutionProvider",
        ]
    assert open_model(toy_model).why == "CUDA: a GPU is here and its libraries load"
    assert open_model(toy_model, "cuda:1").why == "CUDA:1: as asked"
    assert open_model(toy_model, "cpu").provider == "CPUExecutionProvider"


def test_tensorrt_has_cuda_behind_it(toy_model: Path, gpu: Fake) -> None:
    found = open_model(toy_model, "tensorrt")
    assert (found.provider, found.where) == ("TensorrtExecutionProvider", "TensorRT")
    device, cuda = {"device_id": 0}, {"device_id": 0, "use_tf32": 0}
    assert gpu.asked == [
        [("TensorrtExecutionProvider", device), ("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]
    ]


LIBRARIES = ["libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10", "libcudnn.so.9"]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names of Linux")


@linux
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_that_is_missing_is_named(toy_model: Path, gpu: Fake, library: str) -> None:
    gpu.lost = {library}
    reason = f"a GPU is here, but {library} did not load: {install('gpu')}"
    for device in ("cuda", "tensorrt:0"):
        with pytest.raises(DeviceError) as caught:
            open_model(toy_model, device)
        assert str(caught.value) == f"--device {device}: {reason}; or use --device cpu."
    found = open_model(toy_model, threads=1)
    assert (found.provider, found.why) == ("CPUExecutionProvider", f"CPU: {reason}")


@linux
def test_tensorrts_library_is_named_and_its_own_pip_line(toy_model: Path, gpu: Fake) -> None:
    gpu.lost = set(runtime.tensorrt_libraries())
    version = runtime.tensorrt_libraries()[0].rpartition(".")[2]
    assert version.isdigit()
    with pytest.raises(DeviceError) as caught:
        open_model(toy_model, "tensorrt")
    assert f"libnvinfer.so.{version}" in str(caught.value)
    assert f"did not load: pip install 'tensorrt=={version}.*'; or" in str(caught.value)
    assert open_model(toy_model, "cuda").provider == "CUDAExecutionProvider"
    gpu.lost |= {"libcudnn.so.9"}
    with pytest.raises(DeviceError, match=re.escape(f"{install('gpu')} and pip install 'tensorrt==")):
        open_model(toy_model, "tensorrt")


def test_a_driver_that_does_not_load_is_named(toy_model: Path, gpu: Fake) -> None:
    gpu.lost = {runtime.DRIVER}
    with pytest.raises(DeviceError, match=f"a GPU is here, but {runtime.DRIVER} did not load: install NVIDIA's driver"):
        open_model(toy_model, "cuda")
    gpu.gpus = 0
    with pytest.raises(DeviceError, match=rf"no NVIDIA GPU visible, {runtime.DRIVER} \(the driver's\) did not load;"):
        open_model(toy_model, "cuda")


def test_a_gpu_of_a_number_that_is_not_there(toy_model: Path, gpu: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.gpus = 2
    with pytest.raises(DeviceError, match=r"--device cuda:7: there are 2 GPU\(s\) here, 0 to 1; or use"):
        open_model(toy_model, "cuda:7")
    monkeypatch.setattr(runtime, "gpu_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    reason = r"the driver shows no GPU \(CUDA_VISIBLE_DEVICES='-1'\)"
    with pytest.raises(DeviceError, match=reason):
        open_model(toy_model, "cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert open_model(toy_model).why == "CPU: the driver shows no GPU"


def test_an_onnx_runtime_without_the_provider(toy_model: Path, gpu: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(DeviceError, match="this ONNX Runtime has no CUDA provider: pip uninstall onnxruntime"):
        open_model(toy_model, "cuda")
    found = open_model(toy_model)
    assert found.provider == "CPUExecutionProvider"
    assert found.why.startswith("CPU: a GPU is here, but this ONNX Runtime has no CUDA provider: pip")


def test_falling_back_without_a_word_is_an_error(toy_model: Path, gpu: Fake) -> None:
    """All libraries are there, the session is made, and it runs on the CPU: only its own list tells."""
    gpu.falls = True
    for device in ("cuda", "tensorrt"):
        with pytest.raises(DeviceError, match=r"could not load its .* provider \(libx\.so\.1: cannot open\): pip") as e:
            open_model(toy_model, device)
        assert str(e.value).count("\n") == 1
    found = open_model(toy_model, threads=1)
    assert (found.provider, found.where) == ("CPUExecutionProvider", "CPU, 1 thread(s)")
    assert found.why.startswith("CPU: a GPU is here, but ONNX Runtime could not load its CUDA provider (libx.so.1")


def test_a_gpu_that_fails_is_an_error_and_a_broken_file_is_the_files(
    toy_model: Path, variants: Callable[..., Path], gpu: Fake, tmp_path: Path
) -> None:
    gpu.fails = "CUDA failure 2: out of memory\nexpression: cudaMalloc"
    with pytest.raises(DeviceError, match=r"could not start CUDA \(CUDA failure 2: out of memory\)"):
        open_model(toy_model, "cuda")
    found = open_model(variants("fp32", "fp16", "int8"))
    assert found.path.name == "model.int8.onnx", "float16 is the GPU's file, not the one to fall back with"
    assert found.why.startswith("CPU: a GPU is here, but ONNX Runtime could not start CUDA")
    assert found.why.endswith("; model.int8.onnx: this CPU has avx512_vnni, which int8 is fast with")
    changed(toy_model, tmp_path / "m.onnx", lambda proto: proto.graph.node.__delitem__(slice(3, None)))
    for device in ("auto", "cuda"):
        with pytest.raises(InputError, match=r"m\.onnx: not an ONNX file that runs here"):
            open_model(tmp_path / "m.onnx", device)


# ------------------------------------------------------------------------------------------ the right file


@pytest.mark.parametrize(
    ("there", "device", "flags", "taken", "why"),
    [
        ("fp32 fp16 int8", "cpu", True, "int8", "this CPU has avx512_vnni"),
        ("fp32 fp16 int8", "cpu", False, "fp32", "neither VNNI nor AMX"),
        ("fp32 fp16 int8", "auto", True, "fp16", "float16 is the fastest on a GPU"),
        ("fp32 fp16 int8", "cuda", False, "fp16", "float16 is the fastest on a GPU"),
        ("fp32 fp16 int8", "tensorrt", True, "fp16", "float16 is the fastest on a GPU"),
        ("fp32 fp16", "cpu", True, "fp32", "(model.int8.onnx, preferred, is not there)"),
        ("fp32 int8", "cuda", True, "fp32", "(model.fp16.onnx, preferred, is not there)"),
        ("fp32 fp16", "cpu", False, "fp32", "model.fp32.onnx: the only one here that a CPU runs fast"),
        ("fp32", "cpu", False, "fp32", "CPU: as asked; model.fp32.onnx: the only one here"),
        ("int8", "cpu", False, "int8", "(model.fp32.onnx, preferred, is not there)"),
        ("int8", "auto", True, "int8", "an int8 file, which has no CUDA kernels; model.int8.onnx: the only one here"),
        ("fp32", "auto", True, "fp32", "(model.fp16.onnx, preferred, is not there)"),
    ],
)
def test_of_a_folder_the_right_file_is_taken(
    variants: Callable[..., Path],
    gpu: Fake,
    monkeypatch: pytest.MonkeyPatch,
    there: str,
    device: str,
    flags: bool,
    taken: str,
    why: str,
) -> None:
    if not flags:
        monkeypatch.setattr(hardware, "int8_flags", list)
    found = open_model(variants(*there.split()), device)
    assert (found.path.name, found.variant) == (f"model.{taken}.onnx", taken)
    assert why in found.why
    assert f"; model.{taken}.onnx: " in found.why
    on_gpu = device in ("cuda", "tensorrt") or (device == "auto" and taken != "int8")
    assert (found.provider != "CPUExecutionProvider") == on_gpu


@pytest.mark.parametrize(
    ("there", "file", "device", "match"),
    [
        (
            "fp32 fp16 int8",
            "int8",
            "cuda",
            r"model\.int8\.onnx: int8 has no CUDA kernels; use .*model\.fp16\.onnx, or --d",
        ),
        ("fp32 int8", "int8", "tensorrt", r"int8 has no CUDA kernels; use .*model\.fp32\.onnx, or --device cpu"),
        ("int8", "int8", "cuda", r"use .*model\.fp32\.onnx, which is to be exported first, or --device cpu\."),
        (
            "fp32 fp16 int8",
            "fp16",
            "cpu",
            r"model\.fp16\.onnx: float16 is slower than float32 on a CPU; use .*\.int8\.onnx\.",
        ),
        ("fp32 fp16", "fp16", "cpu", r"use .*model\.fp32\.onnx\."),
        ("fp16", "fp16", "cpu", r"use .*model\.fp32\.onnx, which is to be exported first\."),
        ("fp16", None, "cpu", r"float16 is slower than float32 on a CPU"),
        ("int8", None, "cuda", r"int8 has no CUDA kernels"),
    ],
)
def test_a_file_for_another_device_is_refused_in_one_line(
    variants: Callable[..., Path], gpu: Fake, there: str, file: str | None, device: str, match: str
) -> None:
    folder = variants(*there.split())
    with pytest.raises(DeviceError, match=match) as caught:
        open_model(folder / f"model.{file}.onnx" if file else folder, device)
    assert "\n" not in str(caught.value)
    assert gpu.options == [], "refused before a session is made"
    assert open_model(folder / f"model.{file or there}.onnx", device, strict=False).variant == (file or there)


def test_auto_fits_the_device_to_the_file(
    variants: Callable[..., Path], gpu: Fake, toy_model: Path, tmp_path: Path
) -> None:
    found = open_model(variants("int8") / "model.int8.onnx")
    assert found.why == "CPU: an int8 file, which has no CUDA kernels"
    assert open_model(variants("fp16") / "model.fp16.onnx").provider == "CUDAExecutionProvider"
    gpu.gpus = 0
    with pytest.raises(DeviceError, match=r"float16 is slower than float32 on a CPU \(no NVIDIA GPU visible\); use"):
        open_model(variants("fp16") / "model.fp16.onnx")
    odd = label(toy_model, tmp_path / "mine.onnx", "fp16")
    with pytest.raises(DeviceError, match=r"mine\.onnx: .*use .*model\.fp32\.onnx"):
        open_model(odd)


def test_the_files_of_a_folder_answer_alike(variants: Callable[..., Path]) -> None:
    folder, pixels = variants("fp32", "int8"), np.full((1, 160, 160), 77, np.uint8)
    answers = [
        open_model(path, "cpu", 1).session.run(["probabilities"], {"pixels": pixels})[0]
        for path in (folder, folder / "model.fp32.onnx")
    ]
    np.testing.assert_array_equal(*answers)


def test_a_folder_without_a_model_and_a_renamed_file(toy_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such model in this folder \(model\.fp32\.onnx, .*`cxrfast export RUN`"):
        open_model(tmp_path, "cpu")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match=rf"no such model in this run folder yet; `cxrfast export {tmp_path}` makes"):
        open_model(tmp_path, "cpu")
    shutil.copy(toy_model, tmp_path / "model.int8.onnx")
    with pytest.raises(InputError, match=r"model\.int8\.onnx: its metadata say fp32; was it renamed\?"):
        open_model(tmp_path, "cpu")


def test_a_variant_of_tomorrow_is_refused(toy_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="variant 'fp4' is not fp32, fp16, int8"):
        open_model(label(toy_model, tmp_path / "m.onnx", "fp4"), "cpu")


# ------------------------------------------------------------------------------------------------ the parts


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([], False),
        (["nvidia0"], True),
        (["nvidia12"], True),
        (["nvidiactl", "nvidia-uvm", "nvidia-caps"], False),
        (["dxg"], True),
    ],
)
def test_a_gpu_is_seen_by_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: list[str], expected: bool
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in nodes:
        (tmp_path / name).touch()
    assert runtime.gpu_present(tmp_path) is expected


@linux
def test_names_follow_the_cuda_version(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for version in ("12.8", "13.0", "", None):
        monkeypatch.setattr(onnxruntime, "cuda_version", version, raising=False)
        found[version] = (runtime.cuda_libraries()[:1], runtime.optional_libraries())
    assert found["12.8"] == (("libcudart.so.12",), ("libcufft.so.11",))
    assert found["13.0"] == (("libcudart.so.13",), ("libcufft.so.12",))
    assert found[""] == found[None] == ((), ())


def test_a_library_loads_or_does_not() -> None:
    assert not runtime.loads("libsurely-nobody-has-this.so.9")
    if sys.platform.startswith("linux"):
        assert runtime.loads("libc.so.6")


@no_gpu
def test_no_driver_is_no_gpu() -> None:
    runtime.gpu_count.cache_clear()
    assert runtime.gpu_count() == 0


def test_what_preloading_prints_is_dropped(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def loud() -> None:
        print("Failed to load libx.so")
        os.write(2, b"and C++ too")
        warnings.warn("Failed to register", stacklevel=2)

    monkeypatch.setattr(onnxruntime, "preload_dlls", loud, raising=False)
    runtime.preload.__wrapped__()
    assert capfd.readouterr() == ("", "")
