"""The doctor says what is missing, in any state, and its exit code follows from it."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from cxr_fast.cli import doctor
from cxr_fast.cli.doctor import ABSENT, OK, WRONG, Finding, examine
from cxr_fast.cli.main import main
from cxr_fast.inference import runtime
from cxr_fast.system import hardware
from cxr_fast.system.extras import install

GPU = runtime.gpu_present()
ALL = [name for name, _ in (*doctor.PREDICTING, *doctor.TRAINING)]


class Machine:
    """What is installed and what the machine has, all of it invented; `find` examines it."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.patch, self.folder = patch, folder
        self.versions: dict[str, str | None] = dict.fromkeys(ALL, "99.0") | {"onnxruntime-gpu": "1.31.1"}
        self.gpu, self.names, self.lost = False, list[str](), {runtime.DRIVER}
        patch.setattr(metadata, "version", self.version)
        patch.setattr(hardware, "_gpus", lambda: self.names)
        patch.setattr(runtime, "gpu_present", lambda: self.gpu)
        patch.setattr(runtime, "gpu_count", lambda: len(self.names))
        patch.setattr(runtime, "preload", lambda: None)
        patch.setattr(runtime, "loads", lambda name: name not in self.lost)
        patch.setattr(runtime, "cuda_libraries", lambda: ("libcudart.so.13", "libcudnn.so.9"))
        patch.setattr(runtime, "optional_libraries", lambda: ("libcufft.so.12",))
        patch.setattr(runtime, "tensorrt_libraries", lambda: ("libnvinfer.so.10",))
        patch.setattr(runtime.onnxruntime, "get_available_providers", lambda: list(runtime.PROVIDERS.values()))

    def version(self, name: str) -> str:
        found = self.versions.get(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    def find(self, **options: Any) -> dict[str, Finding]:
        found = examine(folder=self.folder, **options)
        assert len({finding.name for finding in found}) == len(found)
        return {finding.name: finding for finding in found}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def wrong(found: dict[str, Finding]) -> list[str]:
    return [name for name, finding in found.items() if finding.state == WRONG]


# --------------------------------------------------------------------------------------------- what is installed


def test_a_whole_installation_is_sound(machine: Machine) -> None:
    found = machine.find()
    assert wrong(found) == []
    assert doctor.healthy(list(found.values()))
    assert found["torch"] == Finding(name="torch", state=OK, text="99.0")
    for name, extra in (("pydicom", "dicom"), ("pylibjpeg", "dicom"), ("pyarrow", "parquet")):
        assert (found[name].state, found[name].mend) == (ABSENT, install(extra))
        assert "absent; it would bring " in found[name].text


@pytest.mark.parametrize("name", ALL)
def test_a_package_that_is_missing_or_old_is_named_with_its_pip_line(machine: Machine, name: str) -> None:
    for version, text in ((None, "absent"), ("0.0.1", "0.0.1, older than ")):
        machine.versions[name] = version
        found = machine.find()
        assert wrong(found) == [name]
        assert found[name].text.startswith(text)
        assert found[name].mend.startswith(f"pip install '{name}>=")


def test_an_installation_that_only_predicts_is_sound(machine: Machine) -> None:
    for name, _ in doctor.TRAINING:
        machine.versions[name] = None
    found = machine.find(deep=True)
    assert wrong(found) == []
    assert (found["training"].state, found["training"].mend) == (ABSENT, install("train"))
    assert all(name in found["training"].text for name, _ in doctor.TRAINING)
    of_training = ("timm", "torch on CUDA", "bfloat16", "memory", "cache/", "exports/", "Hugging Face hub")
    assert found.keys().isdisjoint(of_training)


def test_a_machine_that_only_predicts_on_its_cpu_says_nothing_of_gpus(machine: Machine) -> None:
    machine.versions |= dict.fromkeys((name for name, _ in doctor.TRAINING), None)
    machine.versions |= {"onnxruntime-gpu": None, "onnxruntime": "1.31.1"}
    machine.patch.setattr(runtime, "cuda_libraries", lambda: ())
    assert not [name for name in machine.find() if "GPU" in name or "--device" in name or name.startswith("lib")]
    machine.gpu = True
    assert "--device cuda" in machine.find()


def test_two_onnx_runtimes_are_wrong(machine: Machine) -> None:
    machine.versions["onnxruntime"] = "1.31.0"
    found = machine.find()
    assert wrong(found) == ["ONNX Runtime"]
    assert found["ONNX Runtime"].text.startswith("onnxruntime-gpu 1.31.1, onnxruntime 1.31.0; they overwrite")
    assert found["ONNX Runtime"].mend == f"pip uninstall onnxruntime onnxruntime-gpu; {install('gpu')}"


def test_the_table_is_pyprojects() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def declared(lines: list[str]) -> dict[str, str]:
        parsed = [re.match(r"([\w-]+)(?:\[.*?\])?>=([\d.]+)", line) for line in lines]
        found = {match[1].replace("_", "-"): match[2] for match in parsed if match}
        assert len(found) == len([line for line in lines if not line.startswith("cxr-fast[")])
        return found

    def told(table: tuple[tuple[str, str], ...]) -> dict[str, str]:
        return {name.replace("_", "-"): least for name, least in table}

    assert declared(project["dependencies"]) == told(doctor.PREDICTING)
    nested = [name for line in extras["train"] for name in re.findall(r"^cxr-fast\[(\w+)\]$", line)]
    assert nested == ["recalibrate", "hub"]
    assert declared(extras["train"] + [line for name in nested for line in extras[name]]) == told(doctor.TRAINING)
    assert declared(extras["cpu"]) == {"onnxruntime": doctor.RUNTIME_LEAST}
    for name, least, _, extra in doctor.OPTIONAL:
        assert any(re.match(rf"{name}(\[.*\])?>={re.escape(least)}$", line) for line in extras[extra])


@pytest.mark.parametrize(
    ("older", "newer"), [("1.9", "1.10"), ("2.9.9", "2.11"), ("1.0.15rc1", "1.0.16"), ("0.1.8", "0.1.9+cpu"), ("", "1")]
)
def test_versions_compare_as_numbers(older: str, newer: str) -> None:
    assert doctor._numbers(older) < doctor._numbers(newer)
    assert doctor._numbers("2.0") == doctor._numbers("2.0.0") == doctor._numbers("2")


BLOCKED = """
import sys
for name in {names!r}:
    sys.modules[name] = None
from cxr_fast.cli import doctor
doctor.reach = lambda address: "cannot be reached"
from cxr_fast.cli.main import main
main(["doctor", *{flags!r}])
"""


@pytest.mark.parametrize("flags", [[], ["--deep"]])
@pytest.mark.parametrize("names", [["onnxruntime"], ["torch", "onnx", "h5py", "pandas"], ["numpy", "PIL"]])
def test_packages_that_do_not_import_are_no_traceback(names: list[str], flags: list[str], tmp_path: Path) -> None:
    script = BLOCKED.format(names=names, flags=flags)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.stderr == ""
    lines = {line[4:].split("  ")[0].strip(): line for line in done.stdout.splitlines()}
    assert done.returncode == int(any(line.startswith("!!") for line in lines.values()))
    if names == ["onnxruntime"]:
        assert lines["ONNX Runtime"].startswith("!!")
        assert "(ModuleNotFoundError: import of onnxruntime halted" in lines["ONNX Runtime"]
        assert done.returncode == 1
    if "torch" in names and flags:
        assert lines["torch"].startswith(("ok", "!!"))
        assert "import of torch halted" in done.stdout
    if "numpy" in names:  # which ONNX Runtime cannot be without
        assert lines["ONNX Runtime"].startswith("!!")


def test_a_plain_look_imports_nothing_heavy(tmp_path: Path) -> None:
    script = "import sys, cxr_fast.cli.doctor as d\nd.reach = lambda a: ''\nd.examine()\nprint(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert {"torch", "pandas", "h5py", "onnx", "open_clip", "timm", "sklearn"}.isdisjoint(done.stdout.split())


# ------------------------------------------------------------------------------------------------ the GPU


def test_without_a_gpu_nothing_of_it_is_needed(machine: Machine) -> None:
    machine.lost |= {"libcudart.so.13", "libcudnn.so.9", "libcufft.so.12", "libnvinfer.so.10"}
    found = machine.find()
    assert wrong(found) == []
    assert found["GPU"].state == ABSENT
    for name in ("libcudart.so.13", "libcudnn.so.9", "libcufft.so.12"):
        assert (found[name].state, found[name].mend) == (ABSENT, install("gpu"))
    assert found["libnvinfer.so.10"].mend == "pip install 'tensorrt==10.*'"
    assert found["--device cuda"].text.startswith("no NVIDIA GPU visible")


def test_with_a_gpu_all_is_well_or_named(machine: Machine) -> None:
    machine.gpu, machine.names, machine.lost = True, ["H100, 580.1, 81559 MiB"], set()
    found = machine.find()
    assert wrong(found) == []
    assert found["GPU"].text == "H100, 580.1, 81559 MiB"
    assert found["--device cuda"] == Finding(name="--device cuda", state=OK, text="can be had")
    machine.lost = {"libcudnn.so.9", "libcufft.so.12", "libnvinfer.so.10"}
    found = machine.find()
    assert wrong(found) == ["libcudnn.so.9", "--device cuda"]
    assert "a GPU is here, but libcudnn.so.9 did not load: pip install" in found["--device cuda"].text
    machine.names, machine.lost = [], {runtime.DRIVER}
    assert wrong(machine.find()) == ["GPU", "--device cuda"]


def test_deep_tries_each_provider(machine: Machine) -> None:
    found = machine.find(deep=True)
    assert found["session on CPU"] == Finding(name="session on CPU", state=OK, text="runs")
    assert found["torch"].text.startswith("99.0")
    assert found["torch imports"].state == OK
    if not GPU:
        assert (found["torch on CUDA"].state, found["session on CUDA"].state) == (ABSENT, ABSENT)
        assert found["session on CUDA"].text.startswith("no NVIDIA GPU visible")


@pytest.mark.skipif(GPU, reason="there is a GPU here")
def test_deep_finds_a_silent_fallback(machine: Machine) -> None:
    """All looks well, and yet ONNX Runtime leaves its CUDA provider out without a word."""
    machine.gpu, machine.names, machine.lost = True, ["H100"], set()
    assert wrong(machine.find()) == []
    found = machine.find(deep=True)
    assert {"session on CUDA", "torch on CUDA"} <= set(wrong(found))
    assert re.match(r"fell back to CPUExecutionProvider: \S", found["session on CUDA"].text)


def test_the_model_of_one_node_is_what_onnx_would_write() -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert onnx.load_from_string(doctor.RELU) == model


# -------------------------------------------------------------------------------------------- the machine


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_machine_that_tells_nothing_is_no_traceback(machine: Machine, tmp_path: Path) -> None:
    machine.patch.setattr(hardware, "memory_total", lambda: None)
    found = machine.find(root=tmp_path / "nothing")
    assert found["memory"].text == "unknown on this system"
    assert found["int8"].state == found["bfloat16"].state == ABSENT or sys.platform == "darwin"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_the_cpu_can_do(machine: Machine, tmp_path: Path) -> None:
    root = put(tmp_path, {"proc/cpuinfo": "model name : Toy\nflags : avx2 avx512_vnni avx512_bf16\n"})
    found = machine.find(root=root)
    assert found["CPU"].text.startswith("Toy, ")
    assert (found["int8"].state, found["bfloat16"].state) == (OK, OK)
    assert found["int8"].text.startswith("VNNI (avx512_vnni): int8 is fast")
    old = machine.find(root=put(tmp_path / "old", {"proc/cpuinfo": "model name : Old\nflags : avx2\n"}))
    assert old["int8"].state == ABSENT
    if platform.machine() in ("x86_64", "AMD64"):
        assert old["int8"].text.startswith("AVX2 only: int8 is slower; pairs of products add up in 16 bits")
    assert old["int8"].text.endswith("of a folder the float32 file is used")
    assert re.match(r"\d+ of the machine's \d+; affinity \d+, container quota", found["cores to use"].text)


def test_room_for_caches_and_exports(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(machine.folder)
    for free, states in ((6e9, [OK, OK]), (3e9, [ABSENT, OK]), (1e8, [WRONG, WRONG])):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=int(free)))
        found = machine.find()
        assert [found[name].state for name in ("cache/", "exports/")] == states
    monkeypatch.setattr(shutil, "disk_usage", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert wrong(machine.find()) == ["cache/", "exports/"]


def test_a_file_in_the_place_of_a_folder_is_wrong(machine: Machine) -> None:
    (machine.folder / "cache").write_text("")
    assert wrong(machine.find()) == ["cache/"]


# ------------------------------------------------------------------------------------------------- the hub


def test_offline_is_said_and_nothing_is_asked(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "reach", lambda address: pytest.fail("asked"))
    finding = machine.find()["Hugging Face hub"]
    assert finding.state == ABSENT
    assert finding.text.startswith("HF_HUB_OFFLINE is set")


def test_the_hub_is_asked_at_its_address(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    asked = []
    monkeypatch.setattr(doctor, "reach", lambda address: asked.append(address) or "")
    assert machine.find()["Hugging Face hub"] == Finding(
        name="Hugging Face hub", state=OK, text="http://hub.example answers"
    )
    monkeypatch.setattr(doctor, "reach", lambda address: "no answer within 3 s")
    found = machine.find()
    assert (found["Hugging Face hub"].state, wrong(found)) == (ABSENT, [])
    assert asked == ["http://hub.example"]
    monkeypatch.setenv("HF_ENDPOINT", "http://anna:PASS@hub.example:80")
    assert machine.find()["Hugging Face hub"].text == "http://hub.example:80: no answer within 3 s"


def test_reaching_never_hangs_and_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def answer(error: Exception | None) -> Any:
        def urlopen(*_: Any, **__: Any) -> Any:
            if error is not None:
                raise error
            over.wait()

        return urlopen

    monkeypatch.setattr(urllib.request, "urlopen", answer(None))
    assert doctor.reach("http://hub.example", 0.05) == "no answer within 0.05 s"
    over.set()
    monkeypatch.setattr(urllib.request, "urlopen", answer(urllib.error.URLError("name unknown")))
    assert doctor.reach("http://hub.example", 60) == "cannot be reached (<urlopen error name unknown>)"
    refused = urllib.error.HTTPError("http://hub.example", 403, "no", {}, None)  # type: ignore[arg-type]
    monkeypatch.setattr(urllib.request, "urlopen", answer(refused))
    assert doctor.reach("http://hub.example", 60) == ""
    refused.close()
    monkeypatch.undo()
    assert "cannot be reached" in doctor.reach("no address at all", 5)


# --------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("missing", [None, "h5py"])
def test_the_command(machine: Machine, monkeypatch: pytest.MonkeyPatch, missing: str | None) -> None:
    monkeypatch.chdir(machine.folder)
    if missing:
        machine.versions[missing] = None
    result = CliRunner().invoke(main, ["doctor", "--json", "d.json"])
    assert result.exit_code == (1 if missing else 0), result.output
    saved = json.loads(Path("d.json").read_text())
    assert (saved["kind"], saved["healthy"]) == ("cxr-fast doctor", not missing)
    *lines, last = result.stdout.splitlines()
    assert last == "wrote d.json"
    assert [line[:4] for line in lines] == [f"{finding['state']}  " for finding in saved["findings"]]
    if missing:
        assert re.search(r"^!!  h5py +absent: pip install 'h5py>=3.11'$", result.stdout, re.MULTILINE)
    assert [dataclasses.asdict(finding) for finding in machine.find().values()] == saved["findings"]
